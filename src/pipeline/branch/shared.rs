//! What the stages before the regions made of a record, so that the branches of a namespace run them once between them.
//!
//! Takes a record's position and the compiled stages; gives what another branch's run of these very stages made of it, or
//! the right to run them. A script is a function of (record, revision of the file), so it is all the same whose run it
//! was; `wall_clock()` is no such function, and then all see the time of the one run. Never waits: who meets a run that
//! is under way turns to other records first, and then runs the stages too.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::record::Position;
use crate::transform::{Event, Fault, Outcome, Transform};

/// Records at most of which something is kept; two reads of a branch.
const MOST: usize = 1_024;
/// Bytes at most that are kept, near enough.
const MOST_BYTES: usize = 4 << 20;

/// What a record became.
type Made = Result<Outcome, Fault>;

/// The outcomes that one namespace's branches share. What does not fit is forgotten, the oldest records first.
#[derive(Debug, Default)]
pub struct Shared(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    slots: BTreeMap<Position, Slot>,
    bytes: usize,
}

#[derive(Debug)]
struct Slot {
    /// The stages that ran. Others of the same name are other stages: a reload never serves the old ones' outcome.
    stages: Transform,
    /// `None` = under way.
    made: Option<Kept>,
}

#[derive(Debug)]
struct Kept {
    made: Arc<Made>,
    bytes: usize,
    /// Branches that have not had it.
    left: usize,
}

/// What there is of a record.
pub(super) enum Found<'a> {
    /// Another branch's run made this of it.
    Made(Made),
    /// Another branch runs the stages just now.
    UnderWay,
    /// Nobody has run them: the caller does.
    Mine(Claim<'a>),
}

impl Shared {
    /// Looks for the outcome of these stages on the record at `position`; `others` is how many more branches want it.
    pub(super) fn look(&self, position: Position, stages: &Transform, others: usize) -> Found<'_> {
        let mut state = self.0.lock();
        if let Some(slot) = state.slots.get_mut(&position).filter(|slot| slot.stages.is(stages)) {
            let Some(kept) = &mut slot.made else { return Found::UnderWay };
            let made = Arc::clone(&kept.made);
            kept.left = kept.left.saturating_sub(1);
            if kept.left == 0 {
                state.remove(position);
            }
            drop(state);
            return Found::Made(Arc::try_unwrap(made).unwrap_or_else(|made| Made::clone(&made)));
        }
        state.remove(position);
        state.slots.insert(position, Slot { stages: stages.clone(), made: None });
        Found::Mine(Claim { shared: self, position, stages: stages.clone(), others })
    }
}

impl State {
    fn remove(&mut self, position: Position) {
        let slot = self.slots.remove(&position);
        self.bytes -= slot.and_then(|slot| slot.made).map_or(0, |kept| kept.bytes);
    }

    /// Forgets the oldest until the rest fits.
    fn fit(&mut self) {
        while self.slots.len() > MOST || self.bytes > MOST_BYTES {
            let Some(oldest) = self.slots.first_key_value().map(|(position, _)| *position) else { return };
            self.remove(oldest);
        }
    }
}

/// The right to run the stages on a record. Dropped without an outcome, it is anybody's again.
pub(super) struct Claim<'a> {
    shared: &'a Shared,
    position: Position,
    stages: Transform,
    others: usize,
}

impl Claim<'_> {
    /// Keeps what the run made, for the others.
    pub(super) fn keep(self, made: &Made) {
        let bytes = weight(made);
        if self.others == 0 || bytes > MOST_BYTES {
            return;
        }
        let mut state = self.shared.0.lock();
        // Gone, or another's by now: then there was no room, or the file has changed.
        if let Some(slot) = state.slots.get_mut(&self.position).filter(|slot| slot.stages.is(&self.stages)) {
            slot.made = Some(Kept { made: Arc::new(made.clone()), bytes, left: self.others });
            state.bytes += bytes;
            state.fit();
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.0.lock();
        let open = |slot: &Slot| slot.made.is_none() && slot.stages.is(&self.stages);
        if state.slots.get(&self.position).is_some_and(open) {
            state.remove(self.position);
        }
    }
}

/// The bytes that an outcome holds on to, near enough.
fn weight(made: &Made) -> usize {
    /// A payload's parsed form beside its bytes.
    const PARSED: usize = 8;
    let event = |event: &Event| 1_024 + event.record.payload.len() + event.payload().len() * PARSED;
    match made {
        Ok(Outcome::Deliver(events)) => events.iter().map(event).sum(),
        Ok(Outcome::Drop(_)) | Err(_) => 1_024,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::testing::{NEW_YEAR, record};
    use crate::transform::{Compiler, Place, StageKind, StageSource};

    fn stages() -> Transform {
        let stage = StageSource {
            name: "transform[0]".into(),
            kind: StageKind::Script,
            text: "payload.a = 1;".into(),
            place: Place { file: "a.yaml".into(), line: 1, column: 1 },
            env: Vec::new(),
        };
        Compiler::new(Clock::manual(NEW_YEAR), [].into()).stages(&[stage]).unwrap()
    }

    fn outcome(payload: &str) -> Outcome {
        Outcome::Deliver(vec![Event::original(Arc::new(record(payload)))])
    }

    /// What is there for the record at `position`: a payload, or why there is none.
    fn look(shared: &Shared, position: u64, stages: &Transform) -> String {
        match shared.look(Position(position), stages, 1) {
            Found::Made(Ok(Outcome::Deliver(events))) => String::from_utf8(events[0].payload().to_vec()).unwrap(),
            Found::Made(other) => panic!("{other:?}"),
            Found::UnderWay => "under way".to_owned(),
            Found::Mine(_) => "nothing".to_owned(),
        }
    }

    fn keep(shared: &Shared, position: u64, stages: &Transform, others: usize, payload: &str) {
        let Found::Mine(claim) = shared.look(Position(position), stages, others) else { panic!("not mine") };
        claim.keep(&Ok(outcome(payload)));
    }

    fn held(shared: &Shared) -> (usize, usize) {
        let state = shared.0.lock();
        (state.slots.len(), state.bytes)
    }

    #[test]
    fn each_other_branch_has_the_outcome_once_and_then_it_is_forgotten() {
        let (shared, stages) = (Shared::default(), stages());
        keep(&shared, 7, &stages, 2, "one");
        assert_eq!(look(&shared, 8, &stages), "nothing");
        assert_eq!(look(&shared, 7, &stages), "one");
        assert_eq!(look(&shared, 7, &stages), "one");
        assert_eq!(held(&shared), (0, 0));
        assert_eq!(look(&shared, 7, &stages), "nothing");
    }

    #[test]
    fn a_run_under_way_is_seen_and_one_given_up_is_anybodys() {
        let (shared, stages) = (Shared::default(), stages());
        let claim = shared.look(Position(1), &stages, 1);
        assert_eq!(look(&shared, 1, &stages), "under way");
        drop(claim);
        assert_eq!(look(&shared, 1, &stages), "nothing");
        assert_eq!(held(&shared), (0, 0));
    }

    #[test]
    fn other_stages_have_outcomes_of_their_own() {
        let (shared, old, new) = (Shared::default(), stages(), stages());
        keep(&shared, 1, &old, 9, "old");
        keep(&shared, 1, &new, 9, "new");
        assert_eq!(look(&shared, 1, &new), "new");
        // A run of the old ones that ends late does not take the place of the new one's.
        let Found::Mine(late) = shared.look(Position(2), &old, 9) else { panic!() };
        keep(&shared, 2, &new, 9, "new");
        late.keep(&Ok(outcome("old")));
        assert_eq!(look(&shared, 2, &new), "new");
    }

    #[test]
    fn what_is_kept_has_a_bound_and_the_oldest_records_go_first() {
        let (shared, stages) = (Shared::default(), stages());
        for position in 0..3_000 {
            keep(&shared, position, &stages, 1, "{}");
        }
        assert_eq!(held(&shared).0, MOST);
        // What is behind all of it, as a lagging branch's, has no room and does no harm.
        keep(&shared, 1, &stages, 1, "late");
        assert_eq!(look(&shared, 1, &stages), "nothing");
        assert_eq!((look(&shared, 0, &stages), look(&shared, 2_999, &stages)), ("nothing".into(), "{}".into()));
        let large = "x".repeat(100_000);
        for position in 3_000..3_100 {
            keep(&shared, position, &stages, 1, &large);
            assert!(held(&shared).1 <= MOST_BYTES);
        }
        assert_eq!(look(&shared, 3_099, &stages), large);
        // What alone is over the bound has no room either.
        keep(&shared, 4_000, &stages, 1, &"x".repeat(MOST_BYTES));
        assert_eq!(look(&shared, 4_000, &stages), "nothing");
        assert!(held(&shared).1 <= MOST_BYTES);
    }
}
