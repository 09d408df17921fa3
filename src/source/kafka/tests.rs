//! A topic on a real broker that other programs write to, with a clock of the test's own; and where a key belongs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use rdkafka::producer::{FutureProducer, FutureRecord};

use super::{KafkaSourceSpec, KafkaStart, murmur2, open, topic as topics};
use crate::clock::{Clock, Timestamp};
use crate::record::Position;
use crate::source::foreign::broker::Begin;
use crate::source::foreign::open::Context;
use crate::source::foreign::{First, Foreign, Settings};
use crate::source::postgres::{self, PostgresShelfSpec};
use crate::source::{
    BranchName, BranchStart, DeadLetter, DeadReason, Log as _, RowKey, Settlement, Shelf as _, Start, Subscription,
    Write,
};
use crate::testing::record;

const HOUR: Duration = Duration::from_secs(3_600);
const NOON: Timestamp = Timestamp::from_millis(1_764_000_000_000);

struct Others {
    producer: FutureProducer,
    topic: String,
}

impl Others {
    fn of(spec: &KafkaSourceSpec) -> Self {
        Self { producer: spec.cluster().config().create().unwrap(), topic: spec.topic.clone() }
    }

    /// Another program writes `text` at that time.
    async fn write(&self, partition: i32, at: Timestamp, text: &str) {
        let record: FutureRecord<'_, str, str> =
            FutureRecord::to(&self.topic).partition(partition).timestamp(at.as_millis()).payload(text);
        self.producer.send(record, Duration::from_secs(30)).await.unwrap();
    }
}

/// A topic of two partitions that nobody has made yet.
fn settings(clock: &Clock) -> (Context, KafkaSourceSpec) {
    let brokers = std::env::var("WALFLOW_TEST_KAFKA").expect("WALFLOW_TEST_KAFKA names a broker: run tests/run");
    let topic = format!("others-{:012x}", fastrand::u64(..1 << 48));
    let context = Context {
        namespace: topic.parse().unwrap(),
        number: 1,
        clock: clock.clone(),
        record_bytes: 1 << 20,
        key_window: HOUR,
        backlog_bytes: 1 << 30,
        strict: false,
    };
    let settings = serde_json::json!({ "brokers": brokers, "topic": topic, "topics": { "partitions": 2 } });
    (context, serde_json::from_value(settings).unwrap())
}

/// Such a topic, and who else writes to it.
async fn topic(clock: &Clock, start: KafkaStart) -> (Foreign, Others) {
    let (context, spec) = settings(clock);
    let first = match start {
        KafkaStart::Earliest => First::Earliest,
        KafkaStart::Latest => First::Latest,
        KafkaStart::Time(time) => First::Time(time),
    };
    let settings = Settings { key_window: HOUR, number: 1, first, one_place_for_keys: false };
    let pair = Foreign::new(open(&spec, &context).unwrap(), None, settings, clock.clone());
    // It is there once its end can be asked for.
    pair.put_epoch(bytes::Bytes::new()).await.unwrap();
    (pair, Others::of(&spec))
}

async fn branch(pair: &Foreign) -> BranchStart {
    pair.open_branch(&BranchName::new("sink", None), Start::Epoch(1)).await.unwrap()
}

/// The next `count` payloads.
async fn next(start: &mut BranchStart, count: usize) -> Vec<String> {
    let mut texts = Vec::new();
    while texts.len() < count {
        let entries = tokio::time::timeout(Duration::from_secs(30), start.subscription.next(100, usize::MAX)).await;
        let entries = entries.unwrap_or_else(|_| panic!("only {texts:?} came")).unwrap();
        texts.extend(entries.iter().map(|entry| String::from_utf8(entry.record.payload.to_vec()).unwrap()));
    }
    texts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka: run tests/run"]
async fn a_partition_is_held_until_its_head_is_due_and_the_other_goes_on() {
    let clock = Clock::manual(NOON);
    let (pair, others) = topic(&clock, KafkaStart::Earliest).await;
    pair.hold(Some(Arc::new(|record| Ok(Some(record.written_at.saturating_add(HOUR))))));
    let long_ago = NOON.saturating_sub(2 * HOUR);
    others.write(0, NOON, "head").await;
    others.write(0, long_ago, "behind").await;
    others.write(1, long_ago, "due").await;
    let mut start = branch(&pair).await;
    assert_eq!(next(&mut start, 1).await, ["due"]);
    // Far more than a branch keeps: the held partition rests at the broker and the other still goes on.
    let large = "x".repeat(100_000);
    for _ in 0..120 {
        others.write(0, NOON, &large).await;
    }
    for number in 0..20 {
        others.write(1, long_ago, &format!("due {number}")).await;
        assert_eq!(next(&mut start, 1).await, [format!("due {number}")]);
    }
    assert!(start.subscription.next(100, usize::MAX).now_or_never().is_none(), "nothing else is due");
    clock.advance(HOUR);
    let rest = next(&mut start, 122).await;
    assert_eq!(rest[..2], ["head", "behind"]);
    assert_eq!((rest.len(), rest[2..].iter().all(|text| *text == large)), (122, true));
    pair.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka: run tests/run"]
async fn without_a_shelf_what_was_written_here_is_held_too() {
    let clock = Clock::manual(NOON);
    let (pair, others) = topic(&clock, KafkaStart::Earliest).await;
    let due_at = Some(NOON.saturating_add(HOUR));
    pair.admit(vec![Write { record: record("ours"), due_at, idempotency: None }]).await.unwrap();
    let long_ago = NOON.saturating_sub(HOUR);
    others.write(0, long_ago, "due").await;
    others.write(1, long_ago, "due").await;
    let mut start = branch(&pair).await;
    assert_eq!(next(&mut start, 1).await, ["due"], "of the partition where ours is not");
    assert!(start.subscription.next(100, usize::MAX).now_or_never().is_none(), "ours is not due");
    clock.advance(HOUR);
    assert_eq!(next(&mut start, 2).await, ["ours", "due"]);
    pair.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka: run tests/run"]
async fn a_branch_begins_at_a_time_in_each_partition() {
    let clock = Clock::manual(NOON);
    let hours = |count: u32| NOON.saturating_sub(count * HOUR);
    for (start, wanted) in [
        (KafkaStart::Time(hours(2)), vec!["new", "p0 1h", "p0 2h"]),
        (KafkaStart::Time(Timestamp::MIN), vec!["new", "p0 1h", "p0 2h", "p0 3h", "p1 3h"]),
    ] {
        let (pair, others) = topic(&clock, start).await;
        for (partition, ago, text) in [(0, 3, "p0 3h"), (0, 2, "p0 2h"), (0, 1, "p0 1h"), (1, 3, "p1 3h")] {
            others.write(partition, hours(ago), text).await;
        }
        let mut branch = branch(&pair).await;
        // A partition with nothing so late begins at its end: what is written from here on is read, whatever its time.
        others.write(1, hours(9), "new").await;
        let mut texts = next(&mut branch, wanted.len()).await;
        texts.sort_unstable();
        assert_eq!(texts, wanted, "{start}");
        pair.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka: run tests/run"]
async fn a_partition_that_rests_is_left_at_the_broker_until_it_goes_on() {
    let clock = Clock::manual(NOON);
    let (context, spec) = settings(&clock);
    let broker = open(&spec, &context).unwrap();
    broker.place().await.unwrap();
    let others = Others::of(&spec);
    let branch = BranchName::new("sink", None);
    let mut reader = broker.open(&branch, Begin::Earliest).await.unwrap().subscription;
    let next = async |reader: &mut Box<dyn Subscription>| {
        let entries = tokio::time::timeout(Duration::from_secs(30), reader.next(1, usize::MAX)).await;
        String::from_utf8(entries.expect("nothing came").unwrap()[0].record.payload.to_vec()).unwrap()
    };
    reader.rest(&BTreeSet::from([0]));
    // The first may have been asked for before it rested; the second was asked for afterwards.
    for text in ["1", "2"] {
        others.write(1, NOON, text).await;
        assert_eq!(next(&mut reader).await, text);
    }
    others.write(0, NOON, "rests").await;
    for text in ["3", "4", "5"] {
        others.write(1, NOON, text).await;
        assert_eq!(next(&mut reader).await, text);
    }
    reader.rest(&BTreeSet::new());
    assert_eq!(next(&mut reader).await, "rests");
    broker.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka and PostgreSQL: run tests/run"]
async fn records_of_a_topic_that_was_made_anew_are_not_taken_for_those_of_the_old_one() {
    let clock = Clock::manual(NOON);
    let (context, spec) = settings(&clock);
    let branch = BranchName::new("sink", None);
    let url = Some(std::env::var("WALFLOW_TEST_POSTGRES").expect("WALFLOW_TEST_POSTGRES: run tests/run"));
    let pair = async || {
        let timeout = Some(crate::units::Span(Duration::from_millis(10_000 + fastrand::u64(..1_000_000))));
        let shelf = PostgresShelfSpec { url: url.clone(), timeout, ..PostgresShelfSpec::default() };
        let store = postgres::open(&shelf, &context).await.unwrap();
        let settings = Settings { key_window: HOUR, number: 1, first: First::Earliest, one_place_for_keys: false };
        let pair = Foreign::new(open(&spec, &context).unwrap(), Some(store), settings, clock.clone());
        pair.put_epoch(bytes::Bytes::new()).await.unwrap();
        pair
    };
    let write = async |texts: [&str; 2]| {
        let others = Others::of(&spec);
        for text in texts {
            others.write(0, NOON, text).await;
        }
    };
    let old = pair().await;
    write(["old 0", "old 1"]).await;
    let mut start = old.open_branch(&branch, Start::Earliest).await.unwrap();
    assert_eq!(next(&mut start, 2).await, ["old 0", "old 1"]);
    // The second has ended and the first has not, so the shelf keeps that.
    let dead = DeadLetter {
        row: RowKey { position: Position::in_part(0, 2), child: 0 },
        branch: branch.clone(),
        at: NOON,
        reason: DeadReason::Refused,
        attempts: 1,
        last_error: "no".into(),
        stage: "sink".into(),
        revision: "r".into(),
        record: Arc::new(record("old 1")),
        rendered: None,
        overtaken: false,
    };
    old.settle(&branch, Settlement { dead: vec![dead], ..Settlement::default() }).await.unwrap();
    drop(start);
    old.close().await;
    // The same log in another process.
    let same = pair().await;
    let mut start = same.open_branch(&branch, Start::Earliest).await.unwrap();
    assert_eq!(next(&mut start, 2).await, ["old 0", "old 1"]);
    assert_eq!(start.ended.len(), 1);
    drop(start);
    same.close().await;
    topics::delete_for_tests(&spec.cluster(), &spec.topic, &spec.group(context.namespace.as_str(), "sink")).await;
    let new = pair().await;
    write(["new 0", "new 1"]).await;
    for _ in 0..2 {
        let told = new.open_branch(&branch, Start::Earliest).await.err().expect("it is opened").to_string();
        assert!(told.contains("made anew") && told.contains("walflow namespace delete"), "{told}");
    }
    new.delete().await.unwrap();
    new.close().await;
    let new = pair().await;
    let mut start = new.open_branch(&branch, Start::Earliest).await.unwrap();
    assert!(start.ended.is_empty(), "{:?}", start.ended);
    assert_eq!(next(&mut start, 2).await, ["new 0", "new 1"]);
    new.close().await;
}

#[test]
fn keys_find_the_partition_that_kafka_gives_them() {
    // From Kafka's own tests of its partitioner.
    for (text, hash) in
        [("21", -973_932_308), ("foobar", -790_332_482), ("a-little-bit-long-string", -985_981_536), ("", 275_646_681)]
    {
        assert_eq!(murmur2(text.as_bytes()).cast_signed(), hash, "{text}");
    }
}
