//! What falls due soon, in memory; everything parked also goes to `state.db`.
//!
//! Takes durable `Park` frames from the writer and rows from the store, gives what is due in (due, sequence) order. The
//! horizon is the time before which memory is complete; it moves only in [`Due::step`], under the lock, after the store
//! has been read up to it, so no row falls between memory and store (LOG.md 2).

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use super::change::{Change, Frame, NamespaceNumber, Sequence};
use super::state::{State, StateError};
use crate::clock::Timestamp;

/// How far ahead memory is filled.
const AHEAD: Duration = Duration::from_secs(60);
/// Memory is filled again when less than this is left of it.
const REFILL: Duration = Duration::from_secs(20);
/// Rows read from the store in one step, about.
const LOAD: usize = 20_000;
/// Rows put into memory at once, while everybody else waits.
const HELD: usize = 500;
/// What a row takes besides its record.
const ROW_BYTES: usize = 96;

/// A parked record that is due, or soon will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DueRow {
    /// Whose.
    pub namespace: NamespaceNumber,
    /// The row's name.
    pub parked: Sequence,
    /// When it is due.
    pub due_at: Timestamp,
    /// The encoded record.
    pub record: Bytes,
}

#[derive(Default)]
struct Soon {
    rows: BTreeMap<(Timestamp, Sequence), (NamespaceNumber, Bytes)>,
    bytes: usize,
    horizon: Timestamp,
    /// Rows beyond the horizon that the store has not committed yet.
    unsettled: VecDeque<DueRow>,
    unsettled_bytes: usize,
}

impl Soon {
    fn insert(&mut self, row: DueRow) {
        let weight = row.record.len() + ROW_BYTES;
        if self.rows.insert((row.due_at, row.parked), (row.namespace, row.record)).is_none() {
            self.bytes += weight;
        }
    }

    fn take(&mut self, place: (Timestamp, Sequence)) -> Option<DueRow> {
        let (namespace, record) = self.rows.remove(&place)?;
        self.bytes = self.bytes.saturating_sub(record.len() + ROW_BYTES);
        Some(DueRow { namespace, parked: place.1, due_at: place.0, record })
    }

    /// Pulls the horizon back until memory is within its bound; what is beyond lies in the store, or will with its next
    /// commit.
    fn shrink(&mut self, limit: usize, applied: Sequence) {
        let target = limit / 4 * 3;
        if self.bytes <= limit {
            return;
        }
        while self.bytes > target
            && let Some((place, _)) = self.rows.last_key_value()
            && let Some(row) = self.take(*place)
        {
            self.horizon = self.horizon.min(row.due_at);
            if row.parked > applied {
                self.unsettled_bytes += row.record.len();
                self.unsettled.push_back(row);
            }
        }
        // All of the horizon's own millisecond is beyond it.
        while let Some((place, _)) = self.rows.last_key_value().filter(|(place, _)| place.0 >= self.horizon)
            && let Some(row) = self.take(*place)
        {
            if row.parked > applied {
                self.unsettled.push_back(row);
            }
        }
    }
}

/// The near future. Shared by the writer, the settle thread and the releaser.
pub struct Due {
    soon: Mutex<Soon>,
    limit: usize,
}

impl Due {
    /// Empty: nothing is known of any time yet. `limit` bounds the bytes in memory.
    pub fn new(limit: usize) -> Self {
        Self { soon: Mutex::default(), limit }
    }

    /// A `Park` or `Move` frame is durable. True when it is due soon enough to be kept here.
    pub fn offer(&self, frame: &Frame) -> bool {
        let (Change::Park { due_at, record, .. } | Change::Move { due_at, record, .. }) = &frame.change else {
            return false;
        };
        let row = DueRow {
            namespace: frame.namespace,
            parked: frame.sequence,
            due_at: *due_at,
            // A copy: the frame's bytes are a slice of a whole group's.
            record: Bytes::copy_from_slice(record),
        };
        let mut soon = self.soon.lock();
        if row.due_at < soon.horizon {
            soon.insert(row);
            return true;
        }
        soon.unsettled_bytes += row.record.len();
        soon.unsettled.push_back(row);
        false
    }

    /// The row has been cancelled or moved.
    pub fn remove(&self, due_at: Timestamp, parked: Sequence) {
        let mut soon = self.soon.lock();
        if soon.take((due_at, parked)).is_none() {
            soon.unsettled.retain(|row| row.parked != parked);
        }
    }

    /// All rows of a namespace that has been deleted.
    pub fn forget(&self, namespace: NamespaceNumber) {
        let mut soon = self.soon.lock();
        let gone: Vec<_> = soon.rows.iter().filter(|(_, (of, _))| *of == namespace).map(|(place, _)| *place).collect();
        for place in gone {
            soon.take(place);
        }
        soon.unsettled.retain(|row| row.namespace != namespace);
    }

    /// Takes what is due, in (due, sequence) order, at most `max`.
    pub fn take_due(&self, now: Timestamp, max: usize) -> Vec<DueRow> {
        let mut soon = self.soon.lock();
        let due: Vec<_> = soon.rows.range(..=(now, Sequence(u64::MAX))).map(|(place, _)| *place).take(max).collect();
        due.into_iter().filter_map(|place| soon.take(place)).collect()
    }

    /// Rows that could not be released after all.
    pub fn give_back(&self, rows: Vec<DueRow>) {
        let mut soon = self.soon.lock();
        for row in rows {
            soon.insert(row);
        }
    }

    /// When the first row is due, or when memory ends and has to be filled, whichever comes first.
    pub fn next_due(&self) -> Option<Timestamp> {
        self.soon.lock().rows.first_key_value().map(|((due_at, _), _)| *due_at)
    }

    /// Rows in memory.
    pub fn len(&self) -> usize {
        self.soon.lock().rows.len()
    }

    /// True when nothing is in memory.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when the settle thread should commit what is pending and then [`Due::step`].
    pub fn wants_step(&self, now: Timestamp) -> bool {
        let soon = self.soon.lock();
        soon.horizon < now.saturating_add(REFILL) || soon.bytes > self.limit || soon.unsettled_bytes > self.limit
    }

    /// The settle step, right after a commit: forgets what the store now has, fills memory ahead. True when the first due
    /// time may have changed.
    ///
    /// # Errors
    /// When the store cannot be read; nothing has moved then.
    pub fn step(&self, state: &State, now: Timestamp) -> Result<bool, StateError> {
        let applied = state.applied();
        let from = {
            let mut soon = self.soon.lock();
            soon.unsettled.retain(|row| row.parked > applied);
            soon.unsettled_bytes = soon.unsettled.iter().map(|row| row.record.len()).sum();
            soon.shrink(self.limit, applied);
            if soon.horizon >= now.saturating_add(REFILL) || soon.bytes > self.limit / 2 {
                return Ok(false);
            }
            soon.horizon
        };
        let to = now.saturating_add(AHEAD);
        let (rows, reached) = state.load_due(from, to, LOAD)?;
        // Some at a time: the writer and the releaser want the lock too, and nobody may be late for it.
        let mut rows = rows.into_iter().peekable();
        while rows.peek().is_some() {
            let mut soon = self.soon.lock();
            rows.by_ref().take(HELD).for_each(|row| soon.insert(row));
        }
        let mut soon = self.soon.lock();
        // Only this thread moves the horizon, so it is still where the reading began.
        soon.horizon = reached;
        let (near, far) = std::mem::take(&mut soon.unsettled).into_iter().partition(|row| row.due_at < reached);
        soon.unsettled = far;
        let near: VecDeque<DueRow> = near;
        for row in near {
            soon.insert(row);
        }
        soon.shrink(self.limit, applied);
        Ok(true)
    }
}
