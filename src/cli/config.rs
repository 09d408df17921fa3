//! `walflow config`: what is in force, and where each value came from.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::settings::{Resolved, resolve};
use super::{Output, Stop, output};
use crate::spec::diagnostic::Diagnostic;
use crate::spec::settings::ServiceSpec;
use crate::spec::{load_with, service_json, service_text};

/// What can be done with the configuration.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigVerb {
    /// Print the settings, connections and defaults in force, or a namespace's effective pipeline, behind each value where it
    /// came from; opens nothing
    Show(ShowArgs),
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// The namespace. Default: what the instance has for itself and for all
    namespace: Option<String>,
    #[command(flatten)]
    own: ServiceSpec,
    /// The file with settings of its own, shared connections and defaults. Default: ./walflow.yaml, else /etc/walflow/walflow.yaml, where there is one
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
    let resolved: Resolved<ShowArgs> = resolve(args.config.as_deref(), &["config", "show"])?;
    let (args, shared) = (&resolved.args, resolved.shared.as_ref());
    let Some(namespace) = &args.namespace else {
        match args.output {
            Output::Json => output::json(&service_json(&resolved.in_force, shared))?,
            Output::Text => output::data(service_text(&resolved.in_force, shared).trim_end())?,
        }
        return told(shared.iter().flat_map(|shared| &shared.diagnostics));
    };
    let load = load_with(&args.own.paths, shared, &resolved.environment);
    let is_it = |name: &str| name == namespace;
    let found = load.files.iter().find(|file| file.namespace.as_ref().is_some_and(|name| is_it(name.as_str())));
    let Some(found) = found else {
        let names: Vec<&str> = load.files.iter().filter_map(|file| Some(file.namespace.as_ref()?.as_str())).collect();
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return Err(Stop::new(
            Stop::CONFIG,
            format!("no file declares the namespace '{namespace}'; there are: {known}"),
        ));
    };
    match args.output {
        Output::Json => output::json(&found.effective_json())?,
        Output::Text => output::data(found.effective_text().trim_end())?,
    }
    told(load.diagnostics.iter().chain(&found.diagnostics))
}

/// Says every error; one is enough to fail.
fn told<'a>(problems: impl Iterator<Item = &'a Diagnostic>) -> Result<(), Stop> {
    let problems: Vec<String> = problems.filter(|found| found.is_error()).map(|found| found.render(false)).collect();
    if problems.is_empty() {
        return Ok(());
    }
    output::notice(&problems.join("\n"));
    Err(Stop::new(Stop::CONFIG, ""))
}
