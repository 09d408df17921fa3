//! What one assignment of partitions holds: records ready to be read, the frontier of what has ended, bounds in bytes.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio_util::sync::CancellationToken;

use crate::clock::Timestamp;
use crate::record::{Position, Record};
use crate::source::{Entry, Reach};

/// Bytes that a branch may hold ready whatever others hold.
const OWN_BYTES: usize = 256 << 10;
/// Bytes that all branches of the process hold ready, about.
const ALL_BYTES: usize = 64 << 20;
/// Bytes that a branch holds ready at most, but for the last turn's.
const MOST_BYTES: usize = 4 << 20;

/// Bytes that are held ready, over all branches.
static HELD: AtomicUsize = AtomicUsize::new(0);

pub(super) struct Session {
    pub(super) generation: u64,
    pub(super) parts: Vec<u16>,
    pub(super) frontier: Reach,
    pub(super) committed: Reach,
    queue: VecDeque<Entry>,
    bytes: usize,
    /// Read and not behind the frontier, by their time.
    times: VecDeque<(Position, Timestamp)>,
    /// What a record weighs, with an eye to the latest.
    pub(super) usual_weight: u64,
    /// Somebody reads it.
    pub(super) taken: bool,
    /// Somebody has read of it before.
    pub(super) used: bool,
    /// Parts that bring enough for now: the thread pauses them.
    pub(super) resting: BTreeSet<u16>,
    /// The thread has to go back to the frontier.
    pub(super) rewind: bool,
    pub(super) moved: CancellationToken,
}

impl Session {
    /// One that goes on at `cursor`.
    pub(super) fn new(generation: u64, parts: Vec<u16>, cursor: Reach) -> Self {
        Self {
            generation,
            parts,
            committed: cursor.clone(),
            frontier: cursor,
            queue: VecDeque::new(),
            bytes: 0,
            times: VecDeque::new(),
            usual_weight: 0,
            taken: false,
            used: false,
            resting: BTreeSet::new(),
            rewind: false,
            moved: CancellationToken::new(),
        }
    }

    /// Forgets what was read.
    pub(super) fn clear(&mut self) {
        HELD.fetch_sub(std::mem::take(&mut self.bytes), Ordering::Relaxed);
        self.resting.clear();
        self.queue.clear();
        self.times.clear();
    }

    pub(super) fn is_full(&self) -> bool {
        self.bytes >= MOST_BYTES || (self.bytes >= OWN_BYTES && HELD.load(Ordering::Relaxed) >= ALL_BYTES)
    }

    /// One that was full stays paused until then.
    pub(super) const fn is_half_full(&self) -> bool {
        self.bytes > MOST_BYTES / 2
    }

    /// Adds what came, but for what is not its own and what has ended.
    pub(super) fn push(&mut self, arrived: Vec<(Position, Record)>) {
        let before = self.bytes;
        for (position, record) in arrived {
            if !self.parts.contains(&position.part()) || self.frontier.covers(position) {
                continue;
            }
            let weight = record.weight();
            self.bytes += weight;
            let usual = self.usual_weight;
            self.usual_weight = if usual == 0 { weight as u64 } else { (usual * 15 + weight as u64).div_ceil(16) };
            self.times.push_back((position, record.written_at));
            self.queue.push_back(Entry::new(position, Arc::new(record)));
        }
        HELD.fetch_add(self.bytes - before, Ordering::Relaxed);
    }

    /// Takes up to so many records, and no more once they have so many bytes; none when none is there.
    pub(super) fn take(&mut self, max_records: usize, max_bytes: usize) -> Vec<Entry> {
        let (mut entries, mut bytes) = (Vec::new(), 0);
        while entries.len() < max_records.max(1)
            && bytes <= max_bytes
            && let Some(entry) = self.queue.pop_front()
        {
            bytes += entry.record.weight();
            entries.push(entry);
        }
        self.bytes -= bytes;
        HELD.fetch_sub(bytes, Ordering::Relaxed);
        entries
    }

    /// All up to `frontier` has ended, of the parts that are its own.
    pub(super) fn progress(&mut self, frontier: &Reach) {
        for position in frontier.iter().filter(|position| self.parts.contains(&position.part())) {
            self.frontier.advance(position);
        }
        while self.times.front().is_some_and(|(position, _)| self.frontier.covers(*position)) {
            self.times.pop_front();
        }
    }

    /// The time of the oldest record that was read and has no end.
    pub(super) fn oldest(&self) -> Option<Timestamp> {
        self.times.front().map(|(_, at)| *at)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.clear();
        self.moved.cancel();
    }
}
