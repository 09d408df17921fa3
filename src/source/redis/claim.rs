//! Takes over what is pending under other names than ours: what an operator read with redis-cli, another program, an older
//! version. Whoever holds a stream finishes the whole pending list of the group, in order, before anything new.
//!
//! Looked at when a hold begins. While it lasts every read looks whether the group was given more than was read here; if so
//! somebody else has read, and their entries are claimed before anything behind them is read. That costs nothing while nobody
//! does. What another consumer has acknowledged is not delivered: that is told.

use super::group::Shared;
use super::link::{Call, Failed, Link};
use super::names;
use super::scripts::CLAIM;

/// Makes everything that is pending after this entry our own; gives how many entries were pending though they are gone.
pub(super) async fn take_over(shared: &Shared, link: &Link, part: u16, after: u64) -> Result<u64, Failed> {
    let mut from = format!("0-{}", after.saturating_add(1));
    let mut lost = 0;
    loop {
        let call = Call::new(&CLAIM)
            .key(shared.names.lease(&shared.group, part))
            .key(shared.names.stream(part))
            .arg(shared.token())
            .arg(shared.group.as_str())
            .arg(from);
        let (next, gone): (String, Vec<String>) = redis::from_redis_value(link.script(&call, false).await?)
            .map_err(|error| Failed::Refused(format!("{}: {error}", link.shown()).into()))?;
        for entry in gone.iter().filter_map(|id| names::offset(id)) {
            shared.tell_lost(part, entry);
            lost += 1;
        }
        if next == "0-0" {
            return Ok(lost);
        }
        from = next;
    }
}
