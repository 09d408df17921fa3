//! The command line of an instance: what it listens on, whom it lets in, when it refuses to run, and how it ends.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use serde_json::json;

use crate::harness::{Place, Running, until_status};

const PIPELINE: &str = "namespace: calm\nsink: { file: { path: out.ndjson } }\n";

/// Runs a command that is to end by itself; gives its exit code and what it said.
async fn ended(place: &Place, mut command: Command) -> (Option<i32>, String) {
    let _ = fs::remove_file(place.path("said"));
    let child = command.stdout(Stdio::null()).stderr(place.file("said")).spawn().unwrap();
    let mut running = Running::of(child, place, "said");
    let status = running.ended(Duration::from_secs(30)).await;
    (status.code(), running.log())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_would_run_nothing_says_what_to_do_and_leaves_nothing_behind() {
    let place = Place::new();
    fs::create_dir(place.path("empty")).unwrap();
    for path in ["empty", "no/such/path"] {
        let (code, said) = ended(&place, place.command(&["run", path, "--listen", "127.0.0.1:0"])).await;
        assert_eq!(code, Some(78), "{said}");
        assert!(said.contains(path) && said.contains("walflow run PATH"), "{said}");
        assert!(!place.path("data").exists(), "{path}: a data folder was made");
    }

    // What an earlier run left behind is delivered without its file.
    let place = place.pipeline("p.yaml", PIPELINE);
    let mut running = place.start().await;
    let paused = running.cli(&place, &["branch", "pause", "calm", "file"]);
    assert_eq!(paused.0, 0, "{}", paused.2);
    running.accepted("calm", None, json!(1)).await;
    assert!(running.stop().await.success());
    fs::remove_file(place.path("pipelines/p.yaml")).unwrap();
    let mut running = place.start().await;
    let resumed = running.cli(&place, &["branch", "resume", "calm", "file"]);
    assert_eq!(resumed.0, 0, "{}", resumed.2);
    until_status(&running, "calm", "the rest", |status| status["branches"][0]["lagRecords"] == 0).await;
    assert_eq!(place.lines("out.ndjson"), ["1"]);

    // A folder that knows no namespace any more has nothing to run either.
    let deleted = running.cli(&place, &["namespace", "delete", "calm", "--yes"]);
    assert_eq!(deleted.0, 0, "{}", deleted.2);
    assert!(running.stop().await.success());
    let (code, said) = ended(&place, place.command(&["run", "pipelines", "--listen", "127.0.0.1:0"])).await;
    assert_eq!(code, Some(78), "{said}");
}

/// Starts a command of this place and waits until it is ready.
async fn started(place: &Place, mut command: Command) -> Running {
    let _ = fs::remove_file(place.path("address"));
    let child = command.stdout(place.file("stdout")).stderr(place.file("log")).spawn().unwrap();
    let mut running = Running::of(child, place, "log");
    running.until_ready().await;
    running
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_it_listens_is_said_by_flag_by_environment_and_by_port() {
    let place = Place::new().pipeline("p.yaml", PIPELINE);
    let run = || place.command(&["run", "pipelines", "--address-file", "address"]);
    let mut command = run();
    command.env("WALFLOW_LISTEN", "127.0.0.2:0");
    let running = started(&place, command).await;
    assert!(running.url.starts_with("http://127.0.0.2:"), "{}", running.url);
    running.accepted("calm", None, json!(1)).await;
    drop(running);

    // The port of this address is taken, so that only PORT lets it start.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut command = run();
    command.args(["--listen", &address]);
    let (code, said) = ended(&place, command).await;
    assert!(code == Some(1) && said.contains(&address) && said.contains("--listen"), "{code:?}: {said}");
    let mut command = run();
    command.args(["--listen", &address]).env("PORT", "0");
    let running = started(&place, command).await;
    assert!(running.url.starts_with("http://127.0.0.1:") && !running.url.ends_with(&address), "{}", running.url);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beyond_loopback_it_listens_only_with_keys_and_each_of_them_opens() {
    let place = Place::new().pipeline("p.yaml", PIPELINE);
    let open = ["run", "pipelines", "--address-file", "address", "--listen", "0.0.0.0:0"];
    for keys in ["", ","] {
        let mut command = place.command(&open);
        command.env("VALID_API_KEYS", keys);
        let (code, said) = ended(&place, command).await;
        assert!(code == Some(2) && said.contains("VALID_API_KEYS"), "{code:?}: {said}");
        assert!(!place.path("data").exists());
    }
    let mut command = place.command(&open);
    command.env("VALID_API_KEYS", "first-secret,second-secret");
    let running = started(&place, command).await;
    let write = ["write", "calm", "1"];
    let (code, _, told) = running.cli(&place, &write);
    assert!(code == 1 && told.contains("401") && told.contains("WALFLOW_API_KEY"), "{code}: {told}");
    for (key, expected) in [("first-secret", 0), ("second-secret", 0), ("first-secret,second-secret", 1), ("third", 1)]
    {
        let mut command = place.command(&write);
        command.env("WALFLOW_URL", &running.url).env("WALFLOW_API_KEY", key);
        let (code, said) = ended(&place, command).await;
        assert_eq!(code, Some(expected), "{key}: {said}");
    }
    let log = running.log();
    assert!(!log.contains("secret"), "a key stands in the log: {log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_idle_connections_leave_room_for_a_write_though_few_files_were_allowed() {
    let hard = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard }).unwrap();
    let place = Place::new().pipeline("p.yaml", PIPELINE);
    let plain = place.command(&["run", "pipelines", "--address-file", "address", "--listen", "127.0.0.1:0"]);
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -Sn 256 && exec \"$0\" \"$@\""]).arg(plain.get_program()).args(plain.get_args());
    command.current_dir(place.path(""));
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let running = started(&place, command).await;
    let address = running.url.trim_start_matches("http://").to_owned();
    let crowd: Vec<TcpStream> = (0..1_000).map(|_| TcpStream::connect(&address).unwrap()).collect();
    running.accepted("calm", None, json!(1)).await;
    assert!(!running.log().contains("could not accept"), "{}", running.log());
    drop(crowd);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strict_starts_nothing_when_one_file_of_many_is_broken() {
    let place = Place::new().pipeline("a.yaml", PIPELINE).pipeline("b.yaml", "namespace: broken\nsinks: {}\n");
    let place = place.pipeline("c.yaml", "namespace: third\nsink: { file: { path: third.ndjson } }\n");
    for twin in [false, true] {
        let mut command = place.command(&["run", "pipelines", "--listen", "127.0.0.1:0"]);
        if twin {
            command.env("WALFLOW_STRICT", "true")
        } else {
            command.arg("--strict")
        };
        let (code, said) = ended(&place, command).await;
        assert_eq!(code, Some(78), "{said}");
        assert!(said.contains("b.yaml") && said.contains("did you mean"), "{said}");
        assert!(!place.path("data").exists(), "a data folder was made");
    }
    let running = place.start().await;
    running.accepted("calm", None, json!(1)).await;
    running.accepted("third", None, json!(1)).await;
    let (status, answer) = running.write(&json!({"namespace": "broken", "payload": 1})).await.unwrap();
    assert_eq!((status.as_u16(), &answer["code"]), (503, &json!("broken")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_waits_for_an_upload_that_never_ends_only_so_long() {
    let place = Place::new().pipeline("p.yaml", PIPELINE).environment("WALFLOW_SHUTDOWN_TIMEOUT", "1s");
    let mut running = place.start().await;
    let mut upload = TcpStream::connect(running.url.trim_start_matches("http://")).unwrap();
    let line = "{\"namespace\":\"calm\",\"payload\":1}\n";
    let head = "POST /api/v1/wal/write/batch HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    write!(upload, "{head}{:x}\r\n{line}\r\n", line.len()).unwrap();
    let mut answer = Vec::new();
    while !String::from_utf8_lossy(&answer).contains("succeeded") {
        let mut part = [0; 1_024];
        let read = upload.read(&mut part).unwrap();
        assert!(read > 0, "{}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&part[..read]);
    }
    running.signal(Signal::TERM);
    assert_eq!(running.ended(Duration::from_secs(60)).await.code(), Some(0));
    // Whoever waited longer would have told the client at last that its body does not go on.
    let _ = upload.read_to_end(&mut answer);
    assert!(!String::from_utf8_lossy(&answer).contains("slow_body"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(place.lines("out.ndjson"), ["1"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_that_is_not_there_is_deleted_in_the_words_of_every_other_verb() {
    let place = Place::new().pipeline("p.yaml", PIPELINE);
    let running = place.start().await;
    let (code, _, deleted) = running.cli(&place, &["namespace", "delete", "calmer", "--yes"]);
    let (_, _, listed) = running.cli(&place, &["branch", "list", "calmer"]);
    assert_eq!(deleted, listed);
    assert!(code == 1 && deleted.contains("there is no namespace `calmer`") && deleted.contains("lists"), "{deleted}");
    let (code, _, told) = running.cli(&place, &["namespace", "delete", "calm"]);
    assert!(code == 2 && told.contains("--yes"), "{told}");
    let (code, _, told) = running.cli(&place, &["namespace", "delete", "calm", "--yes"]);
    assert!(code == 1 && told.contains("in_use") && told.contains("delete it and reload"), "{told}");
    running.accepted("calm", None, json!(1)).await;
}

#[test]
fn a_probe_says_for_each_branch_what_cannot_be_reached_and_ends_with_69() {
    let text = "
namespace: orders
sink:
  fan_out:
    kept: { file: { path: \"out/{payload.kind}.ndjson\" } }
    cache: { redis: { url: \"redis://:geheim@127.0.0.1:1/\", cases: [{ key: \"a:{key}\" }] } }
    hook: { http: { url: \"http://user:geheim@127.0.0.1:1/{payload.id}\" } }
";
    let place = Place::new().pipeline("a.yaml", text);
    let output = place.command(&["run", "--dry-run", "--probe", "pipelines"]).output().unwrap();
    assert_eq!(output.status.code(), Some(69));
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.contains("ok    branch kept: folder out/: files can be made there"), "{told}");
    assert!(told.contains("FAIL  branch cache: redis 127.0.0.1:1: "), "{told}");
    assert!(told.contains("FAIL  branch hook: http://127.0.0.1:1: "), "{told}");
    assert!(!told.contains("geheim"), "{told}");
    let only = place.command(&["run", "--probe", "pipelines"]).output().unwrap();
    assert_eq!(only.status.code(), Some(2), "it is a part of the dry run");
}
