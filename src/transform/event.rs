//! The view of a record that stages, conditions and templates work on.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde_json::Value;

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
    /// The headers now.
    pub headers: Arc<Headers>,
    bytes: Bytes,
    json: Arc<OnceLock<Result<Value, NotJson>>>,
}

impl Event {
    /// The record as it was accepted, nothing changed.
    pub fn original(record: Arc<Record>) -> Self {
        Self {
            child: 0,
            key: record.key.clone(),
            headers: Arc::new(record.headers.clone()),
            bytes: record.payload.clone(),
            json: Arc::new(OnceLock::new()),
            record,
        }
    }

    /// The same event with another payload.
    #[must_use]
    pub fn with_payload(mut self, bytes: Bytes) -> Self {
        self.bytes = bytes;
        self.json = Arc::new(OnceLock::new());
        self
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
        self.json
            .get_or_init(|| {
                if self.record.binary {
                    return Err(NotJson("it was written as payloadBase64".into()));
                }
                serde_json::from_slice(&self.bytes).map_err(|error| NotJson(error.to_string().into()))
            })
            .as_ref()
            .map_err(Clone::clone)
    }
}
