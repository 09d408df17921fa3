//! An outage is not a poison record, a poison record is not an outage, and a bad deploy is neither.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::*;
use crate::source::DeadReason;

#[tokio::test(start_paused = true)]
async fn a_night_of_outage_at_high_traffic_costs_no_record_and_holds_no_memory() {
    let bench = Bench::new(IMPATIENT).await;
    bench.target.judge(|_| Some(Verdict::Down));
    for number in 0..20_000 {
        bench.write(number, (number % 3 > 0).then_some(["a", "b", "c"][usize::try_from(number % 3).unwrap()])).await;
    }
    sleep(Duration::from_secs(2 * 3_600)).await;
    assert_eq!(bench.pause(), Some("breaker"));
    assert!(bench.status().in_flight <= 8_192, "{} are held", bench.status().in_flight);
    let asked = bench.target.asked.lock().clone();
    assert!(asked.len() < 5_000, "{} attempts in a night", asked.len());
    assert!(asked.iter().rev().take(50).collect::<BTreeSet<_>>().len() > 2, "probes rotate over keys");
    bench.target.judge(|_| None);
    bench.drained().await;
    assert_eq!(bench.target.taken_sorted(), (0..20_000).collect::<Vec<_>>());
    assert_eq!(bench.dead_numbers().await, [] as [u64; 0]);
    assert_eq!(bench.pause(), None);
}

#[tokio::test(start_paused = true)]
async fn an_outage_with_500s_at_one_record_a_minute_costs_no_record() {
    let bench = Bench::new(IMPATIENT).await;
    bench.write(0, None).await;
    bench.drained().await;
    bench.target.judge(|_| Some(Verdict::Backoff));
    for number in 1..=90 {
        bench.write(number, None).await;
        sleep(Duration::from_secs(60)).await;
    }
    assert_eq!(bench.dead_numbers().await, [] as [u64; 0]);
    // It comes back for a moment only, and again: each outage is one of its own.
    for flap in 0..20 {
        bench.target.judge(move |number| (number % 20 != flap).then_some(Verdict::Backoff));
        sleep(Duration::from_secs(2)).await;
        bench.target.judge(|_| Some(Verdict::Down));
        sleep(Duration::from_secs(600)).await;
    }
    bench.target.judge(|_| None);
    bench.drained().await;
    assert_eq!(bench.target.taken().iter().collect::<BTreeSet<_>>().len() + bench.dead().await.len(), 91);
}

#[tokio::test(start_paused = true)]
async fn a_record_is_given_up_only_after_others_went_through() {
    let bench = Bench::new(IMPATIENT).await;
    bench.target.judge(|number| (number == 0).then_some(Verdict::Backoff));
    bench.write(0, Some("bad")).await;
    sleep(Duration::from_secs(3_600)).await;
    assert_eq!(bench.dead_numbers().await, [] as [u64; 0], "nobody knows yet whose fault it is");
    for number in 1..50 {
        bench.write(number, Some("good")).await;
        sleep(Duration::from_secs(1)).await;
    }
    bench.drained().await;
    let dead = bench.dead().await;
    assert_eq!(dead.iter().map(|letter| number(&letter.record)).collect::<Vec<_>>(), [0]);
    assert_eq!(dead[0].reason, DeadReason::Exhausted);
    assert!(dead[0].attempts >= 3 && &*dead[0].last_error == "as scripted");
}

#[tokio::test(start_paused = true)]
async fn a_record_for_which_the_target_is_always_away_stops_no_other() {
    let bench = Bench::new(IMPATIENT).await;
    bench.target.judge(|number| (number == 7).then_some(Verdict::Down));
    for number in 0..20_000 {
        bench.write(number, None).await;
    }
    bench.drained().await;
    assert_eq!(bench.dead_numbers().await, [7]);
    assert_eq!(bench.target.taken().len(), 19_999);
}

#[tokio::test(start_paused = true)]
async fn a_part_of_the_target_that_is_away_holds_its_own_keys_only_and_costs_no_record() {
    for attempts in [1, 8] {
        let bench =
            Bench::new(&format!("  retry: {{ attempts: {attempts}, backoff: {{ first: 50ms, max: 5s }} }}\n")).await;
        bench.target.judge(|_| Some(Verdict::Down));
        for number in 0..300 {
            bench.write(number, Some(&format!("k{}", number % 30))).await;
        }
        bench.until("the circuit opens", |bench| bench.pause() == Some("breaker")).await;
        // A probe may meet the part that stays away.
        bench.target.judge(|number| (number % 3 == 0).then_some(Verdict::Part));
        let others: Vec<u64> = (0..300).filter(|number| number % 3 > 0).collect();
        bench.until("all others went through", |bench| bench.target.taken_sorted() == others).await;
        sleep(Duration::from_secs(60)).await;
        assert_eq!((bench.dead_numbers().await, bench.pause()), (vec![], None), "of {attempts} attempts");
        bench.until("the frontier has passed", |bench| bench.lag() == 0).await;
        bench.target.judge(|_| None);
        bench.drained().await;
        assert_eq!(bench.dead_numbers().await, [] as [u64; 0]);
        for key in 0..30 {
            let of_key = bench.target.taken().into_iter().filter(|number| number % 30 == key).collect::<Vec<_>>();
            assert_eq!(of_key, (0..10).map(|round| round * 30 + key).collect::<Vec<_>>(), "in order");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn one_bad_record_in_a_thousand_dies_and_no_other() {
    let bench = Bench::new(IMPATIENT).await;
    bench.target.judge(|number| (number % 1_000 == 500).then_some(Verdict::Never));
    for number in 0..10_000 {
        bench.write(number, (number % 2 == 0).then(|| format!("k{}", number % 97)).as_deref()).await;
    }
    bench.drained().await;
    let mut dead = bench.dead_numbers().await;
    dead.sort_unstable();
    assert_eq!(dead, (0..10).map(|thousand| thousand * 1_000 + 500).collect::<Vec<_>>());
    assert_eq!(bench.target.taken().len(), 9_990);
}

#[tokio::test(start_paused = true)]
async fn a_bad_deploy_pauses_over_a_restart_until_it_is_resumed() {
    let mut bench = Bench::new(IMPATIENT).await;
    bench.target.judge(|_| Some(Verdict::Never));
    for number in 0..5_000 {
        bench.write(number, None).await;
    }
    bench.until("it pauses", |bench| bench.pause() == Some("refused")).await;
    sleep(Duration::from_secs(1)).await;
    bench.restart().await;
    sleep(Duration::from_secs(3_600)).await;
    assert_eq!(bench.pause(), Some("refused"));
    let dead = bench.dead().await.len();
    assert!(dead <= 100, "{dead} died before the pause");
    bench.target.judge(|_| None);
    bench.handle.resume().await;
    bench.drained().await;
    assert_eq!(bench.target.taken().iter().collect::<BTreeSet<_>>().len(), 5_000 - dead);
    assert_eq!(bench.pause(), None);
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_at_once_go_at_the_rate_and_cost_no_attempt() {
    // As `http` sends them, one by one and in batches, and as `redis` and `file` do.
    for (style, records, latency) in
        [(BatchStyle::Independent, 1, 2), (BatchStyle::Atomic, 200, 50), (BatchStyle::StopsAtFirstFailure, 200, 50)]
    {
        let settings = format!(
            "  limits: {{ rate: 1000/s, burst: 100, concurrency: 3 }}\n  batch: {{ records: {records}, linger: 5ms }}\n"
        );
        let mut bench = Bench::new(&settings).await;
        *bench.target.style.lock() = style;
        *bench.target.latency.lock() = Duration::from_millis(latency);
        bench.restart().await;
        let began = Instant::now();
        for number in 0..10_000 {
            bench.write(number, (number % 3 == 0).then(|| format!("k{}", number % 50)).as_deref()).await;
        }
        bench.drained().await;
        let took = began.elapsed().as_secs_f64();
        assert!((9.5..11.0).contains(&took), "{style:?}: {took} s");
        // After a quiet time a burst may go at once, and no more than that.
        sleep(Duration::from_secs(60)).await;
        for number in 10_000..10_500 {
            bench.write(number, None).await;
        }
        bench.drained().await;
        let (mut tokens, mut filled) = (100.0, began);
        for (at, size) in bench.target.batches.lock().iter() {
            tokens = f64::min(100.0, tokens + (*at - filled).as_secs_f64() * 1_000.0);
            filled = *at;
            tokens -= f64::from(u32::try_from(*size).unwrap());
            assert!(tokens > -1e-3, "{style:?}: over the rate by {} at {:?}", -tokens, *at - began);
        }
        let most = bench.target.under_way.lock().1;
        assert!((2..=3).contains(&most), "{style:?}: {most} batches at once");
        let counters = &bench.handle.board().counters;
        assert_eq!(counters.retried.load(Ordering::Relaxed) + counters.down.load(Ordering::Relaxed), 0);
        assert_eq!(bench.target.taken_sorted(), (0..10_500).collect::<Vec<_>>());
        assert_eq!((bench.pause(), bench.dead().await.len()), (None, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_target_that_never_answers_does_not_hold_up_the_drain() {
    let bench = Bench::new(IMPATIENT).await;
    *bench.target.latency.lock() = Duration::from_secs(1_000_000);
    bench.write(0, None).await;
    sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    bench.handle.drain(Duration::from_secs(5)).await;
    assert_eq!(began.elapsed().as_secs(), 5);
    assert_eq!(bench.lag(), 1, "it is sent again at the next start");
}

#[tokio::test(start_paused = true)]
async fn a_drain_with_a_target_that_is_away_ends_at_once() {
    let bench = Bench::new(IMPATIENT).await;
    bench.target.judge(|_| Some(Verdict::Down));
    for number in 0..100 {
        bench.write(number, None).await;
    }
    bench.until("it is away", |bench| bench.pause() == Some("breaker")).await;
    let began = Instant::now();
    bench.handle.drain(Duration::from_secs(60)).await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}
