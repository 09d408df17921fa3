//! What every sink keeps, whatever its protocol: payloads arrive as they came, a record that cannot be rendered is named
//! and hurts no other, a target that is away is an outage and is found again without a new sink, a dropped write can be
//! sent again. Kinds that need a server are run against a real one.

mod http;
pub(crate) mod postgres;
mod postgres_copy;
mod postgres_faults;
mod postgres_servers;
mod postgres_types;
mod queues;
mod redis;
mod redis_cluster;
mod tls;
mod web;

use std::collections::BTreeSet;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use walflow::clock::{Clock, Timestamp};
use walflow::record::{Record, RecordId};
use walflow::sink::{self, BatchStyle, Kind, Operation, Sink, SinkContext, Verdict};
use walflow::transform::Event;

use self::web::{Answer, Web};

pub(crate) fn context(folder: PathBuf) -> SinkContext {
    SinkContext { folder, namespace: "orders".into(), sink: "main".into(), clock: Clock::system() }
}

pub(crate) fn open(kind: &Kind, folder: PathBuf) -> Box<dyn Sink> {
    sink::open(kind, &context(folder)).unwrap()
}

/// An operation; `number` makes its id.
pub(crate) fn operation(number: u16, payload: &str) -> Operation {
    keyed(number, None, payload)
}

pub(crate) fn keyed(number: u16, key: Option<&str>, payload: &str) -> Operation {
    let at = Timestamp::from_millis(1_700_000_000_000);
    let payload = Bytes::copy_from_slice(payload.as_bytes());
    let bare = Record::new(RecordId::new(at, number, 1, 1), at, payload);
    let record = Record { key: key.map(Into::into), epoch: 1, ..bare };
    Operation { event: Event::original(Arc::new(record)), case: 0, region: None }
}

pub(crate) fn verdicts(written: &sink::Written) -> Vec<(usize, Verdict)> {
    written.failed.iter().map(|(index, failure)| (*index, failure.verdict)).collect()
}

/// Payloads that a careless sink would change; each names its file or address by `to`.
const PAYLOADS: [&str; 6] = [
    r#"{"to":"a","n":1.10,"big":12345678901234567890123}"#,
    "{ \"to\" : \"a\" , \"t\" : \"\\u00e9 \\n é\" }",
    r#"{"to":"a","z":1,"a":{"y":[ ],"b":null}}"#,
    r#"{"to":"a","to2":"{key} {{x}} ${HOME}"}"#,
    r#"{"to":"a","e":1e400,"m":-0.0}"#,
    r#"{"to":"a"}"#,
];

/// One kind of target: where a sink writes, and what arrived there.
trait Target {
    /// The sink's kind; its address needs the payload's `to`, so that a record without one cannot be rendered.
    fn kind(&self) -> Kind;
    /// False where every record can be rendered.
    fn may_fail_to_render(&self) -> bool {
        true
    }
    /// What arrived since the last call, in order, by payload.
    fn arrived(&mut self) -> impl Future<Output = Vec<String>>;
    /// Takes the target away.
    fn stop(&mut self) -> impl Future<Output = ()>;
    /// Brings it back under the same address.
    fn start(&mut self) -> impl Future<Output = ()>;
}

async fn conforms(mut target: impl Target) {
    let folder = tempfile::tempdir().unwrap();
    let sink = open(&target.kind(), folder.path().to_owned());
    let style = sink.batch_style();

    let batch: Vec<Operation> = (0..).zip(PAYLOADS).map(|(number, payload)| operation(number, payload)).collect();
    assert_eq!(verdicts(&sink.write(&batch).await), []);
    let arrived = target.arrived().await;
    if style == BatchStyle::Independent {
        let sorted: BTreeSet<&str> = arrived.iter().map(String::as_str).collect();
        assert_eq!(sorted, BTreeSet::from(PAYLOADS));
        assert_eq!(arrived.len(), PAYLOADS.len());
    } else {
        assert_eq!(arrived, PAYLOADS, "in order and untouched");
    }

    if target.may_fail_to_render() {
        let batch = [operation(10, PAYLOADS[0]), operation(11, r#"{"no":"address"}"#), operation(12, PAYLOADS[5])];
        let written = sink.write(&batch).await;
        assert_eq!(verdicts(&written), [(1, Verdict::Never)]);
        assert!(written.failed[0].1.rendering && written.failed[0].1.message.contains("payload.to"), "{written:?}");
        let arrived = target.arrived().await;
        let expected: &[&str] = match style {
            BatchStyle::StopsAtFirstFailure => &[PAYLOADS[0]],
            BatchStyle::Atomic | BatchStyle::Independent => &[PAYLOADS[0], PAYLOADS[5]],
        };
        assert_eq!(arrived.iter().map(String::as_str).collect::<BTreeSet<_>>(), expected.iter().copied().collect());
    }

    target.stop().await;
    let batch = [operation(20, PAYLOADS[5])];
    // A connection that stood open may be found broken first; after it there is none, and that is an outage.
    let first = verdicts(&sink.write(&batch).await);
    assert!(matches!(first[..], [(0, Verdict::Down | Verdict::Backoff)]), "{first:?}");
    for _ in 0..3 {
        assert_eq!(verdicts(&sink.write(&batch).await), [(0, Verdict::Down)], "an outage, not the record's fault");
    }
    target.start().await;
    // A sink may keep a short wait between two attempts to connect.
    let back = tokio::time::timeout(Duration::from_secs(20), async {
        while !sink.write(&batch).await.failed.is_empty() {
            tokio::task::yield_now().await;
        }
    });
    back.await.expect("the target is found again");
    assert_eq!(target.arrived().await, [PAYLOADS[5]]);

    // Dropped on the way: nobody knows what took effect, and the same can be sent again.
    {
        let mut write = sink.write(&batch);
        let _ = futures::poll!(&mut write);
    }
    assert_eq!(verdicts(&sink.write(&batch).await), []);
    let arrived = target.arrived().await;
    assert!(!arrived.is_empty() && arrived.iter().all(|payload| payload == PAYLOADS[5]), "{arrived:?}");
}

struct Files {
    folder: tempfile::TempDir,
    read: usize,
}

impl Target for Files {
    fn kind(&self) -> Kind {
        let path = format!("{}/out/{{payload.to}}.ndjson", self.folder.path().display());
        Kind::File(serde_json::from_value(json!({ "path": path })).unwrap())
    }

    async fn arrived(&mut self) -> Vec<String> {
        let text = std::fs::read_to_string(self.folder.path().join("out/a.ndjson")).unwrap_or_default();
        let lines: Vec<String> = text.lines().skip(self.read).map(str::to_owned).collect();
        self.read += lines.len();
        lines
    }

    async fn stop(&mut self) {
        // A file stands where the folder was.
        std::fs::rename(self.folder.path().join("out"), self.folder.path().join("kept")).unwrap();
        std::fs::write(self.folder.path().join("out"), "in the way").unwrap();
    }

    async fn start(&mut self) {
        std::fs::remove_file(self.folder.path().join("out")).unwrap();
        std::fs::rename(self.folder.path().join("kept"), self.folder.path().join("out")).unwrap();
    }
}

struct Receiver {
    web: Web,
    batched: bool,
    read: usize,
}

impl Target for Receiver {
    fn kind(&self) -> Kind {
        let url = if self.batched { self.web.url("/") } else { self.web.url("/{payload.to}") };
        let mut spec = json!({ "url": url, "timeout": "10s" });
        if self.batched {
            spec["format"] = "ndjson".into();
        }
        Kind::Http { spec: Box::new(serde_json::from_value(spec).unwrap()), batched: self.batched }
    }

    fn may_fail_to_render(&self) -> bool {
        !self.batched
    }

    async fn arrived(&mut self) -> Vec<String> {
        let seen = self.web.seen();
        let new: Vec<String> = seen.iter().skip(self.read).map(|request| request.body.clone()).collect();
        self.read = seen.len();
        new.iter().flat_map(|body| body.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
    }

    async fn stop(&mut self) {
        self.web.stop().await;
    }

    async fn start(&mut self) {
        self.web.start().await;
    }
}

#[tokio::test]
async fn file_conforms() {
    let folder = tempfile::tempdir().unwrap();
    // The path is literal up to a folder, so a file in the folder's place is told from a value that names none.
    let mut files = Files { folder, read: 0 };
    let sink = open(&files.kind(), PathBuf::new());
    assert_eq!(sink.batch_style(), BatchStyle::StopsAtFirstFailure);
    assert_eq!(verdicts(&sink.write(&[operation(0, PAYLOADS[0])]).await), []);
    assert_eq!(files.arrived().await, [PAYLOADS[0]]);
    conforms(files).await;
}

#[tokio::test]
async fn http_record_by_record_conforms() {
    conforms(Receiver { web: Web::start_with(|_| Answer::status(204)).await, batched: false, read: 0 }).await;
}

#[tokio::test]
async fn http_in_batches_conforms() {
    conforms(Receiver { web: Web::start_with(|_| Answer::status(200)).await, batched: true, read: 0 }).await;
}
