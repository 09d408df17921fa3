//! What HTTP asks of the running instance: the way in for writes, and what the console shows.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use secrecy::SecretString;

use super::pipeline::{Config, Pipeline};
use super::pipelines::{Absent, Pipelines};
use crate::clock::{Clock, Timestamp};
use crate::console::{self, ConfigState, DeleteError, Instance, MoveError, Moved, Readiness, View};
use crate::ingest::reply::Problem;
use crate::ingest::{Budget, Directory, Inlet, Keys};
use crate::record::Namespace;
use crate::source::embedded::Counters;

/// Bytes of writes under way, over all namespaces.
const MOST_BYTES: u64 = 256 << 20;

/// The running instance as HTTP sees it.
pub(super) struct Front {
    pipelines: Arc<Pipelines>,
    keys: Keys,
    budget: Arc<Budget>,
}

impl Front {
    pub(super) fn new(pipelines: Arc<Pipelines>, keys: &[SecretString]) -> Self {
        Self { pipelines, keys: Keys::new(keys), budget: Budget::new(MOST_BYTES, None) }
    }

    fn pipeline(&self, name: &str) -> Option<Arc<Pipeline>> {
        self.pipelines.get(&name.parse().ok()?)
    }
}

impl Directory for Front {
    fn inlet(&self, namespace: &str) -> Result<Arc<Inlet>, Problem> {
        if !self.pipelines.is_ready() {
            return Err(Problem::unavailable(
                "stopping",
                "this walflow is starting or stopping",
                Duration::from_secs(1),
            ));
        }
        let name: Namespace = namespace.parse().map_err(|_| Problem::no_namespace(namespace))?;
        if let Some(shard) = self.pipelines.elsewhere(&name) {
            return Err(Problem::other_shard(&name, &shard));
        }
        match self.pipelines.get(&name) {
            Some(pipeline) if matches!(pipeline.config(), Config::Deleted) => Err(Problem::no_namespace(namespace)),
            Some(pipeline) if pipeline.is_moving() => Err(Problem::unavailable(
                "moving",
                format!("`{name}` is moving to another log; it takes writes again when that is done"),
                Duration::from_secs(1),
            )
            .failed()),
            Some(pipeline) => Ok(pipeline.inlet()),
            None => match self.pipelines.absent(&name) {
                None => Err(Problem::no_namespace(namespace)),
                Some(absent) => Err(Problem::unavailable("broken", absent.to_string(), Duration::from_secs(30))),
            },
        }
    }

    fn instance_budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    fn keys(&self) -> &Keys {
        &self.keys
    }
}

fn view(pipeline: &Pipeline) -> View {
    let (config, problem) = match pipeline.config() {
        Config::Current => (ConfigState::Current, None),
        Config::Stale(problem) => (ConfigState::Stale, Some(problem)),
        Config::Deleted => (ConfigState::Deleted, None),
    };
    View {
        namespace: pipeline.namespace.clone(),
        config,
        problem,
        plan: pipeline.plan(),
        log: Arc::clone(&pipeline.log),
        shelf: Arc::clone(&pipeline.shelf),
        branches: pipeline.branches(),
        received: Arc::clone(&pipeline.inlet().received),
    }
}

impl Instance for Front {
    fn readiness(&self) -> Readiness {
        let ready = self.pipelines.is_ready();
        let notes = if ready { Vec::new() } else { vec!["starting or stopping".to_owned()] };
        Readiness { ready, notes, durable: self.pipelines.logs.durable() }
    }

    fn view(&self, namespace: &str) -> Option<View> {
        self.pipeline(namespace).map(|pipeline| view(&pipeline))
    }

    fn views(&self) -> Vec<View> {
        self.pipelines.all().iter().map(|pipeline| view(pipeline)).collect()
    }

    fn absent(&self) -> Vec<console::Absent> {
        let absent = self.pipelines.all_absent().into_iter().map(|(namespace, absent)| {
            let reason = absent.to_string();
            let problem = match absent {
                Absent::Broken(problem) => Some(problem),
                Absent::Failed(_) => None,
            };
            console::Absent { namespace, problem, reason }
        });
        absent.collect()
    }

    fn delete(&self, namespace: String) -> BoxFuture<'static, Result<(), DeleteError>> {
        let pipelines = Arc::clone(&self.pipelines);
        // In a task of its own: whoever asked may leave, and half a deletion is none.
        let task = tokio::spawn(async move { pipelines.delete(&namespace).await });
        async move {
            task.await.unwrap_or_else(|panic| Err(crate::source::LogError::Closed(panic.to_string().into()).into()))
        }
        .boxed()
    }

    fn move_to(
        &self,
        namespace: String,
        file: String,
        patience: Duration,
    ) -> BoxFuture<'static, Result<Moved, MoveError>> {
        let pipelines = Arc::clone(&self.pipelines);
        // In a task of its own: whoever asked may leave, and half a move is none.
        let task = tokio::spawn(async move { pipelines.move_namespace(&namespace, &file, patience).await });
        async move {
            task.await.unwrap_or_else(|panic| Err(crate::source::LogError::Closed(panic.to_string().into()).into()))
        }
        .boxed()
    }

    fn keys(&self) -> &Keys {
        &self.keys
    }

    fn clock(&self) -> &Clock {
        &self.pipelines.clock
    }

    fn bytes_in_flight(&self) -> u64 {
        self.budget.held()
    }

    fn configured_at(&self) -> Timestamp {
        self.pipelines.applied_at()
    }

    fn log_counters(&self) -> &Counters {
        self.pipelines.logs.counters()
    }
}
