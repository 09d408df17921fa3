//! One database for all namespaces that name it: connections that are lent, and the news of what others have changed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Object, Pool};
use futures::StreamExt as _;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_postgres::AsyncMessage;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::PostgresShelfSpec;
use super::schema::{Unfit, migrate};
use crate::connection::kafka::Shared;
use crate::connection::postgres::{Address, explain, explain_pool};
use crate::source::LogError;
use crate::units::Span;

/// Waits between two tries to hear news again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Longest wait for a connection that hears news.
const HANDSHAKE: Duration = Duration::from_secs(15);

static DATABASES: Shared<String, Database> = Shared::new();

/// What somebody changed in a namespace.
#[derive(Debug, Default)]
pub(super) struct News {
    /// Something was parked or moved.
    pub(super) parked: Notify,
    /// Something was replayed.
    pub(super) replayed: Notify,
    /// Counts are to be read anew.
    pub(super) counts: Notify,
}

impl News {
    fn all(&self) {
        self.parked.notify_waiters();
        self.parked.notify_one();
        self.replayed.notify_waiters();
        self.counts.notify_one();
    }
}

/// One database and schema.
pub(super) struct Database {
    address: Address,
    pool: Pool,
    /// The schema's name, quoted.
    pub(super) schema: String,
    channel: String,
    timeout: Duration,
    migrated: tokio::sync::OnceCell<()>,
    news: Arc<Mutex<HashMap<String, Arc<News>>>>,
    listening: tokio::sync::OnceCell<DropGuard>,
}

impl Database {
    /// The database of these settings, shared by all who hold it.
    pub(super) fn of(spec: &PostgresShelfSpec) -> Result<Arc<Self>, LogError> {
        let key = format!("{:?}", (&spec.url, &spec.schema, &spec.ca_file, spec.timeout(), spec.connections()));
        DATABASES.get(key, || {
            let failed = |why: String| LogError::Storage { act: "use the Postgres shelf".into(), cause: why.into() };
            let url = spec.url.as_deref().unwrap_or_default();
            let address = Address::new(url, spec.ca_file.as_deref(), spec.timeout()).map_err(failed)?;
            let pool = address.pool(spec.connections(), spec.timeout()).map_err(failed)?;
            Ok(Self {
                pool,
                address,
                schema: format!("\"{}\"", spec.schema().replace('"', "\"\"")),
                channel: format!("walflow_{}", spec.schema()),
                timeout: spec.timeout(),
                migrated: tokio::sync::OnceCell::new(),
                news: Arc::default(),
                listening: tokio::sync::OnceCell::new(),
            })
        })
    }

    /// Where it is, for messages.
    pub(super) fn shown(&self) -> String {
        format!("{}, schema {}", self.address.shown(), self.schema)
    }

    /// The news of a namespace.
    pub(super) fn news(&self, namespace: &str) -> Arc<News> {
        Arc::clone(self.news.lock().entry(namespace.to_owned()).or_default())
    }

    /// Tells everybody who shares the namespace, with the end of the transaction that this stands in.
    pub(super) fn tell(&self) -> String {
        format!("SELECT pg_notify('{}', $1)", self.channel.replace('\'', "''"))
    }

    fn failed(&self, act: &str, cause: String) -> LogError {
        LogError::Storage { act: format!("{act} ({})", self.shown()).into(), cause: cause.into() }
    }

    /// What went wrong, for whoever asked.
    pub(super) fn error(&self, act: &'static str) -> impl Fn(tokio_postgres::Error) -> LogError + '_ {
        move |error| self.failed(act, explain(&error))
    }

    /// What comes of a verb in time. The server's own limit is none when it is frozen, or the way to it swallows everything.
    pub(super) async fn in_time<T>(&self, verb: impl Future<Output = Result<T, LogError>>) -> Result<T, LogError> {
        let silent = |_| self.failed("use the Postgres shelf", format!("no answer within {}", Span(self.timeout)));
        tokio::time::timeout(self.timeout, verb).await.map_err(silent)?
    }

    /// A connection; the tables are there.
    pub(super) async fn lend(&self, act: &'static str) -> Result<Object, LogError> {
        let mut lent = self.pool.get().await.map_err(|error| self.failed(act, explain_pool(&error)))?;
        let client: &mut tokio_postgres::Client = &mut lent;
        self.migrated
            .get_or_try_init(|| async {
                migrate(client, &self.schema, self.address.user()).await.map_err(|unfit| {
                    let why = match unfit {
                        Unfit::Failed(error) => explain(&error),
                        Unfit::Newer(found) => {
                            format!("its tables are of a later walflow (version {found}): start that one")
                        }
                        Unfit::NoRight(sql) => {
                            format!("this user may not make its tables; somebody with the right runs: {sql}")
                        }
                    };
                    self.failed("make the tables of the shelf", why)
                })
            })
            .await?;
        self.listening.get_or_init(|| async { self.listen() }).await;
        Ok(lent)
    }

    /// Hears what other processes have changed, on a connection of its own, again and again.
    fn listen(&self) -> DropGuard {
        let (address, channel, news) = (self.address.clone(), self.channel.clone(), Arc::clone(&self.news));
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(stopped.run_until_cancelled_owned(async move {
            let mut wait = BACKOFF.0;
            loop {
                if let Err(error) = hear(&address, &channel, &news, &mut wait).await {
                    tracing::debug!(shelf = %address.shown(), error = explain(&error), "news are not heard, trying again");
                }
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(BACKOFF.1);
            }
        }));
        stop.drop_guard()
    }
}

async fn hear(
    address: &Address,
    channel: &str,
    news: &Mutex<HashMap<String, Arc<News>>>,
    wait: &mut Duration,
) -> Result<(), tokio_postgres::Error> {
    // A server may take the connection and say nothing.
    let Ok(connected) = tokio::time::timeout(HANDSHAKE, address.connect()).await else { return Ok(()) };
    let (client, mut connection) = connected?;
    let listen = format!("LISTEN \"{}\"", channel.replace('"', "\"\""));
    let mut messages = futures::stream::poll_fn(move |cx| connection.poll_message(cx));
    let listening = client.batch_execute(&listen);
    tokio::pin!(listening);
    let mut heard = false;
    loop {
        tokio::select! {
            done = &mut listening, if !heard => {
                done?;
                heard = true;
                *wait = BACKOFF.0;
                // What was told before this is not told again.
                news.lock().values().for_each(|news| news.all());
            }
            message = messages.next() => match message {
                None => return Ok(()),
                Some(Err(error)) => return Err(error),
                Some(Ok(AsyncMessage::Notification(told))) => {
                    if let Some(news) = news.lock().get(told.payload()) {
                        news.all();
                    }
                }
                Some(Ok(_)) => {}
            },
        }
    }
}
