//! What the log keeps of a pipeline file that changes: the file as it was written, and of the environment nothing.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::harness::{Place, Receiver, until, until_status};
use crate::reload::reload;

/// The files under `data/` that hold this text. By grep: they are large, and this is not a program that is optimised.
fn holding(place: &Place, text: &str) -> Vec<String> {
    let data = place.path("data");
    let output = Command::new("grep").args(["-rlaF", "-e", text]).arg(&data).output().unwrap();
    assert!(output.status.code().is_some_and(|code| code < 2), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(ToOwned::to_owned).collect()
}

/// The files that the log keeps of each revision.
fn epochs(place: &Place) -> Vec<Value> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    let db = rusqlite::Connection::open_with_flags(place.path("data/state.db"), flags).unwrap();
    let mut epochs = db.prepare("SELECT files FROM epochs ORDER BY namespace, number").unwrap();
    let kept = epochs.query_map([], |row| row.get::<_, Vec<u8>>(0)).unwrap();
    kept.map(|bytes| serde_json::from_slice(&bytes.unwrap()).unwrap()).collect()
}

/// LOG.md 16: what an epoch keeps, what it must not, and what becomes of one whose variable is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_16_an_epoch_keeps_the_file_as_written_and_no_secret_reaches_the_data() {
    const CANARIES: [&str; 3] = ["canary-of-a-header", "canary-of-a-script", "canary-of-a-file"];
    let asked = Arc::new(AtomicU64::new(0));
    let counting = Arc::clone(&asked);
    let receiver = Receiver::judging(move |_| {
        counting.fetch_add(1, Ordering::Relaxed);
        503
    })
    .await;
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secret.path(), CANARIES[2]).unwrap();
    let yaml = format!(
        "namespace: secrets
transform:
  - {{ script: scripts/check.rhai, env: [WORD] }}
sink:
  http:
    url: '${{TARGET}}'
    headers: {{ authorization: 'Bearer ${{TOKEN}}', x-more: '${{file:{}}}' }}
    # a comment, which is part of what was written
",
        secret.path().display()
    );
    let script = "if env(\"WORD\") == \"other\" { drop() }";
    let mut place = Place::new()
        .pipeline("p.yaml", &yaml)
        .pipeline("other.yaml", "namespace: other\nsink: { file: { path: other.ndjson } }\n")
        .environment("TARGET", &receiver.url)
        .environment("TOKEN", CANARIES[0])
        .environment("WORD", CANARIES[1]);
    place.put("scripts/check.rhai", script);
    let mut running = place.start().await;
    running.accepted("secrets", Some("k"), json!({"n": 0})).await;
    until("a failed attempt", || (asked.load(Ordering::Relaxed) > 0).then_some(())).await;
    // Journal and views: what a kill leaves, and what the checkpoint of a stop leaves.
    running.kill();
    for canary in CANARIES {
        assert_eq!(holding(&place, canary), Vec::<String>::new(), "{canary} after a kill");
    }
    assert!(!holding(&place, "a comment, which is part").is_empty(), "the search finds what is there");
    running = place.start().await;
    running.accepted("secrets", Some("k"), json!({"n": 1})).await;
    assert!(running.stop().await.success());
    for canary in CANARIES {
        assert_eq!(holding(&place, canary), Vec::<String>::new(), "{canary} after a stop");
        assert!(!running.log().contains(canary), "{canary} in the log lines");
    }
    let kept = epochs(&place);
    let of_it: Vec<_> = kept.iter().filter(|kept| kept["text"] == yaml).collect();
    assert_eq!(of_it.len(), 1, "one revision, as it was written: {kept:#?}");
    let scripts = of_it[0]["files"].as_object().unwrap();
    assert!(scripts.values().any(|kept| kept == script), "with its script: {scripts:?}");

    // Without a variable neither the file nor what is kept of it can be made into a plan.
    place = place.without("TOKEN");
    running = place.start().await;
    let status = running.status("secrets").await;
    let problem = status["config"]["problem"].to_string();
    assert!(problem.contains("WF0301") && problem.contains("TOKEN") && problem.contains("p.yaml"), "{status:#}");
    let metrics = running.client.get(format!("{}/metrics", running.url)).send().await.unwrap().text().await.unwrap();
    let is_stale =
        |line: &str| line.starts_with("walflow_config_stale{") && line.contains("secrets") && line.ends_with(" 1");
    assert!(metrics.lines().any(is_stale), "{metrics}");
    let (refused, _) = running.write(&json!({"namespace": "secrets", "payload": 1})).await.unwrap();
    assert_eq!(refused, 503);
    running.accepted("other", None, json!({})).await;
    assert!(running.stop().await.success());
    place = place.environment("TOKEN", CANARIES[0]);
    receiver.judge(|_| 200);
    let running = place.start().await;
    until("what was accepted before", || (receiver.count() == 2).then_some(())).await;
    // In a run the last good plan goes on.
    place.put("p.yaml", &yaml.replace("TOKEN", "NOT_SET"));
    reload(&running, 1).await;
    let status = running.status("secrets").await;
    assert_eq!(status["config"]["state"], "stale", "{status:#}");
    assert!(status["config"]["problem"].to_string().contains("NOT_SET"), "{status:#}");
    running.accepted("secrets", Some("k"), json!({"n": 2})).await;
    until("the third by the last good plan", || (receiver.count() == 3).then_some(())).await;
}

/// LOG.md 16: a name that comes back is the same branch, and what came in between was never its.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_16_a_branch_that_is_removed_and_added_again_goes_on_and_skips_what_came_between() {
    let (stays, goes) = (Receiver::start().await, Receiver::judging(|_| 503).await);
    let arm = |name: &str, url: &str| format!("    {name}: {{ http: {{ url: '{url}' }} }}\n");
    let yaml = |arms: &[String]| format!("namespace: again\nsink:\n  fan_out:\n{}", arms.concat());
    let both = yaml(&[arm("stays", &stays.url), arm("goes", &goes.url)]);
    let place = Place::new().pipeline("p.yaml", &both);
    let mut running = place.start().await;
    let bodies = |receiver: &Receiver| -> Vec<String> {
        receiver.accepted().iter().map(|got| String::from_utf8(got.body.to_vec()).unwrap()).collect()
    };
    running.accepted("again", Some("k"), json!("before")).await;
    place.put("p.yaml", &yaml(&[arm("stays", &stays.url)]));
    reload(&running, 1).await;
    running.accepted("again", Some("k"), json!("between")).await;
    until("the first two at the other", || (stays.count() == 2).then_some(())).await;
    running.kill();
    place.put("p.yaml", &both);
    running = place.start().await;
    running.accepted("again", Some("k"), json!("after")).await;
    goes.judge(|_| 200);
    until("what is its own", || (goes.count() >= 2).then_some(())).await;
    until_status(&running, "again", "nothing left", |status| {
        status["branches"].as_array().unwrap().iter().all(|branch| branch["lagRecords"] == 0)
    })
    .await;
    assert_eq!(bodies(&goes), ["\"before\"", "\"after\""]);
    // A kill may repeat what had been sent, from an earlier point on.
    let mut all = Vec::new();
    for body in bodies(&stays) {
        if !all.contains(&body) {
            all.push(body);
        }
    }
    assert_eq!(all, ["\"before\"", "\"between\"", "\"after\""]);
}
