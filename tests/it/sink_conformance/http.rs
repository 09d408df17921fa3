//! `http` against a server that misbehaves in every way that a test can name.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use walflow::sink::{self, Kind, Operation, Sink, Verdict};

use super::web::{Answer, Seen, Web};
use super::{context, keyed, open, operation, verdicts};

fn kind(mut spec: Value, url: String, batched: bool) -> Kind {
    spec["url"] = url.into();
    Kind::Http { spec: Box::new(serde_json::from_value(spec).unwrap()), batched }
}

fn http(web: &Web, spec: Value) -> Box<dyn Sink> {
    open(&kind(spec, web.url("/in"), false), "".into())
}

async fn one(sink: &dyn Sink) -> Result<(), (Verdict, String)> {
    let written = sink.write(&[operation(1, "{\"a\":1}")]).await;
    match written.failed.into_iter().next() {
        None => Ok(()),
        Some((_, failure)) => Err((failure.verdict, failure.message.into())),
    }
}

#[tokio::test]
async fn answers_mean_what_the_table_says() {
    for (answer, expected) in [
        (Answer::status(200), None),
        (Answer::status(202), None),
        (
            Answer::with(422, "", "no\u{1b}[31m such\nuser"),
            Some((Verdict::Never, "422 Unprocessable Entity: no\\u{1b}[31m such\\nuser")),
        ),
        (Answer::with(429, "retry-after: 7\r\n", ""), Some((Verdict::After(Duration::from_secs(7)), "429"))),
        (Answer::with(503, "Retry-After: 9\r\n", ""), Some((Verdict::After(Duration::from_secs(9)), "503"))),
        (Answer::status(503), Some((Verdict::Down, "503"))),
        (Answer::status(500), Some((Verdict::Backoff, "500"))),
        (Answer::status(404), Some((Verdict::Down, "404"))),
        (Answer::status(410), Some((Verdict::Never, "410"))),
        (Answer::with(302, "location: /elsewhere\r\n", ""), Some((Verdict::Down, "302"))),
        (Answer::Last(b"garbage\r\n\r\n".to_vec()), Some((Verdict::Backoff, "POST 127.0.0.1"))),
        (Answer::Last(Vec::new()), Some((Verdict::Backoff, "POST 127.0.0.1"))),
        (Answer::Last(b"HTTP/1.1 20".to_vec()), Some((Verdict::Backoff, "POST 127.0.0.1"))),
        (Answer::Reset, Some((Verdict::Backoff, "POST 127.0.0.1"))),
        // The status says that it was taken; what becomes of the body changes nothing.
        (Answer::Last(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf".to_vec()), None),
        (
            Answer::Last(b"HTTP/1.1 400 No\r\ncontent-length: 100\r\n\r\nhalf".to_vec()),
            Some((Verdict::Never, "400 Bad Request: half")),
        ),
    ] {
        let reply = answer.clone();
        let web = Web::start_with(move |_| reply.clone()).await;
        let result = one(&*http(&web, json!({ "timeout": "10s" }))).await;
        match (result, expected) {
            (Ok(()), None) => {}
            (Err((verdict, message)), Some((expected, text))) => {
                assert_eq!(verdict, expected, "{answer:?}: {message}");
                assert!(message.contains(text) && !message.contains("/in"), "{message}");
            }
            (result, _) => panic!("{answer:?}: {result:?}"),
        }
        assert_eq!(web.seen().len(), 1, "nothing is followed and nothing repeated: {answer:?}");
    }
}

#[tokio::test]
async fn a_request_carries_the_payload_and_its_identity() {
    let web = Web::start_with(|_| Answer::status(204)).await;
    let spec = json!({ "method": "PUT", "headers": { "X-Case": "{payload.a}" }, "sign": { "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw" } });
    let sink = open(&kind(spec, web.url("/in/{payload.a}?k={key}"), false), "".into());
    let operation = keyed(1, Some("a b"), "{ \"a\" : \"x/y\" }");
    assert_eq!(verdicts(&sink.write(std::slice::from_ref(&operation)).await), []);
    let seen = &web.seen()[0];
    assert_eq!((seen.line.as_str(), seen.body.as_str()), ("PUT /in/x%2Fy?k=a%20b", "{ \"a\" : \"x/y\" }"));
    let id = operation.delivery_id();
    let header = |name: &str| seen.headers.get(name).map(String::as_str);
    assert_eq!((header("webhook-id"), header("idempotency-key")), (Some(id.as_str()), Some(id.as_str())));
    assert_eq!((header("x-case"), header("content-type")), (Some("x/y"), Some("application/json")));
    assert!(header("webhook-signature").unwrap().starts_with("v1,"));
    assert_eq!(header("accept-encoding"), None);
}

#[tokio::test]
async fn a_connection_is_used_again_unless_its_answer_came_too_late() {
    let silent = Arc::new(AtomicBool::new(false));
    let quiet = silent.clone();
    let web = Web::start_with(move |_| {
        if quiet.swap(false, Ordering::SeqCst) { Answer::Silence } else { Answer::with(200, "", "ok") }
    })
    .await;
    let sink = http(&web, json!({ "timeout": "300ms" }));
    assert_eq!(one(&*sink).await, Ok(()));
    assert_eq!(one(&*sink).await, Ok(()));
    silent.store(true, Ordering::SeqCst);
    let (verdict, message) = one(&*sink).await.unwrap_err();
    assert_eq!(verdict, Verdict::Backoff);
    assert!(message.contains("no answer within 300ms"), "{message}");
    assert_eq!(one(&*sink).await, Ok(()));
    let seen = web.seen();
    let connections: Vec<usize> = seen.iter().map(|request| request.connection).collect();
    assert_eq!(connections, [1, 1, 1, 2]);
    let ids: Vec<&str> = seen.iter().map(|request| request.headers["webhook-id"].as_str()).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
}

#[tokio::test]
async fn a_body_without_end_costs_neither_time_nor_memory() {
    for status in [200, 400] {
        let web = Web::start_with(move |_| Answer::Endless(status)).await;
        let before = Instant::now();
        let result = one(&*http(&web, json!({ "timeout": "60s" }))).await;
        assert!(before.elapsed() < Duration::from_secs(30));
        match result {
            Ok(()) => assert_eq!(status, 200),
            Err((verdict, message)) => {
                assert_eq!((status, verdict), (400, Verdict::Never));
                assert!(message.chars().count() < 300, "{message}");
            }
        }
    }
}

#[tokio::test]
async fn the_files_verdicts_win_over_the_table() {
    let web = Web::start_with(|_| Answer::status(404)).await;
    assert_eq!(one(&*http(&web, json!({ "verdicts": { "404": "ok" } }))).await, Ok(()));
    let sink = http(&web, json!({ "verdicts": { "4xx": "backoff" } }));
    assert_eq!(one(&*sink).await.unwrap_err().0, Verdict::Backoff);
}

/// A server that refuses a batch in which a word stands, as a whole, and keeps the rest.
async fn picky(status: u16) -> (Web, Arc<AtomicUsize>) {
    let requests = Arc::new(AtomicUsize::new(0));
    let counter = requests.clone();
    let web = Web::start_with(move |request| {
        counter.fetch_add(1, Ordering::SeqCst);
        Answer::status(if request.body.contains("bad") { status } else { 200 })
    })
    .await;
    (web, requests)
}

fn accepted(web: &Web) -> Vec<u64> {
    let fine = |request: &&Seen| !request.body.contains("bad");
    let bodies: Vec<Vec<Value>> =
        web.seen().iter().filter(fine).map(|request| serde_json::from_str(&request.body).unwrap()).collect();
    bodies.concat().iter().map(|value| value["n"].as_u64().unwrap()).collect()
}

#[tokio::test]
async fn a_refused_batch_is_halved_to_the_bad_record() {
    for status in [422, 413] {
        let (web, requests) = picky(status).await;
        let sink = open(&kind(json!({}), web.url("/"), true), "".into());
        let batch: Vec<Operation> = (0..100)
            .map(|n| operation(n, &if n == 37 { r#"{"n":37,"bad":1}"#.to_owned() } else { format!("{{\"n\":{n}}}") }))
            .collect();
        let written = sink.write(&batch).await;
        assert_eq!(verdicts(&written), [(37, Verdict::Never)]);
        assert!(written.failed[0].1.message.contains(&status.to_string()), "{written:?}");
        let expected: Vec<u64> = (0..100).filter(|n| *n != 37).collect();
        assert_eq!(accepted(&web), expected, "each once, in order");
        assert!(requests.load(Ordering::SeqCst) <= 15, "{requests:?} requests");
    }
}

#[tokio::test]
async fn what_follows_a_refused_record_of_its_key_is_not_sent_past_it() {
    let (web, _) = picky(400).await;
    let sink = open(&kind(json!({}), web.url("/"), true), "".into());
    let batch = [
        keyed(0, Some("k"), r#"{"n":0}"#),
        keyed(1, Some("k"), r#"{"n":1,"bad":1}"#),
        keyed(2, Some("other"), r#"{"n":2}"#),
        keyed(3, Some("k"), r#"{"n":3}"#),
        keyed(4, None, r#"{"n":4}"#),
    ];
    assert_eq!(verdicts(&sink.write(&batch).await), [(1, Verdict::Never), (3, Verdict::Backoff)]);
    assert_eq!(accepted(&web), [0, 2, 4]);
}

#[tokio::test]
async fn an_outage_in_the_middle_of_halving_stops_there() {
    let web = Web::start_with(|request| {
        Answer::status(match request.body.as_str() {
            body if body.contains("bad") => 422,
            body if body.contains("\"n\":3") => 502,
            _ => 200,
        })
    })
    .await;
    let sink = open(&kind(json!({}), web.url("/"), true), "".into());
    let batch: Vec<Operation> = [r#"{"n":0}"#, r#"{"n":1,"bad":1}"#, r#"{"n":2}"#, r#"{"n":3}"#]
        .iter()
        .zip(0..)
        .map(|(payload, n)| operation(n, payload))
        .collect();
    let failed = verdicts(&sink.write(&batch).await);
    assert_eq!(failed, [(1, Verdict::Never), (2, Verdict::Down), (3, Verdict::Down)]);
}

#[tokio::test]
async fn a_batch_that_is_refused_whole_is_not_tried_record_by_record_for_ever() {
    let (web, requests) = picky(400).await;
    let sink = open(&kind(json!({}), web.url("/"), true), "".into());
    let batch: Vec<Operation> = (0..1_000).map(|n| operation(n, "{\"bad\":1}")).collect();
    let failed = verdicts(&sink.write(&batch).await);
    assert_eq!(failed.len(), 1_000);
    let never = failed.iter().filter(|(_, verdict)| *verdict == Verdict::Never).count();
    assert!((1..=16).contains(&never) && requests.load(Ordering::SeqCst) < 100, "{never} {requests:?}");
}

#[tokio::test]
async fn a_wait_that_the_target_names_as_a_date_is_kept() {
    let at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(1_000);
    let date = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&at).unwrap();
    for status in [429, 503] {
        let date = date.clone();
        let web = Web::start_with(move |_| Answer::with(status, &format!("retry-after: {date}\r\n"), "")).await;
        match one(&*http(&web, json!({}))).await {
            // A second is lost in the date, and the test takes its time.
            Err((Verdict::After(wait), _)) => {
                assert!(wait > Duration::from_secs(800) && wait <= Duration::from_secs(1_000));
            }
            other => panic!("{status}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_proxy_is_used_only_where_the_file_names_one_and_gets_its_own_credentials() {
    let proxy =
        Web::start_with(|request| Answer::status(if request.line.starts_with("CONNECT") { 407 } else { 200 })).await;
    let address = proxy.url("").replace("http://", "http://user:canary@");
    let through = |url: &str| open(&kind(json!({ "proxy": address }), url.to_owned(), false), "".into());
    assert_eq!(one(&*through("http://me:word@target.invalid/in?a=1")).await, Ok(()));
    let (verdict, message) = one(&*through("https://me:word@target.invalid/in")).await.unwrap_err();
    assert_eq!(verdict, Verdict::Down);
    assert!(!message.contains("canary") && !message.contains("word"), "{message}");
    let seen = proxy.seen();
    let lines: Vec<&str> = seen.iter().map(|request| request.line.as_str()).collect();
    assert_eq!(lines, ["POST http://target.invalid/in?a=1", "CONNECT target.invalid:443"]);
    for request in &seen {
        assert_eq!(request.headers.get("proxy-authorization").map(String::as_str), Some("Basic dXNlcjpjYW5hcnk="));
    }
    assert_eq!(seen[0].headers.get("authorization").map(String::as_str), Some("Basic bWU6d29yZA=="));
    assert_eq!(seen[1].headers.get("authorization"), None, "what is for the target stays in the tunnel");
    // Nobody is there: the proxy is named, its password is not.
    let gone = json!({ "proxy": "http://user:canary@127.0.0.1:1" });
    let (verdict, message) = one(&*open(&kind(gone, "http://h/".to_owned(), false), "".into())).await.unwrap_err();
    assert!(verdict == Verdict::Down && !message.contains("canary"), "{message}");
}

#[tokio::test]
async fn secrets_stand_in_no_message() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "whsec_canary").unwrap();
    let spec = json!({ "sign": { "secret_file": secret } });
    let url = "http://user:canary@127.0.0.1:1/canary?canary".to_owned();
    let error = sink::open(&kind(spec, url.clone(), false), &context("".into())).err().unwrap();
    assert!(!error.to_string().contains("canary"), "{error}");
    let (verdict, message) = one(&*open(&kind(json!({}), url, false), "".into())).await.unwrap_err();
    assert_eq!(verdict, Verdict::Down);
    assert!(message.contains("127.0.0.1:1") && !message.contains("canary") && !message.contains("user"), "{message}");
}
