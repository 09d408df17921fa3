//! Kafka on a bad day, under load: brokers that are killed, a quorum that is lost, members that come and go. An outside list of
//! what was acknowledged decides.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Place, Receiver, Running, until};
use crate::kafka::unique;
use crate::servers::Server;

fn pipeline(namespace: &str, brokers: &str, receiver: &Receiver) -> String {
    format!(
        "namespace: {namespace}\nsource:\n  kafka: {{ brokers: \"{brokers}\", topic: {namespace} }}\n  key: /key\nsink: {{ http: {{ url: \"{}\" }} }}\n",
        receiver.url
    )
}

/// Writers that go on until they are told to stop, each with keys of its own and one write at a time.
pub struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<Mutex<BTreeSet<u64>>>,
    pub refused: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    pub fn start(running: &Running, namespace: &str) -> Self {
        Self::with(running, namespace, &json!({}))
    }

    /// Each write with this `lifecycle`.
    pub fn with(running: &Running, namespace: &str, lifecycle: &Value) -> Self {
        let (stop, acknowledged, refused) =
            (Arc::<AtomicBool>::default(), Arc::<Mutex<BTreeSet<u64>>>::default(), Arc::<AtomicU64>::default());
        let next = Arc::new(AtomicU64::new(0));
        let tasks = (0..4).map(|writer| {
            let (http, url, namespace) = (running.client.clone(), running.url.clone(), namespace.to_owned());
            let lifecycle = lifecycle.clone();
            let (stop, next) = (Arc::clone(&stop), Arc::clone(&next));
            let (acknowledged, refused) = (Arc::clone(&acknowledged), Arc::clone(&refused));
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let payload = json!({"n": n, "key": format!("w{writer}-{}", n % 3)});
                    let body = json!({"namespace": namespace, "payload": payload, "lifecycle": lifecycle});
                    let request =
                        http.post(format!("{url}/api/v1/wal/write")).header("content-type", "application/json");
                    match request.body(body.to_string()).send().await {
                        Ok(answer) if answer.status() == 202 => _ = acknowledged.lock().unwrap().insert(n),
                        _ => _ = refused.fetch_add(1, Ordering::Relaxed),
                    }
                }
            })
        });
        Self { tasks: tasks.collect(), stop, acknowledged, refused }
    }

    fn count(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    /// Waits until so many more were acknowledged.
    pub async fn more(&self, count: usize) {
        let wanted = self.count() + count;
        until("writes are acknowledged", || (self.count() >= wanted).then_some(())).await;
    }

    /// What was acknowledged until now.
    pub fn so_far(&self) -> BTreeSet<u64> {
        self.acknowledged.lock().unwrap().clone()
    }

    pub async fn end(mut self) -> BTreeSet<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for task in std::mem::take(&mut self.tasks) {
            task.await.unwrap();
        }
        self.so_far()
    }
}

/// Every acknowledged record arrives, and of each key the first arrivals are in order.
pub async fn accounts(receiver: &Receiver, acknowledged: &BTreeSet<u64>) {
    let arrived = || {
        let (mut seen, mut keys) = (BTreeSet::new(), BTreeMap::<String, Vec<u64>>::new());
        for received in receiver.accepted() {
            let payload: Value = serde_json::from_slice(&received.body).unwrap();
            let n = payload["n"].as_u64().unwrap();
            if seen.insert(n) {
                keys.entry(payload["key"].as_str().unwrap().to_owned()).or_default().push(n);
            }
        }
        (seen, keys)
    };
    let keys = until("every acknowledged record arrives", || {
        let (seen, keys) = arrived();
        acknowledged.is_subset(&seen).then_some(keys)
    })
    .await;
    for (key, numbers) in keys {
        assert!(numbers.is_sorted(), "{key} is out of order: {numbers:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs servers: run tests/run"]
async fn a_broker_that_is_killed_under_load_costs_nothing_that_was_acknowledged() {
    let server = Server::start("kafka").await;
    let receiver = Receiver::start().await;
    let namespace = unique("broker");
    let place = Place::new().pipeline("a.yaml", &pipeline(&namespace, &server.address(), &receiver));
    let running = place.start().await;
    let load = Load::start(&running, &namespace);
    for _ in 0..2 {
        load.more(200).await;
        server.kill().await;
        // While it is away writers are told so, and soon.
        let refused = load.refused.load(Ordering::Relaxed);
        until("writers hear of it", || (load.refused.load(Ordering::Relaxed) > refused).then_some(())).await;
        server.restart().await;
    }
    load.more(200).await;
    accounts(&receiver, &load.end().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs servers: run tests/run"]
async fn of_three_brokers_one_may_go_and_without_a_quorum_nothing_is_acknowledged() {
    let server = Server::start("kafka3").await;
    let receiver = Receiver::start().await;
    let namespace = unique("quorum");
    let address = server.address();
    let port: u16 = address.rsplit(':').next().unwrap().parse().unwrap();
    let brokers = format!("127.0.0.1:{port},127.0.0.1:{},127.0.0.1:{}", port + 1, port + 2);
    let place = Place::new().pipeline("a.yaml", &pipeline(&namespace, &brokers, &receiver));
    let running = place.start().await;
    let load = Load::start(&running, &namespace);
    load.more(100).await;
    server.kill_node(3).await;
    load.more(100).await;
    server.kill_node(2).await;
    // What was on its way may still hear its answer; from then on there is none.
    let mut last = (load.count(), Instant::now());
    until("nothing is acknowledged any more", || {
        if load.count() != last.0 {
            last = (load.count(), Instant::now());
        }
        (last.1.elapsed() > Duration::from_secs(5)).then_some(())
    })
    .await;
    server.restart().await;
    load.more(100).await;
    accounts(&receiver, &load.end().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka: run tests/run"]
async fn members_that_come_and_go_lose_nothing_and_keep_the_order() {
    let receiver = Receiver::start().await;
    let namespace = unique("storm");
    let text = pipeline(&namespace, &crate::kafka::brokers(), &receiver);
    let place = Place::new().pipeline("a.yaml", &text);
    let running = place.start().await;
    let load = Load::start(&running, &namespace);
    for round in 0..4 {
        let other = Place::new().pipeline("a.yaml", &text);
        let mut member = other.start().await;
        until("it takes part", || member.log().contains("partitions assigned").then_some(())).await;
        load.more(50).await;
        // In order, or without a word: then its session has to end first.
        if round == 3 { member.kill() } else { assert!(member.stop().await.success()) }
    }
    load.more(50).await;
    accounts(&receiver, &load.end().await).await;
}
