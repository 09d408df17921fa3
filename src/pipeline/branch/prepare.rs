//! From a record to the deliveries of one branch: transform, replicate, route, cases.
//!
//! A function of the record, the plan that was in force when it came, and the branch as it is now. It sends nothing and
//! stores nothing, so it may run on any thread and as often as needed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::shared::{Found, Shared};
use crate::pipeline::plan::{BranchPlan, Plan, Routing};
use crate::pipeline::revisions::InForce;
use crate::record::{Position, Record};
use crate::replicate::{Meant, meant_for};
use crate::source::{Child, DeadReason, Entry};
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

impl Stillborn {
    /// One that no target and no author caused.
    fn by_us(error: &str) -> Self {
        Self { reason: DeadReason::Script, stage: "transform".into(), error: error.into() }
    }
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

/// Runs `work`; a panic in it is the record's error, or the branch would meet the record again and again.
pub(super) fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, Stillborn> {
    let panicked = "a stage panicked on this record; this is a fault of walflow";
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| Stillborn::by_us(panicked))
}

/// What the records are to the branch, in order. Stages that other branches run as well run once between them.
pub(super) fn prepare_all(
    entries: Vec<Entry>,
    branch: &BranchPlan,
    now: &Plan,
    in_force: &InForce,
    shared: &Shared,
) -> Vec<Prepared> {
    let prepare = |entry: &Entry, sharing| {
        let then = in_force.branch_at(entry.record.epoch, &branch.name).unwrap_or_else(|| now_as_then(now, branch));
        contained(entry.position, &entry.record, || run(entry, branch, now, then, sharing))
    };
    let first = |entry: &Entry| prepare(entry, Sharing::With(shared));
    let mut prepared: Vec<Option<Prepared>> = entries.iter().map(first).collect();
    for (prepared, entry) in prepared.iter_mut().zip(&entries).filter(|(prepared, _)| prepared.is_none()) {
        // Another branch was at it. It is at one record at a time, so hardly any is left to do.
        *prepared = prepare(entry, Sharing::Or(shared));
    }
    prepared.into_iter().flatten().collect()
}

/// What the record is to the branch. `then` was in force when it came and decides who takes it, and in it the branch as it
/// was, whatever its name; `branch` and `now` say how it is changed and sent.
pub(super) fn prepare(
    position: Position,
    record: Arc<Record>,
    branch: &BranchPlan,
    now: &Plan,
    then: Then<'_>,
) -> Prepared {
    let entry = Entry::new(position, record);
    let prepared = contained(position, &entry.record, || run(&entry, branch, now, then, Sharing::Not));
    prepared.unwrap_or_else(|| dead(position, &entry.record, Stillborn::by_us("the stages did not run")))
}

/// Whether other branches' runs of the same stages count.
#[derive(Clone, Copy)]
enum Sharing<'a> {
    /// No: the record comes again, and alone.
    Not,
    /// Yes, and a record that another branch is at is left for later.
    With(&'a Shared),
    /// Yes, and it is done here if another branch is still at it.
    Or(&'a Shared),
}

/// As [`guarded`]: a record on which a stage panics is stillborn.
fn contained(position: Position, record: &Arc<Record>, work: impl FnOnce() -> Option<Prepared>) -> Option<Prepared> {
    guarded(work).unwrap_or_else(|stillborn| Some(dead(position, record, stillborn)))
}

fn dead(position: Position, record: &Arc<Record>, stillborn: Stillborn) -> Prepared {
    let parts = vec![Part { child: 0, result: Err(stillborn) }];
    Prepared { position, record: Arc::clone(record), parts, dropped: None }
}

/// `None` = another branch is at it.
fn run(
    entry: &Entry,
    branch: &BranchPlan,
    now: &Plan,
    (then, own): Then<'_>,
    sharing: Sharing<'_>,
) -> Option<Prepared> {
    let Entry { position, record, fault } = entry;
    let mut prepared = Prepared { position: *position, record: Arc::clone(record), parts: Vec::new(), dropped: None };
    let Some(own) = own else { return Some(prepared) };
    match meant_for(record, &own.sink, own.region.as_deref(), branch.target, then.origin.as_deref()) {
        Meant::Here => {}
        Meant::Elsewhere => return Some(prepared),
        Meant::CameFromHere => {
            prepared.dropped = Some("loop guard: it came from this region".into());
            return Some(prepared);
        }
        Meant::CameOver => {
            prepared.dropped = Some("loop guard: it came over from another region, which sends it on itself".into());
            return Some(prepared);
        }
    }
    if let Some(fault) = fault {
        let stillborn = Stillborn { reason: DeadReason::Script, stage: "delay".into(), error: (&**fault).into() };
        return Some(dead(*position, record, stillborn));
    }
    // A script that runs before a route decides who takes the record, so it is the one of that time.
    let transform = if decides(&then.routing) { &then.transform } else { &now.transform };
    let made = first_stages(entry, transform, branch, now, sharing)?;
    let mut parts = Vec::new();
    let mut dropped = None;
    follow(made, &mut dropped, &mut parts, &mut |event, dropped, parts| {
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
    Some(prepared)
}

/// Runs the stages that all branches have, or takes what another's run of them made. `None` = another is at it.
fn first_stages(
    entry: &Entry,
    stages: &Transform,
    branch: &BranchPlan,
    now: &Plan,
    sharing: Sharing<'_>,
) -> Option<Result<Outcome, Fault>> {
    let event = || Event::original(Arc::clone(&entry.record));
    let (Sharing::With(shared) | Sharing::Or(shared)) = sharing else { return Some(stages.run(event())) };
    let wants = |other: &BranchPlan| {
        let meant = meant_for(&entry.record, &other.sink, other.region.as_deref(), other.target, now.origin.as_deref());
        other.name != branch.name && meant == Meant::Here
    };
    let others = now.branches.iter().filter(|other| wants(other)).count();
    if stages.is_empty() || others == 0 {
        return Some(stages.run(event()));
    }
    match shared.look(entry.position, stages, others) {
        Found::Made(made) => Some(made),
        Found::UnderWay if matches!(sharing, Sharing::With(_)) => None,
        Found::UnderWay => Some(stages.run(event())),
        Found::Mine(claim) => {
            let made = stages.run(event());
            claim.keep(&made);
            Some(made)
        }
    }
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
    follow(transform.run(event), dropped, parts, next);
}

/// Hands on what stages made of an event.
fn follow(
    made: Result<Outcome, Fault>,
    dropped: &mut Option<Box<str>>,
    parts: &mut Parts,
    next: &mut dyn FnMut(Event, &mut Option<Box<str>>, &mut Parts),
) {
    match made {
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
