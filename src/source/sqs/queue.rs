//! A queue: where it is, what it is like, how much it holds, and what is wrong with it now.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_sqs::types::QueueAttributeName as Attribute;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::connection::sqs::{Account, Connection, Failure, Reached, explain, is_fifo, is_url, queue_name};
use crate::units::Span;

/// What SQS takes where a queue does not say less: a message, or all of a batch, in bytes.
pub(super) const LARGEST: usize = 1 << 20;
/// So long a failed look is not repeated for the next one who asks.
const FRESH: Duration = Duration::from_secs(1);
/// So long the queue's depth is not asked again.
const DEPTH_FRESH: Duration = Duration::from_secs(5);
/// So long something is wrong that nobody has tried again: a write that failed may be the last one for a while.
const TROUBLED: Duration = Duration::from_secs(120);
/// Messages that were received so often and not deleted are taken away by the queue itself; fewer than these are soon spent,
/// since every restart of a process is a receipt.
const ENOUGH_RECEIPTS: u32 = 20;

/// What a queue is like.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// Where requests say that it is.
    pub(super) url: String,
    /// The largest message it takes, in bytes.
    pub(super) largest: usize,
    /// How long it keeps a message that nobody deletes.
    kept: Duration,
    /// After so many receipts it takes a message away.
    redrive: Option<u32>,
}

impl Facts {
    fn of(url: String, attributes: &HashMap<Attribute, String>) -> Self {
        let number = |name: Attribute| attributes.get(&name).and_then(|text| text.parse::<u64>().ok());
        let redrive = attributes.get(&Attribute::RedrivePolicy).and_then(|policy| {
            let policy: serde_json::Value = serde_json::from_str(policy).ok()?;
            let receipts = policy.get("maxReceiveCount")?;
            // A number, or a number in quotes, as it was given.
            receipts.as_u64().or_else(|| receipts.as_str()?.parse().ok())
        });
        Self {
            url,
            largest: number(Attribute::MaximumMessageSize).map_or(LARGEST, |bytes| (bytes as usize).min(LARGEST)),
            kept: Duration::from_secs(number(Attribute::MessageRetentionPeriod).unwrap_or(345_600)),
            redrive: redrive.map(|receipts| u32::try_from(receipts).unwrap_or(u32::MAX)),
        }
    }

    /// In words, for `/readyz`.
    pub(super) fn note(&self) -> String {
        let redrive = self.redrive.map(|receipts| format!(", and taken away after {receipts} receipts"));
        format!("kept {} at most{}", Span(self.kept), redrive.unwrap_or_default())
    }

    /// What is dangerous about a redrive policy, if anything is.
    pub(super) fn weakness(&self) -> Option<String> {
        let receipts = self.redrive.filter(|receipts| *receipts < ENOUGH_RECEIPTS)?;
        Some(format!(
            "the queue's redrive policy takes a message away after {receipts} receipts, and each restart is one: what is not \
             delivered by then is lost to this pipeline without its reason; set maxReceiveCount to {ENOUGH_RECEIPTS} or more"
        ))
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Depth {
    records: u64,
    asked: Option<Instant>,
    asking: bool,
}

/// A queue by name or URL. Connects when it is needed.
pub(super) struct Queue {
    /// As it was written.
    pub(super) given: String,
    /// It keeps the order of its groups.
    pub(super) fifo: bool,
    pub(super) connection: Arc<Connection>,
    facts: Mutex<Option<Arc<Facts>>>,
    looking: tokio::sync::Mutex<Option<(Instant, Failure)>>,
    depth: Mutex<Depth>,
    troubles: Mutex<BTreeMap<&'static str, (Instant, String)>>,
}

impl Queue {
    pub(super) fn new(account: &Account, queue: &str) -> Self {
        Self {
            given: queue.to_owned(),
            fifo: is_fifo(queue),
            connection: account.for_queue(queue).connection(),
            facts: Mutex::default(),
            looking: tokio::sync::Mutex::default(),
            depth: Mutex::default(),
            troubles: Mutex::default(),
        }
    }

    /// Its name.
    pub(super) fn name(&self) -> &str {
        queue_name(&self.given)
    }

    /// What is known of it without asking.
    pub(super) fn known(&self) -> Option<Arc<Facts>> {
        self.facts.lock().clone()
    }

    /// What it is like; asks the first time.
    ///
    /// # Errors
    /// When it cannot be reached or is not there.
    pub(super) async fn facts(&self) -> Result<Arc<Facts>, Failure> {
        if let Some(known) = self.known() {
            return Ok(known);
        }
        let mut looking = self.looking.lock().await;
        if let Some(known) = self.known() {
            return Ok(known);
        }
        if let Some((at, failure)) = &*looking
            && at.elapsed() < FRESH
        {
            return Err(failure.clone());
        }
        match self.look().await {
            Ok(facts) => {
                *looking = None;
                self.fine("find");
                let facts = Arc::new(facts);
                *self.facts.lock() = Some(Arc::clone(&facts));
                Ok(facts)
            }
            Err(failure) => {
                self.trouble("find", &failure.text);
                *looking = Some((Instant::now(), failure.clone()));
                Err(failure)
            }
        }
    }

    async fn look(&self) -> Result<Facts, Failure> {
        let client = self.client().await?;
        let account = self.connection.account();
        let url = if is_url(&self.given) {
            self.given.clone()
        } else {
            let found = client.get_queue_url().queue_name(&self.given).send().await;
            let found = found.map_err(|error| explain(&error, "GetQueueUrl", account, &self.given))?;
            found.queue_url.unwrap_or_default()
        };
        let asking = client.get_queue_attributes().queue_url(&url).attribute_names(Attribute::All).send().await;
        let attributes = asking.map_err(|error| explain(&error, "GetQueueAttributes", account, self.name()))?;
        Ok(Facts::of(url, &attributes.attributes.unwrap_or_default()))
    }

    pub(super) async fn client(&self) -> Result<&aws_sdk_sqs::Client, Failure> {
        let failed = |text| Failure { reached: Reached::Never, no_queue: false, text };
        self.connection.client().await.map_err(failed)
    }

    /// A request failed. What is known of a queue that is gone is forgotten: the next one may be another.
    pub(super) fn failed(&self, act: &'static str, failure: &Failure) {
        if failure.no_queue {
            *self.facts.lock() = None;
        }
        self.trouble(act, &failure.text);
    }

    /// Remembers, and says once, what is wrong.
    pub(super) fn trouble(&self, act: &'static str, text: &str) {
        let former = self.troubles.lock().insert(act, (Instant::now(), text.to_owned()));
        if former.is_none_or(|(_, former)| former != text) {
            tracing::error!(queue = self.name(), act, error = text, "SQS fails, trying again");
        }
    }

    /// An act has been done: what was wrong with it is over.
    pub(super) fn fine(&self, act: &'static str) {
        if self.troubles.lock().remove(act).is_some() {
            tracing::info!(queue = self.name(), act, "SQS works again");
        }
    }

    /// What is wrong now.
    pub(super) fn troubles(&self) -> Option<String> {
        let troubles = self.troubles.lock();
        let (act, (_, text)) = troubles.iter().find(|(_, (since, _))| since.elapsed() < TROUBLED)?;
        Some(format!("queue {}: {act}: {text}", self.name()))
    }

    /// How many messages it holds, as it was some seconds ago; asks in the background when that is older.
    pub(super) fn depth(self: &Arc<Self>) -> u64 {
        let mut depth = self.depth.lock();
        let stale = depth.asked.is_none_or(|at| at.elapsed() >= DEPTH_FRESH);
        if stale
            && !depth.asking
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            depth.asking = true;
            let queue = Arc::clone(self);
            runtime.spawn(async move { queue.ask_depth().await });
        }
        depth.records
    }

    pub(super) async fn ask_depth(&self) {
        let asked = async {
            let facts = self.facts().await?;
            let asking = self.client().await?.get_queue_attributes().queue_url(&facts.url);
            let asking = asking
                .attribute_names(Attribute::ApproximateNumberOfMessages)
                .attribute_names(Attribute::ApproximateNumberOfMessagesNotVisible);
            let explained = |error| explain(&error, "GetQueueAttributes", self.connection.account(), self.name());
            asking.send().await.map_err(explained)
        };
        let answer = asked.await;
        let mut depth = self.depth.lock();
        (depth.asked, depth.asking) = (Some(Instant::now()), false);
        match answer {
            Ok(answer) => {
                let counts = answer.attributes.unwrap_or_default();
                depth.records = counts.values().filter_map(|count| count.parse::<u64>().ok()).sum();
            }
            Err(failure) => tracing::debug!(queue = self.name(), error = failure.text, "its depth is not known"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_nobody_tries_again_is_not_wrong_for_ever() {
        let queue = Queue::new(&Account::default(), "orders");
        queue.trouble("send", "it is away");
        queue.trouble("receive", "it is away");
        queue.fine("receive");
        assert_eq!(queue.troubles().as_deref(), Some("queue orders: send: it is away"));
        tokio::time::advance(TROUBLED).await;
        assert_eq!(queue.troubles(), None);
    }

    #[test]
    fn a_redrive_policy_that_is_soon_spent_is_named() {
        let facts = |policy: &str| Facts::of(String::new(), &[(Attribute::RedrivePolicy, policy.to_owned())].into());
        let weakness = facts("{\"maxReceiveCount\":3}").weakness().unwrap();
        assert!(weakness.contains("after 3 receipts"), "{weakness}");
        assert!(facts("{\"maxReceiveCount\":\"5\"}").weakness().is_some());
        assert!(facts("{\"maxReceiveCount\":100}").weakness().is_none());
        assert!(Facts::of(String::new(), &HashMap::new()).weakness().is_none());
    }
}
