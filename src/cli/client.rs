//! The HTTP client of the verbs that talk to a running walflow.
//!
//! Takes an address, a key and a route, gives JSON or a sentence that says what to do. Never retries.

use std::future::Future;
use std::time::Duration;

use clap::Args;
use reqwest::{Method, StatusCode};
use serde_json::Value;

use super::Stop;

/// Where the running walflow is and how to speak to it.
#[derive(Debug, Args)]
pub(super) struct Remote {
    /// Address of the running walflow
    #[arg(long, env = "WALFLOW_URL", default_value = "http://127.0.0.1:3000", value_name = "URL")]
    url: String,
    /// API key, where walflow asks for one; better given in the environment
    #[arg(long, env = "WALFLOW_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
    /// How long to wait for an answer
    #[arg(long, env = "WALFLOW_TIMEOUT", default_value = "30s", value_name = "DURATION")]
    timeout: crate::units::Span,
}

/// An answer: its status and its body as JSON.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) body: Value,
}

/// Runs one verb's future on a small runtime of its own.
pub(super) fn block_on(verb: impl Future<Output = Result<(), Stop>>) -> Result<(), Stop> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(verb)
}

impl Remote {
    /// The address of `path`.
    fn address(&self, path: &str) -> String {
        format!("{}{path}", self.url.trim_end_matches('/'))
    }

    /// The same, with at least so much time for the answer.
    pub(super) fn at_least(self, time: Duration) -> Self {
        let timeout = crate::units::Span(self.timeout.0.max(time));
        Self { timeout, ..self }
    }

    /// Sends a request and reads the answer, whatever its status.
    pub(super) async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Answer, Stop> {
        self.send(method, path, body, &[]).await
    }

    /// As [`Remote::ask`], with headers.
    pub(super) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        headers: &[(&str, &str)],
    ) -> Result<Answer, Stop> {
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(Duration::from_secs(5))
            .timeout(self.timeout.0)
            .build()
            .map_err(|error| Stop::new(Stop::FAILED, format!("could not set up the client: {error}")))?;
        let mut request = client.request(method, self.address(path));
        if let Some(key) = &self.api_key {
            request = request.header("x-api-key", key);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        let bytes = response.bytes().await.map_err(|error| self.unreachable(&error))?;
        let text = || Value::String(String::from_utf8_lossy(&bytes).into_owned());
        let body =
            if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap_or_else(|_| text()) };
        Ok(Answer { status, body })
    }

    /// As [`Remote::ask`]; an answer that is no success becomes an error that says what was answered.
    pub(super) async fn get(&self, path: &str) -> Result<Value, Stop> {
        self.ask(Method::GET, path, None).await?.success()
    }

    fn unreachable(&self, error: &reqwest::Error) -> Stop {
        if error.is_builder() {
            return Stop::new(Stop::USAGE, format!("`{}` is not an address such as http://127.0.0.1:3000", self.url));
        }
        let what = if error.is_timeout() { "did not answer in time" } else { "cannot be reached" };
        let hint =
            "is walflow running there? start it with `walflow run`, or name another address with --url or WALFLOW_URL";
        let mut causes = String::new();
        let mut cause = std::error::Error::source(error);
        while let Some(inner) = cause {
            causes = inner.to_string();
            cause = inner.source();
        }
        Stop::new(Stop::UNAVAILABLE, format!("{} {what} ({causes}); {hint}", self.url))
    }
}

impl Answer {
    /// The body of a success; anything else is an error in the words of the answer.
    pub(super) fn success(self) -> Result<Value, Stop> {
        if self.status.is_success() {
            return Ok(self.body);
        }
        let word = |name: &str| self.body.get(name).and_then(Value::as_str);
        let said = word("detail").or_else(|| word("title")).or(self.body.as_str()).unwrap_or("no reason given");
        let code = word("code").map(|code| format!(" [{code}]")).unwrap_or_default();
        let hint = match self.status {
            StatusCode::UNAUTHORIZED => "; give a key in WALFLOW_API_KEY",
            StatusCode::NOT_FOUND if self.body.is_string() || self.body.is_null() => "; is that address a walflow?",
            _ => "",
        };
        Err(Stop::new(Stop::FAILED, format!("{}{code}: {said}{hint}", self.status)))
    }
}

/// `text` as one segment of a path.
pub(super) fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~@".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _: std::fmt::Result = std::fmt::Write::write_fmt(&mut out, format_args!("%{byte:02X}"));
        }
    }
    out
}

/// A query string of the pairs that have a value; empty when none has.
pub(super) fn query(pairs: &[(&str, Option<String>)]) -> String {
    let given: Vec<String> =
        pairs.iter().filter_map(|(name, value)| Some(format!("{name}={}", segment(value.as_ref()?)))).collect();
    if given.is_empty() { String::new() } else { format!("?{}", given.join("&")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_adds_no_segment_and_no_parameter() {
        assert_eq!(segment("a/b?c&d=é"), "a%2Fb%3Fc%26d%3D%C3%A9");
        assert_eq!(query(&[("a", None), ("b", Some("x&y".to_owned()))]), "?b=x%26y");
        assert_eq!(query(&[("a", None)]), "");
    }

    #[test]
    fn a_refusal_is_told_in_its_own_words() {
        let body = serde_json::json!({"code": "WF404", "detail": "no such namespace", "title": "not found"});
        let stop = Answer { status: StatusCode::NOT_FOUND, body }.success().unwrap_err();
        assert_eq!((stop.code, stop.message.as_str()), (1, "404 Not Found [WF404]: no such namespace"));
    }
}
