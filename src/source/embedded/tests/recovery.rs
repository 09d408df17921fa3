//! A start on a disk that fails under it: whatever call fails, however often, the next start finds the same.

use super::double::Double;
use super::small::{look, small, start};
use super::*;

/// More calls than any start makes.
const ENOUGH: u64 = 1_000;

/// What a power cut or a kill at this moment leaves, in a folder of its own.
fn left(double: &Double, seed: u64) -> (tempfile::TempDir, Double) {
    let folder = tempfile::tempdir().unwrap();
    let after = if seed.is_multiple_of(2) { double.kill(folder.path()) } else { double.power_cut(seed, folder.path()) };
    (folder, after)
}

/// The killed log with half of its last group written, so that a start also has a tail to cut and to keep.
async fn torn(folder: &Path, clock: &Clock) -> Double {
    let double = small(folder, clock).await;
    let files = double.contents();
    let newest = files.keys().filter(|path| path.extension().is_some_and(|ending| ending == "wal")).max().unwrap();
    double.damage(newest, |bytes| {
        let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        bytes[end - 20..].fill(0);
    });
    double
}

/// RELIABILITY.md 5, row 4.
#[tokio::test(flavor = "multi_thread")]
async fn two_crashes_at_any_two_calls_of_a_recovery_leave_what_one_start_would_have_found() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let killed = torn(folder.path(), &clock).await;
    let expected = look(&start(&killed.again(), folder.path(), &clock).unwrap()).unwrap();
    let mut crashes = (0, 0);
    for n in 1..ENOUGH {
        let first = killed.again();
        first.crash_after(n);
        let opened = start(&first, folder.path(), &clock);
        if !first.has_failed() {
            assert_eq!(look(&opened.unwrap()).unwrap(), expected);
            break;
        }
        drop(opened);
        crashes.0 += 1;
        for m in 1..ENOUGH {
            let (between, second) = left(&first, n * 31 + m);
            second.crash_after(m);
            let opened = start(&second, between.path(), &clock);
            let failed = second.has_failed();
            drop(opened);
            let (at_last, third) = left(&second, n * 17 + m);
            let found = start(&third, at_last.path(), &clock).and_then(|recovered| look(&recovered));
            assert_eq!(found.as_ref(), Ok(&expected), "after crashes at call {n} and call {m}");
            if !failed {
                break;
            }
            crashes.1 += 1;
        }
    }
    assert!(crashes.0 > 10 && crashes.1 > 100, "only {crashes:?} crashes: the test has lost its grip");
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_read_of_a_start_fails_it_refuses_and_names_what_or_finds_everything() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let killed = torn(folder.path(), &clock).await;
    let expected = look(&start(&killed.again(), folder.path(), &clock).unwrap()).unwrap();
    let mut refused = 0;
    for n in 1..ENOUGH {
        let failing = killed.again();
        failing.fail_read_after(n);
        match start(&failing, folder.path(), &clock).and_then(|recovered| look(&recovered)) {
            Ok(found) => assert_eq!(found, expected, "read {n}"),
            Err(said) => {
                assert!(said.contains("by order of the test"), "read {n}: {said}");
                assert!(said.contains(&folder.path().display().to_string()), "read {n}: no path: {said}");
                refused += 1;
            }
        }
        if !failing.has_failed() {
            break;
        }
    }
    assert!(refused > 5, "only {refused} reads failed: the test has lost its grip");
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_that_are_short_or_interrupted_change_nothing() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let killed = torn(folder.path(), &clock).await;
    let expected = look(&start(&killed.again(), folder.path(), &clock).unwrap()).unwrap();
    let choppy = killed.again();
    choppy.make_choppy();
    assert_eq!(look(&start(&choppy, folder.path(), &clock).unwrap()).unwrap(), expected);
}
