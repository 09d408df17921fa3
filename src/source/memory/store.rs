//! What the log in memory holds, and every change to it. Pure: the time comes in with the call, nothing waits.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::clock::Timestamp;
use crate::record::{Position, Record, RecordId};
use crate::source::{
    Admitted, AsideLane, AsideRow, BranchName, DeadLetter, DeadQuery, Entry, Epoch, Fate, Found, IdempotencyKey, Lag,
    Page, ParkedQuery, ParkedRow, Replayed, RowKey, Scheduled, Settlement, Start, StoredPause, Write,
};

/// One branch's progress and rows.
#[derive(Default)]
pub(super) struct Branch {
    pub(super) cursor: Position,
    pub(super) ended: HashSet<RowKey>,
    pub(super) aside: BTreeMap<RowKey, AsideRow>,
    /// In order of their end.
    pub(super) dead: BTreeMap<u64, DeadLetter>,
    pub(super) pause: Option<StoredPause>,
    pub(super) marks: BTreeMap<Position, u32>,
    dropped: BTreeMap<Position, Box<str>>,
    replayed: BTreeSet<Box<str>>,
}

impl Branch {
    /// The lanes that are set aside.
    pub(super) fn lanes(&self) -> Vec<AsideLane> {
        let mut lanes: BTreeMap<&str, AsideLane> = BTreeMap::new();
        for row in self.aside.values() {
            let more = |lane: &mut AsideLane| (lane.rows, lane.last) = (lane.rows + 1, row.row);
            lanes.entry(&row.lane).and_modify(more).or_insert_with(|| AsideLane {
                lane: row.lane.clone(),
                first: row.row,
                last: row.row,
                rows: 1,
                next_try: row.next_try,
                attempts: row.attempts,
                first_failed: row.first_failed,
            });
        }
        lanes.into_values().collect()
    }

    /// What the dead letters take.
    pub(super) fn dead_bytes(&self) -> u64 {
        let bytes = |letter: &DeadLetter| letter.record.weight() + letter.rendered.as_ref().map_or(0, Bytes::len);
        self.dead.values().map(|letter| bytes(letter) as u64).sum()
    }

    fn ended_at(&mut self, row: RowKey) {
        if row.position > self.cursor {
            self.ended.insert(row);
        }
    }
}

struct Seen {
    fingerprint: [u8; 16],
    id: RecordId,
    written_at: Timestamp,
    due_at: Option<Timestamp>,
}

/// Everything.
pub(super) struct Store {
    number: u32,
    entries: VecDeque<Entry>,
    end: Position,
    counter: u64,
    /// The time in the newest id; a clock that steps back takes no id with it.
    newest: Timestamp,
    pub(super) branches: BTreeMap<BranchName, Branch>,
    parked: BTreeMap<(Timestamp, u64), Arc<Record>>,
    cancelled: HashSet<RecordId>,
    keys: HashMap<Box<str>, Seen>,
    /// The keys in the order in which they were used.
    key_order: VecDeque<(Timestamp, Box<str>)>,
    pub(super) key_window: Duration,
    pub(super) epochs: Vec<Epoch>,
    letters: u64,
}

impl Store {
    pub(super) fn new(number: u32) -> Self {
        Self {
            number,
            entries: VecDeque::new(),
            end: Position(0),
            counter: 0,
            newest: Timestamp::MIN,
            branches: BTreeMap::new(),
            parked: BTreeMap::new(),
            cancelled: HashSet::new(),
            keys: HashMap::new(),
            key_order: VecDeque::new(),
            key_window: Duration::from_secs(86_400),
            epochs: Vec::new(),
            letters: 0,
        }
    }

    pub(super) fn branch(&mut self, name: &BranchName) -> &mut Branch {
        self.branches.entry(name.clone()).or_default()
    }

    pub(super) fn admit(&mut self, writes: Vec<Write>, now: Timestamp) -> (Vec<Admitted>, Position) {
        self.forget_keys(now);
        let admitted = writes.into_iter().map(|write| self.admit_one(write, now)).collect();
        (admitted, self.end)
    }

    fn admit_one(&mut self, write: Write, now: Timestamp) -> Admitted {
        if let Some(repeated) = write.idempotency.as_ref().and_then(|key| self.repeated(key)) {
            return repeated;
        }
        self.counter += 1;
        self.newest = self.newest.max(now);
        #[expect(clippy::cast_possible_truncation, reason = "only 12 bits are used")]
        let id = RecordId::new(self.newest, self.counter as u16, self.number, self.counter);
        let due_at = write.due_at.filter(|due| *due > now);
        let record = Record { id, written_at: now, due_at, ..write.record };
        if let Some(IdempotencyKey { key, fingerprint }) = write.idempotency {
            self.key_order.push_back((now, key.clone()));
            self.keys.insert(key, Seen { fingerprint, id, written_at: now, due_at });
        }
        match due_at {
            Some(due_at) => {
                self.parked.insert((due_at, self.counter), Arc::new(record));
                Admitted::Parked { id, written_at: now, due_at }
            }
            None => Admitted::Appended { id, written_at: now, position: self.append(record) },
        }
    }

    /// Forgets the keys that are older than the window.
    fn forget_keys(&mut self, now: Timestamp) {
        let is_old = |at: &Timestamp| now.since(*at) > self.key_window;
        while let Some((at, key)) = self.key_order.pop_front_if(|(at, _)| is_old(at)) {
            // It may have been used anew since.
            if self.keys.get(&key).is_some_and(|seen| seen.written_at == at) {
                self.keys.remove(&key);
            }
        }
    }

    fn repeated(&self, key: &IdempotencyKey) -> Option<Admitted> {
        let seen = self.keys.get(&key.key)?;
        let same = seen.fingerprint == key.fingerprint;
        let first = Admitted::Repeated { id: seen.id, written_at: seen.written_at, due_at: seen.due_at };
        Some(if same { first } else { Admitted::KeyReused })
    }

    fn append(&mut self, mut record: Record) -> Position {
        self.end = self.end.next();
        record.epoch = self.epochs.last().map_or(0, |epoch| epoch.number);
        self.entries.push_back(Entry::new(self.end, Arc::new(record)));
        self.end
    }

    /// Appends what is due, in (due, sequence) order.
    pub(super) fn release(&mut self, now: Timestamp) -> Position {
        while let Some(first) = self.parked.first_entry() {
            if first.key().0 > now {
                break;
            }
            let record = Arc::unwrap_or_clone(first.remove());
            self.append(record);
        }
        self.end
    }

    pub(super) fn next_due(&self) -> Option<Timestamp> {
        self.parked.first_key_value().map(|((due, _), _)| *due)
    }

    pub(super) fn parked_count(&self) -> u64 {
        self.parked.len() as u64
    }

    /// Opens a branch; a new one begins at `start`.
    pub(super) fn open(&mut self, name: &BranchName, start: Start) -> Position {
        let first = self.entries.front().map_or(self.end, |entry| Position(entry.position.0.saturating_sub(1)));
        let end = self.end;
        let start = start.by_position(&self.epochs);
        let begin = || Branch {
            cursor: match start {
                Start::Earliest | Start::Epoch(_) => first,
                Start::Latest => end,
                Start::After(position) => position.max(first).min(end),
            },
            ..Branch::default()
        };
        self.branches.entry(name.clone()).or_insert_with(begin).cursor
    }

    pub(super) fn rename(&mut self, from: &BranchName, to: &BranchName) {
        if self.branches.contains_key(to) {
            return;
        }
        if let Some(mut branch) = self.branches.remove(from) {
            branch.dead.values_mut().for_each(|letter| letter.branch = to.clone());
            self.branches.insert(to.clone(), branch);
        }
    }

    pub(super) fn read(&self, after: Position, max_records: usize, max_bytes: usize) -> Vec<Entry> {
        let from = self.entries.partition_point(|entry| entry.position <= after);
        let mut bytes = 0;
        let within = |entry: &&Entry| {
            let fits = bytes <= max_bytes;
            bytes += entry.record.weight();
            fits
        };
        self.entries.iter().skip(from).take(max_records.max(1)).take_while(within).cloned().collect()
    }

    pub(super) fn lag(&self, name: &BranchName) -> Lag {
        let cursor = self.branches.get(name).map_or(Position(0), |branch| branch.cursor);
        let from = self.entries.partition_point(|entry| entry.position <= cursor);
        let left = self.entries.iter().skip(from);
        Lag {
            records: self.end.0.saturating_sub(cursor.0),
            bytes: left.clone().map(|entry| entry.record.weight() as u64).sum(),
            oldest: left.map(|entry| entry.record.written_at).next(),
            cursor: cursor.into(),
        }
    }

    pub(super) fn put_epoch(&mut self, files: Bytes) -> Epoch {
        let number = self.epochs.last().map_or(0, |epoch| epoch.number) + 1;
        let epoch = Epoch { number, after: self.end, files };
        self.epochs.push(epoch.clone());
        self.trim_epochs();
        epoch
    }

    /// An epoch stays while a cursor is before its end, or a row that is set aside or dead.
    fn trim_epochs(&mut self) {
        let rows = |branch: &Branch| {
            let aside = branch.aside.keys().map(|row| row.position);
            let dead = branch.dead.values().map(|letter| letter.row.position);
            aside.chain(dead).min()
        };
        let needed = |branch: &Branch| rows(branch).map_or(branch.cursor.next(), |row| row.min(branch.cursor.next()));
        let needed = self.branches.values().map(needed).min().unwrap_or_default();
        let passed = self.epochs.iter().skip(1).take_while(|next| next.after < needed).count();
        self.epochs.drain(..passed);
    }

    pub(super) fn settle(&mut self, name: &BranchName, settlement: Settlement) {
        let mut letters = self.letters;
        let branch = self.branch(name);
        for row in settlement.aside {
            branch.ended_at(row.row);
            branch.aside.insert(row.row, row);
        }
        for row in settlement.returned {
            branch.aside.remove(&row);
        }
        for letter in settlement.dead {
            branch.aside.remove(&letter.row);
            branch.ended_at(letter.row);
            letters += 1;
            branch.dead.insert(letters, letter);
        }
        branch.dropped.extend(settlement.dropped);
        if let Some(mark) = settlement.mark {
            *branch.marks.entry(mark).or_default() += 1;
        }
        if let Some(pause) = settlement.pause {
            branch.pause = pause;
        }
        for row in settlement.overtaken {
            branch.dead.values_mut().filter(|letter| letter.row == row).for_each(|letter| letter.overtaken = true);
        }
        let frontier = settlement.frontier.single();
        if frontier > branch.cursor {
            branch.cursor = frontier;
            branch.ended.retain(|row| row.position > frontier);
            branch.marks.retain(|position, _| *position > frontier);
        }
        self.letters = letters;
        self.trim();
    }

    /// Drops records that every branch has passed.
    fn trim(&mut self) {
        let Some(lowest) = self.branches.values().map(|branch| branch.cursor).min() else { return };
        while self.entries.front().is_some_and(|entry| entry.position <= lowest) {
            self.entries.pop_front();
        }
        self.trim_epochs();
    }

    pub(super) fn find(&self, id: RecordId) -> Option<Found> {
        if self.cancelled.contains(&id) {
            return Some(Found::Cancelled);
        }
        if let Some(((due_at, _), record)) = self.parked.iter().find(|(_, record)| record.id == id) {
            return Some(Found::Parked { record: Arc::clone(record), due_at: *due_at });
        }
        let entry = self.entries.iter().find(|entry| entry.record.id == id)?;
        let fates = self.branches.iter().map(|(name, branch)| (name.clone(), fate(branch, entry.position))).collect();
        Some(Found::InLog { record: Arc::clone(&entry.record), position: entry.position, branches: fates })
    }

    fn is_meant(which: &Scheduled, record: &Record) -> bool {
        match which {
            Scheduled::Id(id) => record.id == *id,
            Scheduled::Key(key) => record.key.as_deref() == Some(key),
        }
    }

    fn take_parked(&mut self, which: &Scheduled) -> Vec<(u64, Arc<Record>)> {
        let meant = |record: &Arc<Record>| Self::is_meant(which, record);
        let keys: Vec<_> = self.parked.iter().filter(|(_, record)| meant(record)).map(|(key, _)| *key).collect();
        keys.into_iter().filter_map(|key| Some((key.1, self.parked.remove(&key)?))).collect()
    }

    pub(super) fn cancel(&mut self, which: &Scheduled) -> u64 {
        let taken = self.take_parked(which);
        self.cancelled.extend(taken.iter().map(|(_, record)| record.id));
        taken.len() as u64
    }

    pub(super) fn reschedule(&mut self, which: &Scheduled, due_at: Timestamp) -> u64 {
        let taken = self.take_parked(which);
        let moved = taken.len() as u64;
        for (sequence, record) in taken {
            let record = Record { due_at: Some(due_at), ..Arc::unwrap_or_clone(record) };
            self.parked.insert((due_at, sequence), Arc::new(record));
        }
        moved
    }

    pub(super) fn parked_page(&self, query: &ParkedQuery) -> Page<ParkedRow> {
        let after: Option<(Timestamp, u64)> = query.after.as_deref().and_then(|token| {
            let (due, sequence) = token.split_once('-')?;
            Some((Timestamp::from_millis(due.parse().ok()?), sequence.parse().ok()?))
        });
        let fits = |(due, _): &(Timestamp, u64), record: &Record| {
            query.key.as_ref().is_none_or(|key| record.key.as_deref() == Some(key))
                && query.from.is_none_or(|from| *due >= from)
                && query.to.is_none_or(|to| *due < to)
        };
        let mut rows =
            self.parked.iter().filter(|(at, record)| after.is_none_or(|after| **at > after) && fits(at, record));
        let page: Vec<_> = rows.by_ref().take(query.limit.max(1)).collect();
        let next = page.last().filter(|_| rows.next().is_some());
        Page {
            next: next.map(|((due, sequence), _)| format!("{}-{sequence}", due.as_millis())),
            rows: page
                .iter()
                .map(|((due, _), record)| ParkedRow { record: Arc::clone(record), due_at: *due })
                .collect(),
        }
    }

    /// The matching dead letters, with the number of each and its branch.
    fn matching(&self, query: &DeadQuery) -> Vec<(u64, BranchName, &DeadLetter)> {
        let fits =
            |letter: &DeadLetter| query.takes(letter, &letter.branch, &letter.record.id, letter.record.key.as_deref());
        let of_branch = |(name, branch): (&BranchName, &'_ Branch)| -> Vec<(u64, BranchName)> {
            branch
                .dead
                .range((Bound::Excluded(query.after_number()), Bound::Unbounded))
                .filter(|(_, letter)| fits(letter))
                .map(|(number, _)| (*number, name.clone()))
                .collect()
        };
        let mut found: Vec<(u64, BranchName)> = self.branches.iter().flat_map(of_branch).collect();
        found.sort_by_key(|(number, _)| *number);
        found
            .into_iter()
            .filter_map(|(number, name)| {
                let letter = self.branches.get(&name)?.dead.get(&number)?;
                Some((number, name, letter))
            })
            .collect()
    }

    pub(super) fn dead_page(&self, query: &DeadQuery) -> Page<DeadLetter> {
        let found = self.matching(query);
        let limit = query.rows();
        let next = found.get(limit).and_then(|_| found.get(limit - 1)).map(|(number, ..)| number.to_string());
        Page { rows: found.into_iter().take(limit).map(|(_, _, letter)| letter.clone()).collect(), next }
    }

    pub(super) fn replay(&mut self, query: &DeadQuery, force: bool, now: Timestamp) -> Replayed {
        let mut answer = Replayed::default();
        let found: Vec<(u64, BranchName, bool)> = self
            .matching(query)
            .into_iter()
            .take(query.rows())
            .map(|(number, name, letter)| (number, name, letter.overtaken))
            .collect();
        for (number, name, overtaken) in found {
            if overtaken && !force {
                answer.overtaken += 1;
                continue;
            }
            let branch = self.branch(&name);
            let Some(letter) = branch.dead.remove(&number) else { continue };
            branch.ended_at(letter.row);
            let row = AsideRow::replayed(letter, now);
            branch.replayed.insert(row.lane.clone());
            branch.aside.insert(row.row, row);
            answer.replayed += 1;
        }
        answer
    }

    pub(super) fn take_replayed(&mut self, name: &BranchName) -> Vec<AsideLane> {
        let branch = self.branch(name);
        let replayed = std::mem::take(&mut branch.replayed);
        branch.lanes().into_iter().filter(|lane| replayed.contains(&lane.lane)).collect()
    }

    pub(super) fn purge(&mut self, query: &DeadQuery) -> u64 {
        let found: Vec<(u64, BranchName)> =
            self.matching(query).into_iter().take(query.rows()).map(|(number, name, _)| (number, name)).collect();
        for (number, name) in &found {
            let branch = self.branch(name);
            if let Some(letter) = branch.dead.remove(number) {
                branch.ended_at(letter.row);
            }
        }
        found.len() as u64
    }
}

fn fate(branch: &Branch, position: Position) -> Fate {
    let at = |row: &RowKey| row.position == position;
    if let Some(row) = branch.aside.values().find(|row| at(&row.row)) {
        return Fate::SetAside { attempts: row.attempts, next_try: row.next_try, last_error: row.last_error.clone() };
    }
    if let Some(letter) = branch.dead.values().find(|letter| at(&letter.row)) {
        return Fate::Dead { reason: letter.reason, last_error: letter.last_error.clone() };
    }
    if let Some(reason) = branch.dropped.get(&position) {
        return Fate::Dropped { reason: reason.clone() };
    }
    if position <= branch.cursor { Fate::Finished { after: None, before: None } } else { Fate::Pending }
}
