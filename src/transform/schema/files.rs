//! A schema's files: the one that is named, and those that it refers to by a relative `$ref`.
//!
//! Each file gets an address of its own, and every relative reference is rewritten to it: so it is the path beside the
//! file that counts, whatever `$id` a file gives itself. Absolute addresses are left as they are, and never fetched.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use jsonschema::{Retrieve, Uri};
use serde_json::Value;

use super::SchemaError;

/// Files that one schema may be made of.
pub(super) const MOST: usize = 64;

/// What stands before a file's number in its address.
const ADDRESS: &str = "urn:walflow-schema:";

/// Keywords whose value is data, whatever it looks like.
const DATA: &[&str] = &["const", "default", "enum", "examples"];
/// Keywords whose fields are named by the author.
const NAMED: &[&str] = &["$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"];

/// The files beside a schema, by address.
#[derive(Debug)]
pub(super) struct Files(BTreeMap<String, Value>);

impl Files {
    /// Reads a schema and all that it refers to.
    pub(super) fn gather(
        path: &Path,
        read: &mut dyn FnMut(&Path) -> io::Result<Vec<u8>>,
    ) -> Result<(Value, Self), SchemaError> {
        let mut paths = vec![path.to_path_buf()];
        let mut files = Vec::new();
        // Reading one may add others to the list.
        while let Some(next) = paths.get(files.len()).cloned() {
            let shown = || next.display().to_string().into();
            let bytes = read(&next).map_err(|error| SchemaError::Read { path: shown(), error })?;
            let mut schema =
                serde_json::from_slice(&bytes).map_err(|error| SchemaError::Json { path: shown(), error })?;
            let folder = next.parent().unwrap_or(Path::new(""));
            readdress(&mut schema, folder, &mut paths);
            if paths.len() > MOST {
                return Err(SchemaError::Many { path: path.display().to_string().into(), most: MOST });
            }
            files.push(schema);
        }
        let schema = files.first().cloned().unwrap_or_default();
        let by_address = files.into_iter().enumerate().map(|(number, file)| (format!("{ADDRESS}{number}"), file));
        Ok((schema, Self(by_address.collect())))
    }
}

/// Gives each relative reference the address of its file, which is put on the list if it is new.
fn readdress(schema: &mut Value, folder: &Path, paths: &mut Vec<PathBuf>) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(|item| readdress(item, folder, paths)),
        Value::Object(fields) => {
            for (keyword, value) in fields {
                match value {
                    Value::String(reference) if keyword == "$ref" => {
                        if let Some(address) = address_of(reference, folder, paths) {
                            *reference = address;
                        }
                    }
                    Value::Object(named) if NAMED.contains(&keyword.as_str()) => {
                        named.values_mut().for_each(|value| readdress(value, folder, paths));
                    }
                    _ if DATA.contains(&keyword.as_str()) => {}
                    value => readdress(value, folder, paths),
                }
            }
        }
        _ => {}
    }
}

/// `None` = it is an address, or within the file itself.
fn address_of(reference: &str, folder: &Path, paths: &mut Vec<PathBuf>) -> Option<String> {
    let (path, within) = reference.split_once('#').map_or((reference, ""), |(path, within)| (path, within));
    if path.is_empty() || path.contains(':') {
        return None;
    }
    if path.starts_with('/') {
        // Not beside the schema: an address, which is refused as any other.
        return Some(format!("file://{reference}"));
    }
    let path = tidy(&folder.join(path));
    let number = paths.iter().position(|known| tidy(known) == path).unwrap_or_else(|| {
        paths.push(path);
        paths.len() - 1
    });
    Some(format!("{ADDRESS}{number}#{within}"))
}

/// The path without detours, so that one file has one address.
fn tidy(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if matches!(out.components().next_back(), Some(Component::Normal(_))) => {
                out.pop();
            }
            part => out.push(part),
        }
    }
    out
}

impl Retrieve for Files {
    fn retrieve(&self, uri: &Uri<String>) -> Result<Value, Box<dyn std::error::Error + Send + Sync>> {
        self.0.get(uri.as_str()).cloned().ok_or_else(|| {
            "nothing is fetched for a schema: put the file beside it and refer to it by a relative path".into()
        })
    }
}
