//! Power cuts and failing disks: what was acknowledged is there, what was refused is not, everything once and in order.

use std::collections::BTreeSet;

use super::double::{Double, Short};
use super::*;
use crate::source::AdmitError;

fn on(double: &Double, folder: &Path, clock: &Clock) -> Options {
    Options { disk: Arc::new(double.clone()), ..options(folder, clock) }
}

/// What the writers were told.
#[derive(Clone, Default)]
struct Told {
    acknowledged: Vec<u32>,
    refused: BTreeSet<u32>,
}

async fn write_some(namespace: &EmbeddedNamespace, range: std::ops::Range<u32>, told: &mut Told) {
    for number in range {
        match namespace.admit(vec![write(Some("k"), &number.to_string())]).await {
            Ok(_) => told.acknowledged.push(number),
            Err(AdmitError::Unknown { .. }) => {}
            Err(_) => {
                told.refused.insert(number);
            }
        }
    }
}

/// Everything that is in the log.
async fn all(log: &Embedded) -> Vec<u32> {
    let namespace = orders(log);
    let end = namespace.end().single().0;
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    let count = usize::try_from(end - start.cursor.single().0).unwrap();
    let entries = read(&mut *start.subscription, count).await;
    let positions: Vec<u64> = entries.iter().map(|entry| entry.position.0).collect();
    assert_eq!(positions, (start.cursor.single().0 + 1..=end).collect::<Vec<_>>(), "each position once, without a gap");
    entries.iter().map(|entry| std::str::from_utf8(&entry.record.payload).unwrap().parse().unwrap()).collect()
}

fn judge(found: &[u32], told: &Told, what: &str) {
    assert!(found.windows(2).all(|two| two[0] < two[1]), "{what}: in order and once: {found:?}");
    let there: BTreeSet<u32> = found.iter().copied().collect();
    let lost: Vec<&u32> = told.acknowledged.iter().filter(|number| !there.contains(number)).collect();
    assert!(lost.is_empty(), "{what}: acknowledged and lost: {lost:?}");
    let phantoms: Vec<&u32> = told.refused.intersection(&there).collect();
    assert!(phantoms.is_empty(), "{what}: refused and there: {phantoms:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn row_04_a_power_cut_at_any_moment_loses_nothing_that_was_acknowledged() {
    for seed in 0..6u64 {
        let clock = clock();
        let mut folder = tempfile::tempdir().unwrap();
        let mut double = Double::new(folder.path());
        let mut told = Told::default();
        // Each life begins where the power cut left the one before.
        for life in 0..6u32 {
            let log = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
            let found = all(&log).await;
            judge(&found, &told, &format!("seed {seed}, life {life}"));
            let from = life * 100;
            write_some(&orders(&log), from..from + 20 + u32::try_from(seed).unwrap() * 11, &mut told).await;
            let next = tempfile::tempdir().unwrap();
            let after = double.power_cut(seed * 100 + u64::from(life), next.path());
            log.close().await;
            drop(log);
            (double, folder) = (after, next);
        }
    }
}

/// LOG.md 7, RELIABILITY.md 5, row 9: EIO at every call, with every length that a short write can have.
#[tokio::test(flavor = "multi_thread")]
async fn row_07_whichever_call_fails_the_answers_are_true_after_a_kill_and_after_a_power_cut() {
    let shorts = [Short::Nothing, Short::Half, Short::AllButOneByte, Short::Everything];
    let mut failures = 0;
    for n in 1..400u64 {
        let short = shorts[usize::try_from(n).unwrap() % shorts.len()];
        let clock = clock();
        let folder = tempfile::tempdir().unwrap();
        let double = Double::new(folder.path());
        let mut told = Told::default();
        let log = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
        let namespace = orders(&log);
        write_some(&namespace, 0..10, &mut told).await;
        double.set_short(short);
        double.fail_after(n);
        write_some(&namespace, 10..60, &mut told).await;
        let failed = double.has_failed();
        if log.health().fenced.is_some() {
            // No second try: whoever comes after the failure hears so.
            let after = namespace.admit(vec![write(None, "1")]).await;
            assert!(matches!(after, Err(AdmitError::Closed { .. })), "call {n}: {after:?}");
        }
        log.close().await;
        drop((namespace, log));
        let kill = tempfile::tempdir().unwrap();
        let cut = tempfile::tempdir().unwrap();
        let (killed, after) = (double.kill(kill.path()), double.power_cut(n, cut.path()));
        for (what, double, folder) in [("a kill", killed, kill), ("a power cut", after, cut)] {
            let again = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
            judge(&all(&again).await, &told, &format!("call {n} ({short:?}), {what}"));
            again.close().await;
        }
        failures += u32::from(failed);
        if !failed {
            break;
        }
    }
    assert!(failures > 30, "only {failures} calls failed: the test has lost its grip");
}

#[tokio::test(flavor = "multi_thread")]
async fn row_22_after_a_failed_sync_a_start_from_the_page_cache_trusts_nothing_that_was_not_synced() {
    for n in 1..60u64 {
        let clock = clock();
        let folder = tempfile::tempdir().unwrap();
        let double = Double::new(folder.path());
        let mut told = Told::default();
        let log = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
        write_some(&orders(&log), 0..10, &mut told).await;
        double.fail_after(n);
        write_some(&orders(&log), 10..60, &mut told).await;
        log.close().await;
        drop(log);
        // The process starts again on the same machine: it sees pages that the disk does not have.
        let again = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
        let served = all(&again).await;
        judge(&served, &told, &format!("call {n}, from the page cache"));
        // What it has served once must outlive the next power cut.
        let next = tempfile::tempdir().unwrap();
        let cut = double.power_cut(n, next.path());
        again.close().await;
        drop(again);
        let last = Embedded::open(on(&cut, next.path(), &clock)).unwrap();
        let left = all(&last).await;
        assert_eq!(left, served, "call {n}: served and then gone");
        last.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_call_of_a_recovery_leaves_what_the_next_one_recovers() {
    let clock = clock();
    let folder = tempfile::tempdir().unwrap();
    let double = Double::new(folder.path());
    let mut told = Told::default();
    let log = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
    write_some(&orders(&log), 0..80, &mut told).await;
    let mut failures = 0;
    for n in 1..400u64 {
        let first = tempfile::tempdir().unwrap();
        let crashed = double.power_cut(n, first.path());
        crashed.crash_after(n);
        // Up to the checkpoint that the stop after it makes.
        if let Ok(opened) = Embedded::open(on(&crashed, first.path(), &clock)) {
            opened.close().await;
        }
        let failed = crashed.has_failed();
        let second = tempfile::tempdir().unwrap();
        let crashed = crashed.power_cut(n + 1_000, second.path());
        let again = Embedded::open(on(&crashed, second.path(), &clock)).unwrap();
        judge(&all(&again).await, &told, &format!("call {n} of a recovery"));
        again.close().await;
        if !failed {
            break;
        }
        failures += 1;
    }
    assert!(failures > 20, "only {failures} calls failed: the test has lost its grip");
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_21_on_a_full_disk_writes_are_refused_acks_are_stored_and_room_lets_writes_in_again() {
    let clock = clock();
    let folder = tempfile::tempdir().unwrap();
    let double = Double::new(folder.path());
    let mut told = Told::default();
    let log = Embedded::open(on(&double, folder.path(), &clock)).unwrap();
    let namespace = orders(&log);
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    write_some(&namespace, 0..50, &mut told).await;
    double.set_room(0);
    let mut number = 50;
    while told.refused.is_empty() {
        write_some(&namespace, number..number + 1, &mut told).await;
        number += 1;
        assert!(number < 2_000, "a full disk must be noticed");
    }
    let refused = namespace.admit(vec![write(None, "1")]).await;
    assert_eq!(refused, Err(AdmitError::DiskFull));
    assert!(log.health().disk_full && log.health().fenced.is_none(), "{:?}", log.health());
    // Reading and acking go on.
    let count = told.acknowledged.len();
    let last = read(&mut *start.subscription, count).await.pop().unwrap().position;
    namespace.settle(&sink(), crate::source::Settlement { frontier: last.into(), ..Default::default() }).await.unwrap();
    while namespace.lag(&sink()).cursor.single() < last {
        tokio::task::yield_now().await;
    }
    double.set_room(u64::MAX);
    while log.health().disk_full {
        tokio::task::yield_now().await;
    }
    write_some(&namespace, number..number + 20, &mut told).await;
    assert_eq!(told.acknowledged.last(), Some(&(number + 19)));
    log.close().await;
    drop((namespace, log));
    let next = tempfile::tempdir().unwrap();
    let after = double.power_cut(1, next.path());
    let again = Embedded::open(on(&after, next.path(), &clock)).unwrap();
    assert_eq!(orders(&again).end().single().0, told.acknowledged.len() as u64);
    again.close().await;
}
