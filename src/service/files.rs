//! The pipeline files as they are now: read, made into plans, and told to whoever reads the log.
//!
//! Takes paths, gives for each namespace a plan or the first thing that is wrong. Remembers which file held which
//! namespace, so that a file that cannot be read at all still counts as that namespace's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use tracing::{error, warn};

use super::Settings;
use crate::clock::Clock;
use crate::pipeline::plan::Plan;
use crate::pipeline::{from_epoch, make};
use crate::record::Namespace;
use crate::spec::code::Code;
use crate::spec::diagnostic::Diagnostic;
use crate::spec::environment::Environment;
use crate::spec::settings::{InFile, InForce};
use crate::spec::shared::{self, Shared};
use crate::spec::text::Text;
use crate::spec::{Loaded, Neighbours, load_text_with, load_with};
use crate::transform::Compiler;

/// Where the files are and what they may refer to.
pub(super) struct Files {
    paths: Vec<PathBuf>,
    /// walflow.yaml, where it was named.
    config: Option<PathBuf>,
    /// The shards that run here; none = all.
    shards: Vec<String>,
    /// The service's own settings as they were at the start.
    in_force: InForce,
    environment: Environment,
    compiler: Compiler,
    names: Mutex<BTreeMap<Arc<str>, Namespace>>,
}

/// What one reading found.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// By namespace; none twice.
    pub found: Vec<Found>,
    /// Namespaces that do not run here, with the shard that has each.
    pub elsewhere: BTreeMap<Namespace, Arc<str>>,
    /// Everything that was said about the files, warnings too.
    pub problems: Vec<Diagnostic>,
    /// The problem of a file of which nobody can say whose it is.
    pub nameless: Option<Arc<Diagnostic>>,
    /// Settings of its own to which walflow.yaml now gives other values than those in force.
    pub other_settings: Vec<String>,
    /// True when no path led to a file.
    pub no_files: bool,
}

/// One namespace's file.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// The namespace.
    pub namespace: Namespace,
    /// Its plan, or the first error.
    pub plan: Result<Arc<Plan>, Arc<Diagnostic>>,
    /// Where its source stands, for whoever has to refuse it.
    pub source: Option<Diagnostic>,
}

impl Files {
    /// Files under these paths; references are resolved in the process's own environment.
    pub(super) fn new(settings: &Settings) -> Self {
        let variables: BTreeMap<String, String> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let compiler = Compiler::new(Clock::system(), variables.clone());
        Self {
            paths: settings.paths.clone(),
            config: settings.config.clone(),
            shards: settings.shards.clone(),
            in_force: settings.in_force.clone(),
            environment: Environment::new(variables),
            compiler,
            names: Mutex::default(),
        }
    }

    /// Reads everything again.
    pub(super) fn read(&self) -> Reading {
        let shared = self.shared();
        let load = load_with(&self.paths, shared.as_ref(), &self.environment);
        // What a pipeline takes from a broken walflow.yaml is not known: each stays as it was.
        let broken = shared.as_ref().and_then(Shared::error).cloned().map(Arc::new);
        let no_files = load.files.is_empty();
        let other_settings = match &shared {
            Some(shared) if !shared.unusable().is_empty() => Vec::new(),
            Some(shared) => self.in_force.changed(&shared.settings),
            None => self.in_force.changed(&InFile::default()),
        };
        let mut reading = Reading { problems: load.diagnostics, other_settings, no_files, ..Reading::default() };
        let mut by_name: BTreeMap<Namespace, Result<Arc<Plan>, Arc<Diagnostic>>> = BTreeMap::new();
        let mut sources: BTreeMap<Namespace, Diagnostic> = BTreeMap::new();
        for loaded in &load.files {
            let made = make(loaded, &self.environment, &self.compiler);
            let plan = match (made.plan, made.diagnostics.iter().find(|problem| problem.is_error())) {
                (Some(plan), None) => Ok(Arc::new(plan)),
                (_, Some(problem)) => Err(Arc::new(problem.clone())),
                (None, None) => {
                    Err(Arc::new(Diagnostic::of_file(Code::Refused, loaded.text.name(), "it gives no plan")))
                }
            };
            let plan = broken.clone().map_or(plan, Err);
            reading.problems.extend(made.diagnostics);
            match (self.name_of(loaded), plan) {
                (Some(name), _) if let Some(shard) = self.other_shard(loaded) => {
                    reading.elsewhere.insert(name, shard);
                }
                // Of two files for one namespace neither counts, so a fault is kept.
                (Some(name), plan) => {
                    sources.insert(name.clone(), loaded.diagnostic(Code::NeedsRestart, "/source", true, ""));
                    let earlier = by_name.remove(&name);
                    let plan = earlier.filter(Result::is_err).unwrap_or(plan);
                    by_name.insert(name, plan);
                }
                (None, Err(problem)) => reading.nameless = Some(problem),
                (None, Ok(_)) => {}
            }
        }
        if reading.nameless.is_none() {
            // A path that leads nowhere may have held any of the namespaces that are missing now; a folder that was read
            // and holds no file says that they are gone.
            reading.nameless = reading
                .problems
                .iter()
                .find(|problem| problem.namespace.is_none() && problem.is_error() && problem.code != Code::NoFiles)
                .map(|problem| Arc::new(problem.clone()));
        }
        let found = by_name.into_iter();
        reading.found =
            found.map(|(namespace, plan)| Found { source: sources.remove(&namespace), namespace, plan }).collect();
        reading
    }

    /// The shard of a file that does not run here; a file that does not say it in a way that can be read is everybody's.
    fn other_shard(&self, loaded: &Loaded) -> Option<Arc<str>> {
        let said = loaded.value.as_object()?.get("shard").and_then(serde_json::Value::as_str).unwrap_or("default");
        let here = self.shards.is_empty() || self.shards.iter().any(|shard| shard == said);
        (!here).then(|| said.into())
    }

    fn shared(&self) -> Option<Shared> {
        shared::find(self.config.as_deref()).map(|path| Shared::read(&path, &self.environment))
    }

    /// The file that held a namespace when the files were last read.
    pub(super) fn path_of(&self, namespace: &Namespace) -> Option<PathBuf> {
        self.names.lock().iter().find(|(_, name)| *name == namespace).map(|(file, _)| PathBuf::from(&**file))
    }

    /// The plan that another text in the place of a file would make, or everything that is wrong with it.
    pub(super) fn plan_instead(&self, path: &Path, text: &str) -> Result<Arc<Plan>, String> {
        let named = Text::new(&path.display().to_string(), text);
        let loaded = load_text_with(named, Neighbours::beside(path), self.shared().as_ref(), &self.environment);
        let made = make(&loaded, &self.environment, &self.compiler);
        let problems: Vec<String> =
            made.diagnostics.iter().filter(|problem| problem.is_error()).map(|problem| problem.render(false)).collect();
        match made.plan {
            Some(plan) if problems.is_empty() => Ok(Arc::new(plan)),
            _ => Err(format!("the new file has problems\n{}", problems.join("\n"))),
        }
    }

    /// Makes the plan of an earlier revision again.
    pub(super) fn restore(&self, files: &[u8]) -> Result<Arc<Plan>, String> {
        let made = from_epoch(files, &self.environment, &self.compiler).map_err(|error| error.to_string())?;
        let problem = made.diagnostics.iter().find(|problem| problem.is_error()).map(Diagnostic::short);
        match (made.plan, problem) {
            (Some(plan), None) => Ok(Arc::new(plan)),
            (_, problem) => Err(problem.unwrap_or_else(|| "it gives no plan".to_owned())),
        }
    }

    /// Whose file it is: by what it says, by a line that says it in a file that is no YAML, or by what it said before.
    fn name_of(&self, loaded: &Loaded) -> Option<Namespace> {
        let line = || {
            let lines = loaded.text.as_str().lines();
            let value = lines.filter_map(|line| line.strip_prefix("namespace:")).next()?;
            value.split('#').next()?.trim().trim_matches(['"', '\'']).parse().ok()
        };
        let mut names = self.names.lock();
        let name = loaded.namespace.clone().or_else(line);
        match name {
            Some(name) => {
                names.insert(Arc::clone(loaded.text.name()), name.clone());
                Some(name)
            }
            None => names.get(loaded.text.name()).cloned(),
        }
    }
}

impl Reading {
    /// True when any file has an error.
    pub(super) fn has_errors(&self) -> bool {
        self.problems.iter().any(Diagnostic::is_error)
    }

    /// Tells every problem to the log.
    pub(super) fn report(&self) {
        if !self.other_settings.is_empty() {
            let keys = self.other_settings.join(", ");
            warn!(keys, "walflow.yaml has other settings of the service now: they hold after a restart");
        }
        for problem in &self.problems {
            let (code, file, line) = (problem.code.as_str(), &*problem.file, problem.line);
            let help = problem.help.as_deref();
            if problem.is_error() {
                error!(code, file, line, help, "{}", problem.message);
            } else {
                warn!(code, file, line, help, "{}", problem.message);
            }
        }
    }
}
