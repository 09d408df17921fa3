//! What may be forgotten: finished records beyond age and size, unfinished ones beyond the backlog's age where the file
//! says to drop, keys beyond their window.
//!
//! It only asks for `Trim` and `Cursor` frames; files are removed when those are durable.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::change::Change;
use super::queue::Draft;
use super::segment::load_index;
use super::shared::Shared;
use super::space::Space;
use crate::clock::Timestamp;
use crate::record::Position;

/// Looks at every namespace. Gives the time before which no key is needed any more.
pub(super) fn look(shared: &Arc<Shared>) -> Option<Timestamp> {
    let now = shared.clock.now();
    let spaces: Vec<Arc<Space>> = shared.spaces.read().by_number.values().cloned().collect();
    let mut window = None;
    let told = |space: &&Arc<Space>| space.told.load(Ordering::Acquire);
    for space in spaces.iter().filter(told) {
        let settings = space.settings.read().clone();
        window = window.max(Some(settings.key_window));
        if settings.drop_oldest {
            drop_overflow(shared, space);
        }
        let kept = Position(space.first_kept.load(Ordering::Acquire));
        if let Some(first) = first_to_keep(shared, space, now).filter(|first| *first > kept) {
            shared.send(space, vec![Draft::Change(Change::Trim { first })]);
        }
    }
    // The keys of all lie together, so the longest window decides, and it has to be known.
    let window = window.filter(|_| spaces.iter().all(|space| told(&space)))?;
    Some(Timestamp::from_millis(now.as_millis().saturating_sub(i64::try_from(window.as_millis()).unwrap_or(i64::MAX))))
}

/// The first record of the oldest segment that is still needed, if an older one can go.
fn first_to_keep(shared: &Shared, space: &Space, now: Timestamp) -> Option<Position> {
    let settings = space.settings.read().clone();
    // Without a branch nothing reads and nothing is unfinished.
    let finished = space.lowest_cursor().unwrap_or_else(|| space.end());
    let segments = space.segments.lock();
    let folder = segments.folder().to_owned();
    let mut total = segments.bytes();
    let mut keep = None;
    let sealed = segments.sealed().to_vec();
    let active = segments.active().map(|(first, _)| first);
    drop(segments);
    for (at, segment) in sealed.iter().enumerate() {
        let next = sealed.get(at + 1).map(|next| next.first).or(active)?;
        if next.0 > finished.0 + 1 {
            break;
        }
        let too_big = total > settings.retention_bytes;
        let too_old = || {
            let index = load_index(&*shared.disk, &folder, segment.first, segment.bytes).ok()?;
            Some(now.since(index.marks.last()?.time) > settings.retention_age)
        };
        if !too_big && too_old() != Some(true) {
            break;
        }
        total -= segment.bytes;
        keep = Some(next);
    }
    keep
}

/// Moves the cursors over the oldest unfinished records while they take more than the backlog may (`on_full: drop`).
pub(super) fn drop_overflow(shared: &Shared, space: &Arc<Space>) {
    let limit = space.settings.read().backlog_bytes;
    if space.unfinished_bytes() <= limit {
        return;
    }
    // A tenth more than needed, so that it does not happen for each record.
    let first = space.position_for_bytes(limit - limit / 10);
    let target = Position(first.0.saturating_sub(1));
    let behind: Vec<_> = {
        let branches = space.branches.lock();
        branches.iter().filter(|(_, branch)| branch.wanted < target).map(|(name, b)| (name.clone(), b.wanted)).collect()
    };
    for (branch, from) in behind {
        let dropped = target.0 - from.0;
        space.overflowed.fetch_add(dropped, Ordering::Relaxed);
        tracing::error!(namespace = ?space.name, %branch, dropped, "the backlog is full: the oldest records are dropped");
        super::queue::want_cursor(&shared.queue, space, &branch, target);
    }
    space.news.notify_waiters();
}
