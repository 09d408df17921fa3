//! `walflow run`: run the pipelines, or only check and print them.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::{Output, Stop, logging, output};
use crate::pipeline;
use crate::pipeline::plan::Plan;
use crate::service::probe::Probe;
use crate::service::{self, ServiceError, Settings};
use crate::spec::environment::Environment;
use crate::spec::shared::{self, Shared};
use crate::units::Span;

/// Settings of one instance.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Pipeline files, and folders of them
    #[arg(env = "WALFLOW_PATHS", default_value = "pipelines/", value_delimiter = ',')]
    paths: Vec<PathBuf>,
    /// The file with shared connections and defaults. Default: ./walflow.yaml, else /etc/walflow/walflow.yaml, where there is one
    #[arg(long, env = "WALFLOW_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Run only the namespaces of these shards, comma-separated or repeated. Default: all
    #[arg(long, env = "WALFLOW_SHARD", value_delimiter = ',', value_name = "NAME")]
    shard: Vec<String>,
    /// Where to listen; without API keys only on loopback
    #[arg(long, env = "WALFLOW_LISTEN", default_value = "127.0.0.1:3000", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Another port than that of --listen
    #[arg(long, env = "PORT")]
    port: Option<u16>,
    /// The folder that holds the log
    #[arg(long, env = "WALFLOW_DATA", default_value = "./data", value_name = "FOLDER")]
    data: PathBuf,
    /// Check the files and print what they mean; opens nothing
    #[arg(long, env = "WALFLOW_DRY_RUN")]
    dry_run: bool,
    /// With --dry-run: also reach every source, shelf and target, and say what is wrong there; changes nothing
    #[arg(long, env = "WALFLOW_PROBE", requires = "dry_run")]
    probe: bool,
    /// How the dry run prints
    #[arg(long, env = "WALFLOW_OUTPUT", value_enum, default_value_t)]
    output: Output,
    /// Do not start when any file has a problem
    #[arg(long, env = "WALFLOW_STRICT")]
    strict: bool,
    /// How long a stop lets what is under way end
    #[arg(long, env = "WALFLOW_SHUTDOWN_TIMEOUT", default_value = "25s", value_name = "DURATION")]
    shutdown_timeout: Span,
    /// API keys, comma-separated; every caller needs one of them. Better given in the environment
    #[arg(long, env = "VALID_API_KEYS", hide_env_values = true, value_delimiter = ',', value_name = "KEYS")]
    api_keys: Vec<String>,
    /// Write the address that is listened on to this file
    #[arg(long, env = "WALFLOW_ADDRESS_FILE", value_name = "FILE")]
    address_file: Option<PathBuf>,
    #[command(flatten)]
    log: logging::LogArgs,
}

pub(super) fn run(args: RunArgs) -> Result<(), Stop> {
    if args.dry_run {
        return dry_run(&args);
    }
    logging::start(&args.log)?;
    raise_file_limit();
    let mut listen = args.listen;
    if let Some(port) = args.port {
        listen.set_port(port);
    }
    let settings = Settings {
        paths: args.paths,
        config: args.config,
        shards: args.shard.into_iter().filter(|shard| !shard.is_empty()).collect(),
        listen,
        data: args.data,
        strict: args.strict,
        shutdown_timeout: args.shutdown_timeout.0,
        api_keys: args.api_keys.into_iter().filter(|key| !key.is_empty()).map(Into::into).collect(),
        address_file: args.address_file,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(service::run(settings));
    // A target that never answers must not hold the exit.
    runtime.shutdown_background();
    result.map_err(|error| Stop::new(exit_code(&error), error.to_string()))
}

fn dry_run(args: &RunArgs) -> Result<(), Stop> {
    let variables =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let environment = Environment::new(variables);
    let shared = shared::find(args.config.as_deref()).map(|path| Shared::read(&path, &environment));
    let found = pipeline::dry_run_with(&args.paths, shared.as_ref(), &environment);
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
