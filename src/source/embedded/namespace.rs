//! One namespace's handle on the embedded log: the traits [`Log`] and [`Shelf`].
//!
//! Admission is in `admit`, the shelf's verbs in `shelf`, look-ups in `find`. Every change goes through the writer and is
//! durable before it is answered; every query first has the store catch up with what is durable.

mod admit;
mod export;
mod find;
mod shelf;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use super::change::Change;
use super::queue::{Answer, Draft};
use super::reader::Reader;
use super::shared::Shared;
use super::space::Space;
use super::state::{StateError, StateReader};
use crate::record::{Position, RecordId};
use crate::source::{
    AdmitError, Admitted, BranchName, BranchStart, Caps, Entered, Epoch, Found, Lag, Log, LogError, Reach, Start, Write,
};

/// One namespace of an embedded log. Cheap to clone by its `Arc`.
#[derive(Clone)]
pub struct EmbeddedNamespace {
    shared: Arc<Shared>,
    space: Arc<Space>,
    /// One replay or purge at a time: both read first and change then.
    redrive: Arc<tokio::sync::Mutex<()>>,
}

impl EmbeddedNamespace {
    pub(super) fn new(shared: Arc<Shared>, space: Arc<Space>) -> Self {
        Self { shared, space, redrive: Arc::default() }
    }

    /// Records that `on_full: drop` has ended, since the start.
    pub fn overflowed(&self) -> u64 {
        self.space.overflowed.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(super) const fn shared_for_tests(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Looks after what may be forgotten, as the settle thread does now and then, and waits until that is done.
    #[cfg(test)]
    pub(in crate::source) async fn tidy_for_tests(&self) {
        self.shared.flushed().await.unwrap();
        super::retention::look(&self.shared);
        // Queued after what that has asked for.
        self.shared.change(&self.space, Vec::new()).await.unwrap();
        self.shared.flushed().await.unwrap();
    }

    #[cfg(test)]
    pub(super) const fn space_for_tests(&self) -> &Arc<Space> {
        &self.space
    }

    /// Asks the store once it shows everything that is durable now.
    async fn ask<T: Send + 'static>(
        &self,
        query: impl FnOnce(&StateReader) -> Result<T, StateError> + Send + 'static,
    ) -> Result<T, LogError> {
        // Once it is closed the folder may be another process's.
        self.still_open()?;
        self.shared.flushed().await?;
        let reader = self.shared.reader.clone();
        let panicked = |_| LogError::Closed("the reading thread failed".into());
        Ok(tokio::task::spawn_blocking(move || query(&reader)).await.map_err(panicked)??)
    }

    fn still_open(&self) -> Result<(), LogError> {
        self.shared.refusal().map_or(Ok(()), |reason| Err(LogError::Closed(reason)))
    }

    async fn change(&self, changes: Vec<Change>) -> Result<(), LogError> {
        let drafts = changes.into_iter().map(Draft::Change).collect();
        self.shared.change(&self.space, drafts).await.map(|_| ())
    }

    async fn open(self, name: BranchName, start: Start) -> Result<BranchStart, LogError> {
        self.still_open()?;
        let known = self.space.branches.lock().contains_key(&name);
        if !known {
            let kept = Position(self.space.first_kept.load(Ordering::Acquire).saturating_sub(1));
            let forgotten = self.space.start_over.load(Ordering::Relaxed) > kept.0;
            let position = match start.by_position(&self.space.epochs.lock()) {
                // It may be one whose cursor a repair has lost: rather a record twice than never.
                _ if forgotten => kept,
                Start::Earliest | Start::Epoch(_) => kept,
                Start::Latest => self.space.end(),
                Start::After(position) => position.max(kept),
            };
            self.change(vec![Change::BranchOpened { branch: name.clone(), position }]).await?;
        }
        let cursor = {
            let branches = self.space.branches.lock();
            branches.get(&name).map_or(Position(0), |branch| branch.wanted.max(branch.durable))
        };
        let (number, branch) = (self.space.number, name.clone());
        let found = move |reader: &StateReader| {
            Ok((reader.branch(number, &branch, cursor)?, reader.aside_lanes(number, &branch, None)?))
        };
        // Of a branch that is new the store has nothing, so it does not wait for the views (LOG.md 23).
        let (stored, lanes) = if known { self.ask(found).await? } else { Default::default() };
        // With nothing under way a stop says nothing about any record.
        let idle = cursor >= self.space.end();
        let subscription = Reader::new(Arc::clone(&self.shared), Arc::clone(&self.space), name, cursor);
        Ok(BranchStart {
            cursor: cursor.into(),
            ended: stored.ended,
            lanes,
            pause: stored.pause,
            unclean_stops: if idle { 0 } else { stored.unclean_stops },
            marks: stored.marks,
            subscription: Box::new(subscription),
            moved: CancellationToken::new(),
        })
    }
}

impl Log for EmbeddedNamespace {
    fn caps(&self) -> Caps {
        Caps {
            delay: true,
            max_delay: None,
            hold: false,
            schedule: true,
            ordered: true,
            exact_keys: true,
            look_up: true,
            durable: true,
            set_aside: true,
            pause: true,
            shared: false,
            each_end: false,
        }
    }

    fn admit(&self, writes: Vec<Write>) -> BoxFuture<'static, Result<Vec<Admitted>, AdmitError>> {
        let entering = self.clone().enter_all(writes);
        async move { entering.await?.durable().await }.boxed()
    }

    fn enter(&self, writes: Vec<Write>) -> BoxFuture<'static, Result<Entered, AdmitError>> {
        let entering = self.clone().enter_all(writes);
        async move { Ok(entering.await?.durable().boxed()) }.boxed()
    }

    fn open_branch(&self, branch: &BranchName, start: Start) -> BoxFuture<'static, Result<BranchStart, LogError>> {
        self.clone().open(branch.clone(), start).boxed()
    }

    fn forget_branch(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let (namespace, branch) = (self.clone(), branch.clone());
        async move { namespace.change(vec![Change::BranchForgotten { branch }]).await }.boxed()
    }

    fn rename_branch(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let namespace = self.clone();
        let renamed = Change::BranchRenamed { from: from.clone(), to: to.clone() };
        let (from, to) = (from.clone(), to.clone());
        async move {
            namespace.still_open()?;
            let possible = {
                let branches = namespace.space.branches.lock();
                branches.contains_key(&from) && !branches.contains_key(&to)
            };
            if possible { namespace.change(vec![renamed]).await } else { Ok(()) }
        }
        .boxed()
    }

    fn branches(&self) -> Vec<BranchName> {
        self.space.branches.lock().keys().cloned().collect()
    }

    fn lag(&self, branch: &BranchName) -> Lag {
        let end = self.space.end();
        let Some(cursor) = self.space.branches.lock().get(branch).map(|branch| branch.durable) else {
            return Lag { cursor: end.into(), ..Lag::default() };
        };
        let records = end.0.saturating_sub(cursor.0);
        if records == 0 {
            return Lag { cursor: cursor.into(), ..Lag::default() };
        }
        let bytes = self.space.bytes_before(end.next()).saturating_sub(self.space.bytes_before(cursor.next()));
        Lag { records, bytes, oldest: self.space.time_of(cursor.next()), cursor: cursor.into() }
    }

    fn end(&self) -> Reach {
        self.space.end().into()
    }

    fn find(&self, id: RecordId) -> BoxFuture<'static, Result<Option<Found>, LogError>> {
        self.clone().look_up(id).boxed()
    }

    fn put_epoch(&self, files: Bytes) -> BoxFuture<'static, Result<Epoch, LogError>> {
        let namespace = self.clone();
        async move {
            match namespace.shared.change(&namespace.space, vec![Draft::Epoch(files)]).await? {
                Answer::Epoch(epoch) => Ok(epoch),
                _ => Err(LogError::Unsupported("the log gave no revision")),
            }
        }
        .boxed()
    }

    fn epochs(&self) -> Vec<Epoch> {
        self.space.epochs.lock().clone()
    }
}
