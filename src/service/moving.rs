//! Moving a namespace to another log: stop and go.
//!
//! Writes hear 503 until every branch is at the end; what waits and the keys are copied; then the file is switched, at one
//! moment, and the namespace goes on. Until that moment nothing has changed but copies that nobody reads; a branch that does
//! not come to its end stops the whole, and the namespace goes on where it was.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use tokio::time::Instant;
use tracing::{info, warn};

use super::files::Found;
use super::pipeline::{Config, Pipeline};
use super::pipelines::Pipelines;
use crate::console::{MoveError, Moved, StuckBranch};
use crate::pipeline::plan::{Plan, SourceKind};
use crate::record::Namespace;
use crate::source::embedded::EmbeddedNamespace;
use crate::source::foreign::Foreign;
use crate::source::{BranchName, DeadQuery, LogError, ParkedQuery, Start};
use crate::spec::code::Code;

/// Rows copied at once.
const PAGE: usize = 500;
/// How often it is looked whether branches are at the end.
const LOOK: Duration = Duration::from_millis(20);
/// The last revision of a log whose namespace has moved: what is left of it may go.
const GONE: &[u8] = b"walflow: moved to another log";

/// True for a log that a move has left behind.
pub(super) fn is_left_behind(log: &EmbeddedNamespace) -> bool {
    use crate::source::Log as _;
    log.epochs().last().is_some_and(|epoch| epoch.files == GONE)
}

impl Pipelines {
    /// Moves a namespace to the log that `text`, its new file, names.
    pub(super) async fn move_namespace(
        self: &Arc<Self>,
        name: &str,
        text: &str,
        patience: Duration,
    ) -> Result<Moved, MoveError> {
        let unknown = || MoveError::Unknown(name.to_owned());
        let name: Namespace = name.parse().map_err(|_| unknown())?;
        let _applying = self.applying.lock().await;
        let pipeline = self.get(&name).ok_or_else(unknown)?;
        // A file that already names the other log is why one moves.
        let usable = match pipeline.config() {
            Config::Current => true,
            Config::Stale(problem) => problem.code == Code::NeedsRestart,
            Config::Deleted => false,
        };
        if !usable {
            return Err(MoveError::Refused("its file is broken or gone: put it right and reload first".to_owned()));
        }
        let now = pipeline.plan();
        if !matches!(now.source.kind, SourceKind::Embedded) {
            return Err(MoveError::Refused("only a namespace on the embedded log can be moved by walflow".to_owned()));
        }
        let path = self.files.path_of(&name).ok_or_else(unknown)?;
        let plan = self.files.plan_instead(&path, text).map_err(MoveError::Refused)?;
        if plan.namespace != name {
            return Err(MoveError::Refused(format!("the new file is that of `{}`", plan.namespace)));
        }
        if !plan.source.kind.is_foreign() {
            return Err(MoveError::Refused(
                "the new file names the embedded log too: there is nothing to move".to_owned(),
            ));
        }
        let old = self.logs.embedded(&name)?.ok_or_else(unknown)?;
        pipeline.set_moving(true);
        let result = self.carry_over(&pipeline, &old, &plan, &path, text, patience).await;
        let moved = match result {
            Ok(moved) => moved,
            Err(error) => {
                pipeline.set_moving(false);
                old.hold_releases(false);
                return Err(error);
            }
        };
        // The file is switched: from here on there is no way back. Writes hear 503 until the new log is open.
        let found = Found { namespace: name.clone(), plan: Ok(Arc::clone(&plan)), source: None };
        if let Err(error) = self.begin(name.clone(), Some(plan), Config::Current).await {
            warn!(ns = %name, %error, "moved, but the new log is not open yet; it is tried again");
            tokio::spawn(Arc::clone(self).settle_change(name.clone(), Some(found)));
            return Err(error.into());
        }
        self.logs.delete_embedded(&name).await?;
        info!(ns = %name, ?moved, "moved to another log");
        Ok(moved)
    }

    async fn carry_over(
        self: &Arc<Self>,
        pipeline: &Arc<Pipeline>,
        old: &EmbeddedNamespace,
        plan: &Arc<Plan>,
        path: &Path,
        text: &str,
        patience: Duration,
    ) -> Result<Moved, MoveError> {
        let name = &pipeline.namespace;
        old.hold_releases(true);
        until_at_end(pipeline, patience).await?;
        let branches = pipeline.branches();
        let pair = self.logs.open_pair(name, plan).await?;
        let copied = async {
            // Nothing is sent any more; what is set aside stands still.
            pipeline.stop().await;
            copy(pipeline, old, &pair, &branches.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>()).await
        };
        let moved = match copied.await {
            Ok(moved) => moved,
            Err(error) => {
                if let Err(left) = self.logs.drop_pair(name).await {
                    warn!(ns = %name, error = %left, "copies of a move that failed are left on the new shelf");
                }
                pipeline.apply(pipeline.plan(), Config::Current).await?;
                return Err(error.into());
            }
        };
        // From here on a start with the new file knows that nothing of the old log is missing.
        pipeline.log.put_epoch(Bytes::from_static(GONE)).await?;
        if let Err(cause) = switch(path, text) {
            self.logs.drop_pair(name).await?;
            pipeline.apply(pipeline.plan(), Config::Current).await?;
            return Err(MoveError::Refused(format!("{} could not be written: {cause}", path.display())));
        }
        Ok(moved)
    }
}

/// Waits until every branch has ended all that it has read and there is nothing more to read.
async fn until_at_end(pipeline: &Pipeline, patience: Duration) -> Result<(), MoveError> {
    let deadline = Instant::now() + patience;
    loop {
        // Writes that were let in before are counted until they are durable.
        let entering = pipeline.inlet().budget.held();
        let stuck: Vec<StuckBranch> = pipeline
            .branches()
            .iter()
            .filter_map(|(name, handle)| {
                let (lag, status) = (pipeline.log.lag(name), handle.board().status());
                let left = lag.records.max(status.in_flight);
                (left > 0).then(|| StuckBranch {
                    branch: name.clone(),
                    records: left,
                    why: status.pause.map(|pause| pause.note).or(status.last_error).unwrap_or_default(),
                })
            })
            .collect();
        if entering == 0 && stuck.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(MoveError::Stuck(stuck));
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn copy(
    pipeline: &Pipeline,
    old: &EmbeddedNamespace,
    new: &Foreign,
    branches: &[BranchName],
) -> Result<Moved, LogError> {
    let mut moved = Moved::default();
    let keyed = copy_keys(old, new).await?;
    moved.keys = keyed;
    let mut after = None;
    loop {
        let page = pipeline.shelf.parked(ParkedQuery { limit: PAGE, after, ..ParkedQuery::default() }).await?;
        moved.parked += page.rows.len() as u64;
        if !page.rows.is_empty() {
            new.import_parked(page.rows).await?;
        }
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    for branch in branches {
        let mut numbers = 0;
        let lanes = pipeline.log.open_branch(branch, Start::Latest).await?.lanes;
        let rows =
            join_all(lanes.iter().map(|lane| pipeline.shelf.aside_rows(branch, &lane.lane, usize::MAX / 2))).await;
        for rows in rows {
            let rows = rows?;
            moved.set_aside += rows.len() as u64;
            new.import_rows(branch, rows, Vec::new(), &mut numbers).await?;
        }
        let mut after = None;
        loop {
            let of_branch = Some(branch.to_string());
            let query = DeadQuery { branch: of_branch, limit: PAGE, after, ..DeadQuery::default() };
            let page = pipeline.shelf.dead_letters(query).await?;
            moved.dead_letters += page.rows.len() as u64;
            if !page.rows.is_empty() {
                new.import_rows(branch, Vec::new(), page.rows, &mut numbers).await?;
            }
            after = page.next;
            if after.is_none() {
                break;
            }
        }
    }
    Ok(moved)
}

async fn copy_keys(old: &EmbeddedNamespace, new: &Foreign) -> Result<u64, LogError> {
    if !new.has_shelf() {
        // Only where nothing waits: what follows refuses the rest.
        return Ok(0);
    }
    let (mut copied, mut after) = (0, None);
    loop {
        let page = old.kept_keys(after, PAGE).await?;
        after = page.last().map(|(place, _)| *place);
        let keys: Vec<_> = page.into_iter().map(|(_, key)| key).collect();
        let last = keys.len() < PAGE;
        copied += keys.len() as u64;
        new.import_keys(keys, old.number()).await?;
        if last {
            return Ok(copied);
        }
    }
}

/// Puts the new file in the place of the old one: whoever reads sees the one or the other.
fn switch(path: &Path, text: &str) -> std::io::Result<()> {
    let next: PathBuf = path.with_extension("moving");
    let mut file = File::options().write(true).create(true).truncate(true).open(&next)?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&next, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::options().read(true).open(folder)?.sync_all()
}
