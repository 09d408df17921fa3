//! `redis`: commands chosen by `cases`, pipelined.

use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::template::Template;
use super::{BatchStyle, Failure, OpenError, Operation, Sink, Verdict, Written};
use crate::units::Span;

/// `redis:` — one command a record, chosen by the first case that matches.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RedisSpec {
    /// `redis://…` or `rediss://…`; may come from a region.
    pub url: Option<String>,
    /// Operations on one target: the first whose `when` holds is taken.
    pub cases: Vec<RedisCaseSpec>,
    /// Longest wait for an answer. Default: 5s.
    pub timeout: Option<Span>,
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

/// A Redis server.
pub struct Redis {
    client: redis::Client,
    timeout: Duration,
    connection: tokio::sync::Mutex<Option<redis::aio::MultiplexedConnection>>,
    cases: Vec<Case>,
}

struct Case {
    command: RedisCommand,
    key: Template,
    value: Template,
    ttl: Option<Duration>,
    fields: Vec<(String, Template)>,
    by: Template,
}

impl Redis {
    /// Reads the settings; connects to nothing.
    ///
    /// # Errors
    /// When the address is none.
    pub fn new(spec: &RedisSpec) -> Result<Self, OpenError> {
        let client = redis::Client::open(spec.url.as_deref().unwrap_or_default())
            .map_err(|_| OpenError("redis.url is not an address such as redis://host:6379/0".into()))?;
        let text = |value: &serde_json::Value| {
            Template::new(&value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned))
        };
        let case = |case: &RedisCaseSpec| Case {
            command: case.command.unwrap_or_default(),
            key: Template::new(&case.key),
            value: case.value.as_ref().map_or_else(|| Template::new("{payload}"), text),
            ttl: case.ttl.map(|span| span.0),
            fields: case.fields.iter().map(|(name, value)| (name.clone(), text(value))).collect(),
            by: case.by.as_ref().map_or_else(|| Template::new("1"), text),
        };
        Ok(Self {
            client,
            timeout: spec.timeout.map_or(Duration::from_secs(5), |span| span.0),
            connection: tokio::sync::Mutex::default(),
            cases: spec.cases.iter().map(case).collect(),
        })
    }

    fn command(&self, operation: &Operation) -> Result<redis::Cmd, Failure> {
        let Some(case) = self.cases.get(operation.case) else {
            return Err(Failure::new(Verdict::Never, "the file has no such case"));
        };
        let key = case.key.text(operation, "redis")?;
        let fields = || {
            let field =
                |(name, value): &(String, Template)| Ok((name.clone(), value.bytes(operation, "redis")?.to_vec()));
            case.fields.iter().map(field).collect::<Result<Vec<_>, Failure>>()
        };
        let mut command = redis::Cmd::new();
        match case.command {
            RedisCommand::Set => {
                command.arg("SET").arg(key).arg(case.value.bytes(operation, "redis")?.to_vec());
                if let Some(ttl) = case.ttl {
                    command.arg("PX").arg(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1));
                }
            }
            RedisCommand::Del => {
                command.arg("DEL").arg(key);
            }
            RedisCommand::Hset => {
                command.arg("HSET").arg(key);
                for (name, value) in fields()? {
                    command.arg(name).arg(value);
                }
            }
            RedisCommand::Incrby => {
                let by = case.by.text(operation, "redis")?;
                let by: i64 =
                    by.parse().map_err(|_| Failure::rendering(format!("`by` is `{by}`, which is no whole number")))?;
                command.arg("INCRBY").arg(key).arg(by);
            }
            RedisCommand::Xadd => {
                command.arg("XADD").arg(key).arg("*");
                for (name, value) in fields()? {
                    command.arg(name).arg(value);
                }
            }
        }
        Ok(command)
    }

    async fn connect(&self) -> Result<redis::aio::MultiplexedConnection, Failure> {
        let mut connection = self.connection.lock().await;
        if let Some(open) = &*connection {
            return Ok(open.clone());
        }
        let opened = tokio::time::timeout(self.timeout, self.client.get_multiplexed_async_connection()).await;
        match opened {
            Ok(Ok(opened)) => Ok(connection.insert(opened).clone()),
            Ok(Err(error)) => Err(Failure::new(Verdict::Down, format!("redis cannot be reached: {}", said(&error)))),
            Err(_) => Err(Failure::new(Verdict::Down, "redis cannot be reached in time")),
        }
    }

    /// Sends commands in one pipeline and gives an answer for each.
    async fn send(&self, commands: &[redis::Cmd]) -> Result<Vec<Option<Failure>>, Failure> {
        let mut connection = self.connect().await?;
        let mut pipeline = redis::Pipeline::with_capacity(commands.len());
        pipeline.ignore_errors();
        for command in commands {
            pipeline.add_command(command.clone());
        }
        let answers: Result<Result<Vec<redis::RedisResult<redis::Value>>, _>, _> =
            tokio::time::timeout(self.timeout, pipeline.query_async(&mut connection)).await;
        let failure = match answers {
            Ok(Ok(answers)) => {
                return Ok(answers.into_iter().map(|answer| answer.err().map(|error| judge(&error))).collect());
            }
            Ok(Err(error)) => judge(&error),
            Err(_) => Failure::new(Verdict::Backoff, "redis did not answer in time"),
        };
        // Late answers must not be taken for those of the next batch.
        *self.connection.lock().await = None;
        Err(failure)
    }
}

impl Sink for Redis {
    fn batch_style(&self) -> BatchStyle {
        BatchStyle::Independent
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            let (mut commands, mut indexes) = (Vec::new(), Vec::new());
            let mut written = Written::default();
            for (index, operation) in batch.iter().enumerate() {
                match self.command(operation) {
                    Ok(command) => {
                        commands.push(command);
                        indexes.push(index);
                    }
                    Err(failure) => written.failed.push((index, failure)),
                }
            }
            if !commands.is_empty() {
                match self.send(&commands).await {
                    Ok(answers) => {
                        let failed =
                            indexes.into_iter().zip(answers).filter_map(|(index, answer)| Some((index, answer?)));
                        written.failed.extend(failed);
                    }
                    Err(failure) => written.failed.extend(indexes.into_iter().map(|index| (index, failure.clone()))),
                }
            }
            written.failed.sort_by_key(|(index, _)| *index);
            written
        }
        .boxed()
    }
}

/// What the server or the connection said, without what was sent.
fn said(error: &redis::RedisError) -> String {
    error
        .code()
        .map_or_else(|| error.category().to_owned(), |code| format!("{code} {}", error.detail().unwrap_or_default()))
}

fn judge(error: &redis::RedisError) -> Failure {
    let verdict = match error.code() {
        Some(
            "LOADING" | "READONLY" | "MASTERDOWN" | "CLUSTERDOWN" | "NOAUTH" | "WRONGPASS" | "NOPERM" | "NOREPLICAS",
        ) => Verdict::Down,
        Some("OOM" | "BUSY" | "TRYAGAIN" | "MISCONF") => Verdict::Backoff,
        Some(_) => Verdict::Never,
        None => Verdict::Down,
    };
    Failure::new(verdict, format!("redis: {}", said(error)))
}
