//! Writes on their way into the streams: a few writers, each with a connection and some of the streams of its own, in which
//! entries stand in the order in which they were handed over. One alone would be read by the server some 16 KiB at a time,
//! with a sync of its disk for each.
//!
//! What waits while a group is under way is the next group, so the order is kept without a wait for each record. A full one
//! does not wait for the answer to the one before it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures::future::{BoxFuture, join_all, ready};
use futures::stream::FuturesOrdered;
use futures::{FutureExt as _, StreamExt as _};
use redis::{Pipeline, RedisResult, Value};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::ends::Ends;
use super::fence;
use super::known;
use super::link::{Call, Failed, Link, Open, explain};
use super::names::{self, Names};
use super::scripts::EXACT;
use crate::record::{Position, Record};
use crate::source::foreign::broker::Exactly;
use crate::source::foreign::open::Context;
use crate::source::{AdmitError, IdempotencyKey};

/// Calls that wait for a writer at most.
const WAITING: usize = 16_384;
/// Bytes of one group, about.
const GROUP_BYTES: usize = 8 << 20;
/// Records of one group, about.
const GROUP: usize = 250;
/// Full groups that wait for their answers at once.
const UNDER_WAY: usize = 4;
/// Writers of a namespace at most.
const WRITERS: u16 = 8;

/// A record, with its key if it is to be told apart by it, and its stream.
pub(super) struct Item {
    record: Arc<Record>,
    key: Option<IdempotencyKey>,
    part: u16,
}

/// Records of one call.
struct Job {
    items: Vec<Item>,
    answer: oneshot::Sender<Vec<Result<Exactly, AdmitError>>>,
}

/// Where records are handed over, and what writes them.
pub(super) struct Writers {
    all: Vec<mpsc::Sender<Job>>,
    link: Arc<Link>,
    names: Names,
    /// For records without a key, the streams in turn.
    round: AtomicU16,
}

impl Writers {
    /// Starts them; they end when this is dropped and what they were given is written.
    pub(super) fn start(
        link: &Link,
        names: &Names,
        context: &Context,
        ends: &Arc<Ends>,
    ) -> (Self, Vec<JoinHandle<()>>) {
        let start = |_| {
            let writer = Writer {
                link: Arc::new(link.beside()),
                names: names.clone(),
                context: context.clone(),
                ends: Arc::clone(ends),
                loaded: AtomicU64::new(0),
                fenced: AtomicU64::new(0),
            };
            let (jobs, waiting) = mpsc::channel(WAITING);
            (jobs, tokio::spawn(run(Arc::new(writer), waiting)))
        };
        let (all, tasks) = (0..WRITERS.min(names.streams)).map(start).unzip();
        (Self { all, link: Arc::new(link.beside()), names: names.clone(), round: AtomicU16::new(0) }, tasks)
    }

    /// A way to the server on which a wait for the disk makes no reader wait.
    pub(super) const fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Hands records over, all or none; they have their places then. The future gives what became of each.
    pub(super) fn hand_over(
        &self,
        records: Vec<(Arc<Record>, Option<IdempotencyKey>)>,
    ) -> Result<BoxFuture<'static, Vec<Result<Exactly, AdmitError>>>, AdmitError> {
        let count = records.len();
        let mut shares: Vec<(Vec<usize>, Vec<Item>)> = self.all.iter().map(|_| Default::default()).collect();
        for (index, (record, key)) in records.into_iter().enumerate() {
            let part = match &record.key {
                Some(key) => self.names.part_of(key),
                None => self.round.fetch_add(1, Ordering::Relaxed) % self.names.streams,
            };
            if let Some((indexes, items)) = shares.get_mut(usize::from(part) % self.all.len().max(1)) {
                indexes.push(index);
                items.push(Item { record, key, part });
            }
        }
        let mut going = Vec::new();
        for (jobs, (indexes, items)) in self.all.iter().zip(shares).filter(|(_, (_, items))| !items.is_empty()) {
            let room = jobs.try_reserve().map_err(|full| match full {
                TrySendError::Full(()) => AdmitError::Busy { retry_after: Duration::from_secs(1) },
                TrySendError::Closed(()) => AdmitError::Closed { reason: "the log is closing".into() },
            })?;
            going.push((room, indexes, items));
        }
        let mut waits = Vec::new();
        for (room, indexes, items) in going {
            let (answer, wait) = oneshot::channel();
            room.send(Job { items, answer });
            waits.push(async move { (indexes, wait.await) });
        }
        let gather = async move {
            let lost = || Err(AdmitError::Unknown { reason: "the writer has ended".into() });
            let mut results: Vec<_> = (0..count).map(|_| lost()).collect();
            for (indexes, answers) in join_all(waits).await {
                for (index, answer) in indexes.into_iter().zip(answers.into_iter().flatten()) {
                    if let Some(slot) = results.get_mut(index) {
                        *slot = answer;
                    }
                }
            }
            results
        };
        Ok(gather.boxed())
    }
}

struct Writer {
    link: Arc<Link>,
    names: Names,
    context: Context,
    ends: Arc<Ends>,
    /// The connection that knows the script.
    loaded: AtomicU64,
    /// The connection on which it was made sure that numbers are new.
    fenced: AtomicU64,
}

/// What goes to the server in one piece.
#[derive(Default)]
struct Group {
    jobs: Vec<Job>,
    records: usize,
    bytes: usize,
}

impl Group {
    fn push(&mut self, job: Job) {
        self.records += job.items.len();
        self.bytes += job.items.iter().map(|item| item.record.weight()).sum::<usize>();
        self.jobs.push(job);
    }

    const fn is_full(&self) -> bool {
        self.records >= GROUP || self.bytes >= GROUP_BYTES
    }

    fn items(&self) -> impl Iterator<Item = &Item> {
        self.jobs.iter().flat_map(|job| &job.items)
    }

    fn answer(self, mut results: impl Iterator<Item = Result<Exactly, AdmitError>>) {
        for job in self.jobs {
            // Who asked may be gone.
            let _ = job.answer.send(results.by_ref().take(job.items.len()).collect());
        }
    }
}

/// Writes until nobody can hand anything over any more.
async fn run(writer: Arc<Writer>, mut jobs: mpsc::Receiver<Job>) {
    let mut waiting = Group::default();
    let mut under_way = FuturesOrdered::new();
    let mut open = true;
    while open || !waiting.jobs.is_empty() || !under_way.is_empty() {
        // What is small waits for company: a server that syncs its disk does so once for each piece.
        let may_go = under_way.is_empty() || (waiting.is_full() && under_way.len() < UNDER_WAY);
        if may_go && !waiting.jobs.is_empty() {
            while !waiting.is_full()
                && let Ok(job) = jobs.try_recv()
            {
                waiting.push(job);
            }
            under_way.push_back(Arc::clone(&writer).send(std::mem::take(&mut waiting)).await);
            continue;
        }
        tokio::select! {
            biased;
            Some(()) = under_way.next(), if !under_way.is_empty() => {}
            job = jobs.recv(), if open && !waiting.is_full() => match job {
                Some(job) => waiting.push(job),
                None => open = false,
            },
        }
    }
}

impl Writer {
    /// Hands a group to the connection, behind what it was handed before; the future ends when everybody is answered.
    async fn send(self: Arc<Self>, group: Group) -> BoxFuture<'static, ()> {
        let refused = |group: Group, why: &Failed| {
            let reason = Arc::clone(why.why());
            group.answer(std::iter::repeat_with(|| Err(AdmitError::Unavailable { reason: Arc::clone(&reason) })));
            ready(()).boxed()
        };
        let open = match self.link.open().await {
            Ok(open) => open,
            Err(failed) => return refused(group, &failed),
        };
        if self.fenced.load(Ordering::Relaxed) != open.number() {
            if let Err(failed) = fence::raise(&self.link, &self.names, &self.ends, self.names.parts()).await {
                return refused(group, &failed);
            }
            self.fenced.store(open.number(), Ordering::Relaxed);
        }
        let (mut pipeline, before) = self.pipeline(&open, &group);
        let (link, on) = (Arc::clone(&self.link), open.clone());
        let mut running = async move { link.run(&on, &mut pipeline).await }.boxed();
        // It has its place among the others once it was polled.
        let first = futures::poll!(&mut running);
        async move {
            let answers = match first {
                Poll::Ready(answers) => answers,
                Poll::Pending => running.await,
            };
            let results = self.results(&open, &group, answers.map(|answers| answers.into_iter().skip(before)));
            group.answer(results.into_iter());
        }
        .boxed()
    }

    /// What became of each record of a group.
    fn results(
        &self,
        open: &Open,
        group: &Group,
        answers: Result<impl Iterator<Item = RedisResult<Value>>, Failed>,
    ) -> Vec<Result<Exactly, AdmitError>> {
        let mut answers = match answers {
            Ok(answers) => answers,
            Err(failed) => {
                let reason = Arc::clone(failed.why());
                let error = match failed {
                    Failed::Unreached(_) => AdmitError::Unavailable { reason },
                    _ => AdmitError::Unknown { reason },
                };
                return vec![Err(error); group.records];
            }
        };
        let missing = || Err(AdmitError::Unknown { reason: "the server gave no answer for it".into() });
        let mut results: Vec<Result<Exactly, AdmitError>> = Vec::with_capacity(group.records);
        for item in group.items() {
            results.push(answers.next().map_or_else(missing, |answer| self.outcome(answer, item)));
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
    fn pipeline(&self, open: &Open, group: &Group) -> (Pipeline, usize) {
        let mut pipeline = Pipeline::with_capacity(group.records + 2);
        let mut before = 0;
        let keyed = group.items().any(|item| item.key.is_some());
        if keyed && self.loaded.swap(open.number(), Ordering::Relaxed) != open.number() {
            pipeline.cmd("SCRIPT").arg("LOAD").arg(EXACT.text);
            before = 1;
        }
        let now = self.context.clock.now();
        for Item { record, key, part } in group.items() {
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

    fn outcome(&self, answer: RedisResult<Value>, item: &Item) -> Result<Exactly, AdmitError> {
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
                        self.names.stream(item.part)
                    )),
                    _ => refused(text),
                });
            }
        };
        let unclear =
            || AdmitError::Unknown { reason: format!("{}: the answer is not an id", self.link.shown()).into() };
        if item.key.is_some()
            && let Value::Array(fields) = value
        {
            return known::read(fields).map(Exactly::Known).ok_or_else(unclear);
        }
        let id: String = redis::from_redis_value(value).map_err(|_| unclear())?;
        let offset = names::offset(&id).ok_or_else(unclear)?;
        self.ends.wrote(item.part, offset, item.record.written_at);
        Ok(Exactly::Appended(Position::in_part(item.part, offset)))
    }
}
