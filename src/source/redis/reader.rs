//! The reader of a session: asks for what is pending, then for what is new, and waits for more on a connection of its own.

use std::sync::Arc;

use bytes::Bytes;
use redis::Value;
use redis::aio::MultiplexedConnection;
use tokio_util::sync::CancellationToken;

use super::fence;
use super::group::{BACKOFF, RENEW, Shared};
use super::link::{BLOCK, Call, Failed};
use super::names;
use super::scripts::FETCH;
use super::session::{Got, Wanted};
use crate::record::Record;

/// Reads for a session until it is stopped.
pub(super) async fn read(shared: Arc<Shared>, generation: u64, stop: CancellationToken) {
    let mut blocking: Option<MultiplexedConnection> = None;
    let mut wait = BACKOFF.0;
    let mut lost = false;
    while !stop.is_cancelled() {
        if lost {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.cancelled() => return,
            }
            wait = (wait * 2).min(BACKOFF.1);
            lost = begin_anew(&shared).await.is_err();
            continue;
        }
        let plan = {
            let state = shared.state.lock();
            let Some(session) = state.session.as_ref().filter(|session| session.generation == generation) else {
                return;
            };
            if session.parts().is_empty() { None } else { session.wanted() }
        };
        let Some(wanted) = plan else {
            tokio::select! {
                () = shared.room.notified() => {}
                () = stop.cancelled() => return,
            }
            continue;
        };
        match fetch(&shared, &wanted).await {
            Ok(got) => {
                wait = BACKOFF.0;
                let none = got.is_empty();
                let ends = {
                    let mut state = shared.state.lock();
                    let Some(session) = state.session.as_mut().filter(|session| session.generation == generation)
                    else {
                        return;
                    };
                    for (part, offset, _) in &got {
                        shared.ends.at_least(*part, *offset);
                    }
                    let gone = session.arrived(&wanted, got);
                    for position in &gone {
                        tracing::error!(
                            stream = shared.names.stream(position.part()), group = %shared.group, entry = position.offset(),
                            "a record is lost: it was pending and its entry was removed from the stream by somebody else"
                        );
                    }
                    if session.has_acks() {
                        shared.work.notify_one();
                    }
                    let ends = session.ends();
                    state.trouble = None;
                    ends
                };
                if none {
                    if let Some(ends) = ends {
                        tokio::select! {
                            () = wait_for_more(&shared, &mut blocking, &ends) => {}
                            () = shared.room.notified() => {}
                            () = stop.cancelled() => return,
                        }
                    }
                } else {
                    shared.news.notify_waiters();
                }
            }
            Err(failed) => {
                let anew = ["NOGROUP", "WENTBACK"].iter().any(|code| failed.why().contains(code));
                if matches!(failed, Failed::Refused(_)) && anew {
                    shared.state.lock().broken = Some(shared.storage("read the streams", &failed));
                    shared.work.notify_one();
                    return;
                }
                // A hold that has really ended the keeper notices, and ends the session.
                shared.state.lock().trouble = Some(Arc::clone(failed.why()));
                lost = true;
            }
        }
    }
}

/// After an answer was lost, what was asked for may still be given, to nobody: from now on only under a new mark, and what was
/// given is looked for among what is pending.
async fn begin_anew(shared: &Shared) -> Result<(), Failed> {
    shared.hold(false, true).await?;
    if let Some(session) = shared.state.lock().session.as_mut() {
        session.go_back(false);
    }
    Ok(())
}

async fn fetch(shared: &Shared, wanted: &Wanted) -> Result<Vec<(u16, u64, Got)>, Failed> {
    let parts = || wanted.parts.iter().map(|(part, _)| *part);
    let from = |after: &Option<u64>| after.map_or_else(|| ">".to_owned(), |after| format!("0-{after}"));
    let call = Call::new(&FETCH)
        .keys(parts().map(|part| shared.names.lease(&shared.group, part)))
        .keys(parts().map(|part| shared.names.stream(part)))
        .arg(shared.token())
        .arg(shared.group.as_str())
        .number(wanted.count)
        .args(wanted.parts.iter().map(|(_, after)| from(after)))
        .args(wanted.given.iter().map(u64::to_string));
    let answer = shared.link.script(&call, false).await?;
    let mut got = Vec::new();
    let streams = if let Value::Array(streams) = answer { streams } else { Vec::new() };
    for stream in streams {
        let Value::Array(stream) = stream else { continue };
        let mut stream = stream.into_iter();
        let (Some(name), Some(Value::Array(entries))) = (stream.next(), stream.next()) else { continue };
        let name: String = redis::from_redis_value(name).unwrap_or_default();
        let Some(part) = parts().find(|part| shared.names.stream(*part) == name) else { continue };
        got.extend(entries.into_iter().filter_map(|entry| entry_of(shared, part, entry)));
    }
    Ok(got)
}

/// An entry: its id, and one field with the record.
fn entry_of(shared: &Shared, part: u16, entry: Value) -> Option<(u16, u64, Got)> {
    let Value::Array(entry) = entry else { return None };
    let mut entry = entry.into_iter();
    let id: String = redis::from_redis_value(entry.next()?).ok()?;
    let offset = names::offset(&id)?;
    let Some(Value::Array(fields)) = entry.next() else { return Some((part, offset, Got::Gone)) };
    let mut fields = fields.into_iter();
    let skipped = matches!(fields.next(), Some(Value::BulkString(name)) if name == fence::MARK);
    if skipped {
        return Some((part, offset, Got::Skipped));
    }
    let Some(Value::BulkString(body)) = fields.next() else { return Some((part, offset, Got::Gone)) };
    match Record::decode(&Bytes::from(body)) {
        Ok(record) => Some((part, offset, Got::Record(Box::new(record)))),
        Err(error) => {
            tracing::error!(stream = shared.names.stream(part), entry = id, %error, "an entry is no record of walflow");
            Some((part, offset, Got::Gone))
        }
    }
}

/// Ends when there is more in a stream, after a while, or after a failure; who waits looks again.
async fn wait_for_more(shared: &Shared, blocking: &mut Option<MultiplexedConnection>, ends: &[(u16, u64)]) {
    if blocking.is_none() {
        match shared.link.blocking().await {
            Ok(connection) => *blocking = Some(connection),
            Err(failed) => {
                shared.state.lock().trouble = Some(Arc::clone(failed.why()));
                tokio::time::sleep(RENEW).await;
                return;
            }
        }
    }
    // Taken out: if the wait is given up, so is the connection, on which the server would still wait.
    let Some(mut connection) = blocking.take() else { return };
    let mut cmd = redis::cmd("XREAD");
    cmd.arg("COUNT").arg(1).arg("BLOCK").arg(u64::try_from(BLOCK.as_millis()).unwrap_or(2_000)).arg("STREAMS");
    for (part, _) in ends {
        cmd.arg(shared.names.stream(*part));
    }
    for (_, end) in ends {
        cmd.arg(format!("0-{end}"));
    }
    let answer: redis::RedisResult<Value> = cmd.query_async(&mut connection).await;
    match answer {
        Ok(_) => *blocking = Some(connection),
        Err(_) => tokio::time::sleep(BACKOFF.0).await,
    }
}
