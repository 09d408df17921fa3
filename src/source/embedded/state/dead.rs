//! Reading the dead letters.

use bytes::Bytes;
use rusqlite::types::Value;
use rusqlite::{Row, params, params_from_iter};

use super::reader::{StateReader, damaged};
use super::{StateError, number, rows, sql};
use crate::record::Position;
use crate::source::embedded::body::kind;
use crate::source::embedded::change::{Change, NamespaceNumber};
use crate::source::{BranchName, DeadLetter, DeadQuery, Page};

const COLUMNS: &str = "sequence, body, crc, overtaken, branch, position, child, at, attempts, id, key";

impl StateReader {
    /// A page of dead letters, in the order of their end.
    ///
    /// # Errors
    /// When SQLite fails or a row is damaged.
    pub fn dead_page(&self, namespace: NamespaceNumber, query: &DeadQuery) -> Result<Page<DeadLetter>, StateError> {
        let mut sql_text = format!("SELECT {COLUMNS} FROM dead WHERE namespace = ?");
        let mut values = vec![Value::from(namespace.0)];
        let mut narrow = |condition: &str, value: Option<Value>| {
            if let Some(value) = value {
                sql_text.push_str(" AND ");
                sql_text.push_str(condition);
                values.push(value);
            }
        };
        let reason = query.reason.and_then(|reason| serde_json::to_value(reason).ok());
        let after = i64::try_from(query.after_number()).unwrap_or(i64::MAX);
        narrow("branch = ?", query.branch.clone().map(Value::from));
        narrow("reason = ?", reason.and_then(|reason| reason.as_str().map(|text| Value::from(text.to_owned()))));
        narrow("id = ?", query.id.map(|id| Value::from(id.as_bytes().to_vec())));
        narrow("key = ?", query.key.clone().map(Value::from));
        narrow("at >= ?", query.from.map(|from| Value::from(from.as_millis())));
        narrow("at < ?", query.to.map(|to| Value::from(to.as_millis())));
        narrow("instr(last_error, ?) > 0", query.error_contains.clone().map(Value::from));
        narrow("sequence > ?", Some(Value::from(after)));
        let limit = query.rows();
        sql_text.push_str(" ORDER BY sequence LIMIT ?");
        values.push(Value::from(i64::try_from(limit.saturating_add(1)).unwrap_or(i64::MAX)));
        let mut rows = self.letters(&sql_text, params_from_iter(values))?;
        let next = (rows.len() > limit).then(|| {
            rows.truncate(limit);
            rows.last().map(|(sequence, _)| sequence.to_string()).unwrap_or_default()
        });
        Ok(Page { rows: rows.into_iter().map(|(_, letter)| letter).collect(), next })
    }

    /// A branch's dead letters of one position.
    ///
    /// # Errors
    /// When SQLite fails or a row is damaged.
    pub fn dead_at(
        &self,
        namespace: NamespaceNumber,
        branch: &BranchName,
        position: Position,
    ) -> Result<Vec<DeadLetter>, StateError> {
        let query = format!("SELECT {COLUMNS} FROM dead WHERE namespace = ? AND branch = ? AND position = ?");
        let rows = self.letters(&query, params![namespace.0, branch.as_str(), sql(position.0)])?;
        Ok(rows.into_iter().map(|(_, letter)| letter).collect())
    }

    fn letters(&self, query: &str, values: impl rusqlite::Params) -> Result<Vec<(i64, DeadLetter)>, StateError> {
        type Found = (i64, Vec<u8>, u32, bool, String, [Option<i64>; 4], Vec<u8>, Option<String>);
        let rows: Vec<Found> = self.with(|db| {
            let mut select = db.prepare_cached(query)?;
            let row = |row: &Row<'_>| {
                let columns = [row.get(5)?, row.get(6)?, row.get(7)?, row.get(8)?];
                let (id, key) = (row.get(9)?, row.get(10)?);
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, columns, id, key))
            };
            select.query_map(values, row)?.collect()
        })?;
        let letter = |(sequence, body, crc, overtaken, branch, columns, id, key): Found| {
            let broken = || damaged(self.path(), "dead", number(sequence));
            if crc32c::crc32c(&body) != crc {
                return Err(broken());
            }
            match Change::decode(kind::DEAD, &Bytes::from(body)) {
                Ok(Change::Dead { letter }) if rows::dead_is(&letter, &columns, &id, key.as_deref()) => {
                    // The column follows a branch that was renamed.
                    let branch = BranchName::from_stored(&branch);
                    Ok((sequence, DeadLetter { branch, overtaken, ..*letter }))
                }
                _ => Err(broken()),
            }
        };
        rows.into_iter().map(letter).collect()
    }
}
