//! A verb's arguments with walflow.yaml under them: flag, then environment, then file, then default.
//!
//! Takes the process's own arguments, which clap has accepted once, and reads them again when it is known what the file
//! says. Never says what is wrong with the file: that is the caller's.

use std::ffi::OsString;
use std::path::Path;

use clap::{Command, CommandFactory as _, FromArgMatches};

use super::{Cli, Stop};
use crate::spec::environment::Environment;
use crate::spec::settings::{InFile, InForce};
use crate::spec::shared::{self, Shared};

/// What holds for a verb.
pub(super) struct Resolved<T> {
    pub(super) args: T,
    pub(super) in_force: InForce,
    pub(super) shared: Option<Shared>,
    pub(super) environment: Environment,
}

/// Reads walflow.yaml and the arguments of a verb with it.
pub(super) fn resolve<T: FromArgMatches>(config: Option<&Path>, verb: &[&str]) -> Result<Resolved<T>, Stop> {
    let variables =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let environment = Environment::new(variables);
    let shared = shared::find(config).map(|path| Shared::read(&path, &environment));
    let file = shared.as_ref().map(|shared| shared.settings.clone()).unwrap_or_default();
    let mut words: Vec<OsString> = std::env::args_os().collect();
    if words.len() < 2 {
        words = std::iter::once("walflow").chain(verb.iter().copied()).map(OsString::from).collect();
    }
    let mut matches = under(Cli::command(), verb, &file).get_matches_from(words);
    for _ in verb {
        if let Some((_, inner)) = matches.remove_subcommand() {
            matches = inner;
        }
    }
    let args = T::from_arg_matches(&matches).map_err(|error| Stop::new(Stop::USAGE, error.to_string()))?;
    Ok(Resolved { args, in_force: InForce::new(&matches, &file), shared, environment })
}

fn under(command: Command, verb: &[&str], file: &InFile) -> Command {
    match verb {
        [] => file.under(command),
        [first, rest @ ..] => command.mut_subcommand(first, |inner| under(inner, rest, file)),
    }
}
