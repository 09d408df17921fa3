//! What a shelf is where the log is a broker's: rows in a database of its own.
//!
//! It keeps what [`Shelf`](crate::source::Shelf) promises, and the little that the embedded log keeps in its journal: keys
//! seen, epochs, pauses, marks. All times come in with the call or from the clock that it was made with, never from the server.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::{
    AsideLane, AsideRow, BranchName, DeadLetter, DeadQuery, Fate, IdempotencyKey, LogError, Page, ParkedQuery,
    ParkedRow, Reach, Replayed, RowKey, Scheduled, Settlement, ShelfCounts, StoredPause,
};

/// A record on its way, with the idempotency key that it is to have for itself.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The record; its id, time and due time are drawn already.
    pub record: Arc<Record>,
    /// The client's key with its fingerprint.
    pub key: IdempotencyKey,
}

/// What became of a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claimed {
    /// The key is this record's. `id` and `written_at` are those of an earlier try that nobody knows the end of, if there was
    /// one: the record goes out under them again.
    Fresh {
        /// Its id from now on.
        id: RecordId,
        /// Its time from now on.
        written_at: Timestamp,
    },
    /// The key stands for a record that is durable.
    Known {
        /// The fingerprint of the first.
        fingerprint: [u8; 16],
        /// The id of the first.
        id: RecordId,
        /// When the first was accepted.
        written_at: Timestamp,
        /// When the first is due, if it was parked.
        due_at: Option<Timestamp>,
    },
    /// The first is on its way.
    Running,
}

/// A record to be parked.
#[derive(Clone, Debug)]
pub struct Parking {
    /// The record; `due_at` is set.
    pub record: Arc<Record>,
    /// Its idempotency key, if the client gave one: stored with it or not at all.
    pub key: Option<IdempotencyKey>,
}

/// A parked record that a mover has taken. It is marked, durably, before it is given.
#[derive(Clone, Debug)]
pub struct Releasing {
    /// The record.
    pub record: Arc<Record>,
    /// Where the log ended when it was marked: it stands after that, or not in the log.
    pub place: Arc<str>,
}

/// A revision of the pipeline file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredEpoch {
    /// Counts up from 1.
    pub number: u32,
    /// Where the log ended when it came into force.
    pub place: Arc<str>,
    /// The files.
    pub files: Bytes,
}

/// What is stored of a branch when it starts.
#[derive(Clone, Debug, Default)]
pub struct StoredBranch {
    /// Deliveries above the cursor that have an end here (dead, set aside, or gone since).
    pub ended: Vec<RowKey>,
    /// Keys that are set aside.
    pub lanes: Vec<AsideLane>,
    /// A pause that survives restarts.
    pub pause: Option<StoredPause>,
    /// How many times in a row one of the parts was left without a word at this same cursor.
    pub unclean_stops: u32,
    /// Durable marks above the cursor, and how many each has.
    pub marks: Vec<(Position, u32)>,
}

/// What the store knows of a record.
#[derive(Clone, Debug)]
pub enum StoredRecord {
    /// It waits for its time.
    Parked {
        /// The record.
        record: Arc<Record>,
        /// When it is due.
        due_at: Timestamp,
    },
    /// It was cancelled before.
    Cancelled,
    /// Branches keep rows of it: set aside or dead.
    Rows {
        /// The record.
        record: Arc<Record>,
        /// Its place in the log.
        position: Position,
        /// By branch.
        branches: Vec<(BranchName, Fate)>,
    },
}

/// A shelf in a database that several processes may share. A handle on one namespace; it reconnects by itself.
///
/// Errors are [`LogError::Storage`] when the server cannot be reached or refuses: nothing of the call is promised then.
pub trait Store: Send + Sync {
    /// Where the rows are, in a line for the plan and `/readyz`; no secret.
    fn note(&self) -> String;

    /// Claims idempotency keys. A key that was claimed before `abandoned` and never confirmed goes to the new claim, under its
    /// first id. In one call no key stands twice.
    fn claim(&self, claims: Vec<Claim>, abandoned: Timestamp) -> BoxFuture<'static, Result<Vec<Claimed>, LogError>>;

    /// The claimed records are in the log.
    fn confirm(&self, ids: Vec<(Box<str>, RecordId)>) -> BoxFuture<'static, Result<(), LogError>>;

    /// The claimed records are not in the log and never will be: their keys are free again.
    fn give_up(&self, ids: Vec<(Box<str>, RecordId)>) -> BoxFuture<'static, Result<(), LogError>>;

    /// Parks records, all or none. Whose key is known already is not parked, and told; others are `Fresh`.
    fn park(&self, rows: Vec<Parking>) -> BoxFuture<'static, Result<Vec<Claimed>, LogError>>;

    /// Becomes or stays the one mover of the namespace until `until`; false = another one is.
    fn lead(&self, until: Timestamp) -> BoxFuture<'static, Result<bool, LogError>>;

    /// Lets the lease go, so that another one need not wait for its end.
    fn resign(&self) -> BoxFuture<'static, Result<(), LogError>>;

    /// When the first parked record is due that nobody has marked.
    fn next_due(&self) -> BoxFuture<'static, Result<Option<Timestamp>, LogError>>;

    /// Ends when something was parked or moved, by anybody, as far as that is told; spurious ends are fine.
    fn parked_news(&self) -> BoxFuture<'static, ()>;

    /// Marks what is due at `now` with `place` and gives it, in (due, id) order, at most `limit`.
    fn take_due(
        &self,
        now: Timestamp,
        limit: usize,
        place: Arc<str>,
    ) -> BoxFuture<'static, Result<Vec<Releasing>, LogError>>;

    /// What an earlier mover marked and never reported, in (due, id) order, at most `limit`.
    fn marked(&self, limit: usize) -> BoxFuture<'static, Result<Vec<Releasing>, LogError>>;

    /// These are in the log: their rows are gone.
    fn released(&self, ids: Vec<RecordId>) -> BoxFuture<'static, Result<(), LogError>>;

    /// What is stored of a branch; it is known from now on. `cursor` names the parts that `instance` reads from now on.
    fn open_branch(
        &self,
        branch: &BranchName,
        cursor: &Reach,
        instance: &str,
    ) -> BoxFuture<'static, Result<StoredBranch, LogError>>;

    /// `instance` has let go of the branch with nothing under way.
    fn leave_branch(&self, branch: &BranchName, instance: &str) -> BoxFuture<'static, Result<(), LogError>>;

    /// The branches that are known, as of the last call of [`Store::open_branch`], [`Store::refresh`] and the like.
    fn branches(&self) -> Vec<BranchName>;

    /// Removes a branch with all its rows.
    fn forget_branch(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>>;

    /// Gives a branch and its rows another name. Nothing happens when `from` is unknown or `to` is known.
    fn rename_branch(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>>;

    /// Stores a new revision unless the newest keeps the same files; gives the newest.
    fn put_epoch(&self, files: Bytes, place: Arc<str>) -> BoxFuture<'static, Result<StoredEpoch, LogError>>;

    /// The revisions, oldest first, as they are known here: at the start, and after [`Store::put_epoch`] or
    /// [`Store::refresh`].
    fn epochs(&self) -> Vec<StoredEpoch>;

    /// Reads anew what other processes may have changed: branches and epochs.
    fn refresh(&self) -> BoxFuture<'static, Result<(), LogError>>;

    /// Keeps how far the log has come; what was kept before and is further stays.
    fn keep_end(&self, end: Reach) -> BoxFuture<'static, Result<(), LogError>>;

    /// How far the log had come when this handle was opened, as anybody told [`Store::keep_end`].
    fn kept_end(&self) -> Reach;

    /// Forgets what is over: keys older than their window, ends and marks at or below `cursors`, revisions that neither those
    /// nor any row needs. Called now and then by the mover.
    fn tidy(
        &self,
        keys_before: Timestamp,
        cursors: Vec<(BranchName, Reach)>,
    ) -> BoxFuture<'static, Result<(), LogError>>;

    /// Makes settlements durable, in their order, in one transaction. Their `frontier` only tells which ends and marks are over;
    /// progress itself is the broker's.
    fn settle(&self, branch: &BranchName, settlements: Vec<Settlement>) -> BoxFuture<'static, Result<(), LogError>>;

    /// As [`Shelf::aside_rows`](crate::source::Shelf::aside_rows).
    fn aside_rows(
        &self,
        branch: &BranchName,
        lane: &str,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<AsideRow>, LogError>>;

    /// Waits until rows of `branch` were replayed, by any process, since this handle last told; names their lanes.
    ///
    /// # Cancel safety
    /// Dropping the wait loses no news.
    fn replayed_lanes(&self, branch: &BranchName) -> BoxFuture<'static, Vec<AsideLane>>;

    /// As [`Shelf::parked`](crate::source::Shelf::parked); what is being released is not listed.
    fn parked(&self, query: ParkedQuery) -> BoxFuture<'static, Result<Page<ParkedRow>, LogError>>;

    /// As [`Shelf::cancel`](crate::source::Shelf::cancel).
    fn cancel(&self, which: Scheduled) -> BoxFuture<'static, Result<u64, LogError>>;

    /// As [`Shelf::reschedule`](crate::source::Shelf::reschedule).
    fn reschedule(&self, which: Scheduled, due_at: Timestamp) -> BoxFuture<'static, Result<u64, LogError>>;

    /// As [`Shelf::dead_letters`](crate::source::Shelf::dead_letters).
    fn dead_letters(&self, query: DeadQuery) -> BoxFuture<'static, Result<Page<DeadLetter>, LogError>>;

    /// As [`Shelf::replay`](crate::source::Shelf::replay).
    fn replay(&self, query: DeadQuery, force: bool) -> BoxFuture<'static, Result<Replayed, LogError>>;

    /// As [`Shelf::purge`](crate::source::Shelf::purge).
    fn purge(&self, query: DeadQuery) -> BoxFuture<'static, Result<u64, LogError>>;

    /// What is known of a record.
    fn find(&self, id: RecordId) -> BoxFuture<'static, Result<Option<StoredRecord>, LogError>>;

    /// As [`Shelf::counts`](crate::source::Shelf::counts): as they were a second ago or so.
    fn counts(&self) -> ShelfCounts;

    /// Deletes everything that is stored of the namespace.
    fn delete(&self) -> BoxFuture<'static, Result<(), LogError>>;

    /// Ends: background work stops, connections are let go.
    fn close(&self) -> BoxFuture<'static, ()>;
}
