//! Writes on their way into a queue: batches of ten, several under way at once.
//!
//! Of a FIFO queue's group one message is under way and no more: a batch may fail in part, and what stands behind a message
//! that was not taken must not be taken either, or it would overtake when that one is repeated.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use super::message::Outgoing;
use super::queue::{LARGEST, Queue};
use crate::clock::Clock;
use crate::connection::sqs::{Failure, Reached, explain};
use crate::record::{Position, Record};
use crate::source::AdmitError;
use crate::source::foreign::broker::Handed;

/// Messages in one request, as SQS allows.
pub(super) const BATCH: usize = 10;
/// Requests under way at once.
const FLIGHTS: usize = 8;
/// What waits to be sent, in KiB.
const ROOM: usize = 64 << 10;
/// How long a write waits for room, and how long a stop waits for what was handed over.
const PATIENCE: Duration = Duration::from_secs(10);
/// How far behind the first one another message is looked for that may go now.
const SCAN: usize = 1_000;

type Answer = Result<Position, AdmitError>;

/// A message that waits, and who hears of it.
struct Item {
    outgoing: Outgoing,
    answer: oneshot::Sender<Answer>,
    _room: Arc<OwnedSemaphorePermit>,
}

/// What waits to be sent to one queue.
pub(super) struct Sender {
    queue: Arc<Queue>,
    clock: Clock,
    pending: Mutex<VecDeque<Item>>,
    news: Notify,
    room: Arc<Semaphore>,
    closing: CancellationToken,
    /// Cancelled when nothing waits any more after the close.
    empty: CancellationToken,
}

impl Sender {
    /// Starts the task that sends, which ends when `stopped` is cancelled; must be called inside a runtime.
    pub(super) fn start(queue: Arc<Queue>, clock: Clock, stopped: CancellationToken) -> Arc<Self> {
        let sender = Arc::new(Self {
            queue,
            clock,
            pending: Mutex::default(),
            news: Notify::new(),
            room: Arc::new(Semaphore::new(ROOM)),
            closing: CancellationToken::new(),
            empty: CancellationToken::new(),
        });
        tokio::spawn(Arc::clone(&sender).run(stopped));
        sender
    }

    /// Hands records over. When it returns, they have their place: what is handed over later stands behind.
    pub(super) async fn append(&self, records: &[Arc<Record>]) -> Result<Handed, AdmitError> {
        let facts = self.queue.facts().await.map_err(|failure| refused(&failure))?;
        let outgoing = records.iter().map(|record| Outgoing::of(record, self.queue.fifo)).collect();
        self.hand_over(outgoing, facts.largest).await
    }

    /// Hands messages over; one of more than `largest` bytes is refused.
    pub(super) async fn hand_over(&self, outgoing: Vec<Outgoing>, largest: usize) -> Result<Handed, AdmitError> {
        let closed = || AdmitError::Closed { reason: "the log is closing".into() };
        let kib: usize = outgoing.iter().map(|message| message.size / 1_024 + 1).sum();
        let kib = u32::try_from(kib.min(ROOM)).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(kib);
        let room = tokio::select! {
            room = tokio::time::timeout(PATIENCE, room) => room,
            () = self.closing.cancelled() => return Err(closed()),
        };
        let busy = AdmitError::Busy { retry_after: Duration::from_secs(1) };
        let room = Arc::new(room.map_err(|_| busy)?.map_err(|_| closed())?);
        let mut answers = Vec::with_capacity(outgoing.len());
        {
            let mut pending = self.pending.lock();
            if self.closing.is_cancelled() {
                return Err(closed());
            }
            for outgoing in outgoing {
                let (answer, wait) = oneshot::channel();
                answers.push(wait);
                if outgoing.size > largest {
                    // Nobody waits only if the call was dropped.
                    let too_large = AdmitError::TooLarge { bytes: outgoing.size as u64, limit: largest as u64 };
                    let _ = answer.send(Err(too_large));
                } else {
                    pending.push_back(Item { outgoing, answer, _room: Arc::clone(&room) });
                }
            }
        }
        self.news.notify_one();
        let lost = || Err(AdmitError::Unknown { reason: "the log stopped before SQS had answered".into() });
        let answers = futures::future::join_all(answers);
        Ok(async move { answers.await.into_iter().map(|answer| answer.unwrap_or_else(|_| lost())).collect() }.boxed())
    }

    /// Takes nothing more and sends what waits, with a bound.
    pub(super) async fn close(&self) {
        self.closing.cancel();
        self.news.notify_one();
        // What is left then is answered as unknown.
        let _ = tokio::time::timeout(PATIENCE, self.empty.cancelled()).await;
    }

    async fn run(self: Arc<Self>, stopped: CancellationToken) {
        let (mut flights, mut busy) = (FuturesUnordered::new(), HashSet::new());
        loop {
            while flights.len() < FLIGHTS {
                let batch = next_batch(&mut self.pending.lock(), &busy);
                if batch.is_empty() {
                    break;
                }
                let groups: Vec<Box<str>> = batch.iter().filter_map(|item| item.outgoing.group.clone()).collect();
                busy.extend(groups.iter().cloned());
                flights.push(self.send(batch).map(move |()| groups));
            }
            if flights.is_empty() && self.closing.is_cancelled() {
                self.empty.cancel();
                return;
            }
            tokio::select! {
                Some(groups) = flights.next(), if !flights.is_empty() => {
                    groups.iter().for_each(|group| _ = busy.remove(group));
                }
                () = self.news.notified() => {}
                () = stopped.cancelled() => return,
            }
        }
    }

    async fn send(&self, batch: Vec<Item>) {
        let outcome = self.try_send(&batch).await;
        let mut outcomes = match outcome {
            Ok(outcomes) => outcomes,
            Err(failure) => {
                self.queue.failed("send", &failure);
                batch.iter().map(|_| Err(refused(&failure))).collect()
            }
        };
        for (item, outcome) in batch.into_iter().zip(outcomes.drain(..)) {
            if let (Err(_), Some(group)) = (&outcome, &item.outgoing.group) {
                refuse_behind(&mut self.pending.lock(), group);
            }
            // Who waited may be gone; what was written stays written.
            let _ = item.answer.send(outcome);
        }
    }

    async fn try_send(&self, batch: &[Item]) -> Result<Vec<Answer>, Failure> {
        let facts = self.queue.facts().await?;
        let now = self.clock.now();
        let entries = batch.iter().enumerate().filter_map(|(index, item)| item.outgoing.entry(index, now).ok());
        let request = self.queue.client().await?.send_message_batch().queue_url(&facts.url);
        let answer = request.set_entries(Some(entries.collect())).send().await;
        let answer = answer
            .map_err(|error| explain(&error, "SendMessage", self.queue.connection.account(), self.queue.name()))?;
        self.queue.fine("send");
        let silent = || Err(AdmitError::Unknown { reason: "SQS did not say what became of it".into() });
        let mut outcomes: Vec<Answer> = batch.iter().map(|_| silent()).collect();
        let mut put = |id: &str, outcome: Answer| {
            if let Some(slot) = id.parse().ok().and_then(|index: usize| outcomes.get_mut(index)) {
                *slot = outcome;
            }
        };
        // A queue has no places; the reader counts for itself.
        answer.successful.iter().for_each(|sent| put(&sent.id, Ok(Position(0))));
        for failed in &answer.failed {
            let why =
                format!("SQS refused the message: {} {}", failed.code, failed.message.as_deref().unwrap_or_default());
            let reason = why.trim_end().into();
            let outcome =
                if failed.sender_fault { AdmitError::Unavailable { reason } } else { AdmitError::Unknown { reason } };
            put(&failed.id, Err(outcome));
        }
        Ok(outcomes)
    }
}

/// What a request's failure means to who wrote.
fn refused(failure: &Failure) -> AdmitError {
    let reason = failure.text.as_str().into();
    match failure.reached {
        Reached::Never | Reached::Refused => AdmitError::Unavailable { reason },
        Reached::Throttled => AdmitError::Busy { retry_after: Duration::from_secs(1) },
        Reached::Perhaps => AdmitError::Unknown { reason },
    }
}

/// The next messages that may go together: in their order, of each group only the first, and none while another of its group
/// is under way.
fn next_batch(pending: &mut VecDeque<Item>, busy: &HashSet<Box<str>>) -> Vec<Item> {
    let (mut batch, mut bytes, mut seen) = (Vec::new(), 0, HashSet::new());
    let (mut at, mut looked) = (0, 0);
    while batch.len() < BATCH && looked < SCAN {
        looked += 1;
        let Some(item) = pending.get(at) else { break };
        let group = item.outgoing.group.clone();
        let blocked = group.is_some_and(|group| busy.contains(&group) || !seen.insert(group));
        if blocked || bytes + item.outgoing.size > LARGEST {
            at += 1;
            continue;
        }
        bytes += item.outgoing.size;
        batch.extend(pending.remove(at));
    }
    batch
}

/// One of the group was not taken: what was handed over behind it is not sent.
fn refuse_behind(pending: &mut VecDeque<Item>, group: &str) {
    let reason: Arc<str> = "an earlier record of this key was not taken, and nothing overtakes it".into();
    let (behind, others) =
        std::mem::take(pending).into_iter().partition(|item: &Item| item.outgoing.group.as_deref() == Some(group));
    *pending = others;
    let behind: VecDeque<Item> = behind;
    for item in behind {
        // Nobody waits only if the call was dropped.
        let _ = item.answer.send(Err(AdmitError::Unavailable { reason: Arc::clone(&reason) }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::record;

    fn item(key: Option<&str>, size: usize) -> Item {
        let record = Record { key: key.map(Into::into), ..record("1") };
        let mut outgoing = Outgoing::of(&record, key.is_some());
        outgoing.size = size;
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        Item { outgoing, answer: oneshot::channel().0, _room: Arc::new(room) }
    }

    fn sizes(batch: &[Item]) -> Vec<usize> {
        batch.iter().map(|item| item.outgoing.size).collect()
    }

    #[test]
    fn a_batch_has_ten_messages_and_a_mebibyte_at_most() {
        let mut pending: VecDeque<Item> = (1..=12).map(|size| item(None, size)).collect();
        assert_eq!(sizes(&next_batch(&mut pending, &HashSet::new())), (1..=10).collect::<Vec<_>>());
        assert_eq!(sizes(&next_batch(&mut pending, &HashSet::new())), [11, 12]);
        let mut large: VecDeque<Item> = (0..3).map(|_| item(None, LARGEST / 2)).collect();
        assert_eq!(next_batch(&mut large, &HashSet::new()).len(), 2);
    }

    #[test]
    fn a_group_is_under_way_once_and_nothing_of_it_overtakes() {
        let mut pending: VecDeque<Item> =
            [item(Some("a"), 1), item(Some("b"), 2), item(Some("a"), 3)].into_iter().collect();
        let busy = |group: &str| HashSet::from([group.into()]);
        assert_eq!(sizes(&next_batch(&mut pending, &busy("a"))), [2]);
        assert_eq!(sizes(&next_batch(&mut pending, &busy("b"))), [1]);
        assert!(next_batch(&mut pending, &busy("a")).is_empty());
        assert_eq!(sizes(&next_batch(&mut pending, &busy("b"))), [3]);
        // The large one of `c` does not fit any more, so the small one behind it has to wait too.
        let mut pending: VecDeque<Item> =
            [item(Some("a"), LARGEST - 10), item(Some("c"), 20), item(Some("c"), 1)].into_iter().collect();
        assert_eq!(sizes(&next_batch(&mut pending, &HashSet::new())), [LARGEST - 10]);
        assert_eq!(sizes(&next_batch(&mut pending, &HashSet::new())), [20]);
    }

    #[test]
    fn what_stands_behind_one_that_was_not_taken_is_refused_and_others_are_not() {
        let mut pending: VecDeque<Item> =
            [item(Some("a"), 1), item(Some("b"), 2), item(Some("a"), 3)].into_iter().collect();
        let (answer, mut wait) = oneshot::channel();
        pending[2].answer = answer;
        refuse_behind(&mut pending, "a");
        assert!(matches!(wait.try_recv(), Ok(Err(AdmitError::Unavailable { .. }))));
        assert_eq!(pending.iter().map(|item| item.outgoing.size).collect::<Vec<_>>(), [2]);
    }
}
