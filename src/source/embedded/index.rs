//! The index of one segment: where its records lie, which ids it holds, what ended in it without being sent.
//!
//! It is built while a segment grows and stored beside it as a sidecar (`.idx`) with a checksum of its own. A sidecar
//! is never trusted over the segment: when it is missing, damaged or covers another length, the segment is read anew.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::change::{Change, Frame};
use super::frame::{NotAFrame, read_frame};
use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::BranchName;

/// A mark is put at least this many bytes after the one before.
const MARK_EVERY: u64 = 64 * 1024;
const MAGIC: [u8; 8] = *b"walflowI";
const NO_ID: RecordId = RecordId::from_bytes([0; 16]);

/// A place from which a segment can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The record that starts here.
    pub position: Position,
    /// Where it starts in the file.
    pub offset: u64,
    /// The highest id of an appended record before it.
    pub below: RecordId,
    /// When its frame was written.
    pub time: Timestamp,
}

/// What a segment holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Bytes of the segment that it covers.
    pub len: u64,
    /// The last record.
    pub last: Position,
    /// The highest id of a record that was appended straight away; such ids are in the order of positions.
    pub highest: RecordId,
    /// Sparse places to read from.
    pub marks: Vec<Mark>,
    /// Records that were parked or moved before: their ids are older than their neighbours'.
    pub released: BTreeMap<RecordId, Position>,
    /// Deliveries that ended without being sent, and by what.
    pub dropped: BTreeMap<(Position, BranchName), Box<str>>,
}

impl Index {
    /// The index of a segment with nothing in it but its header.
    pub fn new(header_bytes: u64) -> Self {
        Self {
            len: header_bytes,
            last: Position(0),
            highest: NO_ID,
            marks: Vec::new(),
            released: BTreeMap::new(),
            dropped: BTreeMap::new(),
        }
    }

    /// Takes in the next frame of the segment.
    pub fn add(&mut self, frame: &Frame, frame_bytes: u64) {
        match &frame.change {
            Change::Append { position, record, .. } => {
                self.mark(*position, frame.time);
                self.last = *position;
                if let Some(id) = Record::peek_id(record) {
                    self.highest = self.highest.max(id);
                }
            }
            Change::Release { position, record, .. } => {
                self.mark(*position, frame.time);
                self.last = *position;
                if let Some(id) = Record::peek_id(record) {
                    self.released.insert(id, *position);
                }
            }
            Change::Dropped { branch, position, reason } => {
                self.dropped.insert((*position, branch.clone()), reason.clone());
            }
            _ => {}
        }
        self.len += frame_bytes;
    }

    fn mark(&mut self, position: Position, time: Timestamp) {
        if self.marks.last().is_none_or(|last| self.len >= last.offset + MARK_EVERY) {
            self.marks.push(Mark { position, offset: self.len, below: self.highest, time });
        }
    }

    /// The last mark at or before a position.
    pub fn seek(&self, position: Position) -> Option<Mark> {
        let at = self.marks.partition_point(|mark| mark.position <= position);
        self.marks.get(at.saturating_sub(1)).copied()
    }

    /// The last mark from which an appended record with this id can be found by reading on.
    pub fn seek_id(&self, id: RecordId) -> Option<Mark> {
        let at = self.marks.partition_point(|mark| mark.below < id);
        self.marks.get(at.saturating_sub(1)).copied()
    }

    /// The last mark whose record entered the log before `floor`, and where the one after it starts.
    pub fn seek_time(&self, floor: Timestamp) -> Option<(Mark, Option<u64>)> {
        let at = self.marks.partition_point(|mark| mark.time < floor);
        let mark = self.marks.get(at.checked_sub(1)?).copied()?;
        Some((mark, self.marks.get(at).map(|next| next.offset)))
    }

    /// The index of the frames in `segment`, which starts with `header_bytes` of header.
    ///
    /// # Errors
    /// With the offset of the first bytes that are no frame.
    pub fn build(segment: &Bytes, header_bytes: u64, salt: u32) -> Result<Self, (u64, NotAFrame)> {
        let mut index = Self::new(header_bytes);
        while index.len < segment.len() as u64 {
            let at = usize::try_from(index.len).unwrap_or(usize::MAX).min(segment.len());
            let (header, frame) = read_frame(&segment.slice(at..), salt).map_err(|error| (index.len, error))?;
            index.add(&frame, header.frame_bytes() as u64);
        }
        Ok(index)
    }

    /// The sidecar's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + self.marks.len() * 40 + self.released.len() * 24);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.len.to_le_bytes());
        out.extend_from_slice(&self.last.0.to_le_bytes());
        out.extend_from_slice(self.highest.as_bytes());
        out.extend_from_slice(&(self.marks.len() as u64).to_le_bytes());
        for mark in &self.marks {
            out.extend_from_slice(&mark.position.0.to_le_bytes());
            out.extend_from_slice(&mark.offset.to_le_bytes());
            out.extend_from_slice(mark.below.as_bytes());
            out.extend_from_slice(&mark.time.as_millis().to_le_bytes());
        }
        out.extend_from_slice(&(self.released.len() as u64).to_le_bytes());
        for (id, position) in &self.released {
            out.extend_from_slice(id.as_bytes());
            out.extend_from_slice(&position.0.to_le_bytes());
        }
        out.extend_from_slice(&(self.dropped.len() as u64).to_le_bytes());
        for ((position, branch), reason) in &self.dropped {
            out.extend_from_slice(&position.0.to_le_bytes());
            for text in [branch.as_str(), reason] {
                out.extend_from_slice(&(text.len() as u64).to_le_bytes());
                out.extend_from_slice(text.as_bytes());
            }
        }
        let sum = crc32c::crc32c(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads a sidecar; `None` when it is damaged or covers another length than `len`.
    pub fn decode(bytes: &[u8], len: u64) -> Option<Self> {
        let (covered, sum) = bytes.split_last_chunk::<4>()?;
        if crc32c::crc32c(covered).to_le_bytes() != *sum {
            return None;
        }
        let mut read = Reader(covered);
        if read.take::<8>()? != MAGIC {
            return None;
        }
        let mut index = Self::new(read.u64()?);
        if index.len != len {
            return None;
        }
        index.last = Position(read.u64()?);
        index.highest = RecordId::from_bytes(read.take()?);
        for _ in 0..read.u64()? {
            index.marks.push(Mark {
                position: Position(read.u64()?),
                offset: read.u64()?,
                below: RecordId::from_bytes(read.take()?),
                time: Timestamp::from_millis(i64::from_le_bytes(read.take()?)),
            });
        }
        for _ in 0..read.u64()? {
            index.released.insert(RecordId::from_bytes(read.take()?), Position(read.u64()?));
        }
        for _ in 0..read.u64()? {
            let position = Position(read.u64()?);
            let branch = BranchName::from_stored(read.text()?);
            index.dropped.insert((position, branch), read.text()?.into());
        }
        Some(index)
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Option<&'a str> {
        let len = usize::try_from(self.u64()?).ok()?;
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        std::str::from_utf8(head).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::embedded::change::{NamespaceNumber, Sequence};
    use crate::source::embedded::testing::record;

    fn frame(sequence: u64, change: Change) -> Frame {
        Frame {
            sequence: Sequence(sequence),
            namespace: NamespaceNumber(1),
            time: Timestamp::from_millis(i64::try_from(sequence).unwrap()),
            change,
        }
    }

    fn filled() -> Index {
        let mut index = Index::new(32);
        for n in 1..=40u64 {
            let id = RecordId::new(Timestamp::from_millis(1_000 + i64::try_from(n).unwrap()), 0, 1, n);
            let mut bytes = Vec::new();
            Record { id, ..record(None, "1") }.encode(&mut bytes);
            let (position, record) = (Position(n), Bytes::from(bytes));
            let change = if n % 10 == 0 {
                Change::Release { position, parked: Sequence(1), due_at: Timestamp::MIN, record }
            } else {
                Change::Append { position, record, idempotency: None }
            };
            index.add(&frame(n, change), 20_000);
        }
        let branch = BranchName::new("orders", None);
        index.add(&frame(41, Change::Dropped { branch, position: Position(3), reason: "filter".into() }), 100);
        index
    }

    #[test]
    fn a_sidecar_comes_back_and_a_flipped_bit_or_another_length_is_refused() {
        let index = filled();
        let bytes = index.encode();
        assert_eq!(Index::decode(&bytes, index.len).as_ref(), Some(&index));
        assert_eq!(Index::decode(&bytes, index.len + 1), None);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            assert_eq!(Index::decode(&damaged, index.len), None, "byte {at}");
        }
    }

    #[test]
    fn a_seek_never_lands_behind_what_is_sought() {
        let index = filled();
        assert!(index.marks.len() > 5);
        for n in 1..=40u64 {
            assert!(index.seek(Position(n)).unwrap().position <= Position(n));
            let id = RecordId::new(Timestamp::from_millis(1_000 + i64::try_from(n).unwrap()), 0, 1, n);
            if let Some(position) = index.released.get(&id) {
                assert_eq!(*position, Position(n));
            } else {
                assert!(index.seek_id(id).unwrap().position <= Position(n));
            }
        }
    }
}
