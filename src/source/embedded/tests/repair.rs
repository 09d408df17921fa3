//! Damage and the way on: verify names it, repair gives up what is damaged and nothing else.

use std::path::PathBuf;

use super::*;
use crate::source::LogError;
use crate::source::embedded::frame::{HEADER_BYTES, MAGIC};
use crate::source::embedded::inspect::{dump, repair, verify};

/// Flips a bit in the body of the n-th frame of a file.
fn damage(path: &Path, nth: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let frames = bytes.windows(2).enumerate().filter(|(_, two)| *two == MAGIC).map(|(at, _)| at);
    let at = frames.take(nth + 1).last().unwrap() + HEADER_BYTES + 20;
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn first_segment(folder: &Path) -> PathBuf {
    folder.join("segments/1/00000000000000000001.seg")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_folder_is_verified_and_dumped_and_one_in_use_is_refused() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    append(&orders(&log), 0..100).await;
    assert!(matches!(verify(folder.path()), Err(OpenError::Held { .. })));
    log.close().await;
    let verified = verify(folder.path()).unwrap();
    assert_eq!((verified.records, verified.damage.len()), (100, 0), "{verified:?}");
    assert!(verified.segments >= 3, "{verified:?}");
    let mut payloads = Vec::new();
    dump(folder.path(), &mut |frame| payloads.extend(frame.payload.filter(|_| frame.place == "segment"))).unwrap();
    assert_eq!(payloads, (0..100).map(|number| number.to_string()).collect::<Vec<_>>());
    let empty = tempfile::tempdir().unwrap();
    assert!(verify(empty.path()).is_err());
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0, "a mistaken folder stays as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn row_20_rot_in_the_journal_is_named_and_a_repair_loses_only_that() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    append(&orders(&log), 0..6).await;
    let crashed = snapshot(folder.path());
    log.close().await;
    let journal = crashed.path().join("journal/0000000001.wal");
    // The first two frames say that the instance started and the namespace was created.
    damage(&journal, 3);
    let refused = Embedded::open(options(crashed.path(), &clock)).map(|_| ()).unwrap_err().to_string();
    let verified = verify(crashed.path()).unwrap();
    assert_eq!(verified.damage.len(), 1, "{verified:?}");
    assert!(refused.contains("0000000001.wal") && refused.contains("log repair"), "{refused}");
    let lost = repair(crashed.path()).await.unwrap();
    assert_eq!(lost.len(), 1, "{lost:?}");
    let again = open(crashed.path(), &clock);
    let mut start = orders(&again).open_branch(&sink(), Start::Earliest).await.unwrap();
    let left = payloads(&read(&mut *start.subscription, 5).await);
    assert_eq!(left, [numbers(0..1), numbers(2..6)].concat());
    append(&orders(&again), 9..10).await;
    assert_eq!(payloads(&read(&mut *start.subscription, 1).await), numbers(9..10));
    again.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rot_in_a_segment_is_never_read_as_a_record_and_a_repair_loses_only_that() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    append(&orders(&log), 0..100).await;
    log.close().await;
    drop(log);
    damage(&first_segment(folder.path()), 4);
    assert_eq!(verify(folder.path()).unwrap().damage.len(), 1);
    let log = open(folder.path(), &clock);
    let mut start = orders(&log).open_branch(&sink(), Start::Earliest).await.unwrap();
    let mut seen = 0;
    let error = loop {
        match start.subscription.next(3, 1 << 20).await {
            Ok(entries) => seen += entries.len(),
            Err(error) => break error,
        }
    };
    assert!(matches!(&error, LogError::Damaged(what) if what.contains(".seg")), "{error}");
    assert!(seen <= 4, "nothing past the damage is served");
    assert_eq!(log.health().damaged.len(), 1);
    log.close().await;
    drop(log);
    assert_eq!(repair(folder.path()).await.unwrap().len(), 1);
    assert_eq!(verify(folder.path()).unwrap().damage, []);
    let log = open(folder.path(), &clock);
    let mut start = orders(&log).open_branch(&sink(), Start::Earliest).await.unwrap();
    let left = payloads(&read(&mut *start.subscription, 99).await);
    assert_eq!(left, [numbers(0..4), numbers(5..100)].concat());
    log.close().await;
}
