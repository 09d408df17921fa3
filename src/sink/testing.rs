//! Operations and a context for the sinks' own tests.

use std::sync::Arc;

use bytes::Bytes;

use super::{Operation, SinkContext};
use crate::clock::{Clock, Timestamp};
use crate::record::{Record, RecordId};
use crate::transform::Event;

/// A context whose clock stands at 2021-01-01T00:00:00Z.
pub(super) fn context() -> SinkContext {
    SinkContext {
        folder: std::env::temp_dir(),
        namespace: "orders".into(),
        sink: "main".into(),
        clock: Clock::manual(Timestamp::from_millis(1_609_459_200_000)),
    }
}

/// An operation with this payload and nothing else.
pub(super) fn operation(payload: &str) -> Operation {
    operation_with(payload, |_| {})
}

/// An operation with this payload, its record changed first.
pub(super) fn operation_with(payload: &str, change: impl FnOnce(&mut Record)) -> Operation {
    let mut record = Record {
        id: RecordId::new(Timestamp::from_millis(1_609_459_200_000), 1, 7, 42),
        written_at: Timestamp::from_millis(1_609_459_200_000),
        due_at: None,
        key: None,
        headers: Vec::new(),
        target: None,
        priority: None,
        tags: Vec::new(),
        origin: None,
        idempotency_key: None,
        epoch: 1,
        binary: false,
        payload: Bytes::copy_from_slice(payload.as_bytes()),
    };
    change(&mut record);
    Operation { event: Event::original(Arc::new(record)), case: 0, region: None }
}
