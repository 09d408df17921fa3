//! The writer thread: drains the queue, writes once, syncs once for everybody, publishes, then answers all.
//!
//! It alone gives out sequences, positions, ids and revision numbers, and it alone decides whether a parked row still
//! waits. Nothing is published or answered before its bytes are durable. A failed sync fences the log for good.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::batch::{Batch, Finish, Made, finish_now};
use super::body;
use super::change::{Change, Sequence};
use super::frame::{HEADER_BYTES, Header, put_frame};
use super::gone::Gone;
use super::journal::OpenFile;
use super::queue::{Answer, Ask, DirtyCursor, Draft, Refusal, Request};
use super::shared::Shared;
use super::space::Space;
use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::{Admitted, Epoch, Write};

/// A cursor is durable at most so long after it was asked to be.
pub(super) const CURSOR_LINGER: Duration = Duration::from_millis(100);
/// A batch is written when it has this many bytes, however many groups still wait.
const BATCH_BYTES: usize = 4 << 20;

/// What the writer thread owns.
pub(super) struct Writer {
    shared: Arc<Shared>,
    file: OpenFile,
    /// The last sequence that was given out.
    last: Sequence,
    /// The last sequence that is durable.
    durable: Sequence,
    time: Timestamp,
    counter: u16,
    gone: Gone,
    capacity_hint: usize,
}

impl Writer {
    /// A writer that goes on after `last`, whose time was `time`.
    pub(super) fn new(shared: Arc<Shared>, file: OpenFile, last: Sequence, time: Timestamp) -> Self {
        // The counter of that millisecond is not known any more, so ids go on in the next one.
        let time = time.saturating_add(Duration::from_millis(1));
        Self { shared, file, last, durable: last, time, counter: 0, gone: Gone::default(), capacity_hint: 0 }
    }

    /// Works until the queue is closed and empty.
    pub(super) fn run(mut self) {
        loop {
            let taken = self.shared.queue.take(CURSOR_LINGER);
            let mut batch = self.fresh();
            for cursor in taken.cursors {
                self.add_cursor(&mut batch, &cursor);
            }
            for request in taken.requests {
                if let Some(reason) = self.shared.status.fenced() {
                    self.shared.finish(vec![refused(request, Refusal::Closed(reason))]);
                    continue;
                }
                // A smaller group might still fit, and would overtake the one that was refused.
                let refused_before = self.shared.status.is_disk_full() && matches!(request.ask, Ask::Writes(_));
                if refused_before {
                    self.shared.finish(vec![refused(request, Refusal::DiskFull)]);
                    continue;
                }
                if let Err(refusal) = self.make_room(&mut batch, request.bytes) {
                    self.shared.finish(vec![refused(request, refusal)]);
                    continue;
                }
                let alone = matches!(&request.ask, Ask::Drafts { drafts, .. } if drafts.iter().any(needs_own_batch));
                self.add(&mut batch, request);
                if alone || batch.bytes.len() >= BATCH_BYTES {
                    self.commit(&mut batch);
                }
            }
            self.commit(&mut batch);
            if taken.closed {
                return;
            }
        }
    }

    fn fresh(&self) -> Batch {
        Batch::with_capacity(self.capacity_hint)
    }

    /// Sees to it that the file has room for the batch and `bytes` more; otherwise commits and goes to the next file.
    fn make_room(&mut self, batch: &mut Batch, bytes: usize) -> Result<(), Refusal> {
        let wanted = self.file.offset + (batch.bytes.len() + bytes) as u64;
        let untouched = self.file.offset == super::journal::DATA_START && batch.is_empty();
        if wanted <= self.file.capacity || untouched {
            return Ok(());
        }
        self.commit(batch);
        if let Some(reason) = self.shared.status.fenced() {
            return Err(Refusal::Closed(reason));
        }
        match self.shared.files.start_next(Sequence(self.last.0 + 1), |_| Vec::new()) {
            Ok(file) => {
                self.file = file;
                self.shared.settling.nudge();
                Ok(())
            }
            Err(error) if super::is_full(&error) => {
                self.shared.status.disk_is_full();
                Err(Refusal::DiskFull)
            }
            Err(error) => {
                let reason = self.shared.fence(&format!("start the next journal file: {error}"));
                Err(Refusal::Closed(reason))
            }
        }
    }

    fn tick(&mut self) {
        let now = self.shared.clock.now();
        if now > self.time {
            self.time = now;
            self.counter = 0;
        }
    }

    /// Draws an id; ids of one instance never go down (LOG.md 18).
    fn draw(&mut self, space: &Space) -> RecordId {
        if self.counter >= 0x0FFF {
            self.time = self.time.saturating_add(Duration::from_millis(1));
            self.counter = 0;
        }
        self.counter += 1;
        RecordId::new(self.time, self.counter, space.number.0, fastrand::u64(..))
    }

    fn header(&mut self, space: &Space, kind: u8, first: bool, left: usize) -> Header {
        self.last.0 += 1;
        Header {
            kind,
            first,
            body_bytes: 0,
            namespace: space.number,
            sequence: self.last,
            durable: self.durable,
            left: u32::try_from(left).unwrap_or(u32::MAX),
            time: self.time,
            body_crc: 0,
        }
    }

    fn put(&mut self, batch: &mut Batch, space: &Space, change: Change, first: bool, left: usize) {
        let header = self.header(space, change.kind(), first, left);
        let at = batch.bytes.len();
        let (header, ()) = put_frame(&mut batch.bytes, self.file.salt, header, |out| change.encode(out));
        batch.add(header, at, Made::Whole(change));
    }

    fn add_cursor(&mut self, batch: &mut Batch, cursor: &DirtyCursor) {
        let position = {
            let mut branches = cursor.space.branches.lock();
            let Some(branch) = branches.get_mut(&cursor.branch) else { return };
            branch.dirty = false;
            if branch.wanted <= branch.durable {
                return;
            }
            branch.wanted
        };
        if self.shared.status.fenced().is_some() {
            return;
        }
        if self.make_room(batch, 256).is_err() {
            super::queue::want_again(&self.shared.queue, &cursor.space);
            return;
        }
        self.tick();
        let change = Change::Cursor { branch: cursor.branch.clone(), position };
        self.put(batch, &cursor.space, change, true, 0);
        batch.run(&cursor.space, 1);
    }

    fn add(&mut self, batch: &mut Batch, request: Request) {
        self.tick();
        let Request { space, ask, reservations, permit, reply, .. } = request;
        if space.deleted.load(Ordering::Acquire) {
            let answer = Err(Refusal::Closed("its namespace was deleted".into()));
            batch.finishes.push(finish_now(reply, answer, permit));
            return;
        }
        let first = self.last;
        let answer = match ask {
            Ask::Writes(writes) => self.add_writes(batch, &space, writes),
            Ask::Drafts { drafts, looked } => self.add_drafts(batch, &space, drafts, looked),
        };
        let frames = usize::try_from(self.last.0 - first.0).unwrap_or(0);
        if frames > 0 {
            batch.run(&space, frames);
        }
        let reservations = reservations
            .into_iter()
            .map(|(index, reservation)| (Sequence(first.0 + 1 + index as u64), reservation))
            .collect();
        batch.finishes.push(Finish { reply, answer: Ok(answer), reservations, _permit: permit });
    }

    fn add_writes(&mut self, batch: &mut Batch, space: &Arc<Space>, writes: Vec<Write>) -> Answer {
        let epoch = space.epoch();
        let mut left = writes.len();
        let mut first = true;
        let mut admitted = Vec::with_capacity(left);
        for Write { mut record, due_at, idempotency } in writes {
            left -= 1;
            let id = self.draw(space);
            record.id = id;
            record.written_at = self.time;
            record.due_at = due_at;
            record.epoch = epoch;
            let at = batch.bytes.len();
            let kind = if due_at.is_some() { body::kind::PARK } else { body::kind::APPEND };
            let header = self.header(space, kind, first, left);
            let (key, salt) = (idempotency.as_ref(), self.file.salt);
            if let Some(due_at) = due_at {
                let (header, start) =
                    put_frame(&mut batch.bytes, salt, header, |out| body::put_park(out, due_at, key, &record));
                batch.add(header, at, Made::Park { due_at, idempotency, start });
                admitted.push(Admitted::Parked { id, written_at: self.time, due_at });
            } else {
                let position = Position(space.assigned.fetch_add(1, Ordering::AcqRel) + 1);
                let (header, start) =
                    put_frame(&mut batch.bytes, salt, header, |out| body::put_append(out, position, key, &record));
                let record = Arc::new(record);
                batch.add(header, at, Made::Append { position, idempotency, record, start });
                admitted.push(Admitted::Appended { id, written_at: self.time, position });
            }
            first = false;
        }
        Answer::Admitted(admitted)
    }

    fn add_drafts(&mut self, batch: &mut Batch, space: &Arc<Space>, drafts: Vec<Draft>, looked: Sequence) -> Answer {
        let now = Instant::now();
        let conditional = |draft: &Draft| parked_row(draft).is_some();
        let drafts: Vec<Draft> = if drafts.iter().any(conditional) {
            self.gone.forget(self.shared.committed(), now);
            if !self.gone.can_judge(looked) {
                return Answer::LookAgain;
            }
            let mut seen = std::collections::HashSet::new();
            drafts
                .into_iter()
                .filter(|draft| parked_row(draft).is_none_or(|row| !self.gone.contains(row) && seen.insert(row)))
                .collect()
        } else {
            drafts
        };
        let count = drafts.len() as u64;
        let mut left = drafts.len();
        let mut first = true;
        let mut epoch = None;
        for draft in drafts {
            left -= 1;
            if let Some(row) = parked_row(&draft) {
                self.gone.insert(row, Sequence(self.last.0 + 1), now);
            }
            match draft {
                Draft::Change(change) => self.put(batch, space, change, first, left),
                Draft::Release { parked, due_at, record } => {
                    self.put_release(batch, space, (parked, due_at, &record), first, left);
                }
                Draft::Cancel { parked, due_at, id } => {
                    self.put(batch, space, Change::Cancel { parked, due_at, id }, first, left);
                }
                Draft::Move { parked, from, due_at, record } => {
                    self.put(batch, space, Change::Move { parked, from, due_at, record }, first, left);
                }
                Draft::Epoch(files) => {
                    let number = space.epoch() + 1;
                    let after = Position(space.assigned.load(Ordering::Acquire));
                    epoch = Some(Epoch { number, after, files: files.clone() });
                    self.put(batch, space, Change::Epoch { number, after, files }, first, left);
                }
            }
            first = false;
        }
        epoch.map_or(Answer::Done(count), Answer::Epoch)
    }

    fn put_release(
        &mut self,
        batch: &mut Batch,
        space: &Arc<Space>,
        (parked, due_at, record): (Sequence, Timestamp, &Arc<Record>),
        first: bool,
        left: usize,
    ) {
        let position = Position(space.assigned.fetch_add(1, Ordering::AcqRel) + 1);
        let record = Arc::new(Record { epoch: space.epoch(), ..Record::clone(record) });
        let header = self.header(space, body::kind::RELEASE, first, left);
        let at = batch.bytes.len();
        let (header, start) = put_frame(&mut batch.bytes, self.file.salt, header, |out| {
            body::put_release(out, position, parked, due_at, &record)
        });
        batch.add(header, at, Made::Release { position, parked, due_at, record, start });
    }

    /// Writes and syncs the batch, publishes it, hands it on, answers. Leaves an empty batch.
    fn commit(&mut self, batch: &mut Batch) {
        let fresh = self.fresh();
        let mut batch = std::mem::replace(batch, fresh);
        if batch.is_empty() {
            self.shared.finish(batch.finishes);
            return;
        }
        self.capacity_hint = (batch.bytes.len() + HEADER_BYTES).min(BATCH_BYTES);
        if let Err(error) = self.file.file.write_all_at(&batch.bytes, self.file.offset) {
            self.write_failed(&mut batch, &error);
            return;
        }
        let started = Instant::now();
        if let Err(error) = self.file.file.sync() {
            // The pages may be marked clean now: a second sync would lie (RELIABILITY.md 2, 9).
            let reason = self.shared.fence(&format!("sync journal file {}: {error}", self.file.path.display()));
            self.shared.finish(batch.refuse(&Refusal::Unknown(reason)));
            return;
        }
        self.shared.counters.syncs.observe(started.elapsed());
        self.file.offset += batch.bytes.len() as u64;
        self.durable = self.last;
        let (commit, finishes) = batch.into_commit(self.last);
        self.shared.publish(&commit);
        self.shared.finish_commit(finishes, &commit);
        self.shared.settling.push(commit);
    }

    /// Some of the batch may be in the file. It is voided where that can be made sure of; otherwise nobody can say.
    fn write_failed(&mut self, batch: &mut Batch, error: &io::Error) {
        let path = self.file.path.display();
        if super::is_full(error) {
            let zeros = vec![0; batch.bytes.len()];
            let len = self.file.file.size().unwrap_or(0).saturating_sub(self.file.offset);
            let zeros = zeros.get(..usize::try_from(len).unwrap_or(usize::MAX).min(zeros.len())).unwrap_or(&zeros);
            let voided = self.file.file.write_all_at(zeros, self.file.offset).and_then(|()| self.file.file.sync());
            if voided.is_ok() {
                for space in batch.spaces() {
                    space.assigned.store(space.end().0, Ordering::Release);
                    super::queue::want_again(&self.shared.queue, space);
                }
                self.gone.undo_after(self.durable);
                self.last = self.durable;
                self.shared.status.disk_is_full();
                self.shared.finish(batch.refuse(&Refusal::DiskFull));
                return;
            }
        }
        let reason = self.shared.fence(&format!("write journal file {path}: {error}"));
        self.shared.finish(batch.refuse(&Refusal::Unknown(reason)));
    }
}

fn parked_row(draft: &Draft) -> Option<Sequence> {
    match draft {
        Draft::Release { parked, .. } | Draft::Cancel { parked, .. } | Draft::Move { parked, .. } => Some(*parked),
        Draft::Change(_) | Draft::Epoch(_) => None,
    }
}

/// A revision's number and a deleted namespace must be published before the next group is built.
fn needs_own_batch(draft: &Draft) -> bool {
    matches!(draft, Draft::Epoch(_) | Draft::Change(Change::NamespaceDeleted))
}

fn refused(request: Request, refusal: Refusal) -> Finish {
    finish_now(request.reply, Err(refusal), request.permit)
}
