//! The whole source against a real server; each case has a queue of its own.

mod pair;

use std::sync::Arc;
use std::time::Duration;

use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{Message, MessageAttributeValue, QueueAttributeName as Attribute};
use bytes::Bytes;
use futures::future::join_all;

use super::*;
use crate::clock::Timestamp;
use crate::record::RecordId;
use crate::source::{DeadReason, Entry, RowKey, Subscription};

/// Longest wait for anything; a wait that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(30);
const SECRET: &str = "hush-hush-hush";

struct Bench {
    client: Client,
    url: String,
    spec: SqsSourceSpec,
}

fn server() -> String {
    std::env::var("WALFLOW_TEST_SQS").expect("WALFLOW_TEST_SQS names an SQS server, http://127.0.0.1:9324")
}

fn spec(queue: &str, endpoint: String) -> SqsSourceSpec {
    SqsSourceSpec {
        queue: queue.to_owned(),
        endpoint: Some(endpoint),
        // Each test has a runtime of its own, and connections end with the runtime that made them: nobody shares this one.
        access_key_id: Some(format!("walflow-{:08x}", fastrand::u32(..))),
        secret_access_key: Some(SECRET.into()),
        ..SqsSourceSpec::default()
    }
}

fn context() -> Context {
    Context {
        namespace: "orders".parse().unwrap(),
        number: 7,
        clock: Clock::system(),
        record_bytes: 1 << 20,
        key_window: Duration::from_secs(3_600),
        backlog_bytes: 1 << 30,
        strict: false,
    }
}

impl Bench {
    async fn new(suffix: &str) -> Self {
        let name = format!("t{:016x}{suffix}", fastrand::u64(..));
        let spec = spec(&name, server());
        let client = spec.account().connection().client().await.unwrap().clone();
        let mut bench = Self { client, url: String::new(), spec };
        bench.url = bench.make(&name).await;
        bench
    }

    async fn make(&self, name: &str) -> String {
        let mut make = self.client.create_queue().queue_name(name);
        if name.ends_with(".fifo") {
            make = make.attributes(Attribute::FifoQueue, "true");
        }
        make.send().await.unwrap().queue_url.unwrap()
    }

    fn open(&self) -> Sqs {
        Sqs::new(&self.spec, &context())
    }

    async fn receive(&self, url: &str, wait: i32) -> Vec<Message> {
        let asked = self.client.receive_message().queue_url(url).wait_time_seconds(wait).max_number_of_messages(10);
        let asked = asked.message_attribute_names("All").visibility_timeout(30);
        asked
            .customize()
            .config_override(crate::connection::sqs::for_polls())
            .send()
            .await
            .unwrap()
            .messages
            .unwrap_or_default()
    }

    /// Waits until the queue holds so many messages, visible or not.
    async fn until_left(&self, count: u64) {
        let left = async {
            loop {
                let asked = self.client.get_queue_attributes().queue_url(&self.url).attribute_names(Attribute::All);
                let counts = asked.send().await.unwrap().attributes.unwrap();
                let of = |name: Attribute| counts[&name].parse::<u64>().unwrap();
                let now =
                    of(Attribute::ApproximateNumberOfMessages) + of(Attribute::ApproximateNumberOfMessagesNotVisible);
                if now == count {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        assert!(tokio::time::timeout(PATIENCE, left).await.is_ok(), "the queue never held {count} messages");
    }
}

fn branch() -> BranchName {
    BranchName::new("sink", None)
}

fn record(key: Option<&str>, payload: impl Into<Bytes>) -> Arc<Record> {
    let now = Clock::system().now();
    let id = RecordId::new(now, fastrand::u16(..), 7, fastrand::u64(..));
    Arc::new(Record { key: key.map(Into::into), ..Record::new(id, now, payload.into()) })
}

async fn append(sqs: &Sqs, records: Vec<Arc<Record>>) -> Vec<Result<Position, AdmitError>> {
    sqs.append(records).await.unwrap().await
}

async fn appended(sqs: &Sqs, records: &[Arc<Record>]) {
    let outcomes = append(sqs, records.to_vec()).await;
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
}

async fn reader(sqs: &Sqs) -> Box<dyn Subscription> {
    sqs.open(&branch(), Begin::Earliest).await.unwrap().subscription
}

async fn read(reader: &mut dyn Subscription, count: usize) -> Vec<Entry> {
    let mut found = Vec::new();
    while found.len() < count {
        let next = tokio::time::timeout(PATIENCE, reader.next(count - found.len(), usize::MAX)).await;
        found.extend(next.unwrap_or_else(|_| panic!("only {} came", found.len())).unwrap());
    }
    found
}

fn end(sqs: &Sqs, entries: &[Entry]) {
    let ended: Vec<Position> = entries.iter().map(|entry| entry.position).collect();
    sqs.progress(&branch(), &Reach::none(), &ended);
}

fn payloads(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|entry| String::from_utf8_lossy(&entry.record.payload).into_owned()).collect()
}

fn letter() -> DeadLetter {
    DeadLetter {
        row: RowKey { position: Position(1), child: 0 },
        branch: branch(),
        at: Timestamp::from_millis(1_764_000_000_000),
        reason: DeadReason::Refused,
        attempts: 3,
        last_error: "no \u{1}such row".into(),
        stage: "sink".into(),
        revision: "1".into(),
        record: record(Some("k"), "{\"a\":1}"),
        rendered: None,
        overtaken: false,
    }
}

/// Waits until the broker says that this is wrong.
async fn until_trouble(sqs: &Sqs, what: &str) {
    let told = async {
        while !sqs.trouble().is_some_and(|trouble| trouble.contains(what)) {
            tokio::task::yield_now().await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, told).await.is_ok(), "{:?}", sqs.trouble());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn what_is_appended_is_read_as_it_was_and_gone_when_it_has_ended() {
    let bench = Bench::new("").await;
    let sqs = bench.open();
    let mut records: Vec<_> = (0..25).map(|n| record(Some("k"), n.to_string())).collect();
    let full = Record {
        headers: vec![("a".into(), "b".into())],
        tags: vec!["t".into()],
        priority: Some(3),
        origin: Some("eu".into()),
        idempotency_key: Some("i".into()),
        epoch: 4,
        ..(*record(Some("sch\u{f6}n \u{1}"), "{\"n\":1}")).clone()
    };
    records.push(Arc::new(full));
    appended(&sqs, &records).await;
    let mut reader = reader(&sqs).await;
    let entries = read(&mut *reader, records.len()).await;
    let mut found: Vec<_> = entries.iter().map(|entry| Arc::clone(&entry.record)).collect();
    found.sort_by_key(|record| record.id);
    records.sort_by_key(|record| record.id);
    assert_eq!(found, records);
    assert!(entries.is_sorted_by_key(|entry| entry.position));
    bench.until_left(26).await;
    end(&sqs, &entries[..20]);
    bench.until_left(6).await;
    end(&sqs, &entries[20..]);
    bench.until_left(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn one_that_sqs_refuses_in_a_batch_of_ten_fails_alone() {
    let bench = Bench::new("").await;
    let sqs = bench.open();
    let mut records: Vec<_> = (0..10).map(|n| record(None, n.to_string())).collect();
    // Longer than SQS delays.
    let due_at = Some(Clock::system().now().saturating_add(Duration::from_secs(3_600)));
    records[4] = Arc::new(Record { due_at, ..(*records[4]).clone() });
    let outcomes = append(&sqs, records).await;
    for (index, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Ok(_) => assert_ne!(index, 4),
            Err(error) => assert!(index == 4 && matches!(error, AdmitError::Unavailable { .. }), "{index}: {error:?}"),
        }
    }
    bench.until_left(9).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn what_a_reader_leaves_comes_again_at_once_and_what_has_ended_does_not() {
    let bench = Bench::new("").await;
    let sqs = bench.open();
    let records: Vec<_> = (0..6).map(|n| record(None, n.to_string())).collect();
    appended(&sqs, &records).await;
    let mut first = reader(&sqs).await;
    let entries = read(&mut *first, 6).await;
    end(&sqs, &entries[..3]);
    drop(first);
    // Their visibility would last a minute.
    let mut second = reader(&sqs).await;
    let again = read(&mut *second, 3).await;
    let sorted = |entries: &[Entry]| {
        let mut ids: Vec<_> = entries.iter().map(|entry| entry.record.id).collect();
        ids.sort();
        ids
    };
    assert_eq!(sorted(&again), sorted(&entries[3..]));
    assert!(entries[5].position < again[0].position, "positions of two readers meet");
    end(&sqs, &again);
    bench.until_left(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn a_stop_gives_back_what_was_not_read_and_another_process_goes_on() {
    let bench = Bench::new("").await;
    let sqs = bench.open();
    appended(&sqs, &(0..12).map(|n| record(None, n.to_string())).collect::<Vec<_>>()).await;
    let mut first = reader(&sqs).await;
    let entries = read(&mut *first, 2).await;
    end(&sqs, &entries);
    drop(first);
    sqs.close().await;
    assert!(matches!(sqs.append(vec![record(None, "late")]).await.err(), Some(AdmitError::Closed { .. })));
    let other = bench.open();
    let mut second = reader(&other).await;
    end(&other, &read(&mut *second, 10).await);
    bench.until_left(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn what_takes_longer_than_the_visibility_is_held() {
    let mut bench = Bench::new("").await;
    bench.spec.visibility = Span(Duration::from_secs(2));
    let sqs = bench.open();
    appended(&sqs, &[record(None, "slow"), record(None, "waits")]).await;
    let mut reader = reader(&sqs).await;
    let entries = read(&mut *reader, 1).await;
    // Somebody else waits for it three times as long: one is being delivered, one waits to be read.
    let others = bench.receive(&bench.url, 6).await;
    assert!(others.is_empty(), "{others:?}");
    end(&sqs, &entries);
    end(&sqs, &read(&mut *reader, 1).await);
    bench.until_left(0).await;
    assert_eq!(sqs.receiving.duplicates(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn a_fifo_queue_keeps_the_order_of_each_key_through_a_failure() {
    let bench = Bench::new(".fifo").await;
    let sqs = bench.open();
    assert!(sqs.caps().ordered && sqs.caps().delay.is_none());
    let records: Vec<_> = (0..30).map(|n| record(Some(["a", "b", "two words"][n % 3]), n.to_string())).collect();
    // Handed over in turn without waiting for SQS in between.
    let mut handed = Vec::new();
    for call in records.chunks(4) {
        handed.push(sqs.append(call.to_vec()).await.unwrap());
    }
    assert!(join_all(handed).await.iter().flatten().all(Result::is_ok));
    let mut got: Vec<Entry> = Vec::new();
    let mut first = reader(&sqs).await;
    // Of each key some end; the rest fail and the reader goes.
    let entries = read(&mut *first, 6).await;
    end(&sqs, &entries[..2]);
    got.extend_from_slice(&entries[..2]);
    drop(first);
    let mut second = reader(&sqs).await;
    while got.len() < 30 {
        let entries = read(&mut *second, 1).await;
        end(&sqs, &entries);
        got.extend(entries);
    }
    for key in ["a", "b", "two words"] {
        let order = |entries: Vec<&Record>| -> Vec<Bytes> {
            entries.into_iter().filter(|one| one.key.as_deref() == Some(key)).map(|one| one.payload.clone()).collect()
        };
        let expected = order(records.iter().map(AsRef::as_ref).collect());
        assert_eq!(order(got.iter().map(|entry| &*entry.record).collect()), expected, "key {key}");
    }
    bench.until_left(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn on_a_fifo_queue_the_same_write_twice_is_one_and_another_under_its_key_is_not_lost() {
    let bench = Bench::new(".fifo").await;
    let sqs = bench.open();
    let write = |payload: &'static str| {
        Arc::new(Record { idempotency_key: Some("i".into()), ..(*record(None, payload)).clone() })
    };
    let once = record(None, "same record");
    appended(&sqs, &[write("1"), write("1"), write("2"), Arc::clone(&once), once]).await;
    let mut reader = reader(&sqs).await;
    let mut found = payloads(&read(&mut *reader, 3).await);
    found.sort();
    assert_eq!(found, ["1", "2", "same record"]);
    bench.until_left(3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn a_delay_is_never_short() {
    let bench = Bench::new("").await;
    let sqs = bench.open();
    let clock = Clock::system();
    let mut reader = reader(&sqs).await;
    let due = |millis| Some(clock.now().saturating_add(Duration::from_millis(millis)));
    let delayed: Vec<_> = [700, 1_000, 1_900]
        .map(|after| Arc::new(Record { due_at: due(after), ..(*record(None, "d")).clone() }))
        .to_vec();
    appended(&sqs, &delayed).await;
    appended(&sqs, &[record(None, "now")]).await;
    assert_eq!(payloads(&read(&mut *reader, 1).await), ["now"]);
    for _ in &delayed {
        let entry = read(&mut *reader, 1).await.remove(0);
        assert!(entry.record.due_at.unwrap() <= clock.now());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn every_byte_of_every_payload_comes_back() {
    let bench = Bench::new("").await;
    let sqs = bench.open();
    let all: Vec<u8> = (0..=255).collect();
    let bodies: Vec<Bytes> = vec![
        all.into(),
        Bytes::new(),
        "gr\u{fc}n \u{1f600} \u{4e2d}".into(),
        "\u{0}\u{1}\u{b}\u{1f}\u{FFFE}\u{FFFF}".into(),
        "a\r\nb\rc\td  \n".into(),
        "<x>&amp;\"'</x> %00 +".into(),
    ];
    let records: Vec<_> = bodies.iter().map(|body| record(None, body.clone())).collect();
    appended(&sqs, &records).await;
    let mut reader = reader(&sqs).await;
    for entry in read(&mut *reader, bodies.len()).await {
        let sent = records.iter().find(|record| record.id == entry.record.id).unwrap();
        assert_eq!(&entry.record, sent);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn messages_of_other_programs_are_records() {
    let bench = Bench::new(".fifo").await;
    let colour = MessageAttributeValue::builder().data_type("String").string_value("red").build().unwrap();
    let before = Clock::system().now();
    let sent = bench.client.send_message().queue_url(&bench.url).message_body("{\"plain\":true}");
    let sent = sent.message_group_id("customer-1").message_deduplication_id("d").message_attributes("colour", colour);
    sent.send().await.unwrap();
    let sqs = bench.open();
    let mut first = reader(&sqs).await;
    let entry = read(&mut *first, 1).await.remove(0);
    drop(first);
    let mut second = reader(&sqs).await;
    let again = read(&mut *second, 1).await.remove(0);
    assert_eq!(entry.record, again.record, "it is another record when it comes again");
    let found = &entry.record;
    assert_eq!(found.payload, Bytes::from_static(b"{\"plain\":true}"));
    assert_eq!((found.key.as_deref(), found.binary), (Some("customer-1"), false));
    assert_eq!(found.headers, [("colour".into(), "red".into())]);
    assert!(found.written_at >= before && found.written_at <= Clock::system().now(), "{}", found.written_at);
    assert_eq!(found.id.namespace_number(), 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn what_is_too_large_is_refused_alone_and_what_is_let_in_fits() {
    let bench = Bench::new("").await;
    let sqs = bench.open();
    let limit = sqs.caps().largest_record.unwrap() as usize;
    let fits = record(None, vec![0; limit - 256]);
    let too_large = record(None, vec![0; 1 << 20]);
    let outcomes = append(&sqs, vec![too_large, fits, record(None, "small")]).await;
    assert!(matches!(outcomes[0], Err(AdmitError::TooLarge { limit: 1_048_576, .. })), "{:?}", outcomes[0]);
    assert!(outcomes[1].is_ok() && outcomes[2].is_ok(), "{outcomes:?}");
    bench.until_left(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn a_missing_queue_says_how_it_is_made_and_is_found_once_it_is_there() {
    let bench = Bench::new("").await;
    let name = format!("m{:016x}.fifo", fastrand::u64(..));
    let sqs = Sqs::new(&spec(&name, server()), &context());
    let refused = sqs.append(vec![record(None, "1")]).await.err().unwrap();
    let opened = sqs.open(&branch(), Begin::Earliest).await.err().unwrap().to_string();
    let command = format!("aws sqs create-queue --queue-name {name} --attributes FifoQueue=true");
    for text in [refused.to_string(), opened, sqs.trouble().unwrap()] {
        assert!(text.contains(&command) && !text.contains(SECRET), "{text}");
    }
    assert!(matches!(refused, AdmitError::Unavailable { .. }));
    bench.make(&name).await;
    let deadline = Clock::system().now().saturating_add(PATIENCE);
    while sqs.append(vec![record(None, "1")]).await.is_err() {
        assert!(Clock::system().now() < deadline, "it is not found");
    }
    assert_eq!(sqs.trouble(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_where_nobody_answers_is_named_without_the_secret() {
    // Bound and never listening: the connection is refused.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    let spec = spec("orders", format!("http://user:{SECRET}@{address}"));
    let sqs = Sqs::new(&spec, &context());
    let refused = sqs.append(vec![record(None, "1")]).await.err().unwrap();
    let opened = sqs.open(&branch(), Begin::Earliest).await.err().unwrap();
    assert!(matches!(refused, AdmitError::Unavailable { .. }), "nothing was sent: {refused:?}");
    for text in
        [refused.to_string(), opened.to_string(), sqs.trouble().unwrap(), sqs.durable_note(), format!("{spec:?}")]
    {
        assert!(!text.contains(SECRET), "{text}");
    }
    assert!(opened.to_string().contains(&address.to_string()), "{opened}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn a_queue_that_goes_away_is_an_alarm_and_the_next_one_is_read() {
    let bench = Bench::new("").await;
    let sqs = bench.open();
    let mut reader = reader(&sqs).await;
    appended(&sqs, &[record(None, "1")]).await;
    read(&mut *reader, 1).await;
    bench.client.delete_queue().queue_url(&bench.url).send().await.unwrap();
    until_trouble(&sqs, "aws sqs create-queue").await;
    bench.make(&bench.spec.queue).await;
    let deadline = Clock::system().now().saturating_add(PATIENCE);
    while sqs.append(vec![record(None, "2")]).await.is_err() {
        assert!(Clock::system().now() < deadline, "it is not found again");
    }
    assert_eq!(payloads(&read(&mut *reader, 1).await), ["2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn dead_letters_go_to_a_queue_with_their_reason() {
    let mut bench = Bench::new("").await;
    let letter = letter();
    let nowhere = bench.open().bury(vec![letter.clone()]).await.unwrap_err().to_string();
    assert!(nowhere.contains("source.sqs.dead_letters"), "{nowhere}");
    let dead = format!("{}-dead", bench.spec.queue);
    let url = bench.make(&dead).await;
    bench.spec.dead_letters = Some(dead);
    let sqs = bench.open();
    sqs.bury(vec![letter; 12]).await.unwrap();
    let found = bench.receive(&url, 5).await.remove(0);
    assert_eq!(found.body(), Some("{\"a\":1}"));
    let attributes = found.message_attributes.unwrap();
    let text = |name: &str| attributes[name].string_value().unwrap().to_owned();
    assert_eq!(
        [text("walflow-reason"), text("walflow-error"), text("walflow-attempts"), text("walflow-branch")],
        ["refused", "no such row", "3", "sink"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs WALFLOW_TEST_SQS: run tests/run"]
async fn a_second_branch_is_refused_and_a_renamed_one_goes_on() {
    let bench = Bench::new("").await;
    let sqs = bench.open();
    let mut first = reader(&sqs).await;
    let other = BranchName::new("other", None);
    let refused = sqs.open(&other, Begin::Latest).await.err().unwrap().to_string();
    assert!(refused.contains("one branch"), "{refused}");
    appended(&sqs, &[record(None, "1")]).await;
    read(&mut *first, 1).await;
    drop(first);
    sqs.rename(&branch(), &other).await.unwrap();
    let mut second = sqs.open(&other, Begin::Latest).await.unwrap().subscription;
    assert_eq!(payloads(&read(&mut *second, 1).await), ["1"]);
    sqs.queue.ask_depth().await;
    let lag = sqs.lag(&other);
    assert_eq!((lag.records, lag.oldest.is_some()), (1, true));
    sqs.forget(&other).await.unwrap();
    assert!(sqs.open(&branch(), Begin::Latest).await.is_ok());
}

#[tokio::test]
async fn what_cannot_work_is_a_fault_and_what_can_is_none() {
    let faults = |change: fn(&mut SqsSourceSpec)| {
        let mut spec = spec("orders.fifo", "http://127.0.0.1:9324".into());
        change(&mut spec);
        check(&spec).into_iter().map(|fault| fault.pointer).collect::<Vec<_>>()
    };
    assert!(faults(|_| {}).is_empty());
    assert!(faults(|spec| spec.queue = "https://sqs.eu-west-1.amazonaws.com/1/orders".into()).is_empty());
    assert_eq!(faults(|spec| spec.queue.clear()), ["/queue"]);
    assert_eq!(faults(|spec| spec.queue = "a b".into()), ["/queue"]);
    assert_eq!(faults(|spec| spec.dead_letters = Some("orders.fifo".into())), ["/dead_letters"]);
    assert_eq!(faults(|spec| spec.visibility = Span(Duration::from_millis(1_500))), ["/visibility"]);
    assert_eq!(faults(|spec| spec.visibility = Span(Duration::from_secs(50_000))), ["/visibility"]);
    assert_eq!(faults(|spec| spec.receivers = 0), ["/receivers"]);
    assert_eq!(faults(|spec| spec.access_key_id = None), ["/access_key_id"]);
}
