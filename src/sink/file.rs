//! `file`: each record as one line of an NDJSON file, synced before it counts as delivered.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::template::Template;
use super::{BatchStyle, Failure, Operation, Sink, Verdict, Written};

/// `file:` — each record's payload as one line; synced before it counts as delivered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileSpec {
    /// Where, a template with a literal first folder or name: `out/{payload.kind}.ndjson`. Relative to the working folder.
    pub path: String,
}

/// Files kept open; more are closed and opened again.
const MOST_OPEN: usize = 32;

/// NDJSON files under one template.
pub struct Files {
    path: Template,
    open: Arc<Mutex<BTreeMap<String, File>>>,
}

impl Files {
    /// Opens nothing yet.
    pub fn new(spec: &FileSpec) -> Self {
        Self { path: Template::new(&spec.path), open: Arc::default() }
    }
}

/// Adds a payload as one line: JSON over several lines is written on one, anything else as it is.
pub(super) fn put_line(lines: &mut Vec<u8>, payload: &[u8]) {
    if payload.contains(&b'\n') {
        // Between tokens a line end is white space; within a text JSON has none.
        lines.extend(payload.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }));
    } else {
        lines.extend_from_slice(payload);
    }
    lines.push(b'\n');
}

#[expect(clippy::disallowed_methods, reason = "a target's file is not one of the log's")]
fn open(path: &str) -> io::Result<File> {
    let folder = Path::new(path).parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder {
        std::fs::create_dir_all(folder)?;
    }
    let mut file = OpenOptions::new().create(true).append(true).read(true).open(path)?;
    if file.seek(SeekFrom::End(0))? > 0 {
        // A line that a crash cut short is closed, so that the next one stands alone.
        file.seek(SeekFrom::End(-1))?;
        let mut last = [0];
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
        }
    }
    file.sync_all()?;
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(file)
}

fn append(files: &Mutex<BTreeMap<String, File>>, path: &str, lines: &[u8]) -> io::Result<()> {
    let mut files = files.lock();
    if !files.contains_key(path) {
        if files.len() >= MOST_OPEN {
            files.pop_first();
        }
        files.insert(path.to_owned(), open(path)?);
    }
    let Some(file) = files.get_mut(path) else { return Ok(()) };
    let written = file.write_all(lines).and_then(|()| file.sync_data());
    if written.is_err() {
        // After a failed sync nobody knows what the file holds: the next try opens it anew.
        files.remove(path);
    }
    written
}

impl Sink for Files {
    fn batch_style(&self) -> BatchStyle {
        BatchStyle::Atomic
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            let mut by_path: BTreeMap<String, (Vec<u8>, Vec<usize>)> = BTreeMap::new();
            let mut written = Written::default();
            for (index, operation) in batch.iter().enumerate() {
                match self.path.path(operation, "file") {
                    Ok(path) => {
                        let (lines, indexes) = by_path.entry(path).or_default();
                        put_line(lines, operation.event.payload());
                        indexes.push(index);
                    }
                    Err(failure) => written.failed.push((index, failure)),
                }
            }
            for (path, (lines, indexes)) in by_path {
                let (files, name) = (Arc::clone(&self.open), path.clone());
                let result = tokio::task::spawn_blocking(move || append(&files, &name, &lines)).await;
                let failure = match result {
                    Ok(Ok(())) => continue,
                    Ok(Err(error)) => Failure::new(Verdict::Down, format!("{path}: {error}")),
                    Err(_) => Failure::new(Verdict::Down, format!("{path}: the write was given up")),
                };
                written.failed.extend(indexes.into_iter().map(|index| (index, failure.clone())));
            }
            written.failed.sort_by_key(|(index, _)| *index);
            written
        }
        .boxed()
    }
}
