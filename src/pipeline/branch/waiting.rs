//! The book of keys that are set aside: how much of each lies on the shelf, and when it is tried again.
//!
//! While a key has rows there, its newer records join them, so nothing of the key overtakes. The lane opens again when the
//! end of its last row is durable. It counts rows, but trusts only what was read while nothing was on its way to the
//! shelf: what a count misses would wait for ever.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};

use super::lanes::Since;
use crate::clock::Timestamp;
use crate::record::Position;
use crate::source::{AsideLane, Reach, RowKey};

/// Keys set aside at most; beyond it a failing key waits in memory, and so holds the branch.
const LANES: usize = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing of it is in memory.
    Waiting,
    /// Its rows are being read.
    Loading,
    /// So many of its rows are in the lanes.
    Trying(usize),
    /// Held behind a dead letter of its key.
    Blocked,
}

/// What is known of a first row's failures and is not stored with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failures {
    pub(super) row: RowKey,
    pub(super) since: Since,
    /// The run of failures in which it failed last, and how often in it.
    pub(super) streak: (u64, u32),
    /// Attempts to take back: the target was away.
    pub(super) given_back: u32,
}

#[derive(Debug)]
struct Aside {
    /// Rows on the shelf, those included whose settlement is under way.
    rows: u64,
    next_try: Timestamp,
    stage: Stage,
    /// Changes of its rows that are not durable yet: what is read meanwhile may be stale.
    moving: u32,
    /// Rows were added since they were last read.
    look_again: bool,
    /// Its first row was replayed: it waits for its turn among those, not for a time.
    replayed: bool,
    /// It stands in `replays`.
    listed: bool,
    failures: Option<Failures>,
}

impl Aside {
    const fn is_settled(&self) -> bool {
        self.rows == 0 && self.moving == 0 && !self.look_again
    }
}

/// All keys of a branch that are set aside.
#[derive(Debug, Default)]
pub(super) struct Asides {
    lanes: HashMap<Box<str>, Aside>,
    tries: BinaryHeap<Reverse<(Timestamp, Box<str>)>>,
    /// Keys whose first row was replayed, in the order of their coming.
    replays: VecDeque<Box<str>>,
    blocked: usize,
    /// Keys of an earlier run by their last row: not tried until the branch has read so far again. What was delivered of
    /// them and lies beyond the cursor goes once more, and before their rows (LOG.md 11).
    held: BTreeMap<Position, Vec<Box<str>>>,
}

impl Asides {
    /// What outlived the last run. A try that fell into the time when nothing ran is due now.
    pub(super) fn new(now: Timestamp, cursor: &Reach, stored: &[AsideLane]) -> Self {
        let mut asides = Self::default();
        for lane in stored {
            let stage = if lane.next_try == Timestamp::MAX { Stage::Blocked } else { Stage::Waiting };
            let last = lane.last.position;
            asides.put(&lane.lane, |aside| {
                (aside.rows, aside.next_try, aside.stage) = (lane.rows, lane.next_try.max(now), stage);
                aside.moving = u32::from(!cursor.covers(last));
            });
            if !cursor.covers(last) {
                asides.held.entry(last).or_default().push(lane.lane.clone());
            }
        }
        asides
    }

    /// The branch has read up to here again: keys whose rows all lie at or below may be tried.
    pub(super) fn has_read(&mut self, reach: &Reach) {
        for position in reach.iter() {
            let part = Position::in_part(position.part(), 0)..=position;
            while let Some((&first, _)) = self.held.range(part.clone()).next() {
                self.held.remove(&first).iter().flatten().for_each(|lane| self.moved(lane));
            }
        }
    }

    /// True while there are keys that wait for the branch to read on from here.
    pub(super) fn wait_for(&self, reach: &Reach) -> bool {
        self.held.keys().any(|last| !reach.covers(*last))
    }

    /// Changes a lane's entry, made first if there is none, and keeps what is derived from it.
    fn put(&mut self, lane: &str, change: impl FnOnce(&mut Aside)) {
        let aside = self.lanes.entry(lane.into()).or_insert_with(|| Aside {
            rows: 0,
            next_try: Timestamp::MIN,
            stage: Stage::Waiting,
            moving: 0,
            look_again: false,
            replayed: false,
            listed: false,
            failures: None,
        });
        let was_blocked = aside.stage == Stage::Blocked;
        change(aside);
        let is_blocked = aside.stage == Stage::Blocked;
        if aside.stage == Stage::Waiting && aside.moving == 0 {
            if !aside.replayed {
                self.tries.push(Reverse((aside.next_try, lane.into())));
            } else if !std::mem::replace(&mut aside.listed, true) {
                self.replays.push_back(lane.into());
            }
        }
        self.blocked = self.blocked + usize::from(is_blocked) - usize::from(was_blocked);
    }

    fn remove(&mut self, lane: &str) {
        if self.lanes.remove(lane).is_some_and(|aside| aside.stage == Stage::Blocked) {
            self.blocked -= 1;
        }
    }

    pub(super) fn len(&self) -> usize {
        self.lanes.len()
    }

    pub(super) fn has_room(&self) -> bool {
        self.lanes.len() < LANES
    }

    pub(super) const fn any_blocked(&self) -> bool {
        self.blocked > 0
    }

    pub(super) fn holds(&self, lane: &str) -> bool {
        self.lanes.contains_key(lane)
    }

    /// A newer record of the key joins its rows; gives the time to store with it.
    pub(super) fn joined(&mut self, lane: &str) -> Timestamp {
        self.lanes.get_mut(lane).map_or(Timestamp::MIN, |aside| {
            aside.rows += 1;
            aside.look_again = true;
            if aside.stage == Stage::Blocked { Timestamp::MAX } else { aside.next_try }
        })
    }

    /// A change of the key's rows is on its way to the shelf.
    pub(super) fn moves(&mut self, lane: &str) {
        if let Some(aside) = self.lanes.get_mut(lane) {
            aside.moving += 1;
        }
    }

    /// That change is durable.
    pub(super) fn moved(&mut self, lane: &str) {
        if self.holds(lane) {
            self.put(lane, |aside| aside.moving = aside.moving.saturating_sub(1));
        }
    }

    /// `rows` more of the key are on their way to the shelf; its first row is tried at `next_try`.
    pub(super) fn wait(&mut self, lane: &str, rows: u64, next_try: Timestamp, failures: Option<Failures>) {
        self.put(lane, |aside| {
            aside.rows += rows;
            aside.next_try = next_try;
            aside.look_again = true;
            aside.replayed = false;
            aside.failures = failures;
            if aside.stage != Stage::Blocked {
                aside.stage = Stage::Waiting;
            }
        });
    }

    /// A dead letter holds the key; `rows` of it are on their way to the shelf.
    pub(super) fn block(&mut self, lane: &str, rows: u64) {
        self.put(lane, |aside| {
            aside.rows += rows;
            aside.next_try = Timestamp::MAX;
            aside.stage = Stage::Blocked;
        });
    }

    /// A dead letter of the key came back: its rows are tried from the first on.
    pub(super) fn replayed(&mut self, lane: &AsideLane) {
        self.put(&lane.lane, |aside| {
            aside.rows = aside.rows.max(lane.rows);
            (aside.look_again, aside.replayed) = (true, true);
            // What is in memory of the key goes on; the replayed rows follow when it is through.
            if !matches!(aside.stage, Stage::Trying(_) | Stage::Loading) {
                (aside.stage, aside.next_try) = (Stage::Waiting, Timestamp::MIN);
            }
        });
    }

    /// The target is away: what a key's first row failed in this run of failures is taken back.
    pub(super) fn give_back(&mut self, streak: u64) {
        for failures in self.lanes.values_mut().filter_map(|aside| aside.failures.as_mut()) {
            if failures.streak.0 == streak {
                failures.given_back += std::mem::take(&mut failures.streak.1);
            }
        }
    }

    /// What is known of the failures of a key's first row.
    pub(super) fn failures(&self, lane: &str) -> Option<Failures> {
        self.lanes.get(lane).and_then(|aside| aside.failures)
    }

    /// When the next key is due.
    pub(super) fn next_try(&self) -> Option<Timestamp> {
        self.tries.peek().map(|Reverse((at, _))| *at)
    }

    /// A key that is due; its rows are read next.
    pub(super) fn take_due(&mut self, now: Timestamp) -> Option<Box<str>> {
        while let Some(Reverse((at, _))) = self.tries.peek()
            && *at <= now
            && let Some(Reverse((at, lane))) = self.tries.pop()
        {
            let due = |aside: &&mut Aside| {
                aside.stage == Stage::Waiting && aside.next_try == at && aside.moving == 0 && !aside.replayed
            };
            if let Some(aside) = self.lanes.get_mut(&lane).filter(due) {
                (aside.stage, aside.look_again) = (Stage::Loading, false);
                return Some(lane);
            }
        }
        None
    }

    /// A replayed key whose turn it is; its rows are read next.
    pub(super) fn take_replay(&mut self) -> Option<Box<str>> {
        while let Some(lane) = self.replays.pop_front() {
            let Some(aside) = self.lanes.get_mut(&lane) else { continue };
            aside.listed = false;
            if aside.stage == Stage::Waiting && aside.moving == 0 && aside.replayed {
                (aside.stage, aside.look_again, aside.replayed) = (Stage::Loading, false, false);
                return Some(lane);
            }
        }
        None
    }

    /// True when a replayed key waits for its turn.
    pub(super) fn has_replays(&self) -> bool {
        !self.replays.is_empty()
    }

    /// Replayed rows of the key have to wait for their turn; `all` of what was read, or what follows it.
    pub(super) fn throttle(&mut self, lane: &str, all: bool) {
        self.put(lane, |aside| {
            aside.replayed = true;
            if all && aside.stage == Stage::Loading {
                (aside.stage, aside.next_try) = (Stage::Waiting, Timestamp::MIN);
            }
        });
    }

    /// True while the rows that were read may be tried: nothing blocked the key meanwhile.
    pub(super) fn is_loading(&self, lane: &str) -> bool {
        self.lanes.get(lane).is_some_and(|aside| aside.stage == Stage::Loading)
    }

    /// So many rows of the key were read. None: it is through, or they are not visible yet.
    pub(super) fn trying(&mut self, lane: &str, count: usize) {
        let Some(aside) = self.lanes.get_mut(lane).filter(|aside| aside.stage == Stage::Loading) else { return };
        if count > 0 {
            aside.stage = Stage::Trying(count);
        } else if aside.moving == 0 && !aside.look_again {
            self.remove(lane);
        } else {
            self.put(lane, |aside| (aside.stage, aside.next_try) = (Stage::Waiting, Timestamp::MIN));
        }
    }

    /// A row's end is durable. The lane opens when it was the last; else the next rows are due when none is in memory.
    pub(super) fn left(&mut self, lane: &str) {
        let Some(aside) = self.lanes.get_mut(lane) else { return };
        aside.rows = aside.rows.saturating_sub(1);
        let through = match &mut aside.stage {
            Stage::Trying(count) => {
                *count = count.saturating_sub(1);
                *count == 0
            }
            Stage::Waiting => true,
            Stage::Loading | Stage::Blocked => false,
        };
        if through && aside.is_settled() {
            self.remove(lane);
        } else if through && matches!(aside.stage, Stage::Trying(_)) {
            self.put(lane, |aside| (aside.stage, aside.next_try) = (Stage::Waiting, Timestamp::MIN));
        }
    }

    /// Some of the keys that are held behind a dead letter.
    pub(super) fn blocked_lanes(&self) -> Vec<Box<str>> {
        let blocked = self.lanes.iter().filter(|(_, aside)| aside.stage == Stage::Blocked);
        blocked.map(|(lane, _)| lane.clone()).take(64).collect()
    }

    /// The dead letter is gone: the key goes on.
    pub(super) fn unblock(&mut self, lane: &str) {
        if self.lanes.get(lane).is_some_and(Aside::is_settled) {
            self.remove(lane);
        } else if self.holds(lane) {
            self.put(lane, |aside| (aside.stage, aside.next_try) = (Stage::Waiting, Timestamp::MIN));
        }
    }

    /// The keys of which nothing is in memory.
    pub(super) fn waiting_lanes(&self) -> Vec<Box<str>> {
        let waiting = self.lanes.iter().filter(|(_, aside)| matches!(aside.stage, Stage::Waiting | Stage::Blocked));
        waiting.map(|(lane, _)| lane.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_opens_only_when_the_end_of_its_last_row_is_durable() {
        let mut asides = Asides::default();
        let at = Timestamp::from_millis;
        asides.wait("=a", 2, at(5), None);
        assert!(asides.holds("=a") && asides.take_due(at(4)).is_none());
        assert_eq!(asides.take_due(at(5)).as_deref(), Some("=a"));
        asides.trying("=a", 2);
        assert_eq!(asides.joined("=a"), at(5), "a newer record joins");
        asides.left("=a");
        asides.left("=a");
        assert!(asides.holds("=a"), "the newer one is still there");
        assert_eq!(asides.take_due(at(5)).as_deref(), Some("=a"));
        asides.trying("=a", 1);
        asides.left("=a");
        assert!(!asides.holds("=a"));
    }

    #[test]
    fn rows_are_not_read_while_a_change_of_them_is_under_way() {
        let mut asides = Asides::default();
        asides.wait("=a", 1, Timestamp::MIN, None);
        asides.moves("=a");
        assert!(asides.take_due(Timestamp::MAX).is_none(), "the row is not on the shelf yet");
        asides.moved("=a");
        assert_eq!(asides.take_due(Timestamp::MAX).as_deref(), Some("=a"));
    }

    #[test]
    fn a_row_that_came_while_the_last_was_tried_is_not_forgotten() {
        let mut asides = Asides::default();
        asides.wait("=a", 1, Timestamp::MIN, None);
        asides.take_due(Timestamp::MAX).unwrap();
        asides.trying("=a", 1);
        let replayed = AsideLane {
            lane: "=a".into(),
            first: RowKey { position: Position(1), child: 0 },
            last: RowKey { position: Position(1), child: 0 },
            rows: 1,
            next_try: Timestamp::MIN,
            attempts: 0,
            first_failed: Timestamp::MIN,
        };
        asides.replayed(&replayed);
        asides.left("=a");
        assert_eq!(asides.take_replay().as_deref(), Some("=a"), "by count there was none left");
        asides.trying("=a", 0);
        assert!(!asides.holds("=a"));
    }

    #[test]
    fn a_blocked_lane_is_not_tried_until_it_is_opened() {
        let mut asides = Asides::default();
        asides.block("=a", 0);
        asides.joined("=a");
        assert!(asides.any_blocked() && asides.take_due(Timestamp::MAX).is_none());
        asides.unblock("=a");
        assert_eq!(asides.take_due(Timestamp::MIN).as_deref(), Some("=a"));
        assert!(!asides.any_blocked());
    }
}
