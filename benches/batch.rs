//! An NDJSON upload over HTTP beside appends of the same records by the log itself: both rates and their ratio.
//!
//! `cargo bench --bench batch -- [LINES] [ROUNDS]`, lines in millions. Each half starts on an empty folder below the
//! temporary one (`TMPDIR`, which must lie on the disk that is meant), and nothing is delivered meanwhile.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    clippy::indexing_slicing,
    reason = "a measurement that cannot go on says why and ends; its numbers are small"
)]

use std::fs;
use std::io::{Read, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesOrdered;
use walflow::clock::{Clock, Timestamp};
use walflow::record::{Record, RecordId};
use walflow::source::embedded::{Embedded, NamespaceSettings, Options};
use walflow::source::{BranchName, Log as _, Start, Write};

#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What an upload makes durable together, and how many of these are under way.
const GROUP: usize = 512;
const UNDER_WAY: usize = 32;
/// Lines that are sent with one call.
const BLOCK: usize = 1_000;

/// 512 bytes, as in the other benchmarks.
fn payload() -> String {
    format!(r#"{{"operation":"SET","value":"{}"}}"#, "x".repeat(512 - 31))
}

fn main() {
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with("--"));
    let Some(millions) = words.next().and_then(|word| word.parse::<f64>().ok()) else {
        return; // The test run, or a look at what is there: nothing to do.
    };
    let rounds: usize = words.next().and_then(|word| word.parse().ok()).unwrap_or(3);
    let lines = (millions * 1_000.0) as usize * BLOCK;
    for _ in 0..rounds {
        let own = appended(lines);
        let (http, before, most) = uploaded(lines);
        println!(
            "appended {own:.0}/s  uploaded {http:.0}/s  ratio {:.2}  resident {} MiB before, {} MiB at most",
            http / own,
            before >> 20,
            most >> 20
        );
    }
}

/// Records a second by calls of the log in this process.
fn appended(lines: usize) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let log = Embedded::open(Options::new(folder.path().join("data"), Clock::system())).unwrap();
        let namespace = log.namespace(&"bench".parse().unwrap(), NamespaceSettings::default()).unwrap();
        drop(namespace.open_branch(&BranchName::new("stdout", None), Start::Earliest).await.unwrap());
        let (payload, bare) = (Bytes::from(payload()), RecordId::from_bytes([0; 16]));
        let write = || {
            let record = Record::new(bare, Timestamp::MIN, payload.clone());
            Write { record, due_at: None, idempotency: None }
        };
        let (started, mut under_way) = (Instant::now(), FuturesOrdered::<walflow::source::Entered>::new());
        for _ in 0..lines / GROUP {
            if under_way.len() == UNDER_WAY {
                under_way.next().await.unwrap().unwrap();
            }
            under_way.push_back(namespace.enter((0..GROUP).map(|_| write()).collect()).await.unwrap());
        }
        while let Some(admitted) = under_way.next().await {
            admitted.unwrap();
        }
        let rate = rate(lines, started);
        log.close().await;
        rate
    })
}

/// Records a second by one upload to the program, its memory before, and its memory at most.
fn uploaded(lines: usize) -> (f64, u64, u64) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("bench.yaml"), "namespace: bench\nsink: { stdout: {} }\n").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_walflow"));
    command.current_dir(folder.path()).args(["run", "bench.yaml", "--listen", "127.0.0.1:0", "--address-file", "a"]);
    let program = command.stdout(Stdio::null()).stderr(fs::File::create(folder.path().join("log")).unwrap());
    let mut program = Program(program.spawn().unwrap());
    let address = program.address(&folder.path().join("a"));
    let paused = request(&address, "POST /api/v1/wal/namespace/bench/branches/stdout/pause");
    assert!(paused.starts_with("HTTP/1.1 200"), "{paused}");
    let before = program.resident();

    let line = format!("{{\"namespace\":\"bench\",\"payload\":{}}}\n", payload());
    let (block, count) = (line.repeat(BLOCK), lines / BLOCK);
    let started = Instant::now();
    let mut stream = TcpStream::connect(&address).unwrap();
    write!(
        stream,
        "POST /api/v1/wal/write/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        block.len() * count
    )
    .unwrap();
    let mut sender = stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || (0..count).for_each(|_| sender.write_all(block.as_bytes()).unwrap()));
    let most = Arc::new(AtomicU64::new(0));
    let (watched, id) = (Arc::clone(&most), program.0.id());
    let watching = std::thread::spawn(move || {
        while let Some(now) = resident(id) {
            watched.fetch_max(now, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    // An accepted line's answer has one closing brace.
    let (mut buffer, mut answers) = (vec![0; 256 << 10], 0);
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => break,
            read => answers += memchr::memchr_iter(b'}', &buffer[..read]).count(),
        }
    }
    let rate = rate(lines, started);
    sending.join().unwrap();
    let status = request(&address, "GET /api/v1/wal/namespace/bench/status");
    assert!(answers == lines && status.contains(&format!("\"lagRecords\":{lines}")), "{answers} of {lines}: {status}");
    drop(program);
    watching.join().unwrap();
    (rate, before, most.load(Ordering::Relaxed))
}

fn rate(lines: usize, started: Instant) -> f64 {
    lines as f64 / started.elapsed().as_secs_f64()
}

/// Ended when it is dropped.
struct Program(Child);

impl Program {
    fn address(&mut self, file: &Path) -> String {
        loop {
            assert!(self.0.try_wait().unwrap().is_none(), "it did not start");
            if let Ok(address) = fs::read_to_string(file) {
                return address.trim().to_owned();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn resident(&self) -> u64 {
        resident(self.0.id()).unwrap_or(0)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bytes of a process that are in memory; `None` = it is gone.
fn resident(id: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10)
}

/// One small request; gives the whole answer.
fn request(address: &str, what: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "{what} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
