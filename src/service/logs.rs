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
use crate::source::embedded::{Embedded, NamespaceSettings, OpenError, Options};
use crate::source::memory::Memory;
use crate::source::{Epoch, Log, LogError, Shelf};

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

impl Logs {
    /// Opens the folder and repairs what the last stop left behind.
    pub(super) async fn open(data: &Path, clock: Clock) -> Result<Self, ServiceError> {
        let folder = data.to_path_buf();
        let options = Options::new(folder.clone(), clock.clone());
        let opened = tokio::task::spawn_blocking(move || Embedded::open(options)).await;
        let failed = |reason: String| ServiceError::Log { data: folder.clone(), reason };
        match opened {
            Ok(Ok(embedded)) => Ok(Self { embedded, memory: Mutex::default(), clock }),
            Ok(Err(error @ OpenError::Held { .. })) => Err(ServiceError::Held { reason: error.to_string() }),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(panic) => Err(failed(panic.to_string())),
        }
    }

    /// The namespaces that the embedded log holds.
    pub(super) fn names(&self) -> Vec<Namespace> {
        self.embedded.namespace_names()
    }

    /// Whether the log holds this namespace already.
    pub(super) fn knows(&self, name: &Namespace) -> bool {
        self.names().contains(name)
    }

    /// The pair of a plan's namespace, with the plan's bounds.
    pub(super) fn namespace(&self, plan: &Plan) -> Result<Opened, LogError> {
        let source = &plan.source;
        let settings = NamespaceSettings::default();
        match source.kind {
            SourceKind::Embedded => {
                let pair = self.embedded.namespace(&plan.namespace, settings)?;
                Ok(Opened { log: Arc::clone(&pair) as Arc<dyn Log>, shelf: pair })
            }
            SourceKind::Memory => {
                let mut memory = self.memory.lock();
                let pair = memory.entry(plan.namespace.clone()).or_insert_with(|| Memory::new(self.clock.clone()));
                Ok(Opened { log: Arc::clone(pair) as Arc<dyn Log>, shelf: Arc::clone(pair) as Arc<dyn Shelf> })
            }
        }
    }
}
