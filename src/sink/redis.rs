//! `redis`: commands chosen by `cases`, a batch in one pipeline for a server and in one a node for a cluster.
//!
//! Takes operations, gives what the server said to each command. A few connections for the branch and server, each made when
//! it is needed and made again when it breaks. After a time-out a key's next command goes over the same connection, behind what
//! may still be executed, so that an old value never lands on a newer one. Never runs a command that the file does not name.

mod cluster;
mod command;
mod connection;
mod probe;
mod single;
mod slots;
mod verdict;

use std::fmt;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use indexmap::IndexMap;
use redis::{Cmd, ConnectionAddr, ConnectionInfo};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::cluster::Cluster;
use self::command::Case;
use self::connection::address;
use self::single::Single;
use super::template::Scope;
use super::{BatchStyle, Failure, OpenError, Operation, Sink, SinkContext, SpecFault, Written, shown_address};
use crate::connection::probe::Probed;
use crate::connection::tls;
use crate::units::Span;

/// `redis:` — one command a record, chosen by the first case that matches.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RedisSpec {
    /// `redis://…` or `rediss://…`; may come from a region. This or `cluster`.
    pub url: Option<String>,
    /// Some nodes of a Redis Cluster, `redis://…` or `rediss://…`; the others are found through them. The login and the TLS
    /// of the first hold for all nodes. May come from a region.
    pub cluster: Vec<String>,
    /// Operations on one target: the first whose `when` holds is taken.
    pub cases: Vec<RedisCaseSpec>,
    /// Longest wait for an answer. Default: 5s.
    pub timeout: Option<Span>,
}

impl fmt::Debug for RedisSpec {
    /// Shows what is no secret: of the address the host.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSpec")
            .field("url", &self.url.as_deref().map(shown_address))
            .field("cluster", &self.cluster.iter().map(|url| shown_address(url)).collect::<Vec<_>>())
            .field("cases", &self.cases)
            .field("timeout", &self.timeout)
            .finish()
    }
}

/// One case of `redis.cases:`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RedisCaseSpec {
    /// Taken when this is true; without it always.
    pub when: Option<String>,
    /// What to do. Default: set.
    pub command: Option<RedisCommand>,
    /// The key, a template with a literal beginning.
    pub key: String,
    /// For `set`: the value. Default: the payload's bytes.
    pub value: Option<serde_json::Value>,
    /// For `set`: how long the value lives. Default: for ever.
    pub ttl: Option<Span>,
    /// For `hset` and `xadd`: fields and their values.
    pub fields: IndexMap<String, serde_json::Value>,
    /// For `incrby`: how much, a number or a template. Default: 1.
    pub by: Option<serde_json::Value>,
}

/// A Redis command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RedisCommand {
    /// SET, with EX when there is a ttl.
    #[default]
    Set,
    /// DEL.
    Del,
    /// HSET.
    Hset,
    /// INCRBY.
    Incrby,
    /// XADD.
    Xadd,
}

/// Reads the addresses of a cluster's nodes.
fn nodes(urls: &[String]) -> Result<Vec<ConnectionInfo>, SpecFault> {
    let mut infos: Vec<ConnectionInfo> = Vec::with_capacity(urls.len());
    for (index, url) in urls.iter().enumerate() {
        let fault = |why: &str, help: &str| SpecFault::new(format!("/cluster/{index}"), why, help);
        let info = address(url).map_err(|why| fault(&why, "redis://10.0.0.1:6379, or rediss:// for TLS"))?;
        if matches!(info.addr(), ConnectionAddr::Unix(_)) {
            return Err(fault("a node of a cluster is not reached over a socket", "redis://10.0.0.1:6379"));
        }
        if info.redis_settings().db() != 0 {
            return Err(fault("a cluster has no database but 0", "leave out the number after the '/'"));
        }
        let secured = |info: &ConnectionInfo| match info.addr() {
            ConnectionAddr::TcpTls { insecure, .. } => Some(*insecure),
            _ => None,
        };
        let login = |info: &ConnectionInfo| {
            let settings = info.redis_settings();
            (settings.username().map(str::to_owned), settings.password().map(str::to_owned))
        };
        if infos.first().is_some_and(|first| secured(first) != secured(&info) || login(first) != login(&info)) {
            let why = "its login or its TLS is not that of the first node, which holds for all nodes";
            return Err(fault(why, "give each the same user, password and scheme"));
        }
        infos.push(info);
    }
    Ok(infos)
}

/// What cannot work in a `redis:`.
pub(super) fn check(spec: &RedisSpec) -> Vec<SpecFault> {
    let mut faults = Vec::new();
    match &spec.url {
        Some(_) if !spec.cluster.is_empty() => {
            let help = "name one server under `url`, or nodes of a cluster under `cluster`";
            faults.push(SpecFault::new("/cluster", "url and cluster exclude each other", help));
        }
        Some(url) => {
            if let Err(why) = address(url) {
                faults.push(SpecFault::new("/url", why, "redis://127.0.0.1:6379/0, or rediss:// for TLS"));
            }
        }
        None if spec.cluster.is_empty() => {
            faults.push(SpecFault::new("/url", "there is no URL", "redis://127.0.0.1:6379/0, for example"));
        }
        None => faults.extend(nodes(&spec.cluster).err()),
    }
    if spec.timeout.is_some_and(|span| span.0.is_zero()) {
        faults.push(SpecFault::new("/timeout", "nothing can be done in no time", "5s, for example"));
    }
    if spec.cases.is_empty() {
        let help = "- { command: set, key: \"cache:{key}\" }";
        faults.push(SpecFault::new("/cases", "there is no case, so nothing would be done", help));
    }
    for (index, case) in spec.cases.iter().enumerate() {
        command::check(case, &format!("/cases/{index}"), &mut faults);
        if case.when.is_none() && index + 1 < spec.cases.len() {
            faults.push(SpecFault::new(
                format!("/cases/{index}"),
                "this case takes everything, so those after it take nothing",
                "give it a `when`, or make it the last",
            ));
        }
    }
    faults
}

/// When a record counts as delivered and what a second delivery does, for the plan.
pub(super) fn delivered_note(spec: &RedisSpec) -> Vec<String> {
    let mut notes =
        vec!["delivered when Redis has answered its command; how durable that is, its own settings say".to_owned()];
    for (index, case) in spec.cases.iter().enumerate() {
        match case.command.unwrap_or_default() {
            RedisCommand::Incrby => {
                notes.push(format!("case {index}: incrby is not repeatable; after a lost answer it counts twice"));
            }
            RedisCommand::Xadd => {
                notes.push(format!("case {index}: xadd is not repeatable; after a lost answer the entry stands twice"));
            }
            RedisCommand::Set | RedisCommand::Del | RedisCommand::Hset => {}
        }
    }
    if !spec.cluster.is_empty() {
        let what = "a cluster confirms before its replicas have it: a failover may lose what was just delivered";
        notes.push(what.to_owned());
    }
    if spec.url.iter().chain(&spec.cluster).any(|url| url.starts_with("rediss://") && url.ends_with("#insecure")) {
        notes.push("the server's certificate is not checked (#insecure)".to_owned());
    }
    notes
}

/// Where the commands go.
enum Server {
    One(Single),
    Cluster(Cluster),
}

impl Server {
    /// Runs the commands; gives what became of each.
    async fn run(&self, commands: Vec<Cmd>) -> Vec<Result<(), Failure>> {
        match self {
            Self::Cluster(cluster) => cluster.run(&commands).await,
            Self::One(server) => server.run(commands).await,
        }
    }
}

/// A Redis server, or a cluster of them.
pub struct RedisSink {
    server: Server,
    cases: Vec<Case>,
    context: SinkContext,
}

impl RedisSink {
    /// Reads the settings; connects to nothing.
    ///
    /// # Errors
    /// When a setting does not work.
    pub fn open(spec: &RedisSpec, context: &SinkContext) -> Result<Self, OpenError> {
        tls::provider();
        let wrong =
            |pointer: String, message: Box<str>| OpenError::Setting { kind: "redis", pointer: pointer.into(), message };
        let timeout = spec.timeout.map_or(Duration::from_secs(5), |span| span.0);
        let server = if spec.cluster.is_empty() {
            let url = spec.url.as_deref().unwrap_or_default();
            address(url).and_then(|info| Single::new(&info, timeout)).map(Server::One)
        } else {
            let infos = nodes(&spec.cluster).map_err(|fault| wrong(fault.pointer, fault.message.into()))?;
            Cluster::new(infos, timeout).map(Server::Cluster)
        };
        let place = if spec.cluster.is_empty() { "/url" } else { "/cluster" };
        let server = server.map_err(|why| wrong(place.to_owned(), why.into()))?;
        let cases = spec.cases.iter().enumerate().map(|(index, case)| {
            Case::parse(case).map_err(|(place, message)| wrong(format!("/cases/{index}{place}"), message))
        });
        Ok(Self { server, cases: cases.collect::<Result<_, _>>()?, context: context.clone() })
    }

    fn command(&self, operation: &Operation) -> Result<Cmd, Failure> {
        let case = self.cases.get(operation.case).ok_or_else(|| {
            Failure::rendering(format!("no case {} is left in the file; the record matched it before", operation.case))
        })?;
        case.command(&Scope::new(operation, &self.context))
    }
}

impl Sink for RedisSink {
    /// Redis runs every command of a pipeline, also behind one that failed.
    fn batch_style(&self) -> BatchStyle {
        BatchStyle::Independent
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            let mut failed = Vec::new();
            let mut sent = Vec::with_capacity(batch.len());
            let mut commands = Vec::with_capacity(batch.len());
            for (index, operation) in batch.iter().enumerate() {
                match self.command(operation) {
                    Ok(command) => {
                        commands.push(command);
                        sent.push(index);
                    }
                    Err(failure) => failed.push((index, failure)),
                }
            }
            if !commands.is_empty() {
                let outcomes = self.server.run(commands).await;
                let pairs = sent.into_iter().zip(outcomes);
                failed.extend(pairs.filter_map(|(index, outcome)| Some((index, outcome.err()?))));
            }
            failed.sort_unstable_by_key(|(index, _)| *index);
            Written { failed }
        }
        .boxed()
    }

    fn probe(&self) -> BoxFuture<'_, Vec<Probed>> {
        let clock = &self.context.clock;
        match &self.server {
            Server::One(server) => async move { vec![probe::server(server.connection(), clock).await] }.boxed(),
            Server::Cluster(cluster) => probe::cluster(cluster, clock).boxed(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> RedisSpec {
        serde_yaml::from_str(&format!("{{ {text}, cases: [{{ key: c }}] }}")).unwrap()
    }

    #[test]
    fn a_cluster_is_told_by_some_of_its_nodes_all_with_one_login() {
        for (text, place) in [
            ("cluster: [\"redis://u:canary@a:1\", \"redis://u:canary@b\"]", None),
            ("cluster: [\"rediss://a\", \"rediss://b:2/0\"]", None),
            ("cluster: []", Some("/url")),
            ("url: \"redis://a\", cluster: [\"redis://a\"]", Some("/cluster")),
            ("cluster: [\"redis://a\", \"a:canary\"]", Some("/cluster/1")),
            ("cluster: [\"unix:///canary\"]", Some("/cluster/0")),
            ("cluster: [\"redis://a/3\"]", Some("/cluster/0")),
            ("cluster: [\"redis://:canary@a\", \"redis://b\"]", Some("/cluster/1")),
            ("cluster: [\"redis://a\", \"rediss://a\"]", Some("/cluster/1")),
        ] {
            let spec = spec(text);
            let faults = check(&spec);
            assert_eq!(faults.first().map(|fault| fault.pointer.as_str()), place, "{text}");
            let told = format!("{spec:?} {faults:?}");
            assert!(!told.contains("canary"), "{told}");
        }
    }
}
