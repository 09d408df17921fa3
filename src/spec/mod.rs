//! What was written: a pipeline file as its author wrote it, nested from the parts' own settings.
//!
//! These types are the file's grammar: they carry its docs, its defaults and its JSON Schema. What the file *means* is
//! the plan's business.

pub mod check;
pub mod code;
pub mod diagnostic;
pub mod environment;
pub mod expand;
pub mod grammar;
mod load;
mod merge;
mod publish;
mod rules;
pub mod settings;
pub mod shared;
mod show;
pub mod sink;
pub mod text;
pub mod tree;

pub use load::{LARGEST_FILE, Load, Loaded, Neighbours, load, load_text, load_text_with, load_with};
pub use publish::{defaults_table, json_schema, settings_table, shared_schema};
pub use show::{service_json, service_text};

use std::fmt;

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::source::kafka::KafkaSourceSpec;
use crate::source::postgres::PostgresShelfSpec;
use crate::source::redis::{RedisShelfSpec, RedisSourceSpec};
use crate::source::sqs::SqsSourceSpec;
use crate::units::{ByteSize, Count, Rate, Span};

/// One namespace's pipeline: source, delay, transform, replicate, sink.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PipelineSpec {
    /// The namespace: 1 to 63 of a-z, 0-9 and '-'.
    pub namespace: String,
    /// What it is for, in a sentence.
    #[serde(default)]
    pub description: Option<String>,
    /// Who to ask; shown in status, dead letters and `walflow_namespace_info`.
    #[serde(default)]
    pub owner: Option<String>,
    /// Which group of instances runs it. Default: default.
    #[serde(default)]
    pub shard: Option<String>,
    /// Where writes become durable and what is checked before. Default: the embedded log.
    #[serde(default)]
    pub source: SourceSpec,
    /// How long records wait before they enter the log.
    #[serde(default)]
    pub delay: Option<DelaySpec>,
    /// What is done to each record, in order.
    #[serde(default)]
    pub transform: Vec<StageSpec>,
    /// Regions that each get every record.
    #[serde(default)]
    pub replicate: Option<ReplicateSpec>,
    /// Where records end.
    pub sink: sink::SinkSpec,
    /// Branches that the file no longer has and that shall end at once: `{NAME: drop}`.
    #[serde(default)]
    pub retired: IndexMap<String, RetiredSpec>,
    /// Cases run by `walflow test`.
    #[serde(default)]
    pub tests: Vec<TestSpec>,
}

/// `source:`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SourceSpec {
    /// The log inside walflow: one journal, one sync for everybody. The default.
    pub embedded: Option<EmbeddedSpec>,
    /// A log in memory, lost at exit: for tests and benchmarks.
    pub memory: Option<MemorySpec>,
    /// A Kafka topic.
    pub kafka: Option<KafkaSourceSpec>,
    /// Redis Streams.
    pub redis: Option<RedisSourceSpec>,
    /// An SQS queue.
    pub sqs: Option<SqsSourceSpec>,
    /// What keeps records that wait. Default: the source's own.
    pub shelf: Option<ShelfSpec>,
    /// A bound on unfinished records, by branch.
    pub backlog: BacklogSpec,
    /// A JSON Schema file, relative to this one; a payload that does not match is answered with 422.
    pub schema: Option<String>,
    /// A JSON pointer into the payload that gives the key; the request's own `key` wins.
    pub key: Option<String>,
    /// Idempotency keys.
    pub idempotency: IdempotencySpec,
    /// Bounds on what is accepted.
    pub limits: IngestLimitsSpec,
}

/// `source.embedded:`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EmbeddedSpec {
    /// How much of the finished records is kept.
    pub retention: RetentionSpec,
}

/// `source.memory:`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MemorySpec {}

/// `source.shelf:`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ShelfSpec {
    /// The embedded log's own shelf.
    pub embedded: Option<EmbeddedShelfSpec>,
    /// Keys of a Redis; for Redis Streams in the same slot, for other logs anywhere.
    pub redis: Option<RedisShelfSpec>,
    /// Tables in a PostgreSQL database that every instance reaches; for a log that others keep.
    pub postgres: Option<PostgresShelfSpec>,
}

/// `source.shelf.embedded:`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EmbeddedShelfSpec {}

/// `source.embedded.retention:`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionSpec {
    /// Finished records are kept this long. Default: 24h.
    pub age: Span,
    /// Finished records are kept up to this size. Default: 1GiB.
    pub size: ByteSize,
}

impl Default for RetentionSpec {
    fn default() -> Self {
        Self { age: Span(std::time::Duration::from_hours(24)), size: ByteSize(1 << 30) }
    }
}

/// `source.backlog:`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BacklogSpec {
    /// Unfinished records may take this much. Default: 20GiB.
    pub size: ByteSize,
    /// Unfinished records may be this old. Default: 7d.
    pub age: Span,
    /// What happens at the bound: `refuse` new writes (503), or `drop` the oldest (counted, alarmed). Default: refuse.
    pub on_full: OnFull,
}

impl Default for BacklogSpec {
    fn default() -> Self {
        Self { size: ByteSize(20 << 30), age: Span(std::time::Duration::from_hours(7 * 24)), on_full: OnFull::Refuse }
    }
}

/// `source.backlog.on_full:`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnFull {
    /// New writes hear 503.
    Refuse,
    /// The oldest unfinished records are dropped, counted.
    Drop,
}

/// `source.idempotency:`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct IdempotencySpec {
    /// How long a key is remembered. Default: 24h.
    pub window: Span,
    /// How many keys are remembered; of more the oldest go first, in blocks of up to a million. Default: 10M.
    pub max: Count,
    /// A JSON pointer into the payload that gives the key; the header or the write's field wins.
    pub from: Option<String>,
}

impl Default for IdempotencySpec {
    fn default() -> Self {
        Self { window: Span(std::time::Duration::from_hours(24)), max: Count(10_000_000), from: None }
    }
}

/// `source.limits:`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct IngestLimitsSpec {
    /// The largest payload. Default: 1MiB. Maximum: 16MiB.
    pub record: ByteSize,
    /// Writes in a time, over all clients; more hear 429. Default: no limit.
    pub rate: Option<Rate>,
    /// Bytes of writes that are not yet durable; more hear 429. Default: 64MiB.
    pub in_flight: ByteSize,
}

impl Default for IngestLimitsSpec {
    fn default() -> Self {
        Self { record: ByteSize(1 << 20), rate: None, in_flight: ByteSize(64 << 20) }
    }
}

/// `delay:` — one of `for` and `until`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DelaySpec {
    /// How long a record waits: a duration, or an expression that gives seconds.
    #[serde(rename = "for")]
    pub for_: Option<DelayFor>,
    /// An expression that gives the time: RFC 3339, or seconds since the epoch.
    pub until: Option<String>,
    /// Adds up to this much, drawn from the record's key so that a key's records keep their order. Default: 0s.
    pub jitter: Span,
    /// The longest delay, from the file or the request; more is a 422. Default: 7d.
    pub max: Option<Span>,
}

/// `delay.for:` — a duration or an expression.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum DelayFor {
    /// A fixed duration.
    Fixed(Span),
    /// An expression that gives seconds.
    Expression(String),
}

/// One stage of `transform:` — one of the three keys.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StageSpec {
    /// An expression; records for which it is false are dropped, counted.
    pub filter: Option<String>,
    /// A script file, relative to this one.
    pub script: Option<String>,
    /// A script, here.
    pub inline: Option<String>,
    /// Environment variables that the script may read with `env("NAME")`.
    pub env: Vec<String>,
}

/// `replicate:`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReplicateSpec {
    /// Each region is a branch of its own; its map overrides the sink's fields.
    pub regions: IndexMap<String, RegionSpec>,
    /// The region that this instance is in: the origin tag of what clients write here. Between two walflows the tag travels
    /// in the body, `origin: "{record.origin}"`; what came over goes to this region's own branches only, and never back
    /// (the loop guard). Default: none.
    pub origin: Option<String>,
}

/// One region: with one sink the kind's fields, with several keyed by sink name; and a transform of its own.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RegionSpec {
    /// Stages for this region only, after the pipeline's own.
    pub transform: Vec<StageSpec>,
    /// The region's former name, so that its branch goes on: the one that it had when this file was last read. The line may
    /// go again once the file has been read with it.
    pub was: Option<String>,
    /// Fields that override the sink's.
    #[serde(flatten)]
    pub overrides: IndexMap<String, serde_json::Value>,
}

impl fmt::Debug for RegionSpec {
    /// Shows which fields are overridden: their values may be addresses with a password in them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionSpec")
            .field("transform", &self.transform)
            .field("was", &self.was)
            .field("overrides", &self.overrides.keys().collect::<Vec<_>>())
            .finish()
    }
}

/// `retired.NAME:`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RetiredSpec {
    /// What is left is dropped at once, counted.
    Drop,
}

/// One case of `tests:`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TestSpec {
    /// What the case shows.
    pub name: String,
    /// The write, as the API takes it, without `namespace`.
    pub write: serde_json::Value,
    /// What arrives, in any order: each names what must match.
    #[serde(default)]
    pub expect: Vec<serde_json::Value>,
}
