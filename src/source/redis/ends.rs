//! Where each stream ends, and when what is there was written, as far as this process knows.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::clock::Timestamp;

/// Times that are kept of a stream at most.
const TIMES: usize = 4_096;

#[derive(Default)]
struct End {
    newest: AtomicU64,
    /// The oldest entries that this process wrote and that are not finished, with their times.
    times: Mutex<VecDeque<(u64, Timestamp)>>,
}

/// By stream.
pub(super) struct Ends(Vec<End>);

impl Ends {
    pub(super) fn new(streams: u16) -> Self {
        Self((0..streams).map(|_| End::default()).collect())
    }

    /// There is such an entry.
    pub(super) fn at_least(&self, part: u16, offset: u64) {
        if let Some(end) = self.0.get(usize::from(part)) {
            end.newest.fetch_max(offset, Ordering::Relaxed);
        }
    }

    /// We wrote such an entry.
    pub(super) fn wrote(&self, part: u16, offset: u64, at: Timestamp) {
        let Some(end) = self.0.get(usize::from(part)) else { return };
        end.newest.fetch_max(offset, Ordering::Relaxed);
        let mut times = end.times.lock();
        // Those that come later are looked for when the first are finished.
        if times.len() < TIMES {
            times.push_back((offset, at));
        }
    }

    /// The newest entries, and the lowest unfinished ones.
    pub(super) fn looked(&self, streams: &[(u64, Option<u64>)]) {
        for (end, (newest, low)) in self.0.iter().zip(streams) {
            end.newest.fetch_max(*newest, Ordering::Relaxed);
            let mut times = end.times.lock();
            while times.pop_front_if(|(offset, _)| low.is_some_and(|low| *offset < low)).is_some() {}
        }
    }

    pub(super) fn of(&self, part: u16) -> u64 {
        self.0.get(usize::from(part)).map_or(0, |end| end.newest.load(Ordering::Relaxed))
    }

    /// When the first entry after this one was written, if that is known.
    pub(super) fn first_after(&self, part: u16, offset: u64) -> Option<Timestamp> {
        let times = self.0.get(usize::from(part))?.times.lock();
        times.iter().find(|(known, _)| *known > offset).map(|(_, at)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_what_is_not_finished_is_known() {
        let (ends, at) = (Ends::new(2), Timestamp::from_millis);
        ends.wrote(1, 5, at(50));
        ends.wrote(1, 7, at(70));
        assert_eq!((ends.of(1), ends.first_after(1, 0), ends.first_after(1, 5)), (7, Some(at(50)), Some(at(70))));
        ends.looked(&[(0, None), (9, Some(6))]);
        assert_eq!((ends.of(1), ends.first_after(1, 0), ends.first_after(0, 0)), (9, Some(at(70)), None));
    }
}
