//! The docs of what scripts can call: for each function what it takes and gives, an example, and when it is an error.
//!
//! `FUNCTIONS.md` is rendered from this table. Tests hold it to the functions that are registered, and run every
//! example and every error.

use std::fmt::Write as _;

/// One function's entry.
struct Entry {
    /// Its name and the number of its arguments are those registered.
    signature: &'static str,
    does: &'static str,
    /// An expression, or statements where it gives nothing.
    example: &'static str,
    gives: Gives,
    /// A call that is an error, and what the error says; `None` = there is none but a wrong type.
    error: Option<(&'static str, &'static str)>,
}

/// What an example comes to, for the record that the head of the page describes.
enum Gives {
    /// A value, as JSON.
    Value(&'static str),
    /// The record ends here.
    Dropped,
    /// The record's error, with this reason.
    Fault(&'static str),
    /// Children with these payloads.
    Children(&'static [&'static str]),
}

use Gives::{Children, Dropped, Fault, Value};

const HEAD: &str = r#"# Functions for scripts and expressions

Generated from the code; see `src/transform/functions/table.rs`. Every example and every error here is run by a test.

The examples see a record written at `2021-01-01T00:00:00.000Z` with the payload `{"items":["a","b"]}`, and a stage with
`env: [STAGE, UNSET]`, of which `STAGE` is `test`. A result is shown as JSON: `null` is `()` in a script.

- An **error** ends the script, unless `try { … } catch { … }` takes it; the record becomes a dead letter with the
  error, the stage and the line, and is not tried again. `drop()`, `fail()` and the bounds cannot be caught.
- A call with a **wrong type** or number of arguments is an error of that kind: `Function not found`.
- **The same record gives the same** on every retry, after a restart and in every region, with one exception: `wall_clock()`.
  Branches that are near each other in the log share one run of the stages before the regions, and then all of them have
  its time; a branch that lags runs the stages itself and has another.
- **Bounds**: 100 ms, 32 MiB, 250,000 steps; a payload as `source.limits.record` says, a key of 1,024 bytes, headers of 16 KiB.

| function | what it gives | example | error |
|---|---|---|---|
"#;

/// Every function, in the order of the docs.
const TABLE: &[Entry] = &[
    Entry {
        signature: "drop()",
        does: "Ends the script and drops the record, counted. Cannot be caught.",
        example: "drop();",
        gives: Dropped,
        error: None,
    },
    Entry {
        signature: "emit(child: map)",
        does: "Adds a child `#{payload, key?, headers?}`; the children replace the record, at most 1,000.",
        example: "for item in payload.items { emit(#{payload: item}); }",
        gives: Children(&["\"a\"", "\"b\""]),
        error: Some(("emit(#{key: \"k\"})", "emit needs a map with a `payload`")),
    },
    Entry {
        signature: "fail(why: text)",
        does: "Ends the script; the record becomes a dead letter with this reason. Cannot be caught.",
        example: "fail(\"no customer\");",
        gives: Fault("no customer"),
        error: None,
    },
    Entry {
        signature: "now() -> text",
        does: "When the record was accepted: RFC 3339, UTC, milliseconds. The same on every retry.",
        example: "now()",
        gives: Value("\"2021-01-01T00:00:00.000Z\""),
        error: None,
    },
    Entry {
        signature: "wall_clock() -> text",
        does: "The real time: differs between retries.",
        example: "wall_clock() >= now()",
        gives: Value("true"),
        error: None,
    },
    Entry {
        signature: "uuid() -> text",
        does: "A UUID drawn from the record's id and the number of the call: the same on every retry.",
        example: "uuid()",
        gives: Value("\"9267a73b-c484-4783-bb23-9ad76f9048a6\""),
        error: None,
    },
    Entry {
        signature: "random() -> float",
        does: "From 0 up to, not including, 1; drawn as `uuid`.",
        example: "random()",
        gives: Value("0.5145190219006088"),
        error: None,
    },
    Entry {
        signature: "random(low: int, high: int) -> int",
        does: "From `low` to `high`, both included; drawn as `uuid`.",
        example: "random(1, 6)",
        gives: Value("5"),
        error: Some(("random(6, 1)", "the first must not be the greater")),
    },
    Entry {
        signature: "sha256(value) -> text",
        does: "SHA-256 in hex of a text, or of another value's JSON.",
        example: "sha256(\"a\")",
        gives: Value("\"ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb\""),
        error: Some(("sha256(|x| x)", "is no JSON")),
    },
    Entry {
        signature: "sha512(value) -> text",
        does: "SHA-512 in hex of a text, or of another value's JSON.",
        example: "sha512(\"a\").sub_string(0, 16)",
        gives: Value("\"1f40fc92da241694\""),
        error: Some(("sha512(|x| x)", "is no JSON")),
    },
    Entry {
        signature: "hmac_sha256(key: text, value) -> text",
        does: "HMAC-SHA-256 in hex of a text, or of another value's JSON.",
        example: "hmac_sha256(\"k\", \"a\")",
        gives: Value("\"78da91511e675587f5b9df78bedebaf5560da2abb88162ee875dcdf744951d9e\""),
        error: Some(("hmac_sha256(\"k\", |x| x)", "is no JSON")),
    },
    Entry {
        signature: "base64_encode(text: text) -> text",
        does: "Standard alphabet with padding.",
        example: "base64_encode(\"é?>\")",
        gives: Value("\"w6k/Pg==\""),
        error: None,
    },
    Entry {
        signature: "base64_decode(text: text) -> text",
        does: "The reverse.",
        example: "base64_decode(\"w6k/Pg==\")",
        gives: Value("\"é?>\""),
        error: Some(("base64_decode(\"/w==\")", "what is in the base64 is no UTF-8 text")),
    },
    Entry {
        signature: "base64url_encode(text: text) -> text",
        does: "URL-safe alphabet without padding.",
        example: "base64url_encode(\"é?>\")",
        gives: Value("\"w6k_Pg\""),
        error: None,
    },
    Entry {
        signature: "base64url_decode(text: text) -> text",
        does: "The reverse.",
        example: "base64url_decode(\"w6k_Pg\")",
        gives: Value("\"é?>\""),
        error: Some(("base64url_decode(\"w6k/Pg==\")", "no base64")),
    },
    Entry {
        signature: "json_parse(text: text) -> value",
        does: "Reads JSON, nested at most 64 levels.",
        example: "json_parse(\"{\\\"a\\\": [1, null]}\")",
        gives: Value("{\"a\":[1,null]}"),
        error: Some(("json_parse(\"{\")", "no JSON: EOF")),
    },
    Entry {
        signature: "json_format(value) -> text",
        does: "Writes compact JSON; fields in alphabetical order.",
        example: "json_format(#{b: 1, a: [\"x\"]})",
        gives: Value("\"{\\\"a\\\":[\\\"x\\\"],\\\"b\\\":1}\""),
        error: Some(("json_format(0.0 / 0.0)", "NaN is no JSON number")),
    },
    Entry {
        signature: "regex_match(text: text, pattern: text) -> bool",
        does: "Whether the pattern matches anywhere. Linear time.",
        example: "regex_match(\"order-17\", `^order-\\d+$`)",
        gives: Value("true"),
        error: Some(("regex_match(\"a\", \"(\")", "no pattern: ")),
    },
    Entry {
        signature: "regex_find(text: text, pattern: text) -> text | ()",
        does: "The first match, or `()`.",
        example: "regex_find(\"order-17\", `\\d+`)",
        gives: Value("\"17\""),
        error: Some(("regex_find(\"a\", \"[\")", "no pattern: ")),
    },
    Entry {
        signature: "regex_captures(text: text, pattern: text) -> array",
        does: "The first match and its groups, or an empty array.",
        example: "regex_captures(\"order-17\", `(\\w+)-(\\d+)`)",
        gives: Value("[\"order-17\",\"order\",\"17\"]"),
        error: Some(("regex_captures(\"a\", `(?=a)`)", "no pattern: ")),
    },
    Entry {
        signature: "regex_replace(text: text, pattern: text, with: text) -> text",
        does: "Replaces every match; `$1` or `${name}` is a group.",
        example: "regex_replace(\"a@b.c\", \"^[^@]+\", \"***\")",
        gives: Value("\"***@b.c\""),
        error: Some(("regex_replace(\"a\", `\\8`, \"\")", "no pattern: ")),
    },
    Entry {
        signature: "time_parse(text: text, format: text) -> text",
        does: "Reads a time by a strftime format and gives RFC 3339; UTC where no offset is read.",
        example: "time_parse(\"24.11.2026 08:00\", \"%d.%m.%Y %H:%M\")",
        gives: Value("\"2026-11-24T08:00:00.000Z\""),
        error: Some(("time_parse(\"soon\", \"%Y\")", "failed to parse year")),
    },
    Entry {
        signature: "time_format(time: text, format: text) -> text",
        does: "Writes an RFC 3339 time by a strftime format, in UTC.",
        example: "time_format(\"2026-11-24T08:00:00+01:00\", \"%Y-%m-%d %H:%M\")",
        gives: Value("\"2026-11-24 07:00\""),
        error: Some(("time_format(\"yesterday\", \"%Y\")", "`yesterday` is no time like 2026-11-24T08:00:00Z")),
    },
    Entry {
        signature: "time_add(time: text, by) -> text",
        does: "Adds seconds (a number) or a duration such as `\"5m\"` or `\"-1h30m\"`.",
        example: "time_add(now(), \"-1h30m\")",
        gives: Value("\"2020-12-31T22:30:00.000Z\""),
        error: Some(("time_add(now(), \"soon\")", "soon")),
    },
    Entry {
        signature: "time_diff(later: text, earlier: text) -> float",
        does: "The seconds between two times.",
        example: "time_diff(\"2021-01-01T00:00:01.5Z\", now())",
        gives: Value("1.5"),
        error: Some(("time_diff(now(), \"\")", "is no time like")),
    },
    Entry {
        signature: "time_unix(time: text) -> int",
        does: "Whole seconds since 1970.",
        example: "time_unix(now())",
        gives: Value("1609459200"),
        error: Some(("time_unix(\"1609459200\")", "is no time like")),
    },
    Entry {
        signature: "time_from_unix(seconds) -> text",
        does: "The time so many seconds after 1970.",
        example: "time_from_unix(1609459200.25)",
        gives: Value("\"2021-01-01T00:00:00.250Z\""),
        error: Some(("time_from_unix(1e300)", "is no number of seconds")),
    },
    Entry {
        signature: "redact(value) -> text",
        does: "`***`, whatever the value; `()` stays `()`.",
        example: "redact(#{card: 4111}) + redact(\"secret\")",
        gives: Value("\"******\""),
        error: None,
    },
    Entry {
        signature: "redact(text: text, keep: int) -> text",
        does: "`***` and the last `keep` letters, if at least twice as many are hidden.",
        example: "[redact(\"4111222233334444\", 4), redact(\"short\", 4)]",
        gives: Value("[\"***4444\",\"***\"]"),
        error: None,
    },
    Entry {
        signature: "env(name: text) -> text | ()",
        does: "An environment variable that the stage's `env:` list names; `()` if it is not set.",
        example: "[env(\"STAGE\"), env(\"UNSET\")]",
        gives: Value("[\"test\",null]"),
        error: Some(("env(\"HOME\")", "env(\"HOME\") is not allowed here: add HOME to the stage's `env:` list")),
    },
];

/// Every function with its signature, an example and its errors, as a page in Markdown.
pub fn functions_table() -> String {
    let mut out = String::from(HEAD);
    for Entry { signature, does, example, gives, error } in TABLE {
        let gives = match gives {
            Value(json) => code(json),
            Dropped => "the record is dropped".to_owned(),
            Fault(why) => format!("a dead letter: {why}"),
            Children(payloads) => {
                format!("children {}", payloads.iter().map(|payload| code(payload)).collect::<Vec<_>>().join(", "))
            }
        };
        let error = error.map_or_else(String::new, |(call, says)| match says.trim_end_matches([':', ' ']) {
            "" => code(call),
            says => format!("{}: {}", code(call), says.replace('|', "\\|")),
        });
        let (signature, does, example) = (code(signature), does.replace('|', "\\|"), code(example));
        let _: std::fmt::Result = writeln!(out, "| {signature} | {does} | {example} → {gives} | {error} |");
    }
    out
}

/// Code within a table's cell.
fn code(text: &str) -> String {
    let text = text.replace('|', "\\|");
    if text.contains('`') { format!("`` {text} ``") } else { format!("`{text}`") }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Arc;

    use rhai::Engine;
    use serde_json::Value as Json;

    use super::*;
    use crate::clock::Clock;
    use crate::record::Record;
    use crate::testing::{NEW_YEAR, record};
    use crate::transform::{Compiler, Event, Outcome, Place, StageKind, StageSource};

    #[test]
    fn the_table_that_is_checked_in_is_that_of_the_code() {
        crate::testing::checked_in("src/transform/FUNCTIONS.md", &functions_table());
    }

    /// The name in a signature and how many arguments it takes.
    fn shape(signature: &str) -> (String, usize) {
        let (name, rest) = signature.split_once('(').unwrap();
        let arguments = rest.split_once(')').unwrap().0;
        let count = arguments.split(',').filter(|argument| !argument.trim().is_empty()).count();
        (name.trim().to_owned(), count)
    }

    #[test]
    fn the_table_names_what_is_registered_and_nothing_else() {
        let mut engine = Engine::new_raw();
        super::super::register(&mut engine);
        let registered: BTreeSet<_> = engine.gen_fn_signatures(false).iter().map(|line| shape(line)).collect();
        let listed: BTreeSet<_> = TABLE.iter().map(|entry| shape(entry.signature)).collect();
        assert_eq!(registered, listed);
        assert!(listed.len() > 25, "the signatures were not read");
    }

    /// Runs a text on the record of the page's head.
    fn run(text: &str) -> Result<Outcome, String> {
        let variables = [("STAGE".to_owned(), "test".to_owned()), ("HOME".to_owned(), "/".to_owned())];
        let compiler = Compiler::new(Clock::manual(NEW_YEAR), BTreeMap::from(variables));
        let stage = StageSource {
            name: "example".into(),
            kind: StageKind::Script,
            text: text.into(),
            place: Place { file: "example".into(), line: 1, column: 1 },
            env: vec!["STAGE".to_owned(), "UNSET".to_owned()],
        };
        let chain = compiler.within(&"orders".parse().unwrap(), 1 << 16).stages(&[stage]).unwrap();
        let record = Record { key: Some("k".into()), ..record(r#"{"items":["a","b"]}"#) };
        chain.run(Event::original(Arc::new(record))).map_err(|fault| fault.message.into())
    }

    fn payloads(outcome: Result<Outcome, String>) -> Vec<Json> {
        match outcome.unwrap() {
            Outcome::Deliver(events) => events.iter().map(|event| event.json().unwrap().clone()).collect(),
            Outcome::Drop(_) => Vec::new(),
        }
    }

    #[test]
    fn every_example_gives_what_it_says() {
        for Entry { signature, example, gives, .. } in TABLE {
            let name = signature.split_once('(').unwrap().0;
            assert!(example.contains(&format!("{name}(")), "{signature}: the example shows something else");
            let json = |text: &&str| serde_json::from_str::<Json>(text).unwrap();
            match gives {
                Value(value) => assert_eq!(payloads(run(&format!("payload = {example};"))), [json(value)], "{example}"),
                Children(children) => {
                    assert_eq!(payloads(run(example)), children.iter().map(json).collect::<Vec<_>>(), "{example}");
                }
                Dropped => assert!(matches!(run(example), Ok(Outcome::Drop(_))), "{example}"),
                Fault(why) => assert_eq!(run(example).unwrap_err(), format!("example:1: {why}"), "{example}"),
            }
        }
    }

    #[test]
    fn every_error_says_what_it_says_and_can_be_caught() {
        for (call, says) in TABLE.iter().filter_map(|entry| entry.error) {
            let why = run(&format!("\n{call};")).unwrap_err();
            assert!(why.starts_with("example:2: ") && why.contains(says), "{call}: {why}");
            let caught = run(&format!("try {{ {call}; }} catch {{ payload = \"caught\"; }}"));
            assert_eq!(payloads(caught), ["caught"], "{call}");
        }
    }

    #[test]
    fn a_wrong_type_or_number_of_arguments_is_an_error() {
        for call in ["regex_match(1, 2)", "time_add(5, 5)", "now(1)", "uuid(#{})", "emit(1)", "env(())", "fail(1)"] {
            assert!(run(&format!("{call};")).unwrap_err().contains("Function not found"), "{call}");
        }
    }
}
