//! What a payload schema promises: where faults are, which files it reads, and that no payload makes it slow.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use super::{PayloadSchema, SchemaError, SchemaFault, files};

/// Loads the first of these files, with the others to be found, and says which were asked for.
fn load(files: &[(&str, &str)]) -> (Result<PayloadSchema, SchemaError>, Vec<String>) {
    let known: BTreeMap<&str, &str> = files.iter().copied().collect();
    let mut asked = Vec::new();
    let mut read = |path: &Path| {
        let name = path.to_str().unwrap();
        asked.push(name.to_owned());
        known.get(name).map(|text| text.as_bytes().to_vec()).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    };
    (PayloadSchema::load(Path::new(files[0].0), &mut read), asked)
}

fn schema(text: &str) -> PayloadSchema {
    load(&[("s.json", text)]).0.unwrap()
}

fn refused(files: &[(&str, &str)]) -> String {
    load(files).0.unwrap_err().to_string()
}

/// The places of what does not match.
fn pointers(schema: &PayloadSchema, payload: &str) -> Vec<String> {
    let faults = schema.check(payload.as_bytes()).err().unwrap_or_default();
    faults.iter().map(|fault| fault.pointer.to_string()).collect()
}

const ORDER: &str = r#"{
    "type": "object",
    "required": ["id"],
    "properties": {
        "id": { "type": "integer" },
        "lines": { "type": "array", "items": { "properties": { "price": { "type": "number", "minimum": 0 } } } },
        "a/b": { "properties": { "c~d": { "const": 1 } } }
    },
    "additionalProperties": false
}"#;

#[test]
fn each_fault_has_its_place_in_the_payload() {
    let order = schema(ORDER);
    assert_eq!(order.path(), "s.json");
    assert!(order.check(br#"{"id":1,"lines":[{"price":2}]}"#).is_ok());
    let several = r#"{"id":"x","lines":[{"price":1},{"price":-1}]}"#;
    assert_eq!(pointers(&order, several), ["/id", "/lines/1/price"]);
    assert_eq!(pointers(&order, "[]"), [""], "the whole");
    assert_eq!(pointers(&order, "{}"), [""], "what is missing is missing in the whole");
    assert_eq!(pointers(&order, r#"{"id":1,"a/b":{"c~d":2}}"#), ["/a~1b/c~0d"], "as RFC 6901 writes it");
    let [SchemaFault { message, .. }] = &order.check(br#"{"id":1.5}"#).unwrap_err()[..] else { panic!() };
    assert!(message.contains("integer"), "{message}");
}

#[test]
fn what_is_no_json_is_a_fault_of_the_whole() {
    for payload in [&b"{"[..], b"", b"{} {}", b"\xff"] {
        let faults = schema("true").check(payload).unwrap_err();
        assert_eq!((faults.len(), &*faults[0].pointer), (1, ""));
    }
}

#[test]
fn a_payload_that_is_all_wrong_names_a_few_places_and_no_more() {
    let all = schema(r#"{"items":{"type":"string"}}"#);
    let payload = format!("[{}0]", "0,".repeat(10_000));
    assert_eq!(pointers(&all, &payload).len(), 32);
}

#[test]
fn formats_are_checked() {
    for (format, good, bad) in [
        ("date-time", "2026-11-24T08:00:00Z", "2026-11-24 08:00"),
        ("date", "2026-02-28", "2026-02-30"),
        ("email", "a@example.org", "a.example.org"),
        ("uuid", "019a0b1c-2d3e-7f00-8000-000000000000", "019a0b1c"),
        ("ipv4", "127.0.0.1", "127.0.0.256"),
        ("ipv6", "::1", ":::1"),
        ("uri", "https://example.org/a", "example org"),
    ] {
        let schema = schema(&format!(r#"{{"format":"{format}"}}"#));
        assert!(schema.check(format!("\"{good}\"").as_bytes()).is_ok(), "{format}: {good}");
        assert_eq!(pointers(&schema, &format!("\"{bad}\"")), [""], "{format}: {bad}");
    }
}

#[test]
fn a_relative_reference_is_a_file_beside_the_one_that_says_it() {
    let files = [
        (
            "../s/order.json",
            r##"{"properties":{"to":{"$ref":"parts/address.json#/$defs/address"},"self":{"$ref":"#"}}}"##,
        ),
        ("../s/parts/address.json", r#"{"$defs":{"address":{"properties":{"zip":{"$ref":"../zip.json"}}}}}"#),
        ("../s/zip.json", r#"{"type":"string","minLength":5}"#),
    ];
    let (order, asked) = load(&files);
    let order = order.unwrap();
    assert_eq!(asked, files.map(|(name, _)| name));
    assert!(order.check(br#"{"to":{"zip":"50667"},"self":{"to":{}}}"#).is_ok());
    assert_eq!(pointers(&order, r#"{"to":{"zip":"5"}}"#), ["/to/zip"]);
    assert_eq!(pointers(&order, r#"{"self":{"self":{"to":{"zip":5}}}}"#), ["/self/self/to/zip"]);
}

#[test]
fn a_file_is_where_it_lies_whatever_it_calls_itself() {
    let (order, _) = load(&[
        ("order.json", r#"{"$id":"https://example.org/order.json","properties":{"zip":{"$ref":"zip.json"}}}"#),
        ("zip.json", r#"{"$id":"https://example.org/elsewhere/zip.json","$ref":"text.json"}"#),
        ("text.json", r#"{"type":"string"}"#),
    ]);
    assert_eq!(pointers(&order.unwrap(), r#"{"zip":5}"#), ["/zip"]);
}

#[test]
fn files_may_refer_to_each_other_and_are_read_once() {
    let (tree, asked) = load(&[
        ("tree.json", r#"{"properties":{"left":{"$ref":"./node.json"},"right":{"$ref":"x/../node.json"}}}"#),
        ("node.json", r#"{"type":"object","properties":{"tree":{"$ref":"tree.json"}}}"#),
    ]);
    assert_eq!(asked, ["tree.json", "node.json"]);
    let payload = r#"{"left":{"tree":{"right":{"tree":{"left":1}}}}}"#;
    assert_eq!(pointers(&tree.unwrap(), payload), ["/left/tree/right/tree/left"]);
}

#[test]
fn what_only_looks_like_a_reference_is_left_alone() {
    let text = r#"{"const":{"$ref":"a.json"},"enum":[{"$ref":"a.json"}],"properties":{"$ref":{"type":"string"}}}"#;
    let (odd, asked) = load(&[("odd.json", text)]);
    assert_eq!(asked, ["odd.json"]);
    assert!(odd.unwrap().check(br#"{"$ref":"a.json"}"#).is_ok());
    let (named, asked) = load(&[
        ("named.json", r#"{"properties":{"const":{"$ref":"a.json"}},"$defs":{"enum":{"$ref":"a.json"}}}"#),
        ("a.json", r#"{"type":"string"}"#),
    ]);
    assert_eq!(asked.len(), 2, "a field may be called as a keyword is");
    assert_eq!(pointers(&named.unwrap(), r#"{"const":1}"#), ["/const"]);
}

#[test]
fn nothing_is_fetched() {
    for remote in
        ["https://127.0.0.1:9/a.json", "http://127.0.0.1:9/a.json#/x", "file:///etc/hostname", "/etc/hostname"]
    {
        let why = refused(&[("s.json", &format!(r#"{{"properties":{{"a":{{"$ref":"{remote}"}}}}}}"#))]);
        assert!(why.contains("nothing is fetched for a schema"), "{remote}: {why}");
        assert!(
            why.contains("by a relative path") && why.starts_with("s.json is not a JSON Schema"),
            "{remote}: {why}"
        );
    }
    let (own, _) = load(&[("s.json", r#"{"$ref":"https://json-schema.org/draft/2020-12/schema"}"#)]);
    assert!(own.is_ok(), "the language's own schema is at hand");
}

#[test]
fn a_broken_file_is_named() {
    assert!(refused(&[("s.json", "{")]).starts_with("the schema s.json is not JSON: EOF"));
    let beside = r#"{"$ref":"b.json"}"#;
    assert!(refused(&[("s.json", beside)]).starts_with("cannot read the schema b.json: "));
    assert!(refused(&[("s.json", beside), ("b.json", "nonsense")]).starts_with("the schema b.json is not JSON: "));
    assert!(refused(&[("s.json", r#"{"type":"strin"}"#)]).starts_with("s.json is not a JSON Schema: "));
}

#[test]
fn files_are_as_many_as_a_person_writes() {
    let endless = |count: usize| {
        let name = |n: usize| format!("{n}.json");
        (0..count).map(|n| (name(n), format!(r#"{{"$ref":"{}"}}"#, name((n + 1) % count)))).collect::<Vec<_>>()
    };
    let most = endless(files::MOST + 1);
    let most: Vec<_> = most.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    assert_eq!(refused(&most), "the schema 0.json refers to more than 64 files");
}

#[test]
fn a_pattern_costs_time_in_proportion_to_the_text() {
    // On a backtracking engine the first would take longer than the age of the world.
    let nested = schema(r#"{"pattern":"^(a+)+$"}"#);
    let text = format!("\"{}!\"", "a".repeat(200_000));
    assert_eq!(pointers(&nested, &text), [""]);
    // What only a backtracking engine can do is refused.
    for pattern in [r"(a)\\1", "(?=a)b", "(?<!a)b"] {
        let why = refused(&[("s.json", &format!(r#"{{"pattern":"{pattern}"}}"#))]);
        assert!(why.starts_with("s.json is not a JSON Schema: "), "{why}");
    }
}
