//! A secret of a pipeline file stands nowhere but where it is used: not in logs, plans, errors, metrics, answers or on disk.

use std::fs;
use std::path::Path;

use rustix::process::Signal;
use serde_json::json;

use crate::harness::{Place, Receiver, until, until_status};

/// Also a signing secret, which is base64.
const CANARY: &str = "CANARYcanaryCANARYcanaryCANARYcanary";

/// Namespaces that use it in every way, each with a target that gives errors to tell of.
fn place(receiver: &str) -> Place {
    let receiver = receiver.replace("http://", "http://user:${CANARY}@");
    Place::new()
        .environment("CANARY", CANARY)
        .environment("WALFLOW_LOG_LEVEL", "trace")
        .pipeline(
            "refused.yaml",
            "namespace: refused\nsink: { http: { url: 'http://user:${CANARY}@127.0.0.1:1/${CANARY}?t=${CANARY}', \
             headers: { X-Key: '${CANARY}', Authorization: 'Bearer ${CANARY}' }, sign: { secret: 'whsec_${CANARY}' } } }\n",
        )
        .pipeline(
            "judged.yaml",
            &format!(
                "namespace: judged\nsink:\n  http: {{ url: '{receiver}?t=${{CANARY}}', headers: {{ X-Key: '${{CANARY}}' }}, \
                 sign: {{ secret: 'whsec_${{CANARY}}' }} }}\n  retry: {{ attempts: 2, backoff: {{ first: 10ms, max: 20ms }} }}\n"
            ),
        )
        .pipeline(
            "proxied.yaml",
            "namespace: proxied\nsink: { http: { url: 'https://h.invalid/${CANARY}', proxy: 'http://user:${CANARY}@127.0.0.1:1' } }\n",
        )
        .pipeline(
            "cached.yaml",
            "namespace: cached\nsink: { redis: { url: 'redis://user:${CANARY}@127.0.0.1:1/0', cases: [{ key: 'a:{payload.n}' }] } }\n",
        )
        .pipeline("edited.yaml", "namespace: edited\nsink: { file: { path: edited.ndjson } }\n")
}

/// A file with the secret wherever it cannot be.
const WRONG: &str = "namespace: edited
source: { limits: { rate: '${CANARY}', record: '${CANARY}' } }
delay: { for: '${CANARY}', max: '${CANARY}' }
sink:
  http:
    url: '${CANARY}'
    method: 'A ${CANARY}'
    headers: { X-A: \"${CANARY}\\n\", 'B C': '${CANARY}' }
    format: '${CANARY}'
    timeout: '${CANARY}'
    proxy: 'socks://${CANARY}'
    sign: { secret: 'whsec_${CANARY}!' }
    verdicts: { 404: '${CANARY}' }
  ordering: '${CANARY}'
  limits: { concurrency: '${CANARY}' }
  retry: { attempts: '${CANARY}' }
";

#[track_caller]
fn clean(what: &str, text: &str) {
    if let Some(at) = text.find("CANARY").filter(|_| text.contains(CANARY)) {
        let around = text.get(at.saturating_sub(300)..(at + 300).min(text.len()));
        panic!("the secret stands in {what}: {}", around.unwrap_or(text));
    }
}

fn clean_folder(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            clean_folder(&path);
        } else {
            clean(&path.display().to_string(), &String::from_utf8_lossy(&fs::read(&path).unwrap()));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_is_used_and_never_shown() {
    let receiver = Receiver::judging(|got| match got.body.as_ref() {
        br#"{"n":1}"# => 422,
        br#"{"n":2}"# => 500,
        _ => 200,
    })
    .await;
    let place = place(&receiver.url);
    let running = place.start().await;
    let mut ids = Vec::new();
    for namespace in ["refused", "judged", "proxied", "cached", "edited"] {
        for n in 0..3 {
            ids.push(running.accepted(namespace, None, json!({ "n": n })).await);
        }
    }
    let told = |status: &serde_json::Value| status["branches"][0]["lastError"].is_string();
    for namespace in ["refused", "judged", "proxied", "cached"] {
        until_status(&running, namespace, "an error", told).await;
    }
    until("what the receiver takes", || (receiver.count() >= 1).then_some(())).await;
    // The refused one, and perhaps the one that has no attempts left.
    until_status(&running, "judged", "a dead letter", |status| status["branches"][0]["deadLetters"] != 0).await;
    place.put("edited.yaml", WRONG);
    place.put("late.yaml", &WRONG.replace("edited", "late"));
    running.signal(Signal::HUP);
    until_status(&running, "edited", "a broken file", |status| status["config"]["state"] == "stale").await;

    let namespaces = ["refused", "judged", "proxied", "cached", "edited", "late"];
    let mut paths: Vec<String> =
        ["/readyz", "/livez", "/metrics", "/api/v1/health", "/api/v1/wal/namespaces"].map(str::to_owned).into();
    for namespace in namespaces {
        let here = format!("/api/v1/wal/namespace/{namespace}");
        paths.extend(["status", "branches", "dead-letters", "scheduled"].map(|route| format!("{here}/{route}")));
    }
    paths.extend(ids.iter().map(|id| format!("/api/v1/wal/message/{id}")));
    for path in &paths {
        let text = running.client.get(format!("{}{path}", running.url)).send().await.unwrap().text().await.unwrap();
        clean(path, &text);
    }
    for args in [
        &["status"][..],
        &["branch", "list", "refused"],
        &["dead-letters", "list", "judged"],
        &["dead-letters", "show", "judged", &ids[4]],
        &["run", "pipelines", "--dry-run"],
        &["run", "pipelines", "--dry-run", "--output", "json"],
    ] {
        let (code, out, said) = running.cli(&place, args);
        assert!(!out.is_empty() || !said.is_empty(), "{args:?} says nothing, {code}");
        clean(&format!("{args:?}"), &format!("{out}{said}"));
    }
    let log = running.log();
    assert!(log.contains("TRACE") && log.contains("dead letter"), "the log is not what this is about");
    clean("the log", &log);
    clean_folder(&place.path("data"));
}
