//! Dead letters and what follows from them: replay, overtaken, block, full, skip, crashes.

use super::*;
use crate::pipeline::branch::Skip;
use crate::pipeline::branch::aside::{Prepare, again};
use crate::pipeline::revisions::InForce;
use crate::source::{AsideRow, DeadReason, Entry, RowKey, Settlement};

#[tokio::test(start_paused = true)]
async fn a_replayed_letter_goes_to_its_branch_again_and_an_overtaken_one_only_by_force() {
    let bench = Bench::new(IMPATIENT).await;
    bench.target.judge(|number| (number < 2).then_some(Verdict::Never));
    bench.write(0, Some("moved-on")).await;
    bench.write(1, Some("still")).await;
    bench.write(2, Some("moved-on")).await;
    bench.drained().await;
    bench.target.judge(|_| None);
    let letters = bench.dead().await;
    let marks: Vec<(u64, bool)> = letters.iter().map(|letter| (number(&letter.record), letter.overtaken)).collect();
    assert_eq!(marks, [(0, true), (1, false)]);
    let all = DeadQuery { limit: 10, ..DeadQuery::default() };
    let replayed = bench.log.replay(all.clone(), false).await.unwrap();
    assert_eq!((replayed.replayed, replayed.overtaken), (1, 1));
    bench.drained().await;
    assert_eq!(bench.target.taken(), [2, 1]);
    bench.log.replay(all, true).await.unwrap();
    bench.drained().await;
    assert_eq!(bench.target.taken(), [2, 1, 0]);
    assert!(bench.dead().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn replayed_letters_go_at_their_rate_in_order_and_hold_up_no_other_record() {
    let mut bench = Bench::new("  dead_letters: { replay: 50/s }\n").await;
    bench.handle.stop().await;
    let key = |number: u64| number.is_multiple_of(2).then(|| format!("k{}", number % 10));
    for number in 0..1_000 {
        bench.write(number, key(number).as_deref()).await;
    }
    let mut opened = bench.log.open_branch(&bench.branch(), Start::Earliest).await.unwrap();
    let letter = |entry: Entry| DeadLetter {
        row: RowKey { position: entry.position, child: 0 },
        branch: bench.branch(),
        at: bench.clock.now(),
        reason: DeadReason::Refused,
        attempts: 1,
        last_error: "".into(),
        stage: "sink".into(),
        revision: "".into(),
        record: entry.record,
        rendered: None,
        overtaken: false,
    };
    let entries = opened.subscription.next(1_000, usize::MAX).await.unwrap();
    let frontier = entries.iter().map(|entry| entry.position).collect();
    let dead = entries.into_iter().map(letter).collect();
    bench.log.settle(&bench.branch(), Settlement { frontier, dead, ..Settlement::default() }).await.unwrap();
    bench.restart().await;
    let began = Instant::now();
    let all = DeadQuery { limit: 10_000, ..DeadQuery::default() };
    assert_eq!(bench.log.replay(all, false).await.unwrap().replayed, 1_000);
    sleep(Duration::from_secs(5)).await;
    let taken = bench.target.taken().len();
    assert!((250..=310).contains(&taken), "{taken} in five seconds at 50/s with a burst of 50");
    let now = Instant::now();
    bench.write(1_001, None).await;
    bench.until("a new record", |bench| bench.target.taken().contains(&1_001)).await;
    assert!(now.elapsed() < Duration::from_secs(1), "{:?}", now.elapsed());
    bench.restart().await;
    bench.drained().await;
    let took = began.elapsed().as_secs_f64();
    assert!((17.0..24.0).contains(&took), "{took} s for a thousand");
    let mut of_keys: std::collections::BTreeMap<String, Vec<u64>> = std::collections::BTreeMap::new();
    for number in bench.target.taken() {
        of_keys.entry(key(number).unwrap_or_default()).or_default().push(number);
    }
    assert_eq!(of_keys.values().map(Vec::len).sum::<usize>(), 1_001);
    of_keys.iter().filter(|(key, _)| !key.is_empty()).for_each(|(key, numbers)| assert!(numbers.is_sorted(), "{key}"));
}

#[tokio::test(start_paused = true)]
async fn many_replayed_letters_of_one_key_come_in_order() {
    let bench = Bench::new(IMPATIENT).await;
    bench.target.judge(|_| Some(Verdict::Never));
    for number in 0..90 {
        bench.write(number, Some("k")).await;
    }
    bench.drained().await;
    bench.target.judge(|_| None);
    for _ in 0..9 {
        bench.log.replay(DeadQuery { limit: 10, ..DeadQuery::default() }, true).await.unwrap();
        sleep(Duration::from_millis(2)).await;
    }
    bench.drained().await;
    assert_eq!(bench.target.taken(), (0..90).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn with_block_a_dead_letter_holds_its_key_until_it_is_gone() {
    let mut bench = Bench::new("  dead_letters: { on_dead_letter: block }\n").await;
    bench.target.judge(|number| (number == 0).then_some(Verdict::Never));
    for number in 0..5 {
        bench.write(number, Some("held")).await;
    }
    bench.write(5, Some("free")).await;
    sleep(Duration::from_secs(10)).await;
    bench.write(6, Some("held")).await;
    sleep(Duration::from_secs(10)).await;
    assert_eq!(bench.target.taken(), [5], "what waited in memory is held too");
    assert_eq!(bench.lag(), 0, "the frontier has passed");
    bench.restart().await;
    sleep(Duration::from_secs(10)).await;
    assert_eq!(bench.target.taken(), [5], "over a restart too");
    bench.log.purge(DeadQuery { limit: 10, ..DeadQuery::default() }).await.unwrap();
    bench.drained().await;
    assert_eq!(bench.target.taken(), [5, 1, 2, 3, 4, 6]);
}

#[tokio::test(start_paused = true)]
async fn full_dead_letters_pause_the_branch_until_there_is_room() {
    let bench = Bench::new("  dead_letters: { size: 2KiB }\n").await;
    bench.target.judge(|number| (number % 4 == 0).then_some(Verdict::Never));
    for number in 0..100 {
        bench.write(number, None).await;
    }
    bench.until("it is full", |bench| bench.pause() == Some("dead_letters_full")).await;
    sleep(Duration::from_secs(60)).await;
    let dead = bench.dead().await.len();
    assert!((1..25).contains(&dead), "{dead}");
    for _ in 0..10 {
        bench.log.purge(DeadQuery { limit: 1_000, ..DeadQuery::default() }).await.unwrap();
        sleep(Duration::from_secs(1)).await;
    }
    bench.drained().await;
    assert_eq!(bench.target.taken().len(), 75);
}

#[tokio::test(start_paused = true)]
async fn a_skip_ends_what_blocks() {
    let bench = Bench::new(IMPATIENT).await;
    bench.target.judge(|number| (number < 2).then_some(Verdict::Backoff));
    let first = bench.write(0, Some("a")).await;
    let second = bench.write(1, Some("a")).await;
    bench.write(2, Some("a")).await;
    sleep(Duration::from_secs(5)).await;
    assert_eq!(skip(&bench, Skip::Head).await, first);
    assert_eq!(skip(&bench, Skip::Record(second)).await, second);
    bench.drained().await;
    assert_eq!(bench.target.taken(), [2]);
    assert!(bench.dead().await.iter().all(|letter| letter.reason == DeadReason::Skipped));
}

/// Skips, and again while the delivery is under way.
async fn skip(bench: &Bench, which: Skip) -> RecordId {
    loop {
        if let Some(id) = bench.handle.skip(which).await {
            return id;
        }
        sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_panic_on_a_row_of_the_shelf_is_that_records_error() {
    let bench = Bench::new(IMPATIENT).await;
    bench.handle.stop().await;
    bench.write(0, None).await;
    let mut opened = bench.log.open_branch(&bench.branch(), Start::Earliest).await.unwrap();
    let entry = opened.subscription.next(1, usize::MAX).await.unwrap().remove(0);
    let row = AsideRow {
        row: RowKey { position: entry.position, child: 0 },
        lane: "#1/0".into(),
        record: entry.record,
        rendered: None,
        attempts: 1,
        first_failed: bench.clock.now(),
        next_try: bench.clock.now(),
        last_error: "".into(),
        replayed: false,
    };
    let (branch, plan) = (&bench.plan.branches[0], &bench.plan);
    let panics: Prepare = |_, _, _, _, _| panic!("a stage that is not well");
    let (parts, dropped) = again(row, Arc::clone(branch), Arc::clone(plan), InForce::single(Arc::clone(plan)), panics)
        .await
        .expect("no fault of the log");
    assert!(dropped.is_none());
    let stillborn = parts.into_iter().next().unwrap().unwrap_err();
    assert_eq!(stillborn.reason, DeadReason::Script);
    assert!(stillborn.error.contains("panicked"), "{}", stillborn.error);
}

#[tokio::test(start_paused = true)]
async fn an_operators_pause_outlives_a_restart() {
    let mut bench = Bench::new(IMPATIENT).await;
    bench.handle.pause("maintenance".to_owned()).await;
    bench.until("it is paused", |bench| bench.pause() == Some("operator")).await;
    bench.restart().await;
    bench.write(0, None).await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!((bench.pause(), bench.target.taken().len()), (Some("operator"), 0));
    bench.handle.resume().await;
    bench.drained().await;
}

#[tokio::test(start_paused = true)]
async fn the_third_mark_ends_a_record_and_retries_make_no_marks() {
    let mut bench = Bench::new(IMPATIENT).await;
    bench.handle.stop().await;
    for number in 1..=3 {
        bench.write(number, None).await;
    }
    let mark = |position| Settlement { mark: Some(crate::record::Position(position)), ..Settlement::default() };
    bench.log.settle(&bench.branch(), mark(1)).await.unwrap();
    bench.log.settle(&bench.branch(), mark(1)).await.unwrap();
    bench.log.settle(&bench.branch(), mark(2)).await.unwrap();
    bench.target.judge(|_| Some(Verdict::Down));
    bench.restart().await;
    sleep(Duration::from_secs(3_600)).await;
    bench.target.judge(|_| None);
    bench.drained().await;
    let dead = bench.dead().await;
    assert_eq!(
        dead.iter().map(|letter| (number(&letter.record), letter.reason)).collect::<Vec<_>>(),
        [(1, DeadReason::Crash)]
    );
    assert_eq!(bench.target.taken_sorted(), [2, 3]);
}
