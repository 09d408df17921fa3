//! What an operator does from outside: look at dead letters, send them back, throw them away; pause, resume, skip, cancel.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::harness::{Place, Receiver, Running, until, until_status};
use crate::kafka::unique;

/// A desk whose script fails on `poison`, and whose target refuses `bad` until it is mended.
fn desk(url: &str, more: &str) -> Place {
    let yaml = format!(
        "namespace: desk\ntransform: [ {{ inline: 'if payload.poison == true {{ fail(\"no poison here\"); }} payload.seen = true;' }} ]\n\
         sink:\n  http: {{ url: '{url}' }}\n  retry: {{ attempts: 3, backoff: {{ first: 10ms, max: 50ms, factor: 2 }} }}\n{more}"
    );
    Place::new().pipeline("p.yaml", &yaml)
}

/// A receiver that refuses what is bad until it is mended.
async fn strict() -> (Receiver, Arc<AtomicBool>) {
    let mended = Arc::new(AtomicBool::new(false));
    let fine = Arc::clone(&mended);
    let judge = move |got: &crate::harness::Received| {
        let bad = serde_json::from_slice::<Value>(&got.body).unwrap()["bad"] == true;
        if bad && !fine.load(Ordering::SeqCst) { 422 } else { 200 }
    };
    (Receiver::judging(judge).await, mended)
}

async fn until_ended(running: &Running) -> Value {
    let done = |status: &Value| status["branches"][0]["lagRecords"] == 0 && status["branches"][0]["setAside"] == 0;
    until_status(running, "desk", "everything has its end", done).await
}

async fn until_dead(running: &Running, count: u64) {
    let there = |status: &Value| status["branches"][0]["deadLetters"] == count;
    until_status(running, "desk", "so many dead letters", there).await;
}

const DEAD: &str = "/api/v1/wal/namespace/desk/dead-letters";

/// The numbers in the payloads of what a query finds.
async fn found(running: &Running, query: &str) -> Vec<u64> {
    let (status, page) = running.get(&format!("{DEAD}{query}")).await;
    assert_eq!(status, 200, "{query}: {page}");
    page["items"].as_array().unwrap().iter().map(|letter| letter["payload"]["n"].as_u64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_are_found_by_every_filter_page_by_page_and_show_all_that_is_known() {
    let (receiver, _) = strict().await;
    let place = desk(&receiver.url, "");
    let running = place.start().await;
    let mut ids = Vec::new();
    for n in 0..6 {
        let payload = if n % 2 == 0 { json!({ "n": n, "bad": true }) } else { json!({ "n": n, "poison": true }) };
        ids.push(running.accepted("desk", Some(&format!("k{}", n % 3)), payload).await);
        until_dead(&running, n + 1).await;
    }
    let (_, all) = running.get(DEAD).await;
    let at = |n: usize| all["items"][n]["at"].as_str().unwrap().replace('+', "%2B");
    for (query, expected) in [
        (String::new(), &[0, 1, 2, 3, 4, 5][..]),
        ("?branch=http".to_owned(), &[0, 1, 2, 3, 4, 5]),
        ("?branch=other".to_owned(), &[]),
        ("?reason=refused".to_owned(), &[0, 2, 4]),
        ("?reason=script".to_owned(), &[1, 3, 5]),
        ("?key=k1".to_owned(), &[1, 4]),
        ("?key=k1&reason=refused".to_owned(), &[4]),
        (format!("?id={}", ids[3]), &[3]),
        ("?errorContains=no%20poison".to_owned(), &[1, 3, 5]),
        ("?errorContains=422&limit=2".to_owned(), &[0, 2]),
    ] {
        assert_eq!(found(&running, &query).await, expected, "{query}");
    }
    // Two may have ended in the same millisecond, so only what is surely apart is named.
    let (from, to) =
        (found(&running, &format!("?from={}", at(3))).await, found(&running, &format!("?to={}", at(3))).await);
    assert!(
        from.contains(&3) && from.contains(&5) && !to.contains(&3) && from.len() + to.len() == 6,
        "{from:?} {to:?}"
    );
    for wrong in ["?reason=bored", "?id=x", "?from=yesterday", "?limit=many"] {
        assert_eq!(running.get(&format!("{DEAD}{wrong}")).await.0, 400, "{wrong}");
    }
    let (mut pages, mut after) = (Vec::new(), String::new());
    loop {
        let (_, page) = running.get(&format!("{DEAD}?limit=4{after}")).await;
        pages.push(page["items"].as_array().unwrap().len());
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    assert_eq!(pages, [4, 2]);

    let letter = &all["items"][4];
    assert_eq!(
        (&letter["messageId"], &letter["branch"], &letter["reason"]),
        (&json!(ids[4]), &json!("http"), &json!("refused"))
    );
    assert_eq!(
        (&letter["payload"], &letter["rendered"]),
        (&json!({ "n": 4, "bad": true }), &json!({ "n": 4, "bad": true, "seen": true }))
    );
    assert_eq!((&letter["stage"], &letter["attempts"], &letter["key"]), (&json!("sink"), &json!(1), &json!("k1")));
    assert_eq!(letter["revision"], running.status("desk").await["revision"]);
    assert!(letter["lastError"].as_str().unwrap().contains("422"), "{letter}");
    let poisoned = &all["items"][1];
    assert_eq!((&poisoned["attempts"], &poisoned["rendered"]), (&json!(0), &Value::Null));
    assert!(poisoned["lastError"].as_str().unwrap().contains("no poison here"), "{poisoned}");

    // The same from the command line.
    let listed = |args: &[&str]| {
        let (code, out, said) =
            running.cli(&place, &[&["dead-letters", "list", "desk", "--output", "json"], args].concat());
        assert_eq!(code, 0, "{said}");
        let page: Value = serde_json::from_str(&out).unwrap();
        let numbers = page["items"].as_array().unwrap().iter().map(|letter| letter["payload"]["n"].as_u64().unwrap());
        (numbers.collect::<Vec<_>>(), page["next"].as_str().map(ToOwned::to_owned))
    };
    assert_eq!(listed(&["--reason", "script", "--key", "k1"]).0, [1]);
    assert_eq!(listed(&["--error-contains", "422", "--branch", "http"]).0, [0, 2, 4]);
    assert_eq!(listed(&["--id", &ids[2]]).0, [2]);
    assert_eq!(
        listed(&["--from", all["items"][0]["at"].as_str().unwrap(), "--to", "2020-01-01T00:00:00Z"]).0,
        [] as [u64; 0]
    );
    let (first, next) = listed(&["--limit", "4"]);
    assert_eq!((first, listed(&["--limit", "4", "--after", &next.unwrap()]).0), (vec![0, 1, 2, 3], vec![4, 5]));
    let (code, out, _) = running.cli(&place, &["dead-letters", "show", "desk", &ids[4]]);
    assert_eq!(code, 0);
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()[0]["rendered"]["seen"], true);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_keeps_ids_and_order_and_an_overtaken_letter_goes_only_by_force() {
    let (receiver, mended) = strict().await;
    let place = desk(&receiver.url, "");
    let running = place.start().await;
    let mut ids = Vec::new();
    for n in 0..20 {
        ids.push(running.accepted("desk", Some("held"), json!({ "n": n, "bad": true })).await);
    }
    let old = running.accepted("desk", Some("moved-on"), json!({ "n": 20, "bad": true })).await;
    running.accepted("desk", Some("moved-on"), json!({ "n": 21 })).await;
    until_ended(&running).await;
    until_dead(&running, 21).await;
    mended.store(true, Ordering::SeqCst);
    let (code, out, said) = running.cli(&place, &["dead-letters", "replay", "desk"]);
    assert_eq!((code, out.trim()), (0, "replayed 20"), "{said}");
    assert!(said.contains("1 stay"), "{said}");
    until("the replayed", || (receiver.count() == 21).then_some(())).await;
    let got: Vec<String> = receiver.accepted().into_iter().skip(1).map(|got| got.id).collect();
    assert_eq!(got, ids, "in their order, under their ids");

    let replay = |force: bool| json!({ "id": old, "force": force });
    let (status, answer) = running.post(&format!("{DEAD}/replay"), &replay(false)).await.unwrap();
    assert_eq!((status.as_u16(), &answer["code"]), (409, &json!("overtaken")), "{answer}");
    let (code, _, said) = running.cli(&place, &["dead-letters", "replay", "desk", "--id", &old]);
    assert!(code != 0 && said.contains("overtaken"), "{code} {said}");
    let (status, answer) = running.post(&format!("{DEAD}/replay"), &replay(true)).await.unwrap();
    assert_eq!((status.as_u16(), &answer["replayed"]), (200, &json!(1)), "{answer}");
    until("the one by force", || (receiver.count() == 22).then_some(())).await;
    assert_eq!(receiver.accepted().last().unwrap().id, old);
    until_ended(&running).await;
    until_dead(&running, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purge_takes_what_it_names_no_more_than_it_is_told_and_never_by_accident() {
    let (receiver, _) = strict().await;
    let place = desk(&receiver.url, "");
    let running = place.start().await;
    for n in 0..8 {
        let payload = if n % 2 == 0 { json!({ "n": n, "bad": true }) } else { json!({ "n": n, "poison": true }) };
        running.accepted("desk", None, payload).await;
        until_dead(&running, n + 1).await;
    }
    let (code, _, said) = running.cli(&place, &["dead-letters", "purge", "desk"]);
    assert!(code == 2 && said.contains("--yes"), "{code} {said}");
    let (status, _) = running.post(&format!("{DEAD}/purge"), &json!({ "reasn": "script" })).await.unwrap();
    assert_eq!(status, 400, "a filter that is no filter purges nothing");
    let (code, out, said) = running.cli(&place, &["dead-letters", "purge", "desk", "--reason", "script", "--yes"]);
    assert_eq!((code, out.trim()), (0, "purged 4"), "{said}");
    assert_eq!(found(&running, "").await, [0, 2, 4, 6]);
    let (_, answer) = running.post(&format!("{DEAD}/purge"), &json!({ "limit": 3 })).await.unwrap();
    assert_eq!(answer["purged"], 3);
    assert_eq!(found(&running, "").await, [6]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_block_a_letter_holds_its_key_until_it_was_replayed() {
    let (receiver, mended) = strict().await;
    let place = desk(&receiver.url, "  dead_letters: { on_dead_letter: block }\n");
    let mut running = place.start().await;
    running.accepted("desk", Some("k"), json!({ "n": 0, "bad": true })).await;
    for n in 1..4 {
        running.accepted("desk", Some("k"), json!({ "n": n })).await;
    }
    running.accepted("desk", Some("other"), json!({ "n": 4 })).await;
    let held = |status: &Value| status["branches"][0]["lagRecords"] == 0 && status["branches"][0]["setAside"] == 3;
    until_status(&running, "desk", "the key is held", held).await;
    assert_eq!(receiver.count(), 1, "only the other key went through");
    running.kill();
    running = place.start().await;
    running.accepted("desk", Some("k"), json!({ "n": 5 })).await;
    let held = |status: &Value| status["branches"][0]["lagRecords"] == 0 && status["branches"][0]["setAside"] == 4;
    until_status(&running, "desk", "it is held after a crash too", held).await;
    assert!(receiver.accepted().iter().all(|got| got.body.starts_with(br#"{"n":4"#)), "{:?}", receiver.accepted());
    let before = receiver.count();
    mended.store(true, Ordering::SeqCst);
    let (code, out, said) = running.cli(&place, &["dead-letters", "replay", "desk"]);
    assert_eq!((code, out.trim()), (0, "replayed 1"), "{said}");
    until_ended(&running).await;
    let numbers: Vec<Value> = receiver
        .accepted()
        .into_iter()
        .skip(before)
        .map(|got| serde_json::from_slice::<Value>(&got.body).unwrap()["n"].clone())
        .collect();
    assert_eq!(numbers, [0, 1, 2, 3, 5].map(Value::from), "the replayed one first, then what it held");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_is_durable_when_it_is_answered_and_ends_with_a_resume() {
    let receiver = Receiver::start().await;
    let place = desk(&receiver.url, "");
    let mut running = place.start().await;
    let (code, _, said) = running.cli(&place, &["branch", "pause", "desk", "http", "--note", "moving house"]);
    assert_eq!(code, 0, "{said}");
    // Killed the moment it is answered.
    running.kill();
    running = place.start().await;
    let status = running.status("desk").await;
    let pause = &status["branches"][0]["pause"];
    assert_eq!((&pause["cause"], &pause["note"]), (&json!("operator"), &json!("moving house")), "{status:#}");
    for n in 0..10 {
        running.accepted("desk", None, json!({ "n": n })).await;
    }
    until_status(&running, "desk", "all is read", |status| status["branches"][0]["inFlight"] == 10).await;
    assert_eq!(receiver.count(), 0);
    let (code, _, said) = running.cli(&place, &["branch", "resume", "desk", "http"]);
    assert_eq!(code, 0, "{said}");
    running.kill();
    running = place.start().await;
    until("all", || (receiver.count() >= 10).then_some(())).await;
    assert_eq!(running.status("desk").await["branches"][0]["pause"], Value::Null);
    let (code, _, said) = running.cli(&place, &["branch", "pause", "desk", "https"]);
    assert!(code != 0 && said.contains("no_branch") && said.contains("http"), "{code} {said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka: run tests/run"]
async fn a_group_keeps_a_pause_for_whoever_reads_next_where_there_is_no_shelf() {
    let (receiver, desk) = (Receiver::start().await, unique("paused"));
    let source = format!("kafka: {{ brokers: \"{}\", topic: {desk} }}", crate::kafka::brokers());
    let place = Place::new().pipeline(
        "a.yaml",
        &format!("namespace: {desk}\nsource: {{ {source} }}\nsink: {{ http: {{ url: '{}' }} }}\n", receiver.url),
    );
    let mut running = place.start().await;
    let paused = |status: &Value| status["branches"][0]["pause"]["note"] == "moving house";
    running.accepted(&desk, None, json!({ "n": 0 })).await;
    until("the first", || (receiver.count() == 1).then_some(())).await;
    let (code, _, said) = running.cli(&place, &["branch", "pause", &desk, "http", "--note", "moving house"]);
    assert!(code == 0 && !said.contains("warning"), "{said}");
    running.kill();
    running = place.start().await;
    until_status(&running, &desk, "it pauses still", paused).await;
    running.accepted(&desk, None, json!({ "n": 1 })).await;
    until_status(&running, &desk, "it is read", |status| status["branches"][0]["inFlight"] == 1).await;
    assert_eq!(receiver.count(), 1);
    assert_eq!(running.cli(&place, &["branch", "resume", &desk, "http"]).0, 0);
    running.kill();
    running = place.start().await;
    until("the second", || (receiver.count() >= 2).then_some(())).await;
    assert_eq!(running.status(&desk).await["branches"][0]["pause"], Value::Null);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an SQS server: run tests/run"]
async fn who_pauses_a_queue_without_a_shelf_hears_that_it_ends_with_the_process() {
    let (receiver, desk) = (Receiver::start().await, unique("paused"));
    crate::backends::sqs().create_queue().queue_name(&desk).send().await.unwrap();
    let endpoint = std::env::var("WALFLOW_TEST_SQS").expect("WALFLOW_TEST_SQS names a server: run tests/run");
    let source = format!("sqs: {{ queue: {desk}, region: us-east-1, endpoint: \"{endpoint}\" }}");
    let place = Place::new().environment("AWS_ACCESS_KEY_ID", "x").environment("AWS_SECRET_ACCESS_KEY", "x").pipeline(
        "a.yaml",
        &format!("namespace: {desk}\nsource: {{ {source} }}\nsink: {{ http: {{ url: '{}' }} }}\n", receiver.url),
    );
    let running = place.start().await;
    until_status(&running, &desk, "a branch", |status| status["branches"][0]["state"] == "running").await;
    let (code, _, said) = running.cli(&place, &["branch", "pause", &desk, "http"]);
    assert!(code == 0 && said.contains("it ends when this process does"), "{code} {said}");
    running.accepted(&desk, None, json!(1)).await;
    until_status(&running, &desk, "it is read", |status| status["branches"][0]["inFlight"] == 1).await;
    let (_, plan, _) = running.cli(&place, &["run", "pipelines", "--dry-run"]);
    assert!(receiver.count() == 0 && plan.contains("a pause"), "{plan}");
    let (code, _, said) = running.cli(&place, &["branch", "resume", &desk, "http"]);
    assert!(code == 0 && !said.contains("warning"), "{code} {said}");
    until("it is delivered", || (receiver.count() == 1).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_skip_moves_the_record_that_holds_its_key_to_the_dead_letters() {
    let receiver = Receiver::judging(|got| if got.body.starts_with(br#"{"n":0"#) { 500 } else { 200 }).await;
    let place = desk(&receiver.url, "").pipeline(
        "p.yaml",
        &format!("namespace: desk\nsink: {{ http: {{ url: '{}' }}, retry: {{ attempts: 1000, backoff: {{ first: 1h, max: 1h, jitter: none }} }} }}\n", receiver.url),
    );
    let mut running = place.start().await;
    let (code, _, said) = running.cli(&place, &["branch", "skip", "desk", "http"]);
    assert!(code != 0 && said.contains("nothing_to_skip"), "{code} {said}");
    let first = running.accepted("desk", Some("k"), json!({ "n": 0 })).await;
    running.accepted("desk", Some("k"), json!({ "n": 1 })).await;
    until_status(&running, "desk", "it fails", |status| status["branches"][0]["retried"] == 1).await;
    let (code, _, said) = running.cli(&place, &["branch", "skip", "desk", "http", "--id", &first]);
    assert_eq!(code, 0, "{said}");
    // Killed the moment it is answered: the letter is there all the same.
    running.kill();
    running = place.start().await;
    until("what it held", || (receiver.count() >= 1).then_some(())).await;
    let (_, page) = running.get(DEAD).await;
    assert_eq!(
        (&page["items"][0]["messageId"], &page["items"][0]["reason"]),
        (&json!(first), &json!("skipped")),
        "{page:#}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_is_cancelled_by_its_key() {
    let receiver = Receiver::start().await;
    let place = desk(&receiver.url, "");
    let running = place.start().await;
    for (key, n) in [("a", 0), ("b", 1), ("a", 2), ("a", 3)] {
        let write = json!({ "namespace": "desk", "key": key, "payload": { "n": n }, "lifecycle": { "delay": "1h" } });
        assert_eq!(running.write(&write).await.unwrap().0, 202);
    }
    let path = "/api/v1/wal/namespace/desk/scheduled";
    let cancel = |query: &str| running.client.delete(format!("{}{path}{query}", running.url)).send();
    assert_eq!(cancel("").await.unwrap().status(), 400, "without a name nothing is cancelled");
    let answer: Value = serde_json::from_str(&cancel("?key=a").await.unwrap().text().await.unwrap()).unwrap();
    assert_eq!(answer, json!({ "cancelled": 3 }));
    let (_, page) = running.get(path).await;
    let keys: Vec<&Value> = page["items"].as_array().unwrap().iter().map(|item| &item["key"]).collect();
    assert_eq!(keys, ["b"]);
    let (_, answer) = running
        .post(&format!("{path}/move"), &json!({ "key": "b", "deliverAt": "2020-01-01T00:00:00Z" }))
        .await
        .unwrap();
    assert_eq!(answer, json!({ "moved": 1 }));
    until("the other one", || (receiver.count() == 1).then_some(())).await;
    assert!(receiver.accepted()[0].body.starts_with(br#"{"n":1"#));
}
