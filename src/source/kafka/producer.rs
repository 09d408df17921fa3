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
use crate::connection::kafka::{Cluster, Lasting, Listener, Shared, explain, let_go};
use crate::record::{Position, Record};
use crate::source::AdmitError;
use crate::source::foreign::broker::Handed;
use futures::FutureExt as _;

/// How long the client tries to deliver a record; then nobody can say what became of it.
const DELIVERY: Duration = Duration::from_secs(30);
/// How long a record waits for room in the client's queue.
const ROOM: Duration = Duration::from_secs(5);
/// After the cluster was found away, so long nothing is handed over without a look.
const AWAY: Duration = Duration::from_secs(5);

static PRODUCERS: Shared<Cluster, Producer> = Shared::new();

/// A cluster's producer.
pub(super) struct Producer {
    clients: Lasting<Client>,
    listener: Listener,
}

type Client = ThreadedProducer<Reports>;

/// Where delivery reports go.
struct Reports {
    listener: Listener,
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
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::Fatal) {
            tracing::warn!(reason, "a Kafka producer has ended, the next write gets another");
        } else {
            tracing::debug!(%error, reason, "Kafka producer");
            self.listener.hear(&error, reason);
        }
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = Box<Slot>;

    fn delivery(&self, result: &DeliveryResult<'_>, slot: Box<Slot>) {
        let outcome = match result {
            Ok(message) => {
                self.listener.clear();
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
            let listener = Listener::new(cluster);
            let heard = listener.clone();
            let make = move || Client::from_config_and_context(&config, Reports { listener: heard.clone() });
            Ok(Self { clients: Lasting::new(make)?, listener })
        })
    }

    /// Why the cluster cannot be used, if that is known.
    pub(super) fn trouble(&self) -> Option<Arc<str>> {
        self.listener.trouble()
    }

    /// A look whether the cluster is back, if it was away. Blocks.
    pub(super) fn look(&self) {
        if self.trouble().is_none() {
            return;
        }
        // Certificates are read when a client is made: those that were put right are seen by another.
        let client = self.clients.fresh(|client| is_spent(client) || self.listener.is_about_files());
        if let Ok(client) = client {
            if client.client().fetch_metadata(None, Duration::from_secs(2)).is_ok() {
                tracing::info!("the Kafka cluster can be reached again");
                self.listener.clear();
            }
            let_go(client);
        }
    }

    /// Queues the records in this order; each is answered by its delivery report.
    pub(super) async fn append(&self, topic: &str, records: Vec<Arc<Record>>) -> Result<Handed, AdmitError> {
        if let Some((since, why)) = self.listener.heard()
            && since.elapsed() < AWAY
        {
            return Err(AdmitError::Unavailable { reason: format!("Kafka: {why}").into() });
        }
        let client = self.clients.fresh(is_spent).map_err(|error| refusal(&error, explain(&error).into()))?;
        let handed = Self::queue_all(&client, topic, records).await;
        let_go(client);
        handed
    }

    async fn queue_all(client: &Client, topic: &str, records: Vec<Arc<Record>>) -> Result<Handed, AdmitError> {
        let (told, wait) = oneshot::channel();
        let count = records.len();
        let group = Arc::new(Group {
            outcomes: Mutex::new(vec![None; count]),
            open: AtomicUsize::new(count),
            told: Mutex::new(Some(told)),
        });
        let deadline = Instant::now() + ROOM;
        for (index, record) in records.iter().enumerate() {
            if let Err(error) = Self::queue(client, topic, record, &group, index, deadline).await {
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
        client: &Client,
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
            match client.send(next) {
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
        let _ = self.clients.get().flush(Timeout::After(Duration::from_secs(5)));
    }
}

/// After a fatal error (its sequence is not the broker's, it is fenced, it may not be idempotent) a client takes nothing more.
fn is_spent(client: &Client) -> bool {
    client.client().fatal_error().is_some()
}

/// Why the client did not even take a record.
fn refusal(error: &KafkaError, reason: Arc<str>) -> AdmitError {
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::QueueFull) => AdmitError::Busy { retry_after: Duration::from_secs(1) },
        _ => AdmitError::Unavailable { reason: format!("Kafka: {reason}").into() },
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::mocking::MockCluster;
    use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

    use super::*;
    use crate::testing::record;

    /// What became of one record, written anew until it is in the log.
    async fn written(producer: &Producer) -> Vec<AdmitError> {
        let mut refused = Vec::new();
        loop {
            let outcome = match producer.append("orders", vec![Arc::new(record("1"))]).await {
                Ok(handed) => handed.await.remove(0),
                Err(error) => Err(error),
            };
            match outcome {
                Ok(_) => return refused,
                Err(error) => refused.push(error),
            }
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn after_a_fatal_error_another_producer_takes_its_place() {
        let broker = MockCluster::new(1).unwrap();
        broker.create_topic("orders", 1, 1).unwrap();
        let cluster = Cluster { brokers: Some(broker.bootstrap_servers()), ..Cluster::default() };
        let producer = Producer::of(&cluster).unwrap();
        let patience = Duration::from_secs(60);
        assert!(tokio::time::timeout(patience, written(&producer)).await.unwrap().is_empty());
        let first = producer.clients.get();
        let desynchronized = RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER;
        broker.request_errors(RDKafkaApiKey::Produce, &[desynchronized]);
        let refused = tokio::time::timeout(patience, written(&producer)).await.expect("it goes on by itself");
        assert!(refused[0].is_unknown(), "the broker may have it: {refused:?}");
        assert!(is_spent(&first), "the error was a fatal one");
        assert!(!Arc::ptr_eq(&first, &producer.clients.get()));
    }
}
