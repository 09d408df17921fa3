//! Writes on their way in: ids are drawn, keys claimed, what is not due is parked, the rest appended in order.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::broker::{Exactly, Handed, HandedExactly};
use super::store::{Claim, Claimed, Parking, Store};
use super::{CLOSED, Inner};
use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::{AdmitError, Admitted, Entered, IdempotencyKey, LogError, Write};

/// A key that was claimed so long ago and not confirmed goes to whoever repeats it: its process is gone, or its broker did
/// not answer.
const ABANDONED: Duration = Duration::from_secs(60);
/// How long a write waits for the first one with its key before it hears 409.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often another process's claim is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Draws ids that rise, also within a millisecond and when the clock steps back.
#[derive(Debug, Default)]
pub(super) struct Ids {
    newest: Timestamp,
    counter: u16,
}

impl Ids {
    fn draw(&mut self, now: Timestamp, number: u32) -> RecordId {
        if now > self.newest {
            (self.newest, self.counter) = (now, 0);
        } else if self.counter < 0x0FFF {
            self.counter += 1;
        } else {
            (self.newest, self.counter) = (self.newest.saturating_add(Duration::from_millis(1)), 0);
        }
        RecordId::new(self.newest, self.counter, number, fastrand::u64(..))
    }
}

/// One write of a call.
struct Draft {
    record: Arc<Record>,
    key: Option<IdempotencyKey>,
    answer: Option<Result<Admitted, AdmitError>>,
}

/// What was handed over, and to which drafts it belongs.
enum Appending {
    Plain(Vec<usize>, Handed),
    Exact(Vec<usize>, HandedExactly),
}

/// Keys that are this call's own until it ends.
struct Mine {
    inner: Arc<Inner>,
    keys: Vec<Box<str>>,
    _told: DropGuard,
}

impl Drop for Mine {
    fn drop(&mut self) {
        let mut running = self.inner.running.lock();
        for key in &self.keys {
            running.remove(key);
        }
    }
}

fn of_store(error: LogError) -> AdmitError {
    match error {
        LogError::Closed(reason) => AdmitError::Closed { reason },
        LogError::Unsupported(what) => AdmitError::Unsupported(what),
        error => AdmitError::Unavailable { reason: format!("the shelf cannot be reached: {error}").into() },
    }
}

/// A park or a claim may have been done though its answer was lost.
fn unknown(error: LogError) -> AdmitError {
    match error {
        LogError::Storage { act, cause } => AdmitError::Unknown { reason: format!("{act}: {cause}").into() },
        error => of_store(error),
    }
}

impl Inner {
    pub(super) async fn enter_all(self: Arc<Self>, writes: Vec<Write>) -> Result<Entered, AdmitError> {
        if self.closed.is_cancelled() {
            return Err(AdmitError::Closed { reason: CLOSED.into() });
        }
        let mut writes = writes;
        if let Some(store) = &self.store {
            for write in &mut writes {
                if let Some(key) = write.idempotency.take() {
                    write.idempotency = Some(self.hashed(store, key).await.map_err(of_store)?);
                }
            }
        }
        let mut drafts = self.drafts(writes)?;
        let repeats = repeats(&mut drafts);
        let mine = self.own_keys(&drafts).await;
        let Some(mine) = mine else {
            // All or none: nothing of the call is in the log.
            return Ok(std::future::ready(Ok(drafts.iter().map(|_| Admitted::KeyRunning).collect())).boxed());
        };
        self.park(&mut drafts).await?;
        let appending = self.append(&mut drafts).await?;
        let (answer, wait) = oneshot::channel();
        // A task of its own: others wait for these keys, whether or not anybody waits for this answer.
        tokio::spawn(async move {
            let result = self.answer(drafts, repeats, appending).await;
            drop(mine);
            let _ = answer.send(result);
        });
        let lost = || AdmitError::Unknown { reason: "the write's task ended".into() };
        Ok(async move { wait.await.unwrap_or_else(|_| Err(lost())) }.boxed())
    }

    /// Draws ids and times, and refuses what cannot be done here before anything is done.
    fn drafts(&self, writes: Vec<Write>) -> Result<Vec<Draft>, AdmitError> {
        let (now, caps, epoch) = (self.clock.now(), self.broker.caps(), self.epoch());
        let mut ids = self.ids.lock();
        let mut drafts = Vec::with_capacity(writes.len());
        for write in writes {
            let due_at = write.due_at.filter(|due| *due > now);
            if let Some(due) = due_at
                && self.store.is_none()
                && !caps.hold
                && caps.delay.is_none_or(|longest| due.since(now) > longest)
            {
                return Err(AdmitError::Unsupported(match caps.delay {
                    None => super::NO_SHELF,
                    Some(_) => "without a shelf this source delays no longer than its broker does",
                }));
            }
            let id = ids.draw(now, self.settings.number);
            let record = Record { id, written_at: now, due_at, epoch, ..write.record };
            if let Some(limit) = caps.largest_record
                && record.weight() as u64 > limit
            {
                return Err(AdmitError::TooLarge { bytes: record.weight() as u64, limit });
            }
            drafts.push(Draft { record: Arc::new(record), key: write.idempotency, answer: None });
        }
        Ok(drafts)
    }

    /// Waits until no other call of this process has one of these keys on the way; `None` = it took too long.
    async fn own_keys(self: &Arc<Self>, drafts: &[Draft]) -> Option<Mine> {
        let keys: Vec<Box<str>> =
            drafts.iter().filter_map(|draft| draft.key.as_ref()).map(|key| key.key.clone()).collect();
        let token = CancellationToken::new();
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let other = {
                let mut running = self.running.lock();
                let other = keys.iter().find_map(|key| running.get(key).cloned());
                if other.is_none() {
                    // All or none, so that two calls never wait for each other.
                    running.extend(keys.iter().map(|key| (key.clone(), token.clone())));
                }
                other
            };
            let Some(other) = other else {
                return Some(Mine { inner: Arc::clone(self), keys, _told: token.drop_guard() });
            };
            tokio::time::timeout_at(deadline, other.cancelled()).await.ok()?;
        }
    }

    /// Parks what is not due; a broker that can wait itself gets it with the rest.
    async fn park(&self, drafts: &mut [Draft]) -> Result<(), AdmitError> {
        let Some(store) = &self.store else { return Ok(()) };
        let due = |draft: &&mut Draft| draft.answer.is_none() && draft.record.due_at.is_some();
        let mut parking: Vec<&mut Draft> = drafts.iter_mut().filter(due).collect();
        if parking.is_empty() {
            return Ok(());
        }
        let row = |draft: &&mut Draft| Parking { record: Arc::clone(&draft.record), key: draft.key.clone() };
        let parked = store.park(parking.iter().map(row).collect()).await.map_err(unknown)?;
        for (draft, claimed) in parking.iter_mut().zip(parked) {
            draft.answer = Some(Ok(match claimed {
                Claimed::Fresh { id, written_at } => {
                    Admitted::Parked { id, written_at, due_at: draft.record.due_at.unwrap_or(written_at) }
                }
                known => repeated(draft, known),
            }));
        }
        Ok(())
    }

    /// Claims keys and hands over what is fresh, in the order of the call.
    async fn append(&self, drafts: &mut [Draft]) -> Result<Appending, AdmitError> {
        let open = |draft: &Draft| draft.answer.is_none();
        let all: Vec<usize> =
            drafts.iter().enumerate().filter(|(_, draft)| open(draft)).map(|(index, _)| index).collect();
        let keyed = drafts.iter().any(|draft| open(draft) && draft.key.is_some());
        if keyed {
            let pairs: Vec<(Arc<Record>, Option<IdempotencyKey>)> = drafts
                .iter()
                .filter(|draft| open(draft))
                .map(|draft| (Arc::clone(&draft.record), draft.key.clone()))
                .collect();
            if let Some(exact) = self.append_exactly(&pairs) {
                return Ok(Appending::Exact(all, exact));
            }
            if let Some(store) = &self.store {
                self.claim(store, drafts).await?;
            }
        }
        let fresh: Vec<usize> = all.into_iter().filter(|index| drafts.get(*index).is_some_and(open)).collect();
        let records: Vec<_> =
            fresh.iter().filter_map(|index| drafts.get(*index)).map(|draft| Arc::clone(&draft.record)).collect();
        if records.is_empty() {
            return Ok(Appending::Plain(fresh, std::future::ready(Vec::new()).boxed()));
        }
        match self.broker.append(records).await {
            Ok(handed) => Ok(Appending::Plain(fresh, handed)),
            Err(error) => {
                self.give_up(drafts.iter().filter(|draft| open(draft))).await;
                Err(error)
            }
        }
    }

    /// By the broker itself, where no key is known to the shelf alone.
    pub(super) fn append_exactly(&self, pairs: &[(Arc<Record>, Option<IdempotencyKey>)]) -> Option<HandedExactly> {
        let alone = self.store.is_none() || self.settings.one_place_for_keys;
        alone.then(|| self.broker.append_exactly(pairs)).flatten()
    }

    async fn claim(&self, store: &Arc<dyn Store>, drafts: &mut [Draft]) -> Result<(), AdmitError> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let now = self.clock.now();
            let abandoned = now.saturating_sub(ABANDONED);
            let mut waiting: Vec<&mut Draft> =
                drafts.iter_mut().filter(|draft| draft.answer.is_none() && draft.key.is_some()).collect();
            let claim = |draft: &&mut Draft| Some(Claim { record: Arc::clone(&draft.record), key: draft.key.clone()? });
            let claimed = store.claim(waiting.iter().filter_map(claim).collect(), abandoned).await.map_err(of_store)?;
            let mut running = false;
            for (draft, claimed) in waiting.iter_mut().zip(claimed) {
                match claimed {
                    Claimed::Fresh { id, written_at } => {
                        if id != draft.record.id {
                            draft.record = Arc::new(Record { id, written_at, ..(*draft.record).clone() });
                        }
                    }
                    Claimed::Running => running = true,
                    known @ Claimed::Known { .. } => draft.answer = Some(Ok(repeated(draft, known))),
                }
            }
            if !running {
                return Ok(());
            }
            // Another process has it on the way. Those that were fresh are claimed by these very ids, so to ask again is safe.
            if tokio::time::Instant::now() >= deadline {
                self.give_up(drafts.iter().filter(|draft| draft.answer.is_none())).await;
                drafts.iter_mut().filter(|draft| draft.answer.is_none()).for_each(|draft| {
                    draft.answer = Some(Ok(Admitted::KeyRunning));
                });
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Frees the keys of records that are not in the log.
    async fn give_up<'a>(&self, drafts: impl Iterator<Item = &'a Draft>) {
        let ids: Vec<_> = drafts.filter_map(|draft| Some((draft.key.as_ref()?.key.clone(), draft.record.id))).collect();
        if let Some(store) = self.store.as_ref().filter(|_| !ids.is_empty())
            && let Err(error) = store.give_up(ids).await
        {
            tracing::debug!(%error, "keys stay claimed until they count as abandoned");
        }
    }

    async fn answer(
        &self,
        mut drafts: Vec<Draft>,
        repeats: HashMap<usize, usize>,
        appending: Appending,
    ) -> Result<Vec<Admitted>, AdmitError> {
        match appending {
            Appending::Plain(indexes, handed) => {
                for (index, outcome) in indexes.into_iter().zip(handed.await) {
                    if let Some(draft) = drafts.get_mut(index) {
                        draft.answer = Some(outcome.map(|position| appended(draft, position)));
                    }
                }
                self.confirm(&drafts).await;
            }
            Appending::Exact(indexes, handed) => {
                for (index, outcome) in indexes.into_iter().zip(handed.await?) {
                    if let Some(draft) = drafts.get_mut(index) {
                        draft.answer = Some(outcome.map(|exactly| match exactly {
                            Exactly::Appended(position) => appended(draft, position),
                            Exactly::Known(known) => repeated(draft, known),
                        }));
                    }
                }
            }
        }
        let missing = || Err(AdmitError::Unknown { reason: "the broker gave no answer for it".into() });
        let mut answers: Vec<Result<Admitted, AdmitError>> =
            drafts.iter_mut().map(|draft| draft.answer.take().unwrap_or_else(missing)).collect();
        for (later, first) in repeats {
            let answer = answers.get(first).cloned().unwrap_or_else(missing);
            let same = drafts.get(first).and_then(|draft| draft.key.as_ref().map(|key| key.fingerprint))
                == drafts.get(later).and_then(|draft| draft.key.as_ref().map(|key| key.fingerprint));
            if let Some(slot) = answers.get_mut(later) {
                *slot = answer.map(|answer| if same { again(answer) } else { Admitted::KeyReused });
            }
        }
        one_answer(answers)
    }

    /// Makes keys sure of the records that are in the log, and frees those that are certainly not.
    async fn confirm(&self, drafts: &[Draft]) {
        let Some(store) = &self.store else { return };
        let sure: Vec<_> = drafts
            .iter()
            .filter(|draft| matches!(draft.answer, Some(Ok(Admitted::Appended { .. }))))
            .filter_map(|draft| Some((draft.key.as_ref()?.key.clone(), draft.record.id)))
            .collect();
        if !sure.is_empty()
            && let Err(error) = store.confirm(sure).await
        {
            // They count as abandoned after a while: whoever repeats one then appends it again, under the same id.
            tracing::warn!(shelf = %store.note(), %error, "idempotency keys could not be confirmed");
        }
        let failed = |draft: &&Draft| matches!(&draft.answer, Some(Err(error)) if !error.is_unknown());
        self.give_up(drafts.iter().filter(failed)).await;
    }
}

/// Finds keys that stand twice in the call: the later one gets the first one's answer. Gives later → first.
fn repeats(drafts: &mut [Draft]) -> HashMap<usize, usize> {
    let mut first: HashMap<Box<str>, usize> = HashMap::new();
    let mut repeats = HashMap::new();
    for (index, draft) in drafts.iter_mut().enumerate() {
        let Some(key) = &draft.key else { continue };
        match first.get(&key.key) {
            Some(earlier) => {
                repeats.insert(index, *earlier);
                // A stand-in, so that nothing is done with it; it is replaced at the end.
                draft.answer = Some(Ok(Admitted::KeyRunning));
            }
            None => _ = first.insert(key.key.clone(), index),
        }
    }
    repeats
}

fn appended(draft: &Draft, position: Position) -> Admitted {
    let (id, written_at) = (draft.record.id, draft.record.written_at);
    match draft.record.due_at {
        // The broker itself waits with it.
        Some(due_at) => Admitted::Parked { id, written_at, due_at },
        None => Admitted::Appended { id, written_at, position },
    }
}

fn repeated(draft: &Draft, known: Claimed) -> Admitted {
    match known {
        Claimed::Known { fingerprint, id, written_at, due_at } => {
            let same = draft.key.as_ref().is_some_and(|key| key.fingerprint == fingerprint);
            if same { Admitted::Repeated { id, written_at, due_at } } else { Admitted::KeyReused }
        }
        Claimed::Fresh { .. } | Claimed::Running => Admitted::KeyRunning,
    }
}

fn again(first: Admitted) -> Admitted {
    match first {
        Admitted::Appended { id, written_at, .. } => Admitted::Repeated { id, written_at, due_at: None },
        Admitted::Parked { id, written_at, due_at } => Admitted::Repeated { id, written_at, due_at: Some(due_at) },
        other => other,
    }
}

/// A broker may take some and refuse others, and the call has one answer: where some are in the log, a failure of the rest
/// leaves the whole open, and the client repeats it with its keys.
fn one_answer(answers: Vec<Result<Admitted, AdmitError>>) -> Result<Vec<Admitted>, AdmitError> {
    let Some(error) = answers.iter().find_map(|answer| answer.as_ref().err()).cloned() else {
        return Ok(answers.into_iter().flatten().collect());
    };
    let some = answers.iter().any(|answer| {
        matches!(answer, Ok(Admitted::Appended { .. } | Admitted::Parked { .. }) | Err(AdmitError::Unknown { .. }))
    });
    if some && !error.is_unknown() {
        return Err(AdmitError::Unknown { reason: format!("only a part of the writes is in the log: {error}").into() });
    }
    Err(error)
}
