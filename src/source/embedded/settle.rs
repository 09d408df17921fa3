//! The settle thread: carries durable frames on to the views, makes the views durable, recycles the journal.
//!
//! No answer waits for it. Segments are written at once and without a sync; `state.db` commits many changes together. A
//! checkpoint syncs the segments, then commits `state.db` durably with the segments' lengths, and only then frees
//! journal files. A failed sync of a view fences the log.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::batch::{Commit, Durable};
use super::change::{Change, NamespaceNumber, Sequence};
use super::segment::{SegmentError, SegmentFiles};
use super::settling::Work;
use super::shared::Shared;
use super::space::Space;
use super::state::{Checkpoint, SegmentMark, State, StateError};
use super::{ballast, retention, scheduled_step};
use crate::record::Position;

/// Bytes that are written to segments together, about.
const WRITE_BYTES: usize = 4 << 20;
/// Frames and bytes that one transaction of `state.db` takes at most.
const COMMIT_FRAMES: usize = 20_000;
const COMMIT_BYTES: usize = 16 << 20;
/// Looks for which a trim waits for the checkpoint that lets it take a segment, before it brings one about.
const HELD_LOOKS: u32 = 6;
/// Journal files in use that bring a checkpoint about: repeated kills each leave one behind.
const MANY_FILES: usize = 6;
/// How long a full disk is waited for before the next look.
const FULL_WAIT: Duration = Duration::from_millis(200);

/// What the settle thread owns.
pub(super) struct Settler {
    shared: Arc<Shared>,
    state: State,
    files: SegmentFiles,
    /// Applied to `state.db` and not committed yet; applied again after a full disk.
    open: Vec<Commit>,
    open_frames: usize,
    open_bytes: usize,
    since: Instant,
    /// Journal bytes since the last checkpoint.
    unchecked: u64,
    reached: Sequence,
    looked: Instant,
    /// Commits of the start's replay that are still to come. Until they have, the segments lack what `state.db` has: no
    /// checkpoint, and nothing is loaded that the journal may have ended.
    replay: usize,
    /// By namespace: the active segment that the last checkpoint names. A start needs its file, so no trim takes it.
    marked: HashMap<NamespaceNumber, Position>,
    /// Since when a trim waits for a checkpoint.
    held_back: Option<Instant>,
    /// The filter of keys has outgrown the store: from which block on it stays, and what the store must show first.
    relearn: Option<(u64, Sequence)>,
    /// Deleted namespaces whose files go with the next checkpoint.
    doomed: Vec<Arc<Space>>,
}

enum Stop {
    /// The log is fenced.
    Fenced,
}

impl Settler {
    /// `replay` = how many commits of the journal's replay will be pushed before any other.
    pub(super) fn new(shared: Arc<Shared>, state: State, files: SegmentFiles, replay: usize) -> Self {
        let now = Instant::now();
        let reached = state.applied();
        let marks = state.segment_marks().unwrap_or_default();
        Self {
            shared,
            state,
            files,
            open: Vec::new(),
            open_frames: 0,
            open_bytes: 0,
            since: now,
            unchecked: 0,
            reached,
            looked: now,
            replay,
            marked: marks.iter().map(|mark| (mark.namespace, mark.first)).collect(),
            held_back: None,
            relearn: None,
            doomed: Vec::new(),
        }
    }

    /// Works until the inbox is closed and empty; ends with a checkpoint unless the log is fenced.
    pub(super) fn run(mut self) {
        let _ = self.work();
        self.shared.settling.end();
        self.shared.nudge_finisher();
    }

    fn work(&mut self) -> Result<(), Stop> {
        // Branches that come back wait for the views, so files full of zeros are made in the first quiet moment.
        let (started, mut prepared) = (Instant::now(), false);
        loop {
            let timeout = if self.open.is_empty() {
                self.shared.options.look_every
            } else {
                self.shared.options.commit_every.saturating_sub(self.since.elapsed())
            };
            let Work { commits, wanted, nudged, closed } = self.shared.settling.take(self.state.applied(), timeout);
            let quiet = commits.is_empty();
            self.take_in(commits)?;
            let full = self.open_frames >= COMMIT_FRAMES || self.open_bytes >= COMMIT_BYTES;
            let ripe = !self.open.is_empty() && self.since.elapsed() >= self.shared.options.commit_every;
            let asked = wanted > self.state.applied() && self.reached > self.state.applied();
            let step = self.replay == 0 && self.shared.due.wants_step(self.shared.clock.now());
            if full || ripe || asked || step || closed {
                self.commit(false)?;
            }
            if step {
                scheduled_step(&self.shared, &self.state);
            }
            let grown = self.unchecked >= self.shared.options.checkpoint_bytes || self.shared.files.live() > MANY_FILES;
            let held =
                self.held_back.is_some_and(|since| since.elapsed() >= self.shared.options.look_every * HELD_LOOKS);
            let due = grown || held || !self.doomed.is_empty() || closed;
            if due && self.replay == 0 && self.shared.status.fenced().is_none() {
                self.commit(true)?;
            }
            let first = !prepared && (quiet || started.elapsed() >= self.shared.options.look_every);
            if nudged || first {
                self.prepare()?;
                prepared = true;
            }
            if self.looked.elapsed() >= self.shared.options.look_every {
                self.looked = Instant::now();
                self.look();
                if self.state.is_changed() && self.replay == 0 {
                    self.commit(false)?;
                }
            }
            if closed {
                return Ok(());
            }
        }
    }

    /// Takes durable commits into the segments, some at a time, and each into the open transaction.
    fn take_in(&mut self, commits: Vec<Commit>) -> Result<(), Stop> {
        let mut commits = commits.into_iter().peekable();
        while commits.peek().is_some() {
            let mut bytes = 0;
            let mut together = Vec::new();
            while bytes < WRITE_BYTES
                && let Some(commit) = commits.next()
            {
                bytes += commit.bytes.len();
                together.push(commit);
            }
            self.write_segments(&together)?;
            for commit in together {
                self.take_in_state(commit)?;
            }
        }
        Ok(())
    }

    fn take_in_state(&mut self, commit: Commit) -> Result<(), Stop> {
        if self.open.is_empty() {
            self.since = Instant::now();
        }
        let replayed = self.replay > 0;
        self.replay = self.replay.saturating_sub(1);
        self.unchecked += commit.bytes.len() as u64;
        self.reached = self.reached.max(commit.last);
        self.open_frames += commit.frames.len();
        self.open_bytes += commit.bytes.len();
        self.apply(&commit)?;
        if !replayed {
            self.shared.settling.settled(commit.bytes.len());
        }
        if commit.frames.iter().any(|durable| matters(&durable.frame.change)) {
            self.open.push(commit);
        } else if let Some(last) = self.open.last_mut() {
            last.last = last.last.max(commit.last);
        } else {
            // Nothing for `state.db`, but the sequence it has reached.
            self.open.push(Commit { bytes: bytes::Bytes::new(), frames: Vec::new(), runs: Vec::new(), ..commit });
        }
        if self.open_frames >= COMMIT_FRAMES || self.open_bytes >= COMMIT_BYTES {
            self.commit(false)?;
        }
        Ok(())
    }

    /// Writes each namespace's records with one write, however many commits they came in.
    fn write_segments(&mut self, commits: &[Commit]) -> Result<(), Stop> {
        let mut at: HashMap<NamespaceNumber, usize> = HashMap::new();
        let mut groups: Vec<(&Arc<Space>, Vec<(&Commit, &Durable)>)> = Vec::new();
        for commit in commits {
            let mut frames = commit.frames.as_slice();
            for (space, count) in &commit.runs {
                let (own, rest) = frames.split_at(*count.min(&frames.len()));
                frames = rest;
                let index = *at.entry(space.number).or_insert_with(|| {
                    groups.push((space, Vec::new()));
                    groups.len() - 1
                });
                if let Some((_, group)) = groups.get_mut(index) {
                    group.extend(own.iter().map(|durable| (commit, durable)));
                }
            }
        }
        for (space, own) in groups {
            self.write_own(space, &own)?;
        }
        Ok(())
    }

    fn write_own(&mut self, space: &Arc<Space>, own: &[(&Commit, &Durable)]) -> Result<(), Stop> {
        let in_order = |durable: &Durable| {
            matches!(durable.frame.change, Change::Append { .. } | Change::Release { .. } | Change::Dropped { .. })
        };
        let frames: Vec<_> = own
            .iter()
            .filter(|(_, durable)| in_order(durable))
            .map(|(commit, durable)| (&durable.header, &durable.frame, commit.raw(durable)))
            .collect();
        let mut left = frames.as_slice();
        while !left.is_empty() {
            let written = space.segments.lock().append(&mut self.files, left);
            let Err((done, error)) = written else { break };
            left = left.get(done..).unwrap_or_default();
            self.storage_failed(&error)?;
        }
        if !frames.is_empty() {
            let settled = space.segments.lock().settled();
            space.evict(settled, space.passed(), self.shared.options.tail_bytes);
        }
        for (_, durable) in own {
            match &durable.frame.change {
                Change::Trim { first } => self.trim(space, *first)?,
                Change::NamespaceDeleted => {
                    self.shared.due.forget(space.number);
                    // The last checkpoint may name a segment of it, and then a start wants to find the file.
                    self.doomed.push(Arc::clone(space));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn trim(&mut self, space: &Arc<Space>, first: Position) -> Result<(), Stop> {
        let marked = self.marked.get(&space.number).copied().filter(|marked| *marked > Position(0) && *marked < first);
        if marked.is_some() {
            self.held_back.get_or_insert_with(Instant::now);
        }
        let first = marked.unwrap_or(first);
        let trimmed = space.segments.lock().trim(&self.files, first);
        match trimmed {
            Ok(_) => Ok(()),
            Err(error) => self.storage_failed(&error),
        }
    }

    /// A full disk is waited for; anything else fences.
    fn storage_failed(&self, error: &SegmentError) -> Result<(), Stop> {
        if error.is_full() {
            return self.wait_for_room();
        }
        self.shared.fence(&error.to_string());
        Err(Stop::Fenced)
    }

    /// Gives the ballast up and waits a moment. A log that is closing does not wait: the journal has everything.
    fn wait_for_room(&self) -> Result<(), Stop> {
        self.shared.status.disk_is_full();
        if self.shared.status.is_closing() || self.shared.status.fenced().is_some() {
            return Err(Stop::Fenced);
        }
        ballast::give_up(&self.shared.options);
        std::thread::sleep(FULL_WAIT);
        Ok(())
    }

    /// Sees to spare journal files and ballast, so that acks and trims can be written when the disk is full.
    fn prepare(&self) -> Result<(), Stop> {
        let options = &self.shared.options;
        match self.shared.files.prepare(options.journal_spares).and_then(|()| ballast::keep(options)) {
            Ok(()) => {
                self.shared.status.disk_has_room();
                Ok(())
            }
            Err(error) if super::is_full(&error) => {
                self.shared.status.disk_is_full();
                Ok(())
            }
            Err(error) => {
                self.shared.fence(&format!("make spare journal files: {error}"));
                Err(Stop::Fenced)
            }
        }
    }

    fn state_failed(&mut self, error: &StateError) -> Result<(), Stop> {
        if error.is_disk_full() {
            self.state.roll_back();
            return self.wait_for_room();
        }
        self.shared.fence(&error.to_string());
        Err(Stop::Fenced)
    }

    fn apply(&mut self, commit: &Commit) -> Result<(), Stop> {
        loop {
            let applied = self.state.applied();
            let mut frames = commit.frames.iter().filter(|durable| durable.frame.sequence > applied);
            let Err(error) = frames.try_for_each(|durable| self.state.apply(&durable.frame)) else { return Ok(()) };
            self.state_failed(&error)?;
            self.apply_open()?;
        }
    }

    /// Applies again what a roll-back took back.
    fn apply_open(&mut self) -> Result<(), Stop> {
        loop {
            let applied = self.state.applied();
            let mut failed = None;
            for durable in self.open.iter().flat_map(|commit| &commit.frames) {
                if durable.frame.sequence > applied
                    && let Err(error) = self.state.apply(&durable.frame)
                {
                    failed = Some(error);
                    break;
                }
            }
            let Some(error) = failed else { return Ok(()) };
            self.state_failed(&error)?;
        }
    }

    /// Commits `state.db`; with `durable` it is a checkpoint.
    fn commit(&mut self, durable: bool) -> Result<(), Stop> {
        let applied = self.reached;
        let checkpoint = if durable { Some(self.sync_segments()?) } else { None };
        if checkpoint.is_none() && applied == self.state.applied() && !self.state.is_changed() {
            return Ok(());
        }
        while let Err(error) = self.state.commit(applied, checkpoint.as_ref()) {
            if checkpoint.is_some() && !error.is_disk_full() {
                self.shared.fence(&error.to_string());
                return Err(Stop::Fenced);
            }
            self.state_failed(&error)?;
            self.apply_open()?;
        }
        self.open.clear();
        self.open_frames = 0;
        self.open_bytes = 0;
        self.since = Instant::now();
        self.shared.committed.send_replace(applied);
        self.shared.keys.committed(applied);
        if let Some(checkpoint) = checkpoint {
            self.unchecked = 0;
            self.held_back = None;
            self.marked = checkpoint.segments.iter().map(|mark| (mark.namespace, mark.first)).collect();
            if let Err(error) = self.shared.files.recycle(applied) {
                self.shared.fence(&format!("recycle journal files: {error}"));
                return Err(Stop::Fenced);
            }
            self.remove_finished()?;
            self.prepare()?;
        }
        Ok(())
    }

    /// Removes what the checkpoint before no longer lets a start look for.
    fn remove_finished(&mut self) -> Result<(), Stop> {
        for space in std::mem::take(&mut self.doomed) {
            let removed = space.segments.lock().remove_all(&mut self.files);
            if let Err(error) = removed {
                tracing::error!(%error, "the segments of a deleted namespace could not be removed; the next start does");
            }
        }
        let spaces: Vec<Arc<Space>> = self.shared.spaces.read().by_number.values().cloned().collect();
        for space in spaces {
            let first = Position(space.first_kept.load(Ordering::Acquire));
            if space.segments.lock().oldest().is_some_and(|oldest| oldest < first) {
                self.trim(&space, first)?;
            }
        }
        Ok(())
    }

    /// Makes the segments durable. Gives what the checkpoint says of them.
    fn sync_segments(&mut self) -> Result<Checkpoint, Stop> {
        let spaces: Vec<Arc<Space>> = self.shared.spaces.read().by_number.values().cloned().collect();
        for space in &spaces {
            let written = space.segments.lock().write_index(&self.files);
            if let Err(error) = written {
                // A sidecar is only a help: without it the segment is read at the next start.
                tracing::warn!(%error, "a segment's sidecar could not be written");
            }
        }
        if let Err(error) = self.files.sync() {
            self.shared.fence(&error.to_string());
            return Err(Stop::Fenced);
        }
        let mark = |space: &Arc<Space>| {
            let segments = space.segments.lock();
            let (first, length) = segments.active().unwrap_or((Position(0), 0));
            (segments.settled() > Position(0)).then(|| SegmentMark {
                namespace: space.number,
                first,
                length,
                end: segments.settled(),
            })
        };
        let mut segments: Vec<SegmentMark> = spaces.iter().filter_map(mark).collect();
        segments.sort_unstable_by_key(|mark: &SegmentMark| -> NamespaceNumber { mark.namespace });
        Ok(Checkpoint { segments })
    }

    /// Ends the active segments that are old, so that retention can take them.
    fn seal_old(&mut self) -> Result<(), Stop> {
        let now = self.shared.clock.now();
        let spaces: Vec<Arc<Space>> = self.shared.spaces.read().by_number.values().cloned().collect();
        for space in spaces {
            let sealed = space.segments.lock().seal_older(&mut self.files, retention::seal_before(&space, now));
            match sealed {
                Ok(()) => {}
                // The next look tries again.
                Err(error) if error.is_full() => return Ok(()),
                Err(error) => self.storage_failed(&error)?,
            }
        }
        Ok(())
    }

    fn look(&mut self) {
        if self.shared.status.is_disk_full() && self.prepare().is_err() {
            return;
        }
        if self.replay == 0 && self.seal_old().is_err() {
            return;
        }
        retention::look(&self.shared);
        self.forget_keys();
        self.forget_epochs();
    }

    /// Forgets the revisions of files that no record needs any more. While frames wait to be applied nobody can say.
    fn forget_epochs(&mut self) {
        if self.replay > 0 {
            return;
        }
        let spaces: Vec<Arc<Space>> = self.shared.spaces.read().by_number.values().cloned().collect();
        for space in spaces.into_iter().filter(|space| space.epochs.lock().len() > 1) {
            match self.state.forget_epochs(space.number) {
                Ok(None) => {}
                Ok(Some(first)) => space.epochs.lock().retain(|epoch| epoch.number >= first),
                Err(error) => tracing::warn!(%error, "old revisions could not be forgotten"),
            }
        }
    }

    /// Forgets the keys that no namespace needs any more, here and in the filter.
    fn forget_keys(&mut self) {
        match self.state.forget_keys(&retention::key_bounds(&self.shared)) {
            Ok(changed) => {
                let spaces = self.shared.spaces.read();
                for (number, since) in changed {
                    if let Some(space) = spaces.by_number.get(&number) {
                        space.keys_forgotten(since);
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "old idempotency keys could not be forgotten"),
        }
        if self.relearn.is_none() {
            let outgrown = self.shared.keys.outgrown(self.state.keys());
            self.relearn = outgrown.map(|block| (block, self.shared.durable()));
        }
        if let Some((block, _)) = self.relearn.take_if(|(_, durable)| *durable <= self.state.applied()) {
            let (keys, reader) = (self.shared.keys.clone(), self.shared.reader.clone());
            std::thread::spawn(move || {
                if let Err(error) = keys.learn(block, |each| reader.each_key(each)) {
                    tracing::warn!(%error, "the keys could not be read; the filter stays as large as it is");
                }
            });
        }
    }
}

/// Whether a change means anything to `state.db`.
const fn matters(change: &Change) -> bool {
    !matches!(change, Change::Append { idempotency: None, .. } | Change::Dropped { .. })
}
