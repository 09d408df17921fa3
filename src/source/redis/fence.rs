//! No number twice: a stream that ends before an entry that is known to have been there goes on after that entry.
//!
//! A failover to a replica that lagged, a restart of a server that had not written its tail, an emptied database: the server
//! would number new entries as those that are gone, and whoever remembers the old ones would take the new ones for them.
//! Looked at wherever a connection is new, since nothing of it happens on one that lives, and before a hold begins.

use super::ends::Ends;
use super::link::{Call, Failed, Link};
use super::names::Names;
use super::scripts::FENCE;

/// The field of an entry that only stands for numbers that were skipped.
pub(super) const MARK: &[u8] = b"skipped";

/// Makes sure that what is appended from now on has numbers of its own, in these streams.
pub(super) async fn raise(
    link: &Link,
    names: &Names,
    ends: &Ends,
    parts: impl Iterator<Item = u16>,
) -> Result<(), Failed> {
    let known: Vec<(u16, u64)> = parts.map(|part| (part, ends.of(part))).filter(|(_, end)| *end > 0).collect();
    if known.is_empty() {
        return Ok(());
    }
    let call = Call::new(&FENCE)
        .keys(known.iter().map(|(part, _)| names.stream(*part)))
        .args(known.iter().map(|(_, end)| end.to_string()));
    let answer = link.script(&call, true).await?;
    let ended: Vec<i64> = redis::from_redis_value(answer)
        .map_err(|error| Failed::Refused(format!("{}: {error}", link.shown()).into()))?;
    for ((part, end), ended) in known.into_iter().zip(ended) {
        if ended >= 0 {
            ends.at_least(part, end + 1);
            tracing::error!(
                server = %link.shown(), stream = names.stream(part), known = end, ends_at = ended,
                "the server has lost entries that it had: what it confirmed after {ended} is gone if it was not delivered (a \
                 failover to a replica that lagged, or a restart without its newest data). It goes on after {end}"
            );
        }
    }
    Ok(())
}
