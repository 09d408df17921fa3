//! What the tests of this folder share: a namespace whose log does what the test says, and requests to it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, ready};
use futures::{FutureExt as _, Stream};
use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use super::reply::Problem;
use super::{Budget, Directory, Incoming, Inlet, Keys, Outlet, Received};
use crate::clock::{Clock, Timestamp};
use crate::record::{Position, RecordId, TargetKind};
use crate::source::{
    AdmitError, Admitted, BranchName, BranchStart, Caps, Entered, Epoch, Found, Lag, Log, LogError, Reach, Start, Write,
};

/// Longer than every bound that is tested.
pub(super) const LONG: Duration = Duration::from_secs(3_600);

/// What the log made of a group, as the test says it.
pub(super) type Verdict = Result<Vec<Admitted>, AdmitError>;

/// Writes that were handed to the log.
pub(super) struct Handed {
    pub(super) payloads: Vec<Bytes>,
    pub(super) verdict: oneshot::Sender<Verdict>,
}

impl Handed {
    /// Takes all of them.
    pub(super) fn take(self) {
        let admitted = (0..self.payloads.len()).map(|_| appended()).collect();
        let _ = self.verdict.send(Ok(admitted));
    }

    pub(super) fn refuse(self, error: AdmitError) {
        let _ = self.verdict.send(Err(error));
    }
}

/// A write that the log took.
pub(super) fn appended() -> Admitted {
    Admitted::Appended { id: RecordId::new(Timestamp::MIN, 0, 1, 1), written_at: Timestamp::MIN, position: Position(1) }
}

/// A log that hands every group to the test and waits for its verdict.
struct Script {
    handed: mpsc::Sender<Handed>,
    caps: Caps,
}

impl Log for Script {
    fn caps(&self) -> Caps {
        self.caps
    }

    fn admit(&self, writes: Vec<Write>) -> BoxFuture<'static, Result<Vec<Admitted>, AdmitError>> {
        let entering = self.enter(writes);
        async move { entering.await?.await }.boxed()
    }

    fn enter(&self, writes: Vec<Write>) -> BoxFuture<'static, Result<Entered, AdmitError>> {
        let payloads = writes.into_iter().map(|write| write.record.payload).collect();
        let (verdict, answer) = oneshot::channel();
        self.handed.try_send(Handed { payloads, verdict }).unwrap();
        ready(Ok(async move { answer.await.unwrap() }.boxed())).boxed()
    }

    fn open_branch(&self, _: &BranchName, _: Start) -> BoxFuture<'static, Result<BranchStart, LogError>> {
        unused()
    }

    fn forget_branch(&self, _: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        unused()
    }

    fn rename_branch(&self, _: &BranchName, _: &BranchName) -> BoxFuture<'static, Result<(), LogError>> {
        unused()
    }

    fn branches(&self) -> Vec<BranchName> {
        Vec::new()
    }

    fn lag(&self, _: &BranchName) -> Lag {
        Lag::default()
    }

    fn end(&self) -> Reach {
        Reach::none()
    }

    fn find(&self, _: RecordId) -> BoxFuture<'static, Result<Option<Found>, LogError>> {
        unused()
    }

    fn put_epoch(&self, _: Bytes) -> BoxFuture<'static, Result<Epoch, LogError>> {
        unused()
    }

    fn epochs(&self) -> Vec<Epoch> {
        Vec::new()
    }
}

fn unused<T: Send + 'static>() -> BoxFuture<'static, Result<T, LogError>> {
    ready(Err(LogError::Unsupported("the double only takes writes"))).boxed()
}

/// A directory of the one namespace `desk`.
pub(super) struct Desk {
    inlet: Arc<Inlet>,
    instance: Arc<Budget>,
    keys: Keys,
}

/// The namespace `desk`, where `bytes` may be in flight, and what its log is handed.
pub(super) fn desk(bytes: u64) -> (Arc<Desk>, mpsc::Receiver<Handed>) {
    let (handed, told) = mpsc::channel(1_000);
    let caps = Caps {
        delay: false,
        max_delay: None,
        hold: false,
        schedule: false,
        ordered: true,
        exact_keys: true,
        look_up: false,
        durable: true,
        set_aside: true,
        pause: true,
        shared: false,
        each_end: false,
    };
    let inlet = Inlet {
        namespace: "desk".parse().unwrap(),
        log: Arc::new(Script { handed, caps }),
        delay: None,
        schema: None,
        key: None,
        idempotency: None,
        record_bytes: 1 << 20,
        budget: Budget::new(bytes, None),
        received: Arc::new(Received::default()),
        origin: None,
        outlets: vec![Outlet { sink: "stdout".into(), region: None, kind: TargetKind::Queue }],
        clock: Clock::manual(Timestamp::MIN),
    };
    let desk = Desk { inlet: Arc::new(inlet), instance: Budget::new(1 << 30, None), keys: Keys::default() };
    (Arc::new(desk), told)
}

impl Directory for Desk {
    fn inlet(&self, namespace: &str) -> Result<Arc<Inlet>, Problem> {
        if namespace == "desk" { Ok(Arc::clone(&self.inlet)) } else { Err(Problem::no_namespace(namespace)) }
    }

    fn instance_budget(&self) -> &Arc<Budget> {
        &self.instance
    }

    fn keys(&self) -> &Keys {
        &self.keys
    }
}

/// A write of `payload`, as a line.
pub(super) fn line(payload: u32) -> String {
    format!("{{\"namespace\":\"desk\",\"payload\":{payload}}}\n")
}

/// A body whose parts the test sends; it ends when the sender is dropped.
pub(super) fn body() -> (mpsc::Sender<String>, Incoming) {
    let (parts, received) = mpsc::channel(1);
    let stream = tokio_stream::wrappers::ReceiverStream::new(received);
    (parts, incoming(futures::StreamExt::map(stream, |part: String| Ok(Bytes::from(part)))))
}

/// A body of these parts.
pub(super) fn incoming(parts: impl Stream<Item = Result<Bytes, warp::Error>> + Send + Sync + 'static) -> Incoming {
    Incoming::new(parts)
}

/// The next lines of an answer; `None` = it has ended, an error = it was cut off.
pub(super) async fn next_lines(response: &mut warp::reply::Response) -> Result<Option<Vec<Value>>, String> {
    let frame = tokio::time::timeout(LONG, response.body_mut().frame()).await.expect("no answer");
    let Some(frame) = frame else { return Ok(None) };
    let bytes = frame.map_err(|error| error.to_string())?.into_data().unwrap();
    let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    Ok(Some(lines.map(|line| serde_json::from_slice(line).unwrap()).collect()))
}

/// The next group that the log is handed; where time stands still a wait in vain ends at once.
pub(super) async fn next(log: &mut mpsc::Receiver<Handed>) -> Handed {
    tokio::time::timeout(LONG, log.recv()).await.expect("nothing was handed over").unwrap()
}

/// The rest of an answer's lines.
pub(super) async fn all_lines(response: &mut warp::reply::Response) -> Vec<Value> {
    let mut all = Vec::new();
    while let Some(lines) = next_lines(response).await.unwrap() {
        all.extend(lines);
    }
    all
}

/// Lets every task of a runtime whose time stands still come to rest.
pub(super) async fn at_rest() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}
