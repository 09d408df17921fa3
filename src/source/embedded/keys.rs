//! Idempotency keys on their way: reserved in memory first, then looked for in the filter, then in `state.db` (LOG.md 9).
//!
//! A key is taken by a [`Reservation`] before anything is journaled, kept with the answer when the record is durable, and
//! given back when it is not. It is forgotten here only when the store shows it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

use super::change::{NamespaceNumber, Sequence};
use crate::clock::Timestamp;
use crate::record::RecordId;
use crate::source::IdempotencyKey;

/// Bits of the filter for each key, and how many of them a key sets: one false alarm in about a hundred.
const BITS_PER_KEY: usize = 10;
const PROBES: u64 = 6;
/// Keys for which one block of the filter is made.
const BLOCK_KEYS: usize = 1 << 17;
/// Blocks that the filter may have beyond twice what the store's keys need.
const SPARE_BLOCKS: usize = 8;

/// The name under which a key is stored: a digest over namespace and key.
pub fn key_hash(namespace: NamespaceNumber, key: &str) -> [u8; 16] {
    let digest = Sha256::new().chain_update(namespace.0.to_le_bytes()).chain_update(key.as_bytes()).finalize();
    let mut hash = [0; 16];
    hash.iter_mut().zip(digest.iter()).for_each(|(to, from)| *to = *from);
    hash
}

enum Entry {
    Running { news: Arc<Notify> },
    Kept { fingerprint: [u8; 16], id: RecordId, written_at: Timestamp, due_at: Option<Timestamp>, sequence: Sequence },
}

#[derive(Default)]
struct Known {
    entries: HashMap<[u8; 16], Entry>,
    kept: VecDeque<(Sequence, [u8; 16])>,
}

/// What is to be done with a key.
pub enum Reserve {
    /// Nobody has used it: go on, and keep or drop the reservation.
    New(Reservation),
    /// It may be in the store: look there, then go on or drop the reservation.
    Ask(Reservation),
    /// It was used before for the same thing.
    Known {
        /// The first write's id.
        id: RecordId,
        /// When that was accepted.
        written_at: Timestamp,
        /// When it was due, if it was parked.
        due_at: Option<Timestamp>,
    },
    /// It was used before for something else.
    Reused,
    /// Its first write is on its way: wait for the news, then reserve again.
    Running(OwnedNotified),
}

/// A key that one write holds until it is durable. Dropping it gives the key back.
pub struct Reservation {
    keys: Keys,
    hash: [u8; 16],
    fingerprint: [u8; 16],
    index: Option<usize>,
    held: bool,
}

/// The keys of all namespaces. Cheap to clone; shared.
#[derive(Clone)]
pub struct Keys(Arc<Inner>);

struct Inner {
    known: Mutex<Known>,
    filter: RwLock<Filter>,
}

/// A Bloom filter in blocks, which says of most keys that the store has never seen them.
#[derive(Default)]
struct Filter {
    /// Each with its number; those that were filled from the store have 0.
    blocks: Vec<(u64, Vec<u64>)>,
    in_last: usize,
    /// The number of the newest block.
    newest: u64,
    /// It is being filled from the store.
    learning: bool,
    /// Until it has seen the store's keys, every key may be there.
    complete: bool,
}

impl Filter {
    fn bits(hash: &[u8; 16]) -> impl Iterator<Item = usize> + use<> {
        let number = u128::from_le_bytes(*hash);
        let (low, high) = ((number & u128::from(u64::MAX)) as u64, (number >> 64) as u64 | 1);
        let size = (BLOCK_KEYS * BITS_PER_KEY) as u64;
        (0..PROBES)
            .map(move |probe| usize::try_from(low.wrapping_add(high.wrapping_mul(probe)) % size).unwrap_or_default())
    }

    fn insert(&mut self, hash: &[u8; 16]) {
        if self.blocks.is_empty() || self.in_last >= BLOCK_KEYS {
            self.newest += 1;
            self.blocks.push((self.newest, vec![0; BLOCK_KEYS * BITS_PER_KEY / 64]));
            self.in_last = 0;
        }
        self.in_last += 1;
        if let Some((_, block)) = self.blocks.last_mut() {
            for bit in Self::bits(hash) {
                if let Some(word) = block.get_mut(bit / 64) {
                    *word |= 1 << (bit % 64);
                }
            }
        }
    }

    fn may_have(&self, hash: &[u8; 16]) -> bool {
        let has = |(_, block): &(u64, Vec<u64>)| {
            Self::bits(hash).all(|bit| block.get(bit / 64).is_some_and(|word| word & (1 << (bit % 64)) != 0))
        };
        !self.complete || self.blocks.iter().any(has)
    }
}

impl Default for Keys {
    fn default() -> Self {
        Self(Arc::new(Inner { known: Mutex::default(), filter: RwLock::default() }))
    }
}

impl Keys {
    /// Fills the filter with all that `read` gives of the store's keys; until the first time every key is looked for there.
    /// Blocks from number `from` on stay: their keys came after what is read.
    ///
    /// # Errors
    /// What `read` says; the filter then stays as it is.
    pub fn learn<E>(&self, from: u64, read: impl FnOnce(&mut dyn FnMut([u8; 16])) -> Result<(), E>) -> Result<(), E> {
        let mut fresh = Filter::default();
        let read = read(&mut |hash| fresh.insert(&hash));
        let mut filter = self.0.filter.write();
        filter.learning = false;
        read?;
        let kept = std::mem::take(&mut filter.blocks).into_iter().filter(|(number, _)| *number >= from);
        filter.blocks = fresh.blocks.into_iter().map(|(_, block)| (0, block)).chain(kept).collect();
        filter.in_last = BLOCK_KEYS;
        filter.complete = true;
        Ok(())
    }

    /// When the filter is far too large for the `live` keys of the store, begins to make it anew: gives the number of the
    /// block for the keys from here on. The store must show all that came before when it is read for [`Keys::learn`].
    pub fn outgrown(&self, live: u64) -> Option<u64> {
        let mut filter = self.0.filter.write();
        let needed = usize::try_from(live).unwrap_or(usize::MAX) / BLOCK_KEYS;
        if filter.learning
            || !filter.complete
            || filter.blocks.len() <= needed.saturating_mul(2).saturating_add(SPARE_BLOCKS)
        {
            return None;
        }
        filter.learning = true;
        filter.in_last = BLOCK_KEYS;
        Some(filter.newest + 1)
    }

    /// Takes a key for a write. What was written before `since` counts no more.
    pub fn reserve(&self, namespace: NamespaceNumber, key: &IdempotencyKey, since: Timestamp) -> Reserve {
        let hash = key_hash(namespace, &key.key);
        let mut known = self.0.known.lock();
        match known.entries.get(&hash) {
            Some(Entry::Running { news }) => return Reserve::Running(Arc::clone(news).notified_owned()),
            Some(Entry::Kept { fingerprint, id, written_at, due_at, .. }) if *written_at >= since => {
                if *fingerprint != key.fingerprint {
                    return Reserve::Reused;
                }
                return Reserve::Known { id: *id, written_at: *written_at, due_at: *due_at };
            }
            Some(Entry::Kept { .. }) | None => {}
        }
        known.entries.insert(hash, Entry::Running { news: Arc::default() });
        drop(known);
        let fingerprint = key.fingerprint;
        let reservation = Reservation { keys: self.clone(), hash, fingerprint, index: None, held: true };
        if self.0.filter.read().may_have(&hash) { Reserve::Ask(reservation) } else { Reserve::New(reservation) }
    }

    /// A key that the journal has and the store may not have yet, at a start.
    pub fn recall(
        &self,
        namespace: NamespaceNumber,
        key: &IdempotencyKey,
        (id, written_at, due_at): (RecordId, Timestamp, Option<Timestamp>),
        sequence: Sequence,
    ) {
        let hash = key_hash(namespace, &key.key);
        let entry = Entry::Kept { fingerprint: key.fingerprint, id, written_at, due_at, sequence };
        self.end(&hash, Some((sequence, entry)));
    }

    /// The store has committed everything up to `applied`: what it shows need not be remembered here.
    pub fn committed(&self, applied: Sequence) {
        let mut known = self.0.known.lock();
        while let Some((_, hash)) = known.kept.pop_front_if(|(sequence, _)| *sequence <= applied) {
            // It may have been used anew since, and that the store does not show yet.
            if matches!(known.entries.get(&hash), Some(Entry::Kept { sequence, .. }) if *sequence <= applied) {
                known.entries.remove(&hash);
            }
        }
    }

    fn end(&self, hash: &[u8; 16], kept: Option<(Sequence, Entry)>) {
        let mut known = self.0.known.lock();
        let running = match kept {
            Some((sequence, entry)) => {
                self.0.filter.write().insert(hash);
                known.kept.push_back((sequence, *hash));
                known.entries.insert(*hash, entry)
            }
            None => known.entries.remove(hash),
        };
        if let Some(Entry::Running { news }) = running {
            news.notify_waiters();
        }
    }
}

impl Reservation {
    /// Under which name the store has the key.
    pub const fn hash(&self) -> &[u8; 16] {
        &self.hash
    }

    /// What the key stands for now.
    pub const fn fingerprint(&self) -> &[u8; 16] {
        &self.fingerprint
    }

    /// Which write of its group it belongs to.
    pub const fn index(&self) -> Option<usize> {
        self.index
    }

    /// The same for the write with this index in its group.
    #[must_use]
    pub const fn at(mut self, index: usize) -> Self {
        self.index = Some(index);
        self
    }

    /// The write is durable as the frame `sequence`: whoever repeats it gets the same answer.
    pub fn keep(mut self, id: RecordId, written_at: Timestamp, due_at: Option<Timestamp>, sequence: Sequence) {
        self.held = false;
        let entry = Entry::Kept { fingerprint: self.fingerprint, id, written_at, due_at, sequence };
        self.keys.end(&self.hash, Some((sequence, entry)));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.held {
            self.keys.end(&self.hash, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NS: NamespaceNumber = NamespaceNumber(1);

    fn key(text: &str, fingerprint: u8) -> IdempotencyKey {
        IdempotencyKey { key: text.into(), fingerprint: [fingerprint; 16] }
    }

    fn known(keys: &Keys, text: &str, fingerprint: u8) -> &'static str {
        known_since(keys, text, fingerprint, Timestamp::MIN)
    }

    fn known_since(keys: &Keys, text: &str, fingerprint: u8, since: Timestamp) -> &'static str {
        match keys.reserve(NS, &key(text, fingerprint), since) {
            Reserve::New(_) => "new",
            Reserve::Ask(_) => "ask",
            Reserve::Known { .. } => "known",
            Reserve::Reused => "reused",
            Reserve::Running(_) => "running",
        }
    }

    fn keep(keys: &Keys, text: &str, sequence: u64) {
        let (Reserve::New(held) | Reserve::Ask(held)) = keys.reserve(NS, &key(text, 1), Timestamp::MAX) else {
            panic!("taken")
        };
        held.keep(RecordId::from_bytes([1; 16]), Timestamp::MIN, None, Sequence(sequence));
    }

    fn learn(keys: &Keys, from: u64, texts: &[&str]) {
        let read = |each: &mut dyn FnMut([u8; 16])| {
            texts.iter().for_each(|text| each(key_hash(NS, text)));
            Ok::<_, ()>(())
        };
        keys.learn(from, read).unwrap();
    }

    #[test]
    fn a_filter_that_has_outgrown_the_store_is_made_anew_and_forgets_no_key_that_came_meanwhile() {
        let keys = Keys::default();
        assert_eq!(keys.outgrown(0), None, "it is not complete yet");
        learn(&keys, 1, &[]);
        for number in 0..=(SPARE_BLOCKS as u64) {
            assert_eq!(keys.outgrown(0), None);
            keep(&keys, &format!("gone-{number}"), number);
            // As if the block were full.
            keys.0.filter.write().in_last = BLOCK_KEYS;
        }
        keys.committed(Sequence(100));
        assert_eq!(keys.outgrown((BLOCK_KEYS * 2) as u64), None, "so many keys need their blocks");
        let from = keys.outgrown(0).unwrap();
        assert_eq!(keys.outgrown(0), None, "once at a time");
        keep(&keys, "meanwhile", 101);
        keys.committed(Sequence(101));
        learn(&keys, from, &["kept"]);
        assert_eq!((known(&keys, "kept", 1), known(&keys, "meanwhile", 1)), ("ask", "ask"));
        assert_eq!(known(&keys, "gone-0", 1), "new");
        assert_eq!(keys.0.filter.read().blocks.len(), 2);
    }

    #[test]
    fn a_key_is_running_until_it_is_kept_and_free_again_when_it_is_dropped() {
        let keys = Keys::default();
        learn(&keys, 1, &[]);
        let Reserve::New(held) = keys.reserve(NS, &key("a", 1), Timestamp::MIN) else { panic!("taken") };
        assert_eq!(known(&keys, "a", 1), "running");
        drop(held);
        assert_eq!(known(&keys, "a", 1), "new");
        keep(&keys, "a", 7);
        assert_eq!((known(&keys, "a", 1), known(&keys, "a", 2)), ("known", "reused"));
    }

    #[test]
    fn what_the_store_shows_is_asked_there_and_what_it_has_never_seen_is_not() {
        let keys = Keys::default();
        assert_eq!(known(&keys, "a", 1), "ask", "nothing has been learnt yet");
        learn(&keys, 1, &["old"]);
        assert_eq!((known(&keys, "old", 1), known(&keys, "a", 1)), ("ask", "new"));
        keep(&keys, "a", 7);
        keys.committed(Sequence(6));
        assert_eq!(known(&keys, "a", 1), "known", "the store does not show it yet");
        keys.committed(Sequence(7));
        assert_eq!(known(&keys, "a", 1), "ask");
    }

    #[test]
    fn a_key_of_long_ago_is_free_and_its_new_use_stays_until_the_store_shows_it() {
        let keys = Keys::default();
        learn(&keys, 1, &[]);
        let at = |millis| Timestamp::from_millis(millis);
        let keep = |written_at, sequence| {
            let (Reserve::New(held) | Reserve::Ask(held)) = keys.reserve(NS, &key("a", 1), written_at) else {
                panic!("taken")
            };
            held.keep(RecordId::from_bytes([1; 16]), written_at, None, Sequence(sequence));
        };
        keep(at(100), 5);
        assert_eq!(known_since(&keys, "a", 1, at(100)), "known");
        keep(at(101), 9);
        keys.committed(Sequence(5));
        assert_eq!((known_since(&keys, "a", 1, at(101)), known_since(&keys, "a", 2, at(101))), ("known", "reused"));
        keys.committed(Sequence(9));
        assert_eq!(known_since(&keys, "a", 1, at(101)), "ask");
    }

    #[tokio::test]
    async fn whoever_waits_for_a_running_key_hears_of_its_end() {
        let keys = Keys::default();
        let (Reserve::New(held) | Reserve::Ask(held)) = keys.reserve(NS, &key("a", 1), Timestamp::MIN) else {
            panic!("taken")
        };
        let Reserve::Running(news) = keys.reserve(NS, &key("a", 1), Timestamp::MIN) else { panic!("free") };
        drop(held);
        news.await;
    }
}
