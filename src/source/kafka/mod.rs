//! `kafka`: the log is a topic, a branch a consumer group, the order of a key that of its partition.
//!
//! Durable means: the leader and every replica in sync have it (acks=all), and the delivery report says so. Brokers do not
//! sync their disks for it: what every replica loses at one moment is lost.

mod consumer;
mod message;
mod offsets;
mod parts;
mod producer;
mod resting;
mod search;
mod session;
mod spec;
#[cfg(test)]
mod tests;
mod topic;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, ready};
use parking_lot::Mutex;
use rdkafka::error::KafkaError;
use tokio_util::sync::CancellationToken;

use self::consumer::{Member, storage};
use self::producer::Producer;
use self::search::Searched;
pub use self::spec::{KafkaSourceSpec, KafkaStart, TopicsSpec, check, probe};
use self::topic::TopicFacts;
use super::foreign::broker::{self, Begin, Broker, BrokerCaps, Handed, Opened};
use super::foreign::open::Context;
use super::{AdmitError, BranchName, DeadLetter, Lag, LogError, Reach, StoredPause};
use crate::connection::kafka::{Cluster, explain};
use crate::record::{Position, Record, RecordId};

/// How often the ends of a topic are looked at: while something moves, and while nothing does.
const LOOK: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));
/// How long a write or a branch waits for the topic to be found or made.
const READY: Duration = Duration::from_secs(15);

/// Opens a namespace on a topic. Touches no network: the topic is looked for, and made, in the background.
///
/// # Errors
/// When the client cannot be made of these settings (a file of `tls` that cannot be read, for example).
pub fn open(spec: &KafkaSourceSpec, context: &Context) -> Result<Arc<dyn Broker>, LogError> {
    let cluster = spec.cluster();
    let failed = |error: KafkaError| storage(format!("make a client for Kafka at {}", cluster.shown()), &error);
    let producer = Producer::of(&cluster).map_err(failed)?;
    let kafka = Arc::new_cyclic(|this: &Weak<Kafka>| Kafka {
        this: this.clone(),
        cluster: cluster.clone(),
        producer,
        context: context.clone(),
        branches: Mutex::default(),
        ends: Mutex::default(),
        activity: AtomicU64::new(0),
        topic: tokio::sync::watch::Sender::new(TopicState::Unknown(None)),
        closed: CancellationToken::new(),
        entering: tokio::sync::Mutex::default(),
        spec: spec.clone(),
    });
    tokio::spawn(watch(Arc::downgrade(&kafka), kafka.closed.clone()));
    Ok(kafka)
}

#[derive(Clone, Debug)]
enum TopicState {
    /// Not found yet; why, if that is known.
    Unknown(Option<Arc<str>>),
    Ready(Arc<TopicFacts>),
}

struct Kafka {
    this: Weak<Self>,
    spec: KafkaSourceSpec,
    cluster: Cluster,
    producer: Arc<Producer>,
    context: Context,
    branches: Mutex<BTreeMap<BranchName, Arc<Member>>>,
    /// The newest position of each partition, as it was at the last look.
    ends: Mutex<Reach>,
    /// Counts what moves, so that nobody looks at a topic where nothing does.
    activity: AtomicU64,
    topic: tokio::sync::watch::Sender<TopicState>,
    closed: CancellationToken,
    /// Records of one call get their places before those of the next.
    entering: tokio::sync::Mutex<()>,
}

/// Runs a call that blocks.
async fn blocking<T: Send + 'static>(
    act: impl FnOnce() -> String,
    call: impl FnOnce() -> Result<T, KafkaError> + Send + 'static,
) -> Result<T, LogError> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result.map_err(|error| storage(act(), &error)),
        Err(error) => Err(LogError::Storage { act: act().into(), cause: error.to_string().into() }),
    }
}

/// Finds or makes the topic, then looks where it ends, as long as the namespace is open.
async fn watch(kafka: Weak<Kafka>, closed: CancellationToken) {
    let (mut wait, mut seen) = (LOOK.0, 0);
    loop {
        let Some(strong) = kafka.upgrade() else { return };
        let ready = matches!(*strong.topic.borrow(), TopicState::Ready(_));
        if ready {
            let now = strong.activity.load(Ordering::Relaxed);
            wait = if now == std::mem::replace(&mut seen, now) { (wait * 2).min(LOOK.1) } else { LOOK.0 };
            if let Err(error) = strong.look().await {
                tracing::debug!(topic = %strong.spec.topic, %error, "where the topic ends could not be asked");
            }
        } else if let Err(error) = strong.prepare().await {
            let known = matches!(&*strong.topic.borrow(), TopicState::Unknown(Some(known)) if **known == *error);
            if !known {
                tracing::warn!(ns = %strong.context.namespace, topic = %strong.spec.topic, error, "the topic cannot be used, trying again");
            }
            strong.topic.send_replace(TopicState::Unknown(Some(error.into())));
            wait = LOOK.0;
        } else {
            continue;
        }
        drop(strong);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = closed.cancelled() => return,
        }
    }
}

impl Kafka {
    /// Finds the topic, or makes it, and looks at its settings.
    async fn prepare(&self) -> Result<(), String> {
        let topic = self.spec.topic.clone();
        let facts = match self.find(topic.clone()).await? {
            Some(facts) => facts,
            None if self.spec.topics.create => {
                self.create(&topic).await?;
                self.find(topic.clone()).await?.ok_or_else(|| format!("topic {topic} was made and is not there yet"))?
            }
            None => {
                let branches: Vec<String> = self.branches.lock().keys().map(ToString::to_string).collect();
                let names: Vec<&str> = branches.iter().map(String::as_str).collect();
                let commands = self.spec.commands(self.context.namespace.as_str(), &names).join("\n");
                return Err(format!(
                    "topic {topic} does not exist and topics.create is false; somebody with the rights runs:\n{commands}"
                ));
            }
        };
        let facts = TopicFacts { settings: topic::settings(&self.cluster, &topic).await, ..facts };
        let weak = facts.weaknesses();
        if !weak.is_empty() {
            let weak = weak.join("; ");
            if self.context.strict {
                return Err(format!("topic {topic} is weak, and --strict refuses that: {weak}"));
            }
            tracing::warn!(ns = %self.context.namespace, topic, weak, "what is confirmed may be lost");
        }
        tracing::info!(ns = %self.context.namespace, topic, note = facts.note(), "the topic is there");
        let partitions = facts.partitions.clone();
        self.look_at(partitions).await.map_err(|error| error.to_string())?;
        self.topic.send_replace(TopicState::Ready(Arc::new(facts)));
        Ok(())
    }

    async fn find(&self, topic: String) -> Result<Option<TopicFacts>, String> {
        let cluster = self.cluster.clone();
        let found = tokio::task::spawn_blocking(move || {
            let client = topic::observer(&cluster).map_err(|error| explain(&error))?;
            topic::look(&client, &topic).map_err(|error| topic::told(&client, &error))
        });
        found.await.map_err(|error| error.to_string())?
    }

    async fn create(&self, topic: &str) -> Result<(), String> {
        let cluster = self.cluster.clone();
        let brokers = tokio::task::spawn_blocking(move || topic::brokers(&*topic::observer(&cluster)?)).await;
        let brokers = brokers.map_err(|error| error.to_string())?.map_err(|error| explain(&error))?;
        let possible = u16::try_from(brokers).unwrap_or(3).clamp(1, 3);
        let replicas = self.spec.topics.replicas.unwrap_or(possible);
        let in_sync: &[_] = if replicas >= 3 { &[("min.insync.replicas", "2")] } else { &[] };
        let partitions = i32::from(self.spec.topics.partitions);
        topic::create(&self.cluster, topic, partitions, i32::from(replicas), in_sync)
            .await
            .map_err(|error| format!("topic {topic} could not be made: {}", explain(&error)))
    }

    /// Waits until the topic is there, with a bound.
    async fn ready(&self) -> Result<Arc<TopicFacts>, LogError> {
        let mut state = self.topic.subscribe();
        let found = tokio::time::timeout(READY, async {
            loop {
                if let TopicState::Ready(facts) = &*state.borrow_and_update() {
                    return Some(Arc::clone(facts));
                }
                state.changed().await.ok()?;
            }
        });
        if let Ok(Some(facts)) = found.await {
            return Ok(facts);
        }
        let cause = match &*self.topic.borrow() {
            TopicState::Unknown(Some(why)) => Arc::clone(why),
            _ => "no broker has answered yet".into(),
        };
        Err(LogError::Storage {
            act: format!("use Kafka topic {} at {}", self.spec.topic, self.cluster.shown()).into(),
            cause,
        })
    }

    async fn ends(&self, partitions: Vec<i32>) -> Result<Vec<(i32, i64)>, LogError> {
        let (cluster, topic) = (self.cluster.clone(), self.spec.topic.clone());
        let act = || format!("ask where topic {} ends", self.spec.topic);
        blocking(act, move || topic::ends(&*topic::observer(&cluster)?, &topic, &partitions)).await
    }

    async fn look(&self) -> Result<(), LogError> {
        let producer = Arc::clone(&self.producer);
        let _ = tokio::task::spawn_blocking(move || producer.look()).await;
        let partitions = self.ready().await?.partitions.clone();
        self.look_at(partitions).await
    }

    async fn look_at(&self, partitions: Vec<i32>) -> Result<(), LogError> {
        let ends = self.ends(partitions).await?;
        let end = |(partition, end): (i32, i64)| {
            Position::in_part(u16::try_from(partition).unwrap_or(u16::MAX), u64::try_from(end).unwrap_or(0))
        };
        let ends: Reach = ends.into_iter().map(end).collect();
        let mut known = self.ends.lock();
        // A record that was confirmed while the question was under way lies beyond the answer.
        let before = known.clone();
        known.advance_all(&ends);
        if *known != before {
            self.activity.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn member(&self, branch: &BranchName, begin: &Begin) -> Result<Arc<Member>, LogError> {
        let mut branches = self.branches.lock();
        if let Some(member) = branches.get(branch) {
            return Ok(Arc::clone(member));
        }
        let group = self.spec.group(self.context.namespace.as_str(), branch.as_str());
        let joined = Member::join(&self.cluster, &self.spec.topic, &group, self.context.number, begin.clone())?;
        let member = Arc::new(joined);
        branches.insert(branch.clone(), Arc::clone(&member));
        Ok(member)
    }

    fn opened(&self, branch: &BranchName) -> Result<Arc<Member>, LogError> {
        let member = self.branches.lock().get(branch).cloned();
        member.ok_or(LogError::Unsupported("the branch is not open here"))
    }

    async fn leave(&self, branch: &BranchName) {
        let member = self.branches.lock().remove(branch);
        if let Some(member) = member {
            // It blocks with a bound; a panic in it has left the group too.
            let _ = tokio::task::spawn_blocking(move || member.leave()).await;
        }
    }
}

impl Broker for Kafka {
    fn caps(&self) -> BrokerCaps {
        BrokerCaps {
            ordered: true,
            durable: true,
            each_end: false,
            hold: true,
            pause: true,
            delay: None,
            look_up: true,
            largest_record: None,
        }
    }

    fn durable_note(&self) -> String {
        let facts = match &*self.topic.borrow() {
            TopicState::Ready(facts) => facts.note(),
            TopicState::Unknown(_) => "not reached yet".to_owned(),
        };
        let topic = &self.spec.topic;
        format!("kafka: acknowledged by every replica in sync (acks=all), not synced to disk; topic {topic}: {facts}")
    }

    fn trouble(&self) -> Option<String> {
        if let TopicState::Unknown(Some(why)) = &*self.topic.borrow() {
            return Some(format!("kafka topic {}: {why}", self.spec.topic));
        }
        self.producer.trouble().map(|why| format!("kafka at {}: {why}", self.cluster.shown()))
    }

    fn append(&self, records: Vec<Arc<Record>>) -> BoxFuture<'static, Result<Handed, AdmitError>> {
        let Some(kafka) = self.this.upgrade() else { return ready(Err(closed())).boxed() };
        async move {
            let unavailable = |error: LogError| AdmitError::Unavailable { reason: error.to_string().into() };
            if !matches!(*kafka.topic.borrow(), TopicState::Ready(_)) {
                kafka.ready().await.map_err(unavailable)?;
            }
            if kafka.closed.is_cancelled() {
                return Err(closed());
            }
            kafka.activity.fetch_add(1, Ordering::Relaxed);
            let handed = {
                let _turn = kafka.entering.lock().await;
                kafka.producer.append(&kafka.spec.topic, records).await?
            };
            // What was confirmed is the end until the next look says more.
            let known = async move {
                let outcomes = handed.await;
                let mut ends = kafka.ends.lock();
                outcomes.iter().flatten().for_each(|position| ends.advance(*position));
                drop(ends);
                outcomes
            };
            Ok(known.boxed())
        }
        .boxed()
    }

    fn prepare(&self, branch: &BranchName, begin: Begin) -> BoxFuture<'static, Result<(), LogError>> {
        let Some(kafka) = self.this.upgrade() else {
            return ready(Err(LogError::Closed("it was dropped".into()))).boxed();
        };
        let group = self.spec.group(self.context.namespace.as_str(), branch.as_str());
        async move {
            let facts = kafka.ready().await?;
            let (cluster, topic) = (kafka.cluster.clone(), kafka.spec.topic.clone());
            let act = format!("find out where group {group} is in topic {topic}");
            blocking(|| act, move || topic::begin(&cluster, &topic, &facts.partitions, &group, &begin)).await
        }
        .boxed()
    }

    fn open(&self, branch: &BranchName, begin: Begin) -> BoxFuture<'static, Result<Opened, LogError>> {
        let Some(kafka) = self.this.upgrade() else {
            return ready(Err(LogError::Closed("it was dropped".into()))).boxed();
        };
        let branch = branch.clone();
        async move {
            kafka.ready().await?;
            let member = kafka.member(&branch, &begin)?;
            let opened = member.open(begin).await;
            // Certificates are read when a client is made: those that were put right are seen by another.
            if opened.is_err() && member.is_about_files() {
                kafka.leave(&branch).await;
            }
            opened
        }
        .boxed()
    }

    fn progress(&self, branch: &BranchName, frontier: &Reach, _: &[Position]) {
        self.activity.fetch_add(1, Ordering::Relaxed);
        if let Some(member) = self.branches.lock().get(branch) {
            member.progress(frontier);
        }
    }

    fn pause(&self, branch: &BranchName, pause: Option<StoredPause>) -> BoxFuture<'static, Result<(), LogError>> {
        let member = self.opened(branch);
        async move { member?.pause(pause).await }.boxed()
    }

    fn begun(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let member = self.opened(branch);
        async move { member?.begun().await }.boxed()
    }

    fn forget(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let Some(kafka) = self.this.upgrade() else {
            return ready(Err(LogError::Closed("it was dropped".into()))).boxed();
        };
        let branch = branch.clone();
        async move {
            kafka.leave(&branch).await;
            let group = kafka.spec.group(kafka.context.namespace.as_str(), branch.as_str());
            topic::delete_group(&kafka.cluster, &group)
                .await
                .map_err(|error| storage(format!("delete consumer group {group}"), &error))
        }
        .boxed()
    }

    fn rename(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let Some(kafka) = self.this.upgrade() else {
            return ready(Err(LogError::Closed("it was dropped".into()))).boxed();
        };
        let (from, to) = (from.clone(), to.clone());
        async move {
            kafka.leave(&from).await;
            let facts = kafka.ready().await?;
            let name = |branch: &BranchName| kafka.spec.group(kafka.context.namespace.as_str(), branch.as_str());
            let (old, new) = (name(&from), name(&to));
            let (cluster, topic) = (kafka.cluster.clone(), kafka.spec.topic.clone());
            let act = || format!("carry the offsets of group {old} over to {new}");
            let (one, other) = (old.clone(), new.clone());
            blocking(act, move || topic::copy_offsets(&cluster, &topic, &facts.partitions, &one, &other)).await?;
            topic::delete_group(&kafka.cluster, &old)
                .await
                .map_err(|error| storage(format!("delete consumer group {old}"), &error))
        }
        .boxed()
    }

    fn lag(&self, branch: &BranchName) -> Lag {
        let member = self.branches.lock().get(branch).cloned();
        let Some(member) = member else { return Lag::default() };
        let (cursor, oldest, weight) = member.standing();
        let ends = self.ends.lock();
        let behind = |from: Position| ends.of(from.part()).0.saturating_sub(from.0);
        let records: u64 = cursor.iter().map(behind).sum();
        Lag { records, bytes: records * weight, oldest, cursor }
    }

    fn part_of(&self, key: Option<&str>) -> u16 {
        let TopicState::Ready(facts) = &*self.topic.borrow() else { return 0 };
        let Some(key) = key else { return 0 };
        let count = u32::try_from(facts.partitions.len()).unwrap_or(1).max(1);
        u16::try_from((murmur2(key.as_bytes()) & 0x7FFF_FFFF) % count).unwrap_or(0)
    }

    fn end(&self) -> Reach {
        self.ends.lock().clone()
    }

    fn place(&self) -> BoxFuture<'static, Result<Arc<str>, LogError>> {
        let Some(kafka) = self.this.upgrade() else {
            return ready(Err(LogError::Closed("it was dropped".into()))).boxed();
        };
        async move {
            let partitions = kafka.ready().await?.partitions.clone();
            Ok(topic::place_of(&kafka.ends(partitions).await?).into())
        }
        .boxed()
    }

    fn find_after(
        &self,
        place: &str,
        ids: Vec<RecordId>,
    ) -> BoxFuture<'static, Result<HashMap<RecordId, Position>, LogError>> {
        let (cluster, topic, place) = (self.cluster.clone(), self.spec.topic.clone(), place.to_owned());
        let number = self.context.number;
        let act = format!("search topic {topic} for records that were under way");
        async move {
            let ids = ids.into_iter().collect();
            blocking(|| act, move || search::find_after(&cluster, &topic, &place, &ids, number)).await
        }
        .boxed()
    }

    fn locate(&self, id: RecordId) -> BoxFuture<'static, Result<Option<(Position, Arc<Record>)>, LogError>> {
        let (cluster, topic) = (self.cluster.clone(), self.spec.topic.clone());
        let number = self.context.number;
        let act = format!("look for {id} in topic {topic}");
        async move {
            match blocking(|| act, move || search::locate(&cluster, &topic, id, number)).await? {
                Searched::Found((position, record)) => Ok(Some((position, Arc::new(record)))),
                Searched::Nowhere => Ok(None),
                Searched::GaveUp => Err(LogError::Unsupported(broker::GAVE_UP)),
            }
        }
        .boxed()
    }

    fn unfinished(
        &self,
        position: Position,
        branches: Vec<BranchName>,
    ) -> BoxFuture<'static, Result<Vec<BranchName>, LogError>> {
        let mut unfinished = Vec::new();
        let mut elsewhere = Vec::new();
        for branch in branches {
            let standing = self.branches.lock().get(&branch).map(|member| member.standing().0);
            match standing.filter(|cursor| cursor.iter().any(|at| at.part() == position.part())) {
                Some(cursor) if cursor.covers(position) => {}
                Some(_) => unfinished.push(branch),
                None => {
                    let group = self.spec.group(self.context.namespace.as_str(), branch.as_str());
                    elsewhere.push((branch, group));
                }
            }
        }
        let (cluster, topic) = (self.cluster.clone(), self.spec.topic.clone());
        let act = format!("ask how far the consumer groups of topic {topic} are");
        let asking = blocking(
            || act,
            move || {
                let (partition, next) = message::next_offset(position);
                for (branch, group) in elsewhere {
                    if topic::committed(&cluster, &topic, partition, &group)?.is_none_or(|at| at < next) {
                        unfinished.push(branch);
                    }
                }
                Ok(unfinished)
            },
        );
        asking.boxed()
    }

    fn bury(&self, letters: Vec<DeadLetter>) -> BoxFuture<'static, Result<(), LogError>> {
        let Some(kafka) = self.this.upgrade() else {
            return ready(Err(LogError::Closed("it was dropped".into()))).boxed();
        };
        async move {
            let topic = kafka.spec.dead_topic();
            let failed = |why: String| LogError::Storage {
                act: format!("write dead letters to topic {topic}").into(),
                cause: why.into(),
            };
            if kafka.find(topic.clone()).await.map_err(failed)?.is_none() {
                kafka.create(&topic).await.map_err(failed)?;
            }
            let records = letters.iter().map(|letter| Arc::new(message::letter(letter))).collect();
            let handed = kafka.producer.append(&topic, records).await.map_err(|error| failed(error.to_string()))?;
            match handed.await.into_iter().find_map(Result::err) {
                None => Ok(()),
                Some(error) => Err(failed(error.to_string())),
            }
        }
        .boxed()
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.closed.cancel();
        let members: Vec<_> = std::mem::take(&mut *self.branches.lock()).into_values().collect();
        let producer = Arc::clone(&self.producer);
        async move {
            let leaving = members.into_iter().map(|member| tokio::task::spawn_blocking(move || member.leave()));
            futures::future::join_all(leaving).await;
            let _ = tokio::task::spawn_blocking(move || producer.flush()).await;
        }
        .boxed()
    }
}

/// The hash by which Kafka's own clients choose the partition of a key.
fn murmur2(bytes: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let mut hash = 0x9747_b28c ^ (bytes.len() as u32);
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        let mut k = u32::from_le_bytes(*word).wrapping_mul(M);
        k = (k ^ (k >> 24)).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ k;
    }
    if !rest.is_empty() {
        for (index, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * index);
        }
        hash = hash.wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    hash ^ (hash >> 15)
}

fn closed() -> AdmitError {
    AdmitError::Closed { reason: "the log is closing".into() }
}
