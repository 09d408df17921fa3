//! The names of keys, and which stream a record goes to.
//!
//! Every key carries the namespace as its hash tag, so that a script may touch several of them in a cluster too.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::record::{Namespace, Position};

/// Names of one namespace's keys.
#[derive(Clone, Debug)]
pub(super) struct Names {
    /// `PREFIX:{NAMESPACE}`
    root: Arc<str>,
    pub(super) streams: u16,
}

impl Names {
    pub(super) fn new(prefix: Option<&str>, namespace: &Namespace, streams: u16) -> Self {
        Self { root: root(prefix, namespace).into(), streams: streams.max(1) }
    }

    pub(super) fn parts(&self) -> std::ops::Range<u16> {
        0..self.streams
    }

    pub(super) fn stream(&self, part: u16) -> String {
        format!("{}:stream:{part}", self.root)
    }

    pub(super) fn lease(&self, branch: &str, part: u16) -> String {
        format!("{}:lease:{part}:{branch}", self.root)
    }

    /// Who reads a branch.
    pub(super) fn live(&self, branch: &str) -> String {
        format!("{}:live:{branch}", self.root)
    }

    pub(super) fn key(&self, hash: &str) -> String {
        format!("{}:key:{hash}", self.root)
    }

    pub(super) fn dead(&self) -> String {
        format!("{}:dead", self.root)
    }

    /// The stream of a key; the same in every process and for ever.
    pub(super) fn part_of(&self, key: &str) -> u16 {
        let hash: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let [a, b, c, d, ..] = hash;
        u16::try_from(u32::from_be_bytes([a, b, c, d]) % u32::from(self.streams)).unwrap_or(0)
    }
}

/// What all keys of a namespace begin with.
pub(super) fn root(prefix: Option<&str>, namespace: &Namespace) -> String {
    format!("{}:{{{namespace}}}", prefix.unwrap_or("walflow"))
}

/// The position of an entry's id `0-N`.
pub(super) fn offset(id: &str) -> Option<u64> {
    let number = id.strip_prefix("0-")?.parse().ok()?;
    (number <= Position::LAST_OFFSET).then_some(number)
}

/// Where each stream ends, as a text.
pub(super) fn place(ends: impl Iterator<Item = u64>) -> String {
    ends.map(|end| end.to_string()).collect::<Vec<_>>().join(",")
}

/// What [`place`] said of a stream; before its first entry if nothing.
pub(super) fn in_place(place: &str, part: u16) -> u64 {
    place.split(',').nth(usize::from(part)).and_then(|end| end.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_carry_the_namespace_as_their_tag() {
        let names = Names::new(None, &"orders".parse().unwrap(), 8);
        for name in [names.stream(3), names.lease("sink@eu", 0), names.live("b"), names.key("k"), names.dead()] {
            assert!(name.starts_with("walflow:{orders}:"), "{name}");
        }
    }

    #[test]
    fn a_key_has_its_stream_for_ever() {
        let names = Names::new(None, &"orders".parse().unwrap(), 8);
        // Another answer would break the order of what is under way.
        assert_eq!(["", "a", "customer-1"].map(|key| names.part_of(key)), [2, 2, 4]);
        assert!(
            (0..1_000).map(|key| names.part_of(&key.to_string())).collect::<std::collections::HashSet<_>>().len() == 8
        );
    }

    #[test]
    fn a_place_names_the_end_of_each_stream() {
        let place = place([3, 0, 12].into_iter());
        assert_eq!([0, 1, 2, 3].map(|part| in_place(&place, part)), [3, 0, 12, 0]);
        assert_eq!((offset("0-7"), offset("5-7"), offset("0-x")), (Some(7), None, None));
    }
}
