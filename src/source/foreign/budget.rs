//! The memory of what sources hold ready: one bound for the process over all of them, and a little of its own for each reader.
//!
//! Who holds records says so when they come and when they go, and asks before it fetches more. What one turn brings may pass
//! the bound; nothing is fetched then until it is below again.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that a reader may hold ready whatever others hold.
pub(in crate::source) const OWN_BYTES: usize = 256 << 10;
/// Bytes that a reader holds ready at most, but for its last turn's.
pub(in crate::source) const MOST_BYTES: usize = 4 << 20;

/// The process's budget.
static READY: Budget = Budget::new(64 << 20);

/// A bound in bytes for many readers.
pub(in crate::source) struct Budget {
    most: usize,
    held: AtomicUsize,
}

impl Budget {
    /// One of so many bytes.
    pub(in crate::source) const fn new(most: usize) -> Self {
        Self { most, held: AtomicUsize::new(0) }
    }

    /// Bytes that are held of it.
    #[cfg(test)]
    pub(in crate::source) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }
}

/// What one reader holds of the budget. Dropped, it gives everything back.
pub(in crate::source) struct Share {
    budget: &'static Budget,
    bytes: usize,
}

impl Default for Share {
    fn default() -> Self {
        Self::of(&READY)
    }
}

impl Share {
    /// An empty one of this budget.
    pub(in crate::source) const fn of(budget: &'static Budget) -> Self {
        Self { budget, bytes: 0 }
    }

    /// So many bytes came.
    pub(in crate::source) fn add(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.budget.held.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes went.
    pub(in crate::source) fn take(&mut self, bytes: usize) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.budget.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// All of it went.
    pub(in crate::source) fn clear(&mut self) {
        self.take(self.bytes);
    }

    /// True while nothing more is to be fetched.
    pub(in crate::source) fn is_full(&self) -> bool {
        self.bytes >= self.most()
    }

    /// True while more than half is held of what one reader may hold: one that was full goes on only when it is not.
    pub(in crate::source) const fn is_half_full(&self) -> bool {
        self.bytes > MOST_BYTES / 2
    }

    /// What this reader may hold now, in bytes.
    pub(in crate::source) fn most(&self) -> usize {
        if self.budget.held.load(Ordering::Relaxed) >= self.budget.most { OWN_BYTES } else { MOST_BYTES }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that a fetch brings.
    const TURN: usize = 64 << 10;

    fn fill(share: &mut Share) -> usize {
        let before = share.bytes;
        while !share.is_full() {
            share.add(TURN);
        }
        share.bytes - before
    }

    #[test]
    fn many_readers_together_stay_within_the_budget() {
        static BUDGET: Budget = Budget::new(16 << 20);
        let mut shares: Vec<Share> = (0..50).map(|_| Share::of(&BUDGET)).collect();
        // In turn, so that all have some when it is spent.
        for _ in 0..2 * MOST_BYTES / TURN {
            shares.iter_mut().filter(|share| !share.is_full()).for_each(|share| share.add(TURN));
        }
        let most = (16 << 20) + 50 * TURN;
        assert!((16 << 20..=most).contains(&BUDGET.held()), "{} bytes are held", BUDGET.held());
        drop(shares);
        assert_eq!(BUDGET.held(), 0, "what is dropped is given back");
    }

    #[test]
    fn each_has_its_little_whatever_others_hold_and_no_more_than_its_most() {
        static BUDGET: Budget = Budget::new(16 << 20);
        let mut greedy = Share::of(&BUDGET);
        assert_eq!(fill(&mut greedy), MOST_BYTES);
        greedy.add(16 << 20);
        let mut late = Share::of(&BUDGET);
        assert_eq!(fill(&mut late), OWN_BYTES);
        greedy.clear();
        assert_eq!(fill(&mut late), MOST_BYTES - OWN_BYTES, "there is room again");
        late.take(MOST_BYTES / 2);
        assert!(!late.is_half_full());
        late.take(usize::MAX);
        assert_eq!(BUDGET.held(), 0, "no more is given back than was held");
    }
}
