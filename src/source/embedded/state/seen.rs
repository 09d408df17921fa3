//! Idempotency keys in `state.db`: tables in order of time, so that the oldest go at once and at little cost.
//!
//! A table takes the keys of one hour, or a part of them when there are many. For each namespace it is counted how many
//! keys a table has of it, so that the file's `window` and `max` are held for each namespace alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bytes::Bytes;
use rusqlite::{Connection, params};

use super::{State, StateError, failed, number, schema, sql};
use crate::clock::Timestamp;
use crate::record::Record;
use crate::source::IdempotencyKey;
use crate::source::embedded::change::{Frame, NamespaceNumber};
use crate::source::embedded::keys::key_hash;

/// Keys after which an hour goes on in another table.
const TABLE_KEYS: u64 = if cfg!(test) { 4 } else { 1 << 20 };
/// Tables of one hour at most.
pub(super) const TABLES_AN_HOUR: i64 = 1 << 10;
const HOUR: i64 = 3_600_000;

/// How many keys of a namespace a table has, and when the newest of them came.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    keys: u64,
    newest: Timestamp,
}

/// What is known of the tables of keys without reading them.
#[derive(Debug, Default)]
pub(super) struct Seen {
    counted: BTreeMap<(NamespaceNumber, i64), Counted>,
    /// Counts that the next commit writes.
    changed: BTreeSet<(NamespaceNumber, i64)>,
    /// All tables, with the keys of all namespaces in each.
    tables: BTreeMap<i64, u64>,
}

/// The number of an hour's first table.
pub(super) const fn first_table(time: Timestamp) -> i64 {
    time.as_millis() / HOUR * TABLES_AN_HOUR
}

impl Seen {
    pub(super) fn load(db: &Connection) -> rusqlite::Result<Self> {
        let mut seen = Self::default();
        for table in schema::key_tables(db)? {
            seen.tables.insert(table, 0);
        }
        let mut rows = db.prepare("SELECT namespace, hour, keys, newest FROM key_counts")?;
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            let (namespace, table) = (NamespaceNumber(row.get(0)?), row.get(1)?);
            let counted = Counted { keys: number(row.get(2)?), newest: Timestamp::from_millis(row.get(3)?) };
            *seen.tables.entry(table).or_default() += counted.keys;
            seen.counted.insert((namespace, table), counted);
        }
        Ok(seen)
    }

    pub(super) fn store(&mut self, db: &Connection) -> rusqlite::Result<()> {
        let mut put =
            db.prepare_cached("INSERT OR REPLACE INTO key_counts (namespace, hour, keys, newest) VALUES (?, ?, ?, ?)")?;
        for (namespace, table) in &self.changed {
            if let Some(Counted { keys, newest }) = self.counted.get(&(*namespace, *table)) {
                put.execute(params![namespace.0, table, sql(*keys), newest.as_millis()])?;
            }
        }
        self.changed.clear();
        Ok(())
    }

    /// The table for a key that came at `time`.
    fn table(&self, time: Timestamp) -> i64 {
        let first = first_table(time);
        match self.tables.range(first..first + TABLES_AN_HOUR).next_back() {
            Some((last, keys)) if *keys >= TABLE_KEYS => (last + 1).min(first + TABLES_AN_HOUR - 1),
            Some((last, _)) => *last,
            None => first,
        }
    }

    /// The tables of a namespace that go, oldest first: those from before its window, and those without which it still
    /// has `max` keys.
    fn to_forget(&self, namespace: NamespaceNumber, window: Timestamp, max: u64) -> Vec<(i64, Timestamp)> {
        let own: Vec<(i64, Counted)> = self
            .counted
            .range((namespace, i64::MIN)..=(namespace, i64::MAX))
            .map(|((_, table), counted)| (*table, *counted))
            .collect();
        let mut left: u64 = own.iter().map(|(_, counted)| counted.keys).sum();
        let goes = |(_, counted): &&(i64, Counted)| {
            left -= counted.keys;
            counted.newest < window || left >= max
        };
        own.iter().take_while(goes).map(|(table, counted)| (*table, counted.newest)).collect()
    }
}

impl State {
    pub(super) fn see_key(
        &mut self,
        frame: &Frame,
        idempotency: Option<&IdempotencyKey>,
        record: &Bytes,
        due_at: Option<Timestamp>,
    ) -> rusqlite::Result<()> {
        let Some(IdempotencyKey { key, fingerprint }) = idempotency else { return Ok(()) };
        let Ok(record) = Record::decode(record) else { return Ok(()) };
        let table = self.seen.table(frame.time);
        if !self.seen.tables.contains_key(&table) {
            schema::make_key_table(&self.db, table)?;
        }
        *self.seen.tables.entry(table).or_default() += 1;
        let counted = self.seen.counted.entry((frame.namespace, table)).or_default();
        *counted = Counted { keys: counted.keys + 1, newest: counted.newest.max(frame.time) };
        self.seen.changed.insert((frame.namespace, table));
        let put = format!(
            "INSERT OR REPLACE INTO keys_{table} (namespace, hash, fingerprint, id, written_at, due) VALUES (?, ?, ?, ?, ?, ?)"
        );
        self.db.prepare_cached(&put)?.execute(params![
            frame.namespace.0,
            key_hash(frame.namespace, key).as_slice(),
            fingerprint.as_slice(),
            record.id.as_bytes().as_slice(),
            record.written_at.as_millis(),
            due_at.map(Timestamp::as_millis)
        ])?;
        Ok(())
    }

    /// How many keys there are, of all namespaces.
    pub fn keys(&self) -> u64 {
        self.seen.tables.values().sum()
    }

    /// Forgets the oldest keys: `bounds` says for each namespace from when on its keys are needed, and how many of them
    /// it may keep; a namespace that is not there keeps none. Gives since when the keys of those that changed are known.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn forget_keys(
        &mut self,
        bounds: &HashMap<NamespaceNumber, (Timestamp, u64)>,
    ) -> Result<Vec<(NamespaceNumber, Timestamp)>, StateError> {
        let owners: BTreeSet<NamespaceNumber> = self.seen.counted.keys().map(|(namespace, _)| *namespace).collect();
        let mut changed = Vec::new();
        for namespace in owners {
            let (window, max) = bounds.get(&namespace).copied().unwrap_or((Timestamp::MAX, 0));
            let gone = self.seen.to_forget(namespace, window, max);
            let Some((_, newest)) = gone.last().copied() else { continue };
            let since = Timestamp::from_millis(newest.as_millis() + 1);
            self.begin()?;
            let path = self.path.clone();
            self.forget_tables(namespace, &gone, since).map_err(failed(&path, "forget old keys"))?;
            changed.push((namespace, since));
        }
        Ok(changed)
    }

    fn forget_tables(
        &mut self,
        namespace: NamespaceNumber,
        gone: &[(i64, Timestamp)],
        since: Timestamp,
    ) -> rusqlite::Result<()> {
        let note = "INSERT INTO key_floors (namespace, since) VALUES (?, ?)
                    ON CONFLICT DO UPDATE SET since = max(since, excluded.since)";
        self.db.execute(note, params![namespace.0, since.as_millis()])?;
        for (table, _) in gone {
            let counted = self.seen.counted.remove(&(namespace, *table)).unwrap_or_default();
            self.seen.changed.remove(&(namespace, *table));
            let forget = "DELETE FROM key_counts WHERE namespace = ? AND hour = ?";
            self.db.execute(forget, params![namespace.0, table])?;
            if self.seen.counted.keys().any(|(_, other)| other == table) {
                self.db.execute(&format!("DELETE FROM keys_{table} WHERE namespace = ?"), [namespace.0])?;
                let keys = self.seen.tables.entry(*table).or_default();
                *keys = keys.saturating_sub(counted.keys);
            } else {
                self.db.execute_batch(&format!("DROP TABLE IF EXISTS keys_{table}"))?;
                self.seen.tables.remove(table);
            }
        }
        Ok(())
    }
}
