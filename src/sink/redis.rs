//! `redis`: commands chosen by `cases`, pipelined.

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
