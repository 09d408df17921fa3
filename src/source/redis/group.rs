//! A branch as a consumer group on each stream: the streams that are ours by lease, the reader, and the acknowledgements.
//!
//! All processes use the one consumer name of the group, so what one leaves behind is the pending list of the next. The lease
//! says whose turn it is, and every script that reads or acknowledges looks at it. What was read under any other name (by
//! hand, by another program) is taken over: see [`claim`](super::claim).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use redis::Value;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::claim;
use super::ends::Ends;
use super::fence;
use super::link::{Call, Failed, Link};
use super::names::{self, Names};
use super::reader;
use super::scripts::{ACK, BEGIN, HOLD, RELEASE};
use super::session::{Ack, Session};
use crate::clock::Timestamp;
use crate::record::Position;
use crate::source::foreign::broker::{Begin, Opened};
use crate::source::{Entry, Lag, LogError, Reach, Subscription};

/// A hold that is not renewed for so long has ended.
const LEASE: Duration = Duration::from_secs(10);
/// How often it is renewed, and looked whether streams are to move.
const RENEW: Duration = Duration::from_secs(1);
/// One that could not be renewed for so long counts as lost here, well before others may take it.
const SURE: Duration = Duration::from_secs(8);
/// Acknowledgements wait for others so long.
const GATHER: Duration = Duration::from_millis(50);
/// How long those who read may take to let go of streams that move.
const LEAVE: Duration = Duration::from_secs(25);
/// How long a branch waits for its hold before it says that it has none.
const JOIN: Duration = Duration::from_secs(15);
/// Waits after a failure.
pub(super) const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// A branch's part in its group.
pub(super) struct Member {
    shared: Arc<Shared>,
    keeper: Mutex<Option<JoinHandle<()>>>,
}

pub(super) struct Shared {
    pub(super) link: Arc<Link>,
    pub(super) names: Names,
    pub(super) group: String,
    pub(super) instance: String,
    pub(super) ends: Arc<Ends>,
    pub(super) state: Mutex<State>,
    /// One exchange about holds at a time.
    pub(super) holding: tokio::sync::Mutex<()>,
    /// For the keeper: something is to be done.
    pub(super) work: Notify,
    /// For the reader: there is room, or something to go back to.
    pub(super) room: Notify,
    /// For those who wait for entries or a session.
    pub(super) news: Notify,
    pub(super) stop: CancellationToken,
}

pub(super) struct State {
    pub(super) session: Option<Session>,
    pub(super) begin: Begin,
    /// Why there is no session.
    pub(super) failed: Option<LogError>,
    /// Why the session has to end.
    pub(super) broken: Option<LogError>,
    pub(super) generations: u64,
    /// What holds are marked with; only who knows it may read.
    pub(super) token: u64,
    /// The groups of these streams were there.
    pub(super) known: BTreeSet<u16>,
    pub(super) trouble: Option<Arc<str>>,
}

/// What a look at the holds found.
pub(super) struct Holds {
    live: u64,
    ours: Vec<u16>,
    free: bool,
}

impl Holds {
    fn fair(&self, streams: u16) -> usize {
        usize::try_from(u64::from(streams).div_ceil(self.live.max(1))).unwrap_or(usize::MAX)
    }
}

impl Shared {
    pub(super) fn token(&self) -> String {
        format!("{}#{}", self.instance, self.state.lock().token)
    }

    /// Renews holds, under a new mark if `anew`, and takes what is free if `take`.
    pub(super) async fn hold(&self, take: bool, anew: bool) -> Result<Holds, Failed> {
        let _turn = self.holding.lock().await;
        if anew {
            self.state.lock().token += 1;
        }
        let call = Call::new(&HOLD)
            .key(self.names.live(&self.group))
            .keys(self.names.parts().map(|part| self.names.lease(&self.group, part)))
            .arg(format!("{}#", self.instance))
            .arg(self.token())
            .number(LEASE.as_millis())
            .number(u8::from(take));
        let answer = self.link.script(&call, false).await?;
        let answer: Vec<u64> = redis::from_redis_value(answer)
            .map_err(|error| Failed::Refused(format!("{}: {error}", self.link.shown()).into()))?;
        let parts = || self.names.parts().zip(answer.iter().skip(1));
        Ok(Holds {
            live: answer.first().copied().unwrap_or(1),
            ours: parts().filter(|(_, state)| matches!(state, 1 | 2)).map(|(part, _)| part).collect(),
            free: parts().any(|(_, state)| *state == 3),
        })
    }

    async fn release(&self, parts: &[u16], gone: bool) -> Result<(), Failed> {
        let call = Call::new(&RELEASE)
            .key(self.names.live(&self.group))
            .keys(parts.iter().map(|part| self.names.lease(&self.group, *part)))
            .arg(format!("{}#", self.instance))
            .number(u8::from(gone));
        self.link.script(&call, false).await.map(|_| ())
    }

    /// Makes sure of the groups; gives each stream, its cursor and what its group was given last.
    async fn begin(&self, parts: &[u16]) -> Result<Vec<(u16, u64, u64)>, Failed> {
        fence::raise(&self.link, &self.names, &self.ends, parts.iter().copied()).await?;
        let mut found = Vec::with_capacity(parts.len());
        for part in parts {
            let (from, known) = {
                let state = self.state.lock();
                (state.begin.clone(), state.known.contains(part))
            };
            let from = if known { Begin::Earliest } else { from };
            let group = begin_group(&self.link, &self.names, &self.group, *part, &from).await?;
            if known && group.made {
                tracing::error!(
                    server = %self.link.shown(), stream = self.names.stream(*part), group = %self.group,
                    "the consumer group was gone, and what it had not finished may be lost with its stream: it goes on with \
                     everything that the stream holds now"
                );
            }
            if group.others > 0 {
                tracing::warn!(
                    stream = self.names.stream(*part), group = %self.group, entries = group.others,
                    "entries are pending for other consumers of the group: they are taken over"
                );
                claim::take_over(self, &self.link, *part, 0).await?;
            }
            self.ends.at_least(*part, group.end);
            self.state.lock().known.insert(*part);
            found.push((*part, group.cursor, group.given));
        }
        Ok(found)
    }

    pub(super) fn tell_lost(&self, part: u16, entry: u64) {
        tracing::error!(
            stream = self.names.stream(part), group = %self.group, entry,
            "a record is lost: it was pending and its entry was removed from the stream by somebody else"
        );
    }

    fn tell(&self) {
        self.work.notify_one();
        self.room.notify_one();
        self.news.notify_waiters();
    }

    fn fail(&self, error: LogError) {
        let mut state = self.state.lock();
        state.trouble = Some(error.to_string().into());
        state.failed = Some(error);
        drop(state);
        self.tell();
    }

    pub(super) fn storage(&self, act: &str, failed: &Failed) -> LogError {
        failed.storage(format!("{act} of group {}", self.group))
    }

    /// Keeps sessions going until it is stopped.
    async fn keep(self: Arc<Self>) {
        let mut wait = BACKOFF.0;
        while !self.stop.is_cancelled() {
            let begun = Instant::now();
            let Err(error) = self.session().await else { continue };
            if begun.elapsed() > BACKOFF.1 * 2 {
                wait = BACKOFF.0;
            }
            tracing::warn!(group = %self.group, %error, "the branch has no hold on its streams, trying again");
            self.fail(error);
            let until = tokio::time::sleep(wait);
            tokio::select! {
                () = until => {}
                () = self.stop.cancelled() => {}
            }
            wait = (wait * 2).min(BACKOFF.1);
        }
        // Others need not wait for the end of the hold.
        if let Err(failed) = self.release(&self.names.parts().collect::<Vec<_>>(), true).await {
            tracing::debug!(group = %self.group, why = %failed.why(), "the hold was not let go of; it ends by itself");
        }
    }

    /// One hold on some streams, from its begin to its end.
    async fn session(self: &Arc<Self>) -> Result<(), LogError> {
        let failed = |act: &'static str| move |failed: Failed| self.storage(act, &failed);
        let mut renewed = Instant::now();
        let holds = self.hold(true, true).await.map_err(failed("take hold of the streams"))?;
        let begun = self.begin(&holds.ours).await.map_err(failed("find where to go on"))?;
        let (generation, moved) = {
            let mut state = self.state.lock();
            state.generations += 1;
            (state.failed, state.broken, state.trouble) = (None, None, None);
            let session = Session::new(state.generations, &begun);
            let moved = session.moved.clone();
            state.session = Some(session);
            (state.generations, moved)
        };
        tracing::info!(group = %self.group, streams = ?holds.ours, processes = holds.live, "streams taken");
        self.tell();
        let stop_reading = CancellationToken::new();
        let reader = tokio::spawn(reader::read(Arc::clone(self), generation, stop_reading.clone()));
        let kept = self.watch(&holds.ours, &mut renewed).await;
        moved.cancel();
        self.wait_for_readers(&mut renewed).await;
        stop_reading.cancel();
        self.room.notify_one();
        // What it has asked for is answered first: later it could be given entries that nobody waits for.
        let _ = reader.await;
        self.flush().await;
        let broken = self.state.lock().broken.take();
        let ended = self.state.lock().session.take();
        drop(ended);
        self.tell();
        let ours = match kept {
            Ok(keep) => holds.ours.into_iter().skip(keep).collect(),
            Err(_) => holds.ours,
        };
        if !ours.is_empty() && !self.stop.is_cancelled() {
            // If it cannot be told, the holds end by themselves.
            let _ = self.release(&ours, false).await;
        }
        kept?;
        broken.map_or(Ok(()), Err)
    }

    /// Watches over a session; ends with how many of its streams stay.
    async fn watch(&self, ours: &[u16], renewed: &mut Instant) -> Result<usize, LogError> {
        let mut look = tokio::time::interval(RENEW);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        look.tick().await;
        loop {
            tokio::select! {
                _ = look.tick() => {}
                () = self.work.notified() => {
                    if self.stop.is_cancelled() { return Ok(ours.len()) }
                    if let Some(broken) = self.state.lock().broken.clone() { return Err(broken) }
                    let waits = self.state.lock().session.as_ref().is_some_and(Session::has_acks);
                    if waits {
                        tokio::time::sleep(GATHER).await;
                        timeout_at(*renewed + SURE, self.flush()).await.map_err(|_| self.silent())?;
                    }
                    continue;
                }
                () = self.stop.cancelled() => return Ok(ours.len()),
            }
            let asked = Instant::now();
            // A server that says nothing may have given the streams to another by then.
            let held = timeout_at(*renewed + SURE, self.hold(false, false)).await;
            match held.map_err(|_| self.silent())? {
                Ok(holds) => {
                    if holds.ours != ours {
                        let why = "others took them, or the server has lost what it knew".into();
                        let act = format!("keep the streams of group {}", self.group).into();
                        return Err(LogError::Storage { act, cause: why });
                    }
                    *renewed = asked;
                    let fair = holds.fair(self.names.streams);
                    if ours.len() > fair {
                        return Ok(fair);
                    }
                    if ours.len() < fair && holds.free {
                        return Ok(ours.len());
                    }
                    let waits = self.state.lock().session.as_ref().is_some_and(Session::has_acks);
                    if waits {
                        timeout_at(*renewed + SURE, self.flush()).await.map_err(|_| self.silent())?;
                    }
                }
                Err(failed) => {
                    self.state.lock().trouble = Some(Arc::clone(failed.why()));
                    if renewed.elapsed() > SURE {
                        return Err(self.storage("keep the streams", &failed));
                    }
                }
            }
        }
    }

    fn silent(&self) -> LogError {
        let act = format!("keep the streams of group {}", self.group).into();
        LogError::Storage { act, cause: format!("{}: no answer in time", self.link.shown()).into() }
    }

    /// Waits, with a bound, until nobody reads the session any more.
    async fn wait_for_readers(&self, renewed: &mut Instant) {
        let deadline = Instant::now() + LEAVE;
        loop {
            let read = self.state.lock().session.as_ref().is_some_and(|session| session.reader.is_some());
            if !read || renewed.elapsed() > LEASE || self.stop.is_cancelled() {
                return;
            }
            if Instant::now() > deadline {
                tracing::warn!(group = %self.group, "what was under way did not end in time; it is sent again by who has the streams now");
                return;
            }
            let asked = Instant::now();
            if self.hold(false, false).await.is_ok() {
                *renewed = asked;
            }
            self.flush().await;
            let _ = tokio::time::timeout(RENEW, self.work.notified()).await;
        }
    }

    /// Tells the server what has ended. What it does not hear stays for the next time.
    async fn flush(&self) {
        let acks = self.state.lock().session.as_mut().map(Session::take_acks).unwrap_or_default();
        let mut left: Vec<Ack> = Vec::new();
        for ack in acks {
            if !left.is_empty() {
                left.push(ack);
                continue;
            }
            let (part, ids, set) = &ack;
            let call = Call::new(&ACK)
                .key(self.names.lease(&self.group, *part))
                .key(self.names.stream(*part))
                .arg(format!("{}#", self.instance))
                .arg(self.group.as_str())
                .arg(set.map(|set| format!("0-{set}")).unwrap_or_default())
                .args(ids.iter().map(|id| format!("0-{id}")));
            match self.link.script(&call, false).await {
                Ok(Value::Int(1)) => {
                    if let Some((set, session)) = set.zip(self.state.lock().session.as_mut()) {
                        session.was_set(*part, set);
                    }
                }
                Ok(_) => {
                    tracing::warn!(
                        group = %self.group, stream = part,
                        "the hold had ended before the last progress was stored; it is made again"
                    );
                }
                Err(failed) => {
                    tracing::debug!(group = %self.group, why = %failed.why(), "progress could not be stored yet");
                    left.push(ack);
                }
            }
        }
        if !left.is_empty()
            && let Some(session) = self.state.lock().session.as_mut()
        {
            session.put_back(left);
        }
    }
}

/// A group on one stream.
pub(super) struct Group {
    made: bool,
    given: u64,
    cursor: u64,
    end: u64,
    /// Entries that are pending for other consumers than ours.
    others: u64,
}

/// Makes a group if there is none.
pub(super) async fn begin_group(
    link: &Link,
    names: &Names,
    group: &str,
    part: u16,
    begin: &Begin,
) -> Result<Group, Failed> {
    let from = match begin {
        Begin::Earliest => "0".to_owned(),
        // No file of streams names a time.
        Begin::Latest | Begin::Time(_) => "$".to_owned(),
        Begin::Place(place) => names::in_place(place, part).to_string(),
    };
    let call = Call::new(&BEGIN).key(names.stream(part)).arg(group).arg(from);
    let answer = link.script(&call, true).await?;
    let wrong =
        |what: String| Failed::Refused(format!("{}: stream {}: {what}", link.shown(), names.stream(part)).into());
    let (made, given, pending, end, others): (u8, String, String, String, u64) =
        redis::from_redis_value(answer).map_err(|error| wrong(error.to_string()))?;
    let number = |id: &str| names::offset(id).ok_or_else(|| wrong("it holds entries of another program".to_owned()));
    let given = number(&given)?;
    let cursor = if pending.is_empty() { given } else { number(&pending)?.saturating_sub(1) };
    Ok(Group { made: made == 1, given, cursor, end: number(&end)?, others })
}

impl Member {
    /// Takes part in a group; the server is reached when it can be.
    pub(super) fn join(
        link: Arc<Link>,
        names: Names,
        group: &str,
        instance: &str,
        ends: Arc<Ends>,
        begin: Begin,
    ) -> Self {
        let shared = Arc::new(Shared {
            link,
            names,
            group: group.to_owned(),
            instance: instance.to_owned(),
            ends,
            state: Mutex::new(State {
                session: None,
                begin,
                failed: None,
                broken: None,
                generations: 0,
                token: 0,
                known: BTreeSet::new(),
                trouble: None,
            }),
            holding: tokio::sync::Mutex::default(),
            work: Notify::new(),
            room: Notify::new(),
            news: Notify::new(),
            stop: CancellationToken::new(),
        });
        let keeper = tokio::spawn(Arc::clone(&shared).keep());
        Self { shared, keeper: Mutex::new(Some(keeper)) }
    }

    /// Takes the streams that are ours; waits for them. An earlier reader is given nothing more.
    pub(super) async fn open(&self, begin: Begin) -> Result<Opened, LogError> {
        let shared = &self.shared;
        let deadline = Instant::now() + JOIN;
        loop {
            let news = shared.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            {
                let mut state = shared.state.lock();
                if shared.stop.is_cancelled() {
                    return Err(LogError::Closed("the group was left".into()));
                }
                state.begin = begin.clone();
                if let Some(session) = state.session.as_mut().filter(|session| !session.moved.is_cancelled()) {
                    let reader = session.begin_reading();
                    let opened = Opened {
                        cursor: session.frontier.clone(),
                        given: Some(session.given()),
                        parts: Some(session.parts()),
                        fresh: Vec::new(),
                        pause: None,
                        moved: session.moved.clone(),
                        subscription: Box::new(Parts {
                            shared: Arc::clone(shared),
                            generation: session.generation,
                            reader,
                        }),
                    };
                    drop(state);
                    shared.room.notify_one();
                    // An earlier one hears that it is over.
                    shared.news.notify_waiters();
                    return Ok(opened);
                }
                if let Some(failed) = state.failed.take() {
                    return Err(failed);
                }
            }
            if tokio::time::timeout_at(deadline, news).await.is_err() {
                let cause = self.trouble().unwrap_or_else(|| "the server gave no answer".into());
                let act = format!("take hold of the streams of group {}", shared.group);
                return Err(LogError::Storage { act: act.into(), cause });
            }
        }
    }

    pub(super) fn progress(&self, frontier: &Reach, ended: &[Position]) {
        let tell = self.shared.state.lock().session.as_mut().is_some_and(|session| session.progress(frontier, ended));
        if tell {
            self.shared.work.notify_one();
        }
    }

    /// How far it is behind; `size` is about what an entry takes that was not read.
    pub(super) fn lag(&self, size: u64) -> Lag {
        let state = self.shared.state.lock();
        let Some(session) = &state.session else { return Lag::default() };
        let unread = session.unread(|part| self.shared.ends.of(part));
        let (open, bytes, oldest): (u64, u64, Option<Timestamp>) = session.unfinished();
        let waiting = session.reads().filter_map(|(part, read)| self.shared.ends.first_after(part, read)).min();
        let oldest = oldest.into_iter().chain(waiting).min();
        Lag { records: open + unread, bytes: bytes + unread * size, oldest, cursor: session.frontier.clone() }
    }

    pub(super) fn trouble(&self) -> Option<Arc<str>> {
        self.shared.state.lock().trouble.clone()
    }

    /// Stores what has ended and lets go.
    pub(super) async fn leave(&self) {
        self.shared.stop.cancel();
        self.shared.tell();
        let keeper = self.keeper.lock().take();
        if let Some(keeper) = keeper {
            // One that panicked has left too, by the end of its hold.
            let _ = keeper.await;
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.shared.tell();
    }
}

/// The reader of a session.
struct Parts {
    shared: Arc<Shared>,
    generation: u64,
    reader: u64,
}

impl Subscription for Parts {
    fn next(&mut self, max_records: usize, max_bytes: usize) -> BoxFuture<'_, Result<Vec<Entry>, LogError>> {
        async move {
            loop {
                let news = self.shared.news.notified();
                tokio::pin!(news);
                news.as_mut().enable();
                {
                    let mut state = self.shared.state.lock();
                    if self.shared.stop.is_cancelled() {
                        return Err(LogError::Closed("the group was left".into()));
                    }
                    let mine = |session: &&mut Session| {
                        session.generation == self.generation
                            && session.reader == Some(self.reader)
                            && !session.moved.is_cancelled()
                    };
                    // Of a hold that has ended nothing comes any more; `moved` says so.
                    let entries =
                        state.session.as_mut().filter(mine).map(|session| session.take(max_records, max_bytes));
                    if let Some(entries) = entries.filter(|entries| !entries.is_empty()) {
                        drop(state);
                        self.shared.room.notify_one();
                        return Ok(entries);
                    }
                }
                news.await;
            }
        }
        .boxed()
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        let session = state.session.as_mut().filter(|session| session.generation == self.generation);
        if let Some(session) = session.filter(|session| session.reader == Some(self.reader)) {
            session.reader = None;
        }
        drop(state);
        self.shared.work.notify_one();
    }
}
