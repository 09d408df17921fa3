//! What only a database shared by several processes can do wrong: news that come late, tables made twice, a server that
//! falls silent.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::{PostgresShelfSpec, open, shown};
use crate::clock::{Clock, Timestamp};
use crate::record::{Position, Record, RecordId};
use crate::source::foreign::open::Context;
use crate::source::foreign::store::{Parking, Releasing, Store};
use crate::source::{AsideLane, BranchName, DeadLetter, DeadQuery, DeadReason, LogError, Reach, RowKey, Settlement};
use crate::units::Span;

const NOW: Timestamp = Timestamp::from_millis(1_764_000_000_000);
const PATIENCE: Duration = Duration::from_secs(30);

fn server() -> String {
    std::env::var("WALFLOW_TEST_POSTGRES").expect("WALFLOW_TEST_POSTGRES: run tests/run")
}

/// A schema that no other test has.
fn spec() -> PostgresShelfSpec {
    let schema = Some(format!("shelf_{:012x}", fastrand::u64(..1 << 48)));
    PostgresShelfSpec { url: Some(server()), schema, ..PostgresShelfSpec::default() }
}

fn context() -> Context {
    Context {
        namespace: "orders".parse().unwrap(),
        number: 1,
        clock: Clock::manual(NOW),
        record_bytes: 1 << 20,
        key_window: Duration::from_secs(3_600),
        backlog_bytes: 1 << 30,
        strict: false,
    }
}

/// A connection past the shelf.
async fn aside_of_it(url: &str) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

fn branch() -> BranchName {
    BranchName::new("sink", None)
}

fn record(number: u16, epoch: u32) -> Arc<Record> {
    let bare = Record::new(RecordId::new(NOW, number, 1, 7), NOW, Bytes::from(number.to_string()));
    Arc::new(Record { epoch, ..bare })
}

fn letter(number: u16, epoch: u32) -> DeadLetter {
    DeadLetter {
        row: RowKey { position: Position(number.into()), child: 0 },
        branch: branch(),
        at: NOW,
        reason: DeadReason::Refused,
        attempts: 1,
        last_error: "no".into(),
        stage: "sink".into(),
        revision: "r".into(),
        record: record(number, epoch),
        rendered: None,
        overtaken: false,
    }
}

async fn bury(store: &Arc<dyn Store>, letters: Vec<DeadLetter>) {
    store.open_branch(&branch(), &Reach::from(Position(0)), "a").await.unwrap();
    store.settle(&branch(), vec![Settlement { dead: letters, ..Settlement::default() }]).await.unwrap();
}

fn this(number: u16) -> DeadQuery {
    DeadQuery { id: Some(record(number, 0).id), limit: 1, ..DeadQuery::default() }
}

#[test]
fn no_text_of_a_shelf_shows_a_password() {
    for url in [
        "postgres://u:secret@db:5433/orders",
        "postgres://db:5433/orders?user=u&password=secret",
        "postgres://u:secret?x@db:5433/orders",
        "secret",
    ] {
        let spec = PostgresShelfSpec { url: Some(url.to_owned()), ..PostgresShelfSpec::default() };
        let texts = format!("{spec:?} {} {:?}", shown(&spec), super::check(&spec));
        assert!(!texts.contains("secret"), "{texts}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_replay_that_commits_after_a_later_one_is_told_too() {
    let (spec, context) = (spec(), context());
    let store = open(&spec, &context).await.unwrap();
    bury(&store, vec![letter(1, 0), letter(2, 0)]).await;
    // The first replay stops after it has drawn its number and before it commits.
    let gate = aside_of_it(&server()).await;
    let (schema, lock) = (spec.schema.as_deref().unwrap(), i64::from(fastrand::i32(1..)));
    let halt = format!(
        "CREATE FUNCTION {schema}.halt() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN PERFORM pg_advisory_xact_lock({lock}); RETURN OLD; END $$;
         CREATE TRIGGER halt BEFORE DELETE ON {schema}.dead FOR EACH ROW WHEN (OLD.position = 1)
           EXECUTE FUNCTION {schema}.halt();
         SELECT pg_advisory_lock({lock})"
    );
    gate.batch_execute(&halt).await.unwrap();
    let halted =
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = $1::bigint::oid";
    let first = tokio::spawn(store.replay(this(1), false));
    while gate.query_one(halted, &[&lock]).await.unwrap().get::<_, i64>(0) == 0 {
        assert!(!first.is_finished(), "it did not stop");
    }
    let mut second = tokio::spawn(store.replay(this(2), false));
    let mut told: Vec<AsideLane> = Vec::new();
    // Where the second can be seen before the first, the branch is told of it alone.
    let early = tokio::time::timeout(Duration::from_secs(1), &mut second).await.is_ok();
    if early {
        told.extend(store.replayed_lanes(&branch()).await);
    }
    gate.batch_execute(&format!("SELECT pg_advisory_unlock({lock})")).await.unwrap();
    assert_eq!(first.await.unwrap().unwrap().replayed, 1);
    if !early {
        assert_eq!(second.await.unwrap().unwrap().replayed, 1);
    }
    let heard = |told: &[AsideLane], at: u64| told.iter().any(|lane| lane.first.position == Position(at));
    while !(heard(&told, 1) && heard(&told, 2)) {
        let more = tokio::time::timeout(PATIENCE, store.replayed_lanes(&branch())).await;
        told.extend(more.unwrap_or_else(|_| panic!("one is never told: {told:?}")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_revision_stays_while_a_row_is_of_it_however_many_came_since() {
    let store = open(&spec(), &context()).await.unwrap();
    for number in 1..=103_u32 {
        store.put_epoch(number.to_string().into(), "0".into()).await.unwrap();
    }
    bury(&store, vec![letter(1, 2)]).await;
    store.tidy(NOW, Vec::new()).await.unwrap();
    store.refresh().await.unwrap();
    assert_eq!(store.epochs().first().map(|epoch| epoch.number), Some(2), "what comes before it may go");
    store.purge(this(1)).await.unwrap();
    store.tidy(NOW, Vec::new()).await.unwrap();
    store.refresh().await.unwrap();
    assert_eq!(store.epochs().first().map(|epoch| epoch.number), Some(4));
    assert_eq!(store.epochs().last().map(|epoch| epoch.number), Some(103));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn the_tables_are_made_once_brought_up_to_date_and_left_alone_when_they_are_newer() {
    let (spec, context) = (spec(), context());
    // Different settings, so that the two share nothing: as two processes.
    let other = PostgresShelfSpec { connections: Some(2), ..spec.clone() };
    let (one, two) = tokio::join!(open(&spec, &context), open(&other, &context));
    bury(&one.unwrap(), vec![letter(1, 1)]).await;
    drop(two.unwrap());
    let schema = spec.schema.as_deref().unwrap();
    let past = aside_of_it(&server()).await;
    let back = format!(
        "ALTER TABLE {schema}.aside DROP COLUMN epoch; ALTER TABLE {schema}.dead DROP COLUMN epoch;
         DROP TABLE {schema}.ends; UPDATE {schema}.version SET version = 1"
    );
    past.batch_execute(&back).await.unwrap();
    let third = PostgresShelfSpec { connections: Some(3), ..spec.clone() };
    let store = open(&third, &context).await.unwrap();
    assert_eq!(store.dead_letters(this(1)).await.unwrap().rows.len(), 1);
    past.batch_execute(&format!("UPDATE {schema}.version SET version = 99")).await.unwrap();
    let fourth = PostgresShelfSpec { connections: Some(5), ..spec.clone() };
    let refused = open(&fourth, &context).await.err().expect("it is newer").to_string();
    assert!(refused.contains("later walflow (version 99)"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_part_that_was_left_without_a_word_at_its_place_counts_one_more_stop() {
    let store = open(&spec(), &context()).await.unwrap();
    let stops = |at: u64, instance: &'static str| {
        let opening = store.open_branch(&branch(), &Reach::from(Position(at)), instance);
        async move { opening.await.unwrap().unclean_stops }
    };
    assert_eq!((stops(5, "a").await, stops(5, "b").await, stops(5, "c").await), (0, 1, 2));
    assert_eq!(stops(6, "d").await, 0, "it has come further");
    assert_eq!(stops(6, "e").await, 1);
    store.leave_branch(&branch(), "e").await.unwrap();
    assert_eq!(stops(6, "f").await, 0, "it was left in order");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn two_that_take_what_is_due_take_different_rows_and_neither_waits_for_the_other() {
    let spec = spec();
    let store = open(&spec, &context()).await.unwrap();
    let due = |number| Arc::new(Record { due_at: Some(NOW), ..(*record(number, 0)).clone() });
    store.park((1..=3).map(|number| Parking { record: due(number), key: None }).collect()).await.unwrap();
    // One whose lease ran out while it worked is about to mark the first.
    let mut other = aside_of_it(&server()).await;
    let marking = other.transaction().await.unwrap();
    let mark = format!("UPDATE {}.parked SET place = '0' WHERE id = $1", spec.schema.as_deref().unwrap());
    assert_eq!(marking.execute(&mark, &[&&due(1).id.as_bytes()[..]]).await.unwrap(), 1);
    let taken = tokio::time::timeout(PATIENCE, store.take_due(NOW, 10, "7".into())).await.expect("it waits").unwrap();
    let ids = |rows: &[Releasing]| rows.iter().map(|row| row.record.id).collect::<Vec<_>>();
    assert_eq!(ids(&taken), [due(2).id, due(3).id]);
    marking.commit().await.unwrap();
    assert!(store.take_due(NOW, 10, "8".into()).await.unwrap().is_empty());
    let places: Vec<_> = store.marked(10).await.unwrap().iter().map(|row| row.place.to_string()).collect();
    assert_eq!(places, ["0", "7", "7"], "each as who took it marked it");
}

/// What becomes of connections through a relay.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Open,
    /// Nothing passes, and nobody is told.
    Silent,
    /// Connections are cut, and new ones too.
    Cut,
}

/// Passes everything on to the server while the way is open. Gives its own address.
async fn relay(way: watch::Receiver<Way>) -> String {
    let config: tokio_postgres::Config = server().parse().unwrap();
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            tokio::spawn(pass(near, port, way.clone()));
        }
    });
    server().replace(&format!(":{port}"), &format!(":{own}"))
}

async fn pass(mut near: TcpStream, port: u16, mut way: watch::Receiver<Way>) {
    // What comes while it is silent waits; what was under way then is cut when that is over.
    let came = way.wait_for(|way| *way != Way::Silent).await.map(|way| *way);
    let Ok(Way::Open) = came else { return };
    let Ok(mut far) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
        _ = way.wait_for(|way| *way != Way::Open) => {}
    }
    let _ = way.wait_for(|way| *way != Way::Silent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_server_that_is_cut_off_or_silent_fails_verbs_in_time_and_all_is_well_after_it() {
    let (turn, way) = watch::channel(Way::Open);
    let url = Some(relay(way).await);
    let timeout = Some(Span(Duration::from_secs(1)));
    let store = open(&PostgresShelfSpec { url, timeout, ..spec() }, &context()).await.unwrap();
    let parking = |number| vec![Parking { record: record(number, 0), key: None }];
    store.park(parking(1)).await.unwrap();
    for (number, trouble) in [(2, Way::Cut), (3, Way::Silent)] {
        turn.send_replace(trouble);
        // More than there are connections, so that some wait for one.
        let verbs = (0..6).map(|_| tokio::time::timeout(Duration::from_secs(5), store.park(parking(number))));
        for answer in futures::future::join_all(verbs).await {
            let answer = answer.expect("it fails in time");
            assert!(matches!(answer, Err(LogError::Storage { .. })), "{answer:?}");
        }
        turn.send_replace(Way::Open);
        let deadline = std::time::Instant::now() + PATIENCE;
        while let Err(error) = store.park(parking(number)).await {
            assert!(std::time::Instant::now() < deadline, "{error}");
        }
    }
    let page = store.parked(crate::source::ParkedQuery { limit: 10, ..Default::default() }).await.unwrap();
    assert_eq!(page.rows.len(), 3, "each once");
}
