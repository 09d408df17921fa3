//! `shelf: postgres` — what waits, in a PostgreSQL database that every process of a namespace reaches.

mod branch;
mod counts;
mod database;
mod dead;
mod ends;
mod keys;
mod parked;
mod rows;
mod schema;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use self::database::{Database, News};
use super::foreign::open::{Context, SpecFault};
use super::foreign::store::{Claim, Claimed, Parking, Releasing, Store, StoredBranch, StoredEpoch, StoredRecord};
use super::{
    AsideLane, AsideRow, BranchName, DeadLetter, DeadQuery, LogError, Page, ParkedQuery, ParkedRow, Reach, Replayed,
    Scheduled, Settlement, ShelfCounts,
};
use crate::clock::{Clock, Timestamp};
use crate::connection::postgres;
use crate::connection::probe::{Probed, skew};
use crate::record::RecordId;
use crate::units::Span;

/// `source.shelf.postgres:` — tables in a schema of its own, made at the first start.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PostgresShelfSpec {
    /// `postgres://user:password@host:5432/database`; with `?sslmode=require` only over TLS, where certificate and host name are
    /// checked as by `verify-full` (which means the same); with `disable` never over TLS; without, over TLS where the server
    /// offers it, checked the same.
    pub url: Option<String>,
    /// The schema of its tables. Default: walflow.
    pub schema: Option<String>,
    /// Certificates, in PEM, of those who may vouch for the server. Default: the system's.
    pub ca_file: Option<String>,
    /// Longest wait for an answer. Default: 10s.
    pub timeout: Option<Span>,
    /// Connections at most, over all namespaces that name this database. Default: 4.
    pub connections: Option<u16>,
}

impl fmt::Debug for PostgresShelfSpec {
    /// Shows what is no secret: of the address host, port and database.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.url.as_deref().map(postgres::place);
        f.debug_struct("PostgresShelfSpec")
            .field("url", &shown)
            .field("schema", &self.schema)
            .field("ca_file", &self.ca_file)
            .field("timeout", &self.timeout)
            .field("connections", &self.connections)
            .finish()
    }
}

impl PostgresShelfSpec {
    fn schema(&self) -> &str {
        self.schema.as_deref().unwrap_or("walflow")
    }

    fn timeout(&self) -> Duration {
        self.timeout.map_or(Duration::from_secs(10), |span| span.0)
    }

    fn connections(&self) -> usize {
        usize::from(self.connections.unwrap_or(4)).max(1)
    }
}

/// Where it is, for the plan; no secret.
pub fn shown(spec: &PostgresShelfSpec) -> String {
    let url = spec.url.as_deref().unwrap_or_default();
    format!("PostgreSQL {}, schema {}", postgres::place(url), spec.schema())
}

/// What cannot work in a `postgres:` shelf.
pub fn check(spec: &PostgresShelfSpec) -> Vec<SpecFault> {
    let mut faults = Vec::new();
    let help = "postgres://user:password@127.0.0.1:5432/database, for example";
    match &spec.url {
        None => faults.push(SpecFault::new("/url", "there is no URL", help)),
        Some(url) => {
            if let Err(why) = postgres::check(url) {
                faults.push(SpecFault::new("/url", why, help));
            }
        }
    }
    if spec.schema.as_ref().is_some_and(|schema| schema.is_empty() || schema.len() > 40 || schema.contains('\0')) {
        faults.push(SpecFault::new("/schema", "a schema's name has 1 to 40 characters", "walflow, for example"));
    }
    if spec.timeout.is_some_and(|span| span.0 < Duration::from_millis(100)) {
        faults.push(SpecFault::new("/timeout", "nothing can be done in so little time", "10s, for example"));
    }
    faults
}

/// Looks whether the database can be used; makes nothing there.
pub async fn probe(spec: &PostgresShelfSpec, clock: &Clock) -> Probed {
    let what = shown(spec);
    let url = spec.url.as_deref().unwrap_or_default();
    let look = async {
        let address = postgres::Address::new(url, spec.ca_file.as_deref(), spec.timeout())?;
        let (client, connection) = address.connect().await.map_err(|error| postgres::explain(&error))?;
        // It ends with the client.
        tokio::spawn(connection);
        let row = client
            .query_one(
                "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint, to_regnamespace($1) IS NOT NULL,
                   has_database_privilege(current_database(), 'CREATE'), pg_is_in_recovery()",
                &[&format!("\"{}\"", spec.schema())],
            )
            .await
            .map_err(|error| postgres::explain(&error))?;
        let read = || -> Result<(i64, bool, bool, bool), tokio_postgres::Error> {
            Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?))
        };
        let (at, there, may_make, standby) = read().map_err(|error| postgres::explain(&error))?;
        if standby {
            return Err("it is a standby and takes no writes: name the primary".to_owned());
        }
        if !there && !may_make {
            return Err(format!(
                "the schema is not there and this user may not make it; somebody with the right runs: CREATE SCHEMA \"{}\" AUTHORIZATION \"{}\"",
                spec.schema(),
                address.user()
            ));
        }
        let tables = if there { "its schema is there" } else { "its schema will be made" };
        Ok(format!("{tables}; {}", skew(clock.now(), Timestamp::from_millis(at))))
    };
    Probed::of(what, look.await)
}

/// Connects, makes the tables if they are not there, and reads what must be known at once.
///
/// # Errors
/// When the server cannot be reached, refuses, or its tables are of a later version.
pub async fn open(spec: &PostgresShelfSpec, context: &Context) -> Result<Arc<dyn Store>, LogError> {
    let database = Database::of(spec)?;
    let namespace = context.namespace.as_str().to_owned();
    let shelf = Arc::new(Inner {
        news: database.news(&namespace),
        database,
        namespace,
        clock: context.clock.clone(),
        key_window: context.key_window,
        holder: format!("{}/{:016x}", std::process::id(), fastrand::u64(..)),
        branches: Mutex::default(),
        epochs: Mutex::default(),
        end: Mutex::default(),
        counts: Mutex::default(),
        replays: Mutex::default(),
        closed: CancellationToken::new(),
    });
    shelf.database.in_time(shelf.refresh()).await?;
    shelf.database.in_time(shelf.read_end()).await?;
    shelf.database.in_time(shelf.count()).await?;
    tokio::spawn(counts::keep(Arc::downgrade(&shelf)));
    Ok(Arc::new(PostgresShelf(shelf)))
}

/// A namespace's shelf.
struct PostgresShelf(Arc<Inner>);

struct Inner {
    database: Arc<Database>,
    namespace: String,
    clock: Clock,
    key_window: Duration,
    /// Tells this mover from others.
    holder: String,
    news: Arc<News>,
    branches: Mutex<BTreeSet<BranchName>>,
    epochs: Mutex<Vec<StoredEpoch>>,
    /// How far the log had come when this was opened.
    end: Mutex<Reach>,
    counts: Mutex<ShelfCounts>,
    /// Up to which replay each branch has been told.
    replays: Mutex<BTreeMap<BranchName, i64>>,
    closed: CancellationToken,
}

/// Why a closed shelf refuses.
const CLOSED: &str = "the shelf is closed";

impl Inner {
    fn still_open(&self) -> Result<(), LogError> {
        if self.closed.is_cancelled() { Err(LogError::Closed(CLOSED.into())) } else { Ok(()) }
    }

    /// A statement with the schema's name in it.
    fn sql(&self, text: &str) -> String {
        text.replace("{s}", &self.database.schema)
    }
}

impl PostgresShelf {
    fn run<T: Send + 'static, F: Future<Output = Result<T, LogError>> + Send + 'static>(
        &self,
        verb: impl FnOnce(Arc<Inner>) -> F,
    ) -> BoxFuture<'static, Result<T, LogError>> {
        let inner = Arc::clone(&self.0);
        if let Err(closed) = inner.still_open() {
            return std::future::ready(Err(closed)).boxed();
        }
        let done = verb(Arc::clone(&inner));
        async move { inner.database.in_time(done).await }.boxed()
    }
}

impl Store for PostgresShelf {
    fn note(&self) -> String {
        self.0.database.shown()
    }

    fn claim(&self, claims: Vec<Claim>, abandoned: Timestamp) -> BoxFuture<'static, Result<Vec<Claimed>, LogError>> {
        self.run(|inner| async move { inner.claim(&claims, abandoned).await })
    }

    fn confirm(&self, ids: Vec<(Box<str>, RecordId)>) -> BoxFuture<'static, Result<(), LogError>> {
        self.run(|inner| async move { inner.confirm(&ids).await })
    }

    fn give_up(&self, ids: Vec<(Box<str>, RecordId)>) -> BoxFuture<'static, Result<(), LogError>> {
        self.run(|inner| async move { inner.give_up(&ids).await })
    }

    fn park(&self, rows: Vec<Parking>) -> BoxFuture<'static, Result<Vec<Claimed>, LogError>> {
        self.run(|inner| async move { inner.park(&rows).await })
    }

    fn lead(&self, until: Timestamp) -> BoxFuture<'static, Result<bool, LogError>> {
        self.run(move |inner| async move { inner.lead(until).await })
    }

    fn resign(&self) -> BoxFuture<'static, Result<(), LogError>> {
        let inner = Arc::clone(&self.0);
        async move { inner.database.in_time(inner.resign()).await }.boxed()
    }

    fn next_due(&self) -> BoxFuture<'static, Result<Option<Timestamp>, LogError>> {
        self.run(|inner| async move { inner.next_due().await })
    }

    fn parked_news(&self) -> BoxFuture<'static, ()> {
        let news = Arc::clone(&self.0.news);
        async move { news.parked.notified().await }.boxed()
    }

    fn take_due(
        &self,
        now: Timestamp,
        limit: usize,
        place: Arc<str>,
    ) -> BoxFuture<'static, Result<Vec<Releasing>, LogError>> {
        self.run(move |inner| async move { inner.take_due(now, limit, place).await })
    }

    fn marked(&self, limit: usize) -> BoxFuture<'static, Result<Vec<Releasing>, LogError>> {
        self.run(move |inner| async move { inner.marked(limit).await })
    }

    fn released(&self, ids: Vec<RecordId>) -> BoxFuture<'static, Result<(), LogError>> {
        self.run(|inner| async move { inner.released(&ids).await })
    }

    fn open_branch(
        &self,
        branch: &BranchName,
        cursor: &Reach,
        instance: &str,
    ) -> BoxFuture<'static, Result<StoredBranch, LogError>> {
        let (branch, cursor, instance) = (branch.clone(), cursor.clone(), instance.to_owned());
        self.run(move |inner| async move { inner.open_branch(&branch, &cursor, &instance).await })
    }

    fn leave_branch(&self, branch: &BranchName, instance: &str) -> BoxFuture<'static, Result<(), LogError>> {
        let (branch, instance) = (branch.clone(), instance.to_owned());
        self.run(move |inner| async move { inner.leave_branch(&branch, &instance).await })
    }

    fn branches(&self) -> Vec<BranchName> {
        self.0.branches.lock().iter().cloned().collect()
    }

    fn forget_branch(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let branch = branch.clone();
        self.run(move |inner| async move { inner.forget_branch(&branch).await })
    }

    fn rename_branch(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        let (from, to) = (from.clone(), to.clone());
        self.run(move |inner| async move { inner.rename_branch(&from, &to).await })
    }

    fn put_epoch(&self, files: Bytes, place: Arc<str>) -> BoxFuture<'static, Result<StoredEpoch, LogError>> {
        self.run(move |inner| async move { inner.put_epoch(files, place).await })
    }

    fn epochs(&self) -> Vec<StoredEpoch> {
        self.0.epochs.lock().clone()
    }

    fn refresh(&self) -> BoxFuture<'static, Result<(), LogError>> {
        self.run(|inner| async move { inner.refresh().await })
    }

    fn keep_end(&self, end: Reach) -> BoxFuture<'static, Result<(), LogError>> {
        self.run(move |inner| async move { inner.keep_end(&end).await })
    }

    fn kept_end(&self) -> Reach {
        self.0.end.lock().clone()
    }

    fn tidy(
        &self,
        keys_before: Timestamp,
        cursors: Vec<(BranchName, Reach)>,
    ) -> BoxFuture<'static, Result<(), LogError>> {
        self.run(move |inner| async move { inner.tidy(keys_before, &cursors).await })
    }

    fn settle(&self, branch: &BranchName, settlements: Vec<Settlement>) -> BoxFuture<'static, Result<(), LogError>> {
        let branch = branch.clone();
        self.run(move |inner| async move { inner.settle(&branch, settlements).await })
    }

    fn aside_rows(
        &self,
        branch: &BranchName,
        lane: &str,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<AsideRow>, LogError>> {
        let (branch, lane) = (branch.clone(), lane.to_owned());
        self.run(move |inner| async move { inner.aside_rows(&branch, &lane, limit).await })
    }

    fn replayed_lanes(&self, branch: &BranchName) -> BoxFuture<'static, Vec<AsideLane>> {
        let (inner, branch) = (Arc::clone(&self.0), branch.clone());
        async move { inner.wait_for_replays(&branch).await }.boxed()
    }

    fn parked(&self, query: ParkedQuery) -> BoxFuture<'static, Result<Page<ParkedRow>, LogError>> {
        self.run(move |inner| async move { inner.parked_page(&query).await })
    }

    fn cancel(&self, which: Scheduled) -> BoxFuture<'static, Result<u64, LogError>> {
        self.run(move |inner| async move { inner.cancel(&which).await })
    }

    fn reschedule(&self, which: Scheduled, due_at: Timestamp) -> BoxFuture<'static, Result<u64, LogError>> {
        self.run(move |inner| async move { inner.reschedule(&which, due_at).await })
    }

    fn dead_letters(&self, query: DeadQuery) -> BoxFuture<'static, Result<Page<DeadLetter>, LogError>> {
        self.run(move |inner| async move { inner.dead_page(&query).await })
    }

    fn replay(&self, query: DeadQuery, force: bool) -> BoxFuture<'static, Result<Replayed, LogError>> {
        self.run(move |inner| async move { inner.replay(&query, force).await })
    }

    fn purge(&self, query: DeadQuery) -> BoxFuture<'static, Result<u64, LogError>> {
        self.run(move |inner| async move { inner.purge(&query).await })
    }

    fn find(&self, id: RecordId) -> BoxFuture<'static, Result<Option<StoredRecord>, LogError>> {
        self.run(move |inner| async move { inner.find(id).await })
    }

    fn counts(&self) -> ShelfCounts {
        self.0.counts.lock().clone()
    }

    fn delete(&self) -> BoxFuture<'static, Result<(), LogError>> {
        self.run(|inner| async move { inner.delete().await })
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.0.closed.cancel();
        std::future::ready(()).boxed()
    }
}
