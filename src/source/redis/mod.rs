//! `redis`: the log is a number of streams, a branch a consumer group on each, the order of a key that of its stream.
//!
//! Entries are numbered 0-1, 0-2, … by the server, so a position says the stream and the place in it. Durable means what the
//! server's own settings make of it: see [`facts`]. A failover to a replica can lose what was confirmed: replication is not
//! waited for.
//!
//! What a server has lost (a failover, an older file, FLUSHALL) is told with an alarm, and its numbers are used by nothing
//! else, where somebody remembers them: a process that runs, or a shelf on another server, which is told every few seconds
//! and at the end how far the streams have come. Nothing can be noticed of what is lost between two processes where the shelf is
//! on the same server or there is none, nor of what came in the last seconds before all processes were killed.

mod append;
mod claim;
mod ends;
mod facts;
mod fence;
mod group;
mod known;
mod link;
mod names;
mod reader;
mod scripts;
mod search;
mod session;
pub mod shelf;
mod spec;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, ready};
use parking_lot::Mutex;
use redis::Pipeline;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::append::Writers;
use self::ends::Ends;
use self::group::{Member, begin_group};
use self::link::{Call, Failed, Link};
use self::names::Names;
use self::scripts::{FORGET, LOOK, RENAME};
pub use self::spec::{Durability, RedisShelfSpec, RedisSourceSpec, SentinelSpec, check, check_shelf};
use super::foreign::broker::{self, Begin, Broker, BrokerCaps, Exactly, Handed, HandedExactly, Opened};
use super::foreign::open::{Context, SpecFault};
use super::{AdmitError, BranchName, DeadLetter, IdempotencyKey, Lag, LogError, Reach};
use crate::connection::probe::Probed;
use crate::record::{Position, Record, RecordId};

/// How often the streams are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What is finished stays so long: for a branch that is still to be made, and for the search after records that were under
/// way when a process ended.
const KEEP: Duration = Duration::from_secs(30);
/// … unless it takes more than this, about.
const KEEP_BYTES: u64 = 64 << 20;
/// What an entry takes about, before anything is known.
const USUAL: u64 = 512;
/// The largest record: a server takes arguments up to 512 MiB.
const LARGEST: u64 = 256 << 20;

/// What a look at the streams found.
#[derive(Clone, Debug, Default)]
struct Looked {
    /// For each: the newest entry, the lowest that a group has not finished (`None` = it has no group).
    streams: Vec<(u64, Option<u64>)>,
    entries: u64,
    bytes: u64,
}

impl Looked {
    /// What an entry takes, about.
    fn size(&self) -> u64 {
        self.bytes.checked_div(self.entries).unwrap_or(USUAL).max(1)
    }

    /// What could be removed, about.
    fn finished_bytes(&self) -> u64 {
        let left = |(end, low): &(u64, Option<u64>)| (end + 1).saturating_sub(low.unwrap_or(0));
        self.entries.saturating_sub(self.streams.iter().map(left).sum()).saturating_mul(self.size())
    }
}

struct Streams {
    this: Weak<Self>,
    /// For reads and holds.
    link: Arc<Link>,
    names: Names,
    context: Context,
    durable: bool,
    instance: String,
    ends: Arc<Ends>,
    writers: Mutex<Option<Arc<Writers>>>,
    writing: Mutex<Vec<JoinHandle<()>>>,
    branches: Mutex<BTreeMap<BranchName, Arc<Member>>>,
    looked: Mutex<Looked>,
    closed: CancellationToken,
}

/// Opens a namespace on streams. Touches no network. To be called inside a runtime.
///
/// # Errors
/// When the settings cannot work; [`check`] says which.
pub fn open(spec: &RedisSourceSpec, context: &Context) -> Result<Arc<dyn Broker>, LogError> {
    Ok(start(spec, context)?)
}

fn start(spec: &RedisSourceSpec, context: &Context) -> Result<Arc<Streams>, LogError> {
    let wrong = |fault: SpecFault| LogError::Storage {
        act: "make a client for Redis".into(),
        cause: format!("{}: {}", fault.pointer, fault.message).into(),
    };
    let durable = spec.durability == Durability::Strict || context.strict;
    let link = Arc::new(Link::new(spec.address().map_err(wrong)?, spec.timeout(), durable));
    let names = Names::new(spec.prefix.as_deref(), &context.namespace, spec.streams());
    let ends = Arc::new(Ends::new(names.streams));
    // Their connections are their own: what waits for the disk would make reads and renewals of holds wait with it.
    let (writers, writing) = Writers::start(&link, &names, context, &ends);
    let streams = Arc::new_cyclic(|this: &Weak<Streams>| Streams {
        this: this.clone(),
        link,
        names,
        context: context.clone(),
        durable,
        instance: format!("{}-{:016x}", std::process::id(), fastrand::u64(..)),
        ends,
        writers: Mutex::new(Some(Arc::new(writers))),
        writing: Mutex::new(writing),
        branches: Mutex::default(),
        looked: Mutex::default(),
        closed: CancellationToken::new(),
    });
    tokio::spawn(watch(Arc::downgrade(&streams), streams.closed.clone()));
    Ok(streams)
}

/// Looks whether the server can be used as it is; makes nothing.
pub async fn probe(spec: &RedisSourceSpec, namespace: &str, branches: &[String]) -> Vec<Probed> {
    let what = match spec.address() {
        Ok(address) => address.to_string(),
        Err(fault) => return vec![Probed::wrong("redis", fault.message)],
    };
    let Ok(address) = spec.address() else { return Vec::new() };
    let Ok(namespace) = namespace.parse() else { return Vec::new() };
    let link = Link::new(address, spec.timeout(), spec.durability == Durability::Strict);
    let open = match link.open().await {
        Ok(open) => open,
        Err(failed) => return vec![Probed::wrong(what, failed.why().to_string())],
    };
    let weak = open.facts.weak.as_ref().map(|weak| format!("; weak: {weak}")).unwrap_or_default();
    let mut found = vec![Probed::fine(what, format!("{}{weak}", open.facts.note))];
    let names = Names::new(spec.prefix.as_deref(), &namespace, spec.streams());
    let streams = format!("streams {} to {}", names.stream(0), names.stream(names.streams - 1));
    match look(&link, &names, &[]).await {
        Ok(looked) => {
            let note = format!("{} entries, {} bytes; {} branches", looked.entries, looked.bytes, branches.len());
            found.push(Probed::fine(streams, note));
        }
        Err(failed) => found.push(Probed::wrong(streams, failed.why().to_string())),
    }
    found
}

/// Looks at the streams, and trims each up to its horizon if all groups have finished so far.
async fn look(link: &Link, names: &Names, horizons: &[Option<u64>]) -> Result<Looked, Failed> {
    let horizon = |part: u16| horizons.get(usize::from(part)).copied().flatten();
    let call = Call::new(&LOOK)
        .keys(names.parts().map(|part| names.stream(part)))
        .args(names.parts().map(|part| horizon(part).map(|at| at.to_string()).unwrap_or_default()));
    let answer = link.script(&call, false).await?;
    let wrong = |why: String| Failed::Refused(format!("{}: {why}", link.shown()).into());
    let answer: Vec<(u64, String, u64, u64)> =
        redis::from_redis_value(answer).map_err(|error| wrong(error.to_string()))?;
    Ok(Looked {
        entries: answer.iter().map(|(_, _, entries, _)| entries).sum(),
        bytes: answer.iter().map(|(.., bytes)| bytes).sum(),
        streams: answer.into_iter().map(|(end, low, ..)| (end, low.parse().ok())).collect(),
    })
}

/// Looks each second how much there is, and removes what is finished.
async fn watch(streams: Weak<Streams>, closed: CancellationToken) {
    // How far everything was finished, and when.
    let mut finished: VecDeque<(Instant, Vec<Option<u64>>)> = VecDeque::new();
    loop {
        {
            let Some(streams) = streams.upgrade() else { return };
            let crowded = {
                let looked = streams.looked.lock();
                looked.bytes > streams.context.backlog_bytes / 2 || looked.finished_bytes() > KEEP_BYTES
            };
            let keep = if crowded { Duration::ZERO } else { KEEP };
            let mut horizon = Vec::new();
            while finished.front().is_some_and(|(at, _)| at.elapsed() >= keep) {
                horizon = finished.pop_front().map(|(_, horizon)| horizon).unwrap_or_default();
            }
            match look(&streams.link, &streams.names, &horizon).await {
                Ok(looked) => {
                    streams.ends.looked(&looked.streams);
                    finished.push_back((Instant::now(), looked.streams.iter().map(|(_, low)| *low).collect()));
                    *streams.looked.lock() = looked;
                }
                Err(failed) => {
                    tracing::debug!(ns = %streams.context.namespace, why = %failed.why(), "the streams could not be looked at");
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = closed.cancelled() => return,
        }
    }
}

fn closed() -> AdmitError {
    AdmitError::Closed { reason: "the log is closing".into() }
}

impl Streams {
    /// Hands records to the writer; they have their place then.
    fn hand_over(
        &self,
        records: Vec<(Arc<Record>, Option<IdempotencyKey>)>,
    ) -> Result<BoxFuture<'static, Vec<Result<Exactly, AdmitError>>>, AdmitError> {
        if self.closed.is_cancelled() {
            return Err(closed());
        }
        let bytes = self.looked.lock().bytes;
        if bytes > self.context.backlog_bytes {
            return Err(AdmitError::BacklogFull { bytes, limit: self.context.backlog_bytes });
        }
        let writers = self.writers.lock().clone().ok_or_else(closed)?;
        writers.hand_over(records)
    }

    fn member(&self, branch: &BranchName, begin: &Begin) -> Arc<Member> {
        let join = || {
            let (link, ends) = (Arc::clone(&self.link), Arc::clone(&self.ends));
            Arc::new(Member::join(link, self.names.clone(), branch.as_str(), &self.instance, ends, begin.clone()))
        };
        Arc::clone(self.branches.lock().entry(branch.clone()).or_insert_with(join))
    }

    async fn leave(&self, branch: &BranchName) {
        let member = self.branches.lock().remove(branch);
        if let Some(member) = member {
            member.leave().await;
        }
    }

    /// Runs a call that needs the handle.
    fn with<T, F>(&self, call: impl FnOnce(Arc<Self>) -> F) -> BoxFuture<'static, Result<T, LogError>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, LogError>> + Send + 'static,
    {
        match self.this.upgrade() {
            Some(streams) if !self.closed.is_cancelled() => call(streams).boxed(),
            _ => ready(Err(LogError::Closed("the log is closing".into()))).boxed(),
        }
    }
}

impl Broker for Streams {
    fn caps(&self) -> BrokerCaps {
        BrokerCaps {
            ordered: true,
            durable: self.durable,
            each_end: true,
            hold: false,
            pause: false,
            delay: None,
            look_up: true,
            largest_record: Some(LARGEST),
        }
    }

    fn durable_note(&self) -> String {
        let facts = self.link.facts();
        let note = facts.as_ref().map_or("not reached yet", |facts| facts.note.as_str());
        let weak = facts.as_ref().and_then(|facts| facts.weak.as_ref());
        let weak = weak.map(|weak| format!("; weak: {weak}")).unwrap_or_default();
        format!("{}: {note}; a failover to a replica may lose what was confirmed{weak}", self.link.shown())
    }

    fn trouble(&self) -> Option<String> {
        let of_branches =
            || self.branches.lock().iter().find_map(|(name, member)| Some(format!("{name}: {}", member.trouble()?)));
        self.link.trouble().map(|why| why.to_string()).or_else(of_branches)
    }

    fn append(&self, records: Vec<Arc<Record>>) -> BoxFuture<'static, Result<Handed, AdmitError>> {
        let handed = self.hand_over(records.into_iter().map(|record| (record, None)).collect());
        let lost = || Err(AdmitError::Unknown { reason: "the writer has ended".into() });
        let answers = handed.map(|wait| {
            async move {
                let position = |result| match result {
                    Ok(Exactly::Appended(position)) => Ok(position),
                    Ok(Exactly::Known(_)) => lost(),
                    Err(error) => Err(error),
                };
                wait.await.into_iter().map(position).collect()
            }
            .boxed()
        });
        ready(answers).boxed()
    }

    fn append_exactly(&self, records: &[(Arc<Record>, Option<IdempotencyKey>)]) -> Option<HandedExactly> {
        if records.is_empty() {
            return Some(ready(Ok(Vec::new())).boxed());
        }
        let handed = self.hand_over(records.to_vec());
        Some(async move { Ok(handed?.await) }.boxed())
    }

    fn prepare(&self, branch: &BranchName, begin: Begin) -> BoxFuture<'static, Result<(), LogError>> {
        let branch = branch.clone();
        self.with(|streams| async move {
            for part in streams.names.parts() {
                begin_group(&streams.link, &streams.names, branch.as_str(), part, &begin)
                    .await
                    .map_err(|failed| failed.storage(format!("make consumer group {branch}")))?;
            }
            Ok(())
        })
    }

    fn open(&self, branch: &BranchName, begin: Begin) -> BoxFuture<'static, Result<Opened, LogError>> {
        let branch = branch.clone();
        self.with(|streams| async move {
            let member = streams.member(&branch, &begin);
            drop(streams);
            member.open(begin).await
        })
    }

    fn progress(&self, branch: &BranchName, frontier: &Reach, ended: &[Position]) {
        if let Some(member) = self.branches.lock().get(branch) {
            member.progress(frontier, ended);
        }
    }

    fn forget(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let branch = branch.clone();
        self.with(|streams| async move {
            streams.leave(&branch).await;
            let names = &streams.names;
            let pair = |part| [names.lease(branch.as_str(), part), names.stream(part)];
            let call = Call::new(&FORGET)
                .key(names.live(branch.as_str()))
                .keys(names.parts().flat_map(pair))
                .arg(branch.as_str());
            let done = streams.link.script(&call, true).await;
            done.map(|_| ()).map_err(|failed| failed.storage(format!("remove consumer group {branch}")))
        })
    }

    fn rename(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let (from, to) = (from.clone(), to.clone());
        self.with(|streams| async move {
            streams.leave(&from).await;
            for part in streams.names.parts() {
                let call = Call::new(&RENAME).key(streams.names.stream(part)).arg(from.as_str()).arg(to.as_str());
                let done = streams.link.script(&call, true).await;
                done.map_err(|failed| failed.storage(format!("carry consumer group {from} over to {to}")))?;
            }
            Ok(())
        })
    }

    fn lag(&self, branch: &BranchName) -> Lag {
        let size = self.looked.lock().size();
        let member = self.branches.lock().get(branch).cloned();
        member.map(|member| member.lag(size)).unwrap_or_default()
    }

    fn part_of(&self, key: Option<&str>) -> u16 {
        key.map_or(0, |key| self.names.part_of(key))
    }

    fn end(&self) -> Reach {
        self.names.parts().map(|part| Position::in_part(part, self.ends.of(part))).collect()
    }

    fn numbers(&self) -> Option<Reach> {
        Some(self.end())
    }

    fn were_given(&self, numbers: &Reach) {
        // Whoever writes or reads first finds where the streams end before that, says so, and goes on behind it.
        numbers.iter().for_each(|number| self.ends.at_least(number.part(), number.offset()));
    }

    fn place(&self) -> BoxFuture<'static, Result<Arc<str>, LogError>> {
        self.with(|streams| async move {
            let looked = look(&streams.link, &streams.names, &[]).await;
            let looked = looked.map_err(|failed| failed.storage("ask where the streams end"))?;
            streams.ends.looked(&looked.streams);
            Ok(names::place(looked.streams.iter().map(|(end, _)| *end)).into())
        })
    }

    fn find_after(
        &self,
        place: &str,
        ids: Vec<RecordId>,
    ) -> BoxFuture<'static, Result<HashMap<RecordId, Position>, LogError>> {
        let place = place.to_owned();
        self.with(|streams| async move {
            let done = search::find_after(&streams.link, &streams.names, &place, &ids).await;
            done.map_err(|failed| failed.storage("search the streams for records that were under way"))
        })
    }

    fn locate(&self, id: RecordId) -> BoxFuture<'static, Result<Option<(Position, Arc<Record>)>, LogError>> {
        self.with(move |streams| async move {
            let searching = search::locate(&streams.link, &streams.names, id);
            let Ok(done) = tokio::time::timeout(search::LONGEST, searching).await else {
                return Err(LogError::Unsupported(broker::GAVE_UP));
            };
            done.map_err(|failed| failed.storage(format!("look for {id} in the streams")))
        })
    }

    fn unfinished(
        &self,
        position: Position,
        branches: Vec<BranchName>,
    ) -> BoxFuture<'static, Result<Vec<BranchName>, LogError>> {
        self.with(move |streams| async move {
            let asked = search::unfinished(&streams.link, &streams.names, position, branches).await;
            asked.map_err(|failed| failed.storage("ask how far the consumer groups are"))
        })
    }

    fn bury(&self, letters: Vec<DeadLetter>) -> BoxFuture<'static, Result<(), LogError>> {
        self.with(|streams| async move {
            let act = || format!("write dead letters to stream {}", streams.names.dead());
            let writers = streams.writers.lock().clone();
            let link = writers.as_ref().map_or(&streams.link, |writers| writers.link());
            let open = link.open().await.map_err(|failed| failed.storage(act()))?;
            let mut pipeline = Pipeline::new();
            for letter in &letters {
                let mut body = Vec::new();
                letter.record.encode(&mut body);
                pipeline
                    .cmd("XADD")
                    .arg(streams.names.dead())
                    .arg("*")
                    .arg("branch")
                    .arg(letter.branch.as_str())
                    .arg("position")
                    .arg(letter.row.position.to_string())
                    .arg("at")
                    .arg(letter.at.to_string())
                    .arg("reason")
                    .arg(serde_json::to_string(&letter.reason).unwrap_or_default().trim_matches('"'))
                    .arg("attempts")
                    .arg(letter.attempts)
                    .arg("error")
                    .arg(&*letter.last_error)
                    .arg("stage")
                    .arg(&*letter.stage)
                    .arg("revision")
                    .arg(&*letter.revision)
                    .arg("id")
                    .arg(letter.record.id.to_string())
                    .arg("key")
                    .arg(letter.record.key.as_deref().unwrap_or_default())
                    .arg("payload")
                    .arg(&*letter.record.payload)
                    .arg("record")
                    .arg(body);
            }
            if open.facts.waits {
                pipeline.add_command(link.wait_for_disk());
            }
            let answers = link.run(&open, &mut pipeline).await.map_err(|failed| failed.storage(act()))?;
            let last = answers.len().saturating_sub(1);
            for (index, answer) in answers.into_iter().enumerate() {
                let done = if open.facts.waits && index == last {
                    link.is_on_disk(answer)
                } else {
                    link.answer(answer).map(|_| ())
                };
                done.map_err(|failed| failed.storage(act()))?;
            }
            Ok(())
        })
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.closed.cancel();
        let members: Vec<_> = std::mem::take(&mut *self.branches.lock()).into_values().collect();
        // Writers end when they have written what waits.
        drop(self.writers.lock().take());
        let writing = std::mem::take(&mut *self.writing.lock());
        async move {
            futures::future::join_all(members.iter().map(|member| member.leave())).await;
            for writer in writing {
                // One that panicked has answered "unknown".
                let _ = writer.await;
            }
        }
        .boxed()
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}
