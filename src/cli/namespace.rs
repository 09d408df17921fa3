//! `walflow namespace delete`: the only way in which a namespace's records are thrown away.

use clap::Subcommand;
use reqwest::Method;

use super::client::{Remote, segment};
use super::{Stop, output};

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
}

pub(super) async fn namespace(verb: NamespaceVerb) -> Result<(), Stop> {
    let NamespaceVerb::Delete { namespace, yes, remote } = verb;
    if !yes {
        let message =
            format!("this deletes every record, delayed write and dead letter of `{namespace}` for good; say --yes");
        return Err(Stop::new(Stop::USAGE, message));
    }
    remote.ask(Method::DELETE, &format!("/api/v1/wal/namespace/{}", segment(&namespace)), None).await?.success()?;
    output::notice(&format!("deleted {namespace}"));
    Ok(())
}
