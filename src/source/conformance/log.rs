//! What a [`Log`] must do.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::shelf::letter;
use super::{
    KEPT_FOR, KEY_WINDOW, Kind, append, branch, came, closed, end, finish, id_of, in_time, keyed, payloads, positions,
    read, settle_to, until_end, until_epochs, until_lag, write,
};
use crate::record::{Position, Record, RecordId};
use crate::source::{
    AdmitError, Admitted, BranchName, DeadQuery, DeadReason, Fate, Found, Log, LogError, Scheduled, Settlement, Start,
    Write,
};

pub(super) async fn records_come_in_the_order_of_the_log_each_once<K: Kind>(kind: K) {
    let log = kind.log();
    log.admit(["0", "1", "2"].map(|payload| write(Some("k"), payload)).to_vec()).await.unwrap();
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    let first = finish(&kind, &mut *start.subscription, 3).await;
    came(&kind, &first, &["0", "1", "2"]);
    log.admit(vec![write(Some("k"), "3")]).await.unwrap();
    let last = finish(&kind, &mut *start.subscription, 1).await;
    came(&kind, &last, &["3"]);
    assert!(positions(&[first.clone(), last].concat()).is_sorted_by(|one, other| one < other));
    if kind.places() {
        assert_eq!(positions(&first), [1, 2, 3].map(Position));
        until_end(&log, 4).await;
    }
    assert!(futures::poll!(start.subscription.next(1, usize::MAX)).is_pending());
}

pub(super) async fn a_batch_has_as_many_records_and_bytes_as_asked_for<K: Kind>(kind: K) {
    let log = kind.log();
    append(&log, &["0", "1", "2", "3"]).await;
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    let mut sizes = Vec::new();
    while sizes.iter().sum::<usize>() < 4 {
        sizes.push(in_time("next", start.subscription.next(3, usize::MAX)).await.unwrap().len());
    }
    assert!(sizes.iter().all(|size| (1..=3).contains(size)), "{sizes:?}");
    // How many messages of a queue are there is its own affair.
    assert!(sizes == [3, 1] || !kind.places(), "{sizes:?}");
    drop(start);
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    let entries = in_time("next", start.subscription.next(4, 1)).await.unwrap();
    assert_eq!(entries.len(), 1, "one record is always given");
}

pub(super) async fn a_reader_waits_for_what_comes_and_loses_nothing_when_it_gives_up<K: Kind>(kind: K) {
    let log = kind.log();
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    let none = futures::poll!(start.subscription.next(1, usize::MAX));
    assert!(none.is_pending());
    let (entries, _) = tokio::join!(read(&mut *start.subscription, 1), append(&log, &["late"]));
    assert_eq!(payloads(&entries), ["late"].map(Bytes::from));
}

pub(super) async fn branches_read_and_settle_apart<K: Kind>(kind: K) {
    let (log, shelf, other) = (kind.log(), kind.shelf(), BranchName::new("other", Some("eu")));
    append(&log, &["0", "1"]).await;
    let mut one = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    if !kind.places() {
        let second = log.open_branch(&other, Start::Earliest).await;
        assert!(matches!(second, Err(LogError::Unsupported(_))), "it would take the first one's messages");
        assert_eq!(log.branches(), [branch()]);
        assert_eq!(read(&mut *one.subscription, 2).await.len(), 2);
        return;
    }
    let mut two = log.open_branch(&other, Start::Earliest).await.unwrap();
    assert_eq!(read(&mut *one.subscription, 2).await.len(), 2);
    settle_to(&shelf, 2).await;
    assert_eq!(read(&mut *two.subscription, 2).await.len(), 2);
    assert_eq!((log.lag(&branch()).records, log.lag(&other).records), (0, 2));
    let mut known = log.branches();
    known.sort();
    assert_eq!(known, [other, branch()]);
}

pub(super) async fn a_new_branch_starts_where_it_is_told_and_a_known_one_where_it_stopped<K: Kind>(kind: K) {
    let log = kind.log();
    append(&log, &["0", "1", "2"]).await;
    for (name, start, cursor) in
        [("earliest", Start::Earliest, 0), ("latest", Start::Latest, 3), ("after", Start::After(Position(1)), 1)]
    {
        let opened = log.open_branch(&BranchName::new(name, None), start).await.unwrap();
        assert_eq!(opened.cursor.single(), Position(cursor), "{name}");
    }
    log.open_branch(&branch(), Start::Earliest).await.unwrap();
    settle_to(&kind.shelf(), 2).await;
    drop(log);
    let kind = kind.reopen().await;
    let mut start = kind.log().open_branch(&branch(), Start::Latest).await.unwrap();
    assert_eq!(start.cursor.single(), Position(2));
    assert_eq!(payloads(&read(&mut *start.subscription, 1).await), ["2"].map(Bytes::from));
    let latest = kind.log().open_branch(&BranchName::new("latest", None), Start::Earliest).await.unwrap();
    assert_eq!(latest.cursor.single(), Position(3), "it is known, though it never settled anything");
}

pub(super) async fn writes_of_one_call_stand_together_in_their_order<K: Kind>(kind: K) {
    let log = kind.log();
    let calls = (0..20).map(|call| {
        let key = call.to_string();
        log.admit((0..10).map(|number| write(Some(&key), &(call * 10 + number).to_string())).collect())
    });
    for admitted in futures::future::join_all(calls).await {
        let positions: Vec<u64> = admitted
            .unwrap()
            .iter()
            .map(|one| match one {
                Admitted::Appended { position, .. } => position.0,
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(!kind.places() || positions.windows(2).all(|pair| pair[1] == pair[0] + 1), "{positions:?}");
    }
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    let entries = finish(&kind, &mut *start.subscription, 200).await;
    for call in 0..20 {
        let key = call.to_string();
        let of_call: Vec<_> =
            entries.iter().filter(|entry| entry.record.key.as_deref() == Some(&key)).cloned().collect();
        let expected: Vec<String> = (0..10).map(|number| (call * 10 + number).to_string()).collect();
        came(&kind, &of_call, &expected.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

pub(super) async fn what_has_no_end_comes_again_after_a_restart_and_each_key_in_its_order<K: Kind>(kind: K) {
    let log = kind.log();
    let all: Vec<String> = (0..15).map(|number| number.to_string()).collect();
    for (number, payload) in all.iter().enumerate() {
        log.admit(vec![write(Some(["a", "b", "c"][number % 3]), payload)]).await.unwrap();
    }
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    let mut entries = read(&mut *start.subscription, 5).await;
    entries.truncate(2);
    end(&kind.shelf(), &entries).await;
    drop((log, start));
    let kind = kind.reopen().await;
    let mut start = kind.log().open_branch(&branch(), Start::Latest).await.unwrap();
    entries.extend(finish(&kind, &mut *start.subscription, 13).await);
    for (number, key) in ["a", "b", "c"].into_iter().enumerate() {
        let of_key: Vec<_> = entries.iter().filter(|entry| entry.record.key.as_deref() == Some(key)).cloned().collect();
        let expected: Vec<&str> = all.iter().skip(number).step_by(3).map(String::as_str).collect();
        came(&kind, &of_key, &expected);
    }
    assert!(futures::poll!(start.subscription.next(1, usize::MAX)).is_pending(), "what has ended does not come again");
}

pub(super) async fn what_is_entered_in_turn_has_its_place_before_it_is_durable<K: Kind>(kind: K) {
    let log = kind.log();
    let mut entered = Vec::new();
    for number in 0..50 {
        let key = |number: u8| {
            let keyed = keyed(&format!("key {number}"), number, &number.to_string());
            Write { record: Record { key: Some("k".into()), ..keyed.record.clone() }, ..keyed }
        };
        // Every third waits for the key of the one before.
        let write = if number % 3 == 2 { key(number - 1) } else { key(number) };
        entered.push(log.enter(vec![write]).await.unwrap());
    }
    // Whoever is heard first, the order is that of entering.
    for waiting in entered.into_iter().rev() {
        waiting.await.unwrap();
    }
    let expected: Vec<String> = (0..50).filter(|number| number % 3 != 2).map(|number| number.to_string()).collect();
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    let entries = finish(&kind, &mut *start.subscription, expected.len()).await;
    came(&kind, &entries, &expected.iter().map(String::as_str).collect::<Vec<_>>());
}

pub(super) async fn the_same_idempotency_key_is_one_record_and_gives_the_first_answer<K: Kind>(kind: K) {
    let log = kind.log();
    let first = log.admit(vec![keyed("once", 1, "0")]).await.unwrap();
    let Admitted::Appended { id, written_at, .. } = first[0] else { panic!("{first:?}") };
    let again = Admitted::Repeated { id, written_at, due_at: None };
    assert_eq!(log.admit(vec![keyed("once", 1, "0")]).await.unwrap(), std::slice::from_ref(&again));
    assert_eq!(log.admit(vec![keyed("once", 2, "1")]).await.unwrap(), [Admitted::KeyReused]);
    let both = log.admit(vec![keyed("twice", 1, "2"), keyed("twice", 1, "2")]).await.unwrap();
    assert!(matches!(both[..], [Admitted::Appended { .. }, Admitted::Repeated { .. }]), "{both:?}");
    let due_at = Some(kind.clock().now().saturating_add(Duration::from_secs(60)));
    let parked = log.admit(vec![Write { due_at, ..keyed("later", 1, "3") }]).await.unwrap();
    kind.until_holds(&log, 2).await;
    drop(log);
    let kind = kind.reopen().await;
    assert_eq!(kind.log().admit(vec![keyed("once", 1, "0")]).await.unwrap(), [again]);
    let repeated = kind.log().admit(vec![Write { due_at, ..keyed("later", 1, "3") }]).await.unwrap();
    assert_eq!(id_of(&repeated[0]), id_of(&parked[0]));
    assert!(matches!(repeated[0], Admitted::Repeated { due_at: found, .. } if found == due_at), "{repeated:?}");
}

pub(super) async fn the_same_key_at_once_is_one_record<K: Kind>(kind: K) {
    let log = kind.log();
    let answers = futures::future::join_all((0..100).map(|_| log.admit(vec![keyed("once", 1, "0")]))).await;
    let appended = answers.iter().filter(|answer| matches!(answer.as_ref().unwrap()[0], Admitted::Appended { .. }));
    assert_eq!(appended.count(), 1);
    let first = id_of(&answers[0].as_ref().unwrap()[0]);
    assert!(answers.iter().all(|answer| id_of(&answer.as_ref().unwrap()[0]) == first));
    kind.until_holds(&log, 1).await;
}

pub(super) async fn lag_tells_how_much_is_left_and_how_old_it_is<K: Kind>(kind: K) {
    let log = kind.log();
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    assert_eq!((log.lag(&branch()).records, log.lag(&branch()).oldest), (0, None));
    let first = kind.clock().now();
    append(&log, &["0"]).await;
    kind.clock().advance(Duration::from_secs(5));
    let second = kind.clock().now();
    append(&log, &["1"]).await;
    // What nobody has read yet is not known everywhere by its age.
    let mut entries = read(&mut *start.subscription, 2).await;
    let lag = until_lag(&log, |lag| (lag.records, lag.oldest) == (2, Some(first))).await;
    entries.retain(|entry| entry.record.payload == "0");
    end(&kind.shelf(), &entries).await;
    let less = until_lag(&log, |lag| (lag.records, lag.oldest) == (1, Some(second))).await;
    assert!(less.bytes > 0 && less.bytes < lag.bytes, "{less:?} {lag:?}");
    if kind.places() {
        assert_eq!((lag.cursor.single(), less.cursor.single()), (Position(0), Position(1)));
    }
}

pub(super) async fn ids_rise_with_the_log<K: Kind>(kind: K) {
    let log = kind.log();
    let mut last = None;
    for _ in 0..3 {
        for admitted in append(&log, &["0", "1", "2"]).await {
            let id = Some(id_of(&admitted));
            assert!(id > last);
            last = id;
        }
        // A clock that steps back takes no id with it.
        let back = kind.clock().now().as_millis() - 10_000;
        kind.clock().set(crate::clock::Timestamp::from_millis(back));
    }
}

pub(super) async fn a_write_is_found_wherever_it_is<K: Kind>(kind: K) {
    let (log, shelf) = (kind.log(), kind.shelf());
    log.open_branch(&branch(), Start::Earliest).await.unwrap();
    // One that has not passed anything keeps the records from being forgotten.
    log.open_branch(&BranchName::new("behind", None), Start::Earliest).await.unwrap();
    let ids: Vec<RecordId> = append(&log, &["0", "1", "2"]).await.iter().map(id_of).collect();
    let fate = |id| {
        let found = log.find(id);
        async move {
            match found.await.unwrap() {
                Some(Found::InLog { branches, .. }) => {
                    branches.into_iter().find(|(name, _)| *name == branch()).unwrap().1
                }
                other => panic!("{other:?}"),
            }
        }
    };
    assert_eq!(fate(ids[0]).await, Fate::Pending);
    let settlement = Settlement {
        frontier: Position(2).into(),
        dropped: vec![(Position(2), "filter".into())],
        ..Settlement::default()
    };
    shelf.settle(&branch(), settlement).await.unwrap();
    assert!(matches!(fate(ids[0]).await, Fate::Finished { .. }));
    assert_eq!(fate(ids[1]).await, Fate::Dropped { reason: "filter".into() });
    assert_eq!(fate(ids[2]).await, Fate::Pending);
    let due_at = kind.clock().now().saturating_add(Duration::from_secs(60));
    let parked = log.admit(vec![Write { due_at: Some(due_at), ..write(None, "3") }]).await.unwrap();
    let id = id_of(&parked[0]);
    assert!(matches!(log.find(id).await.unwrap(), Some(Found::Parked { due_at: found, .. }) if found == due_at));
    assert_eq!(shelf.cancel(Scheduled::Id(id)).await.unwrap(), 1);
    assert_eq!(log.find(id).await.unwrap(), Some(Found::Cancelled));
    assert_eq!(log.find(RecordId::from_bytes([9; 16])).await.unwrap(), None);
}

pub(super) async fn epochs_are_numbered_and_kept<K: Kind>(kind: K) {
    let log = kind.log();
    let first = log.put_epoch(Bytes::from_static(b"one")).await.unwrap();
    log.open_branch(&branch(), Start::Earliest).await.unwrap();
    append(&log, &["0", "1"]).await;
    let second = log.put_epoch(Bytes::from_static(b"two")).await.unwrap();
    assert_eq!((first.number, first.after), (1, Position(0)));
    assert_eq!((second.number, second.after), (2, Position(2)));
    drop(log);
    let kind = kind.reopen().await;
    assert_eq!(kind.log().epochs(), [first, second], "the branch is still before the second");
    assert_eq!(kind.log().put_epoch(Bytes::from_static(b"three")).await.unwrap().number, 3);
}

pub(super) async fn an_epoch_goes_when_no_cursor_and_no_row_needs_it_and_the_newest_stays<K: Kind>(kind: K) {
    let (log, shelf) = (kind.log(), kind.shelf());
    log.open_branch(&branch(), Start::Earliest).await.unwrap();
    for name in ["one", "two", "three", "four"] {
        log.put_epoch(Bytes::from(name)).await.unwrap();
        append(&log, &[name]).await;
    }
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    let entries = read(&mut *start.subscription, 2).await;
    let dead = vec![letter(&kind, &entries[1], DeadReason::Refused, false)];
    let settlement = Settlement { dead, frontier: Position(3).into(), ..Settlement::default() };
    shelf.settle(&branch(), settlement).await.unwrap();
    // The second record may be sent again, so the revision of its time stays, and all after it.
    until_epochs(&log, &[2, 3, 4]).await;
    assert_eq!(shelf.purge(DeadQuery { limit: 9, ..DeadQuery::default() }).await.unwrap(), 1);
    settle_to(&shelf, 3).await;
    // The record after the third is of the fourth revision.
    until_epochs(&log, &[4]).await;
    drop((log, shelf, start));
    let kind = kind.reopen().await;
    let log = kind.log();
    until_epochs(&log, &[4]).await;
    settle_to(&kind.shelf(), 4).await;
    assert_eq!(log.put_epoch(Bytes::from_static(b"five")).await.unwrap().number, 5);
    until_epochs(&log, &[5]).await;
}

pub(super) async fn a_branch_goes_on_under_another_name_and_is_forgotten_whole<K: Kind>(kind: K) {
    let (log, to) = (kind.log(), BranchName::new("to", None));
    append(&log, &["0", "1"]).await;
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    let entries = read(&mut *start.subscription, 2).await;
    end(&kind.shelf(), &entries[..1]).await;
    drop(start);
    log.rename_branch(&branch(), &to).await.unwrap();
    log.rename_branch(&branch(), &to).await.unwrap();
    drop(log);
    let kind = kind.reopen().await;
    let log = kind.log();
    assert_eq!(log.branches(), std::slice::from_ref(&to));
    let mut start = log.open_branch(&to, Start::Latest).await.unwrap();
    assert!(start.cursor.single() == Position(1) || !kind.places(), "{:?}", start.cursor);
    assert_eq!(read(&mut *start.subscription, 1).await[0].record.id, entries[1].record.id);
    drop(start);
    log.forget_branch(&to).await.unwrap();
    assert!(log.branches().is_empty());
    let mut start = log.open_branch(&to, Start::Latest).await.unwrap();
    if kind.places() {
        assert_eq!(start.cursor.single(), Position(2), "it is a new one");
    } else {
        let left = read(&mut *start.subscription, 1).await;
        assert_eq!(left[0].record.id, entries[1].record.id, "a queue's messages are its owner's");
    }
}

pub(super) async fn an_idempotency_key_is_exact_within_its_window_and_free_after_it<K: Kind>(kind: K) {
    let log = kind.log();
    let first = id_of(&log.admit(vec![keyed("once", 1, "0")]).await.unwrap()[0]);
    let started = kind.clock().now();
    // To its last millisecond it stands for the first, in the run and after a restart.
    kind.clock().set(started.saturating_add(KEY_WINDOW));
    assert_eq!(id_of(&log.admit(vec![keyed("once", 1, "0")]).await.unwrap()[0]), first);
    assert_eq!(log.admit(vec![keyed("once", 2, "1")]).await.unwrap(), [Admitted::KeyReused]);
    drop(log);
    let kind = kind.reopen().await;
    let log = kind.log();
    kind.tidy().await;
    assert_eq!(id_of(&log.admit(vec![keyed("once", 1, "0")]).await.unwrap()[0]), first);
    kind.until_holds(&log, 1).await;
    kind.clock().advance(Duration::from_millis(1));
    // Whatever it is used for then, it is a new record, and the window is that one's.
    let second = log.admit(vec![keyed("once", 2, "1")]).await.unwrap();
    assert!(matches!(second[0], Admitted::Appended { .. }), "{second:?}");
    assert_eq!(log.admit(vec![keyed("once", 1, "0")]).await.unwrap(), [Admitted::KeyReused]);
    kind.clock().advance(KEY_WINDOW);
    kind.tidy().await;
    drop(log);
    let kind = kind.reopen().await;
    let log = kind.log();
    assert_eq!(id_of(&log.admit(vec![keyed("once", 2, "1")]).await.unwrap()[0]), id_of(&second[0]));
    kind.clock().advance(Duration::from_millis(1));
    let third = log.admit(vec![keyed("once", 2, "1")]).await.unwrap();
    assert!(matches!(third[0], Admitted::Appended { .. }), "{third:?}");
    kind.until_holds(&log, 3).await;
}

/// Appends the numbers one by one.
async fn append_numbers(log: &Arc<dyn Log>, numbers: std::ops::RangeInclusive<u64>) {
    for number in numbers {
        append(log, &[&format!("\"{number:0>100}\"")]).await;
    }
}

/// Where a new branch that asks for everything begins; from there to `end` every record must be there.
async fn first_kept(log: &Arc<dyn Log>, end: u64) -> u64 {
    let new = BranchName::new("new", None);
    let mut start = log.open_branch(&new, Start::Earliest).await.unwrap();
    let first = start.cursor.single().0;
    let found = read(&mut *start.subscription, usize::try_from(end - first).unwrap()).await;
    let positions: Vec<u64> = found.iter().map(|entry| entry.position.0).collect();
    assert_eq!(positions, (first + 1..=end).collect::<Vec<_>>());
    let numbers: Vec<Bytes> = (first + 1..=end).map(|number| format!("\"{number:0>100}\"").into()).collect();
    assert_eq!(payloads(&found), numbers);
    log.forget_branch(&new).await.unwrap();
    first
}

pub(super) async fn what_is_finished_goes_by_size_and_what_is_not_stays<K: Kind>(kind: K) {
    let log = kind.log();
    log.open_branch(&branch(), Start::Earliest).await.unwrap();
    append_numbers(&log, 1..=200).await;
    kind.tidy().await;
    assert_eq!(first_kept(&log, 200).await, 0, "nothing is finished");
    settle_to(&kind.shelf(), 100).await;
    kind.tidy().await;
    let first = first_kept(&log, 200).await;
    assert!((1..=100).contains(&first), "of what is finished as much goes as is over the size: {first}");
    settle_to(&kind.shelf(), 200).await;
    kind.tidy().await;
    assert!(first_kept(&log, 200).await > 100, "all is finished, and still more than the size is kept");
    drop(log);
    let kind = kind.reopen().await;
    let log = kind.log();
    append_numbers(&log, 201..=201).await;
    until_end(&log, 201).await;
    assert!(first_kept(&log, 201).await > 100, "what was forgotten does not come back");
    assert_eq!(log.lag(&branch()).records, 1);
}

pub(super) async fn what_is_finished_goes_by_age_and_what_is_not_stays<K: Kind>(kind: K) {
    let log = kind.log();
    log.open_branch(&branch(), Start::Earliest).await.unwrap();
    append_numbers(&log, 1..=30).await;
    kind.clock().advance(KEPT_FOR);
    append_numbers(&log, 31..=60).await;
    settle_to(&kind.shelf(), 5).await;
    kind.clock().advance(Duration::from_secs(1));
    kind.tidy().await;
    assert!(first_kept(&log, 60).await <= 5, "what is old and not finished stays");
    settle_to(&kind.shelf(), 40).await;
    kind.tidy().await;
    let first = first_kept(&log, 60).await;
    assert!((6..=40).contains(&first), "what is old and finished goes, the rest stays: {first}");
}

pub(super) async fn a_closed_log_says_so_and_answers_whoever_waits<K: Kind>(kind: K) {
    let log = kind.log();
    let other = BranchName::new("other", None);
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    append(&log, &["0"]).await;
    let id = read(&mut *start.subscription, 1).await[0].record.id;
    let reader = if kind.places() {
        let mut behind = log.open_branch(&other, Start::Latest).await.unwrap();
        Some(tokio::spawn(async move { behind.subscription.next(100, usize::MAX).await }))
    } else {
        None
    };
    // Some of these are early enough and some are not; each hears which.
    let racing: Vec<_> = (0..200)
        .map(|number: u32| {
            let log = kind.log();
            tokio::spawn(async move { log.admit(vec![keyed(&number.to_string(), 1, "1")]).await })
        })
        .collect();
    kind.close().await;
    let mut accepted = 1;
    for admit in racing {
        match in_time("an admit that raced", admit).await.unwrap() {
            Ok(_) => accepted += 1,
            Err(AdmitError::Closed { .. } | AdmitError::Unknown { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    // It was given records that came before the end, or heard of the end.
    if let Some(reader) = reader {
        let heard = in_time("a reader", reader).await.unwrap();
        assert!(matches!(heard, Ok(_) | Err(LogError::Closed(_))), "{heard:?}");
    }
    let admitted = in_time("admit", log.admit(vec![write(None, "2")])).await;
    assert!(matches!(admitted, Err(AdmitError::Closed { .. })), "{admitted:?}");
    let next = in_time("next", async {
        while !start.subscription.next(100, usize::MAX).await?.is_empty() {}
        Ok::<_, LogError>(())
    });
    closed("next", next.await);
    closed("open_branch", in_time("open_branch", log.open_branch(&branch(), Start::Earliest)).await);
    let new = BranchName::new("new", None);
    closed("open_branch", in_time("open_branch", log.open_branch(&new, Start::Earliest)).await);
    closed("forget_branch", in_time("forget_branch", log.forget_branch(&other)).await);
    closed("rename_branch", in_time("rename_branch", log.rename_branch(&other, &new)).await);
    closed("find", in_time("find", log.find(id)).await);
    closed("put_epoch", in_time("put_epoch", log.put_epoch(Bytes::from_static(b"files"))).await);
    in_time("a second close", kind.close()).await;
    drop((log, start));
    let kind = kind.reopen().await;
    let name = if kind.places() { BranchName::new("all", None) } else { branch() };
    let mut start = kind.log().open_branch(&name, Start::Earliest).await.unwrap();
    // As many as were accepted are there.
    read(&mut *start.subscription, usize::try_from(accepted).unwrap()).await;
}
