//! An outage is not a poison record, a poison record is not an outage, and a bad deploy is neither.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Place, Receiver, Running, until, until_status};

/// A pipeline with few and short retries, so that a test sees them spent.
fn impatient(namespace: &str, url: &str) -> String {
    format!(
        "namespace: {namespace}\nsink:\n  http: {{ url: '{url}' }}\n  limits: {{ concurrency: 4 }}\n  \
         retry: {{ attempts: 3, backoff: {{ first: 10ms, max: 50ms, factor: 2 }} }}\n"
    )
}

/// Writes `payloads` as one batch; every line must be accepted.
async fn batch(running: &Running, namespace: &str, payloads: impl Iterator<Item = Value>) -> Vec<String> {
    let lines: Vec<String> =
        payloads.map(|payload| json!({"namespace": namespace, "payload": payload}).to_string()).collect();
    let request = running.client.post(format!("{}/api/v1/wal/write/batch", running.url));
    let answer =
        request.header("content-type", "application/x-ndjson").body(lines.join("\n") + "\n").send().await.unwrap();
    let text = answer.text().await.unwrap();
    let results: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(results.len(), lines.len(), "{text}");
    let id = |result: &Value| {
        assert_eq!(result["durable"], "succeeded", "{result}");
        result["messageId"].as_str().unwrap().to_owned()
    };
    results.iter().map(id).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_down_longer_than_all_retries_costs_no_record() {
    let receiver = Receiver::judging(|_| 503).await;
    let place = Place::new().pipeline("p.yaml", &impatient("night", &receiver.url));
    let running = place.start().await;
    batch(&running, "night", (0..2_000).map(|n| json!({ "n": n }))).await;
    let before = running.memory();
    // Far longer than three attempts of 50 ms take, with traffic that goes on.
    for n in 2_000..2_100 {
        running.accepted("night", None, json!({ "n": n })).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let status = running.status("night").await;
    assert_eq!(status["branches"][0]["deadLetters"], 0, "{status:#}");
    assert!(running.memory() < before + (32 << 20), "from {before} to {}", running.memory());
    receiver.judge(|_| 200);
    until_status(&running, "night", "all delivered", |status| {
        status["branches"][0]["lagRecords"] == 0 && status["branches"][0]["setAside"] == 0
    })
    .await;
    let bodies: BTreeSet<u64> = receiver
        .accepted()
        .iter()
        .map(|got| serde_json::from_slice::<Value>(&got.body).unwrap()["n"].as_u64().unwrap())
        .collect();
    assert_eq!(bodies, (0..2_100).collect());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_thousand_records_exactly_the_bad_one_is_in_the_dead_letters() {
    let receiver = Receiver::judging(|got| if got.body == r#"{"n":500}"# { 422 } else { 200 }).await;
    let place = Place::new().pipeline("p.yaml", &impatient("picky", &receiver.url));
    let running = place.start().await;
    let ids = batch(&running, "picky", (0..1_000).map(|n| json!({ "n": n }))).await;
    until_status(&running, "picky", "all ended", |status| status["branches"][0]["lagRecords"] == 0).await;
    assert_eq!(receiver.count(), 999);
    let (code, out, said) = running.cli(&place, &["dead-letters", "list", "picky", "--output", "json"]);
    assert_eq!(code, 0, "{said}");
    let answer: Value = serde_json::from_str(&out).unwrap();
    let letters = answer["items"].as_array().unwrap();
    assert_eq!(letters.len(), 1, "{answer:#}");
    assert_eq!(letters[0]["messageId"], ids[500].as_str());
    assert_eq!(letters[0]["reason"], "refused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deploy_that_refuses_everything_pauses_the_branch_until_somebody_resumes_it() {
    let bad = Arc::new(AtomicBool::new(true));
    let refuse = bad.clone();
    let receiver = Receiver::judging(move |_| if refuse.load(Ordering::SeqCst) { 422 } else { 200 }).await;
    let place = Place::new().pipeline("p.yaml", &impatient("deploy", &receiver.url));
    let running = place.start().await;
    batch(&running, "deploy", (0..2_000).map(|n| json!({ "n": n }))).await;
    let status =
        until_status(&running, "deploy", "a pause", |status| status["branches"][0]["pause"]["cause"] == "refused")
            .await;
    let dead = status["branches"][0]["deadLetters"].as_u64().unwrap();
    assert!((1..=400).contains(&dead), "{dead} records were given up before the pause");
    bad.store(false, Ordering::SeqCst);
    let name = status["branches"][0]["name"].as_str().unwrap();
    let (code, _, said) = running.cli(&place, &["branch", "resume", "deploy", name]);
    assert_eq!(code, 0, "{said}");
    until_status(&running, "deploy", "the rest", |status| status["branches"][0]["lagRecords"] == 0).await;
    let (code, out, said) = running.cli(&place, &["dead-letters", "replay", "deploy", "--force"]);
    assert_eq!(code, 0, "{out} {said}");
    until("every record", || (receiver.count() == 2_000).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_region_keeps_nobody_waiting() {
    let (dead, alive) = (Receiver::judging(|_| 503).await, Receiver::start().await);
    let yaml = format!(
        "namespace: regions\nreplicate: {{ regions: {{ dead: {{ url: '{}' }}, alive: {{ url: '{}' }} }} }}\nsink: {{ http: {{ url: 'http://127.0.0.1:1/' }} }}\n",
        dead.url, alive.url
    );
    let place = Place::new().pipeline("p.yaml", &yaml);
    let running = place.start().await;
    for round in 1..=20 {
        for n in 0..10 {
            running.accepted("regions", Some("k"), json!({ "round": round, "n": n })).await;
        }
        until("the living region", || (alive.count() == round * 10).then_some(())).await;
    }
    assert_eq!(dead.count(), 0);
}
