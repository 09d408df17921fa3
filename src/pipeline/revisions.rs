//! Which plan decides who takes a record: the one whose epoch the record fell into.
//!
//! Takes the log's epochs and the plans that were made of them, gives for a position the plan in force there. Never reads
//! files and never compiles: the service publishes each plan after its epoch is durable, and whoever meets an epoch
//! before its plan waits for it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::RwLock;
use tokio::sync::Notify;

use super::plan::{BranchPlan, Plan};
use crate::source::{BranchName, Log};

/// The plans of one namespace, by epoch.
pub struct Revisions {
    log: Arc<dyn Log>,
    plans: RwLock<BTreeMap<u32, Arc<Plan>>>,
    published: Notify,
}

/// A plan and where it begins to be in force.
#[derive(Clone, Debug)]
pub struct Revision {
    /// Its number; records carry it.
    pub number: u32,
    /// The plan.
    pub plan: Arc<Plan>,
}

/// Every revision that may still matter, oldest first; never empty.
#[derive(Clone, Debug)]
pub struct InForce(Arc<[Revision]>);

impl InForce {
    /// One plan for every record.
    pub fn single(plan: Arc<Plan>) -> Self {
        Self(Arc::new([Revision { number: 0, plan }]))
    }

    /// The plan in force for a record of `epoch`, and in it the branch that is called `name` now; it may have had another name.
    pub fn branch_at(&self, epoch: u32, name: &BranchName) -> Option<(&Plan, Option<&Arc<BranchPlan>>)> {
        // A record from before the oldest epoch that is kept goes by that one.
        let at = self.0.partition_point(|revision| revision.number <= epoch).saturating_sub(1);
        let mut name = name;
        let mut found = None;
        for (number, revision) in self.0.iter().enumerate().rev() {
            found = revision.plan.branches.iter().find(|branch| branch.name == *name);
            if number <= at {
                break;
            }
            if let Some(was) = found.and_then(|branch| branch.was.as_ref()) {
                // Only where the earlier plan does not have the new name already: `was` may stay in a file for long.
                let before = number.checked_sub(1).and_then(|before| self.0.get(before));
                if before.is_some_and(|before| before.plan.branches.iter().all(|branch| branch.name != *name)) {
                    name = was;
                }
            }
        }
        Some((&self.0.get(at)?.plan, found))
    }

    /// All of them, oldest first.
    pub fn revisions(&self) -> &[Revision] {
        &self.0
    }
}

impl Revisions {
    /// No plan yet.
    pub fn new(log: Arc<dyn Log>) -> Self {
        Self { log, plans: RwLock::new(BTreeMap::new()), published: Notify::new() }
    }

    /// Publishes the plan of an epoch, and forgets those that the log no longer keeps.
    pub fn publish(&self, epoch: u32, plan: Arc<Plan>) {
        let kept: Vec<u32> = self.log.epochs().iter().map(|epoch| epoch.number).collect();
        {
            let mut plans = self.plans.write();
            plans.insert(epoch, plan);
            plans.retain(|number, _| kept.contains(number) || *number == epoch);
        }
        self.published.notify_waiters();
    }

    /// The plan of the newest epoch that has one.
    pub fn newest(&self) -> Option<Arc<Plan>> {
        self.plans.read().last_key_value().map(|(_, plan)| Arc::clone(plan))
    }

    /// The plans that are known, by epoch.
    pub fn known(&self) -> BTreeMap<u32, Arc<Plan>> {
        self.plans.read().clone()
    }

    /// What is in force for every record that could be read before this call. Waits for a plan that is being made.
    ///
    /// The log shows an epoch before it shows a record after it, so call this *after* reading.
    ///
    /// # Cancel safety
    /// Dropping the wait loses nothing.
    pub async fn in_force(&self) -> InForce {
        loop {
            let published = self.published.notified();
            tokio::pin!(published);
            // Registered before the look, so that no news falls between.
            published.as_mut().enable();
            if let Some(found) = self.look() {
                return found;
            }
            published.await;
        }
    }

    fn look(&self) -> Option<InForce> {
        let epochs = self.log.epochs();
        let plans = self.plans.read();
        let mut revisions = Vec::with_capacity(epochs.len());
        for epoch in epochs {
            revisions.push(Revision { number: epoch.number, plan: Arc::clone(plans.get(&epoch.number)?) });
        }
        if revisions.is_empty() {
            let (_, plan) = plans.last_key_value()?;
            return Some(InForce::single(Arc::clone(plan)));
        }
        Some(InForce(revisions.into()))
    }
}

impl fmt::Debug for Revisions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Revisions")
            .field("epochs", &self.plans.read().keys().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}
