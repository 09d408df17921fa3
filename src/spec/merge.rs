//! What a pipeline takes from walflow.yaml: the fields of the connections that it uses, and the defaults under all.
//!
//! Takes the tree of a pipeline file, leaves the merged one, in which each value still knows where it stands. Never
//! expands and never interprets a value: whether it fits is found where the pipeline's own values are checked.

use std::collections::HashSet;

use super::check::nearest;
use super::code::Code;
use super::expand::{child, core_type};
use super::grammar::{CONNECTION_KINDS, SINK_KINDS, SOURCE_KINDS};
use super::shared::Shared;
use super::text::Text;
use super::tree::{Content, Entry, Fault, MOST_NODES, Node};

/// A merged file: its text with that of walflow.yaml behind it, where it takes anything from there.
pub(super) struct Merged {
    pub(super) text: Text,
    pub(super) faults: Vec<Fault>,
    /// Where a connection is missing: what it would have given is not missed a second time.
    pub(super) unknown: Vec<String>,
}

/// Merges what pipelines share under the tree of one.
pub(super) fn merge(text: Text, root: &mut Node, shared: Option<&Shared>) -> Merged {
    let mut merging = Merging { shared, base: text.beyond(), ..Merging::default() };
    merging.connections(root);
    if let Some(defaults) = shared.and_then(Shared::defaults) {
        let mut defaults = merging.moved(defaults);
        give_way(root, &mut defaults);
        merging.connections(&mut defaults);
        merging.under_arms(root, &defaults);
        merging.under(root, &defaults);
        merging.has_defaults = true;
    }
    clear(root, &merging.cleared);
    let behind = shared.and_then(|shared| shared.relevant(&merging.used, merging.has_defaults));
    Merged {
        text: behind.map_or(text.clone(), |behind| text.with_behind(behind)),
        faults: merging.faults,
        unknown: merging.unknown,
    }
}

#[derive(Default)]
struct Merging<'a> {
    shared: Option<&'a Shared>,
    /// Where the text of walflow.yaml begins.
    base: usize,
    used: HashSet<String>,
    has_defaults: bool,
    /// Where the keys stand whose `null` takes a value away.
    cleared: HashSet<usize>,
    added: usize,
    faults: Vec<Fault>,
    unknown: Vec<String>,
}

/// Places of which only one key can stand: what a pipeline says there replaces what the defaults say.
fn give_way(root: &Node, defaults: &mut Node) {
    let sinks = [SINK_KINDS, CONNECTION_KINDS, &["route", "fan_out"]].concat();
    let sources = [SOURCE_KINDS, CONNECTION_KINDS].concat();
    let shelves = [CONNECTION_KINDS, &["embedded"]].concat();
    let places: [(&[&str], &[&str]); 4] = [
        (&["sink"], &sinks),
        (&["source"], &sources),
        (&["source", "shelf"], &shelves),
        (&["delay"], &["for", "until"]),
    ];
    for (path, words) in places {
        let Some(over) = path.iter().try_fold(root, |node, step| node.get(step)) else { continue };
        let Some(under) = path.iter().try_fold(&mut *defaults, |node, step| node.get_mut(step)) else { continue };
        if words.iter().any(|word| over.get(word).is_some())
            && let Content::Map(entries) = &mut under.content
        {
            entries.retain(|entry| !words.contains(&entry.key.as_str()) || over.get(&entry.key).is_some());
        }
    }
}

fn is_null(node: &Node) -> bool {
    use saphyr_parser::ScalarStyle::Plain;
    matches!(&node.content, Content::Scalar { text, style: Plain } if core_type(text).is_null())
}

/// The word is a kind: with nothing behind it, it means the kind without settings.
fn is_kind(word: &str) -> bool {
    [SINK_KINDS, SOURCE_KINDS, CONNECTION_KINDS].iter().any(|kinds| kinds.contains(&word))
}

fn clear(node: &mut Node, cleared: &HashSet<usize>) {
    match &mut node.content {
        Content::Scalar { .. } => {}
        Content::List(items) => items.iter_mut().for_each(|item| clear(item, cleared)),
        Content::Map(entries) => {
            entries.retain(|entry| !(is_null(&entry.node) && cleared.contains(&entry.key_range.start)));
            entries.iter_mut().for_each(|entry| clear(&mut entry.node, cleared));
        }
    }
}

impl Merging<'_> {
    fn moved(&self, node: &Node) -> Node {
        let mut node = node.clone();
        node.shift(self.base);
        node
    }

    /// Every map whose keys may be kinds.
    fn connections(&mut self, root: &mut Node) {
        if let Some(source) = root.get_mut("source") {
            self.kinds(source, "/source");
            if let Some(shelf) = source.get_mut("shelf") {
                self.kinds(shelf, "/source/shelf");
            }
        }
        let mut names: Vec<(String, &'static str)> = Vec::new();
        let mut single = None;
        if let Some(sink) = root.get_mut("sink") {
            single = self.sink(sink, "/sink");
            if let Some(Content::List(arms)) = sink.get_mut("route").map(|arms| &mut arms.content) {
                for (index, arm) in arms.iter_mut().enumerate() {
                    let name = match arm.get("name").map(|name| &name.content) {
                        Some(Content::Scalar { text, .. }) => text.clone(),
                        _ => String::new(),
                    };
                    let at = child("/sink/route", &index.to_string());
                    names.extend(self.sink(arm, &at).map(|kind| (name, kind)));
                }
            }
            if let Some(Content::Map(arms)) = sink.get_mut("fan_out").map(|arms| &mut arms.content) {
                for arm in arms {
                    let at = child("/sink/fan_out", &arm.key);
                    names.extend(self.sink(&mut arm.node, &at).map(|kind| (arm.key.clone(), kind)));
                }
            }
        }
        let regions = root.get_mut("replicate").and_then(|replicate| replicate.get_mut("regions"));
        let Some(Content::Map(regions)) = regions.map(|regions| &mut regions.content) else { return };
        for region in regions {
            let at = child("/replicate/regions", &region.key);
            if let Some(kind) = single {
                self.take(&mut region.node, kind, at.clone());
            }
            for (name, kind) in &names {
                if let Some(arm) = region.node.get_mut(name) {
                    self.take(arm, kind, child(&at, name));
                }
            }
        }
    }

    /// A sink or arm. Gives its kind, when that can have a connection.
    fn sink(&mut self, sink: &mut Node, pointer: &str) -> Option<&'static str> {
        if let Some(also) = sink.get_mut("dead_letters").and_then(|letters| letters.get_mut("also")) {
            self.kinds(also, &format!("{pointer}/dead_letters/also"));
        }
        self.kinds(sink, pointer)
    }

    fn kinds(&mut self, map: &mut Node, pointer: &str) -> Option<&'static str> {
        let mut found = None;
        for kind in CONNECTION_KINDS {
            if let Some(settings) = map.get_mut(kind) {
                found = Some(*kind);
                self.take(settings, kind, child(pointer, kind));
            }
        }
        found
    }

    /// Puts the fields of the connection that a map names under its own.
    fn take(&mut self, settings: &mut Node, kind: &'static str, pointer: String) {
        let Content::Map(entries) = &mut settings.content else { return };
        let Some(at) = entries.iter().position(|entry| entry.key == "use") else { return };
        let named = entries.remove(at);
        match self.connection(&named, kind) {
            Ok(fields) => self.under(settings, &fields),
            Err((message, help)) => {
                let range = if named.node.range.is_empty() { named.key_range } else { named.node.range };
                self.unknown.push(pointer);
                self.faults.push(Fault { code: Code::Connection, range, message, help: Some(help) });
            }
        }
    }

    fn connection(&mut self, named: &Entry, kind: &'static str) -> Result<Node, (String, String)> {
        let Content::Scalar { text: name, .. } = &named.node.content else {
            return Err((
                "expected the name of a connection for 'use'".to_owned(),
                format!("write `use: NAME` with a {kind} connection of walflow.yaml"),
            ));
        };
        let Some(shared) = self.shared else {
            let help = "walflow.yaml is looked for under --config or WALFLOW_CONFIG, in the working folder and in /etc/walflow";
            return Err((format!("there is no connection '{name}': no walflow.yaml was found"), help.to_owned()));
        };
        let of_kind: Vec<&str> =
            shared.connections().filter(|(_, node)| node.get(kind).is_some()).map(|(name, _)| name).collect();
        let listed = if of_kind.is_empty() {
            format!("{} has no {kind} connection", shared.text.name())
        } else {
            format!("the {kind} connections are {}", of_kind.join(", "))
        };
        let found = shared.connections().find(|(known, _)| known == name).map(|(_, node)| node);
        let Some(found) = found else {
            let meant = nearest(name, of_kind.iter().copied());
            let help = meant.map_or(listed.clone(), |meant| format!("did you mean '{meant}'? {listed}"));
            return Err((format!("there is no connection '{name}'"), help));
        };
        let Some(fields) = found.get(kind) else {
            let other = CONNECTION_KINDS.iter().find(|other| found.get(other).is_some()).unwrap_or(&"no known");
            return Err((format!("the connection '{name}' is of the kind {other}, not {kind}"), listed));
        };
        self.used.insert(name.clone());
        Ok(self.moved(fields))
    }

    /// An arm that has a part of its own takes of the defaults what that part leaves open; the rest it takes from `sink`.
    fn under_arms(&mut self, root: &mut Node, defaults: &Node) {
        let Some(Content::Map(keys)) = defaults.get("sink").map(|sink| &sink.content) else { return };
        let Some(sink) = root.get_mut("sink") else { return };
        let mut arms: Vec<&mut Node> = Vec::new();
        let Content::Map(entries) = &mut sink.content else { return };
        for entry in entries {
            match (entry.key.as_str(), &mut entry.node.content) {
                ("route", Content::List(items)) => arms.extend(items),
                ("fan_out", Content::Map(items)) => arms.extend(items.iter_mut().map(|item| &mut item.node)),
                _ => {}
            }
        }
        for arm in arms {
            for key in keys.iter().filter(|key| !is_kind(&key.key) && !matches!(key.key.as_str(), "route" | "fan_out"))
            {
                if let Some(own) = arm.get_mut(&key.key) {
                    self.under(own, &key.node);
                }
            }
        }
    }

    /// Key by key; lists and scalars of `over` stay as they are.
    fn under(&mut self, over: &mut Node, base: &Node) {
        let (Content::Map(mine), Content::Map(theirs)) = (&mut over.content, &base.content) else { return };
        for entry in theirs {
            match mine.iter_mut().find(|own| own.key == entry.key) {
                Some(own) if is_null(&own.node) && is_kind(&own.key) => {
                    own.node.content = Content::Map(Vec::new());
                    self.under(&mut own.node, &entry.node);
                }
                Some(own) if is_null(&own.node) => {
                    self.cleared.insert(own.key_range.start);
                }
                Some(own) => self.under(&mut own.node, &entry.node),
                None => {
                    self.added = self.added.saturating_add(entry.node.weight());
                    if self.added <= MOST_NODES {
                        mine.push(entry.clone());
                    } else if !self.faults.iter().any(|fault| fault.code == Code::TooComplex) {
                        self.faults.push(Fault {
                            code: Code::TooComplex,
                            range: own_range(mine),
                            message: format!(
                                "with what it takes from walflow.yaml the file has more than {MOST_NODES} values"
                            ),
                            help: Some("connections are a few fields; generated data belongs elsewhere".to_owned()),
                        });
                    }
                }
            }
        }
    }
}

fn own_range(entries: &[Entry]) -> std::ops::Range<usize> {
    entries.first().map_or(0..0, |entry| entry.key_range.clone())
}

#[cfg(test)]
mod tests;
