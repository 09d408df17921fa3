//! How events go through a chain of stages, a condition and a delay's expression.
//!
//! The payload is parsed at most once and written at most once in a chain; what no stage changed keeps its bytes.

use super::convert::{self, Parsed};
use super::guard::MAX_CHILDREN;
use super::program::{Answer, Program, Ran};
use super::{DelayValue, Event, Expression, Fault, Outcome, Predicate, StageKind, Transform};
use crate::clock::Timestamp;
use crate::source::Child;

/// An event between two stages.
struct Work {
    event: Event,
    /// The payload in the scripts' form, out of the event's hands.
    payload: Option<Parsed>,
    /// The last stage that may have changed the payload.
    touched: Option<usize>,
    next: usize,
}

impl Transform {
    /// Runs the stages over one event, in order.
    ///
    /// # Errors
    /// When a stage fails on it: the record's error.
    pub fn run(&self, event: Event) -> Result<Outcome, Fault> {
        #[cfg(test)]
        self.runs.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut work = Work { event, payload: None, touched: None, next: 0 };
        // As long as it is one event, nothing is gathered.
        let children = loop {
            let Some(stage) = self.stages.get(work.next) else {
                return Ok(Outcome::Deliver(vec![self.finish(work)?]));
            };
            match step(stage, work)? {
                Step::On(same) => work = same,
                Step::Dropped => return Ok(Outcome::Drop(stage.name.clone())),
                Step::Children(children) => break children,
            }
        };
        self.run_all(children)
    }

    /// Runs the rest of the stages over the children of one event, and over theirs.
    fn run_all(&self, mut waiting: Vec<Work>) -> Result<Outcome, Fault> {
        let (mut finished, mut dropped) = (Vec::with_capacity(waiting.len()), None);
        // Last first, since the next one is taken from the end.
        waiting.reverse();
        while let Some(work) = waiting.pop() {
            let Some(stage) = self.stages.get(work.next) else {
                finished.push(self.finish(work)?);
                continue;
            };
            match step(stage, work)? {
                Step::On(work) => waiting.push(work),
                Step::Dropped => dropped = Some(stage.name.clone()),
                Step::Children(children) => waiting.extend(children.into_iter().rev()),
            }
            if finished.len() + waiting.len() > MAX_CHILDREN {
                return Err(stage.fault(format!("emit made more than {MAX_CHILDREN} children of one record")));
            }
        }
        match dropped {
            Some(stage) if finished.is_empty() => Ok(Outcome::Drop(stage)),
            _ => Ok(Outcome::Deliver(finished)),
        }
    }

    /// Writes the payload if it changed.
    fn finish(&self, work: Work) -> Result<Event, Fault> {
        let Work { event, payload, touched, .. } = work;
        let Some(parsed) = payload else { return Ok(event) };
        let Some(stage) = touched.and_then(|at| self.stages.get(at)) else {
            event.keep_parsed(parsed);
            return Ok(event);
        };
        if convert::same(event.payload(), &parsed) {
            event.keep_parsed(parsed);
            return Ok(event);
        }
        if parsed.wide && convert::has_wide_integer(event.payload()) {
            return Err(stage.fault(
                "the payload holds an integer beyond 64 bits, which a script that changes the payload would not keep",
            ));
        }
        let bytes = convert::write(&parsed.value, event.payload().len())
            .map_err(|error| stage.fault(format!("the payload: {error}")))?;
        let limit = stage.around.record_limit;
        if bytes.len() > limit {
            let got = bytes.len();
            return Err(stage.fault(format!(
                "the script made a payload of {got} bytes, over the limit of {limit} (source.limits.record)"
            )));
        }
        let event = event.with_payload(bytes.into());
        event.keep_parsed(parsed);
        Ok(event)
    }
}

/// What one stage made of an event.
enum Step {
    On(Work),
    Dropped,
    Children(Vec<Work>),
}

fn step(stage: &Program, work: Work) -> Result<Step, Fault> {
    let Work { mut event, payload, touched, next } = work;
    let ran = stage.run(&event, payload)?;
    event.calls = ran.calls;
    if ran.dropped {
        return Ok(Step::Dropped);
    }
    match stage.kind {
        StageKind::Filter => {
            let passes = truth(stage, &ran)?;
            let payload = untouched(stage, &event, ran, touched.is_some())?;
            Ok(if passes { Step::On(Work { event, payload, touched, next: next + 1 }) } else { Step::Dropped })
        }
        StageKind::Script => {
            if let Some(key) = ran.key {
                event.key = key;
            }
            if let Some(headers) = ran.headers {
                event.set_headers(headers);
            }
            if ran.children.is_empty() {
                let touched = if stage.uses.payload { Some(next) } else { touched };
                return Ok(Step::On(Work { event, payload: ran.payload, touched, next: next + 1 }));
            }
            let numbered = (1..).zip(ran.children);
            let children = numbered.map(|(number, child)| {
                let number = child_number(event.child, number)
                    .ok_or_else(|| stage.fault("emit was called on a child of a child of a child"))?;
                let mut event = event.clone().with_payload(child.payload);
                event.child = number;
                if let Some(key) = child.key {
                    event.key = key;
                }
                if let Some(headers) = child.headers {
                    event.set_headers(headers);
                }
                Ok(Work { event, payload: None, touched: None, next: next + 1 })
            });
            Ok(Step::Children(children.collect::<Result<_, Fault>>()?))
        }
    }
}

/// A number that no other child of the record has: the n-th child of child c.
fn child_number(parent: Child, number: Child) -> Option<Child> {
    let base = Child::try_from(MAX_CHILDREN + 1).ok()?;
    parent.checked_mul(base)?.checked_add(number)
}

fn truth(stage: &Program, ran: &Ran) -> Result<bool, Fault> {
    match &ran.answer {
        Answer::Bool(value) => Ok(*value),
        other => Err(stage.fault(format!("it must give true or false, and gave {other}"))),
    }
}

/// Gives the payload back from a text that only reads, after a look where the text leaves a doubt.
fn untouched(stage: &Program, event: &Event, ran: Ran, changed_before: bool) -> Result<Option<Parsed>, Fault> {
    let Some(payload) = ran.payload else { return Ok(None) };
    if stage.uses.only_reads || !stage.uses.payload {
        return Ok(Some(payload));
    }
    if changed_before {
        // There are no bytes of it to compare with. What it made of the payload counts for nothing all the same: the
        // chain refuses such a text at its first run on an unchanged payload.
        return Ok(Some(payload));
    }
    if convert::same(event.payload(), &payload) {
        return Ok(Some(payload));
    }
    Err(stage.fault("it may only read, and changed the payload"))
}

impl Predicate {
    /// Whether the condition holds for the event.
    ///
    /// # Errors
    /// When it fails on it, or gives neither true nor false: the record's error.
    pub fn holds(&self, event: &Event) -> Result<bool, Fault> {
        let ran = self.0.run(event, None)?;
        let truth = truth(&self.0, &ran)?;
        if let Some(payload) = untouched(&self.0, event, ran, false)? {
            event.keep_parsed(payload);
        }
        Ok(truth)
    }
}

impl Expression {
    /// The number of seconds, or the time, that the expression gives for the event.
    ///
    /// # Errors
    /// When it fails on it, or gives neither: the record's error.
    pub fn delay(&self, event: &Event) -> Result<DelayValue, Fault> {
        let ran = self.0.run(event, None)?;
        let value = match &ran.answer {
            Answer::Number(seconds) => DelayValue::Seconds(*seconds),
            Answer::Text(text) => DelayValue::At(text.parse::<Timestamp>().map_err(|error| self.0.fault(error))?),
            other => return Err(self.0.fault(format!("it must give seconds or a time, and gave {other}"))),
        };
        if let Some(payload) = untouched(&self.0, event, ran, false)? {
            event.keep_parsed(payload);
        }
        Ok(value)
    }
}
