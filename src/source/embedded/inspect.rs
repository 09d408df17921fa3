//! A data folder looked at while nothing runs on it: verified, dumped, repaired.
//!
//! Takes the folder's lock, so it refuses while walflow runs there. Verifying and dumping never write to journal or
//! segments. Repairing gives up what is damaged, keeps the damaged bytes aside and says what was lost; it never writes a
//! checksum over bytes that it has not verified.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;

use super::change::{Change, Frame, NamespaceNumber, Sequence};
use super::disk::{Access, Disk, read_all, replace};
use super::frame::{HEADER_BYTES, Header, MAGIC, NotAFrame, put_frame, read_frame};
use super::journal::{BadHeader, FileHeader, live_numbers, live_path};
use super::recovery::{OpenError, claim};
use super::scan::{OnRot, scan};
use super::segment::{SEGMENT_HEADER, SegmentHeader};
use super::state::State;
use super::{Embedded, Options, salvage};
use crate::clock::{Clock, Timestamp};
use crate::record::{Position, RecordId};
use crate::source::BranchName;

/// Damage that was found, or what a repair gave up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The file.
    pub path: PathBuf,
    /// Where in it.
    pub offset: u64,
    /// What is wrong, or what is gone.
    pub what: String,
}

/// What a folder holds, as far as it is whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Frames in the journal that are not in the last checkpoint.
    pub journal_frames: u64,
    /// The last sequence.
    pub last_sequence: u64,
    /// Segment files.
    pub segments: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes of a last write that was not whole; the next start cuts it. No acknowledged write is in it.
    pub torn_bytes: u64,
    /// What is damaged.
    pub damage: Vec<Damage>,
}

/// One frame, for people and programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dumped {
    /// `journal` or `segment`.
    pub place: &'static str,
    /// Its place in the journal.
    pub sequence: u64,
    /// The number of its namespace; 0 = the instance.
    pub namespace: u32,
    /// When it was written.
    pub time: Timestamp,
    /// What it says, for example `append`.
    pub change: String,
    /// The record's place in its namespace's log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
    /// The record's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<RecordId>,
    /// The record's key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The record's payload, as text where it is text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<String>,
    /// Everything else of the change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

pub(super) fn tried<T>(act: &'static str, path: &Path, result: std::io::Result<T>) -> Result<T, OpenError> {
    result.map_err(|source| OpenError::Storage { act, path: path.to_owned(), source })
}

fn options(data: &Path) -> Result<Options, OpenError> {
    // A folder that is not there is a mistake in the command, not a new log.
    let format = data.join("FORMAT");
    tried("read", &format, std::fs::metadata(&format))?;
    Ok(Options::new(data.to_owned(), Clock::system()))
}

/// Reads everything and checks every checksum.
///
/// # Errors
/// When the folder is in use or cannot be read; damage is no error but in the answer.
pub fn verify(data: &Path) -> Result<Verified, OpenError> {
    let options = options(data)?;
    let _lock = claim(&options)?;
    let mut verified = Verified::default();
    let database = data.join("state.db");
    let (mut after, mut marks) = (Sequence(0), Vec::new());
    let read = State::open(&database, Arc::clone(&options.disk)).and_then(|state| {
        after = state.checkpoint();
        marks = state.segment_marks()?;
        state.check()
    });
    let problems = read.unwrap_or_else(|error| vec![error.to_string()]);
    verified.damage.extend(problems.into_iter().map(|what| Damage { path: database.clone(), offset: 0, what }));
    let mut frames = 0;
    let mut count = |group: Vec<_>| frames += group.len() as u64;
    let found = scan(&*options.disk, &data.join("journal"), after, OnRot::Skip, &mut count)?;
    verified.journal_frames = frames;
    verified.last_sequence = found.last.0;
    verified.torn_bytes = found.cut.map_or(0, |cut| cut.bytes.len() as u64);
    for lost in found.lost {
        let what = format!("durable frames {} to {} are damaged", lost.first.0, lost.last.0);
        verified.damage.push(Damage { path: lost.path, offset: lost.offset, what });
    }
    for (namespace, path) in segment_files(&*options.disk, data)? {
        let mut bytes = tried("read", &path, read_file(&*options.disk, &path))?;
        // Past the checkpoint the journal is the truth.
        let marked = marks.iter().find(|mark| mark.namespace == namespace && path.ends_with(name_of(mark.first)));
        if let Some(mark) = marked {
            let len = usize::try_from(mark.length).unwrap_or(usize::MAX);
            if bytes.len() < len {
                let what = format!("the file is shorter than the {len} bytes that were durable");
                verified.damage.push(Damage { path: path.clone(), offset: bytes.len() as u64, what });
            }
            bytes.truncate(len);
        } else if marks
            .iter()
            .any(|mark| mark.namespace == namespace && path > path.with_file_name(name_of(mark.first)))
            || !marks.iter().any(|mark| mark.namespace == namespace)
        {
            continue;
        }
        verified.segments += 1;
        let walked = walk(&bytes, &mut |_, frame| verified.records += u64::from(is_record(&frame.change)));
        if let Err((offset, what)) = walked {
            verified.damage.push(Damage { path, offset, what: what.to_string() });
        }
    }
    Ok(verified)
}

/// Gives every whole frame: those of the segments, then those of the journal. A record may be in both.
///
/// # Errors
/// When the folder is in use or cannot be read.
pub fn dump(data: &Path, give: &mut dyn FnMut(Dumped)) -> Result<(), OpenError> {
    let options = options(data)?;
    let _lock = claim(&options)?;
    for (_, path) in segment_files(&*options.disk, data)? {
        let bytes = tried("read", &path, read_file(&*options.disk, &path))?;
        // What is damaged is passed over: a dump is for what is left.
        let mut rest = bytes;
        while let Err((offset, _)) = walk(&rest, &mut |_, frame| give(dumped("segment", frame))) {
            let Some(next) = next_frame(&rest, offset) else { break };
            let Some(header) = rest.get(..SEGMENT_HEADER as usize) else { break };
            let mut joined = header.to_vec();
            joined.extend_from_slice(rest.get(next..).unwrap_or_default());
            rest = joined;
        }
    }
    let mut each = |group: Vec<super::scan::Scanned>| {
        group.iter().for_each(|scanned| give(dumped("journal", &scanned.frame)));
    };
    scan(&*options.disk, &data.join("journal"), Sequence(0), OnRot::Skip, &mut each)?;
    Ok(())
}

/// Gives up what is damaged and makes the folder one that opens. Gives what was lost.
///
/// # Errors
/// When the folder is in use or cannot be written.
pub async fn repair(data: &Path) -> Result<Vec<Damage>, OpenError> {
    let options = Options { on_rot: OnRot::Skip, ..options(data)? };
    let mut lost = {
        let _lock = claim(&options)?;
        let before = verify_segments(&options)?;
        for damage in &before {
            fill_damage(&options, &damage.path)?;
        }
        let mut lost = before;
        lost.extend(move_headless(&options)?);
        // Last, since it goes by what segments and journal say.
        lost.extend(salvage::mend(&options)?);
        lost
    };
    let disk = Arc::clone(&options.disk);
    let is_mended = lost.iter().any(|damage| damage.path.ends_with("state.db"));
    let log = Embedded::open(options)?;
    for what in log.health().damaged {
        lost.push(Damage { path: data.join("journal"), offset: 0, what: what.to_string() });
    }
    log.close().await;
    drop(log);
    if is_mended {
        salvage::recount(data, &disk)?;
    }
    Ok(lost)
}

fn verify_segments(options: &Options) -> Result<Vec<Damage>, OpenError> {
    let mut damage = Vec::new();
    for (_, path) in segment_files(&*options.disk, &options.data)? {
        let bytes = tried("read", &path, read_file(&*options.disk, &path))?;
        let mut first = None;
        let mut last = Position(0);
        let walked = walk(&bytes, &mut |_, frame| {
            if let Some(position) = position_of(&frame.change) {
                first.get_or_insert(position);
                last = position;
            }
        });
        if let Err((offset, what)) = walked {
            // A tail that was never durable is rewritten from the journal at the next start.
            if next_frame(&bytes, offset).is_some() {
                damage.push(Damage {
                    path,
                    offset,
                    what: format!("{what}; records after position {last} are lost there"),
                });
            }
        }
    }
    Ok(damage)
}

/// Moves journal files aside whose header is damaged: without its salt nothing in them can be verified.
fn move_headless(options: &Options) -> Result<Vec<Damage>, OpenError> {
    let disk = &*options.disk;
    let (folder, cut) = (options.data.join("journal"), options.data.join("cut"));
    let mut lost = Vec::new();
    for number in tried("list", &folder, live_numbers(disk, &folder))? {
        let path = live_path(&folder, number);
        let bytes = tried("read", &path, read_file(disk, &path))?;
        if matches!(FileHeader::decode(&bytes), Err(BadHeader::Damaged)) {
            let aside = cut.join(format!("damaged-{number:010}.wal"));
            let moved = disk.make_folder(&cut).and_then(|()| disk.rename(&path, &aside));
            tried("move aside", &path, moved.and_then(|()| disk.sync_folder(&folder)))?;
            lost.push(Damage { path, offset: 0, what: "its header is damaged: every frame in it is lost".to_owned() });
        }
    }
    Ok(lost)
}

/// Puts a frame that says nothing in the place of each damaged stretch, so that all behind it keep their places.
fn fill_damage(options: &Options, path: &Path) -> Result<(), OpenError> {
    let disk = &*options.disk;
    let mut bytes = tried("read", path, read_file(disk, path))?;
    let folder = options.data.join("cut");
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let aside = folder.join(format!("damaged-{name}"));
    tried("keep damaged bytes in", &aside, disk.make_folder(&folder).and_then(|()| replace(disk, &aside, &bytes)))?;
    let Some(header) = SegmentHeader::decode(&bytes) else { return Ok(()) };
    while let Err((offset, _)) = walk(&bytes, &mut |_, _| {}) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let Some(end) = next_frame(&bytes, offset) else { break };
        let Some(filler) = filler(&header, end.saturating_sub(start)) else { break };
        if let Some(place) = bytes.get_mut(start..end) {
            place.copy_from_slice(&filler);
        }
    }
    tried("write", path, replace(disk, path, &bytes))?;
    let sidecar = path.with_extension("idx");
    let _ = disk.remove(&sidecar);
    Ok(())
}

/// A frame of exactly `bytes` bytes that changes nothing.
fn filler(segment: &SegmentHeader, bytes: usize) -> Option<Vec<u8>> {
    let make = |padding: usize| {
        let reason: Box<str> = " ".repeat(padding).into();
        let change = Change::Dropped { branch: BranchName::from_stored(""), position: Position(0), reason };
        let header = Header {
            kind: change.kind(),
            first: true,
            body_bytes: 0,
            namespace: segment.namespace,
            sequence: Sequence(0),
            durable: Sequence(0),
            left: 0,
            time: Timestamp::MIN,
            body_crc: 0,
        };
        let mut out = Vec::new();
        put_frame(&mut out, segment.salt, header, |out| change.encode(out));
        out
    };
    let least = make(0).len();
    Some(make(bytes.checked_sub(least)?))
}

pub(super) fn read_file(disk: &dyn Disk, path: &Path) -> std::io::Result<Vec<u8>> {
    disk.open(path, Access::Read).and_then(|file| read_all(&*file))
}

fn name_of(first: Position) -> String {
    format!("{:020}.seg", first.0)
}

pub(super) fn segment_files(disk: &dyn Disk, data: &Path) -> Result<Vec<(NamespaceNumber, PathBuf)>, OpenError> {
    let root = data.join("segments");
    let mut files = Vec::new();
    for namespace in tried("list", &root, disk.list(&root))? {
        let Ok(number) = namespace.parse() else { continue };
        let folder = root.join(&namespace);
        for name in tried("list", &folder, disk.list(&folder))? {
            if name.ends_with(".seg") {
                files.push((NamespaceNumber(number), folder.join(name)));
            }
        }
    }
    Ok(files)
}

/// Reads a segment's frames in order, up to the first that is none.
pub(super) fn walk(bytes: &[u8], give: &mut dyn FnMut(&Header, &Frame)) -> Result<(), (u64, NotAFrame)> {
    let header = SegmentHeader::decode(bytes).ok_or((0, NotAFrame::Header))?;
    let bytes = Bytes::copy_from_slice(bytes);
    let mut at = SEGMENT_HEADER as usize;
    while at < bytes.len() {
        let (found, frame) = read_frame(&bytes.slice(at..), header.salt).map_err(|what| (at as u64, what))?;
        give(&found, &frame);
        at += found.frame_bytes();
    }
    Ok(())
}

/// The first whole frame behind damage at `offset`.
fn next_frame(bytes: &[u8], offset: u64) -> Option<usize> {
    let header = SegmentHeader::decode(bytes)?;
    let mut from = usize::try_from(offset).ok()? + 1;
    loop {
        let rest = bytes.get(from..).filter(|rest| rest.len() >= HEADER_BYTES)?;
        let found = from + rest.windows(2).position(|two| two == MAGIC)?;
        if super::frame::check_frame(bytes.get(found..)?, header.salt).is_ok() {
            return Some(found);
        }
        from = found + 1;
    }
}

pub(super) fn position_of(change: &Change) -> Option<Position> {
    match change {
        Change::Append { position, .. } | Change::Release { position, .. } => Some(*position),
        _ => None,
    }
}

fn is_record(change: &Change) -> bool {
    position_of(change).is_some()
}

fn dumped(place: &'static str, frame: &Frame) -> Dumped {
    let record = match &frame.change {
        Change::Append { record, .. }
        | Change::Park { record, .. }
        | Change::Release { record, .. }
        | Change::Move { record, .. } => crate::record::Record::decode(record).ok(),
        _ => None,
    };
    let shown = format!("{:?}", frame.change);
    let name: String = shown.chars().take_while(char::is_ascii_alphanumeric).collect();
    let detail = record.is_none().then(|| shown.get(name.len()..).unwrap_or_default().trim().to_owned());
    Dumped {
        place,
        sequence: frame.sequence.0,
        namespace: frame.namespace.0,
        time: frame.time,
        change: snake_case(&name),
        position: position_of(&frame.change),
        id: record.as_ref().map(|record| record.id),
        key: record.as_ref().and_then(|record| record.key.as_deref().map(ToOwned::to_owned)),
        payload: record.map(|record| String::from_utf8_lossy(&record.payload).into_owned()),
        detail: detail.filter(|detail| !detail.is_empty()),
    }
}

fn snake_case(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}
