//! The shelf in Redis, shared by two processes: claims and leases are taken over, news is told, stops are counted.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use walflow::clock::{Clock, Timestamp};
use walflow::record::{Position, Record, RecordId};
use walflow::source::foreign::open::Context;
use walflow::source::foreign::store::{Claim, Claimed, Parking, Store, StoredRecord};
use walflow::source::foreign::{First, Foreign, Settings};
use walflow::source::redis::{RedisShelfSpec, RedisSourceSpec, open, shelf};
use walflow::source::{
    Admitted, BranchName, DeadLetter, DeadQuery, DeadReason, IdempotencyKey, Log, ParkedQuery, Reach, RowKey,
    Scheduled, Settlement, Write,
};

/// Longest wait for anything; a wait that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(30);

fn source() -> RedisSourceSpec {
    let url = std::env::var("WALFLOW_TEST_REDIS").expect("WALFLOW_TEST_REDIS names a Redis server: run tests/run");
    RedisSourceSpec { url: Some(url), streams: Some(2), ..RedisSourceSpec::default() }
}

fn context() -> Context {
    Context {
        namespace: format!("shelf-{:012x}", fastrand::u64(..) >> 16).parse().unwrap(),
        number: 1,
        clock: Clock::manual(Timestamp::from_millis(1_764_000_000_000)),
        record_bytes: 1 << 20,
        key_window: Duration::from_secs(3_600),
        backlog_bytes: 1 << 30,
        strict: false,
    }
}

/// What two processes have of one shelf.
async fn two(context: &Context) -> (Arc<dyn Store>, Arc<dyn Store>) {
    let spec = RedisShelfSpec::default().beside(&source());
    (shelf::open(&spec, context).await.unwrap(), shelf::open(&spec, context).await.unwrap())
}

fn after(context: &Context, seconds: u64) -> Timestamp {
    context.clock.now().saturating_add(Duration::from_secs(seconds))
}

fn record(context: &Context, key: Option<&str>, due_at: Option<Timestamp>) -> Arc<Record> {
    let now = context.clock.now();
    let bare = Record::new(RecordId::new(now, 0, 1, fastrand::u64(..)), now, Bytes::from_static(b"{}"));
    Arc::new(Record { key: key.map(Into::into), due_at, ..bare })
}

fn key(name: &str) -> IdempotencyKey {
    IdempotencyKey { key: name.into(), fingerprint: [7; 16] }
}

fn branch() -> BranchName {
    BranchName::new("sink", Some("eu"))
}

#[tokio::test]
#[ignore = "needs a Redis server: run tests/run"]
async fn a_claim_that_nobody_confirmed_goes_to_the_next_under_its_first_id() {
    let context = context();
    let (one, other) = two(&context).await;
    let claim = |record: &Arc<Record>| vec![Claim { record: Arc::clone(record), key: key("once") }];
    let (first, second) = (record(&context, None, None), record(&context, None, None));
    let fresh = Claimed::Fresh { id: first.id, written_at: first.written_at };
    assert_eq!(one.claim(claim(&first), Timestamp::MIN).await.unwrap(), std::slice::from_ref(&fresh));
    assert_eq!(other.claim(claim(&second), Timestamp::MIN).await.unwrap(), [Claimed::Running]);
    context.clock.advance(Duration::from_secs(61));
    let abandoned = context.clock.now().saturating_sub(Duration::from_secs(60));
    assert_eq!(other.claim(claim(&second), abandoned).await.unwrap(), [fresh]);
    // Of the two who claim it at once one is too late.
    assert_eq!(one.claim(claim(&record(&context, None, None)), abandoned).await.unwrap(), [Claimed::Running]);
    other.confirm(vec![("once".into(), first.id)]).await.unwrap();
    other.give_up(vec![("once".into(), first.id)]).await.unwrap();
    let known = one.claim(claim(&second), Timestamp::MAX).await.unwrap();
    assert!(matches!(known[..], [Claimed::Known { id, fingerprint, .. }] if id == first.id && fingerprint == [7; 16]));
    // What was given up is free.
    let free = |record: &Arc<Record>| vec![Claim { record: Arc::clone(record), key: key("free") }];
    one.claim(free(&first), Timestamp::MIN).await.unwrap();
    one.give_up(vec![("free".into(), first.id)]).await.unwrap();
    assert!(
        matches!(other.claim(free(&second), Timestamp::MIN).await.unwrap()[0], Claimed::Fresh { id, .. } if id == second.id)
    );
    one.delete().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a Redis server: run tests/run"]
async fn one_process_moves_what_is_due_and_the_next_finds_what_it_marked() {
    let context = context();
    let (one, other) = two(&context).await;
    let news = other.parked_news();
    let rows: Vec<_> = [30, 10, 20].map(|seconds| record(&context, Some("k"), Some(after(&context, seconds)))).into();
    let park = rows.iter().map(|record| Parking { record: Arc::clone(record), key: None }).collect();
    one.park(park).await.unwrap();
    tokio::time::timeout(PATIENCE, news).await.expect("another process hears of it");
    assert_eq!(other.next_due().await.unwrap(), Some(after(&context, 10)));
    assert!(one.lead(after(&context, 10)).await.unwrap());
    assert!(!other.lead(after(&context, 10)).await.unwrap());
    context.clock.advance(Duration::from_secs(25));
    let now = context.clock.now();
    other.take_due(now, 10, "p".into()).await.unwrap_err();
    let taken = one.take_due(now, 10, "p".into()).await.unwrap();
    assert_eq!(taken.iter().map(|row| row.record.id).collect::<Vec<_>>(), [rows[1].id, rows[2].id]);
    // It ends without a word, and its lease with it.
    assert!(other.lead(after(&context, 10)).await.unwrap());
    let marked = other.marked(10).await.unwrap();
    assert_eq!(
        marked.iter().map(|row| (row.record.id, &*row.place)).collect::<Vec<_>>(),
        [(rows[1].id, "p"), (rows[2].id, "p")]
    );
    assert_eq!(other.cancel(Scheduled::Key("k".into())).await.unwrap(), 1, "what is on its way is not cancelled");
    assert!(matches!(one.find(rows[0].id).await.unwrap(), Some(StoredRecord::Cancelled)));
    other.released(vec![rows[1].id, rows[2].id]).await.unwrap();
    assert!(other.marked(10).await.unwrap().is_empty());
    let left = one.parked(ParkedQuery { limit: 10, ..ParkedQuery::default() }).await.unwrap();
    assert!(left.rows.is_empty(), "{left:?}");
    other.resign().await.unwrap();
    assert!(one.lead(after(&context, 10)).await.unwrap());
    one.delete().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a Redis server: run tests/run"]
async fn stops_without_a_word_are_counted_by_part_at_the_same_cursor() {
    let context = context();
    let (one, other) = two(&context).await;
    let cursor = |offset| [0, 1].into_iter().map(|part| Position::in_part(part, offset)).collect::<Reach>();
    let stops = |store: &Arc<dyn Store>, offset, who: &str| {
        let opened = store.open_branch(&branch(), &cursor(offset), who);
        async move { opened.await.unwrap().unclean_stops }
    };
    assert_eq!(stops(&one, 5, "a").await, 0);
    assert_eq!(stops(&one, 5, "a").await, 0, "the same process opens it anew");
    assert_eq!(stops(&other, 5, "b").await, 1);
    assert_eq!(stops(&one, 5, "c").await, 2);
    assert_eq!(stops(&one, 6, "d").await, 1, "it came further in between");
    one.leave_branch(&branch(), "d").await.unwrap();
    assert_eq!(stops(&other, 6, "e").await, 0);
    // The part that it does not read any more it has let go.
    other.open_branch(&branch(), &Position::in_part(0, 6).into(), "e").await.unwrap();
    let of_one = one.open_branch(&branch(), &Position::in_part(1, 6).into(), "f").await.unwrap();
    assert_eq!(of_one.unclean_stops, 0);
    one.delete().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a Redis server: run tests/run"]
async fn a_replay_by_one_process_is_told_to_the_other_and_outlives_a_new_name() {
    let context = context();
    let (one, other) = two(&context).await;
    for store in [&one, &other] {
        store.open_branch(&branch(), &Reach::none(), "i").await.unwrap();
    }
    let letter = |offset| DeadLetter {
        row: RowKey { position: Position(offset), child: 0 },
        branch: branch(),
        at: context.clock.now(),
        reason: DeadReason::Refused,
        attempts: 1,
        last_error: "no".into(),
        stage: "sink".into(),
        revision: "r".into(),
        record: record(&context, Some("k\0x"), None),
        rendered: Some(Bytes::from_static(b"r")),
        overtaken: false,
    };
    let dead: Vec<_> = (1..=700).map(letter).collect();
    other.settle(&branch(), vec![Settlement { dead: dead.clone(), ..Settlement::default() }]).await.unwrap();
    // Told once more, it is no second letter.
    other.settle(&branch(), vec![Settlement { dead: vec![dead[0].clone()], ..Settlement::default() }]).await.unwrap();
    let to = BranchName::new("other", None);
    one.rename_branch(&branch(), &to).await.unwrap();
    other.refresh().await.unwrap();
    assert_eq!(other.branches(), std::slice::from_ref(&to));
    let query = || DeadQuery { branch: Some("other".into()), limit: 600, ..DeadQuery::default() };
    let page = other.dead_letters(query()).await.unwrap();
    assert_eq!((page.rows.len(), page.next.is_some()), (600, true));
    assert_eq!(page.rows[0], DeadLetter { branch: to.clone(), ..dead[0].clone() });
    let rest = other.dead_letters(DeadQuery { after: page.next, ..query() }).await.unwrap();
    assert_eq!((rest.rows.len(), rest.next), (100, None));
    assert_eq!(one.replay(query(), false).await.unwrap().replayed, 600);
    let lanes = tokio::time::timeout(PATIENCE, other.replayed_lanes(&to)).await.unwrap();
    assert_eq!(lanes.iter().map(|lane| (&*lane.lane, lane.rows)).collect::<Vec<_>>(), [("=k\0x", 600)]);
    let rows = other.aside_rows(&to, "=k\0x", 700).await.unwrap();
    assert!(rows.len() == 600 && rows.is_sorted_by_key(|row| row.row));
    let found = one.find(dead[0].record.id).await.unwrap();
    assert!(matches!(found, Some(StoredRecord::Rows { position: Position(1), .. })), "{found:?}");
    one.forget_branch(&to).await.unwrap();
    assert!(one.find(dead[699].record.id).await.unwrap().is_none());
    assert!(one.dead_letters(DeadQuery { limit: 1, ..DeadQuery::default() }).await.unwrap().rows.is_empty());
    one.delete().await.unwrap();
}

#[tokio::test]
#[ignore = "needs a Redis server: run tests/run"]
async fn a_key_is_one_record_whether_that_was_parked_or_not() {
    let context = context();
    let pair = || async {
        let store = shelf::open(&RedisShelfSpec::default().beside(&source()), &context).await.unwrap();
        let settings =
            Settings { key_window: context.key_window, number: 1, first: First::Earliest, one_place_for_keys: true };
        Foreign::new(open(&source(), &context).unwrap(), Some(store), settings, context.clock.clone())
    };
    let (one, other) = (pair().await, pair().await);
    let write = |name: &str, due_at| {
        let record = Record::clone(&record(&context, None, None));
        vec![Write { record, due_at, idempotency: Some(key(name)) }]
    };
    let later = Some(after(&context, 60));
    let parked = one.admit(write("parked", later)).await.unwrap().remove(0);
    let Admitted::Parked { id, .. } = parked else { panic!("{parked:?}") };
    let again = other.admit(write("parked", None)).await.unwrap().remove(0);
    assert!(
        matches!(again, Admitted::Repeated { id: first, due_at, .. } if first == id && due_at == later),
        "{again:?}"
    );
    let at_once = one.admit(write("at once", None)).await.unwrap().remove(0);
    let Admitted::Appended { id, .. } = at_once else { panic!("{at_once:?}") };
    let again = other.admit(write("at once", later)).await.unwrap().remove(0);
    assert!(matches!(again, Admitted::Repeated { id: first, .. } if first == id), "{again:?}");
    assert!(one.caps().exact_keys);
    one.delete().await.unwrap();
    one.close().await;
    other.close().await;
}
