//! `http`: requests to a URL that the file fixes, one record or one batch each.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use hmac::{Hmac, KeyInit as _, Mac as _};
use indexmap::IndexMap;
use schemars::JsonSchema;
use secrecy::{ExposeSecret as _, SecretBox};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::Sha256;

use super::file::put_line;
use super::template::{self, Template};
use super::{BatchStyle, Failure, OpenError, Operation, Sink, Verdict, Written};
use crate::clock::Clock;
use crate::units::Span;

/// `http:` — one request a record; with `batch:` one a batch, the body a JSON array or NDJSON.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpSpec {
    /// Where; scheme and host are literal.
    pub url: String,
    /// Default: POST.
    #[serde(default)]
    pub method: Option<String>,
    /// Headers, values are templates.
    #[serde(default)]
    pub headers: IndexMap<String, String>,
    /// The body; a map's scalars are templates. Default: the payload's bytes.
    #[serde(default)]
    pub body: Option<serde_json::Value>,
    /// How a batch is written: `json_array` or `ndjson`. Default: json_array.
    #[serde(default)]
    pub format: Option<BatchFormat>,
    /// Sign each request after Standard Webhooks.
    #[serde(default)]
    pub sign: Option<SignSpec>,
    /// From the first byte sent to the last received. Default: 30s.
    #[serde(default)]
    pub timeout: Option<Span>,
    /// To open a connection. Default: 5s.
    #[serde(default)]
    pub connect_timeout: Option<Span>,
    /// TLS settings.
    #[serde(default)]
    pub tls: Option<TlsSpec>,
    /// A proxy's URL, or `none`. Default: none.
    #[serde(default)]
    pub proxy: Option<String>,
    /// What a status means where the default table is wrong: `{404: never, 409: ok}`.
    #[serde(default)]
    pub verdicts: IndexMap<String, VerdictSpec>,
}

/// `http.format:`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BatchFormat {
    /// `[a, b]`
    JsonArray,
    /// One a line.
    Ndjson,
}

/// `http.sign:` — one of the two.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SignSpec {
    /// The secret, `whsec_…`; several separated by spaces while rotating.
    pub secret: Option<String>,
    /// A file that holds it.
    pub secret_file: Option<String>,
}

/// `http.tls:`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TlsSpec {
    /// PEM certificates to trust besides the system's.
    pub ca_file: Option<String>,
    /// PEM certificate for this client.
    pub cert_file: Option<String>,
    /// PEM key for this client.
    pub key_file: Option<String>,
}

/// What a status means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VerdictSpec {
    /// Delivered.
    Ok,
    /// This record is refused.
    Never,
    /// Try again later.
    Backoff,
    /// The target is away.
    Down,
}

/// A target that speaks HTTP.
pub struct Http {
    client: reqwest::Client,
    method: reqwest::Method,
    url: Template,
    headers: Vec<(reqwest::header::HeaderName, Template)>,
    body: Option<Shape>,
    batch: Option<BatchFormat>,
    secrets: Vec<SecretBox<Vec<u8>>>,
    verdicts: Vec<(u16, VerdictSpec)>,
}

/// A body as the file says it: a JSON value whose texts are templates.
enum Shape {
    Text(Template),
    List(Vec<Shape>),
    Map(Vec<(String, Shape)>),
    Plain(Value),
}

impl Shape {
    fn new(value: &Value) -> Self {
        match value {
            Value::String(text) => Self::Text(Template::new(text)),
            Value::Array(items) => Self::List(items.iter().map(Self::new).collect()),
            Value::Object(map) => Self::Map(map.iter().map(|(key, value)| (key.clone(), Self::new(value))).collect()),
            other => Self::Plain(other.clone()),
        }
    }

    fn value(&self, operation: &Operation) -> Result<Value, Failure> {
        Ok(match self {
            Self::Text(template) => template.value(operation, "http")?,
            Self::List(items) => {
                Value::Array(items.iter().map(|item| item.value(operation)).collect::<Result<_, _>>()?)
            }
            Self::Map(map) => {
                let field = |(key, shape): &(String, Self)| Ok((key.clone(), shape.value(operation)?));
                Value::Object(map.iter().map(field).collect::<Result<_, Failure>>()?)
            }
            Self::Plain(value) => value.clone(),
        })
    }
}

impl Http {
    /// Sets the client up; connects to nothing.
    ///
    /// # Errors
    /// When a setting cannot work.
    pub fn open(spec: &HttpSpec, batched: bool) -> Result<Self, OpenError> {
        let wrong = |what: String| OpenError(what.into());
        let mut client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(spec.timeout.map_or(Duration::from_secs(30), |span| span.0))
            .connect_timeout(spec.connect_timeout.map_or(Duration::from_secs(5), |span| span.0))
            .user_agent(concat!("walflow/", env!("CARGO_PKG_VERSION")));
        client = match spec.proxy.as_deref() {
            None | Some("none") => client.no_proxy(),
            Some(url) => client.proxy(reqwest::Proxy::all(url).map_err(|error| wrong(format!("http.proxy: {error}")))?),
        };
        if let Some(tls) = &spec.tls {
            let read = |path: &str| std::fs::read(path).map_err(|error| wrong(format!("{path}: {error}")));
            if let Some(path) = &tls.ca_file {
                let pem = read(path)?;
                let certificates =
                    reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| wrong(format!("{path}: {error}")))?;
                for certificate in certificates {
                    client = client.add_root_certificate(certificate);
                }
            }
            if let (Some(certificate), Some(key)) = (&tls.cert_file, &tls.key_file) {
                let mut pem = read(certificate)?;
                pem.extend(read(key)?);
                let identity =
                    reqwest::Identity::from_pem(&pem).map_err(|error| wrong(format!("{certificate}: {error}")))?;
                client = client.identity(identity);
            }
        }
        let client = client.build().map_err(|error| wrong(format!("the HTTP client cannot be set up: {error}")))?;
        let method = spec.method.as_deref().unwrap_or("POST").to_ascii_uppercase();
        let header = |(name, value): (&String, &String)| {
            let name = name.parse().map_err(|_| wrong(format!("`{name}` is no name for a header")))?;
            Ok((name, Template::new(value)))
        };
        let verdict = |(status, verdict): (&String, &VerdictSpec)| {
            let status = status.parse().map_err(|_| wrong(format!("`{status}` is no HTTP status")))?;
            Ok((status, *verdict))
        };
        Ok(Self {
            client,
            method: method.parse().map_err(|_| wrong(format!("`{method}` is no HTTP method")))?,
            url: Template::new(&spec.url),
            headers: spec.headers.iter().map(header).collect::<Result<_, OpenError>>()?,
            body: spec.body.as_ref().map(Shape::new),
            batch: batched.then(|| spec.format.unwrap_or(BatchFormat::JsonArray)),
            secrets: secrets(spec)?,
            verdicts: spec.verdicts.iter().map(verdict).collect::<Result<_, OpenError>>()?,
        })
    }

    fn body_of(&self, operation: &Operation) -> Result<Bytes, Failure> {
        match &self.body {
            None => Ok(operation.event.payload().clone()),
            Some(shape) => Ok(shape.value(operation)?.to_string().into()),
        }
    }

    /// Sends operations as one request; one failure stands for all of them.
    async fn send(&self, batch: &[Operation]) -> Result<(), Failure> {
        let Some(first) = batch.first() else { return Ok(()) };
        let mut content = if first.event.record.binary { "application/octet-stream" } else { "application/json" };
        let body = match self.batch {
            None => self.body_of(first)?,
            Some(format) => {
                let mut body = Vec::new();
                for (index, operation) in batch.iter().enumerate() {
                    let one = self.body_of(operation)?;
                    match format {
                        BatchFormat::JsonArray => {
                            body.push(if index == 0 { b'[' } else { b',' });
                            body.extend_from_slice(&one);
                        }
                        BatchFormat::Ndjson => put_line(&mut body, &one),
                    }
                }
                if format == BatchFormat::JsonArray {
                    body.push(b']');
                } else {
                    content = "application/x-ndjson";
                }
                body.into()
            }
        };
        let id = template::id(first);
        let mut request = self.client.request(self.method.clone(), self.url.url(first, "http")?);
        request = request.header("content-type", content).header("webhook-id", &id);
        if let Some(key) = &first.event.record.idempotency_key {
            request = request.header("idempotency-key", &**key);
        }
        if !self.secrets.is_empty() {
            let now = Clock::system().now().as_millis() / 1000;
            request = request.header("webhook-timestamp", now).header("webhook-signature", self.sign(&id, now, &body));
        }
        for (name, value) in &self.headers {
            request = request.header(name, value.text(first, "http")?);
        }
        let answer = request.body(body).send().await.map_err(|error| unreachable(&error))?;
        self.verdict(&answer)
    }

    fn sign(&self, id: &str, now: i64, body: &[u8]) -> String {
        let signatures = self.secrets.iter().filter_map(|secret| {
            let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose_secret()).ok()?;
            mac.update(format!("{id}.{now}.").as_bytes());
            mac.update(body);
            Some(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
        });
        signatures.collect::<Vec<_>>().join(" ")
    }

    fn verdict(&self, answer: &reqwest::Response) -> Result<(), Failure> {
        let status = answer.status();
        let retry_after = || {
            let text = answer.headers().get("retry-after")?.to_str().ok()?;
            text.trim().parse().ok().map(|seconds: u64| Duration::from_secs(seconds.min(86_400)))
        };
        let own = self.verdicts.iter().find(|(known, _)| *known == status.as_u16()).map(|(_, verdict)| *verdict);
        let verdict = match (own, status.as_u16()) {
            (Some(VerdictSpec::Ok), _) | (None, 200..=299) => return Ok(()),
            (Some(VerdictSpec::Never), _) => Verdict::Never,
            (Some(VerdictSpec::Backoff), _) | (None, 300..=399 | 408 | 425 | 500 | 501 | 505..=599) => Verdict::Backoff,
            (Some(VerdictSpec::Down), _) | (None, 401 | 403 | 404 | 405 | 407 | 410 | 502 | 504) => Verdict::Down,
            (None, 429 | 503) => retry_after().map_or(
                if status.as_u16() == 429 { Verdict::After(Duration::from_secs(1)) } else { Verdict::Down },
                Verdict::After,
            ),
            _ => Verdict::Never,
        };
        Err(Failure::new(verdict, format!("the target answered {status}")))
    }

    /// A batch that is refused as a whole is halved until the refused record stands alone.
    fn bisect<'a>(&'a self, batch: &'a [Operation], at: usize) -> BoxFuture<'a, Vec<(usize, Failure)>> {
        async move {
            match self.send(batch).await {
                Ok(()) => Vec::new(),
                Err(failure) if failure.verdict == Verdict::Never && batch.len() > 1 => {
                    let (left, right) = batch.split_at(batch.len() / 2);
                    let mut failed = self.bisect(left, at).await;
                    failed.extend(self.bisect(right, at + left.len()).await);
                    failed
                }
                Err(failure) => (0..batch.len()).map(|index| (at + index, failure.clone())).collect(),
            }
        }
        .boxed()
    }
}

impl Sink for Http {
    fn batch_style(&self) -> BatchStyle {
        if self.batch.is_some() { BatchStyle::Atomic } else { BatchStyle::Independent }
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            if self.batch.is_some() {
                return Written { failed: self.bisect(batch, 0).await };
            }
            let mut written = Written::default();
            for (index, operation) in batch.iter().enumerate() {
                if let Err(failure) = self.send(std::slice::from_ref(operation)).await {
                    written.failed.push((index, failure));
                }
            }
            written
        }
        .boxed()
    }
}

fn unreachable(error: &reqwest::Error) -> Failure {
    let verdict = if error.is_timeout() && !error.is_connect() { Verdict::Backoff } else { Verdict::Down };
    if error.is_builder() {
        return Failure::rendering("the request cannot be built: an address or header does not work with this record");
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let what =
        if error.is_timeout() { "did not answer in time".to_owned() } else { format!("cannot be reached: {cause}") };
    Failure::new(verdict, format!("the target {what}"))
}

fn secrets(spec: &HttpSpec) -> Result<Vec<SecretBox<Vec<u8>>>, OpenError> {
    let Some(sign) = &spec.sign else { return Ok(Vec::new()) };
    let text = match (&sign.secret, &sign.secret_file) {
        (Some(secret), _) => secret.clone(),
        (None, Some(path)) => {
            std::fs::read_to_string(path).map_err(|error| OpenError(format!("{path}: {error}").into()))?
        }
        (None, None) => String::new(),
    };
    let decode = |word: &str| {
        let bytes = STANDARD.decode(word.strip_prefix("whsec_").unwrap_or(word));
        bytes
            .map(|bytes| SecretBox::new(Box::new(bytes)))
            .map_err(|_| OpenError("http.sign: a secret is base64 after `whsec_`".into()))
    };
    text.split_whitespace().map(decode).collect()
}
