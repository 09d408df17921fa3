//! The tree keeps its own rules: who imports whom, how long a file may be, which dependencies must not come back.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    files.sort();
    let name = |path: &Path| path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
    files.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

/// The modules from low to high; those in one row are blind to each other.
const LAYERS: &[&[&str]] = &[
    &["clock", "units", "telemetry"],
    &["connection"],
    &["record", "retry"],
    &["testing"],
    &["source"],
    &["transform"],
    &["sink"],
    &["delay", "replicate"],
    &["ingest"],
    &["spec"],
    &["pipeline"],
    &["console"],
    &["service"],
    &["cli"],
    &["main"],
];

/// `source` and `sink` never know each other: a sink sees records through `transform`.
const BLIND: &[(&str, &str)] = &[("sink", "source"), ("source", "sink"), ("source", "transform")];

#[test]
fn modules_import_only_from_below() {
    let layer: BTreeMap<&str, usize> =
        LAYERS.iter().enumerate().flat_map(|(row, names)| names.iter().map(move |name| (*name, row))).collect();
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let module = path.trim_start_matches("src/").split(['/', '.']).next().unwrap().to_owned();
        let Some(own) = layer.get(module.as_str()) else {
            assert!(module == "lib", "{path}: module `{module}` has no place in the order");
            continue;
        };
        for (number, line) in text.lines().enumerate() {
            let Some(rest) = line.trim_start().strip_prefix("use crate::") else { continue };
            let other: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let above = layer.get(other.as_str()).is_some_and(|row| row > own || (row == own && other != module));
            if above || BLIND.contains(&(module.as_str(), other.as_str())) {
                wrong.push(format!("{path}:{}: `{module}` may not use `{other}`", number + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_file_is_longer_than_600_lines_and_each_says_what_it_is() {
    for (path, text) in sources() {
        assert!(text.lines().count() <= 600, "{path} has {} lines", text.lines().count());
        let first = text.lines().next().unwrap_or_default();
        assert!(first.starts_with("//!") || first.contains("ARCHITECTURE.md"), "{path} does not say what it is");
    }
}

#[test]
fn what_must_not_come_back_is_not_built() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    for package in lock.split("[[package]]") {
        let field = |name: &str| {
            let start = package.find(&format!("{name} = \""))? + name.len() + 4;
            package[start..].split('"').next()
        };
        match (field("name"), field("version")) {
            (Some("hyper"), Some(version)) => assert!(!version.starts_with("0."), "hyper {version}"),
            (Some("rustls"), Some(version)) => assert!(version.starts_with("0.23"), "rustls {version}"),
            _ => {}
        }
    }
    // ring stands in Cargo.lock through an optional feature that nobody turns on, so the lock alone cannot tell.
    let mut tree = Command::new(env!("CARGO"));
    let tree = tree.args(["tree", "-i", "ring", "--locked", "--offline"]).current_dir(root()).output().unwrap();
    assert!(tree.status.success() && tree.stdout.is_empty(), "{}", String::from_utf8_lossy(&tree.stdout));
}
