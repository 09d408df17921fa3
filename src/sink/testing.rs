//! Operations and a context for the sinks' own tests.

use std::sync::Arc;

use super::{Operation, SinkContext};
use crate::clock::Clock;
use crate::record::Record;
use crate::testing;
use crate::transform::Event;

/// A context whose clock stands at 2021-01-01T00:00:00Z.
pub(super) fn context() -> SinkContext {
    SinkContext {
        folder: std::env::temp_dir(),
        namespace: "orders".into(),
        sink: "main".into(),
        clock: Clock::manual(testing::NEW_YEAR),
    }
}

/// An operation with this payload and nothing else.
pub(super) fn operation(payload: &str) -> Operation {
    operation_with(payload, |_| {})
}

/// An operation with this payload, its record changed first.
pub(super) fn operation_with(payload: &str, change: impl FnOnce(&mut Record)) -> Operation {
    let mut record = testing::record(payload);
    change(&mut record);
    Operation { event: Event::original(Arc::new(record)), case: 0, region: None }
}
