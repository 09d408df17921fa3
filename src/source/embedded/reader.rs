//! A branch's reader: the newest records from memory, older ones from segments, each position once, in order.
//!
//! Gives only what is durable. Every frame's checksum is verified when it is read.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;

use super::change::Change;
use super::disk::{Access, DiskFile, read_full};
use super::frame::{HEADER_BYTES, NotAFrame, read_frame};
use super::index::Index;
use super::segment::{Extent, SEGMENT_HEADER, SegmentError, SegmentHeader, load_index, segment_path, tried};
use super::shared::Shared;
use super::space::Space;
use crate::record::{Position, Record};
use crate::source::{BranchName, Entry, LogError, Subscription};

/// Bytes read from a segment at once.
const CHUNK: usize = 512 * 1024;

/// Where in a segment the next record lies.
struct Place {
    first: Position,
    file: Arc<dyn DiskFile>,
    salt: u32,
    offset: u64,
    /// The position that is read next at `offset`.
    next: Position,
}

/// Reads one namespace for one branch.
pub(super) struct Reader {
    shared: Arc<Shared>,
    space: Arc<Space>,
    branch: BranchName,
    at: Position,
    place: Option<Place>,
}

impl From<SegmentError> for LogError {
    fn from(error: SegmentError) -> Self {
        match error {
            SegmentError::Damaged { .. } => Self::Damaged(error.to_string().into()),
            SegmentError::Storage { .. } => {
                Self::Storage { act: "read a segment".into(), cause: error.to_string().into() }
            }
        }
    }
}

impl Reader {
    /// A reader that gives what is after `at`.
    pub(super) fn new(shared: Arc<Shared>, space: Arc<Space>, branch: BranchName, at: Position) -> Self {
        Self { shared, space, branch, at, place: None }
    }

    async fn read(&mut self, max_records: usize, max_bytes: usize) -> Result<Vec<Entry>, LogError> {
        let space = Arc::clone(&self.space);
        loop {
            let news = space.news.notified();
            tokio::pin!(news);
            // Registered before the look, so that no news falls between.
            news.as_mut().enable();
            if let Some(reason) = self.shared.refusal() {
                return Err(LogError::Closed(reason));
            }
            if space.deleted.load(Ordering::Acquire) {
                return Err(LogError::Closed("its namespace was deleted".into()));
            }
            // What was trimmed, or dropped because the backlog was full, is behind the cursor.
            let (cursor, stored) = {
                let branches = space.branches.lock();
                branches.get(&self.branch).map_or((None, None), |own| (Some(own.wanted), Some(own.durable)))
            };
            let kept = Position(space.first_kept.load(Ordering::Acquire).saturating_sub(1));
            self.at = self.at.max(kept).max(cursor.unwrap_or_default());
            let from = self.at.next();
            // What is beyond the stored cursor is sent again after a crash, so it is bounded (LOG.md 14).
            let window =
                stored.map_or(u64::MAX, |stored| (stored.0 + self.shared.options.window).saturating_sub(self.at.0));
            let Some(max_records) =
                usize::try_from(window).ok().map(|window| window.min(max_records)).filter(|max| *max > 0)
            else {
                news.await;
                continue;
            };
            if let Some(entries) = space.recent(from, max_records, max_bytes) {
                self.place = None;
                return Ok(self.gave(entries));
            }
            if from <= space.end() {
                let settled = space.segments.lock().settled();
                let (place, shared, space) = (self.place.take(), Arc::clone(&self.shared), Arc::clone(&self.space));
                let read = move || from_segments(&shared, &space, place, from, max_records, max_bytes);
                let panicked = |_| LogError::Closed("the reading thread failed".into());
                let (entries, place) = tokio::task::spawn_blocking(read).await.map_err(panicked)??;
                let at_end = entries.is_empty() && place.is_some();
                self.place = place;
                if !entries.is_empty() {
                    return Ok(self.gave(entries));
                }
                if at_end && from <= settled {
                    // A repair gave up the records from here on.
                    self.at = self.at.max(settled);
                }
                tokio::task::yield_now().await;
                continue;
            }
            news.await;
        }
    }

    fn gave(&mut self, entries: Vec<Entry>) -> Vec<Entry> {
        if let Some(last) = entries.last() {
            self.at = last.position;
        }
        entries
    }
}

impl Subscription for Reader {
    fn next(&mut self, max_records: usize, max_bytes: usize) -> BoxFuture<'_, Result<Vec<Entry>, LogError>> {
        self.read(max_records, max_bytes).boxed()
    }
}

fn open_place(shared: &Shared, space: &Space, extent: Extent, from: Position) -> Result<Option<Place>, SegmentError> {
    let (folder, index) = {
        let segments = space.segments.lock();
        (segments.folder().to_owned(), segments.active_index(extent.first))
    };
    let index: Index = match index {
        Some(index) => index,
        None => load_index(&*shared.disk, &folder, extent.first, extent.bytes)?,
    };
    let Some(mark) = index.seek(from) else { return Ok(None) };
    let path = segment_path(&folder, extent.first);
    let file = tried("open segment", &path, shared.disk.open(&path, Access::Read))?;
    let mut head = [0; SEGMENT_HEADER as usize];
    tried("read segment", &path, read_full(&*file, &mut head, 0))?;
    let header =
        SegmentHeader::decode(&head).ok_or(SegmentError::Damaged { path, offset: 0, what: NotAFrame::Header })?;
    Ok(Some(Place { first: extent.first, file, salt: header.salt, offset: mark.offset, next: mark.position }))
}

/// Reads records from `from` on. Nothing may come of it when segments change meanwhile; the caller looks again.
pub(super) fn from_segments_at(
    shared: &Shared,
    space: &Space,
    from: Position,
    max_records: usize,
) -> Result<Vec<Entry>, LogError> {
    let (entries, _) = from_segments_inner(shared, space, None, from, max_records, CHUNK)?;
    Ok(entries)
}

type Read = (Vec<Entry>, Option<Place>);

fn from_segments(
    shared: &Arc<Shared>,
    space: &Arc<Space>,
    place: Option<Place>,
    from: Position,
    max_records: usize,
    max_bytes: usize,
) -> Result<Read, LogError> {
    match from_segments_inner(shared, space, place, from, max_records, max_bytes) {
        // Trimmed while it was being read.
        Err(SegmentError::Storage { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok((Vec::new(), None))
        }
        Err(error @ SegmentError::Damaged { .. }) => {
            shared.status.found_damage(&error.to_string());
            Err(error.into())
        }
        result => result.map_err(Into::into),
    }
}

fn from_segments_inner(
    shared: &Shared,
    space: &Space,
    place: Option<Place>,
    from: Position,
    max_records: usize,
    max_bytes: usize,
) -> Result<Read, SegmentError> {
    let Some(mut extent) = space.segments.lock().extent(from) else { return Ok((Vec::new(), None)) };
    let usable = |place: &Place| place.first == extent.first && place.next <= from;
    let mut place = match place.filter(usable) {
        Some(place) => place,
        None => match open_place(shared, space, extent, from)? {
            Some(place) => place,
            None => return Ok((Vec::new(), None)),
        },
    };
    let (mut entries, mut bytes) = (Vec::new(), 0);
    let mut chunk = CHUNK;
    loop {
        if place.offset >= extent.bytes {
            let after = space.segments.lock().after(place.first);
            let Some(next) = after.filter(|_| extent.sealed) else { return Ok((entries, Some(place))) };
            extent = next;
            place = match open_place(shared, space, extent, place.next)? {
                Some(place) => place,
                None => return Ok((entries, None)),
            };
            continue;
        }
        let left = usize::try_from(extent.bytes - place.offset).unwrap_or(usize::MAX);
        let mut buffer = vec![0; chunk.min(left)];
        let path = || segment_path(space.segments.lock().folder(), place.first);
        let read = tried("read segment", &path(), read_full(&*place.file, &mut buffer, place.offset))?;
        buffer.truncate(read);
        let (buffer, mut at) = (Bytes::from(buffer), 0);
        while at < buffer.len() {
            let (header, frame) = match read_frame(&buffer.slice(at..), place.salt) {
                Ok(found) => found,
                // Cut by the end of the chunk, not of the segment.
                Err(NotAFrame::Short) if read < left && (at > 0 || chunk < left) => break,
                Err(what) => {
                    return Err(SegmentError::Damaged { path: path(), offset: place.offset + at as u64, what });
                }
            };
            at += header.frame_bytes();
            let (Change::Append { position, record, .. } | Change::Release { position, record, .. }) = frame.change
            else {
                continue;
            };
            place.next = position.next();
            if position < from {
                continue;
            }
            let what = NotAFrame::Body;
            let damaged = |_| SegmentError::Damaged { path: path(), offset: place.offset + at as u64, what };
            let record = Record::decode(&record).map_err(damaged)?;
            bytes += record.payload.len();
            entries.push(Entry::new(position, Arc::new(record)));
            if entries.len() >= max_records || bytes >= max_bytes {
                place.offset += at as u64;
                return Ok((entries, Some(place)));
            }
        }
        if at == 0 {
            // One frame is larger than a chunk.
            chunk = chunk.saturating_mul(4).max(HEADER_BYTES);
        }
        place.offset += at as u64;
    }
}
