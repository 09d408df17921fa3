//! A `state.db` of an earlier format, brought to the present one where it lies.
//!
//! Format 1 had one table of idempotency keys an hour, `keys_{hour}`, without a namespace and without counts. A file that
//! says 1 may hold what format 2 added nevertheless: it came before its number did.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use rusqlite::types::Value;
use rusqlite::{Connection, params};

use super::schema::{FORMAT, IN_2, key_tables, make_key_table};
use super::seen::TABLES_AN_HOUR;
use super::{StateError, failed};
use crate::record::RecordId;

/// The columns of a table of keys in format 1.
const KEYS_OF_1: &str =
    "(hash BLOB PRIMARY KEY, fingerprint BLOB NOT NULL, id BLOB NOT NULL, written_at INTEGER NOT NULL, due INTEGER)";

/// Brings a file of format 1 to the present one: in whole, or not at all when that fails or the power does.
pub(super) fn from_1(db: &Connection, path: &Path) -> Result<(), StateError> {
    let start = Instant::now();
    let upgrade = || {
        db.execute_batch("PRAGMA synchronous=FULL; BEGIN IMMEDIATE;")?;
        let keys = convert(db)?;
        db.execute_batch("COMMIT; PRAGMA synchronous=NORMAL;")?;
        Ok(keys)
    };
    let keys = upgrade().map_err(failed(path, "bring format 1 to format 2"))?;
    let took = start.elapsed();
    tracing::info!(path = %path.display(), keys, ?took, "state.db was of format 1 and is of format 2 now");
    Ok(())
}

/// Makes everything as format 2 has it, within the caller's transaction; what is so already stays. Gives how many keys moved.
pub(super) fn convert(db: &Connection) -> rusqlite::Result<u64> {
    db.execute_batch(IN_2)?;
    let mut moved = 0;
    for hour in key_tables(db)? {
        if is_of_1(db, hour)? {
            moved += move_keys(db, hour)?;
        }
    }
    db.execute("INSERT OR REPLACE INTO meta (name, value) VALUES ('format', ?)", [FORMAT])?;
    Ok(moved)
}

/// Whether a table of keys is one of format 1.
pub(super) fn is_of_1(db: &Connection, table: i64) -> rusqlite::Result<bool> {
    let query = "SELECT count(*) = 0 FROM pragma_table_info(?) WHERE name = 'namespace'";
    db.query_row(query, [format!("keys_{table}")], |row| row.get(0))
}

/// Drops the keys that [`convert`] cannot move, since their ids are none. Gives how many.
pub(super) fn drop_nameless(db: &Connection, hour: i64) -> rusqlite::Result<usize> {
    let other = "typeof(id) != 'blob' OR length(id) != 16 OR typeof(written_at) != 'integer'";
    db.execute(&format!("DELETE FROM keys_{hour} WHERE {other}"), [])
}

/// Makes a table of keys as format 1 had it, for rows that [`convert`] moves on.
pub(super) fn make_key_table_of_1(db: &Connection, hour: i64) -> rusqlite::Result<()> {
    db.execute_batch(&format!("CREATE TABLE IF NOT EXISTS keys_{hour} {KEYS_OF_1} WITHOUT ROWID"))
}

fn move_keys(db: &Connection, hour: i64) -> rusqlite::Result<u64> {
    let table = hour * TABLES_AN_HOUR;
    make_key_table(db, table)?;
    let mut counted: BTreeMap<u32, (i64, i64)> = BTreeMap::new();
    {
        let mut select = db.prepare(&format!("SELECT hash, fingerprint, id, written_at, due FROM keys_{hour}"))?;
        let mut put = db.prepare(&format!(
            "INSERT INTO keys_{table} (namespace, hash, fingerprint, id, written_at, due) VALUES (?, ?, ?, ?, ?, ?)"
        ))?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let id: [u8; 16] = row.get(2)?;
            let namespace = RecordId::from_bytes(id).namespace_number();
            let written_at: i64 = row.get(3)?;
            let (hash, fingerprint): (Value, Value) = (row.get(0)?, row.get(1)?);
            put.execute(params![namespace, hash, fingerprint, id, written_at, row.get::<_, Option<i64>>(4)?])?;
            let (keys, newest) = counted.entry(namespace).or_insert((0, written_at));
            (*keys, *newest) = (*keys + 1, written_at.max(*newest));
        }
    }
    db.execute_batch(&format!("DROP TABLE keys_{hour}"))?;
    for (namespace, (keys, newest)) in &counted {
        let put = "INSERT INTO key_counts (namespace, hour, keys, newest) VALUES (?, ?, ?, ?)";
        db.execute(put, params![namespace, table, keys, newest])?;
    }
    Ok(counted.values().map(|(keys, _)| super::number(*keys)).sum())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::Timestamp;
    use crate::source::DeadQuery;
    use crate::source::embedded::change::NamespaceNumber;
    use crate::source::embedded::disk::RealDisk;
    use crate::source::embedded::keys::key_hash;
    use crate::source::embedded::state::State;

    const ORDERS: NamespaceNumber = NamespaceNumber(1);
    const USERS: NamespaceNumber = NamespaceNumber(2);

    /// A file that a walflow of format 1 left behind: keys of two namespaces, a parked record, a dead letter.
    fn golden(folder: &tempfile::TempDir) -> std::path::PathBuf {
        let path = folder.path().join("state.db");
        let text = include_str!("../../../../tests/golden/state-v1.sql");
        Connection::open(&path).unwrap().execute_batch(text).unwrap();
        path
    }

    fn open(path: &Path) -> State {
        State::open(path, Arc::new(RealDisk)).unwrap()
    }

    fn id_of(state: &State, namespace: NamespaceNumber, key: &str) -> Option<String> {
        let seen = state.reader().key(namespace, &key_hash(namespace, key), Timestamp::from_millis(0)).unwrap();
        seen.map(|seen| seen.id.to_string())
    }

    fn rows(path: &Path, query: &str) -> Vec<Vec<i64>> {
        let db = Connection::open(path).unwrap();
        let mut select = db.prepare(query).unwrap();
        let columns = select.column_count();
        let rows = select.query_map([], |row| (0..columns).map(|at| row.get(at)).collect()).unwrap();
        rows.map(Result::unwrap).collect()
    }

    /// What must be there, however the file came to its format.
    fn assert_is_whole(path: &Path) {
        let state = open(path);
        assert_eq!(id_of(&state, ORDERS, "e1").unwrap(), "01a21ed6-c2fd-7001-8000-0077b43a60e3");
        assert_eq!(id_of(&state, USERS, "e1").unwrap(), "01a21ed6-c330-7001-8000-0081501b8c91");
        assert_eq!((id_of(&state, ORDERS, "e9"), id_of(&state, USERS, "e4")), (None, None));
        let parked = id_of(&state, ORDERS, "p1").unwrap();
        let row = state.reader().parked_by_id(parked.parse().unwrap()).unwrap().unwrap();
        assert_eq!(row.due_at, Timestamp::from_millis(1_795_856_920_915));
        assert_eq!(state.counts().parked(ORDERS).0, 1);
        assert_eq!(state.reader().dead_page(ORDERS, &DeadQuery::default()).unwrap().rows.len(), 1);
        assert_eq!(state.keys(), 10);
        assert_eq!(state.check().unwrap(), Vec::<String>::new());
        drop(state);
        let counted = rows(path, "SELECT namespace, hour, keys, newest FROM key_counts ORDER BY namespace");
        let table = 498_837 * 1024;
        assert_eq!(counted, [[1, table, 7, 1_795_813_720_928], [2, table, 3, 1_795_813_720_903]]);
        assert_eq!(rows(path, "SELECT value FROM meta WHERE name = 'format'"), [[2]]);
        assert_eq!(rows(path, "SELECT count(*) FROM sqlite_master WHERE name = 'keys_498837'"), [[0]]);
    }

    #[test]
    fn a_file_of_format_1_opens_with_all_that_it_holds_and_opens_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = golden(&folder);
        assert_is_whole(&path);
        assert_is_whole(&path);
    }

    #[test]
    fn a_file_that_is_ahead_of_its_number_keeps_its_tables() {
        let folder = tempfile::tempdir().unwrap();
        let path = golden(&folder);
        drop(open(&path));
        let older = "UPDATE meta SET value = 1 WHERE name = 'format'; DROP TABLE start_over;";
        Connection::open(&path).unwrap().execute_batch(older).unwrap();
        assert_is_whole(&path);
    }

    #[test]
    fn an_upgrade_that_fails_leaves_the_file_as_it_was_and_a_repair_gives_up_what_stood_in_its_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = golden(&folder);
        // No id has 15 bytes.
        let break_one = "UPDATE keys_498837 SET id = x'0102030405060708090a0b0c0d0e0f' WHERE due IS NOT NULL";
        Connection::open(&path).unwrap().execute_batch(break_one).unwrap();
        let error = State::open(&path, Arc::new(RealDisk)).err().unwrap().to_string();
        assert!(error.contains("bring format 1 to format 2"), "{error}");
        assert_eq!(rows(&path, "SELECT value FROM meta WHERE name = 'format'"), [[1]]);
        assert_eq!(rows(&path, "SELECT count(*) FROM keys_498837"), [[10]]);
        assert_eq!(rows(&path, "SELECT count(*) FROM sqlite_master WHERE name = 'key_counts'"), [[0]]);

        let fresh = folder.path().join("fresh.db");
        let salvaged = State::salvage(&path, &fresh).unwrap();
        assert_eq!(salvaged.lost, ["idempotency keys: 1 in table keys_498837 without a record's id"]);
        let state = open(&fresh);
        assert_eq!((state.keys(), id_of(&state, USERS, "e1").is_some(), id_of(&state, ORDERS, "p1")), (9, true, None));
    }

    #[test]
    fn a_file_of_format_1_is_salvaged_into_the_present_format_with_its_keys() {
        let folder = tempfile::tempdir().unwrap();
        let path = golden(&folder);
        let fresh = folder.path().join("fresh.db");
        let salvaged = State::salvage(&path, &fresh).unwrap();
        assert_eq!((salvaged.lost, salvaged.tables), (vec![], vec![]));
        // As a repair does: the rows come first.
        let disk: Arc<dyn crate::source::embedded::disk::Disk> = Arc::new(RealDisk);
        State::recount(&fresh, &disk).unwrap();
        assert_is_whole(&fresh);
    }
}
