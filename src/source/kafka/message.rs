//! A record as a Kafka message, and back: the payload is the value, the key the key, headers are headers.
//!
//! What Kafka has no place for (id, times, target, tags …) stands in one header of ours. A message without it was written by
//! another program: it gets an id that is the same at every reading, and the broker's time.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use rdkafka::Message;
use rdkafka::message::{BorrowedMessage, Header, Headers as _, OwnedHeaders};

use crate::clock::Timestamp;
use crate::record::{Headers, Position, Record, RecordId};
use crate::source::DeadLetter;

/// The header with what Kafka has no place for: the record's encoding without payload, key and headers.
pub(super) const ENVELOPE: &str = "walflow";
/// The header with the record's id as text, for those who read the topic with other tools.
pub(super) const ID: &str = "walflow-id";

/// A record as its parts of a message: headers; key and value are the record's own.
pub(super) fn headers(record: &Record) -> OwnedHeaders {
    let bare = Record { key: None, headers: Vec::new(), payload: Bytes::new(), ..record.clone() };
    let mut envelope = Vec::new();
    bare.encode(&mut envelope);
    let id = record.id.to_string();
    let mut headers = OwnedHeaders::new_with_capacity(record.headers.len() + 2);
    for (name, value) in &record.headers {
        headers = headers.insert(Header { key: name, value: Some(value.as_bytes()) });
    }
    headers
        .insert(Header { key: ID, value: Some(id.as_bytes()) })
        .insert(Header { key: ENVELOPE, value: Some(envelope.as_slice()) })
}

/// Where a message stands; the first offset of a partition is place 1.
pub(super) fn position(partition: i32, offset: i64) -> Position {
    let part = u16::try_from(partition).unwrap_or(u16::MAX);
    Position::in_part(part, u64::try_from(offset).unwrap_or(0) + 1)
}

/// The partition and the offset that is read next after a position.
pub(super) fn next_offset(position: Position) -> (i32, i64) {
    (i32::from(position.part()), i64::try_from(position.offset()).unwrap_or(i64::MAX))
}

/// What a message was made of, or what it is as another program wrote it.
pub(super) fn record(message: &BorrowedMessage<'_>, number: u32) -> Record {
    let mut envelope = None;
    let mut headers: Headers = Vec::new();
    for header in message.headers().iter().flat_map(|headers| headers.iter()) {
        match header.key {
            ENVELOPE => envelope = header.value,
            ID => {}
            name => headers.push((name.into(), text(header.value.unwrap_or_default()))),
        }
    }
    let payload = message.payload().map(Bytes::copy_from_slice);
    let key: Option<Arc<str>> = message.key().map(|key| (&*text(key)).into());
    let ours = envelope.and_then(|bytes| Record::decode(&Bytes::copy_from_slice(bytes)).ok());
    if let Some(ours) = ours {
        return Record { key, headers, payload: payload.unwrap_or_default(), ..ours };
    }
    let at = Timestamp::from_millis(message.timestamp().to_millis().unwrap_or(0));
    let id = foreign_id(message.topic(), message.partition(), message.offset(), at, number);
    // A null value is no payload; scripts see it as ().
    let payload = payload.unwrap_or_else(|| Bytes::from_static(b"null"));
    let binary = serde_json::from_slice::<serde::de::IgnoredAny>(&payload).is_err();
    Record { key, headers, binary, ..Record::new(id, at, payload) }
}

/// A dead letter as a record of the topic for dead letters: the original payload and headers, and why it is there.
pub(super) fn letter(letter: &DeadLetter) -> Record {
    let record = &letter.record;
    let mut headers = record.headers.clone();
    let facts = [
        ("walflow-branch", letter.branch.to_string()),
        (
            "walflow-reason",
            serde_json::to_value(letter.reason).ok().and_then(|v| Some(v.as_str()?.to_owned())).unwrap_or_default(),
        ),
        ("walflow-error", letter.last_error.to_string()),
        ("walflow-stage", letter.stage.to_string()),
        ("walflow-attempts", letter.attempts.to_string()),
        ("walflow-dead-at", letter.at.to_string()),
    ];
    headers.extend(facts.into_iter().map(|(name, value)| (name.into(), value.into())));
    Record { headers, ..(**record).clone() }
}

/// The id of a message of another program: the same whoever reads it, and whenever.
fn foreign_id(topic: &str, partition: i32, offset: i64, at: Timestamp, number: u32) -> RecordId {
    // FNV-1a: it has to stay the same for ever, not to resist anybody.
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let numbers = partition.to_le_bytes().into_iter().chain(offset.to_le_bytes());
    for byte in topic.bytes().chain(numbers) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let counter = u16::try_from(offset & 0x0FFF).unwrap_or(0);
    RecordId::new(at, counter, number, hash)
}

/// Bytes as a key or header value; what is no UTF-8 is kept as base64 and says so.
fn text(bytes: &[u8]) -> Box<str> {
    std::str::from_utf8(bytes).map_or_else(|_| format!("base64:{}", STANDARD.encode(bytes)).into(), Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_offsets_agree() {
        assert_eq!(position(0, 0), Position(1));
        assert_eq!(next_offset(position(7, 41)), (7, 42));
        assert_eq!(next_offset(Position::in_part(3, 0)), (3, 0));
    }

    #[test]
    fn a_message_of_another_program_has_one_id_for_ever() {
        let at = Timestamp::from_millis(1_764_000_000_000);
        let id = foreign_id("orders", 2, 77, at, 9);
        assert_eq!(id.to_string(), foreign_id("orders", 2, 77, at, 9).to_string());
        assert_ne!(id, foreign_id("orders", 3, 77, at, 9));
        assert_eq!((id.time(), id.namespace_number()), (at, 9));
    }

    #[test]
    fn bytes_that_are_no_text_are_kept() {
        assert_eq!(&*text("grüß".as_bytes()), "grüß");
        assert_eq!(&*text(&[0xFF, 0x00]), "base64:/wA=");
    }
}
