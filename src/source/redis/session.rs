//! What a branch holds of its streams between one assignment and the next. Pure: the server is asked elsewhere.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::clock::Timestamp;
use crate::record::{Position, Record};
use crate::source::foreign::budget::{MOST_BYTES, Share};
use crate::source::{Entry, Reach};

/// Entries of one stream in one answer at most.
const PAGE: usize = 256;

/// One stream.
#[derive(Clone, Debug)]
struct Part {
    /// The newest entry that was given to the group, or that has ended.
    read: u64,
    /// The newest entry that the server says it has given to the group: it never goes back unless the server did.
    given: u64,
    /// The pending list is still being gone through, after this entry.
    pending_after: Option<u64>,
    /// The group goes on after this entry, which it has not read.
    set: Option<u64>,
    /// Up to where others read, and how many of those entries did not come to us yet: while the pending list is gone through.
    others: Option<(u64, u64)>,
}

/// The hold on some streams.
pub(super) struct Session {
    pub(super) generation: u64,
    /// Everything at or below has ended.
    pub(super) frontier: Reach,
    pub(super) moved: CancellationToken,
    /// Somebody reads it: the number of the newest reader.
    pub(super) reader: Option<u64>,
    readers: u64,
    parts: BTreeMap<u16, Part>,
    /// Given to the group and not ended: what each takes, and its time.
    open: BTreeMap<Position, (usize, Timestamp)>,
    open_bytes: u64,
    /// Ended, above the frontier.
    ended: BTreeSet<Position>,
    /// To be acknowledged.
    acks: BTreeMap<u16, Vec<u64>>,
    queue: VecDeque<Entry>,
    /// Of what is in the queue.
    share: Share,
    /// The largest record of late.
    largest: usize,
    /// Counts how often it was gone back.
    pub(super) turn: u64,
}

/// What to ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) turn: u64,
    /// Each stream, and after which entry of the pending list; `None` = what is new.
    pub(super) parts: Vec<(u16, Option<u64>)>,
    /// For each stream the newest entry that the group was given.
    pub(super) given: Vec<u64>,
    pub(super) count: usize,
}

/// What to acknowledge in a stream, and where its group goes on.
pub(super) type Ack = (u16, Vec<u64>, Option<u64>);

/// What is to be told of entries that came.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Arrived {
    /// Their bodies are gone.
    pub(super) gone: Vec<Position>,
    /// Another consumer read as the group up to there, and so many of the entries were neither pending nor lost.
    pub(super) passed_over: Vec<(Position, u64)>,
}

/// An entry as the server gave it.
pub(super) enum Got {
    Record(Box<Record>),
    /// Its id is pending, and its body is gone.
    Gone,
    /// It stands for numbers that were skipped.
    Skipped,
}

impl Session {
    /// `begun`: each stream, where its cursor is and what the group was given last.
    pub(super) fn new(generation: u64, begun: &[(u16, u64, u64)]) -> Self {
        let part = |read| Part { read, given: read, pending_after: Some(0), set: None, others: None };
        Self {
            generation,
            frontier: begun.iter().map(|(part, cursor, _)| Position::in_part(*part, *cursor)).collect(),
            moved: CancellationToken::new(),
            reader: None,
            readers: 0,
            parts: begun.iter().map(|(number, _, read)| (*number, part(*read))).collect(),
            open: BTreeMap::new(),
            open_bytes: 0,
            ended: BTreeSet::new(),
            acks: BTreeMap::new(),
            queue: VecDeque::new(),
            share: Share::default(),
            largest: 1 << 10,
            turn: 0,
        }
    }

    pub(super) fn parts(&self) -> Vec<u16> {
        self.parts.keys().copied().collect()
    }

    /// A new reader: it is given everything after the frontier that has not ended, whatever an earlier one was given.
    pub(super) fn begin_reading(&mut self) -> u64 {
        self.readers += 1;
        if self.readers > 1 {
            self.go_back(true);
        }
        self.reader = Some(self.readers);
        self.readers
    }

    /// Goes through the pending list: from its beginning, or from the newest known entry, because an answer was lost.
    pub(super) fn go_back(&mut self, to_the_beginning: bool) {
        if to_the_beginning {
            self.turn += 1;
            self.drop_queue();
        }
        for part in self.parts.values_mut() {
            let after = if to_the_beginning { 0 } else { part.read };
            part.pending_after = Some(part.pending_after.unwrap_or(after).min(after));
        }
    }

    /// Others read as the group up to `given`, and what was pending for them is ours now, but for `gone` entries.
    pub(super) fn taken_over(&mut self, number: u16, given: u64, gone: u64) {
        if let Some(part) = self.parts.get_mut(&number) {
            part.pending_after = Some(part.pending_after.unwrap_or(part.read).min(part.read));
            part.others = Some((given, given.saturating_sub(part.read).saturating_sub(gone)));
        }
    }

    fn drop_queue(&mut self) {
        self.share.clear();
        self.queue.clear();
    }

    /// What to read next; `None` = there is no room.
    pub(super) fn wanted(&self) -> Option<Wanted> {
        if self.share.is_full() || self.reader.is_none() {
            return None;
        }
        let count = MOST_BYTES / self.largest.max(1) / self.parts.len().max(1);
        Some(Wanted {
            turn: self.turn,
            parts: self.parts.iter().map(|(number, part)| (*number, part.pending_after)).collect(),
            given: self.parts.values().map(|part| part.given).collect(),
            count: count.clamp(1, PAGE),
        })
    }

    /// Each stream with the newest entry that was read, if nothing is pending that has to come first.
    pub(super) fn ends(&self) -> Option<Vec<(u16, u64)>> {
        let fresh = self.parts.values().all(|part| part.pending_after.is_none());
        fresh.then(|| self.parts.iter().map(|(number, part)| (*number, part.read)).collect())
    }

    /// Entries came.
    pub(super) fn arrived(&mut self, wanted: &Wanted, got: Vec<(u16, u64, Got)>) -> Arrived {
        let stale = wanted.turn != self.turn;
        let mut arrived = Arrived::default();
        let mut last: BTreeMap<u16, u64> = BTreeMap::new();
        for (number, offset, got) in got {
            last.insert(number, offset);
            let Some(part) = self.parts.get_mut(&number) else { continue };
            if let Some((to, left)) = &mut part.others
                && (part.read + 1..=*to).contains(&offset)
            {
                *left = left.saturating_sub(1);
            }
            part.read = part.read.max(offset);
            part.given = part.given.max(offset);
            let position = Position::in_part(number, offset);
            if self.frontier.covers(position) || self.ended.contains(&position) {
                // Its end is on its way to the server, or the answer to that was lost.
                self.acks.entry(number).or_default().push(offset);
                continue;
            }
            if stale {
                // The pending list is gone through anew, and gives it again.
                continue;
            }
            match got {
                Got::Skipped => {
                    self.acks.entry(number).or_default().push(offset);
                    self.ended.insert(position);
                }
                Got::Gone => {
                    arrived.gone.push(position);
                    self.acks.entry(number).or_default().push(offset);
                    self.ended.insert(position);
                }
                Got::Record(record) => {
                    let weight = record.weight();
                    self.largest = weight.max(self.largest - self.largest / 64).max(256);
                    if self.open.insert(position, (weight, record.written_at)).is_none() {
                        self.open_bytes += weight as u64;
                    }
                    self.share.add(weight);
                    self.queue.push_back(Entry::new(position, Arc::new(*record)));
                }
            }
        }
        if !stale {
            for (number, after) in &wanted.parts {
                if after.is_some()
                    && let Some(part) = self.parts.get_mut(number)
                    && part.pending_after == *after
                {
                    part.pending_after = last.get(number).copied();
                    if part.pending_after.is_none()
                        && let Some((to, left)) = part.others.take()
                    {
                        part.read = part.read.max(to);
                        part.given = part.given.max(to);
                        if left > 0 {
                            arrived.passed_over.push((Position::in_part(*number, to), left));
                        }
                    }
                }
            }
        }
        arrived
    }

    /// The next entries for a reader.
    pub(super) fn take(&mut self, max_records: usize, max_bytes: usize) -> Vec<Entry> {
        let (mut entries, mut bytes, mut freed) = (Vec::new(), 0, 0);
        while entries.len() < max_records.max(1)
            && bytes <= max_bytes
            && let Some(entry) = self.queue.pop_front()
        {
            freed += entry.record.weight();
            if self.open.contains_key(&entry.position) {
                bytes += entry.record.weight();
                entries.push(entry);
            }
        }
        self.share.take(freed);
        entries
    }

    fn end(&mut self, position: Position) {
        if let Some((weight, _)) = self.open.remove(&position) {
            self.open_bytes -= weight as u64;
            self.acks.entry(position.part()).or_default().push(position.offset());
        }
    }

    /// The branch has come so far, and these have ended beyond. True when the server has to hear of it.
    pub(super) fn progress(&mut self, frontier: &Reach, ended: &[Position]) -> bool {
        for position in ended {
            if !self.parts.contains_key(&position.part()) {
                continue;
            }
            self.end(*position);
            if !self.frontier.covers(*position) {
                self.ended.insert(*position);
            }
        }
        for position in frontier.iter() {
            let number = position.part();
            if !self.parts.contains_key(&number) {
                continue;
            }
            self.frontier.advance(position);
            let passed = Position::in_part(number, 0)..=position;
            let open: Vec<Position> = self.open.range(passed.clone()).map(|(position, _)| *position).collect();
            open.into_iter().for_each(|position| self.end(position));
            while let Some(first) = self.ended.range(passed.clone()).next().copied() {
                self.ended.remove(&first);
            }
            if let Some(part) = self.parts.get_mut(&number)
                && position.offset() > part.read
            {
                part.read = position.offset();
                part.set = Some(position.offset());
            }
        }
        self.has_acks()
    }

    pub(super) fn has_acks(&self) -> bool {
        !self.acks.is_empty() || self.parts.values().any(|part| part.set.is_some())
    }

    /// What the server has to hear.
    pub(super) fn take_acks(&mut self) -> Vec<Ack> {
        let mut acks = std::mem::take(&mut self.acks);
        let set = |(number, part): (&u16, &mut Part)| Some((*number, part.set.take()?));
        let set: BTreeMap<u16, u64> = self.parts.iter_mut().filter_map(set).collect();
        set.keys().for_each(|number| _ = acks.entry(*number).or_default());
        acks.into_iter().map(|(number, ids)| (number, ids, set.get(&number).copied())).collect()
    }

    /// The group of the stream goes on there, the server says.
    pub(super) fn was_set(&mut self, number: u16, offset: u64) {
        if let Some(part) = self.parts.get_mut(&number) {
            part.given = part.given.max(offset);
        }
    }

    /// For each stream the newest entry that the group was given.
    pub(super) fn given(&self) -> Reach {
        self.parts.iter().map(|(number, part)| Position::in_part(*number, part.given)).collect()
    }

    /// It has not heard it.
    pub(super) fn put_back(&mut self, acks: Vec<Ack>) {
        for (number, ids, set) in acks {
            self.acks.entry(number).or_default().extend(ids);
            if let Some(part) = self.parts.get_mut(&number) {
                part.set = part.set.max(set);
            }
        }
    }

    /// Not ended, as far as it was read: how many, their bytes, the time of the oldest.
    pub(super) fn unfinished(&self) -> (u64, u64, Option<Timestamp>) {
        let oldest = self.open.values().map(|(_, at)| *at).min();
        (self.open.len() as u64, self.open_bytes, oldest)
    }

    /// The newest entry of a stream that was read.
    pub(super) fn read(&self, number: u16) -> u64 {
        self.parts.get(&number).map_or(0, |part| part.read)
    }

    /// Each stream with the newest entry that was read.
    pub(super) fn reads(&self) -> impl Iterator<Item = (u16, u64)> {
        self.parts.iter().map(|(number, part)| (*number, part.read))
    }

    /// How many entries of the streams, which end there, were not read.
    pub(super) fn unread(&self, end: impl Fn(u16) -> u64) -> u64 {
        self.parts.iter().map(|(number, part)| end(*number).saturating_sub(part.read)).sum()
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
    use crate::record::RecordId;
    use crate::source::foreign::budget::{Budget, OWN_BYTES};

    fn at(part: u16, offset: u64) -> Position {
        Position::in_part(part, offset)
    }

    fn got(part: u16, offsets: &[u64]) -> Vec<(u16, u64, Got)> {
        let record = || Record::new(RecordId::from_bytes([1; 16]), Timestamp::from_millis(5), Bytes::new());
        offsets.iter().map(|offset| (part, *offset, Got::Record(Box::new(record())))).collect()
    }

    fn given(session: &mut Session) -> Vec<Position> {
        session.take(100, usize::MAX).iter().map(|entry| entry.position).collect()
    }

    fn begun() -> Session {
        let mut session = Session::new(1, &[(0, 4, 9), (3, 0, 0)]);
        session.begin_reading();
        session
    }

    #[test]
    fn what_is_pending_comes_first_and_whole() {
        let mut session = begun();
        let first = session.wanted().unwrap();
        assert_eq!(first.parts, [(0, Some(0)), (3, Some(0))]);
        assert_eq!(session.ends(), None);
        session.arrived(&first, got(0, &[5, 9]));
        let second = session.wanted().unwrap();
        assert_eq!(second.parts, [(0, Some(9)), (3, None)]);
        session.arrived(&second, got(3, &[1]));
        assert_eq!(session.wanted().unwrap().parts, [(0, None), (3, None)]);
        assert_eq!(session.ends().unwrap(), [(0, 9), (3, 1)]);
        assert_eq!(given(&mut session), [at(0, 5), at(0, 9), at(3, 1)]);
    }

    #[test]
    fn exactly_what_has_ended_is_acknowledged() {
        let mut session = begun();
        let wanted = session.wanted().unwrap();
        session.arrived(&wanted, got(0, &[5, 7, 9]));
        assert!(session.progress(&Reach::none(), &[at(0, 7), at(1, 1)]));
        assert_eq!(session.take_acks(), [(0, vec![7], None)]);
        assert!(session.progress(&at(0, 7).into(), &[at(0, 5)]));
        let acks = session.take_acks();
        assert_eq!(acks, [(0, vec![5], None)]);
        session.put_back(acks);
        assert!(session.has_acks());
        assert_eq!(session.unfinished().0, 1);
    }

    #[test]
    fn a_new_reader_is_given_again_what_has_not_ended() {
        let mut session = begun();
        let wanted = session.wanted().unwrap();
        session.arrived(&wanted, got(0, &[5, 7, 9]));
        assert_eq!(given(&mut session).len(), 3);
        session.progress(&at(0, 5).into(), &[at(0, 5), at(0, 9)]);
        session.begin_reading();
        // Asked before it went back: it comes again.
        session.arrived(&wanted, got(0, &[5, 7, 9]));
        assert_eq!(given(&mut session), []);
        let wanted = session.wanted().unwrap();
        session.arrived(&wanted, got(0, &[5, 7, 9]));
        assert_eq!(given(&mut session), [at(0, 7)]);
    }

    #[test]
    fn a_lost_answer_is_looked_for_in_the_pending_list() {
        let mut session = begun();
        let wanted = session.wanted().unwrap();
        session.arrived(&wanted, Vec::new());
        assert_eq!(session.ends().unwrap(), [(0, 9), (3, 0)]);
        session.go_back(false);
        assert_eq!(session.wanted().unwrap().parts, [(0, Some(9)), (3, Some(0))]);
    }

    #[test]
    fn an_entry_without_a_body_is_told_and_acknowledged() {
        let mut session = begun();
        let wanted = session.wanted().unwrap();
        let gone = session.arrived(&wanted, vec![(0, 5, Got::Gone)]).gone;
        assert_eq!((gone, session.take_acks()), (vec![at(0, 5)], vec![(0, vec![5], None)]));
    }

    #[test]
    fn what_is_read_and_not_taken_is_held_of_the_budget() {
        static BUDGET: Budget = Budget::new(1 << 20);
        let mut others = Share::of(&BUDGET);
        others.add(1 << 20);
        let mut session = begun();
        session.share = Share::of(&BUDGET);
        let mut next = 9;
        while let Some(wanted) = session.wanted() {
            next += 1;
            session.arrived(&wanted, got(0, &[next]));
        }
        let held = BUDGET.held() - (1 << 20);
        assert!((OWN_BYTES..OWN_BYTES + 1_000).contains(&held), "{held} bytes are its own little");
        session.take(10, usize::MAX);
        assert!(session.wanted().is_some() && BUDGET.held() < (1 << 20) + held);
        drop(session);
        assert_eq!(BUDGET.held(), 1 << 20);
    }

    #[test]
    fn what_others_read_comes_before_what_is_new_and_what_they_acknowledged_is_told() {
        let mut session = begun();
        let wanted = session.wanted().unwrap();
        session.arrived(&wanted, Vec::new());
        // Of 10 to 14 one is gone, and one was acknowledged.
        session.taken_over(0, 14, 1);
        let first = session.wanted().unwrap();
        assert_eq!((first.parts[0], session.ends()), ((0, Some(9)), None));
        assert_eq!(session.arrived(&first, got(0, &[10, 12, 13])), Arrived::default());
        let second = session.wanted().unwrap();
        assert_eq!(second.parts[0], (0, Some(13)));
        assert_eq!(session.arrived(&second, Vec::new()).passed_over, [(at(0, 14), 1)]);
        assert_eq!(given(&mut session), [at(0, 10), at(0, 12), at(0, 13)]);
        // The wait for more does not end at once for what others have done.
        assert_eq!((session.ends().unwrap(), session.wanted().unwrap().given), (vec![(0, 14), (3, 0)], vec![14, 0]));
    }
}
