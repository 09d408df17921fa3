//! What an HTTP answer means for a record: one table, printed by the plan and obeyed by the sink.
//!
//! Takes a status and its `Retry-After`; gives a verdict. The file's own `verdicts:` come first. Never looks at a body.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::{HttpSpec, VerdictSpec};
use crate::clock::Timestamp;
use crate::sink::Verdict;

/// What a row of the table says about an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// Delivered.
    Delivered,
    /// The record is refused.
    Never,
    /// Tried again, and counted.
    Backoff,
    /// Tried again after what `Retry-After` says, or after a while.
    After,
    /// As `After` with a `Retry-After`, else as `Down`.
    AfterOrDown,
    /// The target is away.
    Down,
    /// `Down` where the URL is the same for every record; `Never` where the record is part of it.
    DownUnlessNamed,
}

impl Meaning {
    /// In words, for the plan.
    pub const fn words(self, url_varies: bool) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Never => "the record is refused: dead letter, no retry",
            Self::Backoff => "tried again",
            Self::After => "tried again after Retry-After, or 5s",
            Self::AfterOrDown => "tried again after Retry-After; without it the target is down",
            Self::DownUnlessNamed if url_varies => {
                "the record is refused, since the URL names it: dead letter, no retry"
            }
            Self::Down | Self::DownUnlessNamed => "the target is down: the branch waits, no attempt is lost",
        }
    }
}

/// One row: these statuses mean this.
#[derive(Clone, Debug)]
pub struct Row {
    /// As the plan shows them.
    pub shown: &'static str,
    /// The statuses.
    pub statuses: &'static [RangeInclusive<u16>],
    /// What they mean.
    pub meaning: Meaning,
}

/// The table; the first row that holds a status decides.
///
/// A redirect is not followed, as senders of webhooks do not: the address in the file is what its author meant, so one that
/// has moved is an outage until the file says the new one.
pub const TABLE: &[Row] = &[
    Row { shown: "2xx", statuses: &[200..=299], meaning: Meaning::Delivered },
    Row { shown: "429", statuses: &[429..=429], meaning: Meaning::After },
    Row { shown: "503", statuses: &[503..=503], meaning: Meaning::AfterOrDown },
    Row { shown: "404 405", statuses: &[404..=405], meaning: Meaning::DownUnlessNamed },
    Row {
        shown: "3xx 401 402 403 407 502 504 507 521-524",
        statuses: &[300..=399, 401..=403, 407..=407, 502..=504, 507..=507, 521..=524],
        meaning: Meaning::Down,
    },
    Row {
        shown: "408 421 423 425",
        statuses: &[408..=408, 421..=421, 423..=423, 425..=425],
        meaning: Meaning::Backoff,
    },
    Row { shown: "400 409 410 413 422, other 4xx", statuses: &[400..=499], meaning: Meaning::Never },
    Row { shown: "500, other 5xx", statuses: &[500..=599], meaning: Meaning::Backoff },
];

/// What happens without any status.
pub const WITHOUT_STATUS: &[(&str, Meaning)] = &[
    ("no connection (DNS, refused, TLS)", Meaning::Down),
    ("a time-out, a broken or malformed answer", Meaning::Backoff),
];

/// A wait that `After` takes when the target names none.
const UNNAMED: Duration = Duration::from_secs(5);
/// No `Retry-After` is believed beyond this.
const LONGEST: Duration = Duration::from_hours(1);
/// No `Retry-After` is shorter, so that a zero does not make a busy loop.
const SHORTEST: Duration = Duration::from_secs(1);

/// The table in lines, the file's own words first.
pub fn verdict_table(spec: &HttpSpec) -> Vec<String> {
    let varies = super::url_varies(spec);
    let own = spec.verdicts.iter().map(|(status, verdict)| {
        let meaning = match verdict {
            VerdictSpec::Ok => Meaning::Delivered,
            VerdictSpec::Never => Meaning::Never,
            VerdictSpec::Backoff => Meaning::Backoff,
            VerdictSpec::Down => Meaning::Down,
        };
        format!("{status}: {} (the file says so)", meaning.words(varies))
    });
    let rows = TABLE.iter().map(|row| (row.shown, row.meaning)).chain(WITHOUT_STATUS.iter().copied());
    own.chain(rows.map(|(shown, meaning)| format!("{shown}: {}", meaning.words(varies)))).collect()
}

/// The file's own words, ready to look up.
#[derive(Clone, Debug, Default)]
pub(super) struct Overrides(Vec<(RangeInclusive<u16>, VerdictSpec)>);

impl Overrides {
    /// Reads `404` and `4xx`; a single status goes before its class.
    pub(super) fn parse<'a>(written: impl Iterator<Item = (&'a str, VerdictSpec)>) -> Result<Self, &'a str> {
        let mut rows = Vec::new();
        for (status, verdict) in written {
            rows.push((statuses(status).ok_or(status)?, verdict));
        }
        rows.sort_by_key(|(range, _)| range.end() - range.start());
        Ok(Self(rows))
    }

    fn find(&self, status: u16) -> Option<VerdictSpec> {
        self.0.iter().find(|(range, _)| range.contains(&status)).map(|(_, verdict)| *verdict)
    }
}

/// The statuses that `404` or `4xx` names.
fn statuses(text: &str) -> Option<RangeInclusive<u16>> {
    let first = match text.strip_suffix("xx") {
        Some(class) => class.parse::<u16>().ok()?.checked_mul(100)?,
        None => text.parse().ok()?,
    };
    let width = if text.ends_with("xx") { 99 } else { 0 };
    (100..=599).contains(&first).then(|| first..=first + width)
}

/// What an answer means; `Ok` = delivered.
pub(super) fn judge(
    status: u16,
    retry_after: Option<&str>,
    url_varies: bool,
    overrides: &Overrides,
    now: Timestamp,
) -> Result<(), Verdict> {
    if let Some(verdict) = overrides.find(status) {
        return match verdict {
            VerdictSpec::Ok => Ok(()),
            VerdictSpec::Never => Err(Verdict::Never),
            VerdictSpec::Backoff => Err(Verdict::Backoff),
            VerdictSpec::Down => Err(Verdict::Down),
        };
    }
    let row = TABLE.iter().find(|row| row.statuses.iter().any(|range| range.contains(&status)));
    // What no row holds is no status that HTTP knows.
    let meaning = row.map_or(Meaning::Backoff, |row| row.meaning);
    let wait = retry_after.and_then(|text| retry_after_wait(text, now));
    match meaning {
        Meaning::Delivered => Ok(()),
        Meaning::Never => Err(Verdict::Never),
        Meaning::Backoff => Err(Verdict::Backoff),
        Meaning::After => Err(Verdict::After(wait.unwrap_or(UNNAMED))),
        Meaning::AfterOrDown => Err(wait.map_or(Verdict::Down, Verdict::After)),
        Meaning::DownUnlessNamed if url_varies => Err(Verdict::Never),
        Meaning::Down | Meaning::DownUnlessNamed => Err(Verdict::Down),
    }
}

/// The wait that a `Retry-After` names, in seconds or as a date.
fn retry_after_wait(text: &str, now: Timestamp) -> Option<Duration> {
    let text = text.trim();
    let wait = if let Ok(seconds) = text.parse::<u64>() {
        Duration::from_secs(seconds)
    } else {
        let at = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
        Timestamp::from_millis(at.as_millisecond()).since(now)
    };
    Some(wait.clamp(SHORTEST, LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn default(status: u16) -> Result<(), Verdict> {
        judge(status, None, false, &Overrides::default(), Timestamp::from_millis(0))
    }

    #[test]
    fn every_status_means_what_the_design_says() {
        for (verdict, statuses) in [
            (Ok(()), &[200, 201, 202, 204, 299][..]),
            (Err(Verdict::Never), &[400, 406, 409, 410, 411, 413, 415, 422, 451]),
            (Err(Verdict::Backoff), &[408, 425, 500, 501, 505, 520, 599]),
            (Err(Verdict::Down), &[301, 302, 308, 401, 403, 404, 405, 502, 503, 504]),
            (Err(Verdict::After(Duration::from_secs(5))), &[429]),
        ] {
            for status in statuses {
                assert_eq!(default(*status), verdict, "{status}");
            }
        }
        for status in 200..=599 {
            assert!(TABLE.iter().any(|row| row.statuses.iter().any(|range| range.contains(&status))), "{status}");
        }
    }

    #[test]
    fn a_url_that_names_the_record_turns_404_into_a_refusal() {
        let judge = |status| judge(status, None, true, &Overrides::default(), Timestamp::from_millis(0));
        assert_eq!(
            (judge(404), judge(405), judge(403)),
            (Err(Verdict::Never), Err(Verdict::Never), Err(Verdict::Down))
        );
    }

    #[test]
    fn retry_after_is_read_in_both_forms_and_kept_within_bounds() {
        let now: Timestamp = "2015-10-21T07:28:00Z".parse().unwrap();
        for (text, seconds) in [
            ("120", Some(120)),
            ("0", Some(1)),
            ("999999999", Some(3_600)),
            ("Wed, 21 Oct 2015 07:29:30 GMT", Some(90)),
            ("Wed, 21 Oct 2015 07:00:00 GMT", Some(1)),
            ("soon", None),
            ("-5", None),
        ] {
            assert_eq!(retry_after_wait(text, now), seconds.map(Duration::from_secs), "{text}");
        }
        let after = |status| judge(status, Some("7"), false, &Overrides::default(), now);
        let wait = Err(Verdict::After(Duration::from_secs(7)));
        assert_eq!((after(429), after(503), after(502)), (wait, wait, Err(Verdict::Down)));
    }

    #[test]
    fn the_files_own_words_come_first_and_the_nearest_of_them() {
        let written = [("4xx", VerdictSpec::Backoff), ("404", VerdictSpec::Ok), ("200", VerdictSpec::Never)];
        let overrides = Overrides::parse(written.into_iter()).unwrap();
        let judge = |status| judge(status, None, false, &overrides, Timestamp::from_millis(0));
        assert_eq!((judge(404), judge(422)), (Ok(()), Err(Verdict::Backoff)));
        assert_eq!((judge(200), judge(201)), (Err(Verdict::Never), Ok(())));
        for wrong in ["600", "655xx", "99", "9xx", "x", "xx", ""] {
            assert_eq!(Overrides::parse([(wrong, VerdictSpec::Ok)].into_iter()).unwrap_err(), wrong);
        }
    }
}
