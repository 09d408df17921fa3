//! A shelf in Redis: what waits by its time, what is set aside by its lane, the dead by their number. Each verb is one script,
//! so it is done whole or not at all; what it wrote is on the server's disk when it answers.

mod dead;
mod ends;
mod parked;
mod rows;
mod scripts;
mod settle;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::{BoxFuture, ready};
use parking_lot::Mutex;
use redis::{FromRedisValue, Value};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use self::scripts::{CLAIM, CONFIRM, COUNTS, EPOCH, FORGET, LEAVE, OPEN, REFRESH, RENAME, TIDY};
use super::link::{Call, Failed, Link, Text};
use super::spec::{Durability, RedisShelfSpec};
use super::{known, names};
use crate::clock::Timestamp;
use crate::record::{Position, RecordId};
use crate::source::foreign::open::Context;
use crate::source::foreign::store::{
    Claim, Claimed, Parking, Releasing, Store, StoredBranch, StoredEpoch, StoredRecord,
};
use crate::source::{
    AsideLane, AsideRow, BranchName, DeadLetter, DeadQuery, IdempotencyKey, LogError, Page, ParkedQuery, ParkedRow,
    Reach, Replayed, Scheduled, Settlement, ShelfCounts,
};

/// How often it is looked what other processes did.
const LOOK: Duration = Duration::from_secs(1);
/// Rows in one script at most.
const ROWS: usize = 500;

/// What is known here of the server's state.
#[derive(Clone, Default)]
struct Seen {
    /// How far the log had come when this was opened.
    end: Reach,
    epochs: Vec<StoredEpoch>,
    /// Each branch with its number.
    branches: BTreeMap<BranchName, String>,
    counts: ShelfCounts,
    /// How often something was parked, moved or released.
    parked: String,
    /// The number of the newest replay.
    news: String,
    /// By branch number: lanes that rows were sent back to.
    replayed: HashMap<String, BTreeSet<Box<str>>>,
}

/// The shelf of one namespace.
struct Shelf {
    this: Weak<Self>,
    link: Link,
    root: String,
    /// What idempotency keys begin with: the log's own, if it is in the same Redis.
    keys: names::Names,
    context: Context,
    instance: String,
    seen: Mutex<Seen>,
    /// For whoever waits for what is parked.
    parked: watch::Sender<u64>,
    /// For whoever waits for what is replayed.
    replayed: Notify,
    /// For the task that looks.
    changed: Notify,
    closed: CancellationToken,
}

/// Opens the shelf of a namespace and reads what it needs.
///
/// # Errors
/// When the settings cannot work, or the server cannot be reached or is refused.
pub async fn open(spec: &RedisShelfSpec, context: &Context) -> Result<Arc<dyn Store>, LogError> {
    let wrong =
        |why: String| LogError::Storage { act: "make a client for the shelf in Redis".into(), cause: why.into() };
    let address = spec.address().map_err(|fault| wrong(fault.message))?;
    let strict = spec.durability == Durability::Strict || context.strict;
    let prefix = spec.prefix.as_deref();
    let shelf = Arc::new_cyclic(|this: &Weak<Shelf>| Shelf {
        this: this.clone(),
        link: Link::new(address, spec.timeout(), strict),
        root: format!("{}:shelf", names::root(prefix, &context.namespace)),
        keys: names::Names::new(prefix, &context.namespace, 1),
        context: context.clone(),
        instance: format!("{}-{:016x}", std::process::id(), fastrand::u64(..)),
        seen: Mutex::default(),
        parked: watch::Sender::new(0),
        replayed: Notify::new(),
        changed: Notify::new(),
        closed: CancellationToken::new(),
    });
    shelf.refresh_all().await?;
    let end = shelf.further(&Reach::none()).await?;
    shelf.seen.lock().end = end;
    shelf.look().await?;
    tokio::spawn(look_on(Arc::downgrade(&shelf), shelf.closed.clone()));
    Ok(shelf)
}

/// Looks each second, and whenever something was changed here.
async fn look_on(shelf: Weak<Shelf>, closed: CancellationToken) {
    let mut failing = false;
    loop {
        let Some(strong) = shelf.upgrade() else { return };
        let looked = strong.look().await;
        if let Err(error) = &looked
            && !failing
        {
            tracing::warn!(shelf = %strong.note(), %error, "what other processes did could not be looked at, trying again");
        }
        failing = looked.is_err();
        let wait = async { if failing { std::future::pending().await } else { strong.changed.notified().await } };
        tokio::select! {
            () = wait => {}
            () = tokio::time::sleep(LOOK) => {}
            () = closed.cancelled() => return,
        }
    }
}

fn time(text: &str) -> Option<Timestamp> {
    // A score comes as a floating number.
    text.parse::<f64>().ok().map(|millis| {
        #[expect(clippy::cast_possible_truncation, reason = "times are below 2^53")]
        Timestamp::from_millis(millis as i64)
    })
}

fn id_of(bytes: &[u8]) -> Result<RecordId, LogError> {
    bytes.try_into().map(RecordId::from_bytes).map_err(|_| rows::damaged("an id"))
}

impl Shelf {
    fn call(&self, script: &'static Text) -> Call {
        Call::new(script).key(self.root.as_str())
    }

    async fn ask<T: FromRedisValue>(&self, act: &'static str, call: Call, durable: bool) -> Result<T, LogError> {
        let failed = |failed: Failed| failed.storage(format!("{act} on the shelf"));
        let answer = self.link.script(&call, durable).await.map_err(failed)?;
        redis::from_redis_value(answer).map_err(|error| LogError::Storage {
            act: format!("{act} on the shelf").into(),
            cause: format!("{}: {error}", self.link.shown()).into(),
        })
    }

    fn with<T, F>(&self, call: impl FnOnce(Arc<Self>) -> F) -> BoxFuture<'static, Result<T, LogError>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, LogError>> + Send + 'static,
    {
        match self.this.upgrade() {
            Some(this) => call(this).boxed(),
            None => ready(Err(LogError::Closed("the shelf was dropped".into()))).boxed(),
        }
    }

    /// What a verb changed is to be seen in the counts.
    fn told(&self) {
        self.changed.notify_one();
    }

    async fn look(&self) -> Result<(), LogError> {
        type Branch = (String, String, u64, u64, u64);
        let known = self.seen.lock().news.clone();
        let call = self.call(&COUNTS).arg(known);
        let (waiting, parked, news, replayed, branches): (u64, String, String, Vec<String>, Vec<Branch>) =
            self.ask("count", call, false).await?;
        let mut seen = self.seen.lock();
        let name = |name: &String| BranchName::from_stored(name);
        seen.counts = ShelfCounts {
            parked: waiting,
            aside: branches.iter().map(|(branch, _, aside, ..)| (name(branch), *aside)).collect(),
            dead: branches.iter().map(|(branch, _, _, dead, bytes)| (name(branch), *dead, *bytes)).collect(),
            keys_since: None,
            overflowed: 0,
        };
        seen.branches = branches.iter().map(|(branch, number, ..)| (name(branch), number.clone())).collect();
        seen.news = news;
        let any = !replayed.is_empty();
        for told in replayed {
            let mut fields = told.splitn(3, ':');
            if let (Some(_), Some(number), Some(lane)) = (fields.next(), fields.next(), fields.next()) {
                seen.replayed.entry(number.to_owned()).or_default().insert(lane.into());
            }
        }
        let moved = std::mem::replace(&mut seen.parked, parked.clone()) != parked;
        drop(seen);
        if moved {
            self.parked.send_modify(|count| *count += 1);
        }
        if any {
            self.replayed.notify_waiters();
        }
        Ok(())
    }

    async fn refresh_all(&self) -> Result<(), LogError> {
        type Read = (Vec<(String, String)>, Vec<(u32, Vec<u8>)>, HashMap<u32, String>);
        let (branches, files, mut places): Read =
            self.ask("read branches and revisions", self.call(&REFRESH), false).await?;
        let mut epochs: Vec<StoredEpoch> = files
            .into_iter()
            .map(|(number, files)| StoredEpoch {
                number,
                place: places.remove(&number).unwrap_or_default().into(),
                files: files.into(),
            })
            .collect();
        epochs.sort_by_key(|epoch| epoch.number);
        let mut seen = self.seen.lock();
        seen.epochs = epochs;
        seen.branches = branches.into_iter().map(|(name, number)| (BranchName::from_stored(&name), number)).collect();
        Ok(())
    }

    fn key(&self, key: &IdempotencyKey) -> String {
        self.keys.key(&key.key)
    }

    fn window(&self) -> u128 {
        self.context.key_window.as_millis()
    }

    fn claimed(answer: Vec<Value>) -> Result<Claimed, LogError> {
        let wrong = || rows::damaged("an idempotency key");
        let mut fields = answer.into_iter();
        let mut text =
            || fields.next().and_then(|value| redis::from_redis_value::<Option<Vec<u8>>>(value).ok().flatten());
        let millis = |bytes: Vec<u8>| {
            let text = String::from_utf8(bytes).ok()?;
            Some(Timestamp::from_millis(text.parse().ok()?))
        };
        match text().ok_or_else(wrong)?.as_slice() {
            b"running" => Ok(Claimed::Running),
            b"fresh" => Ok(Claimed::Fresh {
                id: id_of(&text().ok_or_else(wrong)?)?,
                written_at: text().and_then(millis).ok_or_else(wrong)?,
            }),
            _ => Ok(Claimed::Known {
                fingerprint: text().and_then(|bytes| bytes.try_into().ok()).ok_or_else(wrong)?,
                id: id_of(&text().ok_or_else(wrong)?)?,
                written_at: text().and_then(millis).ok_or_else(wrong)?,
                due_at: text().and_then(millis),
            }),
        }
    }

    /// Confirms claims, or gives them up.
    fn decide(&self, ids: Vec<(Box<str>, RecordId)>, state: &'static str) -> BoxFuture<'static, Result<(), LogError>> {
        self.with(|shelf| async move {
            for ids in ids.chunks(ROWS) {
                let call = shelf
                    .call(&CONFIRM)
                    .keys(ids.iter().map(|(key, _)| shelf.keys.key(key)))
                    .arg(state)
                    .args(ids.iter().map(|(_, id)| id.as_bytes().to_vec()));
                shelf.ask::<Value>("confirm idempotency keys", call, true).await?;
            }
            Ok(())
        })
    }

    /// Deletes all keys that begin so.
    async fn delete_all(&self, beginning: &str) -> Result<(), LogError> {
        let failed = |failed: Failed| failed.storage("delete the shelf");
        let escaped: String =
            beginning.chars().flat_map(|c| if "*?[]\\".contains(c) { vec!['\\', c] } else { vec![c] }).collect();
        let mut cursor = 0u64;
        loop {
            let open = self.link.open().await.map_err(failed)?;
            let mut pipeline = redis::Pipeline::new();
            pipeline.cmd("SCAN").arg(cursor).arg("MATCH").arg(format!("{escaped}*")).arg("COUNT").arg(1_000);
            let answer = self.link.run(&open, &mut pipeline).await.map_err(failed)?.into_iter().next();
            let answer = self.link.answer(answer.unwrap_or(Ok(Value::Nil))).map_err(failed)?;
            let (next, found): (u64, Vec<Vec<u8>>) =
                redis::from_redis_value(answer).map_err(|_| rows::damaged("a list of keys"))?;
            if !found.is_empty() {
                let mut pipeline = redis::Pipeline::new();
                pipeline.cmd("UNLINK").arg(found);
                for answer in self.link.run(&open, &mut pipeline).await.map_err(failed)? {
                    self.link.answer(answer).map_err(failed)?;
                }
            }
            if next == 0 {
                return Ok(());
            }
            cursor = next;
        }
    }
}

impl Store for Shelf {
    fn note(&self) -> String {
        let facts = self.link.facts();
        let note = facts.as_ref().map_or("not reached yet", |facts| facts.note.as_str());
        let weak = facts.as_ref().and_then(|facts| facts.weak.as_ref());
        let weak = weak.map(|weak| format!("; weak: {weak}")).unwrap_or_default();
        format!("shelf in {}: {note}{weak}", self.link.shown())
    }

    fn claim(&self, claims: Vec<Claim>, abandoned: Timestamp) -> BoxFuture<'static, Result<Vec<Claimed>, LogError>> {
        self.with(|shelf| async move {
            let mut out = Vec::with_capacity(claims.len());
            for claims in claims.chunks(ROWS) {
                let now = shelf.context.clock.now();
                let mut call = shelf
                    .call(&CLAIM)
                    .keys(claims.iter().map(|claim| shelf.key(&claim.key)))
                    .number(now.as_millis())
                    .number(shelf.window())
                    .number(abandoned.as_millis());
                for Claim { record, key } in claims {
                    call = call
                        .arg(key.fingerprint)
                        .arg(*record.id.as_bytes())
                        .number(record.written_at.as_millis())
                        .number(known::keep(record.written_at, now, shelf.context.key_window));
                }
                let answers: Vec<Vec<Value>> = shelf.ask("claim idempotency keys", call, true).await?;
                for answer in answers {
                    out.push(Self::claimed(answer)?);
                }
            }
            Ok(out)
        })
    }

    fn confirm(&self, ids: Vec<(Box<str>, RecordId)>) -> BoxFuture<'static, Result<(), LogError>> {
        self.decide(ids, "k")
    }

    fn give_up(&self, ids: Vec<(Box<str>, RecordId)>) -> BoxFuture<'static, Result<(), LogError>> {
        self.decide(ids, "")
    }

    fn park(&self, rows: Vec<Parking>) -> BoxFuture<'static, Result<Vec<Claimed>, LogError>> {
        self.with(|shelf| async move { shelf.park_rows(rows).await })
    }

    fn lead(&self, until: Timestamp) -> BoxFuture<'static, Result<bool, LogError>> {
        self.with(|shelf| async move { shelf.lead_until(until).await })
    }

    fn resign(&self) -> BoxFuture<'static, Result<(), LogError>> {
        self.with(|shelf| async move { shelf.let_lead_go().await })
    }

    fn next_due(&self) -> BoxFuture<'static, Result<Option<Timestamp>, LogError>> {
        self.with(|shelf| async move { shelf.first_due().await })
    }

    fn parked_news(&self) -> BoxFuture<'static, ()> {
        let mut news = self.parked.subscribe();
        // The sender lives as long as the shelf.
        async move { _ = news.changed().await }.boxed()
    }

    fn take_due(
        &self,
        now: Timestamp,
        limit: usize,
        place: Arc<str>,
    ) -> BoxFuture<'static, Result<Vec<Releasing>, LogError>> {
        self.with(|shelf| async move { shelf.take(now, limit, place).await })
    }

    fn marked(&self, limit: usize) -> BoxFuture<'static, Result<Vec<Releasing>, LogError>> {
        self.with(|shelf| async move { shelf.all_marked(limit).await })
    }

    fn released(&self, ids: Vec<RecordId>) -> BoxFuture<'static, Result<(), LogError>> {
        self.with(|shelf| async move { shelf.are_released(ids).await })
    }

    fn open_branch(
        &self,
        branch: &BranchName,
        cursor: &Reach,
        instance: &str,
    ) -> BoxFuture<'static, Result<StoredBranch, LogError>> {
        let (branch, cursor, instance) = (branch.clone(), cursor.clone(), instance.to_owned());
        self.with(|shelf| async move {
            let mut call = shelf.call(&OPEN).arg(branch.as_str()).arg(instance);
            for position in cursor.iter() {
                call = call.number(position.part()).number(position.offset());
            }
            let (number, pause, unclean_stops, marks): (String, String, u32, Vec<(String, u32)>) =
                shelf.ask("open a branch", call, true).await?;
            shelf.seen.lock().branches.insert(branch.clone(), number.clone());
            shelf.told();
            let mark = |(text, count): (String, u32)| {
                let (part, offset) = text.split_once(':')?;
                Some((Position::in_part(part.parse().ok()?, offset.parse().ok()?), count))
            };
            let mut marks: Vec<_> = marks.into_iter().filter_map(mark).collect();
            marks.sort_unstable();
            marks.retain(|(position, _)| !cursor.covers(*position));
            let pause = match pause.as_str() {
                "" => None,
                text => Some(serde_json::from_str(text).map_err(|_| rows::damaged("a pause"))?),
            };
            let ended = shelf.ended(&number, &cursor).await?;
            Ok(StoredBranch { ended, lanes: shelf.lanes(&branch, None).await?, pause, unclean_stops, marks })
        })
    }

    fn leave_branch(&self, branch: &BranchName, instance: &str) -> BoxFuture<'static, Result<(), LogError>> {
        let call = self.call(&LEAVE).arg(branch.as_str()).arg(instance);
        self.with(|shelf| async move { shelf.ask::<Value>("leave a branch", call, true).await.map(|_| ()) })
    }

    fn branches(&self) -> Vec<BranchName> {
        self.seen.lock().branches.keys().cloned().collect()
    }

    fn forget_branch(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let branch = branch.clone();
        self.with(|shelf| async move {
            while shelf.ask::<u64>("forget a branch", shelf.call(&FORGET).arg(branch.as_str()), true).await? > 0 {}
            shelf.seen.lock().branches.remove(&branch);
            shelf.told();
            Ok(())
        })
    }

    fn rename_branch(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let call = self.call(&RENAME).arg(from.as_str()).arg(to.as_str());
        self.with(|shelf| async move {
            shelf.ask::<Value>("rename a branch", call, true).await?;
            shelf.refresh_all().await?;
            shelf.told();
            Ok(())
        })
    }

    fn put_epoch(&self, files: Bytes, place: Arc<str>) -> BoxFuture<'static, Result<StoredEpoch, LogError>> {
        self.with(|shelf| async move {
            let call = shelf.call(&EPOCH).arg(files.to_vec()).arg(&*place);
            let (number, place): (u32, String) = shelf.ask("store a revision", call, true).await?;
            shelf.refresh_all().await?;
            Ok(StoredEpoch { number, place: place.into(), files })
        })
    }

    fn epochs(&self) -> Vec<StoredEpoch> {
        self.seen.lock().epochs.clone()
    }

    fn refresh(&self) -> BoxFuture<'static, Result<(), LogError>> {
        self.with(|shelf| async move { shelf.refresh_all().await })
    }

    /// Keys go by themselves, by the server's time. Revisions stay: where one begins only the log can tell.
    fn keep_end(&self, end: Reach) -> BoxFuture<'static, Result<(), LogError>> {
        self.with(|shelf| async move { shelf.further(&end).await.map(|_| ()) })
    }

    fn kept_end(&self) -> Reach {
        self.seen.lock().end.clone()
    }

    fn tidy(
        &self,
        keys_before: Timestamp,
        cursors: Vec<(BranchName, Reach)>,
    ) -> BoxFuture<'static, Result<(), LogError>> {
        let mut call = self.call(&TIDY).number(keys_before.as_millis());
        for (branch, reach) in &cursors {
            for position in reach.iter() {
                let (first, last) = rows::up_to(position);
                call = call.arg(branch.as_str()).number(position.part()).number(position.offset()).arg(first).arg(last);
            }
        }
        self.with(|shelf| async move { shelf.ask::<Value>("tidy up", call, false).await.map(|_| ()) })
    }

    fn settle(&self, branch: &BranchName, settlements: Vec<Settlement>) -> BoxFuture<'static, Result<(), LogError>> {
        let branch = branch.clone();
        self.with(|shelf| async move { shelf.settle_all(&branch, settlements).await })
    }

    fn aside_rows(
        &self,
        branch: &BranchName,
        lane: &str,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<AsideRow>, LogError>> {
        let (branch, lane) = (branch.clone(), lane.to_owned());
        self.with(|shelf| async move { shelf.rows_of(&branch, &lane, limit).await })
    }

    fn replayed_lanes(&self, branch: &BranchName) -> BoxFuture<'static, Vec<AsideLane>> {
        let (this, branch) = (self.this.clone(), branch.clone());
        async move {
            loop {
                let Some(strong) = this.upgrade() else { return std::future::pending().await };
                let news = strong.replayed.notified();
                tokio::pin!(news);
                news.as_mut().enable();
                if let Some(lanes) = strong.sent_back(&branch).await {
                    return lanes;
                }
                tokio::select! {
                    () = news => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        }
        .boxed()
    }

    fn parked(&self, query: ParkedQuery) -> BoxFuture<'static, Result<Page<ParkedRow>, LogError>> {
        self.with(|shelf| async move { shelf.parked_page(query).await })
    }

    fn cancel(&self, which: Scheduled) -> BoxFuture<'static, Result<u64, LogError>> {
        self.with(|shelf| async move { shelf.cancel_all(which).await })
    }

    fn reschedule(&self, which: Scheduled, due_at: Timestamp) -> BoxFuture<'static, Result<u64, LogError>> {
        self.with(|shelf| async move { shelf.move_all(which, due_at).await })
    }

    fn dead_letters(&self, query: DeadQuery) -> BoxFuture<'static, Result<Page<DeadLetter>, LogError>> {
        self.with(|shelf| async move { shelf.dead_page(query).await })
    }

    fn replay(&self, query: DeadQuery, force: bool) -> BoxFuture<'static, Result<Replayed, LogError>> {
        self.with(|shelf| async move { shelf.replay_all(query, force).await })
    }

    fn purge(&self, query: DeadQuery) -> BoxFuture<'static, Result<u64, LogError>> {
        self.with(|shelf| async move { shelf.purge_all(query).await })
    }

    fn find(&self, id: RecordId) -> BoxFuture<'static, Result<Option<StoredRecord>, LogError>> {
        self.with(|shelf| async move { shelf.find_record(id).await })
    }

    fn counts(&self) -> ShelfCounts {
        self.seen.lock().counts.clone()
    }

    fn delete(&self) -> BoxFuture<'static, Result<(), LogError>> {
        self.with(|shelf| async move {
            shelf.delete_all(&format!("{}:", shelf.root)).await?;
            shelf.delete_all(&shelf.keys.key("")).await?;
            *shelf.seen.lock() = Seen::default();
            Ok(())
        })
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.closed.cancel();
        ready(()).boxed()
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}
