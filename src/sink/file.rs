//! `file`: each record as one line of an NDJSON file, synced before it counts as delivered.
//!
//! A line is the payload's own bytes; JSON that stands on several lines is put on one, a payload that is not JSON is a JSON
//! string in base64. Folders are made as needed. Never follows a value out of the literal folder, never keeps more than a
//! few files open, never rewrites a line: after a failure a line may stand twice.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use indexmap::IndexMap;
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::lines::{FileError, OpenFiles};
use super::template::{Scope, Template};
use super::{BatchStyle, Failure, OpenError, Operation, Sink, SinkContext, SpecFault, Verdict, Written, json};
use crate::connection::probe::Probed;

/// `file:` — each record's payload as one line; synced before it counts as delivered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileSpec {
    /// Where, a template with a literal first folder or name: `out/{payload.kind}.ndjson`. Relative to the working folder.
    pub path: String,
}

/// What cannot work in a file's settings.
pub(super) fn check(spec: &FileSpec) -> Vec<SpecFault> {
    let template = match Template::parse(&spec.path) {
        Ok(template) => template,
        Err(error) => {
            return vec![SpecFault::new("/path", error.to_string(), "out/{payload.kind}.ndjson, for example")];
        }
    };
    let help = "begin with a folder or name of its own: out/{payload.kind}.ndjson";
    let mut faults = Vec::new();
    let prefix = template.literal_prefix().trim_start_matches(['.', '/']);
    if prefix.is_empty() {
        faults.push(SpecFault::new("/path", "the path begins with no literal folder or name", help));
    } else if template.is_literal() && spec.path.ends_with('/') {
        faults.push(SpecFault::new("/path", "the path names a folder, not a file", "out/records.ndjson, for example"));
    }
    if spec.path.contains('\0') {
        faults.push(SpecFault::new("/path", "the path holds a zero byte", help));
    }
    faults
}

/// Lines in files that a template names.
pub struct FileSink {
    path: Template,
    /// The folder that is the same for every record; `None` where the whole path is.
    folder: Option<PathBuf>,
    context: SinkContext,
    files: Arc<Mutex<OpenFiles>>,
}

/// What a batch means for the disk: lines by file, in the order in which files come first.
#[derive(Default)]
struct Prepared {
    files: IndexMap<PathBuf, Lines>,
    refused: Option<(usize, Failure)>,
}

/// The lines of one file.
#[derive(Default)]
struct Lines {
    first: usize,
    ends: Vec<(usize, usize)>,
    bytes: Vec<u8>,
}

impl Lines {
    /// The lines of the operations before `index`.
    fn before(&self, index: usize) -> &[u8] {
        let end = self.ends.iter().take_while(|(at, _)| *at < index).last().map_or(0, |(_, end)| *end);
        self.bytes.get(..end).unwrap_or(&self.bytes)
    }
}

impl FileSink {
    /// Opens nothing yet: files are opened when a record names them.
    ///
    /// # Errors
    /// When the path is no template.
    pub fn open(spec: &FileSpec, context: &SinkContext) -> Result<Self, OpenError> {
        let path = Template::parse(&spec.path).map_err(|error| OpenError::Setting {
            kind: "file",
            pointer: "/path".into(),
            message: error.message,
        })?;
        let folder = (!path.is_literal()).then(|| {
            let prefix = path.literal_prefix();
            context.folder.join(prefix.rfind('/').and_then(|end| prefix.get(..=end)).unwrap_or("."))
        });
        Ok(Self { path, folder, context: context.clone(), files: Arc::default() })
    }

    fn prepare(&self, batch: &[Operation]) -> Prepared {
        let mut prepared = Prepared::default();
        for (index, operation) in batch.iter().enumerate() {
            let path = match self.path.render_path(&Scope::new(operation, &self.context)) {
                Ok(path) => self.context.folder.join(path),
                Err(error) => {
                    prepared.refused = Some((index, error.into()));
                    return prepared;
                }
            };
            let lines = prepared.files.entry(path).or_insert_with(|| Lines { first: index, ..Lines::default() });
            let payload = operation.event.payload();
            if operation.event.record.binary {
                lines.bytes.extend_from_slice(&json::base64_text(payload));
            } else {
                lines.bytes.extend_from_slice(&json::one_line(payload));
            }
            lines.bytes.push(b'\n');
            lines.ends.push((index, lines.bytes.len()));
        }
        prepared
    }
}

/// Whether files can be made where the path is literal.
fn probe_folder(folder: &Path) -> Probed {
    fn named(path: &Path) -> &Path {
        if path.as_os_str().is_empty() { Path::new(".") } else { path }
    }
    let what = format!("folder {}", named(folder).display());
    let Some(there) = folder.ancestors().map(named).find(|one| one.exists()) else {
        return Probed::wrong(what, "nothing of this path is there");
    };
    if !there.is_dir() {
        return Probed::wrong(what, format!("{} is no folder: move it away, or name another path", there.display()));
    }
    match rustix::fs::access(there, rustix::fs::Access::WRITE_OK) {
        Ok(()) => Probed::fine(what, "files can be made there"),
        Err(error) => Probed::wrong(what, format!("{} cannot be written to: {error}", there.display())),
    }
}

impl Sink for FileSink {
    fn probe(&self) -> BoxFuture<'_, Vec<Probed>> {
        let folder = self.folder.clone().unwrap_or_else(|| {
            let path = self.context.folder.join(self.path.literal_prefix());
            path.parent().map(Path::to_owned).unwrap_or_default()
        });
        std::future::ready(vec![probe_folder(&folder)]).boxed()
    }

    fn batch_style(&self) -> BatchStyle {
        BatchStyle::StopsAtFirstFailure
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            let prepared = self.prepare(batch);
            let files = self.files.clone();
            let folder = self.folder.clone();
            let written = tokio::task::spawn_blocking(move || put(&files, prepared, folder.as_deref())).await;
            let failed = written.unwrap_or_else(|_| Some((0, Failure::new(Verdict::Down, "the write was stopped"))));
            Written { failed: failed.into_iter().collect() }
        }
        .boxed()
    }
}

/// Writes and syncs; gives the first operation that failed.
fn put(files: &Mutex<OpenFiles>, prepared: Prepared, folder: Option<&Path>) -> Option<(usize, Failure)> {
    let mut files = files.lock();
    let mut failed = prepared.refused;
    // A file that cannot be opened is found before anything is written, so that nothing behind it is written twice.
    for (path, lines) in &prepared.files {
        if let Err(error) = files.open(path) {
            let earlier = failed.as_ref().is_some_and(|(index, _)| *index < lines.first);
            if !earlier {
                failed = Some((lines.first, judge(path, &error, folder)));
            }
            break;
        }
    }
    let end = failed.as_ref().map_or(usize::MAX, |(index, _)| *index);
    for (path, lines) in prepared.files.iter().filter(|(_, lines)| lines.first < end) {
        if let Err(error) = files.append(path, lines.before(end)) {
            return Some((lines.first, judge(path, &error, folder)));
        }
    }
    failed
}

/// What a file's error means: an outage of the disk, or a record whose values name a file that cannot be.
fn judge(path: &Path, error: &FileError, folder: Option<&Path>) -> Failure {
    let of_the_record = error.is_about_the_name() && folder.is_some_and(Path::is_dir);
    let verdict = if of_the_record { Verdict::Never } else { Verdict::Down };
    Failure::new(verdict, format!("{}: {error}", path.display().to_string().escape_debug()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::testing::{context, operation, operation_with};

    fn sink(folder: &Path, path: &str) -> FileSink {
        let context = SinkContext { folder: folder.to_owned(), ..context() };
        FileSink::open(&FileSpec { path: path.to_owned() }, &context).unwrap()
    }

    fn read(folder: &Path, name: &str) -> String {
        std::fs::read_to_string(folder.join(name)).unwrap()
    }

    #[tokio::test]
    async fn payloads_arrive_as_lines_in_the_file_that_they_name() {
        let folder = tempfile::tempdir().unwrap();
        let sink = sink(folder.path(), "out/deep/{payload.kind}.ndjson");
        let batch = [
            operation(r#"{ "kind":"a", "n":1.10 }"#),
            operation("{\n  \"kind\": \"../b\",\n  \"t\": \"x\\ny\"\n}"),
            operation(r#"{"kind":"a"}"#),
        ];
        assert!(sink.write(&batch).await.failed.is_empty());
        assert_eq!(read(folder.path(), "out/deep/a.ndjson"), "{ \"kind\":\"a\", \"n\":1.10 }\n{\"kind\":\"a\"}\n");
        assert_eq!(read(folder.path(), "out/deep/%2E.%2Fb.ndjson"), "{\"kind\":\"../b\",\"t\":\"x\\ny\"}\n");
    }

    #[tokio::test]
    async fn bytes_that_are_no_json_become_a_json_string() {
        let folder = tempfile::tempdir().unwrap();
        let sink = sink(folder.path(), "a.ndjson");
        let binary = operation_with("\n\u{0}", |record| record.binary = true);
        assert!(sink.write(&[binary]).await.failed.is_empty());
        assert_eq!(read(folder.path(), "a.ndjson"), "\"CgA=\"\n");
    }

    #[tokio::test]
    async fn a_record_that_names_no_file_stops_the_batch_there() {
        let folder = tempfile::tempdir().unwrap();
        let sink = sink(folder.path(), "{record.namespace}-{payload.kind}.ndjson");
        let batch = [operation(r#"{"kind":"a"}"#), operation("{}"), operation(r#"{"kind":"a"}"#)];
        let failed = sink.write(&batch).await.failed;
        assert_eq!(failed.len(), 1);
        assert_eq!((failed[0].0, failed[0].1.verdict, failed[0].1.rendering), (1, Verdict::Never, true));
        assert_eq!(read(folder.path(), "orders-a.ndjson"), "{\"kind\":\"a\"}\n");
    }

    #[tokio::test]
    async fn a_folder_that_cannot_be_made_is_an_outage_and_nothing_behind_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("out"), "in the way").unwrap();
        let fixed = sink(folder.path(), "out/a.ndjson");
        let failed = fixed.write(&[operation("1")]).await.failed;
        assert_eq!((failed[0].0, failed[0].1.verdict), (0, Verdict::Down));
        assert!(failed[0].1.message.contains("out/a.ndjson"), "{}", failed[0].1);
        std::fs::remove_file(folder.path().join("out")).unwrap();
        assert!(fixed.write(&[operation("1")]).await.failed.is_empty());

        // Here one record's value makes the name impossible: that is the record's fault.
        std::fs::create_dir(folder.path().join("b.ndjson")).unwrap();
        let varied = sink(folder.path(), "./{record.namespace:-x}/../{payload.kind}.ndjson");
        std::fs::create_dir(folder.path().join("orders")).unwrap();
        let kinds = ["a", "b", "a"].map(|kind| operation(&format!("{{\"kind\":\"{kind}\"}}")));
        let failed = varied.write(&kinds).await.failed;
        assert_eq!((failed.len(), failed[0].0, failed[0].1.verdict), (1, 1, Verdict::Never));
        assert_eq!(read(folder.path(), "a.ndjson"), "{\"kind\":\"a\"}\n");
    }

    #[test]
    fn a_path_needs_a_literal_beginning() {
        let faults = |path: &str| check(&FileSpec { path: path.to_owned() });
        for wrong in ["", "{payload.a}", "/{payload.a}", "../{key}/x", "out/", "out/{payload"] {
            assert_eq!(faults(wrong).len(), 1, "{wrong}");
            assert_eq!(faults(wrong)[0].pointer, "/path");
        }
        for fine in ["a.ndjson", "out/{key}", "/var/x/{payload.a}.ndjson", "../out/a"] {
            assert_eq!(faults(fine), [], "{fine}");
        }
    }
}
