//! `POST /api/v1/wal/write/batch`: NDJSON, one write a line, one result a line, in order.
//!
//! The body is never in memory as a whole: a group of lines is read, made durable and answered before the next. After the
//! first line that is not accepted the rest is refused, so that a repetition reorders nothing.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use warp::reply::Reply as _;

use super::decode::Envelope;
use super::reply::Problem;
use super::write::{Accepted, LARGEST_BODY, answer, is_json};
use super::{Directory, Incoming, Inlet, decode};
use crate::source::Write;

/// Lines that are made durable together, at most.
const MOST_LINES: usize = 512;
/// Their bytes at most, but for the last.
const MOST_BYTES: usize = 2 << 20;

type Answers = mpsc::Sender<Result<Bytes, std::convert::Infallible>>;

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
        (status = 415, description = "`content_type`: the body is not NDJSON"),
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
    tokio::spawn(run(directory, body, answers));
    let mut response = warp::reply::stream(ReceiverStream::new(stream)).into_response();
    let kind = http::HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    response
}

/// Lines that were read and are not answered yet, all for one namespace.
#[derive(Default)]
struct Group {
    inlet: Option<Arc<Inlet>>,
    writes: Vec<Write>,
    bytes: usize,
}

struct Run {
    directory: Arc<dyn Directory>,
    answers: Answers,
    group: Group,
    /// Why no further line is taken.
    stopped: bool,
}

async fn run(directory: Arc<dyn Directory>, mut body: Incoming, answers: Answers) {
    let mut run = Run { directory, answers, group: Group::default(), stopped: false };
    let mut rest = BytesMut::new();
    loop {
        let part = match body.next().await {
            Ok(Some(part)) => part,
            Ok(None) => break,
            Err(problem) => {
                let _ = run.flush().await;
                let _ = run.refuse(&problem).await;
                return;
            }
        };
        rest.extend_from_slice(&part);
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line = rest.split_to(end + 1).freeze();
            if run.line(line).await.is_err() {
                return;
            }
        }
        if rest.len() as u64 > LARGEST_BODY {
            let _ = run.flush().await;
            let _ = run.refuse(&Problem::too_large(rest.len() as u64, LARGEST_BODY)).await;
            return;
        }
        // What has come is made durable before more is waited for.
        if run.flush().await.is_err() {
            return;
        }
    }
    if run.line(rest.freeze()).await.is_ok() {
        let _ = run.flush().await;
    }
}

/// Nobody listens any more.
struct Gone;

impl Run {
    async fn line(&mut self, line: Bytes) -> Result<(), Gone> {
        let line = line.slice_ref(line.trim_ascii());
        if line.is_empty() {
            return Ok(());
        }
        if self.stopped {
            return self.refuse(&earlier()).await;
        }
        let decoded = decode::envelope(&line).and_then(|envelope| {
            let inlet = self.directory.inlet(&envelope.namespace)?;
            let write = inlet.budget.count(1).and_then(|()| envelope.write(&inlet, &line, None));
            let write = write.inspect_err(|_| inlet.received.refuse(1))?;
            Ok((write, inlet))
        });
        match decoded {
            Ok((write, inlet)) => {
                let same = self.group.inlet.as_ref().is_none_or(|open| Arc::ptr_eq(open, &inlet));
                if !same || self.group.writes.len() >= MOST_LINES || self.group.bytes >= MOST_BYTES {
                    self.flush().await?;
                    if self.stopped {
                        return self.refuse(&earlier()).await;
                    }
                }
                self.group.inlet = Some(inlet);
                self.group.bytes += line.len();
                self.group.writes.push(write);
                Ok(())
            }
            Err(problem) => {
                self.flush().await?;
                let problem = if self.stopped { earlier() } else { problem };
                self.stopped = true;
                self.refuse(&problem).await
            }
        }
    }

    /// Makes the group durable and answers its lines.
    async fn flush(&mut self) -> Result<(), Gone> {
        let group = std::mem::take(&mut self.group);
        let Some(inlet) = group.inlet else { return Ok(()) };
        let count = group.writes.len();
        let held =
            match (self.directory.instance_budget().take(group.bytes as u64), inlet.budget.take(group.bytes as u64)) {
                (Ok(one), Ok(other)) => Ok((one, other)),
                (Err(problem), _) | (_, Err(problem)) => Err(problem),
            };
        let admitted = match &held {
            Ok(_) => inlet.log.admit(group.writes).await.map_err(Problem::from),
            Err(problem) => Err(problem.clone()),
        };
        let mut lines = Vec::with_capacity(count * 160);
        match admitted {
            Ok(admitted) => {
                inlet.received.accept(count, group.bytes);
                for one in &admitted {
                    // The group was taken as a whole: a key that was used before changes nothing for the others.
                    match answer(one) {
                        Ok(body) => put(&mut lines, &body),
                        Err(problem) => put(&mut lines, &problem.failed().body()),
                    }
                }
            }
            Err(problem) => {
                self.stopped = true;
                inlet.received.refuse(count);
                let problem = problem.failed();
                (0..count).for_each(|_| put(&mut lines, &problem.body()));
            }
        }
        self.answers.send(Ok(lines.into())).await.map_err(|_| Gone)
    }

    async fn refuse(&self, problem: &Problem) -> Result<(), Gone> {
        let mut line = Vec::new();
        put(&mut line, &problem.clone().failed().body());
        self.answers.send(Ok(line.into())).await.map_err(|_| Gone)
    }
}

fn earlier() -> Problem {
    Problem::new(StatusCode::FAILED_DEPENDENCY, "earlier_line", "an earlier line was not accepted; repeat from there")
}

fn put(lines: &mut Vec<u8>, body: &impl Serialize) {
    // A value always has a JSON form.
    let _ = serde_json::to_writer(&mut *lines, body);
    lines.push(b'\n');
}
