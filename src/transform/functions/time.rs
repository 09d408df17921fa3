//! Times for scripts: RFC 3339 texts in UTC with milliseconds, in and out.

use jiff::{SignedDuration, Timestamp};
use rhai::{Dynamic, Engine, FLOAT, INT};

use super::{in_run, kind};
use crate::transform::engine::{Answer, raise};
use crate::units::Span;

pub(super) fn register(engine: &mut Engine) {
    engine.register_fn("now", || in_run(|run| Ok(run.record.written_at.to_string())));
    engine.register_fn("wall_clock", || in_run(|run| Ok(run.around.clock.now().to_string())));
    engine.register_fn("time_parse", |text: &str, format: &str| parse(text, format).map(shown));
    engine.register_fn("time_format", |time: &str, format: &str| -> Answer<String> {
        jiff::fmt::strtime::format(format, read(time)?).or_else(|error| raise(error.to_string()))
    });
    engine.register_fn("time_add", |time: &str, by: Dynamic| -> Answer<String> {
        let (time, by) = (read(time)?, span(&by)?);
        time.checked_add(by).map(shown).or_else(|error| raise(error.to_string()))
    });
    engine.register_fn("time_diff", |later: &str, earlier: &str| -> Answer<FLOAT> {
        Ok(read(later)?.duration_since(read(earlier)?).as_secs_f64())
    });
    engine.register_fn("time_unix", |time: &str| -> Answer<INT> { Ok(read(time)?.as_second()) });
    engine.register_fn("time_from_unix", |seconds: Dynamic| -> Answer<String> {
        Timestamp::UNIX_EPOCH.checked_add(span(&seconds)?).map(shown).or_else(|error| raise(error.to_string()))
    });
}

fn shown(time: Timestamp) -> String {
    format!("{time:.3}")
}

fn read(text: &str) -> Answer<Timestamp> {
    text.parse().or_else(|_| raise(format!("`{}` is no time like 2026-11-24T08:00:00Z", cut(text))))
}

fn parse(text: &str, format: &str) -> Answer<Timestamp> {
    let broken = jiff::fmt::strtime::parse(format, text).or_else(|error| raise(error.to_string()))?;
    if broken.offset().is_some() || broken.timestamp().is_some() {
        return broken.to_timestamp().or_else(|error| raise(error.to_string()));
    }
    let civil = match broken.to_datetime() {
        Ok(civil) => civil,
        Err(_) => broken.to_date().or_else(|error| raise(error.to_string()))?.at(0, 0, 0, 0),
    };
    jiff::tz::TimeZone::UTC.to_timestamp(civil).or_else(|error| raise(error.to_string()))
}

fn span(by: &Dynamic) -> Answer<SignedDuration> {
    if let Ok(seconds) = by.as_int() {
        return Ok(SignedDuration::from_secs(seconds));
    }
    if let Ok(seconds) = by.as_float() {
        let whole = SignedDuration::try_from_secs_f64(seconds);
        return whole.or_else(|_| raise(format!("{seconds} is no number of seconds")));
    }
    let Ok(text) = by.as_immutable_string_ref() else {
        return raise(format!("a duration is seconds or a text such as \"5m\", not {}", kind(by)));
    };
    let (negative, amount) = text.strip_prefix('-').map_or((false, text.as_str()), |amount| (true, amount));
    let span: Span = amount.parse().or_else(|error: crate::units::NotAQuantity| raise(error.to_string()))?;
    let duration = SignedDuration::try_from(span.0).or_else(|error| raise(error.to_string()))?;
    Ok(if negative { -duration } else { duration })
}

/// The start of a text, for messages.
fn cut(text: &str) -> String {
    text.chars().take(40).collect()
}
