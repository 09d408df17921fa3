//! walflow.yaml while it runs: connections for many pipelines, defaults, a broken edit, and shards.

use serde_json::json;

use crate::harness::{Place, Receiver, until, until_status};
use crate::reload::reload;

pub(crate) fn write_config(place: &Place, text: &str) {
    let next = place.path("walflow.next");
    std::fs::write(&next, text).unwrap();
    std::fs::rename(next, place.path("walflow.yaml")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn defaults_are_read_again_and_a_broken_walflow_yaml_leaves_everything_as_it_was() {
    let receiver = Receiver::start().await;
    let sink = |name: &str| format!("namespace: {name}\nsink: {{ http: {{ url: '{}' }} }}\n", receiver.url);
    let place = Place::new().pipeline("a.yaml", &sink("a")).pipeline("b.yaml", &sink("b"));
    let owner = |name: &str| format!("defaults:\n  owner: {name}\n");
    write_config(&place, &owner("one"));
    let running = place.start().await;
    let first = running.status("a").await;
    assert_eq!(first["owner"], "one", "{first}");

    write_config(&place, &owner("two"));
    reload(&running, 1).await;
    let second = running.status("a").await;
    assert_eq!(second["owner"], "two", "{second}");
    assert_ne!(second["revision"], first["revision"]);

    write_config(&place, "defaults:\n  owner: three\n  source: { limits: { recrod: 1KiB } }\n");
    reload(&running, 2).await;
    for name in ["a", "b"] {
        let status = running.status(name).await;
        assert_eq!(status["owner"], "two");
        let problem = status.to_string();
        assert!(problem.contains("walflow.yaml") && problem.contains("WF0201"), "{problem}");
        running.accepted(name, None, json!({"n": 1})).await;
    }
    until("what was written", || (receiver.count() == 2).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_of_another_shard_does_not_run_here() {
    let place = Place::new()
        .pipeline("a.yaml", "namespace: a\nshard: east\nsink: { stdout: {} }\n")
        .pipeline("b.yaml", "namespace: b\nshard: west\nsink: { stdout: {} }\n")
        .pipeline("c.yaml", "namespace: c\nsink: { stdout: {} }\n")
        .environment("WALFLOW_SHARD", "east,default");
    let running = place.start().await;
    running.accepted("a", None, json!({"n": 1})).await;
    running.accepted("c", None, json!({"n": 1})).await;
    let (status, body) = running.write(&json!({"namespace": "b", "payload": 1})).await.unwrap();
    assert_eq!(status, 404, "{body}");
    assert!(body["detail"].as_str().unwrap().contains("the shard `west` has it"), "{body}");
    assert!(running.log().contains("namespaces of other shards do not run here"), "{}", running.log());

    place.put("a.yaml", "namespace: a\nshard: west\nsink: { stdout: {} }\n");
    place.put("b.yaml", "namespace: b\nshard: east\nsink: { stdout: {} }\n");
    reload(&running, 1).await;
    running.accepted("b", None, json!({"n": 1})).await;
    let (status, body) = running.write(&json!({"namespace": "a", "payload": 1})).await.unwrap();
    assert_eq!((status.as_u16(), body["code"].as_str()), (404, Some("other_shard")), "{body}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Redis server: WALFLOW_TEST_REDIS"]
async fn two_pipelines_share_a_connection() {
    let url = std::env::var("WALFLOW_TEST_REDIS").expect("WALFLOW_TEST_REDIS names a Redis server");
    let unique = std::process::id();
    let sink = |name: &str| {
        format!(
            "namespace: {name}\nsink:\n  redis:\n    use: main\n    cases: [{{ key: 'config-{unique}-{name}-{{key}}', value: '{{payload.n}}' }}]\n"
        )
    };
    let place = Place::new().pipeline("a.yaml", &sink("a")).pipeline("b.yaml", &sink("b"));
    write_config(&place, &format!("connections:\n  main: {{ redis: {{ url: '{url}' }} }}\n"));
    let running = place.start().await;
    running.accepted("a", Some("k"), json!({"n": 1})).await;
    running.accepted("b", Some("k"), json!({"n": 2})).await;
    for name in ["a", "b"] {
        until_status(&running, name, "delivered", |status| status["branches"][0]["lagRecords"] == 0).await;
    }
    let client = redis::Client::open(url).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    for (name, value) in [("a", "1"), ("b", "2")] {
        let found: String =
            redis::cmd("GETDEL").arg(format!("config-{unique}-{name}-k")).query_async(&mut connection).await.unwrap();
        assert_eq!(found, value);
    }
}

#[test]
fn config_show_says_where_each_value_came_from() {
    let place = Place::new().pipeline("a.yaml", "namespace: a\nsink: { stdout: {} }\n");
    write_config(&place, "defaults:\n  sink: { limits: { concurrency: 3 } }\n");
    let output = place.command(&["config", "show", "a"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|line| line.contains("concurrency")).unwrap();
    assert!(line.contains('3') && line.ends_with("# walflow.yaml:2 (defaults)"), "{text}");
    assert!(text.contains("# pipelines/a.yaml:1"), "{text}");
    let output = place.command(&["config", "show", "b"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
}
