//! `sqs`: the log is a queue, its one branch the receivers, the order of a key that of its group on a FIFO queue.
//!
//! Durable means: SQS has listed the message under Successful. A queue has no places and cannot be searched: a position is a
//! count of this process, a branch cannot begin anywhere but with what the queue holds, and a parked record whose release was
//! interrupted may be sent twice (on a FIFO queue not within five minutes, by its deduplication id). The queue itself deletes
//! what nobody has ended within its retention period, and its redrive policy takes away what was received too often; each
//! restart is one more receipt.
//!
//! It needs the rights sqs:GetQueueUrl, GetQueueAttributes, SendMessage, ReceiveMessage, DeleteMessage and
//! ChangeMessageVisibility.

mod held;
mod message;
mod queue;
mod receiver;
mod sender;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, ready};
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::message::{LONGEST_DELAY, Outgoing, largest_weight};
use self::queue::{LARGEST, Queue};
use self::receiver::Receiving;
use self::sender::Sender;
use super::foreign::broker::{Begin, Broker, BrokerCaps, Handed, Opened};
use super::foreign::open::{Context, SpecFault};
use super::{AdmitError, BranchName, DeadLetter, Lag, LogError, Reach};
use crate::clock::Clock;
use crate::connection::probe::Probed;
use crate::connection::sqs::{Account, Failure, is_fifo, queue_name};
use crate::record::{Position, Record, RecordId};
use crate::units::Span;

/// `source.sqs:` — a queue that exists. A name that ends with `.fifo` is one that keeps the order of each key.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SqsSourceSpec {
    /// The queue, by its name or URL. Other programs may write to it too.
    pub queue: String,
    /// The region. Default: that of the queue's URL, or the environment's.
    pub region: Option<String>,
    /// Another address than Amazon's: `http://127.0.0.1:9324`.
    pub endpoint: Option<String>,
    /// Who we are. Default: what the AWS tools use too (environment, profile, role of the machine).
    pub access_key_id: Option<String>,
    /// The secret of that key.
    pub secret_access_key: Option<String>,
    /// How long a message stays invisible to others when this process is gone; held on to while it is there. Default: 60s.
    /// Minimum: 1s.
    pub visibility: Span,
    /// Long polls at once. Default: 2. Minimum: 1.
    #[schemars(range(min = 1, max = 32))]
    pub receivers: u16,
    /// The queue where dead letters go when there is no shelf, by its name or URL.
    pub dead_letters: Option<String>,
}

impl fmt::Debug for SqsSourceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqsSourceSpec")
            .field("queue", &queue_name(&self.queue))
            .field("account", &self.account())
            .field("visibility", &self.visibility)
            .field("receivers", &self.receivers)
            .finish_non_exhaustive()
    }
}

impl Default for SqsSourceSpec {
    fn default() -> Self {
        Self {
            queue: String::new(),
            region: None,
            endpoint: None,
            access_key_id: None,
            secret_access_key: None,
            visibility: Span(Duration::from_secs(60)),
            receivers: 2,
            dead_letters: None,
        }
    }
}

impl SqsSourceSpec {
    /// Whether the queue keeps the order of each key.
    pub fn is_fifo(&self) -> bool {
        is_fifo(&self.queue)
    }

    /// Where the queue is and who we are.
    pub fn account(&self) -> Account {
        Account {
            region: self.region.clone(),
            endpoint: self.endpoint.clone(),
            access_key_id: self.access_key_id.clone(),
            secret_access_key: self.secret_access_key.clone(),
        }
        .for_queue(&self.queue)
    }
}

/// Looks whether the queue can be used as it is.
pub async fn probe(spec: &SqsSourceSpec) -> Probed {
    let queue = Queue::new(&spec.account(), &spec.queue);
    let what = format!("SQS queue {} at {}", queue.name(), spec.account().shown());
    match queue.facts().await {
        Err(failure) => Probed::wrong(what, failure.text),
        Ok(facts) => {
            let weak = facts.weakness().map_or(String::new(), |weak| format!("; weak: {weak}"));
            Probed::fine(what, format!("it is there, {}{weak}", facts.note()))
        }
    }
}

/// The longest that SQS hides a message.
const LONGEST_VISIBILITY: Duration = Duration::from_secs(12 * 3_600);

/// What cannot work in a `sqs:`.
pub fn check(spec: &SqsSourceSpec) -> Vec<SpecFault> {
    let faults = spec.account().faults().into_iter();
    let mut faults: Vec<SpecFault> =
        faults.map(|(pointer, message, help)| SpecFault::new(pointer, message, help)).collect();
    for (pointer, queue) in [("/queue", Some(&spec.queue)), ("/dead_letters", spec.dead_letters.as_ref())] {
        let Some(queue) = queue else { continue };
        let name = queue_name(queue);
        let stem = name.strip_suffix(".fifo").unwrap_or(name);
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        if stem.is_empty() || name.len() > 80 || !stem.chars().all(legal) {
            let message = if queue.is_empty() {
                "there is no queue".to_owned()
            } else {
                "that is no name or URL of a queue".to_owned()
            };
            let help = "1 to 80 of a-z, A-Z, 0-9, '-' and '_', with .fifo at the end if it keeps order; or its URL";
            faults.push(SpecFault::new(pointer, message, help));
        }
    }
    if spec.dead_letters.as_deref().is_some_and(|dead| queue_name(dead) == queue_name(&spec.queue)) {
        let message = "dead letters would come back as records";
        faults.push(SpecFault::new("/dead_letters", message, "another queue than the source's own"));
    }
    let whole = spec.visibility.0.subsec_nanos() == 0;
    if !whole || !(Duration::from_secs(1)..=LONGEST_VISIBILITY).contains(&spec.visibility.0) {
        let message = format!("a message cannot be invisible for {}", spec.visibility);
        faults.push(SpecFault::new("/visibility", message, "whole seconds from 1s to 12h; 60s, for example"));
    }
    if !(1..=32).contains(&spec.receivers) {
        faults.push(SpecFault::new("/receivers", format!("{} receivers are out of bounds", spec.receivers), "1 to 32"));
    }
    faults
}

/// Opens a namespace on a queue. Touches no network; must be called inside a runtime.
///
/// # Errors
/// None today; what is wrong is known when the queue is used.
pub fn open(spec: &SqsSourceSpec, context: &Context) -> Result<Arc<dyn Broker>, LogError> {
    Ok(Arc::new(Sqs::new(spec, context)))
}

struct Sqs {
    queue: Arc<Queue>,
    sender: Arc<Sender>,
    receiving: Arc<Receiving>,
    receivers: usize,
    started: AtomicBool,
    warned: Arc<AtomicBool>,
    branch: Arc<Mutex<Option<BranchName>>>,
    dead_letters: Option<Arc<Queue>>,
    dead_sender: OnceLock<Arc<Sender>>,
    clock: Clock,
    strict: bool,
    stopped: CancellationToken,
    _guard: DropGuard,
}

impl Sqs {
    fn new(spec: &SqsSourceSpec, context: &Context) -> Self {
        let stopped = CancellationToken::new();
        let queue = Arc::new(Queue::new(&spec.account(), &spec.queue));
        let clock = context.clock.clone();
        let dead = spec.dead_letters.as_ref().map(|dead| Arc::new(Queue::new(&spec.account(), dead)));
        Self {
            sender: Sender::start(Arc::clone(&queue), clock.clone(), stopped.clone()),
            receiving: Receiving::new(
                Arc::clone(&queue),
                clock.clone(),
                context.number,
                spec.visibility.0,
                stopped.clone(),
            ),
            queue,
            receivers: usize::from(spec.receivers.max(1)),
            started: AtomicBool::new(false),
            warned: Arc::default(),
            branch: Arc::default(),
            dead_letters: dead,
            dead_sender: OnceLock::new(),
            clock,
            strict: context.strict,
            _guard: stopped.clone().drop_guard(),
            stopped,
        }
    }

    fn failed(act: String, failure: &Failure) -> LogError {
        LogError::Storage { act: act.into(), cause: failure.text.as_str().into() }
    }
}

/// Why a second branch is refused.
const ONE_BRANCH: &str =
    "a queue gives each message to one reader, so an sqs source has one branch: keep one sink without regions";

impl Broker for Sqs {
    fn caps(&self) -> BrokerCaps {
        let largest = self.queue.known().map_or(LARGEST, |facts| facts.largest);
        BrokerCaps {
            hold: false,
            pause: false,
            ordered: self.queue.fifo,
            durable: true,
            each_end: true,
            delay: (!self.queue.fifo).then_some(Duration::from_secs(LONGEST_DELAY)),
            look_up: false,
            largest_record: Some(largest_weight(largest) as u64),
        }
    }

    fn durable_note(&self) -> String {
        let facts = self.queue.known().map_or_else(|| "not reached yet".to_owned(), |facts| facts.note());
        let again = if self.queue.fifo { "twice after five minutes" } else { "twice" };
        format!(
            "sqs: listed under Successful by SQS; queue {}: {facts}; it cannot be searched, so a release that was interrupted \
             may send a record {again}",
            self.queue.name()
        )
    }

    fn trouble(&self) -> Option<String> {
        let own = self.queue.troubles();
        own.or_else(|| self.dead_letters.as_ref().and_then(|queue| queue.troubles())).map(|why| format!("sqs {why}"))
    }

    fn append(&self, records: Vec<Arc<Record>>) -> BoxFuture<'static, Result<Handed, AdmitError>> {
        let sender = Arc::clone(&self.sender);
        async move { sender.append(&records).await }.boxed()
    }

    fn open(&self, branch: &BranchName, _: Begin) -> BoxFuture<'static, Result<Opened, LogError>> {
        if self.stopped.is_cancelled() {
            return ready(Err(LogError::Closed("the log is closing".into()))).boxed();
        }
        let other = self.branch.lock().get_or_insert_with(|| branch.clone()) != branch;
        if other {
            return ready(Err(LogError::Unsupported(ONE_BRANCH))).boxed();
        }
        let (queue, receiving) = (Arc::clone(&self.queue), Arc::clone(&self.receiving));
        let (receivers, strict, warned) = (self.receivers, self.strict, Arc::clone(&self.warned));
        let start = !self.started.swap(true, Ordering::Relaxed);
        if start {
            receiving.start(receivers);
        }
        async move {
            let act = || format!("read queue {} at {}", queue.name(), queue.connection.account().shown());
            let facts = queue.facts().await.map_err(|failure| Self::failed(act(), &failure))?;
            if let Some(weakness) = facts.weakness() {
                if strict {
                    return Err(LogError::Storage { act: act().into(), cause: weakness.into() });
                }
                if !warned.swap(true, Ordering::Relaxed) {
                    tracing::warn!(queue = queue.name(), weakness, "messages may be lost to their dead letters");
                }
            }
            let (reader, cursor) = receiving.open().await;
            Ok(Opened {
                cursor,
                given: None,
                parts: None,
                fresh: Vec::new(),
                pause: None,
                subscription: Box::new(reader),
                moved: CancellationToken::new(),
            })
        }
        .boxed()
    }

    fn progress(&self, branch: &BranchName, frontier: &Reach, ended: &[Position]) {
        if self.branch.lock().as_ref() == Some(branch) {
            self.receiving.progress(frontier, ended);
        }
    }

    fn forget(&self, branch: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        // The queue's messages are its owner's.
        self.branch.lock().take_if(|known| known == branch);
        ready(Ok(())).boxed()
    }

    fn rename(&self, from: &BranchName, to: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        if let Some(known) = self.branch.lock().as_mut().filter(|known| *known == from) {
            known.clone_from(to);
        }
        ready(Ok(())).boxed()
    }

    fn lag(&self, branch: &BranchName) -> Lag {
        if self.branch.lock().as_ref() == Some(branch) { self.receiving.lag() } else { Lag::default() }
    }

    fn end(&self) -> Reach {
        // A queue has no end; what was given out is what a stop has to send.
        match self.receiving.newest() {
            Position(0) => Reach::none(),
            newest => newest.into(),
        }
    }

    fn place(&self) -> BoxFuture<'static, Result<Arc<str>, LogError>> {
        ready(Ok("".into())).boxed()
    }

    fn find_after(
        &self,
        _: &str,
        _: Vec<RecordId>,
    ) -> BoxFuture<'static, Result<HashMap<RecordId, Position>, LogError>> {
        // A queue cannot be searched; what was under way is sent again.
        ready(Ok(HashMap::new())).boxed()
    }

    fn bury(&self, letters: Vec<DeadLetter>) -> BoxFuture<'static, Result<(), LogError>> {
        let Some(queue) = self.dead_letters.clone() else {
            return ready(Err(LogError::Unsupported(NO_DEAD_LETTERS))).boxed();
        };
        let start = || Sender::start(Arc::clone(&queue), self.clock.clone(), self.stopped.clone());
        let sender = Arc::clone(self.dead_sender.get_or_init(start));
        async move {
            let act = || format!("write dead letters to queue {}", queue.name());
            let facts = queue.facts().await.map_err(|failure| Self::failed(act(), &failure))?;
            let fifo = is_fifo(&queue.given);
            let messages = letters.iter().map(|letter| Outgoing::letter(letter, fifo, facts.largest)).collect();
            let failed = |error: AdmitError| LogError::Storage { act: act().into(), cause: error.to_string().into() };
            let handed = sender.hand_over(messages, facts.largest).await.map_err(failed)?;
            match handed.await.into_iter().find_map(Result::err) {
                None => Ok(()),
                Some(error) => Err(failed(error)),
            }
        }
        .boxed()
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        let (sender, dead) = (Arc::clone(&self.sender), self.dead_sender.get().cloned());
        let (receiving, stopped) = (Arc::clone(&self.receiving), self.stopped.clone());
        let queue = Arc::clone(&self.queue);
        async move {
            let dead = async {
                if let Some(dead) = dead {
                    dead.close().await;
                }
            };
            tokio::join!(sender.close(), receiving.close(), dead);
            stopped.cancel();
            let duplicates = receiving.duplicates();
            if duplicates > 0 {
                tracing::info!(queue = queue.name(), duplicates, "messages came more than once");
            }
        }
        .boxed()
    }
}

/// Why a dead letter cannot be kept.
const NO_DEAD_LETTERS: &str = "there is no shelf and no queue for dead letters: name one under source.sqs.dead_letters, or a shelf under source.shelf";
