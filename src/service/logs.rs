//! The logs under the namespaces: one embedded log for all, a log in memory for each that asks for one.
//!
//! Takes the data folder, gives each namespace its pair of [`Log`] and [`Shelf`]. The embedded log is the lock on the
//! folder: whoever comes second is told who holds it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::ServiceError;
use crate::clock::Clock;
use crate::pipeline::plan::{Plan, SourceKind};
use crate::record::Namespace;
use crate::source::embedded::{Counters, Embedded, NamespaceSettings, OpenError, Options};
use crate::source::memory::Memory;
use crate::source::{Log, LogError, Shelf};
use crate::spec::OnFull;

/// Every log of the instance.
pub(super) struct Logs {
    embedded: Arc<Embedded>,
    memory: Mutex<BTreeMap<Namespace, Arc<Memory>>>,
    clock: Clock,
}

/// One namespace's pair.
pub(super) struct Opened {
    pub(super) log: Arc<dyn Log>,
    pub(super) shelf: Arc<dyn Shelf>,
}

fn settings(plan: &Plan) -> NamespaceSettings {
    let source = &plan.source;
    NamespaceSettings {
        retention_age: source.retention.age.0,
        retention_bytes: source.retention.size.0,
        backlog_bytes: source.backlog.size.0,
        backlog_age: source.backlog.age.0,
        drop_oldest: source.backlog.on_full == OnFull::Drop,
        key_window: source.idempotency.window.0,
        key_max: source.idempotency.max.0,
        max_record_bytes: source.limits.record.0,
    }
}

impl Logs {
    /// Opens the folder and repairs what the last stop left behind.
    pub(super) async fn open(data: &Path, clock: Clock) -> Result<Self, ServiceError> {
        let options = Options::new(data.to_owned(), clock.clone());
        let failed = |reason: String| ServiceError::Log { data: data.to_owned(), reason };
        let opened = tokio::task::spawn_blocking(move || Embedded::open(options)).await;
        match opened.map_err(|panic| failed(panic.to_string()))? {
            Ok(embedded) => Ok(Self { embedded, memory: Mutex::default(), clock }),
            Err(error @ OpenError::Held { .. }) => Err(ServiceError::Held { reason: error.to_string() }),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// The namespaces that the logs hold.
    pub(super) fn names(&self) -> Vec<Namespace> {
        let mut names = self.embedded.namespace_names();
        names.extend(self.memory.lock().keys().cloned());
        names
    }

    /// The pair of a namespace; `plan` gives its bounds, and without one it keeps those that it has.
    pub(super) fn namespace(&self, name: &Namespace, plan: Option<&Plan>) -> Result<Opened, LogError> {
        if let Some(plan) = plan.filter(|plan| plan.source.kind == SourceKind::Memory) {
            let mut memory = self.memory.lock();
            let number = u32::try_from(memory.len() + 1).unwrap_or(u32::MAX);
            let pair = memory.entry(name.clone()).or_insert_with(|| Memory::new(number, self.clock.clone()));
            pair.remember_keys_for(plan.source.idempotency.window.0);
            return Ok(Opened { log: Arc::clone(pair) as Arc<dyn Log>, shelf: Arc::clone(pair) as Arc<dyn Shelf> });
        }
        let held = if plan.is_none() { self.embedded.held(name)? } else { None };
        let pair = match held {
            Some(held) => held,
            None => self.embedded.namespace(name, plan.map(settings).unwrap_or_default())?,
        };
        Ok(Opened { log: Arc::clone(&pair) as Arc<dyn Log>, shelf: pair })
    }

    /// Deletes a namespace with all that it holds.
    pub(super) async fn delete(&self, name: &Namespace) -> Result<(), LogError> {
        self.memory.lock().remove(name);
        self.embedded.delete_namespace(name).await.map(|_| ())
    }

    /// What durable means here, and what is wrong with the log.
    pub(super) fn durable(&self) -> Vec<String> {
        let health = self.embedded.health();
        let mut facts = vec!["embedded: on this machine's disk, synced before the answer".to_owned()];
        if health.disk_full {
            facts.push("the disk is full: writes are refused, reading and acking go on".to_owned());
        }
        facts.extend(health.damaged.iter().map(|damage| format!("damaged: {damage}")));
        facts
    }

    /// What the embedded log counts.
    pub(super) fn counters(&self) -> &Counters {
        self.embedded.counters()
    }

    /// Waits until the log has failed for good; gives why.
    pub(super) async fn fenced(&self) -> String {
        self.embedded.fenced().await.to_string()
    }

    /// Makes everything durable and lets the folder go.
    pub(super) async fn close(&self) {
        self.memory.lock().values().for_each(|memory| memory.close());
        self.embedded.close().await;
    }
}
