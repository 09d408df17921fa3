//! From one walflow to another and back: the origin tag travels, the loop guard ends the record, nothing circulates.

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::{Place, Receiver, Running, until, until_status};

/// The file of the instance in `here`: its own region is a store, the other one a walflow.
fn file(here: &str, store: &str, there: &str, peer: &str) -> String {
    format!(
        r#"namespace: shared
replicate:
  origin: {here}
  regions:
    {here}: {{ url: "{store}" }}
    {there}: {{ url: "{peer}/api/v1/wal/write" }}
sink:
  http:
    url: "http://127.0.0.1:1/"
    body: {{ namespace: shared, key: "{{key}}", payload: "{{payload}}", origin: "{{record.origin}}" }}
"#
    )
}

/// The payloads that a store got, with the origin of each.
fn stored(store: &Receiver) -> Vec<(Value, Value)> {
    let read = |body: &[u8]| serde_json::from_slice::<Value>(body).unwrap();
    store
        .accepted()
        .iter()
        .map(|got| read(&got.body))
        .map(|body| (body["payload"].clone(), body["origin"].clone()))
        .collect()
}

/// Waits until all branches have ended all that is in the log; gives how much that is.
async fn ended(running: &Running) -> u64 {
    let done = |status: &Value| {
        status["branches"].as_array().unwrap().iter().all(|branch| branch["lagRecords"] == 0 && branch["setAside"] == 0)
    };
    until_status(running, "shared", "everything has its end", done).await["end"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_instances_that_replicate_to_each_other_pass_each_record_over_once() {
    let (west_store, east_store) = (Receiver::start().await, Receiver::start().await);
    // One has to start before the other has an address: the first file is mended when that is known.
    let west_place = Place::new().pipeline("p.yaml", &file("west", &west_store.url, "east", "http://127.0.0.1:1"));
    let west = west_place.start().await;
    let east_place = Place::new().pipeline("p.yaml", &file("east", &east_store.url, "west", &west.url));
    let east = east_place.start().await;
    west_place.put("p.yaml", &file("west", &west_store.url, "east", &east.url));
    west.signal(Signal::HUP);
    for n in 0..20 {
        west.accepted("shared", Some("k"), json!({ "west": n })).await;
        east.accepted("shared", Some("k"), json!({ "east": n })).await;
    }
    until("all has come over", || (west_store.count() >= 20 && east_store.count() >= 20).then_some(())).await;
    // A record can only enter a log by a write or from the other one, so after this nothing is under way any more.
    while ended(&west).await + ended(&east).await != ended(&west).await + ended(&east).await {}
    assert_eq!((ended(&west).await, ended(&east).await), (40, 40), "nothing circulates");
    let expected = |from: &str| (0..20).map(|n| (json!({ from: n }), json!(from))).collect::<Vec<_>>();
    assert_eq!(stored(&east_store), expected("west"), "in order, each once, with the region where it was written");
    assert_eq!(stored(&west_store), expected("east"));

    // What comes back by another way than a region is refused, and what it came with is told.
    let back = json!({ "namespace": "shared", "key": "k", "payload": 1, "origin": "west" });
    let (status, answer) = west.write(&back).await.unwrap();
    assert_eq!(
        (status.as_u16(), &answer["code"], &answer["durable"]),
        (409, &json!("loop"), &json!("failed")),
        "{answer}"
    );
}
