//! The tables of `state.db`, and how the file is opened.

use std::collections::BTreeSet;
use std::path::Path;

use rusqlite::{Connection, OptionalExtension as _};

use super::{StateError, failed, upgrade};

/// The format of the tables below. Another layout is another number, and `upgrade` brings the files of the one before to it.
pub(super) const FORMAT: i64 = 2;

/// Times are milliseconds since the epoch; `record` and `body` are a frame's own bytes, `crc` is CRC-32C over them.
const IN_1: &str = "
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE namespaces (number INTEGER PRIMARY KEY, name TEXT NOT NULL, deleted INTEGER NOT NULL, first INTEGER NOT NULL);
CREATE TABLE segments (namespace INTEGER PRIMARY KEY, first INTEGER NOT NULL, length INTEGER NOT NULL, end INTEGER NOT NULL);
CREATE TABLE branches (
  namespace INTEGER NOT NULL, name TEXT NOT NULL, cursor INTEGER NOT NULL, pause TEXT,
  unclean INTEGER NOT NULL DEFAULT 0, stopped_at INTEGER NOT NULL DEFAULT -1,
  PRIMARY KEY (namespace, name)) WITHOUT ROWID;
CREATE TABLE samples (namespace INTEGER NOT NULL, branch TEXT NOT NULL, position INTEGER NOT NULL, at INTEGER NOT NULL,
  PRIMARY KEY (namespace, branch, position)) WITHOUT ROWID;
-- The sequence of the frame that parked a record is its row id, so rows are written in order.
CREATE TABLE parked (sequence INTEGER PRIMARY KEY, namespace INTEGER NOT NULL, due INTEGER NOT NULL, id BLOB NOT NULL,
  key TEXT, record BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE INDEX parked_due ON parked (namespace, due);
CREATE INDEX parked_id ON parked (id);
CREATE INDEX parked_key ON parked (namespace, key) WHERE key IS NOT NULL;
CREATE TABLE cancelled (id BLOB PRIMARY KEY, sequence INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE aside (
  namespace INTEGER NOT NULL, branch TEXT NOT NULL, position INTEGER NOT NULL, child INTEGER NOT NULL, lane TEXT NOT NULL,
  attempts INTEGER NOT NULL, first_failed INTEGER NOT NULL, next_try INTEGER NOT NULL, last_error TEXT NOT NULL,
  body BLOB NOT NULL, crc INTEGER NOT NULL,
  PRIMARY KEY (namespace, branch, position, child)) WITHOUT ROWID;
CREATE INDEX aside_lane ON aside (namespace, branch, lane, position, child);
CREATE TABLE dead (
  sequence INTEGER PRIMARY KEY, namespace INTEGER NOT NULL, branch TEXT NOT NULL, position INTEGER NOT NULL,
  child INTEGER NOT NULL, at INTEGER NOT NULL, reason TEXT NOT NULL, id BLOB NOT NULL, key TEXT, attempts INTEGER NOT NULL,
  last_error TEXT NOT NULL, stage TEXT NOT NULL, revision TEXT NOT NULL, overtaken INTEGER NOT NULL, bytes INTEGER NOT NULL,
  body BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE UNIQUE INDEX dead_row ON dead (namespace, branch, position, child);
CREATE INDEX dead_id ON dead (id);
CREATE TABLE tombstones (namespace INTEGER NOT NULL, branch TEXT NOT NULL, position INTEGER NOT NULL, child INTEGER NOT NULL,
  PRIMARY KEY (namespace, branch, position, child)) WITHOUT ROWID;
CREATE TABLE marks (namespace INTEGER NOT NULL, branch TEXT NOT NULL, position INTEGER NOT NULL, count INTEGER NOT NULL,
  PRIMARY KEY (namespace, branch, position)) WITHOUT ROWID;
CREATE TABLE epochs (namespace INTEGER NOT NULL, number INTEGER NOT NULL, after INTEGER NOT NULL, files BLOB NOT NULL,
  PRIMARY KEY (namespace, number)) WITHOUT ROWID;
CREATE TABLE counts (namespace INTEGER NOT NULL, branch TEXT NOT NULL, kind TEXT NOT NULL, rows INTEGER NOT NULL,
  bytes INTEGER NOT NULL, PRIMARY KEY (namespace, branch, kind)) WITHOUT ROWID;
";

/// What format 2 added.
pub(super) const IN_2: &str = "
-- Keys are in tables of their own: `keys_` and 1,024 times the hour, plus which of that hour's tables it is.
CREATE TABLE IF NOT EXISTS key_counts (namespace INTEGER NOT NULL, hour INTEGER NOT NULL, keys INTEGER NOT NULL, newest INTEGER NOT NULL,
  PRIMARY KEY (namespace, hour)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS key_floors (namespace INTEGER PRIMARY KEY, since INTEGER NOT NULL);
-- A repair has lost cursors: branches that are not known begin with the first record, while any up to here is kept.
CREATE TABLE IF NOT EXISTS start_over (namespace INTEGER PRIMARY KEY, upto INTEGER NOT NULL);
";

/// Opens the file for its one owner, makes the tables when it is new, and brings an older file to the present format.
pub(super) fn open(path: &Path) -> Result<Connection, StateError> {
    let db = Connection::open(path).map_err(failed(path, "open"))?;
    let set = || {
        db.busy_timeout(std::time::Duration::from_secs(10))?;
        // Checked on every read besides SQLite's own: a size that a small machine can bear.
        db.execute_batch(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-16384; PRAGMA mmap_size=0;
             PRAGMA temp_store=MEMORY; PRAGMA wal_autocheckpoint=4000; PRAGMA journal_size_limit=67108864;",
        )?;
        db.set_prepared_statement_cache_capacity(64);
        db.query_row("SELECT count(*) FROM sqlite_master WHERE name = 'meta'", [], |row| row.get::<_, i64>(0))
    };
    if set().map_err(failed(path, "set up"))? == 0 {
        let make = || {
            db.execute_batch("PRAGMA synchronous=FULL; BEGIN IMMEDIATE;")?;
            db.execute_batch(IN_1)?;
            db.execute_batch(IN_2)?;
            db.execute("INSERT INTO meta (name, value) VALUES ('format', ?)", [FORMAT])?;
            db.execute_batch("COMMIT; PRAGMA synchronous=NORMAL;")
        };
        make().map_err(failed(path, "make the tables"))?;
    }
    let format = db.query_row("SELECT value FROM meta WHERE name = 'format'", [], |row| row.get(0)).optional();
    match format.map_err(failed(path, "read the format"))? {
        Some(FORMAT) => Ok(db),
        Some(1) => upgrade::from_1(&db, path).map(|()| db),
        Some(found) if found > FORMAT => Err(StateError::Newer { path: path.to_owned(), found, known: FORMAT }),
        _ => Err(StateError::Damaged { path: path.to_owned(), what: "it names no format".into() }),
    }
}

/// The numbers of the tables of keys.
pub(super) fn key_tables(db: &Connection) -> rusqlite::Result<BTreeSet<i64>> {
    let mut names =
        db.prepare("SELECT substr(name, 6) FROM sqlite_master WHERE type = 'table' AND name GLOB 'keys_[0-9]*'")?;
    let hours = names.query_map([], |row| row.get::<_, String>(0))?;
    hours.map(|hour| hour.map(|hour| hour.parse().unwrap_or(0))).collect()
}

/// Makes a table of keys.
pub(super) fn make_key_table(db: &Connection, table: i64) -> rusqlite::Result<()> {
    db.execute_batch(&format!(
        "CREATE TABLE IF NOT EXISTS keys_{table} (namespace INTEGER NOT NULL, hash BLOB NOT NULL, fingerprint BLOB NOT NULL,
         id BLOB NOT NULL, written_at INTEGER NOT NULL, due INTEGER, PRIMARY KEY (namespace, hash)) WITHOUT ROWID"
    ))
}
