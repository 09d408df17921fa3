//! One reference of a template: how it is written, and the value that it finds in a record.
//!
//! Takes the text between two braces, gives a value as it stands in the record. Never parses more of a payload than the
//! path needs to pass.

use std::borrow::Cow;

use bytes::Bytes;
use serde_json::Value;

use super::{RenderError, Scope, TemplateError};
use crate::sink::json::{self, Step};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    text: Box<str>,
    root: Root,
    default: Option<Box<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Root {
    Key,
    Payload(Box<[Step]>),
    Headers,
    Header(Box<str>),
    Record(Field),
    Region,
    Sink,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    Id,
    Namespace,
    WrittenAt,
    DueAt,
    Priority,
    Tags,
    Origin,
    IdempotencyKey,
}

const FIELDS: [(&str, Field); 8] = [
    ("id", Field::Id),
    ("namespace", Field::Namespace),
    ("written_at", Field::WrittenAt),
    ("due_at", Field::DueAt),
    ("priority", Field::Priority),
    ("tags", Field::Tags),
    ("origin", Field::Origin),
    ("idempotency_key", Field::IdempotencyKey),
];

const HEADS: [&str; 6] = ["key", "payload", "headers", "record", "region", "sink"];

/// A reference's value.
pub(super) enum Found<'a> {
    /// A string.
    Text(Cow<'a, str>),
    /// JSON as it stands, no string.
    Json(Cow<'a, str>),
    /// The payload of a record that is not JSON.
    Binary(&'a Bytes),
}

/// The head that a reference begins with; `None` where the brace is literal.
pub(super) fn head_of(body: &str) -> Option<&'static str> {
    HEADS.into_iter().find(|head| {
        body.strip_prefix(head)
            .is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '-')))
    })
}

impl Reference {
    /// Reads a reference that begins at `offset`; `body` is what follows the brace. Also gives the length, braces included.
    pub(super) fn parse(body: &str, head: &str, offset: usize) -> Result<(Self, usize), TemplateError> {
        let wrong = |at: usize, message: String| TemplateError { offset: offset + 1 + at, message: message.into() };
        let Some(end) = body.find('}') else {
            let message = format!("the reference to '{head}' has no closing '}}'; write {{{{ for a literal brace");
            return Err(TemplateError { offset, message: message.into() });
        };
        let inner = body.get(..end).unwrap_or_default();
        let (path, default) = match inner.find(":-") {
            Some(at) => (inner.get(..at).unwrap_or_default(), inner.get(at + 2..)),
            None => (inner, None),
        };
        let rest = path.get(head.len()..).unwrap_or_default();
        let at = head.len();
        let alone = |root: Root| {
            if rest.is_empty() {
                Ok(root)
            } else {
                Err(wrong(at, format!("nothing follows '{head}' in a reference; write {{{head}}}")))
            }
        };
        let root = match head {
            "key" => alone(Root::Key)?,
            "region" => alone(Root::Region)?,
            "sink" => alone(Root::Sink)?,
            "headers" => match rest.strip_prefix('.') {
                Some(name) if !name.is_empty() => Root::Header(name.into()),
                None if rest.is_empty() => Root::Headers,
                _ => return Err(wrong(at, "write {headers.NAME}".to_owned())),
            },
            "record" => {
                let name = rest.strip_prefix('.').unwrap_or_default();
                let field = FIELDS.iter().find(|(known, _)| *known == name);
                let known = FIELDS.map(|(name, _)| name).join(", ");
                Root::Record(
                    field
                        .ok_or_else(|| wrong(at, format!("a record has {known}; write {{record.id}}, for example")))?
                        .1,
                )
            }
            _ => Root::Payload(steps(rest).map_err(|(inside, message)| wrong(at + inside, message.to_owned()))?),
        };
        Ok((Self { text: inner.into(), root, default: default.map(Into::into) }, end + 2))
    }

    pub(super) fn wrong(&self, why: impl Into<Box<str>>) -> RenderError {
        RenderError { reference: self.text.clone(), why: why.into() }
    }

    /// True when it differs from record to record.
    pub(super) const fn varies(&self) -> bool {
        !matches!(self.root, Root::Region | Root::Sink | Root::Record(Field::Namespace))
    }

    /// True for `{payload}` itself.
    pub(super) fn is_whole_payload(&self) -> bool {
        matches!(&self.root, Root::Payload(path) if path.is_empty())
    }

    pub(super) fn text<'a>(&'a self, scope: &Scope<'a>) -> Result<Cow<'a, str>, RenderError> {
        match self.found(scope)? {
            Found::Text(text) => Ok(text),
            Found::Json(Cow::Borrowed(json)) => {
                Ok(match json::compact(json.as_bytes()) {
                    Cow::Borrowed(_) => Cow::Borrowed(json),
                    // Blanks between tokens are ASCII: what is left is the same text without them.
                    Cow::Owned(bytes) => Cow::Owned(String::from_utf8(bytes).unwrap_or_else(|_| json.to_owned())),
                })
            }
            Found::Json(Cow::Owned(json)) => Ok(Cow::Owned(json)),
            Found::Binary(bytes) => std::str::from_utf8(bytes)
                .map(Cow::Borrowed)
                .map_err(|_| self.wrong("is not text: the payload was written as payloadBase64")),
        }
    }

    pub(super) fn found<'a>(&'a self, scope: &Scope<'a>) -> Result<Found<'a>, RenderError> {
        if let Some(found) = self.lookup(scope)? {
            return Ok(found);
        }
        match &self.default {
            Some(text) => Ok(Found::Text(Cow::Borrowed(text))),
            None => Err(self.wrong("is missing or null; {…:-DEFAULT} would fill it in")),
        }
    }

    fn lookup<'a>(&'a self, scope: &Scope<'a>) -> Result<Option<Found<'a>>, RenderError> {
        let (event, record) = (&scope.operation.event, &scope.operation.event.record);
        let text = |text: Option<&'a str>| text.map(|text| Found::Text(Cow::Borrowed(text)));
        Ok(match &self.root {
            Root::Key => text(event.key.as_deref()),
            Root::Region => text(scope.operation.region.as_deref()),
            Root::Sink => text(Some(&scope.context.sink)),
            Root::Header(name) => {
                text(event.headers().iter().find(|(known, _)| known == name).map(|(_, value)| &**value))
            }
            Root::Headers => {
                let pairs = event.headers().iter().map(|(name, value)| (name.to_string(), Value::from(&**value)));
                Some(Found::Json(Cow::Owned(Value::Object(pairs.collect()).to_string())))
            }
            Root::Payload(path) if record.binary => {
                if !path.is_empty() {
                    return Err(self.wrong("looks into a payload that is not JSON: it was written as payloadBase64"));
                }
                Some(Found::Binary(event.payload()))
            }
            Root::Payload(path) => {
                let found = json::find(event.payload(), path)
                    .map_err(|error| self.wrong(format!("looks into a payload that is not JSON: {error}")))?;
                match found.map(serde_json::value::RawValue::get) {
                    None | Some("null") => None,
                    Some(raw) if raw.starts_with('"') => {
                        let value: Cow<'a, str> = plain(raw)
                            .map_or_else(
                                || serde_json::from_str::<String>(raw).map(Cow::Owned),
                                |plain| Ok(Cow::Borrowed(plain)),
                            )
                            .map_err(|error| self.wrong(format!("is no text: {error}")))?;
                        Some(Found::Text(value))
                    }
                    Some(raw) => Some(Found::Json(Cow::Borrowed(raw))),
                }
            }
            Root::Record(field) => match field {
                Field::Id => Some(Found::Text(Cow::Owned(scope.operation.delivery_id()))),
                Field::Namespace => text(Some(&scope.context.namespace)),
                Field::WrittenAt => Some(Found::Text(Cow::Owned(record.written_at.to_string()))),
                Field::DueAt => record.due_at.map(|time| Found::Text(Cow::Owned(time.to_string()))),
                Field::Priority => record.priority.map(|priority| Found::Json(Cow::Owned(priority.to_string()))),
                Field::Tags => {
                    let tags = record.tags.iter().map(|tag| Value::from(&**tag)).collect();
                    Some(Found::Json(Cow::Owned(Value::Array(tags).to_string())))
                }
                Field::Origin => text(record.origin.as_deref()),
                Field::IdempotencyKey => text(record.idempotency_key.as_deref()),
            },
        })
    }
}

/// A JSON string without escapes, without its quotes.
fn plain(raw: &str) -> Option<&str> {
    let inner = raw.strip_prefix('"')?.strip_suffix('"')?;
    (!inner.contains('\\')).then_some(inner)
}

/// The steps of `.a.b[0]`; a fault names its place in the text.
fn steps(text: &str) -> Result<Box<[Step]>, (usize, &'static str)> {
    let mut steps = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let at = text.len() - rest.len();
        if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[']).unwrap_or(after.len());
            let (name, next) = after.split_at_checked(end).unwrap_or((after, ""));
            if name.trim().is_empty() {
                return Err((at, "a name is missing after '.'; write {payload.user.id}, for example"));
            }
            if name.contains(['{', '"']) {
                return Err((
                    at,
                    "a name in a reference has no braces or quotes; write {payload.user.id}, for example",
                ));
            }
            steps.push(Step::Field(name.into()));
            rest = next;
        } else if let Some(after) = rest.strip_prefix('[') {
            let Some((number, next)) = after.split_once(']') else {
                return Err((at, "the '[' has no ']'; write {payload.items[0]}, for example"));
            };
            let index =
                number.parse().map_err(|_| (at, "an index is a number; write {payload.items[0]}, for example"))?;
            steps.push(Step::Index(index));
            rest = next;
        } else {
            return Err((
                at,
                "a reference is {payload}, {payload.a.b} or {payload.a[0]}; write {{ for a literal brace",
            ));
        }
    }
    Ok(steps.into())
}
