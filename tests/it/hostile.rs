//! Bad input from outside: refused with a 4xx, memory flat, nothing written, and everybody else served.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{Place, Running};

const PIPELINE: &str = "namespace: calm\nsink: { file: { path: out.ndjson } }\n";

async fn raw(running: &Running, body: Vec<u8>) -> (u16, String) {
    let request =
        running.client.post(format!("{}/api/v1/wal/write", running.url)).header("content-type", "application/json");
    let answer = request.body(body).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_writes_are_refused_and_leave_nothing_behind() {
    let place = Place::new().pipeline("p.yaml", PIPELINE);
    let mut running = place.start().await;
    let deep = |open: &str, close: &str| {
        format!(r#"{{"namespace":"calm","payload":{}1{}}}"#, open.repeat(100_000), close.repeat(100_000))
    };
    let bodies: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("half", br#"{"namespace":"calm","payl"#.to_vec()),
        ("no object", b"[1]".to_vec()),
        ("bad UTF-8", b"{\"namespace\":\"calm\",\"payload\":\"\xff\xfe\"}".to_vec()),
        ("deep arrays", deep("[", "]").into_bytes()),
        ("deep objects", deep("{\"a\":", "}").into_bytes()),
        ("no payload", br#"{"namespace":"calm"}"#.to_vec()),
        ("no namespace", br#"{"payload":1}"#.to_vec()),
        ("unknown field", br#"{"namespace":"calm","payload":1,"paylod":2}"#.to_vec()),
        ("a path as a name", br#"{"namespace":"../x","payload":1}"#.to_vec()),
        ("a negative delay", br#"{"namespace":"calm","payload":1,"lifecycle":{"delay":-1}}"#.to_vec()),
        ("two megabytes", format!(r#"{{"namespace":"calm","payload":"{}"}}"#, "x".repeat(2 << 20)).into_bytes()),
    ];
    for (what, body) in bodies {
        let (status, answer) = raw(&running, body).await;
        assert!((400..500).contains(&status), "{what}: {status} {answer}");
        let problem: serde_json::Value = serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{what}: {answer}"));
        assert!(problem["code"].is_string() && problem["durable"] == "failed", "{what}: {answer}");
    }
    for name in ["../x", "%2e%2e%2fx", "UPPER", "-a", "a_b", "no-such"] {
        let (status, _) = running.get(&format!("/api/v1/wal/namespace/{name}/status")).await;
        assert!(status == 404 || status == 400, "{name}: {status}");
    }
    running.accepted("calm", None, json!("fine")).await;
    assert!(running.stop().await.success());
    assert_eq!(place.lines("out.ndjson"), ["\"fine\""]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_of_ten_gibibytes_is_refused_before_it_is_read() {
    let place = Place::new().pipeline("p.yaml", PIPELINE);
    let running = place.start().await;
    let before = running.memory();
    for head in ["Content-Length: 10737418240", "Transfer-Encoding: chunked"] {
        let (url, head) = (running.url.clone(), head.to_owned());
        let status = tokio::task::spawn_blocking(move || {
            let mut stream = TcpStream::connect(url.trim_start_matches("http://")).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            write!(
                stream,
                "POST /api/v1/wal/write HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{head}\r\n\r\n"
            )
            .unwrap();
            let chunked = head.starts_with('T');
            let block = vec![b' '; 1 << 20];
            // At most 256 MiB of the ten GiB: a server that has not refused by then never will.
            for _ in 0..256 {
                let sent = (!chunked || write!(stream, "100000\r\n").is_ok())
                    && stream.write_all(&block).is_ok()
                    && (!chunked || write!(stream, "\r\n").is_ok());
                if !sent {
                    break;
                }
            }
            let mut answer = [0; 12];
            // A server that has closed may have reset the connection before its answer was read.
            if stream.read_exact(&mut answer).is_ok() {
                String::from_utf8_lossy(&answer).into_owned()
            } else {
                String::new()
            }
        })
        .await
        .unwrap();
        assert!(status.is_empty() || status.starts_with("HTTP/1.1 4"), "{status}");
    }
    assert!(running.memory() < before + (48 << 20), "from {before} to {}", running.memory());
    running.accepted("calm", None, json!({})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_and_half_requests_are_closed() {
    let place = Place::new().pipeline("p.yaml", PIPELINE);
    let running = place.start().await;
    let begin = |text: &str| {
        let mut stream = TcpStream::connect(running.url.trim_start_matches("http://")).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(40))).unwrap();
        stream
    };
    let half_head = begin("POST /api/v1/wal/write HTTP/1.1\r\nHost: x\r\n");
    let half_body = begin(
        "POST /api/v1/wal/write HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
    );
    let started = Instant::now();
    let closed = tokio::task::spawn_blocking(move || {
        [half_head, half_body].map(|mut stream| stream.read_to_end(&mut Vec::new()).is_ok_and(|_| true))
    });
    running.accepted("calm", None, json!({})).await;
    assert_eq!(closed.await.unwrap(), [true, true]);
    assert!(started.elapsed() < Duration::from_secs(40));
}

#[test]
fn a_yaml_bomb_is_refused_in_a_second() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..40 {
        let below = format!("*a{}, ", level - 1).repeat(9);
        bomb += &format!("a{level}: &a{level} [{}]\n", below.trim_end_matches(", "));
    }
    let place = Place::new().pipeline("bomb.yaml", &bomb);
    let started = Instant::now();
    let output = place.command(&["run", "--dry-run", "pipelines"]).output().unwrap();
    let took = started.elapsed();
    assert_eq!(output.status.code(), Some(78), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(took < Duration::from_secs(1), "took {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_scripts_are_stopped_and_the_next_record_is_served() {
    let scripts = [
        ("loop", "loop { }"),
        ("recursion", "fn f(n) { f(n + 1) } f(0);"),
        ("text-bomb", "let s = \"x\"; loop { s += s; }"),
        ("array-bomb", "let a = []; loop { a.push(\"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"); }"),
        ("map-bomb", "let i = 0; loop { payload[\"k\" + i] = i; i += 1; }"),
    ];
    let mut place = Place::new();
    for (name, script) in scripts {
        let yaml = format!(
            "namespace: {name}\ntransform:\n  - inline: |\n      if payload.hostile {{ {} }}\nsink: {{ file: {{ path: {name}.ndjson }} }}\n",
            if name == "recursion" { "f(0);" } else { script }
        );
        let yaml = if name == "recursion" {
            yaml.replace("inline: |\n", "inline: |\n      fn f(n) { f(n + 1) }\n")
        } else {
            yaml
        };
        place = place.pipeline(&format!("{name}.yaml"), &yaml);
    }
    let running = place.start().await;
    let before = running.memory();
    for (name, _) in scripts {
        running.accepted(name, None, json!({"hostile": true})).await;
        running.accepted(name, None, json!({"hostile": false})).await;
        crate::harness::until("the next record", || (place.lines(&format!("{name}.ndjson")).len() == 1).then_some(()))
            .await;
        let (code, out, said) = running.cli(&place, &["dead-letters", "list", name, "--output", "json"]);
        assert_eq!(code, 0, "{said}");
        let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(answer["items"][0]["reason"], "script", "{name}: {answer:#}");
    }
    assert!(running.memory() < before + (96 << 20), "from {before} to {}", running.memory());
}
