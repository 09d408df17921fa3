//! `state.db`: everything of the log that is looked up and not read in order.
//!
//! Takes every frame in sequence order and keeps what outlives the journal: parked and set-aside records, dead letters,
//! cursors, epochs, keys seen. Each commit stores the sequence it has applied in the same transaction, so applying the
//! frames after it again gives the same state. An operator may open the file with the `sqlite3` shell. The settle thread
//! owns the one [`State`]; everybody else reads through a [`StateReader`].

mod apply;
mod counts;
mod dead;
mod epochs;
mod reader;
mod rows;
mod salvage;
mod schema;
mod seen;
#[cfg(test)]
mod tests;
mod upgrade;
mod waiting;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};

pub use counts::Counts;
pub use reader::{KeptKey, KeyPlace, SeenKey, StateReader, WaitingRow};
pub use salvage::{Mending, Salvaged};

use super::change::{NamespaceNumber, Sequence};
use super::disk::Disk;
use crate::clock::Timestamp;
use crate::record::Position;
use crate::source::{BranchName, Epoch, LogError};

/// What went wrong with `state.db`.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// SQLite refused.
    #[error("state.db at {path}: {act}: {cause}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What was tried.
        act: &'static str,
        /// What SQLite says.
        cause: rusqlite::Error,
    },
    /// The file is not what this version can use.
    #[error(
        "state.db at {path} is damaged: {what}. Restore the data folder from a back-up, or give up what cannot be read with \
         `walflow log repair`, which names what is lost; `walflow log dump` shows what journal and segments hold"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A newer walflow wrote it.
    #[error("state.db at {path} has format {found}, this version knows {known}: use the newer walflow")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: i64,
        /// What is known.
        known: i64,
    },
}

impl StateError {
    /// True when the disk is full.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Sqlite { cause, .. }
            if cause.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull))
    }
}

impl From<StateError> for LogError {
    fn from(error: StateError) -> Self {
        match error {
            StateError::Damaged { .. } => Self::Damaged(error.to_string().into()),
            _ => Self::Storage { act: "use state.db".into(), cause: error.to_string().into() },
        }
    }
}

/// The active segment of a namespace at a checkpoint: beyond its length nothing is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentMark {
    /// Whose.
    pub namespace: NamespaceNumber,
    /// The active segment's first position; 0 = it has none.
    pub first: Position,
    /// How many of its bytes are durable.
    pub length: u64,
    /// The namespace's newest position.
    pub end: Position,
}

/// What a checkpoint adds to a commit.
#[derive(Clone, Debug, Default)]
pub struct Checkpoint {
    /// One for each namespace that has records.
    pub segments: Vec<SegmentMark>,
}

/// A namespace as it was stored.
#[derive(Clone, Debug)]
pub struct StoredNamespace {
    /// Its number.
    pub number: NamespaceNumber,
    /// Its name.
    pub name: String,
    /// It has been deleted; its number stays taken.
    pub deleted: bool,
    /// The first position that is kept.
    pub first: Position,
    /// The revisions of its file, oldest first.
    pub epochs: Vec<Epoch>,
    /// Its branches and their cursors.
    pub branches: Vec<(BranchName, Position)>,
    /// Bytes of its parked records.
    pub parked_bytes: u64,
    /// Idempotency keys from before then have been forgotten.
    pub keys_since: Timestamp,
    /// A repair has lost cursors of records up to here.
    pub start_over: Position,
}

/// The store. One owner; blocking.
pub struct State {
    db: Connection,
    path: PathBuf,
    disk: Arc<dyn Disk>,
    counts: Counts,
    open: bool,
    applied: Sequence,
    checkpoint: Sequence,
    last_time: Timestamp,
    orderly: bool,
    /// Parked in the open transaction and not written yet: what is released before the commit never is.
    pending: BTreeMap<Sequence, apply::Parked>,
    seen: seen::Seen,
    sampled: std::collections::HashMap<(NamespaceNumber, BranchName), Timestamp>,
}

/// Turns a SQLite error into ours.
fn failed<'a>(path: &'a Path, act: &'static str) -> impl FnOnce(rusqlite::Error) -> StateError + use<'a> {
    move |cause| match cause.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
            StateError::Damaged { path: path.to_owned(), what: cause.to_string() }
        }
        _ => StateError::Sqlite { path: path.to_owned(), act, cause },
    }
}

/// Positions and sequences stay far below 2^63.
#[expect(clippy::cast_possible_wrap, reason = "counts of records since the first start")]
const fn sql(number: u64) -> i64 {
    number as i64
}

#[expect(clippy::cast_sign_loss, reason = "only what `sql` stored")]
const fn number(sql: i64) -> u64 {
    sql as u64
}

impl State {
    /// Opens or makes the file. Does not read its rows.
    ///
    /// # Errors
    /// When it cannot be opened, is damaged, or was written by a newer version.
    pub fn open(path: &Path, disk: Arc<dyn Disk>) -> Result<Self, StateError> {
        let db = schema::open(path)?;
        let meta = |name: &str| -> Result<i64, StateError> {
            let value = db.query_row("SELECT value FROM meta WHERE name = ?", [name], |row| row.get(0)).optional();
            Ok(value.map_err(failed(path, "read the meta table"))?.unwrap_or(0))
        };
        let (applied, checkpoint) = (Sequence(number(meta("applied")?)), Sequence(number(meta("checkpoint")?)));
        let last_time = Timestamp::from_millis(meta("last_time")?);
        // 0 = nothing was ever stored, so there was no stop.
        let orderly = meta("running")? == 0;
        let counts = Counts::default();
        counts.load(&db).map_err(failed(path, "count"))?;
        let seen = seen::Seen::load(&db).map_err(failed(path, "count the keys"))?;
        Ok(Self {
            db,
            path: path.to_owned(),
            disk,
            counts,
            open: false,
            applied,
            checkpoint,
            last_time,
            orderly,
            pending: BTreeMap::new(),
            seen,
            sampled: std::collections::HashMap::new(),
        })
    }

    /// Has SQLite read the whole file, and holds the rows against their checksums. Gives what is wrong.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn check(&self) -> Result<Vec<String>, StateError> {
        let read = || {
            let mut rows = self.db.prepare("PRAGMA integrity_check(20)")?;
            rows.query_map([], |row| row.get::<_, String>(0))?.collect::<Result<Vec<_>, _>>()
        };
        let said = read().map_err(failed(&self.path, "check the whole file"))?;
        let mut said: Vec<String> = said.into_iter().filter(|line| line != "ok").collect();
        if said.is_empty() {
            said = rows::misfits(&self.db).map_err(failed(&self.path, "read every row"))?;
        }
        Ok(said)
    }

    /// Something waits for the next commit, though it may be of no frame.
    pub const fn is_changed(&self) -> bool {
        self.open
    }

    /// Everything at or below is in the last commit.
    pub const fn applied(&self) -> Sequence {
        self.applied
    }

    /// Everything at or below is durable in all views: the journal is needed only after it.
    pub const fn checkpoint(&self) -> Sequence {
        self.checkpoint
    }

    /// The newest frame's time: ids never go below it (LOG.md 18).
    pub const fn last_time(&self) -> Timestamp {
        self.last_time
    }

    /// The last stop was orderly, or there was none.
    pub const fn stopped_orderly(&self) -> bool {
        self.orderly
    }

    /// What lies here, counted as changes are applied.
    pub const fn counts(&self) -> &Counts {
        &self.counts
    }

    /// A reader with connections of its own.
    pub fn reader(&self) -> StateReader {
        StateReader::new(self.path.clone(), self.counts.clone())
    }

    /// The active segments at the last checkpoint.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn segment_marks(&self) -> Result<Vec<SegmentMark>, StateError> {
        let act = failed(&self.path, "read the segment marks");
        let read = || {
            let mut rows = self.db.prepare("SELECT namespace, first, length, end FROM segments ORDER BY namespace")?;
            let mark = |row: &rusqlite::Row<'_>| {
                Ok(SegmentMark {
                    namespace: NamespaceNumber(row.get(0)?),
                    first: Position(number(row.get(1)?)),
                    length: number(row.get(2)?),
                    end: Position(number(row.get(3)?)),
                })
            };
            rows.query_map([], mark)?.collect::<Result<Vec<_>, _>>()
        };
        read().map_err(act)
    }

    /// Every namespace there ever was, the deleted ones too.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn namespaces(&self) -> Result<Vec<StoredNamespace>, StateError> {
        let act = failed(&self.path, "read the namespaces");
        let read = || {
            let mut rows = self.db.prepare(
                "SELECT number, name, deleted, first, coalesce(since, 0), coalesce(upto, 0) FROM namespaces
                 LEFT JOIN key_floors ON key_floors.namespace = number
                 LEFT JOIN start_over ON start_over.namespace = number ORDER BY number",
            )?;
            let stored = |row: &rusqlite::Row<'_>| {
                let number_of: u32 = row.get(0)?;
                Ok(StoredNamespace {
                    number: NamespaceNumber(number_of),
                    name: row.get(1)?,
                    deleted: row.get(2)?,
                    first: Position(number(row.get(3)?)),
                    epochs: Vec::new(),
                    branches: Vec::new(),
                    parked_bytes: self.counts.parked(NamespaceNumber(number_of)).1,
                    keys_since: Timestamp::from_millis(row.get(4)?),
                    start_over: Position(number(row.get(5)?)),
                })
            };
            let mut all: Vec<StoredNamespace> = rows.query_map([], stored)?.collect::<Result<_, _>>()?;
            let mut epochs =
                self.db.prepare("SELECT number, after, files FROM epochs WHERE namespace = ? ORDER BY number")?;
            let mut branches =
                self.db.prepare("SELECT name, cursor FROM branches WHERE namespace = ? ORDER BY name")?;
            for namespace in &mut all {
                let epoch = |row: &rusqlite::Row<'_>| {
                    let files: Vec<u8> = row.get(2)?;
                    Ok(Epoch { number: row.get(0)?, after: Position(number(row.get(1)?)), files: Bytes::from(files) })
                };
                namespace.epochs = epochs.query_map([namespace.number.0], epoch)?.collect::<Result<_, _>>()?;
                let branch = |row: &rusqlite::Row<'_>| {
                    let name: String = row.get(0)?;
                    Ok((BranchName::from_stored(&name), Position(number(row.get(1)?))))
                };
                namespace.branches = branches.query_map([namespace.number.0], branch)?.collect::<Result<_, _>>()?;
            }
            Ok(all)
        };
        read().map_err(act)
    }

    /// Makes what was applied visible, together with the sequence it reached. With a checkpoint it is also durable when
    /// this returns, and the segments' marks are replaced.
    ///
    /// # Errors
    /// When SQLite fails; the next start applies the frames again.
    pub fn commit(&mut self, applied: Sequence, checkpoint: Option<&Checkpoint>) -> Result<(), StateError> {
        self.begin()?;
        self.write_pending()?;
        let path = self.path.clone();
        let act = failed(&path, "commit");
        let write = |state: &mut Self| -> rusqlite::Result<()> {
            let db = &state.db;
            let mut meta = db.prepare_cached("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)")?;
            meta.execute(params!["applied", sql(applied.0)])?;
            meta.execute(params!["last_time", state.last_time.as_millis()])?;
            meta.execute(params!["running", i64::from(!state.orderly)])?;
            if let Some(checkpoint) = checkpoint {
                meta.execute(params!["checkpoint", sql(applied.0)])?;
                db.execute("DELETE FROM segments", [])?;
                let mut mark =
                    db.prepare_cached("INSERT INTO segments (namespace, first, length, end) VALUES (?, ?, ?, ?)")?;
                for segment in &checkpoint.segments {
                    let (first, length) = (sql(segment.first.0), sql(segment.length));
                    mark.execute(params![segment.namespace.0, first, length, sql(segment.end.0)])?;
                }
            }
            state.counts.store(db)?;
            state.seen.store(db)?;
            drop(meta);
            db.execute_batch("COMMIT")
        };
        if checkpoint.is_some() {
            // The commit syncs the -wal, whatever readers have open. The setting cannot change inside a transaction,
            // so what has been applied is committed first.
            write(self).map_err(act)?;
            self.open = false;
            let act = failed(&path, "commit durably");
            self.durable_commit().map_err(act)?;
            self.checkpoint = applied;
            self.disk.database_synced(&path);
        } else {
            write(self).map_err(act)?;
            self.open = false;
        }
        self.applied = applied;
        Ok(())
    }

    /// A commit under `synchronous=FULL`: it syncs the -wal up to itself, and so all before it.
    fn durable_commit(&self) -> rusqlite::Result<()> {
        self.db.execute_batch(
            "PRAGMA synchronous=FULL; BEGIN IMMEDIATE;
             INSERT OR REPLACE INTO meta (name, value) VALUES ('synced', (SELECT coalesce(max(value), 0) + 1 FROM meta WHERE name = 'synced'));
             COMMIT; PRAGMA synchronous=NORMAL;",
        )
    }

    /// Takes back what has been applied since the last commit, for a disk that is full: the frames are applied again.
    pub fn roll_back(&mut self) {
        if self.open {
            let _ = self.db.execute_batch("ROLLBACK");
            self.open = false;
        }
        self.pending.clear();
        let _ = self.counts.load(&self.db);
        if let Ok(seen) = seen::Seen::load(&self.db) {
            self.seen = seen;
        }
    }

    /// Writes a new file of the same content and puts it in this one's place: after a failed sync the old one's pages
    /// may be clean in memory and not on the disk (LOG.md 22).
    ///
    /// # Errors
    /// When SQLite or the system fails; the old file is then untouched.
    pub fn rebuild(path: &Path, disk: &dyn Disk) -> Result<(), StateError> {
        if !path.exists() {
            return Ok(());
        }
        let fresh = path.with_extension("db.new");
        let system = |act: &'static str| {
            move |cause: std::io::Error| StateError::Damaged { path: path.to_owned(), what: format!("{act}: {cause}") }
        };
        if fresh.exists() {
            disk.remove(&fresh).map_err(system("remove the half-made copy"))?;
        }
        let db = schema::open(path)?;
        let name = fresh.to_string_lossy().into_owned();
        db.execute("VACUUM INTO ?", [name]).map_err(failed(path, "copy into a new file"))?;
        db.close().map_err(|(_, cause)| failed(path, "close")(cause))?;
        let file = disk.open(&fresh, super::disk::Access::Write).map_err(system("open the copy"))?;
        file.sync().map_err(system("sync the copy"))?;
        for suffix in ["-wal", "-shm"] {
            let mut beside = path.as_os_str().to_owned();
            beside.push(suffix);
            if Path::new(&beside).exists() {
                disk.remove(Path::new(&beside)).map_err(system("remove the old -wal"))?;
            }
        }
        disk.rename(&fresh, path).map_err(system("put the copy in place"))?;
        disk.sync_folder(path.parent().unwrap_or(Path::new("."))).map_err(system("sync the folder"))
    }

    /// Parked records that fall due in `from..to`, in (due, sequence) order, about `limit` of them. Gives up to where the
    /// answer is complete.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn load_due(
        &self,
        from: Timestamp,
        to: Timestamp,
        limit: usize,
    ) -> Result<(Vec<super::due::DueRow>, Timestamp), StateError> {
        waiting::load_due(&self.db, &self.counts, from, to, limit).map_err(failed(&self.path, "load what falls due"))
    }
}

/// Opens the file for reading only.
fn open_reader(path: &Path) -> Result<Connection, StateError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).map_err(failed(path, "open for reading"))?;
    db.busy_timeout(std::time::Duration::from_secs(10)).map_err(failed(path, "set the time-out"))?;
    Ok(db)
}
