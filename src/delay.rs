//! When a record is due: the request's word first, then the file's, then jitter.
//!
//! Takes what the request asked for, the file's rule and the event; gives a time after now, or nothing when the record
//! is due at once. Never waits and never parks: that is the log's part.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::source::HoldRule;
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

/// The rule for records that other programs wrote: as [`due`] for writes that ask for nothing, from the log's time on. Jitter
/// of a keyless one is drawn from its id, so that it is the same at every reading.
pub fn hold_rule(delay: Delay) -> HoldRule {
    Arc::new(move |record| {
        let (at, fault) = (record.written_at, |fault: DelayFault| Arc::<str>::from(fault.to_string()));
        let Some(rule) = &delay.rule else { return Ok(None) };
        let base = by_rule(rule, &Event::original(Arc::clone(record)), at, delay.max).map_err(fault)?;
        within(base.since(at), delay.max).map_err(fault)?;
        let id = record.id.to_string();
        let jitter = drawn(delay.jitter, Some(record.key.as_deref().unwrap_or(&id)));
        let due = base.saturating_add(jitter).min(at.saturating_add(delay.max));
        Ok((due > at).then_some(due))
    })
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::clock::Clock;
    use crate::record::Record;
    use crate::testing::{NEW_YEAR, record};
    use crate::transform::{Compiler, Place};

    const HOUR: Duration = Duration::from_secs(3_600);
    const SECOND: Duration = Duration::from_secs(1);

    fn expression(text: &str) -> Expression {
        let place = Place { file: "orders.yaml".into(), line: 1, column: 1 };
        Compiler::new(Clock::manual(NEW_YEAR), BTreeMap::new()).expression("delay", text, &place).unwrap()
    }

    fn rule(rule: DelayRule) -> Delay {
        Delay { rule: Some(rule), jitter: Duration::ZERO, max: 24 * HOUR }
    }

    fn event(key: Option<&str>, payload: &str) -> Event {
        Event::original(Arc::new(Record { key: key.map(Into::into), ..record(payload) }))
    }

    /// How long after now a record of this payload is due.
    fn wait(delay: &Delay, request: RequestedDelay, payload: &str) -> Result<Option<Duration>, DelayFault> {
        let due = due(Some(delay), &request, &event(Some("k"), payload), NEW_YEAR)?;
        Ok(due.map(|due| due.since(NEW_YEAR)))
    }

    fn by_file(delay: &Delay, payload: &str) -> Result<Option<Duration>, DelayFault> {
        wait(delay, RequestedDelay::default(), payload)
    }

    #[test]
    fn without_any_word_a_record_is_due_at_once() {
        let none = Delay { rule: None, jitter: HOUR, max: 24 * HOUR };
        assert_eq!(by_file(&none, "{}"), Ok(None));
        assert_eq!(due(None, &RequestedDelay::default(), &event(None, "{}"), NEW_YEAR), Ok(None));
    }

    #[test]
    fn the_requests_time_comes_before_its_delay_and_both_before_the_file() {
        let file = rule(DelayRule::Fixed(HOUR));
        let delay = Some(2 * HOUR);
        let deliver_at = Some(NEW_YEAR.saturating_add(3 * HOUR));
        assert_eq!(by_file(&file, "{}"), Ok(Some(HOUR)));
        assert_eq!(wait(&file, RequestedDelay { delay, ..RequestedDelay::default() }, "{}"), Ok(Some(2 * HOUR)));
        let both = RequestedDelay { delay, deliver_at, jitter: None };
        assert_eq!(wait(&file, both, "{}"), Ok(Some(3 * HOUR)));
        let now = RequestedDelay { delay: Some(Duration::ZERO), ..RequestedDelay::default() };
        assert_eq!(wait(&file, now, "{}"), Ok(None), "no delay is a word too");
    }

    #[test]
    fn a_past_time_is_now() {
        let file = rule(DelayRule::Until(expression("payload.at")));
        assert_eq!(by_file(&file, r#"{"at":"2020-12-31T23:59:59Z"}"#), Ok(None));
        assert_eq!(by_file(&file, r#"{"at":0}"#), Ok(None));
        assert_eq!(by_file(&rule(DelayRule::For(expression("-5"))), "{}"), Ok(None));
    }

    #[test]
    fn expressions_give_seconds_or_a_time_with_any_offset() {
        let seconds = rule(DelayRule::For(expression("if payload.vip { 0 } else { 1.5 }")));
        assert_eq!(by_file(&seconds, r#"{"vip":false}"#), Ok(Some(Duration::from_millis(1_500))));
        assert_eq!(by_file(&seconds, r#"{"vip":true}"#), Ok(None));
        let until = rule(DelayRule::Until(expression("payload.at")));
        assert_eq!(by_file(&until, r#"{"at":"2021-01-01T02:00:00+01:00"}"#), Ok(Some(HOUR)));
        assert_eq!(by_file(&until, r#"{"at":1609462800}"#), Ok(Some(HOUR)), "seconds since 1970");
    }

    #[test]
    fn an_expression_that_gives_neither_is_refused_with_what_it_should_give() {
        let time = rule(DelayRule::For(expression("payload.at")));
        let fault = by_file(&time, r#"{"at":"2021-01-02T00:00:00Z"}"#).unwrap_err().to_string();
        assert!(fault.contains("delay.for gave the time 2021-01-02") && fault.contains("delay.until"), "{fault}");
        assert!(matches!(by_file(&time, r#"{"at":true}"#), Err(DelayFault::Expression(_))));
        assert!(matches!(by_file(&time, "no json"), Err(DelayFault::Expression(_))));
        let huge = rule(DelayRule::Until(expression("1e300")));
        assert!(matches!(by_file(&huge, "{}"), Err(DelayFault::Wrong { .. })));
    }

    #[test]
    fn nobody_may_wait_longer_than_max() {
        let file = rule(DelayRule::For(expression("payload.s")));
        assert_eq!(by_file(&file, r#"{"s":86400}"#), Ok(Some(24 * HOUR)));
        let fault = by_file(&file, r#"{"s":86401}"#).unwrap_err();
        assert_eq!(fault, DelayFault::TooLong { asked: Span(24 * HOUR + SECOND), max: Span(24 * HOUR) });
        let request = RequestedDelay { deliver_at: Some(Timestamp::MAX), ..RequestedDelay::default() };
        assert!(matches!(wait(&file, request, "{}"), Err(DelayFault::TooLong { .. })));
        let request = RequestedDelay { delay: Some(DEFAULT_MAX + SECOND), ..RequestedDelay::default() };
        assert!(matches!(due(None, &request, &event(None, "{}"), NEW_YEAR), Err(DelayFault::TooLong { .. })));
    }

    #[test]
    fn jitter_is_added_within_its_bound_and_within_max() {
        let file = Delay { jitter: HOUR, ..rule(DelayRule::Fixed(HOUR)) };
        let waits = |delay: &Delay, request: RequestedDelay| -> Vec<Duration> {
            let one = |_| due(Some(delay), &request, &event(None, "{}"), NEW_YEAR).unwrap();
            (0..200).map(one).map(|due| due.map_or(Duration::ZERO, |due| due.since(NEW_YEAR))).collect()
        };
        let mut drawn = waits(&file, RequestedDelay::default());
        assert!(drawn.iter().all(|wait| (HOUR..=2 * HOUR).contains(wait)));
        drawn.sort_unstable();
        drawn.dedup();
        assert!(drawn.len() > 100, "records without a key spread");
        let request = RequestedDelay { jitter: Some(SECOND), ..RequestedDelay::default() };
        assert!(waits(&file, request).iter().all(|wait| (HOUR..=HOUR + SECOND).contains(wait)), "the request's wins");
        let cut = Delay { max: HOUR + SECOND, ..file };
        assert!(waits(&cut, RequestedDelay::default()).iter().all(|wait| *wait <= HOUR + SECOND));
    }

    #[test]
    fn what_others_wrote_is_due_by_the_file_and_the_same_at_every_reading() {
        let of = |delay: &Delay, key: Option<&str>, payload: &str| {
            let record = Arc::new(Record { key: key.map(Into::into), ..record(payload) });
            hold_rule(delay.clone())(&record).map(|due| due.map(|due| due.since(NEW_YEAR)))
        };
        assert_eq!(of(&rule(DelayRule::Fixed(HOUR)), None, "{}"), Ok(Some(HOUR)));
        let until = rule(DelayRule::Until(expression("payload.at")));
        assert_eq!(of(&until, None, r#"{"at":0}"#), Ok(None), "a past time is now");
        assert!(of(&until, None, r#"{"at":"2031-01-01T00:00:00Z"}"#).unwrap_err().contains("delay.max"));
        assert!(of(&until, None, "no json").is_err());
        let file = Delay { jitter: HOUR, ..rule(DelayRule::Fixed(HOUR)) };
        assert_eq!(of(&file, None, "{}"), of(&file, None, "{}"), "without a key by the id");
        let by_http = by_file(&file, "{}").unwrap();
        assert_eq!(of(&file, Some("k"), "{}"), Ok(by_http), "with one as if it came by HTTP");
    }

    #[test]
    fn records_of_one_key_get_one_jitter_and_so_keep_their_order() {
        let file = Delay { jitter: HOUR, ..rule(DelayRule::Fixed(SECOND)) };
        let of = |key: &str| due(Some(&file), &RequestedDelay::default(), &event(Some(key), "{}"), NEW_YEAR).unwrap();
        let mut seen: Vec<_> = (0..100).map(|n| of(&format!("user-{n}"))).collect();
        assert_eq!(seen, (0..100).map(|n| of(&format!("user-{n}"))).collect::<Vec<_>>());
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 90, "keys spread");
    }
}
