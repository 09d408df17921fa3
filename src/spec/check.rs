//! The check of a file's value against the grammar: every key and type that is wrong, with what would be right.
//!
//! Takes the value, gives findings by JSON pointer and leaves in the value only what fits, so that the later checks
//! see all the rest. Never looks at meaning: rules across keys are in `rules`.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::code::Code;
use super::expand::{Written, child, core_type};
use super::grammar::{self, resolve, type_name};
use crate::source::kafka::KafkaStart;
use crate::units::{ByteSize, Count, Rate, Span};

/// One thing that does not fit the grammar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Its code.
    pub code: Code,
    /// Where.
    pub pointer: String,
    /// The key is meant, not its value.
    pub at_key: bool,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub help: Option<String>,
}

/// What a check found.
#[derive(Debug, Default)]
pub struct Checked {
    /// What does not fit, in file order.
    pub findings: Vec<Finding>,
    /// What was taken out of the value.
    pub pruned: Vec<String>,
}

/// Checks a value and prunes it. With `whole` the keys that must be there are asked for. False when the value cannot
/// stand at all.
pub fn check(schema: &'static Value, value: &mut Value, pointer: &str, whole: bool, out: &mut Checked) -> bool {
    let mut walk = Walk { out, whole, unknown: &[], written: &BTreeMap::new() };
    walk.value(schema, value, pointer)
}

/// Unknown keys for which a likely meaning is looked up; a file that has more is no pipeline file.
const EXPLAINED: usize = 100;

/// The types of the sinks' settings.
const KIND_TYPES: &[&str] = &["StdoutSpec", "FileSpec", "HttpSpec", "RedisSpec"];

struct Walk<'a> {
    out: &'a mut Checked,
    whole: bool,
    /// Pointers whose values could not be expanded: their absence is no finding.
    unknown: &'a [String],
    written: &'a BTreeMap<String, Written>,
}

/// Checks all keys of a file. `unknown` names values that could not be expanded; they are reported already. What is exactly
/// one reference (`written`) takes the type that its place asks for.
pub fn check_file(
    schema: &'static Value,
    value: &mut Value,
    unknown: &[String],
    written: &BTreeMap<String, Written>,
) -> Checked {
    let mut out = Checked::default();
    let mut walk = Walk { out: &mut out, whole: true, unknown, written };
    walk.value(schema, value, "");
    out
}

const fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a bool",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map",
    }
}

/// A value as a message shows it.
fn shown(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    if text.chars().count() > 60 { format!("{}…", text.chars().take(60).collect::<String>()) } else { text }
}

/// The known word that was most likely meant.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    // No word of the grammar is longer, and comparing costs the product of the lengths.
    let known = known.filter(|_| word.len() <= 40);
    known
        .map(|candidate| {
            (candidate, strsim::jaro_winkler(&word, candidate), strsim::damerau_levenshtein(&word, candidate))
        })
        .filter(|(candidate, likeness, distance)| *likeness >= 0.84 || *distance <= candidate.len().min(word.len()) / 3)
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(candidate, ..)| candidate)
}

fn parse_named(name: &str, text: &str) -> Option<Result<(), String>> {
    match name {
        "Span" => Some(text.parse::<Span>().map(drop).map_err(|error| error.to_string())),
        "ByteSize" => Some(text.parse::<ByteSize>().map(drop).map_err(|error| error.to_string())),
        "Count" => Some(text.parse::<Count>().map(drop).map_err(|error| error.to_string())),
        "Rate" => Some(text.parse::<Rate>().map(drop).map_err(|error| error.to_string())),
        "KafkaStart" => Some(text.parse::<KafkaStart>().map(drop).map_err(|error| error.to_string())),
        _ => None,
    }
}

impl Walk<'_> {
    fn find(&mut self, code: Code, pointer: &str, message: String, help: Option<String>) -> &mut Finding {
        self.out.findings.push(Finding { code, pointer: pointer.to_owned(), at_key: false, message, help });
        let last = self.out.findings.len() - 1;
        // The vector is not empty: it was pushed to in the line above.
        #[expect(clippy::indexing_slicing, reason = "the element was pushed just above")]
        &mut self.out.findings[last]
    }

    fn value(&mut self, schema: &'static Value, value: &mut Value, pointer: &str) -> bool {
        if self.unknown.iter().any(|unknown| unknown == pointer) {
            return false;
        }
        let named = type_name(schema);
        if let Some(name) = named {
            let optional = schema.get("anyOf").is_some();
            if let Some(fits) = self.named(name, optional, value, pointer) {
                return fits;
            }
            if optional
                && value.is_null()
                && grammar::definition(name).get("properties").is_none()
                && !is_map(grammar::definition(name))
            {
                return true;
            }
        }
        // A kind's required settings may come from the regions: the plan asks for them once those are merged.
        let overridden = named.is_some_and(|name| KIND_TYPES.contains(&name))
            && pointer.starts_with("/sink/")
            && !pointer.contains("/also/");
        let asked = self.whole;
        self.whole = asked && !overridden;
        let fits = self.shape(schema, value, pointer);
        self.whole = asked;
        fits
    }

    fn shape(&mut self, schema: &'static Value, value: &mut Value, pointer: &str) -> bool {
        let schema = resolve(schema);
        if let Some(words) = words(schema) {
            return self.word(&words, value, pointer);
        }
        let types: Vec<&str> = match schema.get("type") {
            Some(Value::String(one)) => vec![one.as_str()],
            Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
            _ => return true,
        };
        if value.is_null() {
            // `stdout:` with nothing behind it means `stdout: {}`.
            match types.first() {
                Some(&"object") => *value = Value::Object(Map::new()),
                Some(&"array") => *value = Value::Array(Vec::new()),
                _ if types.contains(&"null") => return true,
                _ => {}
            }
        }
        let expected = types.first().copied().unwrap_or_default();
        if let Some(text) = self.written.get(pointer).and_then(|written| written.whole.as_deref()) {
            match (expected, core_type(text)) {
                ("string", _) => *value = Value::String(text.to_owned()),
                ("integer" | "number", scalar @ Value::Number(_)) | ("boolean", scalar @ Value::Bool(_)) => {
                    *value = scalar;
                }
                _ => {}
            }
        }
        match (&mut *value, expected) {
            (Value::Object(map), "object") => self.map(schema, map, pointer),
            (Value::Array(list), "array") => {
                let Some(items) = schema.get("items") else { return true };
                self.list(items, list, pointer)
            }
            (Value::String(_), "string") | (Value::Bool(_), "boolean") => true,
            (Value::Number(_), "number" | "integer") => self.number(schema, value, pointer),
            (found, expected) => {
                let expected_words = match expected {
                    "object" => "a map",
                    "array" => "a list",
                    "string" => "a text",
                    "boolean" => "true or false",
                    "integer" => "a whole number",
                    _ => "a number",
                };
                let help = match (expected, &*found) {
                    ("string", Value::Number(_) | Value::Bool(_)) => {
                        Some(format!("put quotes around it: \"{}\"", shown(found)))
                    }
                    ("array", Value::Object(_)) => Some("begin each item with '- '".to_owned()),
                    ("object", Value::Array(_)) => Some("write `key: value` lines without '- '".to_owned()),
                    _ => self.description(schema),
                };
                let message = format!("expected {expected_words} for {}, found {}", name_of(pointer), type_of(found));
                self.find(Code::WrongType, pointer, message, help);
                false
            }
        }
    }

    #[expect(clippy::unused_self, reason = "reads as one of the walk's steps")]
    fn description(&self, schema: &Value) -> Option<String> {
        schema.get("description").and_then(Value::as_str).map(|text| text.replace('\n', " "))
    }

    /// Quantities and other types whose text is parsed. `None` when the type is none of them.
    fn named(&mut self, name: &str, optional: bool, value: &Value, pointer: &str) -> Option<bool> {
        if name == "DelayFor" {
            return Some(match value {
                Value::Number(_) => return self.named("Span", optional, value, pointer),
                Value::String(_) => true,
                Value::Null if optional => true,
                other => {
                    let message = format!(
                        "expected a duration or an expression for {}, found {}",
                        name_of(pointer),
                        type_of(other)
                    );
                    self.find(Code::WrongType, pointer, message, Some("write a duration such as 5s".to_owned()));
                    false
                }
            });
        }
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            other => {
                let _ = parse_named(name, "")?;
                if optional && other.is_null() {
                    return Some(true);
                }
                let expected =
                    grammar::definition(name).get("description").and_then(Value::as_str).unwrap_or("a number");
                let message = format!("expected {expected} for {}, found {}", name_of(pointer), type_of(other));
                self.find(Code::WrongType, pointer, message, None);
                return Some(false);
            }
        };
        match parse_named(name, &text)? {
            Ok(()) => Some(true),
            Err(message) => {
                self.find(Code::WrongValue, pointer, format!("{}: {message}", name_of(pointer)), None);
                Some(false)
            }
        }
    }

    fn word(&mut self, words: &[&str], value: &Value, pointer: &str) -> bool {
        let text = match value {
            Value::String(text) if words.contains(&text.as_str()) => return true,
            other => shown(other),
        };
        let help = nearest(&text, words.iter().copied()).map(|word| format!("did you mean '{word}'?"));
        let message = format!("{} cannot be '{text}': it is one of {}", name_of(pointer), words.join(", "));
        self.find(Code::WrongValue, pointer, message, help);
        false
    }

    fn number(&mut self, schema: &Value, value: &Value, pointer: &str) -> bool {
        let number = value.as_f64().unwrap_or_default();
        let integer = schema
            .get("type")
            .is_some_and(|kind| kind == "integer" || kind.get(0).is_some_and(|first| first == "integer"));
        if integer && value.as_u64().is_none() {
            let message = format!("expected a whole number of 0 or more for {}, found {value}", name_of(pointer));
            self.find(Code::WrongType, pointer, message, None);
            return false;
        }
        let least = schema.get("minimum").and_then(Value::as_f64);
        let most = schema.get("maximum").and_then(Value::as_f64);
        let bound = if least.is_some_and(|least| number < least) {
            least.map(|least| ("small", format!("the least is {least}")))
        } else if most.is_some_and(|most| number > most) {
            most.map(|most| ("large", format!("the most is {most}")))
        } else {
            None
        };
        let Some((how, help)) = bound else { return true };
        self.find(Code::OutOfRange, pointer, format!("{value} is too {how} for {}", name_of(pointer)), Some(help));
        false
    }

    fn list(&mut self, items: &'static Value, list: &mut [Value], pointer: &str) -> bool {
        let mut fits = true;
        for (index, item) in list.iter_mut().enumerate() {
            let here = child(pointer, &index.to_string());
            if !self.value(items, item, &here) {
                self.out.pruned.push(here);
                let required = resolve(items).get("required").is_some();
                if is_map(resolve(items)) && !required {
                    // An empty item keeps the numbers of those behind it.
                    *item = Value::Object(Map::new());
                } else {
                    fits = false;
                }
            }
        }
        fits
    }

    fn map(&mut self, schema: &'static Value, map: &mut Map<String, Value>, pointer: &str) -> bool {
        let properties = schema.get("properties").and_then(Value::as_object);
        let others = schema.get("additionalProperties");
        let mut gone = HashSet::new();
        for (key, value) in map.iter_mut() {
            let here = child(pointer, key);
            let fits = if let Some(property) = properties.and_then(|known| known.get(key)) {
                self.value(property, value, &here)
            } else {
                match others {
                    Some(Value::Bool(false)) => {
                        self.unknown_key(schema, key, value, &here);
                        false
                    }
                    Some(values @ Value::Object(_)) => self.value(values, value, &here),
                    _ => true,
                }
            };
            if !fits {
                gone.insert(key.clone());
            }
        }
        if !gone.is_empty() {
            map.retain(|key, _| !gone.contains(key));
            self.out.pruned.extend(gone.iter().map(|key| child(pointer, key)));
        }
        let required = schema.get("required").and_then(Value::as_array);
        let mut fits = true;
        for key in required.into_iter().flatten().filter_map(Value::as_str) {
            if map.contains_key(key) || !self.whole {
                continue;
            }
            fits = false;
            let here = child(pointer, key);
            if !self.out.pruned.contains(&here) {
                let property = properties.and_then(|known| known.get(key)).unwrap_or(&Value::Null);
                let message = if pointer.is_empty() {
                    format!("'{key}' is missing")
                } else {
                    format!("'{key}' is missing in {}", name_of(pointer))
                };
                let help = self.description(property).map(|text| format!("{key}: {text}"));
                self.find(Code::MissingKey, pointer, message, help).at_key = true;
            }
        }
        fits
    }

    fn unknown_key(&mut self, schema: &'static Value, key: &str, value: &Value, pointer: &str) {
        let key = &*shown(&Value::String(key.to_owned()));
        if self.out.findings.len() >= EXPLAINED {
            self.find(Code::UnknownKey, pointer, format!("unknown key '{key}'"), None).at_key = true;
            return;
        }
        let parent = pointer.rsplit_once('/').map_or("", |(parent, _)| parent);
        let known: Vec<&'static str> = grammar::properties(schema).map(|(name, _)| name).collect();
        let close = nearest(key, known.iter().copied());
        let inside = grammar::properties(schema)
            .find(|(_, property)| !value.is_null() && grammar::properties(property).any(|(name, _)| name == key))
            .map(|(name, _)| name);
        let places = grammar::places_of(key);
        let (code, message, help) = if let (Some(inside), true) = (inside, !places.is_empty()) {
            let inside = if parent.is_empty() { inside.to_owned() } else { format!("{}.{inside}", dotted(parent)) };
            (
                Code::MisplacedKey,
                format!("'{key}' does not stand here"),
                format!("'{key}' belongs under '{inside}': indent it below that line"),
            )
        } else if let (Some(place), true) = (places.first(), close.is_none_or(|close| close != key)) {
            let where_to = if place.is_empty() {
                format!("'{key}' belongs to the top level of the file: indent it less")
            } else {
                format!("'{key}' belongs under '{place}'")
            };
            (Code::MisplacedKey, format!("'{key}' does not stand here"), where_to)
        } else {
            let message = close.map_or_else(
                || format!("unknown key '{key}'"),
                |close| format!("unknown key '{key}', did you mean '{close}'?"),
            );
            (Code::UnknownKey, message, format!("known here: {}", known.join(", ")))
        };
        let help = if known.is_empty() && code == Code::UnknownKey {
            "nothing stands below this key".to_owned()
        } else {
            help
        };
        self.find(code, pointer, message, Some(help)).at_key = true;
    }
}

fn is_map(schema: &Value) -> bool {
    schema.get("type").is_some_and(|kind| kind == "object")
}

/// The words of an enumeration.
fn words(schema: &Value) -> Option<Vec<&str>> {
    if let Some(words) = schema.get("enum").and_then(Value::as_array) {
        return words.iter().map(Value::as_str).collect();
    }
    let choices = schema.get("oneOf").and_then(Value::as_array)?;
    choices.iter().map(|choice| choice.get("const").and_then(Value::as_str)).collect()
}

/// The last step of a pointer, as a message names it.
pub fn name_of(pointer: &str) -> String {
    let mut steps = pointer.rsplit('/');
    match (steps.next().unwrap_or_default(), steps.next()) {
        ("", _) => "the file".to_owned(),
        (index, Some(list)) if index.bytes().all(|byte| byte.is_ascii_digit()) => format!("'{list}[{index}]'"),
        (name, _) => format!("'{}'", shown(&Value::String(name.replace("~1", "/").replace("~0", "~")))),
    }
}

/// A pointer as people write a path: `sink.route[0].retry`.
pub fn dotted(pointer: &str) -> String {
    let mut out = String::new();
    for step in pointer.split('/').skip(1) {
        if !step.is_empty() && step.bytes().all(|byte| byte.is_ascii_digit()) {
            let _ = write!(out, "[{step}]");
        } else {
            if !out.is_empty() {
                out.push('.');
            }
            out.push_str(&step.replace("~1", "/").replace("~0", "~"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(value: &Value) -> Vec<String> {
        let mut value = value.clone();
        let checked = check_file(grammar::schema(), &mut value, &[], &BTreeMap::new());
        checked
            .findings
            .iter()
            .map(|f| format!("{} {} {} | {}", f.code, f.pointer, f.message, f.help.clone().unwrap_or_default()))
            .collect()
    }

    fn one(value: &Value) -> String {
        let all = found(value);
        assert_eq!(all.len(), 1, "{all:#?}");
        all.into_iter().next().unwrap()
    }

    #[test]
    fn a_wrong_key_gets_its_likely_meaning() {
        let sink = |more: Value| json!({"namespace": "a", "sink": more});
        assert!(one(&sink(json!({"stdout": {}, "retires": {}}))).contains("did you mean 'retry'?"));
        assert!(one(&sink(json!({"stdot": {}}))).contains("did you mean 'stdout'?"));
        assert!(
            one(&json!({"namespace": "a", "sink": {"stdout": {}}, "retry": {}}))
                .contains("'retry' belongs under 'sink'")
        );
        assert!(one(&sink(json!({"stdout": {}, "attempts": 3}))).contains("belongs under 'sink.retry'"));
        assert!(one(&sink(json!({"stdout": {}, "transform": []}))).contains("top level"));
        assert!(one(&sink(json!({"stdout": {}, "zzz": 1}))).contains("known here: route"));
        assert!(one(&sink(json!({"stdout": {"zzz": 1}}))).contains("nothing stands below"));
    }

    #[test]
    fn wrong_values_say_what_would_be_right() {
        let case = |more: Value| {
            let mut value = json!({"namespace": "a", "sink": {"stdout": {}}});
            value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            one(&value)
        };
        assert!(case(json!({"owner": 5})).contains("put quotes around it: \"5\""));
        assert!(case(json!({"transform": {"filter": "x"}})).contains("begin each item with '- '"));
        assert!(case(json!({"delay": {"for": "5s", "jitter": "soon"}})).contains("a duration such as"));
        assert!(case(json!({"source": {"backlog": {"on_full": "dorp"}}})).contains("did you mean 'drop'?"));
        assert!(case(json!({"sink": {"stdout": {}, "limits": {"concurrency": 0}}})).contains("the least is 1"));
        assert!(case(json!({"sink": {"stdout": {}, "batch": {"records": 1.5}}})).contains("whole number"));
        assert!(case(json!({"sink": {"stdout": {}, "batch": {"records": "ten"}}})).starts_with("WF0204"));
        assert!(case(json!({"delay": {"for": []}})).contains("a duration or an expression"));
        assert!(
            case(json!({"sink": {"stdout": {}, "dead_letters": {"also": {"file": {}}}}}))
                .contains("'path' is missing in 'file'")
        );
    }

    #[test]
    fn every_problem_is_found_and_the_rest_still_fits() {
        let mut value = json!({
            "namespace": "a", "typo": 1,
            "transform": ["x", {"filter": "true"}],
            "source": {"limits": {"record": "big"}, "key": "/id"},
            "sink": {"stdout": null, "batch": {"linger": {}}},
        });
        let checked = check_file(grammar::schema(), &mut value, &[], &BTreeMap::new());
        assert_eq!(checked.findings.len(), 4, "{:#?}", checked.findings);
        let spec: crate::spec::PipelineSpec = serde_json::from_value(value).unwrap();
        assert_eq!(spec.source.key.as_deref(), Some("/id"));
        assert_eq!(spec.transform.len(), 2);
        assert!(spec.sink.stdout.is_some(), "nothing behind a kind means its defaults");
    }

    #[test]
    fn the_root_must_be_a_map() {
        assert!(one(&json!(["namespace"])).contains("expected a map for the file, found a list"));
        assert_eq!(found(&json!({})).len(), 2);
    }
}
