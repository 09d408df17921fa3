//! The copy of a dead letter is part of its end.

use std::sync::atomic::Ordering;

use super::*;
use crate::source::DeadReason;

const ALSO: &str = "  dead_letters: { also: { file: { path: dead.ndjson } } }\n";

impl Target {
    fn copies_fail(&self, verdict: Option<Verdict>) {
        self.copies.lock().0 = verdict;
    }

    /// The numbers of the records of which there is a copy.
    fn copied(&self) -> Vec<u64> {
        self.copies.lock().1.iter().map(|line| line["payload"]["n"].as_u64().unwrap()).collect()
    }
}

/// A branch whose target refuses 0, and whose copies fail with this.
async fn failing(verdict: Verdict) -> Bench {
    let bench = Bench::new(ALSO).await;
    bench.target.judge(|number| (number == 0).then_some(Verdict::Never));
    bench.target.copies_fail(Some(verdict));
    for number in 0..3 {
        bench.write(number, Some("k")).await;
    }
    bench
}

#[tokio::test(start_paused = true)]
async fn a_letter_counts_when_its_copy_is_written_and_a_file_that_fails_pauses_the_branch() {
    let bench = failing(Verdict::Down).await;
    bench.until("it pauses", |bench| bench.pause() == Some("dead_letters_copy")).await;
    sleep(Duration::from_secs(600)).await;
    assert!(bench.dead().await.is_empty(), "a letter without its copy has no end");
    assert!(bench.lag() > 0, "and the frontier does not pass it");
    assert!(bench.status().pause.unwrap().note.contains("no copy"));
    let failed = bench.handle.board().counters.copies_failed.load(Ordering::Relaxed);
    assert!((10..100).contains(&failed), "{failed} tries in ten minutes");
    bench.target.copies_fail(None);
    bench.drained().await;
    assert_eq!((bench.dead_numbers().await, bench.target.copied()), (vec![0], vec![0]));
    assert_eq!((bench.pause(), bench.target.taken()), (None, vec![1, 2]));
    assert!(bench.dead().await[0].overtaken, "the mark came after its letter");
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_was_wanted_at_a_crash_is_made_after_it() {
    let mut bench = failing(Verdict::Backoff).await;
    bench.until("it pauses", |bench| bench.pause() == Some("dead_letters_copy")).await;
    bench.restart().await;
    sleep(Duration::from_secs(60)).await;
    bench.target.copies_fail(None);
    bench.drained().await;
    assert_eq!((bench.dead_numbers().await, bench.target.copied()), (vec![0], vec![0]));
}

#[tokio::test(start_paused = true)]
async fn a_letter_that_can_have_no_copy_goes_without_and_is_counted() {
    let bench = failing(Verdict::Never).await;
    bench.target.judge(|number| (number < 2).then_some(Verdict::Never));
    bench.drained().await;
    assert_eq!((bench.dead_numbers().await, bench.target.copied()), (vec![0, 1], vec![1]));
    assert_eq!(bench.handle.board().counters.copies_failed.load(Ordering::Relaxed), 1);
    assert_eq!(bench.pause(), None);
}

#[tokio::test(start_paused = true)]
async fn a_mended_file_and_a_stop_wait_for_no_copy_and_the_letter_comes_again() {
    let mut bench = failing(Verdict::Down).await;
    bench.until("it pauses", |bench| bench.pause() == Some("dead_letters_copy")).await;
    let began = Instant::now();
    bench.handle.drain(Duration::from_secs(60)).await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(bench.dead().await.is_empty() && bench.lag() > 0);
    bench.restart().await;
    bench.until("it pauses again", |bench| bench.pause() == Some("dead_letters_copy")).await;
    let without = plan("", &bench.clock);
    bench.handle.update(Arc::clone(&without.branches[0])).await;
    bench.drained().await;
    let dead = bench.dead().await;
    assert_eq!(dead.iter().map(|letter| letter.reason).collect::<Vec<_>>(), [DeadReason::Refused]);
    assert_eq!(bench.target.copied(), [] as [u64; 0]);
    // What was delivered beyond the letter goes once more, and in order.
    assert!(
        [vec![1, 2], vec![1, 1, 2], vec![1, 2, 1, 2]].contains(&bench.target.taken()),
        "{:?}",
        bench.target.taken()
    );
}
