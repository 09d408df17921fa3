//! What callers hear: JSON, and problems after RFC 9457 with a stable code and, on writes, with `durable`.

use std::time::Duration;

use http::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use serde::Serialize;
use warp::reply::Reply as _;

use crate::delay::DelayFault;
use crate::source::{AdmitError, LogError};
use crate::transform::SchemaFault;

/// Whether a write that was not accepted may be in the log all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Durable {
    /// It is in the log.
    Succeeded,
    /// It is not and never will be.
    Failed,
    /// Nobody can say yet: repeat it with the same idempotency key.
    Unknown,
}

/// A refusal, as the caller hears it.
#[derive(Clone, Debug)]
pub struct Problem {
    /// The status.
    pub status: StatusCode,
    /// The stable code.
    pub code: &'static str,
    /// What failed and what to do.
    pub detail: String,
    /// When to try again.
    pub retry_after: Option<Duration>,
    /// The methods that the path has.
    pub allow: Option<String>,
    /// On writes.
    pub durable: Option<Durable>,
    /// Each fault of a payload.
    pub errors: Vec<SchemaFault>,
}

/// A refusal as RFC 9457 wants it.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody<'a> {
    /// The code as a URN.
    #[serde(rename = "type")]
    kind: String,
    /// The status in words.
    title: &'a str,
    /// The status.
    status: u16,
    /// A stable code for programs.
    code: &'a str,
    /// What failed and what to do.
    detail: &'a str,
    /// On writes: whether the write may be in the log all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    durable: Option<Durable>,
    /// Each fault of a payload that does not match its schema.
    #[serde(skip_serializing_if = "<[SchemaFault]>::is_empty")]
    #[schema(value_type = Vec<SchemaFault>)]
    errors: &'a [SchemaFault],
}

impl Problem {
    /// A refusal.
    pub fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self { status, code, detail: detail.into(), retry_after: None, allow: None, durable: None, errors: Vec::new() }
    }

    /// 400: the request is malformed.
    pub fn malformed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", detail)
    }

    /// 404.
    pub fn not_found(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, detail)
    }

    /// 404: no such namespace. What the client called it is cut to the length that a name can have.
    pub fn no_namespace(name: &str) -> Self {
        let shown: String = name.chars().take(63).collect();
        let detail = format!("there is no namespace `{shown}`; GET /api/v1/wal/namespaces lists those there are");
        Self::not_found("no_namespace", detail)
    }

    /// 404: the namespace runs on other instances.
    pub fn other_shard(namespace: &crate::record::Namespace, shard: &str) -> Self {
        let detail = format!(
            "`{namespace}` does not run on this instance: the shard `{shard}` has it; write to an instance of that shard"
        );
        Self::not_found("other_shard", detail)
    }

    /// 503, with the time after which to try again.
    pub fn unavailable(code: &'static str, detail: impl Into<String>, after: Duration) -> Self {
        Self { retry_after: Some(after), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, code, detail) }
    }

    /// 429, with the time after which to try again.
    pub fn too_many(code: &'static str, detail: impl Into<String>, after: Duration) -> Self {
        Self { retry_after: Some(after), ..Self::new(StatusCode::TOO_MANY_REQUESTS, code, detail) }
    }

    /// 413.
    pub fn too_large(bytes: u64, limit: u64) -> Self {
        let detail = format!("{bytes} bytes are more than the {limit} that are taken here");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", detail)
    }

    /// 422: the payload does not match the namespace's schema.
    pub fn schema(path: &str, faults: Vec<SchemaFault>) -> Self {
        let detail = format!("the payload does not match {path}");
        Self { errors: faults, ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, "schema", detail) }
    }

    /// The same, of a write that is not in the log.
    #[must_use]
    pub fn failed(mut self) -> Self {
        self.durable.get_or_insert(Durable::Failed);
        self
    }

    /// As JSON.
    pub fn body(&self) -> ProblemBody<'_> {
        ProblemBody {
            kind: format!("urn:walflow:problem:{}", self.code),
            title: self.status.canonical_reason().unwrap_or("refused"),
            status: self.status.as_u16(),
            code: self.code,
            detail: &self.detail,
            durable: self.durable,
            errors: &self.errors,
        }
    }

    /// As an answer.
    pub fn into_response(self) -> warp::reply::Response {
        // Texts and numbers always have a JSON form.
        let body = serde_json::to_vec(&self.body()).unwrap_or_default();
        let mut response = bytes(self.status, "application/problem+json", body);
        if let Some(allow) = self.allow.as_deref().and_then(|methods| HeaderValue::from_str(methods).ok()) {
            response.headers_mut().insert(ALLOW, allow);
        }
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs_f64().ceil().max(1.0);
            if let Ok(value) = HeaderValue::from_str(&format!("{seconds:.0}")) {
                response.headers_mut().insert(RETRY_AFTER, value);
            }
        }
        response
    }
}

impl From<AdmitError> for Problem {
    fn from(error: AdmitError) -> Self {
        let detail = error.to_string();
        let second = Duration::from_secs(1);
        match error {
            AdmitError::BacklogFull { .. } | AdmitError::BacklogOld { .. } => {
                Self::unavailable("backlog_full", detail, Duration::from_secs(10)).failed()
            }
            AdmitError::DiskFull => Self::new(StatusCode::INSUFFICIENT_STORAGE, "disk_full", detail).failed(),
            AdmitError::Busy { retry_after } => Self::unavailable("busy", detail, retry_after.max(second)).failed(),
            AdmitError::Unavailable { .. } => Self::unavailable("log_unavailable", detail, second).failed(),
            AdmitError::TooLarge { .. } => Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", detail).failed(),
            AdmitError::Unknown { .. } => {
                let detail = format!("{detail}; repeat it with the same Idempotency-Key and it is settled");
                let problem = Self::new(StatusCode::GATEWAY_TIMEOUT, "unknown", detail);
                Self { durable: Some(Durable::Unknown), ..problem }
            }
            AdmitError::Closed { .. } => Self::unavailable("closed", detail, second).failed(),
            AdmitError::Unsupported(_) => Self::new(StatusCode::NOT_IMPLEMENTED, "unsupported", detail).failed(),
        }
    }
}

impl From<DelayFault> for Problem {
    fn from(fault: DelayFault) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "delay", fault.to_string()).failed()
    }
}

impl From<LogError> for Problem {
    fn from(error: LogError) -> Self {
        let detail = error.to_string();
        match error {
            LogError::Unsupported(_) => Self::new(StatusCode::NOT_IMPLEMENTED, "unsupported", detail),
            _ => Self::unavailable("log", detail, Duration::from_secs(1)),
        }
    }
}

/// An answer of these bytes.
pub fn bytes(status: StatusCode, kind: &'static str, body: Vec<u8>) -> warp::reply::Response {
    let mut response: Response<Vec<u8>> = Response::new(body);
    *response.status_mut() = status;
    let mut response = response.into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// An answer as JSON.
pub fn json(status: StatusCode, body: &impl Serialize) -> warp::reply::Response {
    match serde_json::to_vec(body) {
        Ok(body) => bytes(status, "application/json", body),
        Err(error) => Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()).into_response(),
    }
}
