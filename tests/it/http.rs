//! The HTTP interface as its contract has it: every route is there, asks for a key, and says what is wrong.

use std::collections::BTreeSet;

use http::StatusCode;
use serde_json::{Value, json};
use walflow::clock::Timestamp;

use crate::harness::{Place, Running, until_status};

const PIPELINE: &str = r"namespace: desk
source:
  schema: desk.schema.json
  limits: { record: 1KiB }
delay: { for: 'payload.wait ?? 0', max: 1h }
sink: { file: { path: out.ndjson } }
";
const SCHEMA: &str = r#"{"type":"object","required":["n"],"properties":{"n":{"type":"integer"},"wait":{}}}"#;

async fn ask(running: &Running, method: &str, path: &str, key: Option<&str>) -> (StatusCode, Value) {
    let method = method.parse::<http::Method>().unwrap();
    let mut request = running.client.request(method, format!("{}{path}", running.url));
    if let Some(key) = key {
        request = request.header("x-api-key", key);
    }
    let answer = request.send().await.unwrap();
    let status = answer.status();
    (status, serde_json::from_str(&answer.text().await.unwrap()).unwrap_or(Value::Null))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_route_of_the_contract_is_there_and_asks_for_a_key_unless_it_says_otherwise() {
    let place = Place::new()
        .pipeline("p.yaml", "namespace: calm\nsink: { file: { path: out.ndjson } }\n")
        .environment("VALID_API_KEYS", "sesame,other");
    let running = place.start().await;
    let (status, contract) = ask(&running, "GET", "/api/openapi.json", None).await;
    assert_eq!(status, 200);
    for (template, methods) in contract["paths"].as_object().unwrap() {
        let path = template.replace("{ns}", "calm").replace("{branch}", "file").replace("{id}", "x");
        for (method, operation) in methods.as_object().unwrap() {
            let method = method.to_uppercase();
            let open = operation["security"] == json!([{}]);
            for wrong in [None, Some("wrong")] {
                let (status, _) = ask(&running, &method, &path, wrong).await;
                assert_eq!(status == 401, !open, "{method} {path} with {wrong:?}: {status}");
                assert_eq!(operation["responses"]["401"].is_object(), !open, "{method} {path}");
            }
            let (status, answer) = ask(&running, &method, &path, Some("sesame")).await;
            let code = answer["code"].as_str().unwrap_or_default();
            assert!(code != "no_route" && code != "method" && status != 401, "{method} {path}: {status} {answer}");
            let said = operation["responses"].as_object().unwrap();
            assert!(said.contains_key(status.as_str()), "{method} {path}: {status} is not in the contract: {answer}");
        }
    }
    let (status, _) = ask(&running, "GET", "/no/such", None).await;
    assert_eq!(status, 401, "who has no key hears nothing of paths");
    let docs = running.client.get(format!("{}/api/docs", running.url)).send().await.unwrap();
    assert_eq!(docs.status(), 200, "a browser sends no key");
    assert!(docs.text().await.unwrap().contains("swagger"));
}

async fn write(running: &Running, kind: &str, body: String) -> (u16, Value, bool) {
    let request = running.client.post(format!("{}/api/v1/wal/write", running.url)).header("content-type", kind);
    let answer = request.body(body).send().await.unwrap();
    let (status, waits) = (answer.status().as_u16(), answer.headers().contains_key("retry-after"));
    (status, serde_json::from_str(&answer.text().await.unwrap()).unwrap(), waits)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_refusal_has_its_status_its_code_and_says_that_nothing_was_written() {
    let place = Place::new().pipeline("p.yaml", PIPELINE).pipeline("desk.schema.json", SCHEMA);
    let hourly = "namespace: hourly\nsource: { limits: { rate: 1/h } }\nsink: { file: { path: hourly.ndjson } }\n";
    let place = place.pipeline("hourly.yaml", hourly);
    let running = place.start().await;
    let body = |payload: Value| json!({"namespace": "desk", "payload": payload}).to_string();
    let json_kind = "application/json";
    for (status, code, kind, body) in [
        (415, "content_type", "text/csv", body(json!({"n": 1}))),
        (400, "malformed", json_kind, "{".to_owned()),
        (404, "no_namespace", json_kind, json!({"namespace": "desks", "payload": 1}).to_string()),
        (413, "too_large", json_kind, body(json!({"n": 1, "text": "x".repeat(2_000)}))),
        (422, "schema", json_kind, body(json!({"n": "one"}))),
        (422, "delay", json_kind, body(json!({"n": 1, "wait": 7_200}))),
        (
            422,
            "target",
            json_kind,
            json!({"namespace": "desk", "payload": {"n": 1}, "target": {"type": "cache"}}).to_string(),
        ),
    ] {
        let (found, answer, _) = write(&running, kind, body).await;
        assert_eq!((found, answer["code"].as_str().unwrap()), (status, code), "{answer}");
        assert_eq!(answer["durable"], "failed", "{answer}");
    }
    let (_, answer, _) = write(&running, json_kind, body(json!({"n": "one"}))).await;
    assert_eq!(answer["errors"][0]["pointer"], "/n", "{answer}");
    let hourly = json!({"namespace": "hourly", "payload": 1}).to_string();
    assert_eq!(write(&running, json_kind, hourly.clone()).await.0, 202);
    let (status, answer, waits) = write(&running, json_kind, hourly).await;
    assert_eq!((status, &answer["code"], waits), (429, &json!("rate"), true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_backlog_refuses_with_a_time_to_come_again_and_room_lets_in_again() {
    let bounds = "source: { backlog: { size: 8KiB }, limits: { record: 1KiB } }";
    let place = Place::new()
        .pipeline("p.yaml", &format!("namespace: full\n{bounds}\nsink: {{ file: {{ path: out.ndjson }} }}\n"));
    let running = place.start().await;
    assert_eq!(running.cli(&place, &["branch", "pause", "full", "file"]).0, 0);
    let body = json!({"namespace": "full", "payload": "x".repeat(512)}).to_string();
    let mut accepted = 0;
    let refused = loop {
        let (status, answer, waits) = write(&running, "application/json", body.clone()).await;
        if status != 202 {
            break (status, answer["code"].clone(), answer["durable"].clone(), waits);
        }
        accepted += 1;
        assert!(accepted < 100, "there is no bound");
    };
    assert_eq!(refused, (503, json!("backlog_full"), json!("failed"), true));
    let (status, answer) =
        running.post("/api/v1/wal/write/batch", &serde_json::from_str(&body).unwrap()).await.unwrap();
    assert_eq!((status.as_u16(), &answer["code"], &answer["durable"]), (200, &json!("backlog_full"), &json!("failed")));
    assert_eq!(running.cli(&place, &["branch", "resume", "full", "file"]).0, 0);
    until_status(&running, "full", "room", |status| status["branches"][0]["lagRecords"] == 0).await;
    assert_eq!(write(&running, "application/json", body).await.0, 202);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idempotency_key_gives_its_first_answer_again_and_refuses_another_write() {
    let place = Place::new().pipeline("p.yaml", "namespace: calm\nsink: { file: { path: out.ndjson } }\n");
    let running = place.start().await;
    let body = |payload: u32| json!({"namespace": "calm", "payload": payload, "idempotencyKey": "one"});
    let (status, first) = running.write(&body(1)).await.unwrap();
    assert_eq!(status, 202);
    assert_eq!(running.write(&body(1)).await.unwrap(), (StatusCode::ACCEPTED, first));
    let (status, answer) = running.write(&body(2)).await.unwrap();
    assert_eq!((status.as_u16(), &answer["code"]), (422, &json!("key_reused")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_is_cancelled_by_its_id_in_the_path_and_metrics_tell_what_happened() {
    let place = Place::new().pipeline("p.yaml", "namespace: calm\nsink: { file: { path: out.ndjson } }\n");
    let running = place.start().await;
    let write = json!({"namespace": "calm", "payload": 1, "lifecycle": {"delay": "1h"}});
    let (_, answer) = running.write(&write).await.unwrap();
    let path = format!("/api/v1/wal/namespace/calm/scheduled/{}", answer["messageId"].as_str().unwrap());
    assert_eq!(running.status("calm").await["nextDue"], answer["deliverAt"]);
    assert_eq!(ask(&running, "DELETE", &path, None).await, (StatusCode::OK, json!({"cancelled": 1})));
    assert_eq!(ask(&running, "DELETE", &path, None).await, (StatusCode::OK, json!({"cancelled": 0})));
    let text = running.client.get(format!("{}/metrics", running.url)).send().await.unwrap().text().await.unwrap();
    for line in [
        "walflow_accepted_records_total{ns=\"calm\"} 1",
        "walflow_parked_records{ns=\"calm\"} 0",
        "walflow_journal_sync_duration_seconds_bucket{le=\"+Inf\"}",
        "walflow_release_lateness_seconds_count 0",
        "walflow_attempt_duration_seconds_count{branch=\"file\",ns=\"calm\"} 0",
        "walflow_namespace_info{ns=\"calm\",owner=\"\",shard=\"default\"} 1",
        "walflow_config_applied_timestamp_seconds",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_delay_draws_differs_from_record_to_record() {
    let pipeline = "namespace: spread\ndelay: { for: 'random(1, 500000)' }\nsink: { file: { path: out.ndjson } }\n";
    let place = Place::new().pipeline("p.yaml", pipeline);
    let running = place.start().await;
    let mut waits = BTreeSet::new();
    for n in 0..4 {
        let (_, answer) = running.write(&json!({"namespace": "spread", "payload": n})).await.unwrap();
        let time = |name: &str| answer[name].as_str().unwrap().parse::<Timestamp>().unwrap();
        // Both times are cut to the millisecond apart from each other.
        waits.insert(time("deliverAt").since(time("timestamp")).as_secs_f64().round().to_string());
    }
    assert!(waits.len() > 1, "all wait {waits:?} seconds");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_cannot_be_reached_keeps_nobody_from_a_write_in_another() {
    let gone =
        "namespace: gone\nsource: { redis: { url: 'redis://127.0.0.1:1' } }\nsink: { file: { path: gone.ndjson } }\n";
    let place = Place::new()
        .pipeline("gone.yaml", gone)
        .pipeline("p.yaml", "namespace: calm\nsink: { file: { path: out.ndjson } }\n");
    let mut running = place.spawn();
    let id = loop {
        running.is_ready().await;
        if let Ok((StatusCode::ACCEPTED, answer)) = running.write(&json!({"namespace": "calm", "payload": 1})).await {
            break answer["messageId"].as_str().unwrap().to_owned();
        }
        assert!(!running.has_ended(), "{}", running.log());
    };
    let (status, answer) = ask(&running, "GET", &format!("/api/v1/wal/message/{id}"), None).await;
    assert_eq!((status.as_u16(), &answer["namespace"]), (200, &json!("calm")), "{answer}");
    let nobodys = "019a0b1c-2d3e-7f00-8000-000000000000";
    let (status, answer) = ask(&running, "GET", &format!("/api/v1/wal/message/{nobodys}"), None).await;
    assert_eq!((status.as_u16(), &answer["code"]), (404, &json!("no_message")), "{answer}");
    assert!(answer["detail"].as_str().unwrap().contains("1 namespace(s) that do not run now"), "{answer}");
}
