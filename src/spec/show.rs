//! The effective pipeline as YAML, or the service's own settings, behind each value where it came from.
//!
//! Takes a file that was loaded, gives text or JSON. Shows what was written and never what a reference stands for;
//! credentials that were written out are masked.

use serde_json::{Map, Value, json};

use super::diagnostic::mask;
use super::expand::child;
use super::load::Loaded;
use super::settings::InForce;
use super::shared::{KEYS, Shared};
use super::text::Text;
use super::tree::{self, Content, Node};

/// One line of the effective pipeline.
struct Line {
    depth: usize,
    head: String,
    value: Option<Value>,
    pointer: String,
    origin: Option<String>,
}

struct Show {
    text: Text,
    shared: Option<Node>,
    lines: Vec<Line>,
}

impl Loaded {
    /// Where the value at a pointer stands: `a.yaml:3`, `walflow.yaml:7 (connection main)`, `default`.
    pub fn origin(&self, pointer: &str) -> String {
        let show = Show::of(self);
        match self.root.as_ref().map(|root| root.nearest(pointer)) {
            Some((node, _, true)) => show.origin(node.range.start),
            _ => "default".to_owned(),
        }
    }

    /// The effective pipeline as YAML with its origins.
    pub fn effective_text(&self) -> String {
        Show::of(self).walked(self).text()
    }

    /// The same for programs: each value with its pointer and origin.
    pub fn effective_json(&self) -> Value {
        let values = Show::of(self).walked(self).values();
        json!({ "namespace": self.namespace.as_ref().map(crate::record::Namespace::as_str), "file": **self.text.name(), "values": values })
    }

    /// What came from walflow.yaml, with its origin, in the order of the file.
    pub fn inherited(&self) -> Vec<String> {
        let show = Show::of(self).walked(self);
        let taken = show.lines.into_iter().filter_map(|line| {
            let origin = line.origin.filter(|origin| origin.ends_with(')'))?;
            let value = line.value.as_ref().map(written)?;
            Some(format!("{}: {value}  # {origin}", line.pointer.trim_start_matches('/').replace('/', ".")))
        });
        taken.collect()
    }
}

/// The service's own settings, and what its pipelines share, as YAML with origins.
pub fn service_text(settings: &InForce, shared: Option<&Shared>) -> String {
    Show::service(settings, shared).text()
}

/// The same for programs: each value with its pointer and origin.
pub fn service_json(settings: &InForce, shared: Option<&Shared>) -> Value {
    let file = shared.map(|shared| &**shared.text.name());
    json!({ "file": file, "values": Show::service(settings, shared).values() })
}

/// A value as YAML has it on one line.
fn written(value: &Value) -> String {
    match value {
        Value::String(text) if !text.is_empty() && is_plain(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The text needs no quotes.
fn is_plain(text: &str) -> bool {
    serde_yaml::from_str::<Value>(text).is_ok_and(|value| value == Value::String(text.to_owned()))
        && !text.contains([':', '#', '{', '[', '\n', ','])
}

impl Show {
    fn of(loaded: &Loaded) -> Self {
        let shared = loaded.text.behind().and_then(|text| tree::read(text).ok()).map(|(root, _)| root);
        Self { text: loaded.text.clone(), shared, lines: Vec::new() }
    }

    fn service(settings: &InForce, shared: Option<&Shared>) -> Self {
        let mut lines = Vec::new();
        for held in &settings.held {
            let (head, pointer) = (format!("{}:", held.key), child("", &held.key));
            let origin = Some(held.origin.to_string());
            let Value::Array(items) = &held.value else {
                lines.push(Line { depth: 0, head, value: Some(held.value.clone()), pointer, origin });
                continue;
            };
            lines.push(Line { depth: 0, head, value: None, pointer: pointer.clone(), origin: None });
            lines.extend(items.iter().enumerate().map(|(index, item)| Line {
                depth: 1,
                head: "- ".to_owned(),
                value: Some(item.clone()),
                pointer: child(&pointer, &index.to_string()),
                origin: origin.clone(),
            }));
        }
        let text = shared.map_or_else(|| Text::new("", ""), |shared| shared.text.clone());
        let mut show = Self { text, shared: None, lines };
        if let Some(Content::Map(entries)) = shared.and_then(|shared| shared.root.as_ref()).map(|root| &root.content) {
            let parts = entries.iter().filter(|entry| KEYS.contains(&entry.key.as_str())).cloned().collect();
            show.node(&Node { content: Content::Map(parts), range: 0..0 }, None, "", 0);
        }
        show
    }

    fn text(&self) -> String {
        let texts: Vec<(String, Option<&str>)> = self
            .lines
            .iter()
            .map(|line| {
                let value = line.value.as_ref().map(written).unwrap_or_default();
                let space = if value.is_empty() || line.head.ends_with("- ") { "" } else { " " };
                (format!("{}{}{space}{value}", "  ".repeat(line.depth), line.head), line.origin.as_deref())
            })
            .collect();
        let width = texts.iter().filter(|(_, origin)| origin.is_some()).map(|(text, _)| text.chars().count());
        let width = width.filter(|width| *width <= 72).max().unwrap_or(0);
        texts.iter().fold(String::new(), |out, (text, origin)| match origin {
            Some(origin) => format!("{out}{text:width$}  # {origin}\n"),
            None => format!("{out}{text}\n"),
        })
    }

    fn values(self) -> Vec<Value> {
        let lines = self.lines.into_iter();
        lines
            .filter_map(|line| Some(json!({ "pointer": line.pointer, "value": line.value?, "origin": line.origin? })))
            .collect()
    }

    fn walked(mut self, loaded: &Loaded) -> Self {
        let whole = loaded.spec.as_ref().and_then(|spec| serde_json::to_value(spec).ok());
        if let Some(root) = &loaded.root {
            self.node(root, whole.as_ref(), "", 0);
        }
        self
    }

    fn origin(&self, at: usize) -> String {
        let (text, range) = self.text.part(at..at);
        let place = format!("{}:{}", text.name(), text.line_of(range.start));
        if at < self.text.beyond() {
            return place;
        }
        let holder = |map: Option<&Node>| match map.map(|map| &map.content) {
            Some(Content::Map(entries)) => {
                entries.iter().rfind(|entry| entry.key_range.start <= range.start).map(|entry| entry.key.clone())
            }
            _ => None,
        };
        match holder(self.shared.as_ref()).as_deref() {
            Some("connections") => {
                let all = self.shared.as_ref().and_then(|root| root.get("connections"));
                format!("{place} (connection {})", holder(all).unwrap_or_default())
            }
            _ => format!("{place} (defaults)"),
        }
    }

    fn node(&mut self, node: &Node, whole: Option<&Value>, pointer: &str, depth: usize) {
        match &node.content {
            Content::Map(entries) => {
                for entry in entries {
                    let here = child(pointer, &entry.key);
                    let part = whole.and_then(|whole| whole.get(&entry.key));
                    self.entry(format!("{}:", entry.key), &entry.key, &entry.node, part, &here, depth);
                }
                let rest = whole.and_then(Value::as_object).into_iter().flatten();
                for (key, value) in rest.filter(|(key, _)| !entries.iter().any(|entry| entry.key == **key)) {
                    self.default(key, value, pointer, depth);
                }
            }
            Content::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    let here = child(pointer, &index.to_string());
                    let part = whole.and_then(|whole| whole.get(index));
                    let from = self.lines.len();
                    match &item.content {
                        Content::Scalar { .. } => self.entry("- ".to_owned(), "", item, part, &here, depth),
                        _ => self.node(item, part, &here, depth + 1),
                    }
                    if let Some(first) = self.lines.get_mut(from).filter(|first| first.depth > depth) {
                        first.depth = depth;
                        first.head.insert_str(0, "- ");
                    }
                }
            }
            Content::Scalar { .. } => {}
        }
    }

    fn entry(&mut self, head: String, key: &str, node: &Node, whole: Option<&Value>, pointer: &str, depth: usize) {
        let value = match &node.content {
            Content::Scalar { text, style } => {
                let plain = *style == saphyr_parser::ScalarStyle::Plain;
                let value = if plain { super::expand::core_type(text) } else { Value::String(text.clone()) };
                let holder = if pointer.contains("/headers/") { "secret" } else { key };
                Some(masked(holder, value))
            }
            Content::List(items) if items.is_empty() => Some(Value::Array(Vec::new())),
            Content::Map(entries) if entries.is_empty() && !has_values(whole) => Some(Value::Object(Map::new())),
            _ => None,
        };
        let origin = value.as_ref().map(|_| self.origin(node.range.start));
        self.lines.push(Line { depth, head, value, pointer: pointer.to_owned(), origin });
        self.node(node, whole, pointer, depth + 1);
    }

    fn default(&mut self, key: &str, value: &Value, pointer: &str, depth: usize) {
        if !has_values(Some(value)) {
            return;
        }
        let here = child(pointer, key);
        let head = format!("{key}:");
        if let Value::Object(map) = value {
            self.lines.push(Line { depth, head, value: None, pointer: here.clone(), origin: None });
            for (key, value) in map {
                self.default(key, value, &here, depth + 1);
            }
        } else {
            let (value, origin) = (Some(value.clone()), Some("default".to_owned()));
            self.lines.push(Line { depth, head, value, pointer: here, origin });
        }
    }
}

/// Anything but nothing, empty lists and empty maps.
fn has_values(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::Object(map)) => map.values().any(|value| has_values(Some(value))),
        Some(_) => true,
    }
}

/// The value without credentials: those of addresses, and all that stands under a key for them.
fn masked(key: &str, value: Value) -> Value {
    let Value::String(text) = value else {
        let clean = mask(&format!("{key}: {value}"));
        return if clean == format!("{key}: {value}") { value } else { Value::String("***".to_owned()) };
    };
    if text.starts_with("${") && text.ends_with('}') && text.matches("${").count() == 1 {
        return Value::String(text);
    }
    // What follows the '?' of an address may be a key.
    let text = match text.split_once('?') {
        Some((address, _)) if address.contains("://") => format!("{address}?***"),
        _ => text,
    };
    let line = mask(&format!("{key}: {text}"));
    Value::String(line.strip_prefix(&format!("{key}: ")).map_or_else(|| "***".to_owned(), str::to_owned))
}

#[cfg(test)]
mod tests {
    use crate::spec::environment::Environment;
    use crate::spec::shared::Shared;
    use crate::spec::text::Text;
    use crate::spec::{Loaded, Neighbours, load_text_with};

    fn loaded() -> Loaded {
        let environment = Environment::new([("P".to_owned(), "CANARY-1".to_owned())]);
        let config = "connections:\n  main: { redis: { url: \"redis://u:${P}@r/1\" } }\n  literal:\n    redis: { url: redis://u:CANARY-2@r/1 }\ndefaults:\n  sink: { limits: { concurrency: 3 } }\n";
        let shared = Shared::of_text(Text::new("walflow.yaml", config), &environment);
        let yaml = "namespace: a\nsink:\n  route:\n    - { name: x, when: 'payload.n > 1', redis: { use: main } }\n    - { name: y, redis: { use: literal } }\n    - { name: z, http: { url: 'http://h/?k=CANARY-3', headers: { X-Key: CANARY-4 } } }\n";
        load_text_with(Text::new("a.yaml", yaml), Neighbours::kept([].into()), Some(&shared), &environment)
    }

    #[test]
    fn each_value_says_where_it_came_from() {
        let file = loaded();
        assert_eq!(file.origin("/namespace"), "a.yaml:1");
        assert_eq!(file.origin("/sink/route/0/redis/url"), "walflow.yaml:2 (connection main)");
        assert_eq!(file.origin("/sink/route/1/redis/url"), "walflow.yaml:4 (connection literal)");
        assert_eq!(file.origin("/sink/limits/concurrency"), "walflow.yaml:6 (defaults)");
        assert_eq!(file.origin("/source/backlog/size"), "default");
        let inherited = file.inherited();
        assert!(
            inherited.contains(&"sink.limits.concurrency: 3  # walflow.yaml:6 (defaults)".to_owned()),
            "{inherited:?}"
        );
    }

    #[test]
    fn the_effective_pipeline_is_yaml_without_secrets() {
        let file = loaded();
        let text = file.effective_text();
        assert!(!text.contains("CANARY") && !file.effective_json().to_string().contains("CANARY"), "{text}");
        assert!(text.contains("# default"), "{text}");
        let value: serde_json::Value = serde_yaml::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(value["sink"]["limits"]["concurrency"], 3, "{text}");
        assert_eq!(value["sink"]["route"][0]["when"], "payload.n > 1", "{text}");
        assert_eq!(value["sink"]["route"][0]["redis"]["url"], "redis://u:****@r/1", "{text}");
    }
}
