//! What scripts and expressions make of a record: the chain of stages, and the view that they see.
//!
//! A [`Transform`] is a function of (record, revision of the file): the same record gives the same events in every
//! region, on every retry and after a restart. Payloads that no stage looks into stay untouched bytes. Nothing here
//! touches the disk or the network while a record is under way.

mod compile;
mod convert;
mod depth;
mod engine;
mod event;
mod functions;
mod guard;
mod program;
mod run;
mod scan;
mod schema;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use crate::clock::Timestamp;

pub use compile::{CompileError, Compiler, Place, StageKind, StageSource};
pub use depth::{MAX_DEPTH, json_depth};
pub use event::{Event, NotJson};
pub use functions::functions_table;
pub use schema::{PayloadSchema, SchemaError, SchemaFault};

use program::Program;

/// What a chain of stages made of one event.
#[derive(Clone, Debug)]
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
    stages: Arc<[Program]>,
    /// Events that went into it, over all clones.
    #[cfg(test)]
    pub(crate) runs: Arc<std::sync::atomic::AtomicU64>,
}

impl Transform {
    fn new(stages: Arc<[Program]>) -> Self {
        Self {
            stages,
            #[cfg(test)]
            runs: Arc::default(),
        }
    }

    /// True when there is no stage: events pass untouched.
    pub fn is_empty(&self) -> bool {
        self.stages.is_empty()
    }

    /// True when the other is a clone of this one: the same texts, compiled at the same time.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.stages, &other.stages)
    }

    /// The stages' names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.stages.iter().map(|stage| &*stage.name)
    }
}

/// A condition on an event, compiled. Only reads. Cheap to clone.
#[derive(Clone)]
pub struct Predicate(Arc<Program>);

impl Predicate {
    /// The expression as it was written.
    pub fn source(&self) -> &str {
        &self.0.text
    }
}

impl fmt::Debug for Predicate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Predicate").field(&self.source()).finish()
    }
}

/// An expression that gives a number or a time, compiled. Only reads. Cheap to clone.
#[derive(Clone)]
pub struct Expression(Arc<Program>);

impl Expression {
    /// The expression as it was written.
    pub fn source(&self) -> &str {
        &self.0.text
    }
}

impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Expression").field(&self.source()).finish()
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
