//! What a log must do that several processes share.

use std::collections::{BTreeSet, HashSet};

use tokio::sync::watch;

use super::{Kind, branch, end, in_time, write};
use crate::source::{Entry, Start};

/// A kind that may be open more than once at a time.
pub(super) trait Shared: Kind {
    /// The same namespace in another process.
    async fn another(&self) -> Self;
}

const WRITES: usize = 120;
const KEYS: [&str; 3] = ["a", "b", "c"];

/// What was read, by whichever process.
type Seen = watch::Sender<Vec<Entry>>;

/// Reads and ends as a branch does, on and on.
async fn consume<K: Kind>(kind: &K, seen: &Seen) {
    let (log, shelf) = (kind.log(), kind.shelf());
    loop {
        let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
        loop {
            let entries = tokio::select! {
                entries = start.subscription.next(7, usize::MAX) => entries.unwrap(),
                () = start.moved.cancelled() => break,
            };
            seen.send_modify(|seen| seen.extend(entries.iter().cloned()));
            end(&shelf, &entries).await;
        }
    }
}

async fn until_seen(seen: &Seen, records: usize) {
    let ids = |entries: &Vec<Entry>| entries.iter().map(|entry| entry.record.id).collect::<HashSet<_>>().len();
    seen.subscribe().wait_for(|entries| ids(entries) >= records).await.unwrap();
}

pub(super) async fn what_two_processes_read_comes_in_order_and_one_goes_on_alone<K: Shared>(kind: K) {
    let (other, seen) = (kind.another().await, Seen::default());
    // From here on it is known where the branch begins.
    drop(kind.log().open_branch(&branch(), Start::Earliest).await.unwrap());
    let writing = async {
        for number in 0..WRITES {
            if number == WRITES / 2 {
                until_seen(&seen, number).await;
            }
            let here = number < WRITES / 2 && number % 2 == 0;
            let log = if here { kind.log() } else { other.log() };
            log.admit(vec![write(Some(KEYS[number % KEYS.len()]), &number.to_string())]).await.unwrap();
        }
    };
    let first = async {
        tokio::select! {
            () = consume(&kind, &seen) => {}
            () = until_seen(&seen, WRITES / 2) => {}
        }
        kind.close().await;
    };
    let second = async {
        tokio::select! {
            () = consume(&other, &seen) => {}
            () = until_seen(&seen, WRITES) => {}
        }
    };
    in_time("what two processes read", async { tokio::join!(first, second, writing) }).await;
    let entries = seen.borrow().clone();
    let number = |entry: &Entry| String::from_utf8_lossy(&entry.record.payload).parse::<usize>().unwrap();
    assert_eq!(entries.iter().map(number).collect::<BTreeSet<_>>(), (0..WRITES).collect(), "every record came");
    for key in KEYS.iter().filter(|_| other.log().caps().ordered) {
        let mut known = HashSet::new();
        let mut of_key: Vec<_> = entries.iter().filter(|entry| entry.record.key.as_deref() == Some(key)).collect();
        of_key.retain(|entry| known.insert(entry.record.id));
        assert!(of_key.is_sorted_by_key(|entry| number(entry)), "{key}: {:?}", super::payloads(&entries));
    }
    other.close().await;
}
