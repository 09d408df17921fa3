//! Rows of `state.db` held against their own bytes: SQLite does not notice a flipped bit.
//!
//! A row that keeps a frame's bytes has a checksum over them; what its other columns say must be what the bytes say.

use bytes::Bytes;
use rusqlite::Connection;
use rusqlite::types::Value;

use crate::record::Record;
use crate::source::embedded::body::kind;
use crate::source::embedded::change::Change;
use crate::source::{AsideRow, DeadLetter};

/// The tables whose rows keep bytes with a checksum, each with its columns in order.
pub(super) const CHECKED: [&str; 3] = ["parked", "aside", "dead"];

fn whole(value: Option<&Value>) -> Option<i64> {
    match value? {
        Value::Integer(number) => Some(*number),
        _ => None,
    }
}

fn is_text(value: Option<&Value>, expected: Option<&str>) -> bool {
    match (value, expected) {
        (Some(Value::Text(found)), Some(expected)) => found == expected,
        (Some(Value::Null), None) => true,
        _ => false,
    }
}

/// The bytes at the end of a row, if they match the checksum after them.
fn verified(row: &[Value]) -> Option<Bytes> {
    let [.., Value::Blob(bytes), Value::Integer(crc)] = row else { return None };
    (i64::from(crc32c::crc32c(bytes)) == *crc).then(|| Bytes::copy_from_slice(bytes))
}

/// Whether a whole row of one of the [`CHECKED`] tables says what its bytes say; rows of other tables have none.
pub(super) fn fits(table: &str, row: &[Value]) -> bool {
    let fits = match table {
        "parked" => parked(row),
        "aside" => aside(row),
        "dead" => dead(row),
        _ => Some(true),
    };
    fits == Some(true)
}

fn parked(row: &[Value]) -> Option<bool> {
    let record = Record::decode(&verified(row)?).ok()?;
    let id = matches!(row.get(3)?, Value::Blob(id) if id.as_slice() == record.id.as_bytes());
    let due = record.due_at.is_none_or(|due| Some(due.as_millis()) == whole(row.get(2)));
    Some(id && due && is_text(row.get(4), record.key.as_deref()))
}

/// Whether the columns of a row that is set aside are those of its bytes.
pub(super) fn aside_is(row: &AsideRow, columns: &[Option<i64>], lane: &str) -> bool {
    let own = [
        i64::try_from(row.row.position.0).ok(),
        Some(i64::from(row.row.child)),
        Some(i64::from(row.attempts)),
        Some(row.first_failed.as_millis()),
        Some(row.next_try.as_millis()),
    ];
    own == columns && *row.lane == *lane
}

fn aside(row: &[Value]) -> Option<bool> {
    let Ok(Change::Aside { row: said, .. }) = Change::decode(kind::ASIDE, &verified(row)?) else { return None };
    let Value::Text(lane) = row.get(4)? else { return None };
    let columns = [2, 3, 5, 6, 7].map(|at| whole(row.get(at)));
    Some(aside_is(&said, &columns, lane))
}

/// Whether the columns by which dead letters are found are those of its bytes. Branch and `overtaken` change later.
pub(super) fn dead_is(letter: &DeadLetter, columns: &[Option<i64>], id: &[u8], key: Option<&str>) -> bool {
    let own = [
        i64::try_from(letter.row.position.0).ok(),
        Some(i64::from(letter.row.child)),
        Some(letter.at.as_millis()),
        Some(i64::from(letter.attempts)),
    ];
    own == columns && id == letter.record.id.as_bytes() && key == letter.record.key.as_deref()
}

fn dead(row: &[Value]) -> Option<bool> {
    let Ok(Change::Dead { letter }) = Change::decode(kind::DEAD, &verified(row)?) else { return None };
    let Value::Blob(id) = row.get(7)? else { return None };
    let key = match row.get(8)? {
        Value::Text(key) => Some(key.as_str()),
        _ => None,
    };
    let columns = [3, 4, 5, 9].map(|at| whole(row.get(at)));
    Some(dead_is(&letter, &columns, id, key) && is_text(row.get(10), Some(&letter.last_error)))
}

/// How a row is called in a report: its first columns up to the place that names it.
pub(super) fn name_of(table: &str, row: &[Value]) -> String {
    let show = |value: &Value| match value {
        Value::Integer(number) => number.to_string(),
        Value::Text(text) => text.clone(),
        _ => "?".to_owned(),
    };
    let columns = if table == "aside" { 4 } else { 1 };
    let name: Vec<String> = row.iter().take(columns).map(show).collect();
    format!("row {} of table {table}", name.join("/"))
}

/// Names every row that does not say what its bytes say.
pub(super) fn misfits(db: &Connection) -> rusqlite::Result<Vec<String>> {
    let mut found = Vec::new();
    for table in CHECKED {
        let mut select = db.prepare(&format!("SELECT * FROM {table}"))?;
        let columns = select.column_count();
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let row: Vec<Value> = (0..columns).map(|at| row.get(at)).collect::<Result<_, _>>()?;
            if !fits(table, &row) {
                found.push(format!("{} does not match its checksum", name_of(table, &row)));
            }
        }
    }
    Ok(found)
}
