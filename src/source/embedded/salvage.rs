//! A damaged `state.db` made into one that opens: what can be read of it, mended with what segments and journal say.
//!
//! Takes a data folder on which nothing runs. The old file is kept aside. Where something is lost, cursors fall back, so
//! that records may arrive again and none is passed over; all that is lost is named.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::change::{Change, NamespaceNumber, Sequence};
use super::disk::{Access, Disk};
use super::inspect::{Damage, position_of, read_file, segment_files, tried, walk};
use super::options::Options;
use super::recovery::OpenError;
use super::scan::{OnRot, scan};
use super::segment::SEGMENT_HEADER;
use super::state::{Mending, SegmentMark, State};
use crate::clock::Timestamp;
use crate::record::Position;

/// Mends `state.db` when it is damaged. Gives what is lost; nothing when it is sound.
pub(super) fn mend(options: &Options) -> Result<Vec<Damage>, OpenError> {
    let (disk, database) = (&*options.disk, options.data.join("state.db"));
    if !database.exists() || State::is_sound(&database, &options.disk)? {
        return Ok(Vec::new());
    }
    let fresh = database.with_extension("db.new");
    for path in with_siblings(&fresh) {
        if path.exists() {
            tried("remove the half-made", &path, disk.remove(&path))?;
        }
    }
    let salvaged = State::salvage(&database, &fresh)?;
    let mut names = BTreeMap::new();
    let mut each = |group: Vec<super::scan::Scanned>| {
        for scanned in group {
            if let Change::NamespaceCreated { name } = scanned.frame.change {
                names.insert(scanned.frame.namespace, name.into_string());
            }
        }
    };
    let found = scan(disk, &options.data.join("journal"), Sequence(0), OnRot::Skip, &mut each)?;
    // The journal is recycled only after a checkpoint, so that one lies right before it.
    let journal = found.files.iter().map(|(_, first)| Sequence(first.0.saturating_sub(1))).min();
    let checkpoint = match salvaged.checkpoint {
        Some(checkpoint) => checkpoint,
        None => journal.unwrap_or(Sequence(u64::MAX)),
    };
    let (marks, last_time) = measure(options, checkpoint)?;
    let mending = Mending {
        marks,
        names,
        checkpoint: if checkpoint == Sequence(u64::MAX) { found.last } else { checkpoint },
        last_time: last_time.max(Timestamp::MIN),
        now: options.clock.now(),
    };
    let mut lost = salvaged.lost.clone();
    lost.extend(State::mend(&fresh, &options.disk, &salvaged, &mending)?);
    if lost.is_empty() {
        lost.push("its indexes were damaged and are made anew; no row is lost".to_owned());
    }
    put_in_place(options, &database, &fresh)?;
    Ok(lost.into_iter().map(|what| Damage { path: database.clone(), offset: 0, what }).collect())
}

fn with_siblings(path: &Path) -> [PathBuf; 3] {
    ["", "-wal", "-shm"].map(|suffix| {
        let mut beside = path.as_os_str().to_owned();
        beside.push(suffix);
        beside.into()
    })
}

/// Keeps the old file aside, with its -wal, and puts the new one in its place.
fn put_in_place(options: &Options, database: &Path, fresh: &Path) -> Result<(), OpenError> {
    let (disk, cut) = (&*options.disk, options.data.join("cut"));
    let file = tried("open", fresh, disk.open(fresh, Access::Write))?;
    tried("sync", fresh, file.sync())?;
    tried("make", &cut, disk.make_folder(&cut))?;
    let mut number = 1;
    let aside = |number: u32| cut.join(format!("damaged-state-{number}.db"));
    while aside(number).exists() {
        number += 1;
    }
    let aside = aside(number);
    for (from, to) in with_siblings(database).into_iter().zip(with_siblings(&aside)) {
        // The -wal goes first: beside the new file it would be applied to that.
        if from != database && from.exists() {
            tried("move aside", &from, disk.rename(&from, &to))?;
        }
    }
    tried("move aside", database, disk.rename(database, &aside))?;
    tried("put in place", fresh, disk.rename(fresh, database))?;
    tried("sync", &cut, disk.sync_folder(&cut))?;
    tried("sync", &options.data, disk.sync_folder(&options.data))
}

/// The active segment of each namespace as the checkpoint should have it, found in the segments themselves.
fn measure(options: &Options, checkpoint: Sequence) -> Result<(Vec<SegmentMark>, Timestamp), OpenError> {
    let mut marks: BTreeMap<NamespaceNumber, SegmentMark> = BTreeMap::new();
    let mut last_time = Timestamp::MIN;
    let mut files = segment_files(&*options.disk, &options.data)?;
    files.sort_unstable();
    // The newest first: one that has frames up to the checkpoint is the active one.
    for (namespace, path) in files.into_iter().rev() {
        if marks.contains_key(&namespace) {
            continue;
        }
        let bytes = tried("read", &path, read_file(&*options.disk, &path))?;
        let (mut length, mut end, mut inside) = (SEGMENT_HEADER, Position(0), true);
        // Damage at its end is not of the checkpoint, or could not be mended.
        let _ = walk(&bytes, &mut |header, frame| {
            inside &= frame.sequence <= checkpoint;
            if inside {
                length += header.frame_bytes() as u64;
                end = position_of(&frame.change).unwrap_or(end);
                last_time = last_time.max(frame.time);
            }
        });
        let first = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok()).map(Position);
        if let Some(first) = first.filter(|_| end > Position(0)) {
            marks.insert(namespace, SegmentMark { namespace, first, length, end });
        }
    }
    Ok((marks.into_values().collect(), last_time))
}

/// Counts anew what lies in the store, once the journal's frames have been applied to what was salvaged.
pub(super) fn recount(data: &Path, disk: &Arc<dyn Disk>) -> Result<(), OpenError> {
    Ok(State::recount(&data.join("state.db"), disk)?)
}
