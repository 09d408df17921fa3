//! `postgres`: rows that are put, taken away or changed by a statement, a batch in one transaction.
//!
//! Takes operations, gives for each what the server said. The server itself converts values, from the JSON of the payload to
//! the columns' types, so that none loses a digit. A row that the server refuses is found and taken out; the others are
//! taken. Never builds a value into a statement's text.

mod copy;
mod refusal;
mod statement;
mod transaction;
mod value;
mod verdict;

use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use deadpool_postgres::{Object, Pool};
use futures::future::{BoxFuture, FutureExt};
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::copy::Tables;
use self::statement::Case;
use self::verdict::judge_pool;
use super::template::{Document, Scope};
use super::{BatchStyle, Failure, OpenError, Operation, Sink, SinkContext, SpecFault, Verdict, Written};
use crate::clock::Timestamp;
use crate::connection::postgres::{self, Address};
use crate::connection::probe::{Probed, skew};
use crate::units::Span;

/// Connections of a branch at most.
const CONNECTIONS: usize = 8;

/// `postgres:` — one operation a record: its own fields for one kind of operation, or `cases`.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PostgresSpec {
    /// `postgres://user:password@host:5432/database`; with `?sslmode=require` only over TLS, where certificate and host name are
    /// checked as by `verify-full` (which means the same); with `disable` never over TLS; without, over TLS where the server
    /// offers it, checked the same. May come from a region.
    pub url: Option<String>,
    /// Certificates, in PEM, of those who may vouch for the server. Default: the system's.
    pub ca_file: Option<String>,
    /// Longest wait for an answer. Default: 30s.
    pub timeout: Option<Span>,
    /// Puts a row, over one with the same key if there is one.
    pub upsert: Option<UpsertSpec>,
    /// Puts a new row.
    pub insert: Option<InsertSpec>,
    /// Takes a row away.
    pub delete: Option<DeleteSpec>,
    /// Runs a statement.
    pub statement: Option<StatementSpec>,
    /// Operations on one database: the first whose `when` holds is taken.
    pub cases: Vec<PostgresCaseSpec>,
    /// Remembers what was delivered, in the same transaction, so that a second delivery does nothing.
    pub barrier: Option<BarrierSpec>,
}

/// One case of `postgres.cases:` — exactly one of the operations.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PostgresCaseSpec {
    /// Taken when this is true; without it always.
    pub when: Option<String>,
    /// Puts a row, over one with the same key if there is one.
    pub upsert: Option<UpsertSpec>,
    /// Puts a new row.
    pub insert: Option<InsertSpec>,
    /// Takes a row away.
    pub delete: Option<DeleteSpec>,
    /// Runs a statement.
    pub statement: Option<StatementSpec>,
}

/// `upsert:`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UpsertSpec {
    /// The table, `schema.table` if it is not on the search path.
    pub table: String,
    /// The columns of a unique constraint, by which a row is found.
    pub key: Vec<String>,
    /// By column, what it gets. Default: the payload's own fields. The server reads each value as its own type: numbers keep all
    /// their digits, arrays are JSON arrays, a time without an offset is in the server's time zone. Bytes (`bytea`) are text in
    /// hex, `\x6869`, and no base64; a statement can decode that: `decode($1, 'base64')`.
    #[serde(default)]
    pub columns: IndexMap<String, Value>,
}

/// `insert:` — many go by COPY, if nothing is lost by it: 1,000 values or more in a row with the same columns, without `on_conflict` and
/// `barrier`, into a table without rules, row security and columns of a domain, none of the columns written a composite, an array
/// of such, or generated always. Otherwise, and to find a row that is refused, by INSERT.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InsertSpec {
    /// The table, `schema.table` if it is not on the search path.
    pub table: String,
    /// By column, what it gets. Default: the payload's own fields.
    #[serde(default)]
    pub columns: IndexMap<String, Value>,
    /// `ignore` leaves a row that is there as it is. Default: the record is refused.
    #[serde(default)]
    pub on_conflict: Option<OnConflict>,
}

/// `insert.on_conflict:`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnConflict {
    /// What is there stays.
    Ignore,
}

/// `delete:`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeleteSpec {
    /// The table, `schema.table` if it is not on the search path.
    pub table: String,
    /// The columns that all must be equal.
    pub key: Vec<String>,
    /// By column of the key, what it must equal. Default: the payload's fields of these names.
    #[serde(default)]
    pub columns: IndexMap<String, Value>,
}

/// `statement:`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StatementSpec {
    /// One statement, with `$1`, `$2` … where values go.
    pub sql: String,
    /// The values, in order; the server converts each from text. A list is an array where the parameter is one; for
    /// `jsonb` everything is JSON, elsewhere lists and maps.
    #[serde(default)]
    pub params: Vec<Value>,
}

/// `barrier:`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BarrierSpec {
    /// The table of what was delivered: `id text primary key, at timestamptz`. It is made if it is not there, and grows: delete
    /// old rows now and then. Default: walflow_seen.
    pub table: String,
}

impl Default for BarrierSpec {
    fn default() -> Self {
        Self { table: "walflow_seen".to_owned() }
    }
}

impl fmt::Debug for PostgresSpec {
    /// Shows what is no secret: of the address host, port and database.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresSpec")
            .field("url", &self.url.as_deref().map(postgres::place))
            .field("ca_file", &self.ca_file)
            .field("timeout", &self.timeout)
            .field("cases", &self.all_cases())
            .field("barrier", &self.barrier)
            .finish_non_exhaustive()
    }
}

impl PostgresSpec {
    /// The cases; the short form is one that takes everything.
    pub fn all_cases(&self) -> Vec<PostgresCaseSpec> {
        let own = PostgresCaseSpec {
            when: None,
            upsert: self.upsert.clone(),
            insert: self.insert.clone(),
            delete: self.delete.clone(),
            statement: self.statement.clone(),
        };
        if own.operations() == 0 { self.cases.clone() } else { vec![own] }
    }

    fn timeout(&self) -> Duration {
        self.timeout.map_or(Duration::from_secs(30), |span| span.0)
    }
}

impl PostgresCaseSpec {
    fn operations(&self) -> usize {
        [self.upsert.is_some(), self.insert.is_some(), self.delete.is_some(), self.statement.is_some()]
            .into_iter()
            .filter(|given| *given)
            .count()
    }
}

/// What cannot work in a `postgres:`.
pub(super) fn check(spec: &PostgresSpec) -> Vec<SpecFault> {
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
    if spec.timeout.is_some_and(|span| span.0 < Duration::from_millis(100)) {
        faults.push(SpecFault::new("/timeout", "nothing can be done in so little time", "30s, for example"));
    }
    let short = PostgresCaseSpec { when: None, ..spec.all_cases().into_iter().next().unwrap_or_default() };
    let own = spec.upsert.is_some() || spec.insert.is_some() || spec.delete.is_some() || spec.statement.is_some();
    if own && !spec.cases.is_empty() {
        let message = "an operation stands beside `cases`, so nobody can say which is meant";
        faults.push(SpecFault::new("/cases", message, "put it under `cases` too"));
    }
    if own {
        statement::check(&short, "", &mut faults);
    } else if spec.cases.is_empty() {
        let help = "upsert: { table: orders, key: [id] }";
        faults.push(SpecFault::new("", "there is no operation, so nothing would be done", help));
    }
    for (index, case) in spec.cases.iter().enumerate().filter(|_| !own) {
        statement::check(case, &format!("/cases/{index}"), &mut faults);
        if case.when.is_none() && index + 1 < spec.cases.len() {
            let message = "this case takes everything, so those after it take nothing";
            faults.push(SpecFault::new(format!("/cases/{index}"), message, "give it a `when`, or make it the last"));
        }
    }
    faults
}

/// What each case does, in a few words, for the plan.
pub fn steps(spec: &PostgresSpec) -> Vec<String> {
    let step = |case: &PostgresCaseSpec| {
        let act = match case {
            PostgresCaseSpec { upsert: Some(upsert), .. } => {
                format!("upsert into {} by {}", upsert.table, upsert.key.join(", "))
            }
            PostgresCaseSpec { insert: Some(insert), .. } => format!("insert into {}", insert.table),
            PostgresCaseSpec { delete: Some(delete), .. } => {
                format!("delete from {} by {}", delete.table, delete.key.join(", "))
            }
            PostgresCaseSpec { statement: Some(statement), .. } => statement.sql.clone(),
            _ => String::new(),
        };
        let when = case.when.as_ref().map_or(String::new(), |when| format!("  when {when}"));
        format!("{act}{when}")
    };
    spec.all_cases().iter().map(step).collect()
}

/// When a record counts as delivered and what a second delivery does, for the plan.
pub(super) fn delivered_note(spec: &PostgresSpec) -> Vec<String> {
    let mut notes = vec!["delivered when the transaction of its batch is committed".to_owned()];
    if let Some(barrier) = &spec.barrier {
        notes.push(format!("a second delivery does nothing: table {} remembers the first", barrier.table));
        return notes;
    }
    for (index, case) in spec.all_cases().iter().enumerate() {
        let again = match (&case.insert, &case.statement) {
            (Some(insert), _) if insert.on_conflict.is_none() => {
                "insert is not repeatable; after a lost answer the record is refused as a duplicate, or stands twice"
            }
            (_, Some(_)) => "whether its statement is repeatable nobody can say but you; `barrier:` makes it so",
            _ => continue,
        };
        notes.push(format!("case {index}: {again}"));
    }
    notes
}

/// A PostgreSQL database.
pub struct PostgresSink {
    address: Address,
    pool: Pool,
    cases: Vec<Case>,
    timeout: Duration,
    /// The barrier's table, quoted.
    barrier: Option<String>,
    /// The barrier's table was there when it was last looked for.
    prepared: AtomicBool,
    /// What is known of the tables that rows may be copied into.
    tables: Tables,
    context: SinkContext,
}

impl PostgresSink {
    /// Reads the settings; connects to nothing.
    ///
    /// # Errors
    /// When a setting does not work or a file that it names cannot be read.
    pub fn open(spec: &PostgresSpec, context: &SinkContext) -> Result<Self, OpenError> {
        let wrong = |pointer: &str, message: String| OpenError::Setting {
            kind: "postgres",
            pointer: pointer.into(),
            message: message.into(),
        };
        let url = spec.url.as_deref().unwrap_or_default();
        // The address itself was checked before, so this is about the certificates.
        let pointer = if spec.ca_file.is_some() { "/ca_file" } else { "/url" };
        let address = Address::new(url, spec.ca_file.as_deref(), spec.timeout()).map_err(|why| wrong(pointer, why))?;
        let pool = address.pool(CONNECTIONS, spec.timeout()).map_err(|why| wrong("/url", why))?;
        let cases = spec.all_cases().iter().map(Case::parse).collect::<Result<_, _>>();
        Ok(Self {
            address,
            pool,
            cases: cases.map_err(|why: Box<str>| wrong("", why.into()))?,
            barrier: spec.barrier.as_ref().map(|barrier| statement::quoted(&barrier.table)),
            prepared: AtomicBool::new(false),
            tables: Tables::default(),
            timeout: spec.timeout(),
            context: context.clone(),
        })
    }

    fn shown(&self) -> &str {
        self.address.shown()
    }

    async fn lend(&self) -> Result<Object, Failure> {
        self.pool.get().await.map_err(|error| judge_pool(self.shown(), &error))
    }

    /// The rows of a batch, and what cannot be one.
    fn rendered(&self, batch: &[Operation]) -> (Vec<(usize, statement::Row)>, Vec<(usize, Failure)>) {
        let (mut rows, mut failed) = (Vec::with_capacity(batch.len()), Vec::new());
        for (index, operation) in batch.iter().enumerate() {
            let scope = Scope::new(operation, &self.context);
            let number = operation.case;
            let row = match self.cases.get(number) {
                Some(case) => case.row(number, &scope, operation).map_err(|failure| case.placed(failure)),
                None => Err(Failure::rendering(format!(
                    "no case {number} is left in the file; the record matched it before"
                ))),
            };
            match row {
                Ok(row) => rows.push((index, row)),
                Err(failure) => failed.push((index, failure)),
            }
        }
        (rows, failed)
    }

    async fn look(&self) -> Result<String, String> {
        let client = self.pool.get().await.map_err(|error| postgres::explain_pool(&error))?;
        let explain = |error: tokio_postgres::Error| postgres::explain(&error);
        let row = client
            .query_one("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint, pg_is_in_recovery()", &[])
            .await
            .map_err(explain)?;
        let (at, standby): (i64, bool) = (row.try_get(0).map_err(explain)?, row.try_get(1).map_err(explain)?);
        if standby {
            return Err("it is a standby and takes no writes: name the primary".to_owned());
        }
        for case in &self.cases {
            case.probe(&client).await?;
        }
        if let Some(barrier) = &self.barrier {
            let query = "SELECT to_regclass($1) IS NOT NULL OR coalesce(has_schema_privilege(current_schema(), 'CREATE'), false)";
            let usable = client.query_one(query, &[barrier]).await.map_err(explain)?;
            if !usable.try_get::<_, bool>(0).map_err(explain)? {
                let make = make_barrier(barrier);
                return Err(format!("the barrier's table is not there; somebody with the right runs: {make}"));
            }
        }
        Ok(format!("its tables can be written to; {}", skew(self.context.clock.now(), Timestamp::from_millis(at))))
    }
}

impl Sink for PostgresSink {
    /// One transaction for a batch.
    fn batch_style(&self) -> BatchStyle {
        BatchStyle::Atomic
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            let (rows, mut failed) = self.rendered(batch);
            if !rows.is_empty() {
                let sent: Vec<usize> = rows.iter().map(|(index, _)| *index).collect();
                let keys = failed.iter().filter_map(|(index, _)| batch.get(*index)?.event.key.as_deref());
                let refused: HashSet<&str> = keys.collect();
                let mut written = self.write_rows(batch, rows, refused.clone(), false).await;
                if written.as_ref().is_err_and(|failure| failure.verdict == Verdict::Never) {
                    // Refused when the transaction ended, so nobody knows for which row: once more, and each is checked.
                    let (rows, _) = self.rendered(batch);
                    written = self.write_rows(batch, rows, refused, true).await;
                }
                match written {
                    Ok(refused) => failed.extend(refused),
                    Err(failure) => failed.extend(sent.into_iter().map(|index| (index, failure.clone()))),
                }
            }
            failed.sort_unstable_by_key(|(index, _)| *index);
            Written { failed }
        }
        .boxed()
    }

    fn probe(&self) -> BoxFuture<'_, Vec<Probed>> {
        async move { vec![Probed::of(self.shown(), self.look().await)] }.boxed()
    }
}

fn make_barrier(barrier: &str) -> String {
    format!("CREATE TABLE IF NOT EXISTS {barrier} (id text PRIMARY KEY, at timestamptz NOT NULL DEFAULT now())")
}

/// A document of the file, or where and why it is none.
fn document(pointer: &str, value: &Value, faults: &mut Vec<SpecFault>) {
    if let Err(error) = Document::parse(value) {
        let help = "{payload.a}, for example; {{ is a literal brace";
        faults.push(SpecFault::new(format!("{pointer}{}", error.pointer), error.error.to_string(), help));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::testing::context;

    #[test]
    fn no_form_of_an_address_shows_its_password() {
        for url in [
            "postgres://u:geheim@h:5433/db",
            "postgres://h:5433/db?user=u&password=geheim",
            "postgres://u:geh@eim@h:x/db",
        ] {
            let spec = PostgresSpec { url: Some(url.to_owned()), ..PostgresSpec::default() };
            let shown = format!("{spec:?} {:?}", check(&spec));
            assert!(!shown.contains("geheim") && !shown.contains("eim@"), "{shown}");
        }
    }

    #[test]
    fn a_certificate_that_cannot_be_read_is_said_of_its_own_setting() {
        let spec = serde_json::json!({
            "url": "postgres://h/db?sslmode=verify-full", "ca_file": "/nowhere/ca.pem", "insert": { "table": "t" },
        });
        let spec = serde_json::from_value(spec).unwrap();
        let error = PostgresSink::open(&spec, &context()).err().unwrap().to_string();
        assert!(error.starts_with("postgres/ca_file: /nowhere/ca.pem"), "{error}");
    }
}
