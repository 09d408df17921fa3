//! Turns ends in any order into the one position that may be stored.

use std::collections::BTreeMap;

use crate::record::Position;

/// Tracks the deliveries of one branch: the frontier is the highest position at or below which everything has ended.
///
/// A position counts as ended when all its deliveries have: `emit` makes several of one position.
#[derive(Debug, Default)]
pub struct Frontier {
    base: Position,
    /// Positions above the base, each with how many deliveries are still open.
    open: BTreeMap<Position, u32>,
}

impl Frontier {
    /// Everything at or below `base` has ended already.
    pub const fn new(base: Position) -> Self {
        Self { base, open: BTreeMap::new() }
    }

    /// A position was read; positions come in ascending order. It has one open delivery.
    pub fn begin(&mut self, position: Position) {
        self.open.insert(position, 1);
    }

    /// The position's delivery became `children` deliveries instead of one.
    pub fn split(&mut self, position: Position, children: u32) {
        if let Some(open) = self.open.get_mut(&position) {
            *open = children;
        }
    }

    /// One delivery of the position ended. Gives the frontier when it moved.
    pub fn end(&mut self, position: Position) -> Option<Position> {
        let open = self.open.get_mut(&position)?;
        *open = open.saturating_sub(1);
        let before = self.base;
        while let Some(first) = self.open.first_entry() {
            if *first.get() > 0 {
                break;
            }
            self.base = *first.key();
            first.remove();
        }
        (self.base != before).then_some(self.base)
    }

    /// The position that may be stored.
    pub const fn position(&self) -> Position {
        self.base
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
        let mut frontier = Frontier::new(Position(10));
        for position in 11..=13 {
            frontier.begin(Position(position));
        }
        assert_eq!(frontier.end(Position(12)), None);
        assert_eq!(frontier.end(Position(11)), Some(Position(12)));
        assert_eq!(frontier.in_flight(), 1);
    }

    #[test]
    fn a_position_with_children_ends_with_the_last_of_them() {
        let mut frontier = Frontier::new(Position(0));
        frontier.begin(Position(1));
        frontier.split(Position(1), 2);
        assert_eq!(frontier.end(Position(1)), None);
        assert_eq!(frontier.end(Position(1)), Some(Position(1)));
    }

    proptest! {
        #[test]
        fn in_any_order_it_is_the_lowest_open_position_less_one(order in Just((1..=40u64).collect::<Vec<_>>()).prop_shuffle()) {
            let mut frontier = Frontier::new(Position(0));
            (1..=40).for_each(|position| frontier.begin(Position(position)));
            let mut open: std::collections::BTreeSet<u64> = (1..=40).collect();
            for position in order {
                frontier.end(Position(position));
                open.remove(&position);
                let expected = open.first().map_or(40, |lowest| lowest - 1);
                prop_assert_eq!(frontier.position(), Position(expected));
            }
        }
    }
}
