//! `POST /api/v1/wal/write/batch`: NDJSON, one write a line, one result a line, in order.
//!
//! The body is never in memory as a whole: while groups of lines are being made durable the next lines are read, so many and
//! no more; then nothing is read until the oldest group is answered. Groups enter the log in line order. After the first
//! line that is not accepted what was not yet handed over is refused, so that a repetition reorders nothing.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;
use futures::{FutureExt as _, Stream, StreamExt as _};
use http::{HeaderMap, StatusCode};
use serde::Serialize;
use tokio::sync::mpsc;
use warp::reply::Reply as _;

use super::admit::Held;
use super::decode::Envelope;
use super::lines::Lines;
use super::reply::Problem;
use super::write::{Accepted, LARGEST_BODY, answer, is_json};
use super::{Directory, Incoming, Inlet, decode};
use crate::source::{Admitted, Write};

/// Lines that are made durable together, at most.
const MOST_LINES: usize = 512;
/// Their bytes at most, but for the last.
const MOST_BYTES: usize = 2 << 20;
/// Groups that may be under way, but for those of the last part that was read.
const MOST_GROUPS: usize = 32;
/// Their bytes, in the same way.
const MOST_UNDER_WAY: usize = 8 << 20;
/// A line that has begun is counted from this size on, in bytes.
const SMALL_LINE: u64 = 64 << 10;
/// Answers that are sent together, in bytes, but for the last.
const MOST_ANSWERS: usize = 64 << 10;
/// How long a client may leave answers unread.
const PATIENCE: Duration = Duration::from_secs(30);

/// Answers on their way to the client; the last is `None`.
type Answers = mpsc::Sender<Option<Bytes>>;

/// Makes many writes durable
///
/// NDJSON: one write a line, one result a line, in order, while the body is still coming in. After the first line that is
/// not `succeeded` the lines that were not yet handed over are `failed`, so that repeating from there reorders nothing.
#[utoipa::path(
    post,
    path = "/api/v1/wal/write/batch",
    tag = "writes",
    request_body(content = Envelope, content_type = "application/x-ndjson", description = "One write a line"),
    responses(
        (status = 200, description = "One result a line: what a single write would have been answered", body = Accepted, content_type = "application/x-ndjson"),
        (status = 415, description = "`content_type`: the body is not NDJSON; `content_encoding`: it is packed"),
    )
)]
pub(super) fn batch(directory: Arc<dyn Directory>, headers: &HeaderMap, body: Incoming) -> warp::reply::Response {
    let fine = directory.keys().check(headers).and_then(|()| {
        is_json(headers, &["application/x-ndjson", "application/ndjson", "application/jsonl", "application/json"])
    });
    if let Err(problem) = fine {
        return problem.failed().into_response();
    }
    let (answers, stream) = mpsc::channel(4);
    tokio::spawn(async move {
        let mut upload = Upload::new(directory, answers);
        // Whoever does not listen any more takes nothing back of what was handed over.
        let _ = upload.take(body).await;
    });
    let mut response = warp::reply::stream(told(stream)).into_response();
    let kind = http::HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    response
}

/// The answers as a body. One that ends without its last answer is cut off, so that nobody takes it for the whole.
fn told(answers: mpsc::Receiver<Option<Bytes>>) -> impl Stream<Item = io::Result<Bytes>> {
    futures::stream::unfold(Some(answers), |answers| async {
        let mut answers = answers?;
        match answers.recv().await {
            Some(Some(lines)) => Some((Ok(lines), Some(answers))),
            Some(None) => None,
            None => Some((Err(io::ErrorKind::ConnectionAborted.into()), None)),
        }
    })
}

/// Lines that were read and are not handed over yet, all for one namespace.
#[derive(Default)]
struct Group {
    inlet: Option<Arc<Inlet>>,
    writes: Vec<Write>,
    bytes: usize,
}

impl Group {
    fn takes(&self, inlet: &Arc<Inlet>) -> bool {
        let same = self.inlet.as_ref().is_none_or(|open| Arc::ptr_eq(open, inlet));
        same && self.writes.len() < MOST_LINES && self.bytes < MOST_BYTES
    }
}

/// A group of which the log has said what became of it.
struct Done {
    inlet: Arc<Inlet>,
    lines: usize,
    bytes: usize,
    admitted: Result<Vec<Admitted>, Problem>,
}

struct Upload {
    directory: Arc<dyn Directory>,
    answers: Answers,
    /// Answers that are not sent yet.
    lines: Vec<u8>,
    group: Group,
    /// Groups that have their place in the log, in the order of their lines.
    under_way: FuturesOrdered<BoxFuture<'static, Done>>,
    bytes_under_way: usize,
    /// Bytes of the line that has begun.
    begun: Option<Held>,
    /// No further line is taken. Nothing is under way then.
    stopped: bool,
}

/// Nobody listens any more.
struct Gone;

impl Upload {
    fn new(directory: Arc<dyn Directory>, answers: Answers) -> Self {
        let (lines, group, under_way) = (Vec::new(), Group::default(), FuturesOrdered::new());
        Self { directory, answers, lines, group, under_way, bytes_under_way: 0, begun: None, stopped: false }
    }

    async fn take(&mut self, mut body: Incoming) -> Result<(), Gone> {
        let mut lines = Lines::default();
        loop {
            let part = tokio::select! {
                biased;
                Some(done) = self.under_way.next(), if !self.under_way.is_empty() => {
                    self.settle(done).await?;
                    continue;
                }
                part = body.next(), if self.has_room() => part,
            };
            match part {
                Ok(Some(part)) => lines.feed(part),
                Ok(None) => break,
                Err(problem) => {
                    self.refuse(problem).await?;
                    return self.end().await;
                }
            }
            while let Some(line) = lines.next() {
                self.line(line).await?;
            }
            if let Err(problem) = self.begin(lines.begun() as u64) {
                self.refuse(problem).await?;
                return self.end().await;
            }
            // What has come is handed over before more is waited for.
            self.hand_over().await?;
            self.send().await?;
        }
        self.line(lines.last()).await?;
        self.hand_over().await?;
        self.drain().await?;
        self.end().await
    }

    /// Counts a line that is not whole yet against the instance's budget, unless it is small.
    fn begin(&mut self, bytes: u64) -> Result<(), Problem> {
        if bytes > LARGEST_BODY {
            return Err(Problem::too_large(bytes, LARGEST_BODY));
        }
        // A whole line is counted with its group.
        self.begun = None;
        if bytes > SMALL_LINE {
            self.begun = Some(self.directory.instance_budget().take(bytes)?);
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.under_way.len() < MOST_GROUPS && self.bytes_under_way < MOST_UNDER_WAY
    }

    async fn line(&mut self, line: Bytes) -> Result<(), Gone> {
        if line.is_empty() {
            return Ok(());
        }
        if self.stopped {
            put(&mut self.lines, &earlier().body());
            return if self.lines.len() < MOST_ANSWERS { Ok(()) } else { self.send().await };
        }
        match self.read(&line) {
            Ok((inlet, write)) => {
                if !self.group.takes(&inlet) {
                    self.hand_over().await?;
                }
                self.group.inlet = Some(inlet);
                self.group.bytes += line.len();
                self.group.writes.push(write);
                Ok(())
            }
            Err(problem) => self.refuse(problem).await,
        }
    }

    fn read(&self, line: &Bytes) -> Result<(Arc<Inlet>, Write), Problem> {
        let envelope = decode::envelope(line)?;
        let inlet = self.directory.inlet(&envelope.namespace)?;
        let write = inlet.budget.count(1).and_then(|()| envelope.write(&inlet, line, None));
        let write = write.inspect_err(|_| inlet.received.refuse(1))?;
        Ok((inlet, write))
    }

    /// Gives the group its place in the log. Waits for that, not for the disk.
    async fn hand_over(&mut self) -> Result<(), Gone> {
        let Group { inlet: Some(inlet), writes, bytes } = std::mem::take(&mut self.group) else { return Ok(()) };
        let lines = writes.len();
        let held = loop {
            match self.hold(&inlet, bytes) {
                Ok(held) => break Ok(held),
                // As long as it is our own writes that fill the budget they are waited for.
                Err(problem) => match self.under_way.next().await {
                    Some(done) => self.settle(done).await?,
                    None => break Err(problem),
                },
            }
        };
        if self.stopped {
            return self.fail(&inlet, lines, &earlier()).await;
        }
        let entered = match held {
            Ok(held) => inlet.log.enter(writes).await.map(|entered| (held, entered)).map_err(Problem::from),
            Err(problem) => Err(problem),
        };
        match entered {
            Ok((held, entered)) => {
                self.bytes_under_way += bytes;
                let done = async move {
                    let admitted = entered.await.map_err(Problem::from);
                    drop(held);
                    Done { inlet, lines, bytes, admitted }
                };
                self.under_way.push_back(done.boxed());
                Ok(())
            }
            Err(problem) => {
                self.drain().await?;
                self.stopped = true;
                self.fail(&inlet, lines, &problem).await
            }
        }
    }

    fn hold(&self, inlet: &Inlet, bytes: usize) -> Result<(Held, Held), Problem> {
        Ok((self.directory.instance_budget().take(bytes as u64)?, inlet.budget.take(bytes as u64)?))
    }

    /// Answers a group. When it was not taken, what was handed over behind it is answered as it turns out.
    async fn settle(&mut self, done: Done) -> Result<(), Gone> {
        self.answer(done);
        if self.stopped {
            while let Some(done) = self.under_way.next().await {
                self.answer(done);
            }
        }
        self.send().await
    }

    fn answer(&mut self, done: Done) {
        let Done { inlet, lines, bytes, admitted } = done;
        self.bytes_under_way -= bytes;
        match admitted {
            Ok(admitted) => {
                inlet.received.accept(lines, bytes);
                for one in &admitted {
                    // The group was taken as a whole: a key that was used before changes nothing for the others in it.
                    match answer(one) {
                        Ok(body) => put(&mut self.lines, &body),
                        Err(problem) => {
                            self.stopped = true;
                            put(&mut self.lines, &problem.failed().body());
                        }
                    }
                }
            }
            Err(problem) => {
                self.stopped = true;
                inlet.received.refuse(lines);
                let problem = problem.failed();
                (0..lines).for_each(|_| put(&mut self.lines, &problem.body()));
            }
        }
    }

    /// Waits for everything that is under way.
    async fn drain(&mut self) -> Result<(), Gone> {
        while let Some(done) = self.under_way.next().await {
            self.settle(done).await?;
        }
        Ok(())
    }

    /// Answers the line that ends the taking, after all lines before it.
    async fn refuse(&mut self, problem: Problem) -> Result<(), Gone> {
        self.hand_over().await?;
        self.drain().await?;
        let problem = if std::mem::replace(&mut self.stopped, true) { earlier() } else { problem };
        put(&mut self.lines, &problem.failed().body());
        self.send().await
    }

    async fn fail(&mut self, inlet: &Inlet, lines: usize, problem: &Problem) -> Result<(), Gone> {
        inlet.received.refuse(lines);
        let problem = problem.clone().failed();
        (0..lines).for_each(|_| put(&mut self.lines, &problem.body()));
        self.send().await
    }

    async fn send(&mut self) -> Result<(), Gone> {
        if self.lines.is_empty() {
            return Ok(());
        }
        let lines = std::mem::take(&mut self.lines).into();
        self.answers.send_timeout(Some(lines), PATIENCE).await.map_err(|_| Gone)
    }

    async fn end(&mut self) -> Result<(), Gone> {
        self.send().await?;
        self.answers.send_timeout(None, PATIENCE).await.map_err(|_| Gone)
    }
}

fn earlier() -> Problem {
    let detail = "an earlier line was not accepted; repeat from there";
    Problem::new(StatusCode::FAILED_DEPENDENCY, "earlier_line", detail).failed()
}

fn put(lines: &mut Vec<u8>, body: &impl Serialize) {
    // A value always has a JSON form.
    let _ = serde_json::to_writer(&mut *lines, body);
    lines.push(b'\n');
}

#[cfg(test)]
mod tests;
