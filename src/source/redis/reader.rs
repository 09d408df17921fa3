//! The reader of a session: asks for what is pending, then for what is new, and waits for more. All on a connection of its own:
//! a large answer, or a wait, makes no renewal of a hold wait.

use std::sync::Arc;

use bytes::Bytes;
use redis::{Pipeline, Value};
use tokio_util::sync::CancellationToken;

use super::group::{BACKOFF, Shared};
use super::link::{Call, Failed, Link};
use super::scripts::FETCH;
use super::session::{Got, Session, Wanted};
use super::{claim, fence, names};
use crate::record::Record;

/// What a read gave.
enum Fetched {
    /// Of these streams others have read, each up to there.
    Others(Vec<(u16, u64)>),
    Entries(Vec<(u16, u64, Got)>),
}

struct Reader {
    shared: Arc<Shared>,
    link: Link,
    generation: u64,
    stop: CancellationToken,
}

/// Reads for a session until it is stopped.
pub(super) async fn read(shared: Arc<Shared>, generation: u64, stop: CancellationToken) {
    let link = shared.link.beside();
    Reader { shared, link, generation, stop }.run().await;
}

impl Reader {
    /// `None` = the session is over.
    fn session<T>(&self, act: impl FnOnce(&mut Session) -> T) -> Option<T> {
        let mut state = self.shared.state.lock();
        state.session.as_mut().filter(|session| session.generation == self.generation).map(act)
    }

    async fn run(&self) {
        let mut wait = BACKOFF.0;
        let mut lost = false;
        while !self.stop.is_cancelled() {
            if lost {
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = self.stop.cancelled() => return,
                }
                wait = (wait * 2).min(BACKOFF.1);
                lost = self.begin_anew().await.is_err();
                continue;
            }
            let wanted = |session: &mut Session| session.wanted().filter(|wanted| !wanted.parts.is_empty());
            let Some(wanted) = self.session(wanted) else { return };
            let Some(wanted) = wanted else {
                tokio::select! {
                    () = self.shared.room.notified() => {}
                    () = self.stop.cancelled() => return,
                }
                continue;
            };
            let turn = match self.fetch(&wanted).await {
                Ok(Fetched::Others(streams)) => self.take_over(streams).await,
                Ok(Fetched::Entries(got)) => {
                    wait = BACKOFF.0;
                    self.take(&wanted, got).await
                }
                Err(failed) => Err(failed),
            };
            let Err(failed) = turn else { continue };
            let anew = ["NOGROUP", "WENTBACK"].iter().any(|code| failed.why().contains(code));
            if matches!(failed, Failed::Refused(_)) && anew {
                self.shared.state.lock().broken = Some(self.shared.storage("read the streams", &failed));
                self.shared.work.notify_one();
                return;
            }
            // A hold that has really ended the keeper notices, and ends the session. One that it has and this server does not
            // know: one of the two speaks to a master that was replaced.
            self.link.let_go().await;
            if failed.why().contains("NOTHELD") {
                self.shared.link.let_go().await;
            }
            self.shared.state.lock().trouble = Some(Arc::clone(failed.why()));
            lost = true;
        }
    }

    /// After an answer was lost, what was asked for may still be given, to nobody: from now on only under a new mark, and what
    /// was given is looked for among what is pending.
    async fn begin_anew(&self) -> Result<(), Failed> {
        self.shared.hold(false, true).await?;
        self.session(|session| session.go_back(false));
        Ok(())
    }

    async fn take_over(&self, streams: Vec<(u16, u64)>) -> Result<(), Failed> {
        for (part, given) in streams {
            let Some(read) = self.session(|session| session.read(part)) else { return Ok(()) };
            tracing::warn!(
                stream = self.shared.names.stream(part), group = %self.shared.group, after = read, to = given,
                "another consumer reads as this group: what it has not acknowledged is taken over"
            );
            let gone = claim::take_over(&self.shared, &self.link, part, read).await?;
            self.session(|session| session.taken_over(part, given, gone));
        }
        Ok(())
    }

    /// Gives the session what came; if nothing came, waits for more.
    async fn take(&self, wanted: &Wanted, got: Vec<(u16, u64, Got)>) -> Result<(), Failed> {
        let shared = &self.shared;
        let none = got.is_empty();
        got.iter().for_each(|(part, offset, _)| shared.ends.at_least(*part, *offset));
        let taken = |session: &mut Session| (session.arrived(wanted, got), session.has_acks(), session.ends());
        let Some((arrived, has_acks, ends)) = self.session(taken) else { return Ok(()) };
        shared.state.lock().trouble = None;
        arrived.gone.iter().for_each(|position| shared.tell_lost(position.part(), position.offset()));
        for (position, entries) in arrived.passed_over {
            tracing::error!(
                stream = shared.names.stream(position.part()), group = %shared.group, to = position.offset(), entries,
                "entries are not delivered: another consumer of the group has acknowledged them"
            );
        }
        if has_acks {
            shared.work.notify_one();
        }
        match ends {
            Some(ends) if none => self.wait_for_more(&ends).await,
            _ => {
                shared.news.notify_waiters();
                Ok(())
            }
        }
    }

    async fn fetch(&self, wanted: &Wanted) -> Result<Fetched, Failed> {
        let shared = &self.shared;
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
        let answer = self.link.script(&call, false).await?;
        let wrong = |error: redis::ParsingError| Failed::Refused(format!("{}: {error}", self.link.shown()).into());
        let (others, streams): (Vec<(usize, u64)>, Value) = redis::from_redis_value(answer).map_err(wrong)?;
        if !others.is_empty() {
            let of = |(number, given): (usize, u64)| Some((parts().nth(number.checked_sub(1)?)?, given));
            return Ok(Fetched::Others(others.into_iter().filter_map(of).collect()));
        }
        let mut got = Vec::new();
        let streams = if let Value::Array(streams) = streams { streams } else { Vec::new() };
        for stream in streams {
            let Value::Array(stream) = stream else { continue };
            let mut stream = stream.into_iter();
            let (Some(name), Some(Value::Array(entries))) = (stream.next(), stream.next()) else { continue };
            let name: String = redis::from_redis_value(name).unwrap_or_default();
            let Some(part) = parts().find(|part| shared.names.stream(*part) == name) else { continue };
            got.extend(entries.into_iter().filter_map(|entry| entry_of(shared, part, entry)));
        }
        Ok(Fetched::Entries(got))
    }

    /// Ends when there is more in a stream, after a while, or when the pending list is to be gone through.
    async fn wait_for_more(&self, ends: &[(u16, u64)]) -> Result<(), Failed> {
        let open = self.link.open().await?;
        let block = u64::try_from(self.link.block().as_millis()).unwrap_or(1_000);
        let mut pipeline = Pipeline::new();
        let cmd = pipeline.cmd("XREAD").arg("COUNT").arg(1).arg("BLOCK").arg(block).arg("STREAMS");
        for (part, _) in ends {
            cmd.arg(self.shared.names.stream(*part));
        }
        for (_, end) in ends {
            cmd.arg(format!("0-{end}"));
        }
        let more = self.link.run(&open, &mut pipeline);
        tokio::pin!(more);
        loop {
            tokio::select! {
                answers = &mut more => {
                    return answers?.into_iter().try_for_each(|answer| self.link.answer(answer).map(|_| ()));
                }
                () = self.shared.room.notified() => {
                    if self.session(|session| session.ends().is_some_and(|now| now == ends)) == Some(true) {
                        continue;
                    }
                }
                () = self.stop.cancelled() => {}
            }
            // The server still waits on it.
            self.link.let_go().await;
            return Ok(());
        }
    }
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
