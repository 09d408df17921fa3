//! The other ends of a benchmark: a bare warp echo to compare with, and an HTTP sink that counts what it gets.
//!
//! `peer echo PORT` answers each POST with the bytes it got. `peer sink PORT [MILLISECONDS]` counts records in JSON array or
//! NDJSON bodies and answers `GET /count` with the number so far and the time of the last one; with a number it waits
//! that long before each answer. `peer copy BROKERS FROM TO COUNT` carries that many messages from a topic to another with
//! one consumer and one producer of the client library, acks=all, and prints how many a second. `peer append REDIS COUNT`
//! appends so many records of 512 bytes to Redis Streams by the log itself, 50 calls of 100 records under way.

#![allow(clippy::print_stdout, clippy::cast_precision_loss, clippy::expect_used)]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use warp::Filter as _;

/// The whole body, at most 16 MiB of it.
async fn whole<S, B>(mut body: S) -> Result<Bytes, warp::Rejection>
where
    S: futures::Stream<Item = Result<B, warp::Error>> + Unpin,
    B: bytes::Buf,
{
    let mut out = Vec::new();
    while let Some(part) = body.next().await {
        let mut part = part.map_err(|_| warp::reject())?;
        let len = part.remaining();
        out.extend_from_slice(&part.copy_to_bytes(len));
        if out.len() > 16 << 20 {
            return Err(warp::reject());
        }
    }
    Ok(out.into())
}

/// How many records a body carries: the elements of an array, or its lines.
fn records(body: &[u8]) -> u64 {
    let lines = |body: &[u8]| body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
    let count = if body.first() == Some(&b'[') {
        serde_json::from_slice::<Vec<&serde_json::value::RawValue>>(body).map_or(0, |elements| elements.len())
    } else {
        lines(body)
    };
    count as u64
}

/// From one topic to the other; every delivery is awaited, as many at once as the producer's queue holds.
async fn copy(brokers: &str, from: &str, to: &str, count: usize) -> rdkafka::error::KafkaResult<()> {
    use rdkafka::consumer::{Consumer as _, StreamConsumer};
    use rdkafka::producer::{FutureProducer, FutureRecord};
    let mut config = rdkafka::ClientConfig::new();
    config.set("bootstrap.servers", brokers).set("enable.idempotence", "true").set("linger.ms", "5");
    let producer: FutureProducer = config.create()?;
    let mut config = rdkafka::ClientConfig::new();
    config.set("bootstrap.servers", brokers).set("auto.offset.reset", "earliest").set("enable.auto.commit", "false");
    let consumer: StreamConsumer = config.set("group.id", format!("peer-{}", std::process::id())).create()?;
    consumer.subscribe(&[from])?;
    let mut began = None;
    let mut messages = consumer.stream().take(count);
    let mut under_way = futures::stream::FuturesUnordered::new();
    while let Some(message) = messages.next().await {
        let message = message?;
        began.get_or_insert_with(std::time::Instant::now);
        let record = FutureRecord::to(to)
            .key(rdkafka::Message::key(&message).unwrap_or_default())
            .payload(rdkafka::Message::payload(&message).unwrap_or_default());
        under_way.push(producer.send_result(record).map_err(|(error, _)| error)?);
        if under_way.len() >= 10_000 {
            under_way.next().await.and_then(Result::ok).transpose().map_err(|(error, _)| error)?;
        }
    }
    while let Some(delivery) = under_way.next().await {
        delivery.ok().transpose().map_err(|(error, _)| error)?;
    }
    let seconds = began.map_or(0.0, |began| began.elapsed().as_secs_f64());
    println!("one consumer, one producer: {:.0}/s", count as f64 / seconds);
    Ok(())
}

/// What `redis-benchmark -c 50 -P 100` does with XADD, done by the log.
async fn append(url: String, count: usize) {
    use futures::stream::FuturesUnordered;
    use walflow::clock::Clock;
    use walflow::record::{Record, RecordId};
    use walflow::source::foreign::open::Context;
    use walflow::source::redis::{RedisSourceSpec, open};
    let spec = RedisSourceSpec { url: Some(url), ..RedisSourceSpec::default() };
    let clock = Clock::system();
    let context = Context {
        namespace: format!("peer-{}", std::process::id()).parse().expect("a name"),
        number: 1,
        clock: clock.clone(),
        record_bytes: 1 << 20,
        key_window: Duration::from_secs(1),
        backlog_bytes: u64::MAX,
        strict: false,
    };
    let log = open(&spec, &context).expect("a log");
    let payload = Bytes::from(vec![b'x'; 512]);
    let records = || {
        let now = clock.now();
        let record = || Arc::new(Record::new(RecordId::new(now, 0, 1, fastrand::u64(..)), now, payload.clone()));
        (0..100).map(|_| record()).collect::<Vec<_>>()
    };
    let (began, mut under_way) = (std::time::Instant::now(), FuturesUnordered::new());
    for _ in 0..count / 100 {
        if under_way.len() >= 50 {
            under_way.next().await;
        }
        let handed = log.append(records()).await.expect("taken");
        under_way.push(async move { assert!(handed.await.iter().all(Result::is_ok), "not all are written") });
    }
    while under_way.next().await.is_some() {}
    println!("appended to Redis Streams: {:.0}/s", count as f64 / began.elapsed().as_secs_f64());
    log.close().await;
}

#[tokio::main]
async fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [kind, brokers, from, to, count] = words.as_slice()
        && kind == "copy"
    {
        copy(brokers, from, to, count.parse().expect("a number")).await.expect("Kafka");
        return;
    }
    if let [kind, url, count] = words.as_slice()
        && kind == "append"
    {
        append(url.clone(), count.parse().expect("a number")).await;
        return;
    }
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with("--"));
    let (kind, port) = (words.next(), words.next().and_then(|port| port.parse().ok()));
    let wait = words.next().and_then(|millis| millis.parse().ok()).map(Duration::from_millis);
    let (Some(kind), Some(port)) = (kind, port) else {
        return; // `cargo bench` without words, or the test run: nothing to do.
    };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    if kind == "echo" {
        let echo = warp::post().and(warp::body::stream()).and_then(whole);
        warp::serve(echo.map(|body: Bytes| body.to_vec())).run(address).await;
        return;
    }
    let count = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&count);
    let read = warp::path("count").and(warp::get()).map(move || counter.load(Ordering::Relaxed).to_string());
    let take = warp::post().and(warp::body::stream()).and_then(move |body| {
        let count = Arc::clone(&count);
        async move {
            let body = whole(body).await?;
            if let Some(wait) = wait {
                tokio::time::sleep(wait).await;
            }
            count.fetch_add(records(&body), Ordering::Relaxed);
            Ok::<_, warp::Rejection>(warp::reply())
        }
    });
    warp::serve(read.or(take)).run(address).await;
}
