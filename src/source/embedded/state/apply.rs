//! Applying frames: what each change does to the tables. The same frames after the same commit give the same state.

use bytes::Bytes;
use rusqlite::params;

use super::counts::Kind;
use super::{State, StateError, failed, sql};
use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::embedded::change::{Change, Frame, NamespaceNumber, Sequence};
use crate::source::{AsideRow, BranchName, DeadLetter, RowKey, StoredPause};

/// Cancelled ids that are remembered for look-ups.
const CANCELLED: u64 = 100_000;
/// A branch's progress is sampled this often (milliseconds), for "finished between".
const SAMPLE_EVERY: i64 = 1_000;

/// A parked record before it is written.
pub(super) struct Parked {
    pub(super) namespace: NamespaceNumber,
    pub(super) due_at: Timestamp,
    pub(super) record: Bytes,
}

const NO_BRANCH: &str = "";

impl State {
    pub(super) fn begin(&mut self) -> Result<(), StateError> {
        if !self.open {
            self.db.execute_batch("BEGIN IMMEDIATE").map_err(failed(&self.path, "begin"))?;
            self.open = true;
        }
        Ok(())
    }

    /// Applies one frame; frames come in sequence order. Visible after the next [`State::commit`].
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn apply(&mut self, frame: &Frame) -> Result<(), StateError> {
        self.last_time = self.last_time.max(frame.time);
        let namespace = frame.namespace;
        match &frame.change {
            Change::Append { idempotency: None, .. } | Change::Dropped { .. } => return Ok(()),
            Change::Stopped => {
                self.orderly = true;
                return Ok(());
            }
            Change::Started { .. } => self.orderly = false,
            Change::Park { due_at, record, idempotency } => {
                self.park(frame.sequence, namespace, *due_at, record);
                if idempotency.is_none() {
                    return Ok(());
                }
            }
            Change::Release { parked, .. } if self.unpark(namespace, *parked) => return Ok(()),
            _ => {}
        }
        self.begin()?;
        let path = self.path.clone();
        self.write(frame).map_err(failed(&path, "apply a change"))
    }

    fn park(&mut self, sequence: Sequence, namespace: NamespaceNumber, due_at: Timestamp, record: &Bytes) {
        let bytes = i64::try_from(record.len()).unwrap_or(i64::MAX);
        self.counts.add(namespace, Kind::Parked, &BranchName::from_stored(NO_BRANCH), 1, bytes);
        // A copy: the frame's bytes are a slice of a whole group's.
        self.pending.insert(sequence, Parked { namespace, due_at, record: Bytes::copy_from_slice(record) });
    }

    /// Takes back a row that has not been written yet.
    fn unpark(&mut self, namespace: NamespaceNumber, parked: Sequence) -> bool {
        let Some(row) = self.pending.remove(&parked) else { return false };
        let bytes = i64::try_from(row.record.len()).unwrap_or(i64::MAX);
        self.counts.add(namespace, Kind::Parked, &BranchName::from_stored(NO_BRANCH), -1, -bytes);
        true
    }

    fn delete_parked(&mut self, namespace: NamespaceNumber, parked: Sequence) -> rusqlite::Result<()> {
        if self.unpark(namespace, parked) {
            return Ok(());
        }
        let mut delete = self.db.prepare_cached("DELETE FROM parked WHERE sequence = ? RETURNING length(record)")?;
        let mut rows = delete.query([sql(parked.0)])?;
        if let Some(row) = rows.next()? {
            let bytes: i64 = row.get(0)?;
            self.counts.add(namespace, Kind::Parked, &BranchName::from_stored(NO_BRANCH), -1, -bytes);
        }
        Ok(())
    }

    pub(super) fn write_pending(&mut self) -> Result<(), StateError> {
        let pending = std::mem::take(&mut self.pending);
        let write = || -> rusqlite::Result<()> {
            let mut insert = self.db.prepare_cached(
                "INSERT OR REPLACE INTO parked (sequence, namespace, due, id, key, record, crc) VALUES (?, ?, ?, ?, ?, ?, ?)",
            )?;
            for (sequence, row) in &pending {
                let Ok(record) = Record::decode(&row.record) else { continue };
                let crc = crc32c::crc32c(&row.record);
                let (id, key) = (record.id.as_bytes().as_slice(), record.key.as_deref());
                let (due, bytes) = (row.due_at.as_millis(), row.record.as_ref());
                insert.execute(params![sql(sequence.0), row.namespace.0, due, id, key, bytes, crc])?;
            }
            Ok(())
        };
        write().map_err(failed(&self.path, "write parked records"))
    }

    fn write(&mut self, frame: &Frame) -> rusqlite::Result<()> {
        let namespace = frame.namespace;
        match &frame.change {
            Change::Append { idempotency, record, .. } => {
                self.see_key(frame, idempotency.as_ref(), record, None)?;
            }
            Change::Park { idempotency, record, due_at } => {
                self.see_key(frame, idempotency.as_ref(), record, Some(*due_at))?;
            }
            Change::Release { parked, .. } => self.delete_parked(namespace, *parked)?,
            Change::Cancel { parked, id, .. } => {
                self.delete_parked(namespace, *parked)?;
                self.cancelled(*id, frame.sequence)?;
            }
            Change::Move { parked, due_at, record, .. } => {
                self.delete_parked(namespace, *parked)?;
                self.park(frame.sequence, namespace, *due_at, record);
            }
            Change::Cursor { branch, position } => self.cursor(namespace, branch, *position, frame.time)?,
            Change::BranchOpened { branch, position } => {
                let mut open = self
                    .db
                    .prepare_cached("INSERT OR IGNORE INTO branches (namespace, name, cursor) VALUES (?, ?, ?)")?;
                open.execute(params![namespace.0, branch.as_str(), sql(position.0)])?;
            }
            Change::Aside { branch, row } => self.put_aside(namespace, branch, row, &frame.change)?,
            Change::Returned { branch, row } => self.remove_aside(namespace, branch, *row)?,
            Change::Dead { letter } => self.put_dead(frame, letter)?,
            Change::Overtaken { branch, row } => {
                let mut mark = self.db.prepare_cached(
                    "UPDATE dead SET overtaken = 1 WHERE namespace = ? AND branch = ? AND position = ? AND child = ?",
                )?;
                mark.execute(params![namespace.0, branch.as_str(), sql(row.position.0), row.child])?;
            }
            Change::Replay { branch, row } => {
                self.remove_dead(namespace, branch, row.row)?;
                self.put_aside(namespace, branch, row, &frame.change)?;
            }
            Change::Purge { branch, row } => {
                self.remove_dead(namespace, branch, *row)?;
                let mut bury = self.db.prepare_cached(
                    "INSERT OR IGNORE INTO tombstones (namespace, branch, position, child)
                     SELECT ?1, ?2, ?3, ?4 WHERE ?3 > (SELECT cursor FROM branches WHERE namespace = ?1 AND name = ?2)",
                )?;
                bury.execute(params![namespace.0, branch.as_str(), sql(row.position.0), row.child])?;
            }
            Change::Mark { branch, position } => {
                let mut mark = self.db.prepare_cached(
                    "INSERT INTO marks (namespace, branch, position, count) VALUES (?, ?, ?, 1)
                     ON CONFLICT DO UPDATE SET count = count + 1",
                )?;
                mark.execute(params![namespace.0, branch.as_str(), sql(position.0)])?;
            }
            Change::Pause { branch, pause } => self.pause(namespace, branch, pause.as_ref())?,
            Change::BranchForgotten { branch } => {
                for table in ["aside", "dead", "tombstones", "marks", "samples"] {
                    let delete = format!("DELETE FROM {table} WHERE namespace = ? AND branch = ?");
                    self.db.execute(&delete, params![namespace.0, branch.as_str()])?;
                }
                self.db.execute(
                    "DELETE FROM branches WHERE namespace = ? AND name = ?",
                    params![namespace.0, branch.as_str()],
                )?;
                self.counts.forget(namespace, Some(branch));
            }
            Change::Epoch { number, after, files } => {
                let put = "INSERT OR REPLACE INTO epochs (namespace, number, after, files) VALUES (?, ?, ?, ?)";
                self.db.execute(put, params![namespace.0, number, sql(after.0), files.as_ref()])?;
            }
            Change::Trim { first } => self.trim(namespace, *first)?,
            Change::NamespaceCreated { name } => {
                let make = "INSERT OR IGNORE INTO namespaces (number, name, deleted, first) VALUES (?, ?, 0, 1)";
                self.db.execute(make, params![namespace.0, name])?;
            }
            Change::NamespaceDeleted => self.delete_namespace(namespace)?,
            Change::Started { clean } => self.started(*clean)?,
            Change::BranchRenamed { from, to } => self.rename_branch(namespace, from, to)?,
            Change::Dropped { .. } | Change::Stopped => {}
        }
        Ok(())
    }

    fn cursor(
        &mut self,
        namespace: NamespaceNumber,
        branch: &BranchName,
        position: Position,
        at: Timestamp,
    ) -> rusqlite::Result<()> {
        let (name, upto) = (branch.as_str(), sql(position.0));
        let mut update = self.db.prepare_cached(
            "INSERT INTO branches (namespace, name, cursor) VALUES (?, ?, ?)
             ON CONFLICT DO UPDATE SET cursor = max(cursor, excluded.cursor)",
        )?;
        update.execute(params![namespace.0, name, upto])?;
        for delete in [
            "DELETE FROM tombstones WHERE namespace = ? AND branch = ? AND position <= ?",
            "DELETE FROM marks WHERE namespace = ? AND branch = ? AND position <= ?",
        ] {
            self.db.prepare_cached(delete)?.execute(params![namespace.0, name, upto])?;
        }
        let sampled = self.sampled.entry((namespace, branch.clone())).or_default();
        if at.as_millis() - sampled.as_millis() >= SAMPLE_EVERY {
            *sampled = at;
            let put = "INSERT OR REPLACE INTO samples (namespace, branch, position, at) VALUES (?, ?, ?, ?)";
            self.db.prepare_cached(put)?.execute(params![namespace.0, name, upto, at.as_millis()])?;
        }
        Ok(())
    }

    fn put_aside(
        &mut self,
        namespace: NamespaceNumber,
        branch: &BranchName,
        row: &AsideRow,
        change: &Change,
    ) -> rusqlite::Result<()> {
        let mut body = Vec::new();
        // A replayed row is read back as any other.
        let aside = match change {
            Change::Aside { .. } => None,
            _ => Some(Change::Aside { branch: branch.clone(), row: Box::new(row.clone()) }),
        };
        aside.as_ref().unwrap_or(change).encode(&mut body);
        let crc = crc32c::crc32c(&body);
        self.remove_aside(namespace, branch, row.row)?;
        let mut insert = self.db.prepare_cached(
            "INSERT INTO aside (namespace, branch, position, child, lane, attempts, first_failed, next_try, last_error, body, crc)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )?;
        insert.execute(params![
            namespace.0,
            branch.as_str(),
            sql(row.row.position.0),
            row.row.child,
            row.lane,
            row.attempts,
            row.first_failed.as_millis(),
            row.next_try.as_millis(),
            row.last_error,
            body,
            crc
        ])?;
        self.counts.add(namespace, Kind::Aside, branch, 1, 0);
        Ok(())
    }

    fn remove_aside(&mut self, namespace: NamespaceNumber, branch: &BranchName, row: RowKey) -> rusqlite::Result<()> {
        let mut delete = self
            .db
            .prepare_cached("DELETE FROM aside WHERE namespace = ? AND branch = ? AND position = ? AND child = ?")?;
        if delete.execute(params![namespace.0, branch.as_str(), sql(row.position.0), row.child])? > 0 {
            self.counts.add(namespace, Kind::Aside, branch, -1, 0);
        }
        Ok(())
    }

    fn put_dead(&mut self, frame: &Frame, letter: &DeadLetter) -> rusqlite::Result<()> {
        let namespace = frame.namespace;
        self.remove_aside(namespace, &letter.branch, letter.row)?;
        self.remove_dead(namespace, &letter.branch, letter.row)?;
        let mut body = Vec::new();
        frame.change.encode(&mut body);
        let crc = crc32c::crc32c(&body);
        let reason = serde_json::to_value(letter.reason).ok();
        let mut insert = self.db.prepare_cached(
            "INSERT INTO dead (sequence, namespace, branch, position, child, at, reason, id, key, attempts, last_error, stage,
             revision, overtaken, bytes, body, crc) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )?;
        let bytes = i64::try_from(body.len()).unwrap_or(i64::MAX);
        insert.execute(params![
            sql(frame.sequence.0),
            namespace.0,
            letter.branch.as_str(),
            sql(letter.row.position.0),
            letter.row.child,
            letter.at.as_millis(),
            reason.as_ref().and_then(|reason| reason.as_str()).unwrap_or_default(),
            letter.record.id.as_bytes().as_slice(),
            letter.record.key.as_deref(),
            letter.attempts,
            letter.last_error,
            letter.stage,
            letter.revision,
            letter.overtaken,
            bytes,
            body,
            crc
        ])?;
        self.counts.add(namespace, Kind::Dead, &letter.branch, 1, bytes);
        Ok(())
    }

    fn remove_dead(&mut self, namespace: NamespaceNumber, branch: &BranchName, row: RowKey) -> rusqlite::Result<()> {
        let mut delete = self.db.prepare_cached(
            "DELETE FROM dead WHERE namespace = ? AND branch = ? AND position = ? AND child = ? RETURNING bytes",
        )?;
        let mut rows = delete.query(params![namespace.0, branch.as_str(), sql(row.position.0), row.child])?;
        if let Some(row) = rows.next()? {
            let bytes: i64 = row.get(0)?;
            self.counts.add(namespace, Kind::Dead, branch, -1, -bytes);
        }
        Ok(())
    }

    fn pause(
        &self,
        namespace: NamespaceNumber,
        branch: &BranchName,
        pause: Option<&StoredPause>,
    ) -> rusqlite::Result<()> {
        let pause = pause.and_then(|pause| serde_json::to_string(pause).ok());
        let put = "INSERT INTO branches (namespace, name, cursor, pause) VALUES (?, ?, 0, ?)
                   ON CONFLICT DO UPDATE SET pause = excluded.pause";
        self.db.execute(put, params![namespace.0, branch.as_str(), pause])?;
        Ok(())
    }

    fn cancelled(&self, id: RecordId, sequence: Sequence) -> rusqlite::Result<()> {
        let mut put = self.db.prepare_cached("INSERT OR REPLACE INTO cancelled (id, sequence) VALUES (?, ?)")?;
        put.execute(params![id.as_bytes().as_slice(), sql(sequence.0)])?;
        if sequence.0.is_multiple_of(1_000) {
            let many =
                "DELETE FROM cancelled WHERE id IN (SELECT id FROM cancelled ORDER BY sequence DESC LIMIT -1 OFFSET ?)";
            self.db.execute(many, [sql(CANCELLED)])?;
        }
        Ok(())
    }

    fn trim(&self, namespace: NamespaceNumber, first: Position) -> rusqlite::Result<()> {
        let first = sql(first.0);
        self.db.execute("UPDATE namespaces SET first = max(first, ?) WHERE number = ?", params![first, namespace.0])?;
        self.db.execute("DELETE FROM samples WHERE namespace = ? AND position < ?", params![namespace.0, first])?;
        Ok(())
    }

    fn rename_branch(
        &mut self,
        namespace: NamespaceNumber,
        from: &BranchName,
        to: &BranchName,
    ) -> rusqlite::Result<()> {
        let known = "SELECT 1 FROM branches WHERE namespace = ? AND name = ?";
        if self.db.prepare_cached(known)?.exists(params![namespace.0, to.as_str()])? {
            return Ok(());
        }
        self.db.execute(
            "UPDATE branches SET name = ?3 WHERE namespace = ?1 AND name = ?2",
            params![namespace.0, from.as_str(), to.as_str()],
        )?;
        for table in ["aside", "dead", "tombstones", "marks", "samples"] {
            let rename = format!("UPDATE {table} SET branch = ?3 WHERE namespace = ?1 AND branch = ?2");
            self.db.execute(&rename, params![namespace.0, from.as_str(), to.as_str()])?;
        }
        self.counts.rename(namespace, from, to);
        Ok(())
    }

    fn delete_namespace(&mut self, namespace: NamespaceNumber) -> rusqlite::Result<()> {
        self.pending.retain(|_, row| row.namespace != namespace);
        for table in ["branches", "samples", "parked", "aside", "dead", "tombstones", "marks", "epochs"] {
            self.db.execute(&format!("DELETE FROM {table} WHERE namespace = ?"), [namespace.0])?;
        }
        self.db.execute("UPDATE namespaces SET deleted = 1 WHERE number = ?", [namespace.0])?;
        self.counts.forget(namespace, None);
        Ok(())
    }

    /// Counts unclean stops in a row at which a branch had not moved (LOG.md 15).
    fn started(&self, clean: bool) -> rusqlite::Result<()> {
        let count = if clean {
            "UPDATE branches SET unclean = 0, stopped_at = cursor"
        } else {
            "UPDATE branches SET unclean = CASE WHEN stopped_at = cursor THEN unclean + 1 ELSE 1 END, stopped_at = cursor"
        };
        self.db.execute(count, [])?;
        Ok(())
    }
}
