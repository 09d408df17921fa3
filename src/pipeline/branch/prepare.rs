//! From a record to the deliveries of one branch: transform, replicate, route, cases.
//!
//! A function of the record, the plan that was in force when it came, and the branch as it is now. It sends nothing and
//! stores nothing, so it may run on any thread and as often as needed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::pipeline::plan::{BranchPlan, Plan, Routing};
use crate::record::{Position, Record};
use crate::replicate::{Meant, meant_for};
use crate::source::{Child, DeadReason};
use crate::spec::sink::Otherwise;
use crate::transform::{Event, Fault, Outcome, Predicate, Transform};

/// What a record is to a branch.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) position: Position,
    pub(super) record: Arc<Record>,
    /// What to send, or why not; each is one delivery with an end of its own.
    pub(super) parts: Vec<Part>,
    /// A filter, `drop()`, a route or the loop guard ended it here.
    pub(super) dropped: Option<Box<str>>,
}

/// One delivery that a record became.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) child: Child,
    pub(super) result: Result<(Event, usize), Stillborn>,
}

/// A delivery that ends in the dead letters before it was tried.
#[derive(Debug)]
pub(super) struct Stillborn {
    pub(super) reason: DeadReason,
    pub(super) stage: Box<str>,
    pub(super) error: Box<str>,
}

impl From<Fault> for Stillborn {
    fn from(fault: Fault) -> Self {
        Self { reason: DeadReason::Script, stage: fault.stage, error: fault.message }
    }
}

/// The plan that decides who takes a record, and the branch in it.
pub(super) type Then<'a> = (&'a Plan, Option<&'a Arc<BranchPlan>>);

/// The branch in the plan as it is now.
pub(super) fn now_as_then<'a>(now: &'a Plan, branch: &BranchPlan) -> Then<'a> {
    (now, now.branches.iter().find(|own| own.name == branch.name))
}

/// True when preparing runs no script, so that it need not leave the calling thread.
pub(super) fn is_cheap(branch: &BranchPlan, plan: &Plan) -> bool {
    let conditions = match &plan.routing {
        Routing::Single => 0,
        Routing::Route { arms, .. } | Routing::FanOut { arms } => {
            arms.iter().filter(|(_, when)| when.is_some()).count()
        }
    };
    plan.transform.is_empty()
        && branch.transforms.iter().all(Transform::is_empty)
        && branch.cases.iter().all(Option::is_none)
        && conditions == 0
}

/// What the record is to the branch. `then` was in force when it came and decides who takes it, and in it the branch as it
/// was, whatever its name; `branch` and `now` say how it is changed and sent. A stage that panics is the record's error, or the branch would meet it again and again.
pub(super) fn prepare(
    position: Position,
    record: Arc<Record>,
    branch: &BranchPlan,
    now: &Plan,
    then: Then<'_>,
) -> Prepared {
    let work = || run(position, Arc::clone(&record), branch, now, then);
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        let stillborn = Stillborn {
            reason: DeadReason::Script,
            stage: "transform".into(),
            error: "a stage panicked on this record; this is a fault of walflow".into(),
        };
        let parts = vec![Part { child: 0, result: Err(stillborn) }];
        Prepared { position, record: Arc::clone(&record), parts, dropped: None }
    })
}

fn run(position: Position, record: Arc<Record>, branch: &BranchPlan, now: &Plan, (then, own): Then<'_>) -> Prepared {
    let mut prepared = Prepared { position, record: Arc::clone(&record), parts: Vec::new(), dropped: None };
    let Some(own) = own else { return prepared };
    match meant_for(&record, &own.sink, own.region.as_deref(), branch.target) {
        Meant::Here => {}
        Meant::Elsewhere => return prepared,
        Meant::CameFromHere => {
            prepared.dropped = Some("loop guard: it came from this region".into());
            return prepared;
        }
    }
    // A script that runs before a route decides who takes the record, so it is the one of that time.
    let transform = if decides(&then.routing) { &then.transform } else { &now.transform };
    let mut parts = Vec::new();
    let mut dropped = None;
    stage(Event::original(record), transform, &mut dropped, &mut parts, &mut |event, dropped, parts| {
        stage(event, &branch.transforms[0], dropped, parts, &mut |event, dropped, parts| match takes(
            &then.routing,
            own.arm,
            &event,
        ) {
            Err(stillborn) => parts.push(Err(stillborn)),
            Ok(Taken::No) => {}
            Ok(Taken::Nobody) => *dropped = Some("no arm of the route took it".into()),
            Ok(Taken::Yes) => stage(event, &branch.transforms[1], dropped, parts, &mut |event, _, parts| {
                parts.push(choose(&branch.cases, &event).map(|case| (event, case)));
            }),
        });
    });
    let several = parts.len() > 1;
    prepared.parts = parts
        .into_iter()
        .zip(0..)
        .map(|(result, index)| {
            let child = match &result {
                Ok((event, _)) if !several => event.child,
                Err(_) if !several => 0,
                _ => index + 1,
            };
            Part {
                child,
                result: result.map(|(mut event, case)| {
                    event.child = child;
                    (event, case)
                }),
            }
        })
        .collect();
    if prepared.parts.is_empty() {
        prepared.dropped = dropped;
    }
    prepared
}

/// Whether a routing looks at the record at all.
fn decides(routing: &Routing) -> bool {
    match routing {
        Routing::Single => false,
        Routing::Route { .. } => true,
        Routing::FanOut { arms } => arms.iter().any(|(_, when)| when.is_some()),
    }
}

type Parts = Vec<Result<(Event, usize), Stillborn>>;

/// Runs one chain of stages and hands each of its events on.
fn stage(
    event: Event,
    transform: &Transform,
    dropped: &mut Option<Box<str>>,
    parts: &mut Parts,
    next: &mut dyn FnMut(Event, &mut Option<Box<str>>, &mut Parts),
) {
    if transform.is_empty() {
        return next(event, dropped, parts);
    }
    match transform.run(event) {
        Ok(Outcome::Deliver(events)) => events.into_iter().for_each(|event| next(event, dropped, parts)),
        Ok(Outcome::Drop(by)) => *dropped = Some(by),
        Err(fault) => parts.push(Err(fault.into())),
    }
}

enum Taken {
    Yes,
    No,
    /// No arm did, and the file says to drop such records.
    Nobody,
}

fn takes(routing: &Routing, arm: usize, event: &Event) -> Result<Taken, Stillborn> {
    let holds = |when: &Option<Predicate>| when.as_ref().map_or(Ok(true), |when| when.holds(event));
    match routing {
        Routing::Single => Ok(Taken::Yes),
        Routing::FanOut { arms } => {
            let mine = arms.get(arm).map_or(Ok(true), |(_, when)| holds(when))?;
            Ok(if mine { Taken::Yes } else { Taken::No })
        }
        Routing::Route { arms, otherwise } => {
            for (index, (_, when)) in arms.iter().enumerate() {
                match holds(when) {
                    Ok(false) => {}
                    Ok(true) => return Ok(if index == arm { Taken::Yes } else { Taken::No }),
                    // Every branch sees the same error: only the first one reports it.
                    Err(fault) => return if arm == 0 { Err(fault.into()) } else { Ok(Taken::No) },
                }
            }
            match (arm, otherwise) {
                (0, Otherwise::DeadLetter) => Err(Stillborn {
                    reason: DeadReason::NoRoute,
                    stage: "sink.route".into(),
                    error: "no arm of the route takes this record: add an arm without `when`, or say `otherwise: drop`"
                        .into(),
                }),
                (0, Otherwise::Drop) => Ok(Taken::Nobody),
                _ => Ok(Taken::No),
            }
        }
    }
}

pub(super) fn choose(cases: &[Option<Predicate>], event: &Event) -> Result<usize, Stillborn> {
    for (index, when) in cases.iter().enumerate() {
        if when.as_ref().map_or(Ok(true), |when| when.holds(event))? {
            return Ok(index);
        }
    }
    if cases.is_empty() {
        return Ok(0);
    }
    Err(Stillborn {
        reason: DeadReason::NoRoute,
        stage: "sink.cases".into(),
        error: "no case holds for this record: add one without `when`".into(),
    })
}
