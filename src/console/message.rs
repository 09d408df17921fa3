//! Where a write is: waiting for its time, in the log and what each branch made of it, cancelled.

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::{Answer, Instance, View, request};
use crate::clock::Timestamp;
use crate::ingest::reply::{self, Problem};
use crate::record::{Position, RecordId};
use crate::source::{BranchName, Fate, Found};

/// Where a write is.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Message {
    message_id: RecordId,
    namespace: String,
    #[serde(flatten)]
    place: Place,
    /// The revision of the file in force.
    revision: String,
}

/// The same, by state.
#[derive(Serialize, ToSchema)]
#[serde(tag = "state", rename_all = "snake_case", rename_all_fields = "camelCase")]
enum Place {
    /// Waits for its time.
    Parked { written_at: Timestamp, deliver_at: Timestamp },
    /// In the log; what each branch made of it.
    InLog { written_at: Timestamp, position: Position, branches: Vec<BranchFate> },
    /// Cancelled before it was due.
    Cancelled,
}

/// What one branch made of it.
#[derive(Serialize, ToSchema)]
struct BranchFate {
    branch: BranchName,
    #[serde(flatten)]
    fate: Fate,
}

/// Finds a write by its id
#[utoipa::path(get, path = "/api/v1/wal/message/{id}", tag = "writes",
    params(("id" = String, Path, description = "The `messageId` of its answer")),
    responses(
        (status = 200, description = "Where it is", body = Message),
        (status = 501, description = "`unsupported`: too much came after it in a broker's log to be searched"),
        (status = 503, description = "`log`: it is in none that answers, and one does not answer"),
        (status = 404, description = "`no_message`: it never was accepted, or ended longer ago than is kept"),
    ))]
pub(super) async fn find(instance: &dyn Instance, id: &str) -> Answer {
    let id = request::id(id)?;
    // All at once: a log that cannot be reached keeps nobody from what is in another.
    let search = |view: View| async move { (view.log.find(id).await, view) };
    let mut searches: FuturesUnordered<_> = instance.views().into_iter().map(search).collect();
    let mut failed = None;
    while let Some((found, view)) = searches.next().await {
        match found {
            Ok(Some(found)) => return Ok(reply::json(StatusCode::OK, &message(id, &view, found))),
            Ok(None) => {}
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    if let Some(error) = failed {
        return Err(error.into());
    }
    let absent = match instance.absent().len() {
        0 => String::new(),
        count => format!("; {count} namespace(s) that do not run now were not asked"),
    };
    Err(Problem::not_found(
        "no_message",
        format!(
            "no log knows this id: it never was accepted, or it ended longer ago than is kept (30 s on Redis Streams); of \
             what went to an SQS queue only what waits or is dead is found{absent}"
        ),
    ))
}

fn message(id: RecordId, view: &View, found: Found) -> Message {
    let place = match found {
        Found::Parked { record, due_at } => Place::Parked { written_at: record.written_at, deliver_at: due_at },
        Found::InLog { record, position, branches } => Place::InLog {
            written_at: record.written_at,
            position,
            branches: branches.into_iter().map(|(branch, fate)| BranchFate { branch, fate }).collect(),
        },
        Found::Cancelled => Place::Cancelled,
    };
    Message { message_id: id, namespace: view.namespace.to_string(), place, revision: view.plan.revision.to_string() }
}
