//! What a broker is to walflow: a log that others keep.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use super::store::Claimed;
use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::{
    AdmitError, BranchName, DeadLetter, IdempotencyKey, Lag, LogError, Reach, StoredPause, Subscription,
};

/// What a broker can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokerCaps {
    /// Order per key is kept.
    pub ordered: bool,
    /// What is confirmed survives the end of the broker's process.
    pub durable: bool,
    /// It wants to know each position that has ended.
    pub each_end: bool,
    /// Others may write into it, and a part of it can be held until its next record is due.
    pub hold: bool,
    /// It keeps a pause of a branch.
    pub pause: bool,
    /// How long it can delay a record itself; `None` = not at all.
    pub delay: Option<Duration>,
    /// It can be asked for one record.
    pub look_up: bool,
    /// The largest record that it takes, in bytes; `None` = no limit of its own.
    pub largest_record: Option<u64>,
}

/// Why [`Broker::locate`] does not say where a record is.
pub const GAVE_UP: &str =
    "looking for it among all that came after it took too long and was given up: ask the broker's own tools";

/// Records that a broker was handed: what became of each, in their order.
pub type Handed = BoxFuture<'static, Vec<Result<Position, AdmitError>>>;

/// What became of a record that was appended together with its idempotency key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exactly {
    /// It is in the log, and the key is its own.
    Appended(Position),
    /// The key stands for an earlier record; never [`Claimed::Fresh`].
    Known(Claimed),
}

/// What became of each of the records that were appended together with their keys.
pub type HandedExactly = BoxFuture<'static, Result<Vec<Result<Exactly, AdmitError>>, AdmitError>>;

/// Where a branch begins that the broker has never seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begin {
    /// At the first record that is kept.
    Earliest,
    /// After the newest record.
    Latest,
    /// After a [`Broker::place`].
    Place(Arc<str>),
    /// In each part at the first record that the broker took at this time or later; where none is so late, at the end.
    Time(Timestamp),
}

/// A branch's hold on the parts of the log that are its own in this process, until the subscription is dropped.
pub struct Opened {
    /// Everything at or below has ended, for each part that is read here.
    pub cursor: Reach,
    /// The newest that the broker has ever given to this branch, of each part, where it knows that: what lies beyond has no
    /// end yet, whatever is remembered of a log that was there before and is gone.
    pub given: Option<Reach>,
    /// The parts that are read here; `None` = all that there are.
    pub parts: Option<Vec<u16>>,
    /// Parts in which it knows no progress of the branch: those begin, and are known once [`Broker::begun`] has said so.
    pub fresh: Vec<u16>,
    /// The pause that it keeps.
    pub pause: Option<StoredPause>,
    /// The reader of those parts.
    pub subscription: Box<dyn Subscription>,
    /// Cancelled when the parts are to be others. The broker waits, with a bound, until the subscription is dropped.
    pub moved: CancellationToken,
}

/// A log that others keep. A handle on one namespace; it reconnects by itself, and what it cannot reach is an outage.
pub trait Broker: Send + Sync {
    /// What it can do.
    fn caps(&self) -> BrokerCaps;

    /// What "durable" means here, in a line for `/readyz`.
    fn durable_note(&self) -> String;

    /// What is wrong with it now, in a line; `None` = nothing that is known.
    fn trouble(&self) -> Option<String>;

    /// Hands records over. The first wait ends when they have their place in the order: what is handed over later stands
    /// behind. An error of a record that is not [`AdmitError::Unknown`] says that it is not in the log and never will be.
    ///
    /// # Errors
    /// Nothing was handed over.
    ///
    /// # Cancel safety
    /// Dropping either wait never un-writes.
    fn append(&self, records: Vec<Arc<Record>>) -> BoxFuture<'static, Result<Handed, AdmitError>>;

    /// Appends records, in this order, each together with its idempotency key in one step; `None` where that cannot be.
    fn append_exactly(&self, _records: &[(Arc<Record>, Option<IdempotencyKey>)]) -> Option<HandedExactly> {
        None
    }

    /// Makes sure that a branch that is opened later begins where it would begin now. Nothing to do where `begin` says it for
    /// ever.
    ///
    /// # Errors
    /// When the broker cannot be reached or refuses.
    fn prepare(&self, _branch: &BranchName, _begin: Begin) -> BoxFuture<'static, Result<(), LogError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Takes hold of a branch's parts; waits until there are some, or until it is known that others have them all.
    ///
    /// # Errors
    /// When the broker cannot be reached, refuses, or no longer keeps what has no end yet.
    fn open(&self, branch: &BranchName, begin: Begin) -> BoxFuture<'static, Result<Opened, LogError>>;

    /// A branch that was opened begins where it was told: wherever it is opened next, it is there.
    ///
    /// # Errors
    /// When the broker cannot be reached or refuses.
    fn begun(&self, _branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// A branch has come so far, and `ended` have ended beyond it. Stored soon, and when the subscription is dropped; of
    /// parts that are not held any more nothing is stored.
    fn progress(&self, branch: &BranchName, frontier: &Reach, ended: &[Position]);

    /// Keeps a pause of a branch that is open, or its end, where the namespace has no shelf; only where
    /// [`BrokerCaps::pause`] says so. Done when it is durable.
    ///
    /// # Errors
    /// When the broker cannot be reached or refuses: nobody can say then what it keeps.
    fn pause(&self, _branch: &BranchName, _pause: Option<StoredPause>) -> BoxFuture<'static, Result<(), LogError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Removes what it keeps of a branch.
    ///
    /// # Errors
    /// When the broker cannot be reached or refuses.
    fn forget(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>>;

    /// Gives a branch that is not open another name.
    ///
    /// # Errors
    /// When the broker cannot be reached or refuses.
    fn rename(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>>;

    /// How far a branch is behind, over the parts that this process reads; as it was a second ago or so.
    fn lag(&self, branch: &BranchName) -> Lag;

    /// The part in which records of a key are.
    fn part_of(&self, _key: Option<&str>) -> u16 {
        0
    }

    /// The newest position of each part that this process reads; as it was a second ago or so.
    fn end(&self) -> Reach;

    /// The newest number of each part that was ever given, as far as it is known here; `None` where a log that has lost its end
    /// gives no number twice, or says so itself.
    fn numbers(&self) -> Option<Reach> {
        None
    }

    /// Numbers up to these were given: none of them stands for another record from now on. To be called before the first
    /// append.
    fn were_given(&self, _numbers: &Reach) {}

    /// Where the log ends now, as a text that only it reads.
    ///
    /// # Errors
    /// When the broker cannot be reached.
    fn place(&self) -> BoxFuture<'static, Result<Arc<str>, LogError>>;

    /// Which of these records stand after `place`.
    ///
    /// # Errors
    /// When the broker cannot be reached.
    fn find_after(
        &self,
        place: &str,
        ids: Vec<RecordId>,
    ) -> BoxFuture<'static, Result<HashMap<RecordId, Position>, LogError>>;

    /// Where a record stands, as long as it is kept; only where [`BrokerCaps::look_up`] says so.
    ///
    /// # Errors
    /// When the broker cannot be reached, and [`GAVE_UP`] when too much would have to be read.
    fn locate(&self, _id: RecordId) -> BoxFuture<'static, Result<Option<(Position, Arc<Record>)>, LogError>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// Which of these branches have no end yet for the record at `position`, whichever process runs them; only where
    /// [`BrokerCaps::look_up`] says so.
    ///
    /// # Errors
    /// When the broker cannot be reached.
    fn unfinished(
        &self,
        _position: Position,
        _branches: Vec<BranchName>,
    ) -> BoxFuture<'static, Result<Vec<BranchName>, LogError>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// Keeps dead letters where the namespace has no shelf; done when they are durable.
    ///
    /// # Errors
    /// When the broker cannot be reached or refuses.
    fn bury(&self, letters: Vec<DeadLetter>) -> BoxFuture<'static, Result<(), LogError>>;

    /// Ends: hands over what waits, lets go of everything.
    fn close(&self) -> BoxFuture<'static, ()>;
}
