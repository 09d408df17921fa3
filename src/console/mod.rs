//! HTTP for operators: status, dead letters, what is scheduled, branches, health, metrics, the contract.
//!
//! Takes requests that are no writes and an [`Instance`] to ask, gives answers. Never changes anything itself: every
//! change is a call of the log, the shelf or a branch.

mod branches;
mod dead_letters;
mod message;
mod metrics;
mod moving;
mod openapi;
mod request;
mod route;
mod scheduled;
mod status;

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

pub use moving::{MoveError, Moved, StuckBranch};
pub use openapi::openapi;
pub use status::ConfigState;

use crate::clock::{Clock, Timestamp};
use crate::ingest::reply::{self, Problem};
use crate::ingest::{Asked, Keys, Received};
use crate::pipeline::branch::BranchHandle;
use crate::pipeline::plan::Plan;
use crate::record::Namespace;
use crate::source::embedded::Counters;
use crate::source::{BranchName, Log, Shelf};
use crate::spec::diagnostic::Diagnostic;
use request::Query;
use route::Operation;

/// A namespace as it runs.
pub struct View {
    /// Its name.
    pub namespace: Namespace,
    /// How the plan in force relates to the file.
    pub config: ConfigState,
    /// What is wrong with the file, where it is stale or broken.
    pub problem: Option<Arc<Diagnostic>>,
    /// The plan in force.
    pub plan: Arc<Plan>,
    /// Its log.
    pub log: Arc<dyn Log>,
    /// Its shelf.
    pub shelf: Arc<dyn Shelf>,
    /// Its branches, the removed ones that still drain included.
    pub branches: Vec<(BranchName, Arc<BranchHandle>)>,
    /// What came in.
    pub received: Arc<Received>,
}

/// A namespace that a file names and that does not run.
pub struct Absent {
    /// Its name.
    pub namespace: Namespace,
    /// What is wrong with its file, if that is it.
    pub problem: Option<Arc<Diagnostic>>,
    /// The same in words.
    pub reason: String,
}

/// How the instance is.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    /// Writes are taken.
    pub ready: bool,
    /// Why not; or what is worth knowing all the same.
    pub notes: Vec<String>,
    /// What durable means on each source that is in use.
    pub durable: Vec<String>,
}

/// Why a namespace was not deleted.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DeleteError {
    /// There is none.
    #[error("there is no namespace `{0}`")]
    Unknown(String),
    /// Its file is there.
    #[error("the pipeline file of `{0}` is still there: delete it and reload first, so that no write can come between")]
    InUse(Namespace),
    /// The log could not.
    #[error(transparent)]
    Log(#[from] crate::source::LogError),
}

/// What the console asks of the service.
pub trait Instance: Send + Sync {
    /// How the instance is.
    fn readiness(&self) -> Readiness;

    /// A namespace that runs or drains.
    fn view(&self, namespace: &str) -> Option<View>;

    /// Every namespace that runs or drains, by name.
    fn views(&self) -> Vec<View>;

    /// Every namespace that does not run although a file names it.
    fn absent(&self) -> Vec<Absent>;

    /// Deletes a namespace whose file is gone, with all that it holds.
    fn delete(&self, namespace: String) -> BoxFuture<'static, Result<(), DeleteError>>;

    /// Moves a namespace to the log that its new file names, with all that waits in it.
    fn move_to(
        &self,
        namespace: String,
        file: String,
        patience: Duration,
    ) -> BoxFuture<'static, Result<Moved, MoveError>>;

    /// Who may call.
    fn keys(&self) -> &Keys;

    /// The time.
    fn clock(&self) -> &Clock;

    /// Bytes of writes that are under way.
    fn bytes_in_flight(&self) -> u64;

    /// When the pipeline files were last read and made so.
    fn configured_at(&self) -> Timestamp;

    /// What the embedded log counts.
    fn log_counters(&self) -> &Counters;
}

/// Answers a request that is no write.
pub async fn answer(instance: Arc<dyn Instance>, asked: Asked) -> warp::reply::Response {
    respond(&*instance, asked).await.unwrap_or_else(Problem::into_response)
}

type Answer = Result<warp::reply::Response, Problem>;

async fn respond(instance: &dyn Instance, mut asked: Asked) -> Answer {
    let segments = request::segments(&asked.path)?;
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let found = route::find(&asked.method, &segments);
    // Who has no key does not even hear which paths there are.
    if !found.as_ref().is_ok_and(|(route, _)| route.open) {
        instance.keys().check(&asked.headers)?;
    }
    let (route, variables) = found?;
    let view = || {
        let name = variables.first().copied().unwrap_or_default();
        instance.view(name).ok_or_else(|| Problem::no_namespace(name))
    };
    let (first, second) =
        (variables.first().copied().unwrap_or_default(), variables.get(1).copied().unwrap_or_default());
    let query = Query::new(&asked.query)?;
    match route.operation {
        Operation::Livez => Ok(status::live()),
        Operation::Readyz => Ok(status::ready(instance)),
        Operation::Contract => Ok(openapi::contract()),
        Operation::Docs => openapi::docs(&variables),
        Operation::Metrics => metrics::answer(instance),
        Operation::Health => Ok(status::health(instance)),
        Operation::Namespaces => Ok(status::namespaces(instance)),
        Operation::Message => message::find(instance, first).await,
        Operation::Delete => delete(instance, first).await,
        Operation::MoveNamespace => moving::to(instance, first, request::body(&mut asked).await?).await,
        Operation::Status => match instance.view(first) {
            Some(view) => status::of(instance, &view).await,
            None => status::absent(instance, first),
        },
        Operation::Branches => Ok(status::branches(instance, &view()?)),
        Operation::Pause => branches::pause(&view()?, second, request::body(&mut asked).await?).await,
        Operation::Resume => branches::resume(&view()?, second).await,
        Operation::Skip => branches::skip(&view()?, second, request::body(&mut asked).await?).await,
        Operation::DeadLetters => dead_letters::list(&view()?, &query).await,
        Operation::Replay => dead_letters::replay(&view()?, request::body(&mut asked).await?).await,
        Operation::Purge => dead_letters::purge(&view()?, request::body(&mut asked).await?).await,
        Operation::Scheduled => scheduled::list(&view()?, &query).await,
        Operation::Cancel => scheduled::cancel(&view()?, &query).await,
        Operation::CancelOne => scheduled::cancel_one(&view()?, second).await,
        Operation::Move => scheduled::reschedule(&view()?, request::body(&mut asked).await?).await,
    }
}

/// A namespace that is gone.
#[derive(Serialize, ToSchema)]
struct Deleted<'a> {
    namespace: &'a str,
    deleted: bool,
}

/// Deletes a namespace with all that it holds, once its file is gone
#[utoipa::path(delete, path = "/api/v1/wal/namespace/{ns}", tag = "namespaces",
    params(("ns" = String, Path, description = "The namespace")),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = 409, description = "`in_use`: its file is still there"),
    ))]
async fn delete(instance: &dyn Instance, name: &str) -> Answer {
    match instance.delete(name.to_owned()).await {
        Ok(()) => Ok(reply::json(StatusCode::OK, &Deleted { namespace: name, deleted: true })),
        Err(DeleteError::Unknown(_)) => Err(Problem::no_namespace(name)),
        Err(error @ DeleteError::InUse(_)) => Err(Problem::new(StatusCode::CONFLICT, "in_use", error.to_string())),
        Err(DeleteError::Log(error)) => Err(error.into()),
    }
}
