//! The grammar of a pipeline file as JSON Schema, generated from the types: what the check walks.
//!
//! Takes nothing, gives schemas of whole and parts. Never written by hand.

use std::sync::LazyLock;

use serde_json::Value;

use super::{PipelineSpec, settings};

/// The words that say what a sink is.
pub const SINK_KINDS: &[&str] = &["stdout", "file", "http", "redis", "postgres", "kafka", "sqs"];
/// The words that say what a source is.
pub const SOURCE_KINDS: &[&str] = &["embedded", "memory", "kafka", "redis", "sqs"];
/// The words that say what a stage is.
pub const STAGE_KINDS: &[&str] = &["filter", "script", "inline"];
/// The words that say what a connection is.
pub const CONNECTION_KINDS: &[&str] = &["redis", "kafka", "sqs", "postgres"];

static SCHEMA: LazyLock<Value> = LazyLock::new(|| schemars::schema_for!(PipelineSpec).to_value());

/// The schema of the types as they are.
pub fn schema() -> &'static Value {
    &SCHEMA
}

/// The schema of a named type, or null.
pub fn definition(name: &str) -> &'static Value {
    let of = |schema: &'static Value| schema.get("$defs").and_then(|all| all.get(name));
    of(&SCHEMA).or_else(|| of(settings::schema())).unwrap_or(&Value::Null)
}

/// The schema of a sink kind's settings.
pub fn kind(name: &str) -> &'static Value {
    definition(match name {
        "stdout" => "StdoutSpec",
        "file" => "FileSpec",
        "http" => "HttpSpec",
        "redis" => "RedisSpec",
        "postgres" => "PostgresSpec",
        "kafka" => "KafkaSpec",
        "sqs" => "SqsSpec",
        _ => "",
    })
}

/// The name of the type that a schema refers to, if it does.
pub fn type_name(schema: &Value) -> Option<&str> {
    let reference = schema.get("$ref").or_else(|| {
        let any = schema.get("anyOf")?.as_array()?;
        any.iter().any(|one| one.get("type").is_some_and(|kind| kind == "null")).then(|| any.first()?.get("$ref"))?
    });
    reference.and_then(Value::as_str).map(|name| name.trim_start_matches("#/$defs/"))
}

/// Follows the reference to a named type.
pub fn resolve(schema: &'static Value) -> &'static Value {
    type_name(schema).map_or(schema, definition)
}

/// The keys that a map of this schema may hold.
pub fn properties(schema: &'static Value) -> impl Iterator<Item = (&'static str, &'static Value)> {
    let properties = resolve(schema).get("properties").and_then(Value::as_object);
    properties.into_iter().flatten().map(|(name, schema)| (name.as_str(), schema))
}

/// The places of the whole grammar where a key is known, outermost first: `sink.retry`, `sink.route[].retry`.
pub fn places_of(key: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut next = vec![(String::new(), schema())];
    for _ in 0..6 {
        let mut deeper = Vec::new();
        for (path, schema) in next {
            for (name, property) in properties(schema) {
                if name == key {
                    found.push(path.clone());
                }
                let here = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
                let inner = resolve(property);
                if let Some(items) = inner.get("items") {
                    deeper.push((format!("{here}[]"), items));
                } else if let Some(values) = inner.get("additionalProperties").filter(|values| values.is_object()) {
                    deeper.push((format!("{here}.NAME"), values));
                } else {
                    deeper.push((here, inner));
                }
            }
        }
        next = deeper;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_knows_where_its_keys_stand() {
        assert_eq!(places_of("retry").first().map(String::as_str), Some("sink"));
        assert_eq!(places_of("attempts").first().map(String::as_str), Some("sink.retry"));
        assert_eq!(places_of("namespace"), [""]);
        assert!(places_of("nothing").is_empty());
        for name in SINK_KINDS {
            assert!(properties(definition("SinkSpec")).any(|(property, _)| property == *name), "{name}");
            assert!(properties(definition("ArmSpec")).any(|(property, _)| property == *name), "{name}");
            assert!(kind(name).is_object(), "{name}");
        }
        for name in SOURCE_KINDS {
            assert!(properties(definition("SourceSpec")).any(|(property, _)| property == *name), "{name}");
        }
        for name in STAGE_KINDS {
            assert!(properties(definition("StageSpec")).any(|(property, _)| property == *name), "{name}");
        }
    }
}
