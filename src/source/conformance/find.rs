//! Where a write is, on its way from the shelf through the log to its end.

use std::time::Duration;

use super::{Kind, PATIENCE, append, branch, id_of, settle_to, until_end, write};
use crate::record::RecordId;
use crate::source::{BranchName, Fate, Found, Scheduled, Start, Write};

/// What each branch made of a record that is in the log.
async fn fates<K: Kind>(kind: &K, id: RecordId) -> Vec<(BranchName, Fate)> {
    match kind.log().find(id).await.unwrap() {
        Some(Found::InLog { record, branches, .. }) if record.id == id => branches,
        other => panic!("{other:?}"),
    }
}

pub(super) async fn a_write_is_found_on_its_way<K: Kind>(kind: K) {
    let (log, shelf) = (kind.log(), kind.shelf());
    log.open_branch(&branch(), Start::Earliest).await.unwrap();
    // One that passes nothing keeps the records from being forgotten.
    let behind = BranchName::new("behind", None);
    log.open_branch(&behind, Start::Earliest).await.unwrap();
    let due_at = kind.clock().now().saturating_add(Duration::from_secs(60));
    let parked = log.admit(vec![Write { due_at: Some(due_at), ..write(None, "later") }]).await.unwrap();
    let parked = id_of(&parked[0]);
    assert!(matches!(log.find(parked).await.unwrap(), Some(Found::Parked { due_at: found, .. }) if found == due_at));
    let cancelled = log.admit(vec![Write { due_at: Some(due_at), ..write(None, "never") }]).await.unwrap();
    let cancelled = id_of(&cancelled[0]);
    shelf.cancel(Scheduled::Id(cancelled)).await.unwrap();
    assert_eq!(log.find(cancelled).await.unwrap(), Some(Found::Cancelled));
    let ids: Vec<RecordId> = append(&log, &["0", "1", "2"]).await.iter().map(id_of).collect();
    for id in &ids {
        let mut fates = fates(&kind, *id).await;
        fates.sort_by(|one, other| one.0.cmp(&other.0));
        assert_eq!(fates, [(behind.clone(), Fate::Pending), (branch(), Fate::Pending)]);
    }
    settle_to(&shelf, 1).await;
    let deadline = std::time::Instant::now() + PATIENCE;
    let ended =
        |fates: &[(BranchName, Fate)]| fates.iter().all(|(name, fate)| (*fate == Fate::Pending) == (*name == behind));
    while !ended(&fates(&kind, ids[0]).await) {
        assert!(std::time::Instant::now() < deadline, "{:?}", fates(&kind, ids[0]).await);
    }
    assert!(fates(&kind, ids[1]).await.iter().all(|(_, fate)| *fate == Fate::Pending));
    kind.clock().advance(Duration::from_secs(61));
    until_end(&log, 4).await;
    // It may be in the log for a moment before the shelf has let it go.
    while let Some(Found::Parked { .. }) = log.find(parked).await.unwrap() {
        assert!(std::time::Instant::now() < deadline, "it is parked for ever");
    }
    assert!(fates(&kind, parked).await.iter().all(|(_, fate)| *fate == Fate::Pending));
    let never = RecordId::new(kind.clock().now(), 1, 1, 7);
    assert_eq!(log.find(never).await.unwrap(), None);
}
