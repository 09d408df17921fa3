//! What a branch tells of itself: counters for metrics, and its state for status pages.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

use crate::clock::Timestamp;
use crate::telemetry::Durations;

/// Counts since the process started. Read with relaxed loads.
#[derive(Debug)]
pub struct BranchCounters {
    /// Deliveries that the target took.
    pub delivered: AtomicU64,
    /// Payload bytes of them.
    pub delivered_bytes: AtomicU64,
    /// Records that a filter, script or guard ended.
    pub dropped: AtomicU64,
    /// Failed attempts that may be repeated.
    pub retried: AtomicU64,
    /// Failed attempts because the target was away.
    pub down: AtomicU64,
    /// Deliveries set aside.
    pub set_aside: AtomicU64,
    /// Deliveries that ended in the dead letters.
    pub dead: AtomicU64,
    /// Copies of dead letters that could not be written.
    pub copies_failed: AtomicU64,
    /// Times that the branch was started again after a failure of its own.
    pub restarts: AtomicU64,
    /// Attempts by duration.
    pub attempts: Durations,
}

impl Default for BranchCounters {
    fn default() -> Self {
        const ATTEMPT: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];
        let none = AtomicU64::default;
        Self {
            delivered: none(),
            delivered_bytes: none(),
            dropped: none(),
            retried: none(),
            down: none(),
            set_aside: none(),
            dead: none(),
            copies_failed: none(),
            restarts: none(),
            attempts: Durations::new(ATTEMPT),
        }
    }
}

impl BranchCounters {
    pub(super) fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// Why a branch does not send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Pause {
    /// `breaker`, `refused`, `dead_letters_full`, `dead_letters_copy` or `operator`.
    #[schema(value_type = String)]
    pub cause: &'static str,
    /// What happened, and what ends it.
    pub note: String,
    /// Since when.
    pub since: Timestamp,
}

/// A branch as a status page shows it.
#[derive(Clone, Debug, Default)]
pub struct BranchStatus {
    /// Why it does not send, if it does not.
    pub pause: Option<Pause>,
    /// Deliveries read and not yet ended.
    pub in_flight: u64,
    /// Keys that are set aside.
    pub lanes_aside: u64,
    /// What the target said last when it failed.
    pub last_error: Option<String>,
    /// When that was.
    pub last_error_at: Option<Timestamp>,
    /// When the target last took something.
    pub last_delivered_at: Option<Timestamp>,
}

/// Where the branch's task writes its state and others read it.
#[derive(Debug, Default)]
pub struct Board {
    /// Counters.
    pub counters: BranchCounters,
    status: Mutex<BranchStatus>,
}

impl Board {
    /// The state now.
    pub fn status(&self) -> BranchStatus {
        self.status.lock().clone()
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut BranchStatus)) {
        change(&mut self.status.lock());
    }
}
