//! From paths to files that were read, expanded and checked, with every problem of each.
//!
//! Takes paths and the environment, gives one [`Loaded`] for each file, broken ones too. Opens the files that are
//! named and those that they name, nothing else; a file that is too large is never read.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use saphyr_parser::ScalarStyle;
use serde_json::Value;
use serde_path_to_error::Segment;

use super::check::{self, Finding};
use super::code::Code;
use super::diagnostic::Diagnostic;
use super::environment::Environment;
use super::expand::{Expansion, child, expand_tree};
use super::merge;
use super::shared::Shared;
use super::text::Text;
use super::tree::{self, Content, Node};
use super::{PipelineSpec, grammar, rules};
use crate::record::Namespace;

/// The largest file that is read, in bytes.
pub const LARGEST_FILE: u64 = 1 << 20;

/// Problems of one file that are told; a file that has more is no pipeline file.
const MOST_PROBLEMS: usize = 100;

/// One pipeline file: what it says, where it says it, and what is wrong with it. `Debug` leaves out what may hold
/// values from outside.
#[derive(Clone)]
pub struct Loaded {
    /// Its text, under the name that the user gave.
    pub text: Text,
    /// The namespace, when the file says one that is valid, even if the rest is broken.
    pub namespace: Option<Namespace>,
    /// What was written; `None` when too little of it could be read.
    pub spec: Option<PipelineSpec>,
    /// The value after expansion, without what does not fit the grammar.
    pub value: Value,
    /// What came from outside.
    pub expansion: Expansion,
    /// Everything found so far, in file order.
    pub diagnostics: Vec<Diagnostic>,
    /// Where scripts and schemas come from.
    pub neighbours: Neighbours,
    pub(super) root: Option<Node>,
    pub(super) pruned: Vec<String>,
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded")
            .field("file", self.text.name())
            .field("namespace", &self.namespace)
            .field("diagnostics", &self.diagnostics)
            .finish_non_exhaustive()
    }
}

/// The files that a pipeline file names: on disk beside it, or kept from an earlier time.
#[derive(Clone, Debug)]
pub struct Neighbours {
    folder: Option<PathBuf>,
    kept: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Neighbours {
    /// Files relative to a folder.
    pub fn beside(file: &Path) -> Self {
        Self { folder: Some(file.parent().unwrap_or(Path::new("")).to_path_buf()), kept: Arc::default() }
    }

    /// Files that were kept, by the name that the pipeline file has for them.
    pub fn kept(files: BTreeMap<String, String>) -> Self {
        Self { folder: None, kept: Arc::new(Mutex::new(files)) }
    }

    /// The text of a file, which is kept from now on.
    ///
    /// # Errors
    /// When it cannot be read, is too large or not text.
    pub fn read(&self, name: &str) -> std::io::Result<String> {
        if let Some(text) = self.kept.lock().get(name) {
            return Ok(text.clone());
        }
        let Some(folder) = &self.folder else {
            return Err(std::io::Error::new(std::io::ErrorKind::NotFound, "it was not kept with the pipeline file"));
        };
        let text = read_text(&folder.join(name)).map_err(|(_, message)| std::io::Error::other(message))?;
        self.kept.lock().insert(name.to_owned(), text.clone());
        Ok(text)
    }

    /// The name of a neighbour as messages show it.
    pub fn shown(&self, name: &str) -> String {
        self.folder.as_ref().map_or_else(|| name.to_owned(), |folder| folder.join(name).display().to_string())
    }

    /// Everything that was read, by name.
    pub fn all(&self) -> BTreeMap<String, String> {
        self.kept.lock().clone()
    }
}

/// All files of a run.
#[derive(Debug, Default)]
pub struct Load {
    /// One for each file, in order.
    pub files: Vec<Loaded>,
    /// Problems of no file: a path that leads nowhere.
    pub diagnostics: Vec<Diagnostic>,
}

/// Reads pipeline files. A path is a file, or a folder whose `*.yaml` and `*.yml` are taken, sorted by name.
pub fn load(paths: &[PathBuf], environment: &Environment) -> Load {
    load_with(paths, None, environment)
}

/// The same, with what pipelines share: its own problems are among those of no file.
pub fn load_with(paths: &[PathBuf], shared: Option<&Shared>, environment: &Environment) -> Load {
    let mut out =
        Load { diagnostics: shared.map(|shared| shared.diagnostics.clone()).unwrap_or_default(), ..Load::default() };
    let mut files = discover(paths, &mut out.diagnostics);
    files.retain(|file| !shared.is_some_and(|shared| shared.is_at(file)));
    for path in files {
        let name = path.display().to_string();
        match read_text(&path) {
            Ok(text) => {
                out.files.push(load_text_with(Text::new(&name, &text), Neighbours::beside(&path), shared, environment));
            }
            Err((code, message)) => {
                let broken = Loaded::broken(Text::new(&name, ""), Neighbours::beside(&path));
                let diagnostic = Diagnostic::of_file(code, &name, message);
                out.files.push(Loaded { diagnostics: vec![diagnostic], ..broken });
            }
        }
    }
    rules::across(&mut out.files);
    out
}

/// Reads one file's text.
pub fn load_text(text: Text, neighbours: Neighbours, environment: &Environment) -> Loaded {
    load_text_with(text, neighbours, None, environment)
}

/// Reads one file's text, with what pipelines share merged under it.
pub fn load_text_with(
    text: Text,
    neighbours: Neighbours,
    shared: Option<&Shared>,
    environment: &Environment,
) -> Loaded {
    let (mut root, faults) = match tree::read(&text) {
        Ok(read) => read,
        Err(fault) => {
            let diagnostics = vec![of_fault(&text, fault)];
            return Loaded { diagnostics, ..Loaded::broken(text, neighbours) };
        }
    };
    let mut diagnostics: Vec<Diagnostic> =
        faults.into_iter().take(MOST_PROBLEMS).map(|fault| of_fault(&text, fault)).collect();
    let merged = merge::merge(text, &mut root, shared);
    let (text, without) = (merged.text, merged.unknown);
    diagnostics.extend(merged.faults.into_iter().take(MOST_PROBLEMS).map(|fault| of_fault(&text, fault)));
    let mut expansion = expand_tree(&text, &root, environment);
    diagnostics.append(&mut expansion.problems);
    let unknown: Vec<String> =
        diagnostics.iter().map(|found| found.pointer.clone()).filter(|at| !at.is_empty()).collect();
    let mut value = std::mem::take(&mut expansion.value);
    let checked = check::check_file(grammar::schema(), &mut value, &unknown, &expansion.written);

    let namespace = value.get("namespace").and_then(Value::as_str).and_then(|name| name.parse().ok());
    let mut loaded = Loaded {
        text,
        namespace,
        spec: None,
        value: Value::Null,
        expansion,
        diagnostics,
        neighbours,
        root: Some(root),
        pruned: checked.pruned.into_iter().chain(without).chain(unknown).collect(),
    };
    for finding in checked.findings.iter().take(MOST_PROBLEMS) {
        let diagnostic = loaded.of_finding(finding);
        loaded.diagnostics.push(diagnostic);
    }
    match serde_path_to_error::deserialize::<_, PipelineSpec>(filled(&value)) {
        Ok(spec) => loaded.spec = Some(spec),
        Err(error) if loaded.diagnostics.is_empty() => {
            let pointer = error.path().iter().fold(String::new(), |pointer, step| match step {
                Segment::Seq { index } => child(&pointer, &index.to_string()),
                step => child(&pointer, &step.to_string()),
            });
            let diagnostic = loaded.diagnostic(Code::Refused, &pointer, false, error.inner().to_string());
            loaded.diagnostics.push(diagnostic);
        }
        Err(_) => {}
    }
    loaded.value = value;
    rules::within(&mut loaded);
    loaded.tidy();
    loaded
}

/// The value with the few keys that must be there, so that the rest can be read when one of them is missing or wrong.
fn filled(value: &Value) -> Value {
    let mut value = value.clone();
    if let Some(map) = value.as_object_mut() {
        map.entry("namespace").or_insert_with(|| Value::String(String::new()));
        let sink = map.entry("sink").or_insert_with(|| Value::Object(serde_json::Map::new()));
        fill_kinds(sink);
        let arms = sink.get_mut("route").and_then(Value::as_array_mut).into_iter().flatten();
        arms.for_each(fill_kinds);
        let arms = sink.get_mut("fan_out").and_then(Value::as_object_mut).into_iter().flat_map(|map| map.values_mut());
        arms.for_each(fill_kinds);
    }
    value
}

/// Settings that a region may give stand empty until it has.
fn fill_kinds(sink: &mut Value) {
    for (kind, key) in [("http", "url"), ("file", "path")] {
        if let Some(settings) = sink.get_mut(kind).and_then(Value::as_object_mut) {
            settings.entry(key).or_insert_with(|| Value::String(String::new()));
        }
    }
}

pub(super) fn of_fault(text: &Text, fault: tree::Fault) -> Diagnostic {
    let diagnostic = Diagnostic::at(fault.code, text, &fault.range, fault.message);
    match fault.help {
        Some(help) => diagnostic.help(help),
        None => diagnostic,
    }
}

impl Loaded {
    pub(super) fn broken(text: Text, neighbours: Neighbours) -> Self {
        Self {
            text,
            namespace: None,
            spec: None,
            value: Value::Null,
            expansion: Expansion::default(),
            diagnostics: Vec::new(),
            neighbours,
            root: None,
            pruned: Vec::new(),
        }
    }

    /// True when the file cannot run.
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(Diagnostic::is_error)
    }

    /// The bytes of the file that a pointer means: the key, or its value.
    pub fn range(&self, pointer: &str, at_key: bool) -> Range<usize> {
        let Some(root) = &self.root else { return 0..0 };
        let (node, holder, found) = root.nearest(pointer);
        let collection = !matches!(node.content, Content::Scalar { .. });
        match holder {
            Some(entry) if at_key || collection || !found || node.range.is_empty() => entry.key_range.clone(),
            None if collection && (pointer.is_empty() || (!found && pointer.matches('/').count() == 1)) => 0..0,
            _ => node.range.clone(),
        }
    }

    /// A problem at the place of a pointer.
    pub fn diagnostic(&self, code: Code, pointer: &str, at_key: bool, message: impl Into<String>) -> Diagnostic {
        let range = self.range(pointer, at_key);
        if range.is_empty() && range.start == 0 {
            return Diagnostic::of_file(code, self.text.name(), message).pointer(pointer);
        }
        Diagnostic::at(code, &self.text, &range, message).pointer(pointer)
    }

    pub(super) fn of_finding(&self, finding: &Finding) -> Diagnostic {
        let written = self.expansion.written.get(&finding.pointer);
        let mut diagnostic = self.diagnostic(finding.code, &finding.pointer, finding.at_key, finding.message.clone());
        diagnostic.help.clone_from(&finding.help);
        if let (Some(written), None) = (written, &finding.help) {
            diagnostic.help = Some(format!("the value comes from {}", written.text));
        }
        diagnostic
    }

    /// A problem at a line and column (both from 1) of the text that a scalar holds, a script for example.
    pub fn diagnostic_within(
        &self,
        code: Code,
        pointer: &str,
        line: usize,
        column: usize,
        message: impl Into<String>,
    ) -> Diagnostic {
        let at = self.offset_within(pointer, line, column);
        let (text, within) = self.text.part(at..at);
        let next = text.slice(within.start..text.as_str().len()).chars().next();
        let end = next.map_or(at, |c| at + c.len_utf8());
        Diagnostic::at(code, &self.text, &(at..end), message).pointer(pointer)
    }

    /// The place of a line and column of a scalar's text: by counting what is no white space, since folding and
    /// indentation change nothing else.
    pub fn offset_within(&self, pointer: &str, line: usize, column: usize) -> usize {
        let whole = self.range(pointer, false);
        let Some((node, _, true)) = self.root.as_ref().map(|root| root.nearest(pointer)) else { return whole.start };
        let Content::Scalar { text, style } = &node.content else { return whole.start };
        let before = text.split('\n').take(line.saturating_sub(1)).map(|line| line.len() + 1).sum::<usize>();
        let on_line = text.get(before..).unwrap_or_default();
        let at = before + on_line.char_indices().nth(column.saturating_sub(1)).map_or(on_line.len(), |(at, _)| at);
        let mut solid = text.get(..at.min(text.len())).unwrap_or(text).chars().filter(|c| !c.is_whitespace()).count();

        let source = self.text.slice(whole.clone());
        let skip = match style {
            ScalarStyle::Literal | ScalarStyle::Folded if source.starts_with(['|', '>']) => {
                source.find('\n').unwrap_or(0)
            }
            ScalarStyle::SingleQuoted | ScalarStyle::DoubleQuoted => 1,
            _ => 0,
        };
        let mut escaped = false;
        let mut last = whole.start + skip;
        for (offset, c) in source.char_indices().skip_while(|(offset, _)| *offset < skip) {
            if c.is_whitespace() {
                continue;
            }
            let quote = (*style == ScalarStyle::DoubleQuoted && c == '\\')
                || (*style == ScalarStyle::SingleQuoted && c == '\'');
            if quote && !escaped {
                escaped = true;
                continue;
            }
            escaped = false;
            last = whole.start + offset;
            if solid == 0 {
                return last;
            }
            solid -= 1;
        }
        last
    }

    /// Takes secrets out of the words, sorts by place, drops repetitions, and names the namespace in each.
    pub fn tidy(&mut self) {
        let outside: Vec<(String, String)> = self
            .expansion
            .outside()
            .filter(|(_, value)| value.len() >= 4)
            .map(|(name, value)| (value.to_owned(), format!("${{{name}}}")))
            .collect();
        let namespace: Option<Arc<str>> = self.namespace.as_ref().map(|namespace| namespace.as_str().into());
        for diagnostic in &mut self.diagnostics {
            diagnostic.scrub(outside.iter().map(|(value, reference)| (value.as_str(), reference.as_str())));
            diagnostic.namespace.clone_from(&namespace);
        }
        self.diagnostics.sort_by_key(|diagnostic| (diagnostic.severity, diagnostic.line, diagnostic.column));
        self.diagnostics.dedup();
        let more = self.diagnostics.len().saturating_sub(MOST_PROBLEMS);
        if let (1.., Some(next)) = (more, self.diagnostics.get(MOST_PROBLEMS)) {
            let message = format!("{more} more problems in this file, the next in line {}", next.line);
            let rest = Diagnostic::of_file(next.code, self.text.name(), message);
            self.diagnostics.truncate(MOST_PROBLEMS);
            self.diagnostics.push(Diagnostic { namespace, ..rest });
        }
    }

    /// True when something at, in or directly around a pointer was taken out: what is missing there was reported.
    pub fn is_pruned(&self, pointer: &str) -> bool {
        let inside = |outer: &str, inner: &str| {
            inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.pruned.iter().any(|pruned| inside(pruned, pointer) || inside(pointer, pruned))
    }
}

fn discover(paths: &[PathBuf], diagnostics: &mut Vec<Diagnostic>) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for path in paths {
        let unreadable = |error: &dyn fmt::Display| {
            Diagnostic::of_file(Code::Unreadable, &path.display().to_string(), format!("cannot be read: {error}"))
        };
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => match fs::read_dir(path) {
                Ok(entries) => {
                    let mut inside: Vec<PathBuf> = entries
                        .filter_map(Result::ok)
                        .map(|entry| entry.path())
                        .filter(|path| is_pipeline(path))
                        .collect();
                    inside.sort();
                    files.append(&mut inside);
                }
                Err(error) => diagnostics.push(unreadable(&error)),
            },
            Ok(_) => files.push(path.clone()),
            Err(error) => diagnostics.push(unreadable(&error).help("give a pipeline file, or a folder of them")),
        }
    }
    let mut seen = std::collections::HashSet::new();
    files.retain(|file| seen.insert(file.clone()));
    if files.is_empty() && diagnostics.is_empty() {
        let named = paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        let message = "no pipeline file is there";
        diagnostics
            .push(Diagnostic::of_file(Code::NoFiles, &named, message).help("pipeline files end in .yaml or .yml"));
    }
    files
}

fn is_pipeline(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
    let yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
    !hidden && yaml && path.is_file()
}

/// A small text file.
pub(super) fn read_text(path: &Path) -> Result<String, (Code, String)> {
    let unreadable = |error: std::io::Error| (Code::Unreadable, format!("cannot be read: {error}"));
    let found = fs::metadata(path).map_err(unreadable)?;
    if !found.is_file() {
        return Err((Code::Unreadable, "cannot be read: it is no regular file".to_owned()));
    }
    if found.len() > LARGEST_FILE {
        return Err((Code::TooLarge, format!("is {} bytes long; the most is {LARGEST_FILE}", found.len())));
    }
    let bytes = fs::read(path).map_err(unreadable)?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1;
        (Code::NotUtf8, format!("is not UTF-8 text: line {line} holds other bytes"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaded(yaml: &str) -> Loaded {
        load_text(Text::new("a.yaml", yaml), Neighbours::kept(BTreeMap::new()), &Environment::default())
    }

    #[test]
    fn folders_give_their_yaml_files_sorted_without_hidden_ones() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.yaml", "a.yml", ".hidden.yaml", "..data", "notes.txt"] {
            fs::write(
                folder.path().join(name),
                format!("namespace: {}\nsink: {{ stdout: {{}} }}\n", name.split('.').next().unwrap()),
            )
            .unwrap();
        }
        fs::create_dir(folder.path().join("folder.yaml")).unwrap();
        let load = load(&[folder.path().to_path_buf()], &Environment::default());
        let names: Vec<&str> =
            load.files.iter().filter_map(|file| file.namespace.as_ref()).map(Namespace::as_str).collect();
        assert_eq!(names, ["a", "b"]);
        assert!(load.diagnostics.is_empty());
    }

    #[test]
    fn what_cannot_be_read_is_a_problem_and_not_a_panic() {
        let folder = tempfile::tempdir().unwrap();
        let big = folder.path().join("big.yaml");
        fs::File::create(&big).unwrap().set_len(100 << 20).unwrap();
        let odd = folder.path().join("odd.yaml");
        fs::write(&odd, b"a: 1\nb: \xff\n").unwrap();
        let found =
            load(&[big, odd, folder.path().join("none.yaml"), PathBuf::from("/dev/zero")], &Environment::default());
        let codes: Vec<Code> =
            found.files.iter().flat_map(|file| &file.diagnostics).chain(&found.diagnostics).map(|d| d.code).collect();
        assert_eq!(codes, [Code::TooLarge, Code::NotUtf8, Code::Unreadable, Code::Unreadable]);
        assert!(found.files[1].diagnostics[0].message.contains("line 2"));
        let empty = tempfile::tempdir().unwrap();
        let found = load(&[empty.path().to_path_buf()], &Environment::default());
        assert_eq!(found.diagnostics[0].code, Code::NoFiles);
    }

    #[test]
    fn a_place_in_a_script_is_a_place_in_the_file() {
        let file = loaded(concat!(
            "namespace: a\ntransform:\n",
            "  - inline: |\n      let a = 1;\n\n      let b = a +;\n",
            "  - inline: 'let s = ''x'' +;'\n",
            "  - inline: \"let s = \\\"x\\\" +;\"\n",
            "  - inline: >-\n      one\n      two three\n",
            "sink: { stdout: {} }\n",
        ));
        let at = |pointer: &str, line, column| {
            let found = file.diagnostic_within(Code::ScriptError, pointer, line, column, "m");
            (found.line, found.column)
        };
        assert_eq!(at("/transform/0/inline", 3, 12), (6, 18));
        assert_eq!(at("/transform/0/inline", 1, 1), (4, 7));
        assert_eq!(at("/transform/1/inline", 1, 14), (7, 29));
        assert_eq!(at("/transform/2/inline", 1, 14), (8, 29));
        assert_eq!(at("/transform/3/inline", 1, 9), (11, 11));
        assert_eq!(at("/transform/3/inline", 9, 99), (11, 15));
    }

    #[test]
    fn a_valid_file_has_no_problem() {
        let file = loaded("namespace: a\nsource: { key: /id }\nsink: { file: { path: out/a.ndjson } }\n");
        assert!(file.diagnostics.is_empty(), "{:?}", file.diagnostics);
        assert_eq!(file.spec.unwrap().source.key.as_deref(), Some("/id"));
    }

    #[test]
    fn a_reference_takes_the_type_that_its_place_asks_for() {
        let environment = Environment::new([("N", "12"), ("ID", "0042")].map(|(n, v)| (n.to_owned(), v.to_owned())));
        let yaml = "namespace: a\nowner: ${ID}\nsink:\n  stdout: {}\n  limits: { concurrency: \"${N}\" }\n  retry:\n    attempts: ${N}\n";
        let file = load_text(Text::new("a.yaml", yaml), Neighbours::kept(BTreeMap::new()), &environment);
        assert!(file.diagnostics.is_empty(), "{:?}", file.diagnostics);
        let spec = file.spec.unwrap();
        assert_eq!(spec.owner.as_deref(), Some("0042"));
        assert_eq!(spec.sink.limits.map(|limits| limits.concurrency), Some(12));
        assert_eq!(spec.sink.retry.and_then(|retry| retry.attempts), Some(12));
    }

    #[test]
    fn values_from_outside_never_show() {
        let environment = Environment::new([("SECRET".to_owned(), "CANARY-value".to_owned())]);
        let yaml = "namespace: \"${SECRET}\"\nsource: { limits: { record: \"${SECRET}\" }, backlog: { on_full: \"${SECRET}\" } }\nsink: { stdout: {}, retry: { attempts: \"${SECRET}\" } }\n";
        let file = load_text(Text::new("a.yaml", yaml), Neighbours::kept(BTreeMap::new()), &environment);
        assert!(file.diagnostics.len() >= 4, "{:#?}", file.diagnostics);
        let shown =
            format!("{:?} {}", file.diagnostics, file.diagnostics.iter().map(|d| d.render(false)).collect::<String>());
        assert!(!shown.contains("CANARY"), "{shown}");
        assert!(shown.contains("${SECRET}"));
    }
}
