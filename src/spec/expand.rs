//! From the tree to a value: scalars get their types, references to the environment their values.
//!
//! Keys, scripts and expressions stay as they are written; test cases too. What was expanded is remembered by
//! pointer, so that whoever prints a value prints what was written.

use std::collections::BTreeMap;
use std::fmt;

use saphyr_parser::ScalarStyle;
use serde_json::Value;

use super::diagnostic::Diagnostic;
use super::environment::{Environment, Used, expand};
use super::text::Text;
use super::tree::{Content, Node};

/// References that cannot be expanded and are told.
const MOST_PROBLEMS: usize = 100;

/// What a scalar is to the parts that read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// A setting.
    Setting,
    /// A template, filled from each record.
    Template,
    /// A script or expression.
    Script,
    /// Taken exactly as written.
    Verbatim,
}

/// One scalar that held references.
#[derive(Clone)]
pub struct Written {
    /// As it stands in the file.
    pub text: String,
    /// What it referred to.
    pub used: Vec<Used>,
    /// What it is after expansion, when it is exactly one reference: its type follows from where it stands.
    pub whole: Option<String>,
}

impl fmt::Debug for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A file's value, and where it came from outside. `Debug` leaves the value out: it holds what came from outside.
#[derive(Clone, Default)]
pub struct Expansion {
    /// The whole file.
    pub value: Value,
    /// Scalars with references, by pointer.
    pub written: BTreeMap<String, Written>,
    /// References that cannot be expanded.
    pub problems: Vec<Diagnostic>,
}

impl fmt::Debug for Expansion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Expansion")
            .field("written", &self.written)
            .field("problems", &self.problems)
            .finish_non_exhaustive()
    }
}

impl Expansion {
    /// Every reference that took a value from outside, with that value.
    pub fn outside(&self) -> impl Iterator<Item = (&str, &str)> {
        self.written
            .values()
            .flat_map(|written| &written.used)
            .filter_map(|used| Some((used.name.as_str(), used.value.as_deref()?)))
    }
}

struct Walk<'a> {
    text: &'a Text,
    root: &'a Node,
    environment: &'a Environment,
    out: Expansion,
}

/// Expands a file.
pub fn expand_tree(text: &Text, root: &Node, environment: &Environment) -> Expansion {
    let mut walk = Walk { text, root, environment, out: Expansion::default() };
    let mut path = Vec::new();
    let value = walk.value(root, &mut path);
    walk.out.value = value;
    walk.out
}

/// Appends a step to a JSON pointer.
pub fn child(pointer: &str, step: &str) -> String {
    format!("{pointer}/{}", step.replace('~', "~0").replace('/', "~1"))
}

impl Walk<'_> {
    fn value(&mut self, node: &Node, path: &mut Vec<String>) -> Value {
        match &node.content {
            Content::Map(entries) => {
                let mut map = serde_json::Map::with_capacity(entries.len());
                for entry in entries {
                    path.push(entry.key.clone());
                    map.insert(entry.key.clone(), self.value(&entry.node, path));
                    path.pop();
                }
                Value::Object(map)
            }
            Content::List(items) => {
                let mut list = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    path.push(index.to_string());
                    list.push(self.value(item, path));
                    path.pop();
                }
                Value::Array(list)
            }
            Content::Scalar { text, style } => self.scalar(node, text, *style, path),
        }
    }

    fn scalar(&mut self, node: &Node, text: &str, style: ScalarStyle, path: &[String]) -> Value {
        let plain = style == ScalarStyle::Plain;
        let role = role(self.root, path);
        if matches!(role, Role::Script | Role::Verbatim) || !text.contains("${") {
            return if plain { core_type(text) } else { Value::String(text.to_owned()) };
        }
        let pointer = path.iter().fold(String::new(), |pointer, step| child(&pointer, step));
        match expand(text, self.environment, role == Role::Template) {
            Ok(expanded) => {
                let whole = expanded.whole.then(|| expanded.text.clone());
                self.out.written.insert(pointer, Written { text: text.to_owned(), used: expanded.used, whole });
                match core_type(&expanded.text) {
                    value @ (Value::Number(_) | Value::Bool(_)) if plain && expanded.whole => value,
                    _ => Value::String(expanded.text),
                }
            }
            Err(bad) => {
                for bad in bad.into_iter().take(MOST_PROBLEMS.saturating_sub(self.out.problems.len())) {
                    // The scalar's own text may differ from the file's (escapes, folding): find the reference there.
                    let reference = text.get(bad.range).unwrap_or_default();
                    let written = self.text.slice(node.range.clone());
                    let range = written.find(reference).map_or(node.range.clone(), |offset| {
                        node.range.start + offset..node.range.start + offset + reference.len()
                    });
                    self.out.problems.push(
                        Diagnostic::at(bad.code, self.text, &range, bad.message).help(bad.help).pointer(&pointer),
                    );
                }
                // The value is not known; its absence is not reported a second time.
                Value::Null
            }
        }
    }
}

/// The type of a plain scalar in YAML's core schema, as serde_yaml reads it; what JSON has no number for stays text.
pub(super) fn core_type(text: &str) -> Value {
    let could_be = text.len() <= 64
        && text.bytes().next().is_none_or(|first| first.is_ascii_digit() || b"+-.~nNtTfF".contains(&first))
        && !text.contains('\n');
    if !could_be {
        return Value::String(text.to_owned());
    }
    match serde_yaml::from_str::<Value>(text) {
        Ok(value @ (Value::Null | Value::Bool(_) | Value::Number(_))) => value,
        _ => Value::String(text.to_owned()),
    }
}

/// The kind word of a sink or arm.
pub fn kind_of(sink: &Node) -> Option<&'static str> {
    super::grammar::SINK_KINDS.iter().find(|kind| sink.get(kind).is_some()).copied()
}

fn arm<'a>(root: &'a Node, name: &str) -> Option<&'a Node> {
    let sink = root.get("sink")?;
    if let Some(arm) = sink.get("fan_out").and_then(|arms| arms.get(name)) {
        return Some(arm);
    }
    let Content::List(arms) = &sink.get("route")?.content else { return None };
    let is = |arm: &&Node| matches!(arm.get("name").map(|node| &node.content), Some(Content::Scalar { text, .. }) if text == name);
    arms.iter().find(is)
}

/// What the scalar at a path is.
fn role(root: &Node, path: &[String]) -> Role {
    let steps: Vec<&str> = path.iter().map(String::as_str).collect();
    match steps.as_slice() {
        ["tests", ..] => Role::Verbatim,
        ["delay", "until" | "for"] => {
            let whole = |node: &Node| matches!(&node.content, Content::Scalar { text, .. } if text.starts_with("${") && text.ends_with('}'));
            if steps.last() == Some(&"for") && root.get("delay").and_then(|delay| delay.get("for")).is_some_and(whole) {
                Role::Setting
            } else {
                Role::Script
            }
        }
        [.., "transform", _, "filter" | "inline"] | ["sink", "route" | "fan_out", _, "when"] => Role::Script,
        ["sink", "route" | "fan_out", _, rest @ ..] | ["sink", rest @ ..] => match rest {
            ["dead_letters", "also", "file", "path"] => Role::Template,
            [kind, rest @ ..] => of_kind(kind, rest),
            [] => Role::Setting,
        },
        ["replicate", "regions", _, rest @ ..] => {
            if let Some(kind) = root.get("sink").and_then(kind_of) {
                return of_kind(kind, rest);
            }
            match rest {
                [name, rest @ ..] => {
                    arm(root, name).and_then(kind_of).map_or(Role::Setting, |kind| of_kind(kind, rest))
                }
                [] => Role::Setting,
            }
        }
        _ => Role::Setting,
    }
}

fn of_kind(kind: &str, path: &[&str]) -> Role {
    match (kind, path) {
        (_, ["cases", _, "when"]) => Role::Script,
        ("file", ["path"])
        | ("http", ["url"] | ["headers" | "body", ..])
        | ("redis", ["cases", _, "key" | "value" | "fields" | "by", ..]) => Role::Template,
        _ => Role::Setting,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tree;

    fn expansion(yaml: &str) -> Expansion {
        let text = Text::new("a.yaml", yaml);
        let (root, _) = tree::read(&text).unwrap();
        let environment = Environment::new(
            [("N", "8"), ("S", "no: {payload.x}"), ("T", "true")].map(|(n, v)| (n.to_owned(), v.to_owned())),
        );
        expand_tree(&text, &root, &environment)
    }

    #[test]
    fn a_plain_scalar_that_is_one_reference_takes_a_type_and_nothing_else_does() {
        let value = expansion("a: ${N}\nb: \"${N}\"\nc: x${N}\nd: ${T}\ne: ${S}\nf: ${NONE:-null}\n").value;
        assert_eq!(
            value,
            serde_json::json!({"a": 8, "b": "8", "c": "x8", "d": true, "e": "no: {payload.x}", "f": "null"})
        );
    }

    #[test]
    fn keys_scripts_and_tests_are_not_touched() {
        let expansion = expansion(
            "transform: [{ filter: '`${N}` == \"\"' }, { inline: 'let x = `${NONE}`;' }]\nsink:\n  route: [{ when: '`${NONE}`', file: { path: 'x/${S}' } }]\ndelay: { until: '`${NONE}`', for: \"${N}\" }\ntests: [{ write: '${NONE}' }]\n'${NONE}': 1\n",
        );
        assert!(expansion.problems.is_empty(), "{:?}", expansion.problems);
        assert_eq!(expansion.value["sink"]["route"][0]["file"]["path"], "x/no: {{payload.x}");
        assert_eq!(expansion.value["delay"]["for"], "8");
    }

    #[test]
    fn a_region_knows_which_of_its_fields_are_templates() {
        let http = expansion("replicate: { regions: { a: { url: '${S}' } } }\nsink: { http: { url: x } }\n").value;
        assert_eq!(http["replicate"]["regions"]["a"]["url"], "no: {{payload.x}");
        let redis = expansion(
            "replicate: { regions: { a: { r: { url: '${S}' } } } }\nsink: { route: [{ name: r, redis: {} }] }\n",
        )
        .value;
        assert_eq!(redis["replicate"]["regions"]["a"]["r"]["url"], "no: {payload.x}");
    }

    #[test]
    fn an_unset_variable_is_reported_at_its_place() {
        let problems = expansion("sink:\n  redis: { url: \"redis://${NONE}/1\" }\n").problems;
        assert_eq!(problems[0].short(), "a.yaml:2:26: error[WF0301]: the environment variable NONE is not set");
    }

    #[test]
    fn plain_scalars_have_the_types_of_serde_yaml() {
        for text in [
            "1", "-1.5", "0x1f", "true", "~", "null", "1e3", "no", "yes", "1_000", "12:30", ".inf", "+1", "1.2.3", "-",
            "007",
        ] {
            let ours = core_type(text);
            let theirs = serde_yaml::from_str::<serde_yaml::Value>(text).unwrap();
            let theirs = serde_json::to_value(theirs).unwrap_or_else(|_| Value::String(text.to_owned()));
            if text != ".inf" && text != "-" {
                assert_eq!(ours, theirs, "{text}");
            }
        }
    }
}
