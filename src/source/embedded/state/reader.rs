//! Reading `state.db` beside its owner: connections of its own, blocking calls, only what is committed.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::{Counts, StateError, number, open_reader, schema, seen, sql};
use crate::clock::Timestamp;
use crate::record::{Position, RecordId};
use crate::source::embedded::change::{NamespaceNumber, Sequence};
use crate::source::{BranchName, RowKey, StoredPause};

/// Connections that are kept open between queries.
const IDLE: usize = 4;

/// A parked record as it lies in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitingRow {
    /// The row's name.
    pub parked: Sequence,
    /// When it is due.
    pub due_at: Timestamp,
    /// The encoded record.
    pub record: Bytes,
}

/// An idempotency key that was seen before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenKey {
    /// What it stood for.
    pub fingerprint: [u8; 16],
    /// The first write's id.
    pub id: RecordId,
    /// When that was accepted.
    pub written_at: Timestamp,
    /// When it was due, if it was parked.
    pub due_at: Option<Timestamp>,
}

/// Where a key stands among all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyPlace {
    table: i64,
    hash: [u8; 16],
}

/// An idempotency key as it is kept: its text is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptKey {
    /// The hash of the key under the namespace's number.
    pub hash: [u8; 16],
    /// What it stands for.
    pub seen: SeenKey,
}

/// What a branch finds in the store when it starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredBranch {
    /// Deliveries above the cursor that have an end in the store.
    pub ended: HashSet<RowKey>,
    /// A pause that outlived the last run.
    pub pause: Option<StoredPause>,
    /// Unclean stops in a row at this cursor.
    pub unclean_stops: u32,
    /// Marks above the cursor.
    pub marks: Vec<(Position, u32)>,
}

/// Reads what is committed. Cheap to clone; blocking, so call it off the async threads.
#[derive(Clone)]
pub struct StateReader {
    path: Arc<PathBuf>,
    idle: Arc<Mutex<Vec<Connection>>>,
    counts: Counts,
}

/// A row whose bytes do not match their checksum.
pub(super) fn damaged(path: &Path, table: &str, row: u64) -> StateError {
    StateError::Damaged {
        path: path.to_owned(),
        what: format!("row {row} of table {table} does not match its checksum"),
    }
}

impl StateReader {
    pub(super) fn new(path: PathBuf, counts: Counts) -> Self {
        Self { path: Arc::new(path), idle: Arc::default(), counts }
    }

    /// What lies in the store, as counted.
    pub const fn counts(&self) -> &Counts {
        &self.counts
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn connection(&self) -> Result<Connection, StateError> {
        let idle = self.idle.lock().pop();
        idle.map_or_else(|| open_reader(&self.path), Ok)
    }

    pub(super) fn give_back(&self, db: Connection) {
        let mut idle = self.idle.lock();
        if idle.len() < IDLE {
            idle.push(db);
        }
    }

    /// What a branch has in the store besides its cursor and its lanes.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn branch(
        &self,
        namespace: NamespaceNumber,
        branch: &BranchName,
        cursor: Position,
    ) -> Result<StoredBranch, StateError> {
        self.with(|db| {
            let mut stored = StoredBranch::default();
            let row = |row: &rusqlite::Row<'_>| Ok((row.get::<_, Option<String>>(0)?, row.get(1)?));
            let mut own = db.prepare_cached("SELECT pause, unclean FROM branches WHERE namespace = ? AND name = ?")?;
            if let Some((pause, unclean)) = own.query_row(params![namespace.0, branch.as_str()], row).optional()? {
                stored.pause = pause.and_then(|pause| serde_json::from_str(&pause).ok());
                stored.unclean_stops = unclean;
            }
            for table in ["dead", "aside", "tombstones"] {
                let query = format!("SELECT position, child FROM {table} WHERE namespace = ? AND branch = ? AND position > ?");
                let mut select = db.prepare_cached(&query)?;
                let mut rows = select.query(params![namespace.0, branch.as_str(), sql(cursor.0)])?;
                while let Some(row) = rows.next()? {
                    stored.ended.insert(RowKey { position: Position(number(row.get(0)?)), child: row.get(1)? });
                }
            }
            let mut marks = db.prepare_cached(
                "SELECT position, count FROM marks WHERE namespace = ? AND branch = ? AND position > ? ORDER BY position",
            )?;
            let mark = |row: &rusqlite::Row<'_>| Ok((Position(number(row.get(0)?)), row.get(1)?));
            let values = params![namespace.0, branch.as_str(), sql(cursor.0)];
            stored.marks = marks.query_map(values, mark)?.collect::<Result<_, _>>()?;
            Ok(stored)
        })
    }

    /// When the branch's frontier passed a position: not before the first time, not after the second.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn finished_between(
        &self,
        namespace: NamespaceNumber,
        branch: &BranchName,
        position: Position,
    ) -> Result<(Option<Timestamp>, Option<Timestamp>), StateError> {
        self.with(|db| {
            let one = |query: &str| {
                let values = params![namespace.0, branch.as_str(), sql(position.0)];
                let at = db.prepare_cached(query)?.query_row(values, |row| row.get(0)).optional()?;
                Ok::<_, rusqlite::Error>(at.map(Timestamp::from_millis))
            };
            let before = "SELECT at FROM samples WHERE namespace = ? AND branch = ? AND position < ? ORDER BY position DESC LIMIT 1";
            let after = "SELECT at FROM samples WHERE namespace = ? AND branch = ? AND position >= ? ORDER BY position LIMIT 1";
            Ok((one(before)?, one(after)?))
        })
    }

    /// A key that was seen at or after `since`.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn key(
        &self,
        namespace: NamespaceNumber,
        hash: &[u8; 16],
        since: Timestamp,
    ) -> Result<Option<SeenKey>, StateError> {
        self.with(|db| {
            // One view of the file for the list of tables and what is in them: any may go meanwhile.
            let _view = db.unchecked_transaction()?;
            for table in schema::key_tables(db)?.into_iter().rev() {
                if table < seen::first_table(since) {
                    break;
                }
                let query = format!(
                    "SELECT fingerprint, id, written_at, due FROM keys_{table} WHERE namespace = ? AND hash = ?"
                );
                let seen = |row: &rusqlite::Row<'_>| {
                    Ok(SeenKey {
                        fingerprint: row.get(0)?,
                        id: RecordId::from_bytes(row.get(1)?),
                        written_at: Timestamp::from_millis(row.get(2)?),
                        due_at: row.get::<_, Option<i64>>(3)?.map(Timestamp::from_millis),
                    })
                };
                let found =
                    db.prepare_cached(&query)?.query_row(params![namespace.0, hash.as_slice()], seen).optional()?;
                if let Some(found) = found {
                    return Ok((found.written_at >= since).then_some(found));
                }
            }
            Ok(None)
        })
    }

    /// A namespace's keys after `after`, at most `limit`.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn kept_keys(
        &self,
        namespace: NamespaceNumber,
        after: Option<KeyPlace>,
        limit: usize,
    ) -> Result<Vec<(KeyPlace, KeptKey)>, StateError> {
        self.with(|db| {
            let _view = db.unchecked_transaction()?;
            let mut found = Vec::new();
            let from = after.map_or((i64::MIN, [0; 16]), |place| (place.table, place.hash));
            for table in schema::key_tables(db)?.range(from.0..) {
                let beyond = if *table == from.0 { &from.1[..] } else { &[] };
                let mut select = db.prepare(&format!(
                    "SELECT hash, fingerprint, id, written_at, due FROM keys_{table} WHERE namespace = ? AND hash > ? ORDER BY hash LIMIT ?"
                ))?;
                let mut rows = select.query(params![namespace.0, beyond, sql((limit - found.len()) as u64)])?;
                while let Some(row) = rows.next()? {
                    let hash = row.get(0)?;
                    let key = SeenKey {
                        fingerprint: row.get(1)?,
                        id: RecordId::from_bytes(row.get(2)?),
                        written_at: Timestamp::from_millis(row.get(3)?),
                        due_at: row.get::<_, Option<i64>>(4)?.map(Timestamp::from_millis),
                    };
                    found.push((KeyPlace { table: *table, hash }, KeptKey { hash, seen: key }));
                }
                if found.len() >= limit {
                    break;
                }
            }
            Ok(found)
        })
    }

    /// Hands every known key's hash to `each`.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn each_key(&self, each: &mut dyn FnMut([u8; 16])) -> Result<(), StateError> {
        self.with(|db| {
            let _view = db.unchecked_transaction()?;
            for table in schema::key_tables(db)? {
                let mut select = db.prepare(&format!("SELECT hash FROM keys_{table}"))?;
                let mut rows = select.query([])?;
                while let Some(row) = rows.next()? {
                    each(row.get(0)?);
                }
            }
            Ok(())
        })
    }
}
