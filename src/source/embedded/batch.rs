//! The groups of one write: encoded into one buffer, answered together.
//!
//! The writer fills a batch; when its bytes are durable the batch becomes a [`Commit`] for the settle thread and a list
//! of answers for the runtime.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::change::{Change, Frame, Sequence};
use super::frame::{HEADER_BYTES, Header};
use super::keys::Reservation;
use super::queue::{Answer, Refusal, Reply};
use super::space::Space;
use crate::clock::Timestamp;
use crate::record::{Position, Record};
use crate::source::IdempotencyKey;

/// What a frame of the batch says, while its record's bytes are still in the buffer.
pub(super) enum Made {
    Append { position: Position, idempotency: Option<IdempotencyKey>, record: Arc<Record>, start: usize },
    Park { due_at: Timestamp, idempotency: Option<IdempotencyKey>, start: usize },
    Release { position: Position, parked: Sequence, due_at: Timestamp, record: Arc<Record>, start: usize },
    Whole(Change),
}

struct Encoded {
    header: Header,
    at: usize,
    made: Made,
}

/// Who hears what when the batch is durable.
pub(super) struct Finish {
    pub(super) reply: oneshot::Sender<Reply>,
    pub(super) answer: Reply,
    pub(super) reservations: Vec<(Sequence, Reservation)>,
    /// Given back when the answer has been sent.
    pub(super) _permit: Option<OwnedSemaphorePermit>,
}

/// One durable frame with where it lies in its commit.
pub(super) struct Durable {
    pub(super) header: Header,
    pub(super) at: usize,
    pub(super) frame: Frame,
    /// The record of an `Append` or `Release`, as a value.
    pub(super) record: Option<Arc<Record>>,
}

/// What one sync has made durable.
pub(super) struct Commit {
    pub(super) bytes: Bytes,
    pub(super) frames: Vec<Durable>,
    /// Whose frames they are: so many in a row.
    pub(super) runs: Vec<(Arc<Space>, usize)>,
    pub(super) last: Sequence,
}

impl Commit {
    /// The bytes of one of its frames.
    pub(super) fn raw(&self, durable: &Durable) -> &[u8] {
        self.bytes.get(durable.at..durable.at + durable.header.frame_bytes()).unwrap_or_default()
    }
}

/// Groups that are written together.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    frames: Vec<Encoded>,
    runs: Vec<(Arc<Space>, usize)>,
    pub(super) finishes: Vec<Finish>,
}

impl Batch {
    /// Empty, with room for so many bytes.
    pub(super) fn with_capacity(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), ..Self::default() }
    }

    /// True when there is nothing to write; there may be answers all the same.
    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Takes in a frame that has just been put at the end of `bytes`.
    pub(super) fn add(&mut self, header: Header, at: usize, made: Made) {
        self.frames.push(Encoded { header, at, made });
    }

    /// The last `frames` frames are of this namespace.
    pub(super) fn run(&mut self, space: &Arc<Space>, frames: usize) {
        match self.runs.last_mut() {
            Some((last, count)) if Arc::ptr_eq(last, space) => *count += frames,
            _ => self.runs.push((Arc::clone(space), frames)),
        }
    }

    /// The namespaces that have frames in it.
    pub(super) fn spaces(&self) -> impl Iterator<Item = &Arc<Space>> {
        self.runs.iter().map(|(space, _)| space)
    }

    /// Turns every answer into this refusal.
    pub(super) fn refuse(&mut self, refusal: &Refusal) -> Vec<Finish> {
        let mut finishes = std::mem::take(&mut self.finishes);
        for finish in &mut finishes {
            finish.answer = Err(refusal.clone());
            finish.reservations.clear();
        }
        finishes
    }

    /// What the batch has become, now that it is durable.
    pub(super) fn into_commit(self, last: Sequence) -> (Commit, Vec<Finish>) {
        let bytes = Bytes::from(self.bytes);
        let frames = self.frames.into_iter().map(|encoded| encoded.into_durable(&bytes)).collect();
        (Commit { bytes, frames, runs: self.runs, last }, self.finishes)
    }
}

impl Encoded {
    fn into_durable(self, bytes: &Bytes) -> Durable {
        let Self { header, at, made } = self;
        let end = at + header.frame_bytes();
        let body = |start: usize| -> Bytes {
            let range: Range<usize> = start.min(end)..end;
            bytes.slice(range)
        };
        debug_assert!(at + HEADER_BYTES <= end);
        let (change, record) = match made {
            Made::Append { position, idempotency, record, start } => {
                (Change::Append { position, record: body(start), idempotency }, Some(record))
            }
            Made::Park { due_at, idempotency, start } => {
                (Change::Park { due_at, record: body(start), idempotency }, None)
            }
            Made::Release { position, parked, due_at, record, start } => {
                (Change::Release { position, parked, due_at, record: body(start) }, Some(record))
            }
            Made::Whole(change) => (change, None),
        };
        let frame = Frame { sequence: header.sequence, namespace: header.namespace, time: header.time, change };
        Durable { header, at, frame, record }
    }
}

/// An answer that needs no write.
pub(super) fn finish_now(
    reply: oneshot::Sender<Reply>,
    answer: Result<Answer, Refusal>,
    permit: Option<OwnedSemaphorePermit>,
) -> Finish {
    Finish { reply, answer, reservations: Vec::new(), _permit: permit }
}
