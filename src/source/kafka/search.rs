//! Looking for records in the topic: those that were under way when a process ended, and one that somebody asks for.
//!
//! All calls here block; they run on threads for that.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::{Message as _, Offset, TopicPartitionList};

use super::message;
use super::topic::{Observer, ends, first_since, look, observer_of, offsets_of, reader};
use crate::connection::kafka::{Cluster, METADATA_TIMEOUT};
use crate::record::{Position, Record, RecordId};

/// A search for one record ends after this long.
const LONGEST: Duration = Duration::from_secs(5);
/// A message may be this much older than its record's id says: clocks differ.
const SKEW: Duration = Duration::from_secs(60);

/// How a search ended.
pub(super) enum Searched<T> {
    Found(T),
    /// All of it was read.
    Nowhere,
    /// Time was up first.
    GaveUp,
}

/// Which of the records stand at or after the place, up to the end as it is now.
pub(super) fn find_after(
    cluster: &Cluster,
    topic: &str,
    place: &str,
    ids: &HashSet<RecordId>,
    number: u32,
) -> Result<HashMap<RecordId, Position>, KafkaError> {
    let client = observer_of(cluster, &reader(cluster))?;
    let from = offsets_of(place);
    let mut found = HashMap::new();
    scan(
        &client,
        topic,
        |partition| Ok(from.get(&partition).copied()),
        None,
        |message| {
            let id = message::record(message, number).id;
            if ids.contains(&id) {
                found.insert(id, message::position(message.partition(), message.offset()));
            }
            (found.len() == ids.len()).then_some(())
        },
    )?;
    Ok(found)
}

/// Where the record stands. It is looked for from the time in its id on: one that was parked stands where it was released.
pub(super) fn locate(
    cluster: &Cluster,
    topic: &str,
    id: RecordId,
    number: u32,
) -> Result<Searched<(Position, Record)>, KafkaError> {
    let mut config = reader(cluster);
    config.set("queued.max.messages.kbytes", "16384");
    let client = observer_of(cluster, &config)?;
    let since = id.time().saturating_sub(SKEW);
    let from = |partition| Ok(Some(first_since(&client, topic, partition, since)?.unwrap_or(i64::MAX)));
    scan(&client, topic, from, Some(LONGEST), |message| {
        let record = message::record(message, number);
        (record.id == id).then(|| (message::position(message.partition(), message.offset()), record))
    })
}

/// Reads every partition from where `from` says (`None` = from its beginning) up to its end as it is now, until `visit` has
/// what it wants.
fn scan<T>(
    client: &Observer,
    topic: &str,
    from: impl Fn(i32) -> Result<Option<i64>, KafkaError>,
    longest: Option<Duration>,
    mut visit: impl FnMut(&BorrowedMessage<'_>) -> Option<T>,
) -> Result<Searched<T>, KafkaError> {
    let began = Instant::now();
    let partitions = look(client, topic)?.map(|facts| facts.partitions).unwrap_or_default();
    let mut left: BTreeMap<i32, i64> = BTreeMap::new();
    let mut wanted = TopicPartitionList::new();
    for (partition, end) in ends(client, topic, &partitions)? {
        let low = client.fetch_watermarks(topic, partition, METADATA_TIMEOUT)?.0;
        let start = from(partition)?.unwrap_or(low).max(low);
        if start < end {
            wanted.add_partition_offset(topic, partition, Offset::Offset(start))?;
            left.insert(partition, end);
        }
    }
    client.assign(&wanted)?;
    let mut heard = Instant::now();
    while !left.is_empty() {
        if longest.is_some_and(|longest| began.elapsed() > longest) {
            return Ok(Searched::GaveUp);
        }
        match client.poll(Duration::from_millis(200)) {
            Some(Ok(message)) => {
                heard = Instant::now();
                if let Some(found) = visit(&message) {
                    return Ok(Searched::Found(found));
                }
                if left.get(&message.partition()).is_some_and(|end| message.offset() + 1 >= *end) {
                    left.remove(&message.partition());
                }
            }
            Some(Err(error)) => return Err(error),
            None => {
                // Markers of transactions take offsets that no record has: the position tells that the end is reached.
                for part in client.position()?.elements() {
                    if let (Offset::Offset(at), Some(end)) = (part.offset(), left.get(&part.partition()).copied())
                        && at >= end
                    {
                        left.remove(&part.partition());
                    }
                }
                if heard.elapsed() > METADATA_TIMEOUT {
                    return Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut));
                }
            }
        }
    }
    Ok(Searched::Nowhere)
}
