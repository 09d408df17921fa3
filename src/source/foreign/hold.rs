//! What a branch reads: each record with its revision, and of each part nothing before its next record is due.
//!
//! Records that other programs wrote belong to no revision, so they go by the one in force when they are read, and the file's
//! rule says when they are due; a record that was written here carries its time. A part waits as a whole: what is behind a
//! record that is not due stays behind it. Other parts go on. What waits here is bounded: a part that brings more rests at
//! the broker.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::Inner;
use super::budget::Share;
use crate::clock::{Clock, Timestamp};
use crate::source::{Entry, HoldRule, LogError, Subscription};

/// Bytes that may wait of a part, however many parts there are.
const LEAST_SHARE: usize = 16 << 10;

/// A branch's reader.
pub(super) struct Holding {
    subscription: Box<dyn Subscription>,
    revision: Box<dyn Fn() -> u32 + Send + Sync>,
    clock: Clock,
    rule: watch::Receiver<Option<HoldRule>>,
    /// What was written here may not be due either: there is no shelf where it would have waited.
    ours_too: bool,
    parts: BTreeMap<u16, Part>,
    /// Of all that waits here.
    share: Share,
    /// The parts that rest at the broker.
    resting: BTreeSet<u16>,
}

/// What waits of a part, in its order.
#[derive(Default)]
struct Part {
    waiting: VecDeque<Waiting>,
    bytes: usize,
}

struct Waiting {
    due: Timestamp,
    /// Another program wrote it, so another rule gives it another time.
    by_rule: bool,
    entry: Entry,
}

impl Holding {
    pub(super) fn new(subscription: Box<dyn Subscription>, inner: &Arc<Inner>) -> Self {
        let (clock, rule, inner) = (inner.clock.clone(), inner.hold.subscribe(), Arc::clone(inner));
        let ours_too = inner.broker.caps().hold && inner.store.is_none();
        Self::of(subscription, Box::new(move || inner.epoch()), clock, rule, ours_too)
    }

    fn of(
        subscription: Box<dyn Subscription>,
        revision: Box<dyn Fn() -> u32 + Send + Sync>,
        clock: Clock,
        rule: watch::Receiver<Option<HoldRule>>,
        ours_too: bool,
    ) -> Self {
        Self {
            subscription,
            revision,
            clock,
            rule,
            ours_too,
            parts: BTreeMap::new(),
            share: Share::default(),
            resting: BTreeSet::new(),
        }
    }

    /// Takes in what came; gives it back where nothing of it has to wait.
    fn take_in(&mut self, entries: Vec<Entry>) -> Vec<Entry> {
        let rule = self.rule.borrow().clone();
        let now = self.clock.now();
        let mut ready = Vec::with_capacity(entries.len());
        let mut revision = None;
        for mut entry in entries {
            let by_rule = entry.record.epoch == 0 && entry.record.due_at.is_none();
            if entry.record.epoch == 0 {
                Arc::make_mut(&mut entry.record).epoch = *revision.get_or_insert_with(&self.revision);
            }
            if by_rule {
                set_due(&mut entry, rule.as_ref());
            }
            let due_at = entry.record.due_at.filter(|_| by_rule || self.ours_too);
            let due = due_at.unwrap_or(Timestamp::MIN);
            let number = entry.position.part();
            let behind = self.parts.get(&number).is_some_and(|part| !part.waiting.is_empty());
            if due <= now && !behind {
                ready.push(entry);
            } else {
                let part = self.parts.entry(number).or_default();
                part.bytes += entry.record.weight();
                self.share.add(entry.record.weight());
                part.waiting.push_back(Waiting { due, by_rule, entry });
            }
        }
        ready
    }

    /// Takes what is due of every part, up to these bounds.
    fn due(&mut self, max_records: usize, max_bytes: usize) -> Vec<Entry> {
        let now = self.clock.now();
        let (mut ready, mut bytes) = (Vec::new(), 0);
        for part in self.parts.values_mut() {
            while ready.len() < max_records.max(1)
                && bytes <= max_bytes
                && part.waiting.front().is_some_and(|first| first.due <= now)
                && let Some(first) = part.waiting.pop_front()
            {
                let weight = first.entry.record.weight();
                part.bytes -= weight;
                self.share.take(weight);
                bytes += weight;
                ready.push(first.entry);
            }
        }
        self.parts.retain(|_, part| !part.waiting.is_empty());
        ready
    }

    /// Each part may fill its own of what the branch may hold. Those of which so much waits rest; one of which half is gone
    /// goes on.
    fn balance(&mut self) {
        let share = (self.share.most() / self.parts.len().max(1)).max(LEAST_SHARE);
        let rests =
            |number: &u16, part: &Part| part.bytes >= if self.resting.contains(number) { share / 2 } else { share };
        let resting: BTreeSet<u16> =
            self.parts.iter().filter(|(number, part)| rests(number, part)).map(|(number, _)| *number).collect();
        if resting != self.resting {
            self.subscription.rest(&resting);
            self.resting = resting;
        }
    }

    /// The file has another rule: what waits by it gets another time.
    fn renew(&mut self) {
        let rule = self.rule.borrow_and_update().clone();
        for waiting in self.parts.values_mut().flat_map(|part| &mut part.waiting).filter(|waiting| waiting.by_rule) {
            set_due(&mut waiting.entry, rule.as_ref());
            waiting.due = waiting.entry.record.due_at.unwrap_or(Timestamp::MIN);
        }
    }
}

/// Gives a record of another program its time. One without is due at once, with the reason why it has none.
fn set_due(entry: &mut Entry, rule: Option<&HoldRule>) {
    let (due_at, fault) = match rule.map(|rule| rule(&entry.record)) {
        None => (None, None),
        Some(Ok(due_at)) => (due_at, None),
        Some(Err(fault)) => (None, Some(fault)),
    };
    entry.fault = fault;
    if entry.record.due_at != due_at {
        Arc::make_mut(&mut entry.record).due_at = due_at;
    }
}

impl Subscription for Holding {
    fn next(&mut self, max_records: usize, max_bytes: usize) -> BoxFuture<'_, Result<Vec<Entry>, LogError>> {
        async move {
            loop {
                let ready = self.due(max_records, max_bytes);
                self.balance();
                if !ready.is_empty() {
                    return Ok(ready);
                }
                let first = self.parts.values().filter_map(|part| part.waiting.front()).map(|first| first.due).min();
                let clock = self.clock.clone();
                let due = async {
                    match first {
                        Some(first) => clock.sleep_until(first).await,
                        None => std::future::pending().await,
                    }
                };
                let changed = async {
                    if self.rule.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                };
                tokio::select! {
                    entries = self.subscription.next(max_records, max_bytes) => {
                        let ready = self.take_in(entries?);
                        if !ready.is_empty() {
                            self.balance();
                            return Ok(ready);
                        }
                    }
                    () = due => {}
                    () = changed => self.renew(),
                }
            }
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use parking_lot::Mutex;
    use tokio::sync::mpsc;

    use super::*;
    use crate::record::{Position, Record};
    use crate::source::foreign::budget::{Budget, MOST_BYTES, OWN_BYTES};
    use crate::testing::{NEW_YEAR, record};

    const HOUR: Duration = Duration::from_secs(3_600);

    /// A log that gives what the test sends.
    struct Sent {
        entries: mpsc::Receiver<Vec<Entry>>,
        resting: Arc<Mutex<BTreeSet<u16>>>,
    }

    impl Subscription for Sent {
        fn next(&mut self, _: usize, _: usize) -> BoxFuture<'_, Result<Vec<Entry>, LogError>> {
            async move { self.entries.recv().await.ok_or(LogError::Closed("the test is over".into())) }.boxed()
        }

        fn rest(&mut self, parts: &BTreeSet<u16>) {
            *self.resting.lock() = parts.clone();
        }
    }

    struct Bench {
        holding: Holding,
        log: mpsc::Sender<Vec<Entry>>,
        rule: watch::Sender<Option<HoldRule>>,
        resting: Arc<Mutex<BTreeSet<u16>>>,
        clock: Clock,
    }

    fn after(wait: Duration) -> HoldRule {
        Arc::new(move |record| Ok(Some(record.written_at.saturating_add(wait))))
    }

    fn bench(rule: Option<HoldRule>) -> Bench {
        let (clock, rule) = (Clock::manual(NEW_YEAR), watch::Sender::new(rule));
        let (log, entries) = mpsc::channel(100);
        let resting = Arc::<Mutex<BTreeSet<u16>>>::default();
        let sent = Box::new(Sent { entries, resting: Arc::clone(&resting) });
        let holding = Holding::of(sent, Box::new(|| 7), clock.clone(), rule.subscribe(), true);
        Bench { holding, log, rule, resting, clock }
    }

    /// A record of another program, written so long after the new year.
    fn others(part: u16, offset: u64, written: Duration) -> Entry {
        let record = Record { epoch: 0, written_at: NEW_YEAR.saturating_add(written), ..record(&offset.to_string()) };
        Entry::new(Position::in_part(part, offset), Arc::new(record))
    }

    impl Bench {
        fn send(&self, entries: Vec<Entry>) {
            self.log.try_send(entries).unwrap();
        }

        /// What can be had now, without any waiting.
        fn now(&mut self) -> Vec<(u16, u64)> {
            let mut all = Vec::new();
            while let Some(entries) = self.holding.next(100, usize::MAX).now_or_never() {
                all.extend(entries.unwrap().iter().map(|entry| (entry.position.part(), entry.position.offset())));
            }
            all
        }
    }

    #[tokio::test]
    async fn a_part_waits_until_its_head_is_due_and_the_others_go_on() {
        let mut bench = bench(Some(after(HOUR)));
        let early = Duration::from_secs(60);
        bench.send(vec![others(0, 1, 2 * early), others(0, 2, early), others(1, 1, Duration::ZERO)]);
        assert_eq!(bench.now(), []);
        bench.clock.advance(HOUR);
        assert_eq!(bench.now(), [(1, 1)]);
        bench.clock.advance(early);
        assert_eq!(bench.now(), [], "what is due stays behind the head, that is the order");
        bench.clock.advance(early);
        assert_eq!(bench.now(), [(0, 1), (0, 2)]);
    }

    #[tokio::test]
    async fn who_waits_is_woken_when_the_head_is_due() {
        let mut bench = bench(Some(after(HOUR)));
        bench.send(vec![others(0, 1, Duration::ZERO)]);
        assert_eq!(bench.now(), []);
        let clock = bench.clock.clone();
        let (entries, ()) = tokio::join!(bench.holding.next(1, 1), async { clock.advance(HOUR) });
        let entry = entries.unwrap().remove(0);
        assert_eq!(entry.record.due_at, Some(NEW_YEAR.saturating_add(HOUR)));
        assert_eq!(entry.record.epoch, 7, "it goes by the revision in force");
    }

    #[tokio::test]
    async fn what_was_written_here_has_its_own_time() {
        let mut bench = bench(Some(after(HOUR)));
        let ours = |offset, due_at| {
            let record = Record { due_at, ..record("1") };
            Entry::new(Position::in_part(0, offset), Arc::new(record))
        };
        bench.send(vec![ours(1, None), ours(2, Some(NEW_YEAR.saturating_add(2 * HOUR)))]);
        assert_eq!(bench.now(), [(0, 1)]);
        bench.clock.advance(HOUR);
        assert_eq!(bench.now(), []);
        bench.clock.advance(HOUR);
        assert_eq!(bench.now(), [(0, 2)]);
        // What a shelf has released may have been moved there to an earlier time.
        bench.holding.ours_too = false;
        bench.send(vec![ours(3, Some(NEW_YEAR.saturating_add(9 * HOUR)))]);
        assert_eq!(bench.now(), [(0, 3)]);
    }

    #[tokio::test]
    async fn another_rule_is_in_force_for_what_waits() {
        let mut bench = bench(Some(after(2 * HOUR)));
        bench.send(vec![others(0, 1, Duration::ZERO)]);
        assert_eq!(bench.now(), []);
        bench.clock.advance(HOUR);
        assert_eq!(bench.now(), []);
        bench.rule.send_replace(Some(after(HOUR)));
        assert_eq!(bench.now(), [(0, 1)]);
        bench.send(vec![others(0, 2, 2 * HOUR)]);
        assert_eq!(bench.now(), []);
        bench.rule.send_replace(None);
        assert_eq!(bench.now(), [(0, 2)]);
    }

    #[tokio::test]
    async fn a_record_without_a_time_comes_at_once_with_the_reason() {
        let mut bench = bench(Some(Arc::new(|_| Err("no time".into()))));
        bench.send(vec![others(0, 1, HOUR)]);
        let entry = bench.holding.next(1, 1).await.unwrap().remove(0);
        assert_eq!(entry.fault.as_deref(), Some("no time"));
    }

    #[tokio::test]
    async fn a_part_of_which_enough_waits_rests_until_half_is_gone() {
        let mut bench = bench(Some(after(HOUR)));
        let large = |offset: u64, minutes: u64| {
            let mut entry = others(0, offset, Duration::from_secs(60 * minutes));
            Arc::make_mut(&mut entry.record).payload = bytes::Bytes::from(vec![b'x'; MOST_BYTES / 8]);
            entry
        };
        bench.send((1..=5).map(|number| large(number, number)).collect());
        assert_eq!(bench.now(), []);
        assert!(bench.resting.lock().is_empty(), "there is room");
        bench.send((6..=8).map(|number| large(number, number)).chain([others(1, 1, HOUR)]).collect());
        assert_eq!(bench.now(), []);
        assert_eq!(*bench.resting.lock(), BTreeSet::from([0]));
        bench.clock.advance(HOUR + Duration::from_secs(8 * 60));
        assert_eq!(bench.now().len(), 8);
        assert!(bench.resting.lock().is_empty(), "it goes on");
    }

    #[tokio::test]
    async fn what_waits_is_held_of_the_budget_and_little_waits_when_that_is_spent() {
        static BUDGET: Budget = Budget::new(1 << 20);
        let mut others_hold = Share::of(&BUDGET);
        others_hold.add(1 << 20);
        let mut bench = bench(Some(after(HOUR)));
        bench.holding.share = Share::of(&BUDGET);
        let mut large = others(0, 1, Duration::ZERO);
        Arc::make_mut(&mut large.record).payload = bytes::Bytes::from(vec![b'x'; OWN_BYTES]);
        bench.send(vec![large]);
        assert_eq!(bench.now(), []);
        assert_eq!(*bench.resting.lock(), BTreeSet::from([0]), "its own little is held");
        assert!(BUDGET.held() > (1 << 20) + OWN_BYTES);
        bench.clock.advance(HOUR);
        assert_eq!(bench.now(), [(0, 1)]);
        assert_eq!(BUDGET.held(), 1 << 20, "what is due is held here no more");
    }
}
