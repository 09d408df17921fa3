//! The window of idempotency keys: by time, by number, over restarts, and what is said of it.

use super::*;
use crate::source::IdempotencyKey;
use crate::source::embedded::keys::key_hash;

const HOUR: Duration = Duration::from_hours(1);

fn with(log: &Embedded, settings: NamespaceSettings) -> Arc<EmbeddedNamespace> {
    log.namespace(&"orders".parse().unwrap(), settings).unwrap()
}

fn often(folder: &Path, clock: &Clock) -> Arc<Embedded> {
    Embedded::open(Options { look_every: Duration::from_millis(5), ..options(folder, clock) }).unwrap()
}

async fn send(namespace: &EmbeddedNamespace, number: u32) -> Admitted {
    let idempotency = Some(IdempotencyKey { key: number.to_string().into(), fingerprint: [1; 16] });
    let mut admitted = namespace.admit(vec![Write { idempotency, ..write(None, "1") }]).await.unwrap();
    admitted.remove(0)
}

async fn is_known(namespace: &EmbeddedNamespace, number: u32) -> bool {
    namespace.shared_for_tests().flushed().await.unwrap();
    is_stored(namespace, number, namespace.counts().keys_since.unwrap())
}

fn is_stored(namespace: &EmbeddedNamespace, number: u32, since: Timestamp) -> bool {
    let space = namespace.space_for_tests();
    let hash = key_hash(space.number, &number.to_string());
    namespace.shared_for_tests().reader.key(space.number, &hash, since).unwrap().is_some()
}

/// Waits until a key is not even in the file any more.
async fn until_gone(namespace: &EmbeddedNamespace, number: u32) {
    namespace.shared_for_tests().flushed().await.unwrap();
    let gone = async {
        while is_stored(namespace, number, Timestamp::MIN) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.unwrap_or_else(|_| panic!("key {number} stays"));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_known_for_their_window_and_the_window_is_said() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = often(folder.path(), &clock);
    let namespace = with(&log, NamespaceSettings { key_window: HOUR * 2, ..NamespaceSettings::default() });
    let begun = clock.now();
    send(&namespace, 1).await;
    send(&namespace, 2).await;
    assert_eq!(namespace.counts().keys_since, Some(begun.saturating_sub(HOUR * 2)));
    clock.advance(HOUR * 2);
    assert!(is_known(&namespace, 1).await);
    assert!(matches!(send(&namespace, 1).await, Admitted::Repeated { .. }));
    clock.advance(Duration::from_millis(1));
    assert!(!is_known(&namespace, 1).await, "a millisecond over the window");
    until_gone(&namespace, 2).await;
    assert!(matches!(send(&namespace, 1).await, Admitted::Appended { .. }));
    // A window that is made longer does not bring back what has gone.
    let widened = with(&log, NamespaceSettings { key_window: HOUR * 9, ..NamespaceSettings::default() });
    assert_eq!(widened.counts().keys_since, Some(Timestamp::from_millis(begun.as_millis() + 1)));
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_the_greatest_number_the_oldest_keys_go_and_the_real_window_is_said_over_a_restart_too() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = often(folder.path(), &clock);
    let few = || NamespaceSettings { key_max: 10, ..NamespaceSettings::default() };
    let namespace = with(&log, few());
    let other = log.namespace(&"other".parse().unwrap(), NamespaceSettings::default()).unwrap();
    send(&other, 1).await;
    let begun = clock.now();
    for number in 1..=20 {
        send(&namespace, number).await;
        clock.advance(Duration::from_secs(1));
    }
    // A table takes four keys in a test build, the other namespace's among them: 1 to 3, 4 to 7, and 8 to 11 stays because
    // without it there would be 9.
    let since = Timestamp::from_millis(begun.as_millis() + 6_001);
    until_gone(&namespace, 7).await;
    assert_eq!(namespace.counts().keys_since, Some(since));
    assert!(is_known(&namespace, 8).await);
    assert!(is_known(&other, 1).await, "its own bound holds for each namespace");
    assert_eq!(other.counts().keys_since, Some(clock.now().saturating_sub(HOUR * 24)));
    assert!(matches!(send(&namespace, 8).await, Admitted::Repeated { .. }));
    assert!(matches!(send(&namespace, 3).await, Admitted::Appended { .. }));
    log.close().await;
    drop((namespace, other, log));
    let db = rusqlite::Connection::open(folder.path().join("state.db")).unwrap();
    let tables: i64 = db
        .query_row("SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name GLOB 'keys_*'", [], |row| {
            row.get(0)
        })
        .unwrap();
    assert!(tables <= 5, "what nobody needs is gone from the file: {tables}");
    drop(db);
    let log = open(folder.path(), &clock);
    let namespace = with(&log, few());
    assert!(namespace.counts().keys_since >= Some(since));
    assert!(is_known(&namespace, 20).await);
    log.close().await;
}
