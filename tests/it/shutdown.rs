//! Stopping, and one process a folder.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::harness::{Place, Receiver, Running, until, until_status};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_with_a_dead_target_ends_well_and_in_time_and_loses_nothing() {
    let receiver = Receiver::judging(|_| 503).await;
    let yaml =
        format!("namespace: stopping\nsink: {{ http: {{ url: '{}' }}, batch: {{ records: 10 }} }}\n", receiver.url);
    let place = Place::new().pipeline("p.yaml", &yaml).arg("--shutdown-timeout").arg("2s");
    let mut running = place.start().await;
    for n in 0..50 {
        running.accepted("stopping", Some("k"), json!({ "n": n })).await;
    }
    let asked = Instant::now();
    let status = running.stop().await;
    assert_eq!(status.code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(5), "took {:?}", asked.elapsed());

    receiver.judge(|_| 200);
    let running = place.start().await;
    until_status(&running, "stopping", "all delivered", |status| status["branches"][0]["lagRecords"] == 0).await;
    let numbers: Vec<u64> = receiver
        .accepted()
        .iter()
        .flat_map(|got| serde_json::from_slice::<Vec<serde_json::Value>>(&got.body).unwrap())
        .map(|payload| payload["n"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, (0..50).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orderly_stop_and_start_repeat_nothing_and_lose_nothing() {
    let place = Place::new().pipeline("p.yaml", "namespace: drained\nsink: { file: { path: out.ndjson } }\n");
    for round in 0..3 {
        let mut running = place.start().await;
        for n in 0..200 {
            running.accepted("drained", None, json!(round * 200 + n)).await;
        }
        assert_eq!(running.stop().await.code(), Some(0));
    }
    let running = place.start().await;
    until_status(&running, "drained", "the rest", |status| status["branches"][0]["lagRecords"] == 0).await;
    let mut lines: Vec<u64> = place.lines("out.ndjson").iter().map(|line| line.parse().unwrap()).collect();
    lines.sort_unstable();
    assert_eq!(lines, (0..600).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_it_at_once() {
    // A target that takes connections and never answers keeps the stop waiting.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/in", silent.local_addr().unwrap());
    let yaml = format!("namespace: hurried\nsink: {{ http: {{ url: '{url}' }} }}\n");
    let place = Place::new().pipeline("p.yaml", &yaml).arg("--shutdown-timeout").arg("60s");
    let mut running = place.start().await;
    running.accepted("hurried", None, json!({})).await;
    until("the record to be under way", || {
        silent.set_nonblocking(true).unwrap();
        silent.accept().ok()
    })
    .await;
    running.signal(Signal::TERM);
    until("the stop to begin", || running.log().contains("stopping").then_some(())).await;
    assert!(!running.has_ended());
    running.signal(Signal::TERM);
    assert_eq!(running.ended(Duration::from_secs(2)).await.code(), Some(143));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_on_the_same_data_says_so_and_leaves() {
    let place = Place::new().pipeline("p.yaml", "namespace: mine\nsink: { file: { path: out.ndjson } }\n");
    let running = place.start().await;
    let mut second = place.command(&["run", "pipelines", "--listen", "127.0.0.1:0"]);
    let mut second = Running::of(second.stderr(place.file("second")).spawn().unwrap(), &place, "second");
    let status = second.ended(Duration::from_secs(20)).await;
    let said = second.log();
    assert_eq!(status.code(), Some(75), "{said}");
    assert!(said.contains(&running.pid().to_string()) && said.contains("data"), "{said}");
    running.accepted("mine", None, json!({})).await;
}
