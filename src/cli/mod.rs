//! The command line: one file a verb, each a parsed set of arguments and a function that carries it out.
//!
//! Takes arguments and their environment twins, gives an exit code. Data goes to standard output, everything else to
//! standard error. Never holds logic that another part of walflow needs.

mod branch;
mod client;
mod config;
mod dead_letters;
mod explain;
mod log;
mod logging;
mod namespace;
mod output;
mod run;
mod schema;
mod settings;
mod status;
mod write;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

/// One HTTP call makes a write durable; a YAML file per namespace says what happens then.
#[derive(Debug, Parser)]
#[command(name = "walflow", version, about, max_term_width = 110)]
pub struct Cli {
    /// What to do. Default: run.
    #[command(subcommand)]
    verb: Option<Verb>,
}

/// What walflow can be asked to do.
#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the pipelines of the given files and folders, or only check and print them with --dry-run
    Run(run::RunArgs),
    /// Write one record to a running walflow
    Write(write::WriteArgs),
    /// Show what a running walflow is doing: every namespace and branch
    Status(status::StatusArgs),
    /// List, look into, replay or purge what could not be delivered
    #[command(subcommand)]
    DeadLetters(dead_letters::DeadLettersVerb),
    /// List, pause, resume or unblock branches
    #[command(subcommand)]
    Branch(branch::BranchVerb),
    /// Delete a namespace with all that it holds
    #[command(subcommand)]
    Namespace(namespace::NamespaceVerb),
    /// Show what is in force, and where each value came from
    #[command(subcommand)]
    Config(config::ConfigVerb),
    /// Look at a data folder on which nothing runs: verify, dump, repair
    #[command(subcommand)]
    Log(log::LogVerb),
    /// Print the JSON Schema of pipeline files, or the OpenAPI description of the HTTP interface
    Schema(schema::SchemaArgs),
    /// Explain an error code
    Explain(explain::ExplainArgs),
    /// Succeed when a running walflow is ready; for container health checks
    Healthcheck(status::HealthcheckArgs),
    /// Print the version
    Version,
}

/// How data is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    #[default]
    Text,
    /// For programs
    Json,
}

/// Why a verb did not succeed, with its exit code.
#[derive(Debug)]
struct Stop {
    code: u8,
    /// Said on standard error; empty when everything has been said already.
    message: String,
}

impl Stop {
    /// A runtime error.
    const FAILED: u8 = 1;
    /// Wrong usage.
    const USAGE: u8 = 2;
    /// A service that is needed does not answer.
    const UNAVAILABLE: u8 = 69;
    /// Another process holds the data folder.
    const HELD: u8 = 75;
    /// The configuration has problems.
    const CONFIG: u8 = 78;

    fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Self::new(Self::FAILED, format!("{error:#}"))
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        // Whoever read the output has seen enough: `walflow … | head`.
        let message = if error.kind() == std::io::ErrorKind::BrokenPipe { String::new() } else { error.to_string() };
        Self::new(Self::FAILED, message)
    }
}

/// Parses the command line, carries it out and says how it went.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let verb = cli.verb.unwrap_or_else(|| Cli::parse_from(["walflow", "run"]).verb.unwrap_or(Verb::Version));
    match carry_out(verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(stop) => {
            if !stop.message.is_empty() {
                output::notice(&format!("error: {}", stop.message));
            }
            ExitCode::from(stop.code)
        }
    }
}

fn carry_out(verb: Verb) -> Result<(), Stop> {
    // Two TLS stacks in one process panic at the first use; this picks the one that is linked.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    match verb {
        Verb::Run(args) => run::run(&args),
        Verb::Write(args) => client::block_on(write::write(args)),
        Verb::Status(args) => client::block_on(status::status(args)),
        Verb::DeadLetters(verb) => client::block_on(dead_letters::dead_letters(verb)),
        Verb::Branch(verb) => client::block_on(branch::branch(verb)),
        Verb::Namespace(verb) => client::block_on(namespace::namespace(verb)),
        Verb::Config(verb) => config::config(&verb),
        Verb::Log(verb) => verb.run(),
        Verb::Schema(args) => schema::schema(&args),
        Verb::Explain(args) => explain::explain(&args),
        Verb::Healthcheck(args) => client::block_on(status::healthcheck(args)),
        Verb::Version => Ok(output::data(concat!("walflow ", env!("CARGO_PKG_VERSION")))?),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_of_run_is_a_key_of_walflow_yaml() {
        let command = Cli::command();
        let run = command.find_subcommand("run").unwrap();
        let flags: Vec<&str> = run
            .get_arguments()
            .map(|argument| argument.get_id().as_str())
            // The file itself, and what only one call does.
            .filter(|id| !["config", "dry_run", "probe", "output"].contains(id))
            .collect();
        assert_eq!(flags, crate::spec::settings::keys().collect::<Vec<_>>());
        let schema: serde_json::Value = serde_json::from_str(&crate::spec::shared_schema()).unwrap();
        for argument in run.get_arguments().filter(|argument| flags.contains(&argument.get_id().as_str())) {
            let key = argument.get_id().as_str();
            let property = &schema["properties"][key];
            assert!(argument.get_long().is_none_or(|long| long.replace('-', "_") == key), "{key}");
            let default = argument.get_default_values().first().map(|default| default.to_str().unwrap());
            assert_eq!(property["default"].as_str().map(ToOwned::to_owned), default.map(ToOwned::to_owned), "{key}");
        }
    }

    #[test]
    fn every_flag_has_an_environment_twin() {
        fn check(command: &clap::Command) {
            for argument in command.get_arguments() {
                let global = ["help", "version"].contains(&argument.get_id().as_str());
                // Flags that choose what one call does belong to that call alone.
                let own = argument.get_help_heading() == Some("This call");
                if argument.get_long().is_some() && !global && !own {
                    assert!(argument.get_env().is_some(), "{} --{}", command.get_name(), argument.get_id());
                }
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }
}
