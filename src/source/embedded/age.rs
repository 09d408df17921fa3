//! How old the records of a namespace are, for the bounds `backlog.age` and `retention.age`.
//!
//! Takes the time before which a record is too old, gives the newest record that is. Memory answers for what is there,
//! segments for the rest; a look goes on where the one before it ended, so that no segment is read twice for it.

use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::change::Change;
use super::disk::{Access, read_full};
use super::frame::{NotAFrame, read_frame};
use super::index::{Index, Mark};
use super::segment::{Extent, SEGMENT_HEADER, Sealed, SegmentError, SegmentHeader, load_index, segment_path, tried};
use super::shared::Shared;
use super::space::Space;
use crate::clock::Timestamp;
use crate::record::Position;

/// The newest record that entered the log before `floor`, if some branch has not ended it.
pub(super) fn too_old(shared: &Shared, space: &Space, floor: Timestamp) -> Option<Position> {
    let (_, ended) = space.behind(space.end())?;
    let first = ended.next();
    if space.time_of(first).is_none() {
        learn(shared, space, first);
    }
    // What is known without a look at the disk is the time of that record or of an older one.
    if space.time_of(first).is_some_and(|time| time >= floor) {
        return None;
    }
    let known = Position(space.aged.load(Ordering::Acquire));
    let newest = space.recent_before(floor).or_else(|| match in_segments(shared, space, first.max(known), floor) {
        Ok(newest) => newest,
        Err(error) => {
            tracing::warn!(namespace = ?space.name, %error, "the age of the backlog could not be read; it is tried again");
            None
        }
    });
    newest.max(Some(known)).filter(|newest| *newest >= first)
}

/// Whether every record of a sealed segment was written before `floor`. Mostly answered without a look at the disk.
pub(super) fn is_wholly_older(shared: &Shared, space: &Space, segment: Sealed, floor: Timestamp) -> bool {
    if segment.newest.is_some_and(|newest| newest >= floor) {
        return false;
    }
    let extent = Extent { first: segment.first, bytes: segment.bytes, sealed: true };
    let newest = || {
        let index = index(shared, space, extent)?;
        if let Some(last) = index.marks.last() {
            space.segments.lock().learn_newest(segment.first, last.time);
        }
        // The last mark may be far older than the last record.
        let Some((mark, None)) = index.seek_time(floor) else { return Ok(false) };
        Ok::<_, SegmentError>(read_before(shared, space, extent, mark, extent.bytes, floor)? >= index.last)
    };
    newest().unwrap_or(false)
}

/// The newest record from `from` on that a segment has and that was written before `floor`.
fn in_segments(
    shared: &Shared,
    space: &Space,
    from: Position,
    floor: Timestamp,
) -> Result<Option<Position>, SegmentError> {
    let mut found = None;
    let mut extent = space.segments.lock().extent(from);
    while let Some(here) = extent {
        let Some((mark, end)) = index(shared, space, here)?.seek_time(floor) else { break };
        found = Some((here, mark, end.unwrap_or(here.bytes)));
        extent = if end.is_none() { space.segments.lock().after(here.first) } else { None };
    }
    found.map(|(extent, mark, end)| read_before(shared, space, extent, mark, end, floor)).transpose()
}

/// Asks the segment of a record when its first one was written, once after a start; for lag too.
fn learn(shared: &Shared, space: &Space, position: Position) {
    let extent = space.segments.lock().extent(position);
    if let Some(extent) = extent
        && let Ok(index) = index(shared, space, extent)
        && let Some(mark) = index.marks.first()
    {
        space.learn_time(extent.first, mark.time);
    }
}

fn index(shared: &Shared, space: &Space, extent: Extent) -> Result<Index, SegmentError> {
    let (folder, loaded) = {
        let segments = space.segments.lock();
        (segments.folder().to_owned(), segments.active_index(extent.first))
    };
    loaded.map_or_else(|| load_index(&*shared.disk, &folder, extent.first, extent.bytes), Ok)
}

/// Reads on from a mark that is old enough to the last record that is.
fn read_before(
    shared: &Shared,
    space: &Space,
    extent: Extent,
    mark: Mark,
    end: u64,
    floor: Timestamp,
) -> Result<Position, SegmentError> {
    let path = segment_path(space.segments.lock().folder(), extent.first);
    let file = tried("open segment", &path, shared.disk.open(&path, Access::Read))?;
    let mut head = [0; SEGMENT_HEADER as usize];
    tried("read segment", &path, read_full(&*file, &mut head, 0))?;
    let damaged = |offset, what| SegmentError::Damaged { path: path.clone(), offset, what };
    let header = SegmentHeader::decode(&head).ok_or_else(|| damaged(0, NotAFrame::Header))?;
    let mut bytes = vec![0; usize::try_from(end.saturating_sub(mark.offset)).unwrap_or(usize::MAX)];
    let read = tried("read segment", &path, read_full(&*file, &mut bytes, mark.offset))?;
    bytes.truncate(read);
    let (bytes, mut at, mut newest) = (Bytes::from(bytes), 0, mark.position);
    while at < bytes.len() {
        let (header, frame) =
            read_frame(&bytes.slice(at..), header.salt).map_err(|what| damaged(mark.offset + at as u64, what))?;
        if frame.time >= floor {
            break;
        }
        if let Change::Append { position, .. } | Change::Release { position, .. } = frame.change {
            newest = position;
        }
        at += header.frame_bytes();
    }
    Ok(newest)
}
