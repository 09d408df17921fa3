//! Admission: bounds, idempotency keys, and the wait for the group that makes the writes durable.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;

use super::EmbeddedNamespace;
use crate::record::Position;
use crate::source::embedded::keys::{Reservation, Reserve};
use crate::source::embedded::queue::{Answer, Ask, Refusal, Reply, Request};
use crate::source::embedded::retention::drop_overflow;
use crate::source::{AdmitError, Admitted, IdempotencyKey, LogError, Write};

/// How long a write waits for room in the queue before it is told to come again.
const ROOM_WAIT: Duration = Duration::from_secs(2);
/// How long a write waits for the first one with its key.
const KEY_WAIT: Duration = Duration::from_secs(10);
/// What a write takes in the queue besides its payload.
const WRITE_BYTES: usize = 512;

/// What is known of a write before it goes to the writer.
enum Keyed {
    Go(Option<Reservation>),
    Answered(Admitted),
}

/// Writes that have their place in the queue, and what is already known of their answers.
pub(super) struct Queued {
    /// One for each write; `None` = the writer says it.
    answers: Vec<Option<Admitted>>,
    /// `None` = nothing had to be written.
    reply: Option<oneshot::Receiver<Reply>>,
}

impl Queued {
    /// Waits until they are durable.
    pub(super) async fn durable(self) -> Result<Vec<Admitted>, AdmitError> {
        let done = match self.reply {
            Some(reply) => heard(reply).await?,
            None => Vec::new(),
        };
        if self.answers.is_empty() {
            return Ok(done);
        }
        let mut done = done.into_iter();
        Ok(self
            .answers
            .into_iter()
            .map(|known| known.or_else(|| done.next()).unwrap_or(Admitted::KeyRunning))
            .collect())
    }
}

impl EmbeddedNamespace {
    pub(super) async fn enter_all(self, writes: Vec<Write>) -> Result<Queued, AdmitError> {
        self.check(&writes)?;
        if writes.iter().all(|write| write.idempotency.is_none()) {
            return Ok(Queued { answers: Vec::new(), reply: Some(self.submit(writes, Vec::new()).await?) });
        }
        let mut answers: Vec<Option<Admitted>> = Vec::with_capacity(writes.len());
        let (mut group, mut held) = (Vec::new(), Vec::new());
        for write in writes {
            let keyed = match &write.idempotency {
                None => Keyed::Go(None),
                Some(key) => {
                    let key = key.clone();
                    // The same key twice in one batch: the first must be durable before the second is judged.
                    if held.iter().any(|(_, reservation): &(usize, Reservation)| self.is_same(reservation, &key)) {
                        let reply = self.submit(std::mem::take(&mut group), std::mem::take(&mut held)).await?;
                        let done = heard(reply).await?;
                        answers.iter_mut().filter(|answer| answer.is_none()).zip(done).for_each(
                            |(answer, admitted)| {
                                *answer = Some(admitted);
                            },
                        );
                    }
                    self.key(&key).await?
                }
            };
            match keyed {
                Keyed::Answered(answer) => answers.push(Some(answer)),
                Keyed::Go(reservation) => {
                    let index = group.len();
                    held.extend(reservation.map(|reservation| (index, reservation.at(index))));
                    answers.push(None);
                    group.push(write);
                }
            }
        }
        let reply = if group.is_empty() { None } else { Some(self.submit(group, held).await?) };
        Ok(Queued { answers, reply })
    }

    fn is_same(&self, reservation: &Reservation, key: &IdempotencyKey) -> bool {
        *reservation.hash() == crate::source::embedded::keys::key_hash(self.space.number, &key.key)
    }

    fn check(&self, writes: &[Write]) -> Result<(), AdmitError> {
        if let Some(reason) = self.shared.refusal() {
            return Err(AdmitError::Closed { reason });
        }
        if self.space.deleted.load(Ordering::Acquire) {
            return Err(AdmitError::Closed { reason: "its namespace was deleted".into() });
        }
        if self.shared.status.is_disk_full() {
            return Err(AdmitError::DiskFull);
        }
        let settings = self.space.settings.read();
        let limit = settings.max_record_bytes;
        if let Some(bytes) = writes.iter().map(|write| write.record.payload.len() as u64).find(|bytes| *bytes > limit) {
            return Err(AdmitError::TooLarge { bytes, limit });
        }
        let aged = Position(self.space.aged.load(Ordering::Acquire));
        if aged > Position(0)
            && let Some((branch, _)) = self.space.behind(aged)
        {
            return Err(AdmitError::BacklogOld { branch, limit: settings.backlog_age });
        }
        let bytes = self.space.unfinished_bytes();
        if bytes > settings.backlog_bytes {
            let (limit, drops) = (settings.backlog_bytes, settings.drop_oldest);
            drop(settings);
            if !drops {
                return Err(AdmitError::BacklogFull { bytes, limit });
            }
            drop_overflow(&self.shared, &self.space);
        }
        Ok(())
    }

    /// Reserves a key, or says what its first use gave.
    async fn key(&self, key: &IdempotencyKey) -> Result<Keyed, AdmitError> {
        let deadline = tokio::time::Instant::now() + KEY_WAIT;
        let since = self.space.keys_known_since(self.shared.clock.now());
        loop {
            match self.shared.keys.reserve(self.space.number, key, since) {
                Reserve::New(reservation) => return Ok(Keyed::Go(Some(reservation))),
                Reserve::Known { id, written_at, due_at } => {
                    return Ok(Keyed::Answered(Admitted::Repeated { id, written_at, due_at }));
                }
                Reserve::Reused => return Ok(Keyed::Answered(Admitted::KeyReused)),
                Reserve::Running(news) => {
                    if tokio::time::timeout_at(deadline, news).await.is_err() {
                        return Ok(Keyed::Answered(Admitted::KeyRunning));
                    }
                }
                Reserve::Ask(reservation) => {
                    let (reader, hash) = (self.shared.reader.clone(), *reservation.hash());
                    let number = self.space.number;
                    let found = tokio::task::spawn_blocking(move || reader.key(number, &hash, since)).await;
                    let unreadable = |reason: String| AdmitError::Closed { reason: reason.into() };
                    let found = found.map_err(|error| unreadable(error.to_string()))?;
                    return match found.map_err(|error| unreadable(error.to_string()))? {
                        None => Ok(Keyed::Go(Some(reservation))),
                        Some(seen) if seen.fingerprint != key.fingerprint => Ok(Keyed::Answered(Admitted::KeyReused)),
                        Some(seen) => Ok(Keyed::Answered(Admitted::Repeated {
                            id: seen.id,
                            written_at: seen.written_at,
                            due_at: seen.due_at,
                        })),
                    };
                }
            }
        }
    }

    /// Puts one group into the writer's queue.
    async fn submit(
        &self,
        writes: Vec<Write>,
        reservations: Vec<(usize, Reservation)>,
    ) -> Result<oneshot::Receiver<Reply>, AdmitError> {
        let bytes: usize = writes.iter().map(|write| write.record.payload.len() + WRITE_BYTES).sum();
        let wanted = u32::try_from(bytes.min(self.shared.options.queue_bytes)).unwrap_or(u32::MAX);
        let permits = Arc::clone(&self.shared.permits);
        let permit = match Arc::clone(&permits).try_acquire_many_owned(wanted) {
            Ok(permit) => permit,
            Err(_) => match tokio::time::timeout(ROOM_WAIT, permits.acquire_many_owned(wanted)).await {
                Ok(Ok(permit)) => permit,
                _ => return Err(AdmitError::Busy { retry_after: Duration::from_secs(1) }),
            },
        };
        let (reply, answer) = oneshot::channel();
        let request = Request {
            space: Arc::clone(&self.space),
            ask: Ask::Writes(writes),
            bytes,
            reservations,
            permit: Some(permit),
            reply,
        };
        self.shared.queue.push(request).map_err(|(_, reason)| AdmitError::Closed { reason })?;
        Ok(answer)
    }
}

/// What the writer made of a group.
async fn heard(reply: oneshot::Receiver<Reply>) -> Result<Vec<Admitted>, AdmitError> {
    match reply.await {
        Ok(Ok(Answer::Admitted(admitted))) => Ok(admitted),
        Ok(Ok(_)) => Err(AdmitError::Unsupported("the log answered something else")),
        Ok(Err(Refusal::Unknown(reason))) => Err(AdmitError::Unknown { reason }),
        Ok(Err(Refusal::Closed(reason))) => Err(AdmitError::Closed { reason }),
        Ok(Err(Refusal::DiskFull)) => Err(AdmitError::DiskFull),
        // The writer went away with the request in its hands.
        Err(_) => Err(AdmitError::Unknown { reason: "the log stopped during the write".into() }),
    }
}

impl From<LogError> for AdmitError {
    fn from(error: LogError) -> Self {
        Self::Closed { reason: error.to_string().into() }
    }
}
