//! Keys that are set aside: what waits on the shelf for this branch, and when it is tried again.
//!
//! While a key has rows there, its newer records join them, so nothing of the key overtakes; the lane opens again when
//! the end of its last row is durable.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use futures::FutureExt as _;

use super::actor::{Actor, Settled};
use super::lanes::Delivery;
use super::prepare::prepare;
use crate::clock::Timestamp;
use crate::record::RecordId;
use crate::source::{AsideLane, AsideRow, DeadQuery, DeadReason, LogError, RowKey, Settlement};
use crate::spec::sink::OnDeadLetter;

/// Keys set aside at most; beyond it a failing key waits in memory, and so holds the branch.
const LANES: usize = 10_000;
/// Rows of one key loaded at once.
const ROWS: usize = 100;
/// Dead letters known by key at most, for `overtaken` and `block`.
const KNOWN_DEAD: usize = 10_000;

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

#[derive(Debug)]
struct Aside {
    /// Rows on the shelf, those included whose settlement is under way.
    rows: u64,
    next_try: Timestamp,
    stage: Stage,
}

/// All keys of a branch that are set aside.
#[derive(Debug, Default)]
pub(super) struct Asides {
    lanes: HashMap<Box<str>, Aside>,
    tries: BinaryHeap<Reverse<(Timestamp, Box<str>)>>,
    blocked: usize,
}

impl Asides {
    /// What outlived the last run. A try that fell into the time when nothing ran is due now.
    pub(super) fn new(now: Timestamp, stored: &[AsideLane]) -> Self {
        let mut asides = Self::default();
        for lane in stored {
            let stage = if lane.next_try == Timestamp::MAX { Stage::Blocked } else { Stage::Waiting };
            asides.insert(&lane.lane, lane.rows, lane.next_try.max(now), stage);
        }
        asides
    }

    fn insert(&mut self, lane: &str, rows: u64, next_try: Timestamp, stage: Stage) {
        if let Some(old) = self.lanes.insert(lane.into(), Aside { rows, next_try, stage }) {
            self.blocked -= usize::from(old.stage == Stage::Blocked);
        }
        self.blocked += usize::from(stage == Stage::Blocked);
        if stage == Stage::Waiting {
            self.tries.push(Reverse((next_try, lane.into())));
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
        !self.lanes.is_empty() && self.lanes.contains_key(lane)
    }

    /// A newer record of the key joins its rows; gives the time to store with it.
    pub(super) fn joined(&mut self, lane: &str) -> Timestamp {
        self.lanes.get_mut(lane).map_or(Timestamp::MIN, |aside| {
            aside.rows += 1;
            aside.next_try
        })
    }

    /// `rows` more of the key are on their way to the shelf; its first row is tried at `next_try`.
    pub(super) fn wait(&mut self, lane: &str, rows: u64, next_try: Timestamp) {
        let before = self.lanes.get(lane).map_or(0, |aside| aside.rows);
        self.insert(lane, before + rows, next_try, Stage::Waiting);
    }

    fn block(&mut self, lane: &str) {
        let rows = self.lanes.get(lane).map_or(0, |aside| aside.rows);
        self.insert(lane, rows, Timestamp::MAX, Stage::Blocked);
    }

    /// A dead letter of the key came back: its rows are tried from the first on.
    pub(super) fn replayed(&mut self, lane: &AsideLane) {
        match self.lanes.get_mut(&lane.lane) {
            // What is in memory of the key goes on; the replayed rows follow when it is through.
            Some(aside) if matches!(aside.stage, Stage::Trying(_) | Stage::Loading) => {
                aside.rows = aside.rows.max(lane.rows);
            }
            _ => self.insert(&lane.lane, lane.rows, Timestamp::MIN, Stage::Waiting),
        }
    }

    /// When the next key is due.
    pub(super) fn next_try(&self) -> Option<Timestamp> {
        self.tries.peek().map(|Reverse((at, _))| *at)
    }

    fn take_due(&mut self, now: Timestamp) -> Option<Box<str>> {
        while let Some(Reverse((at, _))) = self.tries.peek()
            && *at <= now
            && let Some(Reverse((at, lane))) = self.tries.pop()
        {
            let current = |aside: &&mut Aside| aside.stage == Stage::Waiting && aside.next_try == at;
            if let Some(aside) = self.lanes.get_mut(&lane).filter(current) {
                aside.stage = Stage::Loading;
                return Some(lane);
            }
        }
        None
    }

    fn trying(&mut self, lane: &str, count: usize) {
        if let Some(aside) = self.lanes.get_mut(lane) {
            aside.stage = Stage::Trying(count);
        }
    }

    /// A row's end is durable. The lane opens when it was the last; else the next rows are due when none is in memory.
    pub(super) fn left(&mut self, lane: &str) {
        let Some(aside) = self.lanes.get_mut(lane) else { return };
        aside.rows = aside.rows.saturating_sub(1);
        if let Stage::Trying(count) = aside.stage {
            let count = count.saturating_sub(1);
            aside.stage = Stage::Trying(count);
            if count == 0 {
                let rows = aside.rows;
                if rows == 0 {
                    self.lanes.remove(lane);
                } else {
                    self.insert(lane, rows, Timestamp::MIN, Stage::Waiting);
                }
            }
        } else if aside.rows == 0 && aside.stage == Stage::Waiting {
            self.lanes.remove(lane);
        }
    }

    fn blocked_lanes(&self) -> Vec<Box<str>> {
        let blocked = self.lanes.iter().filter(|(_, aside)| aside.stage == Stage::Blocked);
        blocked.map(|(lane, _)| lane.clone()).take(64).collect()
    }

    fn unblock(&mut self, lane: &str) {
        let rows = self.lanes.get(lane).map_or(0, |aside| aside.rows);
        if rows == 0 {
            if self.lanes.remove(lane).is_some() {
                self.blocked -= 1;
            }
        } else {
            self.insert(lane, rows, Timestamp::MIN, Stage::Waiting);
        }
    }
}

impl Actor {
    /// Begins to read the rows of every key that is due.
    pub(super) fn load_due(&mut self) {
        let now = self.deps.clock.now();
        while self.loads.len() < 16
            && let Some(lane) = self.asides.take_due(now)
        {
            let rows = self.deps.shelf.aside_rows(&self.plan.name, &lane, ROWS);
            self.loads.push(async move { (lane, rows.await) }.boxed());
        }
    }

    /// The rows of a key are here: prepare them again and put them into the lanes, in order.
    pub(super) async fn loaded(&mut self, lane: &str, rows: Vec<AsideRow>) {
        let (mut settlement, mut settled) = (Settlement::default(), Settled::default());
        let mut deliveries = Vec::new();
        let in_force = self.deps.revisions.in_force().await;
        let count = rows.len();
        for row in rows {
            let Some(now) = in_force.revisions().last().map(|newest| Arc::clone(&newest.plan)) else { break };
            // What is sent again goes by the file as it is now: that is how a mended script gets its chance.
            let then = if row.replayed { &now } else { in_force.at(row.row.position).unwrap_or(&now) };
            let then = Arc::clone(then);
            let branch = Arc::clone(&self.plan);
            let record = Arc::clone(&row.record);
            let position = row.row.position;
            let prepared =
                tokio::task::spawn_blocking(move || prepare(position, record, &branch, &now, &then)).await.ok();
            // A replay runs the original and sends all that comes of it; a child that was set aside is itself again.
            let dropped = prepared.as_ref().and_then(|prepared| prepared.dropped.clone());
            let parts = prepared.map(|prepared| prepared.parts).unwrap_or_default();
            let mine = parts.into_iter().filter(|part| row.replayed || part.child == row.row.child);
            let mut any = false;
            for part in mine {
                match part.result {
                    Ok((event, case)) => {
                        let event = match &row.rendered {
                            Some(rendered) => event.with_payload(rendered.clone()),
                            None => event,
                        };
                        let mut delivery = Delivery::new(row.row, event, case);
                        delivery.attempts = row.attempts;
                        delivery.first_failed = (row.attempts > 0).then_some(row.first_failed);
                        delivery.last_error.clone_from(&row.last_error);
                        delivery.shelved = Some(lane.into());
                        deliveries.push(delivery);
                        any = true;
                    }
                    Err(stillborn) => {
                        let record = Arc::clone(&row.record);
                        let (reason, error) = (stillborn.reason, stillborn.error);
                        settlement.dead.push(self.letter(row.row, record, reason, 0, error, &stillborn.stage, None));
                        settled.left.push(lane.into());
                        any = true;
                    }
                }
            }
            if !any && dropped.is_none() && row.replayed {
                // Another arm's now. Nobody else has it, so it stays where it can be found.
                let error = "the file gives this record to another sink now: write it again, or purge it".into();
                let record = Arc::clone(&row.record);
                let letter = self.letter(row.row, record, DeadReason::NoRoute, 0, error, "sink", None);
                settlement.dead.push(letter);
                settled.left.push(lane.into());
            } else if !any {
                settlement.returned.push(row.row);
                let reason = dropped.unwrap_or_else(|| "the file sends it nowhere any more".into());
                settlement.dropped.push((row.row.position, reason));
                settled.left.push(lane.into());
            }
        }
        // A row that became several deliveries ends with the first of them that ends; the others are at least once.
        self.asides.trying(lane, count);
        if count == 0 {
            // Its rows are not visible yet, or are gone.
            self.asides.unblock_empty(lane);
        }
        for delivery in deliveries {
            self.bytes += delivery.weight();
            self.lanes.push(delivery, true);
        }
        if !settlement.is_frontier_only() {
            self.settle(settlement, settled);
        }
    }

    /// Skips a record that lies on the shelf: only a key's first row can be skipped.
    pub(super) async fn skip_shelved(&mut self, id: RecordId) -> Option<RecordId> {
        let lanes: Vec<Box<str>> = self
            .asides
            .lanes
            .iter()
            .filter(|(_, aside)| aside.stage == Stage::Waiting)
            .map(|(lane, _)| lane.clone())
            .collect();
        for lane in lanes {
            let rows = self.deps.shelf.aside_rows(&self.plan.name, &lane, 1).await.ok()?;
            if let Some(row) = rows.into_iter().find(|row| row.record.id == id) {
                let error = "skipped by an operator".into();
                let letter =
                    self.letter(row.row, row.record, DeadReason::Skipped, row.attempts, error, "sink", row.rendered);
                let settlement = Settlement { dead: vec![letter], ..Settlement::default() };
                self.settle(settlement, Settled { ends: Vec::new(), left: vec![lane] });
                return Some(id);
            }
        }
        None
    }

    /// Remembers which keys have dead letters, so that they can be marked as overtaken, or hold their key.
    pub(super) async fn learn_dead_letters(&mut self) -> Result<(), LogError> {
        self.count_dead_bytes();
        if self.dead_bytes == 0 {
            return Ok(());
        }
        let branch = Some(self.plan.name.as_str().to_owned());
        let query = DeadQuery { branch, limit: KNOWN_DEAD, ..DeadQuery::default() };
        for letter in self.deps.shelf.dead_letters(query).await?.rows {
            if letter.record.key.is_some() && !letter.overtaken {
                self.remember_dead(&crate::source::lane_of(letter.record.key.as_deref(), letter.row), letter.row);
            }
        }
        Ok(())
    }

    pub(super) fn remember_dead(&mut self, lane: &str, row: RowKey) {
        if self.dead_lanes.len() < KNOWN_DEAD {
            self.dead_lanes.entry(lane.into()).or_default().push(row);
        }
        if self.plan.dead_letters.on_dead_letter == OnDeadLetter::Block && self.asides.has_room() {
            self.asides.block(lane);
        }
    }

    pub(super) fn count_dead_bytes(&mut self) {
        let counts = self.deps.shelf.counts();
        let own = counts.dead.iter().find(|(name, _, _)| *name == self.plan.name);
        self.dead_bytes = own.map_or(0, |(_, _, bytes)| *bytes);
    }

    /// Opens keys again whose dead letters have been purged.
    pub(super) async fn look_at_blocked(&mut self) -> Result<(), LogError> {
        for lane in self.asides.blocked_lanes() {
            let branch = Some(self.plan.name.as_str().to_owned());
            let key = lane.strip_prefix('=').map(ToOwned::to_owned);
            let query = DeadQuery { branch, key, limit: 1, ..DeadQuery::default() };
            if self.deps.shelf.dead_letters(query).await?.rows.is_empty() {
                self.asides.unblock(&lane);
            }
        }
        self.load_due();
        Ok(())
    }
}

impl Asides {
    /// Nothing of the key was found: look again a little later while rows are known, else open it.
    fn unblock_empty(&mut self, lane: &str) {
        match self.lanes.get(lane).map(|aside| aside.rows) {
            Some(0) => _ = self.lanes.remove(lane),
            Some(rows) => {
                let later = Timestamp::MIN;
                self.insert(lane, rows - 1, later, Stage::Waiting);
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_opens_only_when_the_end_of_its_last_row_is_durable() {
        let mut asides = Asides::default();
        let at = Timestamp::from_millis;
        asides.wait("=a", 2, at(5));
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
    fn a_blocked_lane_is_not_tried_until_it_is_opened() {
        let mut asides = Asides::default();
        asides.block("=a");
        asides.joined("=a");
        assert!(asides.any_blocked() && asides.take_due(Timestamp::MAX).is_none());
        asides.unblock("=a");
        assert_eq!(asides.take_due(Timestamp::MIN).as_deref(), Some("=a"));
        assert!(!asides.any_blocked());
    }
}
