//! What could not be delivered: listed, looked into, sent back, thrown away.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tracing::info;

use super::request::{self, Query};
use super::{Answer, View, no_route};
use crate::clock::Timestamp;
use crate::ingest::reply::{self, Problem};
use crate::source::{DeadLetter, DeadQuery, DeadReason};

/// How many are sent back or thrown away by one order at most.
const MOST: usize = 10_000;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct Which {
    id: Option<String>,
    branch: Option<String>,
    reason: Option<DeadReason>,
    key: Option<String>,
    from: Option<Timestamp>,
    to: Option<Timestamp>,
    error_contains: Option<String>,
    limit: Option<usize>,
    force: bool,
}

pub(super) async fn list(view: &View, query: &Query) -> Answer {
    let reason = query.text("reason").map(|text| serde_json::from_value(Value::String(text)));
    let reason = reason.transpose().map_err(|error| Problem::malformed(format!("reason: {error}")))?;
    let query = DeadQuery {
        branch: query.text("branch"),
        reason,
        id: query.id("id")?,
        key: query.text("key"),
        from: query.time("from")?,
        to: query.time("to")?,
        error_contains: query.text("errorContains"),
        limit: query.limit()?,
        after: query.text("after"),
    };
    let page = view.shelf.dead_letters(query).await?;
    let items: Vec<Value> = page.rows.iter().map(letter).collect();
    Ok(reply::json(StatusCode::OK, &json!({"items": items, "next": page.next})))
}

pub(super) async fn order(view: &View, verb: &str, body: Value) -> Answer {
    let which: Which =
        serde_json::from_value(body).map_err(|error| Problem::malformed(format!("the body: {error}")))?;
    let query = DeadQuery {
        branch: which.branch,
        reason: which.reason,
        id: which.id.as_deref().map(request::id).transpose()?,
        key: which.key,
        from: which.from,
        to: which.to,
        error_contains: which.error_contains,
        limit: which.limit.unwrap_or(MOST).clamp(1, MOST),
        after: None,
    };
    match verb {
        "replay" => {
            let one = query.id.is_some();
            let replayed = view.shelf.replay(query, which.force).await?;
            info!(ns = %view.namespace, replayed = replayed.replayed, overtaken = replayed.overtaken, "replayed dead letters");
            if one && replayed.replayed == 0 && replayed.overtaken > 0 {
                let detail = "its key has moved on: replaying it could put an old value over a new one; say force";
                return Err(Problem::new(StatusCode::CONFLICT, "overtaken", detail));
            }
            Ok(reply::json(StatusCode::OK, &replayed))
        }
        "purge" => {
            let purged = view.shelf.purge(query).await?;
            info!(ns = %view.namespace, purged, "purged dead letters");
            Ok(reply::json(StatusCode::OK, &json!({ "purged": purged })))
        }
        _ => Err(no_route(&http::Method::POST, verb)),
    }
}

fn letter(letter: &DeadLetter) -> Value {
    let record = &letter.record;
    let headers: BTreeMap<&str, &str> = record.headers.iter().map(|(name, value)| (&**name, &**value)).collect();
    json!({
        "messageId": record.id,
        "position": letter.row.position,
        "child": letter.row.child,
        "branch": letter.branch,
        "at": letter.at,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "lastError": letter.last_error,
        "stage": letter.stage,
        "revision": letter.revision,
        "overtaken": letter.overtaken,
        "key": record.key,
        "writtenAt": record.written_at,
        "metadata": headers,
        "priority": record.priority,
        "tags": record.tags,
        "payload": content(&record.payload, record.binary),
        "rendered": letter.rendered.as_ref().map(|bytes| content(bytes, false)),
    })
}

/// JSON as it is; anything else in base64.
pub(super) fn content(bytes: &Bytes, binary: bool) -> Value {
    let json = if binary { None } else { serde_json::from_slice::<&RawValue>(bytes).ok() };
    let value = json.and_then(|raw| serde_json::from_str(raw.get()).ok());
    value.unwrap_or_else(|| json!({"base64": STANDARD.encode(bytes)}))
}
