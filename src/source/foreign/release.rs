//! Parked records go into the log when they are due: marked first, removed when they are in it.
//!
//! One process of those that share a namespace is the mover, by lease. What it marked and did not report, because it was
//! killed or the broker did not answer, the next one searches in the log before it sends it again.

use std::collections::HashSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::Inner;
use super::store::{Releasing, Store};
use crate::clock::Timestamp;
use crate::record::RecordId;
use crate::source::{LogError, Reach};

/// Records released at once.
const GROUP: usize = 500;
/// A mover that does not renew its lease for so long is gone.
const LEASE: Duration = Duration::from_secs(10);
/// The longest wait without a look: for the lease, and for what nobody told.
const LOOK: Duration = Duration::from_secs(3);
/// Waits after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// How often what is over is forgotten.
const TIDY: Duration = Duration::from_secs(30);

/// Releases until the pair is closed or dropped.
pub(super) async fn run(inner: Weak<Inner>) {
    let mut wait = BACKOFF.0;
    let mut tidied = tokio::time::Instant::now();
    let (mut kept, mut kept_at) = (Reach::none(), tokio::time::Instant::now());
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let Some(store) = strong.store.clone() else { return };
        let closed = strong.closed.clone();
        let tidy = tidied.elapsed() >= TIDY;
        if tidy {
            tidied = tokio::time::Instant::now();
        }
        let keep = kept_at.elapsed() >= LOOK;
        if keep {
            kept_at = tokio::time::Instant::now();
        }
        let turn = async {
            if keep {
                strong.keep_end(&store, &mut kept).await?;
            }
            if tidy {
                strong.tidy(&store).await?;
            }
            strong.turn(&store).await
        };
        let result = tokio::select! {
            result = turn => result,
            () = closed.cancelled() => {
                // The next one need not wait for the lease to end.
                let _ = store.resign().await;
                return;
            }
        };
        match result {
            Ok(()) => wait = BACKOFF.0,
            Err(error) => {
                tracing::warn!(shelf = %store.note(), %error, "what is due could not be released, trying again");
                drop(strong);
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = closed.cancelled() => return,
                }
                wait = (wait * 2).min(BACKOFF.1);
            }
        }
    }
}

impl Inner {
    /// Releases what is due now, then waits for what comes next, or for the lease.
    async fn turn(&self, store: &Arc<dyn Store>) -> Result<(), LogError> {
        // Registered before the look, so that no news falls between.
        let news = store.parked_news();
        let now = self.clock.now();
        if !store.lead(now.saturating_add(LEASE)).await? {
            tokio::select! {
                () = news => {}
                () = tokio::time::sleep(LOOK) => {}
            }
            return Ok(());
        }
        loop {
            let marked = store.marked(GROUP).await?;
            if marked.is_empty() {
                break;
            }
            self.finish(store, marked).await?;
        }
        let due = store.next_due().await?;
        if due.is_some_and(|due| due <= now) {
            let place = self.broker.place().await?;
            let rows = store.take_due(now, GROUP, place).await?;
            return self.release(store, rows).await;
        }
        tokio::select! {
            () = news => {}
            () = async { match due { Some(due) => self.clock.sleep_until(due).await, None => std::future::pending().await } } => {}
            () = tokio::time::sleep(LOOK) => {}
        }
        Ok(())
    }

    /// Sends what an earlier turn marked, except what is in the log already.
    async fn finish(&self, store: &Arc<dyn Store>, rows: Vec<Releasing>) -> Result<(), LogError> {
        let mut left = rows;
        while let Some(place) = left.first().map(|row| Arc::clone(&row.place)) {
            let same = left.iter().position(|row| row.place != place).unwrap_or(left.len());
            let rest = left.split_off(same);
            let ids = left.iter().map(|row| row.record.id).collect();
            let there = self.broker.find_after(&place, ids).await?;
            let there: HashSet<RecordId> = there.into_keys().collect();
            if !there.is_empty() {
                store.released(there.iter().copied().collect()).await?;
            }
            left.retain(|row| !there.contains(&row.record.id));
            self.release(store, left).await?;
            left = rest;
        }
        Ok(())
    }

    async fn release(&self, store: &Arc<dyn Store>, rows: Vec<Releasing>) -> Result<(), LogError> {
        if rows.is_empty() {
            return Ok(());
        }
        let epoch = self.epoch();
        let renew = |row: &Releasing| Arc::new(crate::record::Record { epoch, ..(*row.record).clone() });
        let failed = |error: crate::source::AdmitError| LogError::Storage {
            act: "append records that are due".into(),
            cause: error.to_string().into(),
        };
        let outcomes = self.broker.append(rows.iter().map(renew).collect()).await.map_err(failed)?.await;
        let mut first_failure = None;
        let mut gone = Vec::with_capacity(rows.len());
        for (row, outcome) in rows.iter().zip(outcomes) {
            match outcome {
                Ok(_) => gone.push(row.record.id),
                // Marked as it is, it is looked for and sent again.
                Err(error) => first_failure = first_failure.or(Some(error)),
            }
        }
        if !gone.is_empty() {
            store.released(gone).await?;
        }
        first_failure.map_or(Ok(()), |error| Err(failed(error)))
    }

    async fn tidy(&self, store: &Arc<dyn Store>) -> Result<(), LogError> {
        store.refresh().await?;
        let now = self.clock.now();
        let window = i64::try_from(self.settings.key_window.as_millis()).unwrap_or(i64::MAX);
        let keys_before = Timestamp::from_millis(now.as_millis().saturating_sub(window));
        let names: Vec<_> = self.branches.lock().keys().cloned().collect();
        let cursors = names.into_iter().map(|name| (name.clone(), self.broker.lag(&name).cursor)).collect();
        store.tidy(keys_before, cursors).await
    }
}
