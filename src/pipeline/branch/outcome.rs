//! What an attempt's outcome means: the end of a delivery, another try, a key set aside, or a closed branch.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::Told;
use super::actor::{Actor, BatchDone, Settled, aside_row};
use super::breaker::Circuit;
use super::lanes::{Delivery, Since};
use super::stats::{BranchCounters, Pause};
use super::waiting::Failures;
use crate::clock::Timestamp;
use crate::record::Record;
use crate::sink::{Failure, Verdict};
use crate::source::{DeadLetter, DeadReason, RowKey, Settlement, StoredPause};

/// A key that failed so often, or has to wait longer than this, goes to the shelf so that the frontier can pass it.
const ASIDE_AFTER: (u32, Duration) = (3, Duration::from_secs(2));
/// No answer makes a branch wait longer than this.
const LONGEST_AFTER: Duration = Duration::from_secs(3_600);

enum Next {
    /// It has its end.
    Over,
    /// Back to the head of its lane, and wait so long.
    Again(Delivery, Option<Duration>),
    /// To the shelf, with all of its lane; tried again after so long.
    Aside(Delivery, Duration),
    /// To the dead letters.
    Dead(Delivery, DeadReason),
}

impl Actor {
    /// Goes through a batch's outcomes in order and gives each delivery its end or its next try.
    pub(super) fn finished(&mut self, done: BatchDone) {
        self.board.counters.attempts.observe(done.took);
        let panicked = done.written.is_none();
        let mut failed = done.written.unwrap_or_default().failed.into_iter().peekable();
        let first_failed = failed.peek().map(|(index, _)| *index);
        let stops = self.stops_at_first_failure();
        let accepted_before = self.accepted;
        let mut settlement = Settlement::default();
        let mut settled = Settled::default();
        let mut landed: Vec<(Box<str>, usize)> = Vec::new();
        let mut back: Vec<(Box<str>, Vec<Delivery>, Option<Duration>)> = Vec::new();
        let mut aside: Vec<(Box<str>, Delivery, Duration)> = Vec::new();
        let mut dead: Vec<(Delivery, DeadReason)> = Vec::new();
        for (index, delivery) in done.taken.into_iter().enumerate() {
            // Most are of no lane and go well: there is no need to name one.
            let goes_well = !panicked && failed.peek().is_none_or(|(at, _)| *at != index);
            if goes_well && !delivery.has_lane() && !(stops && first_failed.is_some_and(|first| index > first)) {
                self.accepted(delivery, &mut settlement, &mut settled);
                continue;
            }
            let lane = delivery.lane();
            match landed.iter_mut().rev().take(8).find(|(name, _)| *name == lane) {
                Some((_, count)) => *count += 1,
                None => landed.push((lane.clone(), 1)),
            }
            let failure = match failed.next_if(|(at, _)| *at == index) {
                Some((_, failure)) => Some(failure),
                None if panicked => Some(Failure::new(Verdict::Backoff, "the sink's own code panicked")),
                None => None,
            };
            let untried = stops && first_failed.is_some_and(|first| index > first) && failure.is_none();
            let held = back.iter().any(|(name, _, _)| *name == lane) || aside.iter().any(|(name, ..)| *name == lane);
            let next = match failure {
                // An earlier one of its lane did not go through: it follows that one.
                _ if untried || (held && failure.is_some()) => Next::Again(delivery, None),
                None => {
                    self.accepted(delivery, &mut settlement, &mut settled);
                    Next::Over
                }
                Some(failure) => self.judge(delivery, &failure),
            };
            match next {
                Next::Over => {}
                Next::Again(delivery, wait) => match back.iter_mut().find(|(name, _, _)| *name == lane) {
                    Some((_, group, _)) => group.push(delivery),
                    None => back.push((lane, vec![delivery], wait)),
                },
                Next::Aside(delivery, wait) => aside.push((lane, delivery, wait)),
                Next::Dead(delivery, reason) => dead.push((delivery, reason)),
            }
        }
        if self.accepted > accepted_before {
            let now = self.deps.clock.now();
            self.board.update(|status| status.last_delivered_at = Some(now));
        }
        let now = Instant::now();
        for (lane, group, wait) in back {
            self.lanes.put_back(&lane, group, wait.map(|wait| now + wait));
        }
        for (lane, count) in landed {
            self.lanes.landed(&lane, count);
        }
        for (delivery, reason) in dead {
            let error = delivery.last_error.clone();
            self.dead_bytes = self.dead_bytes.saturating_sub(delivery.event.record.weight() as u64);
            self.end_in(delivery, reason, error, &mut settlement, &mut settled);
        }
        for (lane, delivery, wait) in aside {
            self.set_aside(lane, delivery, wait, &mut settlement, &mut settled);
        }
        if !settlement.is_frontier_only() {
            self.settle(settlement, settled);
        }
    }

    /// The target took it.
    fn accepted(&mut self, delivery: Delivery, settlement: &mut Settlement, settled: &mut Settled) {
        let weight = delivery.weight();
        BranchCounters::add(&self.board.counters.delivered, 1);
        BranchCounters::add(&self.board.counters.delivered_bytes, weight);
        self.bytes = self.bytes.saturating_sub(weight);
        self.accepted += 1;
        if self.breaker.answered(false) {
            self.reopen();
        }
        if !self.dead_lanes.is_empty() {
            settlement.overtaken.extend(self.overtaken_by(&delivery.lane(), delivery.row));
        }
        match &delivery.shelved {
            Some(shelved) => Self::end_shelved(shelved, delivery.row, None, settlement, settled),
            None => _ = self.frontier.end(delivery.row.position),
        }
    }

    /// What a failure means for the delivery and for the branch.
    fn judge(&mut self, mut delivery: Delivery, failure: &Failure) -> Next {
        let (now, instant) = (self.deps.clock.now(), Instant::now());
        delivery.last_error.clone_from(&failure.message);
        self.board.update(|status| {
            status.last_error = Some(failure.message.to_string());
            status.last_error_at = Some(now);
        });
        match failure.verdict {
            Verdict::Never => {
                delivery.attempts += 1;
                if failure.rendering {
                    return self.end_or_keep(delivery, DeadReason::Template);
                }
                if self.breaker.answered(true) {
                    self.reopen();
                }
                if self.breaker.is_refusing() {
                    self.begin_pause("refused", refusal_note(&failure.message));
                    return Next::Again(delivery, None);
                }
                self.end_or_keep(delivery, DeadReason::Refused)
            }
            Verdict::Down | Verdict::After(_) => {
                let at_least = match failure.verdict {
                    Verdict::After(wait) => wait.min(LONGEST_AFTER),
                    _ => Duration::ZERO,
                };
                // A target that is away only for this one, again and again, would else stop all others with it.
                let only_for_this = delivery.away_since.is_some_and(|taken| self.accepted > taken);
                if only_for_this && self.breaker.circuit() == Circuit::Closed {
                    return self.back_off(delivery, at_least, failure);
                }
                BranchCounters::add(&self.board.counters.down, 1);
                delivery.away_since.get_or_insert(self.accepted);
                if self.breaker.down(instant, Some(at_least)) {
                    self.close(&failure.message);
                }
                Next::Again(delivery, None)
            }
            Verdict::Part => {
                // A probe that met the part that is away says nothing of the rest: the next goes with another key.
                if self.breaker.circuit() != Circuit::Closed {
                    self.breaker.down(instant, None);
                }
                self.back_off(delivery, Duration::ZERO, failure)
            }
            // The target is known to be away: what it says to a probe, or to what was under way, is no record's fault.
            Verdict::Backoff if self.breaker.circuit() != Circuit::Closed => {
                BranchCounters::add(&self.board.counters.down, 1);
                self.breaker.down(instant, None);
                Next::Again(delivery, None)
            }
            Verdict::Backoff => self.back_off(delivery, Duration::ZERO, failure),
        }
    }

    /// Counts the failure and waits, in memory or on the shelf; or the delivery has had its chances.
    fn back_off(&mut self, mut delivery: Delivery, at_least: Duration, failure: &Failure) -> Next {
        let part = failure.verdict == Verdict::Part;
        BranchCounters::add(&self.board.counters.retried, 1);
        let since = self.since();
        delivery.count_failure(self.breaker.streak(), self.deps.clock.now(), since);
        if !part && self.breaker.failed(Instant::now(), &delivery.lane()) {
            delivery.give_back(self.breaker.streak());
            self.close(&failure.message);
            return Next::Again(delivery, None);
        }
        let first = delivery.failing.unwrap_or(since);
        let retry = &self.plan.retry;
        let others_go_through = since.accepted > first.accepted;
        let spent = delivery.attempts >= retry.attempts && others_go_through && !part;
        if spent || since.open.saturating_sub(first.open) >= retry.give_up {
            return self.end_or_keep(delivery, DeadReason::Exhausted);
        }
        let mut wait = retry.wait(delivery.attempts, fastrand::f64()).max(at_least);
        let long = delivery.attempts >= ASIDE_AFTER.0.min(retry.attempts) || wait > ASIDE_AFTER.1;
        if part {
            // The last attempt is left for what is the record's own, so the waits grow with the time instead.
            delivery.attempts = delivery.attempts.min(retry.attempts.saturating_sub(1).max(1));
            wait = wait.max((since.open.saturating_sub(first.open) / 8).min(retry.max));
        }
        if delivery.shelved.is_some() || (long && others_go_through && self.caps.set_aside && self.asides.has_room()) {
            return Next::Aside(delivery, wait);
        }
        Next::Again(delivery, Some(wait))
    }

    /// How far the branch has come; only the time counts in which it was open.
    pub(super) fn since(&self) -> Since {
        let now = self.deps.clock.now();
        let closed = self.closed + self.closed_since.map_or(Duration::ZERO, |since| now.since(since));
        Since { open: now.since(self.started).saturating_sub(closed), accepted: self.accepted }
    }

    /// Closes the delivery's lane: it and all that waits behind it go to the shelf in one group (LOG.md 12).
    fn set_aside(
        &mut self,
        lane: Box<str>,
        delivery: Delivery,
        wait: Duration,
        settlement: &mut Settlement,
        settled: &mut Settled,
    ) {
        let now = self.deps.clock.now();
        let next_try = now.saturating_add(wait);
        let behind = self.lanes.close(&lane);
        let again = delivery.shelved.is_some();
        let failures =
            delivery.failing.map(|since| Failures { row: delivery.row, since, streak: delivery.streak, given_back: 0 });
        let mut added = 0;
        for delivery in std::iter::once(delivery).chain(behind) {
            self.bytes = self.bytes.saturating_sub(delivery.weight());
            let first = settlement.aside.last().is_none_or(|row| row.lane != lane);
            if delivery.shelved.is_none() {
                added += 1;
                settled.ends.push(delivery.row.position);
            } else if !first {
                // It lies on the shelf as it is; only the first row's attempts have changed.
                continue;
            }
            settlement.aside.push(aside_row(&delivery, lane.clone(), next_try, now));
        }
        if !again {
            BranchCounters::add(&self.board.counters.set_aside, added);
        }
        self.asides.wait(&lane, added as u64, next_try, failures);
        settled.joined.push(lane);
    }

    /// A dead letter if there is room for one; else the branch pauses and the delivery keeps waiting.
    fn end_or_keep(&mut self, delivery: Delivery, reason: DeadReason) -> Next {
        if self.is_full() {
            return Next::Again(delivery, None);
        }
        // Reserved at once, so that a whole batch of letters does not pass the limit together.
        self.dead_bytes += delivery.event.record.weight() as u64;
        Next::Dead(delivery, reason)
    }

    /// True when the dead letters have no room; the branch then pauses.
    pub(super) fn is_full(&mut self) -> bool {
        let size = self.plan.dead_letters.size;
        // Counted here alone: the shelf knows nothing yet of letters under way. The tick counts anew while it is full.
        let full = self.dead_bytes >= size.0;
        if full {
            let note =
                format!("the dead letters have reached {size}: replay or purge some, or raise dead_letters.size");
            self.begin_pause("dead_letters_full", note);
        }
        full
    }

    /// Ends one delivery in the dead letters. Nothing of its lane may be under way.
    pub(super) fn end_badly(&mut self, delivery: Delivery, reason: DeadReason, error: Box<str>, tell: Vec<Told>) {
        let (mut settlement, mut settled) = (Settlement::default(), Settled { tell, ..Settled::default() });
        self.end_in(delivery, reason, error, &mut settlement, &mut settled);
        self.settle(settlement, settled);
    }

    /// Ends a delivery in the dead letters; the frontier passes when that is durable. Where the file says `block`, the
    /// rest of its key goes to the shelf in the same group.
    fn end_in(
        &mut self,
        delivery: Delivery,
        reason: DeadReason,
        error: Box<str>,
        settlement: &mut Settlement,
        settled: &mut Settled,
    ) {
        self.bytes = self.bytes.saturating_sub(delivery.weight());
        let lane = delivery.lane();
        let keyed = delivery.ordered && delivery.event.key.is_some();
        let record = Arc::clone(&delivery.event.record);
        let rendered = Some(delivery.event.payload().clone());
        let letter = self.letter(delivery.row, record, reason, delivery.attempts, error, "sink", rendered);
        if keyed {
            self.remember_dead(&lane, delivery.row);
        }
        match &delivery.shelved {
            Some(shelved) => Self::end_shelved(shelved, delivery.row, Some(letter), settlement, settled),
            None => {
                settled.ends.push(delivery.row.position);
                settlement.dead.push(letter);
            }
        }
        if self.blocks(keyed) {
            let now = self.deps.clock.now();
            let mut added = 0;
            for behind in self.lanes.close(&lane) {
                self.bytes = self.bytes.saturating_sub(behind.weight());
                if behind.shelved.is_none() {
                    added += 1;
                    settled.ends.push(behind.row.position);
                    settlement.aside.push(aside_row(&behind, lane.clone(), Timestamp::MAX, now));
                }
            }
            self.asides.block(&lane, added);
            settled.joined.push(lane);
        }
    }

    /// Writes a dead letter.
    #[expect(clippy::too_many_arguments, reason = "a letter's fields, each of another origin")]
    pub(super) fn letter(
        &mut self,
        row: RowKey,
        record: Arc<Record>,
        reason: DeadReason,
        attempts: u32,
        error: Box<str>,
        stage: &str,
        rendered: Option<Bytes>,
    ) -> DeadLetter {
        BranchCounters::add(&self.board.counters.dead, 1);
        self.dead_bytes += (record.weight() + rendered.as_ref().map_or(0, Bytes::len)) as u64;
        let newest = self.deps.revisions.newest();
        let letter = DeadLetter {
            row,
            branch: self.plan.name.clone(),
            at: self.deps.clock.now(),
            reason,
            attempts,
            last_error: error,
            stage: stage.into(),
            revision: newest.map(|plan| plan.revision.as_ref().into()).unwrap_or_default(),
            // Only what differs from the original is worth keeping.
            rendered: rendered.filter(|rendered| *rendered != record.payload),
            record,
            overtaken: false,
        };
        tracing::warn!(namespace = %self.deps.namespace, branch = %letter.branch, id = %letter.record.id,
            reason = ?letter.reason, error = %letter.last_error, "dead letter");
        letter
    }

    fn close(&mut self, error: &str) {
        let streak = self.breaker.streak();
        self.lanes.each(|delivery| delivery.give_back(streak));
        self.asides.give_back(streak);
        self.closed_since.get_or_insert(self.deps.clock.now());
        if self.pause.is_none() {
            let note = format!("the target is away ({error}); it is probed with growing waits of up to 30 s");
            self.begin_pause("breaker", note);
        }
    }

    fn reopen(&mut self) {
        let now = self.deps.clock.now();
        if let Some(since) = self.closed_since.take() {
            self.closed += now.since(since);
        }
        if self.pause.as_ref().is_some_and(|pause| pause.cause == "breaker") {
            self.pause = None;
            tracing::info!(namespace = %self.deps.namespace, branch = %self.plan.name, "the target is back");
            self.board.update(|status| status.pause = None);
        }
        self.lanes.wake_all();
    }

    pub(super) fn begin_pause(&mut self, cause: &'static str, note: String) {
        self.pause_and_tell(cause, note, Settled::default());
    }

    /// Pauses; whoever waits is told when that is durable, if it is to outlive a restart.
    pub(super) fn pause_and_tell(&mut self, cause: &'static str, note: String, settled: Settled) {
        // A pause that only a person ends gives way to none that ends by itself.
        let stays = |known: &str| known == cause || known == "operator" || (known == "refused" && cause != "operator");
        if self.pause.as_ref().is_some_and(|pause| stays(pause.cause)) {
            settled.tell.into_iter().for_each(Told::now);
            return;
        }
        let since = self.deps.clock.now();
        if cause != "breaker" {
            self.closed_since.get_or_insert(since);
        }
        tracing::warn!(namespace = %self.deps.namespace, branch = %self.plan.name, cause, note, "branch pauses");
        if matches!(cause, "refused" | "operator") {
            let stored = StoredPause { cause: cause.into(), note: note.as_str().into(), since };
            self.settle(Settlement { pause: Some(Some(stored)), ..Settlement::default() }, settled);
        }
        let pause = Pause { cause, note, since };
        self.board.update(|status| status.pause = Some(pause.clone()));
        self.pause = Some(pause);
    }

    /// Ends the pause; `stored` also clears what would outlive a restart, and whoever waits is told when that is durable.
    pub(super) fn end_pause(&mut self, stored: bool, mut settled: Settled) {
        if let Some(pause) = self.pause.take() {
            tracing::info!(namespace = %self.deps.namespace, branch = %self.plan.name, cause = pause.cause, "branch goes on");
            self.board.update(|status| status.pause = None);
            if stored && matches!(pause.cause, "refused" | "operator") {
                let ended = Settlement { pause: Some(None), ..Settlement::default() };
                self.settle(ended, std::mem::take(&mut settled));
            }
            self.reopen();
            self.breaker.probe_now();
            if self.breaker.circuit() != Circuit::Closed {
                self.closed_since = Some(self.deps.clock.now());
                self.begin_pause("breaker", "the target was away when it was last tried; it is probed".to_owned());
            }
        }
        settled.tell.into_iter().for_each(Told::now);
    }
}

fn refusal_note(error: &str) -> String {
    format!(
        "the target refused half of the last 200 records ({error}): this looks like a bad deploy, not bad records. \
         Correct the pipeline or the target, then reload or resume"
    )
}
