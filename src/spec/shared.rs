//! walflow.yaml: the service's own settings and what pipelines share, read and checked on its own.
//!
//! Takes the file's text, gives its settings, and its connections and defaults as trees that know where they stand, with
//! every problem.
//! Never merges anything into a pipeline.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::check::{Checked, Finding, check, nearest};
use super::code::Code;
use super::diagnostic::Diagnostic;
use super::environment::Environment;
use super::expand::{child, expand_tree};
use super::grammar::{self, CONNECTION_KINDS};
use super::load::{Loaded, Neighbours, of_fault, read_text};
use super::settings::{self, InFile};
use super::text::Text;
use super::tree::{self, Content, Entry, Node};

/// The keys of walflow.yaml beside the service's own settings.
pub(super) const KEYS: &[&str] = &["connections", "defaults"];
/// What a pipeline says for itself alone.
const OWN: &[&str] = &["namespace", "retired", "tests"];

/// walflow.yaml as it was read.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Its text, under the name that the user gave.
    pub text: Text,
    /// Everything that is wrong with it.
    pub diagnostics: Vec<Diagnostic>,
    /// What it says of the service's own settings, as far as that is fine.
    pub settings: InFile,
    pub(super) root: Option<Node>,
    path: Option<PathBuf>,
}

/// The file that holds: the one that was named, else that of the working folder, else that of the machine.
pub fn find(named: Option<&Path>) -> Option<PathBuf> {
    match named {
        Some(named) => Some(named.to_path_buf()),
        None => ["walflow.yaml", "/etc/walflow/walflow.yaml"].iter().map(PathBuf::from).find(|path| path.is_file()),
    }
}

impl Shared {
    /// Reads the file. One that cannot be read is one with a problem.
    pub fn read(path: &Path, environment: &Environment) -> Self {
        let name = path.display().to_string();
        let mut shared = match read_text(path) {
            Ok(text) => Self::of_text(Text::new(&name, &text), environment),
            Err((code, message)) => Self {
                text: Text::new(&name, ""),
                diagnostics: vec![
                    Diagnostic::of_file(code, &name, message)
                        .help("--config or WALFLOW_CONFIG names the file; without either it may be missing"),
                ],
                ..Self::of_text(Text::new(&name, ""), environment)
            },
        };
        shared.path = path.canonicalize().ok();
        shared
    }

    /// Reads the file's text. One that says nothing shares nothing.
    pub fn of_text(text: Text, environment: &Environment) -> Self {
        let says_nothing = text.as_str().lines().all(|line| line.trim().is_empty() || line.trim().starts_with('#'));
        if says_nothing {
            return Self { text, diagnostics: Vec::new(), settings: InFile::default(), root: None, path: None };
        }
        match tree::read(&text) {
            Ok((root, faults)) => {
                let faults = faults.into_iter().map(|fault| of_fault(&text, fault)).collect();
                let mut loaded = Loaded { root: Some(root), ..Loaded::broken(text, Neighbours::kept([].into())) };
                loaded.diagnostics = faults;
                let settings = inspect(&mut loaded, environment);
                loaded.tidy();
                Self { text: loaded.text, diagnostics: loaded.diagnostics, settings, root: loaded.root, path: None }
            }
            Err(fault) => {
                let diagnostics = vec![of_fault(&text, fault)];
                Self { text, diagnostics, settings: InFile::default(), root: None, path: None }
            }
        }
    }

    /// The first thing that keeps it from counting.
    pub fn error(&self) -> Option<&Diagnostic> {
        self.diagnostics.iter().find(|found| found.is_error())
    }

    /// Every error, when one of them leaves open how the service itself shall run. What is wrong with connections and
    /// defaults concerns the pipelines that take them.
    pub fn unusable(&self) -> Vec<&Diagnostic> {
        let of_pipelines = |at: &str| at.split('/').nth(1).is_some_and(|key| KEYS.contains(&key));
        let errors: Vec<&Diagnostic> = self.diagnostics.iter().filter(|found| found.is_error()).collect();
        if errors.iter().all(|found| of_pipelines(&found.pointer)) { Vec::new() } else { errors }
    }

    /// True when a path leads to it.
    pub fn is_at(&self, path: &Path) -> bool {
        self.path.is_some() && path.canonicalize().ok() == self.path
    }

    /// The connections by name.
    pub(super) fn connections(&self) -> impl Iterator<Item = (&str, &Node)> {
        let all = self.root.as_ref().and_then(|root| root.get("connections"));
        let entries = match all.map(|all| &all.content) {
            Some(Content::Map(entries)) => entries.as_slice(),
            _ => &[],
        };
        entries.iter().map(|entry| (entry.key.as_str(), &entry.node))
    }

    /// The partial pipeline under all pipelines.
    pub(super) fn defaults(&self) -> Option<&Node> {
        self.root.as_ref().and_then(|root| root.get("defaults")).filter(|node| matches!(node.content, Content::Map(_)))
    }

    /// The text without what a pipeline does not use, each of the rest where it stood; `None` when it uses nothing.
    pub(super) fn relevant(&self, used: &HashSet<String>, defaults: bool) -> Option<Text> {
        let root = self.root.as_ref()?;
        if used.is_empty() && !defaults {
            return None;
        }
        let end = self.text.as_str().len();
        // An anchor or a map in braces may reach beyond its part: then more is kept.
        for whole in [false, true] {
            let mut text = self.text.as_str().to_owned();
            let keeps = |entry: &Entry| match entry.key.as_str() {
                "connections" => whole || !used.is_empty(),
                "defaults" => whole || defaults,
                _ => false,
            };
            self.blank(root, end, &mut text, &keeps);
            if let Some(at) = root.entry("connections").filter(|_| !whole && !used.is_empty()) {
                let after = following(root, at.key_range.start).unwrap_or(end);
                self.blank(&at.node, after, &mut text, &|entry| used.contains(&entry.key));
            }
            let trimmed = Text::new(self.text.name(), &text);
            let same = tree::read(&trimmed).is_ok_and(|(other, faults)| {
                let equal = |pointer: &str| {
                    let (a, b) = (root.nearest(pointer), other.nearest(pointer));
                    a.2 == b.2 && (!a.2 || format!("{:?}", a.0) == format!("{:?}", b.0))
                };
                let mut parts = used.iter().map(|name| child("/connections", name));
                faults.is_empty() && parts.all(|part| equal(&part)) && (!defaults || equal("/defaults"))
            });
            if same {
                return Some(trimmed);
            }
        }
        Some(self.text.clone())
    }

    /// Blanks the lines of every entry of a map that is not kept.
    fn blank(&self, map: &Node, end: usize, text: &mut String, keeps: &dyn Fn(&Entry) -> bool) {
        let Content::Map(entries) = &map.content else { return };
        for entry in entries.iter().filter(|entry| !keeps(entry)) {
            let line = |at: usize| self.text.offset_at(self.text.line_of(at), 1);
            let from = line(entry.key_range.start);
            let to = following(map, entry.key_range.start).map_or(end, line);
            let Some(part) = text.get(from..to) else { continue };
            let blanks: String =
                part.bytes().map(|byte| if byte == b'\n' || byte == b'\r' { char::from(byte) } else { ' ' }).collect();
            text.replace_range(from..to, &blanks);
        }
    }
}

/// Where the next key of a map stands.
fn following(map: &Node, start: usize) -> Option<usize> {
    let Content::Map(entries) = &map.content else { return None };
    entries.iter().map(|entry| entry.key_range.start).filter(|at| *at > start).min()
}

fn inspect(loaded: &mut Loaded, environment: &Environment) -> InFile {
    let Some(root) = loaded.root.clone() else { return InFile::default() };
    let mut findings = Vec::new();
    let Content::Map(entries) = &root.content else {
        findings.push(finding(Code::WrongType, "", "walflow.yaml holds a map", "write `connections:` and `defaults:`"));
        tell(loaded, &findings);
        return InFile::default();
    };
    for entry in entries {
        match entry.key.as_str() {
            "connections" => connections(loaded, &entry.node, environment, &mut findings),
            "defaults" => {
                for own in OWN.iter().filter(|own| entry.node.get(own).is_some()) {
                    let message = format!("'{own}' has no default: it is each pipeline's own");
                    findings.push(finding(
                        Code::MisplacedKey,
                        &child("/defaults", own),
                        message,
                        "move it to the pipeline file",
                    ));
                }
                part(loaded, &entry.node, grammar::schema(), "/defaults", environment, &mut findings);
            }
            other if settings::keys().any(|key| key == other) => {}
            other => {
                let keys: Vec<&str> = KEYS.iter().copied().chain(settings::keys()).collect();
                let help = match nearest(other, keys.iter().copied()) {
                    Some(meant) => format!("did you mean '{meant}'?"),
                    None if grammar::properties(grammar::schema()).any(|(key, _)| key == other) => {
                        format!("'{other}' belongs to a pipeline: put it below `defaults:`")
                    }
                    None => format!("the keys of walflow.yaml are {}", keys.join(", ")),
                };
                findings.push(finding(Code::UnknownKey, &child("", other), format!("unknown key '{other}'"), help));
            }
        }
    }
    let settings = InFile::read(loaded, entries, environment, &mut findings);
    tell(loaded, &findings);
    settings
}

fn finding(code: Code, pointer: &str, message: impl Into<String>, help: impl Into<String>) -> Finding {
    Finding { code, pointer: pointer.to_owned(), at_key: true, message: message.into(), help: Some(help.into()) }
}

fn tell(loaded: &mut Loaded, findings: &[Finding]) {
    for finding in findings {
        let diagnostic = loaded.of_finding(finding);
        loaded.diagnostics.push(diagnostic);
    }
}

fn connections(loaded: &mut Loaded, all: &Node, environment: &Environment, findings: &mut Vec<Finding>) {
    let kinds = CONNECTION_KINDS.join(", ");
    let Content::Map(entries) = &all.content else {
        findings.push(finding(
            Code::WrongType,
            "/connections",
            "expected a map for 'connections'",
            format!("write NAME: with one of {kinds}"),
        ));
        return;
    };
    for entry in entries {
        let pointer = child("/connections", &entry.key);
        let fields = match &entry.node.content {
            Content::Map(fields) => fields.as_slice(),
            _ => &[],
        };
        for field in fields.iter().filter(|field| !CONNECTION_KINDS.contains(&field.key.as_str())) {
            let help = nearest(&field.key, CONNECTION_KINDS.iter().copied())
                .map_or_else(|| format!("a connection is one of {kinds}"), |meant| format!("did you mean '{meant}'?"));
            let message = format!("'{}' is no kind of connection", field.key);
            findings.push(finding(Code::UnknownKey, &child(&pointer, &field.key), message, help));
        }
        if fields.len() != 1 {
            let message = format!("the connection '{}' needs exactly one kind", entry.key);
            findings.push(finding(Code::OneKind, &pointer, message, format!("one of {kinds}")));
        }
        for field in fields {
            if field.node.get("use").is_some() {
                let at = child(&child(&pointer, &field.key), "use");
                findings.push(finding(Code::MisplacedKey, &at, "a connection uses no other", "write the fields out"));
            }
            settings(loaded, &field.node, &field.key, &child(&pointer, &field.key), environment, findings);
        }
    }
}

/// A connection's fields are those of any sink, source or shelf of its kind.
fn settings(
    loaded: &mut Loaded,
    node: &Node,
    kind: &str,
    pointer: &str,
    environment: &Environment,
    findings: &mut Vec<Finding>,
) {
    let of = |holder: &str| {
        let found = grammar::properties(grammar::definition(holder)).find(|(name, _)| *name == kind);
        found.map(|(_, schema)| schema)
    };
    let mut best: Option<(Vec<Finding>, Vec<Diagnostic>)> = None;
    for schema in ["SinkSpec", "SourceSpec", "ShelfSpec"].into_iter().filter_map(of) {
        let earlier = loaded.diagnostics.len();
        let mut found = Vec::new();
        part(loaded, node, schema, pointer, environment, &mut found);
        let said = loaded.diagnostics.split_off(earlier);
        if best.as_ref().is_none_or(|(least, _)| found.len() < least.len()) {
            best = Some((found, said));
        }
    }
    if let Some((found, said)) = best {
        findings.extend(found);
        loaded.diagnostics.extend(said);
    }
}

/// Checks a part of the file against a part of the grammar.
fn part(
    loaded: &mut Loaded,
    node: &Node,
    schema: &'static Value,
    pointer: &str,
    environment: &Environment,
    findings: &mut Vec<Finding>,
) {
    let mut node = node.clone();
    without_use(&mut node);
    let mut expansion = expand_tree(&loaded.text, &node, environment);
    let mut checked = Checked::default();
    // What is not there may be the pipeline's to give, and so is a value from the environment that is not set.
    let unknown: Vec<String> =
        expansion.problems.drain(..).map(|problem| format!("{pointer}{}", problem.pointer)).collect();
    let whole: Vec<String> = expansion.written.keys().map(|at| format!("{pointer}{at}")).collect();
    check(schema, &mut expansion.value, pointer, false, &mut checked);
    // What a reference gives is checked where it is used, with the type that its place asks for.
    findings.extend(
        checked
            .findings
            .into_iter()
            .filter(|finding| !whole.contains(&finding.pointer) && !unknown.contains(&finding.pointer)),
    );
    loaded.expansion.written.extend(
        std::mem::take(&mut expansion.written).into_iter().map(|(at, written)| (format!("{pointer}{at}"), written)),
    );
}

fn without_use(node: &mut Node) {
    match &mut node.content {
        Content::Scalar { .. } => {}
        Content::List(items) => items.iter_mut().for_each(without_use),
        Content::Map(entries) => {
            for entry in entries {
                if CONNECTION_KINDS.contains(&entry.key.as_str())
                    && let Content::Map(fields) = &mut entry.node.content
                {
                    fields.retain(|field| field.key != "use");
                }
                without_use(&mut entry.node);
            }
        }
    }
}
