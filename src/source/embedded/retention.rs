//! What may be forgotten: finished records beyond age and size, unfinished ones beyond the backlog's age and size where
//! the file says to drop, keys beyond their window.
//!
//! It only asks for `Trim` and `Cursor` frames; files are removed when those are durable.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::age::{is_wholly_older, too_old};
use super::change::{Change, NamespaceNumber};
use super::options::NamespaceSettings;
use super::queue::Draft;
use super::shared::Shared;
use super::space::Space;
use crate::clock::Timestamp;
use crate::record::Position;

/// Segments into which the records of one `retention.age` fall at most, those that are full apart.
const SEALS_AN_AGE: u32 = 8;
/// No segment is ended earlier because of its age.
const SEAL_AFTER: Duration = Duration::from_mins(1);

/// By namespace: from when on its keys are needed, and how many of them. All of a namespace whose file was not read yet.
pub(super) fn key_bounds(shared: &Shared) -> HashMap<NamespaceNumber, (Timestamp, u64)> {
    let now = shared.clock.now();
    let spaces = shared.spaces.read();
    let bound = |space: &Arc<Space>| {
        if !space.told.load(Ordering::Acquire) {
            return (space.number, (Timestamp::MIN, u64::MAX));
        }
        let settings = space.settings.read();
        (space.number, (now.saturating_sub(settings.key_window), settings.key_max))
    };
    spaces.by_number.values().map(bound).collect()
}

/// Looks at every namespace.
pub(super) fn look(shared: &Arc<Shared>) {
    let now = shared.clock.now();
    let spaces: Vec<Arc<Space>> = shared.spaces.read().by_number.values().cloned().collect();
    let told = |space: &&Arc<Space>| space.told.load(Ordering::Acquire);
    for space in spaces.iter().filter(told) {
        let settings = space.settings.read().clone();
        if settings.drop_oldest {
            drop_overflow(shared, space);
        }
        look_at_age(shared, space, &settings, now);
        let kept = Position(space.first_kept.load(Ordering::Acquire));
        if let Some(first) = first_to_keep(shared, space, now).filter(|first| *first > kept) {
            shared.send(space, vec![Draft::Change(Change::Trim { first })]);
        }
    }
}

/// A segment whose first record was written before this ends, however few bytes it has: so finished records go a little
/// after `retention.age` in a namespace that is idle too.
pub(super) fn seal_before(space: &Space, now: Timestamp) -> Timestamp {
    now.saturating_sub((space.settings.read().retention_age / SEALS_AN_AGE).max(SEAL_AFTER))
}

/// The first record of the oldest segment that is still needed, if an older one can go.
fn first_to_keep(shared: &Shared, space: &Space, now: Timestamp) -> Option<Position> {
    let settings = space.settings.read().clone();
    // Without a branch nothing reads and nothing is unfinished.
    let finished = space.lowest_cursor().unwrap_or_else(|| space.end());
    let segments = space.segments.lock();
    let mut total = segments.bytes();
    let mut keep = None;
    let floor = now.saturating_sub(settings.retention_age);
    let sealed = segments.sealed().to_vec();
    let active = segments.active().map(|(first, _)| first);
    drop(segments);
    for (at, segment) in sealed.iter().enumerate() {
        let next = sealed.get(at + 1).map(|next| next.first).or(active)?;
        if next.0 > finished.0 + 1 {
            break;
        }
        let too_big = total > settings.retention_bytes;
        if !too_big && !is_wholly_older(shared, space, *segment, floor) {
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
    drop_up_to(shared, space, Position(first.0.saturating_sub(1)), "the backlog is full");
}

/// What is unfinished for longer than the backlog may be old: dropped, or noted so that writes are refused.
fn look_at_age(shared: &Shared, space: &Arc<Space>, settings: &NamespaceSettings, now: Timestamp) {
    let aged = too_old(shared, space, now.saturating_sub(settings.backlog_age)).unwrap_or_default();
    if settings.drop_oldest {
        space.aged.store(0, Ordering::Release);
        if aged > Position(0) {
            drop_up_to(shared, space, aged, "they are older than backlog.age");
        }
        return;
    }
    let before = space.aged.swap(aged.0, Ordering::AcqRel);
    match (before > 0, space.behind(aged)) {
        (false, Some((branch, _))) => {
            tracing::error!(namespace = ?space.name, %branch, "its records are unfinished for longer than backlog.age: writes are refused");
        }
        (true, None) => tracing::info!(namespace = ?space.name, "nothing is older than backlog.age: writes are taken"),
        _ => {}
    }
}

/// Moves the cursors of all branches that are behind `target` there, and counts what that ends.
fn drop_up_to(shared: &Shared, space: &Arc<Space>, target: Position, why: &str) {
    let behind: Vec<_> = {
        let branches = space.branches.lock();
        branches.iter().filter(|(_, branch)| branch.wanted < target).map(|(name, b)| (name.clone(), b.wanted)).collect()
    };
    for (branch, from) in behind {
        let dropped = target.0 - from.0;
        space.overflowed.fetch_add(dropped, Ordering::Relaxed);
        tracing::error!(namespace = ?space.name, %branch, dropped, why, "the oldest unfinished records are dropped");
        super::queue::want_cursor(&shared.queue, space, &branch, target);
    }
    space.news.notify_waiters();
}
