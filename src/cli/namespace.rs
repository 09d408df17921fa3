//! `walflow namespace delete` and `move`: what is done to a namespace as a whole.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use reqwest::Method;
use serde_json::json;

use super::client::{Remote, segment};
use super::{Stop, output};
use crate::units::Span;

#[derive(Debug, Subcommand)]
pub(super) enum NamespaceVerb {
    /// Delete a namespace whose pipeline file is gone: its records, what waits and its dead letters
    Delete {
        /// The namespace
        namespace: String,
        /// Really delete; without it nothing happens
        #[arg(long, help_heading = "This call")]
        yes: bool,
        #[command(flatten)]
        remote: Remote,
    },
    /// Move a namespace to another log: writes hear 503 until every branch is at the end, then all that waits goes along
    Move {
        /// The namespace
        namespace: String,
        /// The new pipeline file, which takes the place of the one that the running walflow has
        #[arg(long, value_name = "FILE", help_heading = "This call")]
        to: PathBuf,
        /// How long branches may take to come to their end
        #[arg(long, default_value = "60s", value_name = "DURATION", help_heading = "This call")]
        wait: Span,
        #[command(flatten)]
        remote: Remote,
    },
}

pub(super) async fn namespace(verb: NamespaceVerb) -> Result<(), Stop> {
    match verb {
        NamespaceVerb::Delete { namespace, yes, remote } => delete(&namespace, yes, &remote).await,
        NamespaceVerb::Move { namespace, to, wait, remote } => {
            let unreadable = |error| Stop::new(Stop::USAGE, format!("{}: {error}", to.display()));
            let file = std::fs::read_to_string(&to).map_err(unreadable)?;
            let order = json!({ "file": file, "timeout": wait.to_string() });
            let path = format!("/api/v1/wal/namespace/{}/move", segment(&namespace));
            let answer = remote
                .at_least(wait.0 * 2 + Duration::from_secs(60))
                .ask(Method::POST, &path, Some(&order))
                .await?
                .success()?;
            let moved = |name: &str| output::field(answer.get("moved").unwrap_or(&serde_json::Value::Null), name);
            output::notice(&format!(
                "moved {namespace}: {} parked, {} set aside, {} dead letters, {} idempotency keys",
                moved("parked"),
                moved("setAside"),
                moved("deadLetters"),
                moved("keys")
            ));
            Ok(())
        }
    }
}

async fn delete(namespace: &str, yes: bool, remote: &Remote) -> Result<(), Stop> {
    if !yes {
        let message =
            format!("this deletes every record, delayed write and dead letter of `{namespace}` for good; say --yes");
        return Err(Stop::new(Stop::USAGE, message));
    }
    remote.ask(Method::DELETE, &format!("/api/v1/wal/namespace/{}", segment(namespace)), None).await?.success()?;
    output::notice(&format!("deleted {namespace}"));
    Ok(())
}
