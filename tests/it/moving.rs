//! A namespace moves from the embedded log to another: nothing is lost, a key's order holds, and what waits goes along.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::harness::{Place, Receiver, Running, until, until_status};
use crate::kafka::unique;
use crate::reload::reload;

fn postgres() -> String {
    std::env::var("WALFLOW_TEST_POSTGRES").expect("WALFLOW_TEST_POSTGRES names a server: run tests/run")
}

fn file(namespace: &str, source: &str, receiver: &Receiver) -> String {
    format!(
        "namespace: {namespace}\nsource: {{ key: /key{source} }}\nsink:\n  http: {{ url: \"{}\" }}\n  retry: {{ attempts: 50, backoff: {{ first: 50ms, max: 200ms }}, give_up: 1h }}\n",
        receiver.url
    )
}

fn on_kafka(namespace: &str) -> String {
    format!(
        ", kafka: {{ brokers: \"{}\", topic: {namespace} }}, shelf: {{ postgres: {{ url: \"{}\" }} }}",
        crate::kafka::brokers(),
        postgres()
    )
}

fn payload(received: &crate::harness::Received) -> Value {
    serde_json::from_slice(&received.body).unwrap()
}

async fn write_keyed(running: &Running, namespace: &str, idempotency: &str, n: u64) -> (u16, Value) {
    let request = running.client.post(format!("{}/api/v1/wal/write", running.url));
    let body = json!({"namespace": namespace, "payload": {"n": n, "key": "keyed"}});
    let request = request.header("content-type", "application/json").header("idempotency-key", idempotency);
    let answer = request.body(body.to_string()).send().await.unwrap();
    let status = answer.status().as_u16();
    (status, serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka and PostgreSQL: run tests/run"]
async fn from_the_embedded_log_to_kafka_with_a_shelf_in_postgres() {
    let namespace = unique("move");
    moves_under_way(&namespace, &on_kafka(&namespace)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Redis: run tests/run"]
async fn from_the_embedded_log_to_redis_streams() {
    let url = std::env::var("WALFLOW_TEST_REDIS").expect("WALFLOW_TEST_REDIS names a server: run tests/run");
    moves_under_way(&unique("move"), &format!(", redis: {{ url: \"{url}\" }}")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Redis: run tests/run"]
async fn a_file_that_was_edited_first_is_not_in_force_until_it_is_moved() {
    let url = std::env::var("WALFLOW_TEST_REDIS").expect("WALFLOW_TEST_REDIS names a server: run tests/run");
    let (namespace, receiver) = (unique("edited"), Receiver::start().await);
    let place = Place::new().pipeline("a.yaml", &file(&namespace, "", &receiver));
    let running = place.start().await;
    running.accepted(&namespace, None, json!({"n": 0, "key": "k"})).await;
    place.put("a.yaml", &file(&namespace, &format!(", redis: {{ url: \"{url}\" }}"), &receiver));
    reload(&running, 1).await;
    let config = running.status(&namespace).await["config"].clone();
    assert_eq!((&config["state"], &config["problem"]["code"]), (&json!("stale"), &json!("WF0603")), "{config}");
    running.accepted(&namespace, None, json!({"n": 1, "key": "k"})).await;
    let (code, _, told) = running.cli(&place, &["namespace", "move", &namespace, "--to", "pipelines/a.yaml"]);
    assert_eq!(code, 0, "{told}");
    running.accepted(&namespace, None, json!({"n": 2, "key": "k"})).await;
    until("all of it", || (receiver.count() == 3).then_some(())).await;
    let numbers: Vec<_> = receiver.accepted().iter().map(|received| payload(received)["n"].clone()).collect();
    assert_eq!(numbers, [0, 1, 2]);
    assert_eq!(running.status(&namespace).await["config"]["state"], "current");
}

/// Writers go on while a namespace with something of everything moves to another log.
async fn moves_under_way(namespace: &str, to: &str) {
    // 7 is refused; the key `stuck` is not taken for now.
    let judge = |open: bool| {
        move |received: &crate::harness::Received| match payload(received) {
            value if value["n"] == 7 => 422,
            value if value["key"] == "stuck" && !open => 500,
            _ => 200,
        }
    };
    let receiver = Receiver::judging(judge(false)).await;
    let place = Place::new().pipeline("a.yaml", &file(namespace, "", &receiver));
    let running = place.start().await;
    for n in 0..10 {
        running.accepted(namespace, None, json!({"n": n, "key": format!("k{}", n % 3)})).await;
    }
    for n in [20, 21] {
        running.accepted(namespace, None, json!({"n": n, "key": "stuck"})).await;
    }
    for n in 22..30 {
        running.accepted(namespace, None, json!({"n": n, "key": format!("other{n}")})).await;
    }
    let (status, first) = write_keyed(&running, namespace, "once", 40).await;
    assert_eq!(status, 202);
    let delayed = json!({"namespace": namespace, "payload": {"n": 50, "key": "later"}, "lifecycle": {"delay": 8}});
    assert_eq!(running.write(&delayed).await.unwrap().0, 202);
    let waits = until_status(&running, namespace, "one is dead, a key is set aside, one is parked", |status| {
        let branch = &status["branches"][0];
        branch["deadLetters"] == 1 && branch["setAside"] == 2 && branch["lagRecords"] == 0 && status["parked"] == 1
    })
    .await;
    assert_eq!(waits["branches"][0]["name"], "http");

    // Writers go on meanwhile: each hears 503 or 202, and what it hears holds.
    let next = place.path("next.yaml");
    std::fs::write(&next, file(namespace, to, &receiver)).unwrap();
    let mut acknowledged = Vec::new();
    let moving = async {
        let arguments = ["namespace", "move", namespace, "--to", "next.yaml"];
        let mut command = place.command(&arguments);
        command.env("WALFLOW_URL", &running.url);
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    };
    tokio::pin!(moving);
    let output = loop {
        let n = 100 + acknowledged.len() as u64;
        let body = json!({"namespace": namespace, "payload": {"n": n, "key": "during"}});
        tokio::select! {
            output = &mut moving => break output,
            answer = running.write(&body) => match answer.unwrap() {
                (status, _) if status == 202 => acknowledged.push(n),
                (status, problem) => assert_eq!((status.as_u16(), &problem["durable"]), (503, &json!("failed")), "{problem}"),
            }
        }
    };
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{told}\n{}", running.log());
    assert!(told.contains("1 parked, 2 set aside, 1 dead letters, 1 idempotency keys"), "{told}");
    assert!(std::fs::read_to_string(place.path("pipelines/a.yaml")).unwrap().contains(to), "the file is switched");

    let (status, again) = write_keyed(&running, namespace, "once", 40).await;
    assert_eq!((status, &again["messageId"]), (202, &first["messageId"]), "the key is known: {again}");
    assert_eq!(write_keyed(&running, namespace, "once", 41).await.0, 422, "and for what");
    running.accepted(namespace, None, json!({"n": 60, "key": "stuck"})).await;
    let status = until_status(&running, namespace, "all that waits is there", |status| {
        status["branches"][0]["setAside"] == 3 && status["branches"][0]["deadLetters"] == 1
    })
    .await;
    assert_eq!(status["branches"][0]["lagRecords"], 0);
    receiver.judge(judge(true));
    let numbers = |key: &str| -> Vec<u64> {
        let all = receiver.accepted();
        all.iter().map(payload).filter(|value| value["key"] == key).map(|value| value["n"].as_u64().unwrap()).collect()
    };
    until("the key that was stuck goes through", || (numbers("stuck").len() >= 3).then_some(())).await;
    assert_eq!(numbers("stuck"), [20, 21, 60], "in its order");
    until("what was parked comes when it is due", || (numbers("later") == [50]).then_some(())).await;
    receiver.judge(|_| 200);
    running.accepted(namespace, None, json!({"n": 61, "key": "k1"})).await;
    until("a later record of the dead one's key is delivered", || numbers("k1").contains(&61).then_some(())).await;
    let replay = format!("/api/v1/wal/namespace/{namespace}/dead-letters/replay");
    until_status(&running, namespace, "that is settled", |status| status["branches"][0]["inFlight"] == 0).await;
    let (_, refused) = running.post(&replay, &json!({})).await.unwrap();
    assert_eq!((&refused["replayed"], &refused["overtaken"]), (&json!(0), &json!(1)), "its key has moved on");
    let (_, replayed) = running.post(&replay, &json!({"force": true})).await.unwrap();
    assert_eq!(replayed["replayed"], 1, "{replayed}");
    until("the dead letter is delivered", || numbers("k1").contains(&7).then_some(())).await;
    let mut by_key = BTreeMap::<String, Vec<u64>>::new();
    for value in receiver.accepted().iter().map(payload) {
        by_key.entry(value["key"].as_str().unwrap().to_owned()).or_default().push(value["n"].as_u64().unwrap());
    }
    // One more may have been on its way when the move was over.
    assert!(by_key["during"].starts_with(&acknowledged), "{:?} {acknowledged:?}", by_key["during"]);
    assert_eq!(by_key["k0"], [0, 3, 6, 9]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka and PostgreSQL: run tests/run"]
async fn a_branch_that_is_stuck_keeps_the_namespace_where_it_is() {
    let namespace = unique("stay");
    let receiver = Receiver::judging(|_| 503).await;
    let place = Place::new().pipeline("a.yaml", &file(&namespace, "", &receiver));
    let running = place.start().await;
    for n in 0..3 {
        running.accepted(&namespace, None, json!({"n": n, "key": "k"})).await;
    }
    std::fs::write(place.path("next.yaml"), file(&namespace, &on_kafka(&namespace), &receiver)).unwrap();
    let (code, _, told) = running.cli(&place, &["namespace", "move", &namespace, "--to", "next.yaml", "--wait", "1s"]);
    assert_eq!(code, 1, "{told}");
    assert!(told.contains("http has 3 records without an end") && told.contains("nothing was moved"), "{told}");
    running.accepted(&namespace, None, json!({"n": 3, "key": "k"})).await;
    receiver.judge(|_| 200);
    until("it goes on", || (receiver.count() == 4).then_some(())).await;
    std::fs::write(place.path("next.yaml"), "namespace: other\nsink: { stdout: {} }\n").unwrap();
    let (code, _, told) = running.cli(&place, &["namespace", "move", &namespace, "--to", "next.yaml"]);
    assert_eq!(code, 1);
    assert!(told.contains("the new file is that of `other`"), "{told}");
    std::fs::write(place.path("next.yaml"), "namespace: x\nsnik: {}\n").unwrap();
    let (_, _, told) = running.cli(&place, &["namespace", "move", &namespace, "--to", "next.yaml"]);
    assert!(told.contains("unknown key 'snik', did you mean 'sink'?"), "{told}");
}
