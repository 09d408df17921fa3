//! From pipeline files to a running instance: files → plans → log → branches → HTTP, and back down in order.
//!
//! Takes settings, returns when a signal has asked for a stop and everything is closed. Owns the start order, the drain
//! order and the reload. A namespace that fails is that namespace's trouble: the others run.

mod files;
mod instance;
mod logs;
mod moving;
mod pipeline;
mod pipelines;
pub mod probe;
mod signals;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use secrecy::SecretString;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::clock::Clock;
use crate::console::{self, Instance};
use crate::ingest::{self, Limits};
use crate::spec::diagnostic::Diagnostic;
use crate::spec::settings::InForce;

use files::Files;
use instance::Front;
use logs::Logs;
use pipelines::Pipelines;
use signals::{Signals, Wish};

/// Settings of one instance.
#[derive(Debug)]
pub struct Settings {
    /// Pipeline files, and folders of them.
    pub paths: Vec<PathBuf>,
    /// walflow.yaml, where it was named; else it is looked for at each reading.
    pub config: Option<PathBuf>,
    /// The shards whose namespaces run here; none = all.
    pub shards: Vec<String>,
    /// Where to listen.
    pub listen: SocketAddr,
    /// The folder that holds the log.
    pub data: PathBuf,
    /// Refuse to start when any file has a problem.
    pub strict: bool,
    /// How long a stop lets what is under way end.
    pub shutdown_timeout: Duration,
    /// Every caller needs one of them; empty = only loopback is listened on and nobody needs one.
    pub api_keys: Vec<SecretString>,
    /// Where to write the address that is listened on.
    pub address_file: Option<PathBuf>,
    /// What these settings came from, to be compared with walflow.yaml when that is read again.
    pub in_force: InForce,
}

/// Why an instance could not start or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The files have problems, all of which are told.
    #[error("{}", told(.problems))]
    Config {
        /// Every problem.
        problems: Vec<Diagnostic>,
    },
    /// Neither a file nor an earlier run says what there is to do.
    #[error(
        "there is nothing to run: no pipeline file was found, and {} knows no namespace of an earlier run; name the files or their folder: walflow run PATH…\n{}",
        .data.display(),
        texts(.problems)
    )]
    Nothing {
        /// The data folder.
        data: PathBuf,
        /// Where was looked, and what was there instead.
        problems: Vec<Diagnostic>,
    },
    /// Another process works on the data folder.
    #[error("{reason}")]
    Held {
        /// Who, as far as it is known.
        reason: String,
    },
    /// Without keys anybody in the network could write.
    #[error(
        "without API keys walflow listens on loopback only, and {listen} is not loopback: set VALID_API_KEYS=key1,key2 (in a container: docker run -e VALID_API_KEYS=key1,key2 …), or listen on 127.0.0.1:{}",
        .listen.port()
    )]
    OpenToAll {
        /// The address that was asked for.
        listen: SocketAddr,
    },
    /// The log could not be opened.
    #[error("the log in {} cannot be opened: {reason}", .data.display())]
    Log {
        /// The data folder.
        data: PathBuf,
        /// Why.
        reason: String,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {listen}: {cause}; another program may hold the port, --listen names another")]
    Listen {
        /// The address that was asked for.
        listen: SocketAddr,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A file beside the log could not be written, or signals could not be had.
    #[error("{act}: {cause}")]
    System {
        /// What was tried.
        act: String,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The log failed while running; nothing acknowledged is lost, the next start repairs it.
    #[error("the log failed and was closed: {reason}; start again to repair it")]
    Fenced {
        /// What failed.
        reason: String,
    },
}

fn told(problems: &[Diagnostic]) -> String {
    format!("the pipeline files have problems\n{}", texts(problems))
}

fn texts(problems: &[Diagnostic]) -> String {
    problems.iter().map(|problem| problem.render(false)).collect::<Vec<_>>().join("\n")
}

/// True when a run on this folder would be its first.
fn is_new(data: &Path) -> bool {
    std::fs::read_dir(data)
        .map_or_else(|error| error.kind() == ErrorKind::NotFound, |mut inside| inside.next().is_none())
}

/// Runs until a signal asks for a stop.
///
/// # Errors
/// When it cannot start, or the log fails.
pub async fn run(settings: Settings) -> Result<(), ServiceError> {
    if settings.api_keys.is_empty() && !settings.listen.ip().is_loopback() {
        return Err(ServiceError::OpenToAll { listen: settings.listen });
    }
    let mut signals =
        Signals::new().map_err(|cause| ServiceError::System { act: "listen for signals".into(), cause })?;
    let files = Files::new(&settings);
    let reading = files.read();
    reading.report();
    if settings.strict && reading.has_errors() {
        return Err(ServiceError::Config { problems: reading.problems });
    }
    // Most likely a wrong path. What an earlier run left behind is drained without its file.
    let no_files = reading.no_files;
    let nothing = |problems| Err(ServiceError::Nothing { data: settings.data.clone(), problems });
    if no_files && is_new(&settings.data) {
        return nothing(reading.problems);
    }
    let clock = Clock::system();
    let logs = Logs::open(&settings.data, clock.clone(), settings.strict).await?;
    if no_files && logs.names().is_empty() {
        logs.close().await;
        return nothing(reading.problems);
    }
    let listener = listen(settings.listen).await?;
    let address = listener.local_addr().unwrap_or(settings.listen);

    let (running, intake) = (CancellationToken::new(), CancellationToken::new());
    let pipelines = Arc::new(Pipelines::new(files, logs, clock, running.clone()));
    pipelines.apply(reading).await;
    let tasks = TaskTracker::new();
    tasks.spawn(Arc::clone(&pipelines).sweep());
    let front = Arc::new(Front::new(Arc::clone(&pipelines), &settings.api_keys));
    let instance: Arc<dyn Instance> = Arc::clone(&front) as Arc<dyn Instance>;
    let routes = ingest::routes(front, move |asked| console::answer(Arc::clone(&instance), asked).boxed());
    let stop_after = Limits { stop: settings.shutdown_timeout / 2, ..Limits::default() };
    let server = tokio::spawn(ingest::serve(listener, routes, stop_after, intake.clone()));
    if let Some(file) = &settings.address_file {
        write_address(file, address)?;
    }
    pipelines.set_ready(true);
    info!(%address, namespaces = pipelines.all().len(), data = %settings.data.display(), "ready");

    let fenced = loop {
        tokio::select! {
            wish = signals.next() => match wish {
                Wish::Reload => pipelines.reload().await,
                Wish::Stop => break None,
            },
            reason = pipelines.logs.fenced() => break Some(reason),
        }
    };
    info!(within = ?settings.shutdown_timeout, "stopping: no more writes, what is under way ends");
    let stopped = stop(&pipelines, &settings, &intake, server);
    tokio::select! {
        () = stopped => {}
        code = signals.second() => {
            warn!("a second signal: leaving at once; the log keeps what was not delivered");
            std::process::exit(code);
        }
    }
    tasks.close();
    let _ = tokio::time::timeout(Duration::from_secs(1), tasks.wait()).await;
    info!("stopped");
    // Everything is closed. To give back a large log in memory record by record takes seconds; the process's end does not.
    std::mem::forget(pipelines);
    fenced.map_or(Ok(()), |reason| Err(ServiceError::Fenced { reason }))
}

/// Down in order: not ready, no writes, branches, log.
async fn stop(pipelines: &Pipelines, settings: &Settings, intake: &CancellationToken, server: JoinHandle<()>) {
    let deadline = tokio::time::Instant::now() + settings.shutdown_timeout;
    pipelines.set_ready(false);
    intake.cancel();
    let _ = tokio::time::timeout_at(deadline, server).await;
    let left = deadline.saturating_duration_since(tokio::time::Instant::now());
    pipelines.drain(left.max(Duration::from_millis(100))).await;
    pipelines.logs.close().await;
}

async fn listen(address: SocketAddr) -> Result<TcpListener, ServiceError> {
    TcpListener::bind(address).await.map_err(|cause| ServiceError::Listen { listen: address, cause })
}

/// A file that is there is whole: whoever waits for it never reads half an address.
fn write_address(file: &Path, address: SocketAddr) -> Result<(), ServiceError> {
    let next = file.with_extension("next");
    let written = std::fs::write(&next, format!("{address}\n")).and_then(|()| std::fs::rename(&next, file));
    written.map_err(|cause| ServiceError::System { act: format!("write the address to {}", file.display()), cause })
}
