//! What the tests of this folder share: one change of every kind, and small records.

use std::sync::Arc;

use bytes::Bytes;

use super::change::{Change, Sequence};
use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::{AsideRow, BranchName, DeadLetter, DeadReason, IdempotencyKey, RowKey, StoredPause};

/// A record with this key and payload.
pub(crate) fn record(key: Option<&str>, payload: &str) -> Record {
    let payload = Bytes::copy_from_slice(payload.as_bytes());
    let bare = Record::new(RecordId::from_bytes([0; 16]), Timestamp::MIN, payload);
    Record { key: key.map(Into::into), ..bare }
}

/// One change of every kind, with every optional part once there and once not.
pub(crate) fn every_change() -> Vec<Change> {
    let mut encoded = Vec::new();
    record(Some("k"), "{}").encode(&mut encoded);
    let encoded = Bytes::from(encoded);
    let branch = BranchName::new("orders", Some("eu"));
    let at = Timestamp::from_millis(1_764_000_000_000);
    let row = RowKey { position: Position(5), child: 2 };
    let key = IdempotencyKey { key: "once".into(), fingerprint: [7; 16] };
    let aside = AsideRow {
        row,
        lane: "k".into(),
        record: Arc::new(record(Some("k"), "{}")),
        rendered: Some(Bytes::from_static(b"r")),
        attempts: 3,
        first_failed: at,
        next_try: at,
        last_error: "no".into(),
        replayed: true,
    };
    let letter = DeadLetter {
        row,
        branch: branch.clone(),
        at,
        reason: DeadReason::Exhausted,
        attempts: 8,
        last_error: "500".into(),
        stage: "sink".into(),
        revision: "abc".into(),
        record: Arc::new(record(None, "[]")),
        rendered: None,
        overtaken: true,
    };
    vec![
        Change::Append { position: Position(1), record: encoded.clone(), idempotency: Some(key.clone()) },
        Change::Append { position: Position(2), record: encoded.clone(), idempotency: None },
        Change::Park { due_at: at, record: encoded.clone(), idempotency: Some(key) },
        Change::Release { position: Position(3), parked: Sequence(4), due_at: at, record: encoded.clone() },
        Change::Cancel { parked: Sequence(4), due_at: at, id: RecordId::from_bytes([3; 16]) },
        Change::Move { parked: Sequence(4), from: at, due_at: at, record: encoded },
        Change::Cursor { branch: branch.clone(), position: Position(6) },
        Change::Aside { branch: branch.clone(), row: Box::new(aside.clone()) },
        Change::Aside {
            branch: branch.clone(),
            row: Box::new(AsideRow { rendered: None, replayed: false, ..aside.clone() }),
        },
        Change::Returned { branch: branch.clone(), row },
        Change::Dead { letter: Box::new(letter.clone()) },
        Change::Dead {
            letter: Box::new(DeadLetter { rendered: Some(Bytes::from_static(b"x")), overtaken: false, ..letter }),
        },
        Change::Overtaken { branch: branch.clone(), row },
        Change::Replay { branch: branch.clone(), row: Box::new(aside) },
        Change::Purge { branch: branch.clone(), row },
        Change::Dropped { branch: branch.clone(), position: Position(7), reason: "filter".into() },
        Change::Mark { branch: branch.clone(), position: Position(8) },
        Change::Pause {
            branch: branch.clone(),
            pause: Some(StoredPause { cause: "operator".into(), note: "n".into(), since: at }),
        },
        Change::Pause { branch: branch.clone(), pause: None },
        Change::BranchOpened { branch: branch.clone(), position: Position(9) },
        Change::BranchRenamed { from: branch.clone(), to: BranchName::new("x", None) },
        Change::BranchForgotten { branch },
        Change::Epoch { number: 2, after: Position(9), files: Bytes::from_static(b"files") },
        Change::Trim { first: Position(4) },
        Change::NamespaceCreated { name: "orders".into() },
        Change::NamespaceDeleted,
        Change::Started { clean: true },
        Change::Stopped,
    ]
}
