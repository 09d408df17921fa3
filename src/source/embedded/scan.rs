//! Reads the journal's files back in order, and tells a torn tail from rot.
//!
//! It takes a folder and gives each group that counts, whole or not at all, with where it lies; at the end it says what
//! was cut. It never writes. A damage is rot when a later frame says that what is damaged was durable before; rot is an
//! error unless the caller asked to skip it and be told what was lost.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::ZEROS;
use super::change::{Frame, Sequence};
use super::disk::{Access, Disk, read_all};
use super::frame::{HEADER_BYTES, Header, MAGIC, NotAFrame, read_frame};
use super::journal::{BadHeader, DATA_START, FileHeader, live_numbers, live_path};

/// One frame as it lies in the journal.
pub struct Scanned {
    /// Its header.
    pub header: Header,
    /// What it says.
    pub frame: Frame,
    /// A piece of the file in which it lies; `frame` holds on to no more than that.
    pub piece: Bytes,
    /// Where in the piece its header begins.
    pub at: usize,
}

impl Scanned {
    /// Where in the piece it ends.
    pub const fn end(&self) -> usize {
        self.at + self.header.frame_bytes()
    }
}

/// Bytes of a piece, except where one group is larger. What is read from the journal stays in memory until the views have
/// it, so it must not hold on to a whole file for one record.
const PIECE: usize = if cfg!(test) { 1 << 10 } else { 256 << 10 };

/// A file's bytes, given out in pieces.
struct Pieces<'a> {
    bytes: &'a [u8],
    piece: Bytes,
    start: usize,
}

impl Pieces<'_> {
    /// Reads one whole group at `at`. Its first frame must have the sequence `next`.
    fn group(&mut self, at: usize, salt: u32, next: Sequence) -> Result<(Vec<Scanned>, usize), NotAFrame> {
        let mut size = PIECE;
        loop {
            if let Some(inside) = at.checked_sub(self.start).filter(|inside| *inside < self.piece.len()) {
                let left = self.piece.get(inside..).unwrap_or_default();
                let nothing = left.len() >= HEADER_BYTES && Header::decode(left, salt) == Err(NotAFrame::Empty);
                let is_last = self.start + self.piece.len() >= self.bytes.len();
                match group(&self.piece, inside, salt, next) {
                    // The piece ends here, the file does not.
                    Err(NotAFrame::Short | NotAFrame::Empty) if !nothing && !is_last => {}
                    found => return found.map(|(group, end)| (group, self.start + end)),
                }
                if inside == 0 {
                    size = self.piece.len().saturating_mul(4);
                }
            } else if at >= self.bytes.len() {
                return Err(NotAFrame::Empty);
            }
            let rest = self.bytes.get(at..).unwrap_or_default();
            self.piece = Bytes::copy_from_slice(rest.get(..size).unwrap_or(rest));
            self.start = at;
        }
    }
}

/// A tail that was not wholly written; never acknowledged, or not known to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The file.
    pub path: PathBuf,
    /// Where the cut begins.
    pub offset: u64,
    /// The bytes from there up to the last that is not zero.
    pub bytes: Bytes,
}

/// Frames that are gone although they were durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The file.
    pub path: PathBuf,
    /// Where the damage begins.
    pub offset: u64,
    /// The first lost sequence.
    pub first: Sequence,
    /// The last lost sequence.
    pub last: Sequence,
}

/// What the end of the scan knows.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// The live files with the first sequence of each.
    pub files: Vec<(u64, Sequence)>,
    /// The last sequence that counts; 0 when there is none.
    pub last: Sequence,
    /// The highest sequence that a frame or file names as durable before it.
    pub durable: Sequence,
    /// The torn tail, if there was one.
    pub cut: Option<Cut>,
    /// What was skipped, where the caller asked for that.
    pub lost: Vec<Lost>,
}

/// Why the journal cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The storage failed.
    #[error("read journal file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file's header is unreadable.
    #[error("journal file {path}: {source}; `walflow log repair` can go on without it")]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: BadHeader,
    },
    /// A later build wrote the frame.
    #[error("journal file {path} at byte {offset}: {source}")]
    Version {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong.
        source: NotAFrame,
    },
    /// Durable frames are damaged or missing.
    #[error(
        "journal file {} at byte {}: frames {} to {} were durable and are damaged; `walflow log repair` can go on \
         without them",
        .0.path.display(), .0.offset, .0.first.0, .0.last.0
    )]
    Rot(Box<Lost>),
    /// The oldest file starts after what the views have.
    #[error("journal files that hold frames {} to {} are missing from {folder}", .first.0, .last.0)]
    Missing {
        /// The folder.
        folder: PathBuf,
        /// The first missing sequence.
        first: Sequence,
        /// The last missing sequence.
        last: Sequence,
    },
}

/// What to do about rot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnRot {
    /// Stop and say where.
    Refuse,
    /// Go on behind it and list what was lost.
    Skip,
}

struct Walk<'a, F> {
    expected: Sequence,
    on_rot: OnRot,
    scan: Scan,
    give: &'a mut F,
}

/// Reads every group above `after`, oldest first, and hands each to `give` whole.
///
/// # Errors
/// When files are missing, unreadable, or rotten and `on_rot` says refuse.
pub fn scan<F>(disk: &dyn Disk, folder: &Path, after: Sequence, on_rot: OnRot, give: &mut F) -> Result<Scan, ScanError>
where
    F: FnMut(Vec<Scanned>),
{
    let mut files = Vec::new();
    let mut lost = Vec::new();
    for number in live_numbers(disk, folder).map_err(|source| ScanError::Read { path: folder.to_owned(), source })? {
        let path = live_path(folder, number);
        let failed = |source| ScanError::Read { path: path.clone(), source };
        let mut bytes = [0; DATA_START as usize];
        let file = disk.open(&path, Access::Read).map_err(failed)?;
        let read = super::disk::read_full(&*file, &mut bytes, 0).map_err(failed)?;
        match FileHeader::decode(bytes.get(..read).unwrap_or_default()) {
            Ok(header) => files.push((header, path)),
            Err(BadHeader::Damaged) if on_rot == OnRot::Skip => {
                lost.push(Lost { path, offset: 0, first: Sequence(0), last: Sequence(0) });
            }
            Err(source) => return Err(ScanError::Header { path, source }),
        }
    }
    let mut scan = Scan { last: after, lost, ..Scan::default() };
    scan.files = files.iter().map(|(header, _)| (header.number, header.first)).collect();
    if let Some((oldest, _)) = files.first()
        && oldest.first.0 > after.0 + 1
        && on_rot == OnRot::Refuse
    {
        let until = Sequence(oldest.first.0 - 1);
        return Err(ScanError::Missing { folder: folder.to_owned(), first: Sequence(after.0 + 1), last: until });
    }
    let mut walk = Walk { expected: Sequence(after.0 + 1), on_rot, scan, give };
    for (at, (header, path)) in files.iter().enumerate() {
        // A later file's first sequence ends all earlier ones: what recovery cut or wrote anew does not count there.
        let limit = files.iter().skip(at + 1).map(|(next, _)| next.first).min();
        walk.scan.durable = walk.scan.durable.max(Sequence(header.first.0.saturating_sub(1)));
        if limit.is_some_and(|limit| limit <= walk.expected) {
            continue;
        }
        walk.file(disk, header, path, limit)?;
    }
    walk.scan.last = Sequence(walk.expected.0 - 1);
    Ok(walk.scan)
}

impl<F: FnMut(Vec<Scanned>)> Walk<'_, F> {
    fn file(
        &mut self,
        disk: &dyn Disk,
        header: &FileHeader,
        path: &Path,
        limit: Option<Sequence>,
    ) -> Result<(), ScanError> {
        let bytes = disk
            .open(path, Access::Read)
            .and_then(|file| read_all(&*file))
            .map_err(|source| ScanError::Read { path: path.to_owned(), source })?;
        let mut at = usize::try_from(DATA_START).unwrap_or(usize::MAX).min(bytes.len());
        let mut pieces = Pieces { bytes: &bytes, piece: Bytes::new(), start: 0 };
        // The next sequence in this file; what is below `expected` has been applied already.
        let mut next = header.first;
        loop {
            if limit.is_some_and(|limit| next >= limit) {
                return Ok(());
            }
            match pieces.group(at, header.salt, next) {
                Ok((group, end)) => {
                    next = Sequence(next.0 + group.len() as u64);
                    if let Some(durable) = group.iter().map(|scanned| scanned.header.durable).max() {
                        self.scan.durable = self.scan.durable.max(durable);
                    }
                    at = end;
                    if next > self.expected {
                        self.expected = next;
                        (self.give)(group);
                    }
                }
                Err(source @ NotAFrame::Version(_)) => {
                    return Err(ScanError::Version { path: path.to_owned(), offset: at as u64, source });
                }
                Err(_) => {
                    let Some((found, sequence)) = self.damage(&bytes, at, header.salt, next, path, limit)? else {
                        return Ok(());
                    };
                    at = found;
                    next = sequence;
                }
            }
        }
    }

    /// Decides what damage at `at` is. Gives where to go on in this file, if there is anything to go on with.
    fn damage(
        &mut self,
        bytes: &[u8],
        at: usize,
        salt: u32,
        next: Sequence,
        path: &Path,
        limit: Option<Sequence>,
    ) -> Result<Option<(usize, Sequence)>, ScanError> {
        if limit.is_none() && !is_rot(bytes, at, salt, next) {
            let rest = bytes.get(at..).unwrap_or_default();
            let len = written(rest);
            if len > 0 {
                let bytes = Bytes::copy_from_slice(rest.get(..len).unwrap_or_default());
                self.scan.cut = Some(Cut { path: path.to_owned(), offset: at as u64, bytes });
            }
            return Ok(None);
        }
        let later = later_group(bytes, at + 1, salt, |header| header.sequence > next);
        let end = later.map(|(_, header)| header.sequence).into_iter().chain(limit).min();
        let lost_until = Sequence(end.unwrap_or(next).0.saturating_sub(1));
        if lost_until < self.expected {
            // Rot below every view: nothing is lost by it, so it is only told (LOG.md 20).
            tracing::warn!(path = %path.display(), offset = at, "frames that are settled long since are damaged");
        } else {
            let lost =
                Lost { path: path.to_owned(), offset: at as u64, first: next.max(self.expected), last: lost_until };
            match self.on_rot {
                OnRot::Refuse => return Err(ScanError::Rot(Box::new(lost))),
                OnRot::Skip => self.scan.lost.push(lost),
            }
            self.expected = Sequence(lost_until.0 + 1);
        }
        Ok(later.map(|(found, header)| (found, header.sequence)))
    }
}

/// Where the bytes end that are not zero. Most of a file is zeros, so whole blocks are compared at once.
fn written(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    while let Some(shorter) = rest.strip_suffix(&ZEROS) {
        rest = shorter;
    }
    rest.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

/// Reads one whole group at `at` of a piece.
fn group(bytes: &Bytes, at: usize, salt: u32, next: Sequence) -> Result<(Vec<Scanned>, usize), NotAFrame> {
    let mut group: Vec<Scanned> = Vec::new();
    let mut at = at;
    loop {
        let rest = bytes.slice(at.min(bytes.len())..);
        let (header, frame) = read_frame(&rest, salt)?;
        let place = group.len() as u64;
        let fits = header.sequence.0 == next.0 + place
            && header.first == group.is_empty()
            && group.last().is_none_or(|before| before.header.left == header.left + 1);
        if !fits {
            return Err(NotAFrame::Header);
        }
        group.push(Scanned { header, frame, piece: bytes.clone(), at });
        at += header.frame_bytes();
        if header.left == 0 {
            return Ok((group, at));
        }
    }
}

/// True when a later frame says that what is damaged at `at` was durable when it was written.
fn is_rot(bytes: &[u8], at: usize, salt: u32, damaged: Sequence) -> bool {
    later_group(bytes, at + 1, salt, |header| header.durable >= damaged && header.sequence > damaged).is_some()
}

/// The first group start from `from` on that `fits`.
fn later_group(bytes: &[u8], from: usize, salt: u32, fits: impl Fn(&Header) -> bool) -> Option<(usize, Header)> {
    let mut from = from;
    // A header may end with zeros of its own; it does not begin behind what was written.
    let bytes = bytes.get(..written(bytes) + HEADER_BYTES).unwrap_or(bytes);
    loop {
        let rest = bytes.get(from..)?;
        if rest.len() < HEADER_BYTES {
            return None;
        }
        let found = from + rest.windows(2).position(|two| two == MAGIC)?;
        if let Ok(header) = Header::decode(bytes.get(found..)?, salt)
            && header.first
            && fits(&header)
        {
            return Some((found, header));
        }
        from = found + 1;
    }
}
