//! Logs and shelves that others keep, behind a bad network or away: what was acknowledged arrives, whatever lies between.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Place, Receiver, until};
use crate::kafka::unique;
use crate::kafka_faults::{Load, accounts};
use crate::proxy::{Proxy, Way};
use crate::servers::{Server, free_ports};

/// Bytes a second of a line on which hardly anything goes.
const SLOW: u32 = 40_000;
/// For how long a shelf is away.
const AWAY: Duration = Duration::from_secs(60);

/// The host and port of a server of `tests/run`.
fn server(variable: &str) -> String {
    let url = std::env::var(variable).unwrap_or_else(|_| panic!("{variable} names a server: run tests/run"));
    url.split_once("://").map_or(url.clone(), |(_, address)| address.to_owned())
}

/// Each fault in turn under load; what was acknowledged before, in between and afterwards arrives, each key in order.
async fn bad_network(namespace: &str, source: &str, proxy: &mut Proxy, ordered: bool) {
    let receiver = Receiver::start().await;
    let place = Place::new().environment("AWS_ACCESS_KEY_ID", "x").environment("AWS_SECRET_ACCESS_KEY", "x").pipeline(
        "a.yaml",
        &format!(
            "namespace: {namespace}\nsource: {{ {source}, key: /key }}\nsink: {{ http: {{ url: \"{}\" }} }}\n",
            receiver.url
        ),
    );
    let running = place.start().await;
    let load = Load::start(&running, namespace);
    load.more(50).await;
    for fault in ["stalled up", "stalled down", "answers lost", "cut", "slow"] {
        match fault {
            "stalled up" => proxy.stall(Way::Up),
            "stalled down" => proxy.stall(Way::Down),
            "answers lost" => proxy.swallow(Way::Down),
            "cut" => proxy.cut().await,
            _ => proxy.slow(SLOW),
        }
        if fault == "slow" {
            load.more(20).await;
        } else {
            // Nobody waits for ever: writers are told.
            let refused = load.refused.load(Ordering::Relaxed);
            until(fault, || (load.refused.load(Ordering::Relaxed) > refused).then_some(())).await;
        }
        proxy.restore().await;
        load.more(50).await;
    }
    let acknowledged = load.end().await;
    if ordered {
        accounts(&receiver, &acknowledged).await;
    } else {
        arrive(&receiver, &acknowledged).await;
    }
}

/// Every acknowledged record arrives, in whatever order.
async fn arrive(receiver: &Receiver, acknowledged: &BTreeSet<u64>) {
    let number = |body: &[u8]| serde_json::from_slice::<Value>(body).unwrap()["n"].as_u64().unwrap();
    until("every acknowledged record arrives", || {
        let seen: BTreeSet<u64> = receiver.accepted().iter().map(|received| number(&received.body)).collect();
        acknowledged.is_subset(&seen).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Redis server: run tests/run"]
async fn streams_behind_a_bad_network_lose_nothing() {
    let mut proxy = Proxy::start(&server("WALFLOW_TEST_REDIS")).await;
    let source = format!("redis: {{ url: \"redis://{}\", timeout: 2s }}", proxy.address());
    bad_network(&unique("streams"), &source, &mut proxy, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs servers: run tests/run"]
async fn a_replica_goes_on_where_its_master_was_killed() {
    let servers = Server::start("sentinel").await;
    let (receiver, namespace) = (Receiver::start().await, unique("sentinel"));
    let sentinels = [3, 4, 5].map(|node| format!("\"redis://{}\"", servers.node(node))).join(", ");
    let place = Place::new().pipeline(
        "a.yaml",
        &format!(
            "namespace: {namespace}\nsource:\n  redis: {{ sentinel: {{ urls: [{sentinels}], master: main }}, timeout: 2s }}\n  key: \
             /key\nsink: {{ http: {{ url: \"{}\" }} }}\n",
            receiver.url
        ),
    );
    let running = place.start().await;
    let load = Load::start(&running, &namespace);
    load.more(200).await;
    // One of those that are asked is away too.
    servers.kill_node(3).await;
    let replicated = load.so_far();
    let mut master = redis::Client::open(format!("redis://{}", servers.node(1))).unwrap().get_connection().unwrap();
    // What stands before this on the master stands before it on the replica.
    redis::cmd("SET").arg("mark").arg(1).exec(&mut master).unwrap();
    assert_eq!(redis::cmd("WAIT").arg(1).arg(5_000).query::<u64>(&mut master).unwrap(), 1);
    servers.kill_node(1).await;
    let refused = load.refused.load(Ordering::Relaxed);
    until("writers hear of it", || (load.refused.load(Ordering::Relaxed) > refused + 20).then_some(())).await;
    let before = load.so_far();
    load.more(200).await;
    let mut replica = redis::Client::open(format!("redis://{}", servers.node(2))).unwrap().get_connection().unwrap();
    let role: redis::Value = redis::cmd("ROLE").query(&mut replica).unwrap();
    assert!(format!("{role:?}").contains("master"), "{role:?}");
    let acknowledged = load.end().await;
    // Replication is not waited for: what was answered in the last moment before may be gone.
    let unsure: BTreeSet<u64> = before.difference(&replicated).copied().collect();
    accounts(&receiver, &acknowledged.difference(&unsure).copied().collect()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an SQS server: run tests/run"]
async fn a_queue_behind_a_bad_network_loses_nothing() {
    let mut proxy = Proxy::start(&server("WALFLOW_TEST_SQS")).await;
    let name = unique("queue");
    crate::backends::sqs().create_queue().queue_name(&name).send().await.unwrap();
    let source = format!("sqs: {{ queue: {name}, region: us-east-1, endpoint: \"http://{}\" }}", proxy.address());
    bad_network(&name, &source, &mut proxy, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs servers: run tests/run"]
async fn a_topic_behind_a_bad_network_loses_nothing() {
    let port = free_ports(2);
    let mut proxy = Proxy::start(&format!("127.0.0.1:{port}")).await;
    // Clients go where the broker says that it is.
    let advertised = format!("advertised.listeners=PLAINTEXT://{}", proxy.address());
    let _broker = Server::start_at("kafka", port, &[&advertised]).await;
    let name = unique("topic");
    let source = format!("kafka: {{ brokers: \"{}\", topic: {name} }}", proxy.address());
    bad_network(&name, &source, &mut proxy, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs servers: run tests/run"]
async fn a_shelf_may_be_away_for_a_minute_and_be_killed_in_the_middle_of_a_release() {
    let database = Server::start("postgres").await;
    let (receiver, namespace) = (Receiver::start().await, unique("shelf"));
    let place = Place::new().pipeline(
        "a.yaml",
        &format!(
            "namespace: {namespace}\nsource:\n  kafka: {{ brokers: \"{}\", topic: {namespace} }}\n  shelf: {{ postgres: {{ url: \
             \"postgres://postgres@{}/postgres\" }} }}\nsink: {{ http: {{ url: \"{}\" }} }}\n",
            crate::kafka::brokers(),
            database.address(),
            receiver.url
        ),
    );
    let running = place.start().await;
    // All the time some are released.
    let load = Load::with(&running, &namespace, &json!({"delay": 1}));
    for round in 0..3 {
        load.more(100).await;
        let released = receiver.count();
        until("some are released", || (receiver.count() > released + 20).then_some(())).await;
        database.kill().await;
        let (since, refused) = (Instant::now(), load.refused.load(Ordering::Relaxed));
        until("writers hear of it", || (load.refused.load(Ordering::Relaxed) > refused).then_some(())).await;
        if round == 2 {
            // What is due meanwhile waits; a write that is due at once needs no shelf.
            let now = json!({"namespace": namespace, "payload": {"n": 1_000_000}});
            assert_eq!(running.write(&now).await.unwrap().0, 202);
            while since.elapsed() < AWAY {
                let more = load.refused.load(Ordering::Relaxed);
                until("they hear of it again", || (load.refused.load(Ordering::Relaxed) > more).then_some(())).await;
            }
        }
        database.restart().await;
    }
    load.more(100).await;
    let mut acknowledged = load.end().await;
    acknowledged.insert(1_000_000);
    arrive(&receiver, &acknowledged).await;
}
