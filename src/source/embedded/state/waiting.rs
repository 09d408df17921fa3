//! Reading what waits: parked records, and deliveries that are set aside.

use bytes::Bytes;
use rusqlite::{Connection, Row, params};

use super::reader::{StateReader, WaitingRow, damaged};
use super::{Counts, StateError, failed, number, rows, sql};
use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::embedded::body::kind;
use crate::source::embedded::change::{Change, NamespaceNumber, Sequence};
use crate::source::embedded::due::DueRow;
use crate::source::{AsideLane, AsideRow, BranchName, Page, ParkedQuery, RowKey};

/// See [`super::State::load_due`].
pub(super) fn load_due(
    db: &Connection,
    counts: &Counts,
    from: Timestamp,
    to: Timestamp,
    limit: usize,
) -> rusqlite::Result<(Vec<DueRow>, Timestamp)> {
    let mut reached = to;
    let mut found = Vec::new();
    let mut select = db.prepare_cached(
        "SELECT sequence, due, record, crc FROM parked WHERE namespace = ? AND due >= ? AND due < ? ORDER BY due, sequence LIMIT ?",
    )?;
    for namespace in counts.parking() {
        let cap = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut rows = select.query(params![namespace.0, from.as_millis(), reached.as_millis(), cap])?;
        let mut taken = 0;
        while let Some(row) = rows.next()? {
            let (record, crc): (Vec<u8>, u32) = (row.get(2)?, row.get(3)?);
            taken += 1;
            let record = Bytes::from(record);
            if crc32c::crc32c(&record) != crc || !is_due_as_said(&record, Timestamp::from_millis(row.get(1)?)) {
                tracing::error!(
                    sequence = row.get::<_, i64>(0)?,
                    "a parked record in state.db is damaged and is left there"
                );
                continue;
            }
            found.push(DueRow {
                namespace,
                parked: Sequence(number(row.get(0)?)),
                due_at: Timestamp::from_millis(row.get(1)?),
                record,
            });
        }
        // Full: complete only up to the time of the last row, of which there may be more.
        if taken == limit
            && let Some(last) = found.last()
        {
            let later = Timestamp::from_millis(from.as_millis() + 1);
            reached = last.due_at.max(later).min(reached);
        }
    }
    if reached < to && found.iter().all(|row| row.due_at >= reached) {
        // More rows of one millisecond than the limit: all of that millisecond, however many.
        let next = Timestamp::from_millis(reached.as_millis() + 1);
        return load_due(db, counts, from, next, usize::MAX >> 1);
    }
    found.retain(|row| row.due_at < reached);
    found.sort_unstable_by_key(|row| (row.due_at, row.parked));
    Ok((found, reached))
}

/// Whether the column by which a record is released says what the record says: a flipped bit would let it go early.
fn is_due_as_said(record: &Bytes, due_at: Timestamp) -> bool {
    Record::decode(record).is_ok_and(|record| record.due_at.is_none_or(|said| said == due_at))
}

fn waiting_row(row: &Row<'_>) -> rusqlite::Result<(WaitingRow, u32)> {
    let record: Vec<u8> = row.get(2)?;
    let parked = Sequence(number(row.get(0)?));
    let waiting = WaitingRow { parked, due_at: Timestamp::from_millis(row.get(1)?), record: Bytes::from(record) };
    Ok((waiting, row.get(3)?))
}

impl StateReader {
    fn waiting(&self, query: &str, values: impl rusqlite::Params) -> Result<Vec<WaitingRow>, StateError> {
        let rows = self.with(|db| {
            let mut select = db.prepare_cached(query)?;
            select.query_map(values, waiting_row)?.collect::<Result<Vec<_>, _>>()
        })?;
        rows.into_iter()
            .map(|(row, crc)| {
                if crc32c::crc32c(&row.record) == crc && is_due_as_said(&row.record, row.due_at) {
                    Ok(row)
                } else {
                    Err(damaged(self.path(), "parked", row.parked.0))
                }
            })
            .collect()
    }

    /// The parked record with this id.
    ///
    /// # Errors
    /// When SQLite fails or the row is damaged.
    pub fn parked_by_id(&self, id: RecordId) -> Result<Option<WaitingRow>, StateError> {
        let query = "SELECT sequence, due, record, crc FROM parked WHERE id = ?";
        Ok(self.waiting(query, params![id.as_bytes().as_slice()])?.into_iter().next())
    }

    /// All parked records of a key.
    ///
    /// # Errors
    /// When SQLite fails or a row is damaged.
    pub fn parked_by_key(&self, namespace: NamespaceNumber, key: &str) -> Result<Vec<WaitingRow>, StateError> {
        let query =
            "SELECT sequence, due, record, crc FROM parked WHERE namespace = ? AND key = ? ORDER BY due, sequence";
        self.waiting(query, params![namespace.0, key])
    }

    /// A page of parked records in (due, sequence) order.
    ///
    /// # Errors
    /// When SQLite fails or a row is damaged.
    pub fn parked_page(&self, namespace: NamespaceNumber, query: &ParkedQuery) -> Result<Page<WaitingRow>, StateError> {
        let (due, sequence) = query.after.as_deref().and_then(parse_place).unwrap_or((-1, -1));
        let from = query.from.map_or(0, Timestamp::as_millis).max(due);
        let to = query.to.unwrap_or(Timestamp::MAX).as_millis();
        let limit = query.limit.max(1);
        let more = i64::try_from(limit + 1).unwrap_or(i64::MAX);
        let mut rows = match &query.key {
            Some(key) => self.waiting(
                "SELECT sequence, due, record, crc FROM parked INDEXED BY parked_key WHERE namespace = ? AND key = ?
                 AND due >= ? AND due < ? AND (due, sequence) > (?, ?) ORDER BY due, sequence LIMIT ?",
                params![namespace.0, key, from, to, due, sequence, more],
            )?,
            None => self.waiting(
                "SELECT sequence, due, record, crc FROM parked WHERE namespace = ?
                 AND due >= ? AND due < ? AND (due, sequence) > (?, ?) ORDER BY due, sequence LIMIT ?",
                params![namespace.0, from, to, due, sequence, more],
            )?,
        };
        let next = (rows.len() > limit).then(|| {
            rows.truncate(limit);
            rows.last().map(|row| format!("{}-{}", row.due_at.as_millis(), row.parked.0)).unwrap_or_default()
        });
        Ok(Page { rows, next })
    }

    /// Whether the record was cancelled, as far as that is remembered.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn is_cancelled(&self, id: RecordId) -> Result<bool, StateError> {
        self.with(|db| {
            let mut find = db.prepare_cached("SELECT 1 FROM cancelled WHERE id = ?")?;
            find.exists(params![id.as_bytes().as_slice()])
        })
    }

    /// The lanes of a branch that have rows; all of them, or only one.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn aside_lanes(
        &self,
        namespace: NamespaceNumber,
        branch: &BranchName,
        only: Option<&str>,
    ) -> Result<Vec<AsideLane>, StateError> {
        self.with(|db| {
            let mut select = db.prepare_cached(
                "SELECT lane, position, child, next_try, attempts, first_failed FROM aside
                 WHERE namespace = ?1 AND branch = ?2 AND (?3 IS NULL OR lane = ?3) ORDER BY lane, position, child",
            )?;
            let mut rows = select.query(params![namespace.0, branch.as_str(), only])?;
            let mut lanes: Vec<AsideLane> = Vec::new();
            while let Some(row) = rows.next()? {
                let lane: String = row.get(0)?;
                let key = RowKey { position: Position(number(row.get(1)?)), child: row.get(2)? };
                if let Some(same) = lanes.last_mut().filter(|same| *same.lane == *lane) {
                    (same.rows, same.last) = (same.rows + 1, key);
                    continue;
                }
                lanes.push(AsideLane {
                    lane: lane.into(),
                    first: key,
                    last: key,
                    rows: 1,
                    next_try: Timestamp::from_millis(row.get(3)?),
                    attempts: row.get(4)?,
                    first_failed: Timestamp::from_millis(row.get(5)?),
                });
            }
            Ok(lanes)
        })
    }

    /// The rows of a lane, in order, at most `limit`.
    ///
    /// # Errors
    /// When SQLite fails or a row is damaged.
    pub fn aside_rows(
        &self,
        namespace: NamespaceNumber,
        branch: &BranchName,
        lane: &str,
        limit: usize,
    ) -> Result<Vec<AsideRow>, StateError> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.aside(
            "SELECT position, body, crc, child, attempts, first_failed, next_try, lane FROM aside
             WHERE namespace = ? AND branch = ? AND lane = ? ORDER BY position, child LIMIT ?",
            params![namespace.0, branch.as_str(), lane, limit],
        )
    }

    /// A branch's rows of one position.
    ///
    /// # Errors
    /// When SQLite fails or a row is damaged.
    pub fn aside_at(
        &self,
        namespace: NamespaceNumber,
        branch: &BranchName,
        position: Position,
    ) -> Result<Vec<AsideRow>, StateError> {
        self.aside(
            "SELECT position, body, crc, child, attempts, first_failed, next_try, lane FROM aside
             WHERE namespace = ? AND branch = ? AND position = ? ORDER BY child",
            params![namespace.0, branch.as_str(), sql(position.0)],
        )
    }

    fn aside(&self, query: &str, values: impl rusqlite::Params) -> Result<Vec<AsideRow>, StateError> {
        let rows = self.with(|db| {
            let mut select = db.prepare_cached(query)?;
            let row = |row: &Row<'_>| {
                let columns = [row.get(0)?, row.get(3)?, row.get(4)?, row.get(5)?, row.get(6)?];
                let lane: String = row.get(7)?;
                Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?, row.get::<_, u32>(2)?, columns, lane))
            };
            select.query_map(values, row)?.collect::<Result<Vec<_>, _>>()
        })?;
        rows.into_iter()
            .map(|(position, body, crc, columns, lane)| {
                if crc32c::crc32c(&body) != crc {
                    return Err(damaged(self.path(), "aside", number(position)));
                }
                match Change::decode(kind::ASIDE, &Bytes::from(body)) {
                    Ok(Change::Aside { row, .. }) if rows::aside_is(&row, &columns, &lane) => Ok(*row),
                    _ => Err(damaged(self.path(), "aside", number(position))),
                }
            })
            .collect()
    }

    /// Runs a query on a connection of its own.
    pub(super) fn with<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, StateError> {
        let db = self.connection()?;
        let result = query(&db).map_err(failed(self.path(), "read"));
        self.give_back(db);
        result
    }
}

fn parse_place(text: &str) -> Option<(i64, i64)> {
    let (due, sequence) = text.split_once('-')?;
    Some((due.parse().ok()?, sequence.parse().ok()?))
}
