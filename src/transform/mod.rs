//! What scripts and expressions make of a record: the chain of stages, and the view that they see.
//!
//! A [`Transform`] is a function of (record, revision of the file): the same record gives the same events in every
//! region, on every retry and after a restart. Payloads that no stage looks into stay untouched bytes.

mod event;

pub use event::{Event, NotJson};

/// What a chain of stages made of one event.
#[derive(Debug)]
pub enum Outcome {
    /// Send these on, in order; one event unless `emit` made children.
    Deliver(Vec<Event>),
    /// A filter or `drop()` ended it, by name of the stage.
    Drop(Box<str>),
}

/// A stage failed on a record: the record's error, no retry, dead letter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{stage}: {message}")]
pub struct Fault {
    /// The stage, for example `transform[1]` or `sink.route[0].when`.
    pub stage: Box<str>,
    /// What went wrong, with the place in the pipeline file or script.
    pub message: Box<str>,
}
