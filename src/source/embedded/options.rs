//! What an embedded log can be told: where it lies, how much it may take, and each namespace's own bounds.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::disk::{Disk, RealDisk};
use super::scan::OnRot;
use crate::clock::Clock;

/// The settings of one embedded log. [`Options::new`] gives those for production; tests make files tiny.
#[derive(Clone)]
pub struct Options {
    /// The data folder.
    pub data: PathBuf,
    /// Wall-clock time.
    pub clock: Clock,
    /// The file system.
    pub disk: Arc<dyn Disk>,
    /// What a start does about durable frames that are damaged.
    pub on_rot: OnRot,
    /// Bytes of a journal file.
    pub journal_file_bytes: u64,
    /// Journal files kept ready, so that acks and trims can be written when the disk is full.
    pub journal_spares: usize,
    /// Bytes of journal after which the views are made durable.
    pub checkpoint_bytes: u64,
    /// Bytes kept aside for `state.db` and segments when the disk is full.
    pub ballast_bytes: u64,
    /// Records that a branch's reader gives beyond what the branch has stored as ended.
    pub window: u64,
    /// Bytes after which a segment is sealed.
    pub segment_bytes: u64,
    /// Bytes by which the views may lag before writers wait.
    pub settle_lag_bytes: usize,
    /// How long what is durable waits for more before it goes on to the views together.
    pub settle_linger: Duration,
    /// Bytes of requests that may wait for the writer.
    pub queue_bytes: usize,
    /// Bytes of parked records kept in memory because they are due soon.
    pub due_bytes: usize,
    /// Bytes of a namespace's newest records that stay in memory for readers that are behind.
    pub tail_bytes: u64,
    /// How long changes wait before `state.db` commits them.
    pub commit_every: Duration,
    /// How often retention and the age of the backlog are looked at, and a full disk.
    pub look_every: Duration,
}

impl Options {
    /// The settings for production.
    pub fn new(data: PathBuf, clock: Clock) -> Self {
        Self {
            data,
            clock,
            disk: Arc::new(RealDisk),
            on_rot: OnRot::Refuse,
            journal_file_bytes: 64 << 20,
            journal_spares: 2,
            checkpoint_bytes: 192 << 20,
            ballast_bytes: 16 << 20,
            window: 20_000,
            segment_bytes: 64 << 20,
            settle_lag_bytes: 32 << 20,
            settle_linger: Duration::from_millis(20),
            queue_bytes: 64 << 20,
            due_bytes: 32 << 20,
            tail_bytes: 1 << 20,
            commit_every: Duration::from_millis(250),
            look_every: Duration::from_secs(5),
        }
    }

    /// Spare journal files that are not removed: as many as a checkpoint frees at once, so that none is made anew while
    /// writes come in.
    pub(super) fn journal_kept(&self) -> usize {
        self.journal_spares + usize::try_from(self.checkpoint_bytes / self.journal_file_bytes).unwrap_or(0)
    }
}

/// One namespace's bounds. They may change while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceSettings {
    /// Finished records are kept this long.
    pub retention_age: Duration,
    /// Finished records are kept up to this size.
    pub retention_bytes: u64,
    /// Unfinished records may take this much.
    pub backlog_bytes: u64,
    /// Unfinished records may be this old.
    pub backlog_age: Duration,
    /// At the bound the oldest unfinished records are dropped; else new ones are refused.
    pub drop_oldest: bool,
    /// How long idempotency keys are remembered.
    pub key_window: Duration,
    /// How many idempotency keys are remembered at least; a few more may be, the oldest go in blocks.
    pub key_max: u64,
    /// The largest payload.
    pub max_record_bytes: u64,
}

impl Default for NamespaceSettings {
    fn default() -> Self {
        Self {
            retention_age: Duration::from_secs(86_400),
            retention_bytes: 1 << 30,
            backlog_bytes: 20 << 30,
            backlog_age: Duration::from_secs(7 * 86_400),
            drop_oldest: false,
            key_window: Duration::from_secs(86_400),
            key_max: 10_000_000,
            max_record_bytes: 1 << 20,
        }
    }
}
