//! Where a write is: the shelf is asked first, then the broker, so that one that is released meanwhile is not missed.

use std::sync::Arc;

use super::Inner;
use super::store::StoredRecord;
use crate::record::RecordId;
use crate::source::{BranchName, Fate, Found, LogError};

impl Inner {
    /// Where it is; of `branches` those that keep rows of it say what they made of it, of the others only whether they have
    /// finished is known.
    pub(super) async fn find(
        self: Arc<Self>,
        id: RecordId,
        branches: Vec<BranchName>,
    ) -> Result<Option<Found>, LogError> {
        self.still_open()?;
        let stored = match &self.store {
            Some(store) => store.find(id).await?,
            None => None,
        };
        let (record, position, mut fates) = match stored {
            Some(StoredRecord::Parked { record, due_at }) => return Ok(Some(Found::Parked { record, due_at })),
            Some(StoredRecord::Cancelled) => return Ok(Some(Found::Cancelled)),
            Some(StoredRecord::Rows { record, position, branches }) => (record, position, branches),
            // A search costs more than a row: ids of other namespaces are not searched for.
            None if id.namespace_number() == self.settings.number & 0x00FF_FFFF => {
                let Some((position, record)) = self.broker.locate(id).await? else { return Ok(None) };
                (record, position, Vec::new())
            }
            None => return Ok(None),
        };
        let others: Vec<_> = branches.into_iter().filter(|name| fates.iter().all(|(known, _)| known != name)).collect();
        let unfinished = self.broker.unfinished(position, others.clone()).await?;
        fates.extend(others.into_iter().map(|name| {
            let pending = unfinished.contains(&name);
            (name, if pending { Fate::Pending } else { Fate::Finished { after: None, before: None } })
        }));
        Ok(Some(Found::InLog { record, position, branches: fates }))
    }
}
