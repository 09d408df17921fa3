//! The branch's loop: read, prepare, send, settle, one event at a time, all state in one task.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::breaker::{Breaker, Circuit};
use super::copies::Copies;
use super::lanes::{Delivery, Lanes};
use super::pace::Pace;
use super::prepare::{Prepared, Stillborn, is_cheap, prepare_all};
use super::stats::{Board, BranchCounters, Pause};
use super::waiting::Asides;
use super::{BranchDeps, Command, Told};
use crate::clock::Timestamp;
use crate::pipeline::plan::BranchPlan;
use crate::record::Position;
use crate::sink::{BatchStyle, Operation, Sink, SinkContext, Written};
use crate::source::frontier::Frontier;
use crate::source::{AsideRow, Caps, LogError, Reach, RowKey, Settlement, StoredPause, Subscription, lane_of};
use crate::spec::sink::Ordering;

/// Records read and not yet behind the stored cursor: what may be sent twice after a crash.
const WINDOW: u64 = 8_192;
/// Payload bytes held in memory.
const WINDOW_BYTES: usize = 16 << 20;
/// Records taken from the log at once.
const READ: usize = 512;
/// Replayed letters go in portions of about so many, so that their key is not read anew for each.
pub(super) const REPLAYS: usize = 25;
/// How long what is under way may take when the parts of the log that it is from go to another process.
const LEAVE: Duration = Duration::from_secs(20);
/// How often what nobody announces is looked at: room for dead letters, blocked keys.
const TICK: Duration = Duration::from_millis(250);
/// How often a branch with nothing to do looks whether its cursor has become durable.
const STALL: Duration = Duration::from_millis(10);

pub(super) enum Ended {
    Drained,
    /// Other parts of the log are this process's to read now.
    Moved,
    /// The sink must be made anew.
    Replanned(Arc<BranchPlan>, HashSet<Position>),
}

type Reading = BoxFuture<'static, (Box<dyn Subscription>, Result<Vec<Prepared>, LogError>)>;

pub(super) struct BatchDone {
    pub(super) taken: Vec<Delivery>,
    pub(super) written: Option<Written>,
    pub(super) took: Duration,
}

/// What to do once a settlement is durable.
#[derive(Default)]
pub(super) struct Settled {
    pub(super) ends: Vec<Position>,
    /// Rows of these lanes came to the shelf, or were changed there.
    pub(super) joined: Vec<Box<str>>,
    /// Rows of these lanes left the shelf.
    pub(super) left: Vec<Box<str>>,
    /// Somebody waits for it.
    pub(super) tell: Vec<Told>,
}

impl Settled {
    pub(super) const fn is_empty(&self) -> bool {
        self.ends.is_empty() && self.joined.is_empty() && self.left.is_empty() && self.tell.is_empty()
    }
}

pub(super) struct Actor {
    pub(super) deps: BranchDeps,
    pub(super) plan: Arc<BranchPlan>,
    pub(super) board: Arc<Board>,
    pub(super) lanes: Lanes,
    pub(super) breaker: Breaker,
    pub(super) asides: Asides,
    pub(super) frontier: Frontier,
    pub(super) pause: Option<Pause>,
    /// How many deliveries the target took in this run.
    pub(super) accepted: u64,
    pub(super) started: Timestamp,
    /// For how long nothing could be sent, up to `closed_since`.
    pub(super) closed: Duration,
    /// Since when nothing may be sent, if so: that time counts against no record.
    pub(super) closed_since: Option<Timestamp>,
    pub(super) bytes: usize,
    pub(super) dead_bytes: u64,
    /// Dead letters by lane, to mark them when a newer record of the key is delivered. Bounded.
    pub(super) dead_lanes: HashMap<Box<str>, Vec<RowKey>>,
    pub(super) known_dead: usize,
    sink: Arc<dyn Sink>,
    style: BatchStyle,
    pace: Pace,
    ended: HashSet<RowKey>,
    /// Beyond the stored cursor, ended under an earlier plan of this run.
    passed: HashSet<Position>,
    pub(super) batches: FuturesUnordered<BoxFuture<'static, BatchDone>>,
    pub(super) settles: FuturesUnordered<BoxFuture<'static, (Result<(), LogError>, Settled)>>,
    pub(super) loads: FuturesUnordered<BoxFuture<'static, (Box<str>, Result<Vec<AsideRow>, LogError>)>>,
    pub(super) copies: Copies,
    pub(super) copying: FuturesUnordered<BoxFuture<'static, Written>>,
    pub(super) replays: Pace,
    incomplete_since: Option<Instant>,
    read_to: Reach,
    stored: Reach,
    /// Up to here records go one by one, each with a durable mark first.
    careful_until: Reach,
    marks: HashMap<Position, u32>,
    /// Positions that this run has marked: a retry is no new stop.
    marked: HashSet<Position>,
    /// When what nobody announces was last looked at.
    ticked: Instant,
    pub(super) caps: Caps,
    /// It ends to be opened anew.
    moved: bool,
    /// A stop was asked for; what is left is sent until then.
    pub(super) draining: Option<Instant>,
}

/// Runs the branch from its stored cursor until it is drained.
pub(super) async fn run(
    deps: BranchDeps,
    plan: Arc<BranchPlan>,
    board: Arc<Board>,
    commands: Arc<tokio::sync::Mutex<mpsc::Receiver<Command>>>,
    passed: HashSet<Position>,
) -> Result<Ended, LogError> {
    let mut commands = commands.lock().await;
    let start = deps.log.open_branch(&plan.name, deps.start).await?;
    let context = SinkContext {
        folder: PathBuf::new(),
        namespace: deps.namespace.as_str().into(),
        sink: plan.sink.clone(),
        clock: deps.clock.clone(),
    };
    let open = |kind| {
        (deps.open_sink)(kind, &context)
            .map(Arc::from)
            .map_err(|cause| LogError::Storage { act: "make the sink".into(), cause: cause.into() })
    };
    let sink: Arc<dyn Sink> = open(&plan.kind)?;
    let also = match &plan.dead_letters.also {
        Some(also) => Some(open(&crate::sink::Kind::File(also.file.clone()))?),
        None => None,
    };
    let now = deps.clock.now();
    let mut frontier = Frontier::new(start.cursor.clone());
    if deps.log.caps().each_end {
        frontier.keep_ends();
    }
    let careful = start.unclean_stops >= 2 || !start.marks.is_empty();
    let mut actor = Actor {
        lanes: Lanes::default(),
        breaker: Breaker::default(),
        asides: Asides::new(now, &start.cursor, &start.lanes),
        frontier,
        pause: start.pause.as_ref().map(restore_pause),
        accepted: 0,
        started: now,
        closed: Duration::ZERO,
        closed_since: None,
        bytes: 0,
        dead_bytes: 0,
        dead_lanes: HashMap::new(),
        known_dead: 0,
        style: sink.batch_style(),
        pace: Pace::new(plan.rate, Instant::now()),
        sink,
        ended: start.ended,
        passed,
        batches: FuturesUnordered::new(),
        settles: FuturesUnordered::new(),
        loads: FuturesUnordered::new(),
        copies: Copies::new(also),
        copying: FuturesUnordered::new(),
        replays: Pace::new(Some(replay_rate(&plan)), Instant::now()),
        incomplete_since: None,
        read_to: start.cursor.clone(),
        stored: start.cursor.clone(),
        careful_until: if careful { careful_until(&start.cursor, &deps.log.end()) } else { Reach::none() },
        marks: start.marks.into_iter().collect(),
        marked: HashSet::new(),
        ticked: Instant::now(),
        draining: None,
        caps: deps.log.caps(),
        moved: false,
        deps,
        plan,
        board,
    };
    actor.board.update(|status| status.pause.clone_from(&actor.pause));
    actor.learn_dead_letters().await?;
    actor.run(start.subscription, start.moved, &mut commands).await
}

/// Records near the cursor go one by one: so far as a crash can have had them under way.
fn careful_until(cursor: &Reach, end: &Reach) -> Reach {
    let until = |from: Position| Position(from.0 + WINDOW).min(end.of(from.part()));
    cursor.iter().map(|from| until(from).max(from)).collect()
}

/// How fast replayed letters go: a second's worth may go at once.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "far less than fits, and more than none")]
fn replay_rate(plan: &BranchPlan) -> (f64, u32) {
    let per_second = plan.dead_letters.replay.per_second();
    (per_second, per_second.max(1.0) as u32)
}

fn restore_pause(stored: &StoredPause) -> Pause {
    let cause = if &*stored.cause == "refused" { "refused" } else { "operator" };
    Pause { cause, note: stored.note.to_string(), since: stored.since }
}

impl Actor {
    async fn run(
        &mut self,
        subscription: Box<dyn Subscription>,
        moved: CancellationToken,
        commands: &mut mpsc::Receiver<Command>,
    ) -> Result<Ended, LogError> {
        let mut idle = Some(subscription);
        let mut reading: Option<Reading> = None;
        let held = Arc::clone(&self.deps.shelf);
        let mut replayed = held.replayed_lanes(&self.plan.name);
        let mut leave_by = None;
        loop {
            if leave_by.is_some_and(|by| Instant::now() >= by) {
                return Ok(Ended::Moved);
            }
            self.dispatch();
            self.store_frontier();
            if self.is_halting() && self.copies.is_failing() {
                self.forgo_copies();
            }
            if self.is_halting()
                && self.batches.is_empty()
                && self.settles.is_empty()
                && self.copies.is_idle()
                && self.stored == *self.frontier.reach()
            {
                return Ok(if self.moved { Ended::Moved } else { Ended::Drained });
            }
            if reading.is_none()
                && self.may_read()
                && let Some(subscription) = idle.take()
            {
                reading = Some(self.read(subscription));
            }
            let wake = self.next_wake();
            let shelf_wake = self.asides.next_try();
            let clock = self.deps.clock.clone();
            tokio::select! {
                () = moved.cancelled(), if leave_by.is_none() => {
                    let now = Instant::now();
                    (self.moved, self.draining, leave_by) = (true, Some(now), Some(now + LEAVE));
                }
                () = async { match leave_by { Some(by) => tokio::time::sleep_until(by).await, None => std::future::pending().await } } => {}
                Some(command) = commands.recv(), if self.draining.is_none() => {
                    if let Some(newer) = self.obey(command).await {
                        // What has ended beyond the frontier has ended under the new plan too.
                        let ended = self.frontier.ended_beyond().chain(self.passed.drain()).collect();
                        return Ok(Ended::Replanned(newer, ended));
                    }
                }
                Some(done) = self.batches.next(), if !self.batches.is_empty() => self.finished(done),
                Some((result, settled)) = self.settles.next(), if !self.settles.is_empty() => {
                    result?;
                    self.settled(settled);
                }
                Some(written) = self.copying.next(), if !self.copying.is_empty() => self.copied(written),
                (subscription, prepared) = async { match &mut reading { Some(read) => read.await, None => std::future::pending().await } } => {
                    reading = None;
                    idle = Some(subscription);
                    self.enqueue(prepared?);
                }
                Some((lane, rows)) = self.loads.next(), if !self.loads.is_empty() => self.loaded(&lane, rows?).await?,
                lanes = &mut replayed, if self.draining.is_none() => {
                    replayed = held.replayed_lanes(&self.plan.name);
                    self.replayed(lanes);
                }
                () = async { match wake { Some(at) => tokio::time::sleep_until(at).await, None => std::future::pending().await } } => {
                    self.tick().await?;
                }
                () = async { match shelf_wake { Some(at) => clock.sleep_until(at).await, None => std::future::pending().await } }, if self.draining.is_none() && self.may_load() => {
                    self.load_due();
                }
            }
        }
    }

    /// Nothing more is sent: a stop was asked for, and all is delivered, or its time is over, or the target is away.
    fn is_halting(&self) -> bool {
        self.draining.is_some_and(|until| {
            self.pause.is_some()
                || self.breaker.circuit() != Circuit::Closed
                || Instant::now() >= until
                || (self.caps.shared && self.lanes.len() == 0)
                || self.deps.log.end().iter().all(|end| self.frontier.reach().covers(end))
        })
    }

    fn may_read(&self) -> bool {
        let leaves_it = self.caps.shared && self.draining.is_some();
        !self.is_halting()
            && !leaves_it
            && self.has_room()
            && self.pause.as_ref().is_none_or(|pause| !pause.cause.starts_with("dead_letters"))
            && (self.asides.wait_for(&self.read_to)
                || self.read_to.distance(&self.deps.log.lag(&self.plan.name).cursor) < WINDOW)
    }

    pub(super) fn has_room(&self) -> bool {
        self.lanes.len() < READ * 4 && self.bytes < WINDOW_BYTES
    }

    /// Reads and prepares the next records; scripts run off the async threads.
    fn read(&self, mut subscription: Box<dyn Subscription>) -> Reading {
        let (branch, revisions) = (Arc::clone(&self.plan), Arc::clone(&self.deps.revisions));
        let shared = Arc::clone(&self.deps.shared);
        async move {
            let entries = match subscription.next(READ, WINDOW_BYTES / 4).await {
                Ok(entries) => entries,
                Err(error) => return (subscription, Err(error)),
            };
            let in_force = revisions.in_force().await;
            let Some(now) = in_force.revisions().last().map(|newest| Arc::clone(&newest.plan)) else {
                return (subscription, Ok(Vec::new()));
            };
            let cheap = is_cheap(&branch, &now) && in_force.revisions().iter().all(|old| is_cheap(&branch, &old.plan));
            let work = move || prepare_all(entries, &branch, &now, &in_force, &shared);
            if cheap {
                return (subscription, Ok(work()));
            }
            let prepared = tokio::task::spawn_blocking(work).await;
            let failed =
                |_| LogError::Storage { act: "prepare records".into(), cause: "a script's thread panicked".into() };
            (subscription, prepared.map_err(failed))
        }
        .boxed()
    }

    /// Puts prepared records into their lanes, or onto the shelf behind others of their key, or to their end.
    fn enqueue(&mut self, prepared: Vec<Prepared>) {
        let (mut settlement, mut settled) = (Settlement::default(), Settled::default());
        for Prepared { position, record, parts, dropped } in prepared {
            self.read_to.advance(position);
            self.frontier.begin(position);
            if self.passed.remove(&position) {
                self.frontier.end(position);
                continue;
            }
            self.frontier.split(position, u32::try_from(parts.len()).unwrap_or(u32::MAX).max(1));
            if parts.is_empty() {
                if let Some(reason) = dropped {
                    BranchCounters::add(&self.board.counters.dropped, 1);
                    settlement.dropped.push((position, reason));
                }
                self.frontier.end(position);
            }
            for part in parts {
                let row = RowKey { position, child: part.child };
                if self.ended.remove(&row) {
                    self.frontier.end(position);
                    continue;
                }
                match part.result {
                    Err(Stillborn { reason, stage, error }) => {
                        settlement.dead.push(self.letter(row, Arc::clone(&record), reason, 0, error, &stage, None));
                        settled.ends.push(position);
                        if record.key.is_some() && self.plan.ordering == Ordering::Key {
                            let lane = lane_of(record.key.as_deref(), row);
                            self.remember_dead(&lane, row);
                            if self.blocks(true) {
                                self.asides.block(&lane, 0);
                            }
                        }
                    }
                    Ok((event, case)) => {
                        let delivery = Delivery::new(row, event, case, self.plan.ordering == Ordering::Key);
                        // A record of an earlier run may have been delivered before its key was set aside. It goes
                        // again, before those rows: what has no end of its own is not taken as ended.
                        let lane = (self.asides.len() > 0).then(|| delivery.lane());
                        if let Some(lane) = lane.filter(|lane| self.asides.holds(lane)) {
                            let next_try = self.asides.joined(&lane);
                            settlement.aside.push(aside_row(&delivery, lane.clone(), next_try, self.deps.clock.now()));
                            settled.ends.push(position);
                            settled.joined.push(lane);
                        } else {
                            self.bytes += delivery.weight();
                            self.lanes.push(delivery);
                        }
                    }
                }
            }
        }
        let died = !settlement.dead.is_empty();
        if !settlement.is_frontier_only() {
            self.settle(settlement, settled);
        }
        // Only now: what has joined is on its way, so the rows are not read before it is there.
        self.asides.has_read(&self.read_to);
        if died {
            self.is_full();
        }
    }

    pub(super) fn stops_at_first_failure(&self) -> bool {
        self.style == BatchStyle::StopsAtFirstFailure
    }

    fn is_careful(&self) -> bool {
        self.careful_until.iter().any(|until| !self.frontier.reach().covers(until))
    }

    /// Sends what may go now.
    fn dispatch(&mut self) {
        let now = Instant::now();
        self.lanes.wake(now);
        if self.is_halting() || self.pause.as_ref().is_some_and(|pause| pause.cause != "breaker") {
            return;
        }
        let careful = self.is_careful();
        let concurrency = if careful { 1 } else { self.plan.concurrency };
        while self.batches.len() < concurrency && self.lanes.has_ready() {
            let probing = match self.breaker.circuit() {
                Circuit::Closed => false,
                Circuit::Probing => return,
                Circuit::Open { .. } if self.breaker.try_probe(now) => true,
                Circuit::Open { .. } => return,
            };
            let wanted = if probing || careful { 1 } else { self.plan.batch.records };
            // A lone record goes at once; while others are under way it waits a little for company.
            if wanted > 1 && self.lanes.ready_len() < wanted && !self.batches.is_empty() {
                let since = *self.incomplete_since.get_or_insert(now);
                if now < since + self.plan.batch.linger {
                    return;
                }
            }
            self.incomplete_since = None;
            let allowed = self.pace.take(wanted, now);
            let several = self.style != BatchStyle::Independent;
            let taken =
                if allowed == 0 { Vec::new() } else { self.lanes.take(allowed, self.plan.batch.bytes, several) };
            self.pace.give_back(allowed - taken.len());
            if taken.is_empty() {
                if probing {
                    self.breaker.probe_unused(now + self.pace.wait().unwrap_or(TICK));
                }
                return;
            }
            self.send(taken, careful);
        }
    }

    fn send(&mut self, mut taken: Vec<Delivery>, careful: bool) {
        let position =
            taken.first().filter(|delivery| delivery.shelved.is_none()).map(|delivery| delivery.row.position);
        let unmarked = |position: &Position| self.careful_until.covers(*position) && self.marked.insert(*position);
        let mark = if careful { position.filter(unmarked) } else { None };
        if let Some(position) = mark {
            let marks = self.marks.entry(position).or_default();
            *marks += 1;
            if *marks >= 3
                && let Some(delivery) = taken.pop()
            {
                self.lanes.landed(&delivery.lane(), 1);
                let error = "it was under way at three stops in a row that were not orderly";
                return self.end_badly(delivery, crate::source::DeadReason::Crash, error.into(), Vec::new());
            }
        }
        let frontier = self.frontier.reach().clone();
        let region = &self.plan.region;
        let operation = |delivery: &Delivery| Operation {
            event: delivery.event.clone(),
            case: delivery.case,
            region: region.clone(),
        };
        let batch: Vec<Operation> = taken.iter().map(operation).collect();
        let (sink, settles_at, name) = (Arc::clone(&self.sink), Arc::clone(&self.deps.shelf), self.plan.name.clone());
        let attempt = async move {
            if let Some(position) = mark {
                // What went well before is durable with the mark, so a stop counts against this record alone.
                let settlement = Settlement { mark: Some(position), frontier, ..Settlement::default() };
                if settles_at.settle(&name, settlement).await.is_err() {
                    return BatchDone { taken, written: None, took: Duration::ZERO };
                }
            }
            let started = Instant::now();
            let written = AssertUnwindSafe(sink.write(&batch)).catch_unwind().await.ok();
            BatchDone { taken, written, took: started.elapsed() }
        };
        self.batches.push(attempt.boxed());
    }

    pub(super) fn settled(&mut self, settled: Settled) {
        for position in settled.ends {
            self.frontier.end(position);
        }
        for lane in settled.joined {
            self.asides.moved(&lane);
        }
        for lane in settled.left {
            self.asides.moved(&lane);
            self.asides.left(&lane);
        }
        settled.tell.into_iter().for_each(Told::now);
        self.load_due();
    }

    pub(super) fn store_frontier(&mut self) {
        if *self.frontier.reach() != self.stored || self.frontier.has_ends() {
            self.stored.clone_from(self.frontier.reach());
            let stored = &self.stored;
            self.marks.retain(|position, _| !stored.covers(*position));
            self.settle(Settlement::default(), Settled::default());
        }
        self.board.update(|status| {
            status.in_flight = self.frontier.in_flight() as u64;
            status.lanes_aside = self.asides.len() as u64;
        });
    }

    fn next_wake(&self) -> Option<Instant> {
        let now = Instant::now();
        let blocked = self.pause.as_ref().is_some_and(|pause| pause.cause != "breaker") || self.is_halting();
        let ready = self.lanes.has_ready() && !blocked;
        let open = match self.breaker.circuit() {
            Circuit::Open { probe_at } if ready => Some(probe_at),
            _ => None,
        };
        let closed = ready && self.breaker.circuit() == Circuit::Closed && self.batches.len() < self.plan.concurrency;
        let linger = self.incomplete_since.filter(|_| closed).map(|since| since + self.plan.batch.linger);
        let pace = self.pace.wait().filter(|_| closed && linger.is_none()).map(|wait| now + wait);
        let watched =
            self.pause.as_ref().is_some_and(|pause| pause.cause == "dead_letters_full") || self.asides.any_blocked();
        let tick = watched.then(|| self.ticked + TICK);
        // Reading goes on when the cursor is durable, of which nobody tells.
        let stalled = (self.lanes.len() == 0 && !self.is_halting() && !self.may_read()).then(|| now + STALL);
        let drained = self.draining.filter(|_| !self.is_halting());
        let copy = self.copies.retry_at();
        let replay = (self.asides.has_replays() && self.may_load())
            .then(|| self.replays.wait_for(REPLAYS).map(|wait| now + wait))
            .flatten();
        [drained, copy, replay, self.lanes.next_wait().filter(|_| !blocked), open, linger, pace, tick, stalled]
            .into_iter()
            .flatten()
            .min()
    }

    async fn tick(&mut self) -> Result<(), LogError> {
        self.copy();
        self.load_due();
        if self.ticked.elapsed() < TICK {
            return Ok(());
        }
        self.ticked = Instant::now();
        if self.pause.as_ref().is_some_and(|pause| pause.cause == "dead_letters_full") {
            self.count_dead_bytes();
            if self.dead_bytes < self.plan.dead_letters.size.0 {
                self.end_pause(false, Settled::default());
            }
        }
        self.look_at_blocked().await
    }
}

/// The row that a delivery is on the shelf.
pub(super) fn aside_row(delivery: &Delivery, lane: Box<str>, next_try: Timestamp, now: Timestamp) -> AsideRow {
    // A child keeps what it was rendered to: an edited script could make another thing of it.
    let rendered = (delivery.row.child > 0).then(|| delivery.event.payload().clone());
    AsideRow {
        row: delivery.row,
        lane,
        record: Arc::clone(&delivery.event.record),
        rendered,
        attempts: delivery.attempts,
        first_failed: delivery.first_failed.unwrap_or(now),
        next_try,
        last_error: delivery.last_error.clone(),
        replayed: delivery.shelved.as_ref().is_some_and(|shelved| shelved.replayed),
    }
}
