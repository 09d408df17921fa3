//! The log as a whole, with tiny files so that rotation and checkpoints happen in every run.

mod age;
mod crash;
mod double;
mod entering;
mod keys;
mod power;
mod recovery;
mod repair;
mod rot;
mod rows;
mod salvage;
mod small;
mod verbs;
mod views;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::testing::record;
use super::*;
use crate::clock::{Clock, Timestamp};
use crate::record::{Namespace, Position};
use crate::source::{Admitted, BranchName, Entry, Log, Shelf, Start, Subscription, Write};

/// Longest wait for anything; a wait that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(60);

fn options(folder: &Path, clock: &Clock) -> Options {
    Options {
        journal_file_bytes: 16 << 10,
        journal_spares: 1,
        checkpoint_bytes: 24 << 10,
        ballast_bytes: 4 << 10,
        segment_bytes: 4 << 10,
        tail_bytes: 2 << 10,
        settle_linger: Duration::ZERO,
        commit_every: Duration::from_millis(5),
        ..Options::new(folder.to_owned(), clock.clone())
    }
}

fn clock() -> Clock {
    Clock::manual(Timestamp::from_millis(1_764_000_000_000))
}

fn open(folder: &Path, clock: &Clock) -> Arc<Embedded> {
    Embedded::open(options(folder, clock)).unwrap()
}

fn orders(log: &Embedded) -> Arc<EmbeddedNamespace> {
    let name: Namespace = "orders".parse().unwrap();
    log.namespace(&name, NamespaceSettings::default()).unwrap()
}

fn sink() -> BranchName {
    BranchName::new("sink", None)
}

fn write(key: Option<&str>, payload: &str) -> Write {
    Write { record: record(key, payload), due_at: None, idempotency: None }
}

async fn append(namespace: &EmbeddedNamespace, numbers: std::ops::Range<u32>) -> Vec<Admitted> {
    let mut all = Vec::new();
    for number in numbers {
        all.extend(namespace.admit(vec![write(Some("k"), &number.to_string())]).await.unwrap());
    }
    all
}

/// Reads exactly `count` records.
async fn read(subscription: &mut dyn Subscription, count: usize) -> Vec<Entry> {
    let mut entries = Vec::new();
    while entries.len() < count {
        let next = tokio::time::timeout(PATIENCE, subscription.next(count - entries.len(), 1 << 20)).await;
        entries.extend(next.expect("nothing came").unwrap());
    }
    entries
}

fn payloads(entries: &[Entry]) -> Vec<Bytes> {
    entries.iter().map(|entry| entry.record.payload.clone()).collect()
}

fn numbers(range: std::ops::Range<u32>) -> Vec<Bytes> {
    range.map(|number| Bytes::from(number.to_string())).collect()
}

/// Copies a data folder as a crash would leave it: whatever the process has written, at this moment.
fn snapshot(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    copy(from, to.path());
    to
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir_all(&target).unwrap();
            copy(&entry.path(), &target);
        } else if std::fs::copy(entry.path(), &target).is_err() {
            // A file that was recycled meanwhile; the caller copies only what stands still where that matters.
        }
    }
}
