//! A queue as one half of a pair: without a shelf, and with one in PostgreSQL.

use super::*;
use crate::source::foreign::{First, Foreign, Settings};
use crate::source::postgres::{self, PostgresShelfSpec};
use crate::source::{Admitted, DeadQuery, IdempotencyKey, Log, Settlement, Shelf, Start, Write};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn without_a_shelf_a_pair_admits_delays_a_little_and_buries() {
    let mut bench = Bench::new("").await;
    let dead = format!("{}-dead", bench.spec.queue);
    let dead_url = bench.make(&dead).await;
    bench.spec.dead_letters = Some(dead);
    let settings =
        Settings { key_window: Duration::from_secs(60), number: 7, first: First::Earliest, one_place_for_keys: false };
    let pair = Foreign::new(open(&bench.spec, &context()).unwrap(), None, settings, Clock::system());
    assert_eq!(Log::caps(&pair).max_delay, Some(Duration::from_secs(900)));
    let write = |payload: &'static str, delay: Option<u64>| {
        let due_at = delay.map(|after| Clock::system().now().saturating_add(Duration::from_secs(after)));
        Write { record: (*record(None, payload)).clone(), due_at, idempotency: None }
    };
    let admitted = pair.admit(vec![write("now", None), write("soon", Some(1))]).await.unwrap();
    assert!(matches!(admitted[..], [Admitted::Appended { .. }, Admitted::Parked { .. }]), "{admitted:?}");
    let refused = pair.admit(vec![write("too late", Some(901))]).await.unwrap_err();
    assert!(matches!(refused, AdmitError::Unsupported(_)), "{refused:?}");
    let mut start = pair.open_branch(&branch(), Start::Earliest).await.unwrap();
    let entries = read(&mut *start.subscription, 2).await;
    assert_eq!(payloads(&entries), ["now", "soon"]);
    assert_eq!(pair.end().single(), entries[1].position);
    let letter = DeadLetter { record: Arc::clone(&entries[0].record), ..letter() };
    let ended = entries.iter().map(|entry| entry.position).collect();
    let settlement = Settlement { ended, dead: vec![letter], ..Settlement::default() };
    pair.settle(&branch(), settlement).await.unwrap();
    bench.until_left(0).await;
    assert_eq!(bench.receive(&dead_url, 5).await.len(), 1);
    drop(start);
    pair.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS and WALFLOW_TEST_POSTGRES: run tests/run"]
async fn with_a_shelf_a_fifo_queue_delays_knows_keys_and_forgets_no_dead_letter() {
    let bench = Bench::new(".fifo").await;
    let shelf = PostgresShelfSpec {
        url: Some(std::env::var("WALFLOW_TEST_POSTGRES").expect("WALFLOW_TEST_POSTGRES")),
        schema: Some(format!("t{:08x}", fastrand::u32(..))),
        ..PostgresShelfSpec::default()
    };
    let store = postgres::open(&shelf, &context()).await.unwrap();
    let settings =
        Settings { key_window: Duration::from_secs(60), number: 7, first: First::Earliest, one_place_for_keys: false };
    let pair = Foreign::new(open(&bench.spec, &context()).unwrap(), Some(store), settings, Clock::system());
    let write = |payload: &'static str| Write {
        record: (*record(Some("k"), payload)).clone(),
        due_at: None,
        idempotency: None,
    };
    let due = Clock::system().now().saturating_add(Duration::from_millis(300));
    let key = IdempotencyKey { key: "i".into(), fingerprint: [1; 16] };
    let once = Write { idempotency: Some(key), ..write("1") };
    let admitted = pair.admit(vec![Write { due_at: Some(due), ..write("2") }, once.clone()]).await.unwrap();
    assert!(matches!(admitted[..], [Admitted::Parked { .. }, Admitted::Appended { .. }]), "{admitted:?}");
    let again = pair.admit(vec![once]).await.unwrap();
    assert!(matches!(again[..], [Admitted::Repeated { .. }]), "{again:?}");
    let mut start = pair.open_branch(&branch(), Start::Earliest).await.unwrap();
    // Of a group SQS gives the next when the one before is deleted.
    let first = read(&mut *start.subscription, 1).await.remove(0);
    let row = RowKey { position: first.position, child: 0 };
    let dead = vec![DeadLetter { row, record: Arc::clone(&first.record), ..letter() }];
    let frontier = Reach::from(first.position);
    let settlement = Settlement { frontier, ended: vec![first.position], dead, ..Settlement::default() };
    pair.settle(&branch(), settlement).await.unwrap();
    let second = read(&mut *start.subscription, 1).await.remove(0);
    assert_eq!(payloads(&[first.clone(), second.clone()]), ["1", "2"]);
    assert!(second.record.due_at == Some(due) && due <= Clock::system().now());
    drop(start);
    // The next reader gets what has no end, and is not told that it has one.
    let mut start = pair.open_branch(&branch(), Start::Earliest).await.unwrap();
    let again = read(&mut *start.subscription, 1).await.remove(0);
    assert_eq!(again.record.id, second.record.id);
    assert!(again.position > second.position && start.cursor.covers(second.position));
    let letters = pair.dead_letters(DeadQuery { limit: 10, ..DeadQuery::default() }).await.unwrap();
    assert_eq!(letters.rows.len(), 1);
    drop(start);
    pair.delete().await.unwrap();
    pair.close().await;
}
