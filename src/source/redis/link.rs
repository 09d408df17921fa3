//! The connection to a server, for the log and for the shelf: made when it is needed, made anew when it broke.
//!
//! Each new connection looks at the server's settings first: it may be another server than before. One that is reached through
//! sentinels is asked for anew each time.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::sentinel::{Sentinel, SentinelNodeConnectionInfo};
use redis::{
    AsyncConnectionConfig, Client, Cmd, IntoConnectionInfo as _, Pipeline, RedisConnectionInfo, RedisError,
    RedisResult, Script, Value,
};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::facts::{self, Facts};
use crate::source::LogError;

/// To open a connection, at most.
const CONNECT: Duration = Duration::from_secs(5);
/// After a connection could not be made the next is tried after this long, then twice as long …
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// … up to this.
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// A reader waits for news so long at a time, or half the longest wait for an answer if that is shorter.
const BLOCK: Duration = Duration::from_secs(2);

/// Why there is no answer.
#[derive(Clone, Debug)]
pub(super) enum Failed {
    /// Nothing was sent.
    Unreached(Arc<str>),
    /// It was sent, and may have been done.
    Unsure(Arc<str>),
    /// The server refused it: it was not done.
    Refused(Arc<str>),
}

impl Failed {
    pub(super) fn why(&self) -> &Arc<str> {
        match self {
            Self::Unreached(why) | Self::Unsure(why) | Self::Refused(why) => why,
        }
    }

    pub(super) fn storage(&self, act: impl Into<Arc<str>>) -> LogError {
        LogError::Storage { act: act.into(), cause: Arc::clone(self.why()) }
    }
}

/// Where the server is.
#[derive(Clone)]
pub(super) enum Address {
    /// It is this one.
    Server(Box<Client>),
    /// Sentinels know.
    Sentinels { urls: Vec<String>, master: String, login: RedisConnectionInfo },
}

impl fmt::Display for Address {
    /// Shows what is no secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(client) => write!(f, "redis {}", client.get_connection_info().addr()),
            Self::Sentinels { master, .. } => write!(f, "redis master {master}"),
        }
    }
}

fn settings() -> TcpSettings {
    let settings = TcpSettings::default().set_nodelay(true).set_linger_time(Duration::ZERO);
    #[cfg(target_os = "linux")]
    let settings = settings.set_user_timeout(Duration::from_secs(10));
    settings
}

/// What an error says, without addresses that may hold secrets.
pub(super) fn explain(error: &RedisError) -> String {
    let text = match error.code() {
        Some(code) => format!("{code} {}", error.detail().unwrap_or_default()),
        None => error.to_string(),
    };
    text.trim().chars().take(300).map(|character| if character.is_control() { ' ' } else { character }).collect()
}

/// Checks an address without using it; the text itself is not shown, since it may hold a password.
pub(super) fn client(url: &str) -> Result<Client, String> {
    if !["redis://", "rediss://", "unix://", "redis+unix://"].iter().any(|scheme| url.starts_with(scheme)) {
        return Err("the URL is none of redis://, rediss:// and unix://".to_owned());
    }
    let wrong = |error: &RedisError| format!("the URL does not work: {}", error.category());
    let info = url.into_connection_info().map_err(|error| wrong(&error))?;
    Client::open(info.set_tcp_settings(settings())).map_err(|error| wrong(&error))
}

/// A connection that is open.
#[derive(Clone)]
pub(super) struct Open {
    pub(super) connection: MultiplexedConnection,
    pub(super) facts: Arc<Facts>,
    number: u64,
}

impl Open {
    /// Tells connections apart.
    pub(super) const fn number(&self) -> u64 {
        self.number
    }
}

#[derive(Default)]
struct State {
    open: Option<Open>,
    /// Counts the connections, so that a failure drops only the one that it was on.
    number: u64,
    failures: u32,
    refused: Option<(Instant, Arc<str>)>,
}

/// The way to a server.
pub(super) struct Link {
    address: Address,
    timeout: Duration,
    strict: bool,
    shown: Arc<str>,
    state: Mutex<State>,
    known: Arc<parking_lot::Mutex<Known>>,
}

/// What is known of the server, for those who do not want to wait.
#[derive(Clone, Default)]
struct Known {
    facts: Option<Arc<Facts>>,
    trouble: Option<Arc<str>>,
    /// The last thing that was said of weak settings.
    warned: Option<String>,
}

impl Link {
    pub(super) fn new(address: Address, timeout: Duration, strict: bool) -> Self {
        crate::connection::tls::provider();
        let shown = address.to_string().into();
        Self { address, timeout, strict, shown, state: Mutex::default(), known: Arc::default() }
    }

    /// Another way to the same server; what is known of it is known to both.
    pub(super) fn beside(&self) -> Self {
        Self {
            address: self.address.clone(),
            shown: Arc::clone(&self.shown),
            state: Mutex::default(),
            known: Arc::clone(&self.known),
            ..*self
        }
    }

    /// The server's address, for messages.
    pub(super) fn shown(&self) -> &Arc<str> {
        &self.shown
    }

    /// What "durable" means there; `None` = it was not reached yet.
    pub(super) fn facts(&self) -> Option<Arc<Facts>> {
        self.known.lock().facts.clone()
    }

    /// Why it cannot be used now.
    pub(super) fn trouble(&self) -> Option<Arc<str>> {
        self.known.lock().trouble.clone()
    }

    async fn client(&self) -> RedisResult<Client> {
        match &self.address {
            Address::Server(client) => Ok((**client).clone()),
            Address::Sentinels { urls, master, login } => {
                let mut sentinel = Sentinel::build(urls.iter().map(String::as_str).collect())?;
                let info = SentinelNodeConnectionInfo::default().set_redis_connection_info(login.clone());
                sentinel.async_master_for(master, Some(&info)).await
            }
        }
    }

    async fn connect(&self) -> RedisResult<MultiplexedConnection> {
        let config =
            AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT)).set_response_timeout(Some(self.timeout));
        // Sentinels are asked one after the other, each with a wait of its own.
        let client = tokio::time::timeout(CONNECT * 2, self.client()).await;
        let client = client.map_err(|_| RedisError::from(std::io::Error::from(std::io::ErrorKind::TimedOut)))??;
        client.get_multiplexed_async_connection_with_config(&config).await
    }

    /// For how long the server may let a command wait, so that its answer is there in time.
    pub(super) fn block(&self) -> Duration {
        BLOCK.min(self.timeout / 2)
    }

    /// Errors after which another server may have to be found.
    fn is_of_the_place(&self, code: &str) -> bool {
        let has_replicas = matches!(self.address, Address::Sentinels { .. });
        // A master that was cut off from its replicas may have been replaced.
        ["READONLY", "LOADING", "MASTERDOWN", "NOMASTERLINK"].contains(&code) || (has_replicas && code == "NOREPLICAS")
    }

    /// The connection, made if there is none.
    pub(super) async fn open(&self) -> Result<Open, Failed> {
        let mut state = self.state.lock().await;
        if let Some(open) = &state.open {
            return Ok(open.clone());
        }
        if let Some((until, why)) = &state.refused
            && Instant::now() < *until
        {
            return Err(Failed::Unreached(Arc::clone(why)));
        }
        let made = async {
            let mut connection = self.connect().await.map_err(|error| explain(&error))?;
            let settings = facts::ask(&mut connection).await.map_err(|error| explain(&error))?;
            if let Some(why) = facts::too_old(settings.version) {
                return Err(why);
            }
            let facts = settings.judge();
            if let Some(weak) = facts.weak.as_ref().filter(|_| self.strict) {
                return Err(format!(
                    "it may lose what it has confirmed, and walflow would promise the opposite: {weak}; or say `durability: \
                     weak` below `redis:`, and what is acknowledged is as safe as this server keeps it, no more"
                ));
            }
            Ok((connection, facts))
        };
        match made.await {
            Ok((connection, facts)) => {
                let facts = Arc::new(facts);
                {
                    let mut known = self.known.lock();
                    if facts.weak.is_some() && facts.weak != known.warned {
                        tracing::warn!(server = %self.shown, weak = facts.weak, "what is confirmed may be lost");
                    }
                    *known = Known { warned: facts.weak.clone(), facts: Some(Arc::clone(&facts)), trouble: None };
                }
                state.number += 1;
                (state.failures, state.refused) = (0, None);
                let open = Open { connection, facts, number: state.number };
                state.open = Some(open.clone());
                Ok(open)
            }
            Err(why) => {
                let why: Arc<str> = format!("{}: {why}", self.shown).into();
                let wait = FIRST_WAIT.saturating_mul(1 << state.failures.min(10)).min(LONGEST_WAIT);
                state.failures = state.failures.saturating_add(1);
                state.refused = Some((Instant::now() + wait, Arc::clone(&why)));
                let mut known = self.known.lock();
                if known.trouble.is_none() {
                    tracing::warn!(server = %self.shown, %why, "the server cannot be used, trying again");
                }
                known.trouble = Some(Arc::clone(&why));
                Err(Failed::Unreached(why))
            }
        }
    }

    async fn drop_open(&self, number: u64) {
        let mut state = self.state.lock().await;
        if state.number == number {
            state.open = None;
        }
    }

    /// Lets the connection go: the next is to the server that is the right one then.
    pub(super) async fn let_go(&self) {
        self.state.lock().await.open = None;
    }

    /// Runs a pipeline; gives each command's result, or one failure for all.
    pub(super) async fn run(&self, open: &Open, pipeline: &mut Pipeline) -> Result<Vec<RedisResult<Value>>, Failed> {
        let mut connection = open.connection.clone();
        let answers: RedisResult<Vec<RedisResult<Value>>> = pipeline.ignore_errors().query_async(&mut connection).await;
        match answers {
            Ok(answers) => {
                let moved = answers
                    .iter()
                    .filter_map(|answer| answer.as_ref().err()?.code())
                    .any(|code| self.is_of_the_place(code));
                if moved {
                    self.drop_open(open.number).await;
                }
                Ok(answers)
            }
            Err(error) => {
                // What was sent may still be executed; what comes next goes over a connection of its own.
                self.drop_open(open.number).await;
                let why: Arc<str> = format!("{}: {}", self.shown, explain(&error)).into();
                self.known.lock().trouble.get_or_insert_with(|| Arc::clone(&why));
                Err(Failed::Unsure(why))
            }
        }
    }

    /// What the one command's answer is.
    pub(super) fn answer(&self, result: RedisResult<Value>) -> Result<Value, Failed> {
        result.map_err(|error| Failed::Refused(format!("{}: {}", self.shown, explain(&error)).into()))
    }

    /// Runs one script. `durable` = what it wrote is on the server's disk then.
    pub(super) async fn script(&self, call: &Call, durable: bool) -> Result<Value, Failed> {
        let open = self.open().await?;
        let mut loaded = false;
        loop {
            let mut pipeline = Pipeline::new();
            if loaded {
                pipeline.cmd("SCRIPT").arg("LOAD").arg(call.text);
            }
            pipeline.add_command(call.command());
            if durable && open.facts.waits {
                pipeline.add_command(self.wait_for_disk());
            }
            let mut answers = self.run(&open, &mut pipeline).await?.into_iter().skip(usize::from(loaded));
            let missing = || Failed::Unsure(format!("{}: an answer is missing", self.shown).into());
            let first = answers.next().ok_or_else(missing)?;
            if !loaded && first.as_ref().is_err_and(|error| error.code() == Some("NOSCRIPT")) {
                loaded = true;
                continue;
            }
            let value = self.answer(first)?;
            if durable && open.facts.waits {
                self.is_on_disk(answers.next().ok_or_else(missing)?)?;
            }
            return Ok(value);
        }
    }

    /// Waits until what this connection wrote is on the server's disk.
    pub(super) fn wait_for_disk(&self) -> Cmd {
        let wait = self.timeout.saturating_sub(Duration::from_millis(200)).max(Duration::from_millis(100));
        let mut cmd = redis::cmd("WAITAOF");
        cmd.arg(1).arg(0).arg(u64::try_from(wait.as_millis()).unwrap_or(1_000));
        cmd
    }

    /// Whether [`Link::wait_for_disk`] says so.
    pub(super) fn is_on_disk(&self, answer: RedisResult<Value>) -> Result<(), Failed> {
        let unsure = |why: String| Failed::Unsure(format!("{}: {why}", self.shown).into());
        let (local, _): (u64, u64) = redis::from_redis_value(answer.map_err(|error| unsure(explain(&error)))?)
            .map_err(|error| unsure(error.to_string()))?;
        if local >= 1 { Ok(()) } else { Err(unsure(format!("the disk did not follow within {:?}", self.timeout))) }
    }
}

/// A script with its keys and arguments.
pub(super) struct Call {
    text: &'static str,
    hash: String,
    keys: Vec<String>,
    args: Vec<Vec<u8>>,
}

impl Call {
    pub(super) fn new(script: &'static Text) -> Self {
        let (keys, args) = (Vec::new(), Vec::new());
        Self { text: script.text, hash: script.hash().to_owned(), keys, args }
    }

    pub(super) fn key(mut self, key: impl Into<String>) -> Self {
        self.keys.push(key.into());
        self
    }

    pub(super) fn keys(mut self, keys: impl IntoIterator<Item = String>) -> Self {
        self.keys.extend(keys);
        self
    }

    pub(super) fn arg(mut self, arg: impl Into<Vec<u8>>) -> Self {
        self.args.push(arg.into());
        self
    }

    pub(super) fn number(self, number: impl fmt::Display) -> Self {
        self.arg(number.to_string())
    }

    pub(super) fn args<T: Into<Vec<u8>>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    pub(super) fn command(&self) -> Cmd {
        let mut cmd = redis::cmd("EVALSHA");
        cmd.arg(&self.hash).arg(self.keys.len()).arg(&self.keys).arg(&self.args);
        cmd
    }
}

/// A script's text.
pub(super) struct Text {
    pub(super) text: &'static str,
    hash: std::sync::OnceLock<String>,
}

impl Text {
    pub(super) const fn new(text: &'static str) -> Self {
        Self { text, hash: std::sync::OnceLock::new() }
    }

    pub(super) fn hash(&self) -> &str {
        self.hash.get_or_init(|| Script::new(self.text).get_hash().to_owned())
    }
}
