//! A write on its way into the log, and what became of it.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::BranchName;
use crate::units::Span;

/// One write on its way into the log. The log draws the id and the position.
#[derive(Clone, Debug)]
pub struct Write {
    /// The record; `id` and `written_at` are filled in by the log when it accepts.
    pub record: Record,
    /// Park it until then; `None` = append now.
    pub due_at: Option<Timestamp>,
    /// The client's idempotency key with the fingerprint of what it sent.
    pub idempotency: Option<IdempotencyKey>,
}

/// An idempotency key and what it stood for the first time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// The client's key, at most 255 bytes.
    pub key: Box<str>,
    /// A digest over payload, key, target and lifecycle.
    pub fingerprint: [u8; 16],
}

/// What became of one write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// In the log at this position.
    Appended {
        /// Its id.
        id: RecordId,
        /// When it was accepted.
        written_at: Timestamp,
        /// Its place in the log.
        position: Position,
    },
    /// On the shelf until it is due.
    Parked {
        /// Its id.
        id: RecordId,
        /// When it was accepted.
        written_at: Timestamp,
        /// When it will enter the log.
        due_at: Timestamp,
    },
    /// The same idempotency key and fingerprint were accepted before: the first answer again.
    Repeated {
        /// The id of the first.
        id: RecordId,
        /// When the first was accepted.
        written_at: Timestamp,
        /// When the first was or will be due, if it was parked.
        due_at: Option<Timestamp>,
    },
    /// The idempotency key was used before for something else (422).
    KeyReused,
    /// The first write with this key is still on its way and did not end in time (409).
    KeyRunning,
}

/// Why writes were not accepted. `durable` tells the client whether to repeat with care.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// Unfinished records have reached the namespace's backlog limit (503, failed).
    #[error("the backlog of {bytes} bytes has reached its limit of {limit}")]
    BacklogFull {
        /// Bytes of unfinished records.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// Records of a branch are unfinished for longer than the namespace's backlog may be old (503, failed).
    #[error(
        "records of branch {branch} are unfinished for longer than backlog.age ({}): see in the namespace's status why it \
         is behind, resume it or skip what blocks it, or allow a longer backlog.age",
        Span(*.limit)
    )]
    BacklogOld {
        /// The branch that is furthest behind.
        branch: BranchName,
        /// The limit.
        limit: Duration,
    },
    /// The disk is full; reading and acking go on (507, failed).
    #[error("the disk that holds the log is full")]
    DiskFull,
    /// The log cannot keep up; try again after a while (503, failed).
    #[error("the log is catching up, try again in {} s", .retry_after.as_secs().max(1))]
    Busy {
        /// When to try again.
        retry_after: Duration,
    },
    /// What keeps the log, or its shelf, cannot be reached; nothing was handed over (503, failed).
    #[error("{reason}")]
    Unavailable {
        /// What, and why.
        reason: Arc<str>,
    },
    /// One record is larger than the log takes (413, failed).
    #[error("a record of {bytes} bytes is over the limit of {limit}")]
    TooLarge {
        /// The record's size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The log failed while these writes were under way: nobody can say (504, unknown).
    #[error("the log failed during the write: {reason}")]
    Unknown {
        /// What failed.
        reason: Arc<str>,
    },
    /// The log takes no writes any more: it is stopping, was fenced, or its namespace was deleted (503, failed).
    #[error("the log takes no writes: {reason}")]
    Closed {
        /// Why.
        reason: Arc<str>,
    },
    /// The pair cannot do this (501, failed).
    #[error("{0}")]
    Unsupported(&'static str),
}

impl AdmitError {
    /// True when the write may or may not be in the log.
    pub const fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown { .. })
    }
}
