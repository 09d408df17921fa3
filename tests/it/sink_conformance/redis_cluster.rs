//! `redis` against a cluster of three masters: nodes that are killed or hang, slots that move while records flow.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::process::Signal;
use serde_json::{Value, json};
use walflow::sink::{Kind, Operation, Sink, Verdict};

use super::{Target, conforms, open, operation, verdicts};
use crate::harness::{Place, Running, until_status};
use crate::servers::Server;

fn sink(server: &Server, mut spec: Value) -> Box<dyn Sink> {
    let nodes: Vec<String> = (1..=3).map(|node| format!("redis://{}", server.node(node))).collect();
    spec["cluster"] = nodes.into();
    open(&Kind::Redis(Box::new(serde_json::from_value(spec).unwrap())), "".into())
}

/// Asks who serves the key.
async fn ask<T: redis::FromRedisValue>(server: &Server, command: &[&str]) -> T {
    let client = redis::cluster::ClusterClient::new(vec![format!("redis://{}", server.address())]).unwrap();
    let mut connection = client.get_async_connection().await.unwrap();
    redis::cmd(command[0]).arg(&command[1..]).query_async(&mut connection).await.unwrap()
}

/// Asks one node.
async fn ask_node<T: redis::FromRedisValue>(server: &Server, node: u8, command: &[&str]) -> T {
    let client = redis::Client::open(format!("redis://{}", server.node(node))).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    redis::cmd(command[0]).arg(&command[1..]).query_async(&mut connection).await.unwrap()
}

type Entries = Vec<(String, BTreeMap<String, String>)>;

/// The numbers in a stream, in its order.
async fn numbers(server: &Server, key: &str) -> Vec<u64> {
    let entries: Entries = ask(server, &["XRANGE", key, "-", "+"]).await;
    entries.iter().map(|(_, fields)| fields["n"].parse().unwrap()).collect()
}

/// All of 0 to `count` is there, in order; a lost answer may have repeated from an earlier point on, then in order again.
fn assert_in_order(key: &str, numbers: &[u64], count: u64) {
    let last = numbers.iter().try_fold(None, |last: Option<u64>, number| {
        let next = last.map_or(0, |last| last + 1);
        (*number <= next).then_some(Some(*number))
    });
    assert_eq!(last, Some(count.checked_sub(1)), "{key}: {numbers:?}");
}

struct Stream {
    server: Server,
    last: String,
}

impl Target for Stream {
    fn sink(&self) -> Box<dyn Sink> {
        sink(&self.server, json!({ "cases": [{ "command": "xadd", "key": "conforms:{payload.to}" }] }))
    }

    fn refused(&self) -> Option<String> {
        Some(r#"{"to":"text"}"#.to_owned())
    }

    async fn arrived(&mut self) -> Vec<String> {
        let from = format!("({}", self.last);
        let entries: Entries = ask(&self.server, &["XRANGE", "conforms:a", &from, "+"]).await;
        if let Some((id, _)) = entries.last() {
            self.last.clone_from(id);
        }
        entries.into_iter().map(|(_, mut fields)| fields.remove("payload").unwrap()).collect()
    }

    async fn stop(&mut self) {
        self.server.kill().await;
    }

    async fn start(&mut self) {
        self.server.restart().await;
    }
}

#[tokio::test]
#[ignore = "needs servers: run tests/run"]
async fn redis_cluster_conforms() {
    let server = Server::start("cluster").await;
    ask::<()>(&server, &["SET", "conforms:text", "no stream"]).await;
    conforms(Stream { server, last: "0-0".to_owned() }).await;
}

/// A record for the key `k:{number}`.
fn of(case: usize, number: u16) -> Operation {
    Operation { case, ..operation(number, &json!({ "k": number, "n": number }).to_string()) }
}

#[tokio::test]
#[ignore = "needs servers: run tests/run"]
async fn a_batch_goes_to_all_nodes_and_each_record_has_an_outcome_of_its_own() {
    let server = Server::start("cluster").await;
    let sink = sink(
        &server,
        json!({ "cases": [
            { "when": "0", "command": "set", "key": "k:{payload.k}", "value": "{payload.n}" },
            { "when": "1", "command": "incrby", "key": "k:{payload.k}" },
            { "when": "2", "command": "xadd", "key": "order", "fields": { "n": "{payload.n}" } },
        ] }),
    );
    for wrong in ["k:7", "k:90", "k:151"] {
        ask::<i64>(&server, &["RPUSH", wrong, "x"]).await;
    }
    let batch: Vec<Operation> = (0..200).map(|number| of(1, number)).collect();
    let written = sink.write(&batch).await;
    assert_eq!(verdicts(&written), [7, 90, 151].map(|index| (index, Verdict::Never)), "{written:?}");
    assert!(written.failed.iter().all(|(_, failure)| failure.message.contains("WRONGTYPE")), "{written:?}");
    for number in 0..200 {
        if ![7, 90, 151].contains(&number) {
            let value: Option<u64> = ask(&server, &["GET", &format!("k:{number}")]).await;
            assert_eq!(value, Some(1), "k:{number}, once");
        }
    }
    let mixed: Vec<Operation> =
        (0..200).map(|number| of(if number % 2 == 0 { 2 } else { 1 }, number + 1_000)).collect();
    assert_eq!(verdicts(&sink.write(&mixed).await), []);
    assert_eq!(numbers(&server, "order").await, (1_000..1_200).step_by(2).collect::<Vec<_>>());
}

#[tokio::test]
#[ignore = "needs servers: run tests/run"]
async fn a_redirection_is_followed_within_the_write_and_each_command_runs_once() {
    let server = Server::start("cluster").await;
    let sink = sink(
        &server,
        json!({ "cases": [
            { "when": "0", "command": "incrby", "key": "{t}:{payload.k}" },
            { "when": "1", "command": "xadd", "key": "{t}:s", "fields": { "n": "{payload.n}" } },
        ] }),
    );
    let mut sent = 0_u16;
    let mut write = async |keys: &[u16]| {
        let mut batch: Vec<Operation> = keys.iter().map(|key| of(0, *key)).collect();
        batch.extend([of(1, sent), of(1, sent + 1)]);
        sent += 2;
        assert_eq!(verdicts(&sink.write(&batch).await), [], "at once");
    };
    let values = async || {
        let values: Vec<Option<u64>> = ask(&server, &["MGET", "{t}:1", "{t}:2", "{t}:3"]).await;
        (values, numbers(&server, "{t}:s").await)
    };
    write(&[1, 2]).await;
    let slot: u16 = ask_node(&server, 1, &["CLUSTER", "KEYSLOT", "{t}"]).await;
    let (from, to) = (owner(slot), owner(slot) % 3 + 1);
    let slot = slot.to_string();
    let (from_id, to_id): (String, String) =
        (ask_node(&server, from, &["CLUSTER", "MYID"]).await, ask_node(&server, to, &["CLUSTER", "MYID"]).await);
    let port = server.node(to).rsplit(':').next().unwrap().to_owned();
    let migrate = async |key: &str| {
        ask_node::<redis::Value>(&server, from, &["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]).await;
    };
    ask_node::<()>(&server, to, &["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from_id]).await;
    ask_node::<()>(&server, from, &["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to_id]).await;
    // Some keys are there already, a new one goes there too, and some are still here. Twice: who asks is not told for good.
    migrate("{t}:1").await;
    migrate("{t}:s").await;
    for _ in 0..2 {
        write(&[1, 2, 3]).await;
    }
    migrate("{t}:2").await;
    for node in [to, from] {
        ask_node::<()>(&server, node, &["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]).await;
    }
    for _ in 0..2 {
        write(&[1, 2, 3]).await;
    }
    let expected = (vec![Some(5), Some(5), Some(4)], (0..10).collect::<Vec<u64>>());
    assert_eq!(values().await, expected);
}

/// Who serves a slot at first.
fn owner(slot: u16) -> u8 {
    match slot {
        0..=5_460 => 1,
        5_461..=10_922 => 2,
        _ => 3,
    }
}

#[tokio::test]
#[ignore = "needs servers: run tests/run"]
async fn a_node_that_is_away_is_a_part_of_the_target_and_all_of_them_are_the_target() {
    let server = Server::start_with("cluster", &["--cluster-require-full-coverage", "no"]).await;
    let spec = json!({ "timeout": "500ms", "cases": [{ "key": "k:{payload.k}", "value": "{payload.n}" }] });
    let sink = sink(&server, spec);
    let batch: Vec<Operation> = (0..100).map(|number| of(0, number)).collect();
    assert_eq!(verdicts(&sink.write(&batch).await), []);
    let mut of_second = Vec::new();
    for number in 0..100 {
        let slot: u16 = ask_node(&server, 1, &["CLUSTER", "KEYSLOT", &format!("k:{number}")]).await;
        if (5_461..=10_922).contains(&slot) {
            of_second.push((number, Verdict::Part));
        }
    }
    assert!((10..90).contains(&of_second.len()));
    // It hangs: there is a connection, and no answer.
    server.signal_node(2, Signal::STOP);
    for _ in 0..2 {
        let written = sink.write(&batch).await;
        assert_eq!(verdicts(&written), of_second, "{written:?}");
    }
    server.signal_node(2, Signal::CONT);
    until_taken(&*sink, &batch).await;
    server.kill_node(2).await;
    // Refused connections; and soon the others say that nobody serves its slots.
    for _ in 0..20 {
        let written = sink.write(&batch).await;
        assert_eq!(verdicts(&written), of_second, "{written:?}");
    }
    server.kill().await;
    sink.write(&batch).await;
    let written = sink.write(&batch).await;
    assert_eq!(verdicts(&written), (0..100).map(|index| (index, Verdict::Down)).collect::<Vec<_>>(), "{written:?}");
    server.restart().await;
    until_taken(&*sink, &batch).await;
}

async fn until_taken(sink: &dyn Sink, batch: &[Operation]) {
    let taken = async { while !sink.write(batch).await.failed.is_empty() {} };
    tokio::time::timeout(std::time::Duration::from_secs(30), taken).await.expect("it is taken again");
}

#[tokio::test]
#[ignore = "needs servers: run tests/run"]
async fn a_probe_says_how_the_cluster_is() {
    let server = Server::start("cluster").await;
    let spec = json!({ "cases": [{ "key": "k:{payload.k}" }] });
    let found = sink(&server, spec.clone()).probe().await;
    assert!(found.iter().all(|one| one.ok), "{found:?}");
    assert_eq!(found[0].found, "cluster_state:ok, 16384 of 16384 slots assigned, 3 masters");
    assert_eq!(found.len(), 4, "{found:?}");
    assert!(found[1].found.contains("5461 slots; clocks agree"), "{found:?}");
    // One under `url` refers to others, and says where it should stand.
    let named = |address: Value, key: &str| {
        let mut spec = spec.clone();
        spec[key] = address;
        open(&Kind::Redis(Box::new(serde_json::from_value(spec).unwrap())), "".into())
    };
    let one = named(format!("redis://{}", server.address()).into(), "url");
    let batch: Vec<Operation> = (0..20).map(|number| of(0, number)).collect();
    let written = one.write(&batch).await;
    assert!(written.failed[0].1.message.contains("name it under `cluster`"), "{written:?}");
    server.kill_node(3).await;
    let sink = sink(&server, spec.clone());
    let failed = async {
        loop {
            let found = sink.probe().await;
            if found[0].found.contains("cluster_state:fail") {
                return found;
            }
        }
    };
    let found = tokio::time::timeout(std::time::Duration::from_secs(20), failed).await.expect("it is told");
    assert!(!found[0].ok && found[0].found.contains("redis-cli --cluster check"), "{found:?}");
    let away: Vec<bool> = found[1..].iter().map(|one| one.ok || !one.what.contains(&server.node(3))).collect();
    assert_eq!(away, [true, true, false], "{found:?}");
    let alone = Server::start("redis").await;
    let found = named(json!([format!("redis://{}", alone.address())]), "cluster").probe().await;
    assert!(found.len() == 1 && !found[0].ok && found[0].found.contains("write `url:`"), "{found:?}");
}

/// walflow with a cluster as its target, and one who writes to it until told to stop.
struct Flow {
    running: Arc<Running>,
    place: Place,
    stop: Arc<AtomicBool>,
    /// Rounds written: each is one record for every key.
    rounds: Arc<AtomicU64>,
    writer: tokio::task::JoinHandle<()>,
}

/// Of the slot that moves, and others.
const KEYS: [&str; 12] = ["{t}a", "{t}b", "{t}c", "{t}d", "{t}e", "{t}f", "g", "h", "i", "j", "k", "l"];

impl Flow {
    async fn start(server: &Server) -> Self {
        // Few and short retries: an outage must not use them up.
        let pipeline = format!(
            "namespace: flow\nsink:\n  redis:\n    cluster: [\"redis://{}\", \"redis://{}\"]\n    timeout: 1s\n    \
             cases: [{{ command: xadd, key: \"flow:{{key}}\", fields: {{ n: \"{{payload.n}}\" }} }}]\n  \
             retry: {{ attempts: 2, backoff: {{ first: 10ms, max: 50ms, factor: 2 }} }}\n",
            server.node(1),
            server.node(2)
        );
        let place = Place::new().pipeline("flow.yaml", &pipeline);
        let running = Arc::new(place.start().await);
        let (stop, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let writer = tokio::spawn({
            let (running, stop, rounds) = (Arc::clone(&running), Arc::clone(&stop), Arc::clone(&rounds));
            async move {
                while !stop.load(Ordering::SeqCst) {
                    let n = rounds.load(Ordering::SeqCst);
                    let line =
                        |key: &&str| json!({ "namespace": "flow", "key": key, "payload": { "n": n } }).to_string();
                    let body: String = KEYS.iter().map(|key| line(key) + "\n").collect();
                    let request = running.client.post(format!("{}/api/v1/wal/write/batch", running.url));
                    let answer =
                        request.header("content-type", "application/x-ndjson").body(body).send().await.unwrap();
                    let text = answer.text().await.unwrap();
                    assert_eq!(text.matches("\"succeeded\"").count(), KEYS.len(), "{text}");
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        Self { running, place, stop, rounds, writer }
    }

    /// Waits until so many more rounds were written and, with `delivered`, until so many more records came through.
    async fn go_on(&self, rounds: u64, delivered: u64) {
        let status = self.running.status("flow").await;
        let until = (self.rounds.load(Ordering::SeqCst) + rounds, delivered_of(&status) + delivered);
        until_status(&self.running, "flow", "records flow", |status| {
            self.rounds.load(Ordering::SeqCst) >= until.0 && delivered_of(status) >= until.1
        })
        .await;
    }

    /// Stops the writer, waits until all is delivered, and looks at what came.
    async fn end(self, server: &Server) {
        self.stop.store(true, Ordering::SeqCst);
        self.writer.await.unwrap();
        let status = until_status(&self.running, "flow", "all is delivered", |status| {
            let branch = &status["branches"][0];
            branch["lagRecords"] == 0 && branch["setAside"] == 0
        })
        .await;
        assert_eq!(status["branches"][0]["deadLetters"], 0, "{status:#}");
        let rounds = self.rounds.load(Ordering::SeqCst);
        for key in KEYS {
            assert_in_order(key, &numbers(server, &format!("flow:{key}")).await, rounds);
        }
        let (code, out, said) = self.running.cli(&self.place, &["run", "--dry-run", "--probe", "pipelines"]);
        assert!(code == 0 && out.contains("cluster_state:ok"), "{code} {out} {said}");
        assert!(out.contains(&format!("the cluster of redis://{}", server.node(1))), "{out}");
    }
}

fn delivered_of(status: &Value) -> u64 {
    status["branches"][0]["delivered"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs servers: run tests/run"]
async fn a_slot_that_moves_under_traffic_loses_nothing_and_keeps_each_keys_order() {
    let server = Server::start("cluster").await;
    let flow = Flow::start(&server).await;
    flow.go_on(20, 100).await;
    let slot: u16 = ask_node(&server, 1, &["CLUSTER", "KEYSLOT", "{t}"]).await;
    let (owner, slot) = (owner(slot), slot.to_string());
    let mut ids = Vec::new();
    for node in 1..=3 {
        ids.push(ask_node::<String>(&server, node, &["CLUSTER", "MYID"]).await);
    }
    let id = |node: u8| ids[usize::from(node) - 1].as_str();
    let other = owner % 3 + 1;
    for (from, to) in [(owner, other), (other, owner)] {
        ask_node::<()>(&server, to, &["CLUSTER", "SETSLOT", &slot, "IMPORTING", id(from)]).await;
        ask_node::<()>(&server, from, &["CLUSTER", "SETSLOT", &slot, "MIGRATING", id(to)]).await;
        flow.go_on(20, 100).await;
        let port = server.node(to).rsplit(':').next().unwrap().to_owned();
        // One key at a time: between, some are here and some there, and who comes here for those is sent there.
        loop {
            let keys: Vec<String> = ask_node(&server, from, &["CLUSTER", "GETKEYSINSLOT", &slot, "1"]).await;
            let Some(key) = keys.first() else { break };
            ask_node::<redis::Value>(&server, from, &["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]).await;
            flow.go_on(5, 40).await;
        }
        flow.go_on(20, 100).await;
        for node in [to, from] {
            ask_node::<()>(&server, node, &["CLUSTER", "SETSLOT", &slot, "NODE", id(to)]).await;
            flow.go_on(5, 40).await;
        }
    }
    flow.end(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs servers: run tests/run"]
async fn a_node_that_is_killed_and_comes_back_costs_no_record() {
    for coverage in ["yes", "no"] {
        let server = Server::start_with("cluster", &["--cluster-require-full-coverage", coverage]).await;
        let flow = Flow::start(&server).await;
        flow.go_on(20, 100).await;
        server.kill_node(2).await;
        // Longer than all attempts take, and until the others know of it.
        let down = async {
            while !ask_node::<String>(&server, 1, &["CLUSTER", "NODES"]).await.contains("master,fail ") {
                flow.go_on(1, 0).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), down).await.expect("the others notice");
        // Where the rest goes on, records for the rest are delivered.
        flow.go_on(100, if coverage == "no" { 200 } else { 0 }).await;
        server.restart().await;
        flow.end(&server).await;
    }
}
