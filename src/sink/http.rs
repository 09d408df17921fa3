//! `http`: requests to a URL whose scheme and host the file fixes, one record or one batch each.
//!
//! Takes operations, gives what the table in `verdict` says of each answer. One by one the body is the payload's own bytes;
//! with `batch:` they stand untouched in a JSON array or on lines. Every request carries the record's id (`webhook-id`,
//! `idempotency-key`), the same on each attempt. Never follows a redirect, never uses a proxy that the file does not name,
//! never shows more of a URL than its host. A connection whose answer did not come in time is closed, so that a retry
//! never overtakes it on another.

mod client;
mod request;
mod settings;
mod sign;
mod verdict;

use std::collections::HashSet;
use std::fmt;

use futures::future::{BoxFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::client::Connector;
use self::request::Requests;
pub use self::settings::delivered_note;
pub(super) use self::settings::{check, url_varies};
pub use self::verdict::{Meaning, Row, TABLE, WITHOUT_STATUS, verdict_table};
use super::{BatchStyle, Failure, OpenError, Operation, Sink, SinkContext, Verdict, Written, shown_address};
use crate::connection::probe::Probed;
use crate::units::Span;

/// `http:` — one request a record; with `batch:` one a batch, the body a JSON array or NDJSON.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpSpec {
    /// Where; scheme and host are literal.
    pub url: String,
    /// Default: POST.
    #[serde(default)]
    pub method: Option<String>,
    /// Headers, values are templates.
    #[serde(default)]
    pub headers: IndexMap<String, String>,
    /// The body; a map's scalars are templates. Default: the payload's bytes.
    #[serde(default)]
    pub body: Option<serde_json::Value>,
    /// How a batch is written: `json_array` or `ndjson`. Default: json_array.
    #[serde(default)]
    pub format: Option<BatchFormat>,
    /// Sign each request after Standard Webhooks.
    #[serde(default)]
    pub sign: Option<SignSpec>,
    /// From the first byte sent to the last received. Default: 30s.
    #[serde(default)]
    pub timeout: Option<Span>,
    /// To open a connection. Default: 5s.
    #[serde(default)]
    pub connect_timeout: Option<Span>,
    /// TLS settings.
    #[serde(default)]
    pub tls: Option<TlsSpec>,
    /// A proxy's URL, or `none`. Default: none.
    #[serde(default)]
    pub proxy: Option<String>,
    /// What a status means where the default table is wrong: `{404: never, 409: ok}`.
    #[serde(default)]
    pub verdicts: IndexMap<String, VerdictSpec>,
}

impl fmt::Debug for HttpSpec {
    /// Shows what is no secret: of addresses the host, of headers the names.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpSpec")
            .field("url", &shown_address(&self.url))
            .field("method", &self.method)
            .field("headers", &self.headers.keys().collect::<Vec<_>>())
            .field("sign", &self.sign)
            .field("tls", &self.tls)
            .field("proxy", &self.proxy.as_deref().map(shown_address))
            .finish_non_exhaustive()
    }
}

/// `http.format:`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BatchFormat {
    /// `[a, b]`
    JsonArray,
    /// One a line.
    Ndjson,
}

/// `http.sign:` — one of the two.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SignSpec {
    /// The secret, `whsec_…`; several separated by spaces while rotating.
    pub secret: Option<String>,
    /// A file that holds it, read when the branch starts and when the pipeline is loaded again.
    pub secret_file: Option<String>,
}

impl fmt::Debug for SignSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SignSpec").field("secret_file", &self.secret_file).finish_non_exhaustive()
    }
}

/// `http.tls:`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TlsSpec {
    /// PEM certificates to trust besides the system's.
    pub ca_file: Option<String>,
    /// PEM certificate for this client.
    pub cert_file: Option<String>,
    /// PEM key for this client.
    pub key_file: Option<String>,
}

/// What a status means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VerdictSpec {
    /// Delivered.
    Ok,
    /// This record is refused.
    Never,
    /// Try again later.
    Backoff,
    /// The target is away.
    Down,
}

/// Requests under way at once for one batch that is sent record by record.
const AT_ONCE: usize = 8;
/// Records refused one after the other, none accepted, before the rest of a batch is left for later.
const REFUSED_IN_A_ROW: usize = 16;

/// An HTTP target.
pub struct HttpSink {
    requests: Requests,
    connector: Connector,
    batched: bool,
    url: String,
    url_varies: bool,
}

impl HttpSink {
    /// Reads certificates and secrets; connects to nothing.
    ///
    /// # Errors
    /// When a setting does not work or a file that it names cannot be read.
    pub fn open(spec: &HttpSpec, batched: bool, context: &SinkContext) -> Result<Self, OpenError> {
        Ok(Self {
            requests: Requests::open(spec, context)?,
            connector: Connector::open(spec, context.clock.clone())?,
            batched,
            url: spec.url.clone(),
            url_varies: settings::url_varies(spec),
        })
    }

    /// One request for each record.
    async fn write_each(&self, batch: &[Operation]) -> Written {
        let mut under_way = FuturesUnordered::new();
        let mut failed = Vec::new();
        let mut rest = batch.iter().enumerate();
        loop {
            while under_way.len() < AT_ONCE
                && let Some((index, operation)) = rest.next()
            {
                under_way.push(self.write_one(operation).map(move |sent| (index, sent)));
            }
            match under_way.next().await {
                Some((_, Ok(()))) => {}
                Some((index, Err(failure))) => failed.push((index, failure)),
                None => break,
            }
        }
        failed.sort_unstable_by_key(|(index, _)| *index);
        Written { failed }
    }

    async fn write_one(&self, operation: &Operation) -> Result<(), Failure> {
        let body = self.requests.body(operation)?;
        let request = self.requests.request(std::slice::from_ref(&operation), body)?;
        self.connector.send(request).await
    }

    /// One request for the batch. A refusal of several records is halved until it is one record's own.
    async fn write_batch(&self, batch: &[Operation]) -> Written {
        let mut failed: Vec<(usize, Failure)> = Vec::new();
        let mut refused_keys = HashSet::new();
        let mut elements = Vec::with_capacity(batch.len());
        for (index, operation) in batch.iter().enumerate() {
            match self.requests.element(operation) {
                Ok(element) => elements.push((index, operation, element)),
                Err(failure) => {
                    refused_keys.extend(operation.event.key.as_deref());
                    failed.push((index, failure));
                }
            }
        }
        let mut groups = vec![elements];
        let (mut accepted, mut refused) = (0, 0);
        while let Some(mut group) = groups.pop() {
            // What follows a refused record of its key waits: whether it may pass is for the driver to say.
            group.retain(|(index, operation, _)| {
                let waits = operation.event.key.as_deref().is_some_and(|key| refused_keys.contains(key));
                if waits {
                    let why = "not sent: an earlier record of its key in the same batch was refused";
                    failed.push((*index, Failure::new(Verdict::Backoff, why)));
                }
                !waits
            });
            if group.is_empty() {
                continue;
            }
            let operations: Vec<&Operation> = group.iter().map(|(_, operation, _)| *operation).collect();
            let body = self.requests.join(group.iter().map(|(_, _, element)| element.as_ref()));
            let sent = match self.requests.request(&operations, body) {
                Ok(request) => self.connector.send(request).await,
                Err(failure) => Err(failure),
            };
            match sent {
                Ok(()) => accepted += group.len(),
                Err(failure) if failure.verdict == Verdict::Never && group.len() > 1 => {
                    let right = group.split_off(group.len() / 2);
                    groups.push(right);
                    groups.push(group);
                }
                Err(failure) => {
                    let gone_on = failure.verdict == Verdict::Never;
                    for (index, operation, _) in group {
                        refused_keys.extend(operation.event.key.as_deref());
                        failed.push((index, failure.clone()));
                    }
                    refused += 1;
                    if gone_on && (accepted > 0 || refused < REFUSED_IN_A_ROW) {
                        continue;
                    }
                    let failure = if gone_on {
                        Failure::new(
                            Verdict::Backoff,
                            "not sent alone: the target refused each of the records before it",
                        )
                    } else {
                        failure
                    };
                    let left = groups.drain(..).flatten();
                    failed.extend(left.map(|(index, _, _)| (index, failure.clone())));
                }
            }
        }
        failed.sort_unstable_by_key(|(index, _)| *index);
        Written { failed }
    }
}

impl Sink for HttpSink {
    fn probe(&self) -> BoxFuture<'_, Vec<Probed>> {
        async move {
            // Up to the first reference: the host, if that does not come from the record.
            let literal = self.url.split('{').next().unwrap_or_default();
            let host = literal.split_once("://").is_some_and(|(_, rest)| rest.contains('/') || literal == self.url);
            if self.url_varies && !host {
                return vec![Probed::fine("target", "its host comes from the record, so there is none to reach")];
            }
            vec![self.connector.probe(literal).await]
        }
        .boxed()
    }

    /// A batch in one request is taken or refused as a whole; records sent one by one each have their own answer.
    fn batch_style(&self) -> BatchStyle {
        if self.batched { BatchStyle::Atomic } else { BatchStyle::Independent }
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        if self.batched { self.write_batch(batch).boxed() } else { self.write_each(batch).boxed() }
    }
}
