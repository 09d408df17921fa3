//! Bounds by age: what is unfinished for too long, and what is finished for long enough.

use super::*;
use crate::source::{AdmitError, Settlement};

const HOUR: Duration = Duration::from_hours(1);

fn with(log: &Embedded, settings: NamespaceSettings) -> Arc<EmbeddedNamespace> {
    log.namespace(&"orders".parse().unwrap(), settings).unwrap()
}

async fn look(namespace: &EmbeddedNamespace) {
    namespace.shared_for_tests().flushed().await.unwrap();
    retention::look(namespace.shared_for_tests());
}

async fn end_up_to(namespace: &EmbeddedNamespace, branch: &BranchName, position: u64) {
    let frontier = Position(position).into();
    namespace.settle(branch, Settlement { frontier, ..Settlement::default() }).await.unwrap();
}

fn two_hours() -> NamespaceSettings {
    NamespaceSettings { backlog_age: HOUR * 2, ..NamespaceSettings::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_that_is_too_old_refuses_writes_and_names_the_branch_until_it_has_moved_on() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let namespace = with(&log, two_hours());
    let fine = BranchName::new("fine", None);
    namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    namespace.open_branch(&fine, Start::Earliest).await.unwrap();
    append(&namespace, 0..1).await;
    clock.advance(HOUR);
    append(&namespace, 1..2).await;
    end_up_to(&namespace, &fine, 2).await;
    clock.advance(HOUR);
    look(&namespace).await;
    append(&namespace, 2..3).await;
    clock.advance(Duration::from_millis(1));
    look(&namespace).await;
    let refused = namespace.admit(vec![write(None, "no")]).await.unwrap_err();
    assert!(matches!(&refused, AdmitError::BacklogOld { branch, .. } if *branch == sink()), "{refused:?}");
    let text = refused.to_string();
    assert!(text.contains("branch sink ") && text.contains("backlog.age (2h)") && text.contains("skip"), "{text}");
    // The second record is an hour younger: with the first ended, writes are taken before anybody looks again.
    end_up_to(&namespace, &sink(), 1).await;
    append(&namespace, 3..4).await;
    look(&namespace).await;
    append(&namespace, 4..5).await;
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_age_of_the_backlog_is_known_after_a_restart() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let namespace = with(&log, two_hours());
    namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    append(&namespace, 0..100).await;
    log.close().await;
    drop((namespace, log));
    let log = open(folder.path(), &clock);
    let namespace = with(&log, two_hours());
    look(&namespace).await;
    assert_eq!(namespace.lag(&sink()).oldest.map(|oldest| clock.now().since(oldest)), Some(Duration::ZERO));
    clock.advance(HOUR * 3);
    append(&namespace, 100..101).await;
    look(&namespace).await;
    let refused = namespace.admit(vec![write(None, "no")]).await;
    assert!(matches!(refused, Err(AdmitError::BacklogOld { .. })), "{refused:?}");
    end_up_to(&namespace, &sink(), 100).await;
    append(&namespace, 101..102).await;
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_old_is_dropped_where_the_file_says_so_and_nothing_younger() {
    for tail_bytes in [0, 1 << 20] {
        let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
        let log = Embedded::open(Options { tail_bytes, ..options(folder.path(), &clock) }).unwrap();
        let namespace = with(&log, NamespaceSettings { drop_oldest: true, ..two_hours() });
        let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
        append(&namespace, 0..150).await;
        clock.advance(HOUR);
        append(&namespace, 150..200).await;
        clock.advance(HOUR + Duration::from_millis(1));
        look(&namespace).await;
        assert_eq!(namespace.overflowed(), 150);
        append(&namespace, 200..201).await;
        assert_eq!(payloads(&read(&mut *start.subscription, 51).await), numbers(150..201));
        log.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_waited_on_the_shelf_is_as_old_as_its_release() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let namespace = with(&log, two_hours());
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    let due_at = Some(clock.now().saturating_add(HOUR * 9));
    namespace.admit(vec![Write { due_at, ..write(None, "0") }]).await.unwrap();
    clock.advance(HOUR * 9);
    read(&mut *start.subscription, 1).await;
    look(&namespace).await;
    append(&namespace, 1..2).await;
    assert_eq!(namespace.lag(&sink()).oldest, Some(clock.now()));
    log.close().await;
}

fn one_hour() -> NamespaceSettings {
    NamespaceSettings { retention_age: HOUR, ..NamespaceSettings::default() }
}

/// The segment files of the only namespace, by their first record.
fn segments(folder: &Path) -> Vec<u64> {
    let names = std::fs::read_dir(folder.join("segments/1")).unwrap().map(|entry| entry.unwrap().path());
    let mut firsts: Vec<u64> = names
        .filter(|path| path.extension().is_some_and(|ending| ending == "seg"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().parse().unwrap())
        .collect();
    firsts.sort_unstable();
    firsts
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(60), async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// What a fresh branch reads after a crash that leaves the folder as it is now.
async fn after_crash(folder: &Path, clock: &Clock) -> Vec<Bytes> {
    let crashed = snapshot(folder);
    let log = open(crashed.path(), clock);
    let namespace = with(&log, one_hour());
    append(&namespace, 99..100).await;
    let fresh = BranchName::new("fresh", None);
    let mut start = namespace.open_branch(&fresh, Start::Earliest).await.unwrap();
    let count = usize::try_from(namespace.end().single().0 - start.cursor.single().0).unwrap();
    let found = payloads(&read(&mut *start.subscription, count).await);
    log.close().await;
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_namespace_lets_finished_records_go_when_they_are_old_enough_and_no_others() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let often = || Options { look_every: Duration::from_millis(5), ..options(folder.path(), &clock) };
    let log = Embedded::open(often()).unwrap();
    let namespace = with(&log, one_hour());
    namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    append(&namespace, 0..2).await;
    // Within one mark of the index: only the records themselves tell how old the youngest is.
    clock.advance(Duration::from_mins(5));
    append(&namespace, 2..4).await;
    end_up_to(&namespace, &sink(), 4).await;
    namespace.shared_for_tests().flushed().await.unwrap();
    assert_eq!(segments(folder.path()), [1]);
    clock.advance(HOUR / 2);
    until("an old segment ends", || segments(folder.path()) == [1, 5]).await;
    append(&namespace, 4..6).await;
    end_up_to(&namespace, &sink(), 5).await;
    log.close().await;
    drop((namespace, log));
    let log = Embedded::open(often()).unwrap();
    let namespace = with(&log, one_hour());
    clock.advance(HOUR / 2);
    until("the second segment ends", || segments(folder.path()) == [1, 5, 7]).await;
    // Exactly as old as they may be is not too old.
    look(&namespace).await;
    namespace.shared_for_tests().flushed().await.unwrap();
    assert_eq!(after_crash(folder.path(), &clock).await, [numbers(0..6), numbers(99..100)].concat());
    clock.advance(Duration::from_millis(1));
    until("the files of the first segment are gone", || segments(folder.path()) == [5, 7]).await;
    assert_eq!(after_crash(folder.path(), &clock).await, [numbers(4..6), numbers(99..100)].concat());
    clock.advance(HOUR);
    look(&namespace).await;
    namespace.shared_for_tests().flushed().await.unwrap();
    assert_eq!(segments(folder.path()), [5, 7], "one of its records is not finished");
    end_up_to(&namespace, &sink(), 6).await;
    until("nothing is left", || segments(folder.path()) == [7]).await;
    log.close().await;
    drop((namespace, log));
    let log = open(folder.path(), &clock);
    let namespace = with(&log, one_hour());
    append(&namespace, 6..7).await;
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    assert_eq!(payloads(&read(&mut *start.subscription, 1).await), numbers(6..7));
    log.close().await;
}
