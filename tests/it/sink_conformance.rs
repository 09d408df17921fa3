//! What every sink keeps, whatever its protocol: payloads arrive as they came, a record that cannot be rendered is named
//! and hurts no other, nor does one that the target refuses; a target that is away is an outage and is found again without a
//! new sink, a dropped write can be sent again, and each key arrives in order through all of it. Kinds that need a server are
//! run against a real one.

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
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use walflow::clock::{Clock, Timestamp};
use walflow::record::{Record, RecordId};
use walflow::sink::stdout::StdoutSink;
use walflow::sink::{self, BatchStyle, Kind, Operation, Sink, SinkContext, Verdict};
use walflow::transform::Event;

use self::web::{Answer, Seen, Web};

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
    /// The sink; its address needs the payload's `to`, so that a record without one cannot be rendered.
    fn sink(&self) -> Box<dyn Sink>;
    /// False where every record can be rendered.
    fn may_fail_to_render(&self) -> bool {
        true
    }
    /// A payload that can be rendered and that the target itself refuses for good.
    fn refused(&self) -> Option<String> {
        None
    }
    /// False where nobody promises an order.
    fn keeps_order(&self) -> bool {
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
    let sink = target.sink();
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

    if let Some(refused) = target.refused() {
        let batch = [operation(13, PAYLOADS[0]), operation(14, &refused), operation(15, PAYLOADS[5])];
        let written = sink.write(&batch).await;
        assert_eq!(verdicts(&written), [(1, Verdict::Never)], "{written:?}");
        assert!(!written.failed[0].1.rendering, "the target said it: {written:?}");
        let arrived: BTreeSet<String> = target.arrived().await.into_iter().collect();
        assert_eq!(arrived, BTreeSet::from([PAYLOADS[0], PAYLOADS[5]].map(str::to_owned)));
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

    let batch = [operation(21, PAYLOADS[5])];
    // Dropped on the way: nobody knows what took effect, and the same can be sent again.
    {
        let mut write = sink.write(&batch);
        let _ = futures::poll!(&mut write);
    }
    assert_eq!(verdicts(&sink.write(&batch).await), []);
    let arrived = target.arrived().await;
    assert!(!arrived.is_empty() && arrived.iter().all(|payload| payload == PAYLOADS[5]), "{arrived:?}");
    each_key_arrives_in_order(&*sink, &mut target).await;
}

/// Records of one key.
const OF_A_KEY: u16 = 24;

/// Sends a key's records in order as a driver does: several in a batch where the sink allows that, the same again until taken.
async fn send_in_order(sink: &dyn Sink, key: u16, numbers: std::ops::Range<u16>) {
    let name = format!("key-{key}");
    let record = |n| keyed(1_000 + key * 100 + n, Some(&name), &json!({ "to": "a", "k": key, "n": n }).to_string());
    let mut left: Vec<Operation> = numbers.map(record).collect();
    let at_once = if sink.batch_style() == BatchStyle::Independent { 1 } else { 3 };
    while !left.is_empty() {
        let batch = &left[..at_once.min(left.len())];
        let failed = verdicts(&sink.write(batch).await);
        assert!(failed.iter().all(|(_, verdict)| *verdict != Verdict::Never), "{failed:?}");
        let taken = failed.first().map_or(batch.len(), |(first, _)| *first);
        left.drain(..taken);
        tokio::task::yield_now().await;
    }
}

/// Several keys side by side, with an outage on the way: of each what was sent again may stand twice, from an earlier point on
/// and then in order again.
async fn each_key_arrives_in_order(sink: &dyn Sink, target: &mut impl Target) {
    let all = async |numbers: std::ops::Range<u16>| {
        futures::future::join_all((0..4).map(|key| send_in_order(sink, key, numbers.clone()))).await;
    };
    all(0..8).await;
    let mut arrived = target.arrived().await;
    target.stop().await;
    // What is tried while it is away stays to be tried.
    let away = async {
        let sending = all(8..OF_A_KEY);
        tokio::pin!(sending);
        for _ in 0..3 {
            assert!(futures::poll!(&mut sending).is_pending());
            tokio::task::yield_now().await;
        }
        target.start().await;
        sending.await;
    };
    tokio::time::timeout(Duration::from_secs(60), away).await.expect("all of it is taken");
    arrived.extend(target.arrived().await);
    let mut of_keys = [const { Vec::new() }; 4];
    for payload in &arrived {
        let payload: serde_json::Value = serde_json::from_str(payload).unwrap();
        let (Some(key), Some(n)) = (payload["k"].as_u64(), payload["n"].as_u64()) else { panic!("{payload}") };
        of_keys[usize::try_from(key).unwrap()].push(n);
    }
    for mut numbers in of_keys {
        if !target.keeps_order() {
            numbers.sort_unstable();
        }
        let mut next = 0;
        for number in &numbers {
            assert!(*number <= next, "{number} came before {next}: {numbers:?}");
            next = number + 1;
        }
        assert_eq!(next, u64::from(OF_A_KEY), "{numbers:?}");
    }
}

struct Files {
    folder: tempfile::TempDir,
    read: usize,
}

impl Target for Files {
    fn sink(&self) -> Box<dyn Sink> {
        let path = format!("{}/out/{{payload.to}}.ndjson", self.folder.path().display());
        open(&Kind::File(serde_json::from_value(json!({ "path": path })).unwrap()), PathBuf::new())
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

/// What the receiver refuses.
const REFUSED: &str = r#"{"to":"a","refuse":"this"}"#;

/// The status of a receiver's answer, an error where it refuses.
fn answer(request: &Seen, status: u16) -> Result<u16, u16> {
    if request.body.contains("refuse") { Err(422) } else { Ok(status) }
}

struct Receiver {
    web: Web,
    batched: bool,
    read: usize,
}

impl Target for Receiver {
    fn sink(&self) -> Box<dyn Sink> {
        let url = if self.batched { self.web.url("/") } else { self.web.url("/{payload.to}") };
        let mut spec = json!({ "url": url, "timeout": "10s" });
        if self.batched {
            spec["format"] = "ndjson".into();
        }
        let spec = Box::new(serde_json::from_value(spec).unwrap());
        open(&Kind::Http { spec, batched: self.batched }, PathBuf::new())
    }

    fn may_fail_to_render(&self) -> bool {
        !self.batched
    }

    fn refused(&self) -> Option<String> {
        Some(REFUSED.to_owned())
    }

    async fn arrived(&mut self) -> Vec<String> {
        let seen = self.web.seen();
        let taken = |request: &&Seen| answer(request, 200).is_ok();
        let new: Vec<String> = seen.iter().skip(self.read).filter(taken).map(|request| request.body.clone()).collect();
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
    let sink = files.sink();
    assert_eq!(sink.batch_style(), BatchStyle::StopsAtFirstFailure);
    assert_eq!(verdicts(&sink.write(&[operation(0, PAYLOADS[0])]).await), []);
    assert_eq!(files.arrived().await, [PAYLOADS[0]]);
    conforms(files).await;
}

#[tokio::test]
async fn http_record_by_record_conforms() {
    let web = Web::start_with(|request| Answer::status(answer(request, 204).unwrap_or_else(|status| status))).await;
    conforms(Receiver { web, batched: false, read: 0 }).await;
}

#[tokio::test]
async fn http_in_batches_conforms() {
    let web = Web::start_with(|request| Answer::status(answer(request, 200).unwrap_or_else(|status| status))).await;
    conforms(Receiver { web, batched: true, read: 0 }).await;
}

/// A pipe that somebody reads, or nobody does.
#[derive(Clone, Default)]
struct Pipe {
    lines: Arc<Mutex<Vec<u8>>>,
    broken: Arc<AtomicBool>,
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        self.lines.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Target for Pipe {
    fn sink(&self) -> Box<dyn Sink> {
        Box::new(StdoutSink::new(self.clone(), &context(PathBuf::new())))
    }

    fn may_fail_to_render(&self) -> bool {
        false
    }

    async fn arrived(&mut self) -> Vec<String> {
        let lines = std::mem::take(&mut *self.lines.lock().unwrap());
        let payload = |line: &str| line.split_once(",\"payload\":").unwrap().1.strip_suffix('}').unwrap().to_owned();
        String::from_utf8(lines).unwrap().lines().map(payload).collect()
    }

    async fn stop(&mut self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    async fn start(&mut self) {
        self.broken.store(false, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn stdout_conforms() {
    conforms(Pipe::default()).await;
}
