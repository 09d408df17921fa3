//! A YAML file as a tree that knows where each key and value stands, read under a budget.
//!
//! Takes text, gives nodes with their byte ranges. An alias is a copy of what it names, within the budget, so a file
//! of a few bytes can never become a large tree. Never expands, never interprets: that is for those who walk the tree.

use std::collections::HashMap;
use std::ops::Range;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Span};

use super::code::Code;
use super::text::Text;

/// Nodes in one file at most, those that aliases repeat included.
pub(super) const MOST_NODES: usize = 20_000;
/// Levels in one file at most.
const DEEPEST: usize = 32;

/// One value of the file and where it stands.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it is.
    pub content: Content,
    /// Its bytes in the file.
    pub range: Range<usize>,
}

/// What a node is.
#[derive(Clone, Debug)]
pub enum Content {
    /// A text, number, bool or nothing.
    Scalar {
        /// Its text after YAML's own unescaping.
        text: String,
        /// How it was written.
        style: ScalarStyle,
    },
    /// A list.
    List(Vec<Node>),
    /// A map, in file order.
    Map(Vec<Entry>),
}

/// One key of a map with its value.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The key's text.
    pub key: String,
    /// The key's bytes in the file.
    pub key_range: Range<usize>,
    /// The value.
    pub node: Node,
}

/// A problem found while reading, not yet a diagnostic.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Its code.
    pub code: Code,
    /// Where.
    pub range: Range<usize>,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub help: Option<String>,
}

impl Node {
    /// The entry of a map by its key.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        match &self.content {
            Content::Map(entries) => entries.iter().find(|entry| entry.key == key),
            _ => None,
        }
    }

    /// The value of a map by its key.
    pub fn get(&self, key: &str) -> Option<&Self> {
        self.entry(key).map(|entry| &entry.node)
    }

    /// The node at a JSON pointer and the entry that holds it, or of its nearest ancestor that exists.
    pub fn nearest(&self, pointer: &str) -> (&Self, Option<&Entry>, bool) {
        let mut node = self;
        let mut holder = None;
        for step in pointer.split('/').skip(1) {
            let step = step.replace("~1", "/").replace("~0", "~");
            let next = match &node.content {
                Content::Map(_) => node.entry(&step).map(|entry| (&entry.node, Some(entry))),
                Content::List(items) => {
                    step.parse::<usize>().ok().and_then(|index| items.get(index)).map(|item| (item, None))
                }
                Content::Scalar { .. } => None,
            };
            match next {
                Some((found, entry)) => (node, holder) = (found, entry),
                None => return (node, holder, false),
            }
        }
        (node, holder, true)
    }

    /// Moves it and all within it on by so many bytes.
    pub(super) fn shift(&mut self, by: usize) {
        let moved = |range: &Range<usize>| range.start + by..range.end + by;
        self.range = moved(&self.range);
        match &mut self.content {
            Content::Scalar { .. } => {}
            Content::List(items) => items.iter_mut().for_each(|item| item.shift(by)),
            Content::Map(entries) => {
                for entry in entries {
                    entry.key_range = moved(&entry.key_range);
                    entry.node.shift(by);
                }
            }
        }
    }

    /// The value of a map by its key, to be changed.
    pub(super) fn get_mut(&mut self, key: &str) -> Option<&mut Self> {
        match &mut self.content {
            Content::Map(entries) => entries.iter_mut().find(|entry| entry.key == key).map(|entry| &mut entry.node),
            _ => None,
        }
    }

    /// How many values it holds, itself among them.
    pub(super) fn weight(&self) -> usize {
        1 + match &self.content {
            Content::Scalar { .. } => 0,
            Content::List(items) => items.iter().map(Self::weight).sum(),
            Content::Map(entries) => entries.iter().map(|entry| entry.node.weight()).sum(),
        }
    }

    fn depth(&self) -> usize {
        1 + match &self.content {
            Content::Scalar { .. } => 0,
            Content::List(items) => items.iter().map(Self::depth).max().unwrap_or(0),
            Content::Map(entries) => entries.iter().map(|entry| entry.node.depth()).max().unwrap_or(0),
        }
    }
}

/// A collection that is being read.
struct Open {
    content: Content,
    start: usize,
    anchor: usize,
    key: Option<(String, Range<usize>)>,
    merges: Vec<Node>,
    keys: HashMap<String, usize>,
}

struct Reader<'a> {
    text: &'a Text,
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
    weights: HashMap<usize, usize>,
    root: Option<Node>,
    documents: usize,
    nodes: usize,
    faults: Vec<Fault>,
}

/// Reads a file's one document. Gives the tree, when there is one, and the problems that do not hide the rest of it.
///
/// # Errors
/// When the text is no YAML, is empty, or goes beyond the budget.
pub fn read(text: &Text) -> Result<(Node, Vec<Fault>), Fault> {
    let mut reader = Reader {
        text,
        open: Vec::new(),
        anchors: HashMap::new(),
        weights: HashMap::new(),
        root: None,
        documents: 0,
        nodes: 0,
        faults: Vec::new(),
    };
    for event in Parser::new_from_str(text.as_str()) {
        let (event, span) = event.map_err(|error| reader.syntax(*error.marker(), error.info()))?;
        reader.take(event, span)?;
    }
    let Some(root) = reader.root else {
        return Err(Fault {
            code: Code::Documents,
            range: 0..0,
            message: "the file is empty".to_owned(),
            help: Some("a pipeline needs at least `namespace:` and `sink:`".to_owned()),
        });
    };
    Ok((root, reader.faults))
}

impl Reader<'_> {
    fn at(&self, marker: Marker) -> usize {
        self.text.offset(marker.index())
    }

    fn range(&self, span: Span) -> Range<usize> {
        let start = self.at(span.start);
        start..self.at(span.end).max(start)
    }

    fn syntax(&self, marker: Marker, info: &str) -> Fault {
        // An end that comes too early is shown where the last line ends.
        let at = self.at(marker).min(self.text.trim_end(0, self.text.as_str().len()));
        if info.contains("recursion") {
            return Self::too_complex(at..at, format!("the file is nested deeper than {DEEPEST} levels"));
        }
        let lines = [self.text.line_of(at), self.text.line_of(at).saturating_sub(1)];
        let reference = lines.into_iter().any(|line| unquoted_reference(self.text.line(line)));
        let environment = lines.into_iter().any(|line| self.text.line(line).contains("${"));
        let help = if reference {
            "put quotes around a text that holds a reference: \"{payload.x}\"".to_owned()
        } else if environment {
            "within { } and [ ] a reference to the environment needs quotes: \"${NAME}\"".to_owned()
        } else if [0, 1].iter().any(|next| self.text.line(self.text.line_of(at) + next).contains('\t')) {
            "YAML is indented with spaces; here stands a tab".to_owned()
        } else {
            "check indentation, quotes and brackets on this line and the one before".to_owned()
        };
        let code = if reference { Code::UnquotedReference } else { Code::Syntax };
        Fault { code, range: at..at, message: format!("this is not YAML: {info}"), help: Some(help) }
    }

    fn too_complex(range: Range<usize>, message: String) -> Fault {
        Fault {
            code: Code::TooComplex,
            range,
            message,
            help: Some("a pipeline file is a page or two; generated data belongs elsewhere".to_owned()),
        }
    }

    fn count(&mut self, nodes: usize, range: &Range<usize>) -> Result<(), Fault> {
        self.nodes = self.nodes.saturating_add(nodes);
        if self.nodes > MOST_NODES {
            return Err(Self::too_complex(range.clone(), format!("the file has more than {MOST_NODES} values")));
        }
        Ok(())
    }

    fn take(&mut self, event: Event<'_>, span: Span) -> Result<(), Fault> {
        let range = self.range(span);
        match event {
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err(Fault {
                        code: Code::Documents,
                        range,
                        message: "the file holds more than one document".to_owned(),
                        help: Some(
                            "one file is one namespace: put what follows `---` into a file of its own".to_owned(),
                        ),
                    });
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.count(1, &range)?;
                let style = if tag.as_ref().is_some_and(|tag| tag.is_yaml_core_schema() && tag.suffix == "str") {
                    ScalarStyle::DoubleQuoted
                } else {
                    self.refuse_tag(tag.is_some(), &range);
                    style
                };
                let range = range.start..self.text.trim_end(range.start, range.end);
                let node = Node { content: Content::Scalar { text: text.into_owned(), style }, range };
                self.finish(node, anchor)?;
            }
            Event::SequenceStart(anchor, tag) => self.begin(Content::List(Vec::new()), anchor, tag.is_some(), range)?,
            Event::MappingStart(anchor, tag) => self.begin(Content::Map(Vec::new()), anchor, tag.is_some(), range)?,
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(open) = self.open.pop() {
                    self.close(open, &range)?;
                }
            }
            Event::Alias(anchor) => {
                let Some(node) = self.anchors.get(&anchor) else {
                    return Err(Self::too_complex(range, "an alias stands within the value that it names".to_owned()));
                };
                let weight = self.weights.get(&anchor).copied().unwrap_or(1);
                if self.nodes.saturating_add(weight) > MOST_NODES || self.open.len() + node.depth() > DEEPEST {
                    return Err(Self::too_complex(range, "aliases make the file too large or too deep".to_owned()));
                }
                let node = node.clone();
                self.nodes += weight;
                self.finish(node, 0)?;
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
        }
        Ok(())
    }

    fn refuse_tag(&mut self, tagged: bool, range: &Range<usize>) {
        if tagged {
            self.faults.push(Fault {
                code: Code::Tag,
                range: range.clone(),
                message: "a YAML tag has no meaning here".to_owned(),
                help: Some("remove the word that begins with '!', or put quotes around the text".to_owned()),
            });
        }
    }

    fn begin(&mut self, content: Content, anchor: usize, tagged: bool, range: Range<usize>) -> Result<(), Fault> {
        self.count(1, &range)?;
        if self.open.len() >= DEEPEST {
            return Err(Self::too_complex(range, format!("the file is nested deeper than {DEEPEST} levels")));
        }
        self.refuse_tag(tagged, &range);
        self.open.push(Open {
            content,
            start: range.start,
            anchor,
            key: None,
            merges: Vec::new(),
            keys: HashMap::new(),
        });
        Ok(())
    }

    fn close(&mut self, open: Open, end: &Range<usize>) -> Result<(), Fault> {
        let Open { mut content, start, anchor, merges, mut keys, .. } = open;
        let flow = matches!(self.text.byte(start), Some(b'{' | b'['));
        let stop = if flow { end.end } else { self.text.trim_end(start, end.start) };
        let range = start..stop.max(start);
        if let Content::Map(entries) = &mut content {
            for merge in merges {
                let Content::Map(from) = merge.content else { continue };
                for entry in from {
                    if keys.insert(entry.key.clone(), 0).is_none() {
                        self.nodes += entry.node.weight();
                        entries.push(entry);
                    }
                }
            }
            let written = self.text.slice(range.clone());
            if flow && !written.contains(':') && entries.iter().any(|entry| is_reference(&entry.key)) {
                self.faults.push(Fault {
                    code: Code::UnquotedReference,
                    range: range.clone(),
                    message: format!("`{written}` without quotes is a YAML map, not a reference"),
                    help: Some(format!("put quotes around it: \"{written}\"")),
                });
                // Taken as the text that was meant, so that no second problem is reported at the same place.
                content = Content::Scalar { text: written.to_owned(), style: ScalarStyle::DoubleQuoted };
            }
        }
        self.count(0, &range)?;
        self.finish(Node { content, range }, anchor)
    }

    /// Puts a node that is complete where it belongs.
    fn finish(&mut self, node: Node, anchor: usize) -> Result<(), Fault> {
        if anchor > 0 {
            self.weights.insert(anchor, node.weight());
            self.anchors.insert(anchor, node.clone());
            // The copy that is kept counts too: nested anchors would otherwise cost depth × size.
            self.count(node.weight(), &node.range)?;
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match (&mut open.content, open.key.take()) {
            (Content::List(items), _) => items.push(node),
            (Content::Map(_), None) => match node.content {
                Content::Scalar { text, .. } => open.key = Some((text, node.range)),
                _ => {
                    return Err(Fault {
                        code: Code::Syntax,
                        range: node.range,
                        message: "a list or a map cannot be a key".to_owned(),
                        help: Some("put quotes around a text that begins with { or [".to_owned()),
                    });
                }
            },
            (Content::Map(_), Some((key, _))) if key == "<<" && !matches!(node.content, Content::Scalar { .. }) => {
                match node.content {
                    Content::List(items) => open.merges.extend(items),
                    _ => open.merges.push(node),
                }
            }
            (Content::Map(entries), Some((key, key_range))) => {
                if let Some(first) = open.keys.get(&key) {
                    let line = self.text.line_of(*first);
                    self.faults.push(Fault {
                        code: Code::DuplicateKey,
                        range: key_range,
                        message: format!("the key '{key}' stands here for the second time"),
                        help: Some(format!("the first is in line {line}; keep one of them")),
                    });
                } else {
                    open.keys.insert(key.clone(), key_range.start);
                    entries.push(Entry { key, key_range, node });
                }
            }
            (Content::Scalar { .. }, _) => {}
        }
        Ok(())
    }
}

/// True for what a template's braces may hold.
fn is_reference(key: &str) -> bool {
    let head = key.split(['.', ':', '[']).next().unwrap_or(key).trim();
    matches!(head, "key" | "payload" | "headers" | "record" | "region" | "sink")
}

/// True when a line holds a reference that no quote precedes.
fn unquoted_reference(line: &str) -> bool {
    line.match_indices('{').any(|(at, _)| {
        let before = line.get(..at).unwrap_or_default();
        let after = line.get(at + 1..).unwrap_or_default();
        let word = after.split(['}', ' ', ',']).next().unwrap_or_default();
        is_reference(word) && !before.contains(['"', '\'']) && after.contains('}')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(text: &str) -> Result<(Node, Vec<Fault>), Fault> {
        read(&Text::new("a.yaml", text))
    }

    /// Nine levels of nine aliases each: a billion values in 300 bytes.
    fn laughs() -> String {
        let mut text = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n".to_owned();
        for level in 1..9 {
            let names = vec![format!("*a{}", level - 1); 9].join(",");
            text = format!("{text}a{level}: &a{level} [{names}]\n");
        }
        text
    }

    #[test]
    fn every_key_and_value_knows_its_place() {
        let text = Text::new("a.yaml", "namespace: é-a\nsink:\n  file: { path: \"x\" }\nlist:\n  - one\n  - two\n");
        let (root, faults) = read(&text).unwrap();
        assert!(faults.is_empty());
        let (node, holder, found) = root.nearest("/sink/file/path");
        assert!(found);
        assert_eq!(text.slice(node.range.clone()), "\"x\"");
        assert_eq!(text.slice(holder.unwrap().key_range.clone()), "path");
        let (node, _, _) = root.nearest("/list/1");
        assert_eq!((text.slice(node.range.clone()), text.line_of(node.range.start)), ("two", 6));
        let (_, holder, found) = root.nearest("/sink/file/nothing/here");
        assert!(!found);
        assert_eq!(holder.unwrap().key, "file");
    }

    #[test]
    fn bombs_loops_and_towers_are_refused_at_once() {
        let started = std::time::Instant::now();
        let deep_flow = "[".repeat(100_000);
        let deep_block = "- ".repeat(100_000);
        let wide = format!("a: [{}]", "x,".repeat(400_000));
        let nested_anchors = (0..31).fold(String::new(), |text, n| format!("{text}{}a: &n{n}\n", " ".repeat(n)));
        for bomb in [&laughs(), "a: &a [*a]", &deep_flow, &deep_block, &wide] {
            assert_eq!(tree(bomb).unwrap_err().code, Code::TooComplex, "{}", bomb.get(..40).unwrap_or(bomb));
        }
        assert!(tree(&nested_anchors).is_ok());
        assert!(started.elapsed().as_secs() < 5);
    }

    #[test]
    fn a_reference_without_quotes_is_named() {
        let (_, faults) = tree("url: {payload.url}\n").unwrap();
        assert_eq!(faults[0].code, Code::UnquotedReference);
        assert_eq!(faults[0].help.as_deref(), Some("put quotes around it: \"{payload.url}\""));
        assert_eq!(tree("key: {key}-suffix\n").unwrap_err().code, Code::UnquotedReference);
        let (_, faults) = tree("a: {payload: 1}\nb: {key: x}\n").unwrap();
        assert!(faults.is_empty(), "maps are maps");
    }

    #[test]
    fn duplicates_tags_and_second_documents_are_refused() {
        let (root, faults) = tree("a: 1\nb: !x 2\na: 3\n").unwrap();
        assert_eq!(faults.iter().map(|fault| fault.code).collect::<Vec<_>>(), [Code::Tag, Code::DuplicateKey]);
        assert!(root.get("b").is_some());
        assert_eq!(tree("a: 1\n---\nb: 2\n").unwrap_err().code, Code::Documents);
        assert_eq!(tree("# nothing\n").unwrap_err().code, Code::Documents);
    }

    #[test]
    fn the_tree_says_what_serde_yaml_says() {
        let files = [
            "a: 1\nb: [x, 2.5, true, ~, 'q', \"d\\n\"]\nc: { d: { e: x } }\n",
            "x: |\n  one\n  two\ny: >-\n  one\n  two\nz: one\n  two\n",
            "- a\n- - b\n  - c\n- { d: e }\n",
            "é: 'it''s'\nn: 0x1F\nf: 1e3\nv: 1.2.3\nk: no\ne:\n",
        ];
        for yaml in files {
            let text = Text::new("a.yaml", yaml);
            let (root, _) = read(&text).unwrap();
            let ours =
                crate::spec::expand::expand_tree(&text, &root, &crate::spec::environment::Environment::default()).value;
            let theirs: serde_json::Value = serde_yaml::from_str(yaml).unwrap();
            assert_eq!(ours, theirs, "{yaml}");
        }
    }

    #[test]
    fn merges_and_aliases_copy_what_they_name() {
        let (root, _) = tree("base: &b { x: 1, y: 2 }\nuse:\n  <<: *b\n  y: 3\nsame: *b\n").unwrap();
        let merged = root.get("use").unwrap();
        assert!(matches!(&merged.get("y").unwrap().content, Content::Scalar { text, .. } if text == "3"));
        assert!(merged.get("x").is_some());
        assert!(root.get("same").unwrap().get("y").is_some());
    }
}
