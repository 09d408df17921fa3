//! From text to a [`Program`]: the engine that all scripts share, and what a script's error looks like.
//!
//! Takes the text with its place in the file; gives programs, or errors whose line and column count within the text.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use rhai::{AST, Dynamic, Engine, Scope};

use super::{DelayValue, Event, Expression, Fault, Outcome, Predicate, Transform};
use crate::clock::{Clock, Timestamp};
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
            engine: Arc::new(Engine::new_raw()),
            clock,
            environment: Arc::new(environment),
            namespace: "".into(),
            record_limit: 1 << 20,
        }
    }

    /// The same compiler for one namespace: its name for `record.namespace`, its limit for what scripts make.
    #[must_use]
    pub fn within(&self, namespace: &Namespace, record_limit: usize) -> Self {
        Self { namespace: namespace.as_str().into(), record_limit, ..self.clone() }
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
        if errors.is_empty() { Ok(Transform { stages: stages.into() }) } else { Err(errors) }
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
        _env: &[String],
    ) -> Result<Program, CompileError> {
        let ast = self.engine.compile(text).map_err(|error| CompileError {
            stage: name.into(),
            message: error.0.to_string().into(),
            line: error.1.line().unwrap_or(1),
            column: error.1.position().unwrap_or(1),
        })?;
        Ok(Program {
            name: name.into(),
            kind,
            text: text.into(),
            place: place.clone(),
            ast,
            engine: Arc::clone(&self.engine),
            clock: self.clock.clone(),
        })
    }
}

/// One compiled text with all that it needs to run.
pub(super) struct Program {
    name: Box<str>,
    kind: StageKind,
    text: Arc<str>,
    place: Place,
    ast: AST,
    engine: Arc<Engine>,
    clock: Clock,
}

impl Program {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    fn fault(&self, message: impl fmt::Display) -> Fault {
        Fault { stage: self.name.clone(), message: format!("{}: {message}", self.place.file).into() }
    }

    fn eval(&self, event: &Event) -> Result<(Dynamic, Dynamic), Fault> {
        let _ = self.clock.now();
        let value = event.json().map_err(|error| self.fault(error))?;
        let payload = rhai::serde::to_dynamic(value).map_err(|error| self.fault(error))?;
        let mut scope = Scope::new();
        scope.push_dynamic("payload", payload);
        scope.push("key", event.key.as_deref().unwrap_or_default().to_owned());
        let result: Dynamic =
            self.engine.eval_ast_with_scope(&mut scope, &self.ast).map_err(|error| self.fault(error))?;
        Ok((result, scope.get_value("payload").unwrap_or_default()))
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program").field("name", &self.name).field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl Transform {
    /// Runs the stages over one event, in order.
    ///
    /// # Errors
    /// When a stage fails on it: the record's error.
    pub fn run(&self, mut event: Event) -> Result<Outcome, Fault> {
        for stage in self.stages.iter() {
            let (result, payload) = stage.eval(&event)?;
            match stage.kind {
                StageKind::Filter if !result.as_bool().map_err(|kind| stage.fault(kind))? => {
                    return Ok(Outcome::Drop(stage.name.clone()));
                }
                StageKind::Filter => {}
                StageKind::Script => {
                    let bytes = serde_json::to_vec(&payload).map_err(|error| stage.fault(error))?;
                    event = event.with_payload(bytes.into());
                }
            }
        }
        Ok(Outcome::Deliver(vec![event]))
    }
}

impl Predicate {
    /// Whether the condition holds for the event.
    ///
    /// # Errors
    /// When it fails on it, or gives neither true nor false: the record's error.
    pub fn holds(&self, event: &Event) -> Result<bool, Fault> {
        self.0.eval(event)?.0.as_bool().map_err(|kind| self.0.fault(kind))
    }
}

impl Expression {
    /// The number of seconds, or the time, that the expression gives for the event.
    ///
    /// # Errors
    /// When it fails on it, or gives neither: the record's error.
    pub fn delay(&self, event: &Event) -> Result<DelayValue, Fault> {
        let (value, _) = self.0.eval(event)?;
        if let Ok(text) = value.clone().into_string() {
            return text.parse::<Timestamp>().map(DelayValue::At).map_err(|error| self.0.fault(error));
        }
        value.as_float().map(DelayValue::Seconds).map_err(|kind| self.0.fault(kind))
    }
}
