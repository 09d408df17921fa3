//! Writes on their way into the streams: one task, one group at a time, in the order in which they were handed over.
//!
//! What waits while a group is under way is the next group, so the order is kept without a wait for each record.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use redis::{Pipeline, RedisResult, Value};
use tokio::sync::{mpsc, oneshot};

use super::ends::Ends;
use super::known;
use super::link::{Call, Failed, Link, Open, explain};
use super::names::{self, Names};
use super::scripts::EXACT;
use crate::clock::Timestamp;
use crate::record::{Position, Record};
use crate::source::foreign::broker::Exactly;
use crate::source::foreign::open::Context;
use crate::source::{AdmitError, IdempotencyKey};

/// Bytes of one group, about.
const GROUP_BYTES: usize = 8 << 20;
/// Records of one group, about.
const GROUP: usize = 2_000;

/// A record, with its key if it is to be told apart by it.
pub(super) type Item = (Arc<Record>, Option<IdempotencyKey>);

/// Records of one call.
pub(super) struct Job {
    pub(super) items: Vec<Item>,
    pub(super) answer: oneshot::Sender<Vec<Result<Exactly, AdmitError>>>,
}

/// What writes.
pub(super) struct Writer {
    pub(super) link: Arc<Link>,
    pub(super) names: Names,
    pub(super) context: Context,
    pub(super) ends: Arc<Ends>,
    pub(super) round: AtomicU16,
    /// The connection that knows the script.
    pub(super) loaded: std::sync::atomic::AtomicU64,
}

/// Writes until nobody can hand anything over any more.
pub(super) async fn run(writer: Writer, mut jobs: mpsc::Receiver<Job>) {
    while let Some(first) = jobs.recv().await {
        let weight = |job: &Job| job.items.iter().map(|(record, _)| record.weight()).sum::<usize>();
        let (mut bytes, mut records) = (weight(&first), first.items.len());
        let mut group = vec![first];
        while bytes < GROUP_BYTES
            && records < GROUP
            && let Ok(job) = jobs.try_recv()
        {
            bytes += weight(&job);
            records += job.items.len();
            group.push(job);
        }
        let (items, answers): (Vec<_>, Vec<_>) = group.into_iter().map(|job| (job.items, job.answer)).unzip();
        let mut results = writer.write(&items).await.into_iter();
        for (items, answer) in items.iter().zip(answers) {
            // Who asked may be gone.
            let _ = answer.send(results.by_ref().take(items.len()).collect());
        }
    }
}

impl Writer {
    fn part(&self, record: &Record) -> u16 {
        match &record.key {
            Some(key) => self.names.part_of(key),
            None => self.round.fetch_add(1, Ordering::Relaxed) % self.names.streams,
        }
    }

    /// Writes a group; as many answers as there are records.
    async fn write(&self, jobs: &[Vec<Item>]) -> Vec<Result<Exactly, AdmitError>> {
        let items: Vec<&Item> = jobs.iter().flatten().collect();
        let all = |error: AdmitError| vec![Err(error); items.len()];
        let open = match self.link.open().await {
            Ok(open) => open,
            Err(failed) => return all(AdmitError::Unavailable { reason: Arc::clone(failed.why()) }),
        };
        let parts: Vec<u16> = items.iter().map(|(record, _)| self.part(record)).collect();
        let (mut pipeline, before) = self.pipeline(&open, &items, &parts);
        let answers = match self.link.run(&open, &mut pipeline).await {
            Ok(answers) => answers,
            Err(failed @ Failed::Unreached(_)) => {
                return all(AdmitError::Unavailable { reason: Arc::clone(failed.why()) });
            }
            Err(failed) => return all(AdmitError::Unknown { reason: Arc::clone(failed.why()) }),
        };
        let mut answers = answers.into_iter().skip(before);
        let missing = || Err(AdmitError::Unknown { reason: "the server gave no answer for it".into() });
        let mut results: Vec<Result<Exactly, AdmitError>> = Vec::with_capacity(items.len());
        for ((record, key), part) in items.iter().zip(&parts) {
            results.push(
                answers
                    .next()
                    .map_or_else(missing, |answer| self.outcome(answer, *part, record.written_at, key.is_some())),
            );
        }
        let wrote = results.iter().any(|result| matches!(result, Ok(Exactly::Appended(_))));
        if open.facts.waits
            && wrote
            && let Err(failed) = answers.next().map_or_else(
                || Err(Failed::Unsure("the server gave no answer for the disk".into())),
                |answer| self.link.is_on_disk(answer),
            )
        {
            for result in &mut results {
                if matches!(result, Ok(Exactly::Appended(_))) {
                    *result = Err(AdmitError::Unknown { reason: Arc::clone(failed.why()) });
                }
            }
        }
        results
    }

    /// The commands of a group, and how many come before the first record's.
    fn pipeline(&self, open: &Open, items: &[&Item], parts: &[u16]) -> (Pipeline, usize) {
        let mut pipeline = Pipeline::new();
        let mut before = 0;
        let keyed = items.iter().any(|(_, key)| key.is_some());
        if keyed && self.loaded.swap(open.number(), Ordering::Relaxed) != open.number() {
            pipeline.cmd("SCRIPT").arg("LOAD").arg(EXACT.text);
            before = 1;
        }
        let now = self.context.clock.now();
        for ((record, key), part) in items.iter().zip(parts) {
            let mut body = Vec::new();
            record.encode(&mut body);
            let stream = self.names.stream(*part);
            match key {
                None => {
                    pipeline.cmd("XADD").arg(stream).arg("0-*").arg("r").arg(body);
                }
                Some(key) => {
                    let call = Call::new(&EXACT)
                        .key(self.names.key(&key.key))
                        .key(stream)
                        .arg(body)
                        .arg(key.fingerprint)
                        .arg(*record.id.as_bytes())
                        .number(record.written_at.as_millis())
                        .number(now.as_millis())
                        .number(self.context.key_window.as_millis())
                        .number(known::keep(record.written_at, now, self.context.key_window));
                    pipeline.add_command(call.command());
                }
            }
        }
        if open.facts.waits {
            pipeline.add_command(self.link.wait_for_disk());
        }
        (pipeline, before)
    }

    fn outcome(
        &self,
        answer: RedisResult<Value>,
        part: u16,
        at: Timestamp,
        keyed: bool,
    ) -> Result<Exactly, AdmitError> {
        let refused = |why: String| AdmitError::Unavailable { reason: format!("{}: {why}", self.link.shown()).into() };
        let value = match answer {
            Ok(value) => value,
            Err(error) => {
                let text = explain(&error);
                return Err(match error.code() {
                    Some("NOSCRIPT") => {
                        self.loaded.store(0, Ordering::Relaxed);
                        refused(format!("it has forgotten its scripts, try again: {text}"))
                    }
                    Some("OOM") => {
                        refused(format!("it has no memory left (raise maxmemory, or wait for the sinks): {text}"))
                    }
                    _ if text.contains("equal or smaller than the target stream top item") => refused(format!(
                        "stream {} holds entries of another program: name another `prefix`: {text}",
                        self.names.stream(part)
                    )),
                    _ => refused(text),
                });
            }
        };
        let unclear =
            || AdmitError::Unknown { reason: format!("{}: the answer is not an id", self.link.shown()).into() };
        if keyed && let Value::Array(fields) = value {
            return known::read(fields).map(Exactly::Known).ok_or_else(unclear);
        }
        let id: String = redis::from_redis_value(value).map_err(|_| unclear())?;
        let offset = names::offset(&id).ok_or_else(unclear)?;
        self.ends.wrote(part, offset, at);
        Ok(Exactly::Appended(Position::in_part(part, offset)))
    }
}
