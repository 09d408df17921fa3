//! What waits for its time: listed, cancelled, moved.

use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::request::{self, Query};
use super::{Answer, View};
use crate::clock::Timestamp;
use crate::ingest::reply::{self, Problem};
use crate::source::{ParkedQuery, ParkedRow, Scheduled};

pub(super) async fn list(view: &View, query: &Query) -> Answer {
    able(view)?;
    let query = ParkedQuery {
        key: query.text("key"),
        from: query.time("from")?,
        to: query.time("to")?,
        limit: query.limit()?,
        after: query.text("after"),
    };
    let page = view.shelf.parked(query).await?;
    let items: Vec<Value> = page.rows.iter().map(row).collect();
    Ok(reply::json(StatusCode::OK, &json!({"items": items, "next": page.next})))
}

fn row(row: &ParkedRow) -> Value {
    json!({
        "messageId": row.record.id,
        "deliverAt": row.due_at,
        "writtenAt": row.record.written_at,
        "key": row.record.key,
        "bytes": row.record.payload.len(),
    })
}

pub(super) async fn cancel(view: &View, query: &Query) -> Answer {
    able(view)?;
    let which = which(query.text("id"), query.text("key"))?;
    let cancelled = view.shelf.cancel(which).await?;
    Ok(reply::json(StatusCode::OK, &json!({ "cancelled": cancelled })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Move {
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    key: Option<String>,
    deliver_at: Timestamp,
}

pub(super) async fn reschedule(view: &View, body: Value) -> Answer {
    able(view)?;
    let order: Move = serde_json::from_value(body).map_err(|error| Problem::malformed(format!("the body: {error}")))?;
    let moved = view.shelf.reschedule(which(order.id, order.key)?, order.deliver_at).await?;
    Ok(reply::json(StatusCode::OK, &json!({ "moved": moved })))
}

fn which(id: Option<String>, key: Option<String>) -> Result<Scheduled, Problem> {
    match (id, key) {
        (Some(id), None) => Ok(Scheduled::Id(request::id(&id)?)),
        (None, Some(key)) => Ok(Scheduled::Key(key)),
        _ => Err(Problem::malformed("name one record by id, or all of a key by key")),
    }
}

fn able(view: &View) -> Result<(), Problem> {
    if view.log.caps().schedule {
        return Ok(());
    }
    let detail = "this namespace's source keeps no list of what waits";
    Err(Problem::new(StatusCode::NOT_IMPLEMENTED, "unsupported", detail))
}
