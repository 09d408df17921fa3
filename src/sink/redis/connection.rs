//! The one connection of a branch to a Redis server, made when it is needed.
//!
//! Takes pipelines from several batches at once and gives each its answers; the server runs them in the order in which they
//! were handed over. A connection that broke is dropped and made anew by the next batch, not more often than the waits
//! allow. One that only answers late is kept, since what it was sent may still be executed; it is dropped, unsent bytes
//! discarded, when it has been silent for long.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{AsyncConnectionConfig, Client, ConnectionInfo, IntoConnectionInfo as _, Pipeline, RedisResult, Value};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::verdict::judge;
use crate::sink::{Failure, Verdict};

/// To open a connection, at most.
const CONNECT: Duration = Duration::from_secs(5);
/// After a connection could not be made the next is tried after this long, then twice as long …
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// … up to this.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// So many answers in a row that came too late, and the connection is given up.
const LATE_IN_A_ROW: u32 = 8;

/// Reads an address without using it; the text itself is not shown, it may hold a password.
pub(super) fn address(url: &str) -> Result<ConnectionInfo, String> {
    let wrong = |error: &redis::RedisError| format!("the URL does not work: {}", error.category());
    if !["redis://", "rediss://", "unix://", "redis+unix://"].iter().any(|scheme| url.starts_with(scheme)) {
        return Err("the URL is none of redis://, rediss:// and unix://".to_owned());
    }
    url.into_connection_info().map_err(|error| wrong(&error))
}

fn client(info: ConnectionInfo, timeout: Duration) -> Result<Client, String> {
    let settings = TcpSettings::default().set_nodelay(true).set_linger_time(Duration::ZERO);
    #[cfg(target_os = "linux")]
    let settings = settings.set_user_timeout(timeout.max(Duration::from_secs(1)));
    #[cfg(not(target_os = "linux"))]
    let _ = timeout;
    let info = info.set_tcp_settings(settings);
    Client::open(info).map_err(|error| format!("the address does not work: {}", error.category()))
}

/// A connection, or the wait until the next may be tried.
#[derive(Default)]
struct State {
    open: Option<MultiplexedConnection>,
    /// Counts the connections, so that a batch drops only the one that it used.
    number: u64,
    late: u32,
    failures: u32,
    refused: Option<(Instant, Failure)>,
}

/// The connection of a branch to one server.
pub(super) struct Connection {
    client: Client,
    timeout: Duration,
    shown: Box<str>,
    state: Mutex<State>,
}

impl Connection {
    pub(super) fn new(info: ConnectionInfo, timeout: Duration) -> Result<Self, String> {
        let client = client(info, timeout)?;
        let shown = format!("redis {}", client.get_connection_info().addr()).into();
        Ok(Self { client, timeout, shown, state: Mutex::default() })
    }

    /// The server's address, for messages.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    async fn open(&self) -> Result<(MultiplexedConnection, u64), Failure> {
        let mut state = self.state.lock().await;
        if let Some(open) = &state.open {
            return Ok((open.clone(), state.number));
        }
        if let Some((until, failure)) = &state.refused
            && Instant::now() < *until
        {
            return Err(failure.clone());
        }
        let config =
            AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT)).set_response_timeout(Some(self.timeout));
        match self.client.get_multiplexed_async_connection_with_config(&config).await {
            Ok(open) => {
                state.number += 1;
                (state.late, state.failures, state.refused) = (0, 0, None);
                state.open = Some(open.clone());
                Ok((open, state.number))
            }
            Err(error) => {
                // Whatever goes wrong before the first command is about the server, not about a record.
                let failure = Failure { verdict: Verdict::Down, ..judge(&self.shown, &error) };
                let wait = FIRST_WAIT.saturating_mul(1 << state.failures.min(10)).min(LONGEST_WAIT);
                state.failures = state.failures.saturating_add(1);
                state.refused = Some((Instant::now() + wait, failure.clone()));
                Err(failure)
            }
        }
    }

    /// Runs a pipeline; gives each command's result, or one failure for all.
    pub(super) async fn run(&self, pipeline: &Pipeline) -> Result<Vec<RedisResult<Value>>, Failure> {
        let (mut connection, number) = self.open().await?;
        let result: RedisResult<Vec<RedisResult<Value>>> = pipeline.query_async(&mut connection).await;
        let mut state = self.state.lock().await;
        let current = state.number == number;
        match &result {
            Ok(_) if current => state.late = 0,
            Err(error) if current && error.is_timeout() => {
                state.late += 1;
                if state.late >= LATE_IN_A_ROW {
                    state.open = None;
                }
            }
            Err(_) if current => state.open = None,
            _ => {}
        }
        drop(state);
        result.map_err(|error| {
            if error.is_timeout() {
                let why = format!("{}: no answer within {:?}", self.shown, self.timeout);
                Failure::new(Verdict::Backoff, why)
            } else {
                judge(&self.shown, &error)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_checked_without_being_shown() {
        for fine in ["redis://127.0.0.1", "redis://u:p@h:1/3", "rediss://h", "unix:///run/redis.sock"] {
            assert!(address(fine).is_ok(), "{fine}");
        }
        for wrong in ["", "http://h", "h:6379", "redis://h:canary", "redis://u:canary@h/x"] {
            let why = address(wrong).unwrap_err();
            assert!(!why.contains("canary"), "{why}");
        }
        let connection = Connection::new(address("redis://u:canary@h:1/3").unwrap(), CONNECT).unwrap();
        assert_eq!(connection.shown(), "redis h:1");
    }
}
