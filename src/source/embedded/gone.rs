//! Which parked rows are no longer there although `state.db` may still show them.
//!
//! Only the writer asks it, so a cancel and a release of one row are decided in one order (LOG.md 24). A row is
//! forgotten when `state.db` has committed its end and a while has passed; a look-up older than what is still
//! remembered cannot be judged and has to be made again.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::change::Sequence;

/// How long a row is remembered after `state.db` has its end.
const GRACE: Duration = Duration::from_secs(3);

/// The rows that are gone.
#[derive(Default)]
pub(super) struct Gone {
    rows: HashMap<Sequence, Sequence>,
    order: VecDeque<(Instant, Sequence, Sequence)>,
    /// Ends at or below are forgotten.
    floor: Sequence,
}

impl Gone {
    /// True when a look-up that saw everything up to `looked` can be judged.
    pub(super) fn can_judge(&self, looked: Sequence) -> bool {
        looked >= self.floor
    }

    /// True when the row has been released, cancelled or moved.
    pub(super) fn contains(&self, row: Sequence) -> bool {
        self.rows.contains_key(&row)
    }

    /// The frame `end` ends this row.
    pub(super) fn insert(&mut self, row: Sequence, end: Sequence, now: Instant) {
        self.rows.insert(row, end);
        self.order.push_back((now, end, row));
    }

    /// The frames after `durable` were voided: the rows that they ended wait on.
    pub(super) fn undo_after(&mut self, durable: Sequence) {
        while let Some((_, end, row)) = self.order.back().copied() {
            if end <= durable {
                break;
            }
            self.order.pop_back();
            self.rows.remove(&row);
        }
    }

    /// `state.db` has committed everything up to `committed`.
    pub(super) fn forget(&mut self, committed: Sequence, now: Instant) {
        while let Some((since, end, row)) = self.order.front().copied() {
            if end > committed || now.duration_since(since) < GRACE {
                break;
            }
            self.order.pop_front();
            self.rows.remove(&row);
            self.floor = self.floor.max(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_24_an_end_is_remembered_until_it_is_committed_and_the_grace_has_passed() {
        let mut gone = Gone::default();
        let start = Instant::now();
        gone.insert(Sequence(5), Sequence(9), start);
        gone.forget(Sequence(8), start + GRACE * 2);
        assert!(gone.contains(Sequence(5)), "not committed yet");
        gone.forget(Sequence(9), start);
        assert!(gone.contains(Sequence(5)), "a look-up may be under way");
        gone.forget(Sequence(9), start + GRACE);
        assert!(!gone.contains(Sequence(5)));
        assert!(!gone.can_judge(Sequence(8)), "a look-up from before cannot know");
        assert!(gone.can_judge(Sequence(9)));
    }

    #[test]
    fn a_voided_end_is_no_end() {
        let mut gone = Gone::default();
        gone.insert(Sequence(5), Sequence(9), Instant::now());
        gone.insert(Sequence(6), Sequence(10), Instant::now());
        gone.undo_after(Sequence(9));
        assert!(gone.contains(Sequence(5)));
        assert!(!gone.contains(Sequence(6)));
    }
}
