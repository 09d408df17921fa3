//! How the instance and its namespaces are.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::{Absent, Answer, Instance, View};
use crate::clock::Timestamp;
use crate::ingest::reply::{self, Problem};
use crate::pipeline::branch::{BranchHandle, Pause};
use crate::record::Position;
use crate::source::{BranchName, ParkedQuery, ShelfCounts};
use crate::spec::diagnostic::Diagnostic;

/// How the plan in force relates to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ConfigState {
    /// It is the file's.
    Current,
    /// The file is broken; the last good one is in force.
    Stale,
    /// The file never was good; nothing runs.
    Broken,
    /// The file is gone: no writes, what is left drains.
    Deleted,
}

/// The same, with what is wrong.
#[derive(Serialize, ToSchema)]
pub(super) struct Config {
    state: ConfigState,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<ConfigProblem>,
}

/// What is wrong with a file.
#[derive(Serialize, ToSchema)]
struct ConfigProblem {
    /// A stable code.
    code: String,
    file: String,
    line: usize,
    column: usize,
    message: String,
}

/// The process is there.
#[derive(Serialize, ToSchema)]
pub(super) struct Alive {
    alive: bool,
}

/// Whether writes are taken.
#[derive(Serialize, ToSchema)]
pub(super) struct Ready {
    ready: bool,
    /// Why not; or what is worth knowing all the same.
    notes: Vec<String>,
    /// What durable means on each source that is in use.
    durable: Vec<String>,
}

/// The instance in one look.
#[derive(Serialize, ToSchema)]
pub(super) struct Health {
    /// `ok`, `degraded` (a file is stale or broken) or `stopping`.
    status: &'static str,
    version: &'static str,
    timestamp: Timestamp,
    notes: Vec<String>,
    namespaces: Vec<Brief>,
}

/// All namespaces.
#[derive(Serialize, ToSchema)]
pub(super) struct Namespaces {
    namespaces: Vec<Brief>,
}

/// A namespace in a list.
#[derive(Serialize, ToSchema)]
pub(super) struct Brief {
    namespace: String,
    config: Config,
    owner: Option<String>,
    shard: Option<String>,
    /// Which revision of its file is in force.
    revision: Option<String>,
    /// Why it does not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// A namespace that runs or drains.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct NamespaceStatus {
    namespace: String,
    description: Option<String>,
    owner: Option<String>,
    shard: String,
    revision: String,
    config: Config,
    /// The newest durable position.
    end: Position,
    /// Records that wait for their time.
    parked: u64,
    /// When the first of them is due.
    next_due: Option<Timestamp>,
    /// Unfinished records that `on_full: drop` has ended, since the start.
    backlog_dropped: u64,
    /// How far back idempotency keys are really known.
    idempotency_known_since: Option<Timestamp>,
    branches: Vec<BranchState>,
}

/// One (sink, region) of a namespace.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct BranchState {
    name: BranchName,
    sink: String,
    region: Option<String>,
    /// `running`, `paused` or, when the file no longer has it, `draining`.
    state: &'static str,
    pause: Option<Pause>,
    /// Everything at or below has an end.
    cursor: Position,
    lag_records: u64,
    lag_bytes: u64,
    /// Age of the oldest record that has no end.
    lag_seconds: f64,
    /// Read, and not ended yet.
    in_flight: u64,
    /// Records set aside because their key keeps failing.
    set_aside: u64,
    keys_set_aside: u64,
    dead_letters: u64,
    dead_letter_bytes: u64,
    /// Since the start, as are the next two.
    delivered: u64,
    dropped: u64,
    retried: u64,
    last_error: Option<String>,
    last_error_at: Option<Timestamp>,
    last_delivered_at: Option<Timestamp>,
}

/// Says that the process is there
#[utoipa::path(get, path = "/livez", tag = "health", security(()),
    responses((status = 200, description = "It is", body = Alive)))]
pub(super) fn live() -> warp::reply::Response {
    reply::json(StatusCode::OK, &Alive { alive: true })
}

/// Says whether writes are taken
#[utoipa::path(get, path = "/readyz", tag = "health", security(()),
    responses((status = 200, description = "They are", body = Ready), (status = 503, description = "Not yet, or no more", body = Ready)))]
pub(super) fn ready(instance: &dyn Instance) -> warp::reply::Response {
    let readiness = instance.readiness();
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    reply::json(status, &Ready { ready: readiness.ready, notes: readiness.notes, durable: readiness.durable })
}

/// Shows the instance in one look
#[utoipa::path(get, path = "/api/v1/health", tag = "health",
    responses((status = 200, description = "Writes are taken", body = Health), (status = 503, description = "They are not", body = Health)))]
pub(super) fn health(instance: &dyn Instance) -> warp::reply::Response {
    let readiness = instance.readiness();
    let views = instance.views();
    let fine = instance.absent().is_empty() && views.iter().all(|view| view.config == ConfigState::Current);
    let status = match (readiness.ready, fine) {
        (false, _) => "stopping",
        (true, true) => "ok",
        (true, false) => "degraded",
    };
    let body = Health {
        status,
        version: env!("CARGO_PKG_VERSION"),
        timestamp: instance.clock().now(),
        notes: readiness.notes,
        namespaces: all(instance),
    };
    let code = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    reply::json(code, &body)
}

/// Lists all namespaces
#[utoipa::path(get, path = "/api/v1/wal/namespaces", tag = "namespaces",
    responses((status = 200, description = "Those that run, drain, or cannot run", body = Namespaces)))]
pub(super) fn namespaces(instance: &dyn Instance) -> warp::reply::Response {
    reply::json(StatusCode::OK, &Namespaces { namespaces: all(instance) })
}

fn all(instance: &dyn Instance) -> Vec<Brief> {
    let views = instance.views();
    views.iter().map(brief).chain(instance.absent().iter().map(brief_absent)).collect()
}

fn brief(view: &View) -> Brief {
    Brief {
        namespace: view.namespace.to_string(),
        config: config(view.config, view.problem.as_deref()),
        owner: text(view.plan.owner.as_ref()),
        shard: Some(view.plan.shard.clone()),
        revision: Some(view.plan.revision.to_string()),
        reason: None,
    }
}

fn brief_absent(absent: &Absent) -> Brief {
    Brief {
        namespace: absent.namespace.to_string(),
        config: config(ConfigState::Broken, absent.problem.as_deref()),
        owner: None,
        shard: None,
        revision: None,
        reason: Some(absent.reason.clone()),
    }
}

fn text(text: Option<&impl ToString>) -> Option<String> {
    text.map(ToString::to_string)
}

fn config(state: ConfigState, problem: Option<&Diagnostic>) -> Config {
    let problem = problem.map(|problem| ConfigProblem {
        code: problem.code.to_string(),
        file: problem.file.to_string(),
        line: problem.line,
        column: problem.column,
        message: problem.message.clone(),
    });
    Config { state, problem }
}

/// Shows a namespace and each of its branches
#[utoipa::path(get, path = "/api/v1/wal/namespace/{ns}/status", tag = "namespaces",
    params(("ns" = String, Path, description = "The namespace")),
    responses(
        (status = 200, description = "It runs or drains; one that cannot run has only `namespace`, `config` and `reason`", body = NamespaceStatus),
    ))]
pub(super) async fn of(instance: &dyn Instance, view: &View) -> Answer {
    let counts = view.shelf.counts();
    let first = ParkedQuery { limit: 1, ..ParkedQuery::default() };
    let next_due = if view.log.caps().schedule {
        view.shelf.parked(first).await?.rows.first().map(|row| row.due_at)
    } else {
        None
    };
    let status = NamespaceStatus {
        namespace: view.namespace.to_string(),
        description: text(view.plan.description.as_ref()),
        owner: text(view.plan.owner.as_ref()),
        shard: view.plan.shard.clone(),
        revision: view.plan.revision.to_string(),
        config: config(view.config, view.problem.as_deref()),
        end: view.log.end().single(),
        parked: counts.parked,
        next_due,
        backlog_dropped: counts.overflowed,
        idempotency_known_since: counts.keys_since,
        branches: states(instance, view, &counts),
    };
    Ok(reply::json(StatusCode::OK, &status))
}

/// Lists the branches of a namespace
#[utoipa::path(get, path = "/api/v1/wal/namespace/{ns}/branches", tag = "branches",
    params(("ns" = String, Path, description = "The namespace")),
    responses(
        (status = 200, description = "Each (sink, region)", body = Vec<BranchState>),
    ))]
pub(super) fn branches(instance: &dyn Instance, view: &View) -> warp::reply::Response {
    reply::json(StatusCode::OK, &states(instance, view, &view.shelf.counts()))
}

fn states(instance: &dyn Instance, view: &View, counts: &ShelfCounts) -> Vec<BranchState> {
    let now = instance.clock().now();
    let state = |(name, handle): &(BranchName, Arc<BranchHandle>)| {
        let lag = view.log.lag(name);
        let (dead_letters, dead_letter_bytes) = counts.dead_of(name);
        let plan = handle.plan();
        let (status, counters) = (handle.board().status(), &handle.board().counters);
        let declared = view.plan.branches.iter().any(|branch| branch.name == *name);
        BranchState {
            name: name.clone(),
            sink: plan.sink.to_string(),
            region: text(plan.region.as_ref()),
            state: match (&status.pause, declared) {
                (Some(_), _) => "paused",
                (None, false) => "draining",
                (None, true) => "running",
            },
            pause: status.pause,
            cursor: lag.cursor.single(),
            lag_records: lag.records,
            lag_bytes: lag.bytes,
            lag_seconds: lag.oldest.map_or(0.0, |oldest| now.since(oldest).as_secs_f64()),
            in_flight: status.in_flight,
            set_aside: counts.aside_of(name),
            keys_set_aside: status.lanes_aside,
            dead_letters,
            dead_letter_bytes,
            delivered: counters.delivered.load(Ordering::Relaxed),
            dropped: counters.dropped.load(Ordering::Relaxed),
            retried: counters.retried.load(Ordering::Relaxed),
            last_error: status.last_error,
            last_error_at: status.last_error_at,
            last_delivered_at: status.last_delivered_at,
        }
    };
    view.branches.iter().map(state).collect()
}

/// A namespace that a file names and that does not run.
pub(super) fn absent(instance: &dyn Instance, name: &str) -> Answer {
    let absent = instance.absent().into_iter().find(|absent| absent.namespace.as_str() == name);
    absent.map_or_else(
        || Err(Problem::no_namespace(name)),
        |absent| Ok(reply::json(StatusCode::OK, &brief_absent(&absent))),
    )
}
