//! What a [`Shelf`] must do.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;

use super::{
    Kind, append, branch, came, closed, end, finish, id_of, in_time, payloads, positions, reach, read, settle_to,
    until_counts, write,
};
use crate::clock::Timestamp;
use crate::record::Position;
use crate::source::{
    Admitted, AsideRow, BranchName, BranchStart, DeadLetter, DeadQuery, DeadReason, Entry, Log, ParkedQuery, RowKey,
    Scheduled, Settlement, Shelf, Start, StoredPause, Write, lane_of,
};

fn after<K: Kind>(kind: &K, seconds: u64) -> Timestamp {
    kind.clock().now().saturating_add(Duration::from_secs(seconds))
}

async fn park(log: &Arc<dyn Log>, due_at: Timestamp, key: Option<&str>, payload: &str) -> Admitted {
    log.admit(vec![Write { due_at: Some(due_at), ..write(key, payload) }]).await.unwrap().remove(0)
}

/// Three records, read by the branch.
async fn three<K: Kind>(kind: &K) -> (BranchStart, Vec<Entry>) {
    let log = kind.log();
    let admit = async |key, payload| _ = log.admit(vec![write(Some(key), payload)]).await.unwrap();
    let open = || log.open_branch(&branch(), Start::Earliest);
    let writes = [("a", "0"), ("b", "1"), ("a", "2")];
    let (start, mut entries) = if log.caps().ordered {
        // Written before anybody reads: of a key a queue gives together what is there, and nothing behind it.
        for (key, payload) in writes {
            admit(key, payload).await;
        }
        let mut start = open().await.unwrap();
        let entries = read(&mut *start.subscription, 3).await;
        (start, entries)
    } else {
        // Read one by one, they are in this order all the same.
        let (mut start, mut entries) = (open().await.unwrap(), Vec::new());
        for (key, payload) in writes {
            admit(key, payload).await;
            entries.extend(read(&mut *start.subscription, 1).await);
        }
        (start, entries)
    };
    // Of different keys there may be no order.
    entries.sort_by_key(|entry| entry.record.payload.clone());
    (start, entries)
}

/// After a restart exactly these come again, but for what is known to have ended.
async fn come_again<K: Kind>(kind: &K, entries: &[&Entry]) {
    let mut start = kind.log().open_branch(&branch(), Start::Latest).await.unwrap();
    let mut missing: Vec<_> = entries.iter().map(|entry| entry.record.id).collect();
    while !missing.is_empty() {
        let entry = read(&mut *start.subscription, 1).await.remove(0);
        if !start.ended.contains(&row(&entry)) {
            // Of a key a queue may give the next only then.
            end(&kind.shelf(), std::slice::from_ref(&entry)).await;
            let known = missing.iter().position(|id| *id == entry.record.id);
            missing.remove(known.unwrap_or_else(|| panic!("{entry:?} comes again")));
        }
    }
    if let Some(Ok(entries)) = start.subscription.next(1, usize::MAX).now_or_never() {
        assert!(start.ended.contains(&row(&entries[0])), "{entries:?} comes again");
    }
}

fn row(entry: &Entry) -> RowKey {
    RowKey { position: entry.position, child: 0 }
}

pub(super) fn aside<K: Kind>(kind: &K, entry: &Entry, attempts: u32) -> AsideRow {
    AsideRow {
        row: row(entry),
        lane: lane_of(entry.record.key.as_deref(), row(entry)),
        record: Arc::clone(&entry.record),
        rendered: Some(Bytes::from_static(b"rendered")),
        attempts,
        first_failed: kind.clock().now(),
        next_try: after(kind, 1),
        last_error: "503".into(),
        replayed: false,
    }
}

pub(super) fn letter<K: Kind>(kind: &K, entry: &Entry, reason: DeadReason, overtaken: bool) -> DeadLetter {
    DeadLetter {
        row: row(entry),
        branch: branch(),
        at: kind.clock().now(),
        reason,
        attempts: 1,
        last_error: format!("no {}", entry.position).into(),
        stage: "sink".into(),
        revision: "r".into(),
        record: Arc::clone(&entry.record),
        rendered: None,
        overtaken,
    }
}

/// All of these have ended.
fn ended(entries: &[Entry]) -> Settlement {
    Settlement { frontier: reach(entries), ended: positions(entries), ..Settlement::default() }
}

async fn settle(shelf: &Arc<dyn Shelf>, settlement: Settlement) {
    shelf.settle(&branch(), settlement).await.unwrap();
}

fn all() -> DeadQuery {
    DeadQuery { limit: 100, ..DeadQuery::default() }
}

pub(super) async fn what_is_parked_comes_when_it_is_due_in_that_order_and_never_before<K: Kind>(kind: K) {
    let log = kind.log();
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    for (seconds, payload) in [(30, "c"), (10, "a"), (20, "b"), (10, "a2"), (100, "d")] {
        park(&log, after(&kind, seconds), Some("k"), payload).await;
    }
    kind.until_holds(&log, 0).await;
    until_counts(&kind.shelf(), |counts| counts.parked == 5).await;
    kind.clock().advance(Duration::from_millis(9_999));
    assert!(futures::poll!(start.subscription.next(1, usize::MAX)).is_pending());
    kind.clock().advance(Duration::from_millis(20_001));
    kind.until_holds(&log, 4).await;
    came(&kind, &finish(&kind, &mut *start.subscription, 4).await, &["a", "a2", "b", "c"]);
    until_counts(&kind.shelf(), |counts| counts.parked == 1).await;
}

pub(super) async fn what_is_parked_is_listed_in_pages_and_by_key<K: Kind>(kind: K) {
    let (log, shelf) = (kind.log(), kind.shelf());
    for (seconds, key) in [(300, "x"), (100, "y"), (200, "x")] {
        park(&log, after(&kind, seconds), Some(key), &seconds.to_string()).await;
    }
    let first = shelf.parked(ParkedQuery { limit: 2, ..ParkedQuery::default() }).await.unwrap();
    let second = ParkedQuery { limit: 2, after: first.next.clone(), ..ParkedQuery::default() };
    let second = shelf.parked(second).await.unwrap();
    let found: Vec<_> = first.rows.iter().chain(&second.rows).map(|row| row.record.payload.clone()).collect();
    assert_eq!(found, ["100", "200", "300"].map(Bytes::from));
    assert!(first.next.is_some() && second.next.is_none(), "{:?} {:?}", first.next, second.next);
    let of_x = ParkedQuery { limit: 10, key: Some("x".into()), ..ParkedQuery::default() };
    assert_eq!(shelf.parked(of_x).await.unwrap().rows.len(), 2);
    let (from, to) = (Some(after(&kind, 100)), Some(after(&kind, 300)));
    let between = shelf.parked(ParkedQuery { limit: 10, from, to, ..ParkedQuery::default() }).await.unwrap();
    assert_eq!(between.rows.len(), 2, "from is within, to is not");
}

pub(super) async fn what_is_cancelled_never_comes<K: Kind>(kind: K) {
    let (log, shelf) = (kind.log(), kind.shelf());
    let due = after(&kind, 60);
    let one = id_of(&park(&log, due, None, "0").await);
    for payload in ["1", "2"] {
        park(&log, due, Some("k"), payload).await;
    }
    park(&log, due, None, "3").await;
    assert_eq!(shelf.cancel(Scheduled::Id(one)).await.unwrap(), 1);
    assert_eq!(shelf.cancel(Scheduled::Id(one)).await.unwrap(), 0);
    assert_eq!(shelf.cancel(Scheduled::Key("k".into())).await.unwrap(), 2);
    drop((log, shelf));
    let kind = kind.reopen().await;
    let mut start = kind.log().open_branch(&branch(), Start::Earliest).await.unwrap();
    kind.clock().advance(Duration::from_secs(60));
    assert_eq!(payloads(&read(&mut *start.subscription, 1).await), ["3"].map(Bytes::from));
    kind.until_holds(&kind.log(), 1).await;
    until_counts(&kind.shelf(), |counts| counts.parked == 0).await;
}

pub(super) async fn what_is_moved_comes_at_its_new_time<K: Kind>(kind: K) {
    let (log, shelf) = (kind.log(), kind.shelf());
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    let one = id_of(&park(&log, after(&kind, 60), Some("k"), "0").await);
    park(&log, after(&kind, 30), Some("k"), "1").await;
    let sooner = after(&kind, 10);
    assert_eq!(shelf.reschedule(Scheduled::Id(one), sooner).await.unwrap(), 1);
    let page = shelf.parked(ParkedQuery { limit: 1, ..ParkedQuery::default() }).await.unwrap();
    assert_eq!((page.rows[0].record.id, page.rows[0].due_at), (one, sooner));
    kind.clock().advance(Duration::from_secs(30));
    came(&kind, &finish(&kind, &mut *start.subscription, 2).await, &["0", "1"]);
    assert_eq!(shelf.reschedule(Scheduled::Id(one), after(&kind, 1)).await.unwrap(), 0, "it is gone");
}

pub(super) async fn parked_records_outlive_a_restart<K: Kind>(kind: K) {
    let due = after(&kind, 3_600);
    park(&kind.log(), due, None, "0").await;
    let kind = kind.reopen().await;
    until_counts(&kind.shelf(), |counts| counts.parked == 1).await;
    let mut start = kind.log().open_branch(&branch(), Start::Earliest).await.unwrap();
    kind.clock().advance(Duration::from_secs(3_600));
    let found = read(&mut *start.subscription, 1).await;
    assert_eq!((payloads(&found), found[0].record.due_at), (vec![Bytes::from("0")], Some(due)));
}

pub(super) async fn rows_set_aside_come_back_in_order_with_what_is_known_of_them<K: Kind>(kind: K) {
    let (start, entries) = three(&kind).await;
    let shelf = kind.shelf();
    let rows = vec![aside(&kind, &entries[2], 0), aside(&kind, &entries[0], 1)];
    settle(&shelf, Settlement { aside: rows, ..ended(&entries) }).await;
    // The same row again is what is newly known of it.
    settle(&shelf, Settlement { aside: vec![aside(&kind, &entries[0], 4)], ..Settlement::default() }).await;
    drop((start, shelf));
    let kind = kind.reopen().await;
    let mut start = kind.log().open_branch(&branch(), Start::Latest).await.unwrap();
    assert_eq!(start.lanes.len(), 1);
    assert!(start.cursor.single() == Position(3) || !kind.places(), "{:?}", start.cursor);
    assert!(start.subscription.next(1, usize::MAX).now_or_never().is_none(), "what is set aside comes from the shelf");
    let lane = &start.lanes[0];
    assert_eq!((lane.first, lane.last), (row(&entries[0]), row(&entries[2])));
    assert_eq!((lane.rows, lane.attempts), (2, 4));
    let shelf = kind.shelf();
    let found = shelf.aside_rows(&branch(), &lane.lane, 10).await.unwrap();
    assert_eq!(found, [aside(&kind, &entries[0], 4), aside(&kind, &entries[2], 0)]);
    assert_eq!(shelf.aside_rows(&branch(), &lane.lane, 1).await.unwrap().len(), 1);
    until_counts(&shelf, |counts| counts.aside_of(&branch()) == 2).await;
    settle(&shelf, Settlement { returned: vec![row(&entries[0]), row(&entries[2])], ..Settlement::default() }).await;
    until_counts(&shelf, |counts| counts.aside_of(&branch()) == 0).await;
    drop((start, shelf));
    let kind = kind.reopen().await;
    assert!(kind.log().open_branch(&branch(), Start::Latest).await.unwrap().lanes.is_empty());
}

pub(super) async fn ends_above_the_frontier_are_remembered<K: Kind>(kind: K) {
    let (start, entries) = three(&kind).await;
    let dead = vec![letter(&kind, &entries[1], DeadReason::Refused, false)];
    let aside = vec![aside(&kind, &entries[2], 1)];
    settle(&kind.shelf(), Settlement { aside, dead, ended: positions(&entries[1..]), ..Settlement::default() }).await;
    drop(start);
    let kind = kind.reopen().await;
    let start = kind.log().open_branch(&branch(), Start::Latest).await.unwrap();
    if kind.places() {
        assert_eq!(start.cursor.single(), Position(0));
        assert!(start.ended.contains(&row(&entries[1])), "{:?}", start.ended);
        assert!(!start.ended.contains(&row(&entries[0])), "{:?}", start.ended);
    }
    assert_eq!(start.lanes[0].first, row(&entries[2]));
    drop(start);
    come_again(&kind, &[&entries[0]]).await;
}

pub(super) async fn a_dead_letter_ends_its_row_and_is_listed_by_each_filter<K: Kind>(kind: K) {
    let (_start, entries) = three(&kind).await;
    let shelf = kind.shelf();
    settle(&shelf, Settlement { aside: vec![aside(&kind, &entries[0], 1)], ..Settlement::default() }).await;
    let first = kind.clock().now();
    let dead = vec![letter(&kind, &entries[0], DeadReason::Exhausted, false)];
    settle(&shelf, Settlement { dead, ..Settlement::default() }).await;
    until_counts(&shelf, |counts| counts.aside_of(&branch()) == 0).await;
    kind.clock().advance(Duration::from_secs(10));
    let dead = vec![letter(&kind, &entries[1], DeadReason::Refused, false)];
    settle(&shelf, Settlement { dead, ..Settlement::default() }).await;
    until_counts(&shelf, |counts| matches!(counts.dead_of(&branch()), (2, 1..))).await;
    let later = first.saturating_add(Duration::from_secs(10));
    let queries: [(&str, DeadQuery, &[usize]); 9] = [
        ("all", all(), &[0, 1]),
        ("branch", DeadQuery { branch: Some("sink".into()), ..all() }, &[0, 1]),
        ("other branch", DeadQuery { branch: Some("other".into()), ..all() }, &[]),
        ("reason", DeadQuery { reason: Some(DeadReason::Refused), ..all() }, &[1]),
        ("id", DeadQuery { id: Some(entries[0].record.id), ..all() }, &[0]),
        ("key", DeadQuery { key: Some("b".into()), ..all() }, &[1]),
        ("from", DeadQuery { from: Some(later), ..all() }, &[1]),
        ("to", DeadQuery { to: Some(later), ..all() }, &[0]),
        ("error", DeadQuery { error_contains: Some(format!("no {}", entries[1].position)), ..all() }, &[1]),
    ];
    for (what, query, expected) in queries {
        let found = shelf.dead_letters(query).await.unwrap().rows;
        let found: Vec<_> = found.iter().map(|letter| letter.row).collect();
        assert_eq!(found, expected.iter().map(|at| row(&entries[*at])).collect::<Vec<_>>(), "{what}");
    }
    let page = shelf.dead_letters(DeadQuery { limit: 1, ..DeadQuery::default() }).await.unwrap();
    assert_eq!(page.rows[0].row, row(&entries[0]));
    let next = shelf.dead_letters(DeadQuery { limit: 1, after: page.next, ..DeadQuery::default() }).await.unwrap();
    assert_eq!(next.rows, [DeadLetter { at: later, ..letter(&kind, &entries[1], DeadReason::Refused, false) }]);
}

/// Seven letters of two branches, keys and times. What is dead is numbered as it came.
async fn seven<K: Kind>(kind: &K) -> (BranchName, Vec<DeadLetter>) {
    let other = BranchName::new("sink", Some("eu"));
    let log = kind.log();
    for (key, payload) in [(Some("a"), "0"), (Some("b"), "1"), (None, "2"), (Some("a"), "3"), (Some("A"), "4")] {
        log.admit(vec![write(key, payload)]).await.unwrap();
    }
    let entries = read(&mut *log.open_branch(&branch(), Start::Earliest).await.unwrap().subscription, 5).await;
    log.open_branch(&other, Start::Earliest).await.unwrap();
    let mut letters = Vec::new();
    for (at, of, reason, error) in [
        (0, branch(), DeadReason::Refused, "50% of_it"),
        (1, branch(), DeadReason::Exhausted, "50 percent"),
        (0, other.clone(), DeadReason::Refused, "50% of it"),
        (2, branch(), DeadReason::Script, "ÄÖ 'quoted' \\ \"x\""),
        (3, other.clone(), DeadReason::Script, ""),
        (3, branch(), DeadReason::NoRoute, "äö"),
        (4, other.clone(), DeadReason::Refused, "of_it"),
    ] {
        let entry = &entries[at];
        let letter = DeadLetter { branch: of.clone(), last_error: error.into(), ..letter(kind, entry, reason, false) };
        let settlement = Settlement { dead: vec![letter.clone()], ..Settlement::default() };
        kind.shelf().settle(&of, settlement).await.unwrap();
        letters.push(letter);
        kind.clock().advance(Duration::from_secs(10));
    }
    (other, letters)
}

pub(super) async fn every_filter_means_the_same_alone_together_and_in_pages<K: Kind>(kind: K) {
    let (other, letters) = seven(&kind).await;
    let shelf = kind.shelf();
    let of = |text: &str| DeadQuery { error_contains: Some(text.into()), ..DeadQuery::default() };
    let key = |text: &str| DeadQuery { key: Some(text.into()), ..DeadQuery::default() };
    let eu = DeadQuery { branch: Some(other.as_str().to_owned()), ..DeadQuery::default() };
    let (second, fifth) = (Some(letters[1].at), Some(letters[4].at));
    let queries: [(DeadQuery, &[usize]); 17] = [
        (DeadQuery::default(), &[0, 1, 2, 3, 4, 5, 6]),
        (eu.clone(), &[2, 4, 6]),
        (key("a"), &[0, 2, 4, 5]),
        (key("A"), &[6]),
        (key(""), &[]),
        (DeadQuery { reason: Some(DeadReason::Script), ..DeadQuery::default() }, &[3, 4]),
        (DeadQuery { id: Some(letters[0].record.id), ..DeadQuery::default() }, &[0, 2]),
        (DeadQuery { from: second, to: fifth, ..DeadQuery::default() }, &[1, 2, 3]),
        (DeadQuery { from: fifth, to: second, ..DeadQuery::default() }, &[]),
        // A text stands for itself alone.
        (of("50% of_"), &[0]),
        (of("_"), &[0, 6]),
        (of("%"), &[0, 2]),
        (of("'quoted' \\ \""), &[3]),
        (of("äö"), &[5]),
        (of(""), &[0, 1, 2, 3, 4, 5, 6]),
        (DeadQuery { reason: Some(DeadReason::Refused), from: second, ..key("a") }, &[2]),
        (DeadQuery { to: fifth, error_contains: Some("5".into()), ..eu }, &[2]),
    ];
    for (query, expected) in queries {
        let expected: Vec<&DeadLetter> = expected.iter().map(|at| &letters[*at]).collect();
        // A page without a limit has one row.
        for limit in [0, 2, 3, 7, usize::MAX] {
            let (mut found, mut after) = (Vec::new(), None);
            loop {
                let page = shelf.dead_letters(DeadQuery { limit, after, ..query.clone() }).await.unwrap();
                assert!(page.rows.len() <= limit.max(1), "{query:?} by {limit}: {}", page.rows.len());
                found.extend(page.rows);
                after = page.next;
                if after.is_none() {
                    break;
                }
                assert!(found.len() < expected.len(), "{query:?} by {limit}: a page after the last");
            }
            assert_eq!(found.iter().collect::<Vec<_>>(), expected, "{query:?} by {limit}");
        }
    }
}

pub(super) async fn what_is_replayed_or_purged_is_what_would_be_listed<K: Kind>(kind: K) {
    let (other, letters) = seven(&kind).await;
    let shelf = kind.shelf();
    let page = shelf.dead_letters(DeadQuery { limit: 2, ..DeadQuery::default() }).await.unwrap();
    let behind = DeadQuery { after: page.next, ..DeadQuery::default() };
    // An overtaken one counts as one of those that were meant.
    let overtaken = Settlement { overtaken: vec![letters[2].row], ..Settlement::default() };
    shelf.settle(&other, overtaken).await.unwrap();
    let a = DeadQuery { key: Some("a".into()), limit: 2, ..behind.clone() };
    let replayed = shelf.replay(a, false).await.unwrap();
    assert_eq!((replayed.replayed, replayed.overtaken), (1, 1));
    let left = async || {
        let rows = shelf.dead_letters(all()).await.unwrap().rows;
        rows.iter().map(|letter| letters.iter().position(|one| one.at == letter.at).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(left().await, [0, 1, 2, 3, 5, 6]);
    let lanes = tokio::time::timeout(super::PATIENCE, shelf.replayed_lanes(&other)).await.unwrap();
    assert_eq!(lanes.iter().map(|lane| (lane.first, lane.rows)).collect::<Vec<_>>(), [(letters[4].row, 1)]);
    assert_eq!(shelf.purge(DeadQuery { limit: 2, ..behind }).await.unwrap(), 2);
    assert_eq!(left().await, [0, 1, 5, 6]);
    let refused = DeadQuery { reason: Some(DeadReason::Refused), ..DeadQuery::default() };
    assert_eq!(shelf.purge(DeadQuery { limit: usize::MAX, ..refused }).await.unwrap(), 2);
    assert_eq!(left().await, [1, 5]);
}

pub(super) async fn replay_sends_back_in_order_and_leaves_what_was_overtaken<K: Kind>(kind: K) {
    let (_start, entries) = three(&kind).await;
    let shelf = kind.shelf();
    let dead = entries.iter().map(|entry| letter(&kind, entry, DeadReason::Refused, false)).collect();
    settle(&shelf, Settlement { dead, ..ended(&entries) }).await;
    settle(&shelf, Settlement { overtaken: vec![row(&entries[1])], ..Settlement::default() }).await;
    let replayed = shelf.replay(all(), false).await.unwrap();
    assert_eq!((replayed.replayed, replayed.overtaken), (2, 1));
    let lanes = tokio::time::timeout(super::PATIENCE, shelf.replayed_lanes(&branch())).await.unwrap();
    assert_eq!(lanes.len(), 1);
    let rows = shelf.aside_rows(&branch(), &lanes[0].lane, 10).await.unwrap();
    assert_eq!(rows.iter().map(|row| row.row).collect::<Vec<_>>(), [row(&entries[0]), row(&entries[2])]);
    assert!(rows.iter().all(|row| row.replayed && row.rendered.is_none()), "replay runs the original");
    let forced = shelf.replay(all(), true).await.unwrap();
    assert_eq!(forced.replayed, 1);
    until_counts(&shelf, |counts| counts.dead_of(&branch()) == (0, 0)).await;
}

pub(super) async fn a_purged_letter_does_not_come_again<K: Kind>(kind: K) {
    let (start, entries) = three(&kind).await;
    let shelf = kind.shelf();
    let dead = vec![letter(&kind, &entries[1], DeadReason::Refused, false)];
    settle(&shelf, Settlement { dead, ended: positions(&entries[1..2]), ..Settlement::default() }).await;
    assert_eq!(shelf.purge(all()).await.unwrap(), 1);
    assert_eq!(shelf.purge(all()).await.unwrap(), 0);
    drop((start, shelf));
    let kind = kind.reopen().await;
    assert!(kind.shelf().dead_letters(all()).await.unwrap().rows.is_empty());
    // The frontier has not passed it.
    come_again(&kind, &[&entries[0], &entries[2]]).await;
}

pub(super) async fn a_purge_takes_no_more_than_it_was_told<K: Kind>(kind: K) {
    let (_start, mut entries) = three(&kind).await;
    // Those that died at one time go in the order of the log.
    entries.sort_by_key(|entry| entry.position);
    let shelf = kind.shelf();
    let dead = entries.iter().map(|entry| letter(&kind, entry, DeadReason::Refused, false)).collect();
    settle(&shelf, Settlement { dead, ..Settlement::default() }).await;
    assert_eq!(shelf.purge(DeadQuery { limit: 2, ..DeadQuery::default() }).await.unwrap(), 2);
    let left = shelf.dead_letters(all()).await.unwrap().rows;
    assert_eq!(left.iter().map(|letter| letter.row).collect::<Vec<_>>(), [row(&entries[2])], "the oldest go first");
}

pub(super) async fn a_pause_outlives_a_restart_until_it_is_cleared<K: Kind>(kind: K) {
    append(&kind.log(), &["0"]).await;
    kind.log().open_branch(&branch(), Start::Earliest).await.unwrap();
    let pause = StoredPause { cause: "operator".into(), note: "by hand".into(), since: kind.clock().now() };
    settle(&kind.shelf(), Settlement { pause: Some(Some(pause.clone())), ..Settlement::default() }).await;
    let kind = kind.reopen().await;
    assert_eq!(kind.log().open_branch(&branch(), Start::Latest).await.unwrap().pause, Some(pause));
    settle(&kind.shelf(), Settlement { pause: Some(None), ..Settlement::default() }).await;
    let kind = kind.reopen().await;
    assert_eq!(kind.log().open_branch(&branch(), Start::Latest).await.unwrap().pause, None);
}

pub(super) async fn marks_outlive_a_restart_until_the_frontier_has_passed<K: Kind>(kind: K) {
    drop(three(&kind).await);
    for _ in 0..2 {
        settle(&kind.shelf(), Settlement { mark: Some(Position(1)), ..Settlement::default() }).await;
    }
    let kind = kind.reopen().await;
    assert_eq!(kind.log().open_branch(&branch(), Start::Latest).await.unwrap().marks, [(Position(1), 2)]);
    settle_to(&kind.shelf(), 1).await;
    let kind = kind.reopen().await;
    assert!(kind.log().open_branch(&branch(), Start::Latest).await.unwrap().marks.is_empty());
}

pub(super) async fn a_closed_shelf_says_so<K: Kind>(kind: K) {
    let (start, entries) = three(&kind).await;
    let (log, shelf) = (kind.log(), kind.shelf());
    let parked = id_of(&park(&log, after(&kind, 60), Some("k"), "3").await);
    let dead = vec![letter(&kind, &entries[0], DeadReason::Refused, false)];
    let rows = vec![aside(&kind, &entries[1], 1)];
    settle(&shelf, Settlement { dead, aside: rows, ..Settlement::default() }).await;
    kind.close().await;
    let frontier = reach(&entries);
    let alone = Settlement { frontier: frontier.clone(), ..Settlement::default() };
    let more = Settlement { frontier, dropped: vec![(entries[0].position, "filter".into())], ..Settlement::default() };
    closed("settle", in_time("settle", shelf.settle(&branch(), alone)).await);
    closed("settle", in_time("settle", shelf.settle(&branch(), more)).await);
    closed("aside_rows", in_time("aside_rows", shelf.aside_rows(&branch(), "=b", 10)).await);
    let page = ParkedQuery { limit: 10, ..ParkedQuery::default() };
    closed("parked", in_time("parked", shelf.parked(page)).await);
    closed("cancel", in_time("cancel", shelf.cancel(Scheduled::Id(parked))).await);
    let key = Scheduled::Key("k".into());
    closed("reschedule", in_time("reschedule", shelf.reschedule(key, after(&kind, 1))).await);
    closed("dead_letters", in_time("dead_letters", shelf.dead_letters(all())).await);
    closed("replay", in_time("replay", shelf.replay(all(), false)).await);
    closed("purge", in_time("purge", shelf.purge(all())).await);
    // What fell due after the end stays where it is.
    kind.clock().advance(Duration::from_secs(60));
    kind.until_holds(&log, 3).await;
    drop((log, shelf, start));
    let kind = kind.reopen().await;
    assert_eq!(kind.shelf().dead_letters(all()).await.unwrap().rows.len(), 1, "nothing of that has happened");
    let start = kind.log().open_branch(&branch(), Start::Latest).await.unwrap();
    assert_eq!(start.lanes.len(), 1);
    assert!(start.cursor.single() == Position(0) || !kind.places(), "{:?}", start.cursor);
}
