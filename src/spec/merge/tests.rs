//! What a pipeline takes from walflow.yaml, and what it does not.

use std::collections::BTreeMap;

use serde_json::json;

use crate::spec::environment::Environment;
use crate::spec::shared::Shared;
use crate::spec::text::Text;
use crate::spec::{Loaded, Neighbours, load_text_with};

fn environment() -> Environment {
    Environment::new([("PASSWORD".to_owned(), "CANARY-password".to_owned())])
}

fn shared(yaml: &str) -> Shared {
    Shared::of_text(Text::new("walflow.yaml", yaml), &environment())
}

fn loaded(yaml: &str, shared: &Shared) -> Loaded {
    load_text_with(Text::new("a.yaml", yaml), Neighbours::kept(BTreeMap::new()), Some(shared), &environment())
}

const SHARED: &str = "\
connections:
  main:
    redis:
      url: \"redis://u:${PASSWORD}@r/1\"
      timeout: 2s
  other:
    redis: { url: redis://o/1 }
  bus:
    kafka: { brokers: k:9092 }
defaults:
  source:
    backlog: { size: 1GiB, age: 1d }
  sink:
    retry: { attempts: 5, give_up: 1h }
    limits: { concurrency: 3 }
";

fn shorts(loaded: &Loaded) -> Vec<String> {
    loaded.diagnostics.iter().map(crate::spec::diagnostic::Diagnostic::short).collect()
}

#[test]
fn a_pipeline_takes_a_connections_fields_and_its_own_win() {
    let shared = shared(SHARED);
    assert!(shared.diagnostics.is_empty(), "{:?}", shared.diagnostics);
    let file = loaded("namespace: a\nsink: { redis: { use: main, timeout: 9s } }\n", &shared);
    let redis = &file.value["sink"]["redis"];
    assert_eq!((&redis["url"], &redis["timeout"]), (&json!("redis://u:CANARY-password@r/1"), &json!("9s")));
    assert_eq!(redis.get("use"), None);
    assert!(!format!("{:?}", file.diagnostics).contains("CANARY"));
}

#[test]
fn a_connection_may_be_a_cluster() {
    let shared = shared("connections:\n  many: { redis: { cluster: [\"redis://a\", \"redis://b\"] } }\n");
    assert!(shared.diagnostics.is_empty(), "{:?}", shared.diagnostics);
    let file = loaded("namespace: a\nsink: { redis: { use: many, cases: [{ key: c }] } }\n", &shared);
    assert!(file.diagnostics.is_empty(), "{:?}", file.diagnostics);
    assert_eq!(file.value["sink"]["redis"]["cluster"], json!(["redis://a", "redis://b"]));
}

#[test]
fn defaults_are_merged_key_by_key_and_null_clears() {
    let yaml = "namespace: a\nsource: { backlog: { size: 2GiB } }\nsink: { stdout: {}, retry: { attempts: 1, give_up: null }, limits: null }\n";
    let file = loaded(yaml, &shared(SHARED));
    assert!(file.diagnostics.is_empty(), "{:?}", shorts(&file));
    assert_eq!(file.value["source"]["backlog"], json!({"size": "2GiB", "age": "1d"}));
    assert_eq!(file.value["sink"], json!({"stdout": {}, "retry": {"attempts": 1}}));
}

#[test]
fn defaults_of_the_sink_reach_into_every_arm() {
    let yaml =
        "namespace: a\nsink:\n  fan_out:\n    one: { stdout: {}, retry: { attempts: 1 } }\n    two: { stdout: {} }\n";
    let file = loaded(yaml, &shared(SHARED));
    assert!(file.diagnostics.is_empty(), "{:?}", shorts(&file));
    assert_eq!(file.value["sink"]["fan_out"]["one"]["retry"], json!({"attempts": 1, "give_up": "1h"}));
    assert_eq!(file.value["sink"]["retry"], json!({"attempts": 5, "give_up": "1h"}));
}

#[test]
fn a_kind_or_a_delay_replaces_that_of_the_defaults() {
    let shared =
        shared("defaults:\n  sink: { file: { path: out/x }, ordering: none }\n  delay: { for: 5s, max: 1d }\n");
    let file = loaded("namespace: a\ndelay: { until: payload.at }\nsink: { stdout: }\n", &shared);
    assert!(file.diagnostics.is_empty(), "{:?} {:?}", shorts(&file), shared.diagnostics);
    assert_eq!(file.value["sink"], json!({"stdout": {}, "ordering": "none"}));
    assert_eq!(file.value["delay"], json!({"until": "payload.at", "max": "1d"}));
}

#[test]
fn a_region_takes_a_connection_of_its_own() {
    let yaml = "namespace: a\nreplicate: { regions: { us: { use: main }, eu: { use: nowhere } } }\nsink: { redis: { use: other } }\n";
    let file = loaded(yaml, &shared(SHARED));
    assert_eq!(file.value["replicate"]["regions"]["us"]["timeout"], "2s");
    assert_eq!(file.value["sink"]["redis"]["url"], "redis://o/1");
    assert!(
        shorts(&file)[0].contains("a.yaml:2:55: error[WF0420]: there is no connection 'nowhere'"),
        "{:?}",
        shorts(&file)
    );
}

#[test]
fn an_unknown_connection_and_one_of_another_kind_are_told_where_they_are_used() {
    let file = loaded("namespace: a\nsink: { redis: { use: mian } }\n", &shared(SHARED));
    let found = &file.diagnostics[0];
    assert_eq!((found.code.as_str(), found.line, found.column), ("WF0420", 2, 23));
    assert_eq!(found.help.as_deref(), Some("did you mean 'main'? the redis connections are main, other"));
    let file = loaded("namespace: a\nsink: { redis: { use: bus } }\n", &shared(SHARED));
    assert_eq!(file.diagnostics[0].message, "the connection 'bus' is of the kind kafka, not redis");
}

#[test]
fn what_is_wrong_in_walflow_yaml_is_told_at_its_line_there() {
    let yaml = "connections:\n  main:\n    redis: { url: redis://r/1, timeuot: 2s }\ndefaults:\n  sink: { retry: { attempts: many } }\n  namespace: x\nconections: {}\n";
    let shared = shared(yaml);
    let found: Vec<String> = shared
        .diagnostics
        .iter()
        .map(|found| format!("{}:{} {} {:?}", found.line, found.column, found.code, found.help))
        .collect();
    assert_eq!(found.len(), 4, "{found:#?}");
    assert!(found[0].starts_with("3:32 WF0201") && found[0].contains("timeout"), "{found:#?}");
    assert!(found[1].starts_with("5:30 WF0204") && found[2].starts_with("6:3 WF0202"), "{found:#?}");
    assert!(found[3].starts_with("7:1 WF0201") && found[3].contains("connections"), "{found:#?}");
    let file = loaded("namespace: a\nsink: { redis: { use: main } }\n", &shared);
    assert!(
        file.diagnostics.iter().any(|found| &*found.file == "walflow.yaml" && found.line == 3),
        "{:?}",
        shorts(&file)
    );
}

#[test]
fn what_a_pipeline_does_not_use_is_not_kept_with_it() {
    let shared = shared(SHARED);
    let file = loaded("namespace: a\nsink: { redis: { use: other } }\n", &shared);
    let kept = file.text.behind().unwrap();
    assert!(!kept.as_str().contains("PASSWORD") && !kept.as_str().contains("brokers"), "{}", kept.as_str());
    assert_eq!(kept.line(7), "    redis: { url: redis://o/1 }");
    let again =
        loaded("namespace: a\nsink: { redis: { use: other } }\n", &Shared::of_text(kept.clone(), &environment()));
    assert_eq!((&again.value, again.text.behind().unwrap().as_str()), (&file.value, kept.as_str()));
}

#[test]
fn the_services_own_settings_are_not_kept_with_a_pipeline() {
    for yaml in [
        "api_keys: [CANARY]\nconnections:\n  main: { redis: { url: redis://m/1 } }\n",
        // The anchor stands in a part that would not be kept.
        "api_keys:\n  - CANARY\nconnections:\n  other: { redis: &one { url: redis://m/1 } }\n  main: { redis: *one }\n",
    ] {
        let file = loaded("namespace: a\nsink: { redis: { use: main } }\n", &shared(yaml));
        assert_eq!(file.value["sink"]["redis"]["url"], "redis://m/1");
        let kept = file.text.behind().unwrap().as_str();
        assert!(!kept.contains("CANARY") && kept.contains("redis://m/1"), "{kept}");
    }
}

#[test]
fn connections_cannot_make_a_small_file_a_large_one() {
    let list = "x, ".repeat(3000);
    let shared = shared(&format!("connections: {{ big: {{ kafka: {{ brokers: [{list}] }} }} }}\n"));
    let arms: Vec<String> = (0..50).map(|n| format!("    a{n}: {{ kafka: {{ use: big }} }}\n")).collect();
    let arms = arms.concat();
    let file = loaded(&format!("namespace: a\nsink:\n  fan_out:\n{arms}"), &shared);
    assert!(file.diagnostics.iter().any(|found| found.code.as_str() == "WF0105"), "{:?}", shorts(&file).first());
}
