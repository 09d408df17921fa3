//! Files that lines are appended to: opened when they are needed, synced after each append, closed when too many are open.
//!
//! Takes whole lines, returns when they are on the disk. A line that a crash cut short is closed with a line end before the
//! next one; a file that was moved away is opened anew. Never syncs again what failed to sync: such a file is closed, and
//! its lines are the caller's to write again.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;

/// Files kept open; the one that was used longest ago is closed for the next.
const MOST_OPEN: usize = 64;

/// Lines could not be put on the disk.
#[derive(Debug, thiserror::Error)]
#[error("cannot {act}: {cause}")]
pub(super) struct FileError {
    act: &'static str,
    cause: io::Error,
}

impl FileError {
    /// True when no file can have this name, whatever becomes of the disk.
    pub(super) fn is_about_the_name(&self) -> bool {
        matches!(
            self.cause.kind(),
            ErrorKind::IsADirectory | ErrorKind::NotADirectory | ErrorKind::InvalidFilename | ErrorKind::InvalidInput
        )
    }
}

fn failed(act: &'static str) -> impl FnOnce(io::Error) -> FileError {
    move |cause| FileError { act, cause }
}

/// The files that are open, the one that was used longest ago first.
#[derive(Default)]
pub(super) struct OpenFiles {
    files: IndexMap<PathBuf, OpenFile>,
}

struct OpenFile {
    file: File,
    identity: (u64, u64),
}

impl OpenFiles {
    /// Opens a file, its folders made; does nothing when it is open and still in its place.
    pub(super) fn open(&mut self, path: &Path) -> Result<(), FileError> {
        if let Some((_, known)) = self.files.shift_remove_entry(path)
            && std::fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == known.identity)
        {
            self.files.insert(path.to_owned(), known);
            return Ok(());
        }
        let opened = open(path)?;
        while self.files.len() >= MOST_OPEN {
            self.files.shift_remove_index(0);
        }
        self.files.insert(path.to_owned(), opened);
        Ok(())
    }

    /// Appends whole lines and syncs them.
    pub(super) fn append(&mut self, path: &Path, lines: &[u8]) -> Result<(), FileError> {
        self.open(path)?;
        let Some(open) = self.files.get_mut(path) else { return Ok(()) };
        let written = append(&mut open.file, lines);
        if written.is_err() {
            self.files.shift_remove(path);
        }
        written
    }

    #[cfg(test)]
    fn count(&self) -> usize {
        self.files.len()
    }
}

fn append(file: &mut File, lines: &[u8]) -> Result<(), FileError> {
    let before = file.metadata().map_err(failed("look at the file"))?.len();
    let mut rest = lines;
    while !rest.is_empty() {
        match file.write(rest) {
            Ok(count) if count > 0 => rest = rest.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            stopped => {
                let cause = stopped.err().unwrap_or_else(|| ErrorKind::WriteZero.into());
                // Half a line is taken back, unless somebody else has written behind it.
                let ours = before + (lines.len() - rest.len()) as u64;
                if file.metadata().is_ok_and(|now| now.len() == ours) {
                    let _ = file.set_len(before);
                }
                return Err(FileError { act: "write", cause });
            }
        }
    }
    file.sync_data().map_err(failed("sync"))
}

fn open(path: &Path) -> Result<OpenFile, FileError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_folder(folder).map_err(failed("make its folder"))?;
    let existed = path.exists();
    let opened = OpenOptions::new().create(true).append(true).read(true).open(path);
    let mut file = opened.map_err(failed("open it"))?;
    close_last_line(&mut file).map_err(failed("close its last line"))?;
    if !existed {
        sync_folder(folder).map_err(failed("sync its folder"))?;
    }
    let found = file.metadata().map_err(failed("look at the file"))?;
    Ok(OpenFile { identity: (found.dev(), found.ino()), file })
}

/// Makes a folder and those above it; each new name is synced in the folder that holds it.
fn make_folder(folder: &Path) -> io::Result<()> {
    if folder.as_os_str().is_empty() || folder.is_dir() {
        return Ok(());
    }
    let above = folder.parent().unwrap_or(Path::new(""));
    make_folder(above)?;
    match std::fs::create_dir(folder) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && folder.is_dir() => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(ErrorKind::NotADirectory.into()),
        Err(error) => Err(error),
        Ok(()) => sync_folder(if above.as_os_str().is_empty() { Path::new(".") } else { above }),
    }
}

#[expect(clippy::disallowed_methods, reason = "a target's folder is none of the log's")]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// A line that a crash cut short gets its end, so that the next one stands alone.
fn close_last_line(file: &mut File) -> io::Result<()> {
    let regular = file.metadata()?.is_file();
    if !regular || file.seek(SeekFrom::End(0))? == 0 {
        return Ok(());
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    if last == *b"\n" { Ok(()) } else { file.write_all(b"\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_last_line_is_closed_before_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, "{\"whole\":1}\n{\"to").unwrap();
        OpenFiles::default().append(&path, b"2\n").unwrap();
        OpenFiles::default().append(&path, b"3\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"whole\":1}\n{\"to\n2\n3\n");
    }

    #[test]
    fn a_file_that_was_moved_or_removed_is_opened_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let mut files = OpenFiles::default();
        files.append(&path, b"1\n").unwrap();
        std::fs::rename(&path, folder.path().join("old")).unwrap();
        files.append(&path, b"2\n").unwrap();
        std::fs::rename(&path, folder.path().join("second")).unwrap();
        std::fs::write(&path, "").unwrap();
        files.append(&path, b"in the new one\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "in the new one\n");
        std::fs::remove_file(&path).unwrap();
        files.append(&path, b"3\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "3\n");
        assert_eq!(std::fs::read_to_string(folder.path().join("old")).unwrap(), "1\n");
    }

    #[test]
    fn few_files_stay_open_however_many_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = OpenFiles::default();
        for number in 0..MOST_OPEN + 5 {
            files.append(&folder.path().join(number.to_string()), b"1\n").unwrap();
            files.append(&folder.path().join("0"), b"again\n").unwrap();
        }
        assert_eq!(files.count(), MOST_OPEN);
        let first = std::fs::read_to_string(folder.path().join("0")).unwrap();
        assert_eq!(first.lines().count(), MOST_OPEN + 6);
        assert!(files.files.contains_key(&folder.path().join("0")), "what is used stays open");
    }

    #[test]
    fn a_full_disk_is_an_error_that_leaves_no_half_line() {
        let full = Path::new("/dev/full");
        if full.exists() {
            let error = OpenFiles::default().append(full, b"1\n").unwrap_err();
            assert!(!error.is_about_the_name(), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        let error = OpenFiles::default().append(folder.path(), b"1\n").unwrap_err();
        assert!(error.is_about_the_name(), "{error}");
    }
}
