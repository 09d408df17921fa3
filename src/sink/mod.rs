//! Where records end: the trait [`Sink`], its kinds, and the verdicts by which a driver obeys.
//!
//! A sink speaks a protocol: it gets a batch of chosen operations and says which failed and with what verdict. It
//! never retries, waits, or decides about order; the driver does.

pub mod file;
pub mod http;
mod json;
pub mod kafka;
mod lines;
pub mod postgres;
pub mod redis;
pub mod sqs;
pub mod stdout;
pub mod template;
#[cfg(test)]
mod testing;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;

use crate::clock::Clock;
use crate::connection::probe::Probed;
use crate::record::TargetKind;
use crate::retry::Retry;
use crate::transform::Event;

/// One operation of a batch.
#[derive(Clone, Debug)]
pub struct Operation {
    /// What to send.
    pub event: Event,
    /// Which of the sink's `cases` was chosen; 0 where a sink has none.
    pub case: usize,
    /// The region of the branch, if the file replicates.
    pub region: Option<Arc<str>>,
}

impl Operation {
    /// The identity that a target sees, the same on every attempt: the record's id, `id/n` for its n-th child.
    pub fn delivery_id(&self) -> String {
        match self.event.child {
            0 => self.event.record.id.to_string(),
            child => format!("{}/{child}", self.event.record.id),
        }
    }
}

/// What a failure means, said by the code that knows the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This record is refused and always will be.
    Never,
    /// Try again after a while.
    Backoff,
    /// Try again after this long; the target said so.
    After(Duration),
    /// The target is away: an outage, not this record's fault.
    Down,
    /// The part of the target that this record belongs to is away, while others answer: it waits and burns no attempts.
    Part,
}

/// Why one operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What it means.
    pub verdict: Verdict,
    /// What the target said, short, without secrets; for logs, status and dead letters.
    pub message: Box<str>,
    /// It failed while being rendered from the record, before anything was sent.
    pub rendering: bool,
}

impl Failure {
    /// A failure that the target reported.
    pub fn new(verdict: Verdict, message: impl Into<Box<str>>) -> Self {
        Self { verdict, message: message.into(), rendering: false }
    }

    /// A template could not be filled from the record: refused before anything was sent.
    pub fn rendering(message: impl Into<Box<str>>) -> Self {
        Self { verdict: Verdict::Never, message: message.into(), rendering: true }
    }
}

/// How a batch fails, which decides whether several records of one key may be in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchStyle {
    /// All or none take effect.
    Atomic,
    /// In order, up to the first failure.
    StopsAtFirstFailure,
    /// Each on its own: one record of a key at most.
    Independent,
}

/// The result of a batch: empty = all taken. Each pair names an index into the batch. With `StopsAtFirstFailure` the
/// indexes after the first failure were not tried and are not listed.
#[derive(Clone, Debug, Default)]
pub struct Written {
    /// What failed, by ascending index.
    pub failed: Vec<(usize, Failure)>,
}

impl Written {
    /// All of a batch failed for one reason.
    pub fn all(len: usize, failure: &Failure) -> Self {
        Self { failed: (0..len).map(|index| (index, failure.clone())).collect() }
    }
}

/// A target's protocol. Shared by nobody: a branch owns its sink.
pub trait Sink: Send + Sync {
    /// How its batches fail.
    fn batch_style(&self) -> BatchStyle;

    /// Sends a batch, at least one operation. Returns when the target has confirmed or refused each.
    ///
    /// # Cancel safety
    /// When it is dropped nobody knows what took effect; the driver sends the same again.
    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written>;

    /// Reaches the target and looks whether it can be written to; changes nothing there. Empty = there is nothing to look at.
    fn probe(&self) -> BoxFuture<'_, Vec<Probed>> {
        Box::pin(std::future::ready(Vec::new()))
    }
}

/// The kinds of sink, each with its settings as they apply to one branch.
#[derive(Clone, Debug)]
pub enum Kind {
    /// Lines on standard output.
    Stdout(stdout::StdoutSpec),
    /// NDJSON files.
    File(file::FileSpec),
    /// HTTP requests; `batched` when the file has a `batch:`.
    Http {
        /// Its settings.
        spec: Box<http::HttpSpec>,
        /// One request carries many records.
        batched: bool,
    },
    /// Redis commands.
    Redis(Box<redis::RedisSpec>),
    /// Rows of a PostgreSQL database.
    Postgres(Box<postgres::PostgresSpec>),
    /// Messages of a Kafka topic.
    Kafka(Box<kafka::KafkaSpec>),
    /// Messages of an SQS queue.
    Sqs(Box<sqs::SqsSpec>),
}

impl Kind {
    /// The kind's name, as the file says it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Stdout(_) => "stdout",
            Self::File(_) => "file",
            Self::Http { .. } => "http",
            Self::Redis(_) => "redis",
            Self::Postgres(_) => "postgres",
            Self::Kafka(_) => "kafka",
            Self::Sqs(_) => "sqs",
        }
    }
}

/// What a sink knows of the branch that it serves.
#[derive(Clone, Debug)]
pub struct SinkContext {
    /// What relative paths are relative to; empty for the folder that the process runs in.
    pub folder: PathBuf,
    /// The namespace, for lines and templates.
    pub namespace: Arc<str>,
    /// The sink's name, for templates.
    pub sink: Arc<str>,
    /// The time, for signatures and for waits that a target names.
    pub clock: Clock,
}

/// A sink cannot be opened as the file has it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// A setting does not work; [`check`] finds the same without opening.
    #[error("{kind}{pointer}: {message}")]
    Setting {
        /// The sink's kind.
        kind: &'static str,
        /// Where, relative to the kind.
        pointer: Box<str>,
        /// What is wrong.
        message: Box<str>,
    },
    /// A file that the settings name cannot be used.
    #[error("{path}: {message}")]
    Unreadable {
        /// The file.
        path: Box<str>,
        /// What is wrong with it.
        message: Box<str>,
    },
}

/// A setting that cannot work as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecFault {
    /// Where, a JSON pointer relative to the kind's own map: `/url`, `/cases/0/key`.
    pub pointer: String,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub help: String,
}

impl SpecFault {
    fn new(pointer: impl Into<String>, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), message: message.into(), help: help.into() }
    }
}

/// Scheme and host of an address: who else is named in it, its path and its query may be secrets.
fn shown_address(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return "…".to_owned() };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    format!("{scheme}://{}", authority.rsplit('@').next().unwrap_or_default())
}

/// Opens a sink. Touches no network: connections are made when they are needed and made again when they break, so that a
/// target that is away stops no start.
///
/// # Errors
/// When a setting cannot work, or a file that it names (a certificate, a secret) cannot be read.
pub fn open(kind: &Kind, context: &SinkContext) -> Result<Box<dyn Sink>, OpenError> {
    if let Some(fault) = check(kind).into_iter().next() {
        return Err(OpenError::Setting {
            kind: kind.name(),
            pointer: fault.pointer.into(),
            message: fault.message.into(),
        });
    }
    Ok(match kind {
        Kind::Stdout(stdout::StdoutSpec {}) => Box::new(stdout::StdoutSink::new(std::io::stdout(), context)),
        Kind::File(spec) => Box::new(file::FileSink::open(spec, context)?),
        Kind::Http { spec, batched } => Box::new(http::HttpSink::open(spec, *batched, context)?),
        Kind::Redis(spec) => Box::new(redis::RedisSink::open(spec, context)?),
        Kind::Postgres(spec) => Box::new(postgres::PostgresSink::open(spec, context)?),
        Kind::Kafka(spec) => Box::new(kafka::KafkaSink::open(spec, context)?),
        Kind::Sqs(spec) => Box::new(sqs::SqsSink::open(spec, context)?),
    })
}

/// Everything in a kind's settings that cannot work as written. Reads no file and touches no network.
pub fn check(kind: &Kind) -> Vec<SpecFault> {
    match kind {
        Kind::Stdout(stdout::StdoutSpec {}) => Vec::new(),
        Kind::File(spec) => file::check(spec),
        Kind::Http { spec, batched } => http::check(spec, *batched),
        Kind::Redis(spec) => redis::check(spec),
        Kind::Postgres(spec) => postgres::check(spec),
        Kind::Kafka(spec) => kafka::check(spec),
        Kind::Sqs(spec) => sqs::check(spec),
    }
}

/// The retry schedule of a kind where the file leaves it open.
pub const fn retry_default(kind: &Kind) -> Retry {
    match kind {
        Kind::Http { .. } => Retry::webhook(),
        _ => Retry::nearby(),
    }
}

/// What sort of target a kind is by nature.
pub const fn target_kind(kind: &Kind) -> TargetKind {
    match kind {
        Kind::Http { .. } => TargetKind::Http,
        Kind::Redis(_) => TargetKind::Cache,
        Kind::Postgres(_) => TargetKind::Database,
        Kind::Kafka(_) | Kind::Sqs(_) => TargetKind::Queue,
        Kind::Stdout(_) | Kind::File(_) => TargetKind::FileSystem,
    }
}

/// When a record counts as delivered, and what happens when it is sent twice, for the plan.
pub fn delivered_note(kind: &Kind) -> Vec<String> {
    match kind {
        Kind::Stdout(_) => vec!["delivered when the line is handed to the system; nothing keeps it".to_owned()],
        Kind::File(_) => vec![
            "delivered when the line is synced to the disk (fdatasync, one a file and batch)".to_owned(),
            "after a crash a line may stand twice".to_owned(),
        ],
        Kind::Http { spec, batched } => http::delivered_note(spec, *batched),
        Kind::Redis(spec) => redis::delivered_note(spec),
        Kind::Postgres(spec) => postgres::delivered_note(spec),
        Kind::Kafka(_) => kafka::delivered_note(),
        Kind::Sqs(spec) => sqs::delivered_note(spec),
    }
}
