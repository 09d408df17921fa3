//! `kafka`: a message for each record, a batch handed over at once.
//!
//! Takes operations, gives what the delivery reports say. The producer is idempotent and waits for every replica in sync, so a
//! batch keeps its order; one report that fails fails what follows of its key.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use indexmap::IndexMap;
use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer as _};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::template::{Document, Scope, Template};
use super::{BatchStyle, Failure, OpenError, Operation, Sink, SinkContext, SpecFault, Verdict, Written};
use crate::connection::kafka::{
    Cluster, Lasting, Listener, METADATA_TIMEOUT, SaslSpec, Shared, TlsSpec, explain, let_go,
};
use crate::connection::probe::Probed;
use crate::units::Span;

/// The header with the delivery's identity, the same on every attempt.
const ID: &str = "walflow-id";

/// Characters of a topic's name at most.
const LONGEST_TOPIC: usize = 249;
/// What Kafka takes as one.
const TOPIC_HELP: &str = "1 to 249 of letters, digits, '.', '_' and '-'";

/// Whether Kafka takes this as a topic's name; with another it would refuse the whole request.
fn is_topic(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=LONGEST_TOPIC).contains(&name.len()) && name.chars().all(legal) && !matches!(name, "." | "..")
}

/// `kafka:` — a message for each record.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KafkaSpec {
    /// Where to begin: `host:port`, several with commas. May come from a region.
    pub brokers: Option<String>,
    /// Encrypts the connection. Default: off.
    pub tls: Option<TlsSpec>,
    /// Who we are.
    pub sasl: Option<SaslSpec>,
    /// The topic, a template with a literal beginning.
    pub topic: String,
    /// The message's key. Default: the record's key; without one no key.
    pub key: Option<String>,
    /// The message's value. Default: the payload's bytes.
    pub value: Option<Value>,
    /// Headers besides the record's own.
    pub headers: IndexMap<String, String>,
    /// How messages are packed. Default: none.
    pub compression: Compression,
    /// How long a message may take to be confirmed. Default: 30s.
    pub timeout: Option<Span>,
}

/// `kafka.compression:`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// As they are.
    #[default]
    None,
    /// gzip.
    Gzip,
    /// Snappy.
    Snappy,
    /// LZ4.
    Lz4,
    /// Zstandard.
    Zstd,
}

impl Compression {
    const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Snappy => "snappy",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

impl KafkaSpec {
    fn cluster(&self) -> Cluster {
        Cluster { brokers: self.brokers.clone(), tls: self.tls.clone(), sasl: self.sasl.clone() }
    }

    fn timeout(&self) -> Duration {
        self.timeout.map_or(Duration::from_secs(30), |span| span.0)
    }
}

/// What cannot work in a `kafka:`.
pub(super) fn check(spec: &KafkaSpec) -> Vec<SpecFault> {
    let faults = spec.cluster().faults().into_iter();
    let mut faults: Vec<SpecFault> =
        faults.map(|(pointer, message, help)| SpecFault::new(pointer, message, help)).collect();
    match Template::parse(&spec.topic) {
        Err(error) => faults.push(SpecFault::new("/topic", error.to_string(), "orders-{region}, for example")),
        Ok(template) if template.literal_prefix().is_empty() => {
            let message = if spec.topic.is_empty() {
                "there is no topic"
            } else {
                "the topic begins with no literal text, so a record could name any topic"
            };
            faults.push(SpecFault::new("/topic", message, "orders, or orders-{payload.kind}"));
        }
        Ok(template) if template.is_literal() && !is_topic(template.literal_prefix()) => {
            faults.push(SpecFault::new("/topic", "Kafka takes no topic of this name", TOPIC_HELP));
        }
        Ok(_) => {}
    }
    for name in spec.headers.keys().filter(|name| name.is_empty() || name.eq_ignore_ascii_case(ID)) {
        let message = if name.is_empty() { "a header has a name" } else { "this header is walflow's own" };
        faults.push(SpecFault::new(format!("/headers/{name}"), message, "another name"));
    }
    let texts = spec.key.iter().map(|key| ("/key".to_owned(), key));
    let headers = spec.headers.iter().map(|(name, value)| (format!("/headers/{}", name.replace('/', "~1")), value));
    for (pointer, text) in texts.chain(headers) {
        if let Err(error) = Template::parse(text) {
            faults.push(SpecFault::new(pointer, error.to_string(), "{payload.a}, for example"));
        }
    }
    if let Some(Err(error)) = spec.value.as_ref().map(Document::parse) {
        faults.push(SpecFault::new(
            format!("/value{}", error.pointer),
            error.error.to_string(),
            "{payload.a}, for example",
        ));
    }
    if spec.timeout.is_some_and(|span| span.0 < Duration::from_secs(1)) {
        faults.push(SpecFault::new("/timeout", "nothing is confirmed in so little time", "30s, for example"));
    }
    faults
}

/// When a record counts as delivered and what a second delivery does, for the plan.
pub(super) fn delivered_note() -> Vec<String> {
    vec![
        "delivered when every replica in sync has the message (acks=all)".to_owned(),
        format!("after a lost answer a message may stand twice, with one {ID} header"),
    ]
}

/// Producers that sinks of equal settings share.
static PRODUCERS: Shared<(Cluster, Compression, Duration), Producer> = Shared::new();

type Client = FutureProducer<Listener>;

/// A producer that is made anew when it has to be.
struct Producer {
    clients: Lasting<Client>,
    listener: Listener,
}

impl Producer {
    fn new(cluster: &Cluster, config: ClientConfig) -> Result<Self, KafkaError> {
        let listener = Listener::new(cluster);
        let heard = listener.clone();
        let make = move || Client::from_config_and_context(&config, heard.clone());
        Ok(Self { clients: Lasting::new(make)?, listener })
    }

    /// The client to write with. After a fatal error one takes nothing more, and certificates are read when it is made.
    fn client(&self) -> Result<Arc<Client>, KafkaError> {
        self.clients.fresh(|client| client.client().fatal_error().is_some() || self.listener.is_about_files())
    }
}

/// A Kafka cluster.
pub struct KafkaSink {
    producer: Arc<Producer>,
    shown: Box<str>,
    topic: Template,
    key: Option<Template>,
    value: Option<Document>,
    headers: Vec<(Box<str>, Template)>,
    context: SinkContext,
}

struct Message {
    topic: String,
    key: Option<Vec<u8>>,
    value: bytes::Bytes,
    headers: OwnedHeaders,
}

impl KafkaSink {
    /// Reads the settings; connects to nothing.
    ///
    /// # Errors
    /// When a setting does not work or a file that it names cannot be read.
    pub fn open(spec: &KafkaSpec, context: &SinkContext) -> Result<Self, OpenError> {
        let wrong =
            |pointer: &str, message: Box<str>| OpenError::Setting { kind: "kafka", pointer: pointer.into(), message };
        let cluster = spec.cluster();
        let make = || {
            let mut config: ClientConfig = cluster.config();
            config.set("enable.idempotence", "true").set("acks", "all").set("linger.ms", "2");
            config.set("compression.type", spec.compression.name());
            config.set("message.timeout.ms", spec.timeout().as_millis().to_string());
            config.set("partitioner", "murmur2_random").set("message.max.bytes", "20000000");
            // A topic that is not there is told soon, and as what it is.
            config.set("topic.metadata.propagation.max.ms", "1000");
            config.set("queue.buffering.max.messages", "100000").set("queue.buffering.max.kbytes", "65536");
            Producer::new(&cluster, config)
        };
        let producer = PRODUCERS.get((cluster.clone(), spec.compression, spec.timeout()), make);
        let producer = producer.map_err(|error: KafkaError| wrong("", explain(&error).into()))?;
        let template = |pointer: &str, text: &str| Template::parse(text).map_err(|error| wrong(pointer, error.message));
        let headers = spec.headers.iter().map(|(name, value)| Ok((name.as_str().into(), template("/headers", value)?)));
        Ok(Self {
            producer,
            shown: format!("kafka {}", cluster.shown()).into(),
            topic: template("/topic", &spec.topic)?,
            key: spec.key.as_deref().map(|key| template("/key", key)).transpose()?,
            value: spec
                .value
                .as_ref()
                .map(Document::parse)
                .transpose()
                .map_err(|error| wrong("/value", error.error.message))?,
            headers: headers.collect::<Result<_, _>>()?,
            context: context.clone(),
        })
    }

    fn message(&self, operation: &Operation) -> Result<Message, Failure> {
        let scope = Scope::new(operation, &self.context);
        let event = &operation.event;
        let key = match &self.key {
            Some(template) => Some(template.render_text(&scope)?.into_bytes()),
            None => event.key.as_deref().map(|key| key.as_bytes().to_vec()),
        };
        let mut headers = OwnedHeaders::new();
        // One identity: a record that came from another walflow brings that of its former life.
        for (name, value) in event.headers().iter().filter(|(name, _)| !name.eq_ignore_ascii_case(ID)) {
            headers = headers.insert(Header { key: name, value: Some(value.as_bytes()) });
        }
        for (name, template) in &self.headers {
            let value = template.render_text(&scope)?;
            headers = headers.insert(Header { key: name, value: Some(value.as_bytes()) });
        }
        let id = operation.delivery_id();
        headers = headers.insert(Header { key: ID, value: Some(id.as_bytes()) });
        let value = match &self.value {
            Some(document) => document.render_bytes(&scope)?,
            None => scope.payload().clone(),
        };
        let topic = self.topic.render_text(&scope)?;
        if !is_topic(&topic) {
            let shown: String = topic.chars().take(LONGEST_TOPIC).collect();
            return Err(Failure::rendering(format!("{shown:?} is no name for a topic: {TOPIC_HELP}")));
        }
        Ok(Message { topic, key, value, headers })
    }

    fn judge(&self, error: &KafkaError) -> Failure {
        use RDKafkaErrorCode as Code;
        let verdict = match error.rdkafka_error_code() {
            Some(Code::MessageSizeTooLarge | Code::InvalidMessage | Code::InvalidRecord) => Verdict::Never,
            Some(Code::QueueFull | Code::RequestTimedOut | Code::NotLeaderForPartition | Code::LeaderNotAvailable) => {
                Verdict::Backoff
            }
            // Nobody there, no quorum, no right, no topic: the target's trouble, for every record.
            _ => Verdict::Down,
        };
        Failure::new(verdict, format!("{}: {}", self.shown, self.producer.listener.explain(error)))
    }

    async fn look(&self, topic: &str) -> Result<String, String> {
        let (producer, topic) = (self.producer.clients.get(), topic.to_owned());
        let looked = tokio::task::spawn_blocking(move || {
            let metadata = producer.client().fetch_metadata(Some(&topic), METADATA_TIMEOUT)?;
            let found = metadata.topics().iter().find(|found| found.name() == topic);
            match found.and_then(rdkafka::metadata::MetadataTopic::error).map(RDKafkaErrorCode::from) {
                Some(error) => Err(KafkaError::MetadataFetch(error)),
                None => Ok(found.map_or(0, |found| found.partitions().len())),
            }
        });
        let listener = &self.producer.listener;
        let partitions = looked.await.map_err(|error| error.to_string())?.map_err(|error| listener.explain(&error))?;
        Ok(format!("topic {}, {partitions} partition(s)", self.topic.literal_prefix()))
    }
}

impl Sink for KafkaSink {
    /// The producer keeps the order of what it is handed, but a message that fails fails alone.
    fn batch_style(&self) -> BatchStyle {
        BatchStyle::Independent
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            let client = match self.producer.client() {
                Ok(client) => client,
                Err(error) => {
                    return Written { failed: (0..batch.len()).map(|index| (index, self.judge(&error))).collect() };
                }
            };
            let mut failed = Vec::new();
            let mut reports = Vec::with_capacity(batch.len());
            for (index, operation) in batch.iter().enumerate() {
                let message = match self.message(operation) {
                    Ok(message) => message,
                    Err(failure) => {
                        failed.push((index, failure));
                        continue;
                    }
                };
                let mut record: FutureRecord<'_, [u8], [u8]> =
                    FutureRecord::to(&message.topic).payload(&message.value[..]).headers(message.headers);
                if let Some(key) = &message.key {
                    record = record.key(key.as_slice());
                }
                match client.send_result(record) {
                    Ok(report) => reports.push((index, report)),
                    Err((error, _)) => failed.push((index, self.judge(&error))),
                }
            }
            let mut taken = false;
            // One after the other: all are under way whoever is asked first.
            for (index, report) in reports {
                match report.await {
                    Ok(Ok(_)) => taken = true,
                    Ok(Err((error, _))) => failed.push((index, self.judge(&error))),
                    Err(_) => failed
                        .push((index, Failure::new(Verdict::Backoff, format!("{}: the client ended", self.shown)))),
                }
            }
            let_go(client);
            if taken {
                self.producer.listener.clear();
            }
            failed.sort_unstable_by_key(|(index, _)| *index);
            let mut seen = HashSet::new();
            failed.retain(|(index, _)| seen.insert(*index));
            Written { failed }
        }
        .boxed()
    }

    fn probe(&self) -> BoxFuture<'_, Vec<Probed>> {
        async move {
            let topic = self.topic.literal_prefix();
            if !self.topic.is_literal() {
                return vec![Probed::fine(
                    &*self.shown,
                    "its topic comes from the record, so there is none to look at",
                )];
            }
            vec![Probed::of(&*self.shown, self.look(topic).await)]
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sink::testing::{context, operation_with};

    fn spec(topic: &str) -> KafkaSpec {
        serde_json::from_value(json!({ "brokers": "127.0.0.1:1", "topic": topic })).unwrap()
    }

    #[test]
    fn a_topic_that_kafka_refuses_is_found_in_the_file_and_in_the_record() {
        for (topic, fine) in [("orders", true), ("o.r-d_1", true), ("o rders", false), ("..", false), ("", false)] {
            assert_eq!(check(&spec(topic)).is_empty(), fine, "{topic}");
        }
        assert!(!check(&spec(&"x".repeat(250))).is_empty());
        let sink = KafkaSink::open(&spec("to-{payload.to}"), &context()).unwrap();
        for (to, fine) in [("a", true), ("a b", false), ("\\u0000", false), ("\u{fc}", false), ("../x", false)] {
            let message = sink.message(&operation_with(&format!("{{\"to\": \"{to}\"}}"), |_| {}));
            assert_eq!(message.as_ref().err().map(|failure| failure.rendering), (!fine).then_some(true), "{to}");
        }
    }

    #[test]
    fn a_message_has_one_identity() {
        use rdkafka::message::Headers as _;
        let mut spec = spec("orders");
        let sink = KafkaSink::open(&spec, &context()).unwrap();
        let operation = operation_with("1", |record| {
            record.headers = vec![("Walflow-Id".into(), "of-before".into()), ("a".into(), "b".into())];
        });
        let message = sink.message(&operation).unwrap_or_else(|failure| panic!("{failure}"));
        let names: Vec<&str> = message.headers.iter().map(|header| header.key).collect();
        assert_eq!(names, ["a", ID]);
        spec.headers.insert(ID.to_owned(), "x".to_owned());
        assert_eq!(check(&spec).len(), 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn after_a_fatal_error_the_branch_goes_on_with_another_producer() {
        use rdkafka::mocking::MockCluster;
        use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
        let broker = MockCluster::new(1).unwrap();
        broker.create_topic("orders", 1, 1).unwrap();
        let spec = KafkaSpec { brokers: Some(broker.bootstrap_servers()), ..spec("orders") };
        let sink = KafkaSink::open(&spec, &context()).unwrap();
        let batch = [operation_with("1", |_| {})];
        assert!(sink.write(&batch).await.failed.is_empty());
        let first = sink.producer.clients.get();
        let desynchronized = RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER;
        broker.request_errors(RDKafkaApiKey::Produce, &[desynchronized]);
        let failed = sink.write(&batch).await.failed;
        assert_eq!(failed.len(), 1, "it was not delivered");
        assert_ne!(failed[0].1.verdict, Verdict::Never, "that is not the record's fault: {failed:?}");
        assert!(first.client().fatal_error().is_some(), "the error was a fatal one");
        let written = tokio::time::timeout(Duration::from_secs(60), sink.write(&batch)).await.unwrap();
        assert!(written.failed.is_empty(), "{:?}", written.failed);
    }
}
