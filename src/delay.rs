//! When a record is due: the request's word first, then the file's, then jitter.
//!
//! Takes what the request asked for, the file's rule and the event; gives a time after now, or nothing when the record
//! is due at once. Never waits and never parks: that is the log's part.

use std::time::Duration;

use crate::clock::Timestamp;
use crate::transform::{DelayValue, Event, Expression, Fault};
use crate::units::Span;

/// The longest delay where the file sets none.
pub const DEFAULT_MAX: Duration = Duration::from_secs(7 * 86_400);

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

/// What a write asks for in its `lifecycle`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestedDelay {
    /// `deliverAt`: at that time.
    pub deliver_at: Option<Timestamp>,
    /// `delay`: after this long.
    pub delay: Option<Duration>,
    /// `jitter`: at most this much is added; wins over the file's.
    pub jitter: Option<Duration>,
}

/// A record cannot be given a time; the write is refused before anything is durable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DelayFault {
    /// It would wait longer than the file allows.
    #[error("the delay of {asked} is longer than the {max} that delay.max allows")]
    TooLong {
        /// How long it would wait.
        asked: Span,
        /// The bound.
        max: Span,
    },
    /// The file's expression gave something else than it should.
    #[error("{rule} gave {got}; it must give {wanted}")]
    Wrong {
        /// `delay.for` or `delay.until`.
        rule: &'static str,
        /// What it gave.
        got: Box<str>,
        /// What would be right.
        wanted: &'static str,
    },
    /// The file's expression failed on the record.
    #[error(transparent)]
    Expression(#[from] Fault),
}

/// When the record is due; `None` = at once.
///
/// The first present of `deliverAt`, the request's `delay`, and the file's `until` or `for` decides alone; then jitter
/// is added, drawn from the key where there is one, so that equal delays keep a key's order. A past time is now. Where
/// jitter would reach beyond the longest delay it is cut there.
///
/// # Errors
/// When the delay is longer than allowed, or the file's expression fails: the write is refused with 422.
pub fn due(
    delay: Option<&Delay>,
    request: &RequestedDelay,
    event: &Event,
    now: Timestamp,
) -> Result<Option<Timestamp>, DelayFault> {
    let max = delay.map_or(DEFAULT_MAX, |delay| delay.max);
    let base = if let Some(at) = request.deliver_at {
        at
    } else if let Some(delay) = request.delay {
        within(delay, max)?;
        now.saturating_add(delay)
    } else if let Some(rule) = delay.and_then(|delay| delay.rule.as_ref()) {
        by_rule(rule, event, now, max)?
    } else if request.jitter.is_some() {
        now
    } else {
        return Ok(None);
    };
    within(base.since(now), max)?;
    let jitter = request.jitter.or_else(|| delay.map(|delay| delay.jitter)).unwrap_or_default();
    let due = base.saturating_add(drawn(jitter, event.key.as_deref())).min(now.saturating_add(max));
    Ok((due > now).then_some(due))
}

fn within(asked: Duration, max: Duration) -> Result<(), DelayFault> {
    if asked > max { Err(DelayFault::TooLong { asked: Span(asked), max: Span(max) }) } else { Ok(()) }
}

fn by_rule(rule: &DelayRule, event: &Event, now: Timestamp, max: Duration) -> Result<Timestamp, DelayFault> {
    match rule {
        DelayRule::Fixed(delay) => Ok(now.saturating_add(*delay)),
        DelayRule::For(expression) => match expression.delay(event)? {
            DelayValue::Seconds(seconds) => {
                let delay = seconds_of("delay.for", seconds)?;
                within(delay, max)?;
                Ok(now.saturating_add(delay))
            }
            DelayValue::At(time) => Err(DelayFault::Wrong {
                rule: "delay.for",
                got: format!("the time {time}").into(),
                wanted: "a number of seconds (a time belongs in delay.until)",
            }),
        },
        DelayRule::Until(expression) => match expression.delay(event)? {
            DelayValue::Seconds(seconds) => Ok(Timestamp::MIN.saturating_add(seconds_of("delay.until", seconds)?)),
            DelayValue::At(time) => Ok(time),
        },
    }
}

/// Rounded to the millisecond, the finest time there is here; a negative number is zero, and so the past.
fn seconds_of(rule: &'static str, seconds: f64) -> Result<Duration, DelayFault> {
    if seconds <= 0.0 {
        return Ok(Duration::ZERO);
    }
    Duration::try_from_secs_f64((seconds * 1_000.0).round() / 1_000.0).map_err(|_| DelayFault::Wrong {
        rule,
        got: seconds.to_string().into(),
        wanted: "a number of seconds, finite and not beyond all time",
    })
}

/// A part of `jitter`: always the same for a key, random without one.
fn drawn(jitter: Duration, key: Option<&str>) -> Duration {
    let millis = u64::try_from(jitter.as_millis()).unwrap_or(u64::MAX);
    if millis == 0 {
        return Duration::ZERO;
    }
    let number = key.map_or_else(|| fastrand::u64(..), |key| spread(crc32c::crc32c(key.as_bytes())));
    Duration::from_millis(number % millis.saturating_add(1))
}

/// Spreads the checksum over 64 bits, since checksums of similar keys lie close together (the end of SplitMix64).
fn spread(checksum: u32) -> u64 {
    let mut z = u64::from(checksum).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
