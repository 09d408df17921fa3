//! A branch as a consumer group: a thread that polls, the parts that are its own, and the offsets that it commits.
//!
//! The thread polls whether or not anybody reads, so the group sees us alive while a target is away. Each assignment is a
//! session with a frontier of its own: once its parts are taken away nothing of it is committed any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use rdkafka::client::ClientContext;
use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Message as _, Offset, TopicPartitionList};
use tokio::sync::{Notify, oneshot};

use super::message;
use super::offsets::{self, list};
use super::parts::Parts;
use super::resting::Resting;
use super::session::{Session, Told};
use super::topic::first_offset;
use crate::clock::Timestamp;
use crate::connection::kafka::{Cluster, Listener, METADATA_TIMEOUT, explain};
use crate::record::{Position, Record};
use crate::source::foreign::broker::{Begin, Opened};
use crate::source::{LogError, Reach, StoredPause};

/// How often progress is committed.
const COMMIT: Duration = Duration::from_millis(250);
/// How long the thread waits for messages, and for room.
const POLL: Duration = Duration::from_millis(100);
/// How long a full branch leaves its partitions as they are. Pausing one throws away what was fetched of it, so that is for
/// those that stay full.
const PATIENCE: Duration = Duration::from_secs(1);
/// Messages, and bytes of them, that are handed to the readers at once.
const TURN: (usize, usize) = (512, 256 << 10);
/// How long those who read may take to let go of parts that are taken away.
const LEAVE: Duration = Duration::from_secs(25);
/// How long a branch waits for its parts before it says that it has none.
const JOIN: Duration = Duration::from_secs(30);

/// A branch's membership in its group.
pub(super) struct Member {
    shared: Arc<Shared>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// What the thread, the callbacks and the readers share.
pub(super) struct Shared {
    topic: String,
    group: String,
    number: u32,
    listener: Listener,
    pub(super) state: Mutex<State>,
    /// The number of the newest session, which only the thread that polls begins.
    generation: AtomicU64,
    /// For the thread and for callbacks: something changed.
    pub(super) changed: Condvar,
    /// For readers: entries, a session, an error.
    pub(super) news: Notify,
}

pub(super) struct State {
    pub(super) session: Option<Session>,
    /// Where parts begin that the group has never committed.
    begin: Begin,
    /// Why there is no session; whoever opens hears it once, and then it is tried again.
    failed: Option<LogError>,
    rejoin: bool,
    pub(super) stopped: bool,
    trouble: Option<String>,
}

/// What librdkafka calls, from the thread that polls.
pub(super) struct Callbacks(Arc<Shared>);

impl ClientContext for Callbacks {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(group = %self.0.group, %error, reason, "Kafka consumer");
        self.0.listener.hear(&error, reason);
    }
}

impl ConsumerContext for Callbacks {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, error: RDKafkaRespErr, parts: &mut TopicPartitionList) {
        if error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
            if let Err(error) = self.0.assigned(consumer, parts) {
                let act = format!("find out where group {} is in topic {}", self.0.group, self.0.topic);
                self.0.fail(storage(act, &error));
                // The group has to hear that we take part, if with nothing.
                let _ = consumer.assign(&TopicPartitionList::new());
            }
        } else {
            self.0.revoked(consumer);
            if let Err(error) = consumer.unassign() {
                tracing::warn!(group = %self.0.group, %error, "parts could not be given back");
            }
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result
            && error.rdkafka_error_code() != Some(RDKafkaErrorCode::NoOffset)
        {
            // It goes with the next one; what is not committed comes again.
            tracing::debug!(group = %self.0.group, %error, "a commit failed");
            if let Some(session) = &mut self.0.state.lock().session {
                session.committed = Reach::none();
            }
        }
    }
}

pub(super) fn storage(act: String, error: &KafkaError) -> LogError {
    LogError::Storage { act: act.into(), cause: explain(error).into() }
}

impl Shared {
    /// Parts are ours: where do they go on?
    fn assigned(&self, consumer: &BaseConsumer<Callbacks>, parts: &TopicPartitionList) -> KafkaResult<()> {
        let begin = self.state.lock().begin.clone();
        let committed = consumer.committed_offsets(parts.clone(), METADATA_TIMEOUT)?;
        let mut cursor = Reach::none();
        let mut fresh = Vec::new();
        for part in committed.elements() {
            let partition = part.partition();
            let next = match part.offset() {
                Offset::Offset(next) => next,
                _ => {
                    fresh.push(u16::try_from(partition).unwrap_or(u16::MAX));
                    first_offset(consumer, &self.topic, partition, &begin)?
                }
            };
            let place = u64::try_from(next).unwrap_or(0);
            cursor.advance(Position::in_part(u16::try_from(partition).unwrap_or(u16::MAX), place));
        }
        let parts: Vec<u16> = cursor.iter().map(Position::part).collect();
        consumer.assign(&list(&self.topic, &cursor, &parts))?;
        let mut state = self.state.lock();
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::info!(group = %self.group, partitions = ?parts, "partitions assigned");
        state.trouble = None;
        self.listener.clear();
        let mut session = Session::new(generation, parts, cursor);
        session.pause = offsets::pause(&committed);
        session.fresh = fresh;
        state.session = Some(session);
        drop(state);
        self.tell();
        Ok(())
    }

    /// Parts go to others: what is under way may end, its progress is committed, then they are let go.
    fn revoked(&self, consumer: &BaseConsumer<Callbacks>) {
        let mut state = self.state.lock();
        let Some(session) = &state.session else { return };
        session.moved.cancel();
        let deadline = Instant::now() + LEAVE;
        let held = |state: &State| state.session.as_ref().is_some_and(|session| session.taken);
        while held(&state) && !self.changed.wait_until(&mut state, deadline).timed_out() {}
        if held(&state) {
            tracing::warn!(group = %self.group, "what was under way did not end in time; it is sent again by who has the partitions now");
        }
        // Taken out under the lock that progress takes, so nothing is committed past this.
        let session = state.session.take();
        drop(state);
        // Of a membership that was lost others may have gone on already.
        if let Some(mut session) = session.filter(|_| !consumer.assignment_lost())
            && (session.frontier != session.committed || !session.told.is_empty())
        {
            let done = consumer.commit(&session.progress_in(&self.topic), CommitMode::Sync);
            if let Err(error) = &done {
                tracing::warn!(group = %self.group, %error, "the last progress could not be committed; it is made again");
            }
            self.answer(std::mem::take(&mut session.told), &done);
        }
        self.tell();
    }

    /// Who waits until something is stored hears what became of it.
    fn answer(&self, told: Vec<Told>, done: &KafkaResult<()>) {
        for told in told {
            let failed = |error: &KafkaError| storage(format!("store the offsets of group {}", self.group), error);
            // Nobody waits any more if the branch has ended.
            let _ = told.send(done.as_ref().copied().map_err(failed));
        }
    }

    fn fail(&self, error: LogError) {
        let mut state = self.state.lock();
        state.failed = Some(error);
        if let Some(session) = &state.session {
            session.moved.cancel();
        }
        drop(state);
        self.tell();
    }

    pub(super) fn tell(&self) {
        self.changed.notify_all();
        self.news.notify_waiters();
    }

    /// The thread: polls until it is stopped.
    fn run(self: &Arc<Self>, consumer: &BaseConsumer<Callbacks>) {
        let (mut paused, mut full_since) = (false, None);
        let mut resting = Resting::default();
        let mut committed = Instant::now();
        loop {
            let mut state = self.state.lock();
            if state.stopped {
                drop(state);
                self.revoked(consumer);
                consumer.unsubscribe();
                return;
            }
            if std::mem::take(&mut state.rejoin) {
                drop(state);
                self.revoked(consumer);
                consumer.unsubscribe();
                if let Err(error) = consumer.subscribe(&[&self.topic]) {
                    self.fail(storage(format!("subscribe to {}", self.topic), &error));
                }
                continue;
            }
            let wanted = self.upkeep(&mut state, &mut committed);
            let full =
                state.session.as_ref().is_some_and(|session| session.is_full() || (paused && session.is_half_full()));
            drop(state);
            match wanted {
                Some(Upkeep::Rewind(from)) => {
                    paused = false;
                    resting.forget();
                    if let Err(error) = consumer.assign(&from) {
                        self.fail(storage(format!("go back in topic {}", self.topic), &error));
                    }
                }
                Some(Upkeep::Store(progress, told)) => {
                    self.answer(told, &consumer.commit(&progress, CommitMode::Sync));
                }
                Some(Upkeep::Commit(progress)) => {
                    if let Err(error) = consumer.commit(&progress, CommitMode::Async) {
                        tracing::debug!(group = %self.group, %error, "a commit could not be sent");
                    }
                }
                None => {}
            }
            if !full {
                full_since = None;
            } else if full_since.get_or_insert_with(Instant::now).elapsed() < PATIENCE {
                self.wait_for_room();
                continue;
            }
            if full != paused
                && let Ok(assignment) = consumer.assignment()
            {
                let done = if full { consumer.pause(&assignment) } else { consumer.resume(&assignment) };
                paused = if done.is_ok() { full } else { paused };
                resting.forget();
            }
            let wanted =
                self.state.lock().session.as_ref().map(|session| (session.generation, session.resting.clone()));
            if let Some((generation, wanted)) = wanted.filter(|_| !paused) {
                resting.keep(consumer, &self.topic, generation, wanted);
            }
            self.poll(consumer);
        }
    }

    /// Waits until readers have taken something, or for what else changes, with a bound.
    fn wait_for_room(&self) {
        let mut state = self.state.lock();
        let asked = state.stopped || state.rejoin;
        if !asked && state.session.as_ref().is_some_and(|session| session.is_full() && !session.rewind) {
            self.changed.wait_for(&mut state, POLL);
        }
    }

    /// Waits for a message and takes what else is there with it.
    fn poll(&self, consumer: &BaseConsumer<Callbacks>) {
        let mut generation = self.generation.load(Ordering::Relaxed);
        let (mut arrived, mut bytes, mut wait) = (Vec::new(), 0, POLL);
        let mut error = None;
        while arrived.len() < TURN.0 && bytes < TURN.1 {
            match consumer.poll(wait) {
                None => break,
                Some(Ok(message)) => {
                    // What came before parts were given anew comes again from where those begin.
                    let now = self.generation.load(Ordering::Relaxed);
                    if std::mem::replace(&mut generation, now) != now {
                        arrived.clear();
                    }
                    let record = message::record(&message, self.number);
                    bytes += record.weight();
                    arrived.push((message::position(message.partition(), message.offset()), record));
                }
                Some(Err(refused)) => {
                    error = Some(refused);
                    break;
                }
            }
            wait = Duration::ZERO;
        }
        self.arrived(generation, arrived);
        if let Some(error) = error {
            self.refused(consumer, &error);
        }
    }

    /// What the thread has to do before it polls.
    fn upkeep(&self, state: &mut MutexGuard<'_, State>, committed: &mut Instant) -> Option<Upkeep> {
        let session = state.session.as_mut()?;
        if std::mem::take(&mut session.rewind) {
            return Some(Upkeep::Rewind(list(&self.topic, &session.frontier, &session.parts)));
        }
        if !session.told.is_empty() {
            let told = std::mem::take(&mut session.told);
            return Some(Upkeep::Store(session.progress_in(&self.topic), told));
        }
        if session.frontier != session.committed && committed.elapsed() >= COMMIT {
            *committed = Instant::now();
            session.committed = session.frontier.clone();
            return Some(Upkeep::Commit(session.progress_in(&self.topic)));
        }
        None
    }

    /// Puts what came into the queue of its session, if that is still the one of `generation`: a poll may take parts away
    /// and give them anew, and those begin at what is committed.
    fn arrived(&self, generation: u64, arrived: Vec<(Position, Record)>) {
        if arrived.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        let Some(session) = state.session.as_mut().filter(|session| session.generation == generation) else { return };
        // What was fetched before the thread went back is not taken twice.
        if session.rewind {
            return;
        }
        session.push(arrived);
        drop(state);
        self.news.notify_waiters();
    }

    /// The client says that something is wrong.
    fn refused(&self, consumer: &BaseConsumer<Callbacks>, error: &KafkaError) {
        let code = error.rdkafka_error_code();
        match code {
            Some(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange) => {
                self.fail(LogError::Damaged(self.out_of_range(consumer).into()));
            }
            Some(
                RDKafkaErrorCode::UnknownTopicOrPartition
                | RDKafkaErrorCode::UnknownTopic
                | RDKafkaErrorCode::TopicAuthorizationFailed
                | RDKafkaErrorCode::GroupAuthorizationFailed
                | RDKafkaErrorCode::PollExceeded,
            ) => self.fail(storage(format!("read topic {} as group {}", self.topic, self.group), error)),
            _ => {
                tracing::debug!(group = %self.group, %error, "Kafka consumer");
                self.state.lock().trouble = Some(explain(error));
            }
        }
    }

    fn out_of_range(&self, consumer: &BaseConsumer<Callbacks>) -> String {
        let frontier = self.state.lock().session.as_ref().map(|session| session.frontier.clone()).unwrap_or_default();
        let mut wrong = Vec::new();
        for position in frontier.iter() {
            let (partition, next) = message::next_offset(position);
            if let Ok((low, high)) = consumer.fetch_watermarks(&self.topic, partition, METADATA_TIMEOUT)
                && !(low..=high).contains(&next)
            {
                wrong.push(format!("partition {partition}: {next} is next, {low} to {high} are kept"));
            }
        }
        format!(
            "the offset of group {} is out of the range that topic {} keeps ({}): records were removed before they were \
             delivered. Nothing is skipped by itself: choose where to go on with `kafka-consumer-groups --group {} --topic {} \
             --reset-offsets --to-earliest --execute`; the branch goes on by itself then",
            self.group,
            self.topic,
            wrong.join("; "),
            self.group,
            self.topic
        )
    }
}

enum Upkeep {
    Rewind(TopicPartitionList),
    Commit(TopicPartitionList),
    Store(TopicPartitionList, Vec<Told>),
}

impl Member {
    /// Joins the group. Connects when it can.
    pub(super) fn join(
        cluster: &Cluster,
        topic: &str,
        group: &str,
        number: u32,
        begin: Begin,
    ) -> Result<Self, LogError> {
        let mut config = cluster.config();
        config.set("group.id", group);
        config.set("enable.auto.commit", "false").set("enable.auto.offset.store", "false");
        // A stale offset is an alarm, never a silent jump.
        config.set("auto.offset.reset", "error");
        config.set("session.timeout.ms", "10000").set("heartbeat.interval.ms", "1000");
        config.set("max.poll.interval.ms", "300000");
        config.set("partition.assignment.strategy", "range");
        config.set("queued.max.messages.kbytes", "2048").set("fetch.message.max.bytes", "1048576");
        config.set("fetch.wait.max.ms", "500").set("fetch.error.backoff.ms", "200");
        // What is held is little on purpose: at the default of a second, a full queue once emptied would stay empty that long.
        config.set("fetch.queue.backoff.ms", "5");
        config.set("isolation.level", "read_committed");
        let shared = Arc::new(Shared {
            topic: topic.to_owned(),
            group: group.to_owned(),
            number,
            listener: Listener::new(cluster),
            generation: AtomicU64::new(0),
            state: Mutex::new(State {
                session: None,
                begin,
                failed: None,
                rejoin: false,
                stopped: false,
                trouble: None,
            }),
            changed: Condvar::new(),
            news: Notify::new(),
        });
        let failed = |error: KafkaError| storage(format!("join group {group}"), &error);
        let consumer =
            BaseConsumer::from_config_and_context(&config, Callbacks(Arc::clone(&shared))).map_err(failed)?;
        consumer.subscribe(&[topic]).map_err(failed)?;
        let running = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("kafka-branch".to_owned())
            .stack_size(512 << 10)
            .spawn(move || running.run(&consumer))
            .map_err(|error| LogError::Storage { act: "start a thread".into(), cause: error.to_string().into() })?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Takes the parts that are ours; waits for them.
    pub(super) async fn open(&self, begin: Begin) -> Result<Opened, LogError> {
        let deadline = tokio::time::Instant::now() + JOIN;
        loop {
            let news = self.shared.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            {
                let mut state = self.shared.state.lock();
                if state.stopped {
                    return Err(LogError::Closed("the group was left".into()));
                }
                state.begin = begin.clone();
                if let Some(failed) = state.failed.take() {
                    state.rejoin = true;
                    return Err(failed);
                }
                if let Some(session) =
                    state.session.as_mut().filter(|session| !session.taken && !session.moved.is_cancelled())
                {
                    session.taken = true;
                    if std::mem::replace(&mut session.used, true) {
                        session.clear();
                        session.rewind = true;
                    }
                    return Ok(Opened {
                        cursor: session.frontier.clone(),
                        given: None,
                        parts: Some(session.parts.clone()),
                        fresh: session.fresh.clone(),
                        pause: session.pause.clone(),
                        subscription: Box::new(Parts {
                            shared: Arc::clone(&self.shared),
                            generation: session.generation,
                        }),
                        moved: session.moved.clone(),
                    });
                }
            }
            if tokio::time::timeout_at(deadline, news).await.is_err() {
                let cause = self.trouble().unwrap_or_else(|| "the group gave no answer".to_owned());
                let act = format!("join group {} of topic {}", self.shared.group, self.shared.topic);
                return Err(LogError::Storage { act: act.into(), cause: cause.into() });
            }
        }
    }

    pub(super) fn progress(&self, frontier: &Reach) {
        let mut state = self.shared.state.lock();
        let Some(session) = &mut state.session else { return };
        session.progress(frontier);
    }

    /// Keeps a pause, or its end, beside the offsets of the parts that are ours; done when the group has it.
    pub(super) async fn pause(&self, pause: Option<StoredPause>) -> Result<(), LogError> {
        self.store(|session| session.pause = pause).await
    }

    /// Parts that the group does not know begin; done when it knows them.
    pub(super) async fn begun(&self) -> Result<(), LogError> {
        self.store(|session| session.fresh.clear()).await
    }

    async fn store(&self, change: impl FnOnce(&mut Session) + Send) -> Result<(), LogError> {
        let failed = |cause: &str| LogError::Storage {
            act: format!("store the offsets of group {}", self.shared.group).into(),
            cause: cause.into(),
        };
        let (told, wait) = oneshot::channel();
        {
            let mut state = self.shared.state.lock();
            let session = state.session.as_mut().filter(|session| !session.parts.is_empty());
            let session = session.ok_or_else(|| failed("no partition of the topic is read here now"))?;
            change(session);
            session.told.push(told);
        }
        self.shared.tell();
        wait.await.unwrap_or_else(|_| Err(failed("the partitions were taken away")))
    }

    /// How far the parts are that are ours, the time of the oldest record that was read and has no end, and what a record of
    /// late weighs.
    pub(super) fn standing(&self) -> (Reach, Option<Timestamp>, u64) {
        let state = self.shared.state.lock();
        state.session.as_ref().map_or((Reach::none(), None, 0), |session| {
            (session.frontier.clone(), session.oldest(), session.usual_weight)
        })
    }

    pub(super) fn trouble(&self) -> Option<String> {
        let heard = self.shared.listener.trouble().map(|heard| heard.to_string());
        heard.or_else(|| self.shared.state.lock().trouble.clone())
    }

    /// Whether another client may not have what is wrong with this one.
    pub(super) fn is_about_files(&self) -> bool {
        self.shared.listener.is_about_files()
    }

    /// Commits and leaves. Blocks, with a bound.
    pub(super) fn leave(&self) {
        {
            let mut state = self.shared.state.lock();
            state.stopped = true;
        }
        self.shared.tell();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            // A thread that panicked has left too.
            let _ = thread.join();
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.shared.state.lock().stopped = true;
        self.shared.tell();
    }
}
