//! `run --dry-run --probe`: reaches what the plans name, and changes nothing there.
//!
//! Takes plans, gives for each namespace what was found at its source, its shelf and the target of each branch.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use futures::future::join_all;
use serde::Serialize;

use crate::clock::Clock;
use crate::connection::probe::Probed;
use crate::pipeline::plan::{BranchPlan, Plan, ShelfKind, SourceKind};
use crate::sink::{self, SinkContext};
use crate::source::{kafka, postgres, sqs};

/// Nothing is waited for longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// What was found for one namespace.
#[derive(Debug, Serialize)]
pub struct Probe {
    /// The namespace.
    pub namespace: String,
    /// By part: `source`, `shelf`, or a branch.
    pub parts: Vec<Part>,
}

/// One part of a pipeline.
#[derive(Debug, Serialize)]
pub struct Part {
    /// `source`, `shelf`, or `branch NAME`.
    pub name: String,
    /// What was looked at.
    pub probed: Vec<Probed>,
}

impl Probe {
    /// Whether everything works.
    pub fn is_fine(&self) -> bool {
        self.parts.iter().flat_map(|part| &part.probed).all(|probed| probed.ok)
    }

    /// As lines for people.
    pub fn text(&self) -> String {
        let mut out = format!("probe of {}\n", self.namespace);
        for part in &self.parts {
            for probed in &part.probed {
                let verdict = if probed.ok { "ok  " } else { "FAIL" };
                let _ = writeln!(out, "  {verdict}  {}: {}: {}", part.name, probed.what, probed.found);
            }
        }
        out
    }
}

/// Probes every plan, all at once.
pub async fn probe(plans: &[Plan]) -> Vec<Probe> {
    join_all(plans.iter().map(namespace)).await
}

async fn namespace(plan: &Plan) -> Probe {
    let source = part("source".to_owned(), source(plan));
    let branches = join_all(plan.branches.iter().map(|one| part(format!("branch {}", one.name), branch(plan, one))));
    let shelf = part("shelf".to_owned(), shelf(plan));
    let (source, shelf, branches) = tokio::join!(source, shelf, branches);
    let parts = [source, shelf].into_iter().chain(branches).filter(|part| !part.probed.is_empty()).collect();
    Probe { namespace: plan.namespace.to_string(), parts }
}

async fn part(name: String, probing: impl Future<Output = Vec<Probed>>) -> Part {
    let late = || vec![Probed::wrong("probe", format!("no answer within {} s", PATIENCE.as_secs()))];
    let probed = tokio::time::timeout(PATIENCE, probing).await.unwrap_or_else(|_| late());
    Part { name, probed }
}

async fn source(plan: &Plan) -> Vec<Probed> {
    match &plan.source.kind {
        // The folder is the instance's, not the file's.
        SourceKind::Embedded | SourceKind::Memory => Vec::new(),
        SourceKind::Kafka(spec) => {
            let branches: Vec<String> = plan.branches.iter().map(|branch| branch.name.to_string()).collect();
            kafka::probe(spec, plan.namespace.as_str(), &branches).await
        }
        SourceKind::Sqs(spec) => vec![sqs::probe(spec).await],
    }
}

async fn shelf(plan: &Plan) -> Vec<Probed> {
    match &plan.source.shelf {
        ShelfKind::Own | ShelfKind::None => Vec::new(),
        ShelfKind::Postgres(spec) => vec![postgres::probe(spec, &Clock::system()).await],
    }
}

async fn branch(plan: &Plan, branch: &BranchPlan) -> Vec<Probed> {
    let context = SinkContext {
        folder: PathBuf::new(),
        namespace: plan.namespace.as_str().into(),
        sink: branch.sink.clone(),
        clock: Clock::system(),
    };
    match sink::open(&branch.kind, &context) {
        Ok(sink) => sink.probe().await,
        Err(error) => vec![Probed::wrong(branch.kind.name(), error.to_string())],
    }
}
