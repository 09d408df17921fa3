//! The store against a model: whatever is applied again after a crash, and wherever it falls between two commits, the
//! same state comes of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::record::RecordId;
use crate::source::embedded::change::{Change, Frame};
use crate::source::embedded::disk::RealDisk;
use crate::source::embedded::due::Due;
use crate::source::embedded::testing::record;
use crate::source::{AsideRow, DeadLetter, DeadQuery, DeadReason, ParkedQuery, RowKey};

const NS: NamespaceNumber = NamespaceNumber(1);

fn at(millis: u64) -> Timestamp {
    Timestamp::from_millis(i64::try_from(millis).unwrap())
}

fn frame(sequence: u64, change: Change) -> Frame {
    Frame { sequence: Sequence(sequence), namespace: NS, time: at(sequence), change }
}

fn encoded(number: u64, key: Option<&str>) -> Bytes {
    let mut record = record(key, "{}");
    record.id = RecordId::new(at(number), 0, 1, number);
    let mut bytes = Vec::new();
    record.encode(&mut bytes);
    bytes.into()
}

fn park(sequence: u64, due: u64) -> Frame {
    frame(sequence, Change::Park { due_at: at(due), record: encoded(sequence, Some("k")), idempotency: None })
}

fn open(folder: &tempfile::TempDir) -> State {
    State::open(&folder.path().join("state.db"), Arc::new(RealDisk)).unwrap()
}

fn branch() -> BranchName {
    BranchName::new("sink", None)
}

fn row(position: u64) -> RowKey {
    RowKey { position: Position(position), child: 0 }
}

fn aside(position: u64) -> Box<AsideRow> {
    Box::new(AsideRow {
        row: row(position),
        lane: "=k".into(),
        record: Arc::new(record(Some("k"), "{}")),
        rendered: None,
        attempts: 3,
        first_failed: at(1),
        next_try: at(2),
        last_error: "500".into(),
        replayed: false,
    })
}

fn letter(position: u64) -> Box<DeadLetter> {
    Box::new(DeadLetter {
        row: row(position),
        branch: branch(),
        at: at(9),
        reason: DeadReason::Refused,
        attempts: 1,
        last_error: "422".into(),
        stage: "sink".into(),
        revision: "r".into(),
        record: Arc::new(record(Some("k"), "{}")),
        rendered: None,
        overtaken: false,
    })
}

#[test]
fn a_dead_letter_takes_the_place_of_its_row_and_a_purge_leaves_a_tombstone_until_the_cursor_passed() {
    let folder = tempfile::tempdir().unwrap();
    let mut state = open(&folder);
    let changes = [
        Change::BranchOpened { branch: branch(), position: Position(0) },
        Change::Aside { branch: branch(), row: aside(5) },
        Change::Dead { letter: letter(5) },
        Change::Purge { branch: branch(), row: row(5) },
    ];
    for (sequence, change) in (1..).zip(changes) {
        state.apply(&frame(sequence, change)).unwrap();
    }
    state.commit(Sequence(4), None).unwrap();
    let reader = state.reader();
    assert!(reader.aside_lanes(NS, &branch(), None).unwrap().is_empty());
    assert!(reader.dead_page(NS, &DeadQuery::default()).unwrap().rows.is_empty());
    assert!(reader.branch(NS, &branch(), Position(0)).unwrap().ended.contains(&row(5)));
    state.apply(&frame(5, Change::Cursor { branch: branch(), position: Position(6) })).unwrap();
    state.commit(Sequence(5), None).unwrap();
    assert!(reader.branch(NS, &branch(), Position(0)).unwrap().ended.is_empty());
    assert_eq!((state.counts().aside(NS), state.counts().dead(NS)), (vec![], vec![]));
}

#[test]
fn an_unclean_stop_counts_only_while_the_cursor_stands_still() {
    let folder = tempfile::tempdir().unwrap();
    let mut state = open(&folder);
    let unclean = |state: &State| state.reader().branch(NS, &branch(), Position(0)).unwrap().unclean_stops;
    let steps = [
        (Change::Cursor { branch: branch(), position: Position(3) }, 0),
        (Change::Started { clean: false }, 1),
        (Change::Started { clean: false }, 2),
        (Change::Cursor { branch: branch(), position: Position(4) }, 2),
        (Change::Started { clean: false }, 1),
        (Change::Started { clean: true }, 0),
    ];
    for (sequence, (change, expected)) in (1..).zip(steps) {
        state.apply(&frame(sequence, change)).unwrap();
        state.commit(Sequence(sequence), None).unwrap();
        assert_eq!(unclean(&state), expected, "after step {sequence}");
    }
}

#[test]
fn a_flipped_bit_in_a_row_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let mut state = open(&folder);
    state.apply(&park(1, 100)).unwrap();
    state.commit(Sequence(1), None).unwrap();
    state.db.execute("UPDATE parked SET record = zeroblob(length(record))", []).unwrap();
    let error = state.reader().parked_by_key(NS, "k").unwrap_err();
    assert!(error.to_string().contains("does not match its checksum"), "{error}");
}

#[test]
fn a_new_file_of_the_same_content_takes_the_old_ones_place() {
    let folder = tempfile::tempdir().unwrap();
    let mut state = open(&folder);
    state.apply(&park(1, 100)).unwrap();
    state.commit(Sequence(1), Some(&Checkpoint::default())).unwrap();
    drop(state);
    State::rebuild(&folder.path().join("state.db"), &RealDisk).unwrap();
    let state = open(&folder);
    assert_eq!((state.applied(), state.checkpoint()), (Sequence(1), Sequence(1)));
    assert_eq!(
        state.reader().parked_page(NS, &ParkedQuery { limit: 9, ..ParkedQuery::default() }).unwrap().rows.len(),
        1
    );
    assert_eq!(state.counts().parked(NS).0, 1);
}

/// What is done to one of the first twenty parked rows.
#[derive(Clone, Debug)]
enum Step {
    Park(u64),
    Release(usize),
    Cancel(usize),
    Move(usize, u64),
    Commit,
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..50u64).prop_map(Step::Park),
        2 => (0..20usize).prop_map(Step::Release),
        1 => (0..20usize).prop_map(Step::Cancel),
        1 => (0..20usize, 0..50u64).prop_map(|(row, due)| Step::Move(row, due)),
        2 => Just(Step::Commit),
        1 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn parked_rows_are_as_the_frames_say_wherever_a_crash_falls(steps in steps()) {
        let folder = tempfile::tempdir().unwrap();
        let mut state = open(&folder);
        let mut journal: Vec<Frame> = Vec::new();
        let mut waiting: BTreeMap<u64, u64> = BTreeMap::new();
        for step in steps {
            let sequence = journal.len() as u64 + 1;
            let pick = |row: usize| waiting.iter().nth(row).map(|(sequence, due)| (*sequence, *due));
            let change = match step {
                Step::Park(due) => Some(park(sequence, due).change),
                Step::Release(row) => pick(row).map(|(parked, due)| Change::Release {
                    position: Position(sequence), parked: Sequence(parked), due_at: at(due), record: encoded(parked, Some("k")),
                }),
                Step::Cancel(row) => pick(row).map(|(parked, due)| Change::Cancel {
                    parked: Sequence(parked), due_at: at(due), id: RecordId::new(at(parked), 0, 1, parked),
                }),
                Step::Move(row, due_at) => pick(row).map(|(parked, from)| Change::Move {
                    parked: Sequence(parked), from: at(from), due_at: at(due_at), record: encoded(parked, Some("k")),
                }),
                Step::Commit => { state.commit(Sequence(sequence - 1), None).unwrap(); None }
                Step::Crash => {
                    drop(state);
                    state = open(&folder);
                    let applied = state.applied();
                    for frame in journal.iter().filter(|frame| frame.sequence > applied) {
                        state.apply(frame).unwrap();
                    }
                    None
                }
            };
            if let Some(change) = change {
                match &change {
                    Change::Park { due_at, .. } => _ = waiting.insert(sequence, due_at.as_millis().try_into().unwrap()),
                    Change::Release { parked, .. } | Change::Cancel { parked, .. } => _ = waiting.remove(&parked.0),
                    Change::Move { parked, due_at, .. } => {
                        waiting.remove(&parked.0);
                        waiting.insert(sequence, due_at.as_millis().try_into().unwrap());
                    }
                    _ => {}
                }
                let frame = frame(sequence, change);
                state.apply(&frame).unwrap();
                journal.push(frame);
            }
        }
        state.commit(Sequence(journal.len() as u64), None).unwrap();
        let mut expected: Vec<(u64, u64)> = waiting.iter().map(|(sequence, due)| (*due, *sequence)).collect();
        expected.sort_unstable();
        let reader = state.reader();
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let page = reader.parked_page(NS, &ParkedQuery { limit: 3, after, ..ParkedQuery::default() }).unwrap();
            found.extend(page.rows.iter().map(|row| (row.due_at.as_millis().try_into().unwrap(), row.parked.0)));
            after = page.next;
            if after.is_none() { break }
        }
        prop_assert_eq!(&found, &expected);
        prop_assert_eq!(state.counts().parked(NS).0, expected.len() as u64);
    }

    #[test]
    fn nothing_due_is_lost_or_early_however_memory_and_store_take_turns(
        steps in prop::collection::vec(prop_oneof![3 => (0..200_000u64).prop_map(Some), 2 => Just(None)], 1..80), tiny: bool,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut state = open(&folder);
        let due = Due::new(if tiny { 1_000 } else { 1 << 20 });
        let (mut now, mut sequence, mut parked, mut taken) = (0, 0, Vec::new(), Vec::new());
        for step in steps.into_iter().chain(std::iter::repeat_n(None, 60)) {
            match step {
                Some(delay) => {
                    sequence += 1;
                    let frame = park(sequence, now + delay);
                    due.offer(&frame);
                    state.apply(&frame).unwrap();
                    parked.push((now + delay, sequence));
                }
                None => {
                    now += 5_000;
                    if due.wants_step(at(now)) {
                        state.commit(Sequence(sequence), None).unwrap();
                        due.step(&state, at(now)).unwrap();
                    }
                    for row in due.take_due(at(now), 1_000) {
                        prop_assert!(row.due_at <= at(now));
                        taken.push((row.due_at.as_millis().try_into().unwrap(), row.parked.0));
                        sequence += 1;
                        let release = Change::Release { position: Position(sequence), parked: row.parked, due_at: row.due_at, record: row.record };
                        state.apply(&frame(sequence, release)).unwrap();
                    }
                }
            }
        }
        parked.sort_unstable();
        taken.sort_unstable();
        prop_assert_eq!(taken, parked);
    }
}
