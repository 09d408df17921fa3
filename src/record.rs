//! What flows: one write, from the client's request to its targets, and its bytes in a frame.
//!
//! A [`Record`] never changes after ingest. Its payload stays the exact bytes that the client sent; who needs JSON
//! parses them. The encoding is a list of typed entries, so that a reader skips what it does not know.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;

/// The longest key, in bytes; a client's or a script's.
pub const LONGEST_KEY: usize = 1_024;
/// Headers at most, names and values, in bytes; a client's with its tags, or a script's.
pub const MOST_HEADERS: usize = 16 << 10;

/// A namespace's name: 1 to 63 of `a-z`, `0-9`, `-`, starting and ending with a letter or digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Namespace(Arc<str>);

/// A text cannot name a namespace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a namespace is 1 to 63 of a-z, 0-9 and '-', with a letter or digit at both ends")]
pub struct NotANamespace;

impl Namespace {
    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Namespace {
    type Err = NotANamespace;

    fn from_str(text: &str) -> Result<Self, NotANamespace> {
        let legal = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let fine =
            (1..=63).contains(&text.len()) && text.bytes().all(legal) && !text.starts_with('-') && !text.ends_with('-');
        if fine { Ok(Self(text.into())) } else { Err(NotANamespace) }
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// A record's identity: a UUIDv7 whose random bits carry the namespace's number, so that an id alone finds its log.
///
/// Layout of the 128 bits: 48 time in ms, 4 version, 12 counter, 2 variant, 24 namespace number, 38 random.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, utoipa::ToSchema)]
#[schema(value_type = String, format = "uuid")]
pub struct RecordId(uuid::Uuid);

impl RecordId {
    /// Builds an id from its parts; `counter` keeps ids of one millisecond in order (12 bits are used).
    pub fn new(time: Timestamp, counter: u16, namespace: u32, random: u64) -> Self {
        let millis = u64::try_from(time.as_millis()).unwrap_or(0) & 0xFFFF_FFFF_FFFF;
        let high = (millis << 16) | 0x7000 | u64::from(counter & 0x0FFF);
        let low = (0b10 << 62) | (u64::from(namespace & 0x00FF_FFFF) << 38) | (random & 0x3F_FFFF_FFFF);
        Self(uuid::Uuid::from_u64_pair(high, low))
    }

    /// The id whose 16 bytes these are, most significant first.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(uuid::Uuid::from_bytes(bytes))
    }

    /// The id's 16 bytes, most significant first; they sort as ids do.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// The millisecond in which the id was drawn.
    pub fn time(self) -> Timestamp {
        Timestamp::from_millis(i64::try_from(self.0.as_u64_pair().0 >> 16).unwrap_or(0))
    }

    /// The number of the namespace that drew it.
    pub fn namespace_number(self) -> u32 {
        ((self.0.as_u64_pair().1 >> 38) & 0x00FF_FFFF) as u32
    }
}

/// A text is not a record's id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a message id is a UUID such as 019a0b1c-2d3e-7f00-8000-000000000000")]
pub struct NotAnId;

impl FromStr for RecordId {
    type Err = NotAnId;

    fn from_str(text: &str) -> Result<Self, NotAnId> {
        let id: uuid::Uuid = text.parse().map_err(|_| NotAnId)?;
        if id.get_version_num() == 7 { Ok(Self(id)) } else { Err(NotAnId) }
    }
}

impl fmt::Display for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl fmt::Debug for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl Serialize for RecordId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A record's place in its namespace's log. A log has one part or several (a broker's partitions or streams), each with an
/// order of its own; of a part the first place is 1 at the lowest and each next one is higher. 0 is before the first. The part
/// stands in the upper 16 bits, so a log of one part counts 1, 2, 3…
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, utoipa::ToSchema)]
pub struct Position(pub u64);

impl Position {
    /// The highest place in a part.
    pub const LAST_OFFSET: u64 = (1 << 48) - 1;

    /// The place `offset` of a part.
    pub const fn in_part(part: u16, offset: u64) -> Self {
        Self(((part as u64) << 48) | (offset & Self::LAST_OFFSET))
    }

    /// Which part of the log it lies in.
    pub const fn part(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// The place in its part.
    pub const fn offset(self) -> u64 {
        self.0 & Self::LAST_OFFSET
    }

    /// The position after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What sort of thing a target is, as the API says it. Each sink kind is one of them by nature; a file may say otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TargetKind {
    /// A database.
    Database,
    /// A cache.
    Cache,
    /// An HTTP service.
    Http,
    /// A queue or topic.
    Queue,
    /// Files.
    FileSystem,
    /// A webhook receiver.
    Webhook,
}

/// The client's wish to send a record to fewer targets than the file declares. It can only narrow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Only sinks of this kind.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<TargetKind>,
    /// Only these regions; empty = all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub regions: Vec<String>,
    /// Only these sinks, by name; empty = all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sinks: Vec<String>,
}

/// Name and value pairs that travel with a record.
pub type Headers = Vec<(Box<str>, Box<str>)>;

/// One accepted write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its identity, the same at every target and on every retry.
    pub id: RecordId,
    /// When ingest accepted it; parking does not change it.
    pub written_at: Timestamp,
    /// When it is due, if it was delayed.
    pub due_at: Option<Timestamp>,
    /// Records with the same key keep their order; `None` has no order.
    pub key: Option<Arc<str>>,
    /// What the request called `metadata`.
    pub headers: Headers,
    /// Which targets the client wants, if fewer than all.
    pub target: Option<Target>,
    /// Stored and shown; changes no order.
    pub priority: Option<i64>,
    /// Stored and shown.
    pub tags: Vec<Box<str>>,
    /// The region whose walflow first accepted it, for the loop guard.
    pub origin: Option<Box<str>>,
    /// The idempotency key, handed on to sinks whose protocol has one.
    pub idempotency_key: Option<Box<str>>,
    /// The revision of the pipeline file in force when it entered the log.
    pub epoch: u32,
    /// True for `payloadBase64`: the payload is not JSON.
    pub binary: bool,
    /// The exact bytes received.
    pub payload: Bytes,
}

/// The bytes of a frame are no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the bytes are not a record: {0}")]
pub struct Malformed(&'static str);

mod tag {
    pub(super) const ID: u8 = 1;
    pub(super) const WRITTEN_AT: u8 = 2;
    pub(super) const DUE_AT: u8 = 3;
    pub(super) const KEY: u8 = 4;
    pub(super) const HEADER: u8 = 5;
    pub(super) const TARGET: u8 = 6;
    pub(super) const PRIORITY: u8 = 7;
    pub(super) const TAG: u8 = 8;
    pub(super) const ORIGIN: u8 = 9;
    pub(super) const IDEMPOTENCY_KEY: u8 = 10;
    pub(super) const EPOCH: u8 = 11;
    pub(super) const BINARY: u8 = 12;
    pub(super) const PAYLOAD: u8 = 255;
}

fn put(out: &mut Vec<u8>, tag: u8, bytes: &[u8]) {
    out.push(tag);
    out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(bytes);
}

impl Record {
    /// A record with nothing but a payload: no key, no headers, due at once, for every target, epoch 0.
    pub const fn new(id: RecordId, written_at: Timestamp, payload: Bytes) -> Self {
        Self {
            id,
            written_at,
            due_at: None,
            key: None,
            headers: Vec::new(),
            target: None,
            priority: None,
            tags: Vec::new(),
            origin: None,
            idempotency_key: None,
            epoch: 0,
            binary: false,
            payload,
        }
    }

    /// Appends the record's entries to `out`: each is a tag (u8), a length (u32 LE) and that many bytes; payload last.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.reserve(128 + self.payload.len());
        put(out, tag::ID, self.id.as_bytes());
        put(out, tag::WRITTEN_AT, &self.written_at.as_millis().to_le_bytes());
        if let Some(due_at) = self.due_at {
            put(out, tag::DUE_AT, &due_at.as_millis().to_le_bytes());
        }
        if let Some(key) = &self.key {
            put(out, tag::KEY, key.as_bytes());
        }
        for (name, value) in &self.headers {
            let mut pair = Vec::with_capacity(4 + name.len() + value.len());
            pair.extend_from_slice(&u32::try_from(name.len()).unwrap_or(0).to_le_bytes());
            pair.extend_from_slice(name.as_bytes());
            pair.extend_from_slice(value.as_bytes());
            put(out, tag::HEADER, &pair);
        }
        if let Some(target) = self.target.as_ref().and_then(|target| serde_json::to_vec(target).ok()) {
            put(out, tag::TARGET, &target);
        }
        if let Some(priority) = self.priority {
            put(out, tag::PRIORITY, &priority.to_le_bytes());
        }
        for text in &self.tags {
            put(out, tag::TAG, text.as_bytes());
        }
        if let Some(origin) = &self.origin {
            put(out, tag::ORIGIN, origin.as_bytes());
        }
        if let Some(key) = &self.idempotency_key {
            put(out, tag::IDEMPOTENCY_KEY, key.as_bytes());
        }
        if self.epoch != 0 {
            put(out, tag::EPOCH, &self.epoch.to_le_bytes());
        }
        if self.binary {
            put(out, tag::BINARY, &[]);
        }
        put(out, tag::PAYLOAD, &self.payload);
    }

    /// The id in an encoded record, without decoding the rest.
    pub fn peek_id(bytes: &[u8]) -> Option<RecordId> {
        let (head, rest) = bytes.split_first_chunk::<5>()?;
        let id = rest.first_chunk::<16>()?;
        (*head == [tag::ID, 16, 0, 0, 0]).then(|| RecordId::from_bytes(*id))
    }

    /// Reads a record back. The payload shares `bytes`; entries with an unknown tag are skipped.
    ///
    /// # Errors
    /// When an entry is cut short, a text is not UTF-8, or id, time or payload are missing.
    pub fn decode(bytes: &Bytes) -> Result<Self, Malformed> {
        let mut record = Self::new(RecordId::from_bytes([0; 16]), Timestamp::MIN, Bytes::new());
        let (mut has_id, mut has_payload) = (false, false);
        let mut at = 0;
        while at < bytes.len() {
            let tag = *bytes.get(at).ok_or(Malformed("cut short"))?;
            let len = bytes.get(at + 1..at + 5).and_then(|four| four.try_into().ok()).map(u32::from_le_bytes);
            let len = usize::try_from(len.ok_or(Malformed("cut short"))?).map_err(|_| Malformed("too long"))?;
            let start = at + 5;
            let end = start.checked_add(len).filter(|end| *end <= bytes.len()).ok_or(Malformed("cut short"))?;
            let value = bytes.get(start..end).ok_or(Malformed("cut short"))?;
            match tag {
                tag::ID => {
                    record.id = RecordId::from_bytes(value.try_into().map_err(|_| Malformed("id"))?);
                    has_id = true;
                }
                tag::WRITTEN_AT => record.written_at = Timestamp::from_millis(integer(value)?),
                tag::DUE_AT => record.due_at = Some(Timestamp::from_millis(integer(value)?)),
                tag::KEY => record.key = Some(text(value)?.into()),
                tag::HEADER => record.headers.push(header(value)?),
                tag::TARGET => {
                    record.target = Some(serde_json::from_slice(value).map_err(|_| Malformed("target"))?);
                }
                tag::PRIORITY => record.priority = Some(integer(value)?),
                tag::TAG => record.tags.push(text(value)?.into()),
                tag::ORIGIN => record.origin = Some(text(value)?.into()),
                tag::IDEMPOTENCY_KEY => record.idempotency_key = Some(text(value)?.into()),
                tag::EPOCH => {
                    record.epoch = u32::from_le_bytes(value.try_into().map_err(|_| Malformed("epoch"))?);
                }
                tag::BINARY => record.binary = true,
                tag::PAYLOAD => {
                    record.payload = bytes.slice(start..end);
                    has_payload = true;
                }
                _ => {}
            }
            at = end;
        }
        if has_id && has_payload { Ok(record) } else { Err(Malformed("no id or no payload")) }
    }

    /// Bytes that the record takes in memory, near enough for budgets.
    pub fn weight(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len() + 32).sum();
        256 + headers + self.key.as_ref().map_or(0, |key| key.len()) + self.payload.len()
    }
}

fn text(value: &[u8]) -> Result<&str, Malformed> {
    std::str::from_utf8(value).map_err(|_| Malformed("text is not UTF-8"))
}

fn integer(value: &[u8]) -> Result<i64, Malformed> {
    value.try_into().map(i64::from_le_bytes).map_err(|_| Malformed("number"))
}

fn header(value: &[u8]) -> Result<(Box<str>, Box<str>), Malformed> {
    let (len, rest) = value.split_at_checked(4).ok_or(Malformed("header"))?;
    let len = len.try_into().map(u32::from_le_bytes).map_err(|_| Malformed("header"))?;
    let len = usize::try_from(len).map_err(|_| Malformed("header"))?;
    let (name, value) = rest.split_at_checked(len).ok_or(Malformed("header"))?;
    Ok((text(name)?.into(), text(value)?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Record {
        Record {
            id: RecordId::new(Timestamp::from_millis(1_764_000_000_000), 7, 42, 99),
            written_at: Timestamp::from_millis(1_764_000_000_000),
            due_at: Some(Timestamp::from_millis(1_764_000_005_000)),
            key: Some("user:123".into()),
            headers: vec![("a".into(), "b".into()), ("empty".into(), "".into())],
            target: Some(Target { kind: Some(TargetKind::Cache), regions: vec!["eu".into()], sinks: vec![] }),
            priority: Some(-3),
            tags: vec!["x".into()],
            origin: Some("us".into()),
            idempotency_key: Some("k".into()),
            epoch: 4,
            binary: true,
            payload: Bytes::from_static(b"\x00\xff"),
        }
    }

    #[test]
    fn a_record_comes_back_as_it_was_encoded() {
        let record = full();
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        assert_eq!(Record::peek_id(&bytes), Some(record.id));
        assert_eq!(Record::decode(&bytes.into()).unwrap(), record);
    }

    #[test]
    fn every_cut_is_refused_and_an_unknown_entry_is_skipped() {
        let mut bytes = Vec::new();
        put(&mut bytes, 200, b"from the future");
        full().encode(&mut bytes);
        for cut in 0..bytes.len() {
            assert!(Record::decode(&Bytes::copy_from_slice(&bytes[..cut])).is_err(), "cut at {cut}");
        }
        assert_eq!(Record::decode(&bytes.into()).unwrap(), full());
    }

    #[test]
    fn an_id_carries_its_time_and_namespace_and_reads_back() {
        let id = full().id;
        assert_eq!(id.namespace_number(), 42);
        assert_eq!(id.time(), Timestamp::from_millis(1_764_000_000_000));
        assert_eq!(id.to_string().parse::<RecordId>().unwrap(), id);
        assert!("550e8400-e29b-41d4-a716-446655440000".parse::<RecordId>().is_err());
    }

    #[test]
    fn names_that_could_reach_the_file_system_are_refused() {
        for wrong in ["", "../x", "A", "a/b", "-a", "a-", ".", "a b", &"a".repeat(64)] {
            assert!(wrong.parse::<Namespace>().is_err(), "{wrong}");
        }
        assert_eq!("user-cache-2".parse::<Namespace>().unwrap().as_str(), "user-cache-2");
    }
}
