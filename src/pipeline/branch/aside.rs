//! How keys come back from the shelf, and what dead letters mean for the rest of their key.
//!
//! Takes the rows of a key that is due and puts them into the lanes again, in order; keeps in mind which keys have dead
//! letters. Never lets a key's newer record pass its rows.

use std::sync::Arc;

use futures::FutureExt as _;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::Told;
use super::actor::{Actor, REPLAYS, Settled};
use super::lanes::{Delivery, Shelved, Siblings};
use super::prepare::{Prepared, Stillborn, Then, choose, guarded, now_as_then, prepare};
use crate::pipeline::plan::{BranchPlan, Plan};
use crate::pipeline::revisions::InForce;
use crate::record::{Position, Record, RecordId};
use crate::source::{AsideLane, AsideRow, DeadLetter, DeadQuery, DeadReason, LogError, RowKey, Settlement, lane_of};
use crate::spec::sink::OnDeadLetter;
use crate::transform::Event;

/// Rows of one key loaded at once.
const ROWS: usize = 100;
/// Keys whose rows are read at once.
const LOADS: usize = 16;
/// Dead letters known by key at most, for `overtaken`; of those beyond nothing is marked.
const KNOWN_DEAD: usize = 10_000;

/// What a row became.
pub(super) type Parts = Vec<Result<(Event, usize), Stillborn>>;

/// [`prepare`], or what a test puts in its place.
pub(super) type Prepare = fn(Position, Arc<Record>, &BranchPlan, &Plan, Then<'_>) -> Prepared;

/// What a row is to the branch now, run off the async threads. A panic is the record's error.
pub(super) async fn again(
    row: AsideRow,
    branch: Arc<BranchPlan>,
    now: Arc<Plan>,
    in_force: InForce,
    prepare: Prepare,
) -> Result<(Parts, Option<Box<str>>), LogError> {
    let work = move || {
        // What is sent again goes by the file as it is now: that is how a mended script gets its chance.
        let then = if row.replayed { None } else { in_force.branch_at(row.record.epoch, &branch.name) };
        let then = then.unwrap_or_else(|| now_as_then(&now, &branch));
        let prepared = prepare(row.row.position, Arc::clone(&row.record), &branch, &now, then);
        // A replay runs the original and sends all that comes of it; a child that was set aside is itself again.
        let mine = prepared.parts.into_iter().filter(|part| row.replayed || part.child == row.row.child);
        let mut parts: Parts = mine.map(|part| part.result).collect();
        if let Some(rendered) = row.rendered {
            for (event, _) in parts.iter_mut().flatten() {
                *event = event.clone().with_payload(rendered.clone());
            }
            if parts.is_empty() {
                // The script was edited and makes no such child any more: it goes out as it was.
                let mut event = Event::original(row.record).with_payload(rendered);
                event.child = row.row.child;
                parts.push(choose(&branch.cases, &event).map(|case| (event, case)));
            }
        }
        (parts, prepared.dropped)
    };
    let failed = |_| LogError::Storage { act: "prepare a row of the shelf".into(), cause: "its thread ended".into() };
    let guarded = move || guarded(work).unwrap_or_else(|stillborn| (vec![Err(stillborn)], None));
    tokio::task::spawn_blocking(guarded).await.map_err(failed)
}

impl Actor {
    pub(super) fn may_load(&self) -> bool {
        self.loads.len() < LOADS && self.has_room()
    }

    /// Begins to read the rows of every key that is due.
    pub(super) fn load_due(&mut self) {
        let now = self.deps.clock.now();
        while self.may_load()
            && let Some(lane) = self.asides.take_due(now)
        {
            self.load(lane, ROWS);
        }
        while self.may_load()
            && let Some(allowed) = self.replays.allows(REPLAYS, Instant::now())
            && let Some(lane) = self.asides.take_replay()
        {
            self.load(lane, allowed.min(ROWS));
        }
    }

    fn load(&mut self, lane: Box<str>, limit: usize) {
        let rows = self.deps.shelf.aside_rows(&self.plan.name, &lane, limit);
        self.loads.push(async move { (lane, rows.await) }.boxed());
    }

    /// The rows that may go now: replayed ones go at their own rate, and nothing of a key goes before them.
    fn paced(&mut self, lane: &str, mut rows: Vec<AsideRow>) -> Vec<AsideRow> {
        let wanted = rows.iter().filter(|row| row.replayed).count();
        if wanted == 0 {
            return rows;
        }
        let mut allowed = self.replays.take(wanted, Instant::now());
        if allowed < wanted {
            rows.retain({
                let mut open = true;
                move |row| {
                    open &= !row.replayed || allowed > 0;
                    allowed -= usize::from(open && row.replayed);
                    open
                }
            });
            self.asides.throttle(lane, rows.is_empty());
        }
        rows
    }

    /// The rows of a key are here: prepare them again and put them into the lanes, in order.
    pub(super) async fn loaded(&mut self, lane: &str, rows: Vec<AsideRow>) -> Result<(), LogError> {
        if !self.asides.is_loading(lane) {
            return Ok(());
        }
        let found = rows.len();
        let rows = self.paced(lane, rows);
        if rows.is_empty() && found > 0 {
            return Ok(());
        }
        let (mut settlement, mut settled) = (Settlement::default(), Settled::default());
        let mut deliveries = Vec::new();
        let in_force = self.deps.revisions.in_force().await;
        let Some(now) = in_force.revisions().last().map(|newest| Arc::clone(&newest.plan)) else { return Ok(()) };
        let blocks = self.plan.dead_letters.on_dead_letter == OnDeadLetter::Block;
        let mut count = 0;
        for row in rows {
            let (parts, dropped) =
                again(row.clone(), Arc::clone(&self.plan), Arc::clone(&now), in_force.clone(), prepare).await?;
            let bad = parts.iter().any(Result::is_err);
            if bad && blocks && count > 0 {
                // What lies before it goes first; then it is met again, and holds the rest.
                break;
            }
            count += 1;
            if parts.is_empty() && dropped.is_none() && row.replayed {
                // Another arm's now. Nobody else has it, so it stays where it can be found.
                let error = "the file gives this record to another sink now: write it again, or purge it".into();
                let record = Arc::clone(&row.record);
                let letter = self.letter(row.row, record, DeadReason::NoRoute, row.attempts, error, "sink", None);
                settlement.dead.push(letter);
                settled.left.push(lane.into());
                continue;
            }
            if parts.is_empty() {
                settlement.returned.push(row.row);
                let reason = dropped.unwrap_or_else(|| "the file sends it nowhere any more".into());
                settlement.dropped.push((row.row.position, reason));
                settled.left.push(lane.into());
                continue;
            }
            let mut letter = None;
            let mut sound = Vec::new();
            for part in parts {
                match part {
                    Ok(sent) => sound.push(sent),
                    Err(Stillborn { reason, stage, error }) => {
                        let record = Arc::clone(&row.record);
                        letter = Some(self.letter(row.row, record, reason, row.attempts, error, &stage, None));
                    }
                }
            }
            if sound.is_empty() {
                settlement.dead.extend(letter);
                settled.left.push(lane.into());
                if blocks {
                    self.asides.block(lane, 0);
                    break;
                }
                continue;
            }
            let siblings = (sound.len() > 1 || letter.is_some())
                .then(|| Arc::new(Mutex::new(Siblings { open: sound.len(), letter: letter.take() })));
            for (event, case) in sound {
                let mut delivery = self.shelved_delivery(&row, lane, event, case);
                if let Some(shelved) = &mut delivery.shelved {
                    shelved.siblings.clone_from(&siblings);
                }
                deliveries.push(delivery);
            }
        }
        self.asides.trying(lane, count);
        for delivery in deliveries {
            self.bytes += delivery.weight();
            self.lanes.push(delivery);
        }
        if !settlement.is_frontier_only() {
            self.settle(settlement, settled);
        }
        Ok(())
    }

    fn shelved_delivery(&self, row: &AsideRow, lane: &str, event: Event, case: usize) -> Delivery {
        let mut delivery = Delivery::new(row.row, event, case, true);
        delivery.attempts = row.attempts;
        delivery.first_failed = (row.attempts > 0).then_some(row.first_failed);
        delivery.last_error.clone_from(&row.last_error);
        delivery.shelved = Some(Shelved { lane: lane.into(), replayed: row.replayed, siblings: None });
        match self.asides.failures(lane).filter(|failures| failures.row == row.row) {
            Some(failures) => {
                delivery.attempts = delivery.attempts.saturating_sub(failures.given_back);
                delivery.failing = (delivery.attempts > 0).then_some(failures.since);
                delivery.streak = failures.streak;
            }
            // It failed in an earlier run, of which nobody knows how long the branch was open: it counts from now.
            None => delivery.failing = (row.attempts > 0).then(|| self.since()),
        }
        delivery
    }

    /// Ends a row that came from the shelf; with siblings, when it is the last of them.
    pub(super) fn end_shelved(
        shelved: &Shelved,
        row: RowKey,
        letter: Option<DeadLetter>,
        settlement: &mut Settlement,
        settled: &mut Settled,
    ) {
        let letter = match &shelved.siblings {
            None => letter,
            Some(siblings) => {
                let mut siblings = siblings.lock();
                siblings.open = siblings.open.saturating_sub(1);
                siblings.letter = letter.or(siblings.letter.take());
                if siblings.open > 0 {
                    return;
                }
                siblings.letter.take()
            }
        };
        match letter {
            Some(letter) => settlement.dead.push(letter),
            None => settlement.returned.push(row),
        }
        settled.left.push(shelved.lane.clone());
    }

    /// Skips a record that lies on the shelf: only a key's first row can be skipped.
    pub(super) async fn skip_shelved(&mut self, id: RecordId, told: Told) {
        for lane in self.asides.waiting_lanes() {
            let Ok(rows) = self.deps.shelf.aside_rows(&self.plan.name, &lane, 1).await else { return };
            if let Some(row) = rows.into_iter().find(|row| row.record.id == id) {
                let error = "skipped by an operator".into();
                let letter =
                    self.letter(row.row, row.record, DeadReason::Skipped, row.attempts, error, "sink", row.rendered);
                let settlement = Settlement { dead: vec![letter], ..Settlement::default() };
                return self
                    .settle(settlement, Settled { left: vec![lane], tell: vec![told.of(id)], ..Settled::default() });
            }
        }
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
                let lane = lane_of(letter.record.key.as_deref(), letter.row);
                self.remember_dead(&lane, letter.row);
                if self.blocks(true) {
                    self.asides.block(&lane, 0);
                }
            }
        }
        Ok(())
    }

    /// Whether a dead letter holds its key.
    pub(super) fn blocks(&self, keyed: bool) -> bool {
        keyed && self.plan.dead_letters.on_dead_letter == OnDeadLetter::Block && self.asides.has_room()
    }

    pub(super) fn remember_dead(&mut self, lane: &str, row: RowKey) {
        if self.known_dead < KNOWN_DEAD {
            self.known_dead += 1;
            self.dead_lanes.entry(lane.into()).or_default().push(row);
        }
    }

    /// The dead letters of the key that a newer delivery has overtaken.
    pub(super) fn overtaken_by(&mut self, lane: &str, row: RowKey) -> Vec<RowKey> {
        let Some(rows) = self.dead_lanes.get_mut(lane) else { return Vec::new() };
        let older: Vec<RowKey> = rows.extract_if(.., |dead| *dead < row).collect();
        if rows.is_empty() {
            self.dead_lanes.remove(lane);
        }
        self.known_dead -= older.len();
        older
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

    pub(super) fn replayed(&mut self, lanes: Vec<AsideLane>) {
        for lane in lanes {
            self.asides.replayed(&lane);
        }
        self.load_due();
    }
}
