//! `sqs`: a message for each record, ten in a request, each with an outcome of its own.
//!
//! Takes operations, gives what SQS listed under Failed. What is no text that SQS takes travels as base64 and says so in an
//! attribute. On a FIFO queue the record's key is the group and the delivery's identity the deduplication id.

use std::collections::HashSet;
use std::fmt;

use aws_sdk_sqs::types::{MessageAttributeValue, QueueAttributeName, SendMessageBatchRequestEntry};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, StreamExt as _};
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::template::{Document, Scope, Template};
use super::{BatchStyle, Failure, OpenError, Operation, Sink, SinkContext, SpecFault, Verdict, Written};
use crate::connection::probe::Probed;
use crate::connection::sqs::{Account, Connection, explain, is_fifo, is_url, queue_name};

/// Entries of a request.
const ENTRIES: usize = 10;
/// Bytes of a request, and of a message.
const LARGEST: usize = 1 << 20;
/// Requests under way at once for one batch.
const AT_ONCE: usize = 8;
/// The attribute that says how a body is written, where it is not the text itself.
const ENCODING: &str = "walflow-encoding";

/// `sqs:` — a message for each record.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SqsSpec {
    /// The queue, by its name or URL. May come from a region.
    pub queue: Option<String>,
    /// The region. Default: that of the queue's URL, or the environment's.
    pub region: Option<String>,
    /// Another address than Amazon's: `http://127.0.0.1:9324`.
    pub endpoint: Option<String>,
    /// Who we are. Default: what the AWS tools use too.
    pub access_key_id: Option<String>,
    /// The secret of that key.
    pub secret_access_key: Option<String>,
    /// The body. Default: the payload's bytes.
    pub body: Option<Value>,
    /// The group of a message, on a FIFO queue. Default: the record's key.
    pub group: Option<String>,
    /// Attributes, text each.
    pub attributes: IndexMap<String, String>,
}

impl fmt::Debug for SqsSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqsSpec")
            .field("queue", &self.queue.as_deref().map(queue_name))
            .field("account", &self.account())
            .field("attributes", &self.attributes)
            .finish_non_exhaustive()
    }
}

impl SqsSpec {
    fn account(&self) -> Account {
        Account {
            region: self.region.clone(),
            endpoint: self.endpoint.clone(),
            access_key_id: self.access_key_id.clone(),
            secret_access_key: self.secret_access_key.clone(),
        }
        .for_queue(self.queue.as_deref().unwrap_or_default())
    }
}

/// What cannot work in a `sqs:`.
pub(super) fn check(spec: &SqsSpec) -> Vec<SpecFault> {
    let faults = spec.account().faults().into_iter();
    let mut faults: Vec<SpecFault> =
        faults.map(|(pointer, message, help)| SpecFault::new(pointer, message, help)).collect();
    let queue = spec.queue.as_deref().unwrap_or_default();
    if queue_name(queue).is_empty() {
        faults.push(SpecFault::new("/queue", "there is no queue", "its name or its URL"));
    }
    if spec.group.is_some() && !is_fifo(queue) {
        let message = "only a FIFO queue has groups, and this one's name does not end with .fifo";
        faults.push(SpecFault::new("/group", message, "leave it out, or name a FIFO queue"));
    }
    if spec.attributes.len() > 9 {
        faults.push(SpecFault::new(
            "/attributes",
            "a message has ten attributes, one of which is walflow's",
            "nine at most",
        ));
    }
    let group = spec.group.iter().map(|group| ("/group".to_owned(), group));
    let attributes =
        spec.attributes.iter().map(|(name, text)| (format!("/attributes/{}", name.replace('/', "~1")), text));
    for (pointer, text) in group.chain(attributes) {
        if let Err(error) = Template::parse(text) {
            faults.push(SpecFault::new(pointer, error.to_string(), "{payload.a}, for example"));
        }
    }
    if let Some(Err(error)) = spec.body.as_ref().map(Document::parse) {
        faults.push(SpecFault::new(
            format!("/body{}", error.pointer),
            error.error.to_string(),
            "{payload.a}, for example",
        ));
    }
    faults
}

/// When a record counts as delivered and what a second delivery does, for the plan.
pub(super) fn delivered_note(spec: &SqsSpec) -> Vec<String> {
    let again = if spec.queue.as_deref().is_some_and(is_fifo) {
        "a second delivery within five minutes does nothing (deduplication id)"
    } else {
        "after a lost answer a message may stand twice"
    };
    vec!["delivered when SQS lists the message under Successful".to_owned(), again.to_owned()]
}

/// An SQS queue.
pub struct SqsSink {
    connection: std::sync::Arc<Connection>,
    queue: String,
    fifo: bool,
    url: tokio::sync::OnceCell<String>,
    body: Option<Document>,
    group: Option<Template>,
    attributes: Vec<(String, Template)>,
    context: SinkContext,
}

/// Whether SQS takes these characters: those of XML 1.0.
fn is_text(text: &str) -> bool {
    !text.is_empty()
        && text
            .chars()
            .all(|c| matches!(c, '\t' | '\n' | ' '..='\u{D7FF}' | '\u{E000}'..='\u{FFFD}' | '\u{10000}'..='\u{10FFFF}'))
}

/// What the outcome of an entry that failed means. What the service blames on the message stays wrong; its own trouble
/// passes; rights, keys and the queue itself are no message's fault, whomever it blames.
fn of_entry(code: &str, sender_fault: bool) -> Verdict {
    let says = |words: &[&str]| words.iter().any(|word| code.contains(word));
    if says(&["Throttl"]) {
        return Verdict::Backoff;
    }
    if says(&["AccessDenied", "KMS", "Kms", "NonExistentQueue", "QueueDoesNotExist", "Token", "Signature", "Security"])
    {
        return Verdict::Down;
    }
    if sender_fault { Verdict::Never } else { Verdict::Backoff }
}

/// A group's or deduplication id: as it is where SQS takes that, else its digest.
fn id(text: &str) -> String {
    let legal = |c: char| c.is_ascii_graphic();
    if (1..=128).contains(&text.len()) && text.chars().all(legal) {
        return text.to_owned();
    }
    STANDARD_NO_PAD.encode(Sha256::digest(text.as_bytes()))
}

impl SqsSink {
    /// Reads the settings; connects to nothing.
    ///
    /// # Errors
    /// When a setting does not work.
    pub fn open(spec: &SqsSpec, context: &SinkContext) -> Result<Self, OpenError> {
        let wrong =
            |pointer: &str, message: Box<str>| OpenError::Setting { kind: "sqs", pointer: pointer.into(), message };
        let template = |pointer: &str, text: &str| Template::parse(text).map_err(|error| wrong(pointer, error.message));
        let queue = spec.queue.clone().unwrap_or_default();
        let attributes = spec.attributes.iter().map(|(name, text)| Ok((name.clone(), template("/attributes", text)?)));
        Ok(Self {
            connection: spec.account().connection(),
            fifo: is_fifo(&queue),
            queue,
            url: tokio::sync::OnceCell::new(),
            body: spec
                .body
                .as_ref()
                .map(Document::parse)
                .transpose()
                .map_err(|error| wrong("/body", error.error.message))?,
            group: spec.group.as_deref().map(|group| template("/group", group)).transpose()?,
            attributes: attributes.collect::<Result<_, _>>()?,
            context: context.clone(),
        })
    }

    fn entry(&self, index: usize, operation: &Operation) -> Result<(SendMessageBatchRequestEntry, usize), Failure> {
        let scope = Scope::new(operation, &self.context);
        let body = match &self.body {
            Some(document) => document.render_bytes(&scope)?,
            None => scope.payload().clone(),
        };
        let text = std::str::from_utf8(&body).ok().filter(|text| is_text(text));
        let encoded = text.is_none();
        let text = text.map_or_else(|| STANDARD.encode(&body), str::to_owned);
        let mut size = text.len();
        let mut entry = SendMessageBatchRequestEntry::builder().id(index.to_string()).message_body(text);
        let mut attribute =
            |entry: aws_sdk_sqs::types::builders::SendMessageBatchRequestEntryBuilder, name: &str, value: String| {
                size += name.len() + value.len() + "String".len();
                let value = MessageAttributeValue::builder().data_type("String").string_value(value).build();
                let value = value.map_err(|error| Failure::rendering(format!("attribute {name}: {error}")))?;
                Ok::<_, Failure>(entry.message_attributes(name, value))
            };
        if encoded {
            entry = attribute(entry, ENCODING, "base64".to_owned())?;
        }
        for (name, template) in &self.attributes {
            let value = template.render_text(&scope)?;
            if !is_text(&value) {
                return Err(Failure::rendering(format!(
                    "attribute {name} is empty or holds characters that SQS refuses"
                )));
            }
            entry = attribute(entry, name, value)?;
        }
        if size > LARGEST {
            return Err(Failure::rendering(format!("the message has {size} bytes, and SQS takes {LARGEST}")));
        }
        if self.fifo {
            let delivery = operation.delivery_id();
            let group = match &self.group {
                Some(template) => template.render_text(&scope)?,
                None => operation.event.key.as_deref().unwrap_or(&delivery).to_owned(),
            };
            entry = entry.message_group_id(id(&group)).message_deduplication_id(id(&delivery));
        }
        entry.build().map(|entry| (entry, size)).map_err(|error| Failure::rendering(error.to_string()))
    }

    async fn client(&self) -> Result<&aws_sdk_sqs::Client, Failure> {
        self.connection.client().await.map_err(|text| Failure::new(Verdict::Down, text))
    }

    async fn url(&self) -> Result<&str, Failure> {
        let find = || async {
            if is_url(&self.queue) {
                return Ok(self.queue.clone());
            }
            let found = self.client().await?.get_queue_url().queue_name(&self.queue).send().await;
            let account = self.connection.account();
            let found = found.map_err(|error| {
                Failure::new(Verdict::Down, explain(&error, "GetQueueUrl", account, &self.queue).text)
            })?;
            Ok(found.queue_url.unwrap_or_default())
        };
        self.url.get_or_try_init(find).await.map(String::as_str)
    }

    async fn send(&self, entries: Vec<(usize, SendMessageBatchRequestEntry)>) -> Vec<(usize, Failure)> {
        let (indexes, entries): (Vec<usize>, Vec<_>) = entries.into_iter().unzip();
        let all = |failure: &Failure| indexes.iter().map(|index| (*index, failure.clone())).collect();
        let (client, url) = match (self.client().await, self.url().await) {
            (Ok(client), Ok(url)) => (client, url),
            (Err(failure), _) | (_, Err(failure)) => return all(&failure),
        };
        match client.send_message_batch().queue_url(url).set_entries(Some(entries)).send().await {
            Err(error) => {
                let account = self.connection.account();
                let text = explain(&error, "SendMessage", account, queue_name(&self.queue)).text;
                all(&Failure::new(Verdict::Down, text))
            }
            Ok(answer) => {
                let queue = queue_name(&self.queue);
                let mut open: HashSet<usize> = indexes.iter().copied().collect();
                for taken in answer.successful() {
                    open.retain(|index| taken.id() != index.to_string());
                }
                let failure = |failed: &aws_sdk_sqs::types::BatchResultErrorEntry| {
                    let index: usize = failed.id().parse().ok()?;
                    let why = failed.message().unwrap_or_default();
                    let verdict = of_entry(failed.code(), failed.sender_fault());
                    Some((index, Failure::new(verdict, format!("SQS {queue}: {} {why}", failed.code()))))
                };
                let mut failed: Vec<(usize, Failure)> = answer.failed().iter().filter_map(failure).collect();
                failed.retain(|(index, _)| open.remove(index));
                // Delivered is what was said to be.
                let unsaid =
                    Failure::new(Verdict::Backoff, format!("SQS {queue}: the answer does not say what became of it"));
                failed.extend(open.into_iter().map(|index| (index, unsaid.clone())));
                failed
            }
        }
    }
}

impl Sink for SqsSink {
    /// Every entry has an outcome of its own.
    fn batch_style(&self) -> BatchStyle {
        BatchStyle::Independent
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            let mut failed = Vec::new();
            let mut requests: Vec<Vec<(usize, SendMessageBatchRequestEntry)>> = Vec::new();
            let mut left = 0;
            for (index, operation) in batch.iter().enumerate() {
                match self.entry(index, operation) {
                    Err(failure) => failed.push((index, failure)),
                    Ok((entry, size)) => {
                        match requests.last_mut().filter(|request| request.len() < ENTRIES && size <= left) {
                            Some(request) => request.push((index, entry)),
                            None => {
                                left = LARGEST;
                                requests.push(vec![(index, entry)]);
                            }
                        }
                        left = left.saturating_sub(size);
                    }
                }
            }
            let mut sent = stream::iter(requests).map(|request| self.send(request)).buffer_unordered(AT_ONCE);
            while let Some(refused) = sent.next().await {
                failed.extend(refused);
            }
            failed.sort_unstable_by_key(|(index, _)| *index);
            Written { failed }
        }
        .boxed()
    }

    fn probe(&self) -> BoxFuture<'_, Vec<Probed>> {
        async move {
            let what = format!("SQS queue {} at {}", queue_name(&self.queue), self.connection.account().shown());
            let look = async {
                let (client, url) = (self.client().await?, self.url().await?);
                let asked = client.get_queue_attributes().queue_url(url).attribute_names(QueueAttributeName::QueueArn);
                let account = self.connection.account();
                asked.send().await.map_err(|error| {
                    Failure::new(
                        Verdict::Down,
                        explain(&error, "GetQueueAttributes", account, queue_name(&self.queue)).text,
                    )
                })
            };
            vec![Probed::of(
                what,
                look.await.map(|_| "it is there".to_owned()).map_err(|failure: Failure| failure.message.into()),
            )]
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_blamed_only_for_what_is_its_own() {
        for (code, sender_fault, verdict) in [
            ("InvalidMessageContents", true, Verdict::Never),
            ("InvalidParameterValue", true, Verdict::Never),
            ("InternalError", false, Verdict::Backoff),
            ("ServiceUnavailable", false, Verdict::Backoff),
            ("RequestThrottled", true, Verdict::Backoff),
            ("KmsThrottled", true, Verdict::Backoff),
            ("AccessDenied", true, Verdict::Down),
            ("KMS.DisabledException", true, Verdict::Down),
            ("AWS.SimpleQueueService.NonExistentQueue", true, Verdict::Down),
        ] {
            assert_eq!(of_entry(code, sender_fault), verdict, "{code}");
        }
    }
}
