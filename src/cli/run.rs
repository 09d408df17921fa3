//! `walflow run`: run the pipelines, or only check and print them.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use clap::Args;

use super::settings::{Resolved, resolve};
use super::{Output, Stop, logging, output};
use crate::pipeline;
use crate::pipeline::plan::Plan;
use crate::service::probe::Probe;
use crate::service::{self, ServiceError, Settings};
use crate::spec::settings::ServiceSpec;

/// Settings of one instance, and what this call does.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    own: ServiceSpec,
    /// The file with settings of its own, shared connections and defaults. Default: ./walflow.yaml, else /etc/walflow/walflow.yaml, where there is one
    #[arg(long, env = "WALFLOW_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the files and print what they mean; opens nothing
    #[arg(long, env = "WALFLOW_DRY_RUN")]
    dry_run: bool,
    /// With --dry-run: also reach every source, shelf and target, and say what is wrong there; changes nothing
    #[arg(long, env = "WALFLOW_PROBE", requires = "dry_run")]
    probe: bool,
    /// How the dry run prints
    #[arg(long, env = "WALFLOW_OUTPUT", value_enum, default_value_t)]
    output: Output,
}

pub(super) fn run(args: &RunArgs) -> Result<(), Stop> {
    let resolved: Resolved<RunArgs> = resolve(args.config.as_deref(), &["run"])?;
    if resolved.args.dry_run {
        return dry_run(&resolved);
    }
    if let Some(shared) = &resolved.shared {
        let problems: Vec<String> = shared.unusable().iter().map(|problem| problem.render(false)).collect();
        if !problems.is_empty() {
            let message = format!("{} has problems\n{}", shared.text.name(), problems.join("\n"));
            return Err(Stop::new(Stop::CONFIG, message.trim_end()));
        }
    }
    let own = resolved.args.own;
    logging::start(own.log_format, &own.log_level)?;
    raise_file_limit();
    let settings = Settings {
        listen: resolved.in_force.address(&own),
        paths: own.paths,
        config: resolved.args.config,
        shards: own.shard.into_iter().filter(|shard| !shard.is_empty()).collect(),
        data: own.data,
        strict: own.strict,
        shutdown_timeout: own.shutdown_timeout.0,
        api_keys: own.api_keys.into_iter().filter(|key| !key.is_empty()).map(Into::into).collect(),
        address_file: own.address_file,
        in_force: resolved.in_force,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(service::run(settings));
    // A target that never answers must not hold the exit.
    runtime.shutdown_background();
    result.map_err(|error| Stop::new(exit_code(&error), error.to_string()))
}

fn dry_run(resolved: &Resolved<RunArgs>) -> Result<(), Stop> {
    let args = &resolved.args;
    let found = pipeline::dry_run_with(&args.own.paths, resolved.shared.as_ref(), &resolved.environment);
    let probes = if args.probe { probe(&found.plans)? } else { Vec::new() };
    match args.output {
        Output::Json => {
            let mut all = found.json();
            if args.probe {
                let probes = serde_json::to_value(&probes).map_err(std::io::Error::from)?;
                all.as_object_mut().into_iter().for_each(|all| _ = all.insert("probes".to_owned(), probes.clone()));
            }
            output::json(&all)?;
        }
        Output::Text => {
            output::data(found.plans_text().trim_end())?;
            for probe in &probes {
                output::data(&format!("\n{}", probe.text().trim_end()))?;
            }
            let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            output::notice(found.problems_text(colour).trim_end());
        }
    }
    match found.exit_code() {
        0 if probes.iter().all(Probe::is_fine) => Ok(()),
        0 => Err(Stop::new(Stop::UNAVAILABLE, "")),
        code => Err(Stop::new(code, "")),
    }
}

fn probe(plans: &[Plan]) -> std::io::Result<Vec<Probe>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let probes = runtime.block_on(service::probe::probe(plans));
    // A server that never answers must not hold the exit.
    runtime.shutdown_background();
    Ok(probes)
}

const fn exit_code(error: &ServiceError) -> u8 {
    match error {
        ServiceError::Config { .. } | ServiceError::Nothing { .. } => Stop::CONFIG,
        ServiceError::Held { .. } => Stop::HELD,
        ServiceError::OpenToAll { .. } => Stop::USAGE,
        _ => Stop::FAILED,
    }
}

/// Every connection, segment and sink is an open file; the soft limit is often 1,024.
#[cfg(target_os = "linux")]
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // A process that may not raise its limit runs with the one that it has.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

#[cfg(not(target_os = "linux"))]
const fn raise_file_limit() {}
