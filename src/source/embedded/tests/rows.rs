//! Rules of the list of twenty-four ways to lose a record that no other file here holds.

use super::double::Double;
use super::*;
use crate::source::Settlement;
use crate::source::embedded::frame::{Header, put_frame, read_frame};
use crate::source::embedded::retention;
use crate::source::embedded::testing::every_change;

fn on(double: &Double, folder: &Path, clock: &Clock) -> Options {
    // One checkpoint at the start and none after it, so that what lies between is what a power cut finds.
    let base = options(folder, clock);
    Options { disk: Arc::new(double.clone()), checkpoint_bytes: 1 << 30, journal_file_bytes: 1 << 20, ..base }
}

async fn settle_all(namespace: &EmbeddedNamespace) {
    let frontier = namespace.end();
    namespace.settle(&sink(), Settlement { frontier, ..Settlement::default() }).await.unwrap();
    while namespace.lag(&sink()).records > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn row_05_a_trim_or_delete_that_the_last_checkpoint_does_not_know_survives_a_power_cut() {
    let clock = clock();
    let folder = tempfile::tempdir().unwrap();
    let double = Double::new(folder.path());
    let log = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
    let mut namespace = orders(&log);
    namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    append(&namespace, 0..30).await;
    let gone: Namespace = "gone".parse().unwrap();
    let doomed = log.namespace(&gone, NamespaceSettings::default()).unwrap();
    append(&doomed, 0..30).await;
    drop((namespace, doomed));
    // The checkpoint names the active segments of both.
    log.close().await;
    drop(log);
    let log = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
    let small = NamespaceSettings { retention_bytes: 1, ..NamespaceSettings::default() };
    namespace = log.namespace(&"orders".parse().unwrap(), small).unwrap();
    append(&namespace, 30..200).await;
    settle_all(&namespace).await;
    let shared = Arc::clone(namespace.shared_for_tests());
    shared.flushed().await.unwrap();
    retention::look(&shared);
    log.delete_namespace(&gone).await.unwrap();
    shared.flushed().await.unwrap();
    for seed in 0..8 {
        let next = tempfile::tempdir().unwrap();
        let cut = double.power_cut(seed, next.path());
        let again = Embedded::open(on(&cut, next.path(), &clock)).unwrap();
        assert_eq!(again.namespace_names(), ["orders".parse().unwrap()], "seed {seed}: what was deleted stays so");
        let namespace = orders(&again);
        assert_eq!(namespace.end().single(), Position(200), "seed {seed}");
        let start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
        assert_eq!(start.cursor.single(), Position(200), "seed {seed}: what was finished does not come again");
        let fresh = again.namespace(&gone, NamespaceSettings::default()).unwrap();
        assert_eq!(fresh.end().single(), Position(0), "seed {seed}: a new namespace of that name is empty");
        again.close().await;
    }
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_start_nothing_is_forgotten_by_bounds_that_are_not_the_namespaces_own() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let days = |days: u64| Duration::from_secs(days * 86_400);
    let name: Namespace = "orders".parse().unwrap();
    let patient = NamespaceSettings { retention_age: days(30), key_window: days(30), ..NamespaceSettings::default() };
    let log = open(folder.path(), &clock);
    let namespace = log.namespace(&name, patient.clone()).unwrap();
    namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    append(&namespace, 0..100).await;
    settle_all(&namespace).await;
    log.close().await;
    drop((namespace, log));
    // Older than a day, after which all of it would go by the usual bounds.
    clock.advance(days(3));
    let log = open(folder.path(), &clock);
    let other = log.namespace(&"other".parse().unwrap(), NamespaceSettings::default()).unwrap();
    let shared = Arc::clone(other.shared_for_tests());
    let number = shared.spaces.read().by_name[&name].number;
    let bound = || retention::key_bounds(&shared)[&number];
    assert_eq!(bound(), (Timestamp::MIN, u64::MAX), "keys may be needed whose window is not known");
    let held = log.held(&name).unwrap().unwrap();
    held.tidy_for_tests().await;
    let all = BranchName::new("all", None);
    let mut start = held.open_branch(&all, Start::Earliest).await.unwrap();
    assert_eq!(payloads(&read(&mut *start.subscription, 100).await), numbers(0..100));
    held.forget_branch(&all).await.unwrap();
    let namespace = log.namespace(&name, NamespaceSettings { retention_age: days(2), ..patient }).unwrap();
    assert_eq!(bound().0, clock.now().saturating_sub(days(30)));
    namespace.tidy_for_tests().await;
    assert!(namespace.open_branch(&all, Start::Earliest).await.unwrap().cursor.single() > Position(0), "now it may go");
    log.close().await;
}

#[tokio::test]
async fn row_15_a_start_is_counted_before_anything_can_be_written_in_it() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    append(&orders(&log), 0..1).await;
    log.close().await;
    let mut changes = Vec::new();
    let mut journal = |frame: crate::source::embedded::inspect::Dumped| {
        changes.extend((frame.place == "journal").then_some(frame.change));
    };
    crate::source::embedded::inspect::dump(folder.path(), &mut journal).unwrap();
    assert_eq!(changes.first().map(String::as_str), Some("started"), "{changes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn row_14_a_branch_is_given_no_more_than_the_window_beyond_its_stored_cursor() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = Embedded::open(Options { window: 10, ..options(folder.path(), &clock) }).unwrap();
    let namespace = orders(&log);
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    append(&namespace, 0..25).await;
    let mut given = 0;
    for expected in [10, 20, 25] {
        let entries = start.subscription.next(100, 1 << 20).await.unwrap();
        given += entries.len();
        assert_eq!(given, expected);
        let more = start.subscription.next(100, 1 << 20);
        assert!(futures::FutureExt::now_or_never(more).is_none(), "nothing more before the cursor is stored");
        let frontier = entries.iter().map(|entry| entry.position).collect();
        namespace.settle(&sink(), Settlement { frontier, ..Settlement::default() }).await.unwrap();
    }
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_18_ids_and_times_never_go_back_though_the_clock_does_over_a_restart_too() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let mut last = None;
    for _ in 0..3 {
        let log = open(folder.path(), &clock);
        for admitted in append(&orders(&log), 0..5).await {
            let Admitted::Appended { id, .. } = admitted else { panic!("{admitted:?}") };
            assert!(Some(id) > last, "{id} is not after {last:?}");
            last = Some(id);
        }
        log.close().await;
        clock.set(Timestamp::from_millis(clock.now().as_millis() - 60_000));
    }
}

#[test]
fn the_format_on_disk_is_the_one_that_the_first_release_wrote() {
    let mut written = Vec::new();
    for (number, change) in (1u64..).zip(every_change()) {
        let header = Header {
            kind: change.kind(),
            first: true,
            body_bytes: 0,
            namespace: change::NamespaceNumber(7),
            sequence: change::Sequence(number),
            durable: change::Sequence(number - 1),
            left: 0,
            time: Timestamp::from_millis(1_764_000_000_000),
            body_crc: 0,
        };
        put_frame(&mut written, 0x5EED, header, |out| change.encode(out));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/frames-v1.bin");
    let golden = Bytes::from(std::fs::read(&path).unwrap());
    let mut at = 0;
    for change in every_change() {
        let (header, frame) = read_frame(&golden.slice(at..), 0x5EED).unwrap();
        assert_eq!(frame.change, change);
        at += header.frame_bytes();
    }
    assert_eq!(written, golden, "the layout has changed: give it a new version and keep reading this one");
}
