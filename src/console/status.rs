//! How the instance and its namespaces are.

use std::sync::atomic::Ordering;

use http::StatusCode;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Absent, Answer, Instance, View, unknown};
use crate::ingest::reply;
use crate::spec::diagnostic::Diagnostic;

/// How the plan in force relates to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
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

pub(super) fn ready(instance: &dyn Instance) -> warp::reply::Response {
    let readiness = instance.readiness();
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({"ready": readiness.ready, "notes": readiness.notes, "durable": readiness.durable});
    reply::json(status, &body)
}

pub(super) fn health(instance: &dyn Instance) -> warp::reply::Response {
    let readiness = instance.readiness();
    let views = instance.views();
    let absent = instance.absent();
    let fine = absent.is_empty() && views.iter().all(|view| view.config == ConfigState::Current);
    let mut namespaces: Vec<Value> = views.iter().map(brief).collect();
    namespaces.extend(absent.iter().map(brief_absent));
    let status = if !readiness.ready {
        "stopping"
    } else if fine {
        "ok"
    } else {
        "degraded"
    };
    let body = json!({
        "status": status,
        "version": env!("CARGO_PKG_VERSION"),
        "timestamp": instance.clock().now(),
        "notes": readiness.notes,
        "namespaces": namespaces,
    });
    let code = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    reply::json(code, &body)
}

pub(super) fn namespaces(instance: &dyn Instance) -> warp::reply::Response {
    let mut namespaces: Vec<Value> = instance.views().iter().map(brief).collect();
    namespaces.extend(instance.absent().iter().map(brief_absent));
    reply::json(StatusCode::OK, &json!({ "namespaces": namespaces }))
}

fn brief(view: &View) -> Value {
    json!({
        "namespace": view.namespace.as_str(),
        "config": config(view.config, view.problem.as_deref()),
        "owner": view.plan.owner,
        "shard": view.plan.shard,
        "revision": view.plan.revision,
    })
}

fn brief_absent(absent: &Absent) -> Value {
    json!({
        "namespace": absent.namespace.as_str(),
        "config": config(ConfigState::Broken, absent.problem.as_deref()),
        "reason": absent.reason,
    })
}

fn config(state: ConfigState, problem: Option<&Diagnostic>) -> Value {
    let mut value = json!({ "state": state });
    if let (Some(problem), Some(map)) = (problem, value.as_object_mut()) {
        let problem = json!({
            "code": problem.code,
            "file": problem.file,
            "line": problem.line,
            "column": problem.column,
            "message": problem.message,
        });
        map.insert("problem".to_owned(), problem);
    }
    value
}

/// A namespace that runs or drains.
pub(super) fn of(instance: &dyn Instance, view: &View) -> Value {
    let counts = view.shelf.counts();
    json!({
        "namespace": view.namespace.as_str(),
        "description": view.plan.description,
        "owner": view.plan.owner,
        "shard": view.plan.shard,
        "revision": view.plan.revision,
        "config": config(view.config, view.problem.as_deref()),
        "end": view.log.end(),
        "parked": counts.parked,
        "nextDue": counts.next_due,
        "idempotencyKnownSince": counts.keys_since,
        "branches": branches(instance, view),
    })
}

/// Its branches.
pub(super) fn branches(instance: &dyn Instance, view: &View) -> Vec<Value> {
    let counts = view.shelf.counts();
    let now = instance.clock().now();
    let branch =
        |(name, handle): &(crate::source::BranchName, std::sync::Arc<crate::pipeline::branch::BranchHandle>)| {
            let lag = view.log.lag(name);
            let aside = counts.aside.iter().find(|(branch, _)| branch == name).map_or(0, |(_, rows)| *rows);
            let dead = counts
                .dead
                .iter()
                .find(|(branch, ..)| branch == name)
                .map_or((0, 0), |(_, letters, bytes)| (*letters, *bytes));
            let plan = handle.plan();
            let (status, counters) = (handle.board().status(), &handle.board().counters);
            let declared = view.plan.branches.iter().any(|branch| branch.name == *name);
            let state = match (&status.pause, declared) {
                (Some(_), _) => "paused",
                (None, false) => "draining",
                (None, true) => "running",
            };
            json!({
                "name": name,
                "sink": plan.sink,
                "region": plan.region,
                "state": state,
                "pause": status.pause,
                "cursor": lag.cursor,
                "lagRecords": lag.records,
                "lagBytes": lag.bytes,
                "lagSeconds": lag.oldest.map_or(0.0, |oldest| now.since(oldest).as_secs_f64()),
                "inFlight": status.in_flight,
                "setAside": aside,
                "keysSetAside": status.lanes_aside,
                "deadLetters": dead.0,
                "deadLetterBytes": dead.1,
                "delivered": counters.delivered.load(Ordering::Relaxed),
                "dropped": counters.dropped.load(Ordering::Relaxed),
                "retried": counters.retried.load(Ordering::Relaxed),
                "lastError": status.last_error,
                "lastErrorAt": status.last_error_at,
                "lastDeliveredAt": status.last_delivered_at,
            })
        };
    view.branches.iter().map(branch).collect()
}

/// A namespace that a file names and that does not run.
pub(super) fn absent(instance: &dyn Instance, name: &str) -> Answer {
    let absent = instance.absent().into_iter().find(|absent| absent.namespace.as_str() == name);
    absent.map_or_else(|| Err(unknown(name)), |absent| Ok(reply::json(StatusCode::OK, &brief_absent(&absent))))
}
