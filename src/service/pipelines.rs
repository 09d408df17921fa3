//! All namespaces of an instance, and what a reading of the files does to them.
//!
//! Each namespace is changed in a task of its own, so that one that fails or panics is its own trouble. Never decides
//! what a file means: that was done when it was read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use parking_lot::{Mutex, RwLock};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::files::{Files, Found, Reading};
use super::logs::Logs;
use super::pipeline::{Config, Pipeline};
use crate::clock::{Clock, Timestamp};
use crate::console::DeleteError;
use crate::pipeline::plan::Plan;
use crate::record::Namespace;
use crate::source::{Epoch, LogError};
use crate::spec::code::Code;
use crate::spec::diagnostic::Diagnostic;

/// How many namespaces are changed at once; together they share syncs of the log.
const AT_ONCE: usize = 64;

/// How long a reading of the files waits for one namespace.
const PATIENCE: Duration = Duration::from_secs(5);
/// Waits between two tries to reach what keeps a namespace.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How often removed branches are looked at.
const SWEEP: Duration = Duration::from_secs(1);

/// Why a namespace has no pipeline although a file names it.
#[derive(Clone, Debug)]
pub(super) enum Absent {
    /// Its file never was good.
    Broken(Arc<Diagnostic>),
    /// Its log could not be opened, or it fell over while starting.
    Failed(Arc<str>),
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broken(problem) => write!(f, "its pipeline file has never been good: {}", problem.short()),
            Self::Failed(reason) => write!(f, "it could not be started: {reason}"),
        }
    }
}

/// All namespaces.
pub(super) struct Pipelines {
    pub(super) logs: Logs,
    pub(super) clock: Clock,
    pub(super) files: Files,
    running: CancellationToken,
    set: RwLock<BTreeMap<Namespace, Arc<Pipeline>>>,
    absent: RwLock<BTreeMap<Namespace, Absent>>,
    /// Namespaces of other shards, with their shard.
    elsewhere: RwLock<BTreeMap<Namespace, Arc<str>>>,
    /// When the files were last read and made so.
    applied_at: RwLock<Timestamp>,
    ready: AtomicBool,
    pub(super) applying: tokio::sync::Mutex<()>,
    /// By namespace: how many changes there were, and who makes one now.
    changes: Mutex<BTreeMap<Namespace, (u64, Arc<tokio::sync::Mutex<()>>)>>,
}

impl Pipelines {
    /// None yet.
    pub(super) fn new(files: Files, logs: Logs, clock: Clock, running: CancellationToken) -> Self {
        Self {
            logs,
            clock,
            files,
            running,
            set: RwLock::default(),
            absent: RwLock::default(),
            elsewhere: RwLock::default(),
            applied_at: RwLock::default(),
            ready: AtomicBool::new(false),
            applying: tokio::sync::Mutex::new(()),
            changes: Mutex::default(),
        }
    }

    /// Makes what was read so, namespace by namespace; each either as a whole or not at all.
    pub(super) async fn apply(self: &Arc<Self>, reading: Reading) {
        let _applying = self.applying.lock().await;
        let mut names: BTreeSet<Namespace> = reading.found.iter().map(|found| found.namespace.clone()).collect();
        let nameless = reading.nameless;
        if !reading.elsewhere.is_empty() {
            let shards: BTreeSet<&str> = reading.elsewhere.values().map(|shard| &**shard).collect();
            let shards = shards.into_iter().collect::<Vec<_>>().join(", ");
            info!(skipped = reading.elsewhere.len(), shards, "namespaces of other shards do not run here");
        }
        let mut work: Vec<(Namespace, Option<Found>)> =
            reading.found.into_iter().map(|found| (found.namespace.clone(), Some(found))).collect();
        let known = self.set.read().keys().cloned().chain(self.logs.names()).collect::<BTreeSet<_>>();
        // What this data folder still holds of a namespace that another shard has now is drained, like that of a deleted file.
        for name in known.iter().filter(|name| reading.elsewhere.contains_key(*name)) {
            if names.insert(name.clone()) {
                work.push((name.clone(), None));
            }
        }
        *self.elsewhere.write() = reading.elsewhere;
        for name in known.into_iter().filter(|name| names.insert(name.clone())) {
            // A file of which nobody can say whose it is may be this one's: then it is broken, not gone.
            let found = nameless.as_ref().map(|problem| Found {
                namespace: name.clone(),
                plan: Err(Arc::clone(problem)),
                source: None,
            });
            work.push((name, found));
        }
        self.absent.write().retain(|name, _| names.contains(name));
        futures::stream::iter(work)
            .for_each_concurrent(AT_ONCE, |(name, found)| {
                let this = Arc::clone(self);
                async move {
                    let namespace = name.clone();
                    let foreign = found
                        .as_ref()
                        .and_then(|found| found.plan.as_ref().ok())
                        .is_some_and(|plan| plan.source.kind.is_foreign());
                    // A server that does not answer is waited for beside the others, not before them.
                    let patience = if foreign { PATIENCE } else { Duration::MAX };
                    let task = tokio::spawn(this.settle_change(name, found));
                    if tokio::time::timeout(patience, task).await.is_err() && self.get(&namespace).is_none() {
                        let waiting = "its log or its shelf has not answered yet; it is tried again and again";
                        self.absent.write().insert(namespace, Absent::Failed(waiting.into()));
                    }
                }
            })
            .await;
        *self.applied_at.write() = self.clock.now();
    }

    /// Changes one namespace; what failed because a server is away is tried again until it is there, or until the files are
    /// read anew.
    pub(super) async fn settle_change(self: Arc<Self>, name: Namespace, found: Option<Found>) {
        let turn = {
            let mut changes = self.changes.lock();
            let entry = changes.entry(name.clone()).or_default();
            entry.0 += 1;
            (entry.0, Arc::clone(&entry.1))
        };
        let mut wait = RETRY.0;
        loop {
            let changing = turn.1.lock().await;
            if self.changes.lock().get(&name).is_none_or(|entry| entry.0 != turn.0) {
                return;
            }
            let (this, namespace, what) = (Arc::clone(&self), name.clone(), found.clone());
            let (failed, again) = match tokio::spawn(async move { this.change(namespace, what).await }).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => (error.to_string(), matches!(error, LogError::Storage { .. })),
                Err(panic) => (format!("it fell over: {panic}"), false),
            };
            let place = found.as_ref().and_then(|found| found.source.as_ref());
            let (file, line) = (place.map(|place| &*place.file), place.map(|place| place.line));
            error!(ns = %name, file, line, error = failed, again_in = ?again.then_some(wait), "the namespace could not be changed");
            if !self.set.read().contains_key(&name) {
                self.absent.write().insert(name.clone(), Absent::Failed(failed.into()));
            }
            drop(changing);
            if !again || self.running.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
                return;
            }
            wait = (wait * 2).min(RETRY.1);
        }
    }

    /// When the files were last read and made so.
    pub(super) fn applied_at(&self) -> Timestamp {
        *self.applied_at.read()
    }

    /// Reads the files again and makes what they say so.
    pub(super) async fn reload(self: &Arc<Self>) {
        let this = Arc::clone(self);
        let Ok(reading) = tokio::task::spawn_blocking(move || this.files.read()).await else { return };
        reading.report();
        self.apply(reading).await;
        info!(namespaces = self.all().len(), "read the pipeline files again");
    }

    /// One namespace: `found` is what its file says now, `None` = the file is gone.
    async fn change(&self, name: Namespace, found: Option<Found>) -> Result<(), LogError> {
        // What has moved away is replaced by what runs on the new log.
        let running = self.get(&name).filter(|pipeline| !pipeline.is_moving());
        let source = found.as_ref().and_then(|found| found.source.clone());
        let (plan, config) = match (found.map(|found| found.plan), &running) {
            (Some(Ok(plan)), _) => (Some(plan), Config::Current),
            (Some(Err(problem)), _) => (None, Config::Stale(problem)),
            (None, _) => (None, Config::Deleted),
        };
        match (running, plan) {
            (Some(pipeline), Some(plan)) => {
                if let Err(why) = Logs::same_log(&pipeline.plan(), &plan) {
                    let source = source.unwrap_or_else(|| Diagnostic::of_file(Code::NeedsRestart, "", ""));
                    let problem = Diagnostic { message: why.to_owned(), ..source };
                    let (code, file, line) = (problem.code.as_str(), &*problem.file, problem.line);
                    error!(ns = %name, code, file, line, "{why}");
                    pipeline.set_config(Config::Stale(Arc::new(problem)));
                    return Ok(());
                }
                if !plan.source.kind.is_foreign() {
                    // The log takes the bounds of the new plan.
                    self.logs.namespace(&name, Some(&plan)).await?;
                }
                pipeline.apply(plan, config).await
            }
            (Some(pipeline), None) => {
                pipeline.set_config(config);
                Ok(())
            }
            (None, plan) => self.begin(name, plan, config).await,
        }
    }

    /// A namespace that does not run yet: by its file, or by the last good one that the log keeps.
    pub(super) async fn begin(&self, name: Namespace, plan: Option<Arc<Plan>>, config: Config) -> Result<(), LogError> {
        let never = |config: &Config| match config {
            Config::Stale(problem) => Some(Absent::Broken(Arc::clone(problem))),
            Config::Current | Config::Deleted => None,
        };
        let gone = |this: &Self| {
            if let Some(absent) = never(&config) {
                this.absent.write().insert(name.clone(), absent);
            }
            Ok(())
        };
        if plan.is_none() && !self.logs.names().contains(&name) {
            return gone(self);
        }
        let opened = self.logs.namespace(&name, plan.as_deref()).await?;
        let epochs = opened.log.epochs();
        let mut earlier = self.earlier(&name, &epochs);
        let Some(plan) = plan.or_else(|| earlier.last().map(|(_, plan)| Arc::clone(plan))) else { return gone(self) };
        // The bounds are the plan's, also where it is an earlier one.
        let opened =
            if matches!(config, Config::Current) { opened } else { self.logs.namespace(&name, Some(&plan)).await? };
        // Who met an epoch without a plan would wait for ever: what cannot be made any more goes by the newest.
        for epoch in &epochs {
            if !earlier.iter().any(|(number, _)| *number == epoch.number) {
                earlier.push((epoch.number, Arc::clone(&plan)));
            }
        }
        let pipeline = Pipeline::start(name.clone(), opened, earlier, plan, config, self.clock.clone()).await?;
        self.absent.write().remove(&name);
        self.set.write().insert(name, Arc::new(pipeline));
        Ok(())
    }

    /// The plans of the epochs that the log keeps, as far as they can still be made.
    fn earlier(&self, name: &Namespace, epochs: &[Epoch]) -> Vec<(u32, Arc<Plan>)> {
        let mut plans = Vec::with_capacity(epochs.len());
        for epoch in epochs {
            match self.files.restore(&epoch.files) {
                Ok(plan) => plans.push((epoch.number, plan)),
                Err(problem) => {
                    warn!(ns = %name, epoch = epoch.number, problem, "an earlier revision cannot be read any more; its records go by the newest");
                }
            }
        }
        plans
    }

    /// A namespace that runs, or drains.
    pub(super) fn get(&self, name: &Namespace) -> Option<Arc<Pipeline>> {
        self.set.read().get(name).cloned()
    }

    /// Why a namespace that a file names does not run.
    pub(super) fn absent(&self, name: &Namespace) -> Option<Absent> {
        self.absent.read().get(name).cloned()
    }

    /// The shard that has a namespace which does not run here.
    pub(super) fn elsewhere(&self, name: &Namespace) -> Option<Arc<str>> {
        self.elsewhere.read().get(name).cloned()
    }

    /// Every namespace that does not run although a file names it.
    pub(super) fn all_absent(&self) -> Vec<(Namespace, Absent)> {
        self.absent.read().iter().map(|(name, absent)| (name.clone(), absent.clone())).collect()
    }

    /// Every namespace that runs or drains.
    pub(super) fn all(&self) -> Vec<Arc<Pipeline>> {
        self.set.read().values().cloned().collect()
    }

    /// Deletes a namespace whose file is gone, with all that it holds.
    pub(super) async fn delete(&self, name: &str) -> Result<(), DeleteError> {
        let unknown = || DeleteError::Unknown(name.to_owned());
        let name: Namespace = name.parse().map_err(|_| unknown())?;
        let _applying = self.applying.lock().await;
        let pipeline = self.get(&name).ok_or_else(unknown)?;
        if !matches!(pipeline.config(), Config::Deleted) {
            return Err(DeleteError::InUse(name));
        }
        pipeline.stop().await;
        self.logs.delete(&name).await?;
        self.set.write().remove(&name);
        info!(ns = %name, "deleted a namespace");
        Ok(())
    }

    /// Whether writes are taken.
    pub(super) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Writes are taken from now on, or not any more.
    pub(super) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    /// Forgets removed branches of which nothing is left, until the instance stops.
    pub(super) async fn sweep(self: Arc<Self>) {
        while self.running.run_until_cancelled(tokio::time::sleep(SWEEP)).await.is_some() {
            for pipeline in self.all() {
                if let Err(error) = pipeline.sweep().await {
                    warn!(ns = %pipeline.namespace, %error, "could not look after removed branches");
                }
            }
        }
    }

    /// Lets what is under way end, at most until `patience` has passed, then ends the rest where it is.
    pub(super) async fn drain(&self, patience: Duration) {
        self.running.cancel();
        let all = self.all();
        futures::future::join_all(all.iter().map(|pipeline| pipeline.drain(patience))).await;
        futures::future::join_all(all.iter().map(|pipeline| pipeline.stop())).await;
    }
}
