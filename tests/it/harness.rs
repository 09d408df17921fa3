//! The real program in a folder of its own, a client for it, and receivers that record what reaches them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longest wait for anything; a wait that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// The program's path.
pub fn program() -> &'static str {
    env!("CARGO_BIN_EXE_walflow")
}

/// A folder with pipelines and data, and the way to start walflow on it.
pub struct Place {
    folder: TempDir,
    args: Vec<String>,
    environment: BTreeMap<String, String>,
}

impl Place {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("pipelines")).unwrap();
        Self { folder, args: Vec::new(), environment: BTreeMap::new() }
    }

    /// Writes a file under `pipelines/`.
    pub fn pipeline(self, name: &str, text: &str) -> Self {
        self.put(name, text);
        self
    }

    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Without this variable from now on.
    pub fn without(mut self, name: &str) -> Self {
        self.environment.remove(name);
        self
    }

    /// Writes a file under `pipelines/`, whole or not at all, as an editor does.
    pub fn put(&self, name: &str, text: &str) {
        let path = self.path("pipelines").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let next = path.with_extension("next");
        fs::write(&next, text).unwrap();
        fs::rename(next, path).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file here, opened for more at its end.
    pub fn file(&self, name: &str) -> File {
        File::options().create(true).append(true).open(self.path(name)).unwrap()
    }

    /// Starts walflow and does not wait for it.
    pub fn spawn(&self) -> Running {
        let address = self.path("address");
        let _ = fs::remove_file(&address);
        let (log, out) = (self.file("log"), self.file("stdout"));
        let mut command = self.command(&["run"]);
        if !self.args.iter().any(|arg| !arg.starts_with('-') && Path::new(arg).exists()) {
            command.arg("pipelines");
        }
        command.args(["--listen", "127.0.0.1:0", "--address-file", "address"]).args(&self.args);
        let child = command.stdin(Stdio::null()).stdout(out).stderr(log).spawn().unwrap();
        Running { child, url: String::new(), client: client(), address, log: self.path("log") }
    }

    /// Starts walflow and waits until it is ready.
    pub async fn start(&self) -> Running {
        let mut running = self.spawn();
        running.until_ready().await;
        running
    }

    /// walflow with these arguments, in this folder, with nothing of walflow's in its environment.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("WALFLOW_")) {
            command.env_remove(name);
        }
        command.env_remove("PORT").env_remove("VALID_API_KEYS");
        command.current_dir(self.folder.path()).args(args).envs(&self.environment);
        command
    }

    /// The lines of a file in this folder; none when there is no such file. A last line that is not ended is left out.
    pub fn lines(&self, name: &str) -> Vec<String> {
        let mut bytes = Vec::new();
        if let Ok(mut file) = File::open(self.path(name)) {
            file.read_to_end(&mut bytes).unwrap();
        }
        let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        String::from_utf8_lossy(&bytes[..end]).lines().map(ToOwned::to_owned).collect()
    }

    /// The lines of a file as JSON.
    pub fn values(&self, name: &str) -> Vec<Value> {
        self.lines(name).iter().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect()
    }
}

/// A client that trusts what walflow trusts and goes through no proxy.
pub fn client() -> reqwest::Client {
    // Whichever test comes first installs it.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build().unwrap()
}

/// A running walflow; killed when it is dropped.
pub struct Running {
    child: Child,
    pub url: String,
    pub client: reqwest::Client,
    address: PathBuf,
    log: PathBuf,
}

impl Running {
    /// A process that was started by hand; `log` is where it writes.
    pub fn of(child: Child, place: &Place, log: &str) -> Self {
        Self { child, url: String::new(), client: client(), address: place.path("address"), log: place.path(log) }
    }

    /// Waits until it is ready to take writes.
    pub async fn until_ready(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_ready().await {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("walflow ended with {status}:\n{}", self.log());
            }
            assert!(Instant::now() < deadline, "not ready:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Whether it takes writes now.
    pub async fn is_ready(&mut self) -> bool {
        let Ok(address) = fs::read_to_string(&self.address) else { return false };
        if !address.ends_with('\n') {
            return false;
        }
        self.url = format!("http://{}", address.trim());
        let answer = self.client.get(format!("{}/readyz", self.url)).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it without a chance to do anything.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for its end, at most `patience`.
    pub async fn ended(&mut self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "still there after {patience:?}:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Asks it to stop and waits.
    pub async fn stop(&mut self) -> ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        self.ended(PATIENCE).await
    }

    /// One write; gives the status and the answer.
    pub async fn write(&self, body: &Value) -> Result<(StatusCode, Value), reqwest::Error> {
        self.post("/api/v1/wal/write", body).await
    }

    /// One write that must be accepted; gives its id.
    pub async fn accepted(&self, namespace: &str, key: Option<&str>, payload: Value) -> String {
        let mut body = json!({"namespace": namespace, "payload": payload});
        if let Some(key) = key {
            body["key"] = json!(key);
        }
        let (status, answer) = self.write(&body).await.unwrap();
        assert_eq!(status, 202, "{answer}");
        assert_eq!(answer["durable"], "succeeded", "{answer}");
        answer["messageId"].as_str().unwrap().to_owned()
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<(StatusCode, Value), reqwest::Error> {
        let request = self.client.post(format!("{}{path}", self.url)).header("content-type", "application/json");
        answer(request.body(body.to_string()).send().await?).await
    }

    pub async fn get(&self, path: &str) -> (StatusCode, Value) {
        answer(self.client.get(format!("{}{path}", self.url)).send().await.unwrap()).await.unwrap()
    }

    /// A namespace's status.
    pub async fn status(&self, namespace: &str) -> Value {
        let (status, body) = self.get(&format!("/api/v1/wal/namespace/{namespace}/status")).await;
        assert_eq!(status, 200, "{body}");
        body
    }

    /// Its resident memory in bytes.
    pub fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// walflow's own client, pointed at this one; gives its exit code, standard output and standard error.
    pub fn cli(&self, place: &Place, args: &[&str]) -> (i32, String, String) {
        let output = place.command(args).env("WALFLOW_URL", &self.url).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }
}

async fn answer(response: reqwest::Response) -> Result<(StatusCode, Value), reqwest::Error> {
    let status = response.status();
    let bytes = response.bytes().await?;
    let text = || Value::String(String::from_utf8_lossy(&bytes).into_owned());
    Ok((status, serde_json::from_slice(&bytes).unwrap_or_else(|_| text())))
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- walflow said:\n{}", self.log());
        }
    }
}

/// Waits until `found` gives something.
pub async fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = found() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until a namespace's status satisfies `fine`.
pub async fn until_status(running: &Running, namespace: &str, what: &str, fine: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = running.status(namespace).await;
        if fine(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}: {status:#}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// One request as it reached a receiver.
#[derive(Clone, Debug)]
pub struct Received {
    pub id: String,
    pub body: Bytes,
}

type Judge = Box<dyn FnMut(&Received) -> u16 + Send>;

/// An HTTP target that records what it accepted, in order.
pub struct Receiver {
    pub url: String,
    accepted: Arc<Mutex<Vec<Received>>>,
    judge: Arc<Mutex<Judge>>,
    task: tokio::task::JoinHandle<()>,
}

impl Receiver {
    /// One that accepts everything.
    pub async fn start() -> Self {
        Self::judging(|_| 200).await
    }

    /// One that answers with what `judge` says; what gets a 2xx is recorded.
    pub async fn judging(judge: impl FnMut(&Received) -> u16 + Send + 'static) -> Self {
        let listener = tokio::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let url = format!("http://{}/in", listener.local_addr().unwrap());
        let accepted = Arc::new(Mutex::new(Vec::new()));
        let judge: Arc<Mutex<Judge>> = Arc::new(Mutex::new(Box::new(judge)));
        let task = tokio::spawn(serve(listener, Arc::clone(&accepted), Arc::clone(&judge)));
        Self { url, accepted, judge, task }
    }

    /// From now on answers otherwise.
    pub fn judge(&self, judge: impl FnMut(&Received) -> u16 + Send + 'static) {
        *self.judge.lock().unwrap() = Box::new(judge);
    }

    pub fn accepted(&self) -> Vec<Received> {
        self.accepted.lock().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.accepted.lock().unwrap().len()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: tokio::net::TcpListener, accepted: Arc<Mutex<Vec<Received>>>, judge: Arc<Mutex<Judge>>) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (accepted, judge) = (Arc::clone(&accepted), Arc::clone(&judge));
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let (accepted, judge) = (Arc::clone(&accepted), Arc::clone(&judge));
            async move {
                let id =
                    request.headers().get("webhook-id").and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
                let Ok(body) = request.into_body().collect().await else {
                    return Ok::<_, std::convert::Infallible>(Response::new(Full::default()));
                };
                let received = Received { id, body: body.to_bytes() };
                let status = (judge.lock().unwrap())(&received);
                if (200..300).contains(&status) {
                    accepted.lock().unwrap().push(received);
                }
                let mut response = Response::new(Full::<Bytes>::default());
                *response.status_mut() = StatusCode::from_u16(status).unwrap();
                Ok(response)
            }
        });
        connections.spawn(async move {
            let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// An outside list that survives whatever it watches: lines that are on disk when `add` returns.
pub struct Ledger(File);

impl Ledger {
    pub fn new(path: &Path) -> Self {
        Self(File::options().create(true).append(true).open(path).unwrap())
    }

    pub fn add(&mut self, lines: &str) {
        self.0.write_all(lines.as_bytes()).unwrap();
        self.0.sync_data().unwrap();
    }
}
