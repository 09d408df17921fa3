//! The steps of a pair, and what a crash between two of them does. With a shelf in PostgreSQL and a broker in memory.

use std::sync::Arc;
use std::time::Duration;

use super::open::Context;
use super::store::{Claim, Claimed, Parking, Store};
use super::testing::MemoryBroker;
use super::{First, Foreign, Settings};
use crate::clock::{Clock, Timestamp};
use crate::record::{Record, RecordId};
use crate::source::postgres::{self, PostgresShelfSpec};
use crate::source::redis::{self, RedisSourceSpec};
use crate::source::{Admitted, BranchName, DeadQuery, IdempotencyKey, Log as _, Shelf as _, Start, Write};

const NOW: Timestamp = Timestamp::from_millis(1_764_000_000_000);
const SETTINGS: Settings =
    Settings { key_window: Duration::from_secs(3_600), number: 1, first: First::Earliest, one_place_for_keys: false };
const PATIENCE: Duration = Duration::from_secs(30);

fn context(clock: &Clock) -> Context {
    Context {
        namespace: format!("pair-{:012x}", fastrand::u64(..1 << 48)).parse().unwrap(),
        number: 1,
        clock: clock.clone(),
        record_bytes: 1 << 20,
        key_window: SETTINGS.key_window,
        backlog_bytes: 1 << 30,
        strict: false,
    }
}

async fn shelf(context: &Context) -> Arc<dyn Store> {
    shelf_in(None, context).await
}

/// In a schema of its own, if one is named.
async fn shelf_in(schema: Option<&str>, context: &Context) -> Arc<dyn Store> {
    let url = Some(std::env::var("WALFLOW_TEST_POSTGRES").expect("WALFLOW_TEST_POSTGRES: run tests/run"));
    // Settings of its own, so that two of them share nothing: as two processes, and whatever test made a connection first.
    let timeout = Some(crate::units::Span(Duration::from_millis(10_000 + fastrand::u64(..1_000_000))));
    let schema = schema.map(str::to_owned);
    postgres::open(&PostgresShelfSpec { url, schema, timeout, ..PostgresShelfSpec::default() }, context).await.unwrap()
}

fn record(number: u16, due_at: Option<Timestamp>) -> Arc<Record> {
    let bare = Record::new(RecordId::new(NOW, number, 1, 7), NOW, bytes::Bytes::from(number.to_string()));
    Arc::new(Record { due_at, ..bare })
}

fn key(key: &str) -> IdempotencyKey {
    IdempotencyKey { key: key.into(), fingerprint: [7; 16] }
}

fn after(seconds: u64) -> Timestamp {
    NOW.saturating_add(Duration::from_secs(seconds))
}

async fn until(what: &str, fine: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !fine() {
        assert!(std::time::Instant::now() < deadline, "waited in vain: {what}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn what_was_marked_and_is_in_the_log_is_not_sent_again_and_what_is_not_is_sent_once() {
    let clock = Clock::manual(NOW);
    let (broker, context) = (MemoryBroker::new(), context(&clock));
    let store = shelf(&context).await;
    let (one, other) = (record(1, Some(after(1))), record(2, Some(after(1))));
    let row = |record: &Arc<Record>| Parking { record: Arc::clone(record), key: None };
    store.park(vec![row(&one), row(&other)]).await.unwrap();
    clock.advance(Duration::from_secs(1));
    // A mover marked both, appended the first, and was killed.
    let taken = store.take_due(clock.now(), 10, "0".into()).await.unwrap();
    assert_eq!(taken.len(), 2);
    super::broker::Broker::append(&*broker, vec![Arc::clone(&one)]).await.unwrap().await;
    store.close().await;
    let pair = Foreign::new(Arc::clone(&broker) as _, Some(shelf(&context).await), SETTINGS, clock.clone());
    until("the other is released", || broker.records().len() == 2).await;
    until("nothing is parked any more", || pair.counts().parked == 0).await;
    let there: Vec<RecordId> = broker.records().iter().map(|record| record.id).collect();
    assert_eq!(there, [one.id, other.id]);
    pair.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_release_whose_answer_is_lost_is_looked_for_and_found() {
    let clock = Clock::manual(NOW);
    let (broker, context) = (MemoryBroker::new(), context(&clock));
    let pair = Foreign::new(Arc::clone(&broker) as _, Some(shelf(&context).await), SETTINGS, clock.clone());
    let write = Write { record: (*record(1, None)).clone(), due_at: Some(after(5)), idempotency: None };
    assert!(matches!(pair.admit(vec![write]).await.unwrap()[..], [Admitted::Parked { .. }]));
    // The counts are a little behind: none yet would look like none any more.
    until("it is parked", || pair.counts().parked == 1).await;
    broker.lose_answers(1);
    clock.advance(Duration::from_secs(5));
    until("nothing is parked any more", || pair.counts().parked == 0 && !broker.records().is_empty()).await;
    assert_eq!(broker.records().len(), 1, "it was there");
    pair.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_key_whose_write_nobody_knows_the_end_of_is_repeated_under_its_first_id() {
    let clock = Clock::manual(NOW);
    let (broker, context) = (MemoryBroker::new(), context(&clock));
    let pair = Foreign::new(Arc::clone(&broker) as _, Some(shelf(&context).await), SETTINGS, clock.clone());
    let write = || Write { record: (*record(1, None)).clone(), due_at: None, idempotency: Some(key("k")) };
    broker.lose_answers(1);
    assert!(pair.admit(vec![write()]).await.unwrap_err().is_unknown());
    // Its claim counts as given up on after a minute.
    clock.advance(Duration::from_secs(61));
    let again = pair.admit(vec![write()]).await.unwrap();
    let first = broker.records()[0].id;
    assert!(matches!(again[..], [Admitted::Appended { id, .. }] if id == first), "{again:?} {first}");
    let third = pair.admit(vec![write()]).await.unwrap();
    assert!(matches!(third[..], [Admitted::Repeated { id, .. }] if id == first), "{third:?}");
    pair.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn two_processes_claim_one_key_once_and_one_of_them_releases() {
    let clock = Clock::manual(NOW);
    let context = context(&clock);
    let (one, other) = (shelf(&context).await, shelf(&context).await);
    let claim = |number| vec![Claim { record: record(number, None), key: key("k") }];
    let (a, b) = tokio::join!(one.claim(claim(1), Timestamp::MIN), other.claim(claim(2), Timestamp::MIN));
    let (a, b) = (a.unwrap(), b.unwrap());
    let fresh = [&a, &b].iter().filter(|claimed| matches!(claimed[..], [Claimed::Fresh { .. }])).count();
    assert_eq!((fresh, [&a, &b].iter().any(|claimed| claimed[..] == [Claimed::Running])), (1, true), "{a:?} {b:?}");
    let until = after(10);
    assert!(one.lead(until).await.unwrap());
    assert!(!other.lead(until).await.unwrap());
    assert!(one.lead(after(20)).await.unwrap(), "it stays the one");
    clock.advance(Duration::from_secs(21));
    assert!(other.lead(after(40)).await.unwrap(), "its lease is over");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn who_is_not_the_one_that_releases_touches_nothing_until_the_lease_is_over() {
    let clock = Clock::manual(NOW);
    let (broker, context) = (MemoryBroker::new(), context(&clock));
    let schema = format!("pair_{:012x}", fastrand::u64(..1 << 48));
    let leader = shelf_in(Some(&schema), &context).await;
    assert!(leader.lead(after(100)).await.unwrap());
    leader.park(vec![Parking { record: record(1, Some(NOW)), key: None }]).await.unwrap();
    // Every look for the lease is noted.
    let address = std::env::var("WALFLOW_TEST_POSTGRES").unwrap();
    let (client, connection) = tokio_postgres::connect(&address, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let note = format!(
        "CREATE TABLE {schema}.looks (n bigserial);
         CREATE FUNCTION {schema}.note() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN INSERT INTO {schema}.looks DEFAULT VALUES; RETURN NEW; END $$;
         CREATE TRIGGER note BEFORE INSERT ON {schema}.leases FOR EACH ROW EXECUTE FUNCTION {schema}.note()"
    );
    client.batch_execute(&note).await.unwrap();
    let store = shelf_in(Some(&schema), &context).await;
    let pair = Foreign::new(Arc::clone(&broker) as _, Some(store), SETTINGS, clock.clone());
    let looks = format!("SELECT count(*) FROM {schema}.looks");
    let deadline = std::time::Instant::now() + PATIENCE;
    // At the second look the turn of the first is over.
    while client.query_one(&looks, &[]).await.unwrap().get::<_, i64>(0) < 2 {
        assert!(std::time::Instant::now() < deadline, "nobody looks");
    }
    assert_eq!(broker.records().len(), 0);
    assert!(leader.marked(10).await.unwrap().is_empty(), "nothing is taken");
    clock.advance(Duration::from_secs(101));
    until("it is released when the lease is over", || broker.records().len() == 1).await;
    pair.close().await;
    client.batch_execute(&format!("DROP SCHEMA {schema} CASCADE")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_replay_is_heard_by_every_process_that_has_the_branch_open() {
    let clock = Clock::manual(NOW);
    let context = context(&clock);
    let branch = BranchName::new("sink", None);
    let (broker, store) = (MemoryBroker::new(), shelf(&context).await);
    let pair = Foreign::new(Arc::clone(&broker) as _, Some(store), SETTINGS, clock.clone());
    let other = Foreign::new(Arc::clone(&broker) as _, Some(shelf(&context).await), SETTINGS, clock.clone());
    let write = Write { record: (*record(1, None)).clone(), due_at: None, idempotency: None };
    pair.admit(vec![write]).await.unwrap();
    let mut start = pair.open_branch(&branch, Start::Earliest).await.unwrap();
    let _second = other.open_branch(&branch, Start::Earliest).await.unwrap();
    let entry = start.subscription.next(1, usize::MAX).await.unwrap().remove(0);
    let row = crate::source::RowKey { position: entry.position, child: 0 };
    let letter = crate::source::DeadLetter {
        row,
        branch: branch.clone(),
        at: clock.now(),
        reason: crate::source::DeadReason::Refused,
        attempts: 1,
        last_error: "no\0".into(),
        stage: "sink".into(),
        revision: "r".into(),
        record: entry.record,
        rendered: None,
        overtaken: false,
    };
    let settlement = crate::source::Settlement { dead: vec![letter], ..Default::default() };
    pair.settle(&branch, settlement).await.unwrap();
    let replayed = pair.replay(DeadQuery { limit: 10, ..DeadQuery::default() }, false).await.unwrap();
    assert_eq!(replayed.replayed, 1);
    for handle in [&pair, &other] {
        let lanes = tokio::time::timeout(PATIENCE, handle.replayed_lanes(&branch)).await.expect("it is told");
        assert_eq!((lanes.len(), lanes[0].first), (1, row));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Redis and PostgreSQL: run tests/run"]
async fn a_key_parked_on_another_server_than_the_log_is_known_to_what_is_appended() {
    let clock = Clock::manual(NOW);
    let context = context(&clock);
    let url = Some(std::env::var("WALFLOW_TEST_REDIS").expect("WALFLOW_TEST_REDIS: run tests/run"));
    let spec = RedisSourceSpec { url, streams: Some(1), ..RedisSourceSpec::default() };
    let broker = redis::open(&spec, &context).unwrap();
    let pair = Foreign::new(broker, Some(shelf(&context).await), SETTINGS, clock.clone());
    let write = |due_at| Write { record: (*record(1, None)).clone(), due_at, idempotency: Some(key("once")) };
    let parked = pair.admit(vec![write(Some(after(5)))]).await.unwrap();
    let [Admitted::Parked { id, .. }] = parked[..] else { panic!("{parked:?}") };
    let again = pair.admit(vec![write(None)]).await.unwrap();
    assert!(matches!(again[..], [Admitted::Repeated { id: known, .. }] if known == id), "{again:?}");
    pair.close().await;
}
