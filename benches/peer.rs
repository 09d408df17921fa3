//! The other ends of a benchmark: a bare warp echo to compare with, and an HTTP sink that counts what it gets.
//!
//! `peer echo PORT` answers each POST with the bytes it got. `peer sink PORT [MILLISECONDS]` counts records in JSON array or
//! NDJSON bodies and answers `GET /count` with the number so far and the time of the last one; with a number it waits
//! that long before each answer.

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

#[tokio::main]
async fn main() {
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
