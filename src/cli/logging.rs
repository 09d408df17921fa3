//! Structured logs on standard error: lines for people on a terminal, JSON everywhere else.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use super::Stop;
use crate::spec::settings::LogFormat;

/// Sends every log line to standard error from now on.
pub(super) fn start(format: LogFormat, level: &str) -> Result<(), Stop> {
    let filter =
        EnvFilter::try_new(level).map_err(|error| Stop::new(Stop::USAGE, format!("--log-level `{level}`: {error}")))?;
    let terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let json = format == LogFormat::Json || (format == LogFormat::Auto && !terminal);
    // A second subscriber in one process is a test's; the first one stays.
    let _ = if json {
        builder.json().flatten_event(true).with_current_span(false).try_init()
    } else {
        builder.with_ansi(terminal).with_target(false).try_init()
    };
    Ok(())
}
