//! Deliveries that are not over: set aside for a while, or dead until somebody replays them.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{BranchName, RowKey, lane_of};
use crate::clock::Timestamp;
use crate::record::Record;

/// A key that is set aside, in one branch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AsideLane {
    /// The lane: the record's key, or for a keyless record a name of its own.
    pub lane: Box<str>,
    /// Its first row.
    pub first: RowKey,
    /// Its last row: until a branch has read so far, older records of the key may have to go before it again.
    pub last: RowKey,
    /// How many rows wait.
    pub rows: u64,
    /// When to try the first row again.
    pub next_try: Timestamp,
    /// Attempts spent on the first row.
    pub attempts: u32,
    /// When the first row failed for the first time.
    pub first_failed: Timestamp,
}

/// One delivery on the shelf: set aside because its key keeps failing, or replayed from the dead letters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AsideRow {
    /// Which delivery.
    pub row: RowKey,
    /// Its lane.
    pub lane: Box<str>,
    /// The original record.
    pub record: Arc<Record>,
    /// What a child was rendered to, so that an edited script does not make another thing of it; `None` = run the original.
    pub rendered: Option<Bytes>,
    /// Attempts spent.
    pub attempts: u32,
    /// When it failed for the first time.
    pub first_failed: Timestamp,
    /// When to try again.
    pub next_try: Timestamp,
    /// What the target said last.
    pub last_error: Box<str>,
    /// It came from the dead letters.
    pub replayed: bool,
}

impl AsideRow {
    /// A dead letter that is sent back: the original, with no attempt counted.
    pub(super) fn replayed(letter: DeadLetter, now: Timestamp) -> Self {
        Self {
            row: letter.row,
            lane: lane_of(letter.record.key.as_deref(), letter.row),
            record: letter.record,
            rendered: None,
            attempts: 0,
            first_failed: now,
            next_try: now,
            last_error: letter.last_error,
            replayed: true,
        }
    }
}

/// Why a delivery ended in the dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeadReason {
    /// The target refused this record.
    Refused,
    /// Its attempts or its time ran out while the target took others.
    Exhausted,
    /// A script or expression failed on it, or called `fail()`.
    Script,
    /// A template could not be rendered from it.
    Template,
    /// No arm of the route took it.
    NoRoute,
    /// It was under way at three unclean stops in a row.
    Crash,
    /// An operator skipped it.
    Skipped,
}

/// A delivery that ended badly, with everything needed to understand and repeat it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// Which delivery; unique in its branch.
    pub row: RowKey,
    /// The branch that failed.
    pub branch: BranchName,
    /// When it was given up.
    pub at: Timestamp,
    /// Why.
    pub reason: DeadReason,
    /// Attempts spent.
    pub attempts: u32,
    /// What the target or the script said last.
    pub last_error: Box<str>,
    /// The stage that gave up, for example `sink` or `transform[1]`.
    pub stage: Box<str>,
    /// The revision of the file that was in force.
    pub revision: Box<str>,
    /// The original record.
    pub record: Arc<Record>,
    /// What would have been sent, if it got that far.
    pub rendered: Option<Bytes>,
    /// Its key's later records have been delivered: replaying could put an old value over a new one.
    pub overtaken: bool,
}
