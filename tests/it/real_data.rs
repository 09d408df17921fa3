//! Records that nobody here made up, from the client through a script to a real Redis and an HTTP receiver.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use redis::AsyncCommands;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::harness::{Place, Receiver, Running, until_status};

/// Every record of a data set, its bytes as they stand in the file.
fn records(folder: &Path, name: &str) -> Vec<Box<RawValue>> {
    let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
    if let Ok(records) = serde_json::from_str(&text) {
        return records;
    }
    let map: BTreeMap<String, Box<RawValue>> = serde_json::from_str(&text).unwrap();
    serde_json::from_str(map["features"].get()).unwrap()
}

fn envelope(namespace: &str, key: &str, payload: &str) -> String {
    format!(r#"{{"namespace":"{namespace}","key":"{key}","payload":{payload}}}"#)
}

async fn send(running: &Running, path: &str, kind: &str, body: String) -> String {
    let request = running.client.post(format!("{}{path}", running.url)).header("content-type", kind);
    let answer = request.body(body).send().await.unwrap();
    let status = answer.status();
    let text = answer.text().await.unwrap();
    assert!(status.is_success(), "{status} {text}");
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_REDIS and WALFLOW_TEST_DATASETS, which tests/run provides"]
async fn public_data_arrives_in_redis_and_over_http_whole_and_unaltered() {
    let redis_url = std::env::var("WALFLOW_TEST_REDIS").expect("WALFLOW_TEST_REDIS");
    let folder = std::env::var("WALFLOW_TEST_DATASETS").expect("WALFLOW_TEST_DATASETS");
    let receiver = Receiver::start().await;
    let prefix = format!("walflow-real-{}", std::process::id());
    let yaml = format!(
        "namespace: data-sets
transform:
  - filter: 'payload != ()'
sink:
  fan_out:
    store:
      transform:
        - inline: |
            payload.checked = true;
            payload.source_key = key;
      redis:
        url: '{redis_url}'
        cases: [ {{ command: set, key: '{prefix}:{{key}}', value: '{{payload}}', ttl: 1h }} ]
    hook: {{ http: {{ url: '{}' }}, limits: {{ concurrency: 16 }} }}
",
        receiver.url
    );
    let place = Place::new().pipeline("p.yaml", &yaml);
    let running = place.start().await;

    let mut expected: BTreeMap<String, String> = BTreeMap::new();
    for name in ["movies", "cars", "earthquakes", "penguins"] {
        let records = records(Path::new(&folder), name);
        assert!(records.len() > 300, "{name} has only {} records", records.len());
        let mut lines = String::new();
        for (index, record) in records.iter().enumerate() {
            let key = format!("{name}-{index}");
            let line = envelope("data-sets", &key, record.get());
            // One in ten goes alone, and so does what would break a line.
            if index % 10 == 0 || record.get().contains('\n') {
                send(&running, "/api/v1/wal/write", "application/json", line).await;
            } else {
                lines += &line;
                lines.push('\n');
            }
            expected.insert(key, record.get().to_owned());
        }
        let sent = lines.lines().count();
        let answers = send(&running, "/api/v1/wal/write/batch", "application/x-ndjson", lines).await;
        let fine = answers.lines().filter(|line| line.contains(r#""durable":"succeeded""#)).count();
        assert_eq!(fine, sent, "{name}");
    }
    until_status(&running, "data-sets", "all delivered", |status| {
        status["branches"].as_array().unwrap().iter().all(|branch| branch["lagRecords"] == 0)
    })
    .await;

    let mut arrived: Vec<String> =
        receiver.accepted().iter().map(|got| String::from_utf8(got.body.to_vec()).unwrap()).collect();
    let ids: BTreeSet<String> = receiver.accepted().into_iter().map(|got| got.id).collect();
    assert_eq!(ids.len(), expected.len(), "each record has an id of its own");
    let mut written: Vec<String> = expected.values().cloned().collect();
    arrived.sort();
    written.sort();
    assert!(arrived == written, "{} of {} arrived over HTTP, or not byte for byte", arrived.len(), written.len());

    let mut redis = redis::Client::open(redis_url).unwrap().get_multiplexed_async_connection().await.unwrap();
    for (key, text) in &expected {
        let name = format!("{prefix}:{key}");
        let stored: Option<String> = redis.get(&name).await.unwrap();
        let mut value: Value = serde_json::from_str(text).unwrap();
        value["checked"] = json!(true);
        value["source_key"] = json!(key);
        let stored: Value = serde_json::from_str(&stored.unwrap_or_else(|| panic!("{key} is not in Redis"))).unwrap();
        assert_eq!(stored, value, "{key}");
        let _: () = redis.del(&name).await.unwrap();
    }
}
