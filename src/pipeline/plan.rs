//! What a pipeline file means: every default filled in, every script compiled, every branch laid out.
//!
//! A plan is pure: making one opens nothing. The dry run prints it, the service runs it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;

use crate::delay::Delay;
use crate::record::{Namespace, TargetKind};
use crate::retry::Retry;
use crate::sink::Kind;
use crate::source::BranchName;
use crate::source::kafka::KafkaSourceSpec;
use crate::source::postgres::PostgresShelfSpec;
use crate::source::redis::{RedisShelfSpec, RedisSourceSpec};
use crate::source::sqs::SqsSourceSpec;
use crate::spec::sink::{DeadLettersSpec, Ordering, Otherwise, StartSpec};
use crate::spec::{BacklogSpec, IdempotencySpec, IngestLimitsSpec, RetentionSpec, TestSpec};
use crate::transform::{PayloadSchema, Predicate, Transform};

/// One namespace's pipeline, ready to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The namespace.
    pub namespace: Namespace,
    /// What it is for.
    pub description: Option<String>,
    /// Who to ask.
    pub owner: Option<String>,
    /// Which group of instances runs it.
    pub shard: String,
    /// A short digest of the files and of the environment they used; shown in dead letters and status.
    pub revision: Arc<str>,
    /// The unexpanded files with a digest of the environment used: what an epoch frame keeps.
    pub files: Bytes,
    /// Where writes become durable.
    pub source: SourcePlan,
    /// How long records wait.
    pub delay: Option<Delay>,
    /// What is done to each record before it is replicated.
    pub transform: Transform,
    /// The region of this instance, for origin tags and the loop guard.
    pub origin: Option<Arc<str>>,
    /// Which branch takes what.
    pub routing: Routing,
    /// Every branch, in file order: regions × sinks.
    pub branches: Vec<Arc<BranchPlan>>,
    /// Branches that are ended at once.
    pub retired: Vec<BranchName>,
    /// The cases of `tests:`.
    pub tests: Vec<TestSpec>,
}

impl Plan {
    /// The file's rule delays what others write into the log, by holding its parts.
    pub fn holds(&self) -> bool {
        let rule = self.delay.as_ref().is_some_and(|delay| delay.rule.is_some());
        rule && matches!(self.source.kind, SourceKind::Kafka(_))
    }
}

/// Where a namespace's writes become durable.
#[derive(Clone, Debug)]
pub struct SourcePlan {
    /// The kind.
    pub kind: SourceKind,
    /// What keeps records that wait.
    pub shelf: ShelfKind,
    /// What is kept of finished records.
    pub retention: RetentionSpec,
    /// The bound on unfinished ones.
    pub backlog: BacklogSpec,
    /// Idempotency keys.
    pub idempotency: IdempotencySpec,
    /// What is accepted.
    pub limits: IngestLimitsSpec,
    /// A JSON pointer that gives the key.
    pub key: Option<Arc<str>>,
    /// What payloads must match.
    pub schema: Option<Arc<PayloadSchema>>,
}

/// The kinds of source.
#[derive(Clone, Debug, Serialize)]
pub enum SourceKind {
    /// The log inside walflow.
    Embedded,
    /// A log in memory, lost at exit.
    Memory,
    /// A Kafka topic.
    Kafka(Box<KafkaSourceSpec>),
    /// Redis Streams.
    Redis(Box<RedisSourceSpec>),
    /// An SQS queue.
    Sqs(Box<SqsSourceSpec>),
}

impl SourceKind {
    /// The log is one that others keep.
    pub const fn is_foreign(&self) -> bool {
        !matches!(self, Self::Embedded | Self::Memory)
    }
}

/// The kinds of shelf.
#[derive(Clone, Debug, Serialize)]
pub enum ShelfKind {
    /// The log's own.
    Own,
    /// None: nothing can wait.
    None,
    /// A PostgreSQL database.
    Postgres(Box<PostgresShelfSpec>),
    /// Keys of a Redis.
    Redis(Box<RedisShelfSpec>),
}

/// How a record finds its sinks.
#[derive(Clone, Debug)]
pub enum Routing {
    /// One sink takes all.
    Single,
    /// The first arm whose condition holds takes it; by arm, `None` = always.
    Route {
        /// The conditions, in order.
        arms: Arc<[(Arc<str>, Option<Predicate>)]>,
        /// When no arm takes it.
        otherwise: Otherwise,
    },
    /// Every arm whose own condition holds takes it.
    FanOut {
        /// By arm, `None` = always.
        arms: Arc<[(Arc<str>, Option<Predicate>)]>,
    },
}

/// One branch: a sink in a region, with everything that its driver obeys.
#[derive(Clone, Debug)]
pub struct BranchPlan {
    /// Its name.
    pub name: BranchName,
    /// The sink's name: the arm's, or the kind where there is one sink.
    pub sink: Arc<str>,
    /// The region, where the file replicates.
    pub region: Option<Arc<str>>,
    /// Its former name, so that the stored cursor goes on.
    pub was: Option<BranchName>,
    /// Which arm of the routing it is; 0 where there is one sink.
    pub arm: usize,
    /// The region's own stages, then the arm's.
    pub transforms: [Transform; 2],
    /// The protocol and its settings, the region's overrides applied.
    pub kind: Kind,
    /// The conditions of the sink's `cases`, in order; empty where the kind has none. `None` = always.
    pub cases: Vec<Option<Predicate>>,
    /// What sort of target it is for the API.
    pub target: TargetKind,
    /// Records a second, and how many at once after a quiet time.
    pub rate: Option<(f64, u32)>,
    /// Batches under way at once.
    pub concurrency: usize,
    /// How records are grouped.
    pub batch: BatchPlan,
    /// When to try again.
    pub retry: Retry,
    /// Whether a key's order is kept.
    pub ordering: Ordering,
    /// What becomes of what cannot be delivered.
    pub dead_letters: DeadLettersSpec,
    /// Where it begins when the log has never seen it; `None` = at its epoch.
    pub start: Option<StartSpec>,
}

/// How a branch groups records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchPlan {
    /// Records at most.
    pub records: usize,
    /// Payload bytes at most.
    pub bytes: usize,
    /// How long an incomplete batch waits.
    pub linger: Duration,
}
