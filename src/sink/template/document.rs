//! A text or a YAML map whose scalars are templates: a request's body, a value, a field.
//!
//! Takes what stands in the file, gives bytes. Names are never templates, only values are.

use bytes::Bytes;
use serde_json::Value;

use super::{RenderError, Scope, Template, TemplateError};

/// A value of the file, its scalars parsed as templates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document(Node);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    Text(Template),
    /// A number, a bool or null, as JSON.
    Plain(Box<str>),
    List(Vec<Node>),
    Map(Vec<(Box<str>, Node)>),
}

/// A scalar within a value is no template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentError {
    /// Where, a JSON pointer into the value; empty for the value itself.
    pub pointer: String,
    /// What is wrong with it.
    pub error: TemplateError,
}

impl Document {
    /// Reads every scalar of a value.
    ///
    /// # Errors
    /// When one is a malformed template.
    pub fn parse(value: &Value) -> Result<Self, DocumentError> {
        Node::parse(value).map(Self)
    }

    /// True when its content differs from record to record.
    pub fn varies(&self) -> bool {
        self.0.any(&Template::varies)
    }

    /// True when it renders to JSON rather than to text: a map, a list, a number, or a single reference.
    pub fn is_json(&self) -> bool {
        match &self.0 {
            Node::Text(template) => template.exact().is_some(),
            Node::Plain(_) | Node::List(_) | Node::Map(_) => true,
        }
    }

    /// True for `{payload}` alone.
    pub fn is_payload(&self) -> bool {
        matches!(&self.0, Node::Text(template) if template.exact().is_some_and(super::Reference::is_whole_payload))
    }

    /// As bytes: a text as text, anything else as JSON.
    ///
    /// # Errors
    /// When a value is missing, null or no text.
    pub fn render_bytes(&self, scope: &Scope<'_>) -> Result<Bytes, RenderError> {
        match &self.0 {
            Node::Text(template) => template.render_bytes(scope),
            node => {
                let mut out = Vec::new();
                node.render_json(scope, &mut out)?;
                Ok(out.into())
            }
        }
    }

    /// As JSON, appended; a text becomes a string, a single reference keeps its type.
    ///
    /// # Errors
    /// When a value is missing or null.
    pub fn render_json(&self, scope: &Scope<'_>, out: &mut Vec<u8>) -> Result<(), RenderError> {
        self.0.render_json(scope, out)
    }
}

impl Node {
    fn parse(value: &Value) -> Result<Self, DocumentError> {
        let within = |step: &str, error: DocumentError| DocumentError {
            pointer: format!("/{}{}", step.replace('~', "~0").replace('/', "~1"), error.pointer),
            ..error
        };
        Ok(match value {
            Value::String(text) => {
                Self::Text(Template::parse(text).map_err(|error| DocumentError { pointer: String::new(), error })?)
            }
            Value::Array(items) => Self::List(
                items
                    .iter()
                    .enumerate()
                    .map(|(index, item)| Self::parse(item).map_err(|error| within(&index.to_string(), error)))
                    .collect::<Result<_, _>>()?,
            ),
            Value::Object(members) => Self::Map(
                members
                    .iter()
                    .map(|(name, value)| {
                        let node = Self::parse(value).map_err(|error| within(name, error))?;
                        Ok((name.as_str().into(), node))
                    })
                    .collect::<Result<_, _>>()?,
            ),
            plain => Self::Plain(plain.to_string().into()),
        })
    }

    fn any(&self, test: &impl Fn(&Template) -> bool) -> bool {
        match self {
            Self::Text(template) => test(template),
            Self::Plain(_) => false,
            Self::List(items) => items.iter().any(|item| item.any(test)),
            Self::Map(members) => members.iter().any(|(_, value)| value.any(test)),
        }
    }

    fn render_json(&self, scope: &Scope<'_>, out: &mut Vec<u8>) -> Result<(), RenderError> {
        match self {
            Self::Text(template) => template.render_json(scope, out)?,
            Self::Plain(json) => out.extend_from_slice(json.as_bytes()),
            Self::List(items) => {
                out.push(b'[');
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        out.push(b',');
                    }
                    item.render_json(scope, out)?;
                }
                out.push(b']');
            }
            Self::Map(members) => {
                out.push(b'{');
                for (index, (name, value)) in members.iter().enumerate() {
                    if index > 0 {
                        out.push(b',');
                    }
                    // Writing a text into memory cannot fail.
                    let _ = serde_json::to_writer(&mut *out, name);
                    out.push(b':');
                    value.render_json(scope, out)?;
                }
                out.push(b'}');
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sink::testing::{context, operation};

    #[test]
    fn a_maps_scalars_are_filled_and_keep_their_types() {
        let value =
            json!({ "id": "{payload.n}", "text": "n={payload.n}", "list": ["{payload}", 1, null], "{key}": true });
        let document = Document::parse(&value).unwrap();
        assert!(document.is_json() && document.varies() && !document.is_payload());
        let operation = operation(r#"{"n":1.50}"#);
        let out = document.render_bytes(&Scope::new(&operation, &context())).unwrap();
        assert_eq!(out, r#"{"id":1.50,"text":"n=1.50","list":[{"n":1.50},1,null],"{key}":true}"#.as_bytes());
    }

    #[test]
    fn a_malformed_scalar_is_named_by_its_place() {
        let error = Document::parse(&json!({ "a/b": [1, "{payload.}"] })).unwrap_err();
        assert_eq!((error.pointer.as_str(), error.error.offset), ("/a~1b/1", 8));
    }

    #[test]
    fn a_text_is_text_and_a_single_reference_is_json() {
        let document = |text: &str| Document::parse(&json!(text)).unwrap();
        assert!(!document("hello {key}").is_json() && document("{payload.a}").is_json());
        assert!(document("{payload}").is_payload() && !document("").varies());
    }
}
