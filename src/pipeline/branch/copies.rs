//! The copy of each dead letter that a file asks for, and the order of ends meanwhile.
//!
//! Takes settlements; gives them on in the order of their coming, each when the copies of its letters are on the disk. A
//! copy that fails holds the letter: it is tried again while the branch pauses. Never ends a letter whose copy can still be
//! written.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::time::Instant;

use super::actor::{Actor, Settled};
use super::stats::BranchCounters;
use crate::clock::Timestamp;
use crate::record::{Record, RecordId};
use crate::sink::{Failure, Operation, Sink, Verdict, Written};
use crate::source::{BranchName, DeadLetter, DeadReason, Settlement};
use crate::transform::Event;

/// The first wait after a copy that failed, and the longest.
const WAITS: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));

/// Settlements that wait for the copies of their letters, and those behind them.
pub(super) struct Copies {
    sink: Option<Arc<dyn Sink>>,
    held: VecDeque<(Settlement, Settled)>,
    /// So many of the first one's letters have their copy.
    done: usize,
    writing: bool,
    wait: Duration,
    /// The last try failed; the next one goes then.
    retry_at: Option<Instant>,
}

/// What a try came to.
enum Tried {
    /// The copies are there.
    Written,
    /// A letter that can have no copy is left out; the others have theirs or are tried next.
    LeftOut(Failure),
    /// The file cannot be written.
    Failed(Failure),
}

impl Copies {
    pub(super) fn new(sink: Option<Arc<dyn Sink>>) -> Self {
        Self { sink, held: VecDeque::new(), done: 0, writing: false, wait: WAITS.0, retry_at: None }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.held.is_empty()
    }

    /// True while the last try has failed.
    pub(super) const fn is_failing(&self) -> bool {
        self.retry_at.is_some()
    }

    /// When the next try goes, if the last one failed and none is under way.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry_at.filter(|_| !self.writing)
    }

    /// Gives back what may be settled now, or keeps it behind what waits for its copies.
    fn pass(&mut self, settlement: Settlement, settled: Settled) -> Option<(Settlement, Settled)> {
        if self.held.is_empty() && (self.sink.is_none() || settlement.dead.is_empty()) {
            return Some((settlement, settled));
        }
        if settlement.is_frontier_only()
            && settled.is_empty()
            && let Some((last, _)) = self.held.back_mut()
        {
            // The frontier has passed only what is durable, so it may as well go with an earlier one.
            last.frontier.advance_all(&settlement.frontier);
            last.ended.extend(settlement.ended);
            return None;
        }
        self.held.push_back((settlement, settled));
        None
    }

    /// The next try: the copies that the first settlement still wants.
    fn begin(&mut self, now: Instant) -> Option<BoxFuture<'static, Written>> {
        let due = !self.writing && self.retry_at.is_none_or(|at| at <= now);
        let sink = self.sink.as_ref().filter(|_| due)?;
        let letters = self.held.front()?.0.dead.get(self.done..).filter(|letters| !letters.is_empty())?;
        let batch: Vec<Operation> = letters.iter().map(line).collect();
        let sink = Arc::clone(sink);
        self.writing = true;
        Some(async move { sink.write(&batch).await }.boxed())
    }

    fn tried(&mut self, written: Written, now: Instant) -> Tried {
        self.writing = false;
        let all = self.held.front().map_or(0, |(settlement, _)| settlement.dead.len());
        let Some((index, failure)) = written.failed.into_iter().next() else {
            (self.done, self.wait, self.retry_at) = (all, WAITS.0, None);
            return Tried::Written;
        };
        self.done = (self.done + index).min(all);
        if failure.verdict == Verdict::Never {
            self.done += 1;
            return Tried::LeftOut(failure);
        }
        self.retry_at = Some(now + self.wait);
        self.wait = (self.wait * 2).min(WAITS.1);
        Tried::Failed(failure)
    }

    /// What waits for no copy any more.
    fn next(&mut self) -> Option<(Settlement, Settled)> {
        let through = !self.writing && self.held.front().is_some_and(|(first, _)| first.dead.len() <= self.done);
        let next = if through { self.held.pop_front() } else { None };
        self.done = if next.is_some() { 0 } else { self.done };
        next
    }

    /// Everything that waits, less the letters without a copy: they have no end, and come again at the next start.
    fn forgo(&mut self) -> Vec<(Settlement, Settled)> {
        self.retry_at = None;
        let mut done = std::mem::take(&mut self.done);
        let without = |(mut settlement, mut settled): (Settlement, Settled)| {
            for letter in settlement.dead.split_off(std::mem::take(&mut done).min(settlement.dead.len())) {
                settled.ends.retain(|position| *position != letter.row.position);
            }
            (settlement, settled)
        };
        std::mem::take(&mut self.held).into_iter().map(without).collect()
    }
}

impl Actor {
    /// Hands ends to the shelf; `settled` happens when they are durable.
    pub(super) fn settle(&mut self, mut settlement: Settlement, settled: Settled) {
        // Only what has its end: the positions of this settlement follow when it is durable.
        settlement.frontier.clone_from(self.frontier.reach());
        settlement.ended = self.frontier.take_ends();
        for lane in settled.left.iter().chain(&settled.joined) {
            self.asides.moves(lane);
        }
        match self.copies.pass(settlement, settled) {
            Some((settlement, settled)) => self.hand_over(settlement, settled),
            None => self.copy(),
        }
    }

    fn hand_over(&mut self, settlement: Settlement, settled: Settled) {
        let settling = self.deps.shelf.settle(&self.plan.name, settlement);
        self.settles.push(async move { (settling.await, settled) }.boxed());
    }

    /// Writes the copies that are wanted next, if their time has come.
    pub(super) fn copy(&mut self) {
        if let Some(writing) = self.copies.begin(Instant::now()) {
            self.copying.push(writing);
        }
    }

    /// Copies are written, or could not be.
    pub(super) fn copied(&mut self, written: Written) {
        match self.copies.tried(written, Instant::now()) {
            Tried::Written => {}
            Tried::LeftOut(failure) => {
                BranchCounters::add(&self.board.counters.copies_failed, 1);
                tracing::error!(namespace = %self.deps.namespace, branch = %self.plan.name, error = %failure,
                    "a dead letter has no copy: dead_letters.also.file.path cannot be made from it");
            }
            Tried::Failed(failure) => {
                BranchCounters::add(&self.board.counters.copies_failed, 1);
                let note = format!(
                    "the copy of a dead letter cannot be written ({failure}): it is tried again with growing waits of up \
                     to 30 s; make room for it, or change dead_letters.also and reload"
                );
                self.begin_pause("dead_letters_copy", note);
            }
        }
        while let Some((settlement, settled)) = self.copies.next() {
            self.hand_over(settlement, settled);
        }
        if !self.copies.is_failing() && self.pause.as_ref().is_some_and(|pause| pause.cause == "dead_letters_copy") {
            self.end_pause(false, Settled::default());
        }
        self.copy();
    }

    /// The branch ends, or begins anew: what cannot have its copy now stays without an end.
    pub(super) fn forgo_copies(&mut self) {
        for (settlement, settled) in self.copies.forgo() {
            self.hand_over(settlement, settled);
        }
    }
}

/// A letter as a line; the payload stands in it as it was written.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    message_id: RecordId,
    branch: &'a BranchName,
    at: Timestamp,
    reason: DeadReason,
    attempts: u32,
    last_error: &'a str,
    stage: &'a str,
    key: Option<&'a str>,
    payload: Payload<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Payload<'a> {
    Json(&'a RawValue),
    Bytes { base64: String },
}

fn line(letter: &DeadLetter) -> Operation {
    let record = &letter.record;
    let json = if record.binary { None } else { serde_json::from_slice(&record.payload).ok() };
    let line = Line {
        message_id: record.id,
        branch: &letter.branch,
        at: letter.at,
        reason: letter.reason,
        attempts: letter.attempts,
        last_error: &letter.last_error,
        stage: &letter.stage,
        key: record.key.as_deref(),
        payload: json.map_or_else(|| Payload::Bytes { base64: STANDARD.encode(&record.payload) }, Payload::Json),
    };
    // All of it has a JSON form.
    let line = serde_json::to_vec(&line).unwrap_or_default();
    let record = Arc::new(Record { binary: false, ..Record::clone(record) });
    Operation { event: Event::original(record).with_payload(line.into()), case: 0, region: None }
}
