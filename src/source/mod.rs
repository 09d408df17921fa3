//! The seam between the pipelines and what keeps their records: the traits [`Log`] and [`Shelf`].
//!
//! A [`Log`] makes writes durable and lets each branch read them in order. A [`Shelf`] keeps what waits (parked, set
//! aside) and what ended badly (dead letters). What must happen together goes through one call of the pair: `admit`
//! (record + idempotency key, appended or parked) and `settle` (ends + frontier). Both traits are handles on *one*
//! namespace.

mod admission;
#[cfg(test)]
mod conformance;
pub mod embedded;
pub mod foreign;
pub mod frontier;
pub mod kafka;
pub mod memory;
pub mod postgres;
mod query;
pub mod redis;
pub mod sqs;
mod waiting;

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

pub use self::frontier::Reach;
pub use admission::{AdmitError, Admitted, IdempotencyKey, Write};
pub use query::{DeadQuery, Fate, Found, Page, ParkedQuery, ParkedRow, Replayed, Scheduled, ShelfCounts};
pub use waiting::{AsideLane, AsideRow, DeadLetter, DeadReason};

use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};

/// A branch's name inside its namespace: `sink`, or `sink@region` where the file replicates.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, utoipa::ToSchema)]
#[schema(value_type = String)]
pub struct BranchName(Arc<str>);

impl BranchName {
    /// The branch of `sink` in `region`, or of `sink` alone.
    pub fn new(sink: &str, region: Option<&str>) -> Self {
        Self(region.map_or_else(|| sink.into(), |region| format!("{sink}@{region}").into()))
    }

    /// A branch name as it was stored or requested.
    pub fn from_stored(name: &str) -> Self {
        Self(name.into())
    }

    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BranchName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BranchName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// What a pair of log and shelf can do; the plan prints it and HTTP answers 501 for the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "a table of yes and no")]
pub struct Caps {
    /// Records may be parked.
    pub delay: bool,
    /// The longest delay, if there is a limit.
    pub max_delay: Option<Duration>,
    /// The log holds its records, in its order, until they are due by the file's rule: what others wrote, and where nothing
    /// may be parked what was written here as well.
    pub hold: bool,
    /// Parked records can be listed and cancelled.
    pub schedule: bool,
    /// Order per key is kept.
    pub ordered: bool,
    /// The same idempotency key twice is one record, exactly.
    pub exact_keys: bool,
    /// A write can be looked up by its id.
    pub look_up: bool,
    /// Records survive `kill -9` and a power cut once acknowledged.
    pub durable: bool,
    /// A failing key can be set aside, and dead letters can be listed and replayed.
    pub set_aside: bool,
    /// A pause that only a person ends outlives a restart.
    pub pause: bool,
    /// Other processes may carry on where this one stops, so what was read and not sent is left to them.
    pub shared: bool,
    /// It wants to know each position that has ended, not only how far everything has.
    pub each_end: bool,
}

/// Why reading or settling failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogError {
    /// The log takes no changes any more.
    #[error("the log is closed: {0}")]
    Closed(Arc<str>),
    /// Bytes that were durable are damaged; nothing past them is served.
    #[error("{0}")]
    Damaged(Arc<str>),
    /// The storage below answered with an error.
    #[error("{act}: {cause}")]
    Storage {
        /// What was tried, with the path.
        act: Arc<str>,
        /// What the storage said.
        cause: Arc<str>,
    },
    /// The pair cannot do this.
    #[error("{0}")]
    Unsupported(&'static str),
}

/// Where a branch begins that the log has never seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the first record that the log still keeps.
    Earliest,
    /// After the newest record.
    Latest,
    /// After this position.
    After(Position),
    /// Where this revision of the file came into force.
    Epoch(u32),
}

impl Start {
    /// The same without naming a revision; of one that is not kept nobody knows where it began.
    fn by_position(self, epochs: &[Epoch]) -> Self {
        let Self::Epoch(number) = self else { return self };
        epochs.iter().find(|epoch| epoch.number == number).map_or(Self::Earliest, |epoch| Self::After(epoch.after))
    }
}

/// A record read from the log.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its place.
    pub position: Position,
    /// The record.
    pub record: Arc<Record>,
    /// Why nobody can say when it is due: it ends in the dead letters. Only records that others wrote have it, since a write
    /// without a time is refused.
    pub fault: Option<Arc<str>>,
}

impl Entry {
    /// A record that may be delivered.
    pub const fn new(position: Position, record: Arc<Record>) -> Self {
        Self { position, record, fault: None }
    }
}

/// When a record is due that another program wrote, by the file's rule; `None` = at once. What has no time ends by this reason.
pub type HoldRule = Arc<dyn Fn(&Arc<Record>) -> Result<Option<Timestamp>, Arc<str>> + Send + Sync>;

/// A branch's own reader. Reads only what is durable, in log order, each position once.
pub trait Subscription: Send {
    /// The next records, at least one; waits for one. At most `max_records`, and it stops after `max_bytes` are passed.
    ///
    /// # Errors
    /// When the log is closed or the bytes are damaged.
    ///
    /// # Cancel safety
    /// Dropping the wait loses nothing: the next call gives the same records.
    fn next(&mut self, max_records: usize, max_bytes: usize) -> BoxFuture<'_, Result<Vec<Entry>, LogError>>;

    /// These parts bring enough for now, all others go on. What is on its way of them may still come.
    fn rest(&mut self, _parts: &BTreeSet<u16>) {}
}

/// A child of a position: 0 is the record itself, 1… are what `emit` made of it.
pub type Child = u32;

/// The name of one delivery inside a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct RowKey {
    /// The record's position.
    pub position: Position,
    /// Which child of it.
    pub child: Child,
}

/// The lane of a delivery: its key, or for a keyless one a name that nothing else has.
pub fn lane_of(key: Option<&str>, row: RowKey) -> Box<str> {
    // A key may be any text, so a keyless lane's name begins with what no key's does.
    key.map_or_else(|| format!("#{}/{}", row.position, row.child), |key| format!("={key}")).into()
}

/// What a branch finds when it starts: everything that outlived the last run.
pub struct BranchStart {
    /// Everything at or below is ended, except the rows in `lanes`.
    pub cursor: Reach,
    /// Deliveries above the cursor that already have an end in the store (dead, set aside, or purged since).
    pub ended: HashSet<RowKey>,
    /// Keys that are set aside, with what must be known to order them.
    pub lanes: Vec<AsideLane>,
    /// A pause that survives restarts (`refused`, `operator`).
    pub pause: Option<StoredPause>,
    /// How many unclean stops in a row had this same cursor.
    pub unclean_stops: u32,
    /// Positions above the cursor with a durable "about to try" mark, and how many marks each has.
    pub marks: Vec<(Position, u32)>,
    /// The reader, which gives what is after `cursor`.
    pub subscription: Box<dyn Subscription>,
    /// Cancelled when the parts of the log that this process reads are no longer those: what is under way may end, then the
    /// branch is to be opened anew. Dropping the reader lets the parts go.
    pub moved: CancellationToken,
}

/// A pause that survives a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredPause {
    /// `refused` or `operator`.
    pub cause: Box<str>,
    /// What an operator should know.
    pub note: Box<str>,
    /// Since when.
    pub since: Timestamp,
}

/// Ends of deliveries and the progress they allow; one frame group on the embedded pair.
#[derive(Clone, Debug, Default)]
pub struct Settlement {
    /// Everything at or below has an end. Alone it may ride on a later group; with anything else it is in the same one.
    pub frontier: Reach,
    /// Positions that have ended since the last settlement, in any order; only where [`Caps::each_end`] asks for them.
    pub ended: Vec<Position>,
    /// New rows for the shelf, in order; also used to update a row's attempts and next try (same row key).
    pub aside: Vec<AsideRow>,
    /// Rows that came back from the shelf and have ended.
    pub returned: Vec<RowKey>,
    /// New dead letters; ends a set-aside row of the same row key.
    pub dead: Vec<DeadLetter>,
    /// Filtered, dropped or expired: counted ends that a look-up shows.
    pub dropped: Vec<(Position, Box<str>)>,
    /// Careful mode: about to try this one.
    pub mark: Option<Position>,
    /// A pause to store, or `Some(None)` to clear it.
    pub pause: Option<Option<StoredPause>>,
    /// For dead letters that stay: keys whose later records have now been delivered.
    pub overtaken: Vec<RowKey>,
}

impl Settlement {
    /// True when only the frontier moves, so nobody has to wait for it.
    pub fn is_frontier_only(&self) -> bool {
        self.aside.is_empty()
            && self.returned.is_empty()
            && self.dead.is_empty()
            && self.dropped.is_empty()
            && self.mark.is_none()
            && self.pause.is_none()
            && self.overtaken.is_empty()
    }
}

/// How far a branch is behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// Records not yet ended.
    pub records: u64,
    /// Their bytes in the log, near enough.
    pub bytes: u64,
    /// When the oldest of them entered the log.
    pub oldest: Option<Timestamp>,
    /// The stored cursor.
    pub cursor: Reach,
}

/// A pipeline file as it was in force from a position on: unexpanded, with its scripts and schemas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// Counts up from 1.
    pub number: u32,
    /// In force for records after this position.
    pub after: Position,
    /// The files, in a form that only the pipeline reads.
    pub files: Bytes,
}

/// The wait for writes that have their place in the log's order.
pub type Entered = BoxFuture<'static, Result<Vec<Admitted>, AdmitError>>;

/// Makes writes durable and gives them to each branch in order. A handle on one namespace.
pub trait Log: Send + Sync {
    /// What this pair can do.
    fn caps(&self) -> Caps;

    /// Makes the writes durable, all or none, in this order; answers only then. A write with a due time is parked.
    ///
    /// # Errors
    /// See [`AdmitError`]: it says whether the writes may be in the log.
    ///
    /// # Cancel safety
    /// Dropping the wait never un-writes.
    fn admit(&self, writes: Vec<Write>) -> BoxFuture<'static, Result<Vec<Admitted>, AdmitError>>;

    /// As [`Log::admit`] in two steps: the first ends when the writes have their place in the log's order, the second, which
    /// it gives, when they are durable. Who waits for the first before he enters more keeps his own order without waiting
    /// for the disk each time. While the disk is full, what was entered behind a refused one is refused too.
    ///
    /// # Errors
    /// As [`Log::admit`]; after an error of the first step nothing is in the log.
    ///
    /// # Cancel safety
    /// Dropping the first wait enters the writes or does not; dropping the second never un-writes.
    fn enter(&self, writes: Vec<Write>) -> BoxFuture<'static, Result<Entered, AdmitError>>;

    /// Opens a branch where it stopped, or at `start` when the log has never seen it.
    ///
    /// # Errors
    /// When the log is closed or damaged.
    fn open_branch(&self, branch: &BranchName, start: Start) -> BoxFuture<'static, Result<BranchStart, LogError>>;

    /// Makes a branch known that begins at `start` unless it is: what is appended from here on is its own, whenever it is
    /// opened.
    ///
    /// # Errors
    /// When the log is closed or cannot be reached.
    fn make_branch(&self, branch: &BranchName, start: Start) -> BoxFuture<'static, Result<(), LogError>> {
        let opening = self.open_branch(branch, start);
        Box::pin(async move { opening.await.map(drop) })
    }

    /// Removes a branch's cursor, rows and dead letters. For branches that the file no longer has.
    ///
    /// # Errors
    /// When the log is closed.
    fn forget_branch(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>>;

    /// Gives a branch another name; its cursor, rows and dead letters go on under it. Nothing happens when `from` is
    /// unknown or `to` is known.
    ///
    /// # Errors
    /// When the log is closed.
    fn rename_branch(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>>;

    /// From now on what others write into the log is due by this rule; `None` = at once. Only where [`Caps::hold`] says so.
    fn hold(&self, _rule: Option<HoldRule>) {}

    /// The branches that the log knows, whether or not the file still has them.
    fn branches(&self) -> Vec<BranchName>;

    /// How far a branch is behind; cheap enough for every scrape.
    fn lag(&self, branch: &BranchName) -> Lag;

    /// The newest durable position of each part that is known here.
    fn end(&self) -> Reach;

    /// Where a write is, if the log still knows.
    ///
    /// # Errors
    /// When the storage fails.
    fn find(&self, id: RecordId) -> BoxFuture<'static, Result<Option<Found>, LogError>>;

    /// Stores a new revision of the pipeline file; in force for records appended after it. Gives its number and place.
    ///
    /// # Errors
    /// When the log is closed.
    fn put_epoch(&self, files: Bytes) -> BoxFuture<'static, Result<Epoch, LogError>>;

    /// The stored revisions, oldest first; the last is in force. Kept while a cursor is before their end, or a row that is
    /// set aside or dead.
    fn epochs(&self) -> Vec<Epoch>;
}

/// Keeps what waits and what ended badly. A handle on one namespace.
pub trait Shelf: Send + Sync {
    /// Makes ends durable and moves a branch's frontier. Frontier alone answers at once and is stored within 100 ms.
    ///
    /// # Errors
    /// When the log is closed; nothing of the settlement is then promised.
    ///
    /// # Cancel safety
    /// Dropping the wait never un-settles.
    fn settle(&self, branch: &BranchName, settlement: Settlement) -> BoxFuture<'static, Result<(), LogError>>;

    /// The rows of a lane that is set aside, in order, at most `limit`.
    ///
    /// # Errors
    /// When the storage fails.
    fn aside_rows(
        &self,
        branch: &BranchName,
        lane: &str,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<AsideRow>, LogError>>;

    /// Waits until rows were put aside for `branch` by somebody else (a replay), and names their lanes.
    ///
    /// # Cancel safety
    /// Dropping the wait loses no news.
    fn replayed_lanes(&self, branch: &BranchName) -> BoxFuture<'static, Vec<AsideLane>>;

    /// Parked records in (due, sequence) order.
    ///
    /// # Errors
    /// When the storage fails.
    fn parked(&self, query: ParkedQuery) -> BoxFuture<'static, Result<Page<ParkedRow>, LogError>>;

    /// Cancels what still waits; answers how many, when that is durable. What is being released is not counted.
    ///
    /// # Errors
    /// When the log is closed.
    fn cancel(&self, which: Scheduled) -> BoxFuture<'static, Result<u64, LogError>>;

    /// Moves what still waits to another time; answers how many, when that is durable.
    ///
    /// # Errors
    /// When the log is closed.
    fn reschedule(&self, which: Scheduled, due_at: Timestamp) -> BoxFuture<'static, Result<u64, LogError>>;

    /// Dead letters in order of their end.
    ///
    /// # Errors
    /// When the storage fails.
    fn dead_letters(&self, query: DeadQuery) -> BoxFuture<'static, Result<Page<DeadLetter>, LogError>>;

    /// Sends matching dead letters back to the branch that failed, in order, at most `query.limit`.
    ///
    /// # Errors
    /// When the log is closed.
    fn replay(&self, query: DeadQuery, force: bool) -> BoxFuture<'static, Result<Replayed, LogError>>;

    /// Deletes matching dead letters for good, the oldest first, at most `query.limit`; answers how many.
    ///
    /// # Errors
    /// When the log is closed.
    fn purge(&self, query: DeadQuery) -> BoxFuture<'static, Result<u64, LogError>>;

    /// How much lies here; cheap enough for every scrape, so it may be behind by what is durable and not yet sorted in.
    fn counts(&self) -> ShelfCounts;
}
