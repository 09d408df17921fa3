//! An HTTP server that does what a test tells it, down to the bytes: answers, silence, resets, garbage.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// One request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// The number of the connection that it came over.
    pub(crate) connection: usize,
    /// Method and path.
    pub(crate) line: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

/// What the server does with a request.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    /// These bytes; the connection stays open.
    Bytes(Vec<u8>),
    /// These bytes, then the end.
    Last(Vec<u8>),
    /// A reset.
    Reset,
    /// Nothing, and the connection stays open.
    Silence,
    /// A body that never ends.
    Endless(u16),
}

impl Answer {
    pub(crate) fn status(status: u16) -> Self {
        Self::with(status, "", "")
    }

    pub(crate) fn with(status: u16, headers: &str, body: &str) -> Self {
        let length = if status == 204 { String::new() } else { format!("content-length: {}\r\n", body.len()) };
        Self::Bytes(format!("HTTP/1.1 {status} Text\r\n{length}{headers}\r\n{body}").into_bytes())
    }
}

type Script = Arc<dyn Fn(&Seen) -> Answer + Send + Sync>;

pub(crate) struct Web {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    script: Script,
    task: Option<JoinHandle<()>>,
}

impl Web {
    pub(crate) async fn start_with(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut web = Self { address, seen: Arc::default(), script: Arc::new(script), task: None };
        web.serve(listener);
        web
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Closes the listener and every connection.
    pub(crate) async fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
    }

    pub(crate) async fn start(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.serve(listener);
    }

    fn serve(&mut self, listener: TcpListener) {
        let (seen, script) = (self.seen.clone(), self.script.clone());
        self.task = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            let mut number = 0;
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                number += 1;
                connections.spawn(connection(stream, number, seen.clone(), script.clone()));
            }
        }));
    }
}

async fn connection(mut stream: TcpStream, number: usize, seen: Arc<Mutex<Vec<Seen>>>, script: Script) {
    let mut buffer = Vec::new();
    loop {
        let Some(request) = read(&mut stream, &mut buffer, number).await else { return };
        seen.lock().unwrap().push(request.clone());
        match script(&request) {
            Answer::Bytes(bytes) => stream.write_all(&bytes).await.unwrap(),
            Answer::Last(bytes) => {
                stream.write_all(&bytes).await.unwrap();
                return;
            }
            Answer::Reset => {
                stream.set_zero_linger().unwrap();
                return;
            }
            // Until the client closes.
            Answer::Silence => {
                let _ = stream.read_to_end(&mut Vec::new()).await;
                return;
            }
            Answer::Endless(status) => {
                let head = format!("HTTP/1.1 {status} Text\r\ntransfer-encoding: chunked\r\n\r\n");
                stream.write_all(head.as_bytes()).await.unwrap();
                while stream.write_all(b"400\r\n").await.is_ok()
                    && stream.write_all(&[b'x'; 0x400]).await.is_ok()
                    && stream.write_all(b"\r\n").await.is_ok()
                {}
                return;
            }
        }
    }
}

async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>, connection: usize) -> Option<Seen> {
    let end = loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(buffer[..end].to_vec()).unwrap();
    let mut lines = head.split("\r\n");
    let line = lines.next()?.trim_end_matches(" HTTP/1.1").to_owned();
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length: usize = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    while buffer.len() < end + 4 + length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let body = String::from_utf8_lossy(&buffer[end + 4..end + 4 + length]).into_owned();
    buffer.drain(..end + 4 + length);
    Some(Seen { connection, line, headers, body })
}
