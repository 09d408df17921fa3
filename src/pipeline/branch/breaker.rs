//! Tells an outage from a bad record, and a bad deploy from bad records.
//!
//! Takes the outcome of each attempt; says when the branch should stop trying and when to probe. It never ends a
//! record and never waits.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Failures in a row, by two keys or more, after which a target that only says "try later" counts as away.
const FAILURES_TO_OPEN: u32 = 5;
/// How many outcomes the check for a bad deploy looks back.
const REFUSAL_WINDOW: usize = 200;
/// The first wait before a probe, and the longest.
const PROBE_WAITS: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Whether the target may be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Circuit {
    /// Yes.
    Closed,
    /// No, until then.
    Open {
        /// When the next probe may go.
        probe_at: Instant,
    },
    /// One record is out to see.
    Probing,
}

/// The state of one branch's breaker.
#[derive(Debug)]
pub(super) struct Breaker {
    circuit: Circuit,
    wait: Duration,
    /// Counts runs of failures without a success between; names the run in which a delivery failed.
    streak: u64,
    failures: u32,
    lanes: Vec<Box<str>>,
    outcomes: VecDeque<bool>,
    refused: usize,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            circuit: Circuit::Closed,
            wait: PROBE_WAITS.0,
            streak: 0,
            failures: 0,
            lanes: Vec::new(),
            outcomes: VecDeque::with_capacity(REFUSAL_WINDOW),
            refused: 0,
        }
    }
}

impl Breaker {
    /// Whether the target may be tried.
    pub(super) const fn circuit(&self) -> Circuit {
        self.circuit
    }

    /// The number of the current run of failures.
    pub(super) const fn streak(&self) -> u64 {
        self.streak
    }

    /// The target took or refused a record: it is there. True when the circuit was not closed.
    pub(super) fn answered(&mut self, refused: bool) -> bool {
        self.streak += 1;
        self.failures = 0;
        self.lanes.clear();
        self.wait = PROBE_WAITS.0;
        if self.outcomes.len() == REFUSAL_WINDOW && self.outcomes.pop_front() == Some(true) {
            self.refused -= 1;
        }
        self.outcomes.push_back(refused);
        self.refused += usize::from(refused);
        std::mem::replace(&mut self.circuit, Circuit::Closed) != Circuit::Closed
    }

    /// Half of the last outcomes were refusals: a bad deploy, not bad records.
    pub(super) const fn is_refusing(&self) -> bool {
        self.refused * 2 >= REFUSAL_WINDOW
    }

    /// Forgets the refusals, so that a resumed branch is given another chance.
    pub(super) fn forgive(&mut self) {
        self.outcomes.clear();
        self.refused = 0;
    }

    /// The target is away, or asked to be left alone for `at_least`. True when the circuit was closed before.
    pub(super) fn down(&mut self, now: Instant, at_least: Option<Duration>) -> bool {
        let opened = self.circuit == Circuit::Closed;
        if opened || self.circuit == Circuit::Probing {
            // Between half and all of the wait, so that many branches do not probe in step.
            let wait = self.wait.mul_f64(0.5 + fastrand::f64() / 2.0).max(at_least.unwrap_or_default());
            self.circuit = Circuit::Open { probe_at: now + wait };
            self.wait = (self.wait * 2).min(PROBE_WAITS.1);
        }
        opened
    }

    /// An attempt failed in a way that may be the record's or the target's fault. True when the circuit opened by it.
    pub(super) fn failed(&mut self, now: Instant, lane: &str) -> bool {
        self.failures += 1;
        if self.lanes.len() < 2 && !self.lanes.iter().any(|known| &**known == lane) {
            self.lanes.push(lane.into());
        }
        self.failures >= FAILURES_TO_OPEN && self.lanes.len() >= 2 && self.down(now, None)
    }

    /// Takes the right to send one probe, when its time has come.
    pub(super) fn try_probe(&mut self, now: Instant) -> bool {
        let due = matches!(self.circuit, Circuit::Open { probe_at } if probe_at <= now);
        if due {
            self.circuit = Circuit::Probing;
        }
        due
    }

    /// An operator says that the target is back: the next probe goes at once.
    pub(super) fn probe_now(&mut self) {
        self.wait = PROBE_WAITS.0;
        if let Circuit::Open { probe_at } = &mut self.circuit {
            *probe_at = Instant::now();
        }
    }

    /// The probe could not be sent yet; it may at `again_at`.
    pub(super) fn probe_unused(&mut self, again_at: Instant) {
        self.circuit = Circuit::Open { probe_at: again_at };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_that_fails_alone_opens_nothing() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        assert!((0..100).all(|_| !breaker.failed(now, "a")));
        assert!(breaker.failed(now, "b"), "a second key shows that it is the target");
    }

    #[test]
    fn an_open_circuit_closes_with_the_first_answer_and_waits_grow_until_then() {
        let (mut breaker, mut now) = (Breaker::default(), Instant::now());
        assert!(breaker.down(now, None));
        let mut waits = Vec::new();
        for _ in 0..10 {
            let Circuit::Open { probe_at } = breaker.circuit() else { panic!("not open") };
            assert!(!breaker.try_probe(probe_at.checked_sub(Duration::from_millis(1)).unwrap()));
            waits.push(probe_at - now);
            now = probe_at;
            assert!(breaker.try_probe(now));
            assert!(!breaker.down(now, None), "it was open already");
        }
        assert!(waits.last() > waits.first() && waits.iter().all(|wait| *wait <= PROBE_WAITS.1));
        assert!(breaker.try_probe(now + PROBE_WAITS.1));
        assert!(breaker.answered(false));
        assert_eq!(breaker.circuit(), Circuit::Closed);
    }

    #[test]
    fn half_of_the_last_two_hundred_refused_is_a_bad_deploy() {
        let mut breaker = Breaker::default();
        (0..1_000).for_each(|number| _ = breaker.answered(number % 1_000 == 0));
        assert!(!breaker.is_refusing());
        (0..99).for_each(|_| _ = breaker.answered(true));
        assert!(!breaker.is_refusing());
        breaker.answered(true);
        assert!(breaker.is_refusing());
        breaker.forgive();
        assert!(!breaker.is_refusing());
    }
}
