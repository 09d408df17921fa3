//! `redis`: commands chosen by `cases`, a batch in one pipeline.
//!
//! Takes operations, gives what the server said to each command. One connection for the branch, made when it is needed and
//! made again when it breaks. After a time-out the next batch goes over the same connection, behind what may still be
//! executed, so that an old value never lands on a newer one. Never runs a command that the file does not name.

mod command;
mod connection;
mod verdict;

use std::fmt;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::command::Case;
use self::connection::Connection;
use self::verdict::judge;
use super::template::Scope;
use super::{BatchStyle, Failure, OpenError, Operation, Sink, SinkContext, SpecFault, Verdict, Written, shown_address};
use crate::clock::Timestamp;
use crate::connection::probe::{Probed, skew};
use crate::connection::tls;
use crate::units::Span;

/// `redis:` — one command a record, chosen by the first case that matches.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RedisSpec {
    /// `redis://…` or `rediss://…`; may come from a region.
    pub url: Option<String>,
    /// Operations on one target: the first whose `when` holds is taken.
    pub cases: Vec<RedisCaseSpec>,
    /// Longest wait for an answer. Default: 5s.
    pub timeout: Option<Span>,
}

impl fmt::Debug for RedisSpec {
    /// Shows what is no secret: of the address the host.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSpec")
            .field("url", &self.url.as_deref().map(shown_address))
            .field("cases", &self.cases)
            .field("timeout", &self.timeout)
            .finish()
    }
}

/// One case of `redis.cases:`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RedisCaseSpec {
    /// Taken when this is true; without it always.
    pub when: Option<String>,
    /// What to do. Default: set.
    pub command: Option<RedisCommand>,
    /// The key, a template with a literal beginning.
    pub key: String,
    /// For `set`: the value. Default: the payload's bytes.
    pub value: Option<serde_json::Value>,
    /// For `set`: how long the value lives. Default: for ever.
    pub ttl: Option<Span>,
    /// For `hset` and `xadd`: fields and their values.
    pub fields: IndexMap<String, serde_json::Value>,
    /// For `incrby`: how much, a number or a template. Default: 1.
    pub by: Option<serde_json::Value>,
}

/// A Redis command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RedisCommand {
    /// SET, with EX when there is a ttl.
    #[default]
    Set,
    /// DEL.
    Del,
    /// HSET.
    Hset,
    /// INCRBY.
    Incrby,
    /// XADD.
    Xadd,
}

/// What cannot work in a `redis:`.
pub(super) fn check(spec: &RedisSpec) -> Vec<SpecFault> {
    let mut faults = Vec::new();
    match &spec.url {
        None => faults.push(SpecFault::new("/url", "there is no URL", "redis://127.0.0.1:6379/0, for example")),
        Some(url) => {
            if let Err(why) = connection::address(url) {
                faults.push(SpecFault::new("/url", why, "redis://127.0.0.1:6379/0, or rediss:// for TLS"));
            }
        }
    }
    if spec.timeout.is_some_and(|span| span.0.is_zero()) {
        faults.push(SpecFault::new("/timeout", "nothing can be done in no time", "5s, for example"));
    }
    if spec.cases.is_empty() {
        let help = "- { command: set, key: \"cache:{key}\" }";
        faults.push(SpecFault::new("/cases", "there is no case, so nothing would be done", help));
    }
    for (index, case) in spec.cases.iter().enumerate() {
        command::check(case, &format!("/cases/{index}"), &mut faults);
        if case.when.is_none() && index + 1 < spec.cases.len() {
            faults.push(SpecFault::new(
                format!("/cases/{index}"),
                "this case takes everything, so those after it take nothing",
                "give it a `when`, or make it the last",
            ));
        }
    }
    faults
}

/// When a record counts as delivered and what a second delivery does, for the plan.
pub(super) fn delivered_note(spec: &RedisSpec) -> Vec<String> {
    let mut notes =
        vec!["delivered when Redis has answered its command; how durable that is, its own settings say".to_owned()];
    for (index, case) in spec.cases.iter().enumerate() {
        match case.command.unwrap_or_default() {
            RedisCommand::Incrby => {
                notes.push(format!("case {index}: incrby is not repeatable; after a lost answer it counts twice"));
            }
            RedisCommand::Xadd => {
                notes.push(format!("case {index}: xadd is not repeatable; after a lost answer the entry stands twice"));
            }
            RedisCommand::Set | RedisCommand::Del | RedisCommand::Hset => {}
        }
    }
    if spec.url.as_deref().is_some_and(|url| url.starts_with("rediss://") && url.ends_with("#insecure")) {
        notes.push("the server's certificate is not checked (#insecure)".to_owned());
    }
    notes
}

/// A Redis server.
pub struct RedisSink {
    connection: Connection,
    cases: Vec<Case>,
    context: SinkContext,
}

impl RedisSink {
    /// Reads the settings; connects to nothing.
    ///
    /// # Errors
    /// When a setting does not work.
    pub fn open(spec: &RedisSpec, context: &SinkContext) -> Result<Self, OpenError> {
        tls::provider();
        let wrong =
            |pointer: String, message: Box<str>| OpenError::Setting { kind: "redis", pointer: pointer.into(), message };
        let url = spec.url.as_deref().unwrap_or_default();
        let timeout = spec.timeout.map_or(Duration::from_secs(5), |span| span.0);
        let connection = Connection::new(url, timeout).map_err(|why| wrong("/url".to_owned(), why.into()))?;
        let cases = spec.cases.iter().enumerate().map(|(index, case)| {
            Case::parse(case).map_err(|(place, message)| wrong(format!("/cases/{index}{place}"), message))
        });
        Ok(Self { connection, cases: cases.collect::<Result<_, _>>()?, context: context.clone() })
    }

    fn command(&self, operation: &Operation) -> Result<redis::Cmd, Failure> {
        let case = self.cases.get(operation.case).ok_or_else(|| {
            Failure::rendering(format!("no case {} is left in the file; the record matched it before", operation.case))
        })?;
        case.command(&Scope::new(operation, &self.context))
    }
}

impl Sink for RedisSink {
    /// Redis runs every command of a pipeline, also behind one that failed.
    fn batch_style(&self) -> BatchStyle {
        BatchStyle::Independent
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            let mut failed = Vec::new();
            let mut sent = Vec::with_capacity(batch.len());
            let mut pipeline = redis::Pipeline::with_capacity(batch.len());
            pipeline.ignore_errors();
            for (index, operation) in batch.iter().enumerate() {
                match self.command(operation) {
                    Ok(command) => {
                        pipeline.add_command(command);
                        sent.push(index);
                    }
                    Err(failure) => failed.push((index, failure)),
                }
            }
            if !sent.is_empty() {
                let shown = self.connection.shown();
                match self.connection.run(&pipeline).await {
                    Err(failure) => failed.extend(sent.into_iter().map(|index| (index, failure.clone()))),
                    Ok(results) if results.len() == sent.len() => {
                        let pairs = sent.into_iter().zip(results);
                        failed.extend(pairs.filter_map(|(index, result)| Some((index, judge(shown, &result.err()?)))));
                    }
                    Ok(results) => {
                        let why = format!("{shown}: {} answers to {} commands", results.len(), sent.len());
                        let failure = Failure::new(Verdict::Backoff, why);
                        failed.extend(sent.into_iter().map(|index| (index, failure.clone())));
                    }
                }
            }
            failed.sort_unstable_by_key(|(index, _)| *index);
            Written { failed }
        }
        .boxed()
    }

    fn probe(&self) -> BoxFuture<'_, Vec<Probed>> {
        async move {
            let shown = self.connection.shown();
            let mut pipeline = redis::Pipeline::new();
            pipeline.ignore_errors().cmd("TIME").cmd("ROLE");
            let answers = match self.connection.run(&pipeline).await {
                Ok(answers) => answers,
                Err(failure) => return vec![Probed::wrong(shown, failure.message)],
            };
            let mut answers = answers.into_iter();
            let time = answers.next().and_then(|answer| redis::from_redis_value::<(i64, i64)>(answer.ok()?).ok());
            let role = answers.next().and_then(|answer| match answer.ok()? {
                redis::Value::Array(parts) => redis::from_redis_value::<String>(parts.into_iter().next()?).ok(),
                _ => None,
            });
            let clock = time.map_or("it tells no time".to_owned(), |(seconds, micros)| {
                skew(self.context.clock.now(), Timestamp::from_millis(seconds * 1_000 + micros / 1_000))
            });
            if role.as_deref() == Some("slave") {
                return vec![Probed::wrong(shown, "it is a replica and takes no writes: name its master")];
            }
            vec![Probed::fine(shown, format!("it answers; {clock}"))]
        }
        .boxed()
    }
}
