//! What a probe finds: can it be reached, may we do what the file asks for, is the clock ours.

use std::time::Duration;

use serde::Serialize;

use crate::clock::Timestamp;

/// A server's clock may differ so much before it is worth a word.
const SKEW: Duration = Duration::from_secs(5);

/// One thing that a probe looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Probed {
    /// What was looked at, without secrets.
    pub what: String,
    /// False when it does not work.
    pub ok: bool,
    /// What was found; where it does not work also what to do.
    pub found: String,
}

impl Probed {
    /// It works.
    pub fn fine(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self { what: what.into(), ok: true, found: found.into() }
    }

    /// It does not.
    pub fn wrong(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self { what: what.into(), ok: false, found: found.into() }
    }

    /// As a result of a call says.
    pub fn of(what: impl Into<String>, result: Result<String, String>) -> Self {
        match result {
            Ok(found) => Self::fine(what, found),
            Err(found) => Self::wrong(what, found),
        }
    }
}

/// What is worth saying of a server's clock; delays and signatures go by it.
pub fn skew(ours: Timestamp, theirs: Timestamp) -> String {
    let apart = ours.since(theirs).max(theirs.since(ours));
    if apart < SKEW {
        return "clocks agree".to_owned();
    }
    let direction = if theirs > ours { "ahead of" } else { "behind" };
    format!("its clock is {} s {direction} ours: synchronise them (NTP)", apart.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_off_is_told_and_which_way() {
        let at = Timestamp::from_millis;
        assert_eq!(skew(at(10_000), at(12_000)), "clocks agree");
        assert!(skew(at(10_000), at(70_000)).starts_with("its clock is 60 s ahead of ours"));
        assert!(skew(at(70_000), at(10_000)).starts_with("its clock is 60 s behind ours"));
    }
}
