//! What this process holds of a queue: messages that wait to be read, that are being delivered, that are to be deleted.
//!
//! Knows no network. A message is known by SQS's id of it; whoever receives it again while it is held has only learnt a newer
//! receipt, so it is never given twice. What has ended and could not be deleted is remembered for when it comes again.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use indexmap::IndexSet;
use tokio::time::Instant;

use super::message::Received;
use crate::clock::Timestamp;
use crate::record::{Position, Record};
use crate::source::foreign::budget::Share;
use crate::source::{Entry, Reach};

/// Messages that wait to be read before no more is received.
const PREFETCH: usize = 400;
/// What has ended and waits to be deleted before no more is received; also how much is remembered of what could not be.
const UNDELETED: usize = 10_000;
/// SQS lets nobody hold a message for longer.
const CEILING: Duration = Duration::from_secs(12 * 3_600);
/// Tries of a delete that SQS refuses for its own sake.
const TRIES: u32 = 5;

/// A receipt of a message: its id, and what changes or deletes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Receipt {
    pub(super) id: Box<str>,
    pub(super) handle: String,
    pub(super) group: Option<Box<str>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Given,
    Ended,
}

#[derive(Debug)]
struct Holding {
    handle: String,
    group: Option<Box<str>>,
    written_at: Timestamp,
    weight: usize,
    /// Its turn among all that were received.
    turn: u64,
    received: Instant,
    extended: Instant,
    /// The receipt is known to be worth nothing.
    stale: bool,
    state: State,
    tries: u32,
}

/// What became of a batch of receipts.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Arrived {
    /// Messages that were held already: SQS delivered them twice, or a receipt had expired.
    pub(super) again: u64,
    /// There was nobody to read them: to be let go at once.
    pub(super) unwanted: Vec<Receipt>,
}

/// See the file's head.
#[derive(Default)]
pub(super) struct Held {
    messages: HashMap<Box<str>, Holding>,
    ready: VecDeque<(Box<str>, Arc<Record>)>,
    early: BTreeMap<(Timestamp, u64), (Box<str>, Arc<Record>)>,
    given: BTreeMap<Position, Box<str>>,
    to_delete: VecDeque<Box<str>>,
    ghosts: IndexSet<Box<str>>,
    /// Of what is in `ready` and `early`.
    share: Share,
    turns: u64,
    /// Counts the readers; the newest alone gets anything.
    session: u64,
    open: bool,
    newest: Position,
    cursor: Reach,
}

impl Held {
    /// A reader comes. Positions of different readers never meet, not even of different processes one after the other: what
    /// a shelf keeps by position must never be taken for another message. So they begin with the time.
    pub(super) fn open(&mut self, now: Timestamp) -> (u64, Reach) {
        let base = Position::in_part(0, u64::try_from(now.as_millis()).unwrap_or(0) << 6);
        self.newest = self.newest.max(base);
        self.cursor = self.newest.into();
        self.session += 1;
        self.open = true;
        (self.session, self.cursor.clone())
    }

    /// A reader goes. Gives what it leaves, in the order of the queue, to be let go; what has ended stays to be deleted.
    pub(super) fn close(&mut self, session: u64) -> Vec<Receipt> {
        if session != self.session || !std::mem::take(&mut self.open) {
            return Vec::new();
        }
        self.ready.clear();
        self.early.clear();
        self.given.clear();
        self.share.clear();
        let left = self.messages.extract_if(|_, holding| holding.state != State::Ended);
        let mut left: Vec<(u64, bool, Receipt)> = left
            .map(|(id, holding)| {
                (holding.turn, holding.stale, Receipt { id, handle: holding.handle, group: holding.group })
            })
            .collect();
        left.sort_unstable_by_key(|(turn, ..)| *turn);
        left.into_iter().filter(|(_, stale, _)| !stale).map(|(.., receipt)| receipt).collect()
    }

    /// A reader that was not dropped makes room for another. Gives what it leaves.
    pub(super) fn displace(&mut self) -> Vec<Receipt> {
        self.close(self.session)
    }

    /// True while `session` is the one that reads.
    pub(super) const fn is_open(&self, session: u64) -> bool {
        self.open && self.session == session
    }

    /// True while somebody reads and there is room for more.
    pub(super) fn wants_more(&self) -> bool {
        let waiting = self.ready.len() + self.early.len();
        self.open && waiting < PREFETCH && !self.share.is_full() && self.to_delete.len() < UNDELETED
    }

    /// Messages came from the queue. On a FIFO queue none is held back until it is due: it would be overtaken.
    pub(super) fn arrive(&mut self, received: Vec<Received>, at: Instant, now: Timestamp, fifo: bool) -> Arrived {
        let mut arrived = Arrived::default();
        for Received { id, handle, group, record } in received {
            if let Some(known) = self.messages.get_mut(&id) {
                arrived.again += 1;
                (known.handle, known.received, known.extended, known.stale) = (handle, at, at, false);
                if known.state == State::Ended {
                    known.tries = 0;
                    self.delete_later(id);
                }
                continue;
            }
            let ended = self.ghosts.shift_remove(&id);
            if !ended && !self.open {
                arrived.unwanted.push(Receipt { id, handle, group });
                continue;
            }
            self.turns += 1;
            let weight = record.weight();
            let state = if ended { State::Ended } else { State::Waiting };
            let (written_at, turn) = (record.written_at, self.turns);
            let holding = Holding {
                handle,
                group,
                written_at,
                weight,
                turn,
                received: at,
                extended: at,
                stale: false,
                state,
                tries: 0,
            };
            self.messages.insert(id.clone(), holding);
            if ended {
                arrived.again += 1;
                self.delete_later(id);
                continue;
            }
            self.share.add(weight);
            match record.due_at.filter(|due| *due > now && !fifo) {
                Some(due) => _ = self.early.insert((due, turn), (id, Arc::new(record))),
                None => self.ready.push_back((id, Arc::new(record))),
            }
        }
        arrived
    }

    /// When the first of those is due that came early.
    pub(super) fn first_due(&self) -> Option<Timestamp> {
        self.early.first_key_value().map(|((due, _), _)| *due)
    }

    /// The next records for the reader; none if nothing waits.
    pub(super) fn take(&mut self, now: Timestamp, max_records: usize, max_bytes: usize) -> Vec<Entry> {
        while let Some(first) = self.early.first_entry()
            && first.key().0 <= now
        {
            self.ready.push_back(first.remove());
        }
        let (mut entries, mut bytes) = (Vec::new(), 0);
        while entries.len() < max_records && bytes <= max_bytes {
            let Some((id, record)) = self.ready.pop_front() else { break };
            let Some(holding) = self.messages.get_mut(&id) else { continue };
            holding.state = State::Given;
            bytes += holding.weight;
            self.share.take(holding.weight);
            self.newest = self.newest.next();
            self.given.insert(self.newest, id);
            entries.push(Entry::new(self.newest, record));
        }
        entries
    }

    /// The reader has come so far, and these have ended.
    pub(super) fn end(&mut self, frontier: &Reach, ended: &[Position]) {
        self.cursor.advance_all(frontier);
        for position in ended {
            let Some(id) = self.given.remove(position) else { continue };
            if let Some(holding) = self.messages.get_mut(&id) {
                holding.state = State::Ended;
                self.delete_later(id);
            }
        }
    }

    fn delete_later(&mut self, id: Box<str>) {
        // Twice in the queue is one delete too many; a look through it for each would cost more.
        self.to_delete.push_back(id);
    }

    /// The next messages to delete.
    pub(super) fn next_deletes(&mut self, count: usize) -> Vec<Receipt> {
        let mut receipts = Vec::new();
        while receipts.len() < count
            && let Some(id) = self.to_delete.pop_front()
        {
            let Some(holding) = self.messages.get(&id) else { continue };
            // One request may not name a message twice.
            if receipts.iter().all(|receipt: &Receipt| receipt.id != id) {
                receipts.push(Receipt { handle: holding.handle.clone(), group: holding.group.clone(), id });
            }
        }
        receipts
    }

    /// SQS has deleted it, unless it was received again meanwhile.
    pub(super) fn deleted(&mut self, receipt: &Receipt) {
        match self.messages.get(&receipt.id) {
            Some(holding) if holding.handle != receipt.handle => self.delete_later(receipt.id.clone()),
            _ => _ = self.messages.remove(&receipt.id),
        }
    }

    /// A delete was not done. True when it is not tried again: the message comes once more, and is deleted then.
    pub(super) fn not_deleted(&mut self, receipt: &Receipt, refused: bool, stale: bool) -> bool {
        let Some(holding) = self.messages.get_mut(&receipt.id) else { return false };
        holding.tries += u32::from(refused);
        if holding.handle == receipt.handle && (stale || holding.tries >= TRIES) {
            self.messages.remove(&receipt.id);
            self.ghosts.insert(receipt.id.clone());
            if self.ghosts.len() > UNDELETED {
                self.ghosts.shift_remove_index(0);
            }
            return true;
        }
        self.delete_later(receipt.id.clone());
        false
    }

    /// What is to be held on to for another `visibility`: everything that was last held on to before `since`.
    pub(super) fn to_extend(&self, since: Instant, now: Instant, visibility: Duration) -> Vec<Receipt> {
        let wanted = |holding: &&Holding| {
            let ceiling = now.duration_since(holding.received) + visibility > CEILING;
            holding.extended <= since && !holding.stale && !ceiling
        };
        let mut wanted: Vec<(u64, Receipt)> = self
            .messages
            .iter()
            .filter(|(_, holding)| wanted(holding))
            .map(|(id, holding)| {
                let receipt = Receipt { id: id.clone(), handle: holding.handle.clone(), group: holding.group.clone() };
                (holding.turn, receipt)
            })
            .collect();
        wanted.sort_unstable_by_key(|(turn, _)| *turn);
        wanted.into_iter().map(|(_, receipt)| receipt).collect()
    }

    /// It is held on to since `at`.
    pub(super) fn extended(&mut self, receipt: &Receipt, at: Instant) {
        if let Some(holding) = self.messages.get_mut(&receipt.id).filter(|known| known.handle == receipt.handle) {
            holding.extended = at;
        }
    }

    /// Its receipt has expired: it will come again. True the first time.
    pub(super) fn expired(&mut self, receipt: &Receipt) -> bool {
        let known = self.messages.get_mut(&receipt.id).filter(|known| known.handle == receipt.handle);
        known.is_some_and(|holding| !std::mem::replace(&mut holding.stale, true))
    }

    /// True when nothing waits to be deleted and no delete is under way.
    pub(super) fn is_clean(&self) -> bool {
        self.messages.values().all(|holding| holding.state != State::Ended)
    }

    /// How far the reader has come.
    pub(super) const fn cursor(&self) -> &Reach {
        &self.cursor
    }

    /// The newest position that was given.
    pub(super) const fn newest(&self) -> Position {
        self.newest
    }

    /// When the oldest that is held and not over was written, and how many bytes those take.
    pub(super) fn standing(&self) -> (Option<Timestamp>, u64) {
        let live = || self.messages.values().filter(|holding| holding.state != State::Ended);
        (live().map(|holding| holding.written_at).min(), live().map(|holding| holding.weight as u64).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::foreign::budget::{Budget, OWN_BYTES};
    use crate::testing::{NEW_YEAR, record};

    fn received(id: &str, handle: &str) -> Received {
        Received { id: id.into(), handle: handle.into(), group: None, record: record(id) }
    }

    fn arrive(held: &mut Held, ids: &[&str]) -> Arrived {
        let messages = ids.iter().map(|id| received(id, &format!("{id}-1"))).collect();
        held.arrive(messages, Instant::now(), NEW_YEAR, false)
    }

    fn take(held: &mut Held) -> Vec<Entry> {
        held.take(NEW_YEAR, 100, usize::MAX)
    }

    fn handles(receipts: &[Receipt]) -> Vec<&str> {
        receipts.iter().map(|receipt| receipt.handle.as_str()).collect()
    }

    #[test]
    fn only_what_has_ended_is_deleted_and_in_any_order() {
        let mut held = Held::default();
        held.open(NEW_YEAR);
        arrive(&mut held, &["a", "b", "c"]);
        let given = take(&mut held);
        held.end(&Reach::none(), &[given[2].position, given[0].position]);
        let deletes = held.next_deletes(10);
        assert_eq!(handles(&deletes), ["c-1", "a-1"]);
        deletes.iter().for_each(|receipt| held.deleted(receipt));
        assert!(held.is_clean() && held.next_deletes(10).is_empty());
    }

    #[test]
    fn what_is_held_is_not_given_twice_and_the_newest_receipt_counts() {
        let mut held = Held::default();
        held.open(NEW_YEAR);
        arrive(&mut held, &["a"]);
        let given = take(&mut held);
        let again = held.arrive(vec![received("a", "a-2")], Instant::now(), NEW_YEAR, false);
        assert_eq!(again.again, 1);
        assert!(take(&mut held).is_empty());
        held.end(&Reach::none(), &[given[0].position]);
        assert_eq!(handles(&held.next_deletes(10)), ["a-2"]);
    }

    #[test]
    fn what_could_not_be_deleted_is_deleted_when_it_comes_again_and_not_given() {
        let mut held = Held::default();
        let (session, _) = held.open(NEW_YEAR);
        arrive(&mut held, &["a"]);
        let given = take(&mut held);
        held.end(&Reach::none(), &[given[0].position]);
        let delete = held.next_deletes(10).remove(0);
        assert!(held.not_deleted(&delete, true, true));
        held.close(session);
        held.arrive(vec![received("a", "a-2")], Instant::now(), NEW_YEAR, false);
        assert_eq!(handles(&held.next_deletes(10)), ["a-2"]);
        held.open(NEW_YEAR);
        assert!(take(&mut held).is_empty());
    }

    #[test]
    fn a_delete_is_tried_a_few_times_when_it_is_refused_and_on_and_on_when_sqs_is_away() {
        let mut held = Held::default();
        held.open(NEW_YEAR);
        arrive(&mut held, &["a"]);
        let given = take(&mut held);
        held.end(&Reach::none(), &[given[0].position]);
        for _ in 0..20 {
            let delete = held.next_deletes(10).remove(0);
            assert!(!held.not_deleted(&delete, false, false));
        }
        let tries = (1..20).find(|_| {
            let delete = held.next_deletes(10).remove(0);
            held.not_deleted(&delete, true, false)
        });
        assert_eq!(tries, Some(TRIES));
    }

    #[test]
    fn a_reader_that_goes_leaves_in_the_queue_s_order_what_has_not_ended() {
        let mut held = Held::default();
        let (session, _) = held.open(NEW_YEAR);
        arrive(&mut held, &["a", "b", "c", "d"]);
        let given = held.take(NEW_YEAR, 2, usize::MAX);
        held.end(&Reach::none(), &[given[1].position]);
        assert_eq!(handles(&held.close(session)), ["a-1", "c-1", "d-1"]);
        assert_eq!(handles(&held.next_deletes(10)), ["b-1"]);
        assert_eq!(handles(&arrive(&mut held, &["e"]).unwanted), ["e-1"]);
        assert!(!held.wants_more());
    }

    #[test]
    fn positions_of_readers_never_meet() {
        let mut held = Held::default();
        let (_, first) = held.open(NEW_YEAR);
        arrive(&mut held, &["a", "b"]);
        let given = take(&mut held);
        let (_, second) = held.open(NEW_YEAR);
        assert!(first.single() < given[0].position && given[1].position <= second.single());
        let (_, later) = Held::default().open(NEW_YEAR.saturating_add(Duration::from_secs(1)));
        assert!(second.single() < later.single(), "nor those of a process that starts later");
    }

    #[test]
    fn what_comes_early_is_held_back_and_on_a_fifo_queue_nothing_is() {
        let due = NEW_YEAR.saturating_add(Duration::from_millis(5));
        let early = || {
            let message = received("a", "a-1");
            vec![Received { record: Record { due_at: Some(due), ..message.record.clone() }, ..message }]
        };
        let mut held = Held::default();
        held.open(NEW_YEAR);
        held.arrive(early(), Instant::now(), NEW_YEAR, false);
        assert_eq!((take(&mut held).len(), held.first_due()), (0, Some(due)));
        assert_eq!(held.take(due, 10, usize::MAX).len(), 1);
        let mut fifo = Held::default();
        fifo.open(NEW_YEAR);
        fifo.arrive(early(), Instant::now(), NEW_YEAR, true);
        assert_eq!(take(&mut fifo).len(), 1);
    }

    #[test]
    fn it_is_held_on_to_until_sqs_s_ceiling() {
        let (mut held, start, visibility) = (Held::default(), Instant::now(), Duration::from_secs(60));
        held.open(NEW_YEAR);
        held.arrive(vec![received("a", "a-1")], start, NEW_YEAR, false);
        let at = |after: u64| start + Duration::from_secs(after);
        assert!(held.to_extend(at(0) - Duration::from_millis(1), at(1), visibility).is_empty());
        let receipt = held.to_extend(at(0), at(20), visibility).remove(0);
        held.extended(&receipt, at(20));
        assert!(held.to_extend(at(10), at(30), visibility).is_empty());
        assert_eq!(held.to_extend(at(20), at(40), visibility).len(), 1);
        assert!(held.to_extend(at(43_100), at(43_190), visibility).is_empty());
        assert!(held.expired(&receipt) && !held.expired(&receipt));
        assert!(held.to_extend(at(20), at(40), visibility).is_empty());
    }

    #[test]
    fn no_more_is_received_than_there_is_room_for() {
        let mut held = Held::default();
        held.open(NEW_YEAR);
        assert!(held.wants_more());
        let ids: Vec<String> = (0..PREFETCH).map(|id| id.to_string()).collect();
        arrive(&mut held, &ids.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(!held.wants_more());
        held.take(NEW_YEAR, 1, usize::MAX);
        assert!(held.wants_more());
    }

    #[test]
    fn what_waits_to_be_read_is_held_of_the_budget() {
        static BUDGET: Budget = Budget::new(1 << 20);
        let mut others = Share::of(&BUDGET);
        others.add(1 << 20);
        let mut held = Held { share: Share::of(&BUDGET), ..Held::default() };
        held.open(NEW_YEAR);
        let large = |id: &str| {
            let message = received(id, id);
            Received { record: Record { payload: vec![b'x'; OWN_BYTES].into(), ..message.record.clone() }, ..message }
        };
        held.arrive(vec![large("a")], Instant::now(), NEW_YEAR, false);
        assert!(!held.wants_more() && BUDGET.held() > (1 << 20) + OWN_BYTES, "its own little is held");
        take(&mut held);
        assert!(held.wants_more() && BUDGET.held() == 1 << 20);
        held.arrive(vec![large("b")], Instant::now(), NEW_YEAR, false);
        held.displace();
        assert_eq!(BUDGET.held(), 1 << 20, "what a reader leaves is held no more");
    }
}
