//! What the views may lack, lose or be behind with, and what nobody may see of it.

use std::collections::BTreeMap;

use super::double::{Call, Double};
use super::*;
use crate::record::{Record, RecordId};
use crate::source::embedded::change::Change;
use crate::source::embedded::disk::{Access, Disk, read_all};
use crate::source::embedded::frame::read_frame;
use crate::source::embedded::journal::{DATA_START, FileHeader};
use crate::source::{Fate, Found, Settlement};

fn on(double: &Double, folder: &Path, clock: &Clock) -> Options {
    // A checkpoint at a start and an orderly stop, and none between.
    let base = options(folder, clock);
    Options { disk: Arc::new(double.clone()), checkpoint_bytes: 1 << 30, journal_file_bytes: 1 << 20, ..base }
}

async fn until(what: &str, fine: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !fine() {
        assert!(std::time::Instant::now() < deadline, "{what} did not come");
        tokio::task::yield_now().await;
    }
}

fn id_of(admitted: &Admitted) -> RecordId {
    match admitted {
        Admitted::Appended { id, .. } | Admitted::Parked { id, .. } => *id,
        other => panic!("{other:?}"),
    }
}

/// LOG.md 3: a release carries the record, so that it needs neither the parked row nor the segment.
#[tokio::test(flavor = "multi_thread")]
async fn row_03_a_released_record_is_whole_though_its_parked_row_and_its_segment_are_gone() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let double = Double::new(folder.path());
    let log = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
    let due_at = Some(clock.now().saturating_add(Duration::from_secs(60)));
    let parked = orders(&log).admit(vec![Write { due_at, ..write(Some("k"), "\"whole\"") }]).await.unwrap();
    let id = id_of(&parked[0]);
    // From this checkpoint on only `state.db` has the record: no journal that a start reads names it.
    log.close().await;
    drop(log);
    let log = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
    let namespace = orders(&log);
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    clock.advance(Duration::from_secs(60));
    assert_eq!(payloads(&read(&mut *start.subscription, 1).await), [Bytes::from("\"whole\"")]);
    let shared = Arc::clone(namespace.shared_for_tests());
    shared.flushed().await.unwrap();
    assert_eq!(shared.reader.parked_by_id(id).unwrap(), None, "the row has been deleted");

    let next = tempfile::tempdir().unwrap();
    let cut = double.power_cut_after_state(next.path());
    let segments = cut.list(&next.path().join("segments/1")).unwrap();
    assert!(!segments.iter().any(|name| name.ends_with(".seg")), "the segment was not synced: {segments:?}");
    let again = Embedded::open(on(&cut, next.path(), &clock)).unwrap();
    let namespace = orders(&again);
    assert_eq!((namespace.end().single(), namespace.counts().parked), (Position(1), 0));
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    let entries = read(&mut *start.subscription, 1).await;
    assert_eq!((entries[0].record.id, payloads(&entries)), (id, vec![Bytes::from("\"whole\"")]));
    again.close().await;
    drop((namespace, again));
    // Once more, so that it is read from the segment that was written anew.
    let last = Embedded::open(on(&cut, next.path(), &clock)).unwrap();
    let mut start = orders(&last).open_branch(&sink(), Start::Earliest).await.unwrap();
    assert_eq!(payloads(&read(&mut *start.subscription, 1).await), [Bytes::from("\"whole\"")]);
    last.close().await;
    log.close().await;
}

/// The id of the record in the last frame that was written to the newest journal file, synced or not.
fn last_written(double: &Double, folder: &Path) -> Option<RecordId> {
    let journal = folder.join("journal");
    let name = double.list(&journal).unwrap().into_iter().filter(|name| name.ends_with(".wal")).max()?;
    let bytes = Bytes::from(read_all(&*double.open(&journal.join(name), Access::Read).unwrap()).unwrap());
    let salt = FileHeader::decode(&bytes).unwrap().salt;
    let (mut at, mut last) = (usize::try_from(DATA_START).unwrap(), None);
    while let Ok((header, frame)) = read_frame(&bytes.slice(at..), salt) {
        at += header.frame_bytes();
        last = match frame.change {
            Change::Append { record, .. } => Record::peek_id(&record),
            _ => None,
        };
    }
    last
}

/// LOG.md 8: what is written and not synced yet does not exist for anybody.
#[tokio::test(flavor = "multi_thread")]
async fn row_08_nothing_shows_a_record_before_the_sync_of_its_group_has_returned() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let double = Double::new(folder.path());
    let log = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
    let namespace = orders(&log);
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    double.hold(Call::Sync, ".wal");
    let admit = tokio::spawn(namespace.admit(vec![write(Some("k"), "1")]));
    until("the sync", || double.holds_one()).await;
    // The group is in the file, and a look-up knows what to look for.
    let id = last_written(&double, folder.path()).expect("the record has been written");
    let next = start.subscription.next(1, 1 << 20);
    assert!(futures::FutureExt::now_or_never(next).is_none(), "a branch was given it");
    assert_eq!(namespace.find(id).await.unwrap(), None, "a look-up found it");
    assert_eq!((namespace.end().single(), namespace.lag(&sink()).records), (Position(0), 0));
    assert!(double.holds_one() && !admit.is_finished(), "it was answered");
    // Were the power to go now, it would never have been.
    let next = tempfile::tempdir().unwrap();
    let cut = double.power_cut_after_state(next.path());
    let other = Embedded::open(on(&cut, next.path(), &clock)).unwrap();
    assert_eq!(orders(&other).end().single(), Position(0));
    other.close().await;
    double.let_go();
    assert_eq!(id_of(&admit.await.unwrap().unwrap()[0]), id);
    assert_eq!(read(&mut *start.subscription, 1).await[0].record.id, id);
    assert!(matches!(namespace.find(id).await.unwrap(), Some(Found::InLog { .. })));
    log.close().await;
}

/// How many rows each table of `state.db` has.
fn rows(folder: &Path) -> BTreeMap<String, i64> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    let db = rusqlite::Connection::open_with_flags(folder.join("state.db"), flags).unwrap();
    let mut tables = db.prepare("SELECT name FROM sqlite_master WHERE type = 'table'").unwrap();
    let names = tables.query_map([], |row| row.get::<_, String>(0)).unwrap();
    let count = |name: &str| db.query_row(&format!("SELECT count(*) FROM {name}"), [], |row| row.get(0)).unwrap();
    names.map(|name| name.unwrap()).map(|name| (name.clone(), count(&name))).collect()
}

/// What the one branch has made of each, or `None` for what is not known any more.
async fn fates(namespace: &EmbeddedNamespace, ids: &[RecordId]) -> Vec<Option<Fate>> {
    let mut fates = Vec::new();
    for id in ids {
        fates.push(match namespace.find(*id).await.unwrap() {
            Some(Found::InLog { record, branches, .. }) => {
                assert_eq!(record.id, *id);
                Some(branches[0].1.clone())
            }
            None => None,
            other => panic!("{other:?}"),
        });
    }
    fates
}

/// LOG.md 19: ids of released and dropped records lie beside their segment, and go with it.
#[tokio::test(flavor = "multi_thread")]
async fn row_19_releases_and_drops_leave_no_rows_and_are_found_while_their_segment_lives() {
    const RECORDS: u32 = 400;
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let namespace = orders(&log);
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    let due_at = Some(clock.now().saturating_add(Duration::from_secs(60)));
    let parked = (0..RECORDS).map(|number| Write { due_at, ..write(None, &number.to_string()) }).collect();
    let all: Vec<RecordId> = namespace.admit(parked).await.unwrap().iter().map(id_of).collect();
    let ids = [all[0], all[1], all[198], all[199]];
    clock.advance(Duration::from_secs(60));
    let entries = read(&mut *start.subscription, RECORDS as usize).await;
    assert_eq!(entries.iter().map(|entry| entry.record.id).collect::<Vec<_>>(), all);
    let dropped = entries.iter().skip(1).step_by(2).map(|entry| (entry.position, "filter".into())).collect();
    let frontier = Position(RECORDS.into()).into();
    namespace.settle(&sink(), Settlement { frontier, dropped, ..Settlement::default() }).await.unwrap();
    namespace.shared_for_tests().flushed().await.unwrap();
    let rows = rows(folder.path());
    assert!(rows.values().all(|rows| *rows < 12), "rows that grow with the records: {rows:?}");

    let both = |fates: Vec<Option<Fate>>, what: &str| {
        for pair in fates.chunks(2) {
            assert!(matches!(pair[0], Some(Fate::Finished { .. })), "{what}: {pair:?}");
            assert_eq!(pair[1], Some(Fate::Dropped { reason: "filter".into() }), "{what}");
        }
    };
    both(fates(&namespace, &ids).await, "in the run");
    log.close().await;
    drop((namespace, log));
    // By the sidecars now.
    let log = open(folder.path(), &clock);
    let small = NamespaceSettings { retention_bytes: 1, ..NamespaceSettings::default() };
    let namespace = log.namespace(&"orders".parse().unwrap(), small).unwrap();
    both(fates(&namespace, &ids).await, "after a restart");
    namespace.shared_for_tests().flushed().await.unwrap();
    retention::look(namespace.shared_for_tests());
    // The checkpoint of a stop no longer names the segments that were trimmed.
    log.close().await;
    drop((namespace, log));
    let first = folder.path().join("segments/1/00000000000000000001");
    assert!(!first.with_extension("seg").exists() && !first.with_extension("idx").exists());
    let log = open(folder.path(), &clock);
    assert_eq!(fates(&orders(&log), &ids).await, [None, None, None, None], "what was trimmed is not known any more");
    log.close().await;
}

/// LOG.md 23: a start serves when the journal has been read, whatever the views still have to do.
#[tokio::test(flavor = "multi_thread")]
async fn row_23_a_large_unsettled_journal_is_served_before_the_views_have_caught_up() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let double = Double::new(folder.path());
    let log = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
    append(&orders(&log), 0..500).await;
    let next = tempfile::tempdir().unwrap();
    let cut = double.power_cut_after_state(next.path());
    log.close().await;
    cut.hold(Call::Write, ".seg");
    // Far less than what is to be settled.
    let options = Options { settle_lag_bytes: 4 << 10, ..on(&cut, next.path(), &clock) };
    let (opened, opening) = tokio::sync::oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    // Not on the runtime's own threads: one that never comes back would keep the test from ending.
    std::thread::spawn(move || {
        let _inside = runtime.enter();
        let _ = opened.send(Embedded::open(options).unwrap());
    });
    let again = tokio::time::timeout(PATIENCE, opening).await.expect("the start waits for the views").unwrap();
    let namespace = orders(&again);
    let start = tokio::time::timeout(PATIENCE, namespace.open_branch(&sink(), Start::Earliest)).await;
    let mut start = start.expect("the branch waits for the views").unwrap();
    append(&namespace, 500..501).await;
    assert_eq!(payloads(&read(&mut *start.subscription, 501).await), numbers(0..501));
    until("the settle step", || cut.holds_one()).await;
    assert!(namespace.shared_for_tests().committed() < namespace.shared_for_tests().durable());
    cut.let_go();
    again.close().await;
    drop((namespace, start, again));
    let last = Embedded::open(on(&cut, next.path(), &clock)).unwrap();
    let mut start = orders(&last).open_branch(&BranchName::new("x", None), Start::Earliest).await.unwrap();
    assert_eq!(payloads(&read(&mut *start.subscription, 501).await), numbers(0..501), "and the views have it all");
    last.close().await;
}
