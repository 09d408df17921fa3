//! One namespace's segments: its records in order, in files that are read, kept, trimmed and deleted alone.
//!
//! The settle thread appends frames to the active segment and seals it when it is full; readers take places from here
//! and read the files themselves. A segment is never trusted past the length that the last checkpoint names.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::change::{Change, Frame, NamespaceNumber};
use super::disk::{Access, Disk, DiskFile, read_full};
use super::frame::{Header, NotAFrame};
use super::index::Index;
use crate::clock::Timestamp;
use crate::record::Position;

/// Bytes of a segment file's header.
pub const SEGMENT_HEADER: u64 = 32;
const MAGIC: [u8; 8] = *b"walflowS";
const VERSION: u32 = 1;
/// Write handles kept open; more namespaces than that share them.
const OPEN_HANDLES: usize = 128;
/// Bytes after which the system is asked to begin carrying a segment to the disk.
const WRITE_BACK: u64 = 256 << 10;

/// What a segment's first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Whose it is.
    pub namespace: NamespaceNumber,
    /// Its first record.
    pub first: Position,
    /// Seeds the checksums of its frames' headers.
    pub salt: u32,
}

impl SegmentHeader {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.namespace.0.to_le_bytes());
        out.extend_from_slice(&self.first.0.to_le_bytes());
        out.extend_from_slice(&self.salt.to_le_bytes());
        let sum = crc32c::crc32c(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads a segment's header; `None` when it is damaged or of another version.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.first_chunk::<32>()?;
        let (covered, sum) = bytes.split_last_chunk::<4>()?;
        let (magic, rest) = covered.split_first_chunk::<8>()?;
        let (version, rest) = rest.split_first_chunk::<4>()?;
        let (namespace, rest) = rest.split_first_chunk::<4>()?;
        let (first, rest) = rest.split_first_chunk::<8>()?;
        let salt = rest.first_chunk::<4>()?;
        let fine =
            *magic == MAGIC && u32::from_le_bytes(*version) == VERSION && crc32c::crc32c(covered).to_le_bytes() == *sum;
        fine.then(|| Self {
            namespace: NamespaceNumber(u32::from_le_bytes(*namespace)),
            first: Position(u64::from_le_bytes(*first)),
            salt: u32::from_le_bytes(*salt),
        })
    }
}

/// The path of the segment with this first record.
pub fn segment_path(folder: &Path, first: Position) -> PathBuf {
    folder.join(format!("{:020}.seg", first.0))
}

/// The path of a segment's sidecar.
pub fn index_path(folder: &Path, first: Position) -> PathBuf {
    folder.join(format!("{:020}.idx", first.0))
}

/// Why a segment cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The storage failed.
    #[error("{act} {path}: {source}")]
    Storage {
        /// What was tried.
        act: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Its bytes are damaged.
    #[error("segment {path} is damaged at byte {offset}: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        what: NotAFrame,
    },
}

impl SegmentError {
    /// True when the disk is full.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Storage { source, .. } if super::is_full(source))
    }
}

/// Turns an I/O result into one that names the act and the path.
pub(super) fn tried<T>(act: &'static str, path: &Path, result: io::Result<T>) -> Result<T, SegmentError> {
    result.map_err(|source| SegmentError::Storage { act, path: path.to_owned(), source })
}

/// A segment that is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Its first record.
    pub first: Position,
    /// Its bytes.
    pub bytes: u64,
    /// When the record of its last mark was written, once somebody has asked.
    pub newest: Option<Timestamp>,
}

struct Active {
    header: SegmentHeader,
    /// Bytes that were written, each of them a whole frame.
    len: u64,
    /// Loaded when it is first needed after a start.
    index: Option<Index>,
    /// Written since the last checkpoint.
    dirty: bool,
    /// Up to here the system has been asked to carry it to the disk.
    written_back: u64,
    /// When its first record was written; `None` until somebody asks, or while there is none.
    since: Option<Timestamp>,
}

/// Where to read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The segment's first record.
    pub first: Position,
    /// Bytes that may be read.
    pub bytes: u64,
    /// It grows no more.
    pub sealed: bool,
}

/// The segments of one namespace.
pub struct Segments {
    namespace: NamespaceNumber,
    folder: PathBuf,
    sealed: Vec<Sealed>,
    active: Option<Active>,
    /// The newest record that is in a segment.
    settled: Position,
}

/// The files under all segments, with the write handles that are open.
pub struct SegmentFiles {
    /// The file system.
    pub disk: Arc<dyn Disk>,
    /// `data/segments`.
    pub root: PathBuf,
    /// A segment is sealed when it has this many bytes.
    pub segment_bytes: u64,
    handles: HashMap<(NamespaceNumber, Position), (u64, Arc<dyn DiskFile>)>,
    uses: u64,
    unsynced: HashMap<PathBuf, PathBuf>,
}

impl SegmentFiles {
    /// The files under `root`.
    pub fn new(disk: Arc<dyn Disk>, root: PathBuf, segment_bytes: u64) -> Self {
        Self { disk, root, segment_bytes, handles: HashMap::new(), uses: 0, unsynced: HashMap::new() }
    }

    fn handle(
        &mut self,
        namespace: NamespaceNumber,
        first: Position,
        path: &Path,
    ) -> Result<Arc<dyn DiskFile>, SegmentError> {
        self.uses += 1;
        if let Some((used, file)) = self.handles.get_mut(&(namespace, first)) {
            *used = self.uses;
            return Ok(Arc::clone(file));
        }
        let file = tried("open segment", path, self.disk.open(path, Access::Write))?;
        self.keep(namespace, first, Arc::clone(&file));
        Ok(file)
    }

    fn keep(&mut self, namespace: NamespaceNumber, first: Position, file: Arc<dyn DiskFile>) {
        if self.handles.len() >= OPEN_HANDLES
            && let Some(oldest) = self.handles.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| *key)
        {
            self.handles.remove(&oldest);
        }
        self.handles.insert((namespace, first), (self.uses, file));
    }

    /// Forgets a namespace's handles and what of it waits for a sync.
    pub fn forget(&mut self, namespace: NamespaceNumber, folder: &Path) {
        self.handles.retain(|(number, _), _| *number != namespace);
        self.unsynced.retain(|_, parent| parent != folder);
    }

    /// Makes everything that was written durable: contents first, then names. After an error nothing may be recycled.
    ///
    /// # Errors
    /// When a sync fails. It must not be tried again.
    pub fn sync(&mut self) -> Result<(), SegmentError> {
        let mut folders: Vec<PathBuf> = Vec::new();
        for (path, folder) in std::mem::take(&mut self.unsynced) {
            let file = match self.disk.open(&path, Access::Write) {
                Ok(file) => file,
                // Trimmed or deleted since.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(SegmentError::Storage { act: "open segment", path, source }),
            };
            tried("sync segment", &path, file.sync())?;
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
        for folder in folders {
            match self.disk.sync_folder(&folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => tried("sync folder", &folder, result)?,
            }
        }
        Ok(())
    }
}

impl Segments {
    /// The segments of a namespace that has none.
    pub fn new(root: &Path, namespace: NamespaceNumber) -> Self {
        Self {
            namespace,
            folder: root.join(namespace.0.to_string()),
            sealed: Vec::new(),
            active: None,
            settled: Position(0),
        }
    }

    /// Takes over what a namespace has on disk: `active` is the segment that the last checkpoint names with its length
    /// and the newest record. What is newer is removed, to be rewritten from the journal (LOG.md 4).
    ///
    /// # Errors
    /// When the storage fails, or the active segment is shorter than the checkpoint says.
    pub fn open(
        files: &SegmentFiles,
        namespace: NamespaceNumber,
        active: Option<(Position, u64)>,
        end: Position,
    ) -> Result<Self, SegmentError> {
        let mut segments = Self::new(&files.root, namespace);
        segments.settled = end;
        let folder = segments.folder.clone();
        let disk = &*files.disk;
        for name in tried("list folder", &folder, disk.list(&folder))? {
            let path = folder.join(&name);
            let first = name.split('.').next().and_then(|stem| stem.parse().ok()).map(Position);
            let (Some(first), Some(ending)) = (first, name.rsplit('.').next()) else { continue };
            match active {
                Some((newest, _)) if first <= newest && matches!(ending, "seg" | "idx") => {
                    if ending == "seg" && first < newest {
                        let file = tried("open segment", &path, disk.open(&path, Access::Read))?;
                        let bytes = tried("measure segment", &path, file.size())?;
                        segments.sealed.push(Sealed { first, bytes, newest: None });
                    }
                }
                _ => tried("remove", &path, disk.remove(&path))?,
            }
        }
        segments.sealed.sort_unstable_by_key(|sealed| sealed.first);
        if let Some((first, len)) = active {
            let path = segment_path(&folder, first);
            let file = tried("open segment", &path, disk.open(&path, Access::Write))?;
            let mut head = [0; 32];
            tried("read segment", &path, read_full(&*file, &mut head, 0))?;
            let short = tried("measure segment", &path, file.size())? < len;
            let header = SegmentHeader::decode(&head).filter(|_| !short);
            let what = if short { NotAFrame::Short } else { NotAFrame::Header };
            let header = header.ok_or(SegmentError::Damaged { path: path.clone(), offset: 0, what })?;
            tried("cut segment", &path, file.set_len(len))?;
            segments.active = Some(Active { header, len, index: None, dirty: false, written_back: len, since: None });
        }
        Ok(segments)
    }

    /// The folder of this namespace.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The newest record that can be read from a segment.
    pub const fn settled(&self) -> Position {
        self.settled
    }

    /// The active segment and its length, for a checkpoint.
    pub fn active(&self) -> Option<(Position, u64)> {
        self.active.as_ref().map(|active| (active.header.first, active.len))
    }

    /// The sealed segments, oldest first.
    pub fn sealed(&self) -> &[Sealed] {
        &self.sealed
    }

    /// Notes when the record of a sealed segment's last mark was written.
    pub fn learn_newest(&mut self, first: Position, time: Timestamp) {
        if let Some(sealed) = self.sealed.iter_mut().find(|sealed| sealed.first == first) {
            sealed.newest = Some(time);
        }
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.sealed.iter().map(|sealed| sealed.bytes).sum::<u64>() + self.active.as_ref().map_or(0, |active| active.len)
    }

    /// The first record of the oldest segment, if there is one.
    pub fn oldest(&self) -> Option<Position> {
        self.sealed.first().map(|sealed| sealed.first).or_else(|| self.active.as_ref().map(|a| a.header.first))
    }

    /// Appends frames, each with its header and its bytes as in the journal; seals segments that are full on the way.
    /// `first` is the first record among them, or the one that comes next.
    ///
    /// # Errors
    /// When writing fails; gives how many of the frames count, and the rest may be appended when there is room.
    pub fn append(
        &mut self,
        files: &mut SegmentFiles,
        frames: &[(&Header, &Frame, &[u8])],
    ) -> Result<(), (usize, SegmentError)> {
        let mut done = 0;
        while let Some(rest) = frames.get(done..).filter(|rest| !rest.is_empty()) {
            let mut bytes = 0;
            let fits = rest.iter().take_while(|(.., raw)| {
                let fits = bytes < files.segment_bytes;
                bytes += raw.len() as u64;
                fits
            });
            let count = fits.count();
            self.append_some(files, rest.get(..count).unwrap_or(rest)).map_err(|error| (done, error))?;
            done += count;
        }
        Ok(())
    }

    fn append_some(
        &mut self,
        files: &mut SegmentFiles,
        frames: &[(&Header, &Frame, &[u8])],
    ) -> Result<(), SegmentError> {
        if frames.is_empty() {
            return Ok(());
        }
        let position = frames.iter().find_map(|(_, frame, _)| match frame.change {
            Change::Append { position, .. } | Change::Release { position, .. } => Some(position),
            _ => None,
        });
        let first = position.unwrap_or(self.settled.next());
        // A segment that has only drops in it yet keeps its name, so it cannot be followed by another.
        if self.active.as_ref().is_some_and(|active| active.len >= files.segment_bytes && first > active.header.first) {
            self.seal(files)?;
        }
        if self.active.is_none() {
            self.start(files, first)?;
        }
        self.load_index(files)?;
        let Some(active) = &mut self.active else { return Ok(()) };
        let path = segment_path(&self.folder, active.header.first);
        let mut bytes = Vec::with_capacity(frames.iter().map(|(.., raw)| raw.len()).sum());
        for (header, _, raw) in frames {
            bytes.extend_from_slice(&header.encode(active.header.salt));
            bytes.extend_from_slice(raw.get(super::frame::HEADER_BYTES..).unwrap_or_default());
        }
        let file = files.handle(self.namespace, active.header.first, &path)?;
        tried("write segment", &path, file.write_all_at(&bytes, active.len))?;
        files.unsynced.insert(path, self.folder.clone());
        if let Some(index) = &mut active.index {
            for (_, frame, raw) in frames {
                index.add(frame, raw.len() as u64);
            }
            self.settled = self.settled.max(index.last);
        }
        active.len += bytes.len() as u64;
        active.dirty = true;
        if active.len - active.written_back >= WRITE_BACK {
            // Else a checkpoint would carry everything at once, and the journal's syncs would wait behind it.
            file.write_back(active.written_back, active.len - active.written_back);
            active.written_back = active.len;
        }
        Ok(())
    }

    fn start(&mut self, files: &mut SegmentFiles, first: Position) -> Result<(), SegmentError> {
        tried("make folder", &self.folder, files.disk.make_folder(&self.folder))?;
        let path = segment_path(&self.folder, first);
        let header = SegmentHeader { namespace: self.namespace, first, salt: fastrand::u32(1..) };
        let file = tried("make segment", &path, files.disk.open(&path, Access::Create))?;
        tried("write segment", &path, file.write_all_at(&header.encode(), 0))?;
        files.unsynced.insert(path, self.folder.clone());
        files.uses += 1;
        files.keep(self.namespace, first, file);
        let (len, index) = (SEGMENT_HEADER, Some(Index::new(SEGMENT_HEADER)));
        self.active = Some(Active { header, len, index, dirty: true, written_back: 0, since: None });
        Ok(())
    }

    fn load_index(&mut self, files: &SegmentFiles) -> Result<(), SegmentError> {
        if let Some(active) = &mut self.active
            && active.index.is_none()
        {
            active.index = Some(load_index(&*files.disk, &self.folder, active.header.first, active.len)?);
        }
        Ok(())
    }

    /// Ends the active segment: its sidecar is written and the next frame starts another.
    ///
    /// # Errors
    /// When writing the sidecar fails; the segment is then still active.
    pub fn seal(&mut self, files: &mut SegmentFiles) -> Result<(), SegmentError> {
        self.write_index(files)?;
        if let Some(active) = self.active.take() {
            files.handles.remove(&(self.namespace, active.header.first));
            let newest = active.index.as_ref().and_then(|index| index.marks.last()).map(|mark| mark.time);
            self.sealed.push(Sealed { first: active.header.first, bytes: active.len, newest });
        }
        Ok(())
    }

    /// Ends the active segment when its first record was written before `floor`, and starts the next one: a checkpoint
    /// names the active segment, so there always is one.
    ///
    /// # Errors
    /// When reading or writing fails; the segment may then still be active.
    pub fn seal_older(&mut self, files: &mut SegmentFiles, floor: Timestamp) -> Result<(), SegmentError> {
        let Some(active) = self.active.as_mut().filter(|active| active.len > SEGMENT_HEADER) else { return Ok(()) };
        if active.since.is_none() {
            let first = |index: &Index| index.marks.first().map(|mark| mark.time);
            active.since = match &active.index {
                Some(index) => first(index),
                // Only looked at: the index of a namespace that is idle stays out of memory.
                None => first(&load_index(&*files.disk, &self.folder, active.header.first, active.len)?),
            };
        }
        if active.since.is_none_or(|since| since >= floor) {
            return Ok(());
        }
        self.seal(files)?;
        self.start(files, self.settled.next())
    }

    /// Writes the active segment's sidecar if it has grown, so that a start need not read the segment.
    ///
    /// # Errors
    /// When writing fails.
    pub fn write_index(&mut self, files: &SegmentFiles) -> Result<(), SegmentError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let Some(index) = active.index.as_ref().filter(|_| active.dirty) else { return Ok(()) };
        let path = index_path(&self.folder, active.header.first);
        let file = tried("make sidecar", &path, files.disk.open(&path, Access::Create))?;
        tried("write sidecar", &path, file.write_all_at(&index.encode(), 0))?;
        active.dirty = false;
        Ok(())
    }

    /// The segment that holds `position`, or the first after it. `None` when there is nothing to read there yet.
    pub fn extent(&self, position: Position) -> Option<Extent> {
        if position > self.settled {
            return None;
        }
        let active =
            self.active.as_ref().map(|active| Extent { first: active.header.first, bytes: active.len, sealed: false });
        if active.is_some_and(|active| active.first <= position) {
            return active;
        }
        let at = self.sealed.partition_point(|sealed| sealed.first <= position).saturating_sub(1);
        let sealed =
            self.sealed.get(at).map(|sealed| Extent { first: sealed.first, bytes: sealed.bytes, sealed: true });
        sealed.or(active)
    }

    /// The segment after the one that starts with `first`, if it has a record to read.
    pub fn after(&self, first: Position) -> Option<Extent> {
        // One that was started ahead of its first record has none yet.
        self.later(first).filter(|extent| extent.sealed || extent.first <= self.settled)
    }

    /// The segment after the one that starts with `first`, though it may hold nothing but drops of earlier records.
    pub fn later(&self, first: Position) -> Option<Extent> {
        let sealed = self.sealed.iter().find(|sealed| sealed.first > first);
        let next = sealed.map(|sealed| Extent { first: sealed.first, bytes: sealed.bytes, sealed: true });
        next.or_else(|| {
            let active = self.active.as_ref().filter(|active| active.header.first > first)?;
            Some(Extent { first: active.header.first, bytes: active.len, sealed: false })
        })
    }

    /// A copy of the active segment's index, if it is loaded and the segment starts with `first`.
    pub fn active_index(&self, first: Position) -> Option<Index> {
        self.active.as_ref().filter(|active| active.header.first == first)?.index.clone()
    }

    /// Removes the segments whose every record is below `keep`. Gives how many bytes went. Trim's frame must be durable.
    ///
    /// # Errors
    /// When removing fails; what was removed until then is forgotten.
    pub fn trim(&mut self, files: &SegmentFiles, keep: Position) -> Result<u64, SegmentError> {
        let mut freed = 0;
        while let Some(oldest) = self.sealed.first().copied() {
            let next = self.sealed.get(1).map(|next| next.first);
            let next = next.or_else(|| self.active.as_ref().map(|active| active.header.first));
            if next.unwrap_or(self.settled.next()) > keep {
                break;
            }
            for path in [segment_path(&self.folder, oldest.first), index_path(&self.folder, oldest.first)] {
                match files.disk.remove(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    result => tried("remove segment", &path, result)?,
                }
            }
            self.sealed.remove(0);
            freed += oldest.bytes;
        }
        Ok(freed)
    }

    /// Removes everything of a namespace that was deleted.
    ///
    /// # Errors
    /// When removing fails.
    pub fn remove_all(&mut self, files: &mut SegmentFiles) -> Result<(), SegmentError> {
        files.forget(self.namespace, &self.folder);
        self.sealed.clear();
        self.active = None;
        for name in tried("list folder", &self.folder, files.disk.list(&self.folder))? {
            let path = self.folder.join(name);
            tried("remove", &path, files.disk.remove(&path))?;
        }
        match files.disk.remove_folder(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => tried("remove folder", &self.folder, result),
        }
    }
}

/// The index of the first `len` bytes of a segment, from its sidecar or, when that is no good, from the segment.
///
/// # Errors
/// When the segment cannot be read or is damaged.
pub fn load_index(disk: &dyn Disk, folder: &Path, first: Position, len: u64) -> Result<Index, SegmentError> {
    let sidecar = index_path(folder, first);
    let stored = disk.open(&sidecar, Access::Read).and_then(|file| super::disk::read_all(&*file));
    if let Some(index) = stored.ok().and_then(|bytes| Index::decode(&bytes, len)) {
        return Ok(index);
    }
    let path = segment_path(folder, first);
    let file = tried("open segment", &path, disk.open(&path, Access::Read))?;
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
    let read = tried("read segment", &path, read_full(&*file, &mut bytes, 0))?;
    let damaged = |offset, what| SegmentError::Damaged { path: path.clone(), offset, what };
    if (read as u64) < len {
        return Err(damaged(read as u64, NotAFrame::Short));
    }
    let header = SegmentHeader::decode(&bytes).ok_or_else(|| damaged(0, NotAFrame::Header))?;
    Index::build(&Bytes::from(bytes), SEGMENT_HEADER, header.salt).map_err(|(offset, what)| damaged(offset, what))
}
