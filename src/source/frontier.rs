//! Turns ends in any order into the positions that may be stored: one for each part of the log.

use std::collections::BTreeMap;

use crate::record::Position;

/// How far something has come in each part of a log, in order of the parts. A part that is not named has not been begun.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach(Vec<Position>);

impl Reach {
    /// Nowhere.
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    /// How far in a part; before its first position if it is not named.
    pub fn of(&self, part: u16) -> Position {
        self.0.iter().find(|position| position.part() == part).copied().unwrap_or(Position::in_part(part, 0))
    }

    /// How far in a log that has one part.
    pub fn single(&self) -> Position {
        self.of(0)
    }

    /// The part of `position` has come at least so far.
    pub fn advance(&mut self, position: Position) {
        match self.0.binary_search_by_key(&position.part(), |known| known.part()) {
            Ok(at) => {
                if let Some(known) = self.0.get_mut(at) {
                    *known = position.max(*known);
                }
            }
            Err(at) => self.0.insert(at, position),
        }
    }

    /// Each part has come at least as far as in `other`.
    pub fn advance_all(&mut self, other: &Self) {
        other.iter().for_each(|position| self.advance(position));
    }

    /// True when the position lies at or below.
    pub fn covers(&self, position: Position) -> bool {
        position <= self.of(position.part())
    }

    /// How many positions lie above `other` and not above this one.
    pub fn distance(&self, other: &Self) -> u64 {
        self.iter().map(|position| position.0.saturating_sub(other.of(position.part()).0)).sum()
    }

    /// By part.
    pub fn iter(&self) -> impl Iterator<Item = Position> {
        self.0.iter().copied()
    }

    /// True when no part is named.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Position> for Reach {
    fn from(position: Position) -> Self {
        Self(vec![position])
    }
}

impl FromIterator<Position> for Reach {
    fn from_iter<I: IntoIterator<Item = Position>>(positions: I) -> Self {
        let mut reach = Self::none();
        positions.into_iter().for_each(|position| reach.advance(position));
        reach
    }
}

/// Tracks the deliveries of one branch: the frontier of a part is the highest position at or below which everything of that
/// part has ended.
///
/// A position counts as ended when all its deliveries have: `emit` makes several of one position.
#[derive(Debug, Default)]
pub struct Frontier {
    base: Reach,
    /// Positions above the base, each with how many deliveries are still open.
    open: BTreeMap<Position, u32>,
    /// Positions that have ended and nobody was told of; kept only if somebody wants to know each.
    ended: Option<Vec<Position>>,
}

impl Frontier {
    /// Everything at or below `base` has ended already.
    pub const fn new(base: Reach) -> Self {
        Self { base, open: BTreeMap::new(), ended: None }
    }

    /// Remembers each position that has ended, whatever its part's frontier, until it is taken.
    pub fn keep_ends(&mut self) {
        self.ended = Some(Vec::new());
    }

    /// The positions that have ended since the last call, if they are kept.
    pub fn take_ends(&mut self) -> Vec<Position> {
        self.ended.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// True when there are positions to take.
    pub fn has_ends(&self) -> bool {
        self.ended.as_ref().is_some_and(|ended| !ended.is_empty())
    }

    /// A position was read; the positions of a part come in ascending order. It has one open delivery.
    pub fn begin(&mut self, position: Position) {
        self.open.insert(position, 1);
    }

    /// The position's delivery became `children` deliveries instead of one.
    pub fn split(&mut self, position: Position, children: u32) {
        if let Some(open) = self.open.get_mut(&position) {
            *open = children;
        }
    }

    /// One delivery of the position ended. Gives the frontier of its part when it moved.
    pub fn end(&mut self, position: Position) -> Option<Position> {
        let open = self.open.get_mut(&position).filter(|open| **open > 0)?;
        *open -= 1;
        if *open == 0
            && let Some(ended) = &mut self.ended
        {
            ended.push(position);
        }
        let mut moved = None;
        let part = Position::in_part(position.part(), 0)..=position;
        // Only the lowest of the part can move it.
        while let Some((&lowest, 0)) = self.open.range(part.clone()).next() {
            self.open.remove(&lowest);
            moved = Some(lowest);
        }
        // Those above ended earlier and waited for this one.
        if moved == Some(position) {
            let last = Position::in_part(position.part(), Position::LAST_OFFSET);
            while let Some((&next, 0)) = self.open.range(position..=last).next() {
                self.open.remove(&next);
                moved = Some(next);
            }
        }
        if let Some(position) = moved {
            self.base.advance(position);
        }
        moved
    }

    /// The positions that may be stored.
    pub const fn reach(&self) -> &Reach {
        &self.base
    }

    /// Positions beyond the frontier that have ended already.
    pub fn ended_beyond(&self) -> impl Iterator<Item = Position> {
        self.open.iter().filter(|(_, open)| **open == 0).map(|(position, _)| *position)
    }

    /// The lowest position that has not ended.
    pub fn first_open(&self) -> Option<Position> {
        self.open.first_key_value().map(|(position, _)| *position)
    }

    /// How many positions are read and not yet behind the frontier.
    pub fn in_flight(&self) -> usize {
        self.open.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_moves_only_over_what_has_ended() {
        let mut frontier = Frontier::new(Position(10).into());
        for position in 11..=13 {
            frontier.begin(Position(position));
        }
        assert_eq!(frontier.end(Position(12)), None);
        assert_eq!(frontier.end(Position(11)), Some(Position(12)));
        assert_eq!(frontier.in_flight(), 1);
    }

    #[test]
    fn a_position_with_children_ends_with_the_last_of_them() {
        let mut frontier = Frontier::new(Position(0).into());
        frontier.begin(Position(1));
        frontier.split(Position(1), 2);
        assert_eq!(frontier.end(Position(1)), None);
        assert_eq!(frontier.end(Position(1)), Some(Position(1)));
    }

    #[test]
    fn each_part_moves_alone() {
        let at = Position::in_part;
        let mut frontier = Frontier::new([at(0, 4), at(3, 7)].into_iter().collect());
        [at(3, 8), at(0, 5), at(3, 9)].into_iter().for_each(|position| frontier.begin(position));
        assert_eq!(frontier.end(at(3, 9)), None);
        assert_eq!(frontier.end(at(0, 5)), Some(at(0, 5)));
        assert_eq!(frontier.reach(), &[at(0, 5), at(3, 7)].into_iter().collect::<Reach>());
        assert_eq!(frontier.end(at(3, 8)), Some(at(3, 9)));
        assert!(frontier.reach().covers(at(3, 9)) && !frontier.reach().covers(at(1, 1)));
        assert_eq!(frontier.reach().distance(&Position(2).into()), 3 + at(3, 9).0 - at(3, 0).0);
    }

    #[test]
    fn who_wants_each_end_hears_of_it_once_and_out_of_order() {
        let mut frontier = Frontier::new(Reach::none());
        frontier.keep_ends();
        (1..=3).for_each(|position| frontier.begin(Position(position)));
        frontier.split(Position(3), 2);
        frontier.end(Position(2));
        frontier.end(Position(3));
        assert_eq!(frontier.take_ends(), [Position(2)]);
        frontier.end(Position(3));
        frontier.end(Position(1));
        assert_eq!(frontier.take_ends(), [Position(3), Position(1)]);
    }

    proptest! {
        #[test]
        fn in_any_order_it_is_the_lowest_open_position_less_one(order in Just((1..=40u64).collect::<Vec<_>>()).prop_shuffle()) {
            let mut frontier = Frontier::new(Position(0).into());
            (1..=40).for_each(|position| frontier.begin(Position(position)));
            let mut open: std::collections::BTreeSet<u64> = (1..=40).collect();
            for position in order {
                frontier.end(Position(position));
                open.remove(&position);
                let expected = open.first().map_or(40, |lowest| lowest - 1);
                prop_assert_eq!(frontier.reach().single(), Position(expected));
            }
        }
    }
}
