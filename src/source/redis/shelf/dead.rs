//! The dead letters: listed, sent back, removed.

use redis::Pipeline;

use super::rows::Head;
use super::scripts::{LETTERS, PURGE, REPLAY};
use super::{ROWS, Shelf, rows};
use crate::record::RecordId;
use crate::source::redis::link::Failed;
use crate::source::{AsideRow, BranchName, DeadLetter, DeadQuery, LogError, Page, Replayed};

/// A letter that is meant: its number, its branch, what is known of it without its record.
struct Meant {
    number: String,
    branch: BranchName,
    head: Head,
}

impl Shelf {
    /// Whether a letter is meant, and of which branch it is.
    fn fits(&self, query: &DeadQuery, head: &Head) -> Option<BranchName> {
        let name = {
            let seen = self.seen.lock();
            seen.branches.iter().find(|(_, number)| **number == head.branch).map(|(name, _)| name.clone())
        };
        let name = name?;
        let id = RecordId::from_bytes(head.id);
        let fits = query.takes(head.letter(), &name, &id, head.key.as_deref());
        fits.then_some(name)
    }

    /// The first letters that are meant, and whether there are more.
    async fn meant(&self, query: &DeadQuery) -> Result<(Vec<Meant>, bool), LogError> {
        let limit = query.rows();
        let mut after = query.after_number().to_string();
        let mut found = Vec::new();
        // Another process may have opened a branch or given it another name.
        self.refresh_all().await?;
        loop {
            let call = self.call(&LETTERS).arg(after.as_str());
            let page: Vec<(String, Vec<u8>, u8)> = self.ask("read dead letters", call, false).await?;
            let whole = page.len() == ROWS;
            for (number, head, overtaken) in page {
                after.clone_from(&number);
                let head = Head::of(&head, overtaken == 1)?;
                let Some(branch) = self.fits(query, &head) else { continue };
                if found.len() == limit {
                    return Ok((found, true));
                }
                found.push(Meant { number, branch, head });
            }
            if !whole {
                return Ok((found, false));
            }
        }
    }

    /// The whole letters; those that are gone since are left out.
    async fn whole(&self, meant: &[Meant]) -> Result<Vec<(usize, DeadLetter)>, LogError> {
        if meant.is_empty() {
            return Ok(Vec::new());
        }
        let failed = |failed: Failed| failed.storage("read dead letters on the shelf");
        let open = self.link.open().await.map_err(failed)?;
        let mut letters = Vec::with_capacity(meant.len());
        for (page, chunk) in meant.chunks(64).enumerate() {
            let mut pipeline = Pipeline::new();
            for one in chunk {
                pipeline.cmd("HGET").arg(format!("{}:db", self.root)).arg(&one.number);
            }
            let answers = self.link.run(&open, &mut pipeline).await.map_err(failed)?;
            for (index, (one, answer)) in chunk.iter().zip(answers).enumerate() {
                let value = self.link.answer(answer).map_err(failed)?;
                let body: Option<Vec<u8>> =
                    redis::from_redis_value(value).map_err(|_| rows::damaged("a dead letter"))?;
                if let Some(body) = body {
                    letters.push((page * 64 + index, one.head.with(&one.branch, body)?));
                }
            }
        }
        Ok(letters)
    }

    pub(super) async fn dead_page(&self, query: DeadQuery) -> Result<Page<DeadLetter>, LogError> {
        let (meant, more) = self.meant(&query).await?;
        let rows = self.whole(&meant).await?.into_iter().map(|(_, letter)| letter).collect();
        Ok(Page { rows, next: meant.last().filter(|_| more).map(|last| last.number.clone()) })
    }

    pub(super) async fn replay_all(&self, query: DeadQuery, force: bool) -> Result<Replayed, LogError> {
        let now = self.context.clock.now();
        let (meant, _) = self.meant(&query).await?;
        let mut answer = Replayed::default();
        for meant in meant.chunks(ROWS) {
            let mut call = self.call(&REPLAY).number(u8::from(force));
            for (index, letter) in self.whole(meant).await? {
                let Some(one) = meant.get(index) else { continue };
                let row = AsideRow::replayed(letter, now);
                call = call
                    .arg(one.number.as_str())
                    .arg(one.head.branch.as_str())
                    .arg(rows::row_key(row.row))
                    .arg(one.head.id)
                    .number(one.head.bytes)
                    .arg(rows::aside_head(&row))
                    .arg(rows::body(&row.record, None));
            }
            let (replayed, overtaken): (u64, u64) = self.ask("replay", call, true).await?;
            answer.replayed += replayed;
            answer.overtaken += overtaken;
        }
        self.told();
        Ok(answer)
    }

    pub(super) async fn purge_all(&self, query: DeadQuery) -> Result<u64, LogError> {
        let (meant, _) = self.meant(&query).await?;
        let mut purged = 0;
        for meant in meant.chunks(ROWS) {
            let mut call = self.call(&PURGE);
            for one in meant {
                call = call
                    .arg(one.number.as_str())
                    .arg(one.head.branch.as_str())
                    .arg(rows::row_key(one.head.letter().row))
                    .arg(one.head.id)
                    .number(one.head.bytes);
            }
            purged += self.ask::<u64>("purge", call, true).await?;
        }
        self.told();
        Ok(purged)
    }
}
