//! `sink:` as it was written: one kind, a route, or a fan-out, with what every sink takes.

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::StageSpec;
use crate::record::TargetKind;
use crate::retry::RetrySpec;
use crate::sink::file::FileSpec;
use crate::sink::http::HttpSpec;
use crate::sink::kafka::KafkaSpec;
use crate::sink::postgres::PostgresSpec;
use crate::sink::redis::RedisSpec;
use crate::sink::sqs::SqsSpec;
use crate::sink::stdout::StdoutSpec;
use crate::units::{ByteSize, Rate, Span};

/// `sink:` — exactly one of the kinds, `route` or `fan_out`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SinkSpec {
    /// Arms of which the first that matches takes the record.
    pub route: Option<Vec<ArmSpec>>,
    /// What happens to a record that no arm takes. Default: dead_letter.
    pub otherwise: Option<Otherwise>,
    /// Arms that each take every record, by name.
    pub fan_out: Option<IndexMap<String, ArmSpec>>,
    /// Lines on standard output.
    pub stdout: Option<StdoutSpec>,
    /// NDJSON files.
    pub file: Option<FileSpec>,
    /// HTTP requests to a URL.
    pub http: Option<HttpSpec>,
    /// Redis commands.
    pub redis: Option<RedisSpec>,
    /// Rows of a PostgreSQL database.
    pub postgres: Option<PostgresSpec>,
    /// Messages of a Kafka topic.
    pub kafka: Option<KafkaSpec>,
    /// Messages of an SQS queue.
    pub sqs: Option<SqsSpec>,
    /// What sort of target this is for the API's `target.type`. Default: by kind.
    pub target: Option<TargetKind>,
    /// How fast and how much at once, per branch.
    pub limits: Option<SinkLimitsSpec>,
    /// How records are grouped.
    pub batch: Option<BatchSpec>,
    /// When to try again, and when to give up.
    pub retry: Option<RetrySpec>,
    /// `key` keeps each key's order; `none` lets everything overtake. Default: key.
    pub ordering: Option<Ordering>,
    /// What becomes of records that cannot be delivered.
    pub dead_letters: Option<DeadLettersSpec>,
}

/// One arm of `route:` or `fan_out:` — a sink with a name.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ArmSpec {
    /// Its name, in `route:`; in `fan_out:` the key is the name.
    pub name: Option<String>,
    /// The arm's former name, so that its branch goes on: the one that it had when this file was last read. The line may go
    /// again once the file has been read with it. Of a name in between that was never read nobody knows; then the branch
    /// of before drains by the file of before, and this one starts anew.
    pub was: Option<String>,
    /// Takes a record for which this is true; without it every record.
    pub when: Option<String>,
    /// Where a branch that is new begins. Default: latest.
    pub start: Option<StartSpec>,
    /// Stages for this arm only.
    pub transform: Vec<StageSpec>,
    /// Lines on standard output.
    pub stdout: Option<StdoutSpec>,
    /// NDJSON files.
    pub file: Option<FileSpec>,
    /// HTTP requests to a URL.
    pub http: Option<HttpSpec>,
    /// Redis commands.
    pub redis: Option<RedisSpec>,
    /// Rows of a PostgreSQL database.
    pub postgres: Option<PostgresSpec>,
    /// Messages of a Kafka topic.
    pub kafka: Option<KafkaSpec>,
    /// Messages of an SQS queue.
    pub sqs: Option<SqsSpec>,
    /// What sort of target this is for the API's `target.type`. Default: by kind.
    pub target: Option<TargetKind>,
    /// How fast and how much at once, per branch.
    pub limits: Option<SinkLimitsSpec>,
    /// How records are grouped.
    pub batch: Option<BatchSpec>,
    /// When to try again, and when to give up.
    pub retry: Option<RetrySpec>,
    /// `key` keeps each key's order; `none` lets everything overtake. Default: key.
    pub ordering: Option<Ordering>,
    /// What becomes of records that cannot be delivered.
    pub dead_letters: Option<DeadLettersSpec>,
}

/// `otherwise:` of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Otherwise {
    /// Into the dead letters.
    DeadLetter,
    /// Dropped, counted.
    Drop,
}

/// Where a new branch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartSpec {
    /// At the oldest record that is kept.
    Earliest,
    /// With the records that come after it.
    Latest,
}

/// `ordering:` of a sink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ordering {
    /// A key's records go out one after the other.
    #[default]
    Key,
    /// No order.
    None,
}

/// `limits:` of a sink, per branch.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SinkLimitsSpec {
    /// Records in a time. Default: no limit.
    pub rate: Option<Rate>,
    /// How many may go at once after a quiet time. Default: one second's worth.
    #[schemars(range(min = 1))]
    pub burst: Option<u32>,
    /// Batches under way at once. Default: 8. Minimum: 1. Maximum: 256.
    #[schemars(range(min = 1, max = 256))]
    pub concurrency: u32,
}

impl Default for SinkLimitsSpec {
    fn default() -> Self {
        Self { rate: None, burst: None, concurrency: 8 }
    }
}

/// `batch:` of a sink.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BatchSpec {
    /// Records at most. Default: 200; 1 for `http` without `batch:`. Minimum: 1. Maximum: 10000.
    #[schemars(range(min = 1, max = 10_000))]
    pub records: u32,
    /// Payload bytes at most. Default: 1MiB.
    pub bytes: ByteSize,
    /// How long an incomplete batch waits for more. Default: 5ms.
    pub linger: Span,
}

impl Default for BatchSpec {
    fn default() -> Self {
        Self { records: 200, bytes: ByteSize(1 << 20), linger: Span(std::time::Duration::from_millis(5)) }
    }
}

/// `dead_letters:` of a sink.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DeadLettersSpec {
    /// When the dead letters of this branch take this much, it pauses. Default: 1GiB.
    pub size: ByteSize,
    /// `pass` lets later records of the key go on; `block` holds them until the letter is replayed or purged. Default: pass.
    pub on_dead_letter: OnDeadLetter,
    /// How fast replayed letters go to the target at most, so that they crowd out nobody; `limits.rate` holds too.
    /// Default: 100/s.
    pub replay: Rate,
    /// Also write a copy of each to a file. The copy is part of the end: it is on the disk before the letter counts, and a
    /// file that cannot be written pauses the branch until it can (`dead_letters_copy`). Only a letter from which
    /// the path cannot be made goes without a copy, counted.
    pub also: Option<AlsoSpec>,
}

impl Default for DeadLettersSpec {
    fn default() -> Self {
        let replay = Rate { count: 100, per: std::time::Duration::from_secs(1) };
        Self { size: ByteSize(1 << 30), on_dead_letter: OnDeadLetter::Pass, replay, also: None }
    }
}

/// `dead_letters.on_dead_letter:`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnDeadLetter {
    /// Later records of the key go on.
    Pass,
    /// Later records of the key wait.
    Block,
}

/// `dead_letters.also:`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AlsoSpec {
    /// A file that gets a line for each dead letter.
    pub file: FileSpec,
}
