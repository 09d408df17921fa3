//! Servers of a test's own, which it may kill and start again: what `tests/services/up` starts.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use tempfile::TempDir;

/// Ports below those from which clients draw theirs, and apart from those of `tests/run`.
const PORTS: std::ops::Range<u16> = 30_000..32_760;

/// The first of `count` ports in a row that are free, and that no other test here got.
pub fn free_ports(count: u16) -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let first = fastrand::u16(PORTS.start..PORTS.end - count);
        let mut given = GIVEN.lock().unwrap();
        let own = first..first + count;
        if own.clone().all(|port| !given.contains(&port) && TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            given.extend(own);
            return first;
        }
    }
}

/// A server with its data in a folder of its own; both are gone when it is dropped.
pub struct Server {
    name: &'static str,
    arguments: Vec<String>,
    folder: TempDir,
    port: u16,
}

impl Server {
    /// Starts `kafka`, `kafka3`, `redis`, `valkey`, `cluster`, `sentinel`, `postgres` or `sqs`, and returns when it answers.
    pub async fn start(name: &'static str) -> Self {
        Self::start_with(name, &[]).await
    }

    /// Starts it with more arguments; what they are for each server `tests/services/up` says.
    pub async fn start_with(name: &'static str, arguments: &[&str]) -> Self {
        Self::start_at(
            name,
            free_ports(if matches!(name, "kafka3" | "cluster" | "sentinel") { 6 } else { 2 }),
            arguments,
        )
        .await
    }

    /// Starts it on this port and those behind it, which the caller has from [`free_ports`].
    pub async fn start_at(name: &'static str, port: u16, arguments: &[&str]) -> Self {
        // PostgreSQL runs as a user of its own, who could not walk to a folder of the checkout.
        let scratch = std::env::var("WALFLOW_TEST_SCRATCH").unwrap_or_else(|_| "/tmp".into());
        let folder = tempfile::Builder::new().prefix("own.").tempdir_in(scratch).unwrap();
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let server = Self { name, arguments, folder, port };
        server.restart().await;
        server
    }

    /// `host:port`, of the first node if there are several.
    pub fn address(&self) -> String {
        self.node(1)
    }

    /// `host:port` of one of several nodes, which count from 1.
    pub fn node(&self, node: u8) -> String {
        format!("127.0.0.1:{}", self.port + u16::from(node) - 1)
    }

    /// Sends one of three nodes (1 to 3) a signal.
    pub fn signal_node(&self, node: u8, signal: rustix::process::Signal) {
        let pid = std::fs::read_to_string(self.folder.path().join(node.to_string()).join("pid")).unwrap();
        let pid = rustix::process::Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Where its data is.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Asks it to end, and waits.
    pub async fn stop(&self) {
        self.down(&[], self.folder.path()).await;
    }

    /// Ends it at once, as a crash would.
    pub async fn kill(&self) {
        self.down(&["-9"], self.folder.path()).await;
    }

    /// Ends one of several nodes at once.
    pub async fn kill_node(&self, node: u8) {
        self.down(&["-9"], &self.folder.path().join(node.to_string())).await;
    }

    /// Starts it again on its data and port, or those of several nodes that are down.
    pub async fn restart(&self) {
        let mut command = Command::new(script("up"));
        command.arg(self.name).arg(self.folder.path()).arg(self.port.to_string()).args(&self.arguments);
        run(command).await;
    }

    async fn down(&self, how: &[&str], folder: &Path) {
        let mut command = Command::new(script("down"));
        command.args(how).arg(folder);
        run(command).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new(script("down")).arg("-9").arg(self.folder.path()).status();
    }
}

/// What `tests/services/install` has put there.
pub fn installed(name: &str) -> PathBuf {
    script("../../target/services").join(name)
}

/// `up`, or what lies beside it.
fn script(name: &str) -> PathBuf {
    let up = std::env::var("WALFLOW_TEST_SERVICES").expect("WALFLOW_TEST_SERVICES: run tests/run");
    Path::new(&up).with_file_name(name)
}

async fn run(mut command: Command) {
    let output = tokio::task::spawn_blocking(move || (command.output().unwrap(), command)).await.unwrap();
    let said = String::from_utf8_lossy(&output.0.stderr).into_owned();
    assert!(output.0.status.success(), "{:?}: {said}", output.1);
}

mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    async fn redis(server: &Server, command: &str) -> String {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        stream.write_all(format!("{command}\r\nQUIT\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    #[ignore = "needs servers: run tests/run"]
    async fn a_redis_that_was_killed_is_gone_and_comes_back_with_its_data() {
        for name in ["redis", "valkey"] {
            let server = Server::start(name).await;
            assert!(redis(&server, "SET color blue").await.starts_with("+OK"));
            server.kill().await;
            TcpStream::connect(server.address()).await.expect_err("the server was killed");
            server.restart().await;
            assert!(redis(&server, "GET color").await.contains("blue"));
        }
    }

    #[tokio::test]
    #[ignore = "needs servers: run tests/run"]
    async fn every_server_comes_back_after_a_stop_and_after_a_kill() {
        for name in ["postgres", "sqs", "kafka"] {
            let server = Server::start(name).await;
            server.stop().await;
            TcpStream::connect(server.address()).await.expect_err("the server was stopped");
            server.restart().await;
            server.kill().await;
            server.restart().await;
            TcpStream::connect(server.address()).await.unwrap();
            let folder = server.folder.path().to_owned();
            let address = server.address();
            drop(server);
            assert!(!folder.exists());
            TcpStream::connect(address).await.expect_err("the server went with its owner");
        }
    }

    #[tokio::test]
    #[ignore = "needs servers: run tests/run"]
    async fn one_of_three_brokers_is_killed_and_comes_back_alone() {
        let server = Server::start("kafka3").await;
        let pid = |node: &str| std::fs::read_to_string(server.folder.path().join(node).join("pid")).ok();
        let (first, second) = (pid("1"), pid("2"));
        server.kill_node(2).await;
        assert_eq!((pid("1"), pid("2")), (first.clone(), None));
        server.restart().await;
        assert_eq!(pid("1"), first);
        assert_ne!(pid("2"), second);
    }

    #[test]
    fn ports_are_given_once() {
        let mut seen = BTreeSet::new();
        assert!((0..50).map(|_| free_ports(2)).all(|first| seen.insert(first) && seen.insert(first + 1)));
    }
}
