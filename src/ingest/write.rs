//! `POST /api/v1/wal/write`: one write.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use serde::Serialize;

use super::body::read_held;
use super::decode::Envelope;
use super::reply::{self, Durable, Problem};
use super::{Directory, Head, Incoming, Inlet, decode};
use crate::clock::Timestamp;
use crate::record::RecordId;
use crate::source::Admitted;

/// The largest body: the largest payload in base64, and room for the rest.
pub(super) const LARGEST_BODY: u64 = (16 << 20) / 3 * 4 + (64 << 10);

/// Makes one write durable
///
/// Answers when the write is durable, and not before. A repetition with the same idempotency key and the same content
/// gives the first answer again.
#[utoipa::path(
    post,
    path = "/api/v1/wal/write",
    tag = "writes",
    params(("Idempotency-Key" = Option<String>, Header, description = "At most 255 bytes; the field of the body when it is missing")),
    request_body = Envelope,
    responses(
        (status = 202, description = "Durable now", body = Accepted),
        (status = 404, description = "`no_namespace`; `other_shard`: it runs on instances of another shard"),
        (status = 408, description = "`slow_body`"),
        (status = 409, description = "`key_running`: the first write with this idempotency key is still under way; `loop`: its `origin` is this very region"),
        (status = 413, description = "`too_large`"),
        (status = 415, description = "`content_type`: the body is not JSON; `content_encoding`: it is packed"),
        (status = 422, description = "`schema`, `delay`, `target`, `key` or `key_reused`"),
        (status = 429, description = "`in_flight` or `rate`; see Retry-After"),
        (status = 501, description = "`unsupported`: the namespace's source cannot do this"),
        (status = 503, description = "`stopping`, `busy`, `backlog_full`, `broken` or `closed`; see Retry-After"),
        (status = 504, description = "`unknown`: nobody can say whether it is durable; repeat it with the same idempotency key"),
        (status = 507, description = "`disk_full`"),
    )
)]
pub(super) async fn write(directory: Arc<dyn Directory>, head: Arc<Head>, mut body: Incoming) -> warp::reply::Response {
    match try_write(&*directory, &head.headers, &mut body).await {
        Ok(admitted) => match answer(&admitted) {
            Ok(body) => reply::json(StatusCode::ACCEPTED, &body),
            Err(problem) => problem.into_response(),
        },
        Err(problem) => problem.failed().into_response(),
    }
}

async fn try_write(directory: &dyn Directory, headers: &HeaderMap, body: &mut Incoming) -> Result<Admitted, Problem> {
    directory.keys().check(headers)?;
    is_json(headers, &["application/json"])?;
    let (body, _instance) = read_held(headers, body, LARGEST_BODY, directory.instance_budget()).await?;
    one(directory, headers, body).await
}

async fn one(directory: &dyn Directory, headers: &HeaderMap, body: Bytes) -> Result<Admitted, Problem> {
    let envelope = decode::envelope(&body)?;
    let inlet = directory.inlet(&envelope.namespace)?;
    let bytes = body.len();
    let admitted = admit(&inlet, envelope, headers, &body).await;
    match &admitted {
        Ok(_) => inlet.received.accept(1, bytes),
        Err(_) => inlet.received.refuse(1),
    }
    admitted
}

async fn admit(inlet: &Inlet, envelope: Envelope<'_>, headers: &HeaderMap, body: &Bytes) -> Result<Admitted, Problem> {
    let _held = inlet.budget.take(body.len() as u64)?;
    inlet.budget.count(1)?;
    let key = match headers.get("idempotency-key") {
        Some(value) => Some(value.to_str().map_err(|_| Problem::malformed("the Idempotency-Key is not plain text"))?),
        None => None,
    };
    let write = envelope.write(inlet, body, key)?;
    let admitted = inlet.log.admit(vec![write]).await?;
    admitted.into_iter().next().ok_or_else(|| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "no answer"))
}

/// 415 for a body of another kind or one that is packed; none at all is taken for JSON.
pub(super) fn is_json(headers: &HeaderMap, kinds: &[&str]) -> Result<(), Problem> {
    if let Some(coding) =
        headers.get("content-encoding").filter(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
    {
        let coding = coding.to_str().unwrap_or("an unknown coding");
        let detail =
            format!("this takes bodies as they are, not packed with {coding}; send it without Content-Encoding");
        return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "content_encoding", detail));
    }
    let Some(kind) = headers.get("content-type") else { return Ok(()) };
    let kind = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if kinds.contains(&kind.as_str()) || kind.ends_with("+json") {
        return Ok(());
    }
    let detail = format!("this takes {}, not {kind}", kinds.join(" or "));
    Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "content_type", detail))
}

/// A write that is durable.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Accepted {
    durable: Durable,
    /// The record's id, by which it is found again.
    message_id: RecordId,
    message: &'static str,
    /// When it was written.
    timestamp: Timestamp,
    /// When it is due, if it waits.
    #[serde(skip_serializing_if = "Option::is_none")]
    deliver_at: Option<Timestamp>,
}

/// The body of a 202, or the refusal.
pub(super) fn answer(admitted: &Admitted) -> Result<Accepted, Problem> {
    let accepted = |id: &RecordId, written_at: &Timestamp, deliver_at: Option<Timestamp>| Accepted {
        durable: Durable::Succeeded,
        message_id: *id,
        message: if deliver_at.is_some() { "durable, delivered when it is due" } else { "durable" },
        timestamp: *written_at,
        deliver_at,
    };
    match admitted {
        Admitted::Appended { id, written_at, .. } => Ok(accepted(id, written_at, None)),
        Admitted::Parked { id, written_at, due_at } => Ok(accepted(id, written_at, Some(*due_at))),
        Admitted::Repeated { id, written_at, due_at } => Ok(accepted(id, written_at, *due_at)),
        Admitted::KeyReused => {
            let detail = "this idempotency key was used for another write";
            Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "key_reused", detail).failed())
        }
        Admitted::KeyRunning => {
            let detail = "the first write with this idempotency key is still under way; repeat it after a while";
            let problem = Problem::new(StatusCode::CONFLICT, "key_running", detail);
            Err(Problem { durable: Some(Durable::Unknown), ..problem })
        }
    }
}
