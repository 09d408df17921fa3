//! `kafka` and `sqs` against real servers of their own, which are killed and started again.

use std::time::Duration;

use aws_sdk_sqs::config::{BehaviorVersion, Credentials, Region};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Headers as _, Message as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use serde_json::json;
use walflow::sink::{Kind, Sink, Verdict};

use super::web::{Answer, Web};
use super::{PAYLOADS, Target, conforms, keyed, open, operation, verdicts};
use crate::kafka::{brokers, unique};
use crate::servers::Server;

async fn make_topic(brokers: &str, topic: &str) {
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", brokers).create().unwrap();
    let topic = NewTopic::new(topic, 1, TopicReplication::Fixed(1));
    admin.create_topics([&topic], &AdminOptions::new()).await.unwrap();
}

/// What stands in a topic of one partition from `next` on.
fn read(brokers: &str, topic: &str, next: &mut i64) -> Vec<rdkafka::message::OwnedMessage> {
    let consumer: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", brokers).set("group.id", topic).create().unwrap();
    let end = consumer.fetch_watermarks(topic, 0, Duration::from_secs(20)).unwrap().1;
    let mut from = TopicPartitionList::new();
    from.add_partition_offset(topic, 0, Offset::Offset(*next)).unwrap();
    consumer.assign(&from).unwrap();
    let mut found = Vec::new();
    while *next < end {
        let message = consumer.poll(Duration::from_secs(20)).expect("a message").unwrap().detach();
        *next = message.offset() + 1;
        found.push(message);
    }
    found
}

struct Topic {
    server: Server,
    next: i64,
}

impl Target for Topic {
    fn sink(&self) -> Box<dyn Sink> {
        let spec = json!({ "brokers": self.server.address(), "topic": "to-{payload.to}", "timeout": "2s" });
        open(&Kind::Kafka(Box::new(serde_json::from_value(spec).unwrap())), "".into())
    }

    /// Larger than the broker takes.
    fn refused(&self) -> Option<String> {
        Some(json!({ "to": "a", "x": "y".repeat(2 << 20) }).to_string())
    }

    async fn arrived(&mut self) -> Vec<String> {
        let (address, mut next) = (self.server.address(), self.next);
        let (found, next) =
            tokio::task::spawn_blocking(move || (read(&address, "to-a", &mut next), next)).await.unwrap();
        self.next = next;
        found.iter().map(|message| String::from_utf8(message.payload().unwrap().to_vec()).unwrap()).collect()
    }

    async fn stop(&mut self) {
        self.server.kill().await;
    }

    async fn start(&mut self) {
        self.server.restart().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs servers: run tests/run"]
async fn kafka_conforms() {
    let server = Server::start("kafka").await;
    make_topic(&server.address(), "to-a").await;
    conforms(Topic { server, next: 0 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka: run tests/run"]
async fn a_message_has_the_records_key_headers_and_identity() {
    let topic = unique("sink");
    make_topic(&brokers(), &topic).await;
    let spec = json!({ "brokers": brokers(), "topic": topic, "headers": { "kind": "{payload.to}" } });
    let sink = open(&Kind::Kafka(Box::new(serde_json::from_value(spec).unwrap())), "".into());
    let with_key = keyed(1, Some("user:1"), PAYLOADS[0]);
    assert_eq!(verdicts(&sink.write(&[with_key.clone(), operation(2, PAYLOADS[1])]).await), []);
    let found = tokio::task::spawn_blocking(move || read(&brokers(), &topic, &mut 0)).await.unwrap();
    assert_eq!(found.iter().map(|message| message.key()).collect::<Vec<_>>(), [Some(&b"user:1"[..]), None]);
    let headers: Vec<(String, String)> = (found[0].headers().unwrap().iter())
        .map(|header| (header.key.to_owned(), String::from_utf8(header.value.unwrap().to_vec()).unwrap()))
        .collect();
    assert_eq!(headers, [("kind".to_owned(), "a".to_owned()), ("walflow-id".to_owned(), with_key.delivery_id())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka: run tests/run"]
async fn a_topic_that_is_not_there_is_an_outage_that_says_what_to_do() {
    let spec = json!({ "brokers": brokers(), "topic": unique("nowhere"), "timeout": "3s" });
    let sink = open(&Kind::Kafka(Box::new(serde_json::from_value(spec).unwrap())), "".into());
    let written = sink.write(&[operation(1, PAYLOADS[0])]).await;
    assert_eq!(verdicts(&written), [(0, Verdict::Down)]);
    assert!(written.failed[0].1.message.contains("the topic does not exist: make it"), "{written:?}");
    assert!(!sink.probe().await[0].ok);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka: run tests/run"]
async fn a_message_that_kafka_refuses_is_refused_alone() {
    let prefix = unique("odd");
    make_topic(&brokers(), &format!("{prefix}-a")).await;
    let spec = json!({ "brokers": brokers(), "topic": format!("{prefix}-{{payload.to}}"), "timeout": "10s" });
    let sink = open(&Kind::Kafka(Box::new(serde_json::from_value(spec).unwrap())), "".into());
    let large = json!({ "to": "a", "x": "y".repeat(2 << 20) }).to_string();
    for (odd, told) in [
        (r#"{"to": "a b"}"#, "no name for a topic"),
        (r#"{"to": "a\u0000"}"#, "no name for a topic"),
        (&large, "takes no message of this size"),
    ] {
        let batch = [operation(1, PAYLOADS[0]), operation(2, odd), operation(3, PAYLOADS[5])];
        let written = sink.write(&batch).await;
        assert_eq!(verdicts(&written), [(1, Verdict::Never)], "{written:?}");
        assert!(written.failed[0].1.message.contains(told), "{written:?}");
    }
    let topic = format!("{prefix}-a");
    let found = tokio::task::spawn_blocking(move || read(&brokers(), &topic, &mut 0)).await.unwrap();
    assert_eq!(found.len(), 6, "the others, each time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kafka_that_is_not_there_is_an_outage() {
    let spec = json!({ "brokers": "127.0.0.1:1", "topic": "orders", "timeout": "1s" });
    let sink = open(&Kind::Kafka(Box::new(serde_json::from_value(spec).unwrap())), "".into());
    let written = sink.write(&[operation(1, PAYLOADS[0])]).await;
    assert_eq!(verdicts(&written), [(0, Verdict::Down)]);
    assert!(written.failed[0].1.message.contains("127.0.0.1:1"), "{written:?}");
}

fn client(endpoint: &str) -> aws_sdk_sqs::Client {
    let config = aws_sdk_sqs::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .credentials_provider(Credentials::new("x", "x", None, None, "test"))
        .endpoint_url(endpoint)
        .build();
    aws_sdk_sqs::Client::from_conf(config)
}

/// Everything in a queue, which is empty then; by body and encoding.
async fn drain(endpoint: &str, queue: &str) -> Vec<(String, Option<String>)> {
    let client = client(endpoint);
    let url = client.get_queue_url().queue_name(queue).send().await.unwrap().queue_url.unwrap();
    let mut found = Vec::new();
    loop {
        let receive =
            client.receive_message().queue_url(&url).max_number_of_messages(10).message_attribute_names("All");
        let messages = receive.send().await.unwrap().messages.unwrap_or_default();
        if messages.is_empty() {
            return found;
        }
        for message in messages {
            let attributes = message.message_attributes.unwrap_or_default();
            let encoding = attributes.get("walflow-encoding").and_then(|value| value.string_value.clone());
            found.push((message.body.unwrap(), encoding));
            client
                .delete_message()
                .queue_url(&url)
                .receipt_handle(message.receipt_handle.unwrap())
                .send()
                .await
                .unwrap();
        }
    }
}

async fn make_queue(endpoint: &str, queue: &str) {
    let client = client(endpoint);
    let mut make = client.create_queue().queue_name(queue);
    if queue.ends_with(".fifo") {
        make = make.attributes(aws_sdk_sqs::types::QueueAttributeName::FifoQueue, "true");
    }
    make.send().await.unwrap();
}

fn queue(endpoint: &str, queue: &str, more: serde_json::Value) -> Kind {
    // A client of its own for each runtime.
    let mut spec = json!({
        "queue": queue, "region": "us-east-1", "endpoint": endpoint, "access_key_id": unique("key"), "secret_access_key": "geheim",
    });
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Kind::Sqs(Box::new(serde_json::from_value(spec).unwrap()))
}

struct Queue {
    server: Server,
    name: &'static str,
}

impl Queue {
    fn endpoint(&self) -> String {
        format!("http://{}", self.server.address())
    }
}

impl Target for Queue {
    fn sink(&self) -> Box<dyn Sink> {
        open(&queue(&self.endpoint(), self.name, json!({ "attributes": { "to": "{payload.to}" } })), "".into())
    }

    fn keeps_order(&self) -> bool {
        self.name.ends_with(".fifo")
    }

    async fn arrived(&mut self) -> Vec<String> {
        drain(&self.endpoint(), self.name).await.into_iter().map(|(body, _)| body).collect()
    }

    async fn stop(&mut self) {
        self.server.kill().await;
    }

    async fn start(&mut self) {
        self.server.restart().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs servers: run tests/run"]
async fn sqs_conforms() {
    for name in ["conforms", "conforms.fifo"] {
        let target = Queue { server: Server::start("sqs").await, name };
        make_queue(&target.endpoint(), name).await;
        conforms(target).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs SQS: run tests/run"]
async fn bodies_arrive_whatever_they_hold_and_one_that_is_too_large_is_alone() {
    let endpoint = std::env::var("WALFLOW_TEST_SQS").expect("WALFLOW_TEST_SQS: run tests/run");
    let (plain, fifo) = (unique("plain"), format!("{}.fifo", unique("fifo")));
    make_queue(&endpoint, &plain).await;
    make_queue(&endpoint, &fifo).await;
    let sink = open(&queue(&endpoint, &plain, json!({})), "".into());
    let large = format!("\"{}\"", "x".repeat(1 << 20));
    let batch = [operation(1, "\"a\u{1}b\""), operation(2, &large), operation(3, "\"gr\u{fc}\u{df}e\"")];
    let written = sink.write(&batch).await;
    assert_eq!(verdicts(&written), [(1, Verdict::Never)]);
    assert!(written.failed[0].1.message.contains("1048578 bytes, and SQS takes 1048576"), "{written:?}");
    let mut arrived = drain(&endpoint, &plain).await;
    arrived.sort();
    let expected = [("ImEBYiI=".to_owned(), Some("base64".to_owned())), ("\"gr\u{fc}\u{df}e\"".to_owned(), None)];
    let mut expected = expected.to_vec();
    expected.sort();
    assert_eq!(arrived, expected);
    // Of a key in order, and a second delivery does nothing.
    let sink = open(&queue(&endpoint, &fifo, json!({})), "".into());
    for _ in 0..2 {
        for number in 1..=3 {
            assert_eq!(verdicts(&sink.write(&[keyed(number, Some("k"), &number.to_string())]).await), []);
        }
    }
    let arrived: Vec<String> = drain(&endpoint, &fifo).await.into_iter().map(|(body, _)| body).collect();
    assert_eq!(arrived, ["1", "2", "3"]);
    let sink = open(&queue(&endpoint, "nowhere", json!({})), "".into());
    let written = sink.write(&[operation(1, "1")]).await;
    assert_eq!(verdicts(&written), [(0, Verdict::Down)]);
    let message = &written.failed[0].1.message;
    assert!(message.contains("create-queue") && !message.contains("geheim"), "{message}");
}

#[tokio::test]
async fn what_an_answer_of_sqs_does_not_name_was_not_delivered() {
    let body = r#"{"Successful": [{"Id": "0", "MessageId": "m", "MD5OfMessageBody": "c4ca4238a0b923820dcc509a6f75849b"}],
        "Failed": [{"Id": "2", "SenderFault": true, "Code": "AccessDenied", "Message": "no"},
                   {"Id": "3", "SenderFault": true, "Code": "InvalidMessageContents", "Message": "no"}]}"#;
    let web = Web::start_with(move |_| Answer::with(200, "content-type: application/x-amz-json-1.0\r\n", body)).await;
    let sink = open(&queue(&web.url(""), &web.url("/1/orders"), json!({})), "".into());
    let batch: Vec<_> = (0..4).map(|number| operation(number, "1")).collect();
    let written = sink.write(&batch).await;
    let expected = [(1, Verdict::Backoff), (2, Verdict::Down), (3, Verdict::Never)];
    assert_eq!(verdicts(&written), expected, "{written:?}");
}
