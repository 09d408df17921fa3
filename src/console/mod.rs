//! HTTP for operators: status, dead letters, what is scheduled, branches, health, metrics, the contract.
//!
//! Takes requests that are no writes and an [`Instance`] to ask, gives answers. Never changes anything itself: every
//! change is a call of the log, the shelf or a branch.

mod dead_letters;
mod message;
mod metrics;
mod openapi;
mod request;
mod scheduled;
mod status;

use std::sync::Arc;

use futures::future::BoxFuture;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tracing::info;

pub use openapi::openapi;
pub use status::ConfigState;

use crate::clock::Clock;
use crate::ingest::reply::{self, Problem};
use crate::ingest::{Asked, Keys};
use crate::pipeline::branch::{BranchHandle, Skip};
use crate::pipeline::plan::Plan;
use crate::record::Namespace;
use crate::source::{BranchName, Log, Shelf};
use crate::spec::diagnostic::Diagnostic;
use request::Query;

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

    /// Who may call.
    fn keys(&self) -> &Keys;

    /// The time.
    fn clock(&self) -> &Clock;

    /// Bytes of writes that are under way.
    fn bytes_in_flight(&self) -> u64;
}

/// Answers a request that is no write.
pub async fn answer(instance: Arc<dyn Instance>, asked: Asked) -> warp::reply::Response {
    respond(&*instance, asked).await.unwrap_or_else(Problem::into_response)
}

type Answer = Result<warp::reply::Response, Problem>;

async fn respond(instance: &dyn Instance, mut asked: Asked) -> Answer {
    let path = std::mem::take(&mut asked.path);
    let segments = request::segments(&path)?;
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let get = asked.method == Method::GET || asked.method == Method::HEAD;
    match segments.as_slice() {
        ["livez"] if get => return Ok(reply::json(StatusCode::OK, &json!({"alive": true}))),
        ["readyz"] if get => return Ok(status::ready(instance)),
        _ => instance.keys().check(&asked.headers)?,
    }
    match segments.as_slice() {
        ["metrics"] if get => metrics::answer(instance),
        ["api", "openapi.json"] if get => {
            Ok(reply::bytes(StatusCode::OK, "application/json", openapi::openapi().into_bytes()))
        }
        ["api", "docs", rest @ ..] if get => openapi::docs(rest),
        ["api", "v1", "health"] if get => Ok(status::health(instance)),
        ["api", "v1", "wal", "namespaces"] if get => Ok(status::namespaces(instance)),
        ["api", "v1", "wal", "message", id] if get => message::find(instance, id).await,
        ["api", "v1", "wal", "namespace", name] if asked.method == Method::DELETE => delete(instance, name).await,
        ["api", "v1", "wal", "namespace", name, rest @ ..] if !rest.is_empty() => match (instance.view(name), rest) {
            (Some(view), rest) => of_namespace(instance, &view, rest, asked).await,
            (None, ["status"]) if get => status::absent(instance, name),
            (None, _) => Err(unknown(name)),
        },
        _ => Err(no_route(&asked.method, &path)),
    }
}

async fn of_namespace(instance: &dyn Instance, view: &View, rest: &[&str], mut asked: Asked) -> Answer {
    let query = Query::new(&asked.query)?;
    let method = asked.method.clone();
    match (method.as_str(), rest) {
        ("GET" | "HEAD", ["status"]) => Ok(reply::json(StatusCode::OK, &status::of(instance, view))),
        ("GET" | "HEAD", ["branches"]) => Ok(reply::json(StatusCode::OK, &status::branches(instance, view))),
        ("POST", ["branches", branch, verb]) => {
            let body = request::body(&mut asked).await?;
            order(view, branch, verb, &body).await
        }
        ("GET" | "HEAD", ["dead-letters"]) => dead_letters::list(view, &query).await,
        ("POST", ["dead-letters", verb]) => {
            let body = request::body(&mut asked).await?;
            dead_letters::order(view, verb, body).await
        }
        ("GET" | "HEAD", ["scheduled"]) => scheduled::list(view, &query).await,
        ("DELETE", ["scheduled"]) => scheduled::cancel(view, &query).await,
        ("POST", ["scheduled", "move"]) => {
            let body = request::body(&mut asked).await?;
            scheduled::reschedule(view, body).await
        }
        _ => Err(no_route(&method, &rest.join("/"))),
    }
}

async fn order(view: &View, branch: &str, verb: &str, body: &Value) -> Answer {
    let found = view.branches.iter().find(|(name, _)| name.as_str() == branch);
    let Some((name, handle)) = found else {
        let names: Vec<&str> = view.branches.iter().map(|(name, _)| name.as_str()).collect();
        let detail = format!("`{}` has no branch `{branch}`; it has {}", view.namespace, names.join(", "));
        return Err(Problem::not_found("no_branch", detail));
    };
    let mut skipped = Value::Null;
    match verb {
        "pause" => {
            let note = body.get("note").and_then(Value::as_str).unwrap_or("paused by an operator");
            handle.pause(note.to_owned()).await;
        }
        "resume" => handle.resume().await,
        "skip" => {
            let which = match body.get("id").and_then(Value::as_str) {
                None => Skip::Head,
                Some(id) => Skip::Record(request::id(id)?),
            };
            let Some(id) = handle.skip(which).await else {
                let detail = "no such delivery waits in this branch, or it is under way; try again";
                return Err(Problem::new(StatusCode::CONFLICT, "nothing_to_skip", detail));
            };
            skipped = json!(id);
        }
        _ => return Err(no_route(&Method::POST, verb)),
    }
    info!(ns = %view.namespace, branch = %name, verb, "an operator's order");
    Ok(reply::json(StatusCode::OK, &json!({"branch": name, "done": verb, "messageId": skipped})))
}

async fn delete(instance: &dyn Instance, name: &str) -> Answer {
    match instance.delete(name.to_owned()).await {
        Ok(()) => Ok(reply::json(StatusCode::OK, &json!({"namespace": name, "deleted": true}))),
        Err(DeleteError::Unknown(_)) => Err(unknown(name)),
        Err(error @ DeleteError::InUse(_)) => Err(Problem::new(StatusCode::CONFLICT, "in_use", error.to_string())),
        Err(DeleteError::Log(error)) => Err(error.into()),
    }
}

fn unknown(name: &str) -> Problem {
    let shown: String = name.chars().take(63).collect();
    Problem::not_found("no_namespace", format!("there is no namespace `{shown}`"))
}

fn no_route(method: &Method, path: &str) -> Problem {
    let shown: String = path.chars().take(100).collect();
    Problem::not_found("no_route", format!("nothing answers {method} {shown}; /api/docs lists every route"))
}
