//! What could not be delivered: listed, looked into, sent back, thrown away.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tracing::info;
use utoipa::ToSchema;

use super::request::{self, Query};
use super::{Answer, View};
use crate::clock::Timestamp;
use crate::ingest::reply::{self, Problem};
use crate::record::{Position, RecordId};
use crate::source::{BranchName, DeadLetter, DeadQuery, DeadReason, Replayed};

/// How many are sent back or thrown away by one order at most.
const MOST: usize = 10_000;

/// Which dead letters an order is about; all of the namespace where nothing is said.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct Which {
    /// One record.
    id: Option<String>,
    branch: Option<String>,
    reason: Option<DeadReason>,
    key: Option<String>,
    /// Given up at or after.
    from: Option<Timestamp>,
    /// Given up before.
    to: Option<Timestamp>,
    /// Part of the last error's text.
    error_contains: Option<String>,
    /// At most so many; 10,000 where nothing is said.
    limit: Option<usize>,
    /// Replay also what was overtaken: it may put an old value over a new one.
    force: bool,
}

impl Which {
    fn query(self) -> Result<DeadQuery, Problem> {
        Ok(DeadQuery {
            branch: self.branch,
            reason: self.reason,
            id: self.id.as_deref().map(request::id).transpose()?,
            key: self.key,
            from: self.from,
            to: self.to,
            error_contains: self.error_contains,
            limit: self.limit.unwrap_or(MOST).clamp(1, MOST),
            after: None,
        })
    }
}

/// A page of dead letters.
#[derive(Serialize, ToSchema)]
pub(super) struct DeadPage {
    items: Vec<Letter>,
    /// Hand this in as `after` for the next page; null = the end.
    next: Option<String>,
}

/// A delivery that ended badly, with everything needed to understand it.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Letter {
    message_id: RecordId,
    position: Position,
    /// 0 is the record itself, 1 and up are what `emit` made of it.
    child: u32,
    branch: BranchName,
    /// When it was given up.
    at: Timestamp,
    reason: DeadReason,
    attempts: u32,
    last_error: String,
    /// Where in the pipeline.
    stage: String,
    /// By which revision of the file.
    revision: String,
    /// Its key has moved on; replaying it needs `force`.
    overtaken: bool,
    key: Option<String>,
    written_at: Timestamp,
    metadata: BTreeMap<String, String>,
    priority: Option<i64>,
    tags: Vec<String>,
    /// As it was written; `{"base64": …}` when it is not JSON.
    payload: Value,
    /// As it would have been sent, where it came so far.
    rendered: Option<Value>,
}

/// Lists dead letters, oldest first
#[utoipa::path(get, path = "/api/v1/wal/namespace/{ns}/dead-letters", tag = "dead letters",
    params(
        ("ns" = String, Path, description = "The namespace"),
        ("branch" = Option<String>, Query, description = "Only this branch"),
        ("reason" = Option<DeadReason>, Query, description = "Only for this reason"),
        ("id" = Option<String>, Query, description = "Only this record"),
        ("key" = Option<String>, Query, description = "Only this key"),
        ("from" = Option<String>, Query, description = "Given up at or after"),
        ("to" = Option<String>, Query, description = "Given up before"),
        ("errorContains" = Option<String>, Query, description = "Part of the last error's text"),
        ("limit" = Option<u32>, Query, description = "Rows a page, 1 to 1,000; 100 where nothing is said"),
        ("after" = Option<String>, Query, description = "`next` of the page before"),
    ),
    responses(
        (status = 200, description = "A page", body = DeadPage),
    ))]
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
    let items = page.rows.iter().map(letter).collect();
    Ok(reply::json(StatusCode::OK, &DeadPage { items, next: page.next }))
}

/// Sends dead letters back to the branch that failed, in order
#[utoipa::path(post, path = "/api/v1/wal/namespace/{ns}/dead-letters/replay", tag = "dead letters",
    params(("ns" = String, Path, description = "The namespace")),
    request_body = Which,
    responses(
        (status = 200, description = "How many", body = Replayed),
        (status = 409, description = "`overtaken`: its key has moved on; say `force`"),
    ))]
pub(super) async fn replay(view: &View, which: Which) -> Answer {
    let force = which.force;
    let query = which.query()?;
    let one = query.id.is_some();
    let replayed = view.shelf.replay(query, force).await?;
    info!(ns = %view.namespace, replayed = replayed.replayed, overtaken = replayed.overtaken, "replayed dead letters");
    if one && replayed.replayed == 0 && replayed.overtaken > 0 {
        let detail = "its key has moved on: replaying it could put an old value over a new one; say force";
        return Err(Problem::new(StatusCode::CONFLICT, "overtaken", detail));
    }
    Ok(reply::json(StatusCode::OK, &replayed))
}

/// What was thrown away.
#[derive(Serialize, ToSchema)]
pub(super) struct Purged {
    purged: u64,
}

/// Throws dead letters away for good
#[utoipa::path(post, path = "/api/v1/wal/namespace/{ns}/dead-letters/purge", tag = "dead letters",
    params(("ns" = String, Path, description = "The namespace")),
    request_body = Which,
    responses(
        (status = 200, description = "How many", body = Purged),
    ))]
pub(super) async fn purge(view: &View, which: Which) -> Answer {
    let purged = view.shelf.purge(which.query()?).await?;
    info!(ns = %view.namespace, purged, "purged dead letters");
    Ok(reply::json(StatusCode::OK, &Purged { purged }))
}

fn letter(letter: &DeadLetter) -> Letter {
    let record = &letter.record;
    Letter {
        message_id: record.id,
        position: letter.row.position,
        child: letter.row.child,
        branch: letter.branch.clone(),
        at: letter.at,
        reason: letter.reason,
        attempts: letter.attempts,
        last_error: letter.last_error.to_string(),
        stage: letter.stage.to_string(),
        revision: letter.revision.to_string(),
        overtaken: letter.overtaken,
        key: record.key.as_deref().map(ToOwned::to_owned),
        written_at: record.written_at,
        metadata: record.headers.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
        priority: record.priority,
        tags: record.tags.iter().map(ToString::to_string).collect(),
        payload: content(&record.payload, record.binary),
        rendered: letter.rendered.as_ref().map(|bytes| content(bytes, false)),
    }
}

/// JSON as it is; anything else in base64.
fn content(bytes: &Bytes, binary: bool) -> Value {
    let json = if binary { None } else { serde_json::from_slice::<&RawValue>(bytes).ok() };
    let value = json.and_then(|raw| serde_json::from_str(raw.get()).ok());
    value.unwrap_or_else(|| json!({"base64": STANDARD.encode(bytes)}))
}
