//! Two processes on one namespace of a broker: one that is added takes work over, and one goes on alone when the other is killed.

use crate::harness::{Place, Receiver, Running};
use crate::kafka::{brokers, unique};
use crate::kafka_faults::{Load, accounts};

/// Records that this process has brought to the target.
async fn delivered(running: &Running) -> u64 {
    let metrics = running.client.get(format!("{}/metrics", running.url)).send().await.unwrap().text().await.unwrap();
    let of =
        |line: &str| line.strip_prefix("walflow_delivered_records_total{")?.rsplit(' ').next()?.parse::<u64>().ok();
    metrics.lines().filter_map(of).sum()
}

async fn shared(namespace: &str, source: &str) {
    let receiver = Receiver::start().await;
    let text = format!(
        "namespace: {namespace}\nsource: {{ {source}, key: /key }}\nsink: {{ http: {{ url: \"{}\" }} }}\n",
        receiver.url
    );
    let (one, other) = (Place::new().pipeline("a.yaml", &text), Place::new().pipeline("a.yaml", &text));
    let mut first = one.start().await;
    let second = other.start().await;
    let load = Load::start(&second, namespace);
    load.more(50).await;
    // Nobody writes to the first: what it delivers and what the second delivers is the same log, divided.
    let (mut alone, mut beside) = (delivered(&first).await, delivered(&second).await);
    let before = (alone, beside);
    while alone == before.0 || beside == before.1 {
        load.more(20).await;
        (alone, beside) = (delivered(&first).await, delivered(&second).await);
    }
    first.kill();
    load.more(200).await;
    accounts(&receiver, &load.end().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka: run tests/run"]
async fn two_processes_share_a_topic_and_one_takes_over_when_the_other_is_killed() {
    let namespace = unique("share");
    shared(&namespace, &format!("kafka: {{ brokers: \"{}\", topic: {namespace} }}", brokers())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Redis server: run tests/run"]
async fn two_processes_share_streams_and_one_takes_over_when_the_other_is_killed() {
    let url = std::env::var("WALFLOW_TEST_REDIS").expect("WALFLOW_TEST_REDIS names a server: run tests/run");
    shared(&unique("share"), &format!("redis: {{ url: \"{url}\" }}")).await;
}
