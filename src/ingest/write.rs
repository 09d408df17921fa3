//! `POST /api/v1/wal/write`: one write.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use serde_json::{Map, Value, json};

use super::reply::{self, Durable, Problem};
use super::{Directory, Incoming, decode, read_all};
use crate::clock::Timestamp;
use crate::record::RecordId;
use crate::source::Admitted;

/// The largest body: the largest payload in base64, and room for the rest.
pub(super) const LARGEST_BODY: u64 = (16 << 20) / 3 * 4 + (64 << 10);

pub(super) async fn write(
    directory: Arc<dyn Directory>,
    headers: HeaderMap,
    mut body: Incoming,
) -> warp::reply::Response {
    match try_write(&*directory, &headers, &mut body).await {
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
    let body = read_all(headers, body, LARGEST_BODY).await?;
    let _instance = directory.instance_budget().take(body.len() as u64)?;
    one(directory, headers, body).await
}

async fn one(directory: &dyn Directory, headers: &HeaderMap, body: Bytes) -> Result<Admitted, Problem> {
    let envelope = decode::envelope(&body)?;
    let inlet = directory.inlet(&envelope.namespace)?;
    let _held = inlet.budget.take(body.len() as u64)?;
    inlet.budget.count(1)?;
    let key = match headers.get("idempotency-key") {
        Some(value) => Some(value.to_str().map_err(|_| Problem::malformed("the Idempotency-Key is not plain text"))?),
        None => None,
    };
    let write = envelope.write(&inlet, &body, key)?;
    let admitted = inlet.log.admit(vec![write]).await?;
    admitted.into_iter().next().ok_or_else(|| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "no answer"))
}

/// 415 for a body of another kind; none at all is taken for JSON.
pub(super) fn is_json(headers: &HeaderMap, kinds: &[&str]) -> Result<(), Problem> {
    let Some(kind) = headers.get("content-type") else { return Ok(()) };
    let kind = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if kinds.contains(&kind.as_str()) || kind.ends_with("+json") {
        return Ok(());
    }
    let detail = format!("this takes {}, not {kind}", kinds.join(" or "));
    Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "content_type", detail))
}

/// The body of a 202, or the refusal.
pub(super) fn answer(admitted: &Admitted) -> Result<Value, Problem> {
    match admitted {
        Admitted::Appended { id, written_at, .. } => Ok(accepted(*id, *written_at, None)),
        Admitted::Parked { id, written_at, due_at } => Ok(accepted(*id, *written_at, Some(*due_at))),
        Admitted::Repeated { id, written_at, due_at } => Ok(accepted(*id, *written_at, *due_at)),
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

fn accepted(id: RecordId, written_at: Timestamp, due_at: Option<Timestamp>) -> Value {
    let mut body = Map::new();
    body.insert("durable".to_owned(), json!(Durable::Succeeded));
    body.insert("messageId".to_owned(), json!(id));
    let message = if due_at.is_some() { "durable, delivered when it is due" } else { "durable" };
    body.insert("message".to_owned(), json!(message));
    body.insert("timestamp".to_owned(), json!(written_at));
    if let Some(due_at) = due_at {
        body.insert("deliverAt".to_owned(), json!(due_at));
    }
    Value::Object(body)
}
