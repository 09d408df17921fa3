//! How much may be under way: bytes that are not durable yet, and writes in a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::reply::Problem;

/// A bound on bytes under way, and on writes a second.
#[derive(Debug)]
pub struct Budget {
    bytes: AtomicU64,
    limit: u64,
    rate: Option<Mutex<Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    rate: f64,
    burst: f64,
    level: f64,
    at: Instant,
}

/// What came in since the start.
#[derive(Debug, Default)]
pub struct Received {
    /// Writes that became durable, repetitions by idempotency key included.
    pub accepted: AtomicU64,
    /// Bytes of their requests.
    pub accepted_bytes: AtomicU64,
    /// Writes that were refused.
    pub refused: AtomicU64,
}

impl Received {
    pub(super) fn accept(&self, writes: usize, bytes: usize) {
        self.accepted.fetch_add(writes as u64, Ordering::Relaxed);
        self.accepted_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn refuse(&self, writes: usize) {
        self.refused.fetch_add(writes as u64, Ordering::Relaxed);
    }
}

/// Bytes that are under way; given back when it is dropped.
#[derive(Debug)]
pub struct Held {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Held {
    /// Takes more for the same write.
    ///
    /// # Errors
    /// 429 when too much of others is under way.
    pub fn more(&mut self, bytes: u64) -> Result<(), Problem> {
        let budget = &self.budget;
        let before = budget.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.bytes += bytes;
        budget.check(before, before > self.bytes - bytes, bytes)
    }
}

impl Budget {
    /// At most `limit` bytes at once, and `rate` writes a second.
    pub fn new(limit: u64, rate: Option<f64>) -> Arc<Self> {
        let bucket = |rate: f64| {
            let burst = rate.max(1.0);
            Mutex::new(Bucket { rate, burst, level: burst, at: Instant::now() })
        };
        Arc::new(Self { bytes: AtomicU64::new(0), limit, rate: rate.map(bucket) })
    }

    /// Whether it is a budget of these bounds.
    pub fn is(&self, limit: u64, rate: Option<f64>) -> bool {
        self.limit == limit && self.rate.as_ref().map(|bucket| bucket.lock().rate.to_bits()) == rate.map(f64::to_bits)
    }

    /// Bytes under way.
    pub fn held(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Takes `bytes`; one write alone always fits.
    ///
    /// # Errors
    /// 429 when too much is under way.
    pub fn take(self: &Arc<Self>, bytes: u64) -> Result<Held, Problem> {
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let held = Held { budget: Arc::clone(self), bytes };
        self.check(before, before > 0, bytes).map(|()| held)
    }

    fn check(&self, before: u64, others: bool, bytes: u64) -> Result<(), Problem> {
        if !others || before + bytes <= self.limit {
            return Ok(());
        }
        let detail = format!("{before} bytes of writes are not durable yet, and {} may be", self.limit);
        Err(Problem::too_many("in_flight", detail, Duration::from_secs(1)).failed())
    }

    /// Counts writes against the rate.
    ///
    /// # Errors
    /// 429 when there were too many of late.
    #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
    pub fn count(&self, writes: usize) -> Result<(), Problem> {
        let Some(bucket) = &self.rate else { return Ok(()) };
        let mut bucket = bucket.lock();
        let now = Instant::now();
        bucket.level = (bucket.level + (now - bucket.at).as_secs_f64() * bucket.rate).min(bucket.burst);
        bucket.at = now;
        let wanted = (writes as f64).min(bucket.burst);
        if bucket.level < wanted {
            let wait = Duration::from_secs_f64(((wanted - bucket.level) / bucket.rate).clamp(0.001, 3_600.0));
            let detail = format!("this namespace takes {} writes a second", bucket.rate);
            return Err(Problem::too_many("rate", detail, wait).failed());
        }
        bucket.level -= writes as f64;
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_write_always_fits_and_what_is_given_back_can_be_taken_again() {
        let budget = Budget::new(10, None);
        let first = budget.take(100).unwrap();
        assert!(budget.take(1).is_err());
        drop(first);
        assert_eq!(budget.held(), 0);
        assert!(budget.take(5).is_ok());
    }

    #[test]
    fn what_grows_is_refused_where_others_have_taken_the_room_and_gives_all_of_it_back() {
        let budget = Budget::new(10, None);
        let mut first = budget.take(4).unwrap();
        first.more(100).unwrap();
        drop(first);
        let other = budget.take(8).unwrap();
        let mut second = budget.take(2).unwrap();
        assert_eq!(second.more(1).unwrap_err().code, "in_flight");
        drop((second, other));
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn a_rate_lets_its_burst_through_and_no_more() {
        let budget = Budget::new(10, Some(5.0));
        assert!((0..5).all(|_| budget.count(1).is_ok()));
        let refused = budget.count(1).unwrap_err();
        assert_eq!(refused.status.as_u16(), 429);
        assert!(refused.retry_after.is_some());
    }
}
