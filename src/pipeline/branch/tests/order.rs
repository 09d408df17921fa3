//! Order per key through retries, set-aside keys and restarts; nothing lost, nothing twice without a restart.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::source::{AsideRow, DeadReason, Entry, RowKey, Settlement};

#[tokio::test(start_paused = true)]
async fn a_key_that_keeps_failing_is_set_aside_and_comes_back_in_order() {
    let bench = Bench::new("  retry: { attempts: 1000, backoff: { first: 1s, max: 20s } }\n").await;
    bench.target.judge(|number| (number % 10 == 0).then_some(Verdict::Backoff));
    // Number n * 10 is of the key that fails, all others are not.
    for number in 0..500 {
        bench.write(number, Some(if number % 10 == 0 { "bad" } else { "good" })).await;
        sleep(Duration::from_millis(100)).await;
    }
    bench.until("the frontier has passed", |bench| bench.lag() == 0).await;
    assert_eq!(bench.aside(), 50);
    assert_eq!(bench.status().lanes_aside, 1);
    bench.target.judge(|_| None);
    bench.write(500, Some("bad")).await;
    bench.drained().await;
    let bad: Vec<u64> = bench.target.taken().into_iter().filter(|number| number % 10 == 0).collect();
    assert_eq!(bad, (0..=50).map(|ten| ten * 10).collect::<Vec<_>>());
    assert!(bench.dead().await.is_empty());
    bench.write(510, Some("bad")).await;
    bench.drained().await;
    assert_eq!(bench.status().lanes_aside, 0);
}

#[tokio::test(start_paused = true)]
async fn without_ordering_a_record_waits_for_no_other_of_its_key() {
    let mut bench =
        Bench::new("  ordering: none\n  retry: { attempts: 1000, backoff: { first: 1s, max: 2s } }\n").await;
    bench.target.judge(|number| (number == 1 || number == 5).then_some(Verdict::Backoff));
    for number in 0..10 {
        bench.write(number, Some("k")).await;
        sleep(Duration::from_millis(100)).await;
    }
    sleep(Duration::from_secs(60)).await;
    assert_eq!(bench.target.taken().len(), 8);
    bench.restart().await;
    bench.target.judge(|_| None);
    bench.drained().await;
    assert_eq!(bench.target.taken().iter().collect::<BTreeSet<_>>().len(), 10);
}

/// Retries that outlast a test.
const PATIENT: &str = "  retry: { attempts: 100000, backoff: { first: 100ms, max: 3s } }\n";
/// A script that gives every record of the key `a` to the key `b`.
const MOVE: &str = "transform: [ { inline: 'if key == \"a\" { key = \"b\"; }' } ]\n";

/// What the branch has not ended yet, as its log gives it.
async fn entries(bench: &Bench, count: usize) -> Vec<Entry> {
    let mut opened = bench.log.open_branch(&bench.branch(), Start::Earliest).await.unwrap();
    opened.subscription.next(count, usize::MAX).await.unwrap()
}

fn row(entry: &Entry) -> RowKey {
    RowKey { position: entry.position, child: 0 }
}

/// A row of the key `b` that is due.
fn aside(bench: &Bench, entry: &Entry) -> AsideRow {
    let now = bench.clock.now();
    AsideRow {
        row: row(entry),
        lane: "=b".into(),
        record: Arc::clone(&entry.record),
        rendered: None,
        attempts: 3,
        first_failed: now,
        next_try: now,
        last_error: "".into(),
        replayed: false,
    }
}

#[tokio::test(start_paused = true)]
async fn a_script_that_moves_an_unfinished_record_to_a_key_that_is_set_aside_ends_nothing() {
    let mut bench = Bench::new(PATIENT).await;
    bench.handle.stop().await;
    for (number, key) in [(0, "a"), (1, "b"), (2, "b")] {
        bench.write(number, Some(key)).await;
    }
    let entries = entries(&bench, 3).await;
    let aside = entries[1..].iter().map(|entry| aside(&bench, entry)).collect();
    bench.log.settle(&bench.branch(), Settlement { aside, ..Settlement::default() }).await.unwrap();
    bench.restart_as(&format!("{PATIENT}{MOVE}")).await;
    bench.drained().await;
    assert_eq!(bench.target.taken(), [0, 1, 2]);
}

#[tokio::test(start_paused = true)]
async fn what_is_sent_again_after_a_crash_goes_before_the_rows_of_its_key() {
    let mut bench = Bench::new(PATIENT).await;
    bench.handle.stop().await;
    // Far more than is read at once, and the last two are one key's: the first of them was delivered, which nothing says.
    for number in 0..3_000 {
        bench.write(number, (number >= 2_998).then_some("b")).await;
    }
    let entries = entries(&bench, 3_000).await;
    let aside = vec![aside(&bench, &entries[2_999])];
    bench.log.settle(&bench.branch(), Settlement { aside, ..Settlement::default() }).await.unwrap();
    bench.restart().await;
    bench.drained().await;
    let of_b: Vec<u64> = bench.target.taken().into_iter().filter(|number| *number >= 2_998).collect();
    assert_eq!(of_b, [2_998, 2_999], "the old value must not come last");
}

#[tokio::test(start_paused = true)]
async fn a_letter_that_was_replayed_ends_no_older_record_of_its_key() {
    let mut bench = Bench::new(PATIENT).await;
    bench.handle.stop().await;
    for number in 0..3 {
        bench.write(number, Some("k")).await;
    }
    // The second died in a script before the first was through, and was replayed just before a crash.
    let entries = entries(&bench, 3).await;
    let letter = DeadLetter {
        row: row(&entries[1]),
        branch: bench.branch(),
        at: bench.clock.now(),
        reason: DeadReason::Script,
        attempts: 0,
        last_error: "".into(),
        stage: "transform".into(),
        revision: "".into(),
        record: Arc::clone(&entries[1].record),
        rendered: None,
        overtaken: false,
    };
    let dead = Settlement { dead: vec![letter], ..Settlement::default() };
    bench.log.settle(&bench.branch(), dead).await.unwrap();
    bench.log.replay(DeadQuery { limit: 10, ..DeadQuery::default() }, false).await.unwrap();
    bench.restart().await;
    bench.drained().await;
    assert_eq!(bench.target.taken(), [0, 1, 2]);
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize),
    /// This key fails so often in a row, with this verdict.
    Fail(usize, u8, bool),
    Wait(u64),
    Restart,
    /// The same, by a file whose script moves a key's records to another key, or no longer does.
    Edit,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..4usize).prop_map(Step::Write),
        2 => (0..4usize, 1..12u8, any::<bool>()).prop_map(|(key, times, down)| Step::Fail(key, times, down)),
        3 => (0..4_000u64).prop_map(Step::Wait),
        1 => Just(Step::Restart),
        1 => Just(Step::Edit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn first_deliveries_of_a_key_are_in_order_and_none_is_lost(steps in prop::collection::vec(step(), 1..80)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(check(steps));
    }
}

async fn check(steps: Vec<Step>) {
    const KEYS: [Option<&str>; 4] = [Some("a"), Some("b"), Some("c"), None];
    let mut bench = Bench::new(PATIENT).await;
    let failures: Arc<Mutex<BTreeMap<usize, (u8, bool)>>> = Arc::default();
    // A number's last digit is its key.
    bench.target.judge({
        let failures = Arc::clone(&failures);
        move |number| {
            let mut failures = failures.lock();
            let (left, down) = failures.get_mut(&usize::try_from(number % 10).unwrap())?;
            *left = left.checked_sub(1)?;
            Some(if *down { Verdict::Down } else { Verdict::Backoff })
        }
    });
    let (mut written, mut restarts, mut edits) = (Vec::new(), 0, 0);
    for step in steps {
        match step {
            Step::Write(key) => {
                let number = written.len() as u64 * 10 + key as u64;
                bench.write(number, KEYS[key]).await;
                written.push(number);
            }
            Step::Fail(key, times, down) => _ = failures.lock().insert(key, (times, down)),
            Step::Wait(millis) => sleep(Duration::from_millis(millis)).await,
            Step::Restart => {
                restarts += 1;
                bench.restart().await;
            }
            Step::Edit => {
                (restarts, edits) = (restarts + 1, edits + 1);
                bench.restart_as(&format!("{PATIENT}{}", if edits % 2 == 1 { MOVE } else { "" })).await;
            }
        }
    }
    bench.drained().await;
    let taken = bench.target.taken();
    assert_eq!(taken.iter().copied().collect::<BTreeSet<_>>(), written.iter().copied().collect::<BTreeSet<_>>());
    if restarts == 0 {
        assert_eq!(taken.len(), written.len(), "nothing twice: {taken:?}");
    }
    // An edited script gives a record another key: of those two only the rest is in order.
    for key in if edits > 0 { 2..3 } else { 0..3 } {
        let of_key = |numbers: &[u64]| numbers.iter().copied().filter(|number| number % 10 == key).collect::<Vec<_>>();
        let (written, taken) = (of_key(&written), of_key(&taken));
        let mut next = 0;
        for number in &taken {
            let at = written.iter().position(|one| one == number).unwrap();
            assert!(at <= next, "key {key}: {number} came too early, or after a newer one alone: {taken:?}");
            next = at + 1;
        }
        assert_eq!(next, written.len(), "key {key}: an old one came last: {taken:?}");
    }
    assert!(bench.dead().await.is_empty());
}
