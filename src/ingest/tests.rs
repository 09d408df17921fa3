//! The edge as clients meet it: every refusal of the log by its status, bodies in odd forms, and those who are slow.

use std::net::SocketAddr;
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _};
use http::HeaderMap;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::testing::{Desk, Handed, Verdict, appended, body, desk, line, next};
use super::*;
use crate::source::{AdmitError, Admitted};

/// The desk behind a real accept loop.
struct Served {
    address: SocketAddr,
    log: mpsc::Receiver<Handed>,
    _desk: Arc<Desk>,
    _stop: DropGuard,
}

/// How much the one other route answers.
const MUCH: usize = 24 << 20;

async fn served(limits: Limits) -> Served {
    let (desk, log) = desk(1 << 20);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
    let other = |_| async { reply::bytes(http::StatusCode::OK, "text/plain", vec![b'x'; MUCH]) }.boxed();
    let routes = routes(Arc::clone(&desk) as Arc<dyn Directory>, other);
    tokio::spawn(serve(listener, routes, limits, stop.clone()));
    Served { address, log, _desk: desk, _stop: stop.drop_guard() }
}

impl Served {
    /// Sends `text`, lets the log take what it is handed, and gives the answer until the connection is closed.
    async fn raw(&mut self, text: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        tokio::select! {
            read = stream.read_to_end(&mut answer) => read.map(drop).unwrap(),
            () = async { while let Some(handed) = self.log.recv().await { handed.take(); } } => {}
        }
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// A write of somebody who does as he should.
    async fn honest(&mut self) {
        let body = line(7);
        let head = format!("Host: x\r\nConnection: close\r\nContent-Length: {}", body.len());
        let answer = self.raw(&format!("POST /api/v1/wal/write HTTP/1.1\r\n{head}\r\n\r\n{body}")).await;
        assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    }
}

fn client() -> reqwest::Client {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

#[tokio::test]
async fn each_verdict_of_the_log_has_its_status_its_code_and_the_truth_about_the_write() {
    let mut served = served(Limits::default()).await;
    let (client, url) = (client(), format!("http://{}/api/v1/wal/write", served.address));
    let why = || "the disk broke".into();
    let table: [(Verdict, u16, &str, &str, Option<u64>); 10] = [
        (Ok(vec![appended()]), 202, "", "succeeded", None),
        (Ok(vec![Admitted::KeyRunning]), 409, "key_running", "unknown", None),
        (Ok(vec![Admitted::KeyReused]), 422, "key_reused", "failed", None),
        (Err(AdmitError::Unknown { reason: why() }), 504, "unknown", "unknown", None),
        (Err(AdmitError::DiskFull), 507, "disk_full", "failed", None),
        (Err(AdmitError::BacklogFull { bytes: 2, limit: 1 }), 503, "backlog_full", "failed", Some(10)),
        (Err(AdmitError::Busy { retry_after: Duration::from_secs(3) }), 503, "busy", "failed", Some(3)),
        (Err(AdmitError::Closed { reason: why() }), 503, "closed", "failed", Some(1)),
        (Err(AdmitError::TooLarge { bytes: 2, limit: 1 }), 413, "too_large", "failed", None),
        (Err(AdmitError::Unsupported("this source cannot")), 501, "unsupported", "failed", None),
    ];
    for (verdict, status, code, durable, after) in table {
        let (answer, ()) = tokio::join!(client.post(&url).body(line(1)).send(), async {
            next(&mut served.log).await.verdict.send(verdict).unwrap();
        });
        let answer = answer.unwrap();
        let header = |name: &str| answer.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!((answer.status().as_u16(), header("retry-after")), (status, after.map(|after| after.to_string())));
        let kind = if status == 202 { "application/json" } else { "application/problem+json" };
        assert_eq!(header("content-type").as_deref(), Some(kind), "{code}");
        let answer: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
        assert_eq!(answer["durable"], durable, "{answer}");
        if status != 202 {
            assert_eq!((&answer["code"], &answer["status"]), (&code.into(), &status.into()), "{answer}");
            assert_eq!(answer["type"], format!("urn:walflow:problem:{code}"), "{answer}");
            assert!(answer["detail"].as_str().is_some_and(|detail| detail.len() > 10), "{answer}");
        }
    }

    // This log cannot delay, and says so before it is asked.
    let delayed = r#"{"namespace":"desk","payload":1,"lifecycle":{"delay":5}}"#;
    let answer = client.post(&url).body(delayed).send().await.unwrap();
    assert_eq!(answer.status(), 501);
    assert!(answer.text().await.unwrap().contains(r#""code":"unsupported""#));
}

#[tokio::test]
async fn a_write_comes_in_each_form_that_http_has() {
    let mut served = served(Limits::default()).await;
    let body = line(7);
    let length = format!("Content-Length: {}", body.len());
    let post = |version: &str, headers: &str, body: &str| {
        format!("POST /api/v1/wal/write HTTP/{version}\r\nHost: x\r\n{headers}\r\n\r\n{body}")
    };
    let cut = format!("{:x}\r\n{}\r\n{:x}\r\n{}\r\n0\r\n\r\n", 9, &body[..9], body.len() - 9, &body[9..]);
    for (form, request, status) in [
        ("as it is", post("1.1", &format!("{length}\r\nConnection: close"), &body), "202"),
        ("HTTP/1.0", post("1.0", &length, &body), "202"),
        ("in chunks", post("1.1", "Transfer-Encoding: chunked\r\nConnection: close", &cut), "202"),
        (
            "with a charset",
            post(
                "1.1",
                &format!("Content-Type: application/json; charset=utf-8\r\n{length}\r\nConnection: close"),
                &body,
            ),
            "202",
        ),
        (
            "as its own kind of JSON",
            post("1.1", &format!("Content-Type: Application/VND.x+JSON\r\n{length}\r\nConnection: close"), &body),
            "202",
        ),
        (
            "as plain text",
            post("1.1", &format!("Content-Type: text/plain\r\n{length}\r\nConnection: close"), &body),
            "415",
        ),
        ("packed", post("1.1", &format!("Content-Encoding: gzip\r\n{length}\r\nConnection: close"), &body), "415"),
        (
            "not packed",
            post("1.1", &format!("Content-Encoding: identity\r\n{length}\r\nConnection: close"), &body),
            "202",
        ),
        ("with more than one may send", post("1.1", &format!("X: {}\r\n{length}", "x".repeat(1 << 20)), &body), "431"),
    ] {
        let answer = served.raw(&request).await;
        assert_eq!(answer.split(' ').nth(1), Some(status), "{form}: {answer}");
        assert_eq!(answer.contains("content_encoding"), form == "packed", "{answer}");
    }

    // A client that asks first hears that it may go on before it sends the body.
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let asking = post("1.1", &format!("{length}\r\nExpect: 100-continue\r\nConnection: close"), "");
    stream.write_all(asking.as_bytes()).await.unwrap();
    let mut go_on = [0; 25];
    stream.read_exact(&mut go_on).await.unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(body.as_bytes()).await.unwrap();
    next(&mut served.log).await.take();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
}

#[tokio::test]
async fn whoever_keeps_a_connection_busy_with_nothing_gives_it_back() {
    let short = Duration::from_millis(20);
    let limits = Limits { connections: 1, head: short, unread: short, ..Limits::default() };
    let mut served = served(limits).await;
    let much = "GET /much HTTP/1.1\r\nHost: x\r\n\r\n";
    for (who, sends) in [
        ("says nothing", ""),
        ("begins to speak HTTP/2", "PRI * HTTP/2.0\r\n"),
        ("speaks HTTP/2 and says nothing", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("sends half a head", "POST /api/v1/wal/write HTTP/1.1\r\nHost:"),
        ("lies idle after a request", "DELETE / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"),
        ("leaves its answer unread", much),
        ("asks on and on and leaves the answers unread", &much.repeat(10)),
    ] {
        let mut slow = TcpStream::connect(served.address).await.unwrap();
        slow.write_all(sends.as_bytes()).await.unwrap();
        if who.starts_with("lies") {
            let mut answer = vec![0; MUCH];
            slow.read_exact(&mut answer).await.unwrap();
        }
        // There is one connection: who comes next is served only when the slow one has been sent away.
        let honest = tokio::time::timeout(Duration::from_secs(30), served.honest()).await;
        honest.unwrap_or_else(|_| panic!("one that {who} is waited for"));
        drop(slow);
    }
    let crowd: Vec<TcpStream> = futures::stream::iter(0..300)
        .then(|_| async { TcpStream::connect(served.address).await.unwrap() })
        .collect()
        .await;
    served.honest().await;
    drop(crowd);
}

#[tokio::test]
async fn more_connections_than_may_be_wait_until_one_is_given_back() {
    let mut served = served(Limits { connections: 1, ..Limits::default() }).await;
    let first = TcpStream::connect(served.address).await.unwrap();
    let waits = tokio::time::timeout(Duration::from_millis(50), served.honest()).await;
    assert!(waits.is_err(), "the second was served beside the first");
    drop(first);
    served.honest().await;
}

#[tokio::test]
async fn http_2_has_its_bounds_said_at_the_start() {
    let served = served(Limits::default()).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    // The preface, and empty settings.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4, "settings come first");
    let mut settings = vec![0; usize::from(head[2])];
    stream.read_exact(&mut settings).await.unwrap();
    let said = |id: u16| {
        let found = settings.chunks(6).find(|entry| entry[..2] == id.to_be_bytes());
        found.map(|entry| u32::from_be_bytes(entry[2..].try_into().unwrap()))
    };
    let (streams, window, head) = (said(3), said(4), said(6));
    assert_eq!((streams, window, head), (Some(256), Some(256 << 10), Some(16 << 10)));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_go_on_or_trickles_is_refused() {
    let (parts, mut silent) = body();
    let refused = read_all(&HeaderMap::new(), &mut silent, 1 << 20).await.unwrap_err();
    assert_eq!((refused.status.as_u16(), refused.code), (408, "slow_body"));
    drop(parts);

    let (parts, mut trickling) = body();
    let feeding = tokio::spawn(async move {
        while parts.send("x".to_owned()).await.is_ok() {
            tokio::time::sleep(Duration::from_secs(9)).await;
        }
    });
    let reading = async { read_all(&HeaderMap::new(), &mut trickling, 1 << 20).await };
    let refused = tokio::time::timeout(Duration::from_secs(60), reading).await.expect("it is waited for").unwrap_err();
    assert_eq!((refused.status.as_u16(), refused.code), (408, "slow_body"));
    feeding.abort();

    // One that is slow and gets on is taken.
    let (parts, mut slow) = body();
    let feeding = tokio::spawn(async move {
        for _ in 0..10 {
            parts.send("x".repeat(16 << 10)).await.unwrap();
            tokio::time::sleep(Duration::from_secs(9)).await;
        }
    });
    assert_eq!(read_all(&HeaderMap::new(), &mut slow, 1 << 20).await.unwrap().len(), 160 << 10);
    feeding.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn bodies_that_are_still_coming_in_count_against_the_budget() {
    let budget = Budget::new(10, None);
    let (parts, mut first) = body();
    let one = Arc::clone(&budget);
    let reading = tokio::spawn(async move {
        let read = body::read_held(&HeaderMap::new(), &mut first, 1 << 20, &one).await;
        read.map(|(bytes, _)| bytes.len())
    });
    parts.send("8 bytes.".to_owned()).await.unwrap();
    testing::at_rest().await;
    assert_eq!(budget.held(), 8);
    let (others, mut second) = body();
    others.send("3 b".to_owned()).await.unwrap();
    let refused = body::read_held(&HeaderMap::new(), &mut second, 1 << 20, &budget).await.err().unwrap();
    assert_eq!(refused.code, "in_flight");
    // Alone it may be as large as it likes.
    parts.send("and many more of its own".to_owned()).await.unwrap();
    drop(parts);
    assert_eq!(reading.await.unwrap().unwrap(), 32);
    assert_eq!(budget.held(), 0);
}
