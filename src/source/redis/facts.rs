//! What a server says of its own settings, and what that makes of "durable".

use std::collections::HashMap;

use redis::aio::MultiplexedConnection;
use redis::{RedisResult, Value};

/// What an answer of the server is worth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    /// Each group of writes is followed by `WAITAOF 1 0`.
    pub(super) waits: bool,
    /// Why what is answered may be lost; `None` = it survives the end of the server's process.
    pub(super) weak: Option<String>,
    /// In a few words.
    pub(super) note: String,
}

/// What was asked of the server; `None` = it does not say.
#[derive(Clone, Debug, Default)]
pub(super) struct Settings {
    pub(super) version: (u32, u32),
    pub(super) appendonly: Option<bool>,
    pub(super) appendfsync: Option<String>,
    pub(super) policy: Option<String>,
}

/// A server that cannot be used at all.
pub(super) fn too_old(version: (u32, u32)) -> Option<String> {
    (version < (7, 0)).then(|| {
        format!(
            "it is version {}.{}, and entries are numbered with `0-*`, which needs 7.0 or later",
            version.0, version.1
        )
    })
}

impl Settings {
    pub(super) fn judge(&self) -> Facts {
        let mut weak = Vec::new();
        let mut waits = false;
        let kept = match (self.appendonly, self.appendfsync.as_deref()) {
            (Some(true), Some("always")) => "appendonly, appendfsync always".to_owned(),
            (Some(true), other) if self.version >= (7, 2) => {
                waits = true;
                format!(
                    "appendonly, appendfsync {}, each group waits for the disk (WAITAOF)",
                    other.unwrap_or("unknown")
                )
            }
            (Some(true), other) => {
                let (major, minor) = self.version;
                weak.push(format!(
                    "appendfsync is {}, so it confirms before its disk has it, and version {major}.{minor} has no WAITAOF: run \
                     `redis-cli config set appendfsync always` and `redis-cli config rewrite`, or use Redis 7.2 or Valkey",
                    other.unwrap_or("unknown")
                ));
                "appendonly".to_owned()
            }
            (Some(false), _) => {
                weak.push(
                    "appendonly is off, so it keeps nothing: run `redis-cli config set appendonly yes`, `redis-cli config set \
                     appendfsync always` and `redis-cli config rewrite`"
                        .to_owned(),
                );
                "in memory".to_owned()
            }
            (None, _) => {
                weak.push("it does not say whether appendonly is on: allow CONFIG GET or INFO".to_owned());
                "unknown".to_owned()
            }
        };
        match self.policy.as_deref() {
            Some("noeviction") => {}
            Some(policy) => weak.push(format!(
                "maxmemory-policy is {policy}, which drops keys when memory is short: run `redis-cli config set \
                     maxmemory-policy noeviction` and `redis-cli config rewrite`"
            )),
            None => weak.push("it does not say its maxmemory-policy: allow CONFIG GET or INFO".to_owned()),
        }
        let weak = (!weak.is_empty()).then(|| weak.join("; "));
        Facts { waits, note: kept, weak }
    }
}

/// Asks a server.
pub(super) async fn ask(connection: &mut MultiplexedConnection) -> RedisResult<Settings> {
    let info: String = redis::cmd("INFO").arg("everything").query_async(connection).await?;
    let info: HashMap<&str, &str> = info.lines().filter_map(|line| line.trim_end().split_once(':')).collect();
    let mut config: HashMap<String, String> = HashMap::new();
    for name in ["appendonly", "appendfsync", "maxmemory-policy"] {
        // Where CONFIG is forbidden INFO tells most of it.
        let answer: RedisResult<Value> = redis::cmd("CONFIG").arg("GET").arg(name).query_async(connection).await;
        match answer {
            Ok(value) => config.extend(redis::from_redis_value::<HashMap<String, String>>(value).unwrap_or_default()),
            Err(error) if error.code().is_some() => break,
            Err(error) => return Err(error),
        }
    }
    let told = |name: &str| config.get(name).map(String::as_str);
    let aof = match told("appendonly").or(info.get("aof_enabled").copied()) {
        Some("yes" | "1") => Some(true),
        Some("no" | "0") => Some(false),
        _ => None,
    };
    Ok(Settings {
        version: info.get("redis_version").map_or((0, 0), |text| version(text)),
        appendonly: aof,
        appendfsync: told("appendfsync").map(str::to_owned),
        policy: told("maxmemory-policy").or(info.get("maxmemory_policy").copied()).map(str::to_owned),
    })
}

fn version(text: &str) -> (u32, u32) {
    let mut numbers = text.split('.').map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(version: (u32, u32), appendonly: Option<bool>, fsync: &str, policy: &str) -> Facts {
        let (appendfsync, policy) = (Some(fsync.to_owned()), Some(policy.to_owned()));
        Settings { version, appendonly, appendfsync, policy }.judge()
    }

    #[test]
    fn durable_is_what_the_servers_settings_make_of_it() {
        let always = judged((7, 0), Some(true), "always", "noeviction");
        assert_eq!((always.waits, always.weak), (false, None));
        let waits = judged((7, 2), Some(true), "everysec", "noeviction");
        assert_eq!((waits.waits, waits.weak), (true, None));
        for (facts, told) in [
            (
                judged((7, 0), Some(true), "everysec", "noeviction"),
                "appendfsync is everysec, so it confirms before its disk has it, and version 7.0 has no WAITAOF: run `redis-cli",
            ),
            (
                judged((7, 2), Some(false), "always", "noeviction"),
                "appendonly is off, so it keeps nothing: run `redis-cli",
            ),
            (judged((7, 2), None, "always", "noeviction"), "does not say whether appendonly"),
            (judged((7, 0), Some(true), "always", "allkeys-lru"), "maxmemory-policy is allkeys-lru"),
        ] {
            assert!(facts.weak.as_ref().is_some_and(|why| why.contains(told)), "{told}: {facts:?}");
        }
        assert!(too_old((6, 2)).is_some() && too_old((7, 0)).is_none());
    }
}
