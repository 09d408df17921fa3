//! `walflow explain CODE`: why something is a problem, and what to do.

use clap::Args;

use super::{Stop, output};

#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// The code, as a message shows it: WF0201
    code: String,
}

pub(super) fn explain(args: &ExplainArgs) -> Result<(), Stop> {
    let text = crate::spec::code::explain(&args.code).map_err(|error| Stop::new(Stop::USAGE, error.to_string()))?;
    Ok(output::data(text.trim_end())?)
}
