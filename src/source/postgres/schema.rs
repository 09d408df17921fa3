//! The tables, and how a database comes to have them.
//!
//! Every migration runs once, in one transaction, whoever starts first. Keys and lanes are bytes: a text column takes no zero
//! byte. Positions have the part in their upper 16 bits; times are milliseconds since the epoch; a record lies here encoded.

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

/// By version, from 1 on; `{schema}` stands for the schema's quoted name.
const MIGRATIONS: &[&str] = &[
    "
CREATE TABLE {schema}.parked (
  ns text NOT NULL, id bytea NOT NULL, due bigint NOT NULL, key bytea, record bytea NOT NULL, place text,
  PRIMARY KEY (ns, id));
CREATE INDEX parked_due ON {schema}.parked (ns, due, id) WHERE place IS NULL;
CREATE INDEX parked_marked ON {schema}.parked (ns, due, id) WHERE place IS NOT NULL;
CREATE INDEX parked_key ON {schema}.parked (ns, key) WHERE key IS NOT NULL;
CREATE TABLE {schema}.cancelled (ns text NOT NULL, id bytea NOT NULL, at bigint NOT NULL, PRIMARY KEY (ns, id));
CREATE TABLE {schema}.keys (
  ns text NOT NULL, key bytea NOT NULL, fingerprint bytea NOT NULL, id bytea NOT NULL, written_at bigint NOT NULL,
  due bigint, confirmed boolean NOT NULL, claimed_at bigint NOT NULL, PRIMARY KEY (ns, key));
CREATE INDEX keys_age ON {schema}.keys (ns, written_at);
CREATE TABLE {schema}.branches (ns text NOT NULL, name text NOT NULL, pause text, PRIMARY KEY (ns, name));
CREATE TABLE {schema}.holds (
  ns text NOT NULL, branch text NOT NULL, part integer NOT NULL, cursor bigint NOT NULL, instance text,
  unclean integer NOT NULL, PRIMARY KEY (ns, branch, part));
CREATE TABLE {schema}.aside (
  ns text NOT NULL, branch text NOT NULL, position bigint NOT NULL, child bigint NOT NULL, lane bytea NOT NULL,
  attempts bigint NOT NULL, first_failed bigint NOT NULL, next_try bigint NOT NULL, last_error text NOT NULL,
  rendered bytea, record bytea NOT NULL, id bytea NOT NULL, replay bigint,
  PRIMARY KEY (ns, branch, position, child));
CREATE INDEX aside_lane ON {schema}.aside (ns, branch, lane, position, child);
CREATE INDEX aside_replay ON {schema}.aside (ns, branch, replay) WHERE replay IS NOT NULL;
CREATE INDEX aside_id ON {schema}.aside (ns, id);
CREATE SEQUENCE {schema}.replays;
CREATE TABLE {schema}.dead (
  number bigint GENERATED ALWAYS AS IDENTITY, ns text NOT NULL, branch text NOT NULL, position bigint NOT NULL,
  child bigint NOT NULL, at bigint NOT NULL, reason text NOT NULL, attempts bigint NOT NULL, last_error text NOT NULL,
  stage text NOT NULL, revision text NOT NULL, rendered bytea, record bytea NOT NULL, id bytea NOT NULL, key bytea,
  bytes bigint NOT NULL, overtaken boolean NOT NULL, PRIMARY KEY (ns, branch, position, child));
CREATE INDEX dead_number ON {schema}.dead (ns, number);
CREATE INDEX dead_id ON {schema}.dead (ns, id);
CREATE TABLE {schema}.tombstones (
  ns text NOT NULL, branch text NOT NULL, position bigint NOT NULL, child bigint NOT NULL,
  PRIMARY KEY (ns, branch, position, child));
CREATE TABLE {schema}.marks (
  ns text NOT NULL, branch text NOT NULL, position bigint NOT NULL, count integer NOT NULL,
  PRIMARY KEY (ns, branch, position));
CREATE TABLE {schema}.epochs (
  ns text NOT NULL, number integer NOT NULL, place text NOT NULL, files bytea NOT NULL, PRIMARY KEY (ns, number));
CREATE TABLE {schema}.leases (ns text PRIMARY KEY, holder text NOT NULL, until bigint NOT NULL);
",
    // The revision of a row's record; 0 where it was not noted, which keeps every revision.
    "
ALTER TABLE {schema}.aside ADD COLUMN epoch bigint NOT NULL DEFAULT 0;
ALTER TABLE {schema}.dead ADD COLUMN epoch bigint NOT NULL DEFAULT 0;
",
    // How far the log has come, part by part.
    "
CREATE TABLE {schema}.ends (ns text NOT NULL, part integer NOT NULL, position bigint NOT NULL, PRIMARY KEY (ns, part));
",
];

/// Every table with rows of a namespace.
pub(super) const TABLES: &[&str] = &[
    "parked",
    "cancelled",
    "keys",
    "branches",
    "holds",
    "aside",
    "dead",
    "tombstones",
    "marks",
    "epochs",
    "leases",
    "ends",
];

/// The lock under which the tables are made, so that two who start at once do not both make them.
const LOCK: i64 = 0x7761_6c66_6c6f_7701;

/// Why the tables cannot be used.
pub(super) enum Unfit {
    Failed(Error),
    /// They were made by a later version.
    Newer(i32),
    /// This user may not make them; what somebody else has to run.
    NoRight(String),
}

impl From<Error> for Unfit {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Makes what is missing. `schema` is quoted.
pub(super) async fn migrate(client: &mut Client, schema: &str, user: &str) -> Result<(), Unfit> {
    let known = i32::try_from(MIGRATIONS.len()).unwrap_or(i32::MAX);
    // The common case takes no lock and needs no right.
    let found = match client.query_opt(&format!("SELECT version FROM {schema}.version"), &[]).await {
        Ok(row) => row.map(|row| row.try_get::<_, i32>(0)).transpose()?,
        Err(error) if matches!(error.code(), Some(&SqlState::UNDEFINED_TABLE | &SqlState::INVALID_SCHEMA_NAME)) => None,
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => return Err(no_right(schema, user)),
        Err(error) => return Err(error.into()),
    };
    match found {
        Some(found) if found == known => return Ok(()),
        Some(found) if found > known => return Err(Unfit::Newer(found)),
        _ => {}
    }
    let transaction = client.transaction().await?;
    transaction.execute("SELECT pg_advisory_xact_lock($1)", &[&LOCK]).await?;
    let there: bool = transaction.query_one("SELECT to_regnamespace($1) IS NOT NULL", &[&schema]).await?.try_get(0)?;
    let make = async {
        if !there {
            transaction.batch_execute(&format!("CREATE SCHEMA {schema}")).await?;
        }
        transaction
            .batch_execute(&format!("CREATE TABLE IF NOT EXISTS {schema}.version (version integer NOT NULL)"))
            .await?;
        let row = transaction.query_opt(&format!("SELECT version FROM {schema}.version"), &[]).await?;
        let from = row.map(|row| row.try_get::<_, i32>(0)).transpose()?.unwrap_or(0);
        let missing = MIGRATIONS.iter().skip(usize::try_from(from).unwrap_or(0));
        for migration in missing {
            transaction.batch_execute(&migration.replace("{schema}", schema)).await?;
        }
        transaction.batch_execute(&format!("DELETE FROM {schema}.version")).await?;
        transaction.execute(&format!("INSERT INTO {schema}.version VALUES ($1)"), &[&known]).await
    };
    match make.await {
        Ok(_) => Ok(transaction.commit().await?),
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Err(no_right(schema, user)),
        Err(error) => Err(error.into()),
    }
}

fn no_right(schema: &str, user: &str) -> Unfit {
    let user = user.replace('"', "\"\"");
    Unfit::NoRight(format!("CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION \"{user}\""))
}
