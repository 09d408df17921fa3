//! Order per key through retries, set-aside keys and restarts; nothing lost, nothing twice without a restart.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

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

#[derive(Clone, Debug)]
enum Step {
    Write(usize),
    /// This key fails so often in a row, with this verdict.
    Fail(usize, u8, bool),
    Wait(u64),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..4usize).prop_map(Step::Write),
        2 => (0..4usize, 1..12u8, any::<bool>()).prop_map(|(key, times, down)| Step::Fail(key, times, down)),
        3 => (0..4_000u64).prop_map(Step::Wait),
        1 => Just(Step::Restart),
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
    let mut bench = Bench::new("  retry: { attempts: 100000, backoff: { first: 100ms, max: 3s } }\n").await;
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
    let (mut written, mut restarts) = (Vec::new(), 0);
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
        }
    }
    bench.drained().await;
    let taken = bench.target.taken();
    assert_eq!(taken.iter().copied().collect::<BTreeSet<_>>(), written.iter().copied().collect::<BTreeSet<_>>());
    if restarts == 0 {
        assert_eq!(taken.len(), written.len(), "nothing twice: {taken:?}");
    }
    for key in 0..3 {
        let mut seen = BTreeSet::new();
        let first: Vec<u64> =
            taken.iter().copied().filter(|number| number % 10 == key && seen.insert(*number)).collect();
        assert!(first.is_sorted(), "key {key}: {first:?}");
    }
    assert!(bench.dead().await.is_empty());
}
