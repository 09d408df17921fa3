//! What others tell a running branch: a newer plan, pause, resume, skip, drain.

use std::sync::Arc;

use futures::StreamExt as _;

use super::actor::Actor;
use super::{Command, Skip};
use crate::pipeline::plan::BranchPlan;
use crate::record::RecordId;
use crate::source::RowKey;

impl Actor {
    pub(super) async fn obey(&mut self, command: Command) -> Option<Arc<BranchPlan>> {
        match command {
            Command::Update(plan) => {
                if self.pause.as_ref().is_some_and(|pause| pause.cause == "refused") {
                    self.end_pause(true);
                }
                // Everything that is not under way starts again under the new plan, from the frontier.
                while let Some(done) = self.batches.next().await {
                    self.finished(done);
                }
                while let Some((result, settled)) = self.settles.next().await {
                    if result.is_err() {
                        break;
                    }
                    self.settled(settled);
                }
                self.store_frontier();
                while self.settles.next().await.is_some() {}
                return Some(plan);
            }
            Command::Pause(note) => self.begin_pause("operator", note),
            Command::Resume => {
                self.breaker.forgive();
                self.end_pause(true);
            }
            Command::Skip(which, answer) => {
                let skipped = self.skip(which).await;
                let _ = answer.send(skipped);
            }
            Command::Drain(until) => self.draining = Some(until),
        }
        None
    }

    async fn skip(&mut self, which: Skip) -> Option<RecordId> {
        let mut found: Option<(RowKey, bool)> = None;
        self.lanes.each(|delivery| {
            let lower = found.is_none_or(|(lowest, _)| delivery.row < lowest);
            let wanted = match which {
                Skip::Head => lower,
                Skip::Record(id) => lower && delivery.event.record.id == id,
            };
            if wanted {
                found = Some((delivery.row, delivery.shelved.is_some()));
            }
        });
        let (row, shelved) = match (found, which) {
            (Some(found), _) => found,
            (None, Skip::Record(id)) => return self.skip_shelved(id).await,
            (None, Skip::Head) => return None,
        };
        // The head itself may be under way: then another one must not be taken for it.
        if which == Skip::Head && !shelved && self.frontier.first_open() != Some(row.position) {
            return None;
        }
        let delivery = self.lanes.pull(row)?;
        let id = delivery.event.record.id;
        self.end_badly(delivery, crate::source::DeadReason::Skipped, "skipped by an operator".into());
        Some(id)
    }
}
