//! What a pipeline file says of a `redis:` source or shelf.

use std::fmt;
use std::time::Duration;

use redis::RedisConnectionInfo;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::link::{Address, client};
use crate::source::foreign::open::SpecFault;
use crate::units::Span;

/// The longest wait for an answer where the file says nothing.
const TIMEOUT: Duration = Duration::from_secs(5);

/// `source.redis:` — streams on one server, which are walflow's own.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RedisSourceSpec {
    /// `redis://…` or `rediss://…`. This or `sentinel`.
    pub url: Option<String>,
    /// Sentinels that know the master.
    pub sentinel: Option<SentinelSpec>,
    /// Over how many streams keys are spread, so that so many processes may share them; never changed later. Default: 8.
    pub streams: Option<u16>,
    /// What the names of all keys begin with. Default: walflow.
    pub prefix: Option<String>,
    /// Whether a server that may lose what it confirmed is refused. Default: strict.
    pub durability: Durability,
    /// Longest wait for an answer. Default: 5s.
    pub timeout: Option<Span>,
}

/// `source.redis.sentinel:`
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SentinelSpec {
    /// Each sentinel's address, `redis://host:26379`.
    pub urls: Vec<String>,
    /// The name of the master.
    pub master: String,
    /// Who we are at the master.
    pub username: Option<String>,
    /// The password at the master.
    pub password: Option<String>,
    /// The number of the database at the master. Default: 0.
    pub database: Option<i64>,
}

/// `durability:` of a Redis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// What was confirmed is on the server's disk, or the server is refused.
    #[default]
    Strict,
    /// As durable as the server happens to be.
    Weak,
}

/// `source.shelf.redis:`
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RedisShelfSpec {
    /// `redis://…` or `rediss://…`. Default: the source's, where that is a Redis.
    pub url: Option<String>,
    /// The sentinels of the source beside it, where no `url` is named.
    #[serde(skip)]
    pub(super) sentinel: Option<SentinelSpec>,
    /// What the names of all keys begin with. Default: the source's, where that is a Redis; else walflow.
    pub prefix: Option<String>,
    /// Whether a server that may lose what it confirmed is refused. Default: strict.
    pub durability: Durability,
    /// Longest wait for an answer. Default: 5s.
    pub timeout: Option<Span>,
}

fn shown(url: &str) -> String {
    client(url).map_or_else(|why| why, |client| client.get_connection_info().addr().to_string())
}

impl fmt::Debug for RedisSourceSpec {
    /// Shows what is no secret: of an address the host.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSourceSpec")
            .field("url", &self.url.as_deref().map(shown))
            .field("sentinel", &self.sentinel)
            .field("streams", &self.streams)
            .field("prefix", &self.prefix)
            .field("durability", &self.durability)
            .field("timeout", &self.timeout)
            .finish()
    }
}

impl fmt::Debug for SentinelSpec {
    /// Shows what is no secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SentinelSpec")
            .field("urls", &self.urls.iter().map(|url| shown(url)).collect::<Vec<_>>())
            .field("master", &self.master)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for RedisShelfSpec {
    /// Shows what is no secret: of an address the host.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisShelfSpec")
            .field("url", &self.url.as_deref().map(shown))
            .field("sentinel", &self.sentinel)
            .field("prefix", &self.prefix)
            .field("durability", &self.durability)
            .field("timeout", &self.timeout)
            .finish()
    }
}

impl RedisSourceSpec {
    pub(super) fn address(&self) -> Result<Address, SpecFault> {
        match (&self.url, &self.sentinel) {
            (Some(url), None) => of_url(url),
            (None, Some(sentinel)) => sentinel.address(),
            (None, None) => {
                Err(SpecFault::new("/url", "there is no address", "url: redis://host:6379, or sentinel: { … }"))
            }
            (Some(_), Some(_)) => Err(SpecFault::new(
                "/url",
                "url and sentinel exclude each other",
                "leave out the one that does not hold",
            )),
        }
    }

    pub(super) fn streams(&self) -> u16 {
        self.streams.unwrap_or(8)
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout.map_or(TIMEOUT, |span| span.0)
    }
}

impl RedisShelfSpec {
    pub(super) fn timeout(&self) -> Duration {
        self.timeout.map_or(TIMEOUT, |span| span.0)
    }

    /// The shelf that a source has beside it where the file names no other server.
    #[must_use]
    pub fn beside(mut self, source: &RedisSourceSpec) -> Self {
        if self.url.is_none() {
            self.url.clone_from(&source.url);
            self.sentinel.clone_from(&source.sentinel);
            self.durability = source.durability;
        }
        // Under one prefix on one server an idempotency key stands for one record, parked or appended.
        self.prefix = self.prefix.or_else(|| source.prefix.clone());
        self.timeout = self.timeout.or(source.timeout);
        self
    }

    /// True when the streams' keys are its own: it is there where they are, under the same prefix.
    pub fn is_beside(&self, source: &RedisSourceSpec) -> bool {
        (&self.url, &self.sentinel, &self.prefix) == (&source.url, &source.sentinel, &source.prefix)
    }

    pub(super) fn address(&self) -> Result<Address, SpecFault> {
        match (&self.url, &self.sentinel) {
            (Some(url), _) => of_url(url),
            (None, Some(sentinel)) => sentinel.address(),
            (None, None) => Err(SpecFault::new("/url", "there is no address", "url: redis://host:6379")),
        }
    }
}

impl SentinelSpec {
    pub(super) fn address(&self) -> Result<Address, SpecFault> {
        if self.master.is_empty() {
            return Err(SpecFault::new(
                "/sentinel/master",
                "the master has no name",
                "as in `sentinel monitor NAME …`",
            ));
        }
        if self.urls.is_empty() {
            return Err(SpecFault::new("/sentinel/urls", "there is no sentinel", "[\"redis://host:26379\", …]"));
        }
        for (index, url) in self.urls.iter().enumerate() {
            if let Err(why) = client(url) {
                return Err(SpecFault::new(format!("/sentinel/urls/{index}"), why, "redis://host:26379"));
            }
        }
        let mut login = RedisConnectionInfo::default().set_db(self.database.unwrap_or(0));
        if let Some(username) = &self.username {
            login = login.set_username(username);
        }
        if let Some(password) = &self.password {
            login = login.set_password(password);
        }
        Ok(Address::Sentinels { urls: self.urls.clone(), master: self.master.clone(), login })
    }
}

pub(super) fn of_url(url: &str) -> Result<Address, SpecFault> {
    client(url)
        .map(|client| Address::Server(Box::new(client)))
        .map_err(|why| SpecFault::new("/url", why, "redis://[user:password@]host[:port][/database]"))
}

fn prefix_fault(prefix: Option<&str>) -> Option<SpecFault> {
    let prefix = prefix?;
    let wrong =
        prefix.is_empty() || prefix.len() > 100 || prefix.contains(['{', '}']) || prefix.contains(char::is_whitespace);
    wrong.then(|| {
        SpecFault::new("/prefix", format!("'{prefix}' is no prefix"), "1 to 100 characters without braces and blanks")
    })
}

fn timeout_fault(timeout: Option<Span>) -> Option<SpecFault> {
    let timeout = timeout?;
    (timeout.0 < Duration::from_millis(500)).then(|| {
        SpecFault::new("/timeout", "no server writes to its disk reliably in so short a time", "500ms or more")
    })
}

/// What cannot work in a `redis:` source.
pub fn check(spec: &RedisSourceSpec) -> Vec<SpecFault> {
    let mut faults: Vec<SpecFault> = spec.address().err().into_iter().collect();
    if !(1..=1_024).contains(&spec.streams()) {
        faults.push(SpecFault::new(
            "/streams",
            "keys cannot be spread over so many streams",
            "1 to 1024; 8, for example",
        ));
    }
    faults.extend(prefix_fault(spec.prefix.as_deref()));
    faults.extend(timeout_fault(spec.timeout));
    faults
}

/// What cannot work in a `redis:` shelf; its address may be the source's.
pub fn check_shelf(spec: &RedisShelfSpec) -> Vec<SpecFault> {
    let mut faults: Vec<SpecFault> = spec.address().err().into_iter().collect();
    faults.extend(prefix_fault(spec.prefix.as_deref()));
    faults.extend(timeout_fault(spec.timeout));
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shelf_beside_streams_has_their_server_prefix_and_demands() {
        let source: RedisSourceSpec = serde_yaml::from_str(
            "{ sentinel: { urls: [\"redis://h:26379\"], master: m }, prefix: own, durability: weak, timeout: 9s }",
        )
        .unwrap();
        let shelf = RedisShelfSpec::default().beside(&source);
        assert!(shelf.is_beside(&source));
        assert!(check_shelf(&shelf).is_empty() && shelf.address().is_ok());
        assert_eq!(
            (shelf.prefix.as_deref(), shelf.durability, shelf.timeout),
            (Some("own"), Durability::Weak, source.timeout)
        );
        let named = RedisShelfSpec { url: Some("redis://other".into()), ..RedisShelfSpec::default() }.beside(&source);
        assert!(!named.is_beside(&source));
        assert_eq!((&named.sentinel, named.durability), (&None, Durability::Strict));
        assert_eq!(
            check_shelf(&RedisShelfSpec::default()).len(),
            1,
            "beside a log that is no Redis it needs an address"
        );
    }

    #[test]
    fn settings_that_cannot_work_are_told_with_their_place_and_without_secrets() {
        let spec = |text: &str| serde_yaml::from_str::<RedisSourceSpec>(text).unwrap();
        let places = |text: &str| check(&spec(text)).into_iter().map(|fault| fault.pointer).collect::<Vec<_>>();
        assert_eq!(places("{ url: \"redis://u:canary@h:1/3\" }"), [] as [&str; 0]);
        assert_eq!(
            places("{ sentinel: { urls: [\"redis://h:26379\"], master: m, password: canary } }"),
            [] as [&str; 0]
        );
        assert_eq!(places("{}"), ["/url"]);
        assert_eq!(places("{ url: \"redis://h\", sentinel: { urls: [\"redis://h\"], master: m } }"), ["/url"]);
        assert_eq!(places("{ url: \"http://canary\" }"), ["/url"]);
        assert_eq!(places("{ sentinel: { urls: [x], master: m } }"), ["/sentinel/urls/0"]);
        assert_eq!(places("{ sentinel: { urls: [x] } }"), ["/sentinel/master"]);
        let wrong = "{ url: \"redis://h\", streams: 0, prefix: \"a{b\", timeout: 10ms }";
        assert_eq!(places(wrong), ["/streams", "/prefix", "/timeout"]);
        for text in [
            "{ url: \"redis://u:canary@h:1/3\" }",
            "{ url: \"redis://h:canary\" }",
            "{ sentinel: { urls: [\"redis://:canary@h:26379\"], master: m, password: canary } }",
        ] {
            let spec = spec(text);
            let told = format!("{spec:?} {:?}", check(&spec));
            assert!(!told.contains("canary"), "{told}");
        }
    }
}
