//! What is durable and waits for the views. Its bound in bytes makes the writer wait, and so the clients.
//!
//! Commits are given out some at a time: one write for each namespace and one wake-up serve many syncs.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::batch::Commit;
use super::change::Sequence;

/// Bytes in the inbox for which nobody waits for company any more.
const ENOUGH: usize = 1 << 20;

#[derive(Default)]
struct Inner {
    commits: VecDeque<Commit>,
    /// Bytes that have not reached the views, those under way included.
    bytes: usize,
    /// Bytes in the inbox.
    inbox: usize,
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
    linger: Duration,
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
    /// At most `limit` bytes wait, and the first of them for others no longer than `linger`.
    pub(super) fn new(limit: usize, linger: Duration) -> Self {
        Self { inner: Mutex::default(), news: Condvar::new(), room: Condvar::new(), limit, linger }
    }

    /// Hands a commit over; waits while the views are too far behind.
    pub(super) fn push(&self, commit: Commit) {
        let mut inner = self.inner.lock();
        while inner.bytes > self.limit && !inner.closed {
            self.room.wait(&mut inner);
        }
        inner.bytes += commit.bytes.len();
        inner.inbox += commit.bytes.len();
        inner.commits.push_back(commit);
        if inner.commits.len() == 1 || self.has_enough(&inner) {
            self.news.notify_one();
        }
    }

    fn has_enough(&self, inner: &Inner) -> bool {
        inner.inbox >= ENOUGH.min(self.limit / 2)
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

    /// Waits for work, at most `timeout`, and then a little for more of it.
    pub(super) fn take(&self, seen: Sequence, timeout: Duration) -> Work {
        let mut inner = self.inner.lock();
        let presses = |inner: &Inner| inner.nudged || inner.closed || inner.wanted > seen || self.has_enough(inner);
        if inner.commits.is_empty() && !presses(&inner) {
            self.news.wait_for(&mut inner, timeout);
        }
        if !inner.commits.is_empty() {
            let until = Instant::now() + self.linger;
            while !presses(&inner) && !self.news.wait_until(&mut inner, until).timed_out() {}
        }
        let nudged = std::mem::take(&mut inner.nudged);
        let commits = std::mem::take(&mut inner.commits).into();
        inner.inbox = 0;
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
