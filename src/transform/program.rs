//! One compiled text, and how it runs over an event.
//!
//! Takes the event and the payload in the scripts' form; gives what the text answered and what it changed. Whatever a
//! text does, the run ends: by its own end, by the guard, or as a fault.

use std::fmt;
use std::sync::Arc;

use rhai::{AST, Dynamic, Engine, EvalAltResult, Map, Scope};

use super::convert::{self, Parsed};
use super::guard::{self, Ended, NewChild, Surroundings};
use super::scan::Uses;
use super::{Event, Fault, Place, StageKind, engine, functions};
use crate::record::{Headers, Record};

/// Bytes of stack for a text that repeats: it can nest values so deep that to drop them takes this much.
const BIG_STACK: usize = 256 << 20;
/// Letters of a script's message that are kept.
const MESSAGE: usize = 500;

/// One compiled text with all that it needs to run.
pub(super) struct Program {
    pub(super) name: Box<str>,
    pub(super) kind: StageKind,
    pub(super) text: Arc<str>,
    pub(super) place: Place,
    pub(super) ast: AST,
    pub(super) engine: Arc<Engine>,
    pub(super) uses: Uses,
    pub(super) around: Arc<Surroundings>,
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program").field("name", &self.name).field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// A text's last value, as far as anyone asks.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Answer {
    Bool(bool),
    Number(f64),
    Text(Box<str>),
    Other(&'static str),
}

/// What a run left behind.
#[derive(Debug)]
pub(super) struct Ran {
    pub(super) answer: Answer,
    /// `drop()` was called.
    pub(super) dropped: bool,
    /// `None` = the text does not name it.
    pub(super) payload: Option<Parsed>,
    /// `None` = unchanged.
    pub(super) key: Option<Option<Arc<str>>>,
    /// `None` = unchanged.
    pub(super) headers: Option<Headers>,
    pub(super) children: Vec<NewChild>,
    pub(super) calls: u32,
}

/// What comes out of the script itself, nothing of it nested deep.
struct Left {
    answer: Answer,
    payload: Option<Parsed>,
    key: Option<Option<Arc<str>>>,
    headers: Option<Headers>,
}

impl Program {
    pub(super) fn fault(&self, message: impl fmt::Display) -> Fault {
        Fault {
            stage: self.name.clone(),
            message: format!("{}:{}: {message}", self.place.file, self.place.line).into(),
        }
    }

    /// Runs the text. `payload` is the event's, if a stage before has it; else it is taken from the event.
    pub(super) fn run(&self, event: &Event, payload: Option<Parsed>) -> Result<Ran, Fault> {
        let payload = match (payload, self.uses.payload) {
            (Some(payload), _) => Some(payload),
            (None, true) => Some(event.take_parsed().map_err(|error| self.fault(error))?),
            (None, false) => None,
        };
        let work = || self.evaluate(event, payload);
        let (result, run) =
            guard::enter(&self.around, &event.record, event.child, event.calls, event.payload().len(), || {
                if self.uses.repeats { stacker::grow(BIG_STACK, work) } else { work() }
            });
        let Some(run) = run else { return Err(self.fault("the script lost its run")) };
        let dropped = run.ended == Some(Ended::Dropped);
        let left = match result {
            Err(_) => return Err(self.fault("the script made the engine panic")),
            Ok(Err(_)) if dropped => Left { answer: Answer::Other("()"), payload: None, key: None, headers: None },
            Ok(left) => left?,
        };
        // Whatever a script or the library makes of the error that ends a run: ended is ended.
        if let Some(why) = run.ended.as_ref().and_then(Ended::why) {
            return Err(self.fault(why));
        }
        Ok(Ran {
            answer: left.answer,
            dropped,
            payload: left.payload,
            key: left.key,
            headers: left.headers,
            children: run.children,
            calls: run.calls,
        })
    }

    /// Everything that handles values of the script's own making, and drops them: it may run on a stack of its own.
    fn evaluate(&self, event: &Event, payload: Option<Parsed>) -> Result<Left, Fault> {
        let (value, notes) = match payload {
            Some(Parsed { value, wide, repeated }) => (value, Some((wide, repeated))),
            None => (Dynamic::UNIT, None),
        };
        let mut scope = Scope::new();
        scope.push_dynamic("payload", Dynamic::UNIT);
        // Put in its place afterwards: a push goes through all of the value to mark it as a variable's.
        if let Some(payload) = scope.get_mut("payload") {
            *payload = value;
        }
        if self.uses.key {
            scope
                .push_dynamic("key", event.key.as_deref().map_or(Dynamic::UNIT, |text| Dynamic::from(text.to_owned())));
        }
        if self.uses.headers {
            scope.push_dynamic("headers", Dynamic::from_map(headers_map(event.headers())));
        }
        if self.uses.record {
            scope.push_dynamic("record", Dynamic::from_map(self.record_map(&event.record)));
        }
        let given = scope.len();
        let answer = match self.engine.eval_ast_with_scope::<Dynamic>(&mut scope, &self.ast) {
            Ok(value) => Answer::of(&value),
            Err(error) => return Err(self.script_fault(&error)),
        };
        // A `let` may have put another variable of the same name above ours.
        scope.rewind(given);
        let script = self.kind == StageKind::Script;
        let key = if script && self.uses.key { self.new_key(event, &owned(&mut scope, "key"))? } else { None };
        let headers =
            if script && self.uses.headers { self.new_headers(event, &owned(&mut scope, "headers"))? } else { None };
        let payload = match notes {
            Some((wide, repeated)) => {
                let value = owned(&mut scope, "payload");
                if self.uses.repeats && convert::too_deep(&value) {
                    return Err(self.fault(convert::NotWritable::Depth));
                }
                Some(Parsed { value, wide, repeated })
            }
            None => None,
        };
        Ok(Left { answer, payload, key, headers })
    }

    fn new_key(&self, event: &Event, key: &Dynamic) -> Result<Option<Option<Arc<str>>>, Fault> {
        let key = functions::key_of(key).map_err(|why| self.fault(why))?;
        Ok((key != event.key).then_some(key))
    }

    fn new_headers(&self, event: &Event, headers: &Dynamic) -> Result<Option<Headers>, Fault> {
        let headers = functions::headers_of(headers).map_err(|why| self.fault(why))?;
        let now = event.headers();
        let same = headers.len() == now.len() && headers.iter().all(|pair| now.contains(pair));
        Ok((!same).then_some(headers))
    }

    fn record_map(&self, record: &Record) -> Map {
        let tags: rhai::Array = record.tags.iter().map(|tag| Dynamic::from(tag.to_string())).collect();
        [
            ("id", Dynamic::from(record.id.to_string())),
            ("namespace", Dynamic::from(self.around.namespace.to_string())),
            ("written_at", Dynamic::from(record.written_at.to_string())),
            ("priority", record.priority.map_or(Dynamic::UNIT, Dynamic::from)),
            ("tags", Dynamic::from_array(tags)),
        ]
        .into_iter()
        .map(|(name, value)| (name.into(), value))
        .collect()
    }

    /// What a script's error says, with the line in the file.
    fn script_fault(&self, error: &EvalAltResult) -> Fault {
        let mut inner = error;
        while let EvalAltResult::ErrorInFunctionCall(_, _, cause, _) = inner {
            inner = cause;
        }
        let place = inner.position();
        let ended = guard::with_run(|run| run.ended.as_ref().and_then(Ended::why)).flatten();
        let message = ended.unwrap_or_else(|| match inner {
            EvalAltResult::ErrorRuntime(value, _) if value.is_string() => value.to_string(),
            EvalAltResult::ErrorRuntime(value, _) => match convert::write(value, MESSAGE) {
                Ok(json) => String::from_utf8_lossy(&json).into_owned(),
                Err(_) => format!("it threw a value of type {}", engine::kind(value)),
            },
            EvalAltResult::ErrorTooManyOperations(_) => {
                format!("the script took more than {} steps and was stopped", guard::MAX_STEPS)
            }
            EvalAltResult::ErrorStackOverflow(_) => "the script calls functions within functions too deep".to_owned(),
            other => {
                let text = other.to_string();
                // The place is said in the file's own lines instead.
                text.rsplit_once(" (line ").map_or(text.clone(), |(message, _)| message.to_owned())
            }
        });
        let line = self.place.line + place.line().unwrap_or(1).saturating_sub(1);
        let message: String = message.chars().take(MESSAGE).collect();
        Fault { stage: self.name.clone(), message: format!("{}:{line}: {message}", self.place.file).into() }
    }
}

impl Answer {
    #[expect(clippy::cast_precision_loss, reason = "asked for only where a float is meant")]
    fn of(value: &Dynamic) -> Self {
        if value.is_unit() {
            return Self::Other(engine::kind(value));
        }
        if let Ok(value) = value.as_bool() {
            return Self::Bool(value);
        }
        if let Ok(number) = value.as_int() {
            return Self::Number(number as f64);
        }
        if let Ok(number) = value.as_float() {
            return Self::Number(number);
        }
        match value.as_immutable_string_ref() {
            Ok(text) => Self::Text(text.as_str().into()),
            Err(_) => Self::Other(engine::kind(value)),
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => write!(f, "the text \"{}\"", text.chars().take(40).collect::<String>()),
            Self::Other(kind) => f.write_str(kind),
        }
    }
}

fn headers_map(headers: &Headers) -> Map {
    headers.iter().map(|(name, value)| ((&**name).into(), Dynamic::from(value.to_string()))).collect()
}

/// Takes a variable out of the scope. One that a closure captured is taken out of its cell, so that a closure which it
/// holds itself does not keep it alive for ever.
fn owned(scope: &mut Scope<'_>, name: &str) -> Dynamic {
    let mut value = scope.get_mut(name).map(Dynamic::take).unwrap_or_default();
    if value.is_shared() {
        return value.write_lock::<Dynamic>().map(|mut inner| inner.take()).unwrap_or_default();
    }
    value
}
