//! What one assignment of partitions holds: records ready to be read, the frontier of what has ended, bounds in bytes.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use rdkafka::TopicPartitionList;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::offsets;
use crate::clock::Timestamp;
use crate::record::{Position, Record};
use crate::source::foreign::budget::Share;
use crate::source::{Entry, LogError, Reach, StoredPause};

pub(super) struct Session {
    pub(super) generation: u64,
    pub(super) parts: Vec<u16>,
    pub(super) frontier: Reach,
    pub(super) committed: Reach,
    queue: VecDeque<Entry>,
    /// Of what is in the queue.
    share: Share,
    /// Read and not behind the frontier, by their time.
    times: VecDeque<(Position, Timestamp)>,
    /// What a record weighs, with an eye to the latest.
    pub(super) usual_weight: u64,
    /// Somebody reads it.
    pub(super) taken: bool,
    /// Somebody has read of it before.
    pub(super) used: bool,
    /// Parts that bring enough for now: the thread pauses them.
    pub(super) resting: BTreeSet<u16>,
    /// The thread has to go back to the frontier.
    pub(super) rewind: bool,
    pub(super) moved: CancellationToken,
    /// Parts of which the group has no offset.
    pub(super) fresh: Vec<u16>,
    /// A pause that the group keeps beside its offsets.
    pub(super) pause: Option<StoredPause>,
    /// Who waits until that is so.
    pub(super) told: Vec<Told>,
}

/// Who waits for a commit.
pub(super) type Told = oneshot::Sender<Result<(), LogError>>;

impl Session {
    /// One that goes on at `cursor`.
    pub(super) fn new(generation: u64, parts: Vec<u16>, cursor: Reach) -> Self {
        Self {
            generation,
            parts,
            committed: cursor.clone(),
            frontier: cursor,
            queue: VecDeque::new(),
            share: Share::default(),
            times: VecDeque::new(),
            usual_weight: 0,
            taken: false,
            used: false,
            resting: BTreeSet::new(),
            rewind: false,
            moved: CancellationToken::new(),
            fresh: Vec::new(),
            pause: None,
            told: Vec::new(),
        }
    }

    /// Forgets what was read.
    pub(super) fn clear(&mut self) {
        self.share.clear();
        self.resting.clear();
        self.queue.clear();
        self.times.clear();
    }

    pub(super) fn is_full(&self) -> bool {
        self.share.is_full()
    }

    /// One that was full stays paused until then.
    pub(super) const fn is_half_full(&self) -> bool {
        self.share.is_half_full()
    }

    /// Adds what came, but for what is not its own and what has ended.
    pub(super) fn push(&mut self, arrived: Vec<(Position, Record)>) {
        for (position, record) in arrived {
            if !self.parts.contains(&position.part()) || self.frontier.covers(position) {
                continue;
            }
            let weight = record.weight();
            self.share.add(weight);
            let usual = self.usual_weight;
            self.usual_weight = if usual == 0 { weight as u64 } else { (usual * 15 + weight as u64).div_ceil(16) };
            self.times.push_back((position, record.written_at));
            self.queue.push_back(Entry::new(position, Arc::new(record)));
        }
    }

    /// Takes up to so many records, and no more once they have so many bytes; none when none is there.
    pub(super) fn take(&mut self, max_records: usize, max_bytes: usize) -> Vec<Entry> {
        let (mut entries, mut bytes) = (Vec::new(), 0);
        while entries.len() < max_records.max(1)
            && bytes <= max_bytes
            && let Some(entry) = self.queue.pop_front()
        {
            bytes += entry.record.weight();
            entries.push(entry);
        }
        self.share.take(bytes);
        entries
    }

    /// All up to `frontier` has ended, of the parts that are its own.
    pub(super) fn progress(&mut self, frontier: &Reach) {
        for position in frontier.iter().filter(|position| self.parts.contains(&position.part())) {
            self.frontier.advance(position);
        }
        while self.times.front().is_some_and(|(position, _)| self.frontier.covers(*position)) {
            self.times.pop_front();
        }
    }

    /// What the group is to keep.
    pub(super) fn progress_in(&self, topic: &str) -> TopicPartitionList {
        offsets::noted(topic, &self.frontier, &self.parts, self.pause.as_ref())
    }

    /// The time of the oldest record that was read and has no end.
    pub(super) fn oldest(&self) -> Option<Timestamp> {
        self.times.front().map(|(_, at)| *at)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.moved.cancel();
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::source::foreign::budget::{Budget, OWN_BYTES};
    use crate::testing::record;

    #[test]
    fn what_is_read_and_not_taken_is_held_of_the_budget() {
        static BUDGET: Budget = Budget::new(1 << 20);
        let mut others = Share::of(&BUDGET);
        others.add(1 << 20);
        let mut session = Session::new(1, vec![0], Reach::none());
        session.share = Share::of(&BUDGET);
        let mut next = 0;
        while !session.is_full() {
            next += 1;
            let record = Record { payload: Bytes::from(vec![b'x'; 10_000]), ..record("") };
            session.push(vec![(Position::in_part(0, next), record)]);
        }
        let held = BUDGET.held() - (1 << 20);
        assert!((OWN_BYTES..OWN_BYTES + 20_000).contains(&held), "{held} bytes are its own little");
        session.take(1, usize::MAX);
        assert!(!session.is_full() && BUDGET.held() < (1 << 20) + held);
        drop(session);
        assert_eq!(BUDGET.held(), 1 << 20);
    }
}
