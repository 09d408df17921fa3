//! A log in memory: the reference for both traits, for tests and benchmarks. Lost at exit.
//!
//! Takes what every log takes; keeps a record until every branch has passed it. Never touches the disk.

mod store;

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, ready};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::{
    AdmitError, Admitted, AsideLane, AsideRow, BranchName, BranchStart, Caps, DeadLetter, DeadQuery, Entered, Entry,
    Epoch, Found, Lag, Log, LogError, Page, ParkedQuery, ParkedRow, Reach, Replayed, Scheduled, Settlement, Shelf,
    ShelfCounts, Start, Subscription, Write,
};
use crate::clock::{Clock, Timestamp};
use crate::record::{Position, RecordId};
use store::Store;

/// Why a closed log refuses.
const CLOSED: &str = "the log is closing";

/// One namespace's log in memory.
pub struct Memory {
    store: Mutex<Store>,
    closed: watch::Sender<bool>,
    clock: Clock,
    /// Keys are remembered from then on, all of them.
    opened: Timestamp,
    end: watch::Sender<Position>,
    /// Something was parked or moved: the releaser looks again.
    parked: Notify,
    /// Something was replayed: branches look for it.
    replayed: Notify,
    releaser: Mutex<Option<tokio::task::JoinHandle<()>>>,
    this: Weak<Self>,
}

impl Memory {
    /// An empty log of the namespace with this number.
    pub fn new(number: u32, clock: Clock) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            store: Mutex::new(Store::new(number)),
            closed: watch::Sender::new(false),
            opened: clock.now(),
            clock,
            end: watch::Sender::new(Position(0)),
            parked: Notify::new(),
            replayed: Notify::new(),
            releaser: Mutex::default(),
            this: Weak::clone(this),
        })
    }

    /// Idempotency keys are remembered so long; a day unless this is called.
    pub fn remember_keys_for(&self, window: Duration) {
        self.store.lock().key_window = window;
    }

    /// Takes and gives nothing more: every verb answers that it is closed, and every reader hears it.
    pub fn close(&self) {
        self.closed.send_replace(true);
    }

    /// As a restart of the process would find it, if it outlived one.
    #[cfg(test)]
    pub(super) fn reopen_for_tests(&self) {
        self.closed.send_replace(false);
    }

    /// What is held, unless it is closed.
    fn open_store(&self) -> Result<MutexGuard<'_, Store>, LogError> {
        let store = self.store.lock();
        if *self.closed.borrow() { Err(LogError::Closed(CLOSED.into())) } else { Ok(store) }
    }

    /// Answers by what is held, unless it is closed.
    fn answer<T: Send + 'static>(&self, verb: impl FnOnce(&mut Store) -> T) -> BoxFuture<'static, Result<T, LogError>> {
        ready(self.open_store().map(|mut store| verb(&mut store))).boxed()
    }

    /// Starts the task that releases parked records, once there is one.
    fn wake_releaser(&self) {
        self.parked.notify_one();
        let mut releaser = self.releaser.lock();
        if releaser.is_none() {
            *releaser = Some(tokio::spawn(release(Weak::clone(&self.this))));
        }
    }

    fn publish(&self, end: Position) {
        self.end.send_if_modified(|known| {
            let moved = end > *known;
            *known = end.max(*known);
            moved
        });
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(releaser) = self.releaser.lock().take() {
            releaser.abort();
        }
    }
}

async fn release(memory: Weak<Memory>) {
    loop {
        let Some(strong) = memory.upgrade() else { return };
        let next = strong.store.lock().next_due();
        match next {
            Some(due) if due <= strong.clock.now() => {
                let Ok(end) = strong.open_store().map(|mut store| store.release(strong.clock.now())) else {
                    strong.parked.notified().await;
                    continue;
                };
                strong.publish(end);
            }
            Some(due) => {
                let clock = strong.clock.clone();
                tokio::select! {
                    () = clock.sleep_until(due) => {}
                    () = strong.parked.notified() => {}
                }
            }
            None => strong.parked.notified().await,
        }
    }
}

struct Reader {
    memory: Arc<Memory>,
    after: Position,
    end: watch::Receiver<Position>,
    closed: watch::Receiver<bool>,
}

impl Subscription for Reader {
    fn next(&mut self, max_records: usize, max_bytes: usize) -> BoxFuture<'_, Result<Vec<Entry>, LogError>> {
        async move {
            let after = self.after;
            tokio::select! {
                _ = self.end.wait_for(|end| *end > after) => {}
                _ = self.closed.wait_for(|closed| *closed) => {}
            }
            let entries = self.memory.open_store()?.read(self.after, max_records, max_bytes);
            if let Some(last) = entries.last() {
                self.after = last.position;
            }
            Ok(entries)
        }
        .boxed()
    }
}

impl Log for Memory {
    fn caps(&self) -> Caps {
        Caps {
            delay: true,
            max_delay: None,
            hold: false,
            schedule: true,
            ordered: true,
            exact_keys: true,
            look_up: true,
            durable: false,
            set_aside: true,
            pause: true,
            shared: false,
            each_end: false,
        }
    }

    fn admit(&self, writes: Vec<Write>) -> BoxFuture<'static, Result<Vec<Admitted>, AdmitError>> {
        let done = self.open_store().map(|mut store| store.admit(writes, self.clock.now()));
        let Ok((admitted, end)) = done else { return ready(Err(AdmitError::Closed { reason: CLOSED.into() })).boxed() };
        self.publish(end);
        if admitted.iter().any(|one| matches!(one, Admitted::Parked { .. })) {
            self.wake_releaser();
        }
        ready(Ok(admitted)).boxed()
    }

    fn enter(&self, writes: Vec<Write>) -> BoxFuture<'static, Result<Entered, AdmitError>> {
        ready(Ok(self.admit(writes))).boxed()
    }

    fn open_branch(&self, branch: &BranchName, start: Start) -> BoxFuture<'static, Result<BranchStart, LogError>> {
        let Some(memory) = self.this.upgrade() else {
            return ready(Err(LogError::Closed("it was dropped".into()))).boxed();
        };
        let mut store = match self.open_store() {
            Ok(store) => store,
            Err(closed) => return ready(Err(closed)).boxed(),
        };
        let cursor = store.open(branch, start);
        let found = store.branch(branch);
        let open = BranchStart {
            cursor: cursor.into(),
            ended: found.ended.clone(),
            lanes: found.lanes(),
            pause: found.pause.clone(),
            unclean_stops: 0,
            marks: found.marks.iter().map(|(position, marks)| (*position, *marks)).collect(),
            subscription: Box::new(Reader {
                memory,
                after: cursor,
                end: self.end.subscribe(),
                closed: self.closed.subscribe(),
            }),
            moved: CancellationToken::new(),
        };
        ready(Ok(open)).boxed()
    }

    fn forget_branch(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        self.answer(|store| _ = store.branches.remove(branch))
    }

    fn rename_branch(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        self.answer(|store| store.rename(from, to))
    }

    fn branches(&self) -> Vec<BranchName> {
        self.store.lock().branches.keys().cloned().collect()
    }

    fn lag(&self, branch: &BranchName) -> Lag {
        self.store.lock().lag(branch)
    }

    fn end(&self) -> Reach {
        (*self.end.borrow()).into()
    }

    fn find(&self, id: RecordId) -> BoxFuture<'static, Result<Option<Found>, LogError>> {
        self.answer(|store| store.find(id))
    }

    fn put_epoch(&self, files: Bytes) -> BoxFuture<'static, Result<Epoch, LogError>> {
        self.answer(|store| store.put_epoch(files))
    }

    fn epochs(&self) -> Vec<Epoch> {
        self.store.lock().epochs.clone()
    }
}

impl Shelf for Memory {
    fn settle(&self, branch: &BranchName, settlement: Settlement) -> BoxFuture<'static, Result<(), LogError>> {
        self.answer(|store| store.settle(branch, settlement))
    }

    fn aside_rows(
        &self,
        branch: &BranchName,
        lane: &str,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<AsideRow>, LogError>> {
        self.answer(|store| {
            store.branch(branch).aside.values().filter(|row| *row.lane == *lane).take(limit).cloned().collect()
        })
    }

    fn replayed_lanes(&self, branch: &BranchName) -> BoxFuture<'static, Vec<AsideLane>> {
        let (this, branch) = (self.this.clone(), branch.clone());
        async move {
            loop {
                let Some(memory) = this.upgrade() else { return std::future::pending().await };
                let news = memory.replayed.notified();
                tokio::pin!(news);
                news.as_mut().enable();
                let lanes = memory.store.lock().take_replayed(&branch);
                if !lanes.is_empty() {
                    return lanes;
                }
                news.await;
            }
        }
        .boxed()
    }

    fn parked(&self, query: ParkedQuery) -> BoxFuture<'static, Result<Page<ParkedRow>, LogError>> {
        self.answer(|store| store.parked_page(&query))
    }

    fn cancel(&self, which: Scheduled) -> BoxFuture<'static, Result<u64, LogError>> {
        self.answer(|store| store.cancel(&which))
    }

    fn reschedule(&self, which: Scheduled, due_at: Timestamp) -> BoxFuture<'static, Result<u64, LogError>> {
        let moved = self.answer(|store| store.reschedule(&which, due_at));
        self.wake_releaser();
        moved
    }

    fn dead_letters(&self, query: DeadQuery) -> BoxFuture<'static, Result<Page<DeadLetter>, LogError>> {
        self.answer(|store| store.dead_page(&query))
    }

    fn replay(&self, query: DeadQuery, force: bool) -> BoxFuture<'static, Result<Replayed, LogError>> {
        let replayed = self.answer(|store| store.replay(&query, force, self.clock.now()));
        self.replayed.notify_waiters();
        replayed
    }

    fn purge(&self, query: DeadQuery) -> BoxFuture<'static, Result<u64, LogError>> {
        self.answer(|store| store.purge(&query))
    }

    fn counts(&self) -> ShelfCounts {
        let store = self.store.lock();
        let by_branch: &BTreeMap<_, _> = &store.branches;
        ShelfCounts {
            parked: store.parked_count(),
            aside: by_branch.iter().map(|(name, branch)| (name.clone(), branch.aside.len() as u64)).collect(),
            dead: by_branch
                .iter()
                .map(|(name, branch)| (name.clone(), branch.dead.len() as u64, branch.dead_bytes()))
                .collect(),
            keys_since: Some(self.opened),
            overflowed: 0,
        }
    }
}
