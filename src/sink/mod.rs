//! Where records end: the trait [`Sink`], its kinds, and the verdicts by which a driver obeys.
//!
//! A sink speaks a protocol: it gets a batch of chosen operations and says which failed and with what verdict. It
//! never retries, waits, or decides about order; the driver does.

pub mod file;
pub mod http;
pub mod redis;
pub mod stdout;
pub mod template;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;

use crate::clock::Clock;
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

/// A sink cannot be set up as its settings say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OpenError(pub Box<str>);

/// Sets a sink up. Connects to nothing: that waits for the first batch.
///
/// # Errors
/// When a setting cannot work: a file of certificates that is not there, an address that is none.
pub fn open(kind: &Kind, _context: &SinkContext) -> Result<Box<dyn Sink>, OpenError> {
    Ok(match kind {
        Kind::Stdout(_) => Box::new(stdout::Stdout),
        Kind::File(spec) => Box::new(file::Files::new(spec)),
        Kind::Http { spec, batched } => Box::new(http::Http::open(spec, *batched)?),
        Kind::Redis(spec) => Box::new(redis::Redis::new(spec)?),
    })
}
