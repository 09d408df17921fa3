//! The dry run: read, check and compile everything, and say what would run.
//!
//! Takes paths and the environment, gives plans and problems with the exit code that they mean. Touches the files that
//! are named and nothing else.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::make::make;
use super::plan::Plan;
use super::print;
use super::report::{Report, report};
use crate::clock::Clock;
use crate::spec::diagnostic::Diagnostic;
use crate::spec::environment::Environment;
use crate::spec::load_with;
use crate::spec::shared::Shared;
use crate::transform::Compiler;

/// What a dry run found.
#[derive(Debug, Default)]
pub struct DryRun {
    /// Every plan that can be made.
    pub plans: Vec<Plan>,
    /// The same in words, in the same order.
    pub reports: Vec<Report>,
    /// Everything that is wrong or worth a warning.
    pub diagnostics: Vec<Diagnostic>,
    files: usize,
}

/// Reads, expands, checks and plans every file.
pub fn dry_run(paths: &[PathBuf], environment: &Environment) -> DryRun {
    dry_run_with(paths, None, environment)
}

/// The same, with walflow.yaml.
pub fn dry_run_with(paths: &[PathBuf], shared: Option<&Shared>, environment: &Environment) -> DryRun {
    let compiler = Compiler::new(Clock::system(), environment.variables());
    let load = load_with(paths, shared, environment);
    let mut out = DryRun { diagnostics: load.diagnostics, files: load.files.len(), ..DryRun::default() };
    for loaded in &load.files {
        let mut made = make(loaded, environment, &compiler);
        out.diagnostics.append(&mut made.diagnostics);
        if let Some(plan) = made.plan {
            out.reports.push(report(loaded, &plan));
            out.plans.push(plan);
        }
    }
    // What is wrong in walflow.yaml is met again by every pipeline that takes it.
    let mut seen = std::collections::HashSet::new();
    let common = |found: &Diagnostic| shared.is_some_and(|shared| *shared.text.name() == found.file);
    out.diagnostics.retain(|found| !common(found) || seen.insert((found.code, found.line, found.column)));
    out
}

impl DryRun {
    /// 0, or 78 when any file has an error.
    pub fn exit_code(&self) -> u8 {
        if self.errors() > 0 { 78 } else { 0 }
    }

    fn errors(&self) -> usize {
        self.diagnostics.iter().filter(|found| found.is_error()).count()
    }

    /// The plans as text, for standard output.
    pub fn plans_text(&self) -> String {
        self.reports.iter().map(print::plan).collect::<Vec<_>>().join("\n")
    }

    /// The problems as text and a last line that counts them, for standard error.
    pub fn problems_text(&self, colour: bool) -> String {
        let mut out: String = self.diagnostics.iter().map(|found| found.render(colour) + "\n").collect();
        out.push_str(&self.summary());
        out.push('\n');
        out
    }

    /// One line for each problem, for editors.
    pub fn problems_short(&self) -> String {
        self.diagnostics.iter().map(|found| found.short() + "\n").collect()
    }

    /// The whole in one line.
    pub fn summary(&self) -> String {
        let warnings = self.diagnostics.len() - self.errors();
        let files = print::count(self.files, "file", "files");
        let plans = print::count(self.plans.len(), "plan", "plans");
        let errors = print::count(self.errors(), "error", "errors");
        let warnings = print::count(warnings, "warning", "warnings");
        let branches = self.plans.iter().map(|plan| plan.branches.len()).sum();
        let branches = print::count(branches, "branch", "branches");
        format!("{files}: {plans} with {branches}, {errors}, {warnings}")
    }

    /// The same for machines.
    pub fn json(&self) -> Value {
        json!({
            "ok": self.errors() == 0,
            "summary": self.summary(),
            "plans": self.reports,
            "diagnostics": self.diagnostics,
        })
    }
}
