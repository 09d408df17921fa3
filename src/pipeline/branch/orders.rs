//! What others tell a running branch: a newer plan, pause, resume, skip, drain.

use std::sync::Arc;

use futures::StreamExt as _;

use super::actor::{Actor, Settled};
use super::{Command, Skip, Told};
use crate::pipeline::plan::BranchPlan;
use crate::source::RowKey;

impl Actor {
    pub(super) async fn obey(&mut self, command: Command) -> Option<Arc<BranchPlan>> {
        match command {
            Command::Update(plan) => {
                if self.pause.as_ref().is_some_and(|pause| pause.cause == "refused") {
                    self.end_pause(true, Settled::default());
                }
                // Everything that is not under way starts again under the new plan, from the frontier.
                while let Some(done) = self.batches.next().await {
                    self.finished(done);
                }
                while let Some(written) = self.copying.next().await {
                    self.copied(written);
                }
                self.forgo_copies();
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
            Command::Pause(note, told) => {
                let settled = Settled { tell: vec![told], ..Settled::default() };
                self.pause_and_tell("operator", note, settled);
            }
            Command::Resume(told) => {
                self.breaker.forgive();
                self.end_pause(true, Settled { tell: vec![told], ..Settled::default() });
            }
            Command::Skip(which, answer) => self.skip(which, answer).await,
            Command::Drain(until) => self.draining = Some(until),
        }
        None
    }

    async fn skip(&mut self, which: Skip, told: Told) {
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
            (None, Skip::Record(id)) => return self.skip_shelved(id, told).await,
            (None, Skip::Head) => return,
        };
        // The head itself may be under way: then another one must not be taken for it.
        if which == Skip::Head && !shelved && self.frontier.first_open() != Some(row.position) {
            return;
        }
        if let Some(delivery) = self.lanes.pull(row) {
            let told = told.of(delivery.event.record.id);
            self.end_badly(delivery, crate::source::DeadReason::Skipped, "skipped by an operator".into(), vec![told]);
        }
    }
}
