//! `stdout`: each record as one line on standard output.

use std::io::Write;

use futures::FutureExt;
use futures::future::BoxFuture;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BatchStyle, Failure, Operation, Sink, Verdict, Written, file};

/// `stdout:` — each record as one line of JSON on standard output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StdoutSpec {}

/// Standard output. Whole lines: branches never mix theirs.
#[derive(Debug)]
pub struct Stdout;

impl Sink for Stdout {
    fn batch_style(&self) -> BatchStyle {
        BatchStyle::Atomic
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            let mut lines = Vec::new();
            for operation in batch {
                file::put_line(&mut lines, operation.event.payload());
            }
            let written = tokio::task::spawn_blocking(move || {
                let mut out = std::io::stdout().lock();
                out.write_all(&lines).and_then(|()| out.flush())
            });
            match written.await {
                Ok(Ok(())) => Written::default(),
                Ok(Err(error)) => {
                    Written::all(batch.len(), &Failure::new(Verdict::Down, format!("standard output: {error}")))
                }
                Err(_) => {
                    Written::all(batch.len(), &Failure::new(Verdict::Down, "standard output: the write was given up"))
                }
            }
        }
        .boxed()
    }
}
