//! What a log does without a shelf: nobody is left to believe that there is one.

use std::fmt::Debug;
use std::time::Duration;

use super::shelf::aside;
use super::{Kind, append, branch, end, id_of, in_time, payloads, read, until_counts, write};
use crate::clock::Timestamp;
use crate::source::{
    AdmitError, Admitted, DeadQuery, LogError, ParkedQuery, Scheduled, Settlement, ShelfCounts, Start, StoredPause,
    Write,
};

fn refused<T: Debug>(verb: &str, answer: Result<T, LogError>) {
    assert!(matches!(answer, Err(LogError::Unsupported(_))), "{verb} answered: {answer:?}");
}

pub(super) async fn what_needs_a_shelf_is_refused<K: Kind>(kind: K) {
    let (log, shelf) = (kind.log(), kind.shelf());
    let caps = log.caps();
    assert!(!caps.schedule && !caps.set_aside && !caps.exact_keys, "{caps:?}");
    let id = id_of(&append(&log, &["0"]).await[0]);
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    let entry = read(&mut *start.subscription, 1).await.remove(0);
    let aside = vec![aside(&kind, &entry, 1)];
    refused("settle", shelf.settle(&branch(), Settlement { aside, ..Settlement::default() }).await);
    refused("aside_rows", shelf.aside_rows(&branch(), "=k", 1).await);
    refused("parked", shelf.parked(ParkedQuery { limit: 1, ..ParkedQuery::default() }).await);
    refused("cancel", shelf.cancel(Scheduled::Id(id)).await);
    refused("reschedule", shelf.reschedule(Scheduled::Id(id), Timestamp::MIN).await);
    refused("replay", shelf.replay(DeadQuery { limit: 1, ..DeadQuery::default() }, true).await);
    refused("purge", shelf.purge(DeadQuery { limit: 1, ..DeadQuery::default() }).await);
    // A branch asks these at its start: nothing is here.
    let letters = shelf.dead_letters(DeadQuery { limit: 1, ..DeadQuery::default() }).await.unwrap();
    assert!(letters.rows.is_empty() && letters.next.is_none());
    assert_eq!(log.find(id).await.unwrap().is_some(), caps.look_up);
    until_counts(&shelf, |counts| *counts == ShelfCounts::default()).await;
    assert!(futures::poll!(shelf.replayed_lanes(&branch())).is_pending());
    drop(start);
    // What was refused has not ended.
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    assert_eq!(read(&mut *start.subscription, 1).await[0].record.id, id);
}

pub(super) async fn a_delay_is_as_long_as_the_log_itself_can_wait<K: Kind>(kind: K) {
    let (log, caps) = (kind.log(), kind.log().caps());
    let delayed = |by: Duration| Write { due_at: Some(kind.clock().now().saturating_add(by)), ..write(None, "late") };
    let second = Duration::from_secs(1);
    let too_long = match caps.max_delay {
        Some(longest) => longest + Duration::from_millis(1),
        None => second,
    };
    if !caps.hold {
        let answer = in_time("admit", log.admit(vec![write(None, "with it"), delayed(too_long)])).await;
        assert!(matches!(answer, Err(AdmitError::Unsupported(_))), "{answer:?}");
    }
    if caps.hold || caps.delay {
        let late = log.admit(vec![delayed(second)]).await.unwrap();
        assert!(matches!(late[..], [Admitted::Parked { .. }]), "{late:?}");
    }
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    if !caps.hold {
        // What holds keeps it behind the other.
        append(&log, &["now"]).await;
        assert_eq!(payloads(&read(&mut *start.subscription, 1).await), ["now"]);
    }
    if caps.hold || caps.delay {
        assert!(futures::poll!(start.subscription.next(1, usize::MAX)).is_pending());
        kind.clock().advance(second);
        assert_eq!(payloads(&read(&mut *start.subscription, 1).await), ["late"]);
    }
    assert!(futures::poll!(start.subscription.next(1, usize::MAX)).is_pending(), "of a refused call nothing is there");
}

pub(super) async fn a_pause_outlives_a_restart_where_it_is_kept_and_is_over_when_it_is_cleared<K: Kind>(kind: K) {
    let (log, kept) = (kind.log(), kind.log().caps().pause);
    append(&log, &["0", "1", "2"]).await;
    let mut start = log.open_branch(&branch(), Start::Earliest).await.unwrap();
    let entries = read(&mut *start.subscription, 3).await;
    let pause = StoredPause { cause: "operator".into(), note: "by hand".into(), since: kind.clock().now() };
    let order = |pause| Settlement { pause: Some(pause), ..Settlement::default() };
    kind.shelf().settle(&branch(), order(Some(pause.clone()))).await.unwrap();
    // What was under way ends meanwhile.
    end(&kind.shelf(), &entries[..1]).await;
    drop((log, start));
    let kind = kind.reopen().await;
    let mut start = kind.log().open_branch(&branch(), Start::Latest).await.unwrap();
    assert_eq!(start.pause, kept.then_some(pause));
    assert_eq!(read(&mut *start.subscription, 2).await.len(), 2, "the pause is the branch's, the log gives on");
    kind.shelf().settle(&branch(), order(None)).await.unwrap();
    drop(start);
    let kind = kind.reopen().await;
    let start = kind.log().open_branch(&branch(), Start::Latest).await.unwrap();
    assert_eq!(start.pause, None);
}
