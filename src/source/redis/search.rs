//! Looking for entries in the streams: those that were under way when a process ended, and one that somebody asks for.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use redis::{Pipeline, Value};

use super::link::{Call, Failed, Link};
use super::names::{self, Names};
use super::scripts::UNFINISHED;
use crate::record::{Position, Record, RecordId};
use crate::source::BranchName;

/// Entries in one page of a search.
const PAGE: usize = 256;
/// Entries that say how old the records at a place are: some may be older, since they were parked before.
const LOOKED_AT: usize = 16;
/// A record may stand behind one whose id is this much younger: several processes draw ids, each by its own clock.
const SKEW: Duration = Duration::from_secs(60);
/// A search for one record ends after this long.
pub(super) const LONGEST: Duration = Duration::from_secs(5);

/// Some entries of a stream: number and record.
type Entries = Vec<(u64, Vec<u8>)>;

/// The first entries after a number, at most so many; those without a record are left out, and said is the number of the last.
async fn page(link: &Link, stream: &str, after: u64, count: usize) -> Result<(Entries, Option<u64>), Failed> {
    let open = link.open().await?;
    let mut pipeline = Pipeline::new();
    pipeline.cmd("XRANGE").arg(stream).arg(format!("(0-{after}")).arg("+").arg("COUNT").arg(count);
    let answer = link.run(&open, &mut pipeline).await?.into_iter().next();
    let answer = link.answer(answer.unwrap_or(Ok(Value::Nil)))?;
    let rows: Vec<(String, Vec<Vec<u8>>)> = redis::from_redis_value(answer)
        .map_err(|error| Failed::Refused(format!("{}: {error}", link.shown()).into()))?;
    let last = (rows.len() == count).then(|| rows.last().and_then(|(id, _)| names::offset(id))).flatten();
    let entry = |(id, fields): (String, Vec<Vec<u8>>)| Some((names::offset(&id)?, fields.into_iter().nth(1)?));
    Ok((rows.into_iter().filter_map(entry).collect(), last))
}

/// Which of the records stand after the place.
pub(super) async fn find_after(
    link: &Link,
    names: &Names,
    place: &str,
    ids: &[RecordId],
) -> Result<HashMap<RecordId, Position>, Failed> {
    let ids: HashSet<RecordId> = ids.iter().copied().collect();
    let mut found = HashMap::new();
    for part in names.parts() {
        let mut after = Some(names::in_place(place, part));
        while let Some(from) = after.filter(|_| found.len() < ids.len()) {
            let (entries, last) = page(link, &names.stream(part), from, PAGE).await?;
            for (offset, body) in &entries {
                if let Some(known) = Record::peek_id(body).filter(|known| ids.contains(known)) {
                    found.insert(known, Position::in_part(part, *offset));
                }
            }
            after = last;
        }
    }
    Ok(found)
}

/// Where a record stands: looked for where its id says, then everywhere, since one that was parked stands where it was
/// released.
pub(super) async fn locate(
    link: &Link,
    names: &Names,
    id: RecordId,
) -> Result<Option<(Position, Arc<Record>)>, Failed> {
    let mut begun = Vec::new();
    for part in names.parts() {
        let stream = names.stream(part);
        let since = first_as_young(link, &stream, id).await?;
        if let Some(found) = scan(link, &stream, part, since, id, Some(SKEW)).await? {
            return Ok(Some(found));
        }
        begun.push((part, stream));
    }
    for (part, stream) in begun {
        if let Some(found) = scan(link, &stream, part, 0, id, None).await? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The number before the first entries that are about as young as the record.
async fn first_as_young(link: &Link, stream: &str, id: RecordId) -> Result<u64, Failed> {
    let since = id.time().saturating_sub(SKEW);
    let call = |command: &'static str, from: &'static str, to: &'static str| async move {
        let open = link.open().await?;
        let mut pipeline = Pipeline::new();
        pipeline.cmd(command).arg(stream).arg(from).arg(to).arg("COUNT").arg(1);
        let answer = link.run(&open, &mut pipeline).await?.into_iter().next();
        let answer = link.answer(answer.unwrap_or(Ok(Value::Nil)))?;
        let rows: Vec<(String, Vec<Vec<u8>>)> = redis::from_redis_value(answer).unwrap_or_default();
        Ok::<_, Failed>(rows.first().and_then(|(id, _)| names::offset(id)))
    };
    let Some(mut low) = call("XRANGE", "-", "+").await? else { return Ok(0) };
    let mut high = call("XREVRANGE", "+", "-").await?.unwrap_or(low);
    low = low.saturating_sub(1);
    while low < high {
        let middle = low + (high - low) / 2;
        let (entries, _) = page(link, stream, middle, LOOKED_AT).await?;
        let youngest = entries.iter().filter_map(|(_, body)| Record::peek_id(body)).map(RecordId::time).max();
        if youngest.is_some_and(|youngest| youngest < since) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    Ok(low)
}

/// Reads a stream after a number, until the record is found, or all that follows is younger by `ahead`.
async fn scan(
    link: &Link,
    stream: &str,
    part: u16,
    after: u64,
    id: RecordId,
    ahead: Option<Duration>,
) -> Result<Option<(Position, Arc<Record>)>, Failed> {
    let mut after = Some(after);
    while let Some(from) = after {
        let (entries, last) = page(link, stream, from, PAGE).await?;
        let mut oldest = None;
        for (offset, body) in entries {
            let Some(known) = Record::peek_id(&body) else { continue };
            if known == id {
                let wrong = |_| {
                    Failed::Refused(format!("{}: entry 0-{offset} of {stream} cannot be read", link.shown()).into())
                };
                let record = Record::decode(&Bytes::from(body)).map_err(wrong)?;
                return Ok(Some((Position::in_part(part, offset), Arc::new(record))));
            }
            oldest = Some(oldest.map_or(known, |oldest: RecordId| oldest.min(known)));
        }
        let passed = |ahead| oldest.is_some_and(|oldest| oldest.time() > id.time().saturating_add(ahead));
        after = last.filter(|_| !ahead.is_some_and(passed));
    }
    Ok(None)
}

/// Which branches have not finished with an entry.
pub(super) async fn unfinished(
    link: &Link,
    names: &Names,
    position: Position,
    branches: Vec<BranchName>,
) -> Result<Vec<BranchName>, Failed> {
    let call = Call::new(&UNFINISHED)
        .key(names.stream(position.part()))
        .number(position.offset())
        .args(branches.iter().map(BranchName::as_str));
    let answer = link.script(&call, false).await?;
    let left: Vec<String> = redis::from_redis_value(answer)
        .map_err(|error| Failed::Refused(format!("{}: {error}", link.shown()).into()))?;
    Ok(branches.into_iter().filter(|branch| left.iter().any(|name| name == branch.as_str())).collect())
}
