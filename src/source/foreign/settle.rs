//! Ends and progress: rows first, in the order of the calls, then the broker hears how far the branch has come.
//!
//! One task for each branch that is open writes what was handed to it, as much as waits in one transaction.

use std::sync::{Arc, Weak};

use futures::FutureExt as _;
use futures::future::{BoxFuture, ready};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::Inner;
use crate::source::{BranchName, LogError, Settlement};

/// Settlements in one transaction at most.
const GROUP: usize = 256;

/// Settlements that wait at most: more than a branch has deliveries in flight.
const MOST: usize = 65_536;

type Told = oneshot::Sender<Result<(), LogError>>;

/// The task that writes a branch's rows. Dropped, it still writes what it was given.
pub(super) struct Settler {
    orders: mpsc::Sender<(Settlement, Told)>,
    task: JoinHandle<()>,
}

impl Settler {
    pub(super) fn start(inner: &Arc<Inner>, branch: BranchName) -> Self {
        let (orders, waiting) = mpsc::channel(MOST);
        Self { orders, task: tokio::spawn(write(Arc::downgrade(inner), branch, waiting)) }
    }

    /// Writes what waits, and ends.
    pub(super) async fn finish(self) {
        drop(self.orders);
        // It ends when its channel is empty; a panic in it has been reported to whoever waited.
        let _ = self.task.await;
    }
}

async fn write(inner: Weak<Inner>, branch: BranchName, mut waiting: mpsc::Receiver<(Settlement, Told)>) {
    let mut group = Vec::new();
    while waiting.recv_many(&mut group, GROUP).await > 0 {
        let Some(inner) = inner.upgrade() else { return };
        let (settlements, told): (Vec<_>, Vec<_>) = group.drain(..).unzip();
        let result = inner.write(&branch, settlements).await;
        for told in told {
            // Who asked may be gone.
            let _ = told.send(result.clone());
        }
    }
}

impl Inner {
    pub(super) fn settle(
        &self,
        branch: &BranchName,
        settlement: Settlement,
    ) -> BoxFuture<'static, Result<(), LogError>> {
        if let Err(closed) = self.still_open() {
            return ready(Err(closed)).boxed();
        }
        if settlement.is_frontier_only() {
            self.broker.progress(branch, &settlement.frontier, &settlement.ended);
            return ready(Ok(())).boxed();
        }
        let (told, wait) = oneshot::channel();
        let known = match self.branches.lock().get(branch) {
            Some(held) => held.settler.orders.try_send((settlement, told)).is_ok(),
            None => false,
        };
        if !known {
            return ready(Err(LogError::Unsupported(
                "the branch is not open here, or writes ends faster than its shelf takes them",
            )))
            .boxed();
        }
        async move { wait.await.unwrap_or_else(|_| Err(LogError::Closed(super::CLOSED.into()))) }.boxed()
    }

    /// Makes rows durable, then passes the progress on.
    async fn write(&self, branch: &BranchName, settlements: Vec<Settlement>) -> Result<(), LogError> {
        let progress: Vec<_> =
            settlements.iter().map(|settlement| (settlement.frontier.clone(), settlement.ended.clone())).collect();
        match &self.store {
            Some(store) => store.settle(branch, settlements).await?,
            None => self.keep(branch, settlements).await?,
        }
        for (frontier, ended) in progress {
            self.broker.progress(branch, &frontier, &ended);
        }
        Ok(())
    }

    /// Without a shelf dead letters go to the broker, and pauses where it keeps them; marks live as long as the process.
    async fn keep(&self, branch: &BranchName, settlements: Vec<Settlement>) -> Result<(), LogError> {
        let (mut letters, mut pause) = (Vec::new(), None);
        for settlement in settlements {
            if !settlement.aside.is_empty() {
                return Err(LogError::Unsupported(super::NO_SHELF));
            }
            letters.extend(settlement.dead);
            pause = settlement.pause.or(pause);
        }
        if !letters.is_empty() {
            self.broker.bury(letters).await?;
        }
        match pause {
            Some(pause) if self.broker.caps().pause => self.broker.pause(branch, pause).await,
            _ => Ok(()),
        }
    }
}
