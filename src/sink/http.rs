//! `http`: requests to a URL that the file fixes, one record or one batch each.

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
