//! A small log that has a bit of everything, killed; and all that a start finds in it.

use super::double::Double;
use super::*;
use crate::record::Record;
use crate::source::Settlement;
use crate::source::embedded::change::Frame;
use crate::source::embedded::reader::from_segments_at;
use crate::source::embedded::recovery::{Recovered, recover};

pub(super) fn on(double: &Double, folder: &Path, clock: &Clock) -> Options {
    Options {
        disk: Arc::new(double.clone()),
        journal_file_bytes: 8 << 10,
        journal_spares: 0,
        checkpoint_bytes: 1 << 30,
        ballast_bytes: 0,
        segment_bytes: 600,
        ..options(folder, clock)
    }
}

/// Everything that a start up to its threads has found.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Found {
    /// The records that can be read, from memory or segments.
    pub(super) records: Vec<(Position, Record)>,
    /// The changes that the views still have to take in.
    pub(super) changes: Vec<Frame>,
}

/// Reads all there is, or says what is damaged.
pub(super) fn look(recovered: &Recovered) -> Result<Found, String> {
    let space = recovered.shared.spaces.read().by_name[&"orders".parse().unwrap()].clone();
    let (mut records, mut from) = (Vec::new(), Position(1));
    while from <= space.end() {
        let entries = match space.recent(from, 100, 1 << 20) {
            Some(entries) => entries,
            None => from_segments_at(&recovered.shared, &space, from, 100).map_err(|error| error.to_string())?,
        };
        let Some(last) = entries.last() else { return Err(format!("nothing is at {from:?}")) };
        from = last.position.next();
        records.extend(entries.into_iter().map(|entry| (entry.position, Record::clone(&entry.record))));
    }
    let frames = recovered.commits.iter().flat_map(|commit| &commit.frames);
    Ok(Found { records, changes: frames.map(|durable| durable.frame.clone()).collect() })
}

/// A small log with all that has a place of its own: sealed segments with sidecars, a release, a drop, a group of two, keys,
/// parked records; half of it behind a checkpoint, and killed.
pub(super) async fn small(folder: &Path, clock: &Clock) -> Double {
    let first = tempfile::tempdir().unwrap();
    let double = Double::new(first.path());
    let log = Embedded::open(on(&double, first.path(), clock)).unwrap();
    let namespace = orders(&log);
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    let soon = Some(clock.now().saturating_add(Duration::from_secs(10)));
    namespace.admit(vec![Write { due_at: soon, ..write(Some("late"), "\"late\"") }]).await.unwrap();
    append(&namespace, 0..6).await;
    clock.advance(Duration::from_secs(10));
    read(&mut *start.subscription, 7).await;
    let dropped = vec![(Position(2), "filter".into())];
    namespace
        .settle(&sink(), Settlement { frontier: Position(3).into(), dropped, ..Settlement::default() })
        .await
        .unwrap();
    log.close().await;
    drop((namespace, start, log));
    let log = Embedded::open(on(&double, first.path(), clock)).unwrap();
    let namespace = orders(&log);
    let later = Some(clock.now().saturating_add(Duration::from_secs(3_600)));
    namespace.admit(vec![Write { due_at: later, ..write(None, "\"later\"") }]).await.unwrap();
    let key = crate::source::IdempotencyKey { key: "once".into(), fingerprint: [7; 16] };
    namespace.admit(vec![Write { idempotency: Some(key), ..write(None, "\"keyed\"") }]).await.unwrap();
    for number in 10..13u32 {
        namespace.admit(vec![write(Some("k"), &number.to_string()), write(None, "\"second\"")]).await.unwrap();
    }
    let killed = double.kill(folder);
    log.close().await;
    killed
}

pub(super) fn start(double: &Double, folder: &Path, clock: &Clock) -> Result<Recovered, String> {
    recover(on(double, folder, clock)).map_err(|error| error.to_string())
}
