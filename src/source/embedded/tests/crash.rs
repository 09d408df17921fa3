//! What a stop leaves behind, orderly or not, and what the next start makes of it.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_is_there_after_an_orderly_stop_in_order_and_once() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    append(&orders(&log), 0..200).await;
    log.close().await;
    drop(log);
    let log = open(folder.path(), &clock);
    let mut start = orders(&log).open_branch(&sink(), Start::Earliest).await.unwrap();
    assert_eq!(payloads(&read(&mut *start.subscription, 200).await), numbers(0..200));
    assert_eq!(start.unclean_stops, 0);
    append(&orders(&log), 200..201).await;
    assert_eq!(read(&mut *start.subscription, 1).await[0].position, Position(201));
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_is_there_after_a_crash_at_any_moment() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let namespace = orders(&log);
    for round in 1..=8u32 {
        append(&namespace, (round - 1) * 40..round * 40).await;
        // Journal and views are copied while the views still catch up; the journal last, so that it is the newest.
        let crashed = tempfile::tempdir().unwrap();
        for part in ["FORMAT", "segments", "state.db", "state.db-wal", "journal"] {
            let from = folder.path().join(part);
            if from.is_dir() {
                std::fs::create_dir_all(crashed.path().join(part)).unwrap();
                copy(&from, &crashed.path().join(part));
            } else if from.exists() {
                std::fs::copy(&from, crashed.path().join(part)).unwrap();
            }
        }
        // A checkpoint may have fallen between two copies; then the copy is of no one moment and says so.
        let Ok(again) = Embedded::open(options(crashed.path(), &clock)) else { continue };
        let mut start = orders(&again).open_branch(&sink(), Start::Earliest).await.unwrap();
        let found = read(&mut *start.subscription, (round * 40) as usize).await;
        assert_eq!(payloads(&found), numbers(0..round * 40), "round {round}");
        again.close().await;
    }
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_tail_is_cut_and_what_is_written_next_stands_in_its_place() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    append(&orders(&log), 0..3).await;
    let crashed = snapshot(folder.path());
    log.close().await;
    let journal = crashed.path().join("journal");
    let name = std::fs::read_dir(&journal).unwrap().map(|entry| entry.unwrap().path());
    let newest = name.filter(|path| path.extension().is_some_and(|ending| ending == "wal")).max().unwrap();
    let bytes = std::fs::read(&newest).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    // The last record's frame: from its last byte back over all of it.
    let frame = bytes.windows(2).rposition(|two| two == super::frame::MAGIC).unwrap();
    for cut in [frame, usize::midpoint(frame, end), end - 1] {
        let torn = snapshot(crashed.path());
        let mut damaged = bytes.clone();
        damaged[cut..].fill(0);
        std::fs::write(torn.path().join("journal").join(newest.file_name().unwrap()), damaged).unwrap();
        let again = Embedded::open(options(torn.path(), &clock)).unwrap();
        let namespace = orders(&again);
        let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
        append(&namespace, 7..8).await;
        let found = payloads(&read(&mut *start.subscription, 3).await);
        assert_eq!(found[..2], numbers(0..2), "cut at {cut}");
        assert_eq!(found[2], Bytes::from("7"), "cut at {cut}: a torn record must not come back");
        again.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rot_before_what_is_durable_refuses_the_start_and_names_the_place() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    append(&orders(&log), 0..5).await;
    let crashed = snapshot(folder.path());
    log.close().await;
    let newest = crashed.path().join("journal/0000000001.wal");
    let mut bytes = std::fs::read(&newest).unwrap();
    let body = bytes.windows(2).position(|two| two == super::frame::MAGIC).unwrap() + super::frame::HEADER_BYTES + 2;
    bytes[body] ^= 1;
    std::fs::write(&newest, bytes).unwrap();
    let error = Embedded::open(options(crashed.path(), &clock)).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("were durable and are damaged") && error.contains("0000000001.wal"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_is_told_who_has_the_folder() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let error = Embedded::open(options(folder.path(), &clock)).map(|_| ()).unwrap_err();
    assert!(matches!(error, OpenError::Held { .. }) && error.to_string().contains("pid"), "{error}");
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parked_records_keys_and_dead_letters_outlive_a_crash() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    let namespace = orders(&log);
    let due_at = clock.now().saturating_add(Duration::from_secs(3_600));
    let key = crate::source::IdempotencyKey { key: "once".into(), fingerprint: [1; 16] };
    let parked = Write { due_at: Some(due_at), idempotency: Some(key), ..write(None, "\"later\"") };
    let first = namespace.admit(vec![parked.clone()]).await.unwrap();
    let crashed = snapshot(folder.path());
    log.close().await;
    let again = open(crashed.path(), &clock);
    let namespace = orders(&again);
    let repeated = namespace.admit(vec![parked]).await.unwrap();
    assert!(
        matches!((&first[0], &repeated[0]), (Admitted::Parked { id, .. }, Admitted::Repeated { id: same, .. }) if id == same)
    );
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    namespace.shared_for_tests().flushed().await.unwrap();
    assert_eq!(namespace.counts().parked, 1);
    clock.advance(Duration::from_secs(3_600));
    assert_eq!(payloads(&read(&mut *start.subscription, 1).await), [Bytes::from("\"later\"")]);
    again.close().await;
}
