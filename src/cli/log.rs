//! `walflow log verify|dump|repair`: looks at a data folder on which nothing runs.
//!
//! Takes the folder, gives what it holds, what is damaged, or what a repair gave up. Exits 1 when there is damage.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use super::{Output, Stop, output};
use crate::source::embedded::OpenError;
use crate::source::embedded::inspect::{self, Damage};

/// What to do with a data folder.
#[derive(Debug, Subcommand)]
pub(super) enum LogVerb {
    /// Read everything and check every checksum
    Verify(LogArgs),
    /// Print every frame, one JSON object a line
    Dump(LogArgs),
    /// Give up what is damaged, so that the folder opens again; says what is lost
    Repair(LogArgs),
}

/// Which folder.
#[derive(Debug, Args)]
pub(super) struct LogArgs {
    /// The data folder
    #[arg(long, env = "WALFLOW_DATA", default_value = "data")]
    data: PathBuf,
    /// How to print
    #[arg(long, env = "WALFLOW_OUTPUT", value_enum, default_value_t)]
    output: Output,
}

impl LogVerb {
    /// Carries the verb out.
    pub(super) fn run(self) -> Result<(), Stop> {
        match self {
            Self::Verify(args) => verify(&args),
            Self::Dump(args) => dump(&args),
            Self::Repair(args) => repair(&args),
        }
    }
}

fn verify(args: &LogArgs) -> Result<(), Stop> {
    let verified = inspect::verify(&args.data)?;
    match args.output {
        Output::Json => output::json(&json!(verified))?,
        Output::Text => {
            output::data(&format!(
                "{} records in {} segments, {} journal frames to settle, last sequence {}",
                verified.records, verified.segments, verified.journal_frames, verified.last_sequence
            ))?;
            if verified.torn_bytes > 0 {
                let bytes = verified.torn_bytes;
                output::data(&format!("the last write was not whole: the next start cuts {bytes} bytes"))?;
            }
            verified.damage.iter().try_for_each(show)?;
        }
    }
    match verified.damage.len() {
        0 => Ok(()),
        1 => Err(Stop::new(Stop::FAILED, "one place is damaged")),
        many => Err(Stop::new(Stop::FAILED, format!("{many} places are damaged"))),
    }
}

fn dump(args: &LogArgs) -> Result<(), Stop> {
    let mut written = Ok(());
    inspect::dump(&args.data, &mut |frame| {
        if written.is_ok() {
            written = output::data(&json!(frame).to_string());
        }
    })?;
    Ok(written?)
}

fn repair(args: &LogArgs) -> Result<(), Stop> {
    let repairing = inspect::repair(&args.data);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let lost = runtime.block_on(repairing)?;
    match args.output {
        Output::Json => output::json(&json!({ "lost": lost }))?,
        Output::Text => {
            lost.iter().try_for_each(show)?;
            let kept = args.data.join("cut");
            output::notice(&match lost.len() {
                0 => "nothing was damaged".to_owned(),
                _ => format!("what was damaged is kept in {}", kept.display()),
            });
        }
    }
    Ok(())
}

fn show(damage: &Damage) -> std::io::Result<()> {
    let place = if damage.offset > 0 { format!(" at byte {}", damage.offset) } else { String::new() };
    output::data(&format!("{}{place}: {}", damage.path.display(), damage.what))
}

impl From<OpenError> for Stop {
    fn from(error: OpenError) -> Self {
        let code = if matches!(error, OpenError::Held { .. }) { Self::HELD } else { Self::FAILED };
        Self::new(code, error.to_string())
    }
}
