//! The reading side: long polls fill a bounded store, held messages are kept invisible, what has ended is deleted.
//!
//! A poll that is under way when its reader goes is waited for, since what SQS hands to a broken connection stays invisible
//! until its visibility ends; what it brings goes to the next reader, or back to the queue.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aws_sdk_sqs::error::SdkError;
use aws_sdk_sqs::types::{
    BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry,
    MessageSystemAttributeName as SystemName,
};
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::held::{Held, Receipt};
use super::message::{Received, received};
use super::queue::Queue;
use super::sender::BATCH;
use crate::clock::{Clock, Timestamp};
use crate::connection::sqs::{Failure, LONGEST_POLL, explain, for_polls};
use crate::record::Position;
use crate::source::{Entry, Lag, LogError, Reach, Subscription};

/// Waits after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
/// Requests under way at once that delete, or hold on to, messages.
const FLIGHTS: usize = 8;
/// How long a stop, or another reader, waits for what is given back or deleted.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a stop waits for polls that are under way, after the last of them that brought something.
const QUIET: Duration = Duration::from_secs(1);

/// What the readers of one queue share.
pub(super) struct Receiving {
    queue: Arc<Queue>,
    clock: Clock,
    /// The namespace's number in ids.
    number: u32,
    visibility: Duration,
    held: Mutex<Held>,
    /// There is something to read.
    news: Notify,
    /// There is room for more, or somebody to read it.
    room: Notify,
    /// There is something to delete.
    ends: Notify,
    /// Something was deleted.
    deleted: Notify,
    releases: Mutex<Vec<JoinHandle<()>>>,
    duplicates: AtomicU64,
    /// How many polls are under way.
    polls: watch::Sender<usize>,
    stopped: CancellationToken,
}

impl Receiving {
    pub(super) fn new(
        queue: Arc<Queue>,
        clock: Clock,
        number: u32,
        visibility: Duration,
        stopped: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            queue,
            clock,
            number,
            visibility,
            held: Mutex::default(),
            news: Notify::new(),
            room: Notify::new(),
            ends: Notify::new(),
            deleted: Notify::new(),
            releases: Mutex::default(),
            duplicates: AtomicU64::new(0),
            polls: watch::Sender::new(0),
            stopped,
        })
    }

    /// Starts the tasks, which end when it is stopped; must be called inside a runtime, once.
    pub(super) fn start(self: &Arc<Self>, receivers: usize) {
        for _ in 0..receivers {
            self.task(Arc::clone(self).poll());
        }
        self.task(Arc::clone(self).hold());
        self.task(Arc::clone(self).delete());
    }

    fn task(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stopped = self.stopped.clone();
        tokio::spawn(async move { stopped.run_until_cancelled_owned(work).await });
    }

    /// A reader, and where it begins. What a former one left is given back first, with a bound.
    pub(super) async fn open(self: &Arc<Self>) -> (Reader, Reach) {
        let left = self.held.lock().displace();
        self.release(left);
        self.released().await;
        // The machine's own time, whatever a test's clock shows: positions must not be used twice.
        let (session, cursor) = self.held.lock().open(Clock::system().now());
        self.room.notify_waiters();
        (Reader { receiving: Arc::clone(self), session }, cursor)
    }

    /// A branch has come so far, and these have ended.
    pub(super) fn progress(&self, frontier: &Reach, ended: &[Position]) {
        self.held.lock().end(frontier, ended);
        self.ends.notify_one();
    }

    /// How far the reader is behind.
    pub(super) fn lag(&self) -> Lag {
        let records = self.queue.depth();
        let held = self.held.lock();
        let (oldest, bytes) = held.standing();
        Lag { records, bytes, oldest, cursor: held.cursor().clone() }
    }

    /// The newest position that was given out.
    pub(super) fn newest(&self) -> Position {
        self.held.lock().newest()
    }

    /// Receipts that came or will come twice.
    pub(super) fn duplicates(&self) -> u64 {
        self.duplicates.load(Ordering::Relaxed)
    }

    /// Gives back what is held and deletes what has ended, each with a bound.
    pub(super) async fn close(&self) {
        let left = self.held.lock().displace();
        self.release_now(left).await;
        self.last_polls().await;
        self.released().await;
        let cleaned = async {
            loop {
                let deleted = self.deleted.notified();
                if self.held.lock().is_clean() {
                    return;
                }
                deleted.await;
            }
        };
        if tokio::time::timeout(PATIENCE, cleaned).await.is_err() {
            tracing::warn!(queue = self.queue.name(), "not all that has ended could be deleted: it comes again");
        }
    }

    /// Waits for polls that are under way: what is given back goes to them first, and a broken one would keep it invisible.
    /// Where nothing comes any more, nobody waits for them to end.
    async fn last_polls(&self) {
        let mut polls = self.polls.subscribe();
        while *polls.borrow_and_update() > 0 {
            if tokio::time::timeout(QUIET, polls.changed()).await.is_err() {
                return;
            }
        }
    }

    fn twice(&self, count: u64) {
        self.duplicates.fetch_add(count, Ordering::Relaxed);
    }

    async fn poll(self: Arc<Self>) {
        let mut wait = BACKOFF.0;
        loop {
            self.wanted().await;
            self.polls.send_modify(|polls| *polls += 1);
            let received = self.receive().await.map(|messages| self.arrive(messages));
            self.polls.send_modify(|polls| *polls -= 1);
            match received {
                Ok(()) => {
                    wait = BACKOFF.0;
                    self.queue.fine("receive");
                }
                Err(failure) => {
                    self.queue.failed("receive", &failure);
                    tokio::time::sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                    wait = (wait * 2).min(BACKOFF.1);
                }
            }
        }
    }

    /// Waits until somebody reads and there is room.
    async fn wanted(&self) {
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if self.held.lock().wants_more() {
                return;
            }
            room.await;
        }
    }

    async fn receive(&self) -> Result<Vec<Received>, Failure> {
        let facts = self.queue.facts().await?;
        let request = self.queue.client().await?.receive_message().queue_url(&facts.url);
        let answer = request
            .max_number_of_messages(i32::try_from(BATCH).unwrap_or(10))
            .wait_time_seconds(LONGEST_POLL)
            .visibility_timeout(seconds(self.visibility))
            .message_system_attribute_names(SystemName::All)
            .message_attribute_names("All")
            .customize()
            .config_override(for_polls())
            .send()
            .await;
        let answer = answer.map_err(|error| self.explained("ReceiveMessage", &error))?;
        let messages = answer.messages.unwrap_or_default().into_iter();
        Ok(messages.filter_map(|message| received(message, self.queue.fifo, self.number)).collect())
    }

    fn explained<E>(&self, action: &str, error: &SdkError<E>) -> Failure
    where
        E: aws_sdk_sqs::error::ProvideErrorMetadata + std::error::Error + 'static,
    {
        explain(error, action, self.queue.connection.account(), self.queue.name())
    }

    fn arrive(self: &Arc<Self>, messages: Vec<Received>) {
        if messages.is_empty() {
            return;
        }
        let arrived = self.held.lock().arrive(messages, Instant::now(), self.clock.now(), self.queue.fifo);
        self.twice(arrived.again);
        self.news.notify_waiters();
        if arrived.again > 0 {
            self.ends.notify_one();
        }
        self.release(arrived.unwanted);
    }

    /// Makes messages visible at once, in the background.
    fn release(self: &Arc<Self>, receipts: Vec<Receipt>) {
        if receipts.is_empty() {
            return;
        }
        // Outside a runtime the process is ending: their visibility ends by itself.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let receiving = Arc::clone(self);
            let task = runtime.spawn(async move { receiving.release_now(receipts).await });
            let mut releases = self.releases.lock();
            releases.retain(|task| !task.is_finished());
            releases.push(task);
        }
    }

    /// Waits, with a bound, for what is being made visible.
    async fn released(&self) {
        let releases = std::mem::take(&mut *self.releases.lock());
        // Those that take longer end by themselves.
        let _ = tokio::time::timeout(PATIENCE, futures::future::join_all(releases)).await;
    }

    /// One request after the other in the order of the queue; of a group with a failure nothing further is made visible, so
    /// that nothing of it overtakes.
    async fn release_now(&self, receipts: Vec<Receipt>) {
        let mut stuck: HashSet<Box<str>> = HashSet::new();
        for batch in receipts.chunks(BATCH) {
            let free = |receipt: &&Receipt| receipt.group.as_ref().is_none_or(|group| !stuck.contains(group));
            let batch: Vec<Receipt> = batch.iter().filter(free).cloned().collect();
            match self.change(&batch, Duration::ZERO).await {
                Ok(failed) => stuck.extend(failed.into_iter().filter_map(|(receipt, _)| receipt.group.clone())),
                Err(failure) => {
                    tracing::debug!(queue = self.queue.name(), error = failure.text, "messages come again later");
                    return;
                }
            }
        }
    }

    /// Sets the visibility of at most ten messages; gives those for which it was refused.
    async fn change<'a>(
        &self,
        batch: &'a [Receipt],
        visibility: Duration,
    ) -> Result<Vec<(&'a Receipt, BatchResultErrorEntry)>, Failure> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let facts = self.queue.facts().await?;
        let entry = |(index, receipt): (usize, &Receipt)| {
            ChangeMessageVisibilityBatchRequestEntry::builder()
                .id(index.to_string())
                .receipt_handle(&receipt.handle)
                .visibility_timeout(seconds(visibility))
                .build()
                .ok()
        };
        let request = self.queue.client().await?.change_message_visibility_batch().queue_url(&facts.url);
        let answer = request.set_entries(Some(batch.iter().enumerate().filter_map(entry).collect())).send().await;
        let answer = answer.map_err(|error| self.explained("ChangeMessageVisibility", &error))?;
        Ok(by_receipt(batch, answer.failed))
    }

    /// Holds on to everything that is held, at a third of the visibility.
    async fn hold(self: Arc<Self>) {
        let mut beats = tokio::time::interval(self.visibility / 3);
        beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            beats.tick().await;
            let now = Instant::now();
            let since = now.checked_sub(self.visibility / 6).unwrap_or(now);
            let receipts = self.held.lock().to_extend(since, now, self.visibility);
            futures::stream::iter(receipts.chunks(BATCH))
                .for_each_concurrent(FLIGHTS, |batch| self.hold_on(batch))
                .await;
        }
    }

    fn hold_on<'a>(&'a self, batch: &'a [Receipt]) -> BoxFuture<'a, ()> {
        async move {
            let at = Instant::now();
            match self.change(batch, self.visibility).await {
                Ok(failed) => {
                    self.queue.fine("hold");
                    let mut held = self.held.lock();
                    for receipt in batch {
                        match failed.iter().find(|(other, _)| *other == receipt) {
                            None => held.extended(receipt, at),
                            Some((_, error)) if is_stale(error) => {
                                if held.expired(receipt) {
                                    self.twice(1);
                                    tracing::warn!(
                                        queue = self.queue.name(),
                                        message = %receipt.id,
                                        "a message could not be held: it comes again"
                                    );
                                }
                            }
                            // Tried again at the next beat.
                            Some(_) => {}
                        }
                    }
                }
                Err(failure) => self.queue.failed("hold", &failure),
            }
        }
        .boxed()
    }

    /// Deletes what has ended.
    async fn delete(self: Arc<Self>) {
        let mut wait = BACKOFF.0;
        loop {
            let batches: Vec<Vec<Receipt>> = {
                let mut held = self.held.lock();
                std::iter::repeat_with(|| held.next_deletes(BATCH))
                    .take(FLIGHTS)
                    .take_while(|batch| !batch.is_empty())
                    .collect()
            };
            if batches.is_empty() {
                self.ends.notified().await;
                continue;
            }
            let done = futures::future::join_all(batches.iter().map(|batch| self.delete_batch(batch))).await;
            self.deleted.notify_waiters();
            self.room.notify_waiters();
            if done.into_iter().all(|fine| fine) {
                wait = BACKOFF.0;
            } else {
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(BACKOFF.1);
            }
        }
    }

    /// True when nothing of it has to be tried again.
    async fn delete_batch(&self, batch: &[Receipt]) -> bool {
        match self.try_delete(batch).await {
            Ok(failed) => {
                self.queue.fine("delete");
                let mut held = self.held.lock();
                for receipt in batch {
                    let Some((_, error)) = failed.iter().find(|(other, _)| *other == receipt) else {
                        held.deleted(receipt);
                        continue;
                    };
                    if held.not_deleted(receipt, true, is_stale(error)) {
                        self.twice(1);
                        tracing::warn!(
                            queue = self.queue.name(),
                            message = %receipt.id,
                            code = error.code(),
                            "a message that has ended could not be deleted: it comes again"
                        );
                    }
                }
                failed.is_empty()
            }
            Err(failure) => {
                self.queue.failed("delete", &failure);
                let mut held = self.held.lock();
                batch.iter().for_each(|receipt| _ = held.not_deleted(receipt, false, false));
                false
            }
        }
    }

    async fn try_delete<'a>(&self, batch: &'a [Receipt]) -> Result<Vec<(&'a Receipt, BatchResultErrorEntry)>, Failure> {
        let facts = self.queue.facts().await?;
        let entry = |(index, receipt): (usize, &Receipt)| {
            DeleteMessageBatchRequestEntry::builder().id(index.to_string()).receipt_handle(&receipt.handle).build().ok()
        };
        let request = self.queue.client().await?.delete_message_batch().queue_url(&facts.url);
        let answer = request.set_entries(Some(batch.iter().enumerate().filter_map(entry).collect())).send().await;
        let answer = answer.map_err(|error| self.explained("DeleteMessage", &error))?;
        Ok(by_receipt(batch, answer.failed))
    }

    /// The next records of a reader; `None` if it has to wait, and until when at the latest.
    fn take(
        &self,
        session: u64,
        records: usize,
        bytes: usize,
    ) -> Result<Result<Vec<Entry>, Option<Timestamp>>, LogError> {
        let mut held = self.held.lock();
        if !held.is_open(session) || self.stopped.is_cancelled() {
            return Err(LogError::Closed("the queue is not read here any more".into()));
        }
        let entries = held.take(self.clock.now(), records.max(1), bytes);
        if entries.is_empty() {
            return Ok(Err(held.first_due()));
        }
        drop(held);
        self.room.notify_waiters();
        Ok(Ok(entries))
    }
}

/// The receipts that these refusals are of.
fn by_receipt(batch: &[Receipt], failed: Vec<BatchResultErrorEntry>) -> Vec<(&Receipt, BatchResultErrorEntry)> {
    let of = |error: &BatchResultErrorEntry| batch.get(error.id().parse::<usize>().ok()?);
    failed.into_iter().filter_map(|error| Some((of(&error)?, error))).collect()
}

/// The receipt is worth nothing any more: its visibility has ended, or the message is gone.
fn is_stale(error: &BatchResultErrorEntry) -> bool {
    let code = error.code().rsplit('.').next().unwrap_or_default();
    matches!(code, "ReceiptHandleIsInvalid" | "MessageNotInflight" | "InvalidParameterValue" | "InvalidIdFormat")
}

fn seconds(span: Duration) -> i32 {
    i32::try_from(span.as_secs()).unwrap_or(i32::MAX)
}

/// The one reader of a queue in this process. Dropped, it gives back what it has not ended.
pub(super) struct Reader {
    receiving: Arc<Receiving>,
    session: u64,
}

impl Subscription for Reader {
    fn next(&mut self, max_records: usize, max_bytes: usize) -> BoxFuture<'_, Result<Vec<Entry>, LogError>> {
        let (receiving, session) = (Arc::clone(&self.receiving), self.session);
        async move {
            loop {
                let news = receiving.news.notified();
                tokio::pin!(news);
                news.as_mut().enable();
                let due = match receiving.take(session, max_records, max_bytes)? {
                    Ok(entries) => return Ok(entries),
                    Err(due) => due,
                };
                let due = async {
                    match due {
                        Some(due) => receiving.clock.sleep_until(due).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = news => {}
                    () = due => {}
                    () = receiving.stopped.cancelled() => {}
                }
            }
        }
        .boxed()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let left = self.receiving.held.lock().close(self.session);
        self.receiving.release(left);
    }
}
