//! What an `http:` must say to work, checked without a file or the network, and what the plan says of it.

use http::{HeaderName, HeaderValue, Method};

use super::sign::Secrets;
use super::verdict::Overrides;
use super::{BatchFormat, HttpSpec};
use crate::sink::SpecFault;
use crate::sink::template::{Document, Template};

/// Headers that belong to the connection or to the request's own frame, not to a pipeline file.
const NOT_THE_FILES: [&str; 11] = [
    "connection",
    "content-length",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "expect",
];

/// True when the URL differs from record to record.
pub(in crate::sink) fn url_varies(spec: &HttpSpec) -> bool {
    Template::parse(&spec.url).is_ok_and(|template| template.varies())
}

/// When a record counts as delivered and how often it may arrive, for the plan.
pub fn delivered_note(spec: &HttpSpec, batched: bool) -> Vec<String> {
    let again = if batched {
        "a batch whose answer is lost is sent again; a refused batch is halved until the bad record is found"
    } else {
        "a request whose answer is lost is sent again with the same webhook-id and idempotency-key"
    };
    let mut notes = vec!["delivered when the target answers 2xx".to_owned(), again.to_owned()];
    if spec.url.starts_with("http://") && spec.sign.is_some() {
        notes.push("signed, but over http: who listens on the way reads and repeats it".to_owned());
    }
    notes
}

/// What cannot work in an `http:`.
pub(in crate::sink) fn check(spec: &HttpSpec, batched: bool) -> Vec<SpecFault> {
    let mut faults = Vec::new();
    url(spec, batched, &mut faults);
    if let Some(method) = &spec.method {
        let known = Method::from_bytes(method.as_bytes());
        if !known.is_ok_and(|method| !matches!(method, Method::CONNECT | Method::TRACE)) {
            faults.push(SpecFault::new(
                "/method",
                format!("'{method}' is no method for a delivery"),
                "POST, PUT, PATCH or DELETE",
            ));
        }
    }
    for (name, value) in &spec.headers {
        header(name, value, batched, &mut faults);
    }
    if let Some(body) = &spec.body
        && let Err(error) = Document::parse(body)
    {
        let help = "{payload.a}, for example; {{ is a literal brace";
        faults.push(SpecFault::new(format!("/body{}", error.pointer), error.error.to_string(), help));
    }
    sign(spec, &mut faults);
    if let Some(tls) = &spec.tls
        && tls.cert_file.is_some() != tls.key_file.is_some()
    {
        let given = if tls.cert_file.is_some() { "cert_file" } else { "key_file" };
        faults.push(SpecFault::new(
            format!("/tls/{given}"),
            "a client's certificate and its key go together",
            "give both cert_file and key_file",
        ));
    }
    if let Some(proxy) = spec.proxy.as_deref().filter(|proxy| *proxy != "none") {
        let fine =
            reqwest::Url::parse(proxy).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        if !fine {
            // The text is not shown: it may hold a password.
            faults.push(SpecFault::new(
                "/proxy",
                "the proxy is no http or https URL",
                "http://proxy.internal:3128, or none",
            ));
        }
    }
    for (name, span) in [("timeout", spec.timeout), ("connect_timeout", spec.connect_timeout)] {
        if span.is_some_and(|span| span.0.is_zero()) {
            faults.push(SpecFault::new(format!("/{name}"), "nothing can be done in no time", "30s, for example"));
        }
    }
    for (status, verdict) in &spec.verdicts {
        if Overrides::parse(std::iter::once((status.as_str(), *verdict))).is_err() {
            let pointer = format!("/verdicts/{}", status.replace('~', "~0").replace('/', "~1"));
            faults.push(SpecFault::new(
                pointer,
                format!("'{status}' is no status"),
                "a status such as 404, or a class such as 4xx",
            ));
        }
    }
    faults
}

fn url(spec: &HttpSpec, batched: bool, faults: &mut Vec<SpecFault>) {
    const HELP: &str = "https://hooks.internal/users/{payload.id}, for example";
    let mut fault = |message: String| faults.push(SpecFault::new("/url", message, HELP));
    let template = match Template::parse(&spec.url) {
        Ok(template) => template,
        Err(error) => return fault(error.to_string()),
    };
    let prefix = template.literal_prefix();
    let Some((scheme, rest)) = prefix.split_once("://") else {
        return fault("the URL does not begin with a literal scheme and host".to_owned());
    };
    if !matches!(scheme, "http" | "https") {
        return fault(format!("'{scheme}' is neither http nor https"));
    }
    let authority = rest.find(['/', '?', '#']).and_then(|end| rest.get(..end));
    if authority.is_none() && !template.is_literal() {
        return fault("the host is not literal up to its first '/'".to_owned());
    }
    if authority.unwrap_or(rest).is_empty() {
        return fault("the URL has no host".to_owned());
    }
    if prefix.contains('#') {
        return fault("what follows '#' in a URL is never sent".to_owned());
    }
    if let Err(error) = reqwest::Url::parse(prefix) {
        return fault(format!("the URL does not work: {error}"));
    }
    if prefix.split(['?', '#']).next().is_some_and(|path| path.trim_end_matches('/').ends_with("/wal/write/batch")) {
        // It answers 200 and says line by line what became of each, which a sink does not read: refused lines would be lost.
        return fault(
            "walflow's batch route says in its answer which lines it took, and a sink reads no answers".to_owned(),
        );
    }
    if batched && template.varies() {
        fault("a batch goes to one URL, so it cannot name a record".to_owned());
    }
}

fn header(name: &str, value: &str, batched: bool, faults: &mut Vec<SpecFault>) {
    let pointer = format!("/headers/{}", name.replace('~', "~0").replace('/', "~1"));
    let mut fault = |message: String, help: &str| faults.push(SpecFault::new(pointer.clone(), message, help));
    let Ok(known) = HeaderName::from_bytes(name.as_bytes()) else {
        return fault("this is no name of a header".to_owned(), "letters, digits and '-': X-Source, for example");
    };
    if NOT_THE_FILES.contains(&known.as_str()) || known.as_str().starts_with("webhook-") {
        return fault(format!("'{known}' is set by walflow or belongs to the connection"), "remove it");
    }
    match Template::parse(value) {
        Err(error) => fault(error.to_string(), "{payload.a}, for example; {{ is a literal brace"),
        Ok(template) if template.is_literal() && HeaderValue::from_str(template.literal_prefix()).is_err() => {
            fault("the value holds a line end or another control character".to_owned(), "one line of text");
        }
        Ok(template) if batched && template.varies() => {
            fault(
                "a batch has one set of headers, so they cannot name a record".to_owned(),
                "remove `batch:`, or the reference",
            );
        }
        Ok(_) => {}
    }
}

fn sign(spec: &HttpSpec, faults: &mut Vec<SpecFault>) {
    let Some(sign) = &spec.sign else { return };
    match (&sign.secret, &sign.secret_file) {
        (Some(secret), None) => {
            if let Err(error) = Secrets::parse(secret) {
                faults.push(SpecFault::new(
                    "/sign/secret",
                    error.to_string(),
                    "make one: echo whsec_$(openssl rand -base64 32)",
                ));
            }
        }
        (None, Some(_)) => {}
        _ => faults.push(SpecFault::new(
            "/sign",
            "signing needs a secret from one place",
            "give `secret` or `secret_file`, not both",
        )),
    }
}

impl BatchFormat {
    /// The content type of a body in this format.
    pub(super) const fn content_type(self) -> &'static str {
        match self {
            Self::JsonArray => "application/json",
            Self::Ndjson => "application/x-ndjson",
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn faults(spec: &Value, batched: bool) -> Vec<String> {
        let spec: HttpSpec = serde_json::from_value(spec.clone()).unwrap();
        check(&spec, batched).into_iter().map(|fault| fault.pointer).collect()
    }

    #[test]
    fn what_cannot_work_is_found_at_its_place() {
        let with = |mut more: Value| {
            more.as_object_mut().unwrap().entry("url").or_insert("https://h/".into());
            more
        };
        for (more, pointer) in [
            (json!({"url": "{payload.url}"}), "/url"),
            (json!({"url": "https://{payload.host}/"}), "/url"),
            (json!({"url": "https://h{payload.a}/x"}), "/url"),
            (json!({"url": "https://h:{payload.a}/x"}), "/url"),
            (json!({"url": "ftp://h/x"}), "/url"),
            (json!({"url": "https:///x"}), "/url"),
            (json!({"url": "/x"}), "/url"),
            (json!({"url": "https://h/{payload"}), "/url"),
            (json!({"url": "https://h/#{key}"}), "/url"),
            (json!({"url": "https://h:99999/"}), "/url"),
            (json!({"url": "https://h/api/v1/wal/write/batch"}), "/url"),
            (json!({"method": "CONNECT"}), "/method"),
            (json!({"method": "GET IT"}), "/method"),
            (json!({"headers": {"a b": "x"}}), "/headers/a b"),
            (json!({"headers": {"X-A": "a\r\nb: c"}}), "/headers/X-A"),
            (json!({"headers": {"Transfer-Encoding": "chunked"}}), "/headers/Transfer-Encoding"),
            (json!({"headers": {"Webhook-Id": "x"}}), "/headers/Webhook-Id"),
            (json!({"headers": {"X": "{payload.}"}}), "/headers/X"),
            (json!({"body": {"a": ["{key"]}}), "/body/a/0"),
            (json!({"sign": {}}), "/sign"),
            (json!({"sign": {"secret": "whsec_short"}}), "/sign/secret"),
            (json!({"tls": {"cert_file": "a"}}), "/tls/cert_file"),
            (json!({"proxy": "socks://x"}), "/proxy"),
            (json!({"timeout": "0s"}), "/timeout"),
            (json!({"verdicts": {"4x": "ok"}}), "/verdicts/4x"),
        ] {
            assert_eq!(faults(&with(more.clone()), false), [pointer], "{more}");
        }
        let fine = json!({"url": "https://u:p@h:8443/a/{payload.id}?q={key}", "method": "PUT", "headers": {"X": "{key}"},
            "body": {"a": "{payload}"}, "sign": {"secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}, "proxy": "none",
            "verdicts": {"404": "never", "5xx": "down"}});
        assert_eq!(faults(&fine, false), Vec::<String>::new());
        assert_eq!(faults(&fine, true), ["/url", "/headers/X"]);
        assert_eq!(faults(&json!({"url": "http://h/{region:-x}"}), true), Vec::<String>::new());
    }
}
