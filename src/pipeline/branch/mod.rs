//! One branch of a namespace: its own reader, its own lanes, its own breaker, its own task.
//!
//! A branch takes records from the log in order, prepares and sends them, and ends each delivery exactly once: the target
//! took it, it was set aside, or it lies in the dead letters. It never answers for another branch and never waits
//! without a bound. When its task fails it is started again from the stored frontier, and that is counted.

mod actor;
mod aside;
mod breaker;
mod copies;
mod lanes;
mod orders;
mod outcome;
mod pace;
mod prepare;
mod shared;
mod stats;
#[cfg(test)]
mod tests;
mod waiting;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

pub use shared::Shared;
pub use stats::{Board, BranchCounters, BranchStatus, Pause};

use super::plan::BranchPlan;
use super::revisions::Revisions;
use crate::clock::Clock;
use crate::record::{Namespace, RecordId};
use crate::sink::{Kind, Sink, SinkContext};
use crate::source::{BranchName, Log, LogError, Shelf, Start};

/// Makes the sink of a branch, again whenever its settings change. Opens no connection.
pub type OpenSink = Arc<dyn Fn(&Kind, &SinkContext) -> Result<Box<dyn Sink>, Box<str>> + Send + Sync>;

/// What a branch needs.
#[derive(Clone)]
pub struct BranchDeps {
    /// Its namespace, for logs and dead letters.
    pub namespace: Namespace,
    /// Where it reads.
    pub log: Arc<dyn Log>,
    /// Where it settles.
    pub shelf: Arc<dyn Shelf>,
    /// Which plan decides who takes a record.
    pub revisions: Arc<Revisions>,
    /// What the namespace's branches need to do once only.
    pub shared: Arc<Shared>,
    /// How a sink is made.
    pub open_sink: OpenSink,
    /// Wall-clock time.
    pub clock: Clock,
    /// Where it begins if the log has never seen it.
    pub start: Start,
}

/// Which delivery to skip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// The one with the lowest position that waits.
    Head,
    /// This record's.
    Record(RecordId),
}

pub(super) enum Command {
    Update(Arc<BranchPlan>),
    Pause(String, Told),
    Resume(Told),
    Skip(Skip, Told),
    Drain(Instant),
}

/// The duty to tell somebody when what he asked for is durable; dropped, it says that it is not.
pub(super) struct Told(oneshot::Sender<Option<RecordId>>, Option<RecordId>);

impl Told {
    /// The same, about a record.
    fn of(self, id: RecordId) -> Self {
        Self(self.0, Some(id))
    }

    fn now(self) {
        // Whoever asked may be gone.
        let _ = self.0.send(self.1);
    }
}

/// The longest wait for an order to be durable.
const ORDER: Duration = Duration::from_secs(20);

/// The hold on a running branch. Dropping it stops the branch at once; what was under way is sent again at the next start.
pub struct BranchHandle {
    plan: ArcSwap<BranchPlan>,
    board: Arc<Board>,
    commands: mpsc::Sender<Command>,
    task: tokio::sync::Mutex<JoinHandle<()>>,
    /// Ends the task when the handle is dropped, whoever waits for it.
    abort: tokio::task::AbortHandle,
}

impl BranchHandle {
    /// Starts a branch. Must be called inside a runtime.
    pub fn start(deps: BranchDeps, plan: Arc<BranchPlan>) -> Self {
        let board = Arc::new(Board::default());
        let (commands, receiver) = mpsc::channel(16);
        let task = tokio::spawn(keep_running(deps, Arc::clone(&plan), Arc::clone(&board), receiver));
        let abort = task.abort_handle();
        Self { plan: ArcSwap::new(plan), board, commands, task: tokio::sync::Mutex::new(task), abort }
    }

    /// Its name.
    pub fn name(&self) -> BranchName {
        self.plan.load().name.clone()
    }

    /// What it runs by now.
    pub fn plan(&self) -> Arc<BranchPlan> {
        self.plan.load_full()
    }

    /// Counters and state.
    pub const fn board(&self) -> &Arc<Board> {
        &self.board
    }

    /// Address, retry, limits, batches and scripts change at once, for the backlog too. Ends a `refused` pause.
    pub async fn update(&self, plan: Arc<BranchPlan>) {
        self.plan.store(Arc::clone(&plan));
        let _ = self.commands.send(Command::Update(plan)).await;
    }

    /// Stops sending until [`BranchHandle::resume`], over restarts too. True when that is durable; false = nobody can say.
    pub async fn pause(&self, note: String) -> bool {
        self.order(|told| Command::Pause(note, told)).await.is_some()
    }

    /// Ends any pause; an open breaker probes at once. True when that is durable; false = nobody can say.
    pub async fn resume(&self) -> bool {
        self.order(Command::Resume).await.is_some()
    }

    /// Sends a waiting delivery to the dead letters. Gives its record when that is durable, or `None` when there is no such
    /// delivery or it is under way.
    pub async fn skip(&self, which: Skip) -> Option<RecordId> {
        self.order(|told| Command::Skip(which, told)).await.flatten()
    }

    /// Gives an order and waits until it is durable, with a bound; `None` = it was not followed, or not in time.
    async fn order(&self, order: impl FnOnce(Told) -> Command) -> Option<Option<RecordId>> {
        let (answer, wait) = oneshot::channel();
        let followed = async {
            self.commands.send(order(Told(answer, None))).await.ok()?;
            wait.await.ok()
        };
        tokio::time::timeout(ORDER, followed).await.ok().flatten()
    }

    /// Sends what is left while the target takes it, waits for what is under way, settles, and ends; at the deadline it
    /// ends as it is.
    pub async fn drain(&self, deadline: Duration) {
        // A part of the time is for what is under way when sending stops.
        let until = Instant::now() + deadline.mul_f64(0.7);
        let drained = async {
            let _ = self.commands.send(Command::Drain(until)).await;
            let _ = (&mut *self.task.lock().await).await;
        };
        if tokio::time::timeout(deadline, drained).await.is_err() {
            self.abort.abort();
        }
    }

    /// Ends at once; what was under way is sent again at the next start.
    pub async fn stop(&self) {
        self.abort.abort();
        let mut task = self.task.lock().await;
        if !task.is_finished() {
            let _ = (&mut *task).await;
        }
    }
}

impl Drop for BranchHandle {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

/// Runs the branch until it is drained or the log is closed; starts it again when it fails.
async fn keep_running(
    deps: BranchDeps,
    mut plan: Arc<BranchPlan>,
    board: Arc<Board>,
    commands: mpsc::Receiver<Command>,
) {
    let mut wait = Duration::from_millis(100);
    let commands = Arc::new(tokio::sync::Mutex::new(commands));
    let mut passed = HashSet::new();
    loop {
        let begun = tokio::time::Instant::now();
        let name = plan.name.clone();
        // A task of its own, so that a panic ends the attempt and not the branch.
        let run = actor::run(
            deps.clone(),
            Arc::clone(&plan),
            Arc::clone(&board),
            Arc::clone(&commands),
            std::mem::take(&mut passed),
        );
        let mut attempt = AbortOnDrop(tokio::spawn(run));
        match (&mut attempt.0).await {
            Ok(Ok(actor::Ended::Drained)) => return,
            // Opened anew with the parts that are its own now.
            Ok(Ok(actor::Ended::Moved)) => continue,
            Ok(Ok(actor::Ended::Replanned(newer, ended))) => {
                plan = newer;
                passed = ended;
                continue;
            }
            Ok(Err(LogError::Closed(reason))) => {
                tracing::debug!(namespace = %deps.namespace, branch = %name, %reason, "the log is closed");
                return;
            }
            Ok(Err(error)) => {
                tracing::error!(namespace = %deps.namespace, branch = %name, %error, "branch failed, starting it again");
                board.update(|status| status.last_error = Some(error.to_string()));
            }
            Err(error) if error.is_panic() => {
                tracing::error!(namespace = %deps.namespace, branch = %name, "branch panicked, starting it again");
            }
            Err(_) => return,
        }
        BranchCounters::add(&board.counters.restarts, 1);
        if begun.elapsed() > Duration::from_secs(60) {
            wait = Duration::from_millis(100);
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_secs(30));
    }
}

struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
