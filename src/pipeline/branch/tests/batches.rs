//! How records are grouped: never more than the file says, and never waiting longer than it says.

use super::*;

/// The sizes of the batches so far, and when each began.
fn batches(bench: &Bench) -> Vec<(Instant, usize)> {
    bench.target.batches.lock().clone()
}

#[tokio::test(start_paused = true)]
async fn a_lone_record_goes_at_once_and_others_wait_for_company_only_while_one_is_under_way() {
    let mut bench = Bench::new("  batch: { records: 10, linger: 200ms }\n").await;
    *bench.target.style.lock() = BatchStyle::Atomic;
    *bench.target.latency.lock() = Duration::from_secs(2);
    bench.restart().await;
    let began = Instant::now();
    bench.write(0, None).await;
    bench.until("the first goes", |bench| batches(bench).len() == 1).await;
    assert!(began.elapsed() < Duration::from_millis(150), "a lone record waits for nobody: {:?}", began.elapsed());
    let second = Instant::now();
    for number in 1..=3 {
        bench.write(number, None).await;
    }
    bench.until("the wait is over", |bench| batches(bench).len() == 2).await;
    let (at, size) = batches(&bench)[1];
    assert_eq!(size, 3, "they have waited for each other");
    assert!((200..300).contains(&(at - second).as_millis()), "for as long as the file says: {:?}", at - second);
    let third = Instant::now();
    for number in 4..=14 {
        bench.write(number, None).await;
    }
    bench.until("the full one goes", |bench| batches(bench).len() >= 3).await;
    let (at, size) = batches(&bench)[2];
    assert_eq!(size, 10);
    assert!((at - third) < Duration::from_millis(150), "a full batch waits for nothing: {:?}", at - third);
    bench.drained().await;
}

#[tokio::test(start_paused = true)]
async fn a_batch_holds_no_more_bytes_than_the_file_says_and_at_least_one_record() {
    // A payload is `{"n":10}`: eight bytes.
    for (bytes, most) in [(24, 3), (31, 3), (32, 4), (1, 1)] {
        let mut bench = Bench::new(&format!("  batch: {{ records: 100, bytes: {bytes} }}\n")).await;
        *bench.target.style.lock() = BatchStyle::StopsAtFirstFailure;
        bench.restart().await;
        bench.handle.pause("until all is written".to_owned()).await;
        for number in 10..40 {
            bench.write(number, (number % 2 == 0).then_some("k")).await;
        }
        bench.until("all is read", |bench| bench.status().in_flight == 30).await;
        bench.handle.resume().await;
        bench.drained().await;
        let sizes: Vec<usize> = batches(&bench).iter().map(|(_, size)| *size).collect();
        assert_eq!(sizes.iter().max(), Some(&most), "{bytes} bytes: {sizes:?}");
        assert_eq!(bench.target.taken_sorted(), (10..40).collect::<Vec<_>>());
    }
}
