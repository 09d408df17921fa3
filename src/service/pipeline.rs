//! One namespace as it runs: its log, the revisions of its file, and its branches.
//!
//! Takes a plan and makes it so, all or nothing; gives status and the way in. Never touches another namespace. A branch
//! that the file no longer has goes on until nothing of it is left.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tracing::{info, warn};

use super::logs::Opened;
use crate::clock::Clock;
use crate::ingest::{Budget, Inlet, Outlet, Received};
use crate::pipeline::branch::{BranchDeps, BranchHandle, OpenSink, Shared};
use crate::pipeline::plan::{BranchPlan, Plan};
use crate::pipeline::revisions::Revisions;
use crate::record::Namespace;
use crate::sink;
use crate::source::{BranchName, Epoch, Log, LogError, Shelf, Start};
use crate::spec::diagnostic::Diagnostic;
use crate::spec::sink::StartSpec;

/// How the plan in force relates to the file.
#[derive(Clone, Debug)]
pub(super) enum Config {
    /// It is the file's.
    Current,
    /// The file is broken; the last good one is in force.
    Stale(Arc<Diagnostic>),
    /// The file is gone: no writes, what is left drains.
    Deleted,
}

/// One namespace.
pub(super) struct Pipeline {
    pub(super) namespace: Namespace,
    pub(super) log: Arc<dyn Log>,
    pub(super) shelf: Arc<dyn Shelf>,
    pub(super) revisions: Arc<Revisions>,
    shared: Arc<Shared>,
    clock: Clock,
    open_sink: OpenSink,
    /// The way in, as the plan in force has it.
    inlet: ArcSwap<Inlet>,
    state: Mutex<State>,
    /// Writes are refused: it is moving to another log.
    moving: AtomicBool,
    /// Held while branches come and go, so that two reloads never mix.
    changing: tokio::sync::Mutex<()>,
}

struct State {
    plan: Arc<Plan>,
    config: Config,
    branches: BTreeMap<BranchName, Arc<BranchHandle>>,
}

impl Pipeline {
    /// Runs `plan` on an opened log. `earlier` are the plans of the log's epochs, by number.
    pub(super) async fn start(
        namespace: Namespace,
        opened: Opened,
        earlier: Vec<(u32, Arc<Plan>)>,
        plan: Arc<Plan>,
        config: Config,
        clock: Clock,
    ) -> Result<Self, LogError> {
        let revisions = Arc::new(Revisions::new(Arc::clone(&opened.log)));
        for (number, plan) in earlier {
            revisions.publish(number, plan);
        }
        let inlet = inlet(&plan, &opened.log, &clock, Arc::default(), None);
        let pipeline = Self {
            namespace,
            log: opened.log,
            shelf: opened.shelf,
            revisions,
            shared: Arc::default(),
            clock,
            open_sink: Arc::new(|kind, context| sink::open(kind, context).map_err(|error| error.to_string().into())),
            inlet: ArcSwap::from_pointee(inlet),
            state: Mutex::new(State { plan: Arc::clone(&plan), config: config.clone(), branches: BTreeMap::new() }),
            moving: AtomicBool::new(false),
            changing: tokio::sync::Mutex::new(()),
        };
        pipeline.apply(plan, config).await?;
        Ok(pipeline)
    }

    /// Puts `plan` in force: for addresses, retries, limits and scripts at once, for who takes what by a new epoch.
    pub(super) async fn apply(&self, plan: Arc<Plan>, config: Config) -> Result<(), LogError> {
        let _changing = self.changing.lock().await;
        let epoch = self.epoch_of(&plan).await?;
        self.revisions.publish(epoch.number, Arc::clone(&plan));
        {
            let mut state = self.state.lock();
            state.plan = Arc::clone(&plan);
            state.config = config;
        }
        let now = self.inlet.load_full();
        let (received, budget) = (Arc::clone(&now.received), Arc::clone(&now.budget));
        self.inlet.store(Arc::new(inlet(&plan, &self.log, &self.clock, received, Some(budget))));
        for name in self.log.branches().iter().filter(|name| is_retired(&plan, name)) {
            self.end(name).await?;
        }
        for branch in &plan.branches {
            self.take_over(branch).await?;
            let running = self.state.lock().branches.get(&branch.name).cloned();
            if let Some(handle) = running {
                handle.update(Arc::clone(branch)).await;
            } else {
                self.open(Arc::clone(branch), self.start_of(branch, &epoch)).await?;
            }
        }
        self.drain_removed(&plan).await
    }

    /// Writes are refused from now on, or taken again.
    pub(super) fn set_moving(&self, moving: bool) {
        self.moving.store(moving, Ordering::Release);
    }

    /// Whether writes are refused because it moves.
    pub(super) fn is_moving(&self) -> bool {
        self.moving.load(Ordering::Acquire)
    }

    /// The file is broken or good again; the plan stays.
    pub(super) fn set_config(&self, config: Config) {
        self.state.lock().config = config;
    }

    /// How the plan relates to the file.
    pub(super) fn config(&self) -> Config {
        self.state.lock().config.clone()
    }

    /// The plan in force.
    pub(super) fn plan(&self) -> Arc<Plan> {
        Arc::clone(&self.state.lock().plan)
    }

    /// A branch that runs.
    pub(super) fn branch(&self, name: &BranchName) -> Option<Arc<BranchHandle>> {
        self.state.lock().branches.get(name).cloned()
    }

    /// Every branch that runs, by name.
    pub(super) fn branches(&self) -> Vec<(BranchName, Arc<BranchHandle>)> {
        self.state.lock().branches.iter().map(|(name, handle)| (name.clone(), Arc::clone(handle))).collect()
    }

    /// The epoch that keeps this plan's files; a new one when the newest keeps others.
    async fn epoch_of(&self, plan: &Plan) -> Result<Epoch, LogError> {
        match self.log.epochs().pop().filter(|newest| newest.files == plan.files) {
            Some(newest) => Ok(newest),
            None => self.log.put_epoch(plan.files.clone()).await,
        }
    }

    /// Where a branch begins that the log has never seen: where the file first had it, without a gap since.
    fn start_of(&self, branch: &BranchPlan, epoch: &Epoch) -> Start {
        match branch.start {
            Some(StartSpec::Earliest) => return Start::Earliest,
            Some(StartSpec::Latest) | None => {}
        }
        let plans = self.revisions.known();
        let has = |number: u32| {
            plans.get(&number).is_some_and(|plan| plan.branches.iter().any(|other| other.name == branch.name))
        };
        let epochs = self.log.epochs();
        let first = epochs.iter().rev().take_while(|epoch| has(epoch.number)).last();
        Start::Epoch(first.map_or(epoch.number, |first| first.number))
    }

    /// Carries on under a new name what `was:` names.
    async fn take_over(&self, branch: &BranchPlan) -> Result<(), LogError> {
        let Some(was) = &branch.was else { return Ok(()) };
        let known = self.log.branches();
        if known.contains(&branch.name) || !known.contains(was) {
            return Ok(());
        }
        self.close(was).await;
        self.log.rename_branch(was, &branch.name).await?;
        info!(ns = %self.namespace, from = %was, to = %branch.name, "renamed a branch");
        Ok(())
    }

    async fn open(&self, plan: Arc<BranchPlan>, start: Start) -> Result<(), LogError> {
        let name = plan.name.clone();
        // Before anything is written: what comes from here on is this branch's too. The log knows one that ran before; to
        // open it here would keep writes waiting for the log's views after a crash (LOG.md 23).
        if !self.log.branches().contains(&name) {
            self.log.make_branch(&name, start).await?;
        }
        let deps = BranchDeps {
            namespace: self.namespace.clone(),
            log: Arc::clone(&self.log),
            shelf: Arc::clone(&self.shelf),
            revisions: Arc::clone(&self.revisions),
            shared: Arc::clone(&self.shared),
            open_sink: Arc::clone(&self.open_sink),
            clock: self.clock.clone(),
            start,
        };
        self.state.lock().branches.insert(name, Arc::new(BranchHandle::start(deps, plan)));
        Ok(())
    }

    /// Branches that the log knows and the file does not: they go on by the last plan that had them.
    async fn drain_removed(&self, plan: &Plan) -> Result<(), LogError> {
        for name in self.log.branches() {
            let kept = plan.branches.iter().any(|branch| branch.name == name);
            if kept || self.branch(&name).is_some() {
                continue;
            }
            let plans = self.revisions.known();
            let last =
                plans.values().rev().find_map(|plan| plan.branches.iter().find(|branch| branch.name == name).cloned());
            match last {
                Some(branch) => self.open(branch, Start::Latest).await?,
                None if self.is_over(&name) => {
                    self.log.forget_branch(&name).await?;
                    info!(ns = %self.namespace, branch = %name, "a removed branch has nothing left and is gone");
                }
                None => {
                    warn!(ns = %self.namespace, branch = %name, "no file that is kept has this branch; what it holds waits for one");
                }
            }
        }
        Ok(())
    }

    /// Ends at once a branch that the file retired, with all that it holds.
    async fn end(&self, name: &BranchName) -> Result<(), LogError> {
        self.close(name).await;
        if self.log.branches().contains(name) {
            let left = self.log.lag(name).records;
            self.log.forget_branch(name).await?;
            warn!(ns = %self.namespace, branch = %name, records = left, "retired a branch and dropped what was left");
        }
        Ok(())
    }

    async fn close(&self, name: &BranchName) {
        let handle = self.state.lock().branches.remove(name);
        if let Some(handle) = handle {
            handle.stop().await;
        }
    }

    /// Forgets removed branches of which nothing is left. Called now and then.
    pub(super) async fn sweep(&self) -> Result<(), LogError> {
        let Ok(_changing) = self.changing.try_lock() else { return Ok(()) };
        let plan = self.plan();
        let deleted = matches!(self.config(), Config::Deleted);
        let removed: Vec<BranchName> = {
            let state = self.state.lock();
            let gone = |name: &BranchName| !plan.branches.iter().any(|branch| branch.name == *name);
            state.branches.keys().filter(|name| !deleted && gone(name)).cloned().collect()
        };
        if removed.is_empty() {
            return Ok(());
        }
        for name in removed {
            if self.is_over(&name) {
                self.close(&name).await;
                self.log.forget_branch(&name).await?;
                info!(ns = %self.namespace, branch = %name, "a removed branch has nothing left and is gone");
            }
        }
        Ok(())
    }

    /// Whether a removed branch has ended all that was ever its own: it has no rows, and no plan that is in force after its
    /// cursor has it. Of a revision that could not be read nobody can say.
    fn is_over(&self, name: &BranchName) -> bool {
        let counts = self.shelf.counts();
        if counts.aside_of(name) + counts.dead_of(name).0 > 0 {
            return false;
        }
        let lag = self.log.lag(name);
        if lag.records == 0 {
            return true;
        }
        let (epochs, plans) = (self.log.epochs(), self.revisions.known());
        let first = epochs.partition_point(|epoch| epoch.after <= lag.cursor.single()).saturating_sub(1);
        epochs.iter().skip(first).all(|epoch| {
            plans.get(&epoch.number).is_some_and(|plan| {
                plan.files == epoch.files && plan.branches.iter().all(|branch| branch.name != *name)
            })
        })
    }

    /// Lets what is under way end, and stops reading; gives up at `patience`.
    pub(super) async fn drain(&self, patience: Duration) {
        let branches = self.branches();
        futures::future::join_all(branches.iter().map(|(_, handle)| handle.drain(patience))).await;
    }

    /// Ends every branch where it is.
    pub(super) async fn stop(&self) {
        let branches = std::mem::take(&mut self.state.lock().branches);
        futures::future::join_all(branches.values().map(|handle| handle.stop())).await;
    }

    /// The way in.
    pub(super) fn inlet(&self) -> Arc<Inlet> {
        self.inlet.load_full()
    }
}

/// `retired:` names a branch, or a sink or region of which all branches end.
fn is_retired(plan: &Plan, name: &BranchName) -> bool {
    let kept = plan.branches.iter().any(|branch| branch.name == *name);
    let (sink, region) = name.as_str().split_once('@').unwrap_or((name.as_str(), ""));
    !kept && plan.retired.iter().any(|retired| [name.as_str(), sink, region].contains(&retired.as_str()))
}

/// The way in by a plan. Bytes under way stay counted over a change.
fn inlet(
    plan: &Plan,
    log: &Arc<dyn Log>,
    clock: &Clock,
    received: Arc<Received>,
    budget: Option<Arc<Budget>>,
) -> Inlet {
    let source = &plan.source;
    let (limit, rate) = (source.limits.in_flight.0, source.limits.rate.map(crate::units::Rate::per_second));
    log.hold(plan.delay.clone().filter(|delay| delay.rule.is_some()).map(crate::delay::hold_rule));
    let outlet = |branch: &Arc<BranchPlan>| Outlet {
        sink: Arc::clone(&branch.sink),
        region: branch.region.clone(),
        kind: branch.target,
    };
    Inlet {
        namespace: plan.namespace.clone(),
        log: Arc::clone(log),
        delay: plan.delay.clone(),
        schema: source.schema.clone(),
        key: source.key.clone(),
        idempotency: source.idempotency.from.as_deref().map(Into::into),
        record_bytes: source.limits.record.0,
        budget: budget.filter(|budget| budget.is(limit, rate)).unwrap_or_else(|| Budget::new(limit, rate)),
        received,
        origin: plan.origin.clone(),
        outlets: plan.branches.iter().map(outlet).collect(),
        clock: clock.clone(),
    }
}
