//! What can still be read of a damaged `state.db`, copied row by row into a new file.
//!
//! Takes the old file and the path of the new one; gives what is lost, by table and row. Never changes the old file's rows
//! and copies no row that does not match its checksum. What the rows mean for each other is for the caller to mend.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use rusqlite::types::Value;
use rusqlite::{Connection, params, params_from_iter};

use super::{SegmentMark, State, StateError, failed, number, rows, schema, sql, upgrade};
use crate::clock::Timestamp;
use crate::source::embedded::change::{NamespaceNumber, Sequence};
use crate::source::embedded::disk::Disk;

/// Tables with their keys and what an operator loses with a row. `counts` is counted anew.
const TABLES: [(&str, &str, &str); 14] = [
    ("meta", "name", "places and times of the log itself"),
    ("namespaces", "number", "names of namespaces"),
    ("segments", "namespace", "lengths of segments, which are measured anew"),
    ("branches", "namespace, name", "cursors and pauses of branches"),
    ("epochs", "namespace, number", "earlier revisions of pipeline files"),
    ("parked", "sequence", "parked records"),
    ("aside", "namespace, branch, position, child", "deliveries that were set aside"),
    ("dead", "sequence", "dead letters"),
    ("tombstones", "namespace, branch, position, child", "notes of purged dead letters"),
    ("marks", "namespace, branch, position", "notes of attempts before a crash"),
    ("samples", "namespace, branch, position", "times at which records were finished"),
    ("cancelled", "id", "ids of cancelled records"),
    ("key_counts", "namespace, hour", "counts of idempotency keys"),
    ("key_floors", "namespace", "the window of idempotency keys"),
];
/// The most probes for a next readable row in one gap.
const PROBES: usize = 200;

/// What was copied and what was not.
#[derive(Debug, Default)]
pub struct Salvaged {
    /// What is lost, for people.
    pub lost: Vec<String>,
    /// Tables of which something is lost.
    pub tables: Vec<String>,
    /// The checkpoint that the old file names, if that could be read.
    pub checkpoint: Option<Sequence>,
}

struct Copy<'a> {
    old: &'a Connection,
    new: &'a Connection,
    table: &'a str,
    keys: Vec<&'a str>,
    bad: Vec<String>,
}

/// How far a walk came.
enum Walked {
    /// To its end.
    Whole,
    /// To a place that cannot be read; the last key before it.
    Broken(Option<Vec<Value>>),
}

impl Copy<'_> {
    /// Copies rows after `from` (before it, when `backward`) until the end or until a place that cannot be read.
    fn walk(&mut self, from: Option<&[Value]>, until: Option<&[Value]>, backward: bool) -> rusqlite::Result<Walked> {
        let columns = self.keys.join(", ");
        let (beyond, order) = if backward { ("<", "DESC") } else { (">", "ASC") };
        let marks = vec!["?"; self.keys.len()].join(", ");
        let within = from.map_or(String::new(), |_| format!(" WHERE ({columns}) {beyond} ({marks})"));
        let ordered: Vec<String> = self.keys.iter().map(|key| format!("{key} {order}")).collect();
        let query = format!("SELECT {columns}, * FROM {}{within} ORDER BY {}", self.table, ordered.join(", "));
        let Ok(mut select) = self.old.prepare(&query) else { return Ok(Walked::Broken(None)) };
        let width = select.column_count();
        let Ok(mut found) = select.query(params_from_iter(from.unwrap_or_default())) else {
            return Ok(Walked::Broken(None));
        };
        let mut last = None;
        loop {
            let row = match found.next() {
                Ok(Some(row)) => row,
                Ok(None) => return Ok(Walked::Whole),
                Err(_) => return Ok(Walked::Broken(last)),
            };
            let values: Result<Vec<Value>, _> = (0..width).map(|at| row.get(at)).collect();
            let Ok(mut values) = values else { return Ok(Walked::Broken(last)) };
            let row = values.split_off(self.keys.len());
            if until == Some(values.as_slice()) {
                return Ok(Walked::Whole);
            }
            last = Some(values);
            if !rows::fits(self.table, &row) {
                self.bad.push(rows::name_of(self.table, &row));
                continue;
            }
            let marks = vec!["?"; row.len()].join(", ");
            // A row that the new table does not take is damaged too.
            let put = format!("INSERT OR REPLACE INTO {} VALUES ({marks})", self.table);
            if self.new.prepare_cached(&put)?.execute(params_from_iter(&row)).is_err() {
                self.bad.push(rows::name_of(self.table, &row));
            }
        }
    }

    /// Copies all that can be read: from the start, from the end, and where the key is a number, in between. Gives whether
    /// there was a gap, and around what.
    fn all(&mut self) -> rusqlite::Result<Option<(Option<Vec<Value>>, Option<Vec<Value>>)>> {
        let Walked::Broken(first) = self.walk(None, None, false)? else { return Ok(None) };
        let last = match self.walk(None, first.as_deref(), true)? {
            Walked::Whole => None,
            Walked::Broken(last) => last,
        };
        if let (Some([Value::Integer(low)]), Some([Value::Integer(high)])) = (first.as_deref(), last.as_deref()) {
            let (mut low, mut step) = (*low, 1);
            for _ in 0..PROBES {
                low = low.saturating_add(step);
                if low >= *high {
                    break;
                }
                match self.walk(Some(&[Value::Integer(low)]), last.as_deref(), false)? {
                    Walked::Whole => break,
                    Walked::Broken(Some(key)) => {
                        if let [Value::Integer(reached)] = key.as_slice() {
                            low = *reached;
                        }
                        step = 1;
                    }
                    Walked::Broken(None) => step = step.saturating_mul(2),
                }
            }
        }
        Ok(Some((first, last)))
    }
}

fn hex(bytes: &[u8]) -> String {
    let digits =
        |byte: &u8| [byte >> 4, byte & 15].map(|digit| char::from_digit(u32::from(digit), 16).unwrap_or_default());
    bytes.iter().flat_map(digits).collect()
}

fn shown(key: Option<&[Value]>, other: &str) -> String {
    let show = |value: &Value| match value {
        Value::Integer(number) => number.to_string(),
        Value::Text(text) => text.clone(),
        Value::Blob(bytes) => hex(bytes),
        _ => "?".to_owned(),
    };
    key.map_or_else(|| other.to_owned(), |key| key.iter().map(show).collect::<Vec<_>>().join("/"))
}

impl State {
    /// Whether the file can be used as it is: SQLite finds nothing wrong, and each row says what its bytes say.
    ///
    /// # Errors
    /// When a newer version wrote it.
    pub fn is_sound(path: &Path, disk: &Arc<dyn Disk>) -> Result<bool, StateError> {
        match Self::open(path, Arc::clone(disk)).and_then(|state| state.check()) {
            Ok(problems) => Ok(problems.is_empty()),
            Err(newer @ StateError::Newer { .. }) => Err(newer),
            Err(_) => Ok(false),
        }
    }

    /// Copies what can be read of the file at `old` into a new file at `fresh`.
    ///
    /// # Errors
    /// When the new file cannot be written.
    pub fn salvage(old: &Path, fresh: &Path) -> Result<Salvaged, StateError> {
        let source = Connection::open(old).map_err(failed(old, "open"))?;
        let target = schema::open(fresh)?;
        let act = failed(fresh, "copy what can be read");
        copy(&source, &target).map_err(act)
    }
}

/// The format that the file names, if that can be read.
fn said_format(db: &Connection) -> Option<i64> {
    db.query_row("SELECT value FROM meta WHERE name = 'format'", [], |row| row.get(0)).ok()
}

fn has_table(db: &Connection, table: &str) -> bool {
    db.prepare("SELECT 1 FROM sqlite_master WHERE name = ?")
        .and_then(|mut select| select.exists([table]))
        .unwrap_or(true)
}

fn copy(source: &Connection, target: &Connection) -> rusqlite::Result<Salvaged> {
    let mut salvaged = Salvaged::default();
    target.execute_batch("PRAGMA synchronous=FULL; BEGIN IMMEDIATE")?;
    let mut tables: Vec<(String, String, String)> =
        TABLES.iter().map(|(table, keys, what)| ((*table).into(), (*keys).into(), (*what).into())).collect();
    let key_tables = schema::key_tables(source).unwrap_or_default();
    let is_of_1 = |table: &i64| upgrade::is_of_1(source, *table).unwrap_or(false);
    if said_format(source) == Some(1) || key_tables.iter().any(is_of_1) {
        // Only a file that has them can have lost something of them.
        tables.retain(|(table, ..)| !table.starts_with("key_") || has_table(source, table));
    }
    for table in key_tables {
        let keys = if is_of_1(&table) {
            upgrade::make_key_table_of_1(target, table)?;
            "hash"
        } else {
            schema::make_key_table(target, table)?;
            "namespace, hash"
        };
        tables.push((format!("keys_{table}"), keys.into(), "idempotency keys".into()));
    }
    for (table, keys, what) in &tables {
        let keys: Vec<&str> = keys.split(", ").collect();
        let mut copy = Copy { old: source, new: target, table, keys, bad: Vec::new() };
        let gap = copy.all()?;
        if let Some((first, last)) = &gap {
            let (first, last) = (shown(first.as_deref(), "the first"), shown(last.as_deref(), "the last"));
            let key = copy.keys.join("/");
            salvaged.lost.push(format!("{what}: table {table} cannot be read between {key} {first} and {last}"));
        }
        salvaged.lost.extend(copy.bad.iter().map(|row| format!("{what}: {row} does not match its checksum")));
        if gap.is_some() || !copy.bad.is_empty() {
            salvaged.tables.push(table.clone());
        }
    }
    for table in schema::key_tables(target)? {
        if upgrade::is_of_1(target, table)? {
            let (lost, table) = (upgrade::drop_nameless(target, table)?, format!("keys_{table}"));
            if lost > 0 {
                salvaged.lost.push(format!("idempotency keys: {lost} in table {table} without a record's id"));
                salvaged.tables.push(table);
            }
        }
    }
    upgrade::convert(target)?;
    let checkpoint = "SELECT value FROM meta WHERE name = 'checkpoint'";
    let checkpoint: Option<i64> = target.query_row(checkpoint, [], |row| row.get(0)).ok();
    salvaged.checkpoint = checkpoint.map(|checkpoint| Sequence(number(checkpoint)));
    target.execute_batch("COMMIT")?;
    Ok(salvaged)
}

/// What segments and journal say, for a store of which rows are lost.
#[derive(Debug)]
pub struct Mending {
    /// By namespace: the active segment as the checkpoint should have it.
    pub marks: Vec<SegmentMark>,
    /// Names of namespaces that the journal still has.
    pub names: BTreeMap<NamespaceNumber, String>,
    /// What is settled.
    pub checkpoint: Sequence,
    /// The newest time in the segments.
    pub last_time: Timestamp,
    /// The time now.
    pub now: Timestamp,
}

impl State {
    /// Makes the salvaged rows at `path` a store that opens. Gives what else is lost.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn mend(
        path: &Path,
        disk: &Arc<dyn Disk>,
        salvaged: &Salvaged,
        mending: &Mending,
    ) -> Result<Vec<String>, StateError> {
        let state = Self::open(path, Arc::clone(disk))?;
        mended(&state.db, salvaged, mending).map_err(failed(path, "mend"))
    }

    /// Counts anew what lies in the file.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn recount(path: &Path, disk: &Arc<dyn Disk>) -> Result<(), StateError> {
        let state = Self::open(path, Arc::clone(disk))?;
        state.db.execute_batch(COUNT).map_err(failed(path, "count"))
    }
}

const COUNT: &str = "
DELETE FROM counts;
INSERT INTO counts SELECT namespace, '', 'parked', count(*), sum(length(record)) FROM parked GROUP BY namespace;
INSERT INTO counts SELECT namespace, branch, 'aside', count(*), 0 FROM aside GROUP BY namespace, branch;
INSERT INTO counts SELECT namespace, branch, 'dead', count(*), sum(bytes) FROM dead GROUP BY namespace, branch;";

fn mended(db: &Connection, salvaged: &Salvaged, mending: &Mending) -> rusqlite::Result<Vec<String>> {
    let mut lost = Vec::new();
    let is_damaged = |tables: &[&str]| salvaged.tables.iter().any(|table| tables.contains(&table.as_str()));
    db.execute_batch("PRAGMA synchronous=FULL; BEGIN IMMEDIATE")?;
    let known =
        |number: NamespaceNumber| db.prepare_cached("SELECT 1 FROM namespaces WHERE number = ?")?.exists([number.0]);
    let numbers: BTreeSet<NamespaceNumber> =
        mending.marks.iter().map(|mark| mark.namespace).chain(mending.names.keys().copied()).collect();
    for number in numbers {
        if known(number)? {
            continue;
        }
        let name = mending.names.get(&number).cloned().unwrap_or_else(|| {
            let name = format!("recovered-{}", number.0);
            lost.push(format!(
                "the name of namespace number {}: what it holds is in the namespace {name} now",
                number.0
            ));
            name
        });
        let put = "INSERT INTO namespaces (number, name, deleted, first) VALUES (?, ?, 0, 1)";
        db.execute(put, params![number.0, name])?;
    }
    for mark in &mending.marks {
        // The checkpoint's own marks stay, as long as they are those of this checkpoint.
        let verb = if salvaged.checkpoint.is_some() { "IGNORE" } else { "REPLACE" };
        let put = format!("INSERT OR {verb} INTO segments (namespace, first, length, end) VALUES (?, ?, ?, ?)");
        db.execute(&put, params![mark.namespace.0, sql(mark.first.0), sql(mark.length), sql(mark.end.0)])?;
    }
    // Applied once more from the checkpoint on: so the rows that the journal still has come back.
    for (name, value) in
        [("applied", sql(mending.checkpoint.0)), ("checkpoint", sql(mending.checkpoint.0)), ("running", 1)]
    {
        db.execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", params![name, value])?;
    }
    let time = "INSERT INTO meta (name, value) VALUES ('last_time', ?)
                ON CONFLICT DO UPDATE SET value = max(value, excluded.value)";
    db.execute(time, [mending.last_time.as_millis()])?;
    for table in ["aside", "dead", "tombstones", "marks", "samples"] {
        db.execute_batch(&format!(
            "INSERT OR IGNORE INTO branches (namespace, name, cursor)
             SELECT DISTINCT namespace, branch, first - 1 FROM {table} JOIN namespaces ON number = namespace"
        ))?;
    }
    if is_damaged(&["branches", "namespaces"]) {
        db.execute_batch(
            "INSERT OR REPLACE INTO start_over (namespace, upto)
             SELECT number, coalesce(end, 0) FROM namespaces LEFT JOIN segments ON namespace = number WHERE deleted = 0",
        )?;
        lost.push(
            "how far some branches were: a branch that is not known any more begins with the first record that is kept, so \
             records may arrive again"
                .to_owned(),
        );
    }
    db.execute_batch("DELETE FROM key_counts")?;
    for table in schema::key_tables(db)? {
        db.execute_batch(&format!(
            "INSERT INTO key_counts SELECT namespace, {table}, count(*), max(written_at) FROM keys_{table} GROUP BY namespace"
        ))?;
    }
    let keys_lost = salvaged.tables.iter().any(|table| table.starts_with("key") || table == "meta");
    if keys_lost {
        let since = mending.now.as_millis();
        db.execute("INSERT OR REPLACE INTO key_floors SELECT number, ? FROM namespaces", [since])?;
        lost.push(format!("idempotency keys from before {}: none of them is taken as known", mending.now));
    }
    db.execute_batch(COUNT)?;
    db.execute_batch("COMMIT")?;
    Ok(lost)
}
