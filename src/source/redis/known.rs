//! Idempotency keys as the server keeps them: a hash with `f` fingerprint, `i` id, `w` time written, `d` due, `s` state (`k` it
//! stands for a durable record, `r` that one is on its way), `c` since when it is claimed.
//!
//! The log and a shelf on the same server share them, so that a key stands for one record whether that was parked or not.

use std::time::Duration;

use redis::Value;

use crate::clock::Timestamp;
use crate::record::RecordId;
use crate::source::foreign::store::Claimed;

/// Beyond its window a key is kept so long: clocks differ.
const SLACK: Duration = Duration::from_secs(600);
/// The longest that a server takes.
const LONGEST: i64 = 1 << 52;

/// For how many milliseconds the server keeps a key.
pub(super) fn keep(written_at: Timestamp, now: Timestamp, window: Duration) -> i64 {
    let millis = |span: Duration| i64::try_from(span.as_millis()).unwrap_or(LONGEST);
    let left = written_at.as_millis().saturating_sub(now.as_millis());
    left.saturating_add(millis(window)).saturating_add(millis(SLACK)).clamp(1_000, LONGEST)
}

fn number(value: &Value) -> Option<i64> {
    redis::from_redis_value_ref::<Option<i64>>(value).ok().flatten()
}

/// What `HMGET key f i w d s` says.
pub(super) fn read(fields: Vec<Value>) -> Option<Claimed> {
    let [fingerprint, id, written_at, due_at, state]: [Value; 5] = fields.try_into().ok()?;
    let bytes = |value: &Value| redis::from_redis_value_ref::<Vec<u8>>(value).ok()?.try_into().ok();
    let fingerprint: [u8; 16] = bytes(&fingerprint)?;
    if redis::from_redis_value_ref::<String>(&state).ok()? == "r" {
        return Some(Claimed::Running);
    }
    Some(Claimed::Known {
        fingerprint,
        id: RecordId::from_bytes(bytes(&id)?),
        written_at: Timestamp::from_millis(number(&written_at)?),
        due_at: number(&due_at).map(Timestamp::from_millis),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_kept_beyond_its_window_and_one_of_the_far_future_for_very_long() {
        let now = Timestamp::from_millis(1_764_000_000_000);
        let hour = Duration::from_secs(3_600);
        assert!(keep(now, now, hour) > 3_600_000);
        assert!(keep(Timestamp::from_millis(253_000_000_000_000), now, hour) > 200_000_000_000_000);
        assert_eq!(keep(Timestamp::MIN, now, hour), 1_000);
    }
}
