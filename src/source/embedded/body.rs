//! The body of a frame: a change as typed entries, and back.
//!
//! Each entry is a tag (u8), a length (u32 little-endian) and that many bytes. A reader skips tags that it does not
//! know and refuses a body in which a needed entry is missing or cut short. Nothing here does I/O.

use std::sync::Arc;

use bytes::Bytes;

use super::change::{Change, Sequence};
use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::{AsideRow, BranchName, DeadLetter, DeadReason, IdempotencyKey, RowKey, StoredPause};

/// The bytes of a frame's body do not say what its kind needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the frame's body is malformed: {0}")]
pub struct MalformedBody(&'static str);

/// The number of each kind of change in a frame's header. Numbers are never reused.
pub mod kind {
    /// A record entered the log.
    pub const APPEND: u8 = 1;
    /// A record was parked.
    pub const PARK: u8 = 2;
    /// A parked record entered the log.
    pub const RELEASE: u8 = 3;
    /// A parked record was cancelled.
    pub const CANCEL: u8 = 4;
    /// A parked record moved to another time.
    pub const MOVE: u8 = 5;
    /// A branch's frontier moved.
    pub const CURSOR: u8 = 6;
    /// A delivery was set aside.
    pub const ASIDE: u8 = 7;
    /// A set-aside delivery ended well.
    pub const RETURNED: u8 = 8;
    /// A delivery ended in the dead letters.
    pub const DEAD: u8 = 9;
    /// A dead letter's key has moved on.
    pub const OVERTAKEN: u8 = 10;
    /// A dead letter went back to its branch.
    pub const REPLAY: u8 = 11;
    /// A dead letter was deleted.
    pub const PURGE: u8 = 12;
    /// A delivery ended without being sent.
    pub const DROPPED: u8 = 13;
    /// A branch is about to try a record.
    pub const MARK: u8 = 14;
    /// A lasting pause was set or cleared.
    pub const PAUSE: u8 = 15;
    /// A branch exists.
    pub const BRANCH_OPENED: u8 = 16;
    /// A branch is gone.
    pub const BRANCH_FORGOTTEN: u8 = 17;
    /// A revision of the pipeline file.
    pub const EPOCH: u8 = 18;
    /// Records were trimmed away.
    pub const TRIM: u8 = 19;
    /// A namespace was created.
    pub const NAMESPACE_CREATED: u8 = 20;
    /// A namespace is gone.
    pub const NAMESPACE_DELETED: u8 = 21;
    /// The instance started.
    pub const STARTED: u8 = 22;
    /// The instance stops orderly.
    pub const STOPPED: u8 = 23;
    /// A branch has another name.
    pub const BRANCH_RENAMED: u8 = 24;
}

mod tag {
    pub(super) const POSITION: u8 = 1;
    pub(super) const DUE_AT: u8 = 2;
    pub(super) const FROM: u8 = 3;
    pub(super) const PARKED: u8 = 4;
    pub(super) const KEY: u8 = 5;
    pub(super) const FINGERPRINT: u8 = 6;
    pub(super) const ID: u8 = 7;
    pub(super) const BRANCH: u8 = 8;
    pub(super) const CHILD: u8 = 9;
    pub(super) const LANE: u8 = 10;
    pub(super) const RENDERED: u8 = 11;
    pub(super) const ATTEMPTS: u8 = 12;
    pub(super) const FIRST_FAILED: u8 = 13;
    pub(super) const NEXT_TRY: u8 = 14;
    pub(super) const LAST_ERROR: u8 = 15;
    pub(super) const REPLAYED: u8 = 16;
    pub(super) const AT: u8 = 17;
    pub(super) const REASON: u8 = 18;
    pub(super) const STAGE: u8 = 19;
    pub(super) const REVISION: u8 = 20;
    pub(super) const OVERTAKEN: u8 = 21;
    pub(super) const CAUSE: u8 = 22;
    pub(super) const NOTE: u8 = 23;
    pub(super) const NUMBER: u8 = 24;
    pub(super) const FILES: u8 = 25;
    pub(super) const NAME: u8 = 26;
    pub(super) const CLEAN: u8 = 27;
    pub(super) const RECORD: u8 = 255;
}

fn put(out: &mut Vec<u8>, tag: u8, bytes: &[u8]) {
    out.push(tag);
    out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(bytes);
}

fn put_u64(out: &mut Vec<u8>, tag: u8, number: u64) {
    put(out, tag, &number.to_le_bytes());
}

fn put_u32(out: &mut Vec<u8>, tag: u8, number: u32) {
    put(out, tag, &number.to_le_bytes());
}

fn put_time(out: &mut Vec<u8>, tag: u8, time: Timestamp) {
    put(out, tag, &time.as_millis().to_le_bytes());
}

/// Puts an entry whose length is known only once `fill` has run. Gives where its bytes start.
fn put_with(out: &mut Vec<u8>, tag: u8, fill: impl FnOnce(&mut Vec<u8>)) -> usize {
    out.push(tag);
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    let start = out.len();
    fill(out);
    let len = u32::try_from(out.len() - start).unwrap_or(u32::MAX);
    if let Some(place) = out.get_mut(at..start) {
        place.copy_from_slice(&len.to_le_bytes());
    }
    start
}

fn put_idempotency(out: &mut Vec<u8>, idempotency: Option<&IdempotencyKey>) {
    if let Some(IdempotencyKey { key, fingerprint }) = idempotency {
        put(out, tag::KEY, key.as_bytes());
        put(out, tag::FINGERPRINT, fingerprint);
    }
}

/// Puts the body of an `Append` whose record is still a value. Gives where the record's bytes start in `out`.
pub(super) fn put_append(
    out: &mut Vec<u8>,
    position: Position,
    idempotency: Option<&IdempotencyKey>,
    record: &Record,
) -> usize {
    put_u64(out, tag::POSITION, position.0);
    put_idempotency(out, idempotency);
    put_with(out, tag::RECORD, |out| record.encode(out))
}

/// Puts the body of a `Park` whose record is still a value. Gives where the record's bytes start in `out`.
pub(super) fn put_park(
    out: &mut Vec<u8>,
    due_at: Timestamp,
    idempotency: Option<&IdempotencyKey>,
    record: &Record,
) -> usize {
    put_time(out, tag::DUE_AT, due_at);
    put_idempotency(out, idempotency);
    put_with(out, tag::RECORD, |out| record.encode(out))
}

/// Puts the body of a `Release` whose record is still a value. Gives where the record's bytes start in `out`.
pub(super) fn put_release(
    out: &mut Vec<u8>,
    position: Position,
    parked: Sequence,
    due_at: Timestamp,
    record: &Record,
) -> usize {
    put_u64(out, tag::POSITION, position.0);
    put_u64(out, tag::PARKED, parked.0);
    put_time(out, tag::DUE_AT, due_at);
    put_with(out, tag::RECORD, |out| record.encode(out))
}

fn put_branch(out: &mut Vec<u8>, branch: &BranchName) {
    put(out, tag::BRANCH, branch.as_str().as_bytes());
}

fn put_row(out: &mut Vec<u8>, row: RowKey) {
    put_u64(out, tag::POSITION, row.position.0);
    put_u32(out, tag::CHILD, row.child);
}

fn put_aside(out: &mut Vec<u8>, branch: &BranchName, row: &AsideRow) {
    put_branch(out, branch);
    put_row(out, row.row);
    put(out, tag::LANE, row.lane.as_bytes());
    if let Some(rendered) = &row.rendered {
        put(out, tag::RENDERED, rendered);
    }
    put_u32(out, tag::ATTEMPTS, row.attempts);
    put_time(out, tag::FIRST_FAILED, row.first_failed);
    put_time(out, tag::NEXT_TRY, row.next_try);
    put(out, tag::LAST_ERROR, row.last_error.as_bytes());
    if row.replayed {
        put(out, tag::REPLAYED, &[]);
    }
    put_with(out, tag::RECORD, |out| row.record.encode(out));
}

fn put_dead(out: &mut Vec<u8>, letter: &DeadLetter) {
    put_branch(out, &letter.branch);
    put_row(out, letter.row);
    put_time(out, tag::AT, letter.at);
    put(out, tag::REASON, &[reason_number(letter.reason)]);
    put_u32(out, tag::ATTEMPTS, letter.attempts);
    put(out, tag::LAST_ERROR, letter.last_error.as_bytes());
    put(out, tag::STAGE, letter.stage.as_bytes());
    put(out, tag::REVISION, letter.revision.as_bytes());
    if let Some(rendered) = &letter.rendered {
        put(out, tag::RENDERED, rendered);
    }
    if letter.overtaken {
        put(out, tag::OVERTAKEN, &[]);
    }
    put_with(out, tag::RECORD, |out| letter.record.encode(out));
}

const fn reason_number(reason: DeadReason) -> u8 {
    match reason {
        DeadReason::Refused => 1,
        DeadReason::Exhausted => 2,
        DeadReason::Script => 3,
        DeadReason::Template => 4,
        DeadReason::NoRoute => 5,
        DeadReason::Crash => 6,
        DeadReason::Skipped => 7,
    }
}

const fn reason_of(number: u8) -> Option<DeadReason> {
    Some(match number {
        1 => DeadReason::Refused,
        2 => DeadReason::Exhausted,
        3 => DeadReason::Script,
        4 => DeadReason::Template,
        5 => DeadReason::NoRoute,
        6 => DeadReason::Crash,
        7 => DeadReason::Skipped,
        _ => return None,
    })
}

impl Change {
    /// The number that stands for this kind of change in a frame's header.
    pub const fn kind(&self) -> u8 {
        match self {
            Self::Append { .. } => kind::APPEND,
            Self::Park { .. } => kind::PARK,
            Self::Release { .. } => kind::RELEASE,
            Self::Cancel { .. } => kind::CANCEL,
            Self::Move { .. } => kind::MOVE,
            Self::Cursor { .. } => kind::CURSOR,
            Self::Aside { .. } => kind::ASIDE,
            Self::Returned { .. } => kind::RETURNED,
            Self::Dead { .. } => kind::DEAD,
            Self::Overtaken { .. } => kind::OVERTAKEN,
            Self::Replay { .. } => kind::REPLAY,
            Self::Purge { .. } => kind::PURGE,
            Self::Dropped { .. } => kind::DROPPED,
            Self::Mark { .. } => kind::MARK,
            Self::Pause { .. } => kind::PAUSE,
            Self::BranchOpened { .. } => kind::BRANCH_OPENED,
            Self::BranchForgotten { .. } => kind::BRANCH_FORGOTTEN,
            Self::BranchRenamed { .. } => kind::BRANCH_RENAMED,
            Self::Epoch { .. } => kind::EPOCH,
            Self::Trim { .. } => kind::TRIM,
            Self::NamespaceCreated { .. } => kind::NAMESPACE_CREATED,
            Self::NamespaceDeleted => kind::NAMESPACE_DELETED,
            Self::Started { .. } => kind::STARTED,
            Self::Stopped => kind::STOPPED,
        }
    }

    /// Appends the body's entries to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Append { position, record, idempotency } => {
                put_u64(out, tag::POSITION, position.0);
                put_idempotency(out, idempotency.as_ref());
                put(out, tag::RECORD, record);
            }
            Self::Park { due_at, record, idempotency } => {
                put_time(out, tag::DUE_AT, *due_at);
                put_idempotency(out, idempotency.as_ref());
                put(out, tag::RECORD, record);
            }
            Self::Release { position, parked, due_at, record } => {
                put_u64(out, tag::POSITION, position.0);
                put_u64(out, tag::PARKED, parked.0);
                put_time(out, tag::DUE_AT, *due_at);
                put(out, tag::RECORD, record);
            }
            Self::Cancel { parked, due_at, id } => {
                put_u64(out, tag::PARKED, parked.0);
                put_time(out, tag::DUE_AT, *due_at);
                put(out, tag::ID, id.as_bytes());
            }
            Self::Move { parked, from, due_at, record } => {
                put_u64(out, tag::PARKED, parked.0);
                put_time(out, tag::FROM, *from);
                put_time(out, tag::DUE_AT, *due_at);
                put(out, tag::RECORD, record);
            }
            Self::Cursor { branch, position }
            | Self::Mark { branch, position }
            | Self::BranchOpened { branch, position } => {
                put_branch(out, branch);
                put_u64(out, tag::POSITION, position.0);
            }
            Self::Aside { branch, row } | Self::Replay { branch, row } => put_aside(out, branch, row),
            Self::Returned { branch, row } | Self::Overtaken { branch, row } | Self::Purge { branch, row } => {
                put_branch(out, branch);
                put_row(out, *row);
            }
            Self::Dead { letter } => put_dead(out, letter),
            Self::Dropped { branch, position, reason } => {
                put_branch(out, branch);
                put_u64(out, tag::POSITION, position.0);
                put(out, tag::REASON, reason.as_bytes());
            }
            Self::Pause { branch, pause } => {
                put_branch(out, branch);
                if let Some(pause) = pause {
                    put(out, tag::CAUSE, pause.cause.as_bytes());
                    put(out, tag::NOTE, pause.note.as_bytes());
                    put_time(out, tag::AT, pause.since);
                }
            }
            Self::BranchForgotten { branch } => put_branch(out, branch),
            Self::BranchRenamed { from, to } => {
                put_branch(out, from);
                put(out, tag::NAME, to.as_str().as_bytes());
            }
            Self::Epoch { number, after, files } => {
                put_u32(out, tag::NUMBER, *number);
                put_u64(out, tag::POSITION, after.0);
                put(out, tag::FILES, files);
            }
            Self::Trim { first } => put_u64(out, tag::POSITION, first.0),
            Self::NamespaceCreated { name } => put(out, tag::NAME, name.as_bytes()),
            Self::NamespaceDeleted | Self::Stopped => {}
            Self::Started { clean } => put(out, tag::CLEAN, &[u8::from(*clean)]),
        }
    }

    /// Reads a body of this kind back; records and files share `body`.
    ///
    /// # Errors
    /// When an entry is cut short, a needed one is missing, or the kind is unknown.
    pub fn decode(kind: u8, body: &Bytes) -> Result<Self, MalformedBody> {
        let entries = Entries::read(body)?;
        Ok(match kind {
            kind::APPEND => Self::Append {
                position: entries.position()?,
                record: entries.bytes(tag::RECORD)?,
                idempotency: entries.idempotency()?,
            },
            kind::PARK => Self::Park {
                due_at: entries.time(tag::DUE_AT)?,
                record: entries.bytes(tag::RECORD)?,
                idempotency: entries.idempotency()?,
            },
            kind::RELEASE => Self::Release {
                position: entries.position()?,
                parked: Sequence(entries.u64(tag::PARKED)?),
                due_at: entries.time(tag::DUE_AT)?,
                record: entries.bytes(tag::RECORD)?,
            },
            kind::CANCEL => Self::Cancel {
                parked: Sequence(entries.u64(tag::PARKED)?),
                due_at: entries.time(tag::DUE_AT)?,
                id: RecordId::from_bytes(entries.array(tag::ID)?),
            },
            kind::MOVE => Self::Move {
                parked: Sequence(entries.u64(tag::PARKED)?),
                from: entries.time(tag::FROM)?,
                due_at: entries.time(tag::DUE_AT)?,
                record: entries.bytes(tag::RECORD)?,
            },
            kind::CURSOR => Self::Cursor { branch: entries.branch()?, position: entries.position()? },
            kind::ASIDE => Self::Aside { branch: entries.branch()?, row: Box::new(entries.aside()?) },
            kind::RETURNED => Self::Returned { branch: entries.branch()?, row: entries.row()? },
            kind::DEAD => Self::Dead { letter: Box::new(entries.dead()?) },
            kind::OVERTAKEN => Self::Overtaken { branch: entries.branch()?, row: entries.row()? },
            kind::REPLAY => Self::Replay { branch: entries.branch()?, row: Box::new(entries.aside()?) },
            kind::PURGE => Self::Purge { branch: entries.branch()?, row: entries.row()? },
            kind::DROPPED => Self::Dropped {
                branch: entries.branch()?,
                position: entries.position()?,
                reason: entries.text(tag::REASON)?.into(),
            },
            kind::MARK => Self::Mark { branch: entries.branch()?, position: entries.position()? },
            kind::PAUSE => Self::Pause { branch: entries.branch()?, pause: entries.pause()? },
            kind::BRANCH_OPENED => Self::BranchOpened { branch: entries.branch()?, position: entries.position()? },
            kind::BRANCH_FORGOTTEN => Self::BranchForgotten { branch: entries.branch()? },
            kind::BRANCH_RENAMED => {
                Self::BranchRenamed { from: entries.branch()?, to: BranchName::from_stored(entries.text(tag::NAME)?) }
            }
            kind::EPOCH => Self::Epoch {
                number: entries.u32(tag::NUMBER)?,
                after: entries.position()?,
                files: entries.bytes(tag::FILES)?,
            },
            kind::TRIM => Self::Trim { first: entries.position()? },
            kind::NAMESPACE_CREATED => Self::NamespaceCreated { name: entries.text(tag::NAME)?.into() },
            kind::NAMESPACE_DELETED => Self::NamespaceDeleted,
            kind::STARTED => Self::Started { clean: entries.array::<1>(tag::CLEAN)? != [0] },
            kind::STOPPED => Self::Stopped,
            _ => return Err(MalformedBody("unknown kind")),
        })
    }
}

/// The entries of one body; none holds a tag twice that matters, so the first wins.
struct Entries<'a> {
    body: &'a Bytes,
    found: [(u8, usize, usize); 16],
    len: usize,
}

impl<'a> Entries<'a> {
    fn read(body: &'a Bytes) -> Result<Self, MalformedBody> {
        let cut = || MalformedBody("cut short");
        let mut entries = Self { body, found: [(0, 0, 0); 16], len: 0 };
        let mut at = 0;
        while at < body.len() {
            let tag = *body.get(at).ok_or_else(cut)?;
            let len: [u8; 4] = body.get(at + 1..at + 5).and_then(|four| four.try_into().ok()).ok_or_else(cut)?;
            let start = at + 5;
            let len = usize::try_from(u32::from_le_bytes(len)).map_err(|_| cut())?;
            let end = start.checked_add(len).filter(|end| *end <= body.len()).ok_or_else(cut)?;
            // More entries than any kind has can only be unknown ones; the known are written first.
            if let Some(place) = entries.found.get_mut(entries.len) {
                *place = (tag, start, end);
                entries.len += 1;
            }
            at = end;
        }
        Ok(entries)
    }

    fn span(&self, tag: u8) -> Option<(usize, usize)> {
        self.found.iter().take(self.len).find(|(found, ..)| *found == tag).map(|(_, start, end)| (*start, *end))
    }

    fn slice(&self, tag: u8) -> Result<&'a [u8], MalformedBody> {
        let (start, end) = self.span(tag).ok_or(MalformedBody("an entry is missing"))?;
        self.body.get(start..end).ok_or(MalformedBody("cut short"))
    }

    fn bytes(&self, tag: u8) -> Result<Bytes, MalformedBody> {
        let (start, end) = self.span(tag).ok_or(MalformedBody("an entry is missing"))?;
        Ok(self.body.slice(start..end))
    }

    fn optional(&self, tag: u8) -> Option<Bytes> {
        self.span(tag).map(|(start, end)| self.body.slice(start..end))
    }

    fn array<const N: usize>(&self, tag: u8) -> Result<[u8; N], MalformedBody> {
        self.slice(tag)?.try_into().map_err(|_| MalformedBody("an entry has the wrong length"))
    }

    fn u64(&self, tag: u8) -> Result<u64, MalformedBody> {
        self.array(tag).map(u64::from_le_bytes)
    }

    fn u32(&self, tag: u8) -> Result<u32, MalformedBody> {
        self.array(tag).map(u32::from_le_bytes)
    }

    fn time(&self, tag: u8) -> Result<Timestamp, MalformedBody> {
        self.array(tag).map(|bytes| Timestamp::from_millis(i64::from_le_bytes(bytes)))
    }

    fn text(&self, tag: u8) -> Result<&'a str, MalformedBody> {
        std::str::from_utf8(self.slice(tag)?).map_err(|_| MalformedBody("text is not UTF-8"))
    }

    fn position(&self) -> Result<Position, MalformedBody> {
        self.u64(tag::POSITION).map(Position)
    }

    fn branch(&self) -> Result<BranchName, MalformedBody> {
        self.text(tag::BRANCH).map(BranchName::from_stored)
    }

    fn row(&self) -> Result<RowKey, MalformedBody> {
        Ok(RowKey { position: self.position()?, child: self.u32(tag::CHILD)? })
    }

    fn record(&self) -> Result<Arc<Record>, MalformedBody> {
        Record::decode(&self.bytes(tag::RECORD)?).map(Arc::new).map_err(|_| MalformedBody("its record is malformed"))
    }

    fn idempotency(&self) -> Result<Option<IdempotencyKey>, MalformedBody> {
        if self.span(tag::KEY).is_none() {
            return Ok(None);
        }
        Ok(Some(IdempotencyKey { key: self.text(tag::KEY)?.into(), fingerprint: self.array(tag::FINGERPRINT)? }))
    }

    fn aside(&self) -> Result<AsideRow, MalformedBody> {
        Ok(AsideRow {
            row: self.row()?,
            lane: self.text(tag::LANE)?.into(),
            record: self.record()?,
            rendered: self.optional(tag::RENDERED),
            attempts: self.u32(tag::ATTEMPTS)?,
            first_failed: self.time(tag::FIRST_FAILED)?,
            next_try: self.time(tag::NEXT_TRY)?,
            last_error: self.text(tag::LAST_ERROR)?.into(),
            replayed: self.span(tag::REPLAYED).is_some(),
        })
    }

    fn dead(&self) -> Result<DeadLetter, MalformedBody> {
        let [reason] = self.array(tag::REASON)?;
        Ok(DeadLetter {
            row: self.row()?,
            branch: self.branch()?,
            at: self.time(tag::AT)?,
            reason: reason_of(reason).ok_or(MalformedBody("unknown reason"))?,
            attempts: self.u32(tag::ATTEMPTS)?,
            last_error: self.text(tag::LAST_ERROR)?.into(),
            stage: self.text(tag::STAGE)?.into(),
            revision: self.text(tag::REVISION)?.into(),
            record: self.record()?,
            rendered: self.optional(tag::RENDERED),
            overtaken: self.span(tag::OVERTAKEN).is_some(),
        })
    }

    fn pause(&self) -> Result<Option<StoredPause>, MalformedBody> {
        if self.span(tag::CAUSE).is_none() {
            return Ok(None);
        }
        Ok(Some(StoredPause {
            cause: self.text(tag::CAUSE)?.into(),
            note: self.text(tag::NOTE)?.into(),
            since: self.time(tag::AT)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::embedded::testing::every_change;

    #[test]
    fn every_kind_of_change_comes_back_as_it_was_encoded() {
        for change in every_change() {
            let mut body = Vec::new();
            change.encode(&mut body);
            assert_eq!(Change::decode(change.kind(), &body.into()).unwrap(), change);
        }
    }

    #[test]
    fn a_cut_body_is_refused_or_lacks_nothing_and_unknown_entries_are_skipped() {
        for change in every_change() {
            let mut body = Vec::new();
            change.encode(&mut body);
            for cut in 0..body.len() {
                let _ = Change::decode(change.kind(), &Bytes::copy_from_slice(&body[..cut]));
            }
            put(&mut body, 200, b"from the future");
            assert_eq!(Change::decode(change.kind(), &body.into()).unwrap(), change);
        }
        assert!(Change::decode(99, &Bytes::new()).is_err());
    }
}
