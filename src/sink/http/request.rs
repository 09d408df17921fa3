//! A request from a record or a batch: URL, headers, body, ids and signature.
//!
//! Takes operations, gives a request that is ready to send. Payloads are copied as they are. Never sends anything.

use std::borrow::Cow;
use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use reqwest::Url;
use sha2::{Digest, Sha256};

use super::sign::Secrets;
use super::{BatchFormat, HttpSpec};
use crate::sink::template::{Document, Scope, Template};
use crate::sink::{Failure, OpenError, Operation, SinkContext, json};

const ID: HeaderName = HeaderName::from_static("webhook-id");
const TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// A secret file is read up to this size.
const LARGEST_SECRET: u64 = 64 << 10;

/// A body and what it is.
pub(super) struct Body {
    bytes: Bytes,
    content_type: Option<&'static str>,
}

/// Makes requests as an `http:` describes them.
pub(super) struct Requests {
    url: Template,
    method: Method,
    headers: Vec<(HeaderName, Template)>,
    body: Option<Document>,
    format: BatchFormat,
    secrets: Option<Secrets>,
    context: SinkContext,
}

fn wrong(pointer: String, message: &impl ToString) -> OpenError {
    OpenError::Setting { kind: "http", pointer: pointer.into(), message: message.to_string().into() }
}

/// Reads a small file that the settings name.
#[expect(clippy::disallowed_methods, reason = "a secret or certificate is none of the log's files")]
pub(super) fn read_file(path: &str, largest: u64) -> Result<Vec<u8>, OpenError> {
    use std::io::Read as _;
    let unreadable = |message: String| OpenError::Unreadable { path: path.into(), message: message.into() };
    let file = std::fs::File::open(path).map_err(|error| unreadable(error.to_string()))?;
    let mut bytes = Vec::new();
    file.take(largest + 1).read_to_end(&mut bytes).map_err(|error| unreadable(error.to_string()))?;
    if bytes.len() as u64 > largest {
        return Err(unreadable(format!("it is larger than {largest} bytes")));
    }
    Ok(bytes)
}

impl Requests {
    pub(super) fn open(spec: &HttpSpec, context: &SinkContext) -> Result<Self, OpenError> {
        let mut headers = Vec::new();
        for (name, value) in &spec.headers {
            let pointer = || format!("/headers/{name}");
            let known = HeaderName::from_bytes(name.as_bytes()).map_err(|error| wrong(pointer(), &error))?;
            headers.push((known, Template::parse(value).map_err(|error| wrong(pointer(), &error))?));
        }
        let secrets = match &spec.sign {
            None => None,
            Some(sign) => {
                let (text, place) = match (&sign.secret, &sign.secret_file) {
                    (Some(secret), _) => (Cow::Borrowed(secret.as_str()), None),
                    (None, Some(path)) => {
                        let bytes = read_file(path, LARGEST_SECRET)?;
                        (Cow::Owned(String::from_utf8(bytes).unwrap_or_default()), Some(path))
                    }
                    (None, None) => (Cow::Borrowed(""), None),
                };
                let secrets = Secrets::parse(&text).map_err(|error| match place {
                    Some(path) => {
                        OpenError::Unreadable { path: path.as_str().into(), message: error.to_string().into() }
                    }
                    None => wrong("/sign/secret".to_owned(), &error),
                });
                Some(secrets?)
            }
        };
        let body = spec.body.as_ref().map(Document::parse).transpose();
        Ok(Self {
            url: Template::parse(&spec.url).map_err(|error| wrong("/url".to_owned(), &error))?,
            method: match &spec.method {
                None => Method::POST,
                Some(name) => {
                    Method::from_bytes(name.as_bytes()).map_err(|error| wrong("/method".to_owned(), &error))?
                }
            },
            headers,
            body: body.map_err(|error| wrong(format!("/body{}", error.pointer), &error.error))?,
            format: spec.format.unwrap_or(BatchFormat::JsonArray),
            secrets,
            context: context.clone(),
        })
    }

    /// The body of a request that carries one record.
    pub(super) fn body(&self, operation: &Operation) -> Result<Body, Failure> {
        let payload = || Body {
            bytes: operation.event.payload().clone(),
            content_type: Some(if operation.event.record.binary {
                "application/octet-stream"
            } else {
                "application/json"
            }),
        };
        let Some(document) = &self.body else { return Ok(payload()) };
        if document.is_payload() {
            return Ok(payload());
        }
        let scope = Scope::new(operation, &self.context);
        if document.is_json() {
            let mut bytes = Vec::new();
            document.render_json(&scope, &mut bytes)?;
            return Ok(Body { bytes: bytes.into(), content_type: Some("application/json") });
        }
        let bytes = document.render_bytes(&scope)?;
        let content_type = (!bytes.is_empty()).then_some("text/plain; charset=utf-8");
        Ok(Body { bytes, content_type })
    }

    /// A record's part of a batch: JSON, on one line where the format needs that.
    pub(super) fn element(&self, operation: &Operation) -> Result<Bytes, Failure> {
        let event = &operation.event;
        let element = match &self.body {
            Some(document) => {
                let mut out = Vec::new();
                document.render_json(&Scope::new(operation, &self.context), &mut out)?;
                Bytes::from(out)
            }
            None if event.record.binary => json::base64_text(event.payload()).into(),
            None => event.payload().clone(),
        };
        Ok(match (self.format, json::one_line(&element)) {
            (BatchFormat::Ndjson, Cow::Owned(line)) => line.into(),
            _ => element,
        })
    }

    /// The body of a batch.
    pub(super) fn join<'a>(&self, elements: impl Iterator<Item = &'a [u8]>) -> Body {
        let mut bytes = Vec::new();
        let array = self.format == BatchFormat::JsonArray;
        for element in elements {
            if array {
                bytes.push(if bytes.is_empty() { b'[' } else { b',' });
            }
            bytes.extend_from_slice(element);
            if !array {
                bytes.push(b'\n');
            }
        }
        if array {
            bytes.push(b']');
        }
        Body { bytes: bytes.into(), content_type: Some(self.format.content_type()) }
    }

    /// The request for these records, at least one.
    pub(super) fn request(&self, operations: &[&Operation], body: Body) -> Result<reqwest::Request, Failure> {
        let Some(first) = operations.first() else {
            return Err(Failure::rendering("a request needs a record"));
        };
        let scope = Scope::new(first, &self.context);
        let url = self.url.render_url(&scope)?;
        let mut url =
            Url::parse(&url).map_err(|error| Failure::rendering(format!("the URL does not work: {error}")))?;
        let mut headers = HeaderMap::new();
        if let Some(login) = login(&mut url) {
            headers.insert(AUTHORIZATION, login);
        }
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("walflow/", env!("CARGO_PKG_VERSION"))));
        if let Some(content_type) = body.content_type {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        }
        let id = delivery_id(operations);
        if let [operation] = operations
            && let Some(key) = idempotency_key(operation, &id)
        {
            headers.insert(IDEMPOTENCY_KEY, key);
        }
        for (name, template) in &self.headers {
            let value = template.render_text(&scope)?;
            let mut value = HeaderValue::from_str(&value).map_err(|_| {
                Failure::rendering(format!("the header {name} would hold a line end or another control character"))
            })?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        let timestamp = (self.context.clock.now().as_millis() / 1_000).to_string();
        let signature = self.secrets.as_ref().map(|secrets| secrets.sign(&id, &timestamp, &body.bytes));
        for (name, value) in [(ID, Some(id)), (TIMESTAMP, Some(timestamp)), (SIGNATURE, signature)] {
            // These are made of letters, digits and signs that every header takes.
            if let Some(value) = value.and_then(|value| HeaderValue::from_str(&value).ok()) {
                headers.insert(name, value);
            }
        }
        let mut request = reqwest::Request::new(self.method.clone(), url);
        *request.headers_mut() = headers;
        if !body.bytes.is_empty() {
            *request.body_mut() = Some(body.bytes.into());
        }
        Ok(request)
    }
}

/// What stands before the host, as the header that carries it; the URL goes on without it, also in the logs of libraries.
fn login(url: &mut Url) -> Option<HeaderValue> {
    let (user, password) = (url.username().to_owned(), url.password().map(ToOwned::to_owned));
    if user.is_empty() && password.is_none() {
        return None;
    }
    // A URL with a host takes both.
    let _ = (url.set_username(""), url.set_password(None));
    let mut pair = percent_decoded(&user);
    pair.push(b':');
    pair.extend(percent_decoded(&password.unwrap_or_default()));
    let mut value = HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(pair))).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn percent_decoded(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        let code = behind.get(..2).filter(|_| *first == b'%').and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = behind.get(2..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = behind;
            }
        }
    }
    out
}

/// The identity of a request, the same whenever it carries the same records.
fn delivery_id(operations: &[&Operation]) -> String {
    if let [operation] = operations {
        return operation.delivery_id();
    }
    let mut digest = Sha256::new();
    for operation in operations {
        digest.update(operation.delivery_id());
        digest.update("\n");
    }
    let mut id = "batch_".to_owned();
    for byte in digest.finalize().iter().take(16) {
        let _ = write!(id, "{byte:02x}");
    }
    id
}

/// The client's own key where the write had one, so that a target that knows it sees the same again; else the delivery's id.
fn idempotency_key(operation: &Operation, id: &str) -> Option<HeaderValue> {
    let record = &operation.event.record;
    let own = record.idempotency_key.as_deref().map(|key| match operation.event.child {
        0 => key.to_owned(),
        child => format!("{key}/{child}"),
    });
    own.and_then(|key| HeaderValue::from_str(&key).ok()).or_else(|| HeaderValue::from_str(id).ok())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sink::testing::{context, operation, operation_with};

    fn requests(spec: &serde_json::Value) -> Requests {
        Requests::open(&serde_json::from_value(spec.clone()).unwrap(), &context()).unwrap()
    }

    fn single(requests: &Requests, operation: &Operation) -> (reqwest::Request, Vec<u8>) {
        let body = requests.body(operation).unwrap();
        let request = requests.request(&[operation], body).unwrap();
        let bytes = request.body().and_then(reqwest::Body::as_bytes).unwrap_or_default().to_vec();
        (request, bytes)
    }

    #[test]
    fn a_record_goes_out_as_it_came_with_its_ids_and_a_signature() {
        let requests = requests(&json!({"url": "http://h/{payload.a}", "headers": {"X-Key": "{key}"},
            "sign": {"secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}}));
        let operation = operation_with("{ \"a\": 1.10 }", |record| record.key = Some("k".into()));
        let (request, body) = single(&requests, &operation);
        assert_eq!(body, b"{ \"a\": 1.10 }");
        assert_eq!((request.method(), request.url().as_str()), (&Method::POST, "http://h/1.10"));
        let header = |name: &str| request.headers().get(name).unwrap().to_str().unwrap().to_owned();
        let id = operation.event.record.id.to_string();
        assert_eq!((header("webhook-id"), header("idempotency-key")), (id.clone(), id.clone()));
        assert_eq!((header("webhook-timestamp").as_str(), header("x-key").as_str()), ("1609459200", "k"));
        assert_eq!(header("content-type"), "application/json");
        assert!(header("user-agent").starts_with("walflow/"));
        let expected =
            Secrets::parse("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap().sign(&id, "1609459200", b"{ \"a\": 1.10 }");
        assert_eq!(header("webhook-signature"), expected);
    }

    #[test]
    fn what_stands_before_the_host_becomes_a_header_and_leaves_the_url() {
        let plain = operation("1");
        let sent = |spec: serde_json::Value| single(&requests(&spec), &plain).0;
        let request = sent(json!({"url": "http://me:p%40ss%3A@h:81/x"}));
        assert_eq!(request.url().as_str(), "http://h:81/x");
        assert_eq!(request.headers()["authorization"], format!("Basic {}", STANDARD.encode("me:p@ss:")));
        let request = sent(json!({"url": "http://me@h/"}));
        assert_eq!(request.headers()["authorization"], format!("Basic {}", STANDARD.encode("me:")));
        let request = sent(json!({"url": "http://me:p@h/", "headers": {"Authorization": "Bearer t"}}));
        assert_eq!(request.headers()["authorization"], "Bearer t", "the file's own word wins");
        assert!(sent(json!({"url": "http://h/"})).headers().get("authorization").is_none());
    }

    #[test]
    fn a_child_and_the_clients_own_key_keep_their_identity() {
        let requests = requests(&json!({"url": "http://h/"}));
        let mut operation = operation_with("1", |record| record.idempotency_key = Some("pay-1".into()));
        let key = |operation: &Operation| {
            let (request, _) = single(&requests, operation);
            let text = |name: &str| request.headers().get(name).unwrap().to_str().unwrap().to_owned();
            (text("webhook-id"), text("idempotency-key"))
        };
        let id = operation.event.record.id;
        assert_eq!(key(&operation), (id.to_string(), "pay-1".to_owned()));
        operation.event.child = 3;
        assert_eq!(key(&operation), (format!("{id}/3"), "pay-1/3".to_owned()));
        let hostile = operation_with("1", |record| record.idempotency_key = Some("a\r\nb".into()));
        assert_eq!(key(&hostile).1, id.to_string());
    }

    #[test]
    fn bodies_are_what_the_file_says() {
        let plain = operation(r#"{"t":"x","n":1}"#);
        for (body, bytes, content_type) in [
            (json!("{payload}"), r#"{"t":"x","n":1}"#, Some("application/json")),
            (json!("{payload.t}"), "\"x\"", Some("application/json")),
            (json!("t={payload.t}"), "t=x", Some("text/plain; charset=utf-8")),
            (json!({"n": "{payload.n}"}), r#"{"n":1}"#, Some("application/json")),
            (json!(""), "", None),
        ] {
            let requests = requests(&json!({"url": "http://h/", "body": body}));
            let (request, sent) = single(&requests, &plain);
            assert_eq!(String::from_utf8(sent).unwrap(), bytes);
            assert_eq!(request.headers().get("content-type").map(|value| value.to_str().unwrap()), content_type);
        }
        let binary = operation_with("\u{1}", |record| record.binary = true);
        let (request, sent) = single(&requests(&json!({"url": "http://h/"})), &binary);
        assert_eq!(
            (sent.as_slice(), request.headers()["content-type"].to_str().unwrap()),
            (&b"\x01"[..], "application/octet-stream")
        );
    }

    #[test]
    fn a_batch_holds_the_payloads_as_they_are() {
        let batch = [operation("{ \"a\":1.10}"), operation("2"), operation_with("x", |record| record.binary = true)];
        let joined = |format: &str| {
            let requests = requests(&json!({"url": "http://h/", "format": format}));
            let elements: Vec<Bytes> = batch.iter().map(|one| requests.element(one).unwrap()).collect();
            let body = requests.join(elements.iter().map(AsRef::as_ref));
            (String::from_utf8(body.bytes.to_vec()).unwrap(), body.content_type.unwrap())
        };
        assert_eq!(joined("json_array"), ("[{ \"a\":1.10},2,\"eA==\"]".to_owned(), "application/json"));
        assert_eq!(joined("ndjson"), ("{ \"a\":1.10}\n2\n\"eA==\"\n".to_owned(), "application/x-ndjson"));
    }

    #[test]
    fn a_batch_has_an_id_that_only_its_records_decide() {
        let one = operation("1");
        let mut two = operation("1");
        two.event.child = 1;
        assert_eq!(delivery_id(&[&one]), one.delivery_id());
        let both = delivery_id(&[&one, &two]);
        assert!(both.starts_with("batch_") && both == delivery_id(&[&one, &two]));
        assert_ne!(both, delivery_id(&[&two, &one]));
    }

    #[test]
    fn a_value_cannot_add_a_header() {
        let requests = requests(&json!({"url": "http://h/", "headers": {"X-A": "{payload.a}"}}));
        let operation = operation(r#"{"a":"x\r\nX-Admin: 1"}"#);
        let failure = requests.request(&[&operation], requests.body(&operation).unwrap()).unwrap_err();
        assert!(failure.rendering && failure.message.contains("x-a"), "{failure}");
    }
}
