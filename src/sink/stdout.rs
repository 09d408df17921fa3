//! `stdout`: each record as one line of JSON on standard output, for a person who watches or a program behind a pipe.
//!
//! A line is `{"namespace":…,"region":…,"key":…,"id":…,"payload":…}`; region and key only where there are any, the payload's
//! own bytes (on one line), `payloadBase64` instead where it is not JSON. A pipe that nobody reads any more is an outage:
//! the branch waits. Lines of several branches never mix.

use std::io::Write;
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BatchStyle, Failure, Operation, Sink, SinkContext, Verdict, Written, json};

/// `stdout:` — each record as one line of JSON on standard output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StdoutSpec {}

/// Lines on standard output, or on another writer in tests.
pub struct StdoutSink<W = std::io::Stdout> {
    writer: Arc<Mutex<W>>,
    namespace: Arc<str>,
}

impl<W: Write + Send + 'static> StdoutSink<W> {
    /// A sink that writes lines to `writer`.
    pub fn new(writer: W, context: &SinkContext) -> Self {
        Self { writer: Arc::new(Mutex::new(writer)), namespace: context.namespace.clone() }
    }

    fn line(&self, operation: &Operation, out: &mut Vec<u8>) {
        let mut member = |name: &str, value: &str| {
            out.push(if out.last().is_none_or(|byte| *byte == b'\n') { b'{' } else { b',' });
            // Writing a text into memory cannot fail.
            let _ = serde_json::to_writer(&mut *out, name);
            out.push(b':');
            let _ = serde_json::to_writer(&mut *out, value);
        };
        member("namespace", &self.namespace);
        if let Some(region) = &operation.region {
            member("region", region);
        }
        if let Some(key) = &operation.event.key {
            member("key", key);
        }
        member("id", &operation.delivery_id());
        let payload = operation.event.payload();
        if operation.event.record.binary {
            out.extend_from_slice(b",\"payloadBase64\":");
            out.extend_from_slice(&json::base64_text(payload));
        } else {
            out.extend_from_slice(b",\"payload\":");
            out.extend_from_slice(&json::one_line(payload));
        }
        out.extend_from_slice(b"}\n");
    }
}

impl<W: Write + Send + 'static> Sink for StdoutSink<W> {
    fn batch_style(&self) -> BatchStyle {
        BatchStyle::Atomic
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            let mut lines = Vec::new();
            for operation in batch {
                self.line(operation, &mut lines);
            }
            let writer = self.writer.clone();
            // A reader that stops reading blocks the write: never on a thread that others need.
            let written = tokio::task::spawn_blocking(move || {
                let mut writer = writer.lock();
                writer.write_all(&lines).and_then(|()| writer.flush())
            })
            .await;
            let error = match written {
                Ok(Ok(())) => return Written::default(),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "the write was stopped".to_owned(),
            };
            Written::all(batch.len(), &Failure::new(Verdict::Down, format!("standard output: {error}")))
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::testing::{context, operation, operation_with};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    struct Closed;

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn each_record_is_one_line_of_json() {
        let out = Shared::default();
        let sink = StdoutSink::new(out.clone(), &context());
        let plain = operation(r#"{ "a":1.10 }"#);
        let several_lines = operation_with("{\n \"a\": \"x\\n\"\n}", |record| record.key = Some("k\"1".into()));
        let mut binary = operation_with("\u{1}\u{2}", |record| record.binary = true);
        binary.region = Some("eu".into());
        let batch = [plain, several_lines, binary];
        assert!(sink.write(&batch).await.failed.is_empty());
        let text = String::from_utf8(out.0.lock().clone()).unwrap();
        let id = batch[0].event.record.id;
        let expected = format!(
            "{{\"namespace\":\"orders\",\"id\":\"{id}\",\"payload\":{{ \"a\":1.10 }}}}\n\
             {{\"namespace\":\"orders\",\"key\":\"k\\\"1\",\"id\":\"{id}\",\"payload\":{{\"a\":\"x\\n\"}}}}\n\
             {{\"namespace\":\"orders\",\"region\":\"eu\",\"id\":\"{id}\",\"payloadBase64\":\"AQI=\"}}\n"
        );
        assert_eq!(text, expected);
    }

    #[tokio::test]
    async fn a_closed_pipe_is_an_outage() {
        let sink = StdoutSink::new(Closed, &context());
        let failed = sink.write(&[operation("1"), operation("2")]).await.failed;
        assert_eq!(failed.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [0, 1]);
        assert!(failed.iter().all(|(_, failure)| failure.verdict == Verdict::Down && !failure.rendering));
    }
}
