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
    let large = "1".repeat(6 << 10);
    let mut refused = false;
    for _ in 0..1_000 {
        let first = namespace.enter(vec![write(Some("k"), &large)]).await;
        let Ok(first) = first else { break };
        let second = namespace.enter(vec![write(Some("k"), "2")]).await;
        if first.await == Err(AdmitError::DiskFull) {
            refused = true;
            let Ok(second) = second else { continue };
            assert_eq!(second.await, Err(AdmitError::DiskFull));
        }
    }
    assert!(refused, "a full disk must be noticed");
    log.close().await;
}
