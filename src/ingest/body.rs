//! Reading a request's body with a bound on its size and on each wait.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures::{Stream, StreamExt as _};
use http::{HeaderMap, StatusCode};

use tokio::time::Instant;

use super::admit::{Budget, Held};
use super::reply::Problem;

/// How long one part of a body may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes a second that a body as a whole must bring once that time has passed.
const SLOWEST: u64 = 1 << 10;

/// A body as it comes in.
pub struct Incoming(Pin<Box<dyn Stream<Item = Result<Bytes, warp::Error>> + Send + Sync>>);

impl Incoming {
    /// Wraps a body.
    pub fn new<B: Buf>(stream: impl Stream<Item = Result<B, warp::Error>> + Send + Sync + 'static) -> Self {
        Self(Box::pin(stream.map(|part| {
            part.map(|mut part| {
                let len = part.remaining();
                part.copy_to_bytes(len)
            })
        })))
    }

    /// The next part; `None` = the end.
    ///
    /// # Errors
    /// 408 when it takes too long, 400 when the connection broke.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Problem> {
        match tokio::time::timeout(PATIENCE, self.0.next()).await {
            Ok(None) => Ok(None),
            Ok(Some(Ok(part))) => Ok(Some(part)),
            Ok(Some(Err(_))) => Err(Problem::malformed("the body broke off")),
            Err(_) => Err(slow()),
        }
    }
}

/// The whole body, at most `limit` bytes of it.
///
/// # Errors
/// 413 before more than that is held, 408 when it trickles; as [`Incoming::next`].
pub async fn read_all(headers: &HeaderMap, body: &mut Incoming, limit: u64) -> Result<Bytes, Problem> {
    read(headers, body, limit, &mut |_| Ok(())).await
}

/// As [`read_all`]; what has come in is held against `budget` while more is waited for.
///
/// # Errors
/// 429 when too much of others is held; as [`read_all`].
pub(super) async fn read_held(
    headers: &HeaderMap,
    body: &mut Incoming,
    limit: u64,
    budget: &Arc<Budget>,
) -> Result<(Bytes, Held), Problem> {
    let mut held = budget.take(0)?;
    let whole = read(headers, body, limit, &mut |bytes| held.more(bytes)).await?;
    Ok((whole, held))
}

async fn read(
    headers: &HeaderMap,
    body: &mut Incoming,
    limit: u64,
    hold: &mut (dyn FnMut(u64) -> Result<(), Problem> + Send),
) -> Result<Bytes, Problem> {
    let announced: u64 = headers.get("content-length").and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0);
    if announced > limit {
        return Err(Problem::too_large(announced, limit));
    }
    let started = Instant::now();
    let (mut first, mut whole, mut size) = (Bytes::new(), BytesMut::new(), 0);
    while let Some(part) = body.next().await? {
        size += part.len() as u64;
        if size > limit {
            return Err(Problem::too_large(size, limit));
        }
        if started.elapsed() > PATIENCE + Duration::from_secs(size / SLOWEST) {
            return Err(slow());
        }
        hold(part.len() as u64)?;
        if first.is_empty() {
            // Most often it is the only one.
            first = part;
            continue;
        }
        if whole.is_empty() {
            whole.extend_from_slice(&first);
        }
        whole.extend_from_slice(&part);
    }
    Ok(if whole.is_empty() { first } else { whole.freeze() })
}

fn slow() -> Problem {
    Problem::new(StatusCode::REQUEST_TIMEOUT, "slow_body", "the body came too slowly")
}
