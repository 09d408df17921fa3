//! `redis` against a real server, behind a relay that can cut, hold and mend the connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use walflow::sink::{BatchStyle, Kind, Operation, Sink, Verdict};

use super::{PAYLOADS, Target, conforms, open, operation, verdicts};

fn server() -> redis::ConnectionInfo {
    use redis::IntoConnectionInfo as _;
    let url = std::env::var("WALFLOW_TEST_REDIS").expect("WALFLOW_TEST_REDIS names a Redis server");
    url.as_str().into_connection_info().unwrap()
}

/// Asks the server itself.
async fn ask(command: &[&str]) -> redis::Value {
    let client = redis::Client::open(server()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let mut query = redis::cmd(command[0]);
    query.arg(&command[1..]);
    query.query_async(&mut connection).await.unwrap()
}

async fn text(command: &[&str]) -> Option<String> {
    redis::from_redis_value(ask(command).await).unwrap()
}

/// A relay in front of the server.
struct Relay {
    address: SocketAddr,
    task: Option<JoinHandle<()>>,
    /// While true, nothing goes from the client to the server.
    held: Arc<watch::Sender<bool>>,
    accepted: Arc<AtomicUsize>,
}

impl Relay {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut relay =
            Self { address, task: None, held: Arc::new(watch::Sender::new(false)), accepted: Arc::default() };
        relay.serve(listener);
        relay
    }

    fn serve(&mut self, listener: TcpListener) {
        let (held, accepted) = (self.held.clone(), self.accepted.clone());
        self.task = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                accepted.fetch_add(1, Ordering::SeqCst);
                connections.spawn(carry(client, held.subscribe()));
            }
        }));
    }

    async fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
    }

    async fn mend(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.serve(listener);
    }

    fn sink(&self, mut spec: Value) -> Box<dyn Sink> {
        spec["url"] = format!("redis://{}", self.address).into();
        open(&Kind::Redis(Box::new(serde_json::from_value(spec).unwrap())), "".into())
    }
}

async fn carry(client: TcpStream, mut held: watch::Receiver<bool>) {
    let redis::ConnectionAddr::Tcp(host, port) = server().addr().clone() else { panic!("a TCP address") };
    let server = TcpStream::connect((host.as_str(), port)).await.unwrap();
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let there = async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut bytes = vec![0; 65_536];
        while let Ok(count @ 1..) = from_client.read(&mut bytes).await {
            held.wait_for(|held| !held).await.unwrap();
            if to_server.write_all(&bytes[..count]).await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = there => {}
        _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
    }
}

/// A list-like view of what was set: each record appends to a stream that a test owns.
struct Stream {
    relay: Relay,
    key: String,
    last: String,
}

impl Target for Stream {
    fn sink(&self) -> Box<dyn Sink> {
        let key = format!("{}:{{payload.to}}", self.key);
        self.relay.sink(json!({ "cases": [{ "command": "xadd", "key": key }] }))
    }

    fn refused(&self) -> Option<String> {
        Some(r#"{"to":"text"}"#.to_owned())
    }

    async fn arrived(&mut self) -> Vec<String> {
        type Entries = Vec<(String, Vec<(String, String)>)>;
        let key = format!("{}:a", self.key);
        let from = format!("({}", self.last);
        let entries: Entries = redis::from_redis_value(ask(&["XRANGE", &key, &from, "+"]).await).unwrap();
        if let Some((id, _)) = entries.last() {
            self.last.clone_from(id);
        }
        entries
            .into_iter()
            .map(|(_, fields)| fields.into_iter().find(|(name, _)| name == "payload").unwrap().1)
            .collect()
    }

    async fn stop(&mut self) {
        self.relay.stop().await;
    }

    async fn start(&mut self) {
        self.relay.mend().await;
    }
}

#[tokio::test]
#[ignore = "needs a Redis server: WALFLOW_TEST_REDIS"]
async fn redis_conforms() {
    let key = "walflow-test:conforms".to_owned();
    ask(&["DEL", &format!("{key}:a")]).await;
    ask(&["SET", &format!("{key}:text"), "no stream"]).await;
    conforms(Stream { relay: Relay::start().await, key, last: "0-0".to_owned() }).await;
}

#[tokio::test]
#[ignore = "needs a Redis server: WALFLOW_TEST_REDIS"]
async fn every_command_does_what_it_says_and_a_wrong_type_is_its_records_own() {
    let key = |name: &str| format!("walflow-test:commands:{name}");
    ask(&["DEL", &key("set"), &key("hash"), &key("number"), &key("gone"), &key("stream")]).await;
    ask(&["SET", &key("gone"), "x"]).await;
    let relay = Relay::start().await;
    let sink = relay.sink(json!({ "cases": [
        { "when": "0", "command": "set", "key": key("set"), "value": "{payload.v}", "ttl": "1h" },
        { "when": "1", "command": "del", "key": key("gone") },
        { "when": "2", "command": "hset", "key": key("hash"), "fields": { "v": "{payload.v}", "all": "{payload}" } },
        { "when": "3", "command": "incrby", "key": key("number"), "by": "{payload.n}" },
        { "when": "4", "command": "xadd", "key": key("stream"), "fields": { "v": "{payload.v}" } },
        { "when": "5", "command": "incrby", "key": key("hash") },
    ] }));
    assert_eq!(sink.batch_style(), BatchStyle::Independent);
    let payload = r#"{ "v": {"a": 1.50}, "n": 7 }"#;
    let of = |case: usize| Operation { case, ..operation(u16::try_from(case).unwrap(), payload) };
    let batch = [of(0), of(5), of(1), of(2), of(5), of(3), of(4), of(3)];
    let written = sink.write(&batch).await;
    // The first incrby makes the key a number, so the hash fails on it; the others never notice.
    assert_eq!(verdicts(&written), [(3, Verdict::Never)]);
    assert!(written.failed[0].1.message.contains("WRONGTYPE"), "{written:?}");
    assert_eq!(text(&["GET", &key("set")]).await.as_deref(), Some(r#"{"a":1.50}"#));
    let ttl: i64 = redis::from_redis_value(ask(&["TTL", &key("set")]).await).unwrap();
    assert!((3_500..=3_600).contains(&ttl), "{ttl}");
    assert_eq!(text(&["GET", &key("gone")]).await, None);
    assert_eq!(text(&["GET", &key("number")]).await.as_deref(), Some("14"));
    assert_eq!(text(&["GET", &key("hash")]).await.as_deref(), Some("2"));
    ask(&["DEL", &key("hash")]).await;
    assert_eq!(verdicts(&sink.write(&[of(2)]).await), []);
    assert_eq!(text(&["HGET", &key("hash"), "all"]).await.as_deref(), Some(payload));
    let entries: i64 = redis::from_redis_value(ask(&["XLEN", &key("stream")]).await).unwrap();
    assert_eq!(entries, 1);
}

#[tokio::test]
#[ignore = "needs a Redis server: WALFLOW_TEST_REDIS"]
async fn a_late_answer_is_waited_for_behind_what_was_sent_before() {
    let key = "walflow-test:late";
    ask(&["DEL", key]).await;
    let relay = Relay::start().await;
    let sink = relay.sink(json!({ "timeout": "200ms", "cases": [{ "key": key, "value": "{payload}" }] }));
    assert_eq!(verdicts(&sink.write(&[operation(0, "0")]).await), []);
    relay.held.send_replace(true);
    let written = sink.write(&[operation(1, "1")]).await;
    assert_eq!(verdicts(&written), [(0, Verdict::Backoff)]);
    assert!(written.failed[0].1.message.contains("no answer within 200ms"), "{written:?}");
    // The newer value is sent while the older one is still on its way: it must not be overtaken by it.
    let newer = [operation(2, "2")];
    let (written, ()) = tokio::join!(sink.write(&newer), async {
        tokio::task::yield_now().await;
        relay.held.send_replace(false);
    });
    assert_eq!(verdicts(&written), []);
    assert_eq!(text(&["GET", key]).await.as_deref(), Some("2"));
    assert_eq!(relay.accepted.load(Ordering::SeqCst), 1, "one connection, so one order");
}

#[tokio::test]
#[ignore = "needs a Redis server: WALFLOW_TEST_REDIS"]
async fn a_wrong_password_is_an_outage_and_stands_in_no_message() {
    let redis::ConnectionAddr::Tcp(host, port) = server().addr().clone() else { panic!("a TCP address") };
    let spec =
        json!({ "url": format!("redis://someone:canary@{host}:{port}"), "cases": [{ "key": "walflow-test:x" }] });
    let sink = open(&Kind::Redis(Box::new(serde_json::from_value(spec).unwrap())), "".into());
    let written = sink.write(&[operation(0, PAYLOADS[0]), operation(1, PAYLOADS[1])]).await;
    assert_eq!(verdicts(&written), [(0, Verdict::Down), (1, Verdict::Down)]);
    assert!(!written.failed[0].1.message.contains("canary"), "{written:?}");
}

#[tokio::test]
#[ignore = "needs a Redis server: WALFLOW_TEST_REDIS"]
async fn a_broken_connection_is_made_anew_under_load() {
    let key = "walflow-test:load";
    let mut relay = Relay::start().await;
    let sink: Arc<dyn Sink> = relay
        .sink(json!({ "timeout": "2s", "cases": [{ "command": "set", "key": format!("{key}:{{payload}}") }] }))
        .into();
    let mut writers = JoinSet::new();
    for writer in 0..8_u16 {
        let sink = sink.clone();
        writers.spawn(async move {
            for number in 0..50 {
                let one = [operation(number, &(writer * 100 + number).to_string())];
                let sent = async {
                    while !sink.write(&one).await.failed.is_empty() {
                        tokio::task::yield_now().await;
                    }
                };
                tokio::time::timeout(Duration::from_secs(30), sent).await.unwrap();
            }
        });
    }
    for _ in 0..3 {
        relay.stop().await;
        relay.mend().await;
    }
    writers.join_all().await;
    for writer in 0..8 {
        for number in 0..50 {
            let name = format!("{key}:{}", writer * 100 + number);
            assert!(text(&["GETDEL", &name]).await.is_some(), "{name}");
        }
    }
}
