//! HTTP for writes: from a request's bytes to records that are durable, and the answer that tells the truth about it.
//!
//! Takes connections, a way to find each namespace's [`Inlet`], and the routes of others; gives answers. Never answers
//! before the log has, and holds a bounded number of bytes.

mod admit;
mod auth;
mod batch;
mod body;
mod decode;
mod lines;
mod patient;
pub mod reply;
mod routes;
mod serve;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod write;

use std::sync::Arc;

pub use admit::{Budget, Received};
pub use auth::Keys;
pub use body::{Incoming, read_all};
pub use routes::{Asked, BoxedRoutes, Head, WRITES, routes};
pub use serve::{Limits, serve};

use crate::clock::Clock;
use crate::delay::Delay;
use crate::record::{Namespace, TargetKind};
use crate::source::Log;
use crate::transform::PayloadSchema;
use reply::Problem;

/// The routes for writes, as OpenAPI.
#[derive(utoipa::OpenApi)]
#[openapi(paths(write::write, batch::batch), components(schemas(reply::ProblemBody)))]
pub struct Contract;

/// The way into one namespace, as its file in force has it.
pub struct Inlet {
    /// The namespace.
    pub namespace: Namespace,
    /// Where writes become durable.
    pub log: Arc<dyn Log>,
    /// How long records wait.
    pub delay: Option<Delay>,
    /// What payloads must match.
    pub schema: Option<Arc<PayloadSchema>>,
    /// A JSON pointer that gives the key.
    pub key: Option<Arc<str>>,
    /// A JSON pointer that gives the idempotency key.
    pub idempotency: Option<Arc<str>>,
    /// The largest payload.
    pub record_bytes: u64,
    /// Bytes that are not durable yet, and writes a second.
    pub budget: Arc<Budget>,
    /// What came in.
    pub received: Arc<Received>,
    /// The region that this instance is in.
    pub origin: Option<Arc<str>>,
    /// Every branch, as `target` may choose it.
    pub outlets: Vec<Outlet>,
    /// The time.
    pub clock: Clock,
}

/// A branch as a write's `target` sees it.
#[derive(Clone, Debug)]
pub struct Outlet {
    /// Its sink.
    pub sink: Arc<str>,
    /// Its region.
    pub region: Option<Arc<str>>,
    /// What sort of target it is.
    pub kind: TargetKind,
}

/// Finds the way into a namespace.
pub trait Directory: Send + Sync {
    /// The inlet, or why there is none: unknown (404), its file is broken (503), stopping (503).
    ///
    /// # Errors
    /// The answer to give.
    fn inlet(&self, namespace: &str) -> Result<Arc<Inlet>, Problem>;

    /// Bytes of all writes under way, over all namespaces.
    fn instance_budget(&self) -> &Arc<Budget>;

    /// Who may call.
    fn keys(&self) -> &Keys;
}
