//! The view of a record that stages, conditions and templates work on.
//!
//! Holds the payload's bytes and, once somebody asked, its parsed forms; branches that share an event share these. An
//! event never changes in place: a stage makes another one.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::Value;

use super::convert::{self, Parsed};
use crate::record::{Headers, Record};
use crate::source::Child;

/// A payload is not the JSON that a stage needs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the payload is not JSON: {0}")]
pub struct NotJson(Arc<str>);

/// One delivery's content on its way through the stages: the record, and what became of payload, key and headers.
#[derive(Clone, Debug)]
pub struct Event {
    /// The record as it was accepted.
    pub record: Arc<Record>,
    /// 0, or the number of the child that `emit` made.
    pub child: Child,
    /// The key now.
    pub key: Option<Arc<str>>,
    /// The headers that a stage made; `None` = the record's own.
    headers: Option<Arc<Headers>>,
    bytes: Bytes,
    forms: Arc<Forms>,
    /// Calls of `uuid` and `random` so far, so that each stage draws anew.
    pub(super) calls: u32,
}

/// The payload's parsed forms, each made when it is first asked for.
#[derive(Debug, Default)]
struct Forms {
    json: OnceLock<Result<Value, NotJson>>,
    /// The scripts' form. A run takes it out and puts it back unchanged: it is never copied and never waited for.
    parsed: Mutex<Option<Parsed>>,
}

impl Event {
    /// The record as it was accepted, nothing changed.
    pub fn original(record: Arc<Record>) -> Self {
        Self {
            child: 0,
            key: record.key.clone(),
            headers: None,
            bytes: record.payload.clone(),
            forms: Arc::default(),
            calls: 0,
            record,
        }
    }

    /// The same event with another payload.
    #[must_use]
    pub fn with_payload(mut self, bytes: Bytes) -> Self {
        self.bytes = bytes;
        self.forms = Arc::default();
        self
    }

    /// The headers now.
    pub fn headers(&self) -> &Headers {
        self.headers.as_deref().unwrap_or(&self.record.headers)
    }

    /// The event has other headers from now on.
    pub(super) fn set_headers(&mut self, headers: Headers) {
        self.headers = Some(Arc::new(headers));
    }

    /// The payload's bytes: the client's own where no stage changed them.
    pub const fn payload(&self) -> &Bytes {
        &self.bytes
    }

    /// The payload as JSON, parsed at the first call.
    ///
    /// # Errors
    /// When it is not JSON.
    pub fn json(&self) -> Result<&Value, NotJson> {
        let parse = || {
            self.refuse_binary()?;
            serde_json::from_slice(&self.bytes).map_err(|error| NotJson(error.to_string().into()))
        };
        self.forms.json.get_or_init(parse).as_ref().map_err(Clone::clone)
    }

    /// Takes the scripts' form, made now if nobody left one.
    pub(super) fn take_parsed(&self) -> Result<Parsed, NotJson> {
        if let Some(parsed) = self.forms.parsed.lock().take() {
            return Ok(parsed);
        }
        self.refuse_binary()?;
        convert::parse(&self.bytes).map_err(|error| NotJson(error.to_string().into()))
    }

    /// Leaves the scripts' form, which must be what the bytes say, for the next one.
    pub(super) fn keep_parsed(&self, parsed: Parsed) {
        *self.forms.parsed.lock() = Some(parsed);
    }

    /// A payload that a script made is JSON, whatever the record's was.
    fn refuse_binary(&self) -> Result<(), NotJson> {
        if self.record.binary && self.bytes == self.record.payload {
            return Err(NotJson(what_it_is(&self.bytes)));
        }
        Ok(())
    }
}

/// Confluent's serializers put a zero byte and the schema's number before what they write.
#[cold]
fn what_it_is(bytes: &[u8]) -> Arc<str> {
    match *bytes {
        [0, a, b, c, d, _, ..] => {
            let schema = u32::from_be_bytes([a, b, c, d]);
            format!(
                "it is framed as by Confluent's Avro and Protobuf serializers (schema {schema}), and only JSON is read"
            )
            .into()
        }
        _ => "it was written as payloadBase64, or by a program that writes no JSON".into(),
    }
}
