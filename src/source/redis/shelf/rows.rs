//! Rows as bytes: a head, which a script and a listing read, and a body with the record.
//!
//! A head begins with the record's id; that of a row set aside goes on with its lane. The rest is JSON.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::record::{Position, Record};
use crate::source::{AsideRow, BranchName, DeadLetter, DeadReason, LogError, RowKey};

/// A row's name: 12 bytes that sort as rows do.
pub(super) fn row_key(row: RowKey) -> Vec<u8> {
    let mut bytes = row.position.0.to_be_bytes().to_vec();
    bytes.extend_from_slice(&row.child.to_be_bytes());
    bytes
}

pub(super) fn row_of(bytes: &[u8]) -> Option<RowKey> {
    let (position, child) = bytes.split_first_chunk::<8>()?;
    let child = child.try_into().ok()?;
    Some(RowKey { position: Position(u64::from_be_bytes(*position)), child: u32::from_be_bytes(child) })
}

/// The range of rows of a part up to a position, as a server wants it.
pub(super) fn up_to(position: Position) -> (Vec<u8>, Vec<u8>) {
    let bound = |position: Position, child: u32| {
        let mut bytes = vec![b'['];
        bytes.extend(row_key(RowKey { position, child }));
        bytes
    };
    (bound(Position::in_part(position.part(), 0), 0), bound(position, u32::MAX))
}

#[derive(Serialize, Deserialize)]
struct AsideRest {
    attempts: u32,
    first_failed: i64,
    next_try: i64,
    last_error: String,
    replayed: bool,
}

#[derive(Serialize, Deserialize)]
struct DeadRest {
    position: u64,
    child: u32,
    at: i64,
    reason: DeadReason,
    attempts: u32,
    last_error: String,
    stage: String,
    revision: String,
    key: Option<String>,
    bytes: u64,
}

/// What is read is not what was written.
pub(super) fn damaged(what: &str) -> LogError {
    LogError::Damaged(format!("the shelf in Redis: {what} cannot be read").into())
}

/// A record and what was rendered of it.
pub(super) fn body(record: &Record, rendered: Option<&Bytes>) -> Vec<u8> {
    let mut encoded = Vec::new();
    record.encode(&mut encoded);
    let mut out = u32::try_from(encoded.len()).unwrap_or(u32::MAX).to_be_bytes().to_vec();
    out.append(&mut encoded);
    if let Some(rendered) = rendered {
        out.push(1);
        out.extend_from_slice(rendered);
    }
    out
}

pub(super) fn body_of(bytes: Vec<u8>) -> Result<(Arc<Record>, Option<Bytes>), LogError> {
    let wrong = || damaged("a record");
    let bytes = Bytes::from(bytes);
    let length = bytes.first_chunk::<4>().map(|length| u32::from_be_bytes(*length)).ok_or_else(wrong)?;
    let end = usize::try_from(length).ok().and_then(|length| length.checked_add(4)).ok_or_else(wrong)?;
    if end > bytes.len() {
        return Err(wrong());
    }
    let record = Record::decode(&bytes.slice(4..end)).map_err(|_| wrong())?;
    let rendered = (bytes.len() > end).then(|| bytes.slice(end + 1..));
    Ok((Arc::new(record), rendered))
}

/// The head of a row that is set aside.
pub(super) fn aside_head(row: &AsideRow) -> Vec<u8> {
    let rest = AsideRest {
        attempts: row.attempts,
        first_failed: row.first_failed.as_millis(),
        next_try: row.next_try.as_millis(),
        last_error: row.last_error.to_string(),
        replayed: row.replayed,
    };
    let mut out = row.record.id.as_bytes().to_vec();
    out.extend_from_slice(&u32::try_from(row.lane.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(row.lane.as_bytes());
    out.extend(serde_json::to_vec(&rest).unwrap_or_default());
    out
}

/// A row that is set aside, with its body or without.
pub(super) fn aside_of(row: RowKey, head: &[u8], body: Option<Vec<u8>>) -> Result<AsideRow, LogError> {
    let wrong = || damaged("a row that is set aside");
    let (_, head) = head.split_at_checked(16).ok_or_else(wrong)?;
    let (length, head) = head.split_first_chunk::<4>().ok_or_else(wrong)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| wrong())?;
    let (lane, rest) = head.split_at_checked(length).ok_or_else(wrong)?;
    let rest: AsideRest = serde_json::from_slice(rest).map_err(|_| wrong())?;
    let (record, rendered) = match body {
        Some(body) => body_of(body)?,
        None => {
            (Arc::new(Record::new(crate::record::RecordId::from_bytes([0; 16]), Timestamp::MIN, Bytes::new())), None)
        }
    };
    Ok(AsideRow {
        row,
        lane: std::str::from_utf8(lane).map_err(|_| wrong())?.into(),
        record,
        rendered,
        attempts: rest.attempts,
        first_failed: Timestamp::from_millis(rest.first_failed),
        next_try: Timestamp::from_millis(rest.next_try),
        last_error: rest.last_error.into(),
        replayed: rest.replayed,
    })
}

/// What a dead letter counts.
pub(super) fn weight(letter: &DeadLetter) -> u64 {
    (letter.record.weight() + letter.rendered.as_ref().map_or(0, Bytes::len)) as u64
}

/// The end of a dead letter's head: the script puts its id and the number of its branch before it.
pub(super) fn dead_head(letter: &DeadLetter) -> Vec<u8> {
    let rest = DeadRest {
        position: letter.row.position.0,
        child: letter.row.child,
        at: letter.at.as_millis(),
        reason: letter.reason,
        attempts: letter.attempts,
        last_error: letter.last_error.to_string(),
        stage: letter.stage.to_string(),
        revision: letter.revision.to_string(),
        key: letter.record.key.as_deref().map(str::to_owned),
        bytes: weight(letter),
    };
    serde_json::to_vec(&rest).unwrap_or_default()
}

/// A dead letter without its record.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) id: [u8; 16],
    /// The branch's number.
    pub(super) branch: String,
    pub(super) bytes: u64,
    pub(super) key: Option<String>,
    letter: DeadLetter,
}

impl Head {
    pub(super) fn of(head: &[u8], overtaken: bool) -> Result<Self, LogError> {
        let wrong = || damaged("a dead letter");
        let (id, head) = head.split_first_chunk::<16>().ok_or_else(wrong)?;
        let bar = head.iter().position(|byte| *byte == b'|').ok_or_else(wrong)?;
        let (branch, rest) = head.split_at_checked(bar).ok_or_else(wrong)?;
        let rest: DeadRest = serde_json::from_slice(rest.get(1..).unwrap_or_default()).map_err(|_| wrong())?;
        let none = Record::new(crate::record::RecordId::from_bytes(*id), Timestamp::MIN, Bytes::new());
        Ok(Self {
            id: *id,
            branch: String::from_utf8(branch.to_vec()).map_err(|_| wrong())?,
            bytes: rest.bytes,
            key: rest.key,
            letter: DeadLetter {
                row: RowKey { position: Position(rest.position), child: rest.child },
                branch: BranchName::from_stored(""),
                at: Timestamp::from_millis(rest.at),
                reason: rest.reason,
                attempts: rest.attempts,
                last_error: rest.last_error.into(),
                stage: rest.stage.into(),
                revision: rest.revision.into(),
                record: Arc::new(none),
                rendered: None,
                overtaken,
            },
        })
    }

    pub(super) fn letter(&self) -> &DeadLetter {
        &self.letter
    }

    /// The whole letter.
    pub(super) fn with(&self, branch: &BranchName, body: Vec<u8>) -> Result<DeadLetter, LogError> {
        let (record, rendered) = body_of(body)?;
        Ok(DeadLetter { branch: branch.clone(), record, rendered, ..self.letter.clone() })
    }
}
