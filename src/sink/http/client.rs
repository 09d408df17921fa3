//! Sends requests and says what the answers mean.
//!
//! Takes a request, gives delivered or a failure with its verdict. The client is made at the first request, so that an idle
//! branch holds no certificates. Reads a bounded part of an answer's body, within a bounded time.

use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, Identity, Proxy, Request, Response};
use tokio::sync::OnceCell;

use super::request::read_file;
use super::verdict::{Overrides, judge};
use super::{HttpSpec, url_varies};
use crate::clock::Clock;
use crate::clock::Timestamp;
use crate::connection::probe::{Probed, skew};
use crate::connection::tls;
use crate::sink::{Failure, OpenError, Verdict};

/// A file of certificates is read up to this size.
const LARGEST_PEM: u64 = 4 << 20;
/// Of an answer's body so much is read, so that the connection can be used again.
const READ: usize = 64 << 10;
/// An answer's body may take so long once its status is known.
const READ_FOR: Duration = Duration::from_secs(1);
/// Of an answer's body so much is shown.
const SHOWN: usize = 200;
/// A connection that nobody used for so long is closed: shorter than the keep-alive of common servers, so that a request
/// seldom meets a connection that is being closed.
const IDLE: Duration = Duration::from_secs(4);

/// Connections to one target.
pub(super) struct Connector {
    client: OnceCell<Client>,
    timeout: Duration,
    connect_timeout: Duration,
    secure: bool,
    roots: Vec<Certificate>,
    identity: Option<Identity>,
    proxy: Option<String>,
    url_varies: bool,
    overrides: Overrides,
    clock: Clock,
}

impl Connector {
    pub(super) fn open(spec: &HttpSpec, clock: Clock) -> Result<Self, OpenError> {
        tls::provider();
        let settings = spec.tls.clone().unwrap_or_default();
        let unusable = |path: &str, what: &str| OpenError::Unreadable { path: path.into(), message: what.into() };
        let mut roots = Vec::new();
        if let Some(path) = &settings.ca_file {
            roots = Certificate::from_pem_bundle(&read_file(path, LARGEST_PEM)?).unwrap_or_default();
            if roots.is_empty() {
                return Err(unusable(path, "it holds no PEM certificate"));
            }
        }
        let identity = match (&settings.cert_file, &settings.key_file) {
            (Some(certificate), Some(key)) => {
                let mut pem = read_file(key, LARGEST_PEM)?;
                pem.push(b'\n');
                pem.extend(read_file(certificate, LARGEST_PEM)?);
                let identity = Identity::from_pem(&pem);
                Some(identity.map_err(|_| unusable(certificate, "it and its key are no PEM certificate and key"))?)
            }
            _ => None,
        };
        let proxy = spec.proxy.clone().filter(|proxy| proxy != "none");
        let overrides = Overrides::parse(spec.verdicts.iter().map(|(status, verdict)| (status.as_str(), *verdict)))
            .map_err(|status| OpenError::Setting {
                kind: "http",
                pointer: format!("/verdicts/{status}").into(),
                message: "this is no status".into(),
            })?;
        Ok(Self {
            client: OnceCell::new(),
            timeout: spec.timeout.map_or(Duration::from_secs(30), |span| span.0),
            connect_timeout: spec.connect_timeout.map_or(Duration::from_secs(5), |span| span.0),
            secure: spec.url.starts_with("https:") || proxy.as_deref().is_some_and(|url| url.starts_with("https:")),
            roots,
            identity,
            proxy,
            url_varies: url_varies(spec),
            overrides,
            clock,
        })
    }

    fn client(&self) -> reqwest::Result<Client> {
        let mut builder = Client::builder()
            // One request at a time on a connection: one whose answer is late is closed with it, and no other waits behind it.
            .http1_only()
            .redirect(Policy::none())
            .retry(reqwest::retry::never())
            .no_gzip()
            .no_proxy()
            .connect_timeout(self.connect_timeout)
            .timeout(self.timeout)
            .pool_idle_timeout(IDLE)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30));
        if let Some(proxy) = &self.proxy {
            builder = builder.proxy(Proxy::all(proxy)?);
        }
        if let Some(identity) = &self.identity {
            builder = builder.identity(identity.clone());
        }
        if !self.secure {
            // Without TLS the system's certificates need not even be there.
            builder = builder.tls_certs_only(std::iter::empty());
        } else if !self.roots.is_empty() {
            builder = builder.tls_certs_merge(self.roots.iter().cloned());
        }
        builder.build()
    }

    /// Asks the host of `url` for its head: any answer says that it is there.
    pub(super) async fn probe(&self, url: &str) -> Probed {
        let what = crate::sink::shown_address(url);
        let asked = async {
            let client = self.client.get_or_try_init(|| async { self.client() }).await.map_err(chain)?;
            client.head(&what).send().await.map_err(chain)
        };
        let found: Result<reqwest::Response, String> = asked.await;
        let found = found.map(|answer| {
            let date = answer.headers().get(http::header::DATE).and_then(|date| date.to_str().ok());
            let theirs = date.and_then(|date| jiff::fmt::rfc2822::parse(date).ok());
            let clock = theirs.map_or("it tells no time".to_owned(), |at| {
                skew(self.clock.now(), Timestamp::from_millis(at.timestamp().as_millisecond()))
            });
            format!("it answers; {clock}")
        });
        Probed::of(what, found)
    }

    /// Sends a request and waits for its answer.
    pub(super) async fn send(&self, request: Request) -> Result<(), Failure> {
        let line = line(&request);
        let made = self.client.get_or_try_init(|| async { self.client() }).await;
        let client = made.map_err(|error| Failure::new(Verdict::Down, format!("{line}: {}", chain(error))))?;
        match client.execute(request).await {
            Ok(answer) => self.answered(&line, answer).await,
            Err(error) => {
                // Before there is a connection nothing of this record was seen. A server that misses the client's
                // certificate may say so only when the request is on its way.
                let down = error.is_connect() || error.is_builder() || is_tls(&error);
                let verdict = if down { Verdict::Down } else { Verdict::Backoff };
                let late = !error.is_connect() && error.is_timeout();
                let why = if late { format!("no answer within {:?}", self.timeout) } else { chain(error) };
                Err(Failure::new(verdict, format!("{line}: {why}")))
            }
        }
    }

    async fn answered(&self, line: &str, answer: Response) -> Result<(), Failure> {
        let status = answer.status();
        let retry_after =
            answer.headers().get(http::header::RETRY_AFTER).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let body = excerpt(answer).await;
        let now = self.clock.now();
        judge(status.as_u16(), retry_after.as_deref(), self.url_varies, &self.overrides, now).map_err(|verdict| {
            let said = if body.is_empty() { String::new() } else { format!(": {body}") };
            Failure::new(verdict, format!("{line}: {status}{said}"))
        })
    }
}

/// Method and host: the rest of a URL may be a secret.
fn line(request: &Request) -> String {
    let url = request.url();
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{} {}{port}", request.method(), url.host_str().unwrap_or_default())
}

/// True when the two ends could not agree on a secure connection.
fn is_tls(error: &reqwest::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        let inner = next.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        if next.is::<rustls::Error>() || inner.is_some_and(<dyn std::error::Error + Send + Sync>::is::<rustls::Error>) {
            return true;
        }
        cause = next.source();
    }
    false
}

/// An error with its causes, without the URL.
fn chain(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        let next_text = next.to_string();
        // Some causes repeat in their text what lies below them.
        if !text.ends_with(&next_text) {
            text.push_str(": ");
            text.push_str(&next_text);
        }
        cause = next.source();
    }
    shown(&text)
}

/// The beginning of an answer's body, on one line.
async fn excerpt(mut answer: Response) -> String {
    let mut head = Vec::new();
    let mut read = 0;
    let all = async {
        while let Ok(Some(chunk)) = answer.chunk().await {
            read += chunk.len();
            let room = (SHOWN * 4).saturating_sub(head.len());
            head.extend(chunk.iter().take(room));
            if read >= READ {
                break;
            }
        }
    };
    // What came within the time is enough: the status is known.
    let _ = tokio::time::timeout(READ_FOR, all).await;
    shown(&String::from_utf8_lossy(&head))
}

/// Text from outside: cut, on one line, control characters escaped.
fn shown(text: &str) -> String {
    let mut out = String::new();
    let mut count = 0;
    for character in text.trim().chars() {
        let escaped: String =
            if character.is_control() { character.escape_default().collect() } else { character.into() };
        count += escaped.chars().count();
        if count > SHOWN {
            out.push('…');
            break;
        }
        out.push_str(&escaped);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_target_says_is_cut_and_escaped() {
        assert_eq!(shown(" a\n\u{1b}[31mb\r "), "a\\n\\u{1b}[31mb");
        let long = shown(&"é".repeat(500));
        assert_eq!(long.chars().count(), SHOWN + 1);
        assert!(long.ends_with('…'));
    }

    #[test]
    fn a_url_is_shown_by_its_host_only() {
        let url = "https://user:secret@h:8443/token/abc?key=1".parse().unwrap();
        assert_eq!(line(&Request::new(http::Method::PUT, url)), "PUT h:8443");
    }

    #[test]
    fn certificates_that_are_none_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        let spec: HttpSpec =
            serde_json::from_value(serde_json::json!({"url": "https://h/", "tls": {"ca_file": path}})).unwrap();
        let error = |spec: &HttpSpec| Connector::open(spec, Clock::system()).err().unwrap().to_string();
        assert!(error(&spec).contains("ca.pem"), "{}", error(&spec));
        std::fs::write(&path, "no certificate").unwrap();
        assert!(error(&spec).contains("no PEM certificate"), "{}", error(&spec));
    }
}
