//! Which request is which operation. The table is the contract's paths: a test compares the two.

use http::{Method, StatusCode};

use crate::ingest;
use crate::ingest::reply::Problem;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Livez,
    Readyz,
    Metrics,
    Contract,
    Docs,
    Health,
    Namespaces,
    Message,
    Delete,
    MoveNamespace,
    Status,
    Branches,
    Pause,
    Resume,
    Skip,
    DeadLetters,
    Replay,
    Purge,
    Scheduled,
    Cancel,
    CancelOne,
    Move,
}

/// One operation and how it is asked for.
pub(super) struct Route {
    pub(super) method: Method,
    /// `{name}` stands for one segment, `{*name}` at the end for any number.
    pub(super) path: &'static str,
    pub(super) operation: Operation,
    /// Nobody is asked for a key.
    pub(super) open: bool,
}

const fn route(method: Method, path: &'static str, operation: Operation) -> Route {
    Route { method, path, operation, open: false }
}

const fn open(path: &'static str, operation: Operation) -> Route {
    Route { method: Method::GET, path, operation, open: true }
}

/// Everything that the console answers.
pub(super) static ROUTES: [Route; 22] = [
    open("/livez", Operation::Livez),
    open("/readyz", Operation::Readyz),
    // A browser sends no key of its own, and they show nothing but what every copy of walflow has.
    open("/api/openapi.json", Operation::Contract),
    open("/api/docs/{*file}", Operation::Docs),
    route(Method::GET, "/metrics", Operation::Metrics),
    route(Method::GET, "/api/v1/health", Operation::Health),
    route(Method::GET, "/api/v1/wal/namespaces", Operation::Namespaces),
    route(Method::GET, "/api/v1/wal/message/{id}", Operation::Message),
    route(Method::DELETE, "/api/v1/wal/namespace/{ns}", Operation::Delete),
    route(Method::POST, "/api/v1/wal/namespace/{ns}/move", Operation::MoveNamespace),
    route(Method::GET, "/api/v1/wal/namespace/{ns}/status", Operation::Status),
    route(Method::GET, "/api/v1/wal/namespace/{ns}/branches", Operation::Branches),
    route(Method::POST, "/api/v1/wal/namespace/{ns}/branches/{branch}/pause", Operation::Pause),
    route(Method::POST, "/api/v1/wal/namespace/{ns}/branches/{branch}/resume", Operation::Resume),
    route(Method::POST, "/api/v1/wal/namespace/{ns}/branches/{branch}/skip", Operation::Skip),
    route(Method::GET, "/api/v1/wal/namespace/{ns}/dead-letters", Operation::DeadLetters),
    route(Method::POST, "/api/v1/wal/namespace/{ns}/dead-letters/replay", Operation::Replay),
    route(Method::POST, "/api/v1/wal/namespace/{ns}/dead-letters/purge", Operation::Purge),
    route(Method::GET, "/api/v1/wal/namespace/{ns}/scheduled", Operation::Scheduled),
    route(Method::DELETE, "/api/v1/wal/namespace/{ns}/scheduled", Operation::Cancel),
    route(Method::DELETE, "/api/v1/wal/namespace/{ns}/scheduled/{id}", Operation::CancelOne),
    route(Method::POST, "/api/v1/wal/namespace/{ns}/scheduled/move", Operation::Move),
];

impl Route {
    /// What the path's variables stand for, when it is of this form.
    fn fits<'a>(path: &str, segments: &[&'a str]) -> Option<Vec<&'a str>> {
        let mut variables = Vec::new();
        let mut rest = segments.iter();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if part.starts_with("{*") {
                variables.extend(rest.by_ref());
                break;
            }
            let segment = rest.next()?;
            if part.starts_with('{') {
                variables.push(*segment);
            } else if part != *segment {
                return None;
            }
        }
        rest.next().is_none().then_some(variables)
    }
}

/// The operation of a request and its path's variables.
///
/// # Errors
/// 404 for a path that nothing answers, 405 for a method that this path does not have.
pub(super) fn find<'a>(method: &Method, segments: &[&'a str]) -> Result<(&'static Route, Vec<&'a str>), Problem> {
    let asked = if *method == Method::HEAD { &Method::GET } else { method };
    let mut allowed = Vec::new();
    for route in &ROUTES {
        if let Some(variables) = Route::fits(route.path, segments) {
            if route.method == *asked {
                return Ok((route, variables));
            }
            allowed.push(route.method.as_str());
        }
    }
    allowed.extend(ingest::WRITES.iter().filter(|path| Route::fits(path, segments).is_some()).map(|_| "POST"));
    let shown: String = segments.join("/").chars().take(100).collect();
    if allowed.is_empty() {
        let detail = format!("nothing answers /{shown}; /api/docs lists every route");
        return Err(Problem::not_found("no_route", detail));
    }
    let allowed = allowed.join(", ");
    let detail = format!("/{shown} takes {allowed}, not {method}");
    Err(Problem { allow: Some(allowed), ..Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method", detail) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(method: &Method, path: &str) -> Result<(Operation, Vec<String>), (u16, Option<String>)> {
        let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
        match find(method, &segments) {
            Ok((route, variables)) => Ok((route.operation, variables.iter().map(ToString::to_string).collect())),
            Err(problem) => Err((problem.status.as_u16(), problem.allow)),
        }
    }

    #[test]
    fn a_path_is_one_operation_or_says_what_it_takes() {
        let one = |text: &str| vec![text.to_owned()];
        assert_eq!(found(&Method::GET, "/api/v1/wal/namespace/a/status"), Ok((Operation::Status, one("a"))));
        assert_eq!(found(&Method::HEAD, "/livez"), Ok((Operation::Livez, Vec::new())));
        assert_eq!(found(&Method::GET, "/api/docs"), Ok((Operation::Docs, Vec::new())));
        assert_eq!(found(&Method::GET, "/api/docs/a/b").unwrap().1, ["a", "b"]);
        assert_eq!(found(&Method::GET, "/api/v1/wal/nothing"), Err((404, None)));
        assert_eq!(found(&Method::GET, "/api/v1/wal/namespace/a/status/more"), Err((404, None)));
        assert_eq!(found(&Method::PUT, "/api/v1/wal/write"), Err((405, Some("POST".to_owned()))));
        let allowed = Some("GET, DELETE".to_owned());
        assert_eq!(found(&Method::PUT, "/api/v1/wal/namespace/a/scheduled"), Err((405, allowed)));
    }
}
