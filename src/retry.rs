//! How long to wait before the next attempt: exponential back-off with full jitter.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::Span;

/// `retry:` of a sink.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RetrySpec {
    /// Attempts before a record may be given up, the first included. Default: 8; 12 for `http`. Minimum: 1.
    #[schemars(range(min = 1))]
    pub attempts: Option<u32>,
    /// The waits between attempts.
    pub backoff: BackoffSpec,
    /// Give a record up after this long, counting only time in which the branch was open. Default: 24h.
    pub give_up: Span,
}

impl Default for RetrySpec {
    fn default() -> Self {
        Self { attempts: None, backoff: BackoffSpec::default(), give_up: Span(Duration::from_secs(86_400)) }
    }
}

/// `retry.backoff:` of a sink.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BackoffSpec {
    /// The longest first wait. Default: 100ms; 5s for `http`.
    pub first: Option<Span>,
    /// No wait is longer. Default: 2m; 6h for `http`.
    pub max: Option<Span>,
    /// Each wait may be this many times longer than the one before. Default: 2; 4 for `http`. Minimum: 1.
    #[schemars(range(min = 1.0))]
    pub factor: Option<f64>,
    /// `full` draws each wait between zero and its longest; `none` always waits the longest. Default: full.
    pub jitter: Jitter,
}

impl Default for BackoffSpec {
    fn default() -> Self {
        Self { first: None, max: None, factor: None, jitter: Jitter::Full }
    }
}

/// How waits are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Jitter {
    /// Between zero and the longest wait.
    Full,
    /// Always the longest wait.
    None,
}

/// What a retry schedule is when the kind's defaults have been filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    /// Attempts before a record may be given up, the first included.
    pub attempts: u32,
    /// The longest first wait.
    pub first: Duration,
    /// No wait is longer.
    pub max: Duration,
    /// Growth from wait to wait.
    pub factor: f64,
    /// How waits are drawn.
    pub jitter: Jitter,
    /// Give up after this long in which the branch was open.
    pub give_up: Duration,
}

impl Retry {
    /// The file's words, with `kind` filling in what it leaves open.
    pub fn plan(spec: &RetrySpec, kind: &Self) -> Self {
        Self {
            attempts: spec.attempts.unwrap_or(kind.attempts),
            first: spec.backoff.first.map_or(kind.first, |span| span.0),
            max: spec.backoff.max.map_or(kind.max, |span| span.0),
            factor: spec.backoff.factor.unwrap_or(kind.factor),
            jitter: spec.backoff.jitter,
            give_up: spec.give_up.0,
        }
    }

    /// For targets inside one's own network: 8 attempts within about half a minute.
    pub const fn nearby() -> Self {
        Self {
            attempts: 8,
            first: Duration::from_millis(100),
            max: Duration::from_secs(120),
            factor: 2.0,
            jitter: Jitter::Full,
            give_up: Duration::from_secs(86_400),
        }
    }

    /// As webhook senders do: about a day in 12 attempts.
    pub const fn webhook() -> Self {
        Self {
            attempts: 12,
            first: Duration::from_secs(5),
            max: Duration::from_secs(6 * 3_600),
            factor: 4.0,
            jitter: Jitter::Full,
            give_up: Duration::from_secs(86_400),
        }
    }

    /// The longest wait after `failures` failed attempts (1 = after the first).
    pub fn longest_wait(&self, failures: u32) -> Duration {
        let exponent = i32::try_from(failures.saturating_sub(1)).unwrap_or(i32::MAX);
        let seconds = self.first.as_secs_f64() * self.factor.max(1.0).powi(exponent);
        Duration::try_from_secs_f64(seconds).map_or(self.max, |wait| wait.min(self.max))
    }

    /// The wait to take after `failures` failed attempts; `draw` is between 0 and 1.
    pub fn wait(&self, failures: u32, draw: f64) -> Duration {
        let longest = self.longest_wait(failures);
        match self.jitter {
            Jitter::Full => longest.mul_f64(draw.clamp(0.0, 1.0)),
            Jitter::None => longest,
        }
    }

    /// All longest waits added up, as the plan prints it.
    pub fn longest_total(&self) -> Duration {
        (1..self.attempts).map(|failures| self.longest_wait(failures)).fold(Duration::ZERO, Duration::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_longest_and_no_further() {
        let retry = Retry { max: Duration::from_secs(1), jitter: Jitter::None, ..Retry::nearby() };
        let waits: Vec<u128> = (1..=6).map(|failures| retry.wait(failures, 0.5).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1_000, 1_000]);
        assert_eq!(retry.longest_wait(u32::MAX), Duration::from_secs(1));
    }

    #[test]
    fn full_jitter_draws_between_zero_and_the_longest() {
        let retry = Retry::nearby();
        assert_eq!(retry.wait(1, 0.0), Duration::ZERO);
        assert_eq!(retry.wait(2, 1.0), Duration::from_millis(200));
    }

    #[test]
    fn the_webhook_schedule_takes_about_a_day() {
        let total = Retry::webhook().longest_total();
        assert!(total > Duration::from_secs(20 * 3_600) && total < Duration::from_secs(60 * 3_600), "{total:?}");
    }
}
