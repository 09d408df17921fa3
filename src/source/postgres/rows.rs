//! Rows and what they stand for: numbers, names and encoded records.

use std::sync::Arc;

use bytes::Bytes;
use tokio_postgres::{Error, Row};

use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::{AsideRow, BranchName, DeadLetter, DeadReason, LogError, RowKey};

/// A position as its column has it; parts beyond 32,767 do not occur.
pub(super) const fn sql(position: Position) -> i64 {
    position.0.cast_signed()
}

/// The first place of the part after that of `position`.
pub(super) const fn part_end(position: Position) -> i64 {
    Position::in_part(position.part(), Position::LAST_OFFSET).0.cast_signed()
}

/// A position as it was stored.
pub(super) const fn position(stored: i64) -> Position {
    Position(stored.cast_unsigned())
}

/// A time as it was stored.
pub(super) const fn time(stored: i64) -> Timestamp {
    Timestamp::from_millis(stored)
}

/// A count that was stored and is small.
pub(super) fn count(stored: i64) -> u32 {
    u32::try_from(stored).unwrap_or(u32::MAX)
}

/// Text without what a text column refuses.
pub(super) fn text(text: &str) -> String {
    text.replace('\0', "\u{FFFD}")
}

/// A record's encoding.
pub(super) fn encoded(record: &Record) -> Vec<u8> {
    let mut bytes = Vec::new();
    record.encode(&mut bytes);
    bytes
}

/// The record of an encoding that was stored.
pub(super) fn record(bytes: Vec<u8>) -> Result<Arc<Record>, LogError> {
    let damaged = |error| LogError::Damaged(format!("a record on the Postgres shelf cannot be read: {error}").into());
    Record::decode(&Bytes::from(bytes)).map(Arc::new).map_err(damaged)
}

/// The id that was stored.
pub(super) fn id(bytes: &[u8]) -> RecordId {
    RecordId::from_bytes(bytes.try_into().unwrap_or_default())
}

/// The bytes of an id.
pub(super) fn id_bytes(id: &RecordId) -> &[u8] {
    id.as_bytes()
}

/// A reason's word.
pub(super) fn reason_word(reason: DeadReason) -> String {
    let value = serde_json::to_value(reason).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

/// A row's fields, or what the server gave instead.
pub(super) struct Fields<'a>(pub(super) &'a Row);

impl Fields<'_> {
    pub(super) fn row_key(&self) -> Result<RowKey, Error> {
        Ok(RowKey { position: position(self.0.try_get("position")?), child: count(self.0.try_get("child")?) })
    }

    pub(super) fn bytes(&self, name: &str) -> Result<Vec<u8>, Error> {
        self.0.try_get(name)
    }

    fn rendered(&self) -> Result<Option<Bytes>, Error> {
        Ok(self.0.try_get::<_, Option<Vec<u8>>>("rendered")?.map(Bytes::from))
    }

    pub(super) fn lane(&self) -> Result<Box<str>, Error> {
        Ok(String::from_utf8_lossy(&self.bytes("lane")?).into())
    }

    /// A row that is set aside.
    pub(super) fn aside(&self) -> Result<Result<AsideRow, LogError>, Error> {
        let found = record(self.bytes("record")?);
        let row = AsideRow {
            row: self.row_key()?,
            lane: self.lane()?,
            record: match found {
                Ok(record) => record,
                Err(damaged) => return Ok(Err(damaged)),
            },
            rendered: self.rendered()?,
            attempts: count(self.0.try_get("attempts")?),
            first_failed: time(self.0.try_get("first_failed")?),
            next_try: time(self.0.try_get("next_try")?),
            last_error: self.0.try_get::<_, &str>("last_error")?.into(),
            replayed: self.0.try_get::<_, Option<i64>>("replay")?.is_some(),
        };
        Ok(Ok(row))
    }

    /// A dead letter.
    pub(super) fn dead(&self) -> Result<Result<DeadLetter, LogError>, Error> {
        let found = record(self.bytes("record")?);
        let reason = serde_json::Value::String(self.0.try_get("reason")?);
        let letter = DeadLetter {
            row: self.row_key()?,
            branch: BranchName::from_stored(self.0.try_get("branch")?),
            at: time(self.0.try_get("at")?),
            reason: serde_json::from_value(reason).unwrap_or(DeadReason::Refused),
            attempts: count(self.0.try_get("attempts")?),
            last_error: self.0.try_get::<_, &str>("last_error")?.into(),
            stage: self.0.try_get::<_, &str>("stage")?.into(),
            revision: self.0.try_get::<_, &str>("revision")?.into(),
            record: match found {
                Ok(record) => record,
                Err(damaged) => return Ok(Err(damaged)),
            },
            rendered: self.rendered()?,
            overtaken: self.0.try_get("overtaken")?,
        };
        Ok(Ok(letter))
    }
}
