//! What waits for its time: listed, cancelled, moved.

use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::request::{self, Query};
use super::{Answer, View};
use crate::clock::Timestamp;
use crate::ingest::reply::{self, Problem};
use crate::record::RecordId;
use crate::source::{ParkedQuery, ParkedRow, Scheduled};

/// A page of what waits.
#[derive(Serialize, ToSchema)]
pub(super) struct ScheduledPage {
    items: Vec<ScheduledItem>,
    /// Hand this in as `after` for the next page; null = the end.
    next: Option<String>,
}

/// One record that waits.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct ScheduledItem {
    message_id: RecordId,
    deliver_at: Timestamp,
    written_at: Timestamp,
    key: Option<String>,
    /// Of the payload.
    bytes: usize,
}

/// Lists what waits for its time, in the order in which it is due
#[utoipa::path(get, path = "/api/v1/wal/namespace/{ns}/scheduled", tag = "scheduled",
    params(
        ("ns" = String, Path, description = "The namespace"),
        ("key" = Option<String>, Query, description = "Only this key"),
        ("from" = Option<String>, Query, description = "Due at or after"),
        ("to" = Option<String>, Query, description = "Due before"),
        ("limit" = Option<u32>, Query, description = "Rows a page, 1 to 1,000; 100 where nothing is said"),
        ("after" = Option<String>, Query, description = "`next` of the page before"),
    ),
    responses(
        (status = 200, description = "A page", body = ScheduledPage),
        (status = 501, description = "`unsupported`: this source keeps no list"),
    ))]
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
    let items = page.rows.iter().map(item).collect();
    Ok(reply::json(StatusCode::OK, &ScheduledPage { items, next: page.next }))
}

fn item(row: &ParkedRow) -> ScheduledItem {
    ScheduledItem {
        message_id: row.record.id,
        deliver_at: row.due_at,
        written_at: row.record.written_at,
        key: row.record.key.as_deref().map(ToOwned::to_owned),
        bytes: row.record.payload.len(),
    }
}

/// What was cancelled.
#[derive(Serialize, ToSchema)]
pub(super) struct Cancelled {
    cancelled: u64,
}

/// Cancels what waits, by id or all of a key
#[utoipa::path(delete, path = "/api/v1/wal/namespace/{ns}/scheduled", tag = "scheduled",
    params(
        ("ns" = String, Path, description = "The namespace"),
        ("id" = Option<String>, Query, description = "One record; this or `key`"),
        ("key" = Option<String>, Query, description = "All of a key; this or `id`"),
    ),
    responses(
        (status = 200, description = "How many, once that is durable; what is being released is not counted", body = Cancelled),
        (status = 501, description = "`unsupported`"),
    ))]
pub(super) async fn cancel(view: &View, query: &Query) -> Answer {
    cancel_which(view, which(query.text("id"), query.text("key"))?).await
}

/// Cancels one record that waits
#[utoipa::path(delete, path = "/api/v1/wal/namespace/{ns}/scheduled/{id}", tag = "scheduled",
    params(("ns" = String, Path, description = "The namespace"), ("id" = String, Path, description = "Its `messageId`")),
    responses(
        (status = 200, description = "1, or 0 when it does not wait any more", body = Cancelled),
        (status = 501, description = "`unsupported`"),
    ))]
pub(super) async fn cancel_one(view: &View, id: &str) -> Answer {
    cancel_which(view, Scheduled::Id(request::id(id)?)).await
}

async fn cancel_which(view: &View, which: Scheduled) -> Answer {
    able(view)?;
    let cancelled = view.shelf.cancel(which).await?;
    Ok(reply::json(StatusCode::OK, &Cancelled { cancelled }))
}

/// What to move, and to when.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Move {
    /// One record; this or `key`.
    #[serde(default)]
    id: Option<String>,
    /// All of a key; this or `id`.
    #[serde(default)]
    key: Option<String>,
    deliver_at: Timestamp,
}

/// What was moved.
#[derive(Serialize, ToSchema)]
pub(super) struct Moved {
    moved: u64,
}

/// Moves what waits to another time
#[utoipa::path(post, path = "/api/v1/wal/namespace/{ns}/scheduled/move", tag = "scheduled",
    params(("ns" = String, Path, description = "The namespace")),
    request_body = Move,
    responses(
        (status = 200, description = "How many, once that is durable", body = Moved),
        (status = 501, description = "`unsupported`"),
    ))]
pub(super) async fn reschedule(view: &View, order: Move) -> Answer {
    able(view)?;
    let moved = view.shelf.reschedule(which(order.id, order.key)?, order.deliver_at).await?;
    Ok(reply::json(StatusCode::OK, &Moved { moved }))
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
