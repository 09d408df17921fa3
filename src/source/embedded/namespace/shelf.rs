//! The shelf's verbs: settle, what is set aside, what is parked, what is dead.

use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::{BoxFuture, ready};

use super::EmbeddedNamespace;
use crate::clock::Timestamp;
use crate::record::Record;
use crate::source::embedded::change::{Change, Sequence};
use crate::source::embedded::queue::{Answer, Draft, want_cursor};
use crate::source::embedded::state::WaitingRow;
use crate::source::{
    AsideLane, AsideRow, BranchName, DeadLetter, DeadQuery, LogError, Page, ParkedQuery, ParkedRow, Replayed,
    Scheduled, Settlement, Shelf, ShelfCounts,
};

/// Rows that one group changes at most.
const GROUP: usize = 500;
/// Looks that a cancel or move makes before it gives up on a row that keeps changing.
const LOOKS: usize = 8;

fn damaged(what: &str) -> LogError {
    LogError::Damaged(format!("{what} in state.db cannot be read").into())
}

fn changes(branch: &BranchName, settlement: Settlement) -> Vec<Change> {
    let Settlement { frontier, ended: _, aside, returned, dead, dropped, mark, pause, overtaken } = settlement;
    let name = || branch.clone();
    let mut changes: Vec<Change> = Vec::new();
    changes.extend(aside.into_iter().map(|row| Change::Aside { branch: name(), row: Box::new(row) }));
    changes.extend(dead.into_iter().map(|letter| Change::Dead { letter: Box::new(letter) }));
    changes.extend(returned.into_iter().map(|row| Change::Returned { branch: name(), row }));
    changes.extend(overtaken.into_iter().map(|row| Change::Overtaken { branch: name(), row }));
    changes.extend(dropped.into_iter().map(|(position, reason)| Change::Dropped { branch: name(), position, reason }));
    changes.extend(mark.map(|position| Change::Mark { branch: name(), position }));
    changes.extend(pause.map(|pause| Change::Pause { branch: name(), pause }));
    changes.extend(frontier.iter().map(|position| Change::Cursor { branch: name(), position }));
    changes
}

impl EmbeddedNamespace {
    async fn rows_of(&self, which: Scheduled) -> Result<(Vec<WaitingRow>, Sequence), LogError> {
        let looked = self.shared.flushed().await?;
        let number = self.space.number;
        let rows = self
            .ask(move |reader| match which {
                Scheduled::Id(id) => Ok(reader.parked_by_id(id)?.into_iter().collect()),
                Scheduled::Key(key) => reader.parked_by_key(number, &key),
            })
            .await?;
        Ok((rows, looked))
    }

    /// Changes parked rows as `draft` says; the writer decides which of them still wait (LOG.md 24).
    async fn change_parked(
        self,
        which: Scheduled,
        draft: impl Fn(&WaitingRow) -> Option<Draft> + Send + 'static,
    ) -> Result<u64, LogError> {
        let mut changed = 0;
        for _ in 0..LOOKS {
            let (rows, looked) = self.rows_of(which.clone()).await?;
            let mut again = false;
            for rows in rows.chunks(GROUP) {
                let drafts: Vec<Draft> = rows.iter().filter_map(&draft).collect();
                if drafts.is_empty() {
                    continue;
                }
                match self.shared.change_looked(&self.space, drafts, looked).await? {
                    Answer::Done(count) => changed += count,
                    _ => again = true,
                }
            }
            if !again {
                self.shared.due_news.notify_one();
                return Ok(changed);
            }
        }
        Err(LogError::Closed("its parked records keep changing, try again".into()))
    }

    async fn replay_all(self, query: DeadQuery, force: bool) -> Result<Replayed, LogError> {
        let _one = self.redrive.lock().await;
        let number = self.space.number;
        let page = self.ask(move |reader| reader.dead_page(number, &query)).await?;
        let now = self.shared.clock.now();
        let (overtaken, back): (Vec<DeadLetter>, Vec<DeadLetter>) =
            page.rows.into_iter().partition(|letter| letter.overtaken && !force);
        let replayed = back.len() as u64;
        let mut changes = back.into_iter().map(|letter| replay(letter, now)).peekable();
        while changes.peek().is_some() {
            self.change(changes.by_ref().take(GROUP).collect()).await?;
        }
        self.space.replays.notify_waiters();
        Ok(Replayed { replayed, overtaken: overtaken.len() as u64 })
    }

    async fn purge_all(self, query: DeadQuery) -> Result<u64, LogError> {
        let _one = self.redrive.lock().await;
        let number = self.space.number;
        let mut purged = 0;
        loop {
            let limit = GROUP.min(query.rows() - purged);
            let page = DeadQuery { limit, ..query.clone() };
            let letters = if limit == 0 {
                Vec::new()
            } else {
                self.ask(move |reader| reader.dead_page(number, &page)).await?.rows
            };
            if letters.is_empty() {
                return Ok(purged as u64);
            }
            purged += letters.len();
            let purge = |letter: DeadLetter| Change::Purge { branch: letter.branch, row: letter.row };
            self.change(letters.into_iter().map(purge).collect()).await?;
        }
    }

    async fn wait_for_replays(self, branch: BranchName) -> Vec<AsideLane> {
        loop {
            let news = self.space.replays.notified();
            tokio::pin!(news);
            // Registered before the look, so that no news falls between.
            news.as_mut().enable();
            let lanes = self.space.replayed.lock().remove(&branch).unwrap_or_default();
            let mut found = Vec::new();
            for lane in lanes {
                let (number, branch) = (self.space.number, branch.clone());
                if let Ok(rows) = self.ask(move |reader| reader.aside_lanes(number, &branch, Some(&lane))).await {
                    found.extend(rows);
                }
            }
            if !found.is_empty() {
                return found;
            }
            news.await;
        }
    }
}

/// A dead letter on its way back.
fn replay(letter: DeadLetter, now: Timestamp) -> Change {
    Change::Replay { branch: letter.branch.clone(), row: Box::new(AsideRow::replayed(letter, now)) }
}

impl Shelf for EmbeddedNamespace {
    fn settle(&self, branch: &BranchName, settlement: Settlement) -> BoxFuture<'static, Result<(), LogError>> {
        if settlement.is_frontier_only() {
            if let Some(reason) = self.shared.refusal() {
                return ready(Err(LogError::Closed(reason))).boxed();
            }
            if !settlement.frontier.is_empty() {
                want_cursor(&self.shared.queue, &self.space, branch, settlement.frontier.single());
            }
            return ready(Ok(())).boxed();
        }
        let changes = changes(branch, settlement);
        let drafts = changes.into_iter().map(Draft::Change).collect();
        // Queued now, so that settlements become durable in the order of their calls.
        self.shared.change_now(&self.space, drafts)
    }

    fn aside_rows(
        &self,
        branch: &BranchName,
        lane: &str,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<AsideRow>, LogError>> {
        let (namespace, branch, lane) = (self.clone(), branch.clone(), lane.to_owned());
        let number = self.space.number;
        async move { namespace.ask(move |reader| reader.aside_rows(number, &branch, &lane, limit)).await }.boxed()
    }

    fn replayed_lanes(&self, branch: &BranchName) -> BoxFuture<'static, Vec<AsideLane>> {
        self.clone().wait_for_replays(branch.clone()).boxed()
    }

    fn parked(&self, query: ParkedQuery) -> BoxFuture<'static, Result<Page<ParkedRow>, LogError>> {
        let namespace = self.clone();
        async move {
            let number = namespace.space.number;
            let page = namespace.ask(move |reader| reader.parked_page(number, &query)).await?;
            let row = |row: WaitingRow| {
                let record = Record::decode(&row.record).map_err(|_| damaged("a parked record"))?;
                Ok(ParkedRow { record: Arc::new(record), due_at: row.due_at })
            };
            let rows = page.rows.into_iter().map(row).collect::<Result<_, LogError>>()?;
            Ok(Page { rows, next: page.next })
        }
        .boxed()
    }

    fn cancel(&self, which: Scheduled) -> BoxFuture<'static, Result<u64, LogError>> {
        let draft = |row: &WaitingRow| {
            let id = Record::peek_id(&row.record)?;
            Some(Draft::Cancel { parked: row.parked, due_at: row.due_at, id })
        };
        self.clone().change_parked(which, draft).boxed()
    }

    fn reschedule(&self, which: Scheduled, due_at: Timestamp) -> BoxFuture<'static, Result<u64, LogError>> {
        let draft = move |row: &WaitingRow| {
            let record = Record { due_at: Some(due_at), ..Record::decode(&row.record).ok()? };
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            Some(Draft::Move { parked: row.parked, from: row.due_at, due_at, record: bytes.into() })
        };
        self.clone().change_parked(which, draft).boxed()
    }

    fn dead_letters(&self, query: DeadQuery) -> BoxFuture<'static, Result<Page<DeadLetter>, LogError>> {
        let namespace = self.clone();
        let number = self.space.number;
        async move { namespace.ask(move |reader| reader.dead_page(number, &query)).await }.boxed()
    }

    fn replay(&self, query: DeadQuery, force: bool) -> BoxFuture<'static, Result<Replayed, LogError>> {
        self.clone().replay_all(query, force).boxed()
    }

    fn purge(&self, query: DeadQuery) -> BoxFuture<'static, Result<u64, LogError>> {
        self.clone().purge_all(query).boxed()
    }

    fn counts(&self) -> ShelfCounts {
        let counts = self.shared.reader.counts();
        ShelfCounts {
            parked: counts.parked(self.space.number).0,
            aside: counts.aside(self.space.number),
            dead: counts.dead(self.space.number),
            keys_since: Some(self.space.keys_known_since(self.shared.clock.now())),
            overflowed: self.overflowed(),
        }
    }
}
