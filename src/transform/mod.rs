//! What scripts and expressions make of a record: the chain of stages, and the view that they see.
//!
//! A [`Transform`] is a function of (record, revision of the file): the same record gives the same events in every
//! region, on every retry and after a restart. Payloads that no stage looks into stay untouched bytes.

mod event;

use std::sync::Arc;

use crate::clock::Timestamp;

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

/// A chain of stages, compiled. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Transform {
    stages: Arc<[Box<str>]>,
}

impl Transform {
    /// True when there is no stage: events pass untouched.
    pub fn is_empty(&self) -> bool {
        self.stages.is_empty()
    }
}

/// A condition on an event, compiled. Only reads. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Predicate {
    source: Arc<str>,
}

impl Predicate {
    /// The expression as it was written.
    pub fn source(&self) -> &str {
        &self.source
    }
}

/// An expression that gives a number or a time, compiled. Only reads. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Expression {
    source: Arc<str>,
}

impl Expression {
    /// The expression as it was written.
    pub fn source(&self) -> &str {
        &self.source
    }
}

/// What an expression for a delay gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DelayValue {
    /// So many seconds.
    Seconds(f64),
    /// That time.
    At(Timestamp),
}

/// A JSON Schema, compiled, for payloads.
#[derive(Debug)]
pub struct PayloadSchema {
    path: Box<str>,
}

impl PayloadSchema {
    /// The file it came from, as the pipeline file names it.
    pub fn path(&self) -> &str {
        &self.path
    }
}
