//! The grammar as others read it: the JSON Schema for editors, and the table of all defaults.
//!
//! Takes the generated schema, gives text. Never knows a key by name other than where exactly one of several is wanted.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::grammar::{self, CONNECTION_KINDS, SINK_KINDS, STAGE_KINDS};
use super::settings;

/// A reference to the environment, which may stand wherever a value does.
const REFERENCE: &str = "\\$\\{.+\\}";

/// The JSON Schema of a pipeline file, draft 2020-12, as text.
pub fn json_schema() -> String {
    let mut schema = softened();
    one_of(&mut schema, "SinkSpec", &[SINK_KINDS, &["route", "fan_out"]].concat());
    one_of(&mut schema, "ArmSpec", SINK_KINDS);
    one_of(&mut schema, "StageSpec", STAGE_KINDS);
    if let Some(map) = schema.as_object_mut() {
        map.insert("title".to_owned(), json!("A walflow pipeline file"));
        // What a kind needs may come from a region: only the plan knows. The nested uses keep their own.
        for kind in ["HttpSpec", "FileSpec"] {
            if let Some(Value::Object(definition)) = map.get_mut("$defs").and_then(|all| all.get_mut(kind)) {
                definition.shift_remove("required");
            }
        }
    }
    let mut text = serde_json::to_string_pretty(&schema).unwrap_or_default();
    text.push('\n');
    text
}

/// The JSON Schema of walflow.yaml, draft 2020-12, as text.
pub fn shared_schema() -> String {
    let mut schema = softened();
    let kinds: Map<String, Value> = CONNECTION_KINDS
        .iter()
        .map(|kind| {
            let places: Vec<Value> =
                connection_types(kind).map(|name| json!({ "$ref": format!("#/$defs/{name}") })).collect();
            let fields = if places.is_empty() { json!({ "type": "object" }) } else { json!({ "anyOf": places }) };
            ((*kind).to_owned(), fields)
        })
        .collect();
    let mut defaults = schema.clone();
    let mut parts = Value::Null;
    if let Some(map) = defaults.as_object_mut() {
        parts = map.shift_remove("$defs").unwrap_or_default();
        for key in ["$schema", "title", "required", "description"] {
            map.shift_remove(key);
        }
        if let Some(properties) = map.get_mut("properties").and_then(Value::as_object_mut) {
            properties.retain(|key, _| !["namespace", "retired", "tests"].contains(&key.as_str()));
        }
        map.insert("description".to_owned(), json!("What every pipeline has that does not say it itself, key by key."));
    }
    // Of what is shared, each pipeline may give the rest.
    for part in parts.as_object_mut().into_iter().flat_map(|parts| parts.values_mut()) {
        if let Some(map) = part.as_object_mut() {
            map.shift_remove("required");
        }
    }
    let mut properties = settings_for_editors();
    let own = settings::schema().get("$defs").and_then(Value::as_object);
    for (name, definition) in own.into_iter().flatten() {
        let mut definition = definition.clone();
        soften(&mut definition);
        if let Some(parts) = parts.as_object_mut() {
            parts.entry(name.clone()).or_insert(definition);
        }
    }
    let shared = json!({
            "connections": {
                "description": "Connections by name; a pipeline takes one with `use: NAME` in a map of its kind.",
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "properties": kinds,
                    "additionalProperties": false,
                    "minProperties": 1,
                    "maxProperties": 1
                }
            },
            "defaults": defaults
    });
    properties.extend(shared.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
    schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "walflow.yaml",
        "description": "The settings of an instance, and what its pipelines share.",
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
        "$defs": parts
    });
    let mut text = serde_json::to_string_pretty(&schema).unwrap_or_default();
    text.push('\n');
    text
}

/// The service's own settings, in which a list may be one text, as its flag has it.
fn settings_for_editors() -> Map<String, Value> {
    let mut schema = settings::schema().clone();
    let properties = schema.get_mut("properties").and_then(Value::as_object_mut).map(std::mem::take);
    let mut properties = properties.unwrap_or_default();
    for property in properties.values_mut() {
        soften(property);
        if let Some(map) = property.as_object_mut().filter(|map| map.get("type").is_some_and(|kind| kind == "array")) {
            let list = json!({ "type": map.shift_remove("type"), "items": map.shift_remove("items") });
            map.insert("anyOf".to_owned(), json!([list, { "type": "string" }]));
        }
    }
    properties
}

/// The types of what may have a connection of a kind.
fn connection_types(kind: &str) -> impl Iterator<Item = &'static str> {
    ["SinkSpec", "SourceSpec", "ShelfSpec"].into_iter().filter_map(move |holder| {
        let found = grammar::properties(grammar::definition(holder)).find(|(name, _)| *name == kind);
        found.and_then(|(_, schema)| grammar::type_name(schema))
    })
}

/// The grammar for editors, in which a map of a kind may name a connection.
fn softened() -> Value {
    let mut schema = grammar::schema().clone();
    soften(&mut schema);
    for name in CONNECTION_KINDS.iter().flat_map(|kind| connection_types(kind)) {
        if let Some(Value::Object(definition)) = schema.get_mut("$defs").and_then(|all| all.get_mut(name)) {
            // What it needs may be the connection's to give.
            definition.shift_remove("required");
            if let Some(properties) = definition.get_mut("properties").and_then(Value::as_object_mut) {
                let says = "The connection in walflow.yaml whose fields are taken; those that stand here win.";
                properties.insert("use".to_owned(), json!({ "type": "string", "description": says }));
            }
        }
    }
    schema
}

/// Says that exactly one of the keys stands in the map.
fn one_of(schema: &mut Value, name: &str, keys: &[&str]) {
    if let Some(Value::Object(definition)) = schema.get_mut("$defs").and_then(|all| all.get_mut(name)) {
        let choices: Vec<Value> = keys.iter().map(|key| json!({ "required": [key] })).collect();
        definition.insert("oneOf".to_owned(), Value::Array(choices));
    }
}

/// Lets references stand for numbers, bools and words, and takes out what an editor would only stumble over.
fn soften(schema: &mut Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(soften),
        Value::Object(map) => {
            if map.get("default").is_some_and(|default| default.is_null() || default.is_object() || default.is_array())
            {
                map.shift_remove("default");
            }
            if let Some(Value::String(text)) = map.get_mut("description") {
                *text = text.replace('\n', " ");
            }
            let words = map
                .get("oneOf")
                .and_then(Value::as_array)
                .is_some_and(|all| all.iter().all(|one| one.get("const").is_some()));
            if words && let Some(Value::Array(mut choices)) = map.shift_remove("oneOf") {
                choices.push(json!({ "type": "string", "pattern": REFERENCE }));
                map.insert("anyOf".to_owned(), Value::Array(choices));
                return;
            }
            if is_scalar(map) {
                let mut exact = Map::new();
                for key in ["type", "format", "minimum", "maximum"] {
                    if let Some(value) = map.shift_remove(key) {
                        exact.insert(key.to_owned(), value);
                    }
                }
                let choices = json!([exact, { "type": "string", "pattern": REFERENCE }]);
                map.insert("anyOf".to_owned(), choices);
                return;
            }
            // A quantity names its own forms.
            if map
                .get("anyOf")
                .and_then(Value::as_array)
                .is_some_and(|all| all.iter().any(|one| one.get("pattern").is_some()))
            {
                return;
            }
            // Kept apart from keywords: a property may be called `default` or `type`.
            map.iter_mut().for_each(|(_, value)| soften(value));
        }
        _ => {}
    }
}

fn is_scalar(map: &Map<String, Value>) -> bool {
    let is = |kind: &Value| matches!(kind.as_str(), Some("integer" | "number" | "boolean"));
    match map.get("type") {
        Some(Value::Array(kinds)) => kinds.iter().any(is),
        Some(kind) => is(kind),
        None => false,
    }
}

/// Every key with its default and bounds, as a Markdown table. Arms take the keys of `sink`, and are not repeated.
pub fn defaults_table() -> String {
    let mut out = String::from("| key | default | bounds | what it is |\n|---|---|---|---|\n");
    rows("", grammar::schema(), &mut out);
    out
}

/// Every key of the service's own settings with its default, as a Markdown table.
pub fn settings_table() -> String {
    let mut out = String::from("| key | default | bounds | what it is |\n|---|---|---|---|\n");
    rows("", settings::schema(), &mut out);
    out
}

fn rows(path: &str, schema: &'static Value, out: &mut String) {
    for (name, property) in grammar::properties(schema) {
        let here = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        let doc = Doc::read(property);
        let required =
            schema.get("required").and_then(Value::as_array).is_some_and(|keys| keys.iter().any(|key| key == name));
        let default = doc.default.unwrap_or_else(|| if required { "must be there".to_owned() } else { "–".to_owned() });
        let _ = writeln!(out, "| `{here}` | {} | {} | {} |", cell(&default), cell(&doc.bounds), cell(&doc.says));
        let inner = grammar::resolve(property);
        let (next, below) = match (inner.get("items"), inner.get("additionalProperties").filter(|v| v.is_object())) {
            (Some(items), _) => (format!("{here}[]"), grammar::resolve(items)),
            (_, Some(values)) => (format!("{here}.NAME"), grammar::resolve(values)),
            _ => (here, inner),
        };
        if !matches!(grammar::type_name(property), Some("ArmSpec"))
            && !next.starts_with("sink.route")
            && !next.starts_with("sink.fan_out")
        {
            rows(&next, below, out);
        }
    }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// A key's description, taken apart.
struct Doc {
    says: String,
    default: Option<String>,
    bounds: String,
}

impl Doc {
    fn read(property: &Value) -> Self {
        let text = property.get("description").and_then(Value::as_str).unwrap_or_default().replace('\n', " ");
        let mut says = text.as_str();
        let mut default = None;
        let mut bounds = String::new();
        if let Some((before, after)) = text.split_once("Default: ") {
            says = before;
            let (value, rest) = after.split_once(". ").unwrap_or((after, ""));
            default = Some(value.trim_end_matches('.').to_owned());
            rest.trim().trim_end_matches('.').clone_into(&mut bounds);
        }
        Self { says: says.trim().to_owned(), default, bounds }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::checked_in;

    #[test]
    fn the_schema_that_is_checked_in_is_that_of_the_types() {
        checked_in("schemas/pipeline.schema.json", &json_schema());
    }

    #[test]
    fn the_schema_of_walflow_yaml_that_is_checked_in_is_that_of_the_types() {
        checked_in("schemas/walflow.schema.json", &shared_schema());
        let schema: Value = serde_json::from_str(&shared_schema()).unwrap();
        let validator = jsonschema::draft202012::new(&schema).unwrap();
        let fits = |value: Value| validator.is_valid(&value);
        assert!(fits(json!({ "connections": { "main": { "redis": { "url": "redis://r/1" } } } })));
        assert!(fits(json!({ "defaults": { "sink": { "retry": { "attempts": 3 } } } })));
        assert!(!fits(json!({ "defaults": { "namespace": "x" } })));
        assert!(!fits(json!({ "connections": { "main": { "redis": {}, "kafka": {} } } })));
        assert!(!fits(json!({ "conections": {} })));
        assert!(fits(json!({ "listen": "0.0.0.0:80", "port": "${PORT:-80}", "paths": "a,b", "shard": ["x", "y"] })));
        assert!(!fits(json!({ "port": 70000 })) && !fits(json!({ "log_format": "xml" })));
    }

    #[test]
    fn the_defaults_that_are_checked_in_are_those_of_the_types() {
        let head = "# Every key of a pipeline file, with its default\n\nGenerated from the types. Each arm of `sink.route` and `sink.fan_out` takes the keys of `sink`, and those of the\n`sink` around it where it has none of its own.\n\n";
        let config = "\n# Every key of walflow.yaml beside `connections` and `defaults`\n\nEach has its flag, `--shutdown-timeout` for `shutdown_timeout`, and its environment variable (`walflow run --help`); both go\nbefore the file. Relative paths begin in the working folder. A list may be one text with commas.\n\n";
        checked_in("src/spec/DEFAULTS.md", &format!("{head}{}{config}{}", defaults_table(), settings_table()));
    }

    /// The docs' `Default:` against the default that serde takes.
    #[test]
    fn every_documented_default_is_the_real_one() {
        fn same(documented: &str, real: &Value) -> bool {
            let real = match real {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            let span = |text: &str| text.parse::<crate::units::Span>().ok();
            let first = documented.split([';', ',']).next().unwrap_or_default().trim();
            first == real || (span(first).is_some() && span(first) == span(&real))
        }
        let mut checked = 0;
        for (name, definition) in grammar::schema()["$defs"].as_object().unwrap() {
            for (key, property) in definition.get("properties").and_then(Value::as_object).into_iter().flatten() {
                let Some(real) =
                    property.get("default").filter(|real| !real.is_null() && !real.is_object() && !real.is_array())
                else {
                    continue;
                };
                if real.as_str() == Some("") {
                    continue;
                }
                let documented = Doc::read(property).default.unwrap_or_default();
                assert!(same(&documented, real), "{name}.{key}: documented {documented:?}, real {real}");
                checked += 1;
            }
        }
        assert!(checked > 10, "{checked}");
    }

    #[test]
    fn editors_accept_references_and_exactly_one_kind() {
        let schema: Value = serde_json::from_str(&json_schema()).unwrap();
        let validator = jsonschema::draft202012::new(&schema).unwrap();
        let fits = |sink: Value| validator.is_valid(&json!({ "namespace": "a", "sink": sink }));
        assert!(fits(
            json!({ "stdout": {}, "limits": { "concurrency": "${N}", "rate": "${R:-5/s}" }, "ordering": "${O}" })
        ));
        assert!(fits(json!({ "stdout": null })));
        assert!(fits(json!({ "http": {} })), "a region may give the url");
        assert!(!fits(json!({ "stdout": {}, "file": { "path": "x" } })));
        assert!(!fits(json!({})));
        assert!(!fits(json!({ "stdout": {}, "limits": { "concurrency": "many" } })));
        assert!(!fits(json!({ "stdout": {}, "limits": { "concurrency": 0 } })));
        assert!(!fits(json!({ "stdout": {}, "ordering": "sorted" })));
        assert!(!fits(json!({ "stdout": {}, "retires": {} })));
    }
}
