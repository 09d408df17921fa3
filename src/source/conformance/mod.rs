//! What every pair of log and shelf must do, whatever it stands on: one suite for each trait, run against each kind.
//!
//! A new kind is one more [`Kind`] and one more line at the end of this file. A case never asks which kind it runs on: where
//! promises differ it asks [`Caps`](super::Caps) and [`Kind::places`], and holds each pair to its own.

mod alone;
mod find;
mod foreign;
mod log;
mod redis;
mod shared;
mod shelf;
mod sqs;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;

use super::embedded::testing::record;
use super::embedded::{Embedded, NamespaceSettings, Options};
use super::memory::Memory;
use super::{
    Admitted, BranchName, Entry, IdempotencyKey, Lag, Log, LogError, Reach, Settlement, Shelf, ShelfCounts,
    Subscription, Write,
};
use crate::clock::{Clock, Timestamp};
use crate::record::{Position, RecordId};

/// Longest wait for anything; a wait that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long each kind remembers idempotency keys.
const KEY_WINDOW: Duration = Duration::from_secs(2 * 3_600);
/// How long, and up to which size, each kind may keep what is finished.
const KEPT_FOR: Duration = Duration::from_secs(3 * 3_600);
const KEPT_BYTES: u64 = 8 << 10;

/// A pair on its storage, with a clock of its own.
trait Kind: Sized {
    async fn start() -> Self;

    /// What a restart of the process does to it; everything acknowledged is still there.
    async fn reopen(self) -> Self;

    /// Has it look after what may be forgotten; done when it returns.
    async fn tidy(&self);

    /// What an orderly stop does. The handles stay.
    async fn close(&self);

    fn log(&self) -> Arc<dyn Log>;

    fn shelf(&self) -> Arc<dyn Shelf>;

    fn clock(&self) -> &Clock;

    /// Records have places, counted from 1, that are the same for every branch and after a restart. A queue's have none: it
    /// gives each message to one branch, under a number of the moment, and what has ended is gone.
    fn places(&self) -> bool {
        true
    }

    /// Waits until the log holds so many records that have not ended; nothing has ended yet where there are places.
    async fn until_holds(&self, log: &Arc<dyn Log>, count: u64) {
        until_end(log, count).await;
    }
}

struct OnDisk {
    folder: TempDir,
    log: Arc<Embedded>,
    clock: Clock,
}

impl OnDisk {
    fn open(folder: TempDir, clock: Clock) -> Self {
        let options = Options {
            journal_file_bytes: 1 << 20,
            ballast_bytes: 0,
            // So small that segments are sealed, and can go.
            segment_bytes: 4 << 10,
            look_every: Duration::from_millis(20),
            ..Options::new(folder.path().to_owned(), clock.clone())
        };
        Self { log: Embedded::open(options).unwrap(), folder, clock }
    }

    fn pair(&self) -> Arc<super::embedded::EmbeddedNamespace> {
        let settings = NamespaceSettings {
            key_window: KEY_WINDOW,
            retention_age: KEPT_FOR,
            retention_bytes: KEPT_BYTES,
            ..NamespaceSettings::default()
        };
        self.log.namespace(&"orders".parse().unwrap(), settings).unwrap()
    }
}

impl Kind for OnDisk {
    async fn start() -> Self {
        Self::open(tempfile::tempdir().unwrap(), clock())
    }

    async fn reopen(self) -> Self {
        self.log.close().await;
        drop(self.log);
        Self::open(self.folder, self.clock)
    }

    async fn tidy(&self) {
        self.pair().tidy_for_tests().await;
    }

    async fn close(&self) {
        self.log.close().await;
    }

    fn log(&self) -> Arc<dyn Log> {
        self.pair()
    }

    fn shelf(&self) -> Arc<dyn Shelf> {
        self.pair()
    }

    fn clock(&self) -> &Clock {
        &self.clock
    }
}

/// The reference. It does not outlive a process; to reopen it is to read it again from what it holds.
struct InMemory {
    pair: Arc<Memory>,
    clock: Clock,
}

impl Kind for InMemory {
    async fn start() -> Self {
        let clock = clock();
        let pair = Memory::new(1, clock.clone());
        pair.remember_keys_for(KEY_WINDOW);
        Self { pair, clock }
    }

    async fn reopen(self) -> Self {
        self.pair.reopen_for_tests();
        self
    }

    // It keeps nothing that is finished.
    async fn tidy(&self) {}

    async fn close(&self) {
        self.pair.close();
    }

    fn log(&self) -> Arc<dyn Log> {
        Arc::clone(&self.pair) as Arc<dyn Log>
    }

    fn shelf(&self) -> Arc<dyn Shelf> {
        Arc::clone(&self.pair) as Arc<dyn Shelf>
    }

    fn clock(&self) -> &Clock {
        &self.clock
    }
}

fn clock() -> Clock {
    Clock::manual(Timestamp::from_millis(1_764_000_000_000))
}

fn branch() -> BranchName {
    BranchName::new("sink", None)
}

fn write(key: Option<&str>, payload: &str) -> Write {
    Write { record: record(key, payload), due_at: None, idempotency: None }
}

fn keyed(key: &str, fingerprint: u8, payload: &str) -> Write {
    let idempotency = IdempotencyKey { key: key.into(), fingerprint: [fingerprint; 16] };
    Write { idempotency: Some(idempotency), ..write(None, payload) }
}

fn id_of(admitted: &Admitted) -> RecordId {
    match admitted {
        Admitted::Appended { id, .. } | Admitted::Parked { id, .. } | Admitted::Repeated { id, .. } => *id,
        other => panic!("{other:?}"),
    }
}

/// Appends these payloads without a key.
async fn append(log: &Arc<dyn Log>, payloads: &[&str]) -> Vec<Admitted> {
    log.admit(payloads.iter().map(|payload| write(None, payload)).collect()).await.unwrap()
}

/// The next `count` entries.
async fn read(subscription: &mut dyn Subscription, count: usize) -> Vec<Entry> {
    let mut found = Vec::new();
    while found.len() < count {
        let next = tokio::time::timeout(PATIENCE, subscription.next(count - found.len(), usize::MAX)).await;
        found.extend(next.expect("nothing came").unwrap());
    }
    found
}

/// Reads `count` records and ends each as it comes: of a key a queue may give the next only then.
async fn finish<K: Kind>(kind: &K, subscription: &mut dyn Subscription, count: usize) -> Vec<Entry> {
    let mut found = Vec::new();
    while found.len() < count {
        let next = tokio::time::timeout(PATIENCE, subscription.next(count - found.len(), usize::MAX)).await;
        let entries = next.unwrap_or_else(|_| panic!("only {:?} came", payloads(&found))).unwrap();
        end(&kind.shelf(), &entries).await;
        found.extend(entries);
    }
    found
}

fn positions(entries: &[Entry]) -> Vec<Position> {
    entries.iter().map(|entry| entry.position).collect()
}

/// How far the branch has come with these.
fn reach(entries: &[Entry]) -> Reach {
    entries.iter().map(|entry| entry.position).collect()
}

/// These have ended, and everything before them; waits until that is stored.
async fn end(shelf: &Arc<dyn Shelf>, entries: &[Entry]) {
    let dropped = entries.iter().map(|entry| (entry.position, "filter".into())).collect();
    let settlement =
        Settlement { frontier: reach(entries), ended: positions(entries), dropped, ..Settlement::default() };
    shelf.settle(&branch(), settlement).await.unwrap();
}

/// These came of one key: in the order in which they were written, where the log keeps that.
fn came<K: Kind>(kind: &K, entries: &[Entry], expected: &[&str]) {
    let expected = expected.iter().map(|payload| Bytes::copy_from_slice(payload.as_bytes()));
    let (mut found, mut expected) = (payloads(entries), expected.collect::<Vec<_>>());
    if !kind.log().caps().ordered {
        found.sort();
        expected.sort();
    }
    assert_eq!(found, expected);
}

fn payloads(entries: &[Entry]) -> Vec<Bytes> {
    entries.iter().map(|entry| entry.record.payload.clone()).collect()
}

/// Waits until the counts, which may be a little behind, are so.
async fn until_counts(shelf: &Arc<dyn Shelf>, fine: impl Fn(&ShelfCounts) -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !fine(&shelf.counts()) {
        assert!(std::time::Instant::now() < deadline, "{:?}", shelf.counts());
        tokio::task::yield_now().await;
    }
}

/// Waits until the log says that it ends there: a broker's may be a little behind.
async fn until_end(log: &Arc<dyn Log>, end: u64) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while log.end().single() != Position(end) {
        assert!(std::time::Instant::now() < deadline, "{:?} is the end, not {end}", log.end());
        tokio::task::yield_now().await;
    }
}

/// Waits until it is said so far behind: a broker's lag may be as it was a moment ago.
async fn until_lag(log: &Arc<dyn Log>, fine: impl Fn(&Lag) -> bool) -> Lag {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let lag = log.lag(&branch());
        if fine(&lag) {
            return lag;
        }
        assert!(std::time::Instant::now() < deadline, "{lag:?}");
        tokio::task::yield_now().await;
    }
}

/// Waits until the log keeps these revisions.
async fn until_epochs(log: &Arc<dyn Log>, expected: &[u32]) {
    let numbers = || log.epochs().iter().map(|epoch| epoch.number).collect::<Vec<_>>();
    let deadline = std::time::Instant::now() + PATIENCE;
    while numbers() != expected {
        assert!(std::time::Instant::now() < deadline, "{:?}, not {expected:?}", numbers());
        tokio::task::yield_now().await;
    }
}

/// Moves the frontier and waits until that is stored.
async fn settle_to(shelf: &Arc<dyn Shelf>, position: u64) {
    // A dropped record makes the settlement one that is waited for.
    let dropped = vec![(Position(position), "filter".into())];
    let settlement = Settlement { frontier: Position(position).into(), dropped, ..Settlement::default() };
    shelf.settle(&branch(), settlement).await.unwrap();
}

/// What comes of it, in time.
async fn in_time<T>(what: &str, wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{what} hangs"))
}

/// A verb on a closed log has said so.
fn closed<T>(verb: &str, answer: Result<T, LogError>) {
    match answer {
        Err(LogError::Closed(_)) => {}
        Err(other) => panic!("{verb} answered: {other}"),
        Ok(_) => panic!("{verb} was done"),
    }
}

/// One test for each case, each with the attribute.
macro_rules! suite {
    ($attribute:tt $name:ident, $kind:ty, $($module:ident: $($case:ident)*;)*) => {
        mod $name {
            use super::*;
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                # $attribute
                async fn $case() {
                    crate::source::conformance::$module::$case(<$kind>::start().await).await;
                }
            )*)*
        }
    };
}

/// What every log does, with a shelf beside it or without.
macro_rules! logs {
    ($attribute:tt $kind:ty) => {
        suite! {
            $attribute logs, $kind,
            log:
                records_come_in_the_order_of_the_log_each_once
                a_batch_has_as_many_records_and_bytes_as_asked_for
                a_reader_waits_for_what_comes_and_loses_nothing_when_it_gives_up
                branches_read_and_settle_apart
                writes_of_one_call_stand_together_in_their_order
                what_has_no_end_comes_again_after_a_restart_and_each_key_in_its_order
                lag_tells_how_much_is_left_and_how_old_it_is
                ids_rise_with_the_log
                a_closed_log_says_so_and_answers_whoever_waits;
        }
    };
}

/// What every pair of log and shelf does.
macro_rules! pairs {
    ($attribute:tt $kind:ty) => {
        suite! {
            $attribute pairs, $kind,
            log:
                what_is_entered_in_turn_has_its_place_before_it_is_durable
                the_same_idempotency_key_is_one_record_and_gives_the_first_answer
                the_same_key_at_once_is_one_record
                an_idempotency_key_is_exact_within_its_window_and_free_after_it
                a_branch_goes_on_under_another_name_and_is_forgotten_whole;
            shelf:
                what_is_parked_comes_when_it_is_due_in_that_order_and_never_before
                what_is_parked_is_listed_in_pages_and_by_key
                what_is_cancelled_never_comes
                what_is_moved_comes_at_its_new_time
                parked_records_outlive_a_restart
                rows_set_aside_come_back_in_order_with_what_is_known_of_them
                ends_above_the_frontier_are_remembered
                a_dead_letter_ends_its_row_and_is_listed_by_each_filter
                replay_sends_back_in_order_and_leaves_what_was_overtaken
                a_purged_letter_does_not_come_again
                a_purge_takes_no_more_than_it_was_told
                a_pause_outlives_a_restart_until_it_is_cleared
                a_closed_shelf_says_so;
        }
    };
}

/// What only is where records have places that outlive a restart and several branches read them: a message of a queue comes
/// under another number then, and to one branch.
macro_rules! places {
    ($attribute:tt $kind:ty) => {
        suite! {
            $attribute places, $kind,
            shelf:
                marks_outlive_a_restart_until_the_frontier_has_passed
                every_filter_means_the_same_alone_together_and_in_pages
                what_is_replayed_or_purged_is_what_would_be_listed;
            find:
                a_write_is_found_on_its_way;
        }
    };
}

/// What a broker does for more than one process.
macro_rules! shared {
    ($attribute:tt $kind:ty) => {
        suite! { $attribute shared, $kind, shared: what_two_processes_read_comes_in_order_and_one_goes_on_alone; }
    };
}

/// What is promised without a shelf: that nobody is left to believe there is one.
macro_rules! alone {
    ($attribute:tt $kind:ty) => {
        suite! {
            $attribute alone, $kind,
            alone:
                what_needs_a_shelf_is_refused
                a_delay_is_as_long_as_the_log_itself_can_wait
                a_pause_outlives_a_restart_where_it_is_kept_and_is_over_when_it_is_cleared;
        }
    };
}

/// What only a log that walflow keeps itself can do: places of its own choice, a look-up that knows what was dropped,
/// retention, revisions by place. A broker's log is trimmed by its owner.
macro_rules! at_home {
    ($attribute:tt $kind:ty) => {
        suite! {
            $attribute at_home, $kind,
            log:
                a_new_branch_starts_where_it_is_told_and_a_known_one_where_it_stopped
                a_write_is_found_wherever_it_is
                epochs_are_numbered_and_kept
                what_is_finished_goes_by_size_and_what_is_not_stays
                what_is_finished_goes_by_age_and_what_is_not_stays
                an_epoch_goes_when_no_cursor_and_no_row_needs_it_and_the_newest_stays;
        }
    };
}

/// A kind and what it is held to.
macro_rules! kind {
    ($attribute:tt $name:ident, $kind:ty: $($part:ident)*) => {
        mod $name {
            use super::*;
            $($part! { $attribute $kind })*
        }
    };
}

kind!([cfg(test)] embedded, OnDisk: logs pairs places at_home);
kind!([cfg(test)] memory, InMemory: logs pairs places at_home);
kind!([ignore = "needs PostgreSQL: run tests/run"] postgres_shelf, foreign::OnPostgres: logs pairs places);
kind!([ignore = "needs Kafka and PostgreSQL: run tests/run"] kafka, foreign::OnKafka<true>: logs pairs places shared);
kind!([ignore = "needs Kafka: run tests/run"] kafka_alone, foreign::OnKafka<false>: logs alone);
kind!([ignore = "needs Redis: run tests/run"] redis_streams, redis::OnRedis: logs pairs places shared);
kind!([ignore = "needs SQS and PostgreSQL: run tests/run"] sqs_standard, sqs::OnSqs<false, true>: logs pairs shared);
kind!([ignore = "needs SQS: run tests/run"] sqs_standard_alone, sqs::OnSqs<false, false>: logs alone);
kind!([ignore = "needs SQS and PostgreSQL: run tests/run"] sqs_fifo, sqs::OnSqs<true, true>: logs pairs shared);
kind!([ignore = "needs SQS: run tests/run"] sqs_fifo_alone, sqs::OnSqs<true, false>: logs alone);
