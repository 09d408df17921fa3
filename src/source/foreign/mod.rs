//! A log that a broker keeps, with a shelf in a database: one pair of [`Log`] and [`Shelf`].
//!
//! What is one frame group on the embedded pair is ordered steps here. Each order is chosen so that a crash between two
//! steps repeats something and loses nothing: a key is claimed before its record is appended and confirmed after it, a
//! parked record is marked before it is appended and removed after it, rows are written before the frontier passes them.

mod admit;
pub mod broker;
pub(in crate::source) mod budget;
mod find;
mod hold;
mod import;
pub mod open;
mod release;
mod settle;
pub mod store;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::{BoxFuture, ready};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use self::admit::Ids;
use self::broker::{Begin, Broker};
use self::hold::Holding;
use self::settle::Settler;
use self::store::{Store, StoredBranch, StoredEpoch};
use super::{
    AdmitError, Admitted, AsideLane, AsideRow, BranchName, BranchStart, Caps, DeadLetter, DeadQuery, Entered, Epoch,
    Found, HoldRule, Lag, Log, LogError, Page, ParkedQuery, ParkedRow, Reach, Replayed, RowKey, Scheduled, Settlement,
    Shelf, ShelfCounts, Start, Write,
};
use crate::clock::{Clock, Timestamp};
use crate::record::{Position, RecordId};

/// Why a pair without a shelf cannot do what waits.
const NO_SHELF: &str =
    "this source has no shelf: nothing can be delayed, listed or set aside; name one under source.shelf";

/// How a pair is to behave.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Idempotency keys are known at least so long.
    pub key_window: Duration,
    /// The namespace's number in ids.
    pub number: u32,
    /// Where a branch begins that exists since the first revision of the file.
    pub first: First,
    /// What the broker and the shelf know of idempotency keys is the same. Else the shelf's word counts, for what is appended
    /// and what is parked.
    pub one_place_for_keys: bool,
}

/// Where the first branches of a namespace begin in a log that was there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First {
    /// At the first record that is kept.
    Earliest,
    /// After what was there.
    Latest,
    /// At the first record that the broker took at this time or later.
    Time(Timestamp),
}

/// One namespace on a broker. Cheap to clone.
#[derive(Clone)]
pub struct Foreign {
    inner: Arc<Inner>,
}

struct Inner {
    broker: Arc<dyn Broker>,
    store: Option<Arc<dyn Store>>,
    clock: Clock,
    settings: Settings,
    /// Tells this process from others that share the namespace.
    instance: String,
    ids: Mutex<Ids>,
    /// When records of other programs are due.
    hold: tokio::sync::watch::Sender<Option<HoldRule>>,
    /// Keys that this process has on the way: whoever comes second waits for the first.
    running: Mutex<HashMap<Box<str>, CancellationToken>>,
    /// The number under which keys are hashed.
    hashed_by: tokio::sync::OnceCell<u32>,
    /// The revisions where there is no store: they are forgotten at exit.
    epochs: Mutex<Vec<StoredEpoch>>,
    branches: Mutex<BTreeMap<BranchName, Held>>,
    closed: CancellationToken,
    /// What the shelf kept was deleted: it is told nothing more.
    deleted: AtomicBool,
    mover: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

/// A branch that is open in this process.
struct Held {
    settler: Settler,
    parts: Option<Vec<u16>>,
}

impl Foreign {
    /// Joins a broker and a shelf. Starts the task that releases what is due, so it must be called inside a runtime.
    pub fn new(broker: Arc<dyn Broker>, store: Option<Arc<dyn Store>>, settings: Settings, clock: Clock) -> Self {
        let instance = format!("{}/{:08x}", std::process::id(), fastrand::u32(..));
        let inner = Arc::new(Inner {
            broker,
            store,
            clock,
            settings,
            instance,
            ids: Mutex::default(),
            hold: tokio::sync::watch::Sender::new(None),
            running: Mutex::default(),
            hashed_by: tokio::sync::OnceCell::new(),
            epochs: Mutex::default(),
            branches: Mutex::default(),
            closed: CancellationToken::new(),
            deleted: AtomicBool::new(false),
            mover: Mutex::default(),
        });
        if let Some(store) = &inner.store {
            // What the log has lost while nobody looked is told by who remembers that it was there.
            inner.broker.were_given(&store.kept_end());
            *inner.mover.lock() = Some(tokio::spawn(release::run(Arc::downgrade(&inner))));
        }
        Self { inner }
    }

    /// What durable means here, and what is wrong.
    pub fn facts(&self) -> Vec<String> {
        let broker = &self.inner.broker;
        let store = self.inner.store.as_ref().map(|store| store.note());
        [Some(broker.durable_note()), store, broker.trouble()].into_iter().flatten().collect()
    }

    /// Lets everything go: what waits is handed over first.
    pub async fn close(&self) {
        self.inner.closed.cancel();
        let mover = self.inner.mover.lock().take();
        if let Some(mover) = mover {
            let _ = mover.await;
        }
        let held = std::mem::take(&mut *self.inner.branches.lock());
        for (branch, held) in held {
            held.settler.finish().await;
            if let Some(store) = &self.inner.store
                && let Err(error) = store.leave_branch(&branch, &self.inner.instance).await
            {
                tracing::warn!(%branch, %error, "the shelf could not be told that the branch was left in order");
            }
        }
        self.inner.broker.close().await;
        if let Some(store) = &self.inner.store {
            if let Err(error) = self.inner.keep_end(store, &mut Reach::none()).await {
                tracing::warn!(%error, "the shelf could not be told how far the log has come");
            }
            store.close().await;
        }
    }

    /// Deletes what the shelf keeps of the namespace. The broker's log is its owner's.
    ///
    /// # Errors
    /// When the shelf cannot be reached.
    pub async fn delete(&self) -> Result<(), LogError> {
        self.inner.deleted.store(true, Ordering::Relaxed);
        for branch in self.branches() {
            self.inner.broker.forget(&branch).await?;
        }
        match &self.inner.store {
            Some(store) => store.delete().await,
            None => Ok(()),
        }
    }
}

impl Inner {
    fn store(&self) -> Result<&Arc<dyn Store>, LogError> {
        self.still_open()?;
        self.store.as_ref().ok_or(LogError::Unsupported(NO_SHELF))
    }

    fn still_open(&self) -> Result<(), LogError> {
        if self.closed.is_cancelled() { Err(LogError::Closed(CLOSED.into())) } else { Ok(()) }
    }

    fn stored_epochs(&self) -> Vec<StoredEpoch> {
        self.store.as_ref().map_or_else(|| self.epochs.lock().clone(), |store| store.epochs())
    }

    /// Tells the shelf how far the log has come, unless that was `kept` before.
    async fn keep_end(&self, store: &Arc<dyn Store>, kept: &mut Reach) -> Result<(), LogError> {
        let numbers = self.broker.numbers().filter(|end| end != kept && !self.deleted.load(Ordering::Relaxed));
        let Some(end) = numbers else { return Ok(()) };
        store.keep_end(end.clone()).await?;
        *kept = end;
        Ok(())
    }

    /// The number of the newest revision.
    fn epoch(&self) -> u32 {
        self.stored_epochs().last().map_or(0, |epoch| epoch.number)
    }

    /// Where a branch begins that nobody knows.
    fn begin(&self, start: Start) -> Begin {
        match start {
            Start::Earliest => Begin::Earliest,
            Start::Latest => Begin::Latest,
            Start::After(position) if position.offset() == 0 => Begin::Earliest,
            Start::After(_) => Begin::Latest,
            Start::Epoch(1) if self.settings.first == First::Earliest => Begin::Earliest,
            Start::Epoch(1) if let First::Time(time) = self.settings.first => Begin::Time(time),
            Start::Epoch(number) => {
                let known = self.stored_epochs();
                let place = known.iter().find(|epoch| epoch.number == number).map(|epoch| Arc::clone(&epoch.place));
                place.map_or(Begin::Latest, Begin::Place)
            }
        }
    }

    async fn open(self: Arc<Self>, branch: BranchName, start: Start) -> Result<BranchStart, LogError> {
        self.still_open()?;
        let opened = tokio::select! {
            opened = self.broker.open(&branch, self.begin(start)) => opened?,
            () = self.closed.cancelled() => return Err(LogError::Closed(CLOSED.into())),
        };
        let settler = Settler::start(&self, branch.clone());
        // A former hold has ended: what it wrote is written.
        let former = self.branches.lock().insert(branch.clone(), Held { settler, parts: opened.parts.clone() });
        if let Some(former) = former {
            former.settler.finish().await;
        }
        let stored = match &self.store {
            Some(store) => store.open_branch(&branch, &opened.cursor, &self.instance).await?,
            None => StoredBranch { pause: opened.pause, ..StoredBranch::default() },
        };
        let replaced = |row: &&RowKey| opened.fresh.contains(&row.position.part());
        if let Some(row) = stored.ended.iter().find(replaced) {
            return Err(LogError::Damaged(made_anew(&branch, row.position.part()).into()));
        }
        if !opened.fresh.is_empty() {
            self.broker.begun(&branch).await?;
        }
        let mine = |position: Position| opened.parts.as_ref().is_none_or(|parts| parts.contains(&position.part()));
        let mut ended: Vec<_> = stored.ended.into_iter().filter(|row| mine(row.position)).collect();
        if let Some(given) = &opened.given {
            let before = ended.len();
            ended.retain(|row| given.covers(row.position));
            if ended.len() < before {
                tracing::error!(
                    %branch, rows = before - ended.len(),
                    "the shelf remembers records that the log does not know to have given: it has lost some, and what has their \
                     numbers now is delivered as new"
                );
            }
        }
        Ok(BranchStart {
            ended: ended.into_iter().collect(),
            lanes: stored.lanes.into_iter().filter(|lane| mine(lane.first.position)).collect(),
            pause: stored.pause,
            unclean_stops: stored.unclean_stops,
            marks: stored.marks.into_iter().filter(|(position, _)| mine(*position)).collect(),
            cursor: opened.cursor,
            subscription: Box::new(Holding::new(opened.subscription, &self)),
            moved: opened.moved,
        })
    }

    /// Ends a branch's hold here before its rows are changed as a whole.
    async fn let_go(&self, branch: &BranchName) {
        let held = self.branches.lock().remove(branch);
        if let Some(held) = held {
            held.settler.finish().await;
        }
    }

    /// Asks the shelf.
    fn ask<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&Arc<dyn Store>) -> BoxFuture<'static, Result<T, LogError>>,
    ) -> BoxFuture<'static, Result<T, LogError>> {
        match self.store() {
            Ok(store) => ask(store),
            Err(refused) => ready(Err(refused)).boxed(),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

/// Rows of a part that the broker has never given to the branch: they are of records that it no longer knows.
fn made_anew(branch: &BranchName, part: u16) -> String {
    format!(
        "branch {branch} has no offset in partition {part}, and the shelf knows of records there that have ended: the log was \
         made anew, or the offsets were removed. Nothing is delivered, since new records would be taken for those. Is it the \
         same log, set the offsets (`kafka-consumer-groups --reset-offsets`) and the branch goes on by itself; is it a new \
         one, see to the dead letters, then `walflow namespace delete` and start anew"
    )
}

/// Why a closed pair refuses.
const CLOSED: &str = "the log is closing";

/// An epoch as pipelines know it; where it begins only the broker can read.
fn epoch(stored: StoredEpoch) -> Epoch {
    Epoch { number: stored.number, after: Position(0), files: stored.files }
}

impl Log for Foreign {
    fn caps(&self) -> Caps {
        let (broker, has_store) = (self.inner.broker.caps(), self.inner.store.is_some());
        Caps {
            delay: has_store || broker.delay.is_some(),
            max_delay: if has_store { None } else { broker.delay },
            hold: broker.hold,
            schedule: has_store,
            ordered: broker.ordered,
            exact_keys: self.inner.append_exactly(&[]).is_some(),
            look_up: broker.look_up,
            durable: broker.durable,
            set_aside: has_store,
            pause: has_store || broker.pause,
            shared: true,
            each_end: broker.each_end,
        }
    }

    fn admit(&self, writes: Vec<Write>) -> BoxFuture<'static, Result<Vec<Admitted>, AdmitError>> {
        let entering = self.enter(writes);
        async move { entering.await?.await }.boxed()
    }

    fn enter(&self, writes: Vec<Write>) -> BoxFuture<'static, Result<Entered, AdmitError>> {
        Arc::clone(&self.inner).enter_all(writes).boxed()
    }

    fn open_branch(&self, branch: &BranchName, start: Start) -> BoxFuture<'static, Result<BranchStart, LogError>> {
        Arc::clone(&self.inner).open(branch.clone(), start).boxed()
    }

    fn make_branch(&self, branch: &BranchName, start: Start) -> BoxFuture<'static, Result<(), LogError>> {
        match self.inner.still_open() {
            Ok(()) => self.inner.broker.prepare(branch, self.inner.begin(start)),
            Err(closed) => ready(Err(closed)).boxed(),
        }
    }

    fn forget_branch(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let (inner, branch) = (Arc::clone(&self.inner), branch.clone());
        async move {
            inner.still_open()?;
            inner.let_go(&branch).await;
            inner.broker.forget(&branch).await?;
            match &inner.store {
                Some(store) => store.forget_branch(&branch).await,
                None => Ok(()),
            }
        }
        .boxed()
    }

    fn rename_branch(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let (inner, from, to) = (Arc::clone(&self.inner), from.clone(), to.clone());
        async move {
            inner.still_open()?;
            inner.let_go(&from).await;
            // Rows first: found under the old name by a start in between, they would be no branch's.
            if let Some(store) = &inner.store {
                store.rename_branch(&from, &to).await?;
            }
            inner.broker.rename(&from, &to).await
        }
        .boxed()
    }

    fn hold(&self, rule: Option<HoldRule>) {
        if self.inner.broker.caps().hold {
            self.inner.hold.send_replace(rule);
        }
    }

    fn branches(&self) -> Vec<BranchName> {
        match &self.inner.store {
            Some(store) => store.branches(),
            None => self.inner.branches.lock().keys().cloned().collect(),
        }
    }

    fn lag(&self, branch: &BranchName) -> Lag {
        self.inner.broker.lag(branch)
    }

    fn end(&self) -> Reach {
        self.inner.broker.end()
    }

    fn find(&self, id: RecordId) -> BoxFuture<'static, Result<Option<Found>, LogError>> {
        Arc::clone(&self.inner).find(id, self.branches()).boxed()
    }

    fn put_epoch(&self, files: Bytes) -> BoxFuture<'static, Result<Epoch, LogError>> {
        let inner = Arc::clone(&self.inner);
        async move {
            inner.still_open()?;
            let place = inner.broker.place().await?;
            let Some(store) = &inner.store else {
                let mut epochs = inner.epochs.lock();
                let number = epochs.last().map_or(0, |newest| newest.number) + 1;
                // Of an earlier run nobody knows: one revision is in force for all records.
                *epochs = vec![StoredEpoch { number, place, files }];
                return epochs.last().cloned().map(epoch).ok_or(LogError::Unsupported("no revision was stored"));
            };
            store.put_epoch(files, place).await.map(epoch)
        }
        .boxed()
    }

    fn epochs(&self) -> Vec<Epoch> {
        self.inner.stored_epochs().into_iter().map(epoch).collect()
    }
}

impl Shelf for Foreign {
    fn settle(&self, branch: &BranchName, settlement: Settlement) -> BoxFuture<'static, Result<(), LogError>> {
        self.inner.settle(branch, settlement)
    }

    fn aside_rows(
        &self,
        branch: &BranchName,
        lane: &str,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<AsideRow>, LogError>> {
        self.inner.ask(|store| store.aside_rows(branch, lane, limit))
    }

    fn replayed_lanes(&self, branch: &BranchName) -> BoxFuture<'static, Vec<AsideLane>> {
        let Some(store) = self.inner.store.clone() else { return futures::future::pending().boxed() };
        let (inner, branch) = (Arc::clone(&self.inner), branch.clone());
        async move {
            loop {
                let lanes = store.replayed_lanes(&branch).await;
                let parts = inner.branches.lock().get(&branch).and_then(|held| held.parts.clone());
                let mine =
                    |lane: &AsideLane| parts.as_ref().is_none_or(|parts| parts.contains(&lane.first.position.part()));
                let mine: Vec<_> = lanes.into_iter().filter(mine).collect();
                if !mine.is_empty() {
                    return mine;
                }
            }
        }
        .boxed()
    }

    fn parked(&self, query: ParkedQuery) -> BoxFuture<'static, Result<Page<ParkedRow>, LogError>> {
        self.inner.ask(|store| store.parked(query))
    }

    fn cancel(&self, which: Scheduled) -> BoxFuture<'static, Result<u64, LogError>> {
        self.inner.ask(|store| store.cancel(which))
    }

    fn reschedule(&self, which: Scheduled, due_at: Timestamp) -> BoxFuture<'static, Result<u64, LogError>> {
        self.inner.ask(|store| store.reschedule(which, due_at))
    }

    fn dead_letters(&self, query: DeadQuery) -> BoxFuture<'static, Result<Page<DeadLetter>, LogError>> {
        // Without a shelf they are a topic's or a queue's: none is here, which a branch asks at its start.
        if self.inner.store.is_none() && !self.inner.closed.is_cancelled() {
            return ready(Ok(Page { rows: Vec::new(), next: None })).boxed();
        }
        self.inner.ask(|store| store.dead_letters(query))
    }

    fn replay(&self, query: DeadQuery, force: bool) -> BoxFuture<'static, Result<Replayed, LogError>> {
        self.inner.ask(|store| store.replay(query, force))
    }

    fn purge(&self, query: DeadQuery) -> BoxFuture<'static, Result<u64, LogError>> {
        self.inner.ask(|store| store.purge(query))
    }

    fn counts(&self) -> ShelfCounts {
        self.inner.store.as_ref().map(|store| store.counts()).unwrap_or_default()
    }
}
