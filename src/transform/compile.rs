//! From text to a [`Program`]: takes the text with its place in the file and what it may see; gives programs, or errors
//! whose line and column count within the text. Reads no file and runs nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rhai::{Engine, Scope};

use super::guard::{DEADLINE, Surroundings};
use super::program::Program;
use super::{Expression, Predicate, Transform, engine, scan};
use crate::clock::Clock;
use crate::record::Namespace;

/// What a stage does with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageKind {
    /// Lets an event pass, or not. Only reads.
    Filter,
    /// Changes the event in place.
    Script,
}

/// Where a text stands, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file, as its author names it.
    pub file: Arc<str>,
    /// The line of the text's first line, counted from 1.
    pub line: usize,
    /// The column of the text's first character, counted from 1.
    pub column: usize,
}

/// One stage as it was written.
#[derive(Clone, Debug)]
pub struct StageSource {
    /// Its name, for example `transform[1]`.
    pub name: Box<str>,
    /// What it does.
    pub kind: StageKind,
    /// The filter's expression or the script.
    pub text: Arc<str>,
    /// Where the text stands: in the pipeline file, or line 1 of the script file.
    pub place: Place,
    /// The environment variables that `env("NAME")` may read.
    pub env: Vec<String>,
}

/// A text is no script.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{stage}: {message}")]
pub struct CompileError {
    /// The stage, as its source names it.
    pub stage: Box<str>,
    /// What is wrong.
    pub message: Box<str>,
    /// The line within the text, counted from 1.
    pub line: usize,
    /// The column within that line, counted from 1.
    pub column: usize,
}

/// Compiles scripts and expressions. One per process; cheap to clone.
#[derive(Clone)]
pub struct Compiler {
    engine: Arc<Engine>,
    clock: Clock,
    environment: Arc<BTreeMap<String, String>>,
    namespace: Arc<str>,
    record_limit: usize,
    deadline: Duration,
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiler").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl Compiler {
    /// Makes the engine. `environment` is all that `env("NAME")` can ever see; each stage sees what its own list allows.
    pub fn new(clock: Clock, environment: BTreeMap<String, String>) -> Self {
        Self {
            engine: Arc::new(engine::build()),
            clock,
            environment: Arc::new(environment),
            namespace: "".into(),
            record_limit: 1 << 20,
            deadline: DEADLINE,
        }
    }

    /// The same compiler for one namespace: its name for `record.namespace`, its limit for what scripts make.
    #[must_use]
    pub fn within(&self, namespace: &Namespace, record_limit: usize) -> Self {
        Self { namespace: namespace.as_str().into(), record_limit, ..self.clone() }
    }

    /// The same compiler whose scripts may run for `deadline`, so that no test depends on how fast the machine is.
    #[cfg(test)]
    pub(crate) fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Compiles a chain of stages, in order.
    ///
    /// # Errors
    /// Every stage that does not compile, with its place.
    pub fn stages(&self, sources: &[StageSource]) -> Result<Transform, Vec<CompileError>> {
        let mut errors = Vec::new();
        let mut stages = Vec::with_capacity(sources.len());
        for source in sources {
            match self.program(&source.name, source.kind, &source.text, &source.place, &source.env) {
                Ok(program) => stages.push(program),
                Err(error) => errors.push(error),
            }
        }
        if errors.is_empty() { Ok(Transform::new(stages.into())) } else { Err(errors) }
    }

    /// Compiles a condition, for example a `when`.
    ///
    /// # Errors
    /// When the text is no expression.
    pub fn predicate(&self, name: &str, text: &str, place: &Place) -> Result<Predicate, CompileError> {
        Ok(Predicate(Arc::new(self.program(name, StageKind::Filter, text, place, &[])?)))
    }

    /// Compiles an expression that gives seconds or a time, for example `delay.for`.
    ///
    /// # Errors
    /// When the text is no expression.
    pub fn expression(&self, name: &str, text: &str, place: &Place) -> Result<Expression, CompileError> {
        Ok(Expression(Arc::new(self.program(name, StageKind::Filter, text, place, &[])?)))
    }

    fn program(
        &self,
        name: &str,
        kind: StageKind,
        text: &str,
        place: &Place,
        env: &[String],
    ) -> Result<Program, CompileError> {
        let refuse = |message: String, position: rhai::Position| CompileError {
            stage: name.into(),
            message: message.into(),
            line: position.line().unwrap_or(1),
            column: position.position().unwrap_or(1),
        };
        if text.len() > engine::MAX_TEXT {
            let (got, most) = (text.len() >> 10, engine::MAX_TEXT >> 10);
            return Err(refuse(format!("the script has {got} KiB; at most {most} are taken"), rhai::Position::NONE));
        }
        let ast = self
            .engine
            .compile_with_scope(&names(), text)
            .map_err(|error| refuse(error.err_type().to_string(), error.position()))?;
        if kind == StageKind::Filter && text.trim().is_empty() {
            return Err(refuse("the expression is empty".to_owned(), rhai::Position::NONE));
        }
        let allowed =
            |name: &String| (name.as_str().into(), self.environment.get(name).map(|value| value.as_str().into()));
        Ok(Program {
            name: name.into(),
            kind,
            text: text.into(),
            place: place.clone(),
            ast,
            engine: Arc::clone(&self.engine),
            uses: scan::uses(text),
            around: Arc::new(Surroundings {
                clock: self.clock.clone(),
                namespace: Arc::clone(&self.namespace),
                env: env.iter().map(allowed).collect(),
                record_limit: self.record_limit,
                deadline: self.deadline,
            }),
        })
    }
}

/// What a script may name without declaring it.
fn names() -> Scope<'static> {
    let mut names = Scope::new();
    for name in ["payload", "key", "headers", "record"] {
        names.push(name, ());
    }
    names
}
