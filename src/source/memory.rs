//! A log in memory: the reference for both traits, for tests and benchmarks. Lost at exit.
//!
//! Takes what every log takes; keeps a record until every branch has passed it. Never touches the disk.

mod store;

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, ready};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::{
    AdmitError, Admitted, AsideLane, AsideRow, BranchName, BranchStart, Caps, DeadLetter, DeadQuery, Entry, Epoch,
    Found, Lag, Log, LogError, Page, ParkedQuery, ParkedRow, Replayed, Scheduled, Settlement, Shelf, ShelfCounts,
    Start, Subscription, Write,
};
use crate::clock::{Clock, Timestamp};
use crate::record::{Position, RecordId};
use store::Store;

/// One namespace's log in memory.
pub struct Memory {
    store: Mutex<Store>,
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
            opened: clock.now(),
            clock,
            end: watch::Sender::new(Position(0)),
            parked: Notify::new(),
            replayed: Notify::new(),
            releaser: Mutex::default(),
            this: Weak::clone(this),
        })
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
                let end = strong.store.lock().release(strong.clock.now());
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
}

impl Subscription for Reader {
    fn next(&mut self, max_records: usize, max_bytes: usize) -> BoxFuture<'_, Result<Vec<Entry>, LogError>> {
        async move {
            let after = self.after;
            let _ = self.end.wait_for(|end| *end > after).await;
            let entries = self.memory.store.lock().read(self.after, max_records, max_bytes);
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
            schedule: true,
            ordered: true,
            exact_keys: true,
            look_up: true,
            durable: false,
        }
    }

    fn admit(&self, writes: Vec<Write>) -> BoxFuture<'static, Result<Vec<Admitted>, AdmitError>> {
        let (admitted, end) = self.store.lock().admit(writes, self.clock.now());
        self.publish(end);
        if admitted.iter().any(|one| matches!(one, Admitted::Parked { .. })) {
            self.wake_releaser();
        }
        ready(Ok(admitted)).boxed()
    }

    fn open_branch(&self, branch: &BranchName, start: Start) -> BoxFuture<'static, Result<BranchStart, LogError>> {
        let Some(memory) = self.this.upgrade() else {
            return ready(Err(LogError::Closed("it was dropped".into()))).boxed();
        };
        let mut store = self.store.lock();
        let cursor = store.open(branch, start);
        let found = store.branch(branch);
        let open = BranchStart {
            cursor,
            ended: found.ended.clone(),
            lanes: found.lanes(),
            pause: found.pause.clone(),
            unclean_stops: 0,
            marks: found.marks.iter().map(|(position, marks)| (*position, *marks)).collect(),
            subscription: Box::new(Reader { memory, after: cursor, end: self.end.subscribe() }),
        };
        ready(Ok(open)).boxed()
    }

    fn forget_branch(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        self.store.lock().branches.remove(branch);
        ready(Ok(())).boxed()
    }

    fn rename_branch(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        self.store.lock().rename(from, to);
        ready(Ok(())).boxed()
    }

    fn branches(&self) -> Vec<BranchName> {
        self.store.lock().branches.keys().cloned().collect()
    }

    fn lag(&self, branch: &BranchName) -> Lag {
        self.store.lock().lag(branch)
    }

    fn end(&self) -> Position {
        *self.end.borrow()
    }

    fn find(&self, id: RecordId) -> BoxFuture<'static, Result<Option<Found>, LogError>> {
        ready(Ok(self.store.lock().find(id))).boxed()
    }

    fn put_epoch(&self, files: Bytes) -> BoxFuture<'static, Result<Epoch, LogError>> {
        ready(Ok(self.store.lock().put_epoch(files))).boxed()
    }

    fn epochs(&self) -> Vec<Epoch> {
        self.store.lock().epochs.clone()
    }
}

impl Shelf for Memory {
    fn settle(&self, branch: &BranchName, settlement: Settlement) -> BoxFuture<'static, Result<(), LogError>> {
        self.store.lock().settle(branch, settlement);
        ready(Ok(())).boxed()
    }

    fn aside_rows(
        &self,
        branch: &BranchName,
        lane: &str,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<AsideRow>, LogError>> {
        let mut store = self.store.lock();
        let rows = store.branch(branch).aside.values().filter(|row| *row.lane == *lane).take(limit).cloned().collect();
        ready(Ok(rows)).boxed()
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
        ready(Ok(self.store.lock().parked_page(&query))).boxed()
    }

    fn cancel(&self, which: Scheduled) -> BoxFuture<'static, Result<u64, LogError>> {
        ready(Ok(self.store.lock().cancel(&which))).boxed()
    }

    fn reschedule(&self, which: Scheduled, due_at: Timestamp) -> BoxFuture<'static, Result<u64, LogError>> {
        let moved = self.store.lock().reschedule(&which, due_at);
        self.wake_releaser();
        ready(Ok(moved)).boxed()
    }

    fn dead_letters(&self, query: DeadQuery) -> BoxFuture<'static, Result<Page<DeadLetter>, LogError>> {
        ready(Ok(self.store.lock().dead_page(&query))).boxed()
    }

    fn replay(&self, query: DeadQuery, force: bool) -> BoxFuture<'static, Result<Replayed, LogError>> {
        let replayed = self.store.lock().replay(&query, force, self.clock.now());
        self.replayed.notify_waiters();
        ready(Ok(replayed)).boxed()
    }

    fn purge(&self, query: DeadQuery) -> BoxFuture<'static, Result<u64, LogError>> {
        ready(Ok(self.store.lock().purge(&query))).boxed()
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
