//! A broker in memory, for tests of pairs: it keeps everything, and outlives whoever opens it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};

use futures::FutureExt as _;
use futures::future::{BoxFuture, ready};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::broker::{Begin, Broker, BrokerCaps, Handed, Opened};
use crate::record::{Position, Record, RecordId};
use crate::source::{AdmitError, BranchName, DeadLetter, Entry, Lag, LogError, Reach, Subscription};

/// What is kept.
#[derive(Default)]
struct Kept {
    entries: Vec<Entry>,
    cursors: BTreeMap<BranchName, Position>,
    letters: Vec<DeadLetter>,
    /// Answers to the next appends that are lost though the records are there.
    lost_answers: usize,
}

/// A log of one part in memory.
pub(in crate::source) struct MemoryBroker {
    kept: Mutex<Kept>,
    end: watch::Sender<Position>,
    closed: Mutex<CancellationToken>,
    /// What branches that are opened hear of what they were given.
    given: Mutex<Option<Reach>>,
    this: Weak<Self>,
}

impl MemoryBroker {
    pub(in crate::source) fn new() -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            kept: Mutex::default(),
            end: watch::Sender::new(Position(0)),
            closed: Mutex::default(),
            given: Mutex::default(),
            this: Weak::clone(this),
        })
    }

    /// As a new process would find it.
    pub(in crate::source) fn reopen(&self) {
        *self.closed.lock() = CancellationToken::new();
    }

    /// The next appends are done, and their answers are lost.
    pub(in crate::source) fn lose_answers(&self, count: usize) {
        self.kept.lock().lost_answers = count;
    }

    /// Branches were given so much, and nothing beyond.
    pub(in crate::source) fn has_given(&self, given: Reach) {
        *self.given.lock() = Some(given);
    }

    /// All that it keeps.
    pub(in crate::source) fn records(&self) -> Vec<Arc<Record>> {
        self.kept.lock().entries.iter().map(|entry| Arc::clone(&entry.record)).collect()
    }

    fn first_after(begin: &Begin, end: Position) -> Position {
        match begin {
            Begin::Earliest => Position(0),
            Begin::Latest | Begin::Time(_) => end,
            Begin::Place(place) => Position(place.parse().unwrap_or(0)),
        }
    }
}

struct Reader {
    broker: Arc<MemoryBroker>,
    after: Position,
    end: watch::Receiver<Position>,
    closed: CancellationToken,
}

impl Subscription for Reader {
    fn next(&mut self, max_records: usize, max_bytes: usize) -> BoxFuture<'_, Result<Vec<Entry>, LogError>> {
        async move {
            let after = self.after;
            tokio::select! {
                biased;
                () = self.closed.cancelled() => return Err(LogError::Closed("it is closed".into())),
                _ = self.end.wait_for(|end| *end > after) => {}
            }
            let kept = self.broker.kept.lock();
            let mut bytes = 0;
            let within = |entry: &&Entry| {
                let fits = bytes <= max_bytes;
                bytes += entry.record.weight();
                fits
            };
            let from = usize::try_from(after.0).unwrap();
            let entries: Vec<Entry> =
                kept.entries.iter().skip(from).take(max_records.max(1)).take_while(within).cloned().collect();
            if let Some(last) = entries.last() {
                self.after = last.position;
            }
            Ok(entries)
        }
        .boxed()
    }
}

impl Broker for MemoryBroker {
    fn caps(&self) -> BrokerCaps {
        BrokerCaps {
            ordered: true,
            durable: true,
            each_end: false,
            hold: true,
            pause: false,
            delay: None,
            look_up: true,
            largest_record: None,
        }
    }

    fn durable_note(&self) -> String {
        "in memory".to_owned()
    }

    fn trouble(&self) -> Option<String> {
        None
    }

    fn append(&self, records: Vec<Arc<Record>>) -> BoxFuture<'static, Result<Handed, AdmitError>> {
        let mut kept = self.kept.lock();
        let mut positions = Vec::new();
        for record in records {
            let position = Position(kept.entries.len() as u64 + 1);
            kept.entries.push(Entry::new(position, record));
            positions.push(position);
        }
        let lost = kept.lost_answers > 0;
        kept.lost_answers = kept.lost_answers.saturating_sub(1);
        self.end.send_replace(Position(kept.entries.len() as u64));
        let outcome = move |position| {
            if lost { Err(AdmitError::Unknown { reason: "the answer is lost".into() }) } else { Ok(position) }
        };
        ready(Ok(ready(positions.into_iter().map(outcome).collect()).boxed())).boxed()
    }

    fn open(&self, branch: &BranchName, begin: Begin) -> BoxFuture<'static, Result<Opened, LogError>> {
        let broker = self.this.upgrade().unwrap();
        let end = *self.end.borrow();
        let cursor = *self.kept.lock().cursors.entry(branch.clone()).or_insert(Self::first_after(&begin, end));
        let closed = self.closed.lock().clone();
        let subscription = Reader { broker, after: cursor, end: self.end.subscribe(), closed };
        ready(Ok(Opened {
            cursor: cursor.into(),
            given: self.given.lock().clone(),
            parts: None,
            fresh: Vec::new(),
            pause: None,
            subscription: Box::new(subscription),
            moved: CancellationToken::new(),
        }))
        .boxed()
    }

    fn progress(&self, branch: &BranchName, frontier: &Reach, _: &[Position]) {
        if let Some(cursor) = self.kept.lock().cursors.get_mut(branch) {
            *cursor = frontier.single().max(*cursor);
        }
    }

    fn forget(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        self.kept.lock().cursors.remove(branch);
        ready(Ok(())).boxed()
    }

    fn rename(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let mut kept = self.kept.lock();
        if let Some(cursor) = kept.cursors.remove(from) {
            kept.cursors.entry(to.clone()).or_insert(cursor);
        }
        ready(Ok(())).boxed()
    }

    fn lag(&self, branch: &BranchName) -> Lag {
        let kept = self.kept.lock();
        let end = kept.entries.len() as u64;
        let cursor = kept.cursors.get(branch).copied().unwrap_or(Position(end));
        let left = kept.entries.iter().find(|entry| entry.position > cursor);
        let open = kept.entries.iter().filter(|entry| entry.position > cursor);
        Lag {
            records: end - cursor.0,
            bytes: open.map(|entry| entry.record.weight() as u64).sum(),
            oldest: left.map(|entry| entry.record.written_at),
            cursor: cursor.into(),
        }
    }

    fn end(&self) -> Reach {
        (*self.end.borrow()).into()
    }

    fn place(&self) -> BoxFuture<'static, Result<Arc<str>, LogError>> {
        ready(Ok(self.end.borrow().to_string().into())).boxed()
    }

    fn find_after(
        &self,
        place: &str,
        ids: Vec<RecordId>,
    ) -> BoxFuture<'static, Result<HashMap<RecordId, Position>, LogError>> {
        let from: usize = place.parse().unwrap();
        let kept = self.kept.lock();
        let there = kept.entries.iter().skip(from).filter(|entry| ids.contains(&entry.record.id));
        ready(Ok(there.map(|entry| (entry.record.id, entry.position)).collect())).boxed()
    }

    fn locate(&self, id: RecordId) -> BoxFuture<'static, Result<Option<(Position, Arc<Record>)>, LogError>> {
        let kept = self.kept.lock();
        let found = kept.entries.iter().find(|entry| entry.record.id == id);
        ready(Ok(found.map(|entry| (entry.position, Arc::clone(&entry.record))))).boxed()
    }

    fn unfinished(
        &self,
        position: Position,
        branches: Vec<BranchName>,
    ) -> BoxFuture<'static, Result<Vec<BranchName>, LogError>> {
        let kept = self.kept.lock();
        let behind = |branch: &BranchName| kept.cursors.get(branch).is_some_and(|cursor| *cursor < position);
        ready(Ok(branches.into_iter().filter(behind).collect())).boxed()
    }

    fn bury(&self, letters: Vec<DeadLetter>) -> BoxFuture<'static, Result<(), LogError>> {
        self.kept.lock().letters.extend(letters);
        ready(Ok(())).boxed()
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.closed.lock().cancel();
        ready(()).boxed()
    }
}
