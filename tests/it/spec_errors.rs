//! What an author reads when a pipeline file is wrong: every code once, all problems of a file at once, no secret ever.
//!
//! The texts stand in `spec_errors.txt`; `WALFLOW_REGENERATE=1` writes them anew, for a person to read the difference.

#![expect(clippy::unwrap_used, clippy::format_push_string, reason = "a test may fail where it stands")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use walflow::pipeline::{DryRun, dry_run, dry_run_with};
use walflow::spec::code::Code;
use walflow::spec::environment::Environment;
use walflow::spec::shared::Shared;

/// Title, environment, and files by name.
type Case = (&'static str, &'static [(&'static str, &'static str)], &'static [(&'static str, &'static str)]);

const CASES: &[Case] = &[
    (
        "many problems of one file, all at once",
        &[],
        &[(
            "orders.yaml",
            r#"namespace: orders
owner: 42
source:
  backlog: { size: 20GB, on_full: dorp }
  key: payload.id
delay: { for: 5 seconds, jitter: 2 s }
transform:
  - filter: 'payload.amount >'
  - inline: |
      let total = 0;
      for item in payload.items {
        total += item.price
      }}
  - script: scripts/none.rhai
sink:
  http: { url: "http://127.0.0.1/{payload.x}", methd: PUT }
  retires: { attempts: 3 }
  limits: { rate: 500, concurrency: 0 }
"#,
        )],
    ),
    (
        "keys at the wrong level",
        &[],
        &[(
            "levels.yaml",
            "namespace: levels\nretry: { attempts: 3 }\nsink:\n  file: { path: out/a.ndjson }\n  transform: []\n  attempts: 3\n  record: 1MiB\n",
        )],
    ),
    (
        "settings of a source",
        &[],
        &[
            (
                "queue.yaml",
                "namespace: queue\nsource: { sqs: { queue: q } }\nsink:\n  fan_out: { a: { stdout: {} }, b: { stdout: {} } }\n",
            ),
            (
                "streams.yaml",
                "namespace: streams\nsource: { redis: { url: 'http://h', streams: 0 } }\nsink: { stdout: {} }\n",
            ),
            (
                "topic.yaml",
                "namespace: topic\nsource: { kafka: { brokers: h, topic: t }, shelf: { embedded: {} } }\nsink: { stdout: {} }\n",
            ),
            (
                "start.yaml",
                "namespace: start\nsource:\n  kafka: { brokers: 'h:1', topic: t, start: yesterday }\nsink: { stdout: {} }\n",
            ),
        ],
    ),
    (
        "missing keys",
        &[],
        &[
            ("missing.yaml", "description: nothing else\n"),
            ("route.yaml", "namespace: route\nsink:\n  route:\n    - stdout: {}\n"),
        ],
    ),
    (
        "the environment",
        &[("SET", "CANARY-of-the-environment")],
        &[(
            "environment.yaml",
            r#"namespace: environment
owner: ${UNSET}
source:
  limits: { record: "${SET}" }
  backlog: { on_full: "${SET}" }
sink:
  redis:
    url: "redis://${REDIS_HOST:?say where Redis is}/1"
    timeout: "${odd-name}"
    cases: [{ key: "a:{key}", value: "${file:/no/such/file}" }]
"#,
        )],
    ),
    (
        "a literal secret is masked",
        &[],
        &[(
            "literal.yaml",
            "namespace: literal\nsink:\n  redis: { url: \"redis://u:CANARY-literal@h/1\", tmeout: 5s }\n",
        )],
    ),
    (
        "not YAML",
        &[],
        &[
            ("a.yaml", "namespace: a\nsink: { stdout: {}\n"),
            ("b.yaml", "namespace: b\n\tsink: x\n"),
            ("c.yaml", "namespace: c\nsource:\n  key: {key}-x\n"),
        ],
    ),
    (
        "references without quotes",
        &[],
        &[("quotes.yaml", "namespace: quotes\nsink:\n  file:\n    path: {payload.kind}\n")],
    ),
    (
        "documents, duplicates and tags",
        &[],
        &[
            ("a-empty.yaml", "# nothing yet\n"),
            ("b-two.yaml", "namespace: one\nsink: { stdout: {} }\n---\nnamespace: two\n"),
            ("c-twice.yaml", "namespace: twice\nsink:\n  stdout: {}\n  ordering: key\n  ordering: none\n"),
            ("d-tag.yaml", "namespace: tag\nowner: !team a\nsink: { stdout: {} }\n"),
        ],
    ),
    (
        "a bomb and a loop",
        &[],
        &[
            (
                "bomb.yaml",
                "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n",
            ),
            ("loop.yaml", "a: &a\n  b: *a\n"),
        ],
    ),
    (
        "one namespace in two files",
        &[],
        &[("a.yaml", "namespace: same\nsink: { stdout: {} }\n"), ("b.yaml", "namespace: same\nsink: { stdout: {} }\n")],
    ),
    (
        "bad names",
        &[],
        &[(
            "names.yaml",
            "namespace: My_Space\nreplicate: { regions: { EU: {} } }\nsink: { fan_out: { 'a b': { stdout: {} } } }\n",
        )],
    ),
    (
        "one kind each",
        &[],
        &[(
            "kinds.yaml",
            "namespace: kinds\ntransform:\n  - filter: 'true'\n    script: x.rhai\n  - {}\nsink:\n  stdout: {}\n  file: { path: out/a }\n",
        )],
    ),
    (
        "arms of a route",
        &[],
        &[(
            "route.yaml",
            r#"namespace: route
sink:
  route:
    - { name: all, stdout: {} }
    - { name: rest, when: 'true', redis: { url: "redis://h/1", cases: [{ key: "a:{key}" }] } }
    - { name: rest, redis: { url: "redis://h/1", cases: [{ key: "a:{key}" }] } }
  otherwise: drop
"#,
        )],
    ),
    (
        "overrides of regions",
        &[],
        &[
            (
                "one.yaml",
                "namespace: one\nreplicate:\n  regions:\n    us: { urll: \"redis://us\" }\n    eu: { timeout: 5 apples, url: \"redis://eu\" }\n    ap: { redis: { url: \"redis://ap\" } }\nsink: { redis: { cases: [{ key: \"a:{key}\" }] } }\n",
            ),
            (
                "several.yaml",
                "namespace: several\nreplicate:\n  regions:\n    us: { cahce: { path: out/us } }\nsink: { fan_out: { cache: { file: { path: out/x } }, screen: { stdout: {} } } }\n",
            ),
        ],
    ),
    (
        "delays and bounds",
        &[],
        &[
            ("a.yaml", "namespace: a\ndelay: { for: 5s, until: 'payload.at' }\nsink: { stdout: {} }\n"),
            (
                "b.yaml",
                "namespace: b\ndelay: { for: 2d, max: 1d }\nsource: { limits: { record: 17MiB, in_flight: 1MiB }, backlog: { size: 1MiB } }\nsink: { stdout: {}, batch: { records: 20000 } }\n",
            ),
        ],
    ),
    (
        "names of the past",
        &[],
        &[(
            "past.yaml",
            "namespace: past\nsink: { fan_out: { a: { was: b, stdout: {} }, b: { stdout: {} } } }\nretired: { a: drop }\n",
        )],
    ),
    (
        "settings without an effect",
        &[],
        &[("effect.yaml", "namespace: effect\nsink:\n  stdout: {}\n  otherwise: drop\n  limits: { burst: 5 }\n")],
    ),
    (
        "a number that is far too large",
        &[],
        &[
            ("refused.yaml", "namespace: refused\ndelay: { for: -5 }\nsink: { stdout: {} }\n"),
            ("large.yaml", "namespace: large\nsink: { stdout: {}, retry: { attempts: 5000000000 } }\n"),
        ],
    ),
    (
        "settings of sinks that cannot work",
        &[],
        &[(
            "sinks.yaml",
            r#"namespace: sinks
replicate: { regions: { eu: { hook: { url: "ftp://eu" } } } }
sink:
  fan_out:
    files: { file: { path: "{payload.kind}/x.ndjson" } }
    cache:
      redis:
        url: "http://127.0.0.1"
        cases: [{ command: set, key: "{payload.k" }]
    hook: { http: { url: "http://127.0.0.1/x", verdicts: { "999": ok } } }
  dead_letters: { also: { file: { path: "{key}" } } }
"#,
        )],
    ),
    (
        "a schema that is none",
        &[],
        &[("schema.yaml", "namespace: schema\nsource: { schema: none.json }\nsink: { stdout: {} }\n")],
    ),
    (
        "a script file with an error",
        &[],
        &[
            ("script.yaml", "namespace: script\ntransform: [{ script: broken.rhai }]\nsink: { stdout: {} }\n"),
            ("broken.rhai", "// fine\nlet a = 1;\nlet b = a +;\n"),
        ],
    ),
    (
        "connections and defaults",
        &[],
        &[
            (
                "walflow.yaml",
                "connections:\n  main: { redis: { url: redis://r/1, timeuot: 1s } }\n  bus: { kafka: { brokers: k }, redis: {} }\ndefaults:\n  namespace: x\n  sink: { retry: { attempts: many } }\nconections: {}\n",
            ),
            ("uses.yaml", "namespace: uses\nsink: { redis: { use: mian } }\n"),
            ("kind.yaml", "namespace: kind\nsource: { kafka: { use: main, topic: t } }\nsink: { stdout: {} }\n"),
        ],
    ),
    (
        "settings of the service",
        &[("PORT_NUMBER", "http")],
        &[
            (
                "walflow.yaml",
                "lisen: 0.0.0.0:3000\nlisten: localhost\nport: ${PORT_NUMBER}\nshutdown-timeout: 5s\nshutdown_timeout: soon\npaths: { a: 1 }\nstrict: \"yes\"\ndata: ${DATA_FOLDER}\nlog_format: jsn\nlog_level: debgu\nretry: {}\nsink: { stdout: {} }\napi_keys:\n  - [CANARY]\n",
            ),
            ("fine.yaml", "namespace: fine\nsink: { stdout: {} }\n"),
        ],
    ),
    (
        "bounds of what others keep",
        &[],
        &[
            ("walflow.yaml", "defaults:\n  source: { backlog: { size: 1GiB } }\n"),
            (
                "kafka.yaml",
                "namespace: kafka\nsource: { kafka: { brokers: 'k:9092', topic: t }, backlog: { size: 2GiB } }\nsink: { stdout: {} }\n",
            ),
            (
                "queue.yaml",
                "namespace: queue\nsource:\n  sqs: { queue: q, region: eu-west-1 }\n  backlog: { age: 1d }\nsink: { stdout: {} }\n",
            ),
            (
                "quiet.yaml",
                "namespace: quiet\nsource: { kafka: { brokers: 'k:9092', topic: t } }\nsink: { stdout: {} }\n",
            ),
            (
                "streams.yaml",
                "namespace: streams\nsource: { redis: { url: redis://r/1 }, backlog: { size: 1GiB, age: 1d } }\nsink: { stdout: {} }\n",
            ),
            (
                "drops.yaml",
                "namespace: drops\nsource: { redis: { url: redis://r/1 }, backlog: { on_full: drop, age: 1d }, idempotency: { max: 5 } }\nsink: { stdout: {} }\n",
            ),
        ],
    ),
    ("a connection without walflow.yaml", &[], &[("alone.yaml", "namespace: alone\nsink: { redis: { use: main } }\n")]),
];

fn run(environment: &[(&str, &str)], files: &[(&str, &str)]) -> (DryRun, String) {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    let environment =
        Environment::new(environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    let config = folder.path().join("walflow.yaml");
    let shared = config.is_file().then(|| Shared::read(&config, &environment));
    let found = dry_run_with(&[folder.path().to_path_buf()], shared.as_ref(), &environment);
    let text = found.problems_text(false).replace(&format!("{}/", folder.path().display()), "");
    (found, text)
}

#[test]
fn every_problem_reads_as_it_is_written_down() {
    let mut shown = String::new();
    for (title, environment, files) in CASES {
        let (found, text) = run(environment, files);
        assert!(!found.diagnostics.is_empty(), "{title}");
        // What the script engine says about an error is its own; here its place counts.
        let lines = text.lines().map(|line| if line.starts_with("error[WF0501]") { "error[WF0501]: …" } else { line });
        let text = lines.collect::<Vec<_>>().join("\n");
        shown.push_str(&format!("=== {title}\n\n{text}\n\n"));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/spec_errors.txt");
    if std::env::var_os("WALFLOW_REGENERATE").is_some() {
        fs::write(&path, &shown).unwrap();
    }
    let wanted = fs::read_to_string(&path).unwrap_or_default();
    for (at, (wanted, shown)) in wanted.lines().zip(shown.lines()).enumerate() {
        assert_eq!(shown, wanted, "line {} of {}", at + 1, path.display());
    }
    assert_eq!(shown.len(), wanted.len());
}

#[test]
fn every_code_is_seen_at_least_once() {
    let seen: BTreeSet<Code> = CASES
        .iter()
        .flat_map(|(_, environment, files)| run(environment, files).0.diagnostics)
        .map(|found| found.code)
        .collect();
    // Those that need a file which cannot stand in a list of texts are seen by the unit tests of `spec::load`, and that of a reload by `reload`.
    let elsewhere = [Code::Unreadable, Code::TooLarge, Code::NotUtf8, Code::NoFiles, Code::NeedsRestart];
    let missing: Vec<&Code> =
        Code::ALL.iter().filter(|code| !seen.contains(code) && !elsewhere.contains(code)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn no_output_holds_a_secret() {
    let yaml = r#"namespace: secrets
owner: team
replicate: { regions: { us: { url: "http://u:${S1}@h/${S2}?k=${S3}" }, eu: { url: "http://u:CANARY-4@h/x?key=CANARY-5" } } }
sink:
  http:
    url: "http://h"
    headers: { Authorization: "Bearer ${S1}", X-Key: CANARY-6 }
    body: { a: "${S2}" }
    sign: { secret: "${S3}" }
    proxy: "http://u:${S1}@proxy"
  dead_letters: { also: { file: { path: "out/${S2}.ndjson" } } }
"#;
    let values = [("S1", "CANARY-1"), ("S2", "CANARY-2"), ("S3", "whsec_CANARYCANARYCANARYCANARYCANARYCA")];
    for yaml in [
        yaml.to_owned(),
        yaml.replace("owner: team", "owner: []"),
        yaml.replace("secret:", "secrt:"),
        yaml.replace("/${S2}", "/${S2}/{payload."),
    ] {
        let (found, text) = run(&values, &[("secrets.yaml", &yaml)]);
        let all = format!("{text}{}{}{}", found.plans_text(), found.json(), found.problems_short());
        assert!(!all.contains("CANARY"), "{all}");
    }
}

#[test]
fn the_pipelines_that_come_along_are_right() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = dry_run(&[folder.join("pipelines")], &Environment::default());
    assert!(found.diagnostics.is_empty(), "{}", found.problems_text(false));
    assert_eq!((found.plans.len(), found.exit_code()), (5, 0));
    assert!(found.plans.iter().all(|plan| !plan.tests.is_empty()));
}

#[test]
fn a_file_of_a_hundred_megabytes_is_refused_unread() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("big.yaml");
    fs::File::create(&path).unwrap().set_len(100 << 20).unwrap();
    let found = dry_run(&[path], &Environment::default());
    assert_eq!((found.diagnostics[0].code, found.exit_code()), (Code::TooLarge, 78));
}

/// A mebibyte of mistakes is told in a moment, and in words that a person can read.
#[test]
fn a_file_of_nothing_but_mistakes_has_an_end() {
    let keys = (0..9_000).map(|n| format!("wrong{n}-{}: 1", "x".repeat(80))).collect::<Vec<_>>().join(", ");
    let references = "\"${NONE}${odd-one}\", ".repeat(9_000);
    let long = format!("\"{}\": 1", "y".repeat(500_000));
    for yaml in [
        format!("{{ namespace: a, {keys} }}"),
        format!("namespace: a\nsink: {{ redis: {{ cases: [{references}] }} }}"),
        format!("namespace: a\n{long}\nsink: {{ stdout: {{}} }}"),
    ] {
        let (found, text) = run(&[], &[("x.yaml", &yaml)]);
        assert!((1..=101).contains(&found.diagnostics.len()), "{}", found.diagnostics.len());
        assert!(text.len() < 101 * 2_000, "{}", text.len());
    }
}

/// Text made of the words that pipeline files are made of, in any order.
fn odd_yaml() -> impl Strategy<Value = String> {
    let words = prop::sample::select(vec![
        "namespace",
        "sink",
        "source",
        "transform",
        "replicate",
        "regions",
        "delay",
        "for",
        "stdout",
        "file",
        "http",
        "redis",
        "cases",
        "route",
        "fan_out",
        "name",
        "when",
        "limits",
        "rate",
        "tests",
        "retired",
        "was",
        ": ",
        ":\n  ",
        "\n",
        "- ",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "'",
        "\"",
        "|\n   ",
        "${A}",
        "${",
        "}",
        "{payload.x}",
        "{key}",
        "&a ",
        "*a",
        "<<",
        "!x ",
        "5s",
        "1GiB",
        "true",
        "~",
        "-1",
        "1e999",
        "\t",
        "é",
        "\u{0}",
        "\r\n",
        "#",
        "? ",
        "  ",
        "    ",
        "a",
        "...",
        "---\n",
        "%YAML 1.2\n",
        "\\",
        "\u{feff}",
    ]);
    prop::collection::vec(words, 0..60).prop_map(|words| words.concat())
}

/// A file that is right but for one line.
fn nearly_right() -> impl Strategy<Value = String> {
    let files: Vec<String> =
        CASES.iter().flat_map(|(_, _, files)| files.iter().map(|(_, text)| (*text).to_owned())).collect();
    (prop::sample::select(files), any::<prop::sample::Index>(), any::<prop::sample::Index>(), "[ -~\n]{0,4}").prop_map(
        |(text, from, to, with)| {
            let mut chars: Vec<char> = text.chars().collect();
            let (from, to) = (from.index(chars.len()), to.index(chars.len()));
            chars.splice(from.min(to)..from.max(to).min(from.min(to) + 6), with.chars());
            chars.into_iter().collect()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_it_panic(text in prop_oneof![odd_yaml(), nearly_right(), any::<String>()]) {
        let (found, shown) = run(&[("A", "{payload.y}: [1")], &[("x.yaml", &text)]);
        prop_assert!(!shown.is_empty());
        prop_assert!(found.exit_code() == 78 || !found.plans.is_empty());
        for diagnostic in &found.diagnostics {
            prop_assert!(diagnostic.line <= text.lines().count() + 1);
        }
    }
}
