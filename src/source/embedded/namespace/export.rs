//! What another log needs to carry on: releases stand still meanwhile, and keys are read out as they are kept.

use std::sync::atomic::Ordering;

use super::EmbeddedNamespace;
use crate::source::LogError;
use crate::source::embedded::state::{KeptKey, KeyPlace};

impl EmbeddedNamespace {
    /// The number under which its keys are hashed.
    pub fn number(&self) -> u32 {
        self.space.number.0
    }

    /// Parked records stay parked, though they are due, until this is called with `false` or the log is opened anew.
    pub fn hold_releases(&self, hold: bool) {
        self.space.held.store(hold, Ordering::Release);
        if !hold {
            let mut waiting = self.shared.held_rows.lock();
            let (mine, others) =
                std::mem::take(&mut *waiting).into_iter().partition(|row| row.namespace == self.space.number);
            *waiting = others;
            drop(waiting);
            self.shared.due.give_back(mine);
            self.shared.due_news.notify_one();
        }
    }

    /// The idempotency keys that are kept, in an order of their own, at most `limit` after `after`.
    ///
    /// # Errors
    /// When the log is closed or the store cannot be read.
    pub async fn kept_keys(&self, after: Option<KeyPlace>, limit: usize) -> Result<Vec<(KeyPlace, KeptKey)>, LogError> {
        let number = self.space.number;
        self.ask(move |reader| reader.kept_keys(number, after, limit)).await
    }
}
