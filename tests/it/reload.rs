//! A file that is edited while it runs: nothing lost, nothing twice, and a broken one harms nobody.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::process::Signal;
use serde_json::json;

use crate::harness::{Place, Receiver, Running, until, until_status};

fn routed(left: &str, right: &str, when: &str) -> String {
    format!(
        "namespace: routed\nsource: {{ key: /key }}\nsink:\n  route:\n    - {{ name: left, when: '{when}', http: {{ url: '{left}' }} }}\n    \
         - {{ name: right, http: {{ url: '{right}' }} }}\n"
    )
}

/// Asks for the files to be read again and waits until that has happened `times` times in all.
pub(crate) async fn reload(running: &Running, times: usize) {
    running.signal(Signal::HUP);
    let count = || running.log().matches("read the pipeline files again").count();
    until("the reload", || (count() >= times).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_that_moves_records_between_arms_under_load_loses_none_and_doubles_none() {
    let (left, right) = (Receiver::start().await, Receiver::start().await);
    let rules = ["payload.n % 2 == 0", "payload.n % 2 == 1", "payload.n % 3 == 0", "true", "false"];
    let place = Place::new().pipeline("p.yaml", &routed(&left.url, &right.url, rules[0]));
    let running = Arc::new(place.start().await);
    let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (running, stop, next) = (running.clone(), stop.clone(), next.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    running.accepted("routed", None, json!({"n": n, "key": format!("k{writer}")})).await;
                }
            })
        })
        .collect();
    for round in 1..=20 {
        place.put("p.yaml", &routed(&left.url, &right.url, rules[round % rules.len()]));
        reload(&running, round).await;
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    let all = next.load(Ordering::Relaxed);
    until_status(&running, "routed", "all delivered", |status| {
        status["branches"].as_array().unwrap().iter().all(|branch| branch["lagRecords"] == 0)
    })
    .await;
    let mut seen: BTreeMap<u64, usize> = BTreeMap::new();
    for got in left.accepted().iter().chain(&right.accepted()) {
        let payload: serde_json::Value = serde_json::from_slice(&got.body).unwrap();
        *seen.entry(payload["n"].as_u64().unwrap()).or_default() += 1;
    }
    let wrong: Vec<_> = (0..all)
        .filter_map(|n| Some((n, seen.get(&n).copied().unwrap_or(0))).filter(|(_, times)| *times != 1))
        .collect();
    assert!(wrong.is_empty(), "of {all} these arrived another number of times than once: {wrong:?}");
    assert!(left.count() > 0 && right.count() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_from_before_an_edit_take_the_old_way_also_after_a_restart() {
    let (left, right) = (Receiver::judging(|_| 503).await, Receiver::judging(|_| 503).await);
    let place = Place::new().pipeline("p.yaml", &routed(&left.url, &right.url, "true"));
    let mut running = place.start().await;
    for n in 0..20 {
        running.accepted("routed", None, json!({"n": n, "key": "k"})).await;
    }
    place.put("p.yaml", &routed(&left.url, &right.url, "false"));
    reload(&running, 1).await;
    for n in 20..40 {
        running.accepted("routed", None, json!({"n": n, "key": "k"})).await;
    }
    running.kill();
    left.judge(|_| 200);
    right.judge(|_| 200);
    let running = place.start().await;
    until("all of them", || (left.count() + right.count() >= 40).then_some(())).await;
    until_status(&running, "routed", "no lag", |status| {
        status["branches"].as_array().unwrap().iter().all(|branch| branch["lagRecords"] == 0)
    })
    .await;
    let numbers = |receiver: &Receiver| -> Vec<u64> {
        let number = |body: &[u8]| serde_json::from_slice::<serde_json::Value>(body).unwrap()["n"].as_u64().unwrap();
        receiver.accepted().iter().map(|got| number(&got.body)).collect()
    };
    assert_eq!(numbers(&left), (0..20).collect::<Vec<_>>());
    assert_eq!(numbers(&right), (20..40).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_file_keeps_its_last_good_plan_over_a_restart_too() {
    let good = "namespace: broken\nsink: { file: { path: out.ndjson } }\n";
    let place = Place::new()
        .pipeline("p.yaml", good)
        .pipeline("other.yaml", "namespace: other\nsink: { file: { path: other.ndjson } }\n");
    let mut running = place.start().await;
    place.put("p.yaml", "namespace: broken\nsink: { file: { path: out.ndjson }, retires: {} }\n");
    reload(&running, 1).await;
    for round in 0..2 {
        let status = running.status("broken").await;
        assert_eq!(status["config"]["state"], "stale", "{status:#}");
        let problem = status["config"]["problem"].to_string();
        assert!(problem.contains("WF0201") && problem.contains("p.yaml") && problem.contains('2'), "{problem}");
        let metrics =
            running.client.get(format!("{}/metrics", running.url)).send().await.unwrap().text().await.unwrap();
        assert!(
            metrics.lines().any(|line| line.starts_with("walflow_config_stale{")
                && line.contains("broken")
                && line.ends_with(" 1")),
            "{metrics}"
        );
        running.accepted("broken", None, json!({ "round": round })).await;
        running.accepted("other", None, json!({ "round": round })).await;
        until("delivery by the last good plan", || (place.lines("out.ndjson").len() == round + 1).then_some(())).await;
        if round == 0 {
            assert!(running.stop().await.success());
            running = place.start().await;
        }
    }
    place.put("p.yaml", good);
    reload(&running, 2).await;
    assert_eq!(running.status("broken").await["config"]["state"], "current");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_file_keeps_the_bounds_of_its_last_good_plan_over_a_restart_too() {
    let away = Receiver::judging(|_| 503).await;
    let yaml = format!(
        "namespace: bounded\nsource: {{ backlog: {{ size: 20KiB }}, limits: {{ record: 4KiB }} }}\nsink: {{ http: {{ url: '{}' }} }}\n",
        away.url
    );
    let place = Place::new().pipeline("p.yaml", &yaml);
    let mut running = place.start().await;
    running.accepted("bounded", None, json!("first")).await;
    assert!(running.stop().await.success());
    place.put("p.yaml", &format!("{yaml}nonsense: 1\n"));
    let running = place.start().await;
    assert_eq!(running.status("bounded").await["config"]["state"], "stale");
    let text = "x".repeat(1_000);
    for _ in 0..100 {
        let (status, body) = running.write(&json!({"namespace": "bounded", "payload": text})).await.unwrap();
        if status != 202 {
            assert_eq!((status.as_u16(), &body["durable"]), (503, &json!("failed")), "{body}");
            assert!(body.to_string().contains("backlog"), "{body}");
            return;
        }
    }
    panic!("100 KiB were taken into a backlog of 20");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_never_was_good_answers_503_and_the_others_run() {
    let place = Place::new()
        .pipeline("p.yaml", "namespace: never\nsink: { nonsense: {} }\n")
        .pipeline("other.yaml", "namespace: other\nsink: { file: { path: other.ndjson } }\n");
    let running = place.start().await;
    let (status, body) = running.write(&json!({"namespace": "never", "payload": 1})).await.unwrap();
    assert_eq!((status.as_u16(), &body["durable"]), (503, &json!("failed")), "{body}");
    running.accepted("other", None, json!({})).await;
    let strict = place.command(&["run", "pipelines", "--strict", "--data", "elsewhere"]).output().unwrap();
    assert_eq!(strict.status.code(), Some(78));
    let said = String::from_utf8_lossy(&strict.stderr).into_owned();
    assert!(said.contains("p.yaml:2:") && said.contains("nonsense"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_file_refuses_writes_and_drains_and_a_new_one_is_taken_up() {
    let receiver = Receiver::judging(|_| 503).await;
    let place = Place::new()
        .pipeline("p.yaml", &format!("namespace: going\nsink: {{ http: {{ url: '{}' }} }}\n", receiver.url));
    let running = place.start().await;
    running.accepted("going", None, json!({"last": true})).await;
    std::fs::remove_file(place.path("pipelines/p.yaml")).unwrap();
    place.put("new.yaml", "namespace: coming\nsink: { file: { path: coming.ndjson } }\n");
    reload(&running, 1).await;
    let (status, body) = running.write(&json!({"namespace": "going", "payload": 1})).await.unwrap();
    assert_eq!(status, 404, "{body}");
    running.accepted("coming", None, json!({})).await;
    until("the new namespace", || (place.lines("coming.ndjson").len() == 1).then_some(())).await;
    receiver.judge(|_| 200);
    until("the drain", || (receiver.count() == 1).then_some(())).await;
    let (code, _, said) = running.cli(&place, &["namespace", "delete", "going", "--yes"]);
    assert_eq!(code, 0, "{said}");
    let (status, _) = running.get("/api/v1/wal/namespace/going/status").await;
    assert_eq!(status, 404);
    let (code, _, said) = running.cli(&place, &["namespace", "delete", "coming", "--yes"]);
    assert_eq!(code, 1, "a namespace whose file is there was deleted: {said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renamed_arm_goes_on_where_it_was_and_a_retired_one_ends() {
    let (kept, gone) = (Receiver::judging(|_| 503).await, Receiver::judging(|_| 503).await);
    let arm = |name: &str, url: &str, was: &str| format!("    {name}: {{ {was}http: {{ url: '{url}' }} }}\n");
    let yaml = |arms: &str, rest: &str| format!("namespace: renamed\nsink:\n  fan_out:\n{arms}{rest}");
    let before = [arm("old", &kept.url, ""), arm("retiring", &gone.url, "")].concat();
    let place = Place::new().pipeline("p.yaml", &yaml(&before, ""));
    let mut running = place.start().await;
    for n in 0..5 {
        running.accepted("renamed", None, json!({ "n": n })).await;
    }
    place.put("p.yaml", &yaml(&arm("fresh", &kept.url, "was: old, "), "retired: { retiring: drop }\n"));
    reload(&running, 1).await;
    kept.judge(|_| 200);
    gone.judge(|_| 200);
    until("the backlog under the new name", || (kept.count() == 5).then_some(())).await;
    let status =
        until_status(&running, "renamed", "one branch", |status| status["branches"].as_array().unwrap().len() == 1)
            .await;
    assert_eq!(status["branches"][0]["name"], "fresh");
    // The line may go again, and a restart changes nothing.
    place.put("p.yaml", &yaml(&arm("fresh", &kept.url, ""), ""));
    reload(&running, 2).await;
    assert!(running.stop().await.success());
    let running = place.start().await;
    running.accepted("renamed", None, json!({"n": 5})).await;
    until("the next", || (kept.count() == 6).then_some(())).await;
    until_status(&running, "renamed", "nothing left", |status| status["branches"][0]["lagRecords"] == 0).await;
    assert_eq!((kept.count(), gone.count()), (6, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_under_any_former_name_goes_on_after_several_renames_and_a_restart() {
    let sink = Receiver::judging(|got| if got.body.ends_with(b"0}") { 422 } else { 503 }).await;
    // A key for each record: those that fail are set aside alone.
    let yaml = |name: &str, was: &str| {
        format!(
            "namespace: chain\nsource: {{ key: /n }}\nsink:\n  fan_out:\n    {name}: {{ {was}http: {{ url: '{}' }}, \
             retry: {{ attempts: 2, backoff: {{ first: 10ms, max: 10ms }} }} }}\n",
            sink.url
        )
    };
    let place = Place::new().pipeline("p.yaml", &yaml("a", ""));
    let mut running = place.start().await;
    let send = async |running: &Running, from: u64| {
        for n in from..from + 5 {
            running.accepted("chain", None, json!({ "n": n })).await;
        }
    };
    send(&running, 0).await;
    until_status(&running, "chain", "a dead letter", |status| status["branches"][0]["deadLetters"] == 1).await;
    place.put("p.yaml", &yaml("b", "was: a, "));
    reload(&running, 1).await;
    send(&running, 5).await;
    place.put("p.yaml", &yaml("c", "was: b, "));
    reload(&running, 2).await;
    send(&running, 11).await;
    // The line may go as soon as it has been read, whatever still waits.
    place.put("p.yaml", &yaml("c", ""));
    reload(&running, 3).await;
    running.kill();
    sink.judge(|_| 200);
    let running = place.start().await;
    until("all but the dead letter", || (sink.count() == 14).then_some(())).await;
    let (code, out, said) = running.cli(&place, &["dead-letters", "replay", "chain", "--force"]);
    assert_eq!((code, out.trim()), (0, "replayed 1"), "{said}");
    until("the dead letter too", || (sink.count() == 15).then_some(())).await;
    let status = until_status(&running, "chain", "nothing left", |status| {
        let branches = status["branches"].as_array().unwrap();
        branches.iter().all(|branch| branch["lagRecords"] == 0 && branch["setAside"] == 0)
    })
    .await;
    let names: Vec<_> = status["branches"].as_array().unwrap().iter().map(|branch| branch["name"].clone()).collect();
    assert_eq!(names, ["c"]);
    let mut numbers: Vec<u64> = sink
        .accepted()
        .iter()
        .map(|got| serde_json::from_slice::<serde_json::Value>(&got.body).unwrap()["n"].as_u64().unwrap())
        .collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..10).chain(11..16).collect::<Vec<_>>());
}

#[tokio::test]
async fn the_bounds_of_the_source_follow_the_file() {
    let file = |limit: &str| {
        format!("namespace: bounds\nsource: {{ limits: {{ record: {limit} }} }}\nsink: {{ stdout: {{}} }}\n")
    };
    let place = Place::new().pipeline("p.yaml", &file("1KiB"));
    let running = place.start().await;
    let large = json!({"namespace": "bounds", "payload": "x".repeat(2000)});
    assert_eq!(running.write(&large).await.unwrap().0, 413);
    place.put("p.yaml", &file("4KiB"));
    reload(&running, 1).await;
    assert_eq!(running.write(&large).await.unwrap().0, 202);
    place.put("p.yaml", &file("1KiB"));
    reload(&running, 2).await;
    assert_eq!(running.write(&large).await.unwrap().0, 413);
    // The log itself is not the file's to change while it runs.
    place.put("p.yaml", "namespace: bounds\nsource: { memory: {} }\nsink: { stdout: {} }\n");
    reload(&running, 3).await;
    let status = running.status("bounds").await;
    assert_eq!(status["config"]["state"], "stale", "{status}");
    let problem = status.to_string();
    assert!(
        problem.contains("WF0603") && problem.contains("p.yaml") && problem.contains("namespace move"),
        "{problem}"
    );
    assert_eq!(running.write(&json!({"namespace": "bounds", "payload": 1})).await.unwrap().0, 202);
    place.put("p.yaml", &file("4KiB"));
    reload(&running, 4).await;
    assert_eq!(running.status("bounds").await["config"]["state"], "current");
}
