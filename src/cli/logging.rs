//! Structured logs on standard error: lines for people on a terminal, JSON everywhere else.

use std::io::IsTerminal;

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

use super::Stop;

/// How walflow says what it does.
#[derive(Debug, Args)]
pub(super) struct LogArgs {
    /// How log lines look; auto = text on a terminal, else json
    #[arg(long, env = "WALFLOW_LOG_FORMAT", value_enum, default_value_t)]
    log_format: Format,
    /// What is logged: error, warn, info, debug, trace, or by module: info,walflow::sink=debug
    #[arg(long, env = "WALFLOW_LOG_LEVEL", default_value = "info", value_name = "LEVEL")]
    log_level: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Text on a terminal, else JSON
    #[default]
    Auto,
    /// Lines for people
    Text,
    /// One JSON object a line
    Json,
}

/// Sends every log line to standard error from now on.
pub(super) fn start(args: &LogArgs) -> Result<(), Stop> {
    let filter = EnvFilter::try_new(&args.log_level)
        .map_err(|error| Stop::new(Stop::USAGE, format!("--log-level `{}`: {error}", args.log_level)))?;
    let terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let json = args.log_format == Format::Json || (args.log_format == Format::Auto && !terminal);
    // A second subscriber in one process is a test's; the first one stays.
    let _ = if json {
        builder.json().flatten_event(true).with_current_span(false).try_init()
    } else {
        builder.with_ansi(terminal).with_target(false).try_init()
    };
    Ok(())
}
