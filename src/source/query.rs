//! Looking things up: where a write is, what is parked, what is dead, how much of it there is.

use std::sync::Arc;

use serde::Serialize;

use super::{BranchName, DeadLetter, DeadReason};
use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};

/// Where a write is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Waiting for its time.
    Parked {
        /// The record.
        record: Arc<Record>,
        /// When it enters the log.
        due_at: Timestamp,
    },
    /// In the log; what each branch made of it.
    InLog {
        /// The record.
        record: Arc<Record>,
        /// Its place.
        position: Position,
        /// By branch.
        branches: Vec<(BranchName, Fate)>,
    },
    /// Cancelled before it was due.
    Cancelled,
}

/// What one branch made of a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(tag = "state", rename_all = "snake_case", rename_all_fields = "camelCase")]
pub enum Fate {
    /// Not ended yet.
    Pending,
    /// Set aside; tried again at that time.
    SetAside {
        /// Attempts spent.
        attempts: u32,
        /// When it is tried again.
        next_try: Timestamp,
        /// What the target said last.
        #[schema(value_type = String)]
        last_error: Box<str>,
    },
    /// Delivered at some time between the two (the frontier is sampled each second).
    Finished {
        /// Not before.
        after: Option<Timestamp>,
        /// Not after.
        before: Option<Timestamp>,
    },
    /// Filtered, dropped or expired.
    Dropped {
        /// By what.
        #[schema(value_type = String)]
        reason: Box<str>,
    },
    /// In the dead letters.
    Dead {
        /// Why.
        reason: DeadReason,
        /// What was said last.
        #[schema(value_type = String)]
        last_error: Box<str>,
    },
}

/// A parked record in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParkedRow {
    /// The record.
    pub record: Arc<Record>,
    /// When it is due.
    pub due_at: Timestamp,
}

/// A page of a listing; `next` continues it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T> {
    /// The rows.
    pub rows: Vec<T>,
    /// Hand this in again for the next page; `None` = the end.
    pub next: Option<String>,
}

/// Which parked records.
#[derive(Clone, Debug, Default)]
pub struct ParkedQuery {
    /// Only this key.
    pub key: Option<String>,
    /// Due at or after.
    pub from: Option<Timestamp>,
    /// Due before.
    pub to: Option<Timestamp>,
    /// Rows a page, at least 1.
    pub limit: usize,
    /// From an earlier page.
    pub after: Option<String>,
}

/// What to cancel or move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scheduled {
    /// This record.
    Id(RecordId),
    /// All parked records of this key.
    Key(String),
}

/// Which dead letters. Every field narrows.
#[derive(Clone, Debug, Default)]
pub struct DeadQuery {
    /// Only this branch.
    pub branch: Option<String>,
    /// Only this reason.
    pub reason: Option<DeadReason>,
    /// Only this record.
    pub id: Option<RecordId>,
    /// Only this key.
    pub key: Option<String>,
    /// Given up at or after.
    pub from: Option<Timestamp>,
    /// Given up before.
    pub to: Option<Timestamp>,
    /// Whose last error contains this.
    pub error_contains: Option<String>,
    /// Rows a page, at least 1.
    pub limit: usize,
    /// From an earlier page.
    pub after: Option<String>,
}

impl DeadQuery {
    /// How many rows are meant, or a page has.
    pub(crate) fn rows(&self) -> usize {
        self.limit.max(1)
    }

    /// The number after which to go on; 0 for the beginning.
    pub(crate) fn after_number(&self) -> u64 {
        self.after.as_deref().and_then(|token| token.parse().ok()).unwrap_or(0)
    }

    /// Whether a letter is meant, whose record has this id and key. Its own branch and record are not looked at: not every
    /// shelf has them at hand. What a database filters by itself says the same in SQL.
    pub(crate) fn takes(&self, letter: &DeadLetter, branch: &BranchName, id: &RecordId, key: Option<&str>) -> bool {
        self.branch.as_ref().is_none_or(|wanted| branch.as_str() == wanted)
            && self.reason.is_none_or(|reason| letter.reason == reason)
            && self.id.is_none_or(|wanted| wanted == *id)
            && self.key.as_ref().is_none_or(|wanted| key == Some(wanted))
            && self.from.is_none_or(|from| letter.at >= from)
            && self.to.is_none_or(|to| letter.at < to)
            && self.error_contains.as_ref().is_none_or(|text| letter.last_error.contains(text.as_str()))
    }
}

/// How much lies on the shelf.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShelfCounts {
    /// Records waiting for their time.
    pub parked: u64,
    /// By branch: rows set aside.
    pub aside: Vec<(BranchName, u64)>,
    /// By branch: dead letters and their bytes.
    pub dead: Vec<(BranchName, u64, u64)>,
    /// How far back idempotency keys are really known.
    pub keys_since: Option<Timestamp>,
    /// Records that `on_full: drop` has ended, since the start.
    pub overflowed: u64,
}

impl ShelfCounts {
    /// Rows of a branch that are set aside.
    pub fn aside_of(&self, branch: &BranchName) -> u64 {
        self.aside.iter().find(|(name, _)| name == branch).map_or(0, |(_, rows)| *rows)
    }

    /// Dead letters of a branch, and their bytes.
    pub fn dead_of(&self, branch: &BranchName) -> (u64, u64) {
        self.dead.iter().find(|(name, ..)| name == branch).map_or((0, 0), |(_, letters, bytes)| (*letters, *bytes))
    }
}

/// What replay did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Replayed {
    /// Sent back to their branch.
    pub replayed: u64,
    /// Left where they are because their key has moved on and `force` was not given.
    pub overtaken: u64,
}
