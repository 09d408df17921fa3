//! A start: what the last stop left behind is read, cut, made durable, and put back into memory.
//!
//! In this order: lock, format, `state.db`, segments cut to the checkpoint, the journal from the checkpoint on. What of
//! the journal was not provably durable is written into a fresh file before anything is served, so a crash during
//! recovery finds the same as the one before it. Rot refuses the start; a torn tail is cut and kept aside.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::batch::{Commit, Durable};
use super::change::{Change, NamespaceNumber, Sequence};
use super::disk::{Access, read_all, replace};
use super::due::Due;
use super::frame::HEADER_BYTES;
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
    let mut groups: Vec<Vec<Scanned>> = Vec::new();
    let found = scan(&*disk, &folder, state.checkpoint(), options.on_rot, &mut |group| groups.push(group))?;
    if let Some(cut) = &found.cut {
        keep_aside(&options, cut)?;
    }
    let files = JournalFiles::open(
        Arc::clone(&disk),
        folder.clone(),
        options.journal_file_bytes,
        options.journal_spares,
        &found.files,
    );
    let files = tried("open", &folder, files)?;
    let file = tried("start a journal file in", &folder, rewrite_tail(&files, &found, &groups))?;
    if was_fenced {
        tried("remove", &fenced, disk.remove(&fenced).and_then(|()| disk.sync_folder(&options.data)))?;
    }
    let last_change = groups.last().and_then(|group| group.last()).map(|last| &last.frame.change);
    let clean = match last_change {
        Some(change) => matches!(change, Change::Stopped),
        None => state.stopped_orderly(),
    };
    let last_frame_time = groups.iter().flatten().map(|scanned| scanned.frame.time).max();
    let time = state.last_time().max(last_frame_time.unwrap_or(Timestamp::MIN));
    let instance = Arc::new(Space::new(
        NamespaceNumber(0),
        None,
        NamespaceSettings::default(),
        Segments::new(&segment_files.root, NamespaceNumber(0)),
    ));
    let commits = into_commits(&mut spaces, &instance, &segment_files.root, groups);
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
fn rewrite_tail(files: &JournalFiles, found: &Scan, groups: &[Vec<Scanned>]) -> io::Result<OpenFile> {
    let doubtful: Vec<&Scanned> =
        groups.iter().flatten().filter(|frame| frame.header.sequence > found.durable).collect();
    let first = doubtful.first().map_or(Sequence(found.last.0 + 1), |frame| frame.header.sequence);
    files.start_next(first, |salt| {
        let mut bytes = Vec::new();
        for frame in doubtful {
            bytes.extend_from_slice(&frame.header.encode(salt));
            bytes.extend_from_slice(frame.raw.get(HEADER_BYTES..).unwrap_or_default());
        }
        bytes
    })
}

/// Turns groups into commits, and makes the namespaces that they create.
fn into_commits(spaces: &mut Spaces, instance: &Arc<Space>, root: &Path, groups: Vec<Vec<Scanned>>) -> Vec<Commit> {
    let mut commits = Vec::new();
    for group in groups {
        let Some(first) = group.first() else { continue };
        let number = first.frame.namespace;
        if let Change::NamespaceCreated { name } = &first.frame.change
            && !spaces.by_number.contains_key(&number)
            && let Ok(name) = name.parse::<Namespace>()
        {
            let segments = Segments::new(root, number);
            let space = Arc::new(Space::new(number, Some(name.clone()), NamespaceSettings::default(), segments));
            spaces.by_number.insert(number, Arc::clone(&space));
            spaces.by_name.insert(name, space);
            spaces.next = spaces.next.max(number.0 + 1);
        }
        let space = if number.0 == 0 { Some(instance) } else { spaces.by_number.get(&number) };
        // A namespace that was deleted before the checkpoint has nothing left to settle.
        let Some(space) = space.cloned() else { continue };
        let mut bytes = Vec::with_capacity(group.iter().map(|scanned| scanned.raw.len()).sum());
        let mut frames = Vec::with_capacity(group.len());
        let last = group.last().map_or(Sequence(0), |last| last.header.sequence);
        for Scanned { header, frame, raw } in group {
            let at = bytes.len();
            bytes.extend_from_slice(&raw);
            let record = match &frame.change {
                Change::Append { record, .. } | Change::Release { record, .. } => {
                    Record::decode(record).ok().map(Arc::new)
                }
                _ => None,
            };
            frames.push(Durable { header, at, frame, record });
        }
        let runs = vec![(space, frames.len())];
        commits.push(Commit { bytes: Bytes::from(bytes), frames, runs, last });
    }
    commits
}

/// Puts a commit's changes back into memory, those that `state.db` has not applied; records all the same.
fn remember(shared: &Arc<Shared>, commit: &Commit, applied: Sequence) {
    let Some((space, _)) = commit.runs.first() else { return };
    for durable in &commit.frames {
        let frame = &durable.frame;
        if let (Some(record), Change::Append { position, .. } | Change::Release { position, .. }) =
            (&durable.record, &frame.change)
        {
            let entry = crate::source::Entry { position: *position, record: Arc::clone(record) };
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
