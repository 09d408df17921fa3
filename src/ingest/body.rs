//! Reading a request's body with a bound on its size and on each wait.

use std::pin::Pin;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures::{Stream, StreamExt as _};
use http::{HeaderMap, StatusCode};

use super::reply::Problem;

/// How long one part of a body may take.
const PATIENCE: Duration = Duration::from_secs(10);

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
            Err(_) => Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "slow_body", "the body came too slowly")),
        }
    }
}

/// The whole body, at most `limit` bytes of it.
///
/// # Errors
/// 413 before more than that is held; as [`Incoming::next`].
pub async fn read_all(headers: &HeaderMap, body: &mut Incoming, limit: u64) -> Result<Bytes, Problem> {
    let announced: u64 = headers.get("content-length").and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0);
    if announced > limit {
        return Err(Problem::too_large(announced, limit));
    }
    let Some(first) = body.next().await? else { return Ok(Bytes::new()) };
    let Some(second) = body.next().await? else {
        return if first.len() as u64 > limit { Err(Problem::too_large(first.len() as u64, limit)) } else { Ok(first) };
    };
    let mut whole = BytesMut::from(&*first);
    let mut part = Some(second);
    while let Some(bytes) = part {
        let size = (whole.len() + bytes.len()) as u64;
        if size > limit {
            return Err(Problem::too_large(size, limit));
        }
        whole.extend_from_slice(&bytes);
        part = body.next().await?;
    }
    Ok(whole.freeze())
}
