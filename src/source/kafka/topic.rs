//! The topic: is it there, how is it kept, where does it end, and how far have groups come.
//!
//! All calls here block; they run on threads for that.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::clock::Timestamp;
use crate::connection::kafka::{Cluster, Listener, METADATA_TIMEOUT, Shared, explain};
use crate::connection::probe::Probed;
use crate::source::foreign::broker::Begin;

/// How long a client may take to say why a call failed.
const WORDS: Duration = Duration::from_millis(500);

/// What is known of a topic.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TopicFacts {
    pub(super) partitions: Vec<i32>,
    pub(super) replicas: usize,
    pub(super) settings: BTreeMap<String, String>,
}

impl TopicFacts {
    fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str)
    }

    /// What is weak about it: each is a way to lose records.
    pub(super) fn weaknesses(&self) -> Vec<String> {
        let mut weak = Vec::new();
        if self.replicas < 3 {
            weak.push(format!("it has {} replica(s): 3 survive the loss of a broker", self.replicas));
        }
        let in_sync = self.setting("min.insync.replicas").and_then(|text| text.parse::<usize>().ok());
        if in_sync.is_some_and(|least| least < 2) {
            weak.push(
                "min.insync.replicas is 1: a record may be confirmed by one broker alone; set it to 2".to_owned(),
            );
        }
        if self.setting("unclean.leader.election.enable") == Some("true") {
            weak.push(
                "unclean.leader.election.enable is true: confirmed records may be lost at an election".to_owned(),
            );
        }
        if self.setting("cleanup.policy").is_some_and(|policy| policy.contains("compact")) {
            weak.push("cleanup.policy compacts: older records of a key vanish before they are delivered".to_owned());
        }
        weak
    }

    pub(super) fn note(&self) -> String {
        let in_sync = self.setting("min.insync.replicas").unwrap_or("?");
        format!("{} partition(s), {} replica(s), min.insync.replicas {in_sync}", self.partitions.len(), self.replicas)
    }
}

/// A client that reads what it is asked for.
pub(super) type Observer = BaseConsumer<Listener>;

static OBSERVERS: Shared<Cluster, Observer> = Shared::new();

/// A client of the cluster that reads what it is asked for and is in no group.
pub(super) fn observer(cluster: &Cluster) -> Result<Arc<Observer>, KafkaError> {
    OBSERVERS.get(cluster.clone(), || observer_of(cluster, &reader(cluster)))
}

pub(super) fn observer_of(cluster: &Cluster, config: &ClientConfig) -> Result<Observer, KafkaError> {
    Observer::from_config_and_context(config, Listener::new(cluster))
}

/// As a client of its own that has group `group`.
fn member(cluster: &Cluster, group: &str) -> Result<Observer, KafkaError> {
    observer_of(cluster, reader(cluster).set("group.id", group))
}

/// What a call's error means, with what the client has to say of its connections. Blocks, with a bound.
pub(super) fn told(client: &Observer, error: &KafkaError) -> String {
    let listener = client.client().context();
    // What it says of them it says where messages are read, its lines for the log first, one with each call.
    let deadline = Instant::now() + WORDS;
    while listener.trouble().is_none() && Instant::now() < deadline {
        client.poll(Duration::from_millis(10));
    }
    if listener.is_about_files() {
        listener.ask();
    }
    listener.explain(error)
}

pub(super) fn reader(cluster: &Cluster) -> ClientConfig {
    let mut config = cluster.config();
    config.set("group.id", "walflow-observer").set("enable.auto.commit", "false");
    config.set("auto.offset.reset", "error").set("queued.max.messages.kbytes", "2048");
    config.set("isolation.level", "read_committed");
    config
}

/// The topic's partitions and replicas; `None` = there is no such topic.
pub(super) fn look(client: &Observer, topic: &str) -> Result<Option<TopicFacts>, KafkaError> {
    let metadata = client.fetch_metadata(Some(topic), METADATA_TIMEOUT)?;
    let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else { return Ok(None) };
    match found.error().map(RDKafkaErrorCode::from) {
        Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => return Ok(None),
        Some(error) => return Err(KafkaError::MetadataFetch(error)),
        None => {}
    }
    if found.partitions().is_empty() {
        return Ok(None);
    }
    let replicas = found.partitions().iter().map(|partition| partition.replicas().len()).min().unwrap_or(0);
    let mut partitions: Vec<i32> = found.partitions().iter().map(rdkafka::metadata::MetadataPartition::id).collect();
    partitions.sort_unstable();
    Ok(Some(TopicFacts { partitions, replicas, settings: BTreeMap::new() }))
}

fn admin(cluster: &Cluster) -> Result<AdminClient<DefaultClientContext>, KafkaError> {
    cluster.config().create()
}

/// The topic's own settings; empty where we may not ask.
pub(super) async fn settings(cluster: &Cluster, topic: &str) -> BTreeMap<String, String> {
    let ask = async {
        let admin = admin(cluster)?;
        let options = AdminOptions::new().request_timeout(Some(METADATA_TIMEOUT));
        admin.describe_configs(&[ResourceSpecifier::Topic(topic)], &options).await
    };
    let answers = match ask.await {
        Ok(answers) => answers,
        Err(error) => {
            tracing::debug!(topic, %error, "the topic's settings could not be read");
            return BTreeMap::new();
        }
    };
    let entries = answers.into_iter().flatten().flat_map(|resource| resource.entries);
    entries.filter_map(|entry| Some((entry.name, entry.value?))).collect()
}

/// Makes the topic; one that is there already is fine.
pub(super) async fn create(
    cluster: &Cluster,
    topic: &str,
    partitions: i32,
    replicas: i32,
    settings: &[(&str, &str)],
) -> Result<(), KafkaError> {
    let admin = admin(cluster)?;
    let mut wanted = NewTopic::new(topic, partitions, TopicReplication::Fixed(replicas));
    for (name, value) in settings {
        wanted = wanted.set(name, value);
    }
    let options = AdminOptions::new().request_timeout(Some(METADATA_TIMEOUT));
    for made in admin.create_topics(&[wanted], &options).await? {
        match made {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((_, error)) => return Err(KafkaError::AdminOp(error)),
        }
    }
    Ok(())
}

/// Removes a consumer group; one that is not there is fine.
pub(super) async fn delete_group(cluster: &Cluster, group: &str) -> Result<(), KafkaError> {
    let admin = admin(cluster)?;
    let options = AdminOptions::new().request_timeout(Some(METADATA_TIMEOUT));
    for gone in admin.delete_groups(&[group], &options).await? {
        match gone {
            Ok(_) | Err((_, RDKafkaErrorCode::GroupIdNotFound)) => {}
            Err((_, error)) => return Err(KafkaError::AdminOp(error)),
        }
    }
    Ok(())
}

/// How many brokers the cluster has.
pub(super) fn brokers(client: &Observer) -> Result<usize, KafkaError> {
    Ok(client.fetch_metadata(None, METADATA_TIMEOUT)?.brokers().len())
}

/// The offset after the last record of each partition, in one request for each leader.
pub(super) fn ends(client: &Observer, topic: &str, partitions: &[i32]) -> Result<Vec<(i32, i64)>, KafkaError> {
    let mut wanted = TopicPartitionList::new();
    for partition in partitions {
        wanted.add_partition_offset(topic, *partition, Offset::End)?;
    }
    let found = client.offsets_for_times(wanted, METADATA_TIMEOUT)?;
    let mut ends = Vec::with_capacity(partitions.len());
    for part in found.elements() {
        part.error()?;
        let end = match part.offset() {
            Offset::Offset(end) => end,
            _ => client.fetch_watermarks(topic, part.partition(), METADATA_TIMEOUT)?.1,
        };
        ends.push((part.partition(), end));
    }
    Ok(ends)
}

/// A place as text: `partition:offset`, with commas.
pub(super) fn place_of(ends: &[(i32, i64)]) -> String {
    ends.iter().map(|(partition, end)| format!("{partition}:{end}")).collect::<Vec<_>>().join(",")
}

/// The offsets of a place.
pub(super) fn offsets_of(place: &str) -> BTreeMap<i32, i64> {
    let pair = |text: &str| {
        let (partition, offset) = text.split_once(':')?;
        Some((partition.parse().ok()?, offset.parse().ok()?))
    };
    place.split(',').filter_map(pair).collect()
}

/// The next offset of a partition for a group that has committed none.
pub(super) fn first_offset<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    topic: &str,
    partition: i32,
    begin: &Begin,
) -> Result<i64, KafkaError> {
    let (low, high) = client.fetch_watermarks(topic, partition, METADATA_TIMEOUT)?;
    Ok(match begin {
        Begin::Earliest => low,
        Begin::Latest => high,
        // A partition that is newer than the place is read from its beginning.
        Begin::Place(place) => offsets_of(place).get(&partition).map_or(low, |next| (*next).clamp(low, high)),
        Begin::Time(time) => first_since(client, topic, partition, *time)?.map_or(high, |next| next.max(low)),
    })
}

/// The offset of the first record of a partition that is as late as `time`; `None` = there is none.
pub(super) fn first_since<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    topic: &str,
    partition: i32,
    time: Timestamp,
) -> Result<Option<i64>, KafkaError> {
    let mut wanted = TopicPartitionList::new();
    wanted.add_partition_offset(topic, partition, Offset::Offset(time.as_millis()))?;
    let found = client.offsets_for_times(wanted, METADATA_TIMEOUT)?;
    let Some(part) = found.elements().into_iter().next() else { return Ok(None) };
    part.error()?;
    Ok(match part.offset() {
        Offset::Offset(next) => Some(next),
        _ => None,
    })
}

/// Commits where a group begins, for the partitions where it has committed nothing.
pub(super) fn begin(
    cluster: &Cluster,
    topic: &str,
    partitions: &[i32],
    group: &str,
    begin: &Begin,
) -> Result<(), KafkaError> {
    let client = member(cluster, group)?;
    let mut wanted = TopicPartitionList::new();
    for partition in partitions {
        wanted.add_partition(topic, *partition);
    }
    let mut fresh = TopicPartitionList::new();
    for part in client.committed_offsets(wanted, METADATA_TIMEOUT)?.elements() {
        if !matches!(part.offset(), Offset::Offset(_)) {
            let next = first_offset(&client, topic, part.partition(), begin)?;
            fresh.add_partition_offset(topic, part.partition(), Offset::Offset(next))?;
        }
    }
    if fresh.count() == 0 {
        return Ok(());
    }
    match client.commit(&fresh, CommitMode::Sync) {
        // Somebody is in the group: it commits where it begins by itself.
        Err(error)
            if matches!(
                error.rdkafka_error_code(),
                Some(
                    RDKafkaErrorCode::UnknownMemberId
                        | RDKafkaErrorCode::IllegalGeneration
                        | RDKafkaErrorCode::RebalanceInProgress
                )
            ) =>
        {
            Ok(())
        }
        done => done,
    }
}

/// What stands against reading as these groups: rights, and offsets that the topic no longer keeps.
pub(super) fn group_faults(cluster: &Cluster, topic: &str, partitions: &[i32], groups: &[String]) -> Vec<Probed> {
    let mut wrong = Vec::new();
    for group in groups {
        let look = || -> Result<Vec<String>, KafkaError> {
            let client = member(cluster, group)?;
            let mut wanted = TopicPartitionList::new();
            for partition in partitions {
                wanted.add_partition(topic, *partition);
            }
            let mut stale = Vec::new();
            for part in client.committed_offsets(wanted, METADATA_TIMEOUT)?.elements() {
                part.error()?;
                let Offset::Offset(next) = part.offset() else { continue };
                let (low, high) = client.fetch_watermarks(topic, part.partition(), METADATA_TIMEOUT)?;
                if !(low..=high).contains(&next) {
                    stale.push(format!("partition {}: {next} is next, {low} to {high} are kept", part.partition()));
                }
            }
            Ok(stale)
        };
        let what = format!("consumer group {group}");
        match look() {
            Err(error) => wrong.push(Probed::wrong(what, explain(&error))),
            Ok(stale) if !stale.is_empty() => {
                let why =
                    format!("its offset is out of range ({}): reset it with kafka-consumer-groups", stale.join("; "));
                wrong.push(Probed::wrong(what, why));
            }
            Ok(_) => {}
        }
    }
    wrong
}

/// Gives a group the committed offsets of another one, with what stands beside them.
pub(super) fn copy_offsets(
    cluster: &Cluster,
    topic: &str,
    partitions: &[i32],
    from: &str,
    to: &str,
) -> Result<(), KafkaError> {
    let mut wanted = TopicPartitionList::new();
    for partition in partitions {
        wanted.add_partition(topic, *partition);
    }
    let committed = member(cluster, from)?.committed_offsets(wanted, METADATA_TIMEOUT)?;
    let mut known = TopicPartitionList::new();
    for part in committed.elements() {
        if let Offset::Offset(_) = part.offset() {
            let mut same = known.add_partition(topic, part.partition());
            same.set_offset(part.offset())?;
            same.set_metadata(part.metadata());
        }
    }
    if known.count() == 0 {
        return Ok(());
    }
    member(cluster, to)?.commit(&known, CommitMode::Sync)
}

/// The offset that a group reads next in a partition; `None` = it has committed none.
pub(super) fn committed(
    cluster: &Cluster,
    topic: &str,
    partition: i32,
    group: &str,
) -> Result<Option<i64>, KafkaError> {
    let mut wanted = TopicPartitionList::new();
    wanted.add_partition(topic, partition);
    let found = member(cluster, group)?.committed_offsets(wanted, METADATA_TIMEOUT)?;
    let Some(part) = found.elements().into_iter().next() else { return Ok(None) };
    part.error()?;
    Ok(match part.offset() {
        Offset::Offset(next) => Some(next),
        _ => None,
    })
}

/// Deletes a topic; waits until its group knows nothing of it any more.
#[cfg(test)]
pub(super) async fn delete_for_tests(cluster: &Cluster, topic: &str, group: &str) {
    let options = AdminOptions::new().operation_timeout(Some(METADATA_TIMEOUT));
    admin(cluster).unwrap().delete_topics(&[topic], &options).await.unwrap().remove(0).unwrap();
    let client = member(cluster, group).unwrap();
    let mut wanted = TopicPartitionList::new();
    wanted.add_partition(topic, 0);
    let deadline = Instant::now() + METADATA_TIMEOUT;
    while let Ok(committed) = client.committed_offsets(wanted.clone(), METADATA_TIMEOUT)
        && matches!(committed.elements()[0].offset(), Offset::Offset(_))
    {
        assert!(Instant::now() < deadline, "the group keeps its offset");
    }
}
