//! The reader of what one assignment of partitions holds. Dropped, it lets them go.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;

use super::consumer::Shared;
use crate::source::{Entry, LogError, Subscription};

/// The reader of a session.
pub(super) struct Parts {
    pub(super) shared: Arc<Shared>,
    pub(super) generation: u64,
}

impl Subscription for Parts {
    fn next(&mut self, max_records: usize, max_bytes: usize) -> BoxFuture<'_, Result<Vec<Entry>, LogError>> {
        async move {
            loop {
                let news = self.shared.news.notified();
                tokio::pin!(news);
                news.as_mut().enable();
                if let Some(entries) = self.take(max_records, max_bytes)? {
                    return Ok(entries);
                }
                news.await;
            }
        }
        .boxed()
    }

    fn rest(&mut self, parts: &BTreeSet<u16>) {
        let mut state = self.shared.state.lock();
        if let Some(session) = state.session.as_mut().filter(|session| session.generation == self.generation) {
            session.resting.clone_from(parts);
        }
    }
}

impl Parts {
    fn take(&self, max_records: usize, max_bytes: usize) -> Result<Option<Vec<Entry>>, LogError> {
        let mut state = self.shared.state.lock();
        if state.stopped {
            return Err(LogError::Closed("the group was left".into()));
        }
        let Some(session) = state.session.as_mut().filter(|session| session.generation == self.generation) else {
            return Ok(None);
        };
        let was_full = session.is_full();
        let entries = session.take(max_records, max_bytes);
        if was_full {
            self.shared.changed.notify_all();
        }
        Ok((!entries.is_empty()).then_some(entries))
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        if let Some(session) = state.session.as_mut().filter(|session| session.generation == self.generation) {
            session.taken = false;
        }
        drop(state);
        self.shared.tell();
    }
}
