//! The service's own settings: flags, environment, walflow.yaml, and what is said when one of them is wrong.

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::config::write_config;
use crate::harness::{Place, Running, until};
use crate::reload::reload;

const SINK: &str = "namespace: a\nsink: { stdout: {} }\n";

async fn run(place: &Place, mut command: Command) -> Running {
    let _ = std::fs::remove_file(place.path("address"));
    let child = command.stdin(Stdio::null()).stdout(place.file("out")).stderr(place.file("log")).spawn().unwrap();
    let mut running = Running::of(child, place, "log");
    running.until_ready().await;
    running
}

async fn with_key(running: &Running, key: &str) -> u16 {
    let request = running.client.post(format!("{}/api/v1/wal/write", running.url)).header("x-api-key", key);
    let request = request.header("content-type", "application/json").body(r#"{"namespace":"a","payload":1}"#);
    request.send().await.unwrap().status().as_u16()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_file_gives_settings_and_the_environment_and_flags_win() {
    let place = Place::new();
    std::fs::create_dir(place.path("pipes")).unwrap();
    std::fs::write(place.path("pipes/a.yaml"), SINK).unwrap();
    std::fs::write(place.path("keys"), "first,second\n").unwrap();
    let keys = place.path("keys");
    write_config(
        &place,
        &format!(
            "paths: pipes\nlisten: 127.0.0.1:0\naddress_file: address\ndata: of-file\nlog_format: text\napi_keys: '${{file:{}}}'\n",
            keys.display()
        ),
    );
    let mut running = run(&place, place.command(&["run"])).await;
    let (status, body) = running.write(&json!({"namespace": "a", "payload": 1})).await.unwrap();
    assert_eq!(status, 401, "{body}");
    assert_eq!(with_key(&running, "second").await, 202);
    assert!(running.log().contains(" INFO ready"), "{}", running.log());
    running.stop().await;
    assert!(place.path("of-file").is_dir());

    let mut command = place.command(&["run"]);
    command.env("WALFLOW_DATA", "of-environment").env("VALID_API_KEYS", "third");
    let mut running = run(&place, command).await;
    assert_eq!((with_key(&running, "first").await, with_key(&running, "third").await), (401, 202));
    running.stop().await;
    assert!(place.path("of-environment").is_dir());

    let mut command = place.command(&["run", "--data", "of-flag", "--log-format", "json"]);
    command.env("WALFLOW_DATA", "of-nobody");
    let mut running = run(&place, command).await;
    assert!(running.log().contains(r#""message":"ready""#), "{}", running.log());
    running.stop().await;
    assert!(place.path("of-flag").is_dir() && !place.path("of-nobody").exists());
    assert!(!running.log().contains("hold after a restart"), "{}", running.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_setting_that_changes_says_that_it_needs_a_restart() {
    let place = Place::new().pipeline("a.yaml", SINK);
    write_config(&place, "shutdown_timeout: 20s\n");
    let running = place.start().await;
    let told = || running.log().lines().filter(|line| line.contains("hold after a restart")).count();
    // What a flag says does not change with the file.
    write_config(&place, "shutdown_timeout: 20s\nlisten: 127.0.0.1:1\n");
    reload(&running, 1).await;
    assert_eq!(told(), 0, "{}", running.log());
    write_config(&place, "shutdown_timeout: 10s\nshard: [east]\n");
    reload(&running, 2).await;
    let log = running.log();
    let line = log.lines().find(|line| line.contains("hold after a restart")).unwrap_or_else(|| panic!("{log}"));
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!((line["keys"].as_str(), line["level"].as_str()), (Some("shard, shutdown_timeout"), Some("WARN")));
    running.accepted("a", None, json!(1)).await;
    std::fs::remove_file(place.path("walflow.yaml")).unwrap();
    reload(&running, 3).await;
    assert_eq!(told(), 2, "{}", running.log());
    write_config(&place, "shutdown_timeout: 20s\n");
    reload(&running, 4).await;
    assert_eq!(told(), 2, "{}", running.log());
}

/// How a run ends that should not begin, and what it says; one that runs all the same is ended.
fn ended(mut command: Command) -> (i32, String) {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let (tell, said) = std::sync::mpsc::channel();
    std::thread::spawn(move || tell.send(std::io::read_to_string(&mut stderr).unwrap()));
    let Ok(said) = said.recv_timeout(Duration::from_secs(30)) else {
        child.kill().unwrap();
        panic!("it runs: {command:?}");
    };
    (child.wait().unwrap().code().unwrap_or(-1), said)
}

#[test]
fn a_mistake_in_the_settings_is_one_message_and_the_exit_code_of_a_configuration() {
    for (text, told) in [
        ("lisen: 0.0.0.0:80\n", &["WF0201", "walflow.yaml:1:1", "did you mean 'listen'?", "^^^^^"][..]),
        ("data: x\nlisten: here\n", &["WF0205", "walflow.yaml:2:9", "invalid socket address", "127.0.0.1:3000"]),
        ("port: 70000\n", &["WF0206", "walflow.yaml:1:7", "the most is 65535"]),
        ("shutdown_timeout: ${NOT_SET}\n", &["WF0301", "walflow.yaml:1:19", "NOT_SET"]),
        ("listen: [\n", &["WF0104", "walflow.yaml:"]),
        ("- listen\n", &["WF0204", "walflow.yaml holds a map"]),
        ("listen: a\nlisten: b\n", &["WF0107", "walflow.yaml:2:1"]),
    ] {
        let place = Place::new().pipeline("a.yaml", SINK);
        write_config(&place, text);
        for verb in [&["run"][..], &["run", "--dry-run"], &["config", "show"]] {
            let (code, said) = ended(place.command(verb));
            assert_eq!(code, 78, "{verb:?} {text}{said}");
            assert!(told.iter().all(|told| said.contains(told)), "{verb:?} {text}{said}");
        }
        assert!(!place.path("data").exists(), "{text}");
    }
    // One problem, one message.
    let place = Place::new().pipeline("a.yaml", SINK);
    std::fs::write(place.path("bytes.yaml"), b"listen: \xff\n").unwrap();
    for (named, told) in [
        ("none.yaml", "No such file"),
        ("pipelines", "it is no regular file"),
        ("bytes.yaml", "is not UTF-8 text: line 1"),
    ] {
        let (code, said) = ended(place.command(&["run", "--config", named]));
        assert_eq!(code, 78, "{said}");
        assert!(said.contains(named) && said.contains(told) && said.contains("WALFLOW_CONFIG"), "{said}");
        assert_eq!(said.matches("error[").count(), 1, "{said}");
    }
    // Wrong usage is another matter.
    let (code, said) = ended(place.command(&["run", "--listen", "here"]));
    assert_eq!((code, said.contains("--listen")), (2, true), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_says_nothing_and_one_with_broken_defaults_do_not_keep_it_from_running() {
    let place = Place::new().pipeline("a.yaml", SINK);
    for text in ["", "# nothing\n", "listen:\n"] {
        write_config(&place, text);
        let (code, said) = ended(place.command(&["run", "--dry-run"]));
        assert_eq!(code, if text.starts_with("listen") { 78 } else { 0 }, "{said}");
    }
    write_config(&place, "");
    let mut running = place.start().await;
    running.accepted("a", None, json!(1)).await;
    running.stop().await;
    // The last good plans are in force, as for any broken file.
    write_config(&place, "defaults: { sink: { retires: 1 } }\nlog_format: json\n");
    let mut running = place.start().await;
    running.accepted("a", None, json!(1)).await;
    assert_eq!(running.status("a").await["config"]["state"], "stale");
    running.signal(Signal::TERM);
    running.ended(Duration::from_secs(30)).await;
}

fn shown(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn config_show_without_a_namespace_prints_the_instance() {
    let place = Place::new().pipeline("a.yaml", SINK);
    write_config(
        &place,
        "data: /var/lib/walflow\nport: 4000\nstrict: true\nconnections:\n  main: { redis: { url: 'redis://u:CANARY-1@r/1' } }\ndefaults: { owner: me }\n",
    );
    let command = |arguments: &[&str]| {
        let mut command = place.command(arguments);
        command.env("WALFLOW_SHARD", "east").env("VALID_API_KEYS", "CANARY-2,CANARY-3");
        command.output().unwrap()
    };
    let output = command(&["config", "show", "--listen", "127.0.0.1:5000"]);
    let text = shown(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for (line, origin) in [
        ("data: /var/lib/walflow", "walflow.yaml:1"),
        ("strict: true", "walflow.yaml:3"),
        ("listen: \"127.0.0.1:5000\"", "--listen"),
        ("- east", "WALFLOW_SHARD"),
        ("- \"***\"", "VALID_API_KEYS"),
        ("log_level: info", "default"),
        ("owner: me", "walflow.yaml:6"),
    ] {
        let is_it =
            |shown: &str| shown.split_once("  # ").is_some_and(|(value, from)| value.trim() == line && from == origin);
        assert!(text.lines().any(is_it), "{line}: {text}");
    }
    assert!(!text.contains("port:"), "the flag gives the whole address: {text}");
    let json = command(&["config", "show", "--output", "json"]);
    let value: Value = serde_json::from_slice(&json.stdout).unwrap();
    let values = value["values"].as_array().unwrap();
    let of =
        |pointer: &str| values.iter().find(|value| value["pointer"] == pointer).unwrap_or_else(|| panic!("{value}"));
    assert_eq!((&of("/port")["value"], &of("/port")["origin"]), (&json!(4000), &json!("walflow.yaml:2")));
    assert_eq!(of("/connections/main/redis/url")["origin"], "walflow.yaml:5");
    assert!(!shown(&json).contains("CANARY") && !text.contains("CANARY"), "{text}");
    // One that names a namespace is what it was, by the paths of the file too.
    assert!(shown(&command(&["config", "show", "a"])).contains("# pipelines/a.yaml:1"));
}

/// Users of the test's own on the server, whose password can be changed.
async fn user(connection: &mut redis::aio::MultiplexedConnection, names: [&str; 2], password: &str) {
    for name in names {
        let mut command = redis::cmd("ACL");
        command.arg("SETUSER").arg(name).arg(&["resetpass", "on", "~*", "&*", "+@all"]).arg(format!(">{password}"));
        command.exec_async(connection).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Redis server: WALFLOW_TEST_REDIS"]
async fn another_password_is_taken_by_a_sink_and_refused_by_a_source() {
    let url = std::env::var("WALFLOW_TEST_REDIS").expect("WALFLOW_TEST_REDIS names a Redis server");
    let client = redis::Client::open(url.as_str()).unwrap();
    let mut admin = client.get_multiplexed_async_connection().await.unwrap();
    let name = format!("login-{}", std::process::id());
    let (taker, giver) = (format!("{name}-to"), format!("{name}-from"));
    let with = |user: &str, password: &str| url.replacen("redis://", &format!("redis://{user}:{password}@"), 1);
    let connections = |password: &str| {
        let (to, from) = (with(&taker, password), with(&giver, password));
        format!("connections:\n  to: {{ redis: {{ url: '{to}' }} }}\n  from: {{ redis: {{ url: '{from}' }} }}\n")
    };
    let sink = format!("redis: {{ use: to, cases: [{{ key: '{name}-{{key}}', value: '{{payload}}' }}] }}");
    let place = Place::new()
        .pipeline("to.yaml", &format!("namespace: to\nsink: {{ {sink} }}\n"))
        .pipeline(
            "from.yaml",
            &format!(
                "namespace: from\nsource: {{ redis: {{ use: from, durability: weak, prefix: {name} }} }}\nsink: {{ file: {{ path: out.ndjson }} }}\n"
            ),
        );
    user(&mut admin, [&taker, &giver], "wrong").await;
    write_config(&place, &connections("CANARY-1"));
    let mut running = place.start().await;
    // A login that never worked is put right without a restart.
    user(&mut admin, [&taker, &giver], "CANARY-2").await;
    write_config(&place, &connections("CANARY-2"));
    reload(&running, 1).await;
    for namespace in ["to", "from"] {
        assert_eq!(running.status(namespace).await["config"]["state"], "current", "{}", running.log());
        running.accepted(namespace, Some("k"), json!(1)).await;
    }
    let get = |key: String| redis::cmd("GET").arg(key).to_owned();
    let mut reader = admin.clone();
    let mut value = async |wanted: &str| loop {
        let found: Option<String> = get(format!("{name}-k")).query_async(&mut reader).await.unwrap();
        if found.as_deref() == Some(wanted) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    tokio::time::timeout(Duration::from_secs(30), value("1")).await.unwrap();

    user(&mut admin, [&taker, &giver], "CANARY-3").await;
    redis::cmd("CLIENT").arg("KILL").arg("USER").arg(&taker).exec_async(&mut admin).await.unwrap();
    write_config(&place, &connections("CANARY-3"));
    reload(&running, 2).await;
    running.accepted("to", Some("k"), json!(2)).await;
    tokio::time::timeout(Duration::from_secs(30), value("2")).await.unwrap();
    let refused = running.status("from").await;
    assert_eq!(
        (&refused["config"]["state"], &refused["config"]["problem"]["code"]),
        (&json!("stale"), &json!("WF0603")),
        "{refused}"
    );
    let log = running.log();
    let line = log.lines().find(|line| line.contains("WF0603")).unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains("restart walflow") && line.contains("from.yaml") && line.contains("\"line\":2"), "{line}");
    assert!(!log.contains("CANARY") && !refused.to_string().contains("CANARY"), "{log}");

    running.stop().await;
    let running = place.start().await;
    running.accepted("from", Some("k"), json!(3)).await;
    until("what the source had", || (place.lines("out.ndjson").len() == 2).then_some(())).await;
    assert_eq!(running.status("from").await["config"]["state"], "current");
    redis::cmd("ACL").arg("DELUSER").arg(&taker).arg(&giver).exec_async(&mut admin).await.unwrap();
}
