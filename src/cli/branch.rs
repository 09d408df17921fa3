//! `walflow branch`: see, pause, resume and unblock the ends of a namespace.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Remote, segment};
use super::{Output, Stop, output};

#[derive(Debug, Subcommand)]
pub(super) enum BranchVerb {
    /// List a namespace's branches and how far each is
    List {
        /// The namespace
        namespace: String,
        /// How to print the list
        #[arg(long, env = "WALFLOW_OUTPUT", value_enum, default_value_t)]
        output: Output,
        #[command(flatten)]
        remote: Remote,
    },
    /// Stop delivering; what is written stays in the log. Survives restarts, but for a queue without a shelf
    Pause {
        #[command(flatten)]
        which: Which,
        /// Why, for whoever finds it paused
        #[arg(long, help_heading = "This call", value_name = "TEXT")]
        note: Option<String>,
    },
    /// Deliver again, whatever paused the branch
    Resume {
        #[command(flatten)]
        which: Which,
    },
    /// Move the oldest unfinished record of the branch to the dead letters
    Skip {
        #[command(flatten)]
        which: Which,
        /// This record instead of the oldest
        #[arg(long, help_heading = "This call")]
        id: Option<String>,
    },
}

/// One branch of a running walflow.
#[derive(Debug, Args)]
pub(super) struct Which {
    /// The namespace
    namespace: String,
    /// The branch, as `branch list` shows it
    branch: String,
    #[command(flatten)]
    remote: Remote,
}

impl Which {
    async fn order(&self, verb: &str, body: Option<&Value>) -> Result<(), Stop> {
        let (namespace, branch) = (segment(&self.namespace), segment(&self.branch));
        let path = format!("/api/v1/wal/namespace/{namespace}/branches/{branch}/{verb}");
        let done = self.remote.ask(Method::POST, &path, body).await?.success()?;
        output::notice(&format!("{verb}: {} of {}", self.branch, self.namespace));
        if let Some(warning) = done.get("warning").and_then(Value::as_str) {
            output::notice(&format!("warning: {warning}"));
        }
        Ok(())
    }
}

pub(super) async fn branch(verb: BranchVerb) -> Result<(), Stop> {
    match verb {
        BranchVerb::List { namespace, output, remote } => list(&namespace, output, &remote).await,
        BranchVerb::Pause { which, note } => {
            let body = note.map(|note| json!({ "note": note }));
            which.order("pause", body.as_ref()).await
        }
        BranchVerb::Resume { which } => which.order("resume", None).await,
        BranchVerb::Skip { which, id } => {
            let body = id.map(|id| json!({ "id": id }));
            which.order("skip", body.as_ref()).await
        }
    }
}

async fn list(namespace: &str, form: Output, remote: &Remote) -> Result<(), Stop> {
    let answer = remote.get(&format!("/api/v1/wal/namespace/{}/status", segment(namespace))).await?;
    let branches = answer.get("branches").cloned().unwrap_or_else(|| json!([]));
    match form {
        Output::Json => output::json(&branches)?,
        Output::Text => output::data(&branch_table(&branches))?,
    }
    Ok(())
}

/// A namespace's branches as rows.
pub(super) fn branch_table(branches: &Value) -> String {
    let columns = [
        ("BRANCH", "name"),
        ("STATE", "state"),
        ("LAG", "lagRecords"),
        ("LAG s", "lagSeconds"),
        ("ASIDE", "setAside"),
        ("DEAD", "deadLetters"),
    ];
    let row = |branch: &Value| columns.iter().map(|(_, name)| output::field(branch, name)).collect();
    let rows: Vec<Vec<String>> = branches.as_array().into_iter().flatten().map(row).collect();
    output::table(&columns.map(|(title, _)| title), &rows)
}
