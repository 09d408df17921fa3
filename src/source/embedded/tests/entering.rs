//! Writes that are entered one behind the other, without a wait for the disk between.

use super::double::Double;
use super::*;
use crate::source::AdmitError;

#[tokio::test(flavor = "multi_thread")]
async fn a_small_write_does_not_overtake_a_large_one_for_which_the_disk_had_no_room() {
    let (clock, folder) = (clock(), tempfile::tempdir().unwrap());
    let double = Double::new(folder.path());
    let log = Embedded::open(Options { disk: Arc::new(double.clone()), ..options(folder.path(), &clock) }).unwrap();
    let namespace = orders(&log);
    double.set_room(0);
    // Three of them are a little more than a journal file.
    let large = "1".repeat(5 << 10);
    let mut entered = Vec::new();
    for number in 0..1_000 {
        let payload = if number % 2 == 0 { large.as_str() } else { "2" };
        match namespace.enter(vec![write(Some("k"), payload)]).await {
            Ok(waiting) => entered.push(waiting),
            Err(error) => {
                assert_eq!(error, AdmitError::DiskFull);
                break;
            }
        }
    }
    let answers = futures::future::join_all(entered).await;
    let refused = answers.iter().position(Result::is_err).expect("a full disk must be noticed");
    for answer in &answers[refused..] {
        assert_eq!(*answer, Err(AdmitError::DiskFull), "accepted behind one that was refused");
    }
    log.close().await;
}
