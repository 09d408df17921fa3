//! Hands records to Kafka in order and tells what became of each. One producer for each cluster, shared by all namespaces.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rdkafka::client::ClientContext;
use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::DeliveryResult;
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};
use rdkafka::{Message as _, util::Timeout};
use tokio::sync::oneshot;

use super::message;
use crate::connection::kafka::{Cluster, Shared, explain};
use crate::record::{Position, Record};
use crate::source::AdmitError;
use crate::source::foreign::broker::Handed;
use futures::FutureExt as _;

/// How long the client tries to deliver a record; then nobody can say what became of it.
const DELIVERY: Duration = Duration::from_secs(30);
/// How long a record waits for room in the client's queue.
const ROOM: Duration = Duration::from_secs(5);
/// After the cluster was found away, so long nothing is handed over without a look.
const AWAY: Duration = Duration::from_secs(1);

static PRODUCERS: Shared<Cluster, Producer> = Shared::new();

/// A cluster's producer.
pub(super) struct Producer {
    client: ThreadedProducer<Reports>,
}

/// Since when no broker can be reached, and why.
#[derive(Default)]
struct Health {
    trouble: Option<(Instant, String)>,
}

/// Where delivery reports go.
struct Reports {
    health: Mutex<Health>,
}

/// Records that were handed over together.
struct Group {
    outcomes: Mutex<Vec<Option<Result<Position, AdmitError>>>>,
    open: AtomicUsize,
    told: Mutex<Option<oneshot::Sender<()>>>,
}

impl Group {
    fn end(&self, index: usize, outcome: Result<Position, AdmitError>) {
        if let Some(slot) = self.outcomes.lock().get_mut(index) {
            *slot = Some(outcome);
        }
        if self.open.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(told) = self.told.lock().take()
        {
            // Who asked may be gone.
            let _ = told.send(());
        }
    }
}

/// One record of a group.
pub(super) struct Slot {
    group: Arc<Group>,
    index: usize,
}

impl ClientContext for Reports {
    fn error(&self, error: KafkaError, reason: &str) {
        if matches!(
            error.rdkafka_error_code(),
            Some(RDKafkaErrorCode::AllBrokersDown | RDKafkaErrorCode::Authentication | RDKafkaErrorCode::SSL)
        ) {
            let mut health = self.health.lock();
            if health.trouble.is_none() {
                tracing::warn!(%error, reason, "the Kafka cluster cannot be reached");
            }
            health.trouble = Some((Instant::now(), explain(&error)));
        } else {
            tracing::debug!(%error, reason, "Kafka producer");
        }
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = Box<Slot>;

    fn delivery(&self, result: &DeliveryResult<'_>, slot: Box<Slot>) {
        let outcome = match result {
            Ok(message) => {
                self.health.lock().trouble = None;
                Ok(message::position(message.partition(), message.offset()))
            }
            // It was handed over: whatever is said now, it may be there.
            Err((error, _)) => Err(AdmitError::Unknown { reason: explain(error).into() }),
        };
        slot.group.end(slot.index, outcome);
    }
}

impl Producer {
    /// The producer of a cluster, shared by all who hold it.
    pub(super) fn of(cluster: &Cluster) -> Result<Arc<Self>, KafkaError> {
        PRODUCERS.get(cluster.clone(), || {
            let mut config = cluster.config();
            config.set("enable.idempotence", "true").set("acks", "all");
            // A record alone waits so long for company; while requests are under way others gather anyway.
            config.set("linger.ms", "1").set("batch.size", "262144");
            config.set("queue.buffering.max.messages", "200000").set("queue.buffering.max.kbytes", "65536");
            config.set("message.timeout.ms", DELIVERY.as_millis().to_string());
            config.set("partitioner", "murmur2_random");
            config.set("message.max.bytes", "20000000");
            let reports = Reports { health: Mutex::default() };
            Ok(Self { client: ThreadedProducer::from_config_and_context(&config, reports)? })
        })
    }

    /// Why the cluster cannot be used, if that is known.
    pub(super) fn trouble(&self) -> Option<String> {
        self.client.context().health.lock().trouble.as_ref().map(|(_, why)| why.clone())
    }

    /// A look whether the cluster is back, if it was away. Blocks.
    pub(super) fn look(&self) {
        if self.trouble().is_some() && self.client.client().fetch_metadata(None, Duration::from_secs(2)).is_ok() {
            tracing::info!("the Kafka cluster can be reached again");
            self.client.context().health.lock().trouble = None;
        }
    }

    /// Queues the records in this order; each is answered by its delivery report.
    pub(super) async fn append(&self, topic: &str, records: Vec<Arc<Record>>) -> Result<Handed, AdmitError> {
        if let Some((since, why)) = self.client.context().health.lock().trouble.clone()
            && since.elapsed() < AWAY * 5
        {
            return Err(AdmitError::Unavailable { reason: format!("Kafka: {why}").into() });
        }
        let (told, wait) = oneshot::channel();
        let count = records.len();
        let group = Arc::new(Group {
            outcomes: Mutex::new(vec![None; count]),
            open: AtomicUsize::new(count),
            told: Mutex::new(Some(told)),
        });
        let deadline = Instant::now() + ROOM;
        for (index, record) in records.iter().enumerate() {
            if let Err(error) = self.queue(topic, record, &group, index, deadline).await {
                let reason: Arc<str> = explain(&error).into();
                if index == 0 {
                    return Err(refusal(&error, reason));
                }
                // Those before it are on their way; it and those behind it are certainly not.
                for index in index..count {
                    group.end(index, Err(refusal(&error, Arc::clone(&reason))));
                }
                break;
            }
        }
        let outcomes = async move {
            // The group outlives the reports, which all come, at the latest when the client gives a record up.
            let _ = wait.await;
            let lost = || Err(AdmitError::Unknown { reason: "the Kafka client ended".into() });
            group.outcomes.lock().drain(..).map(|outcome| outcome.unwrap_or_else(lost)).collect()
        };
        Ok(outcomes.boxed())
    }

    async fn queue(
        &self,
        topic: &str,
        record: &Record,
        group: &Arc<Group>,
        index: usize,
        deadline: Instant,
    ) -> Result<(), KafkaError> {
        let slot = Box::new(Slot { group: Arc::clone(group), index });
        let mut next = BaseRecord::<str, [u8], Box<Slot>>::with_opaque_to(topic, slot)
            .payload(&record.payload[..])
            .headers(message::headers(record));
        if let Some(key) = &record.key {
            next = next.key(key);
        }
        loop {
            match self.client.send(next) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back))
                    if Instant::now() < deadline =>
                {
                    next = back;
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                Err((error, _)) => return Err(error),
            }
        }
    }

    /// Waits, with a bound, until everything that was queued has its report. Blocks.
    pub(super) fn flush(&self) {
        // What is left then is reported as unknown when the client goes.
        let _ = self.client.flush(Timeout::After(Duration::from_secs(5)));
    }
}

/// Why the client did not even take a record.
fn refusal(error: &KafkaError, reason: Arc<str>) -> AdmitError {
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::QueueFull) => AdmitError::Busy { retry_after: Duration::from_secs(1) },
        _ => AdmitError::Unavailable { reason: format!("Kafka: {reason}").into() },
    }
}
