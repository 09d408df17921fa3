//! What stands around one run of a script: its deadline, its budget of memory, and what its functions may know.
//!
//! A run belongs to the thread that runs it, so that host functions find it without being handed it. [`enter`] starts
//! one and gives back how it ended; [`progress`] is asked by the engine at each step and stops what goes too far.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::clock::Clock;
use crate::record::{Headers, Record};
use crate::source::Child;

/// How long a script may run.
pub(super) const DEADLINE: Duration = Duration::from_millis(100);
/// A script may hold this much more memory than when it began.
pub(super) const MEMORY_BUDGET: u64 = 32 << 20;
/// Steps that a script may take.
pub(super) const MAX_STEPS: u64 = 250_000;
/// Children that one record may be replaced by.
pub(super) const MAX_CHILDREN: usize = 1_000;

/// What a script needs to know of its surroundings; made once per stage.
#[derive(Debug)]
pub(super) struct Surroundings {
    pub(super) clock: Clock,
    pub(super) namespace: Arc<str>,
    /// What `env("NAME")` gives, by name; `None` = allowed and not set.
    pub(super) env: BTreeMap<Box<str>, Option<Box<str>>>,
    /// No payload that a script makes is larger, and no text within.
    pub(super) record_limit: usize,
    /// A script that has not ended after this long is stopped.
    pub(super) deadline: Duration,
}

/// How a run ended before its last statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// By `drop()`.
    Dropped,
    /// By `fail("why")`.
    Failed(Box<str>),
    /// By the guard.
    Stopped(Stopped),
}

/// Why the guard stopped a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Stopped {
    #[error("the script ran for more than {} ms and was stopped", .0.as_millis())]
    Deadline(Duration),
    #[error("the script took more than {} MiB of memory and was stopped", MEMORY_BUDGET >> 20)]
    Memory,
}

/// What `emit` was given.
#[derive(Clone, Debug)]
pub(super) struct NewChild {
    pub(super) payload: Bytes,
    /// `None` = as the original's.
    pub(super) key: Option<Option<Arc<str>>>,
    /// `None` = as the original's.
    pub(super) headers: Option<Headers>,
}

/// One run, as the functions see it.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) around: Arc<Surroundings>,
    pub(super) record: Arc<Record>,
    pub(super) child: Child,
    /// Calls of `uuid` and `random` so far, over all stages.
    pub(super) calls: u32,
    pub(super) children: Vec<NewChild>,
    pub(super) ended: Option<Ended>,
    began: Instant,
    held_before: u64,
    held_last: u64,
}

thread_local! {
    static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
}

/// Runs `work` under guard, and gives its result with what became of the run.
pub(super) fn enter<T>(
    around: &Arc<Surroundings>,
    record: &Arc<Record>,
    child: Child,
    calls: u32,
    work: impl FnOnce() -> T,
) -> (std::thread::Result<T>, Option<Run>) {
    let held = memory::held();
    let run = Run {
        around: Arc::clone(around),
        record: Arc::clone(record),
        child,
        calls,
        children: Vec::new(),
        ended: None,
        began: Instant::now(),
        held_before: held,
        held_last: held,
    };
    RUN.set(Some(run));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    (result, RUN.take())
}

/// Gives a host function the run that it is called in; `None` outside of one, as when a text is being compiled.
pub(super) fn with_run<T>(work: impl FnOnce(&mut Run) -> T) -> Option<T> {
    RUN.with_borrow_mut(|run| run.as_mut().map(work))
}

/// Asked before each step of a script: true = stop here.
pub(super) fn progress(steps: u64) -> bool {
    RUN.with_borrow_mut(|run| run.as_mut().is_some_and(|run| run.check(steps)))
}

/// A step that took this much memory may have taken long as well.
const BIG_STEP: u64 = 64 << 10;

impl Run {
    fn check(&mut self, steps: u64) -> bool {
        if self.ended.is_some() {
            return true;
        }
        let held = memory::held();
        if held.saturating_sub(self.held_before) > MEMORY_BUDGET {
            self.ended = Some(Ended::Stopped(Stopped::Memory));
            return true;
        }
        // The clock costs more than a step: it is looked at now and then, and after what may have taken long.
        let big = held.abs_diff(self.held_last) > BIG_STEP;
        self.held_last = held;
        if (big || steps.is_multiple_of(8)) && self.began.elapsed() > self.around.deadline {
            self.ended = Some(Ended::Stopped(Stopped::Deadline(self.around.deadline)));
            return true;
        }
        false
    }

    /// Whether a function may make `bytes` more; asked before what could make much out of little.
    pub(super) fn affords(&mut self, bytes: u64) -> bool {
        let fine = memory::held().saturating_sub(self.held_before).saturating_add(bytes) <= MEMORY_BUDGET;
        if !fine {
            self.ended = Some(Ended::Stopped(Stopped::Memory));
        }
        fine
    }
}

impl Ended {
    /// Why it failed; `None` for `drop()`.
    pub(super) fn why(&self) -> Option<String> {
        match self {
            Self::Dropped => None,
            Self::Failed(why) => Some(why.to_string()),
            Self::Stopped(stopped) => Some(stopped.to_string()),
        }
    }
}

/// What this thread holds, by the allocator's own count.
#[cfg(target_os = "linux")]
mod memory {
    use tikv_jemalloc_ctl::thread;

    #[derive(Clone, Copy)]
    struct Counters {
        allocated: thread::ThreadLocal<u64>,
        deallocated: thread::ThreadLocal<u64>,
    }

    thread_local! {
        static COUNTERS: Option<Counters> = counters();
    }

    fn counters() -> Option<Counters> {
        Some(Counters { allocated: thread::allocatedp::read().ok()?, deallocated: thread::deallocatedp::read().ok()? })
    }

    /// Bytes allocated less bytes freed by this thread; only differences mean anything. Stands still where the
    /// allocator does not count.
    pub(super) fn held() -> u64 {
        COUNTERS.with(|counters| {
            // Offset by half the range, since a thread may free what another has allocated.
            counters.map_or(0, |c| c.allocated.get().wrapping_sub(c.deallocated.get()).wrapping_add(1 << 63))
        })
    }
}

/// No count on this system: steps and deadline alone bound a script.
#[cfg(not(target_os = "linux"))]
mod memory {
    pub(super) const fn held() -> u64 {
        0
    }
}
