//! What is durable and waits for the views. Its bound in bytes makes the writer wait, and so the clients.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::batch::Commit;
use super::change::Sequence;

#[derive(Default)]
struct Inner {
    commits: VecDeque<Commit>,
    bytes: usize,
    wanted: Sequence,
    nudged: bool,
    closed: bool,
    over: bool,
}

/// The settle thread's inbox.
pub(super) struct Settling {
    inner: Mutex<Inner>,
    news: Condvar,
    room: Condvar,
    limit: usize,
}

/// What the settle thread takes out at once.
pub(super) struct Work {
    pub(super) commits: Vec<Commit>,
    /// Somebody waits until `state.db` shows everything up to here.
    pub(super) wanted: Sequence,
    /// The journal has gone on to another file.
    pub(super) nudged: bool,
    /// Nothing more will come.
    pub(super) closed: bool,
}

impl Settling {
    pub(super) fn new(limit: usize) -> Self {
        Self { inner: Mutex::default(), news: Condvar::new(), room: Condvar::new(), limit }
    }

    /// Hands a commit over; waits while the views are too far behind.
    pub(super) fn push(&self, commit: Commit) {
        let mut inner = self.inner.lock();
        while inner.bytes > self.limit && !inner.closed {
            self.room.wait(&mut inner);
        }
        inner.bytes += commit.bytes.len();
        inner.commits.push_back(commit);
        self.news.notify_one();
    }

    /// Hands over a commit of a start's replay. Never waits and never counts: it is in memory already, and the start
    /// serves before the views have it (LOG.md 23).
    pub(super) fn push_replay(&self, commit: Commit) {
        self.inner.lock().commits.push_back(commit);
        self.news.notify_one();
    }

    /// Asks for a commit of everything up to `target`.
    pub(super) fn ask(&self, target: Sequence) {
        let mut inner = self.inner.lock();
        inner.wanted = inner.wanted.max(target);
        self.news.notify_one();
    }

    /// Has the settle thread look whether a checkpoint is due.
    pub(super) fn nudge(&self) {
        self.inner.lock().nudged = true;
        self.news.notify_one();
    }

    /// Nothing more will come.
    pub(super) fn close(&self) {
        self.inner.lock().closed = true;
        self.news.notify_one();
        self.room.notify_all();
    }

    /// Waits for work, at most `timeout`.
    pub(super) fn take(&self, seen: Sequence, timeout: Duration) -> Work {
        let mut inner = self.inner.lock();
        if inner.commits.is_empty() && !inner.nudged && !inner.closed && inner.wanted <= seen {
            self.news.wait_for(&mut inner, timeout);
        }
        let nudged = std::mem::take(&mut inner.nudged);
        let commits = std::mem::take(&mut inner.commits).into();
        Work { commits, wanted: inner.wanted, nudged, closed: inner.closed }
    }

    /// So many bytes of pushed commits have reached the views; those of a replay are not among them.
    pub(super) fn settled(&self, bytes: usize) {
        let mut inner = self.inner.lock();
        inner.bytes = inner.bytes.saturating_sub(bytes);
        self.room.notify_all();
    }

    /// The settle thread has ended.
    pub(super) fn end(&self) {
        let mut inner = self.inner.lock();
        inner.closed = true;
        inner.over = true;
        self.room.notify_all();
    }

    pub(super) fn is_over(&self) -> bool {
        self.inner.lock().over
    }
}
