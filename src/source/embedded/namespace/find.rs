//! Where a write is: on the shelf, in the log and what each branch made of it, or cancelled.

use std::sync::Arc;

use super::EmbeddedNamespace;
use crate::record::{Position, Record, RecordId};
use crate::source::embedded::index::Index;
use crate::source::embedded::reader::from_segments_at;
use crate::source::embedded::segment::{Extent, load_index};
use crate::source::{BranchName, Entry, Fate, Found, LogError};

/// Records read at once while looking for an id.
const READ: usize = 512;

type Dropped = Vec<(BranchName, Box<str>)>;

impl EmbeddedNamespace {
    pub(super) async fn look_up(self, id: RecordId) -> Result<Option<Found>, LogError> {
        // Before anything is looked at: what has ended by then is in the store and the segments when they are read.
        let cursors: Vec<(BranchName, Position)> = {
            let branches = self.space.branches.lock();
            branches.iter().map(|(name, branch)| (name.clone(), branch.wanted)).collect()
        };
        if let Some(row) = self.ask(move |reader| reader.parked_by_id(id)).await? {
            let damaged = |_| LogError::Damaged(format!("the parked record {id} cannot be read").into());
            let record = Record::decode(&row.record).map_err(damaged)?;
            return Ok(Some(Found::Parked { record: Arc::new(record), due_at: row.due_at }));
        }
        let searching = self.clone();
        let panicked = |_| LogError::Closed("the reading thread failed".into());
        let found = tokio::task::spawn_blocking(move || searching.search(id)).await.map_err(panicked)??;
        let Some((entry, dropped)) = found else {
            let cancelled = self.ask(move |reader| reader.is_cancelled(id)).await?;
            return Ok(cancelled.then_some(Found::Cancelled));
        };
        let mut branches = Vec::with_capacity(cursors.len());
        for (name, cursor) in cursors {
            let drop = dropped.iter().find(|(branch, _)| *branch == name).map(|(_, reason)| reason.clone());
            let fate = self.fate(&name, entry.position, cursor, drop).await?;
            branches.push((name, fate));
        }
        Ok(Some(Found::InLog { record: entry.record, position: entry.position, branches }))
    }

    async fn fate(
        &self,
        branch: &BranchName,
        position: Position,
        cursor: Position,
        dropped: Option<Box<str>>,
    ) -> Result<Fate, LogError> {
        let (number, name) = (self.space.number, branch.clone());
        self.ask(move |reader| {
            if let Some(letter) = reader.dead_at(number, &name, position)?.into_iter().next() {
                return Ok(Fate::Dead { reason: letter.reason, last_error: letter.last_error });
            }
            if let Some(row) = reader.aside_at(number, &name, position)?.into_iter().next() {
                let (attempts, next_try, last_error) = (row.attempts, row.next_try, row.last_error);
                return Ok(Fate::SetAside { attempts, next_try, last_error });
            }
            if let Some(reason) = dropped {
                return Ok(Fate::Dropped { reason });
            }
            if position > cursor {
                return Ok(Fate::Pending);
            }
            let (after, before) = reader.finished_between(number, &name, position)?;
            Ok(Fate::Finished { after, before })
        })
        .await
    }

    /// Looks for an id in memory and in the segments, newest first. Blocks.
    fn search(&self, id: RecordId) -> Result<Option<(Entry, Dropped)>, LogError> {
        let space = &self.space;
        let settled = space.segments.lock().settled();
        if let Some(entry) = space.recent_by_id(id)
            && entry.position > settled
        {
            return Ok(Some((entry, Vec::new())));
        }
        let mut at = settled;
        loop {
            let Some(extent) = space.segments.lock().extent(at).filter(|_| at > Position(0)) else { return Ok(None) };
            let index = self.index(extent)?;
            let place = match index.released.get(&id) {
                Some(position) => Some(*position),
                None if index.highest >= id => index.seek_id(id).map(|mark| mark.position),
                None => None,
            };
            if let Some(from) = place
                && let Some(entry) = self.read_until(id, from, index.last)?
            {
                let dropped = self.dropped(entry.position, extent.first, index)?;
                return Ok(Some((entry, dropped)));
            }
            if extent.first.0 <= 1 {
                return Ok(None);
            }
            at = Position(extent.first.0 - 1);
            let oldest = space.segments.lock().oldest();
            if oldest.is_none_or(|oldest| at < oldest) {
                return Ok(None);
            }
        }
    }

    /// How deliveries of the record at `position` ended without being sent. Its own segment's index is at hand; a branch
    /// that was behind has said so in a later segment.
    fn dropped(&self, position: Position, first: Position, index: Index) -> Result<Dropped, LogError> {
        let (mut dropped, mut first, mut index) = (Dropped::new(), first, index);
        loop {
            let here = index.dropped.iter().filter(|((at, _), _)| *at == position);
            dropped.extend(here.map(|((_, branch), reason)| (branch.clone(), reason.clone())));
            let Some(next) = self.space.segments.lock().later(first) else { return Ok(dropped) };
            (first, index) = (next.first, self.index(next)?);
        }
    }

    fn index(&self, extent: Extent) -> Result<Index, LogError> {
        let (folder, loaded) = {
            let segments = self.space.segments.lock();
            (segments.folder().to_owned(), segments.active_index(extent.first))
        };
        match loaded {
            Some(index) => Ok(index),
            None => Ok(load_index(&*self.shared.disk, &folder, extent.first, extent.bytes)?),
        }
    }

    fn read_until(&self, id: RecordId, from: Position, last: Position) -> Result<Option<Entry>, LogError> {
        let mut from = from;
        while from <= last {
            let entries = from_segments_at(&self.shared, &self.space, from, READ)?;
            let Some(newest) = entries.last().map(|entry| entry.position) else { return Ok(None) };
            if let Some(entry) = entries.into_iter().find(|entry| entry.record.id == id) {
                return Ok(Some(entry));
            }
            from = newest.next();
        }
        Ok(None)
    }
}
