//! Nothing acknowledged is lost, whatever ends the process: kill -9 under load, and a record that kills it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Ledger, Place, Receiver, Running, until, until_status};

const PIPELINE: &str = "
namespace: ledger
source: { key: /key }
sink: { file: { path: out.ndjson } }
";

/// One client: writes its own keys in order, notes what it is about to send and what was acknowledged.
async fn client(
    http: reqwest::Client,
    url: String,
    number: u64,
    next: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    ledger: Arc<Mutex<Ledger>>,
) -> Vec<(u64, bool)> {
    let mut sent = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let n = next.fetch_add(1, Ordering::Relaxed);
        let payload =
            json!({"n": n, "key": format!("client-{number}"), "text": "é".repeat(usize::try_from(n % 50).unwrap())});
        ledger.lock().unwrap().add(&format!("sent {n} {payload}\n"));
        let request = http.post(format!("{url}/api/v1/wal/write")).header("content-type", "application/json");
        let answer = request.body(json!({"namespace": "ledger", "payload": payload}).to_string()).send().await;
        let acknowledged = match answer {
            Ok(answer) if answer.status() == 202 => true,
            Ok(_) | Err(_) => false,
        };
        if acknowledged {
            ledger.lock().unwrap().add(&format!("acknowledged {n}\n"));
        }
        sent.push((n, acknowledged));
        if !acknowledged {
            break;
        }
    }
    sent
}

/// Runs clients until the process is killed after `life`; gives what they sent.
async fn one_life(
    running: &mut Running,
    http: &reqwest::Client,
    next: &Arc<AtomicU64>,
    ledger: &Arc<Mutex<Ledger>>,
    life: Duration,
) -> Vec<(u64, bool)> {
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..8)
        .map(|number| {
            tokio::spawn(client(http.clone(), running.url.clone(), number, next.clone(), stop.clone(), ledger.clone()))
        })
        .collect();
    tokio::time::sleep(life).await;
    running.kill();
    stop.store(true, Ordering::Relaxed);
    let mut sent = Vec::new();
    for client in clients {
        sent.extend(client.await.unwrap());
    }
    sent
}

/// How many lives it takes is `WALFLOW_TEST_KILLS`, 30 unless it is set. By hand, 200 of them with the counts shown:
/// `WALFLOW_TEST_KILLS=200 cargo test --locked --test it killed_again -- --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_again_and_again_under_load_nothing_acknowledged_is_missing() {
    let kills: u64 = std::env::var("WALFLOW_TEST_KILLS").map_or(30, |kills| kills.parse().unwrap());
    let place = Place::new().pipeline("ledger.yaml", PIPELINE);
    let ledger = Arc::new(Mutex::new(Ledger::new(&place.path("outside"))));
    let next = Arc::new(AtomicU64::new(0));
    let mut sent = BTreeMap::new();
    let mut seed = fastrand::Rng::new();
    // Made once: making a client takes longer than a life.
    let http = crate::harness::client();
    for _ in 0..kills {
        let mut running = place.start().await;
        let life = Duration::from_millis(seed.u64(20..250));
        sent.extend(one_life(&mut running, &http, &next, &ledger, life).await);
    }
    let mut running = place.start().await;
    running.accepted("ledger", None, json!({"n": "last"})).await;
    until_status(&running, "ledger", "everything delivered", |status| status["branches"][0]["lagRecords"] == 0).await;
    let (_, page) = running.get("/api/v1/wal/namespace/ledger/dead-letters?limit=1000").await;
    assert!(running.stop().await.success());

    let acknowledged: BTreeSet<u64> = sent.iter().filter(|(_, ok)| **ok).map(|(n, _)| *n).collect();
    let text = |n: u64| "é".repeat(usize::try_from(n % 50).unwrap());
    let (mut arrived, mut newest, mut copies) = (BTreeSet::new(), BTreeMap::new(), 0);
    let (mut phantoms, mut altered, mut out_of_order) = (Vec::new(), Vec::new(), Vec::new());
    for payload in place.values("out.ndjson") {
        let Some(n) = payload["n"].as_u64() else { continue };
        if !sent.contains_key(&n) {
            phantoms.push(payload);
            continue;
        }
        if payload["text"] != text(n) {
            altered.push(n);
        }
        if !arrived.insert(n) {
            copies += 1;
            continue;
        }
        // Numbers grow with time, and a client sends one after the other.
        let before = newest.insert(payload["key"].as_str().unwrap().to_owned(), n);
        out_of_order.extend(before.filter(|before| *before > n).map(|before| (before, n)));
    }
    // One that was about to be sent at stop after stop is given up: from inside, nobody can tell it from a record that kills.
    let letters = page["items"].as_array().unwrap();
    assert!(letters.iter().all(|letter| letter["reason"] == "crash"), "{page:#}");
    let dead: BTreeSet<u64> = letters.iter().filter_map(|letter| letter["payload"]["n"].as_u64()).collect();
    let ended = arrived.union(&dead).copied().collect();
    let lost: Vec<_> = acknowledged.difference(&ended).collect();
    eprintln!(
        "{kills} kills: {} sent, {} acknowledged, {} arrived, {} dead of which {} never arrived; lost {}, phantom {}, altered {}, \
         out of order {}, again {copies}",
        sent.len(),
        acknowledged.len(),
        arrived.len(),
        dead.len(),
        dead.difference(&arrived).count(),
        lost.len(),
        phantoms.len(),
        altered.len(),
        out_of_order.len(),
    );
    assert!(dead.len() as u64 <= kills, "a kill can give up one record at most: {dead:?}");
    assert!(lost.is_empty(), "acknowledged and missing: {lost:?}");
    assert!(phantoms.is_empty(), "never sent: {phantoms:?}");
    assert!(altered.is_empty(), "not what was sent: {altered:?}");
    assert!(out_of_order.is_empty(), "the first came before the second: {out_of_order:?}");
    assert!(acknowledged.len() as u64 > kills * 5, "only {} writes in {kills} lives", acknowledged.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_kills_the_process_ends_in_the_dead_letters() {
    let victim = Arc::new(AtomicU64::new(0));
    let target = victim.clone();
    let receiver = Receiver::judging(move |received| {
        if received.body == json!({"poison": true}).to_string() {
            let pid = i32::try_from(target.load(Ordering::SeqCst)).unwrap();
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        200
    })
    .await;
    let place = Place::new()
        .pipeline("p.yaml", &format!("namespace: poisoned\nsink: {{ http: {{ url: '{}' }} }}\n", receiver.url));
    let mut running = place.start().await;
    victim.store(running.pid().into(), Ordering::SeqCst);
    let mut ids = BTreeSet::new();
    for n in 0..5 {
        ids.insert(running.accepted("poisoned", None, json!({ "n": n })).await);
    }
    until("the first five", || (receiver.count() == 5).then_some(())).await;
    // It may be delivered, and so kill, before its answer is out.
    let _ = running.write(&json!({"namespace": "poisoned", "payload": {"poison": true}})).await;
    let mut deaths = 0;
    loop {
        // It may be killed before or after it is ready.
        let dead = until("an end or a dead letter", || {
            if running_ended(&mut running) { Some(true) } else { letters(&running, &place).map(|_| false) }
        })
        .await;
        if !dead {
            break;
        }
        deaths += 1;
        assert!(deaths <= 8, "the poison is tried for ever");
        running = place.spawn();
        victim.store(running.pid().into(), Ordering::SeqCst);
        let _ = tokio::time::timeout(Duration::from_secs(20), until_address(&mut running)).await;
    }
    running.accepted("poisoned", None, json!({"after": true})).await;
    until("the one after", || receiver.accepted().iter().any(|got| got.body == r#"{"after":true}"#).then_some(()))
        .await;
    let letters = letters(&running, &place).unwrap();
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!(letters[0]["reason"], "crash");
}

fn running_ended(running: &mut Running) -> bool {
    running.has_ended()
}

async fn until_address(running: &mut Running) {
    while !running.has_ended() && !running.is_ready().await {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The dead letters, when there are some and walflow answers.
fn letters(running: &Running, place: &Place) -> Option<Vec<Value>> {
    let (code, out, _) = running.cli(place, &["dead-letters", "list", "poisoned", "--output", "json"]);
    let answer: Value = (code == 0).then(|| serde_json::from_str(&out).ok())??;
    Some(answer["items"].as_array()?.clone()).filter(|letters| !letters.is_empty())
}
