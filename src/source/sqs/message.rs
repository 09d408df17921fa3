//! A record as an SQS message, and back: the payload is the body, everything else stands in one attribute of ours.
//!
//! SQS takes only text of certain characters. A payload that is none goes as base64, and an attribute says so. A message
//! without our attribute was written by another program: it gets an id that is the same at every reading, and SQS's time.

use std::collections::HashMap;

use aws_sdk_sqs::error::BuildError;
use aws_sdk_sqs::primitives::Blob;
use aws_sdk_sqs::types::{
    Message, MessageAttributeValue, MessageSystemAttributeName as SystemName, SendMessageBatchRequestEntry,
};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use crate::clock::Timestamp;
use crate::record::{Headers, Record, RecordId};
use crate::source::DeadLetter;

/// The attribute with what SQS has no place for: the record's encoding without its payload.
const ENVELOPE: &str = "walflow";
/// The attribute with the record's id as text, for those who read the queue with other tools.
const ID: &str = "walflow-id";
/// The attribute that says what the body is when it is not the payload itself.
const BODY: &str = "walflow-body";
/// The body is the payload in base64.
const BASE64: &str = "base64";
/// The payload is empty, which no body can be.
const EMPTY: &str = "empty";
/// The longest group and deduplication id.
const LONGEST_ID: usize = 128;
/// The longest delay of a message, in seconds.
pub(super) const LONGEST_DELAY: u64 = 900;
/// What an error text in an attribute is cut to, in characters.
const LONGEST_ERROR: usize = 1_000;

/// A message on its way out.
#[derive(Clone, Debug)]
pub(super) struct Outgoing {
    body: String,
    attributes: Vec<(&'static str, MessageAttributeValue)>,
    /// The group, on a FIFO queue.
    pub(super) group: Option<Box<str>>,
    deduplication: Option<String>,
    due_at: Option<Timestamp>,
    /// What SQS counts of it, in bytes.
    pub(super) size: usize,
}

impl Outgoing {
    /// A record for a queue.
    pub(super) fn of(record: &Record, fifo: bool) -> Self {
        let bare = Record { payload: Bytes::new(), ..record.clone() };
        let mut envelope = Vec::new();
        bare.encode(&mut envelope);
        let (body, flag) = body_of(&record.payload);
        let mut outgoing =
            Self { body, attributes: Vec::new(), group: None, deduplication: None, due_at: None, size: 0 };
        outgoing.size = outgoing.body.len();
        outgoing.size += ENVELOPE.len() + "Binary".len() + envelope.len();
        let value = MessageAttributeValue::builder().data_type("Binary").binary_value(Blob::new(envelope)).build();
        outgoing.attributes.extend(value.ok().map(|value| (ENVELOPE, value)));
        outgoing.add(ID, &record.id.to_string());
        if let Some(flag) = flag {
            outgoing.add(BODY, flag);
        }
        if fifo {
            let deduplication = deduplication_id(record);
            let group = record.key.as_deref().map_or_else(|| deduplication.clone(), legal_id);
            (outgoing.group, outgoing.deduplication) = (Some(group.into()), Some(deduplication));
        } else {
            outgoing.due_at = record.due_at;
        }
        outgoing
    }

    /// A dead letter for a queue: the record, and why it is there. Where SQS takes no more bytes, the payload alone.
    pub(super) fn letter(letter: &DeadLetter, fifo: bool, largest: usize) -> Self {
        let mut outgoing = Self::of(&letter.record, fifo);
        let reason = serde_json::to_value(letter.reason).ok();
        let reason = reason.as_ref().and_then(serde_json::Value::as_str).unwrap_or_default();
        let error: String = letter.last_error.chars().filter(|c| is_legal(*c)).take(LONGEST_ERROR).collect();
        outgoing.add("walflow-branch", letter.branch.as_str());
        outgoing.add("walflow-reason", reason);
        outgoing.add("walflow-error", &error);
        outgoing.add("walflow-stage", &letter.stage);
        outgoing.add("walflow-attempts", &letter.attempts.to_string());
        outgoing.add("walflow-dead-at", &letter.at.to_string());
        // The same record may die in two ways, and again after a replay.
        if let Some(deduplication) = &mut outgoing.deduplication {
            *deduplication = digest(&[deduplication.as_bytes(), letter.at.to_string().as_bytes(), reason.as_bytes()]);
        }
        outgoing.due_at = None;
        if outgoing.size > largest {
            let id = letter.record.id;
            tracing::warn!(%id, reason, error, "a dead letter is so large that the queue takes no more than its payload");
            outgoing.attributes.retain(|(name, _)| *name == BODY);
            outgoing.size =
                outgoing.body.len() + outgoing.attributes.len() * (BODY.len() + "String".len() + BASE64.len());
        }
        outgoing
    }

    fn add(&mut self, name: &'static str, value: &str) {
        if value.is_empty() {
            return;
        }
        self.size += name.len() + "String".len() + value.len();
        let value = MessageAttributeValue::builder().data_type("String").string_value(value).build();
        self.attributes.extend(value.ok().map(|value| (name, value)));
    }

    /// The entry of a batch, sent now.
    pub(super) fn entry(&self, id: usize, now: Timestamp) -> Result<SendMessageBatchRequestEntry, BuildError> {
        // Up, so that it is never early.
        let seconds = |due: Timestamp| due.since(now).as_millis().div_ceil(1_000);
        let delay = self.due_at.filter(|due| *due > now).map(|due| i32::try_from(seconds(due)).unwrap_or(i32::MAX));
        let attributes: HashMap<String, MessageAttributeValue> =
            self.attributes.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        SendMessageBatchRequestEntry::builder()
            .id(id.to_string())
            .message_body(&self.body)
            .set_message_attributes(Some(attributes))
            .set_delay_seconds(delay)
            .set_message_group_id(self.group.as_deref().map(str::to_owned))
            .set_message_deduplication_id(self.deduplication.clone())
            .build()
    }
}

/// The largest [`Record::weight`] that fits whatever its bytes are, in a queue that takes messages of `largest` bytes: base64
/// makes four bytes of three, and tags, target and ids are not in the weight.
pub(super) const fn largest_weight(largest: usize) -> usize {
    largest.saturating_sub(20 << 10) / 4 * 3
}

fn body_of(payload: &[u8]) -> (String, Option<&'static str>) {
    if payload.is_empty() {
        return ("-".to_owned(), Some(EMPTY));
    }
    match std::str::from_utf8(payload) {
        Ok(text) if text.chars().all(is_legal) => (text.to_owned(), None),
        _ => (STANDARD.encode(payload), Some(BASE64)),
    }
}

/// The characters that SQS takes: those of XML 1.0.
const fn is_legal(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{D7FF}' | '\u{E000}'..='\u{FFFD}' | '\u{10000}'..='\u{10FFFF}')
}

/// A key as a group id: itself where SQS takes it, else a digest of it.
fn legal_id(text: &str) -> String {
    let legal = (1..=LONGEST_ID).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    if legal { text.to_owned() } else { digest(&[text.as_bytes()]) }
}

/// What tells SQS that two writes are one. With an idempotency key it is the key *and* what was written: SQS says yes to a
/// repetition and drops it, and another payload under a used key must not be dropped.
fn deduplication_id(record: &Record) -> String {
    match &record.idempotency_key {
        None => record.id.to_string(),
        Some(key) => {
            let own = record.key.as_deref().unwrap_or_default();
            digest(&[key.as_bytes(), own.as_bytes(), &record.payload])
        }
    }
}

fn digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    URL_SAFE_NO_PAD.encode(hash.finalize())
}

/// A message that was received.
#[derive(Clone, Debug)]
pub(super) struct Received {
    /// SQS's id of it, the same at every receipt.
    pub(super) id: Box<str>,
    /// What deletes this receipt of it.
    pub(super) handle: String,
    /// The group, on a FIFO queue.
    pub(super) group: Option<Box<str>>,
    /// What it holds.
    pub(super) record: Record,
}

/// What a message holds; `None` if SQS sent one without id or receipt.
pub(super) fn received(message: Message, fifo: bool, number: u32) -> Option<Received> {
    let (id, handle) = (message.message_id?, message.receipt_handle?);
    let (body, attributes) = (message.body.unwrap_or_default(), message.message_attributes.unwrap_or_default());
    let system = message.attributes.unwrap_or_default();
    let group = system.get(&SystemName::MessageGroupId).filter(|_| fifo).map(|group| group.as_str().into());
    let ours = attributes.get(ENVELOPE).and_then(MessageAttributeValue::binary_value);
    let ours = ours.and_then(|envelope| Record::decode(&Bytes::copy_from_slice(envelope.as_ref())).ok());
    let payload = payload_of(&body, attributes.get(BODY).and_then(MessageAttributeValue::string_value));
    let record = match (ours, payload) {
        (Some(ours), Some(payload)) => Record { payload, ..ours },
        _ => {
            let sent = system.get(&SystemName::SentTimestamp).and_then(|text| text.parse().ok()).unwrap_or(0);
            let payload = Bytes::from(body);
            let binary = serde_json::from_slice::<serde::de::IgnoredAny>(&payload).is_err();
            let key = group.as_deref().map(Into::into);
            let at = Timestamp::from_millis(sent);
            Record {
                key,
                binary,
                headers: headers(attributes),
                ..Record::new(foreign_id(&id, at, number), at, payload)
            }
        }
    };
    Some(Received { id: id.into(), handle, group, record })
}

fn payload_of(body: &str, flag: Option<&str>) -> Option<Bytes> {
    match flag {
        None => Some(Bytes::copy_from_slice(body.as_bytes())),
        Some(BASE64) => STANDARD.decode(body).ok().map(Bytes::from),
        Some(EMPTY) => Some(Bytes::new()),
        Some(_) => None,
    }
}

/// Attributes of another program as headers, by name.
fn headers(attributes: HashMap<String, MessageAttributeValue>) -> Headers {
    let value = |value: MessageAttributeValue| -> Box<str> {
        match (value.string_value, value.binary_value) {
            (Some(text), _) => text.into(),
            (None, Some(bytes)) => format!("base64:{}", STANDARD.encode(bytes)).into(),
            (None, None) => "".into(),
        }
    };
    let mut headers: Headers = attributes.into_iter().map(|(name, of)| (name.into(), value(of))).collect();
    headers.sort();
    headers
}

/// The id of a message of another program: the same whoever receives it, and whenever.
fn foreign_id(id: &str, at: Timestamp, number: u32) -> RecordId {
    let hash = Sha256::digest(id.as_bytes());
    let (head, rest) = hash.split_first_chunk::<8>().map(|(head, rest)| (*head, rest)).unwrap_or_default();
    let counter = rest.first_chunk::<2>().copied().unwrap_or_default();
    RecordId::new(at, u16::from_le_bytes(counter), number, u64::from_le_bytes(head))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::record;

    fn back(record: &Record) -> Record {
        let outgoing = Outgoing::of(record, false);
        let entry = outgoing.entry(0, record.written_at).unwrap();
        let message = Message::builder()
            .message_id("m")
            .receipt_handle("h")
            .body(entry.message_body())
            .set_message_attributes(entry.message_attributes().cloned())
            .build();
        received(message, false, 7).unwrap().record
    }

    #[test]
    fn every_payload_comes_back_as_it_was() {
        for payload in
            [&b"{\"a\":1}"[..], b"", b"\x00\xff", "h\u{e9}llo \u{1f600}\r\n\t".as_bytes(), "\u{1}\u{FFFF}".as_bytes()]
        {
            let record = Record { payload: Bytes::copy_from_slice(payload), key: Some("k".into()), ..record("") };
            assert_eq!(back(&record), record);
        }
    }

    #[test]
    fn only_what_sqs_refuses_goes_as_base64() {
        assert_eq!(body_of("{\"a\":\"\u{e9}\"}".as_bytes()), ("{\"a\":\"\u{e9}\"}".to_owned(), None));
        assert_eq!(body_of(b"\x01"), ("AQ==".to_owned(), Some(BASE64)));
    }

    #[test]
    fn keys_that_are_no_group_ids_are_digested_and_stay_apart() {
        assert_eq!(legal_id("user:1"), "user:1");
        let long = "x".repeat(129);
        for odd in ["", "two words", "\u{e9}", &long] {
            assert_eq!(legal_id(odd).len(), 43, "{odd}");
        }
        assert_ne!(legal_id("a b"), legal_id("a c"));
    }

    #[test]
    fn an_idempotency_key_makes_one_of_the_same_write_and_never_of_two_different_ones() {
        let write =
            |key: Option<&str>, payload: &str| Record { idempotency_key: key.map(Into::into), ..record(payload) };
        let id = |record: &Record| deduplication_id(record);
        assert_eq!(id(&write(Some("k"), "1")), id(&write(Some("k"), "1")));
        assert_ne!(id(&write(Some("k"), "1")), id(&write(Some("k"), "2")));
        assert_eq!(id(&write(None, "1")), write(None, "1").id.to_string());
    }

    #[test]
    fn a_delay_is_rounded_up() {
        let due = |millis: i64| {
            let written = record("").written_at;
            let due_at = Some(Timestamp::from_millis(written.as_millis() + millis));
            Outgoing::of(&Record { due_at, ..record("1") }, false).entry(0, written).unwrap().delay_seconds()
        };
        assert_eq!([due(1), due(1_000), due(1_001), due(0), due(-5)], [Some(1), Some(1), Some(2), None, None]);
    }

    #[test]
    fn the_heaviest_record_that_is_let_in_fits() {
        let largest = 1 << 20;
        let record = Record {
            payload: vec![0; largest_weight(largest) - 256 - 1_024].into(),
            key: Some("k".repeat(1_024).into()),
            tags: vec!["t".repeat(16 << 10).into()],
            idempotency_key: Some("i".repeat(255).into()),
            ..record("")
        };
        assert_eq!(record.weight(), largest_weight(largest));
        assert!(Outgoing::of(&record, true).size <= largest);
    }

    #[test]
    fn a_message_of_another_program_has_the_same_id_each_time() {
        let text =
            |text: &str| MessageAttributeValue::builder().data_type("String").string_value(text).build().unwrap();
        let message = Message::builder()
            .message_id("m-1")
            .receipt_handle("h")
            .body("plain")
            .attributes(SystemName::SentTimestamp, "1764000000123")
            .attributes(SystemName::MessageGroupId, "g")
            .message_attributes("colour", text("red"))
            .build();
        let one = received(message.clone(), true, 7).unwrap().record;
        assert_eq!(one.id, received(message.clone(), true, 7).unwrap().record.id);
        assert_eq!((one.written_at.as_millis(), one.key.as_deref()), (1_764_000_000_123, Some("g")));
        assert_eq!((one.id.namespace_number(), one.id.time()), (7, one.written_at));
        assert_eq!(one.headers, [("colour".into(), "red".into())]);
        assert!(one.binary, "it is no JSON");
        assert_eq!(received(message, false, 7).unwrap().record.key, None);
    }
}
