//! Text with references into a record: `cache:{key}`, `{payload.user.id}`, `{headers.x:-none}`.
//!
//! Takes what a file says, gives a template; takes an operation, gives text, bytes or a JSON value. A `{` opens a
//! reference only before the known words; a value that is missing or null is the record's error unless there is a default.

use bytes::Bytes;
use serde_json::Value;

use super::{Failure, Operation};

/// A text that names what it wants from a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(String),
    Reference { root: Root, path: Vec<String>, default: Option<String>, text: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Root {
    Key,
    Payload,
    Headers,
    Record,
    Region,
    Sink,
}

const ROOTS: [(&str, Root); 6] = [
    ("key", Root::Key),
    ("payload", Root::Payload),
    ("headers", Root::Headers),
    ("record", Root::Record),
    ("region", Root::Region),
    ("sink", Root::Sink),
];

impl Template {
    /// Reads a template. Text that opens no reference is literal, so every text is a template.
    pub fn new(text: &str) -> Self {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('{') {
            let (before, from) = rest.split_at(at);
            literal.push_str(before);
            if let Some(after) = from.strip_prefix("{{") {
                literal.push('{');
                rest = after;
            } else if let Some((part, after)) = reference(from) {
                if !literal.is_empty() {
                    parts.push(Part::Literal(std::mem::take(&mut literal)));
                }
                parts.push(part);
                rest = after;
            } else {
                literal.push('{');
                rest = from.get(1..).unwrap_or_default();
            }
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal));
        }
        Self { parts }
    }

    /// The text when it needs no record.
    pub fn literal(&self) -> Option<&str> {
        match self.parts.as_slice() {
            [] => Some(""),
            [Part::Literal(text)] => Some(text),
            _ => None,
        }
    }

    /// The text for a record.
    ///
    /// # Errors
    /// When a value is missing.
    pub fn text(&self, operation: &Operation, sink: &str) -> Result<String, Failure> {
        self.each(operation, sink, |text| Ok(text.to_owned()))
    }

    /// The text for a record, each value as one segment of a path or one word of a query.
    ///
    /// # Errors
    /// When a value is missing.
    pub fn url(&self, operation: &Operation, sink: &str) -> Result<String, Failure> {
        self.each(operation, sink, |text| Ok(encode(text)))
    }

    /// The text for a record, each value within one name of a path.
    ///
    /// # Errors
    /// When a value is missing, or would leave its folder.
    pub fn path(&self, operation: &Operation, sink: &str) -> Result<String, Failure> {
        self.each(operation, sink, |text| {
            if text.is_empty() || text.starts_with('.') || text.contains(['/', '\\', '\0']) {
                let shown: String = text.chars().take(60).collect();
                return Err(Failure::rendering(format!("`{shown}` cannot be part of a file's name")));
            }
            Ok(text.to_owned())
        })
    }

    fn each(
        &self,
        operation: &Operation,
        sink: &str,
        shape: impl Fn(&str) -> Result<String, Failure>,
    ) -> Result<String, Failure> {
        let mut out = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(text) => out.push_str(text),
                Part::Reference { .. } => out.push_str(&shape(&plain(&look_up(part, operation, sink)?))?),
            }
        }
        Ok(out)
    }

    /// The value for a record: a template that is exactly one reference keeps its JSON type.
    ///
    /// # Errors
    /// When a value is missing.
    pub fn value(&self, operation: &Operation, sink: &str) -> Result<Value, Failure> {
        match self.parts.as_slice() {
            [part @ Part::Reference { .. }] => look_up(part, operation, sink),
            _ => self.text(operation, sink).map(Value::String),
        }
    }

    /// The bytes for a record; `{payload}` alone is the payload as it is.
    ///
    /// # Errors
    /// When a value is missing.
    pub fn bytes(&self, operation: &Operation, sink: &str) -> Result<Bytes, Failure> {
        match self.parts.as_slice() {
            [Part::Reference { root: Root::Payload, path, .. }] if path.is_empty() => {
                Ok(operation.event.payload().clone())
            }
            _ => self.text(operation, sink).map(Bytes::from),
        }
    }
}

fn reference(from: &str) -> Option<(Part, &str)> {
    let end = from.find('}')?;
    let inside = from.get(1..end)?;
    let (name, default) = inside.split_once(":-").map_or((inside, None), |(name, default)| (name, Some(default)));
    let mut steps = name.split('.');
    let word = steps.next()?;
    let (_, root) = ROOTS.iter().find(|(known, _)| *known == word)?;
    let part = Part::Reference {
        root: *root,
        path: steps.map(ToOwned::to_owned).collect(),
        default: default.map(ToOwned::to_owned),
        text: name.to_owned(),
    };
    Some((part, from.get(end + 1..).unwrap_or_default()))
}

fn look_up(part: &Part, operation: &Operation, sink: &str) -> Result<Value, Failure> {
    let Part::Reference { root, path, default, text } = part else { return Ok(Value::Null) };
    let event = &operation.event;
    let record = &event.record;
    let step = path.first().map(String::as_str);
    let string = |text: &str| Value::String(text.to_owned());
    let found = match root {
        Root::Key => event.key.as_deref().map(string),
        Root::Region => operation.region.as_deref().map(string),
        Root::Sink => Some(string(sink)),
        Root::Headers => {
            let name = path.join(".");
            event.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(&name)).map(|(_, value)| string(value))
        }
        Root::Record => match step {
            Some("id") => Some(string(&id(operation))),
            Some("written_at") => Some(string(&record.written_at.to_string())),
            Some("priority") => record.priority.map(Value::from),
            _ => None,
        },
        Root::Payload => {
            let mut value = event.json().map_err(|error| Failure::rendering(format!("{{{text}}}: {error}")))?;
            let mut found = true;
            for step in path {
                let next = match value {
                    Value::Array(items) => step.parse().ok().and_then(|at: usize| items.get(at)),
                    _ => value.get(step),
                };
                match next {
                    Some(next) => value = next,
                    None => {
                        found = false;
                        break;
                    }
                }
            }
            found.then(|| value.clone())
        }
    };
    match (found.filter(|value| !value.is_null()), default) {
        (Some(value), _) => Ok(value),
        (None, Some(default)) => Ok(Value::String(default.clone())),
        (None, None) => Err(Failure::rendering(format!(
            "{{{text}}} is missing or null in this record; a default is written {{{text}:-x}}"
        ))),
    }
}

/// The record's id, with the child's number where `emit` made several.
pub(super) fn id(operation: &Operation) -> String {
    let event = &operation.event;
    if event.child == 0 { event.record.id.to_string() } else { format!("{}/{}", event.record.id, event.child) }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_~".contains(&byte) || (byte == b'.' && text.trim_matches('.') != "") {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}
