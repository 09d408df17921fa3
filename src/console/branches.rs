//! Orders to a branch: pause, resume, skip.

use std::sync::Arc;

use http::StatusCode;
use serde::{Deserialize, Serialize};
use tracing::info;
use utoipa::ToSchema;

use super::{Answer, View, request};
use crate::ingest::reply::{self, Problem};
use crate::pipeline::branch::{BranchHandle, Skip};
use crate::record::RecordId;
use crate::source::BranchName;

/// Why a branch shall pause.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PauseOrder {
    /// What the next operator should know.
    note: Option<String>,
}

/// What to skip.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct SkipOrder {
    /// This record; the one at the head where nothing is said.
    id: Option<String>,
}

/// An order that was followed.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Done {
    branch: BranchName,
    done: &'static str,
    /// What was skipped.
    message_id: Option<RecordId>,
    /// What is not as one might expect.
    warning: Option<&'static str>,
}

/// Of a pause that nobody keeps.
const NOT_KEPT: &str =
    "it ends when this process does: a queue keeps no pause; name a shelf under source.shelf, which does";

/// Stops sending until it is resumed, over restarts too where `warning` does not say otherwise
#[utoipa::path(post, path = "/api/v1/wal/namespace/{ns}/branches/{branch}/pause", tag = "branches",
    params(("ns" = String, Path, description = "The namespace"), ("branch" = String, Path, description = "`sink` or `sink@region`")),
    request_body = PauseOrder,
    responses(
        (status = 200, description = "It pauses, and that is durable unless there is a `warning`", body = Done),
        (status = 404, description = "`no_namespace` or `no_branch`"),
        (status = 503, description = "`busy`: nobody can say whether the order is followed"),
    ))]
pub(super) async fn pause(view: &View, branch: &str, order: PauseOrder) -> Answer {
    let (name, handle) = find(view, branch)?;
    let followed = handle.pause(order.note.unwrap_or_else(|| "paused by an operator".to_owned())).await;
    durable(followed)?;
    let warning = (!view.log.caps().pause).then_some(NOT_KEPT);
    Ok(done(view, Done { branch: name.clone(), done: "pause", message_id: None, warning }))
}

/// Ends a pause of any cause
#[utoipa::path(post, path = "/api/v1/wal/namespace/{ns}/branches/{branch}/resume", tag = "branches",
    params(("ns" = String, Path, description = "The namespace"), ("branch" = String, Path, description = "`sink` or `sink@region`")),
    responses(
        (status = 200, description = "It sends again, and that is durable", body = Done),
        (status = 404, description = "`no_namespace` or `no_branch`"),
        (status = 503, description = "`busy`: nobody can say whether the order is followed"),
    ))]
pub(super) async fn resume(view: &View, branch: &str) -> Answer {
    let (name, handle) = find(view, branch)?;
    durable(handle.resume().await)?;
    Ok(done(view, Done { branch: name.clone(), done: "resume", message_id: None, warning: None }))
}

/// Puts one record into the dead letters and goes on without it
#[utoipa::path(post, path = "/api/v1/wal/namespace/{ns}/branches/{branch}/skip", tag = "branches",
    params(("ns" = String, Path, description = "The namespace"), ("branch" = String, Path, description = "`sink` or `sink@region`")),
    request_body = SkipOrder,
    responses(
        (status = 200, description = "It is in the dead letters", body = Done),
        (status = 404, description = "`no_namespace` or `no_branch`"),
        (status = 409, description = "`nothing_to_skip`: no such delivery waits here, or it is under way"),
    ))]
pub(super) async fn skip(view: &View, branch: &str, order: SkipOrder) -> Answer {
    let (name, handle) = find(view, branch)?;
    let which = match order.id {
        None => Skip::Head,
        Some(id) => Skip::Record(request::id(&id)?),
    };
    let Some(id) = handle.skip(which).await else {
        let detail = "no such delivery waits in this branch, or it is under way; try again";
        return Err(Problem::new(StatusCode::CONFLICT, "nothing_to_skip", detail));
    };
    Ok(done(view, Done { branch: name.clone(), done: "skip", message_id: Some(id), warning: None }))
}

/// 503 for an order of which nobody can say whether it is followed.
fn durable(followed: bool) -> Result<(), Problem> {
    let detail = "the branch does not answer, or its log takes no changes; look at its status, then try again";
    if followed { Ok(()) } else { Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "busy", detail)) }
}

fn find<'a>(view: &'a View, branch: &str) -> Result<(&'a BranchName, &'a Arc<BranchHandle>), Problem> {
    let found = view.branches.iter().find(|(name, _)| name.as_str() == branch);
    found.map(|(name, handle)| (name, handle)).ok_or_else(|| {
        let names: Vec<&str> = view.branches.iter().map(|(name, _)| name.as_str()).collect();
        let detail = format!("`{}` has no branch `{branch}`; it has {}", view.namespace, names.join(", "));
        Problem::not_found("no_branch", detail)
    })
}

fn done(view: &View, done: Done) -> warp::reply::Response {
    info!(ns = %view.namespace, branch = %done.branch, verb = done.done, "an operator's order");
    reply::json(StatusCode::OK, &done)
}
