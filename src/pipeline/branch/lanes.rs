//! Keeps each key's deliveries in order while everything else goes past.
//!
//! A lane is a key's queue: only its head may be under way, except where the target takes a batch in order. Keyless
//! deliveries have a lane each, made only when they fail. It knows nothing of targets, time-outs or verdicts.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::clock::Timestamp;
use crate::source::{DeadLetter, RowKey, lane_of};
use crate::transform::Event;

/// One thing to send, and what has been tried so far.
#[derive(Clone, Debug)]
pub(super) struct Delivery {
    pub(super) row: RowKey,
    pub(super) event: Event,
    /// Which of the sink's cases.
    pub(super) case: usize,
    pub(super) attempts: u32,
    /// When it failed for the first time.
    pub(super) first_failed: Option<Timestamp>,
    /// The run of failures in which it failed last, and how often in it: given back when the breaker opens.
    pub(super) streak: (u64, u32),
    /// Where the branch stood when it failed for the first time.
    pub(super) failing: Option<Since>,
    /// How many deliveries the target had taken when it was away for this one for the first time.
    pub(super) away_since: Option<u64>,
    /// Its key's order is kept.
    pub(super) ordered: bool,
    /// It was put back, so it has a lane even if no other may be in it.
    put_back: bool,
    /// Set if it came from the shelf: its end is a `returned`, not the frontier's.
    pub(super) shelved: Option<Shelved>,
    pub(super) last_error: Box<str>,
}

/// How far a branch had come; counts only time in which it was open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Since {
    /// Time open.
    pub(super) open: Duration,
    /// Deliveries that the target took.
    pub(super) accepted: u64,
}

/// How a delivery lies on the shelf.
#[derive(Clone, Debug)]
pub(super) struct Shelved {
    pub(super) lane: Box<str>,
    pub(super) replayed: bool,
    /// A replayed record became several deliveries: its row ends with the last of them.
    pub(super) siblings: Option<Arc<Mutex<Siblings>>>,
}

/// Deliveries that came of one row.
#[derive(Debug)]
pub(super) struct Siblings {
    pub(super) open: usize,
    /// The letter of one that ended badly; kept until all have ended, since it ends the row.
    pub(super) letter: Option<DeadLetter>,
}

impl Delivery {
    pub(super) fn new(row: RowKey, event: Event, case: usize, ordered: bool) -> Self {
        Self {
            row,
            event,
            case,
            attempts: 0,
            first_failed: None,
            streak: (0, 0),
            failing: None,
            away_since: None,
            ordered,
            put_back: false,
            shelved: None,
            last_error: Box::default(),
        }
    }

    pub(super) fn lane(&self) -> Box<str> {
        match &self.shelved {
            Some(shelved) => shelved.lane.clone(),
            None => lane_of(self.event.key.as_deref().filter(|_| self.ordered), self.row),
        }
    }

    /// No other delivery waits for it.
    fn is_free(&self) -> bool {
        self.shelved.is_none() && !(self.ordered && self.event.key.is_some())
    }

    /// True when there is a lane that has to hear of its end.
    pub(super) fn has_lane(&self) -> bool {
        self.put_back || !self.is_free()
    }

    pub(super) fn weight(&self) -> usize {
        self.event.payload().len()
    }

    /// Counts a failure of the run `streak`.
    pub(super) fn count_failure(&mut self, streak: u64, now: Timestamp, since: Since) {
        self.attempts += 1;
        self.first_failed.get_or_insert(now);
        self.failing.get_or_insert(since);
        self.streak = if self.streak.0 == streak { (streak, self.streak.1 + 1) } else { (streak, 1) };
    }

    /// Takes back the failures of the run `streak`: the target was away.
    pub(super) fn give_back(&mut self, streak: u64) {
        if self.streak.0 == streak {
            self.attempts = self.attempts.saturating_sub(self.streak.1);
            self.streak.1 = 0;
            if self.attempts == 0 {
                (self.first_failed, self.failing) = (None, None);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Lane {
    queue: VecDeque<Delivery>,
    under_way: usize,
    /// Not before then; `None` = its head may go.
    wait: Option<Instant>,
    /// It stands in `ready`.
    listed: bool,
}

#[derive(Debug)]
enum Ready {
    Keyless(Box<Delivery>),
    Lane(Box<str>),
}

/// All deliveries of a branch that are in memory and not under way.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    lanes: HashMap<Box<str>, Lane>,
    ready: VecDeque<Ready>,
    waits: BinaryHeap<Reverse<(Instant, Box<str>)>>,
    queued: usize,
}

impl Lanes {
    /// How many wait in memory.
    pub(super) const fn len(&self) -> usize {
        self.queued
    }

    /// True when something could go now.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// How many entries of the ready list there are; near enough to how many deliveries could go now.
    pub(super) fn ready_len(&self) -> usize {
        self.ready.len()
    }

    /// Adds a delivery at the end of its lane.
    pub(super) fn push(&mut self, delivery: Delivery) {
        self.queued += 1;
        if delivery.is_free() {
            self.ready.push_back(Ready::Keyless(Box::new(delivery)));
            return;
        }
        let name = delivery.lane();
        self.lanes.entry(name.clone()).or_default().queue.push_back(delivery);
        self.list(&name);
    }

    /// Puts deliveries back at the front of their lane, in their order; the lane waits until `wait`.
    pub(super) fn put_back(&mut self, name: &str, deliveries: Vec<Delivery>, wait: Option<Instant>) {
        self.queued += deliveries.len();
        let lane = self.lanes.entry(name.into()).or_default();
        for mut delivery in deliveries.into_iter().rev() {
            delivery.put_back = true;
            lane.queue.push_front(delivery);
        }
        lane.wait = wait;
        if let Some(until) = wait {
            self.waits.push(Reverse((until, name.into())));
        }
        self.list(name);
    }

    /// What was taken of a lane has ended.
    pub(super) fn landed(&mut self, name: &str, count: usize) {
        if let Some(lane) = self.lanes.get_mut(name) {
            lane.under_way = lane.under_way.saturating_sub(count);
            if lane.under_way == 0 && lane.queue.is_empty() {
                self.lanes.remove(name);
            } else {
                self.list(name);
            }
        }
    }

    fn list(&mut self, name: &str) {
        if let Some(lane) = self.lanes.get_mut(name)
            && !lane.listed
            && lane.under_way == 0
            && lane.wait.is_none()
            && !lane.queue.is_empty()
        {
            lane.listed = true;
            self.ready.push_back(Ready::Lane(name.into()));
        }
    }

    /// Takes up to `records` deliveries of up to `bytes` in all, at least one if there is one. Of one lane only its head,
    /// or with `several` as many as fit.
    pub(super) fn take(&mut self, records: usize, bytes: usize, several: bool) -> Vec<Delivery> {
        let (mut taken, mut weight): (Vec<Delivery>, usize) = (Vec::new(), 0);
        while taken.len() < records {
            let fits = |next: &Delivery, taken: &Vec<Delivery>| taken.is_empty() || weight + next.weight() <= bytes;
            match self.ready.pop_front() {
                None => break,
                Some(Ready::Keyless(delivery)) => {
                    if !fits(&delivery, &taken) {
                        self.ready.push_front(Ready::Keyless(delivery));
                        break;
                    }
                    weight += delivery.weight();
                    taken.push(*delivery);
                }
                Some(Ready::Lane(name)) => {
                    let Some(lane) = self.lanes.get_mut(&name) else { continue };
                    lane.listed = false;
                    let before = taken.len();
                    while taken.len() < records
                        && (several || lane.under_way == 0)
                        && lane.queue.front().is_some_and(|next| taken.is_empty() || weight + next.weight() <= bytes)
                        && let Some(next) = lane.queue.pop_front()
                    {
                        weight += next.weight();
                        lane.under_way += 1;
                        taken.push(next);
                    }
                    if taken.len() == before {
                        lane.listed = true;
                        self.ready.push_front(Ready::Lane(name));
                        break;
                    }
                }
            }
        }
        self.queued -= taken.len();
        taken
    }

    /// When the first waiting lane may go on.
    pub(super) fn next_wait(&self) -> Option<Instant> {
        self.waits.peek().map(|Reverse((until, _))| *until)
    }

    /// Lists the lanes whose wait is over.
    pub(super) fn wake(&mut self, now: Instant) {
        while let Some(Reverse((until, _))) = self.waits.peek()
            && *until <= now
            && let Some(Reverse((until, name))) = self.waits.pop()
        {
            if let Some(lane) = self.lanes.get_mut(&name).filter(|lane| lane.wait == Some(until)) {
                lane.wait = None;
                self.list(&name);
            }
        }
    }

    /// Ends all waits: the target is back.
    pub(super) fn wake_all(&mut self) {
        for Reverse((_, name)) in std::mem::take(&mut self.waits) {
            if let Some(lane) = self.lanes.get_mut(&name) {
                lane.wait = None;
                self.list(&name);
            }
        }
    }

    /// Closes a lane and gives all that it holds, in order. Nothing of it may be under way.
    pub(super) fn close(&mut self, name: &str) -> Vec<Delivery> {
        let held: Vec<_> = self.lanes.remove(name).map(|lane| lane.queue.into()).unwrap_or_default();
        self.queued -= held.len();
        held
    }

    /// Every delivery in memory, to change what is known of its attempts.
    pub(super) fn each(&mut self, mut change: impl FnMut(&mut Delivery)) {
        self.lanes.values_mut().flat_map(|lane| &mut lane.queue).for_each(&mut change);
        for ready in &mut self.ready {
            if let Ready::Keyless(delivery) = ready {
                change(delivery);
            }
        }
    }

    /// Takes out the delivery that `row` names, wherever it stands.
    pub(super) fn pull(&mut self, row: RowKey) -> Option<Delivery> {
        let keyless = |ready: &Ready| matches!(ready, Ready::Keyless(delivery) if delivery.row == row);
        if let Some(at) = self.ready.iter().position(keyless)
            && let Some(Ready::Keyless(delivery)) = self.ready.remove(at)
        {
            self.queued -= 1;
            return Some(*delivery);
        }
        let (name, at) = self.lanes.iter().find_map(|(name, lane)| {
            lane.queue.iter().position(|delivery| delivery.row == row).map(|at| (name.clone(), at))
        })?;
        let lane = self.lanes.get_mut(&name)?;
        let delivery = lane.queue.remove(at)?;
        self.queued -= 1;
        if at == 0 {
            lane.wait = None;
        }
        if lane.queue.is_empty() && lane.under_way == 0 {
            self.lanes.remove(&name);
        } else {
            self.list(&name);
        }
        Some(delivery)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::record::{Position, Record, RecordId};

    fn delivery(position: u64, key: Option<&str>) -> Delivery {
        let record = Record {
            id: RecordId::new(Timestamp::MIN, 0, 1, position),
            key: key.map(Into::into),
            ..crate::testing::record("{}")
        };
        Delivery::new(RowKey { position: Position(position), child: 0 }, Event::original(Arc::new(record)), 0, true)
    }

    fn positions(taken: &[Delivery]) -> Vec<u64> {
        taken.iter().map(|delivery| delivery.row.position.0).collect()
    }

    #[test]
    fn of_a_lane_only_the_head_goes_and_the_next_when_it_has_landed() {
        let mut lanes = Lanes::default();
        for (position, key) in [(1, Some("a")), (2, Some("a")), (3, None), (4, Some("b"))] {
            lanes.push(delivery(position, key));
        }
        assert_eq!(positions(&lanes.take(10, 1 << 20, false)), [1, 3, 4]);
        assert_eq!(positions(&lanes.take(10, 1 << 20, false)), [] as [u64; 0]);
        lanes.landed("=a", 1);
        assert_eq!(positions(&lanes.take(10, 1 << 20, false)), [2]);
    }

    #[test]
    fn a_target_that_keeps_a_batch_in_order_gets_several_of_a_lane() {
        let mut lanes = Lanes::default();
        (1..=3).for_each(|position| lanes.push(delivery(position, Some("a"))));
        assert_eq!(positions(&lanes.take(2, 1 << 20, true)), [1, 2]);
        assert!(lanes.take(2, 1 << 20, true).is_empty(), "nothing of the lane while some of it is under way");
    }

    #[test]
    fn what_is_put_back_comes_first_and_only_when_its_wait_is_over() {
        let (mut lanes, now) = (Lanes::default(), Instant::now());
        lanes.push(delivery(1, Some("a")));
        lanes.push(delivery(2, Some("a")));
        let taken = lanes.take(1, 1 << 20, false);
        lanes.put_back("=a", taken, Some(now + Duration::from_secs(1)));
        lanes.landed("=a", 1);
        lanes.wake(now);
        assert!(lanes.take(1, 1 << 20, false).is_empty());
        lanes.wake(now + Duration::from_secs(1));
        assert_eq!(positions(&lanes.take(1, 1 << 20, false)), [1]);
    }

    proptest! {
        #[test]
        fn each_key_comes_out_in_order_and_nothing_is_lost(
            keys in prop::collection::vec(0..4usize, 1..60), steps in prop::collection::vec((1..5usize, any::<bool>()), 0..80), several: bool,
        ) {
            let names = ["a", "b", "c"];
            let mut lanes = Lanes::default();
            for (at, key) in keys.iter().enumerate() {
                lanes.push(delivery(at as u64, names.get(*key).copied()));
            }
            let mut ended: Vec<u64> = Vec::new();
            let drain = std::iter::repeat_n((5, true), 2 * keys.len());
            for (size, succeeds) in steps.into_iter().chain(drain) {
                let taken = lanes.take(size, 1 << 20, several);
                let mut by_lane: Vec<(Box<str>, Vec<Delivery>)> = Vec::new();
                for delivery in taken {
                    let name = delivery.lane();
                    match by_lane.iter_mut().find(|(known, _)| *known == name) {
                        Some((_, group)) => group.push(delivery),
                        None => by_lane.push((name, vec![delivery])),
                    }
                }
                for (name, group) in by_lane {
                    let count = group.len();
                    if succeeds { ended.extend(positions(&group)) } else { lanes.put_back(&name, group, None) }
                    lanes.landed(&name, count);
                }
            }
            for name in 0..3 {
                let of_key: Vec<u64> = ended.iter().copied().filter(|at| keys[usize::try_from(*at).unwrap()] == name).collect();
                prop_assert!(of_key.is_sorted(), "{of_key:?}");
            }
            ended.sort_unstable();
            prop_assert_eq!(ended, (0..keys.len() as u64).collect::<Vec<_>>());
            prop_assert_eq!(lanes.len(), 0);
        }
    }
}
