//! What the threads and handles of one embedded log share: its namespaces, its queues, and how it is doing.
//!
//! The writer publishes through here; the runtime's one finisher task answers through here, so that a hundred waiting
//! clients cost one wake-up. Nothing here does I/O of its own.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, Semaphore, oneshot, watch};

use super::batch::{Commit, Finish};
use super::change::{Change, Frame, NamespaceNumber, Sequence};
use super::disk::Disk;
use super::due::{Due, DueRow};
use super::journal::JournalFiles;
use super::keys::Keys;
use super::options::Options;
use super::queue::{Answer, Ask, Draft, Queue, Refusal, Reply, Request};
use super::settling::Settling;
use super::space::Space;
use super::state::StateReader;
use crate::clock::Clock;
use crate::record::{Namespace, Record};
use crate::source::{Admitted, Entry, Epoch, LogError};
use crate::telemetry::Durations;

/// How the log is doing; every field is what an operator would ask first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// A sync or write failed: no change is taken any more, and the process should end.
    pub fenced: Option<Arc<str>>,
    /// The disk is full: reading and acking go on.
    pub disk_full: bool,
    /// Damage that was found; the log serves what is whole.
    pub damaged: Vec<Arc<str>>,
    /// It has been closed or is closing.
    pub closing: bool,
}

/// How the log is doing, as its threads write it down.
#[derive(Default)]
pub(super) struct Status {
    fenced: Mutex<Option<Arc<str>>>,
    is_fenced: AtomicBool,
    disk_full: AtomicBool,
    damaged: Mutex<Vec<Arc<str>>>,
    closing: AtomicBool,
}

impl Status {
    pub(super) fn fenced(&self) -> Option<Arc<str>> {
        if self.is_fenced.load(Ordering::Acquire) { self.fenced.lock().clone() } else { None }
    }

    pub(super) fn disk_is_full(&self) {
        if !self.disk_full.swap(true, Ordering::AcqRel) {
            tracing::error!("the disk is full: writes are refused, reading and acking go on");
        }
    }

    pub(super) fn disk_has_room(&self) {
        if self.disk_full.swap(false, Ordering::AcqRel) {
            tracing::info!("the disk has room again: writes are taken");
        }
    }

    pub(super) fn is_disk_full(&self) -> bool {
        self.disk_full.load(Ordering::Acquire)
    }

    pub(super) fn found_damage(&self, what: &str) {
        tracing::error!(damage = what, "the log is damaged");
        let mut damaged = self.damaged.lock();
        if damaged.len() < 100 && !damaged.iter().any(|known| &**known == what) {
            damaged.push(what.into());
        }
    }

    pub(super) fn close(&self) -> bool {
        !self.closing.swap(true, Ordering::AcqRel)
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    pub(super) fn health(&self) -> Health {
        Health {
            fenced: self.fenced(),
            disk_full: self.is_disk_full(),
            damaged: self.damaged.lock().clone(),
            closing: self.is_closing(),
        }
    }
}

/// The namespaces that the log knows.
#[derive(Default)]
pub(super) struct Spaces {
    pub(super) by_number: HashMap<NamespaceNumber, Arc<Space>>,
    pub(super) by_name: HashMap<Namespace, Arc<Space>>,
    /// Never given out before (LOG.md 5).
    pub(super) next: u32,
}

/// Counters that a scrape reads.
#[derive(Debug)]
pub struct Counters {
    /// Groups that became durable.
    pub groups: AtomicU64,
    /// Frames that became durable.
    pub frames: AtomicU64,
    /// Bytes that became durable.
    pub bytes: AtomicU64,
    /// Syncs of the journal by duration.
    pub syncs: Durations,
    /// Records released from the shelf, by how late they were.
    pub lateness: Durations,
}

impl Default for Counters {
    fn default() -> Self {
        const SYNC: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5];
        const LATE: &[f64] = &[0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0, 60.0];
        let none = AtomicU64::default;
        Self {
            groups: none(),
            frames: none(),
            bytes: none(),
            syncs: Durations::new(SYNC),
            lateness: Durations::new(LATE),
        }
    }
}

/// What all parts of one log share.
pub(super) struct Shared {
    pub(super) options: Options,
    pub(super) clock: Clock,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) segments_root: PathBuf,
    pub(super) queue: Queue,
    pub(super) settling: Settling,
    pub(super) files: JournalFiles,
    pub(super) status: Status,
    pub(super) spaces: RwLock<Spaces>,
    /// The instance itself, as the owner of frames that belong to no namespace.
    pub(super) instance: Arc<Space>,
    pub(super) permits: Arc<Semaphore>,
    pub(super) durable: AtomicU64,
    pub(super) committed: watch::Sender<Sequence>,
    pub(super) stopped: watch::Sender<Option<Arc<str>>>,
    pub(super) counters: Counters,
    pub(super) due: Due,
    pub(super) keys: Keys,
    pub(super) reader: StateReader,
    pub(super) due_news: Notify,
    /// Rows that are due and held back, of namespaces that are moving.
    pub(super) held_rows: Mutex<Vec<DueRow>>,
    /// The writer thread has ended: no answer comes any more.
    pub(super) writer_is_over: AtomicBool,
    finished: Mutex<Vec<Finished>>,
    finished_news: Notify,
}

struct Finished {
    answers: Vec<Finish>,
    news: Vec<Arc<Space>>,
}

/// What [`Shared`] is made of at a start.
pub(super) struct Parts {
    pub(super) options: Options,
    pub(super) segments_root: PathBuf,
    pub(super) files: JournalFiles,
    pub(super) spaces: Spaces,
    pub(super) instance: Arc<Space>,
    pub(super) durable: Sequence,
    pub(super) committed: Sequence,
    pub(super) due: Due,
    pub(super) keys: Keys,
    pub(super) reader: StateReader,
    pub(super) damaged: Vec<String>,
}

impl Shared {
    pub(super) fn new(parts: Parts) -> Self {
        let status = Status::default();
        for damage in &parts.damaged {
            status.found_damage(damage);
        }
        Self {
            clock: parts.options.clock.clone(),
            disk: Arc::clone(&parts.options.disk),
            segments_root: parts.segments_root,
            queue: Queue::default(),
            settling: Settling::new(parts.options.settle_lag_bytes, parts.options.settle_linger),
            files: parts.files,
            status,
            spaces: RwLock::new(parts.spaces),
            instance: parts.instance,
            permits: Arc::new(Semaphore::new(parts.options.queue_bytes)),
            durable: AtomicU64::new(parts.durable.0),
            committed: watch::Sender::new(parts.committed),
            stopped: watch::Sender::new(None),
            counters: Counters::default(),
            due: parts.due,
            keys: parts.keys,
            reader: parts.reader,
            due_news: Notify::new(),
            held_rows: Mutex::default(),
            writer_is_over: AtomicBool::new(false),
            finished: Mutex::default(),
            finished_news: Notify::new(),
            options: parts.options,
        }
    }

    /// The newest durable sequence.
    pub(super) fn durable(&self) -> Sequence {
        Sequence(self.durable.load(Ordering::Acquire))
    }

    /// What `state.db` has committed.
    pub(super) fn committed(&self) -> Sequence {
        *self.committed.borrow()
    }

    /// No change is taken from here on; says so once, everywhere. Gives the reason.
    pub(super) fn fence(&self, what: &str) -> Arc<str> {
        let reason: Arc<str> = {
            let mut fenced = self.status.fenced.lock();
            let reason = fenced.get_or_insert_with(|| what.into());
            Arc::clone(reason)
        };
        if !self.status.is_fenced.swap(true, Ordering::AcqRel) {
            tracing::error!(reason = what, "the log is fenced: nobody can say whether the last writes are durable");
            // Tells the next start that pages may be clean in memory and not on the disk (LOG.md 22).
            let mark = self.options.data.join(super::FENCED);
            let _ = super::disk::replace(&*self.disk, &mark, what.as_bytes());
        }
        self.stop(&reason);
        reason
    }

    /// Ends every wait with this reason.
    pub(super) fn stop(&self, reason: &Arc<str>) {
        self.queue.close(reason);
        self.settling.close();
        self.stopped.send_replace(Some(Arc::clone(reason)));
        for space in self.spaces.read().by_number.values() {
            space.news.notify_waiters();
            space.replays.notify_waiters();
        }
        self.due_news.notify_one();
        self.finished_news.notify_one();
    }

    /// Why nothing more is taken, if that is so.
    pub(super) fn refusal(&self) -> Option<Arc<str>> {
        if let Some(reason) = self.status.fenced() {
            return Some(reason);
        }
        if self.status.is_closing() {
            return Some("the log is closing".into());
        }
        None
    }

    /// Shows what has become durable to readers (LOG.md 8: never before).
    pub(super) fn publish(&self, commit: &Commit) {
        let mut frames = commit.frames.iter();
        for (space, count) in &commit.runs {
            for durable in frames.by_ref().take(*count) {
                let bytes = durable.header.frame_bytes() as u64;
                if let (Some(record), Change::Append { position, .. } | Change::Release { position, .. }) =
                    (&durable.record, &durable.frame.change)
                {
                    let entry = Entry::new(*position, Arc::clone(record));
                    space.publish(entry, bytes, durable.frame.time);
                }
                self.remember(space, &durable.frame);
            }
        }
        self.durable.store(commit.last.0, Ordering::Release);
        self.counters.groups.fetch_add(commit.runs.len() as u64, Ordering::Relaxed);
        self.counters.frames.fetch_add(commit.frames.len() as u64, Ordering::Relaxed);
        self.counters.bytes.fetch_add(commit.bytes.len() as u64, Ordering::Relaxed);
    }

    /// Takes a durable change into memory, records themselves apart. The same in a run and at a start.
    pub(super) fn remember(&self, space: &Arc<Space>, frame: &Frame) {
        match &frame.change {
            Change::Park { due_at, record, .. } => {
                space.parked_bytes.fetch_add(record.len() as u64, Ordering::Relaxed);
                self.offer(frame, *due_at);
            }
            Change::Release { record, .. } => {
                take_from(&space.parked_bytes, record.len() as u64);
            }
            Change::Cancel { parked, due_at, .. } => self.due.remove(*due_at, *parked),
            Change::Move { parked, from, due_at, .. } => {
                self.due.remove(*from, *parked);
                self.offer(frame, *due_at);
            }
            change => remember_in(space, change, frame.time),
        }
        if matches!(frame.change, Change::NamespaceDeleted) {
            let mut spaces = self.spaces.write();
            spaces.by_number.remove(&space.number);
            if let Some(name) = &space.name {
                spaces.by_name.remove(name);
            }
        }
    }

    fn offer(&self, frame: &Frame, due_at: crate::clock::Timestamp) {
        if self.due.offer(frame) && self.due.next_due().is_some_and(|next| next >= due_at) {
            self.due_news.notify_one();
        }
    }

    /// Hands answers that no commit belongs to over to the runtime.
    pub(super) fn finish(&self, answers: Vec<Finish>) {
        if !answers.is_empty() {
            self.finished.lock().push(Finished { answers, news: Vec::new() });
            self.finished_news.notify_one();
        }
    }

    /// Hands a commit's answers and news over to the runtime: one wake for all of them.
    pub(super) fn finish_commit(&self, answers: Vec<Finish>, commit: &Commit) {
        let mut news: Vec<Arc<Space>> = commit.runs.iter().map(|(space, _)| Arc::clone(space)).collect();
        if news.len() > 1 {
            news.sort_unstable_by_key(|space| space.number);
            news.dedup_by_key(|space| space.number);
        }
        self.finished.lock().push(Finished { answers, news });
        self.finished_news.notify_one();
    }

    /// The finisher task: answers and wakes inside the runtime until the log has stopped and nothing is left.
    pub(super) async fn run_finisher(self: Arc<Self>) {
        let mut stopped = self.stopped.subscribe();
        loop {
            // Looked at before the answers are, so that none comes in between. The writer still answers `unknown` after a
            // fence has ended the settle thread.
            let over = self.settling.is_over() && self.writer_is_over.load(Ordering::Acquire);
            let batch = std::mem::take(&mut *self.finished.lock());
            if batch.is_empty() {
                if over {
                    return;
                }
                tokio::select! {
                    () = self.finished_news.notified() => {}
                    _ = stopped.changed() => tokio::task::yield_now().await,
                }
                continue;
            }
            for finished in batch {
                for finish in finished.answers {
                    finish.send();
                }
                for space in finished.news {
                    space.news.notify_waiters();
                    if !space.replayed.lock().is_empty() {
                        space.replays.notify_waiters();
                    }
                }
            }
        }
    }

    /// Wakes the finisher, which then looks whether everything is over.
    pub(super) fn nudge_finisher(&self) {
        self.finished_news.notify_one();
    }

    /// Sends changes of a namespace through the writer and waits until they are durable.
    pub(super) async fn change(&self, space: &Arc<Space>, drafts: Vec<Draft>) -> Result<Answer, LogError> {
        self.change_looked(space, drafts, Sequence(u64::MAX)).await
    }

    /// Sends changes and does not wait for them.
    pub(super) fn send(&self, space: &Arc<Space>, drafts: Vec<Draft>) {
        // Refused only when the log is closed, and then nobody waits for it.
        let _ = self.queue_drafts(space, drafts, Sequence(u64::MAX));
    }

    /// As [`Shared::change`], but queued before this returns.
    pub(super) fn change_now(
        &self,
        space: &Arc<Space>,
        drafts: Vec<Draft>,
    ) -> BoxFuture<'static, Result<(), LogError>> {
        let answer = self.queue_drafts(space, drafts, Sequence(u64::MAX));
        async move { heard(answer?.await).map(|_| ()) }.boxed()
    }

    /// As [`Shared::change`], with what a look-up had seen, for rows that must still wait.
    pub(super) async fn change_looked(
        &self,
        space: &Arc<Space>,
        drafts: Vec<Draft>,
        looked: Sequence,
    ) -> Result<Answer, LogError> {
        heard(self.queue_drafts(space, drafts, looked)?.await)
    }

    fn queue_drafts(
        &self,
        space: &Arc<Space>,
        drafts: Vec<Draft>,
        looked: Sequence,
    ) -> Result<oneshot::Receiver<Reply>, LogError> {
        let bytes = drafts.iter().map(draft_bytes).sum();
        let (reply, answer) = oneshot::channel();
        let ask = Ask::Drafts { drafts, looked };
        let request = Request { space: Arc::clone(space), ask, bytes, reservations: Vec::new(), permit: None, reply };
        self.queue.push(request).map_err(|(_, reason)| LogError::Closed(reason))?;
        Ok(answer)
    }

    /// Waits until `state.db` shows everything that is durable now. Gives the sequence that it then had.
    pub(super) async fn flushed(&self) -> Result<Sequence, LogError> {
        let target = self.durable();
        let mut committed = self.committed.subscribe();
        let now = *committed.borrow_and_update();
        if now >= target {
            return Ok(now);
        }
        self.settling.ask(target);
        let mut stopped = self.stopped.subscribe();
        let reached = tokio::select! {
            reached = committed.wait_for(|committed| *committed >= target) => reached.ok().map(|at| *at),
            _ = stopped.wait_for(Option::is_some) => None,
        };
        match reached {
            Some(at) => Ok(at),
            // The last step of a close may still have committed it.
            None if self.committed() >= target => Ok(self.committed()),
            None => Err(LogError::Closed(self.refusal().unwrap_or_else(|| "the log has stopped".into()))),
        }
    }
}

fn heard(answer: Result<Reply, oneshot::error::RecvError>) -> Result<Answer, LogError> {
    match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(Refusal::Unknown(reason) | Refusal::Closed(reason))) => Err(LogError::Closed(reason)),
        Ok(Err(Refusal::DiskFull)) => {
            Err(LogError::Storage { act: "write the journal".into(), cause: "the disk is full".into() })
        }
        Err(_) => Err(LogError::Closed("the log has stopped".into())),
    }
}

impl Finish {
    /// Keeps the keys, answers, gives the permit back.
    fn send(self) {
        if let Ok(Answer::Admitted(admitted)) = &self.answer {
            let first = self.reservations.first().map_or(0, |(sequence, _)| sequence.0);
            for (sequence, reservation) in self.reservations {
                let index = usize::try_from(sequence.0 - first).unwrap_or(usize::MAX);
                // The first reservation may belong to a later write of the group; its index says which.
                if let Some(admitted) = admitted.get(reservation.index().unwrap_or(index)) {
                    match admitted {
                        Admitted::Appended { id, written_at, .. } => {
                            reservation.keep(*id, *written_at, None, sequence);
                        }
                        Admitted::Parked { id, written_at, due_at } => {
                            reservation.keep(*id, *written_at, Some(*due_at), sequence);
                        }
                        _ => {}
                    }
                }
            }
        }
        let _ = self.reply.send(self.answer);
    }
}

/// What a change does to a namespace's memory besides its records and parked rows.
fn remember_in(space: &Arc<Space>, change: &Change, time: crate::clock::Timestamp) {
    match change {
        Change::Cursor { branch, position } => space.cursor_stored(branch, *position, time),
        Change::BranchOpened { branch, position } => {
            space.branch_opened(branch, *position, time);
            space.recount();
        }
        Change::BranchForgotten { branch } => {
            space.branches.lock().remove(branch);
            space.recount();
        }
        Change::BranchRenamed { from, to } => {
            let mut branches = space.branches.lock();
            if !branches.contains_key(to)
                && let Some(branch) = branches.remove(from)
            {
                branches.insert(to.clone(), branch);
            }
        }
        Change::Epoch { number, after, files } => {
            let mut epochs = space.epochs.lock();
            if epochs.last().is_none_or(|last| last.number < *number) {
                epochs.push(Epoch { number: *number, after: *after, files: files.clone() });
            }
        }
        Change::Trim { first } => space.forget_before(*first),
        Change::Replay { branch, row } => {
            let mut replayed = space.replayed.lock();
            let lanes = replayed.entry(branch.clone()).or_default();
            if !lanes.contains(&row.lane) {
                lanes.push(row.lane.clone());
            }
        }
        Change::NamespaceDeleted => space.deleted.store(true, Ordering::Release),
        _ => {}
    }
}

fn take_from(counter: &AtomicU64, bytes: u64) {
    let _ = counter.try_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(now.saturating_sub(bytes)));
}

fn draft_bytes(draft: &Draft) -> usize {
    512 + match draft {
        Draft::Change(Change::Aside { row, .. } | Change::Replay { row, .. }) => {
            row.record.weight() + row.rendered.as_ref().map_or(0, bytes::Bytes::len)
        }
        Draft::Change(Change::Dead { letter }) => {
            letter.record.weight() + letter.rendered.as_ref().map_or(0, bytes::Bytes::len)
        }
        Draft::Release { record, .. } => Record::weight(record),
        Draft::Move { record, .. } => record.len(),
        Draft::Epoch(files) => files.len(),
        Draft::Change(_) | Draft::Cancel { .. } => 0,
    }
}
