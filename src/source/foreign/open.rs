//! What every broker and shelf is told when it is opened.

use std::time::Duration;

use crate::clock::Clock;
use crate::record::Namespace;

/// One namespace, as its broker or shelf sees it.
#[derive(Clone, Debug)]
pub struct Context {
    /// The namespace.
    pub namespace: Namespace,
    /// Its number in ids; records of other programs get ids under it too.
    pub number: u32,
    /// The time.
    pub clock: Clock,
    /// The largest payload, in bytes.
    pub record_bytes: u64,
    /// Idempotency keys are known at least so long.
    pub key_window: Duration,
    /// How much unfinished records may take, in bytes: a broker that keeps them in memory refuses more.
    pub backlog_bytes: u64,
    /// Weak settings of the server are an error, not a warning.
    pub strict: bool,
}

/// A setting of a source or shelf that cannot work as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecFault {
    /// Where, a JSON pointer relative to the kind's own map: `/topic`.
    pub pointer: String,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub help: String,
}

impl SpecFault {
    /// A fault.
    pub fn new(pointer: impl Into<String>, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), message: message.into(), help: help.into() }
    }
}
