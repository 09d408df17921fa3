//! A start: what the last stop left behind is read, cut, made durable, and put back into memory.
//!
//! In this order: lock, format, `state.db`, segments cut to the checkpoint, the journal from the checkpoint on. What of
//! the journal was not provably durable is written into a fresh file before anything is served, so a crash during
//! recovery finds the same as the one before it. Rot refuses the start; a torn tail is cut and kept aside.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::batch::{Commit, Durable};
use super::change::{Change, NamespaceNumber, Sequence};
use super::disk::{Access, read_all, replace};
use super::due::Due;
use super::frame::{HEADER_BYTES, Header};
use super::journal::{JournalFiles, OpenFile};
use super::keys::Keys;
use super::options::{NamespaceSettings, Options};
use super::scan::{Cut, Lost, Scan, ScanError, Scanned, scan};
use super::segment::{SegmentError, SegmentFiles, Segments};
use super::shared::{Parts, Shared, Spaces};
use super::space::Space;
use super::state::{State, StateError};
use crate::clock::Timestamp;
use crate::record::{Namespace, Position, Record};

/// The version of the folder's layout.
const FORMAT: &str = "walflow data 1\n";

/// Why a data folder cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("{path} is in use by another walflow ({holder}); stop that one first, or give this one another --data")]
    Held {
        /// The folder.
        path: PathBuf,
        /// What that one wrote about itself.
        holder: String,
    },
    /// The folder is not one of ours, or a newer version's.
    #[error("{path} has the format `{found}`, this version knows `{}`", FORMAT.trim())]
    Format {
        /// The folder.
        path: PathBuf,
        /// What its FORMAT file says.
        found: String,
    },
    /// The file system refused.
    #[error("{act} {path}: {source}")]
    Storage {
        /// What was tried.
        act: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `state.db` cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// A segment cannot be used.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The journal cannot be read.
    #[error(transparent)]
    Journal(#[from] ScanError),
}

/// What a start has found and made.
pub(super) struct Recovered {
    pub(super) shared: Arc<Shared>,
    pub(super) state: State,
    pub(super) segments: SegmentFiles,
    pub(super) file: OpenFile,
    pub(super) last: Sequence,
    pub(super) time: Timestamp,
    pub(super) commits: Vec<Commit>,
    /// The last stop was orderly, or there was none.
    pub(super) clean: bool,
    /// Held as long as the log is open.
    pub(super) lock: Box<dyn std::any::Any + Send + Sync>,
}

fn tried<T>(act: &'static str, path: &Path, result: io::Result<T>) -> Result<T, OpenError> {
    result.map_err(|source| OpenError::Storage { act, path: path.to_owned(), source })
}

/// Takes the folder's lock and checks its format; makes both in a new folder.
pub(super) fn claim(options: &Options) -> Result<Box<dyn std::any::Any + Send + Sync>, OpenError> {
    let (disk, data) = (&*options.disk, &options.data);
    tried("make the data folder", data, disk.make_folder(data))?;
    let path = data.join("LOCK");
    let note = format!("pid {}", std::process::id());
    let Some(lock) = tried("lock", &path, disk.lock(&path, &note))? else {
        let holder = disk.open(&path, Access::Read).and_then(|file| read_all(&*file)).unwrap_or_default();
        return Err(OpenError::Held { path: data.clone(), holder: String::from_utf8_lossy(&holder).trim().to_owned() });
    };
    let path = data.join("FORMAT");
    match disk.open(&path, Access::Read).and_then(|file| read_all(&*file)) {
        Ok(found) if found == FORMAT.as_bytes() => {}
        Ok(found) => {
            let found = String::from_utf8_lossy(&found).trim().to_owned();
            return Err(OpenError::Format { path: data.clone(), found });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            tried("write", &path, replace(disk, &path, FORMAT.as_bytes()))?;
        }
        Err(error) => return Err(OpenError::Storage { act: "read", path, source: error }),
    }
    Ok(lock)
}

/// Opens a folder up to the point where its threads can start.
pub(super) fn recover(options: Options) -> Result<Recovered, OpenError> {
    let lock = claim(&options)?;
    let disk = Arc::clone(&options.disk);
    let database = options.data.join("state.db");
    let fenced = options.data.join(super::FENCED);
    let was_fenced = disk.open(&fenced, Access::Read).is_ok();
    if was_fenced {
        State::rebuild(&database, &*disk)?;
    }
    let state = State::open(&database, Arc::clone(&disk))?;
    let segment_files = SegmentFiles::new(Arc::clone(&disk), options.data.join("segments"), options.segment_bytes);
    let mut spaces = open_spaces(&state, &segment_files)?;
    let folder = options.data.join("journal");
    tried("make", &folder, disk.make_folder(&folder))?;
    let instance = Arc::new(Space::new(
        NamespaceNumber(0),
        None,
        NamespaceSettings::default(),
        Segments::new(&segment_files.root, NamespaceNumber(0)),
    ));
    let mut unsettled = Unsettled::new(&mut spaces, &instance, &segment_files);
    let found = scan(&*disk, &folder, state.checkpoint(), options.on_rot, &mut |group| unsettled.add(group))?;
    let Unsettled { commits, ownerless, last_time, stopped, failed, .. } = unsettled.finish();
    failed.map_or(Ok(()), Err)?;
    if let Some(cut) = &found.cut {
        keep_aside(&options, cut)?;
    }
    let files = JournalFiles::open(
        Arc::clone(&disk),
        folder.clone(),
        options.journal_file_bytes,
        options.journal_kept(),
        &found.files,
    );
    let files = tried("open", &folder, files)?;
    let file = tried("start a journal file in", &folder, rewrite_tail(&files, &found, &commits, &ownerless))?;
    if was_fenced {
        tried("remove", &fenced, disk.remove(&fenced).and_then(|()| disk.sync_folder(&options.data)))?;
    }
    let clean = stopped.unwrap_or_else(|| state.stopped_orderly());
    let time = state.last_time().max(last_time);
    let applied = state.applied();
    let shared = Arc::new(Shared::new(Parts {
        segments_root: segment_files.root.clone(),
        files,
        spaces,
        instance,
        durable: found.last,
        committed: applied,
        due: Due::new(options.due_bytes),
        keys: Keys::default(),
        reader: state.reader(),
        damaged: found.lost.iter().map(lost_frames).collect(),
        options,
    }));
    for commit in &commits {
        remember(&shared, commit, applied);
    }
    Ok(Recovered { shared, state, segments: segment_files, file, last: found.last, time, commits, clean, lock })
}

fn lost_frames(lost: &Lost) -> String {
    let Lost { path, offset, first, last } = lost;
    format!("{} at byte {offset}: frames {} to {} are lost", path.display(), first.0, last.0)
}

fn full_is_fine(error: io::Error) -> io::Result<()> {
    if super::is_full(&error) { Ok(()) } else { Err(error) }
}

/// The namespaces that `state.db` knows, with their segments cut to the checkpoint.
fn open_spaces(state: &State, files: &SegmentFiles) -> Result<Spaces, OpenError> {
    let marks: HashMap<NamespaceNumber, _> =
        state.segment_marks()?.into_iter().map(|mark| (mark.namespace, mark)).collect();
    let mut spaces = Spaces { next: 1, ..Spaces::default() };
    for stored in state.namespaces()? {
        spaces.next = spaces.next.max(stored.number.0 + 1);
        let mark = marks.get(&stored.number);
        let active = mark.filter(|mark| mark.first > Position(0)).map(|mark| (mark.first, mark.length));
        let end = mark.map_or(Position(0), |mark| mark.end);
        let segments = Segments::open(files, stored.number, active.filter(|_| !stored.deleted), end)?;
        let Ok(name) = stored.name.parse::<Namespace>() else { continue };
        if stored.deleted {
            continue;
        }
        let space = Space::new(stored.number, Some(name.clone()), NamespaceSettings::default(), segments);
        space.forget_before(stored.first);
        *space.epochs.lock() = stored.epochs;
        for (branch, cursor) in stored.branches {
            space.branch_opened(&branch, cursor, state.last_time());
        }
        space.keys_forgotten(stored.keys_since);
        space.start_over.store(stored.start_over.0, std::sync::atomic::Ordering::Relaxed);
        space.parked_bytes.store(stored.parked_bytes, std::sync::atomic::Ordering::Relaxed);
        let space = Arc::new(space);
        spaces.by_number.insert(stored.number, Arc::clone(&space));
        spaces.by_name.insert(name, space);
    }
    Ok(spaces)
}

/// Keeps the bytes of a torn tail, for somebody who wants to look.
fn keep_aside(options: &Options, cut: &Cut) -> Result<(), OpenError> {
    let folder = options.data.join("cut");
    let name = cut.path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let path = folder.join(format!("{name}-{}.bytes", cut.offset));
    let made = options.disk.make_folder(&folder).and_then(|()| replace(&*options.disk, &path, &cut.bytes));
    tried("keep the torn tail in", &path, made.or_else(full_is_fine))?;
    tracing::warn!(
        journal = %cut.path.display(), offset = cut.offset, bytes = cut.bytes.len(), kept = %path.display(),
        "the last write was not whole and is cut; it had not been acknowledged"
    );
    Ok(())
}

/// Writes what is not provably durable into a fresh file: the pages of the old one may be clean in memory and not on the
/// disk (LOG.md 6, 7).
fn rewrite_tail(files: &JournalFiles, found: &Scan, commits: &[Commit], ownerless: &[Scanned]) -> io::Result<OpenFile> {
    let owned =
        commits.iter().flat_map(|commit| commit.frames.iter().map(|durable| (&durable.header, commit.raw(durable))));
    let ownerless =
        ownerless.iter().map(|frame| (&frame.header, frame.piece.get(frame.at..frame.end()).unwrap_or_default()));
    let mut doubtful: Vec<(&Header, &[u8])> =
        owned.chain(ownerless).filter(|(header, _)| header.sequence > found.durable).collect();
    doubtful.sort_unstable_by_key(|(header, _)| header.sequence);
    let first = doubtful.first().map_or(Sequence(found.last.0 + 1), |(header, _)| header.sequence);
    files.start_next(first, |salt| {
        let mut bytes = Vec::new();
        for (header, raw) in doubtful {
            bytes.extend_from_slice(&header.encode(salt));
            bytes.extend_from_slice(raw.get(HEADER_BYTES..).unwrap_or_default());
        }
        bytes
    })
}

/// What the journal has after the checkpoint, on its way into commits: one for each piece of a file, so that every byte is
/// in memory once.
struct Unsettled<'a> {
    spaces: &'a mut Spaces,
    instance: &'a Arc<Space>,
    files: &'a SegmentFiles,
    commits: Vec<Commit>,
    /// The commit that is being made.
    open: Option<Commit>,
    /// Frames of namespaces that were deleted before the checkpoint: nothing of them is left to settle.
    ownerless: Vec<Scanned>,
    last_time: Timestamp,
    /// Whether the last change of all was an orderly stop; `None` when there was none.
    stopped: Option<bool>,
    failed: Option<SegmentError>,
}

impl<'a> Unsettled<'a> {
    fn new(spaces: &'a mut Spaces, instance: &'a Arc<Space>, files: &'a SegmentFiles) -> Self {
        Self {
            spaces,
            instance,
            files,
            commits: Vec::new(),
            open: None,
            ownerless: Vec::new(),
            last_time: Timestamp::MIN,
            stopped: None,
            failed: None,
        }
    }

    /// Takes a group in, and makes the namespace that it creates.
    fn add(&mut self, group: Vec<Scanned>) {
        let (Some(first), Some(last)) = (group.first(), group.last()) else { return };
        self.stopped = Some(matches!(last.frame.change, Change::Stopped));
        self.last_time = self.last_time.max(last.frame.time);
        let number = first.frame.namespace;
        if let Change::NamespaceCreated { name } = &first.frame.change
            && !self.spaces.by_number.contains_key(&number)
            && let Ok(name) = name.parse::<Namespace>()
        {
            // No checkpoint knows it, so what it has on disk is of no worth, and may be torn (LOG.md 4).
            let segments = Segments::open(self.files, number, None, Position(0)).unwrap_or_else(|error| {
                self.failed = Some(error);
                Segments::new(&self.files.root, number)
            });
            let space = Arc::new(Space::new(number, Some(name.clone()), NamespaceSettings::default(), segments));
            self.spaces.by_number.insert(number, Arc::clone(&space));
            self.spaces.by_name.insert(name, space);
            self.spaces.next = self.spaces.next.max(number.0 + 1);
        }
        let space = if number.0 == 0 { Some(self.instance) } else { self.spaces.by_number.get(&number) };
        let Some(space) = space.cloned() else {
            self.ownerless.extend(group);
            return;
        };
        if self.open.as_ref().is_none_or(|open| open.bytes.as_ptr() != first.piece.as_ptr()) {
            let fresh = Commit { bytes: first.piece.clone(), frames: Vec::new(), runs: Vec::new(), last: Sequence(0) };
            self.commits.extend(self.open.replace(fresh).map(fitting));
        }
        let Some(open) = &mut self.open else { return };
        open.last = last.header.sequence;
        match open.runs.last_mut() {
            Some((same, count)) if Arc::ptr_eq(same, &space) => *count += group.len(),
            _ => open.runs.push((space, group.len())),
        }
        for Scanned { header, frame, at, .. } in group {
            let record = match &frame.change {
                Change::Append { record, .. } | Change::Release { record, .. } => {
                    Record::decode(record).ok().map(Arc::new)
                }
                _ => None,
            };
            open.frames.push(Durable { header, at, frame, record });
        }
    }

    fn finish(mut self) -> Self {
        self.commits.extend(self.open.take().map(fitting));
        self
    }
}

/// A commit whose bytes are counted only as far as its frames go.
fn fitting(mut commit: Commit) -> Commit {
    let end = commit.frames.last().map_or(0, |last| last.at + last.header.frame_bytes());
    commit.bytes.truncate(end);
    commit.frames.shrink_to_fit();
    commit
}

/// Puts a commit's changes back into memory, those that `state.db` has not applied; records all the same.
fn remember(shared: &Arc<Shared>, commit: &Commit, applied: Sequence) {
    let spaces = commit.runs.iter().flat_map(|(space, count)| std::iter::repeat_n(space, *count));
    for (space, durable) in spaces.zip(&commit.frames) {
        let frame = &durable.frame;
        if let (Some(record), Change::Append { position, .. } | Change::Release { position, .. }) =
            (&durable.record, &frame.change)
        {
            let entry = crate::source::Entry::new(*position, Arc::clone(record));
            space.publish(entry, durable.header.frame_bytes() as u64, frame.time);
            space.assigned.fetch_max(position.0, std::sync::atomic::Ordering::AcqRel);
        }
        if let Change::Append { idempotency: Some(key), record, .. }
        | Change::Park { idempotency: Some(key), record, .. } = &frame.change
            && frame.sequence > applied
            && let Ok(record) = Record::decode(record)
        {
            let answer = (record.id, record.written_at, record.due_at);
            shared.keys.recall(frame.namespace, key, answer, frame.sequence);
        }
        // What the store has applied came from there, and more may have come after it: a branch that was renamed since
        // would be there twice.
        if frame.sequence <= applied && !matches!(frame.change, Change::NamespaceDeleted) {
            continue;
        }
        shared.remember(space, frame);
        if let Change::Release { parked, due_at, .. } = &frame.change {
            shared.due.remove(*due_at, *parked);
        }
    }
}
