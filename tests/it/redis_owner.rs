//! Who reads a stream, on real servers: what others have read of a group is taken over, a hold outlives a large read and ends
//! when nothing is heard of it.

use std::sync::Arc;

use redis::Value;
use walflow::record::Position;
use walflow::source::foreign::broker::{Begin, Broker, Opened};
use walflow::source::redis::{RedisSourceSpec, open};
use walflow::units::Span;

use crate::proxy::{Proxy, Way};
use crate::redis_source::{
    PATIENCE, append, branch, command, context, handle, opened, payload, read, record, shared, spec, unique,
};
use crate::servers::Server;

fn offsets(entries: &[walflow::source::Entry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.position.offset()).collect()
}

/// Adds entries and lets another consumer read them before anybody else can.
async fn read_by_another(url: &str, stream: &str, payloads: &[&str], acknowledged: &[u64]) {
    let mut connection = redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.unwrap();
    let mut at_once = redis::pipe();
    at_once.atomic();
    for payload in payloads {
        let mut body = Vec::new();
        record(None, payload).encode(&mut body);
        at_once.cmd("XADD").arg(stream).arg("0-*").arg("r").arg(body);
    }
    at_once.cmd("XREADGROUP").arg("GROUP").arg("sink").arg("bob").arg("STREAMS").arg(stream).arg(">");
    for number in acknowledged {
        at_once.cmd("XACK").arg(stream).arg("sink").arg(format!("0-{number}"));
    }
    at_once.query_async::<Value>(&mut connection).await.unwrap();
}

#[tokio::test]
#[ignore = "needs a Redis server: run tests/run"]
async fn what_another_consumer_has_read_of_the_group_arrives_in_its_place() {
    let (url, namespace) = (shared(), unique());
    let stream = format!("walflow:{{{namespace}}}:stream:0");
    let broker = handle(&url, &namespace, 1);
    broker.prepare(&branch(), Begin::Earliest).await.unwrap();
    append(&broker, (1..=1_200).map(|n| record(Some("k"), &n.to_string())).collect()).await;
    // Before it starts: by hand, and by a program of another name. One of the entries was deleted meanwhile.
    for (consumer, count) in [("bob", "600"), ("older", "500")] {
        let words = ["XREADGROUP", "GROUP", "sink", consumer, "COUNT", count, "STREAMS", &stream, ">"];
        command(&url, &words).await;
    }
    command(&url, &["XDEL", &stream, "0-2"]).await;
    let mut hold = opened(&broker).await;
    assert_eq!(hold.cursor.single(), Position(0));
    let before = read(&mut hold, 1_199).await;
    assert_eq!(offsets(&before), std::iter::once(1).chain(3..=1_200).collect::<Vec<_>>());
    assert!(before.iter().all(|entry| payload(entry) == entry.position.offset().to_string()));
    // While it waits for more. What they acknowledge is theirs.
    for (first, acknowledged) in [(1_201, &[][..]), (1_206, &[1_207])] {
        read_by_another(&url, &stream, &["a", "b", "c"], acknowledged).await;
        append(&broker, vec![record(Some("k"), "d"), record(Some("k"), "e")]).await;
        let expected: Vec<u64> = (first..first + 5).filter(|number| !acknowledged.contains(number)).collect();
        assert_eq!(offsets(&read(&mut hold, expected.len()).await), expected, "in the order of the stream");
    }
    broker.progress(&branch(), &Position(1_210).into(), &[]);
    drop(hold);
    broker.close().await;
    let left: (u64, Value, Value, Value) =
        redis::from_redis_value(command(&url, &["XPENDING", &stream, "sink"]).await).unwrap();
    assert_eq!(left.0, 0, "nothing is left to anybody: {left:?}");
}

#[tokio::test]
#[ignore = "needs servers: run tests/run"]
async fn what_was_acknowledged_by_another_consumer_makes_nobody_ask_without_end() {
    let server = Server::start("redis").await;
    let url = format!("redis://{}", server.address());
    let stream = "walflow:{orders}:stream:0";
    let broker = handle(&url, "orders", 1);
    let mut hold = opened(&broker).await;
    read_by_another(&url, stream, &["theirs"], &[1]).await;
    append(&broker, vec![record(None, "ours")]).await;
    assert_eq!(offsets(&read(&mut hold, 1).await), [2]);
    read_by_another(&url, stream, &["theirs"], &[3]).await;
    // For how many seconds it runs, and how often it was asked for news.
    let asked = async || {
        let info: redis::InfoDict = redis::from_redis_value(command(&url, &["INFO", "everything"]).await).unwrap();
        let calls: Option<String> = info.get("cmdstat_xread");
        let calls = calls.and_then(|told| told.split(&['=', ','][..]).nth(1)?.parse::<u64>().ok());
        (info.get::<u64>("uptime_in_seconds").unwrap(), calls.unwrap_or(0))
    };
    let (begun, before) = asked().await;
    let later = tokio::time::timeout(PATIENCE, async {
        loop {
            let (now, calls) = asked().await;
            if now >= begun + 4 {
                return calls;
            }
            tokio::task::yield_now().await;
        }
    });
    let calls = later.await.unwrap() - before;
    assert!((1..10).contains(&calls), "it asks once in two seconds, not {calls} times in four");
    broker.close().await;
}

/// The one stream's owner; others have none.
async fn owns(broker: &Arc<dyn Broker>) -> Opened {
    loop {
        let hold = opened(broker).await;
        if hold.parts.as_ref().is_some_and(|parts| !parts.is_empty()) {
            return hold;
        }
        tokio::time::timeout(PATIENCE, hold.moved.cancelled()).await.expect("nobody lets the stream go");
    }
}

fn behind(proxy: &Proxy, namespace: &str, timeout: std::time::Duration) -> Arc<dyn Broker> {
    let url = format!("redis://{}", proxy.address());
    open(&RedisSourceSpec { timeout: Some(Span(timeout)), ..spec(&url, 1) }, &context(namespace)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Redis server: run tests/run"]
async fn an_owner_that_hears_nothing_stops_before_another_can_begin() {
    let (url, namespace) = (shared(), unique());
    let mut proxy = Proxy::start(url.strip_prefix("redis://").unwrap()).await;
    // A wait for one answer is longer than a hold: it has a deadline of its own.
    let one = behind(&proxy, &namespace, PATIENCE);
    let other = handle(&url, &namespace, 1);
    append(&other, (0..4).map(|n| record(Some("k"), &n.to_string())).collect()).await;
    let mut hold = owns(&one).await;
    let first = hold.subscription.next(1, 1).await.unwrap();
    proxy.stall(Way::Up);
    let mut taken = std::pin::pin!(owns(&other));
    let waiting = async {
        tokio::select! {
            biased;
            _ = &mut taken => panic!("another has the stream, and the first does not know"),
            () = hold.moved.cancelled() => {}
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap();
    // Three entries lie ready, and nothing is handed out any more.
    let mut more = hold.subscription.next(16, usize::MAX);
    assert!(futures::poll!(&mut more).is_pending());
    drop(more);
    let mut again = taken.await;
    assert_eq!(offsets(&read(&mut again, 4).await), [1, 2, 3, 4]);
    // What it ends now is not its own to end.
    one.progress(&branch(), &first[0].position.into(), &[]);
    drop(hold);
    proxy.restore().await;
    let nothing = opened(&one).await;
    assert_eq!(nothing.parts.as_deref(), Some(&[][..]), "it has found its way back");
    let stream = format!("walflow:{{{namespace}}}:stream:0");
    let pending: (u64, Value, Value, Value) =
        redis::from_redis_value(command(&url, &["XPENDING", &stream, "sink"]).await).unwrap();
    assert_eq!(pending.0, 4);
    one.close().await;
    other.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Redis server: run tests/run"]
async fn a_large_read_on_a_slow_line_costs_nobody_the_hold() {
    let (url, namespace) = (shared(), unique());
    let proxy = Proxy::start(url.strip_prefix("redis://").unwrap()).await;
    let direct = handle(&url, &namespace, 1);
    let text = "x".repeat(60_000);
    append(&direct, (0..64).map(|_| record(None, &text)).collect()).await;
    let slow = behind(&proxy, &namespace, PATIENCE);
    // Each connection has this for itself: an answer of 4 MB takes longer than a hold lasts without a word.
    proxy.slow(300_000);
    let started = std::time::Instant::now();
    let mut hold = owns(&slow).await;
    assert_eq!(read(&mut hold, 64).await.len(), 64);
    assert!(started.elapsed() > std::time::Duration::from_secs(10), "it was no slow read");
    assert!(!hold.moved.is_cancelled());
    slow.close().await;
    direct.close().await;
}
