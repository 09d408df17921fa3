//! When a record is due: the request's word first, then the file's, then jitter.

use std::time::Duration;

use crate::transform::Expression;

/// `delay:` with its expressions compiled.
#[derive(Clone, Debug)]
pub struct Delay {
    /// The rule; `None` = only requests delay, within `max`.
    pub rule: Option<DelayRule>,
    /// At most this much is added.
    pub jitter: Duration,
    /// No delay is longer.
    pub max: Duration,
}

/// How the file says when a record is due.
#[derive(Clone, Debug)]
pub enum DelayRule {
    /// After this long.
    Fixed(Duration),
    /// After so many seconds.
    For(Expression),
    /// At that time.
    Until(Expression),
}
