//! A topic as the log, on a real broker: what is acknowledged arrives, whoever is killed, and a topic of others is a source.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::{Value, json};

use crate::harness::{Place, Receiver, Running, until, until_status};

pub fn brokers() -> String {
    std::env::var("WALFLOW_TEST_KAFKA").expect("WALFLOW_TEST_KAFKA names a broker: run tests/run")
}

/// A name that no other test and no earlier run has.
pub fn unique(name: &str) -> String {
    format!("{name}-{:08x}", fastrand::u32(..))
}

fn pipeline(namespace: &str, more: &str, sink: &str) -> String {
    format!(
        "namespace: {namespace}\nsource:\n  kafka: {{ brokers: \"{}\", topic: {namespace}{more} }}\n  key: /key\nsink: {sink}\n",
        brokers()
    )
}

/// The numbers of each key in the order of their first arrival.
fn first_arrivals(receiver: &Receiver) -> BTreeMap<String, Vec<u64>> {
    let (mut seen, mut by_key) = (BTreeSet::new(), BTreeMap::<String, Vec<u64>>::new());
    for received in receiver.accepted() {
        let payload: Value = serde_json::from_slice(&received.body).unwrap();
        let n = payload["n"].as_u64().unwrap();
        if seen.insert(n) {
            by_key.entry(payload["key"].as_str().unwrap().to_owned()).or_default().push(n);
        }
    }
    by_key
}

/// Writes `numbers`, of ten keys, and gives those that were acknowledged.
async fn write(running: &Running, namespace: &str, numbers: std::ops::Range<u64>) -> Vec<u64> {
    let mut acknowledged = Vec::new();
    for n in numbers {
        let body = json!({"namespace": namespace, "payload": {"n": n, "key": format!("k{}", n % 10)}});
        if let Ok((status, _)) = running.write(&body).await
            && status == 202
        {
            acknowledged.push(n);
        }
    }
    acknowledged
}

async fn all_arrive(receiver: &Receiver, acknowledged: &[u64]) {
    let wanted: BTreeSet<u64> = acknowledged.iter().copied().collect();
    until("every acknowledged record arrives", || {
        let there: BTreeSet<u64> = first_arrivals(receiver).into_values().flatten().collect();
        wanted.is_subset(&there).then_some(())
    })
    .await;
    for (key, numbers) in first_arrivals(receiver) {
        assert!(numbers.is_sorted(), "{key} is out of order: {numbers:?}");
    }
}

#[tokio::test]
#[ignore = "needs Kafka: run tests/run"]
async fn what_a_topic_has_acknowledged_arrives_after_kill_9() {
    let namespace = unique("kill");
    let receiver = Receiver::start().await;
    let place = Place::new()
        .pipeline("a.yaml", &pipeline(&namespace, "", &format!("{{ http: {{ url: \"{}\" }} }}", receiver.url)));
    let mut running = place.start().await;
    let mut acknowledged = write(&running, &namespace, 0..200).await;
    running.kill();
    let running = place.start().await;
    acknowledged.extend(write(&running, &namespace, 200..250).await);
    assert_eq!(acknowledged.len(), 250);
    all_arrive(&receiver, &acknowledged).await;
    until_status(&running, &namespace, "nothing is left", |status| status["branches"][0]["lagRecords"] == 0).await;
}

fn producer() -> FutureProducer {
    ClientConfig::new().set("bootstrap.servers", brokers()).set("acks", "all").create().unwrap()
}

fn admin() -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", brokers()).create().unwrap()
}

#[tokio::test]
#[ignore = "needs Kafka: run tests/run"]
async fn a_topic_that_others_write_to_is_a_source() {
    let namespace = unique("others");
    let more = ", topics: { partitions: 1 }";
    let sink = "\n  route:\n    - { name: json, when: 'payload?.n != ()', file: { path: json.ndjson } }\n    - { name: rest, file: { path: rest.ndjson } }";
    let place = Place::new().pipeline("a.yaml", &pipeline(&namespace, more, sink));
    let running = place.start().await;
    let producer = producer();
    let header = OwnedHeaders::new().insert(Header { key: "trace", value: Some("t-1") });
    let with_key = FutureRecord::to(&namespace).key("user:1").payload(r#"{"n": 1.10, "key": "x"}"#).headers(header);
    producer.send(with_key, Duration::from_secs(10)).await.unwrap();
    let tombstone: FutureRecord<'_, str, str> = FutureRecord::to(&namespace).key("user:1");
    producer.send(tombstone, Duration::from_secs(10)).await.unwrap();
    let no_json: FutureRecord<'_, str, [u8]> = FutureRecord::to(&namespace).payload(&[0xFF, 0xFE, 0x00][..]);
    producer.send(no_json, Duration::from_secs(10)).await.unwrap();
    until("the JSON arrives", || (place.lines("json.ndjson").len() == 1).then_some(())).await;
    assert_eq!(place.lines("json.ndjson"), [r#"{"n": 1.10, "key": "x"}"#], "not a byte is changed");
    until("the tombstone arrives", || (place.lines("rest.ndjson").len() == 1).then_some(())).await;
    assert_eq!(place.lines("rest.ndjson"), ["null"]);
    // What is no JSON dies only where a condition wants to look into it, by name, in the topic for dead letters.
    let status = until_status(&running, &namespace, "the rest has an end", |status| {
        status["branches"].as_array().unwrap().iter().all(|branch| branch["lagRecords"] == 0)
    })
    .await;
    assert_eq!(status["branches"][0]["name"], "json");
}

#[tokio::test]
#[ignore = "needs Kafka: run tests/run"]
async fn an_offset_that_is_out_of_range_stops_the_branch_and_is_told() {
    let namespace = unique("range");
    let receiver = Receiver::judging(|_| 503).await;
    let sink = format!("{{ http: {{ url: \"{}\" }} }}", receiver.url);
    let place = Place::new().pipeline("a.yaml", &pipeline(&namespace, ", topics: { partitions: 1 }", &sink));
    let mut running = place.start().await;
    assert_eq!(write(&running, &namespace, 0..20).await.len(), 20);
    running.kill();
    let mut gone = TopicPartitionList::new();
    gone.add_partition_offset(&namespace, 0, Offset::Offset(15)).unwrap();
    admin().delete_records(&gone, &AdminOptions::new()).await.unwrap();
    receiver.judge(|_| 200);
    let running = place.start().await;
    let status = until_status(&running, &namespace, "the branch says so", |status| {
        status["branches"][0]["lastError"].as_str().is_some_and(|error| error.contains("out of the range"))
    })
    .await;
    let error = status["branches"][0]["lastError"].as_str().unwrap();
    assert!(error.contains("15 to 20 are kept") && error.contains("--reset-offsets"), "{error}");
    assert_eq!(receiver.count(), 0, "nothing is skipped by itself");
}

#[tokio::test]
#[ignore = "needs Kafka: run tests/run"]
async fn without_a_shelf_a_delay_is_refused_and_a_dead_letter_goes_to_a_topic() {
    let namespace = unique("noshelf");
    let receiver = Receiver::judging(|received| if received.body.ends_with(b"9}") { 422 } else { 200 }).await;
    let sink = format!("{{ http: {{ url: \"{}\" }} }}", receiver.url);
    let place = Place::new().pipeline("a.yaml", &pipeline(&namespace, "", &sink));
    let running = place.start().await;
    let delayed = json!({"namespace": namespace, "payload": {"n": 1}, "lifecycle": {"delay": 5}});
    let (status, answer) = running.write(&delayed).await.unwrap();
    assert_eq!((status.as_u16(), answer["durable"].as_str()), (501, Some("failed")), "{answer}");
    running.accepted(&namespace, None, json!({"n": 9})).await;
    running.accepted(&namespace, None, json!({"n": 1})).await;
    until("the good one arrives", || (receiver.count() == 1).then_some(())).await;
    until_status(&running, &namespace, "the bad one has an end", |status| status["branches"][0]["lagRecords"] == 0)
        .await;
    let consumer: rdkafka::consumer::BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", brokers()).set("group.id", &namespace).create().unwrap();
    let dead = format!("{namespace}.dead-letters");
    let mut from = TopicPartitionList::new();
    for partition in 0..4 {
        from.add_partition_offset(&dead, partition, Offset::Beginning).unwrap();
    }
    rdkafka::consumer::Consumer::assign(&consumer, &from).unwrap();
    let letter = tokio::task::spawn_blocking(move || {
        use rdkafka::Message as _;
        use rdkafka::message::Headers as _;
        let message = consumer.poll(Duration::from_secs(30)).expect("a dead letter").unwrap();
        let headers = message.headers().unwrap();
        let reason = headers.iter().find(|header| header.key == "walflow-reason").and_then(|header| header.value);
        (message.payload().unwrap().to_vec(), String::from_utf8(reason.unwrap().to_vec()).unwrap())
    });
    assert_eq!(letter.await.unwrap(), (br#"{"n":9}"#.to_vec(), "refused".to_owned()));
}

/// Another program writes this, so long ago.
async fn others_write(topic: &str, ago: Duration, payload: &str) {
    let at =
        i64::try_from((std::time::SystemTime::now() - ago).duration_since(std::time::UNIX_EPOCH).unwrap().as_millis());
    let record: FutureRecord<'_, str, str> = FutureRecord::to(topic).timestamp(at.unwrap()).payload(payload);
    producer().send(record, Duration::from_secs(10)).await.unwrap();
}

const LONG_AGO: Duration = Duration::from_secs(2 * 3_600);

#[tokio::test]
#[ignore = "needs Kafka: run tests/run"]
async fn without_a_shelf_the_files_delay_holds_a_partition_until_its_head_is_due() {
    let namespace = unique("held");
    let text = |delay: &str| {
        format!(
            "{}delay: {{ for: {delay} }}\n",
            pipeline(&namespace, ", topics: { partitions: 1 }", "{ file: { path: out.ndjson } }")
        )
    };
    let place = Place::new().pipeline("a.yaml", &text("1h"));
    let running = place.start().await;
    let (_, plan, _) = running.cli(&place, &["run", "pipelines", "--dry-run"]);
    assert!(plan.contains("every record waits in its partition"), "{plan}");
    let delayed = json!({"namespace": namespace, "payload": {"n": 1}, "lifecycle": {"delay": 5}});
    let (status, answer) = running.write(&delayed).await.unwrap();
    assert_eq!(status.as_u16(), 501, "{answer}");
    assert!(answer["detail"].as_str().unwrap().contains("source.shelf"), "{answer}");
    others_write(&namespace, LONG_AGO, "1").await;
    until("what is due arrives", || (place.lines("out.ndjson") == ["1"]).then_some(())).await;
    others_write(&namespace, Duration::ZERO, "2").await;
    others_write(&namespace, LONG_AGO, "3").await;
    until_status(&running, &namespace, "both are there", |status| status["branches"][0]["lagRecords"] == 2).await;
    assert_eq!(place.lines("out.ndjson"), ["1"], "the head is not due, so neither is what is behind it");
    place.put("a.yaml", &text("1s"));
    crate::reload::reload(&running, 1).await;
    until("they arrive in order", || (place.lines("out.ndjson") == ["1", "2", "3"]).then_some(())).await;
    let (status, answer) = running.write(&json!({"namespace": namespace, "payload": 4})).await.unwrap();
    assert_eq!(status.as_u16(), 202, "{answer}");
    until("what was written here arrives", || (place.lines("out.ndjson").len() == 4).then_some(())).await;
    let due: jiff::Timestamp = answer["deliverAt"].as_str().unwrap().parse().unwrap();
    assert!(jiff::Timestamp::now() >= due, "not before {due}");
}

#[tokio::test]
#[ignore = "needs Kafka and Redis: run tests/run"]
async fn beside_a_shelf_what_others_write_is_held_and_what_is_written_here_is_parked() {
    let namespace = unique("both");
    let redis = std::env::var("WALFLOW_TEST_REDIS").expect("WALFLOW_TEST_REDIS names a server: run tests/run");
    let source = pipeline(&namespace, ", topics: { partitions: 1 }", "{ file: { path: out.ndjson } }");
    let source = source
        .replace("  key: /key\n", &format!("  shelf: {{ redis: {{ url: \"{redis}\", prefix: \"{namespace}\" }} }}\n"));
    let place = Place::new().pipeline("a.yaml", &format!("{source}delay: {{ until: 'payload.at' }}\n"));
    let running = place.start().await;
    let (_, plan, _) = running.cli(&place, &["run", "pipelines", "--dry-run"]);
    assert!(plan.contains("what other programs write to the topic waits in its partition"), "{plan}");
    running.accepted(&namespace, None, json!({"at": "2019-01-01T00:00:00Z"})).await;
    until("what is due arrives", || (place.lines("out.ndjson").len() == 1).then_some(())).await;
    let delayed = json!({"namespace": namespace, "payload": {"at": 0}, "lifecycle": {"delay": "1h"}});
    let (status, answer) = running.write(&delayed).await.unwrap();
    assert_eq!(status.as_u16(), 202, "{answer}");
    // A record whose time nobody can say has an end all the same.
    others_write(&namespace, LONG_AGO, r#"{"at": true}"#).await;
    let dead = |status: &Value| status["branches"][0]["deadLetters"] == 1;
    until_status(&running, &namespace, "a dead letter", dead).await;
    let (_, page) = running.get(&format!("/api/v1/wal/namespace/{namespace}/dead-letters")).await;
    assert_eq!(page["items"][0]["stage"], "delay", "{page}");
    let soon = jiff::Timestamp::now() + Duration::from_secs(3_600);
    others_write(&namespace, LONG_AGO, &json!({"at": soon.to_string()}).to_string()).await;
    let status =
        until_status(&running, &namespace, "it is held", |status| status["branches"][0]["lagRecords"] == 1).await;
    assert_eq!((&status["parked"], place.lines("out.ndjson").len()), (&json!(1), 1), "{status}");
}
