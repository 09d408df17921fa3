//! What the log keeps in memory of one namespace: its newest records, its branches' cursors, its segments' places.
//!
//! The writer publishes here what has become durable, the settle thread takes away what readers find in segments, and
//! readers wait here for news. Locks are held for moments, and never across an await.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use super::change::NamespaceNumber;
use super::segment::Segments;
use crate::clock::Timestamp;
use crate::record::{Namespace, Position, RecordId};
use crate::source::embedded::NamespaceSettings;
use crate::source::{BranchName, Entry, Epoch};

/// A record in the tail with the bytes of its frame.
struct Recent {
    entry: Entry,
    bytes: u64,
    /// When its frame was written; a released record entered the log long after it was accepted.
    time: Timestamp,
}

/// The newest records, without a gap from `first` on.
#[derive(Default)]
struct Tail {
    entries: VecDeque<Recent>,
    bytes: u64,
}

/// A place on the way from a position to bytes and time, for lag.
#[derive(Clone, Copy, Debug)]
struct Milestone {
    /// The first record behind it.
    position: Position,
    /// Bytes of all records before it.
    bytes: u64,
    /// When it entered the log, if that is known.
    time: Option<Timestamp>,
}

#[derive(Default)]
struct Milestones {
    list: VecDeque<Milestone>,
    /// Bytes between two of them; doubles when there are too many.
    every: u64,
}

const MILESTONES: usize = 2048;
const MILESTONE_BYTES: u64 = 64 * 1024;

/// One branch's progress.
#[derive(Clone, Debug, Default)]
pub(super) struct Branch {
    /// What the driver has asked to store.
    pub(super) wanted: Position,
    /// What is stored durably.
    pub(super) durable: Position,
    /// It stands in the writer's list of cursors to be written.
    pub(super) dirty: bool,
    /// The cursor at points in time, for look-ups.
    pub(super) samples: VecDeque<(Timestamp, Position)>,
}

const SAMPLES: usize = 600;

/// One namespace in memory.
pub(super) struct Space {
    /// Its number.
    pub number: NamespaceNumber,
    /// Its name; `None` for the instance's own frames.
    pub name: Option<Namespace>,
    pub(super) settings: RwLock<NamespaceSettings>,
    /// The settings are its own. Until then, after a start, nothing of it is forgotten.
    pub(super) told: AtomicBool,
    tail: Mutex<Tail>,
    /// The newest durable position.
    end: AtomicU64,
    /// The newest position that was given out; only the writer moves it.
    pub(super) assigned: AtomicU64,
    /// Bytes of all records up to `end`.
    end_bytes: AtomicU64,
    /// Bytes of parked records.
    pub(super) parked_bytes: AtomicU64,
    /// Bytes of all records up to the lowest cursor.
    finished_bytes: AtomicU64,
    milestones: Mutex<Milestones>,
    /// The first position that is kept.
    pub(super) first_kept: AtomicU64,
    /// Woken for new records, moved cursors and the end.
    pub(super) news: Notify,
    /// Woken when somebody else put rows aside.
    pub(super) replays: Notify,
    /// Lanes that a replay made, by branch, not yet fetched.
    pub(super) replayed: Mutex<BTreeMap<BranchName, Vec<Box<str>>>>,
    pub(super) branches: Mutex<BTreeMap<BranchName, Branch>>,
    pub(super) epochs: Mutex<Vec<Epoch>>,
    pub(super) segments: Mutex<Segments>,
    pub(super) deleted: AtomicBool,
    /// Records that `on_full: drop` has ended.
    pub(super) overflowed: AtomicU64,
    /// At the last look records up to here were older than the backlog may be; 0 = none.
    pub(super) aged: AtomicU64,
    /// Idempotency keys from before this time (milliseconds) have been forgotten.
    keys_floor: AtomicI64,
    /// A repair has lost cursors of records up to here.
    pub(super) start_over: AtomicU64,
    /// What is parked stays parked: the namespace is moving to another log.
    pub(super) held: AtomicBool,
}

impl Space {
    /// A namespace whose newest record is `end`.
    pub(super) fn new(
        number: NamespaceNumber,
        name: Option<Namespace>,
        settings: NamespaceSettings,
        segments: Segments,
    ) -> Self {
        let end = segments.settled().0;
        let mut milestones = Milestones { every: MILESTONE_BYTES, ..Milestones::default() };
        let mut bytes = 0;
        for sealed in segments.sealed() {
            milestones.list.push_back(Milestone { position: sealed.first, bytes, time: None });
            bytes += sealed.bytes;
        }
        if let Some((position, len)) = segments.active() {
            milestones.list.push_back(Milestone { position, bytes, time: None });
            bytes += len;
        }
        Self {
            number,
            name,
            settings: RwLock::new(settings),
            told: AtomicBool::new(false),
            tail: Mutex::default(),
            end: AtomicU64::new(end),
            assigned: AtomicU64::new(end),
            end_bytes: AtomicU64::new(bytes),
            parked_bytes: AtomicU64::new(0),
            finished_bytes: AtomicU64::new(0),
            milestones: Mutex::new(milestones),
            first_kept: AtomicU64::new(1),
            news: Notify::new(),
            replays: Notify::new(),
            replayed: Mutex::default(),
            branches: Mutex::default(),
            epochs: Mutex::default(),
            segments: Mutex::new(segments),
            deleted: AtomicBool::new(false),
            overflowed: AtomicU64::new(0),
            aged: AtomicU64::new(0),
            keys_floor: AtomicI64::new(0),
            start_over: AtomicU64::new(0),
            held: AtomicBool::new(false),
        }
    }

    /// The newest durable position.
    pub(super) fn end(&self) -> Position {
        Position(self.end.load(Ordering::Acquire))
    }

    /// The number of the revision that is in force, 0 before the first.
    pub(super) fn epoch(&self) -> u32 {
        self.epochs.lock().last().map_or(0, |epoch| epoch.number)
    }

    /// Puts a durable record at the end.
    pub(super) fn publish(&self, entry: Entry, bytes: u64, time: Timestamp) {
        let position = entry.position;
        {
            let mut tail = self.tail.lock();
            tail.bytes += bytes;
            tail.entries.push_back(Recent { entry, bytes, time });
        }
        self.count(position, bytes, time);
        self.end.store(position.0, Ordering::Release);
    }

    /// Counts a durable record without keeping it: it is in a segment already.
    pub(super) fn count(&self, position: Position, bytes: u64, time: Timestamp) {
        let before = self.end_bytes.fetch_add(bytes, Ordering::AcqRel);
        {
            let mut milestones = self.milestones.lock();
            let every = milestones.every;
            if milestones.list.back().is_none_or(|last| last.time.is_none() || before >= last.bytes + every) {
                milestones.list.push_back(Milestone { position, bytes: before, time: Some(time) });
                if milestones.list.len() > MILESTONES {
                    let mut keep = false;
                    milestones.list.retain(|_| {
                        keep = !keep;
                        keep
                    });
                    milestones.every *= 2;
                }
            }
        }
        self.end.store(position.0, Ordering::Release);
        self.assigned.fetch_max(position.0, Ordering::AcqRel);
    }

    /// The records from `from` on that are in memory; `None` when the first of them is not.
    pub(super) fn recent(&self, from: Position, max_records: usize, max_bytes: usize) -> Option<Vec<Entry>> {
        let tail = self.tail.lock();
        let first = tail.entries.front()?.entry.position;
        if from < first {
            return None;
        }
        // Not by subtraction: a repair may have left gaps.
        let skip = tail.entries.partition_point(|recent| recent.entry.position < from);
        let mut bytes = 0;
        let mut taken = Vec::new();
        for recent in tail.entries.iter().skip(skip) {
            taken.push(recent.entry.clone());
            bytes += recent.entry.record.payload.len();
            if taken.len() >= max_records || bytes >= max_bytes {
                break;
            }
        }
        (!taken.is_empty()).then_some(taken)
    }

    /// The record with this id, if it is in memory.
    pub(super) fn recent_by_id(&self, id: RecordId) -> Option<Entry> {
        let tail = self.tail.lock();
        tail.entries.iter().find(|recent| recent.entry.record.id == id).map(|recent| recent.entry.clone())
    }

    /// Drops the records at or below `settled` that every reader has passed, and more while over `budget` bytes.
    pub(super) fn evict(&self, settled: Position, passed: Position, budget: u64) {
        let mut tail = self.tail.lock();
        while let Some(front) = tail.entries.front() {
            let position = front.entry.position;
            if position > settled || (position > passed && tail.bytes <= budget) {
                break;
            }
            let bytes = front.bytes;
            tail.entries.pop_front();
            tail.bytes -= bytes;
        }
        if tail.entries.is_empty() {
            tail.entries = VecDeque::new();
        }
    }

    /// The lowest position that some branch has asked to store; the end when there is no branch.
    pub(super) fn passed(&self) -> Position {
        let branches = self.branches.lock();
        branches.values().map(|branch| branch.wanted).min().unwrap_or_else(|| self.end())
    }

    /// The lowest stored cursor; `None` when there is no branch.
    pub(super) fn lowest_cursor(&self) -> Option<Position> {
        self.branches.lock().values().map(|branch| branch.durable).min()
    }

    /// A branch exists from this position on.
    pub(super) fn branch_opened(&self, branch: &BranchName, position: Position, now: Timestamp) {
        self.branches.lock().entry(branch.clone()).or_default();
        self.cursor_stored(branch, position, now);
    }

    /// A cursor has become durable.
    pub(super) fn cursor_stored(&self, branch: &BranchName, position: Position, now: Timestamp) {
        let mut branches = self.branches.lock();
        // A cursor that was on its way when its branch was forgotten does not bring it back.
        let Some(branch) = branches.get_mut(branch) else { return };
        branch.durable = branch.durable.max(position);
        branch.wanted = branch.wanted.max(position);
        let spaced = |last: &(Timestamp, Position)| now.since(last.0).as_millis() >= 1_000 || now < last.0;
        if branch.samples.back().is_none_or(spaced) {
            branch.samples.push_back((now, branch.durable));
            if branch.samples.len() > SAMPLES {
                branch.samples.pop_front();
            }
        }
        let lowest = branches.values().map(|branch| branch.durable).min();
        drop(branches);
        if let Some(lowest) = lowest {
            self.finished_bytes.store(self.bytes_before(lowest.next()), Ordering::Release);
        }
    }

    /// Recounts what is unfinished, after a branch came or went.
    pub(super) fn recount(&self) {
        let lowest = self.lowest_cursor().unwrap_or_else(|| self.end());
        self.finished_bytes.store(self.bytes_before(lowest.next()), Ordering::Release);
    }

    /// Bytes of records that some branch has not ended, and of those that are parked.
    pub(super) fn unfinished_bytes(&self) -> u64 {
        let finished = self.finished_bytes.load(Ordering::Acquire);
        let parked = self.parked_bytes.load(Ordering::Relaxed);
        if self.branches.lock().is_empty() {
            return parked;
        }
        self.end_bytes.load(Ordering::Acquire).saturating_sub(finished) + parked
    }

    /// Bytes of all records before `position`, near enough: in proportion between two milestones.
    pub(super) fn bytes_before(&self, position: Position) -> u64 {
        let end = Milestone { position: self.end().next(), bytes: self.end_bytes.load(Ordering::Acquire), time: None };
        let milestones = self.milestones.lock();
        let at = milestones.list.partition_point(|milestone| milestone.position <= position);
        let Some(before) = at.checked_sub(1).and_then(|at| milestones.list.get(at)) else {
            return milestones.list.front().map_or(end.bytes, |first| first.bytes);
        };
        let after = milestones.list.get(at).copied().unwrap_or(end);
        let records = after.position.0.saturating_sub(before.position.0).max(1);
        let share = position.0.saturating_sub(before.position.0).min(records);
        let bytes = u128::from(after.bytes.saturating_sub(before.bytes)) * u128::from(share) / u128::from(records);
        before.bytes + u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// The first position such that the records from it on take at most `bytes`.
    pub(super) fn position_for_bytes(&self, bytes: u64) -> Position {
        let target = self.end_bytes.load(Ordering::Acquire).saturating_sub(bytes);
        let (mut low, mut high) = (1, self.end().0 + 1);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.bytes_before(Position(middle)) < target { low = middle + 1 } else { high = middle }
        }
        Position(low)
    }

    /// When the record at `position` entered the log, or the newest milestone before it.
    pub(super) fn time_of(&self, position: Position) -> Option<Timestamp> {
        {
            let tail = self.tail.lock();
            let first = tail.entries.front().map(|recent| recent.entry.position);
            if let Some(first) = first.filter(|first| *first <= position)
                && let Some(recent) = tail.entries.get(usize::try_from(position.0 - first.0).unwrap_or(usize::MAX))
            {
                return Some(recent.time);
            }
        }
        let milestones = self.milestones.lock();
        let at = milestones.list.partition_point(|milestone| milestone.position <= position);
        milestones.list.get(at.checked_sub(1)?)?.time
    }

    /// From when on every idempotency key is known: the window, less what had to go because there were too many.
    pub(super) fn keys_known_since(&self, now: Timestamp) -> Timestamp {
        let floor = Timestamp::from_millis(self.keys_floor.load(Ordering::Acquire));
        now.saturating_sub(self.settings.read().key_window).max(floor)
    }

    /// Keys from before `since` have been forgotten.
    pub(super) fn keys_forgotten(&self, since: Timestamp) {
        self.keys_floor.fetch_max(since.as_millis(), Ordering::AcqRel);
    }

    /// A segment's first record entered the log then; after a start nobody knows before it is asked.
    pub(super) fn learn_time(&self, first: Position, time: Timestamp) {
        let mut milestones = self.milestones.lock();
        if let Some(milestone) = milestones.list.iter_mut().find(|milestone| milestone.position == first) {
            milestone.time.get_or_insert(time);
        }
    }

    /// The newest record in memory whose frame was written before `floor`; `None` when the oldest there was not.
    pub(super) fn recent_before(&self, floor: Timestamp) -> Option<Position> {
        let tail = self.tail.lock();
        let older = tail.entries.partition_point(|recent| recent.time < floor);
        Some(tail.entries.get(older.checked_sub(1)?)?.entry.position)
    }

    /// The branch that is furthest behind, if it has not ended everything up to `position`.
    pub(super) fn behind(&self, position: Position) -> Option<(BranchName, Position)> {
        let branches = self.branches.lock();
        let (name, branch) = branches.iter().min_by_key(|(_, branch)| branch.wanted)?;
        (branch.wanted < position).then(|| (name.clone(), branch.wanted))
    }

    /// Forgets milestones below what is kept.
    pub(super) fn forget_before(&self, first: Position) {
        self.first_kept.fetch_max(first.0, Ordering::AcqRel);
        let mut milestones = self.milestones.lock();
        while milestones.list.get(1).is_some_and(|next| next.position <= first) {
            milestones.list.pop_front();
        }
    }
}
