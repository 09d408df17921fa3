//! Moving a namespace to another log.

use std::time::Duration;

use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Answer, Instance};
use crate::ingest::reply::{self, Problem};
use crate::source::{BranchName, LogError};
use crate::units::Span;

/// How long branches may take to come to their end, where the order says nothing.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a namespace shall go.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MoveOrder {
    /// The text of the new pipeline file; it takes the place of the old one.
    file: String,
    /// How long to wait until every branch is at the end, a duration. Default: 60s.
    #[schema(value_type = Option<String>)]
    timeout: Option<Span>,
}

/// What was carried over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CarriedOver)]
pub struct Moved {
    /// Records that wait for their time.
    pub parked: u64,
    /// Records that are set aside, over all branches.
    pub set_aside: u64,
    /// Dead letters, over all branches.
    pub dead_letters: u64,
    /// Idempotency keys.
    pub keys: u64,
}

/// A branch that did not come to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct StuckBranch {
    /// Its name.
    pub branch: BranchName,
    /// Records without an end.
    pub records: u64,
    /// Why, as far as it is known.
    pub why: String,
}

/// Why a namespace was not moved. It goes on where it was.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MoveError {
    /// There is none.
    #[error("there is no namespace `{0}`")]
    Unknown(String),
    /// It cannot be moved so.
    #[error("{0}")]
    Refused(String),
    /// Branches did not come to their end in time.
    #[error("{}", stuck(.0))]
    Stuck(Vec<StuckBranch>),
    /// A log or shelf could not.
    #[error(transparent)]
    Log(#[from] LogError),
}

fn stuck(branches: &[StuckBranch]) -> String {
    if branches.is_empty() {
        return "writes did not stop in time; nothing was moved".to_owned();
    }
    let one = |branch: &StuckBranch| {
        let why = if branch.why.is_empty() { String::new() } else { format!(" ({})", branch.why) };
        format!("{} has {} records without an end{why}", branch.branch, branch.records)
    };
    let all = branches.iter().map(one).collect::<Vec<_>>().join("; ");
    format!("nothing was moved: {all}. Resume it, skip what blocks it or wait, then move again")
}

/// A namespace that has moved.
#[derive(Serialize, ToSchema)]
pub(super) struct MovedAnswer {
    namespace: String,
    moved: Moved,
}

/// Moves a namespace to the log that its new file names
///
/// Writes hear 503 until every branch is at the end; what waits, what is dead and the keys go along; then the file is switched.
#[utoipa::path(post, path = "/api/v1/wal/namespace/{ns}/move", tag = "namespaces",
    params(("ns" = String, Path, description = "The namespace")),
    request_body = MoveOrder,
    responses(
        (status = 200, description = "It runs on the new log", body = MovedAnswer),
        (status = 404, description = "`no_namespace`"),
        (status = 409, description = "`stuck`: branches are not at their end; nothing was moved"),
        (status = 422, description = "`refused`: the new file is no good, or names no other log; nothing was moved"),
        (status = 503, description = "`log`: the new log or shelf cannot be reached; nothing was moved"),
    ))]
pub(super) async fn to(instance: &dyn Instance, name: &str, order: MoveOrder) -> Answer {
    let patience = order.timeout.map_or(PATIENCE, |span| span.0);
    let moved = instance.move_to(name.to_owned(), order.file, patience).await.map_err(|error| match error {
        MoveError::Unknown(_) => Problem::no_namespace(name),
        MoveError::Stuck(_) => Problem::new(StatusCode::CONFLICT, "stuck", error.to_string()),
        MoveError::Refused(_) => Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "refused", error.to_string()),
        MoveError::Log(error) => error.into(),
    })?;
    Ok(reply::json(StatusCode::OK, &MovedAnswer { namespace: name.to_owned(), moved }))
}
