//! A damaged `state.db`: the start refuses and says what to do, a repair names what is lost and loses nothing else.

use std::path::PathBuf;

use super::*;
use crate::source::embedded::inspect::{Damage, repair, verify};
use crate::source::{DeadLetter, DeadQuery, DeadReason, LogError, ParkedQuery, RowKey, Settlement};

const PARKED: u32 = 400;
const HOUR: Duration = Duration::from_hours(1);

/// Fifty records of which thirty are finished and one is dead, and many that are parked.
async fn fill(log: &Embedded, clock: &Clock) {
    let namespace = orders(log);
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    append(&namespace, 0..50).await;
    let entries = read(&mut *start.subscription, 31).await;
    let dead = DeadLetter {
        row: RowKey { position: Position(31), child: 0 },
        branch: sink(),
        at: clock.now(),
        reason: DeadReason::Refused,
        attempts: 1,
        last_error: "422".into(),
        stage: "sink".into(),
        revision: "r".into(),
        record: Arc::clone(&entries[30].record),
        rendered: None,
        overtaken: false,
    };
    let settlement = Settlement { dead: vec![dead], frontier: Position(30).into(), ..Settlement::default() };
    namespace.settle(&sink(), settlement).await.unwrap();
    for number in 0..PARKED {
        let due_at = Some(clock.now().saturating_add(HOUR));
        namespace.admit(vec![Write { due_at, ..write(None, &parked(number)) }]).await.unwrap();
    }
    namespace.shared_for_tests().flushed().await.unwrap();
}

fn parked(number: u32) -> String {
    format!("parked {number:04} {}", "x".repeat(300))
}

/// Brings the -wal into the file, so that damage to the file is damage to what is read.
fn fold(folder: &Path) -> PathBuf {
    let path = folder.join("state.db");
    let db = rusqlite::Connection::open(&path).unwrap();
    db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    path
}

/// Spoils the page of the file in which this text is.
fn spoil(path: &Path, text: &str) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
    let page = at / 4096 * 4096;
    bytes[page..page + 64].fill(0xEE);
    std::fs::write(path, bytes).unwrap();
}

fn said(lost: &[Damage]) -> String {
    lost.iter().map(|damage| damage.what.as_str()).collect::<Vec<_>>().join("\n")
}

async fn listed(namespace: &EmbeddedNamespace) -> Vec<Bytes> {
    let query = ParkedQuery { limit: 1_000, ..ParkedQuery::default() };
    let page = namespace.parked(query).await.unwrap();
    page.rows.into_iter().map(|row| row.record.payload.clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spoilt_page_costs_the_rows_in_it_and_nothing_else_and_that_is_said() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    fill(&log, &clock).await;
    log.close().await;
    drop(log);
    let path = fold(folder.path());
    spoil(&path, &parked(200));
    let damage = verify(folder.path()).unwrap().damage;
    assert!(damage.iter().any(|damage| damage.path == path), "{damage:?}");
    let lost = repair(folder.path()).await.unwrap();
    let text = said(&lost);
    assert!(text.contains("parked records: table parked cannot be read between sequence"), "{text}");
    assert_eq!(lost.len(), 1, "only that: {text}");
    assert!(folder.path().join("cut/damaged-state-1.db").exists());
    assert_eq!(verify(folder.path()).unwrap().damage, []);
    assert_eq!(repair(folder.path()).await.unwrap(), [], "there is nothing more to repair");
    let log = open(folder.path(), &clock);
    let namespace = orders(&log);
    let left = listed(&namespace).await;
    assert!((370..400).contains(&left.len()), "{} are left", left.len());
    assert_eq!(namespace.counts().parked, left.len() as u64);
    for number in (0..170).chain(230..PARKED) {
        assert!(left.contains(&parked(number).into()), "{number} is lost and was readable");
    }
    let letters = namespace.dead_letters(DeadQuery { limit: 9, ..DeadQuery::default() }).await.unwrap().rows;
    assert_eq!(letters.len(), 1);
    let mut start = namespace.open_branch(&sink(), Start::Latest).await.unwrap();
    assert_eq!(start.cursor.single(), Position(30));
    assert_eq!(payloads(&read(&mut *start.subscription, 20).await), numbers(30..50));
    clock.advance(HOUR);
    assert_eq!(payloads(&read(&mut *start.subscription, left.len()).await), left);
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_journal_still_has_comes_back_whatever_the_store_has_lost() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let never = Options { checkpoint_bytes: 1 << 30, journal_file_bytes: 1 << 20, ..options(folder.path(), &clock) };
    let log = Embedded::open(never).unwrap();
    fill(&log, &clock).await;
    let crashed = snapshot(folder.path());
    log.close().await;
    let path = fold(crashed.path());
    spoil(&path, &parked(200));
    assert_ne!(repair(crashed.path()).await.unwrap(), []);
    let log = open(crashed.path(), &clock);
    let namespace = orders(&log);
    assert_eq!(listed(&namespace).await.len(), PARKED as usize);
    assert_eq!(namespace.counts().parked, u64::from(PARKED));
    let mut start = namespace.open_branch(&sink(), Start::Latest).await.unwrap();
    assert_eq!(payloads(&read(&mut *start.subscription, 20).await), numbers(30..50));
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_store_every_record_of_the_segments_is_read_again_from_the_first() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    fill(&log, &clock).await;
    append(&orders(&log), 50..300).await;
    log.close().await;
    drop(log);
    let path = fold(folder.path());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[..4096].fill(0xEE);
    std::fs::write(&path, bytes).unwrap();
    let refused = Embedded::open(options(folder.path(), &clock)).map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("state.db") && refused.contains("back-up") && refused.contains("log repair"), "{refused}");
    let text = said(&repair(folder.path()).await.unwrap());
    for lost in ["parked records", "dead letters", "cursors", "recovered-1", "idempotency keys"] {
        assert!(text.contains(lost), "{lost}: {text}");
    }
    let log = open(folder.path(), &clock);
    let name: Namespace = "recovered-1".parse().unwrap();
    assert_eq!(log.namespace_names(), std::slice::from_ref(&name));
    let namespace = log.namespace(&name, NamespaceSettings::default()).unwrap();
    assert_eq!(namespace.counts().keys_since, Some(clock.now()).max(namespace.counts().keys_since));
    let mut start = namespace.open_branch(&sink(), Start::Latest).await.unwrap();
    assert_eq!(start.cursor.single(), Position(0), "nobody knows how far it was");
    assert_eq!(payloads(&read(&mut *start.subscription, 300).await), numbers(0..300));
    append(&namespace, 300..301).await;
    assert_eq!(payloads(&read(&mut *start.subscription, 1).await), numbers(300..301));
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_says_another_thing_than_its_bytes_is_no_row_to_go_by() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let log = open(folder.path(), &clock);
    fill(&log, &clock).await;
    log.close().await;
    drop(log);
    let db = rusqlite::Connection::open(folder.path().join("state.db")).unwrap();
    let flipped = "UPDATE parked SET due = due - 2097152 WHERE sequence = (SELECT min(sequence) FROM parked)";
    db.execute(flipped, []).unwrap();
    db.execute("UPDATE dead SET position = 32", []).unwrap();
    drop(db);
    let log = open(folder.path(), &clock);
    let namespace = orders(&log);
    clock.advance(Duration::from_mins(59));
    namespace.shared_for_tests().flushed().await.unwrap();
    append(&namespace, 50..51).await;
    assert_eq!(namespace.end().single(), Position(51), "nothing was released before it was due");
    let letters = namespace.dead_letters(DeadQuery { limit: 9, ..DeadQuery::default() }).await;
    assert!(matches!(&letters, Err(LogError::Damaged(what)) if what.contains("log repair")), "{letters:?}");
    let query = ParkedQuery { limit: 1_000, ..ParkedQuery::default() };
    assert!(matches!(namespace.parked(query).await, Err(LogError::Damaged(_))));
    log.close().await;
    drop((namespace, log));
    assert_eq!(verify(folder.path()).unwrap().damage.len(), 2);
    let lost = repair(folder.path()).await.unwrap();
    let text = said(&lost);
    assert!(text.contains("parked records: row ") && text.contains("dead letters: row "), "{text}");
    assert_eq!(lost.len(), 2, "{text}");
    let log = open(folder.path(), &clock);
    assert_eq!(listed(&orders(&log)).await.len(), PARKED as usize - 1);
    log.close().await;
}
