//! Each verb of log and shelf, on the embedded pair.

use super::*;
use crate::source::{
    DeadLetter, DeadQuery, DeadReason, Fate, Found, IdempotencyKey, ParkedQuery, RowKey, Scheduled, Settlement,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_is_far_behind_reads_from_segments_what_a_fresh_one_reads_from_memory() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let namespace = orders(&log);
    let mut early = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    append(&namespace, 0..300).await;
    assert_eq!(payloads(&read(&mut *early.subscription, 300).await), numbers(0..300));
    let mut late = namespace.open_branch(&BranchName::new("late", None), Start::Latest).await.unwrap();
    append(&namespace, 300..301).await;
    assert_eq!(payloads(&read(&mut *late.subscription, 1).await), numbers(300..301));
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settled_frontier_is_where_the_branch_goes_on() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let namespace = orders(&log);
    append(&namespace, 0..10).await;
    namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    assert_eq!(namespace.lag(&sink()).records, 10);
    let settlement = Settlement { frontier: Position(4).into(), ..Settlement::default() };
    namespace.settle(&sink(), settlement).await.unwrap();
    log.close().await;
    drop((namespace, log));
    let log = open(folder.path(), &clock);
    let start = orders(&log).open_branch(&sink(), Start::Latest).await.unwrap();
    assert_eq!(start.cursor.single(), Position(4));
    assert_eq!(orders(&log).lag(&sink()).records, 6);
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parked_records_are_released_in_the_order_of_their_due_times_and_never_early() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let namespace = orders(&log);
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    let base = clock.now();
    for seconds in [30u32, 10, 20, 100] {
        let due_at = Some(base.saturating_add(Duration::from_secs(seconds.into())));
        namespace.admit(vec![Write { due_at, ..write(None, &seconds.to_string()) }]).await.unwrap();
    }
    let page = namespace.parked(ParkedQuery { limit: 2, ..ParkedQuery::default() }).await.unwrap();
    assert_eq!((page.rows.len(), page.next.is_some()), (2, true));
    clock.advance(Duration::from_secs(30));
    let found = read(&mut *start.subscription, 3).await;
    assert_eq!(payloads(&found), [Bytes::from("10"), Bytes::from("20"), Bytes::from("30")]);
    assert_eq!(namespace.end().single(), Position(3), "the fourth is not due");
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cancelled_never_comes_and_what_is_moved_comes_at_its_new_time() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let namespace = orders(&log);
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    let due_at = Some(clock.now().saturating_add(Duration::from_secs(10)));
    let mut ids = Vec::new();
    for (key, payload) in [(None, "1"), (Some("k"), "2"), (None, "3")] {
        let parked = namespace.admit(vec![Write { due_at, ..write(key, payload) }]).await.unwrap();
        let Admitted::Parked { id, .. } = parked[0] else { panic!("{parked:?}") };
        ids.push(id);
    }
    assert_eq!(namespace.cancel(Scheduled::Id(ids[0])).await.unwrap(), 1);
    assert_eq!(namespace.cancel(Scheduled::Id(ids[0])).await.unwrap(), 0);
    assert_eq!(namespace.find(ids[0]).await.unwrap(), Some(Found::Cancelled));
    let sooner = clock.now().saturating_add(Duration::from_secs(1));
    assert_eq!(namespace.reschedule(Scheduled::Key("k".into()), sooner).await.unwrap(), 1);
    clock.advance(Duration::from_secs(1));
    assert_eq!(payloads(&read(&mut *start.subscription, 1).await), [Bytes::from("2")]);
    clock.advance(Duration::from_secs(9));
    assert_eq!(payloads(&read(&mut *start.subscription, 1).await), [Bytes::from("3")]);
    assert!(namespace.parked(ParkedQuery { limit: 1, ..ParkedQuery::default() }).await.unwrap().rows.is_empty());
    assert_eq!(namespace.counts().parked, 0);
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_a_hundred_times_at_once_is_one_record() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let namespace = orders(&log);
    let keyed = |fingerprint| Write {
        idempotency: Some(IdempotencyKey { key: "once".into(), fingerprint: [fingerprint; 16] }),
        ..write(None, "1")
    };
    let writes = (0..100).map(|_| namespace.admit(vec![keyed(1)]));
    let answers = futures::future::join_all(writes).await;
    let appended = answers.iter().filter(|answer| matches!(answer.as_ref().unwrap()[0], Admitted::Appended { .. }));
    assert_eq!(appended.count(), 1);
    assert_eq!(namespace.admit(vec![keyed(2)]).await.unwrap(), [Admitted::KeyReused]);
    assert_eq!(namespace.end().single(), Position(1));
    // Twice in one batch is once too.
    let other = || Write {
        idempotency: Some(IdempotencyKey { key: "twice".into(), fingerprint: [1; 16] }),
        ..write(None, "2")
    };
    let both = namespace.admit(vec![other(), other()]).await.unwrap();
    assert!(matches!(both[..], [Admitted::Appended { .. }, Admitted::Repeated { .. }]), "{both:?}");
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_found_replayed_to_its_branch_and_purged() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let namespace = orders(&log);
    append(&namespace, 0..3).await;
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    let entries = read(&mut *start.subscription, 3).await;
    let letter = |entry: &Entry, overtaken| DeadLetter {
        row: RowKey { position: entry.position, child: 0 },
        branch: sink(),
        at: clock.now(),
        reason: DeadReason::Refused,
        attempts: 1,
        last_error: "422".into(),
        stage: "sink".into(),
        revision: "r".into(),
        record: Arc::clone(&entry.record),
        rendered: None,
        overtaken,
    };
    let dead = vec![letter(&entries[0], true), letter(&entries[1], false)];
    namespace
        .settle(&sink(), Settlement { dead, frontier: Position(3).into(), ..Settlement::default() })
        .await
        .unwrap();
    let id = entries[1].record.id;
    let Some(Found::InLog { branches, .. }) = namespace.find(id).await.unwrap() else { panic!("not found") };
    assert!(matches!(branches[0].1, Fate::Dead { .. }), "{branches:?}");
    let all = DeadQuery { limit: 10, ..DeadQuery::default() };
    let replayed = namespace.replay(all.clone(), false).await.unwrap();
    assert_eq!((replayed.replayed, replayed.overtaken), (1, 1));
    let lanes = namespace.replayed_lanes(&sink()).await;
    let rows = namespace.aside_rows(&sink(), &lanes[0].lane, 10).await.unwrap();
    assert_eq!((rows[0].record.id, rows[0].replayed), (id, true));
    assert_eq!(namespace.purge(all.clone()).await.unwrap(), 1);
    assert!(namespace.dead_letters(all).await.unwrap().rows.is_empty());
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn finished_records_beyond_the_retention_go_and_unfinished_ones_stay() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let name: Namespace = "orders".parse().unwrap();
    let settings = NamespaceSettings { retention_bytes: 8 << 10, ..NamespaceSettings::default() };
    let namespace = log.namespace(&name, settings).unwrap();
    namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    append(&namespace, 0..300).await;
    namespace.shared_for_tests().flushed().await.unwrap();
    retention::look(namespace.shared_for_tests());
    let kept =
        |namespace: &EmbeddedNamespace| namespace.clone().open_branch(&BranchName::new("x", None), Start::Earliest);
    assert_eq!(kept(&namespace).await.unwrap().cursor.single(), Position(0), "nothing is finished yet");
    namespace.forget_branch(&BranchName::new("x", None)).await.unwrap();
    let settlement = Settlement {
        frontier: Position(300).into(),
        dropped: vec![(Position(300), "test".into())],
        ..Settlement::default()
    };
    namespace.settle(&sink(), settlement).await.unwrap();
    namespace.shared_for_tests().flushed().await.unwrap();
    retention::look(namespace.shared_for_tests());
    append(&namespace, 300..301).await;
    let first = kept(&namespace).await.unwrap().cursor.single();
    assert!(first > Position(100), "{first:?}");
    log.close().await;
    drop((namespace, log));
    let log = open(folder.path(), &clock);
    let mut start = kept(&orders(&log)).await.unwrap();
    assert!(start.cursor.single() >= first);
    let expected = numbers(u32::try_from(start.cursor.single().0).unwrap()..301);
    assert_eq!(payloads(&read(&mut *start.subscription, expected.len()).await), expected);
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_backlog_refuses_or_drops_the_oldest_as_the_file_says() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let name: Namespace = "orders".parse().unwrap();
    let settings = NamespaceSettings { backlog_bytes: 4 << 10, ..NamespaceSettings::default() };
    let namespace = log.namespace(&name, settings.clone()).unwrap();
    namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    let mut refused = None;
    for number in 0..200u32 {
        if let Err(error) = namespace.admit(vec![write(None, &number.to_string())]).await {
            refused = Some(error);
            break;
        }
    }
    assert!(matches!(refused, Some(crate::source::AdmitError::BacklogFull { .. })), "{refused:?}");
    let namespace = log.namespace(&name, NamespaceSettings { drop_oldest: true, ..settings }).unwrap();
    append(&namespace, 0..200).await;
    assert!(namespace.overflowed() > 0);
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_namespace_is_gone_and_its_number_is_not_used_again() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let first = append(&orders(&log), 0..1).await;
    let name: Namespace = "orders".parse().unwrap();
    assert!(log.delete_namespace(&name).await.unwrap());
    assert!(log.namespace_names().is_empty());
    let second = append(&orders(&log), 0..1).await;
    let number = |admitted: &Admitted| match admitted {
        Admitted::Appended { id, .. } => id.namespace_number(),
        other => panic!("{other:?}"),
    };
    assert_ne!(number(&first[0]), number(&second[0]));
    log.close().await;
}
