//! `limits.rate`: how many records may go now.
//!
//! A bucket of tokens on tokio's clock: it fills at the rate and holds the burst. It never sleeps; the branch does.

use std::time::Duration;

use tokio::time::Instant;

/// Whole tokens.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounded by the burst, and never negative")]
const fn whole(tokens: f64) -> usize {
    tokens as usize
}

/// A branch's allowance. Without a rate everything may go.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Option<(f64, f64)>,
    tokens: f64,
    filled: Instant,
}

impl Pace {
    /// Records a second and the burst; the bucket starts full.
    pub(super) fn new(rate: Option<(f64, u32)>, now: Instant) -> Self {
        let rate = rate.map(|(per_second, burst)| (per_second, f64::from(burst.max(1))));
        Self { rate, tokens: rate.map_or(0.0, |(_, burst)| burst), filled: now }
    }

    /// How many may go now, at most `wanted`; they count as gone.
    #[expect(clippy::cast_precision_loss, reason = "bounded by a batch")]
    pub(super) fn take(&mut self, wanted: usize, now: Instant) -> usize {
        let Some((per_second, burst)) = self.rate else { return wanted };
        self.tokens = (self.tokens + (now - self.filled).as_secs_f64() * per_second).min(burst);
        self.filled = now;
        let taken = wanted.min(whole(self.tokens));
        self.tokens -= taken as f64;
        taken
    }

    /// Gives back what was taken and not used.
    #[expect(clippy::cast_precision_loss, reason = "bounded by a batch")]
    pub(super) fn give_back(&mut self, unused: usize) {
        self.tokens += unused as f64;
    }

    /// How many may go now if that is a portion of `portion`, or all that there can be; takes nothing.
    pub(super) fn allows(&mut self, portion: usize, now: Instant) -> Option<usize> {
        self.take(0, now);
        let Some((_, burst)) = self.rate else { return Some(usize::MAX) };
        let tokens = whole(self.tokens);
        (tokens >= portion.min(whole(burst))).then_some(tokens)
    }

    /// How long until one more may go; `None` when there is no rate.
    pub(super) fn wait(&self) -> Option<Duration> {
        self.wait_for(1)
    }

    /// How long until a portion of `portion` may go, or all that there can be; `None` when there is no rate.
    #[expect(clippy::cast_precision_loss, reason = "bounded by a batch")]
    pub(super) fn wait_for(&self, portion: usize) -> Option<Duration> {
        let (per_second, burst) = self.rate?;
        let missing = ((portion as f64).min(burst) - self.tokens).max(0.0);
        // A little more than exact, so that the timer does not fire just before the token is there.
        Some(Duration::from_secs_f64(missing / per_second) + Duration::from_millis(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_at_once_and_the_rest_at_the_rate() {
        let start = Instant::now();
        let mut pace = Pace::new(Some((100.0, 10)), start);
        assert_eq!(pace.take(1_000, start), 10);
        assert_eq!(pace.take(1_000, start), 0);
        let sent: usize = (1..=1_000).map(|tick| pace.take(1_000, start + Duration::from_millis(tick * 10))).sum();
        assert!((990..=1_000).contains(&sent), "{sent} in ten seconds at 100/s");
        assert_eq!(Pace::new(None, start).take(7, start), 7);
    }
}
