//! `walflow config`: what is in force, and where each value came from.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Output, Stop, output};
use crate::spec::environment::Environment;
use crate::spec::load_with;
use crate::spec::shared::{self, Shared};

/// What can be done with the configuration.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigVerb {
    /// Print a namespace's effective pipeline, behind each value where it came from; opens nothing
    Show(ShowArgs),
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// The namespace
    namespace: String,
    /// Pipeline files, and folders of them
    #[arg(env = "WALFLOW_PATHS", default_value = "pipelines/", value_delimiter = ',')]
    paths: Vec<PathBuf>,
    /// The file with shared connections and defaults. Default: ./walflow.yaml, else /etc/walflow/walflow.yaml, where there is one
    #[arg(long, env = "WALFLOW_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// How it is printed
    #[arg(long, env = "WALFLOW_OUTPUT", value_enum, default_value_t)]
    output: Output,
}

pub(super) fn config(verb: &ConfigVerb) -> Result<(), Stop> {
    match verb {
        ConfigVerb::Show(args) => show(args),
    }
}

fn show(args: &ShowArgs) -> Result<(), Stop> {
    let variables =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let environment = Environment::new(variables);
    let shared = shared::find(args.config.as_deref()).map(|path| Shared::read(&path, &environment));
    let load = load_with(&args.paths, shared.as_ref(), &environment);
    let is_it = |name: &str| name == args.namespace;
    let found = load.files.iter().find(|file| file.namespace.as_ref().is_some_and(|name| is_it(name.as_str())));
    let Some(found) = found else {
        let names: Vec<&str> = load.files.iter().filter_map(|file| Some(file.namespace.as_ref()?.as_str())).collect();
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return Err(Stop::new(
            Stop::CONFIG,
            format!("no file declares the namespace '{}'; there are: {known}", args.namespace),
        ));
    };
    match args.output {
        Output::Json => output::json(&found.effective_json())?,
        Output::Text => output::data(found.effective_text().trim_end())?,
    }
    let problems = load.diagnostics.iter().chain(&found.diagnostics);
    let problems: Vec<String> = problems.filter(|found| found.is_error()).map(|found| found.render(false)).collect();
    if problems.is_empty() {
        return Ok(());
    }
    output::notice(&problems.join("\n"));
    Err(Stop::new(Stop::CONFIG, ""))
}
