//! Which node of a Redis Cluster serves which slot.
//!
//! Takes what a node says (`CLUSTER SLOTS`, a redirection), gives the node to ask for a key. Only masters are of interest:
//! a sink reads nothing.

use std::fmt;

use redis::{ConnectionAddr, Value};

/// The slots of a cluster.
pub(super) const SLOTS: usize = 16_384;
/// Nodes at most; the protocol is not made for more.
const NODES: usize = 1_000;

/// Where a node listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) host: Box<str>,
    pub(super) port: u16,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl Place {
    /// The place that an address names; none for a socket of the file system.
    pub(super) fn of(address: &ConnectionAddr) -> Option<Self> {
        match address {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => {
                Some(Self { host: host.as_str().into(), port: *port })
            }
            _ => None,
        }
    }

    /// `host:port` as a redirection has it. A node that does not know how it is called leaves the host out: it means the
    /// one that was asked.
    pub(super) fn parse(text: &str, asked: &Self) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let host = if host.is_empty() { &asked.host } else { host };
        Some(Self { host: host.into(), port: port.parse().ok()? })
    }
}

/// The slot of a key: of what stands in its first braces, where that is something.
pub(super) fn slot_of(key: &[u8]) -> u16 {
    let tag = key.iter().position(|byte| *byte == b'{').and_then(|open| {
        let rest = key.get(open + 1..)?;
        let close = rest.iter().position(|byte| *byte == b'}')?;
        rest.get(..close).filter(|tag| !tag.is_empty())
    });
    // CRC-16, XMODEM.
    let crc = tag.unwrap_or(key).iter().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc, _| (crc << 1) ^ if crc & 0x8000 == 0 { 0 } else { 0x1021 })
    });
    crc % 16_384
}

/// The masters and the slots of each.
#[derive(Debug)]
pub(super) struct Slots {
    owners: Vec<Place>,
    /// For each slot the number of its owner.
    of: Vec<Option<u16>>,
}

impl Slots {
    /// Reads an answer to `CLUSTER SLOTS`.
    ///
    /// # Errors
    /// When the answer is not understood, or names too many nodes.
    pub(super) fn read(answer: Value, asked: &Place) -> Result<Self, String> {
        let mut slots = Self { owners: Vec::new(), of: vec![None; SLOTS] };
        let Value::Array(ranges) = answer else {
            return Err("CLUSTER SLOTS gave no list".to_owned());
        };
        for range in ranges {
            let not_understood = || "a range of CLUSTER SLOTS is not understood".to_owned();
            let Value::Array(parts) = range else { return Err(not_understood()) };
            let mut parts = parts.into_iter();
            let mut number = || match parts.next() {
                Some(Value::Int(number)) => usize::try_from(number).ok(),
                _ => None,
            };
            let (first, last) = number().zip(number()).ok_or_else(not_understood)?;
            // The master is the first of its nodes.
            let Some(Value::Array(node)) = parts.next() else { return Err(not_understood()) };
            let mut node = node.into_iter();
            let host = match node.next() {
                Some(Value::BulkString(host)) => String::from_utf8(host).map_err(|_| not_understood())?,
                Some(Value::SimpleString(host)) => host,
                Some(Value::Nil) => String::new(),
                _ => return Err(not_understood()),
            };
            let Some(Value::Int(port)) = node.next() else { return Err(not_understood()) };
            let port = u16::try_from(port).map_err(|_| not_understood())?;
            // It is not known how that node is called: nobody could reach it.
            if host == "?" {
                continue;
            }
            let host = if host.is_empty() { asked.host.clone() } else { host.into() };
            let owner = slots.number(Place { host, port })?;
            for slot in slots.of.get_mut(first..=last).ok_or_else(not_understood)? {
                *slot = Some(owner);
            }
        }
        Ok(slots)
    }

    /// The number of a place among the owners.
    fn number(&mut self, place: Place) -> Result<u16, String> {
        let known = self.owners.iter().position(|owner| *owner == place);
        let at = known.unwrap_or(self.owners.len());
        if known.is_none() {
            if at >= NODES {
                return Err(format!("the cluster names more than {NODES} nodes"));
            }
            self.owners.push(place);
        }
        u16::try_from(at).map_err(|error| error.to_string())
    }

    /// Who serves a slot.
    pub(super) fn owner(&self, slot: u16) -> Option<&Place> {
        self.owners.get(usize::from((*self.of.get(usize::from(slot))?)?))
    }

    /// A slot is served elsewhere.
    pub(super) fn moved(&mut self, slot: u16, to: Place) {
        if let Ok(owner) = self.number(to)
            && let Some(of) = self.of.get_mut(usize::from(slot))
        {
            *of = Some(owner);
        }
    }

    /// Each owner with the number of its slots.
    pub(super) fn owners(&self) -> impl Iterator<Item = (&Place, usize)> {
        let mut counts = vec![0; self.owners.len()];
        for owner in self.of.iter().flatten() {
            if let Some(count) = counts.get_mut(usize::from(*owner)) {
                *count += 1;
            }
        }
        self.owners.iter().zip(counts).filter(|(_, count)| *count > 0)
    }

    /// How many slots are served.
    pub(super) fn served(&self) -> usize {
        self.of.iter().flatten().count()
    }
}

#[cfg(test)]
mod tests {
    use redis::cluster_routing::Slot;

    use super::*;

    fn asked() -> Place {
        Place { host: "seed".into(), port: 1 }
    }

    #[test]
    fn a_key_has_the_slot_that_the_servers_give_it() {
        assert_eq!(slot_of(b"123456789"), 0x31c3);
        for key in ["", "foo", "{user1000}.following", "foo{}{bar}", "foo{{bar}}zap", "foo{bar}{zap}", "a}b{c", "é"] {
            assert_eq!(Slot::new(slot_of(key.as_bytes())), Some(Slot::for_key(key)), "{key}");
        }
    }

    fn range(first: i64, last: i64, host: Value, port: i64) -> Value {
        let replica = Value::Array(vec![Value::BulkString(b"replica".to_vec()), Value::Int(9)]);
        let master = Value::Array(vec![host, Value::Int(port), Value::BulkString(b"id".to_vec())]);
        Value::Array(vec![Value::Int(first), Value::Int(last), master, replica])
    }

    #[test]
    fn an_answer_says_who_serves_what() {
        let text = |host: &str| Value::BulkString(host.as_bytes().to_vec());
        let answer = Value::Array(vec![
            range(0, 99, text("a"), 1),
            range(200, 200, text("a"), 1),
            range(100, 199, Value::Nil, 2),
            range(300, 399, text(""), 2),
            range(400, 499, text("?"), 3),
        ]);
        let mut slots = Slots::read(answer, &asked()).unwrap();
        let owner = |slots: &Slots, slot: u16| slots.owner(slot).map(ToString::to_string);
        for (slot, place) in [
            (0, Some("a:1")),
            (200, Some("a:1")),
            (199, Some("seed:2")),
            (399, Some("seed:2")),
            (400, None),
            (16_383, None),
        ] {
            assert_eq!(owner(&slots, slot).as_deref(), place, "{slot}");
        }
        assert_eq!((slots.served(), slots.owners().count()), (301, 2));
        slots.moved(400, Place::parse("b:7", &asked()).unwrap());
        assert_eq!(owner(&slots, 400).as_deref(), Some("b:7"));
        assert_eq!(slots.owners().map(|(_, count)| count).collect::<Vec<_>>(), [101, 200, 1]);
    }

    #[test]
    fn an_answer_that_makes_no_sense_is_told() {
        let host = || Value::BulkString(b"a".to_vec());
        for wrong in [
            Value::Okay,
            Value::Array(vec![Value::Int(1)]),
            Value::Array(vec![range(0, 16_384, host(), 1)]),
            Value::Array(vec![range(-1, 5, host(), 1)]),
            Value::Array(vec![range(0, 5, host(), 70_000)]),
            Value::Array((0..=1_000).map(|number| range(number, number, host(), number + 1)).collect()),
        ] {
            assert!(Slots::read(wrong, &asked()).is_err());
        }
    }

    #[test]
    fn a_redirection_without_a_host_means_the_one_that_was_asked() {
        let parse = |text: &str| Place::parse(text, &asked()).map(|place| place.to_string());
        assert_eq!(parse("10.0.0.1:6379").as_deref(), Some("10.0.0.1:6379"));
        assert_eq!(parse("[::1]:6379").as_deref(), Some("::1:6379"));
        assert_eq!(parse(":6380").as_deref(), Some("seed:6380"));
        assert_eq!((parse("host"), parse("host:x"), parse("h:70000")), (None, None, None));
    }
}
