//! What stands around one run of a script: its deadline, its budget of memory, and what its functions may know.
//!
//! A run belongs to the thread that runs it, so that host functions find it without being handed it. [`enter`] starts
//! one and gives back how it ended; [`progress`] is asked by the engine at each step and stops what goes too far.

use std::cell::{Cell, RefCell};
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
pub(super) struct Run {
    pub(super) around: Arc<Surroundings>,
    pub(super) record: Arc<Record>,
    pub(super) child: Child,
    /// Calls of `uuid` and `random` so far, over all stages.
    pub(super) calls: u32,
    pub(super) children: Vec<NewChild>,
    /// Why it came to an end before its last statement, if it did.
    pub(super) ended: Option<Ended>,
}

/// What is looked at before each step, apart from the run so that a look costs little.
struct Watch {
    memory: Cell<memory::Counters>,
    held_before: Cell<u64>,
    held_last: Cell<u64>,
    began: Cell<Option<Instant>>,
    deadline: Cell<Duration>,
    /// Bytes that the script was given.
    given: Cell<u64>,
    ended: Cell<bool>,
}

thread_local! {
    static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
    static WATCH: Watch = const {
        Watch {
            memory: Cell::new(memory::Counters::NONE),
            held_before: Cell::new(0),
            held_last: Cell::new(0),
            began: Cell::new(None),
            deadline: Cell::new(DEADLINE),
            given: Cell::new(0),
            ended: Cell::new(false),
        }
    };
}

/// Runs `work` under guard, and gives its result with what became of the run. `calls` is how often `uuid` and `random`
/// were called for the event before, `given` the bytes of its payload.
pub(super) fn enter<T>(
    around: &Arc<Surroundings>,
    record: &Arc<Record>,
    child: Child,
    calls: u32,
    given: usize,
    work: impl FnOnce() -> T,
) -> (std::thread::Result<T>, Option<Run>) {
    let run =
        Run { around: Arc::clone(around), record: Arc::clone(record), child, calls, children: Vec::new(), ended: None };
    RUN.set(Some(run));
    WATCH.with(|watch| watch.begin(around.deadline, given as u64));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    WATCH.with(Watch::end);
    (result, RUN.take())
}

/// Gives a host function the run that it is called in; `None` outside of one, as when a text is being compiled.
pub(super) fn with_run<T>(work: impl FnOnce(&mut Run) -> T) -> Option<T> {
    RUN.with_borrow_mut(|run| run.as_mut().map(work))
}

/// Asked before each step of a script: true = stop here.
pub(super) fn progress(steps: u64) -> bool {
    WATCH.with(|watch| watch.ended.get() || watch.exceeded(steps).is_some_and(stop))
}

/// Ends the run, and says so.
fn stop(why: Stopped) -> bool {
    with_run(|run| run.end(Ended::Stopped(why)));
    true
}

/// A step that took this much memory may have taken long as well.
const BIG_STEP: u64 = 64 << 10;
/// With so much in its hands a script can make one step take long without taking any memory.
const MUCH: u64 = 128 << 10;

impl Watch {
    fn begin(&self, deadline: Duration, given: u64) {
        let memory = memory::counters();
        self.memory.set(memory);
        self.held_before.set(memory.held());
        self.held_last.set(memory.held());
        self.began.set(Some(Instant::now()));
        self.deadline.set(deadline);
        self.given.set(given);
        self.ended.set(false);
    }

    fn end(&self) {
        self.began.set(None);
        self.ended.set(false);
    }

    /// The limit that the run has reached. Outside of a run there is none.
    fn exceeded(&self, steps: u64) -> Option<Stopped> {
        let held = self.memory.get().held();
        let grown = held.saturating_sub(self.held_before.get());
        if grown > MEMORY_BUDGET {
            return self.began.get().map(|_| Stopped::Memory);
        }
        // The clock costs more than a step: it is looked at now and then, and after each that may have taken long.
        let big = held.abs_diff(self.held_last.replace(held)) > BIG_STEP;
        let much = grown.saturating_add(self.given.get()) > MUCH;
        let late = |began: Instant| began.elapsed() > self.deadline.get();
        let looks = big || much || steps.is_multiple_of(8);
        (looks && self.began.get().is_some_and(late)).then(|| Stopped::Deadline(self.deadline.get()))
    }
}

impl Run {
    /// Ends the run: no further step is taken.
    pub(super) fn end(&mut self, why: Ended) {
        self.ended = Some(why);
        WATCH.with(|watch| watch.ended.set(true));
    }

    /// Whether a function may make `bytes` more; asked before what could make much out of little.
    pub(super) fn affords(&mut self, bytes: u64) -> bool {
        let held = WATCH.with(|watch| watch.memory.get().held().saturating_sub(watch.held_before.get()));
        let fine = held.saturating_add(bytes) <= MEMORY_BUDGET;
        if !fine {
            self.end(Ended::Stopped(Stopped::Memory));
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

    /// Where the allocator counts for this thread; `None` where it does not.
    #[derive(Clone, Copy)]
    pub(super) struct Counters(Option<(thread::ThreadLocal<u64>, thread::ThreadLocal<u64>)>);

    thread_local! {
        static COUNTERS: Counters =
            Counters(thread::allocatedp::read().ok().zip(thread::deallocatedp::read().ok()));
    }

    /// The counters of the calling thread.
    pub(super) fn counters() -> Counters {
        COUNTERS.with(|counters| *counters)
    }

    impl Counters {
        pub(super) const NONE: Self = Self(None);

        /// Bytes allocated less bytes freed by this thread; only differences mean anything. Stands still where the
        /// allocator does not count.
        pub(super) fn held(self) -> u64 {
            // Offset by half the range, since a thread may free what another has allocated.
            self.0.map_or(0, |(allocated, freed)| allocated.get().wrapping_sub(freed.get()).wrapping_add(1 << 63))
        }
    }
}

/// No count on this system: steps and deadline alone bound a script.
#[cfg(not(target_os = "linux"))]
mod memory {
    #[derive(Clone, Copy)]
    pub(super) struct Counters;

    pub(super) const fn counters() -> Counters {
        Counters
    }

    impl Counters {
        pub(super) const NONE: Self = Self;

        pub(super) const fn held(self) -> u64 {
            0
        }
    }
}
