//! Counting how long things take: a histogram that many threads write and a scrape reads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Durations by upper bound.
#[derive(Debug)]
pub struct Durations {
    bounds: &'static [f64],
    /// One for each bound, and one for what is beyond all.
    counts: Box<[AtomicU64]>,
    micros: AtomicU64,
}

/// What a scrape sees of it.
#[derive(Clone, Debug, PartialEq)]
pub struct DurationsSeen {
    /// By upper bound in seconds: how many took at most so long.
    pub at_most: Vec<(f64, u64)>,
    /// All.
    pub count: u64,
    /// Seconds of all together.
    pub sum: f64,
}

impl Durations {
    /// None yet; `bounds` are in seconds and rise.
    pub fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(), micros: AtomicU64::new(0) }
    }

    /// Counts one.
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        if let Some(counter) = self.counts.get(self.bounds.partition_point(|bound| *bound < seconds)) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        self.micros.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// What was counted so far.
    #[expect(clippy::cast_precision_loss, reason = "a sum of microseconds as a float is near enough")]
    pub fn seen(&self) -> DurationsSeen {
        let mut count = 0;
        let mut up_to = |counter: &AtomicU64| {
            count += counter.load(Ordering::Relaxed);
            count
        };
        let at_most = self.bounds.iter().zip(&self.counts).map(|(bound, counter)| (*bound, up_to(counter))).collect();
        let count = self.counts.last().map_or(0, &mut up_to);
        DurationsSeen { at_most, count, sum: self.micros.load(Ordering::Relaxed) as f64 / 1e6 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bound_counts_all_that_took_at_most_so_long() {
        let durations = Durations::new(&[0.01, 0.1]);
        for millis in [10, 11, 100, 5_000] {
            durations.observe(Duration::from_millis(millis));
        }
        let seen = durations.seen();
        assert_eq!(seen.at_most, [(0.01, 1), (0.1, 3)]);
        assert_eq!(seen.count, 4);
        assert!((seen.sum - 5.121).abs() < 1e-9);
    }
}
