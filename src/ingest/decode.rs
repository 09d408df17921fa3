//! From the bytes of one write to a record and what its client wants done with it.
//!
//! The payload stays the exact bytes that came; it is parsed only where a key pointer, a schema or an expression needs it.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::StatusCode;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use super::Inlet;
use super::reply::Problem;
use crate::clock::Timestamp;
use crate::delay::{RequestedDelay, due};
use crate::record::{Headers, LONGEST_KEY, MOST_HEADERS, Record, RecordId, Target, TargetKind};
use crate::source::{IdempotencyKey, Write};
use crate::transform::{Event, MAX_DEPTH, json_depth};
use crate::units::Span;

/// Payloads up to this size are copied out of the buffer that they came in.
const LARGEST_COPY: usize = 64 << 10;
/// The longest idempotency key, in bytes.
const LONGEST_IDEMPOTENCY_KEY: usize = 255;
/// The longest origin, in bytes.
const LONGEST_ORIGIN: usize = 255;

/// A write as clients send it.
#[derive(Deserialize, utoipa::ToSchema)]
#[schema(as = Write)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Envelope<'a> {
    /// Where it goes.
    #[serde(borrow)]
    #[schema(value_type = String, example = "user-cache-replication")]
    pub(super) namespace: Cow<'a, str>,
    /// Any JSON; delivered as these bytes where no script changes it. This or `payloadBase64`.
    #[serde(borrow, default, deserialize_with = "raw")]
    #[schema(value_type = Option<Value>)]
    payload: Option<&'a RawValue>,
    /// Anything that is not JSON.
    #[serde(borrow, default)]
    #[schema(value_type = Option<String>)]
    payload_base64: Option<Cow<'a, str>>,
    /// Records of one key stay in order; at most 1,024 bytes.
    #[serde(borrow, default)]
    #[schema(value_type = Option<String>)]
    key: Option<Cow<'a, str>>,
    /// A repetition with the same key is not written twice; the header wins.
    #[serde(borrow, default)]
    #[schema(value_type = Option<String>)]
    idempotency_key: Option<Cow<'a, str>>,
    /// When it is due.
    #[serde(borrow, default)]
    #[schema(value_type = Option<Lifecycle>)]
    lifecycle: Option<&'a RawValue>,
    /// Which of the file's sinks and regions get it.
    #[serde(borrow, default)]
    #[schema(value_type = Option<Wish>)]
    target: Option<&'a RawValue>,
    /// Becomes the record's headers.
    #[serde(default)]
    #[schema(value_type = Object)]
    metadata: serde_json::Map<String, Value>,
    /// Stored and shown; changes no order.
    #[serde(default)]
    priority: Option<i64>,
    /// Stored and shown.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    tags: Vec<Box<str>>,
    /// For a write that another walflow sends on: the region where it was first written. It goes no further than this region.
    #[serde(borrow, default)]
    #[schema(value_type = Option<String>)]
    origin: Option<Cow<'a, str>>,
}

/// `null` is a payload too.
fn raw<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// When a write is due: `deliverAt`, or else `delay`, or else what the file says; `jitter` comes on top.
#[derive(Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct Lifecycle {
    /// From now on.
    delay: Option<Span>,
    /// At most so much later.
    jitter: Option<Span>,
    /// At this time; past is now.
    deliver_at: Option<Timestamp>,
}

/// Which of the file's targets get a write; it never brings an address of its own.
#[derive(Deserialize, utoipa::ToSchema)]
#[schema(as = Target)]
#[serde(deny_unknown_fields)]
pub(super) struct Wish {
    /// Only sinks of this sort.
    #[serde(rename = "type", default)]
    kind: Option<TargetKind>,
    /// Only these.
    #[serde(default)]
    config: WishConfig,
}

/// Names from the file; none = all.
#[derive(Default, Deserialize, utoipa::ToSchema)]
#[schema(as = TargetConfig)]
#[serde(deny_unknown_fields, default)]
pub(super) struct WishConfig {
    regions: Vec<String>,
    sinks: Vec<String>,
}

/// Reads the envelope.
pub(super) fn envelope(bytes: &[u8]) -> Result<Envelope<'_>, Problem> {
    serde_json::from_slice(bytes)
        .map_err(|error| Problem::malformed(format!("the write cannot be read: {error}")).failed())
}

impl Envelope<'_> {
    /// Makes the write for a namespace's log. `whole` are the bytes that the envelope was read from.
    pub(super) fn write(self, inlet: &Inlet, whole: &Bytes, header_key: Option<&str>) -> Result<Write, Problem> {
        let now = inlet.clock.now();
        let (payload, binary) = self.payload(inlet, whole)?;
        let mut json = None;
        let key = match &self.key {
            Some(key) => Some(key.as_ref().into()),
            None => match &inlet.key {
                Some(pointer) if !binary => pointed(&payload, &mut json, pointer, "key")?,
                _ => None,
            },
        };
        let idempotency = match header_key.or(self.idempotency_key.as_deref()) {
            Some(key) => Some(key.into()),
            None => match &inlet.idempotency {
                Some(pointer) if !binary => pointed(&payload, &mut json, pointer, "idempotency key")?,
                _ => None,
            },
        };
        check_length("key", key.as_deref(), LONGEST_KEY)?;
        check_length("origin", self.origin.as_deref(), LONGEST_ORIGIN)?;
        if self.origin.is_some() && self.origin.as_deref() == inlet.origin.as_deref() {
            let detail =
                "this write came from here: whoever sends it back must have this region under `replicate.regions`";
            return Err(Problem::new(StatusCode::CONFLICT, "loop", detail).failed());
        }
        check_length("idempotency key", idempotency.as_deref(), LONGEST_IDEMPOTENCY_KEY)?;
        if let Some(schema) = inlet.schema.as_ref() {
            schema.check(&payload).map_err(|faults| Problem::schema(schema.path(), faults).failed())?;
        }
        let target = self.target.map(|wish| target(wish, inlet)).transpose()?;
        let fingerprint = idempotency.as_ref().map(|_| self.fingerprint(&payload, key.as_deref()));
        let requested = self.lifecycle.map(lifecycle).transpose()?.unwrap_or_default();
        let record = Record {
            key,
            headers: self.headers()?,
            target,
            priority: self.priority,
            tags: self.tags,
            origin: self.origin.as_deref().or(inlet.origin.as_deref()).map(Into::into),
            idempotency_key: idempotency.as_deref().map(Into::into),
            binary,
            ..Record::new(RecordId::from_bytes([0; 16]), now, payload)
        };
        let due_at = if requested == RequestedDelay::default() && inlet.delay.is_none() {
            None
        } else {
            // An expression may look at all of the record; the copy shares its bytes. The log has yet to give the id:
            // what an expression draws comes from one of its own, else every record would draw the same.
            let id = RecordId::new(now, 0, 0, fastrand::u64(..));
            let event = Event::original(Arc::new(Record { id, ..record.clone() }));
            due(inlet.delay.as_ref(), &requested, &event, now)?
        };
        let caps = inlet.log.caps();
        let own = requested != RequestedDelay::default();
        if due_at.is_some() && !caps.delay && (own || !caps.hold) {
            let detail = if caps.hold {
                "without a shelf a write of this namespace has no delay of its own, since its log holds records in their order: \
                 leave `lifecycle` out and let the file's `delay` decide for all, or name a shelf under source.shelf"
            } else {
                "this namespace's source cannot delay: name a shelf under source.shelf"
            };
            return Err(Problem::new(StatusCode::NOT_IMPLEMENTED, "unsupported", detail).failed());
        }
        let idempotency = idempotency
            .zip(fingerprint)
            .map(|(key, fingerprint): (Arc<str>, _)| IdempotencyKey { key: key.as_ref().into(), fingerprint });
        Ok(Write { record, due_at, idempotency })
    }

    fn payload(&self, inlet: &Inlet, whole: &Bytes) -> Result<(Bytes, bool), Problem> {
        let (payload, binary) = match (self.payload, &self.payload_base64) {
            (Some(raw), None) => {
                let text = raw.get().as_bytes();
                if json_depth(text) > MAX_DEPTH {
                    return Err(
                        Problem::malformed(format!("the payload is nested deeper than {MAX_DEPTH} levels")).failed()
                    );
                }
                // A slice would keep the connection's whole buffer alive for as long as the record is in memory.
                let small = text.len() <= LARGEST_COPY;
                (if small { Bytes::copy_from_slice(text) } else { whole.slice_ref(text) }, false)
            }
            (None, Some(text)) => {
                let decoded = STANDARD.decode(text.as_bytes());
                (decoded.map_err(|error| Problem::malformed(format!("payloadBase64: {error}")).failed())?.into(), true)
            }
            (Some(_), Some(_)) => return Err(Problem::malformed("give payload or payloadBase64, not both").failed()),
            (None, None) => return Err(Problem::malformed("payload is missing").failed()),
        };
        let size = payload.len() as u64;
        if size > inlet.record_bytes {
            Err(Problem::too_large(size, inlet.record_bytes).failed())
        } else {
            Ok((payload, binary))
        }
    }

    fn headers(&self) -> Result<Headers, Problem> {
        let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
        let headers: Headers =
            self.metadata.iter().map(|(name, value)| (name.as_str().into(), plain(value).into())).collect();
        let size = headers.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
            + self.tags.iter().map(|tag| tag.len()).sum::<usize>();
        if size > MOST_HEADERS {
            return Err(Problem::too_large(size as u64, MOST_HEADERS as u64).failed());
        }
        Ok(headers)
    }

    /// A digest over what a repetition must repeat.
    fn fingerprint(&self, payload: &[u8], key: Option<&str>) -> [u8; 16] {
        let mut digest = Sha256::new();
        let parts = [
            Some(payload),
            key.map(str::as_bytes),
            self.target.map(|raw| raw.get().as_bytes()),
            self.lifecycle.map(|raw| raw.get().as_bytes()),
        ];
        for part in parts {
            digest.update(part.map_or(u64::MAX, |part| part.len() as u64).to_le_bytes());
            digest.update(part.unwrap_or_default());
        }
        let digest: [u8; 32] = digest.finalize().into();
        let mut short = [0; 16];
        short.iter_mut().zip(digest).for_each(|(to, from)| *to = from);
        short
    }
}

fn check_length(what: &str, text: Option<&str>, longest: usize) -> Result<(), Problem> {
    match text {
        Some(text) if text.len() > longest => {
            Err(Problem::malformed(format!("the {what} is longer than {longest} bytes")).failed())
        }
        Some("") => Err(Problem::malformed(format!("the {what} is empty")).failed()),
        _ => Ok(()),
    }
}

/// The text at a pointer: a string itself, a number or bool as JSON; missing and null are none.
fn pointed(payload: &[u8], json: &mut Option<Value>, pointer: &str, what: &str) -> Result<Option<Arc<str>>, Problem> {
    if json.is_none() {
        let parsed = serde_json::from_slice(payload);
        *json = Some(parsed.map_err(|error| Problem::malformed(format!("the payload is not JSON: {error}")).failed())?);
    }
    match json.as_ref().and_then(|json| json.pointer(pointer)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str().into())),
        Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(Some(value.to_string().into())),
        Some(_) => {
            let detail = format!("the {what} at {pointer} is an array or object; it must be a string, number or bool");
            Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "key", detail).failed())
        }
    }
}

fn lifecycle(raw: &RawValue) -> Result<RequestedDelay, Problem> {
    let wish: Option<Lifecycle> =
        serde_json::from_str(raw.get()).map_err(|error| Problem::malformed(format!("lifecycle: {error}")).failed())?;
    let wish = wish.unwrap_or_default();
    let plain = |span: Option<Span>| span.map(|span| -> Duration { span.0 });
    Ok(RequestedDelay { deliver_at: wish.deliver_at, delay: plain(wish.delay), jitter: plain(wish.jitter) })
}

/// What the client chose of what the file declares; what would reach nobody is refused.
fn target(raw: &RawValue, inlet: &Inlet) -> Result<Target, Problem> {
    let wish: Wish = serde_json::from_str(raw.get()).map_err(|error| {
        Problem::malformed(format!("target: {error}; a target only chooses: {{type, config: {{regions, sinks}}}}"))
            .failed()
    })?;
    let target = Target { kind: wish.kind, regions: wish.config.regions, sinks: wish.config.sinks };
    let refuse = |what: String| Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "target", what).failed());
    let has_region = |name: &String| inlet.outlets.iter().any(|outlet| outlet.region.as_deref() == Some(name));
    let regional = inlet.outlets.iter().any(|outlet| outlet.region.is_some());
    if let Some(region) = target.regions.iter().find(|name| regional && !has_region(name)) {
        return refuse(format!("this namespace has no region `{region}`"));
    }
    if let Some(sink) = target.sinks.iter().find(|name| inlet.outlets.iter().all(|outlet| *outlet.sink != ***name)) {
        return refuse(format!("this namespace has no sink `{sink}`"));
    }
    let fits = |outlet: &super::Outlet| {
        target.kind.is_none_or(|kind| kind == outlet.kind)
            && (target.regions.is_empty()
                || outlet.region.as_deref().is_none_or(|region| target.regions.iter().any(|one| one == region)))
            && (target.sinks.is_empty() || target.sinks.iter().any(|one| **one == *outlet.sink))
    };
    if inlet.outlets.iter().any(fits) {
        Ok(target)
    } else {
        refuse("no sink of this namespace fits the target".to_owned())
    }
}
