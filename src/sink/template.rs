//! Templates: text with references into a record, filled anew for each.
//!
//! `{` opens a reference only before `key`, `payload`, `headers`, `record`, `region` and `sink`; every other brace is literal and
//! `{{` forces one. What is missing or null is the record's error unless the reference has a default (`{payload.a:-x}`).
//! A value never breaks out of its place: in a URL it adds no segment, in a path it is part of one file's name.
//! Rendering never changes the payload and never rewrites a number.

mod document;
mod reference;

use std::fmt::Write as _;

use bytes::Bytes;
use serde_json::Value;

pub use self::document::{Document, DocumentError};
use self::reference::{Found, Reference, head_of};
use super::{Failure, Operation, SinkContext, json};

/// A template's text is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TemplateError {
    /// Where in the text, in bytes.
    pub offset: usize,
    /// What is wrong and what would be right.
    pub message: Box<str>,
}

/// A record cannot fill a template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{{{reference}}} {why}")]
pub struct RenderError {
    /// The reference, as it is written.
    pub reference: Box<str>,
    /// What is wrong with its value.
    pub why: Box<str>,
}

impl From<RenderError> for Failure {
    fn from(error: RenderError) -> Self {
        Self::rendering(error.to_string())
    }
}

/// What a template is filled from.
#[derive(Clone, Copy, Debug)]
pub struct Scope<'a> {
    operation: &'a Operation,
    context: &'a SinkContext,
}

impl<'a> Scope<'a> {
    /// The record and branch of an operation.
    pub const fn new(operation: &'a Operation, context: &'a SinkContext) -> Self {
        Self { operation, context }
    }

    /// The payload's bytes.
    pub fn payload(&self) -> &'a Bytes {
        self.operation.event.payload()
    }

    /// The identity that a target sees.
    pub fn delivery_id(&self) -> String {
        self.operation.delivery_id()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(Box<str>),
    Reference(Reference),
}

/// A text with references, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parts: Box<[Part]>,
}

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    /// When a reference is malformed.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut at = 0;
        while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
            let brace = rest.find('{').unwrap_or(rest.len());
            let (before, from_brace) = rest.split_at_checked(brace).unwrap_or((rest, ""));
            literal.push_str(before);
            at += brace;
            let Some(body) = from_brace.strip_prefix('{') else { break };
            if body.starts_with('{') {
                literal.push('{');
                at += 2;
            } else if let Some(head) = head_of(body) {
                let (reference, length) = Reference::parse(body, head, at)?;
                if !literal.is_empty() {
                    parts.push(Part::Literal(std::mem::take(&mut literal).into()));
                }
                parts.push(Part::Reference(reference));
                at += length;
            } else {
                literal.push('{');
                at += 1;
            }
        }
        if !literal.is_empty() {
            parts.push(Part::Literal(literal.into()));
        }
        Ok(Self { parts: parts.into() })
    }

    /// What stands before the first reference.
    pub fn literal_prefix(&self) -> &str {
        match self.parts.first() {
            Some(Part::Literal(text)) => text,
            _ => "",
        }
    }

    /// True when there is no reference.
    pub fn is_literal(&self) -> bool {
        self.references().next().is_none()
    }

    /// True when its text differs from record to record: it refers to more than region, sink and namespace.
    pub fn varies(&self) -> bool {
        self.references().any(Reference::varies)
    }

    fn references(&self) -> impl Iterator<Item = &Reference> {
        self.parts.iter().filter_map(|part| match part {
            Part::Reference(reference) => Some(reference),
            Part::Literal(_) => None,
        })
    }

    /// The only part, when that is a reference.
    fn exact(&self) -> Option<&Reference> {
        match &*self.parts {
            [Part::Reference(reference)] => Some(reference),
            _ => None,
        }
    }

    /// As text: strings as they are, everything else as compact JSON.
    ///
    /// # Errors
    /// When a value is missing, null or no text.
    pub fn render_text(&self, scope: &Scope<'_>) -> Result<String, RenderError> {
        let mut out = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(text) => out.push_str(text),
                Part::Reference(reference) => out.push_str(&reference.text(scope)?),
            }
        }
        Ok(out)
    }

    /// As bytes: `{payload}` alone is the payload's bytes, untouched; else as [`Template::render_text`].
    ///
    /// # Errors
    /// When a value is missing, null or no text.
    pub fn render_bytes(&self, scope: &Scope<'_>) -> Result<Bytes, RenderError> {
        match self.exact() {
            Some(reference) if reference.is_whole_payload() => Ok(scope.operation.event.payload().clone()),
            _ => self.render_text(scope).map(Bytes::from),
        }
    }

    /// As JSON, appended: a single reference keeps its type (`{payload}` its bytes), other text becomes a string.
    ///
    /// # Errors
    /// When a value is missing or null.
    pub fn render_json(&self, scope: &Scope<'_>, out: &mut Vec<u8>) -> Result<(), RenderError> {
        if let Some(reference) = self.exact() {
            if reference.is_whole_payload() {
                let event = &scope.operation.event;
                if event.record.binary {
                    out.extend_from_slice(&json::base64_text(event.payload()));
                } else {
                    out.extend_from_slice(event.payload());
                }
                return Ok(());
            }
            if let Found::Json(value) = reference.found(scope)? {
                out.extend_from_slice(&json::compact(value.as_bytes()));
                return Ok(());
            }
        }
        let text = self.render_text(scope)?;
        // Writing a text into memory cannot fail.
        let _ = serde_json::to_writer(out, &text);
        Ok(())
    }

    /// As a JSON value: as [`Template::render_json`], parsed.
    ///
    /// # Errors
    /// When a value is missing, null or no JSON.
    pub fn render_value(&self, scope: &Scope<'_>) -> Result<Value, RenderError> {
        let mut json = Vec::new();
        self.render_json(scope, &mut json)?;
        serde_json::from_slice(&json)
            .map_err(|error| RenderError { reference: "payload".into(), why: format!("is not JSON: {error}").into() })
    }

    /// As a URL: each value is percent-encoded, and a path segment made of values is neither empty nor `.` nor `..`.
    ///
    /// # Errors
    /// When a value is missing, null, or would change the URL's structure.
    pub fn render_url(&self, scope: &Scope<'_>) -> Result<String, RenderError> {
        let mut url = String::new();
        let mut in_query = false;
        // The literal's text and whether a value stands in it, for the segment at hand.
        let (mut start, mut last): (usize, Option<&Reference>) = (0, None);
        for part in &self.parts {
            match part {
                Part::Literal(text) => {
                    for character in text.chars() {
                        if !in_query && matches!(character, '/' | '?' | '#') {
                            stays_segment(url.get(start..), last)?;
                            in_query = character != '/';
                            last = None;
                            start = url.len() + 1;
                        }
                        url.push(character);
                    }
                }
                Part::Reference(reference) => {
                    for byte in reference.text(scope)?.bytes() {
                        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
                            url.push(char::from(byte));
                        } else {
                            let _ = write!(url, "%{byte:02X}");
                        }
                    }
                    last = Some(reference);
                }
            }
        }
        if !in_query {
            stays_segment(url.get(start..), last)?;
        }
        Ok(url)
    }

    /// As a path: each value becomes part of one file's name, never a folder of its own or a way out.
    ///
    /// # Errors
    /// When a value is missing, null or empty.
    pub fn render_path(&self, scope: &Scope<'_>) -> Result<String, RenderError> {
        let mut path = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(text) => path.push_str(text),
                Part::Reference(reference) => {
                    let value = reference.text(scope)?;
                    if value.is_empty() {
                        return Err(reference.wrong("is empty, which names no file"));
                    }
                    path.push_str(&file_name(&value));
                }
            }
        }
        Ok(path)
    }
}

/// Refuses a segment that a value made empty or a step up.
fn stays_segment(segment: Option<&str>, value: Option<&Reference>) -> Result<(), RenderError> {
    let Some(reference) = value else { return Ok(()) };
    let segment = segment.unwrap_or_default().to_ascii_lowercase().replace("%2e", ".");
    match segment.as_str() {
        "" => Err(reference.wrong("is empty and would remove a segment of the URL")),
        "." | ".." => Err(reference.wrong("would step through the URL's path")),
        _ => Ok(()),
    }
}

/// The longest that a value may be within a file's name; systems allow 255 bytes for all of it.
const LONGEST_NAME: usize = 160;

/// A value as part of a file's name: what is no letter, digit, `-`, `_` or `.` is percent-encoded, as is a dot at its beginning;
/// two values never share a name, a long one is cut and ends in its hash.
fn file_name(value: &str) -> String {
    use sha2::{Digest, Sha256};
    let mut name = String::new();
    for (at, character) in value.char_indices() {
        let plain = character.is_alphanumeric() || matches!(character, '-' | '_') || (character == '.' && at > 0);
        if plain {
            name.push(character);
        } else {
            let mut bytes = [0; 4];
            for byte in character.encode_utf8(&mut bytes).bytes() {
                let _ = write!(name, "%{byte:02X}");
            }
        }
    }
    if name.len() <= LONGEST_NAME {
        return name;
    }
    let cut = (0..=LONGEST_NAME - 33).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0);
    name.truncate(cut);
    name.push('~');
    for byte in Sha256::digest(value.as_bytes()).iter().take(16) {
        let _ = write!(name, "{byte:02x}");
    }
    name
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sink::testing::{context, operation, operation_with};

    const PAYLOAD: &str = r#"{"id": 12345678901234567890.10, "s": "a/b ü", "o": { "x": [1, 2] }, "n": null, "t": true, "q": "\"", "e": ""}"#;

    fn parse(text: &str) -> Template {
        Template::parse(text).unwrap()
    }

    fn with<T>(render: impl FnOnce(&Scope<'_>) -> T) -> T {
        let operation = operation_with(PAYLOAD, |record| {
            record.key = Some("user:1".into());
            record.headers = vec![("X-User".into(), "u1".into())];
            record.tags = vec!["a".into()];
            record.priority = Some(3);
        });
        render(&Scope::new(&operation, &context()))
    }

    fn text(template: &str) -> Result<String, String> {
        with(|scope| parse(template).render_text(scope).map_err(|error| error.to_string()))
    }

    #[test]
    fn references_are_filled_as_text() {
        for (template, expected) in [
            ("cache:{key}", "cache:user:1"),
            ("{payload.s}|{payload.id}|{payload.t}", "a/b ü|12345678901234567890.10|true"),
            ("{payload.o}", r#"{"x":[1,2]}"#),
            ("{payload.o.x[1]}", "2"),
            ("{payload.q}", "\""),
            ("{payload.n:-none} {payload.a.b:-} {payload.s:-x}", "none  a/b ü"),
            ("{headers.X-User}", "u1"),
            ("{headers}", r#"{"X-User":"u1"}"#),
            ("{record.namespace}/{sink}", "orders/main"),
            ("{record.written_at}", "2021-01-01T00:00:00.000Z"),
            ("{record.tags} {record.priority}", r#"["a"] 3"#),
            ("{region:-here}", "here"),
            ("{{key}} {keyboard} {\"a\": {}} {", "{key}} {keyboard} {\"a\": {}} {"),
        ] {
            assert_eq!(text(template).as_deref(), Ok(expected), "{template}");
        }
    }

    #[test]
    fn what_is_missing_or_null_is_the_records_error() {
        for template in ["{payload.n}", "{payload.zz}", "{payload.s.x}", "{headers.zz}", "{region}", "{record.origin}"]
        {
            let error = text(template).unwrap_err();
            assert!(error.starts_with(template) && error.contains("missing or null"), "{error}");
        }
        let binary = operation_with("\u{0}", |record| record.binary = true);
        let error = parse("{payload.a:-x}").render_text(&Scope::new(&binary, &context())).unwrap_err();
        assert!(error.to_string().contains("not JSON"), "{error}");
    }

    #[test]
    fn a_malformed_reference_is_named_with_its_place() {
        for (template, offset, word) in [
            ("ab{payload", 2, "no closing"),
            ("a{payload.}", 9, "missing after"),
            ("{payload[x]}", 8, "index"),
            ("{payload[0}", 8, "no ']'"),
            ("{key: 1}", 4, "{key}"),
            ("{record.name}", 7, "written_at"),
            ("{headers.}", 8, "headers.NAME"),
            ("{payload }", 8, "{{ for a literal"),
        ] {
            let error = Template::parse(template).unwrap_err();
            assert_eq!(error.offset, offset, "{template}: {error}");
            assert!(error.to_string().contains(word), "{template}: {error}");
        }
    }

    #[test]
    fn a_single_reference_keeps_its_type_and_its_digits() {
        let json = |template: &str| {
            with(|scope| {
                let mut out = Vec::new();
                parse(template).render_json(scope, &mut out).unwrap();
                String::from_utf8(out).unwrap()
            })
        };
        assert_eq!(json("{payload.id}"), "12345678901234567890.10");
        assert_eq!(json("{payload.o}"), r#"{"x":[1,2]}"#);
        assert_eq!(json("{payload.t}"), "true");
        assert_eq!(json("{payload.t}!"), "\"true!\"");
        assert_eq!(json("{payload.q}"), r#""\"""#);
        assert_eq!(json("{payload}"), PAYLOAD);
        assert_eq!(with(|scope| parse("{payload}").render_bytes(scope).unwrap()), PAYLOAD.as_bytes());
        assert_eq!(with(|scope| parse("{payload.o.x[0]}").render_value(scope).unwrap()), Value::from(1));
    }

    #[test]
    fn a_value_adds_no_segment_to_a_url() {
        let url = |template: &str, payload: &str| {
            parse(template).render_url(&Scope::new(&operation(payload), &context())).map_err(|error| error.to_string())
        };
        assert_eq!(
            url("http://h/a/{payload.v}?q={payload.v}", r#"{"v":"x/../y?#&é"}"#).as_deref(),
            Ok("http://h/a/x%2F..%2Fy%3F%23%26%C3%A9?q=x%2F..%2Fy%3F%23%26%C3%A9")
        );
        for (template, value) in [
            ("http://h/{payload.v}", "."),
            ("http://h/a/{payload.v}/b", ".."),
            ("http://h/a/.{payload.v}/b", "."),
            ("http://h/a/%2e{payload.v}", "."),
            ("http://h/a/{payload.v}/b", ""),
            ("http://h/a/{payload.v}", ""),
        ] {
            let error = url(template, &format!("{{\"v\":\"{value}\"}}")).unwrap_err();
            assert!(error.starts_with("{payload.v}"), "{template}: {error}");
        }
        assert_eq!(url("http://h/a?q={payload.v}", r#"{"v":".."}"#).as_deref(), Ok("http://h/a?q=.."));
    }

    #[test]
    fn what_varies_and_what_is_literal_is_known() {
        assert_eq!(parse("cache:{key}").literal_prefix(), "cache:");
        assert_eq!(parse("{key}").literal_prefix(), "");
        assert!(parse("a{{b").is_literal() && !parse("{sink}").is_literal());
        assert!(parse("{payload.a}").varies() && parse("{record.id}").varies());
        assert!(!parse("{region}{sink}{record.namespace}").varies());
    }

    proptest! {
        #[test]
        fn no_text_panics_the_parser_and_text_without_references_is_itself(text in "[a-z{}.:\\[\\]-]{0,24}|.{0,24}") {
            if let Ok(template) = Template::parse(&text) && template.is_literal() {
                prop_assert_eq!(template.literal_prefix(), text.replace("{{", "{"));
            }
        }

        #[test]
        fn a_value_is_one_segment_of_a_url_and_comes_back_from_it(value in ".{1,12}|[./%\\\\a]{1,6}") {
            let operation = operation(&serde_json::json!({ "v": value }).to_string());
            if let Ok(url) = parse("http://h/a/{payload.v}/z").render_url(&Scope::new(&operation, &context())) {
                let parsed = reqwest::Url::parse(&url).unwrap();
                let segments: Vec<_> = parsed.path_segments().unwrap().collect();
                prop_assert_eq!(segments.len(), 3);
                prop_assert_eq!((parsed.host_str(), segments[0], segments[2]), (Some("h"), "a", "z"));
                prop_assert_eq!(parsed.query(), None);
            } else {
                prop_assert!(value == "." || value == "..");
            }
        }

        #[test]
        fn a_value_is_one_name_in_a_path_and_no_two_share_it(one in ".{1,80}|[./%a]{1,6}", other in ".{1,80}|[./%a]{1,6}") {
            let path = |value: &str| {
                let operation = operation(&serde_json::json!({ "v": value }).to_string());
                parse("out/{payload.v}.ndjson").render_path(&Scope::new(&operation, &context())).unwrap()
            };
            let (first, second) = (path(&one), path(&other));
            let name = first.strip_prefix("out/").unwrap();
            prop_assert!(!name.contains(['/', '\\', '\0']) && !name.starts_with('.') && name.len() <= 255);
            prop_assert_eq!(first == second, one == other);
        }
    }
}
