//! The journal's files: made full of zeros, given a number and a salt, overwritten, recycled.
//!
//! [`JournalFiles`] knows which files are live and which are spare; it never reads or writes a frame. A file gets its
//! `.wal` name only when its header is durable, so a crash leaves either a whole file or a spare one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::ZEROS;
use super::change::Sequence;
use super::disk::{Access, Disk, DiskFile};

/// Where the frames of a journal file start. The header has a block of its own, never written again with frames.
pub const DATA_START: u64 = 4096;
const MAGIC: [u8; 8] = *b"walflowJ";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 36;

/// What a journal file's first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileHeader {
    /// Counts up from 1 and stands in the file's name.
    pub number: u64,
    /// Seeds the checksums of this life of the file.
    pub salt: u32,
    /// The first sequence that counts here; frames from here on in earlier files do not.
    pub first: Sequence,
}

/// A journal file's header is damaged, or a later build wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// Magic or checksum is wrong.
    #[error("the file's header does not match its checksum")]
    Damaged,
    /// A later build wrote it.
    #[error("the file has version {0}, this build reads {VERSION}")]
    Version(u32),
}

impl FileHeader {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            if let Some(place) = out.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
                at += bytes.len();
            }
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&self.salt.to_le_bytes());
        put(&self.number.to_le_bytes());
        put(&self.first.0.to_le_bytes());
        let sum = crc32c::crc32c(out.get(..HEADER_BYTES - 4).unwrap_or_default());
        if let Some(place) = out.get_mut(HEADER_BYTES - 4..) {
            place.copy_from_slice(&sum.to_le_bytes());
        }
        out
    }

    /// Reads a header from the start of a file.
    ///
    /// # Errors
    /// When it is damaged or from a later build.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadHeader> {
        let header = bytes.first_chunk::<HEADER_BYTES>().ok_or(BadHeader::Damaged)?;
        let (covered, sum) = header.split_at(HEADER_BYTES - 4);
        let [m0, m1, m2, m3, m4, m5, m6, m7, rest @ ..] = header;
        if [*m0, *m1, *m2, *m3, *m4, *m5, *m6, *m7] != MAGIC || crc32c::crc32c(covered).to_le_bytes() != sum {
            return Err(BadHeader::Damaged);
        }
        let (version, rest) = rest.split_first_chunk::<4>().ok_or(BadHeader::Damaged)?;
        let (salt, rest) = rest.split_first_chunk::<4>().ok_or(BadHeader::Damaged)?;
        let (number, rest) = rest.split_first_chunk::<8>().ok_or(BadHeader::Damaged)?;
        let first = rest.first_chunk::<8>().ok_or(BadHeader::Damaged)?;
        match u32::from_le_bytes(*version) {
            VERSION => Ok(Self {
                number: u64::from_le_bytes(*number),
                salt: u32::from_le_bytes(*salt),
                first: Sequence(u64::from_le_bytes(*first)),
            }),
            version => Err(BadHeader::Version(version)),
        }
    }
}

/// A journal file that is being written.
pub struct OpenFile {
    /// The handle.
    pub file: Arc<dyn DiskFile>,
    /// Its path, for errors.
    pub path: PathBuf,
    /// Its salt.
    pub salt: u32,
    /// Where the next group goes.
    pub offset: u64,
    /// Bytes that were zero-written; a group that is larger than a whole file goes past it.
    pub capacity: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Live {
    number: u64,
    first: Sequence,
}

#[derive(Default)]
struct Names {
    live: Vec<Live>,
    spare: Vec<PathBuf>,
    next_number: u64,
    next_spare: u64,
}

/// The set of journal files in a folder.
pub struct JournalFiles {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    file_bytes: u64,
    kept: usize,
    names: Mutex<Names>,
}

/// The path of the live file with this number.
pub fn live_path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number:010}.wal"))
}

/// The numbers of the live files in a folder, in order.
///
/// # Errors
/// When the folder cannot be listed.
pub fn live_numbers(disk: &dyn Disk, folder: &Path) -> io::Result<Vec<u64>> {
    let names = disk.list(folder)?;
    let mut numbers: Vec<u64> = names.iter().filter_map(|name| name.strip_suffix(".wal")?.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

impl JournalFiles {
    /// Takes over a folder. `live` are the files that recovery read, each with its first sequence, in order. Files
    /// that were being made when the last process stopped are removed; spare ones are used again, and at most `kept`
    /// of them stay when files are freed.
    ///
    /// # Errors
    /// When the folder cannot be made, listed or cleaned.
    pub fn open(
        disk: Arc<dyn Disk>,
        folder: PathBuf,
        file_bytes: u64,
        kept: usize,
        live: &[(u64, Sequence)],
    ) -> io::Result<Self> {
        disk.make_folder(&folder)?;
        let mut names = Names { next_number: 1, ..Names::default() };
        for name in disk.list(&folder)? {
            let path = folder.join(&name);
            if let Some(stem) = name.strip_suffix(".spare") {
                names.next_spare = names.next_spare.max(stem.parse::<u64>().unwrap_or(0) + 1);
                names.spare.push(path);
            } else if name.strip_suffix(".new").is_some() {
                disk.remove(&path)?;
            } else if let Some(number) = name.strip_suffix(".wal").and_then(|stem| stem.parse::<u64>().ok()) {
                names.next_number = names.next_number.max(number + 1);
            }
        }
        names.live = live.iter().map(|(number, first)| Live { number: *number, first: *first }).collect();
        Ok(Self { disk, folder, file_bytes, kept, names: Mutex::new(names) })
    }

    /// Makes the file after the newest ready for frames from `first` on, with `frames` already in it (built for the
    /// salt that is handed in). Durable, name included, when it returns.
    ///
    /// # Errors
    /// When making, writing or syncing fails; nothing that was there before is touched then.
    pub fn start_next(&self, first: Sequence, frames: impl FnOnce(u32) -> Vec<u8>) -> io::Result<OpenFile> {
        let spare = self.names.lock().spare.pop();
        let from = match spare {
            Some(path) => path,
            None => self.zeroed()?,
        };
        let number = self.names.lock().next_number;
        let started = self.fill(&from, number, first, frames);
        match started {
            Ok(open) => {
                let mut names = self.names.lock();
                names.next_number = number + 1;
                names.live.push(Live { number, first });
                Ok(open)
            }
            Err(error) => {
                // It may be half written and its name may not have lasted: it is no spare any more.
                let _ = self.disk.remove(&from);
                Err(error)
            }
        }
    }

    fn fill(
        &self,
        from: &Path,
        number: u64,
        first: Sequence,
        frames: impl FnOnce(u32) -> Vec<u8>,
    ) -> io::Result<OpenFile> {
        let salt = fastrand::u32(1..);
        let file = self.disk.open(from, Access::Write)?;
        let capacity = file.size()?;
        let frames = frames(salt);
        if !frames.is_empty() {
            file.write_all_at(&frames, DATA_START)?;
        }
        file.write_all_at(&FileHeader { number, salt, first }.encode(), 0)?;
        file.sync()?;
        let path = live_path(&self.folder, number);
        self.disk.rename(from, &path)?;
        self.disk.sync_folder(&self.folder)?;
        Ok(OpenFile { file, path, salt, offset: DATA_START + frames.len() as u64, capacity })
    }

    /// Makes a file of zeros under a name that the next start would remove.
    fn zeroed(&self) -> io::Result<PathBuf> {
        let stem = {
            let mut names = self.names.lock();
            names.next_spare += 1;
            names.next_spare
        };
        let path = self.folder.join(format!("{stem:010}.new"));
        let made = self.disk.open(&path, Access::Create).and_then(|file| {
            let mut at = 0;
            while at < self.file_bytes {
                let len = (self.file_bytes - at).min(ZEROS.len() as u64);
                let chunk = usize::try_from(len).unwrap_or(ZEROS.len());
                file.write_all_at(ZEROS.get(..chunk).unwrap_or(&ZEROS), at)?;
                file.write_back(at, len);
                at += len;
            }
            file.sync()
        });
        match made {
            Ok(()) => Ok(path),
            Err(error) => {
                let _ = self.disk.remove(&path);
                Err(error)
            }
        }
    }

    /// Makes spare files until there are `count` (LOG.md 21: acks and trims can be written when the disk is full).
    ///
    /// # Errors
    /// When the disk has no room for another.
    pub fn prepare(&self, count: usize) -> io::Result<()> {
        while self.names.lock().spare.len() < count {
            let made = self.zeroed()?;
            let spare = made.with_extension("spare");
            self.disk.rename(&made, &spare)?;
            self.disk.sync_folder(&self.folder)?;
            self.names.lock().spare.push(spare);
        }
        Ok(())
    }

    /// How many spare files there are.
    pub fn spare(&self) -> usize {
        self.names.lock().spare.len()
    }

    /// How many live files there are, the one being written included.
    pub fn live(&self) -> usize {
        self.names.lock().live.len()
    }

    /// Frees the files that hold nothing above `applied`. Call it only when every view is durable up to there.
    ///
    /// # Errors
    /// When renaming or removing fails.
    pub fn recycle(&self, applied: Sequence) -> io::Result<usize> {
        let mut freed = 0;
        loop {
            let (number, spares) = {
                let names = self.names.lock();
                let [oldest, next, ..] = names.live.as_slice() else { break };
                // The next file's first sequence ends this one's.
                if next.first.0 > applied.0 + 1 {
                    break;
                }
                (oldest.number, names.spare.len())
            };
            let path = live_path(&self.folder, number);
            let usual = self.disk.open(&path, Access::Read)?.size()? == self.file_bytes;
            if spares < self.kept && usual {
                let stem = {
                    let mut names = self.names.lock();
                    names.next_spare += 1;
                    names.next_spare
                };
                let spare = self.folder.join(format!("{stem:010}.spare"));
                self.disk.rename(&path, &spare)?;
                self.names.lock().spare.push(spare);
            } else {
                self.disk.remove(&path)?;
            }
            self.names.lock().live.remove(0);
            freed += 1;
        }
        if freed > 0 {
            self.disk.sync_folder(&self.folder)?;
        }
        Ok(freed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::embedded::disk::RealDisk;

    fn files(folder: &Path, live: &[(u64, Sequence)]) -> JournalFiles {
        JournalFiles::open(Arc::new(RealDisk), folder.join("journal"), 8192, 1, live).unwrap()
    }

    #[test]
    fn a_header_comes_back_and_a_flipped_bit_is_noticed() {
        let header = FileHeader { number: 3, salt: 9, first: Sequence(77) };
        let bytes = header.encode();
        assert_eq!(FileHeader::decode(&bytes), Ok(header));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(FileHeader::decode(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn files_go_round_and_a_recycled_one_has_another_salt() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path(), &[]);
        let first = files.start_next(Sequence(1), |_| Vec::new()).unwrap();
        let second = files.start_next(Sequence(10), |_| Vec::new()).unwrap();
        assert_eq!(files.recycle(Sequence(8)).unwrap(), 0);
        assert_eq!(files.recycle(Sequence(9)).unwrap(), 1);
        assert_eq!((files.live(), files.spare()), (1, 1));
        let third = files.start_next(Sequence(20), |_| b"frames".to_vec()).unwrap();
        assert_eq!(third.offset, DATA_START + 6);
        assert_eq!(files.spare(), 0);
        assert_ne!(third.salt, first.salt);
        assert_ne!(first.path, second.path);
        assert_eq!(live_numbers(&RealDisk, &folder.path().join("journal")).unwrap(), [2, 3]);
    }

    #[test]
    fn what_was_half_made_is_removed_and_numbers_go_on() {
        let folder = tempfile::tempdir().unwrap();
        {
            let files = files(folder.path(), &[]);
            files.start_next(Sequence(1), |_| Vec::new()).unwrap();
            files.prepare(2).unwrap();
            std::fs::write(folder.path().join("journal/0000000009.new"), b"half").unwrap();
        }
        let files = files(folder.path(), &[(1, Sequence(1))]);
        assert_eq!(files.spare(), 2);
        let next = files.start_next(Sequence(5), |_| Vec::new()).unwrap();
        assert!(next.path.ends_with("0000000002.wal"));
        assert!(!folder.path().join("journal/0000000009.new").exists());
    }
}
