//! What waits for the writer thread: requests, and the cursors that ride on the next group.
//!
//! Its bound in bytes is held by permits that a request takes before it gets in and gives back with its answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::change::{Change, Sequence};
use super::keys::Reservation;
use super::space::Space;
use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::{Admitted, BranchName, Epoch, Write};
use bytes::Bytes;

/// A change that the writer completes: it alone knows positions, ids and what is gone already.
#[derive(Debug)]
pub(super) enum Draft {
    /// As it is.
    Change(Change),
    /// A parked record is due, if it still waits.
    Release {
        /// The row.
        parked: Sequence,
        /// When it was due.
        due_at: Timestamp,
        /// The record.
        record: Arc<Record>,
    },
    /// Cancel, if it still waits.
    Cancel {
        /// The row.
        parked: Sequence,
        /// When it was due.
        due_at: Timestamp,
        /// Its id.
        id: RecordId,
    },
    /// Move, if it still waits.
    Move {
        /// The row.
        parked: Sequence,
        /// When it was due.
        from: Timestamp,
        /// When it is due now.
        due_at: Timestamp,
        /// The encoded record.
        record: Bytes,
    },
    /// A revision of the file; the writer draws its number.
    Epoch(Bytes),
}

/// What one request asks for; all of it is one group.
#[derive(Debug)]
pub(super) enum Ask {
    /// Records to append or park.
    Writes(Vec<Write>),
    /// Anything else. `looked` is the state's sequence when conditional rows were looked up.
    Drafts {
        /// The changes.
        drafts: Vec<Draft>,
        /// What the look-up had seen.
        looked: Sequence,
    },
}

/// What the writer answers.
#[derive(Debug)]
pub(super) enum Answer {
    /// The writes are durable.
    Admitted(Vec<Admitted>),
    /// The changes are durable; so many of them applied.
    Done(u64),
    /// The look-up is too old to be judged: look again.
    LookAgain,
    /// The revision is durable.
    Epoch(Epoch),
}

/// Why the writer did not do it.
#[derive(Clone, Debug)]
pub(super) enum Refusal {
    /// Nobody can say whether it is in the log.
    Unknown(Arc<str>),
    /// It is not in the log.
    Closed(Arc<str>),
    /// It is not in the log: the disk is full.
    DiskFull,
}

pub(super) type Reply = Result<Answer, Refusal>;

/// One group on its way to the writer.
pub(super) struct Request {
    pub(super) space: Arc<Space>,
    pub(super) ask: Ask,
    pub(super) bytes: usize,
    /// Keys that this group takes; kept when it is durable, given back when it is not.
    pub(super) reservations: Vec<(usize, Reservation)>,
    pub(super) permit: Option<OwnedSemaphorePermit>,
    pub(super) reply: oneshot::Sender<Reply>,
}

/// A cursor to be written with the next group.
pub(super) struct DirtyCursor {
    pub(super) space: Arc<Space>,
    pub(super) branch: BranchName,
}

#[derive(Default)]
struct Waiting {
    requests: Vec<Request>,
    cursors: Vec<DirtyCursor>,
    cursors_since: Option<Instant>,
    /// The writer sleeps, and nothing but a request or a first cursor wakes it.
    asleep: bool,
    closed: Option<Arc<str>>,
}

/// The writer's inbox.
#[derive(Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    news: Condvar,
}

/// What the writer takes out at once.
pub(super) struct Taken {
    pub(super) requests: Vec<Request>,
    pub(super) cursors: Vec<DirtyCursor>,
    /// Nothing more will come.
    pub(super) closed: bool,
}

impl Queue {
    /// Puts a request in. Gives it back with the reason when nothing is taken any more.
    pub(super) fn push(&self, request: Request) -> Result<(), (Box<Request>, Arc<str>)> {
        let mut waiting = self.waiting.lock();
        if let Some(reason) = &waiting.closed {
            let reason = Arc::clone(reason);
            return Err((Box::new(request), reason));
        }
        waiting.requests.push(request);
        if waiting.asleep {
            waiting.asleep = false;
            self.news.notify_one();
        }
        Ok(())
    }

    /// Notes that a branch's cursor wants to be stored, at most once until it has been.
    pub(super) fn push_cursor(&self, space: &Arc<Space>, branch: &BranchName) {
        let mut waiting = self.waiting.lock();
        if waiting.closed.is_some() {
            return;
        }
        waiting.cursors.push(DirtyCursor { space: Arc::clone(space), branch: branch.clone() });
        if waiting.cursors_since.is_none() {
            waiting.cursors_since = Some(Instant::now());
            if waiting.asleep {
                self.news.notify_one();
            }
        }
    }

    /// Waits for requests, or until a cursor has waited for `linger`, or until the queue is closed.
    pub(super) fn take(&self, linger: Duration) -> Taken {
        let mut waiting = self.waiting.lock();
        loop {
            let due = waiting.cursors_since.map(|since| since + linger);
            let ripe = due.is_some_and(|due| due <= Instant::now());
            if !waiting.requests.is_empty() || ripe || waiting.closed.is_some() {
                waiting.asleep = false;
                waiting.cursors_since = None;
                return Taken {
                    requests: std::mem::take(&mut waiting.requests),
                    cursors: std::mem::take(&mut waiting.cursors),
                    closed: waiting.closed.is_some(),
                };
            }
            waiting.asleep = true;
            match due {
                Some(due) => {
                    self.news.wait_until(&mut waiting, due);
                }
                None => self.news.wait(&mut waiting),
            }
        }
    }

    /// Takes nothing more, for this reason; what is in it is still given out.
    pub(super) fn close(&self, reason: &Arc<str>) {
        let mut waiting = self.waiting.lock();
        waiting.closed.get_or_insert_with(|| Arc::clone(reason));
        self.news.notify_one();
    }
}

/// What a request's position among branches was asked to be, for [`Space`]s.
pub(super) fn want_cursor(queue: &Queue, space: &Arc<Space>, branch: &BranchName, position: Position) {
    let first = {
        let mut branches = space.branches.lock();
        let Some(known) = branches.get_mut(branch) else { return };
        if position <= known.wanted {
            return;
        }
        known.wanted = position;
        !std::mem::replace(&mut known.dirty, true)
    };
    if first {
        queue.push_cursor(space, branch);
    }
}

/// Cursors of a namespace that could not be written want to be once more.
pub(super) fn want_again(queue: &Queue, space: &Arc<Space>) {
    let late: Vec<BranchName> = {
        let mut branches = space.branches.lock();
        let late = branches.iter_mut().filter(|(_, branch)| branch.wanted > branch.durable && !branch.dirty);
        late.map(|(name, branch)| {
            branch.dirty = true;
            name.clone()
        })
        .collect()
    };
    for branch in late {
        queue.push_cursor(space, &branch);
    }
}
