//! What a namespace brings along from another log: what is parked, set aside and dead, and the keys that were seen.
//!
//! Each call may be made again after it failed: what is there already stays as it is.

use std::sync::Arc;

use super::store::{Claim, Claimed, Parking, Store};
use super::{Foreign, Inner};
use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::embedded::change::NamespaceNumber;
use crate::source::embedded::keys::key_hash;
use crate::source::embedded::state::KeptKey;
use crate::source::{AsideRow, BranchName, DeadLetter, IdempotencyKey, LogError, ParkedRow, Reach, RowKey, Settlement};

/// The name, among the hashed keys, under which it is kept by which number keys are hashed.
const HASHED_BY: &str = "hashed-by";
/// So late that no window ends before.
const FOR_EVER: Timestamp = Timestamp::from_millis(253_000_000_000_000);

fn text(hash: &[u8; 16]) -> Box<str> {
    format!("{:032x}", u128::from_be_bytes(*hash)).into()
}

fn bare(id: RecordId, written_at: Timestamp, due_at: Option<Timestamp>) -> Arc<Record> {
    Arc::new(Record { due_at, ..Record::new(id, written_at, bytes::Bytes::new()) })
}

impl Inner {
    /// Keys as the shelf keeps them: hashed, so that those of another log, which had only hashes, are found too.
    pub(super) async fn hashed(&self, store: &Arc<dyn Store>, key: IdempotencyKey) -> Result<IdempotencyKey, LogError> {
        let number = *self.hashed_by.get_or_try_init(|| self.find_number(store)).await?;
        Ok(IdempotencyKey { key: text(&key_hash(NamespaceNumber(number), &key.key)), ..key })
    }

    async fn find_number(&self, store: &Arc<dyn Store>) -> Result<u32, LogError> {
        let key = IdempotencyKey { key: HASHED_BY.into(), fingerprint: [0; 16] };
        let record = bare(RecordId::new(FOR_EVER, 0, self.settings.number, 0), FOR_EVER, None);
        let id = record.id;
        let claimed = store.claim(vec![Claim { record, key }], Timestamp::MIN).await?;
        match claimed.first() {
            Some(Claimed::Known { fingerprint: [a, b, c, d, ..], .. }) => Ok(u32::from_le_bytes([*a, *b, *c, *d])),
            Some(Claimed::Fresh { .. }) => {
                store.give_up(vec![(HASHED_BY.into(), id)]).await?;
                Ok(self.settings.number)
            }
            Some(Claimed::Running) | None => Ok(self.settings.number),
        }
    }
}

impl Foreign {
    /// Whether it can keep what waits.
    pub fn has_shelf(&self) -> bool {
        self.inner.store.is_some()
    }

    /// Keeps keys that another log hashed under `number`, and hashes by that number from now on. To be called, if with no
    /// key, before the first write.
    ///
    /// # Errors
    /// When there is no shelf or it cannot be reached.
    pub async fn import_keys(&self, keys: Vec<KeptKey>, number: u32) -> Result<(), LogError> {
        let store = self.inner.store()?;
        let mut fingerprint = [0; 16];
        fingerprint.iter_mut().zip(number.to_le_bytes()).for_each(|(to, from)| *to = from);
        let by = IdempotencyKey { key: HASHED_BY.into(), fingerprint };
        let mark = Claim { record: bare(RecordId::new(FOR_EVER, 0, number, 0), FOR_EVER, None), key: by };
        let claim = |kept: KeptKey| Claim {
            record: bare(kept.seen.id, kept.seen.written_at, kept.seen.due_at),
            key: IdempotencyKey { key: text(&kept.hash), fingerprint: kept.seen.fingerprint },
        };
        let claims: Vec<Claim> = std::iter::once(mark).chain(keys.into_iter().map(claim)).collect();
        let ids = claims.iter().map(|claim| (claim.key.key.clone(), claim.record.id)).collect();
        store.claim(claims, Timestamp::MIN).await?;
        store.confirm(ids).await
    }

    /// Parks what was parked elsewhere, under the ids that it has.
    ///
    /// # Errors
    /// When there is no shelf or it cannot be reached.
    pub async fn import_parked(&self, rows: Vec<ParkedRow>) -> Result<(), LogError> {
        let due = |row: ParkedRow| Parking {
            record: Arc::new(Record { due_at: Some(row.due_at), ..(*row.record).clone() }),
            key: None,
        };
        self.inner.store()?.park(rows.into_iter().map(due).collect()).await.map(|_| ())
    }

    /// Keeps rows that were set aside or died elsewhere. `numbers` counts them over all calls for a branch, in the order that
    /// a key's rows are to keep.
    ///
    /// # Errors
    /// When there is no shelf or it cannot be reached.
    pub async fn import_rows(
        &self,
        branch: &BranchName,
        aside: Vec<AsideRow>,
        dead: Vec<DeadLetter>,
        numbers: &mut u32,
    ) -> Result<(), LogError> {
        let (inner, store) = (&self.inner, self.inner.store()?);
        store.open_branch(branch, &Reach::none(), &inner.instance).await?;
        // Before the first place of the part that the key's records will be in: whoever reads that part has the rows too.
        let mut place = |record: &Record| {
            *numbers += 1;
            let part = inner.broker.part_of(record.key.as_deref());
            RowKey { position: Position::in_part(part, 0), child: *numbers }
        };
        // It is another log's record: the original is run again, as for a replay.
        let aside = aside.into_iter().map(|row| AsideRow { row: place(&row.record), replayed: true, ..row }).collect();
        let dead = dead.into_iter().map(|letter| DeadLetter { row: place(&letter.record), ..letter }).collect();
        store.settle(branch, vec![Settlement { aside, dead, ..Settlement::default() }]).await?;
        store.leave_branch(branch, &inner.instance).await
    }
}
