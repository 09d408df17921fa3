//! What a plan says, in words: the same facts for people and for machines.
//!
//! Takes a plan and the file that it was made of, gives a report that serialises as JSON and renders as text. Where a
//! value came from the environment it shows the reference, never the value; credentials that stand literally are
//! masked.

mod source;

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::plan::{BranchPlan, Plan, Routing};
use crate::record::TargetKind;
use crate::retry::{Jitter, Retry};
use crate::sink::http::{HttpSpec, verdict_table};
use crate::sink::postgres;
use crate::sink::redis::{RedisCommand, RedisSpec};
use crate::sink::{Kind, delivered_note};
use crate::spec::diagnostic::mask;
use crate::spec::expand::child;
use crate::spec::sink::{OnDeadLetter, Ordering, Otherwise, StartSpec};
use crate::spec::{Loaded, StageSpec};
use crate::units::{ByteSize, Span};

/// A plan in words.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The namespace.
    pub namespace: String,
    /// The file.
    pub file: String,
    /// What it is for.
    pub description: Option<String>,
    /// Who to ask.
    pub owner: Option<String>,
    /// Which group of instances runs it.
    pub shard: String,
    /// The digest of files and environment.
    pub revision: String,
    /// Where writes become durable, and the bounds there.
    pub source: Vec<Fact>,
    /// When a record is due.
    pub delay: Vec<Fact>,
    /// What is done to each record.
    pub transform: Vec<String>,
    /// Which branch takes what.
    pub routing: Vec<String>,
    /// Every branch.
    pub branches: Vec<BranchReport>,
    /// Branches that are ended at once.
    pub retired: Vec<String>,
    /// What came from walflow.yaml, each value with its origin.
    pub inherited: Vec<String>,
    /// How many cases `walflow test` has.
    pub tests: usize,
}

/// One thing that a plan says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fact {
    /// About what.
    pub name: &'static str,
    /// What.
    pub says: String,
}

/// A branch in words.
#[derive(Clone, Debug, Serialize)]
pub struct BranchReport {
    /// Its name.
    pub name: String,
    /// The sink's kind.
    pub kind: &'static str,
    /// The region, where the file replicates.
    pub region: Option<String>,
    /// Everything that its driver obeys.
    pub facts: Vec<Fact>,
    /// The same in numbers.
    pub figures: Figures,
}

/// What a branch's driver obeys, in numbers for machines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// The API's type of the target.
    pub target: TargetKind,
    /// Whether a key's order is kept.
    pub ordering: Ordering,
    /// Records a second.
    pub rate_per_second: Option<f64>,
    /// Records at once after a quiet time.
    pub burst: Option<u32>,
    /// Batches under way at once.
    pub concurrency: usize,
    /// Records of a batch.
    pub batch_records: usize,
    /// Payload bytes of a batch.
    pub batch_bytes: usize,
    /// How long an incomplete batch waits.
    pub linger_seconds: f64,
    /// Attempts, the first included.
    pub attempts: u32,
    /// The longest waits between all attempts together.
    pub retry_total_seconds: f64,
    /// When a record is given up, in time in which the branch was open.
    pub give_up_seconds: f64,
    /// Where the branch pauses.
    pub dead_letters_bytes: u64,
}

impl Figures {
    fn of(branch: &BranchPlan) -> Self {
        Self {
            target: branch.target,
            ordering: branch.ordering,
            rate_per_second: branch.rate.map(|(rate, _)| rate),
            burst: branch.rate.map(|(_, burst)| burst),
            concurrency: branch.concurrency,
            batch_records: branch.batch.records,
            batch_bytes: branch.batch.bytes,
            linger_seconds: branch.batch.linger.as_secs_f64(),
            attempts: branch.retry.attempts,
            retry_total_seconds: branch.retry.longest_total().as_secs_f64(),
            give_up_seconds: branch.retry.give_up.as_secs_f64(),
            dead_letters_bytes: branch.dead_letters.size.0,
        }
    }
}

fn fact(name: &'static str, says: impl Into<String>) -> Fact {
    Fact { name, says: says.into() }
}

fn span(duration: Duration) -> String {
    // Past a minute nobody reads milliseconds.
    let rounded = if duration.as_secs() >= 60 { Duration::from_secs(duration.as_secs()) } else { duration };
    Span(rounded).to_string()
}

/// What a name of the grammar is called in the file.
fn word<T: Serialize>(value: T) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(text)) => text,
        Ok(other) => other.to_string(),
        Err(_) => String::new(),
    }
}

/// Text on one line without its comments, cut.
fn brief(text: &str) -> String {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let line = code.flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ");
    if line.chars().count() > 100 { format!("{}…", line.chars().take(99).collect::<String>()) } else { line }
}

/// Says what a plan means.
pub(super) fn report(loaded: &Loaded, plan: &Plan) -> Report {
    let spec = loaded.spec.as_ref();
    let stages = spec.map(|spec| spec.transform.as_slice()).unwrap_or_default();
    Report {
        namespace: plan.namespace.to_string(),
        file: loaded.text.name().to_string(),
        description: plan.description.clone(),
        owner: plan.owner.clone(),
        shard: plan.shard.clone(),
        revision: plan.revision.to_string(),
        source: source::source(plan),
        delay: source::delay(plan),
        transform: stages.iter().map(stage).collect(),
        routing: routing(plan),
        branches: plan.branches.iter().map(|branch| Describe { loaded, plan, branch }.report()).collect(),
        retired: plan.retired.iter().map(ToString::to_string).collect(),
        inherited: loaded.inherited(),
        tests: plan.tests.len(),
    }
}

/// A stage on one line.
fn stage(stage: &StageSpec) -> String {
    let env = if stage.env.is_empty() { String::new() } else { format!("  (env: {})", stage.env.join(", ")) };
    match (&stage.filter, &stage.inline, &stage.script) {
        (Some(text), _, _) => format!("filter  {}", brief(text)),
        (_, Some(text), _) => format!("inline  {}{env}", brief(text)),
        (_, _, Some(path)) => format!("script  {path}{env}"),
        _ => String::new(),
    }
}

fn routing(plan: &Plan) -> Vec<String> {
    let width = plan.branches.iter().map(|branch| branch.sink.chars().count()).max().unwrap_or(0);
    let arm = |(name, when): &(std::sync::Arc<str>, Option<crate::transform::Predicate>)| match when {
        Some(when) => format!("{name:<width$}  when {}", brief(when.source())),
        None => format!("{name:<width$}  always"),
    };
    match &plan.routing {
        Routing::Single => Vec::new(),
        Routing::FanOut { arms } => std::iter::once("each of these takes what its condition lets through".to_owned())
            .chain(arms.iter().map(arm))
            .collect(),
        Routing::Route { arms, otherwise } => {
            let open = arms.last().is_some_and(|(_, when)| when.is_some());
            let rest = open.then(|| match otherwise {
                Otherwise::DeadLetter => "otherwise  dead letters".to_owned(),
                Otherwise::Drop => "otherwise  dropped, counted".to_owned(),
            });
            let head = "the first of these that matches takes the record".to_owned();
            std::iter::once(head).chain(arms.iter().map(arm)).chain(rest).collect()
        }
    }
}

struct Describe<'a> {
    loaded: &'a Loaded,
    plan: &'a Plan,
    branch: &'a BranchPlan,
}

impl Describe<'_> {
    fn report(&self) -> BranchReport {
        let branch = self.branch;
        let (kind, mut facts) = match &branch.kind {
            Kind::Stdout(_) => ("stdout", vec![fact("to", "a line of JSON on standard output for each record")]),
            Kind::File(file) => {
                ("file", vec![fact("to", format!("a line for each record in {}", self.shown("path", &file.path)))])
            }
            Kind::Http { spec, batched } => ("http", self.http(spec, *batched)),
            Kind::Redis(redis) => ("redis", self.redis(redis)),
            Kind::Kafka(spec) => {
                let brokers = self.shown("brokers", spec.brokers.as_deref().unwrap_or_default());
                ("kafka", vec![fact("to", format!("topic {} at {brokers}", self.shown("topic", &spec.topic)))])
            }
            Kind::Sqs(spec) => (
                "sqs",
                vec![fact("to", format!("queue {}", self.shown("queue", spec.queue.as_deref().unwrap_or_default())))],
            ),
            Kind::Postgres(spec) => {
                let to = fact("to", self.shown("url", spec.url.as_deref().unwrap_or_default()));
                (
                    "postgres",
                    std::iter::once(to)
                        .chain(postgres::steps(spec).into_iter().map(|says| fact("case", says)))
                        .collect(),
                )
            }
        };
        facts.extend(delivered_note(&branch.kind).into_iter().map(|says| fact("delivery", says)));
        if let Some(was) = &branch.was {
            facts.push(fact("was", format!("{was}: its progress goes on here")));
        }
        if branch.start == Some(StartSpec::Earliest) {
            facts.push(fact("begins", "a new branch begins at the oldest record that is kept"));
        }
        facts.extend(self.stages().map(|says| fact("transform", says)));
        facts.push(fact("target", target(branch.target)));
        let rate = match branch.rate {
            Some((rate, burst)) => format!("{} a second, {burst} at once after a quiet time; ", trim(rate)),
            None => "no rate limit; ".to_owned(),
        };
        facts.push(fact("limits", format!("{rate}{} batches under way", branch.concurrency)));
        let batch = &branch.batch;
        let bytes = ByteSize(batch.bytes as u64);
        facts.push(fact(
            "batch",
            match batch.records {
                1 => "one record each".to_owned(),
                records => {
                    format!("up to {records} records or {bytes}, an incomplete one waits {}", span(batch.linger))
                }
            },
        ));
        facts.push(fact("retry", retry(&branch.retry)));
        facts.push(fact(
            "order",
            match branch.ordering {
                Ordering::Key => "a key's records one after the other; one key that fails holds up itself only",
                Ordering::None => "none",
            },
        ));
        let letters = &branch.dead_letters;
        let then = match letters.on_dead_letter {
            OnDeadLetter::Pass => "later records of the key go on",
            OnDeadLetter::Block => "later records of the key wait until it is replayed or purged",
        };
        let also = letters.also.as_ref().map_or(String::new(), |also| {
            let [own, all] =
                [self.own_pointer(), "/sink".to_owned()].map(|sink| format!("{sink}/dead_letters/also/file/path"));
            format!("; a copy to {}", self.written(&[own, all], &also.file.path))
        });
        let (size, replay) = (letters.size, letters.replay);
        facts.push(fact("dead letters", format!("{then}; at {size} the branch pauses; replayed at {replay}{also}")));
        BranchReport {
            name: branch.name.to_string(),
            kind,
            region: branch.region.as_deref().map(ToOwned::to_owned),
            facts,
            figures: Figures::of(branch),
        }
    }

    /// The region's stages and the arm's.
    fn stages(&self) -> impl Iterator<Item = String> {
        let spec = self.loaded.spec.as_ref();
        let region = self.branch.region.as_deref().and_then(|name| spec?.replicate.as_ref()?.regions.get(name));
        let region = region.map(|region| region.transform.as_slice()).unwrap_or_default();
        let sink = spec.map(|spec| &spec.sink);
        let arm = match &self.plan.routing {
            Routing::Single => None,
            Routing::Route { .. } => sink.and_then(|sink| sink.route.as_ref()?.get(self.branch.arm)),
            Routing::FanOut { .. } => sink.and_then(|sink| sink.fan_out.as_ref()?.get(&*self.branch.sink)),
        };
        let arm = arm.map(|arm| arm.transform.as_slice()).unwrap_or_default();
        region.iter().chain(arm).map(stage)
    }

    /// Where the branch's sink stands in the file.
    fn own_pointer(&self) -> String {
        match &self.plan.routing {
            Routing::Single => "/sink".to_owned(),
            Routing::Route { .. } => format!("/sink/route/{}", self.branch.arm),
            Routing::FanOut { .. } => child("/sink/fan_out", &self.branch.sink),
        }
    }

    /// The pointers where a field of the kind may stand, the one that counts first.
    fn pointers(&self, field: &str) -> [String; 2] {
        let branch = self.branch;
        let kind = match &branch.kind {
            Kind::Stdout(_) => "stdout",
            Kind::File(_) => "file",
            Kind::Http { .. } => "http",
            Kind::Redis(_) => "redis",
            Kind::Postgres(_) => "postgres",
            Kind::Kafka(_) => "kafka",
            Kind::Sqs(_) => "sqs",
        };
        let region = branch.region.as_deref().map(|region| child("/replicate/regions", region)).unwrap_or_default();
        let over = match &self.plan.routing {
            Routing::Single => region,
            Routing::Route { .. } | Routing::FanOut { .. } => child(&region, &branch.sink),
        };
        [format!("{over}/{field}"), format!("{}/{kind}/{field}", self.own_pointer())]
    }

    /// A field of the kind as [`Self::written`] shows it.
    fn shown(&self, field: &str, value: &str) -> String {
        self.written(&self.pointers(field), value)
    }

    /// A value as it was written when it came from outside, credentials masked.
    fn written(&self, pointers: &[String], value: &str) -> String {
        for pointer in pointers {
            if let Some(written) = self.loaded.expansion.written.get(pointer) {
                let default = written.used.iter().all(|used| used.value.is_none());
                let note = if default { "not set: the default" } else { "set" };
                return format!("{} ({note})", without_query(&mask(&written.text)));
            }
            if self.loaded.value.pointer(pointer).is_some_and(|found| !found.is_null()) {
                break;
            }
        }
        without_query(&mask(value))
    }

    fn http(&self, spec: &HttpSpec, batched: bool) -> Vec<Fact> {
        let method = spec.method.as_deref().unwrap_or("POST");
        let mut facts = vec![fact("to", format!("{method} {}", self.shown("url", &spec.url)))];
        let body = match (&spec.body, batched) {
            (Some(_), _) => "made from the template".to_owned(),
            (None, false) => "the payload's bytes, one record a request".to_owned(),
            (None, true) => format!("the batch as {}", spec.format.map_or_else(|| "json_array".to_owned(), word)),
        };
        facts.push(fact("body", body));
        if !spec.headers.is_empty() {
            facts.push(fact("headers", spec.headers.keys().map(String::as_str).collect::<Vec<_>>().join(", ")));
        }
        if spec.sign.is_some() {
            facts.push(fact("signed", "after Standard Webhooks"));
        }
        let timeout = spec.timeout.map_or_else(|| "30s".to_owned(), |span| span.to_string());
        let connect = spec.connect_timeout.map_or_else(|| "5s".to_owned(), |span| span.to_string());
        facts.push(fact("time-outs", format!("{timeout} for an answer, {connect} to connect")));
        for row in verdict_table(spec) {
            facts.push(fact("verdicts", row));
        }
        facts
    }

    fn redis(&self, spec: &RedisSpec) -> Vec<Fact> {
        let to = match &spec.url {
            None if !spec.cluster.is_empty() => {
                let nodes = spec.cluster.iter().enumerate();
                let nodes = nodes.map(|(index, url)| self.shown(&format!("cluster/{index}"), url));
                format!("the cluster of {}", nodes.collect::<Vec<_>>().join(", "))
            }
            url => self.shown("url", url.as_deref().unwrap_or_default()),
        };
        let mut facts = vec![fact("to", to)];
        for (index, case) in spec.cases.iter().enumerate() {
            let command = case.command.unwrap_or_default();
            let key = self.shown(&format!("cases/{index}/key"), &case.key);
            let mut says = format!("{} {key}", word(command));
            if let (RedisCommand::Set, Some(ttl)) = (command, case.ttl) {
                let _ = write!(says, " for {ttl}");
            }
            if !case.fields.is_empty() {
                let fields = case.fields.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                let _ = write!(says, " ({fields})");
            }
            if let Some(when) = &case.when {
                let _ = write!(says, "  when {}", brief(when));
            }
            facts.push(fact("case", says));
        }
        facts
    }
}

/// An address up to its '?': what follows often is a credential.
fn without_query(address: &str) -> String {
    // The '?' of a reference, ${VAR:?message}, is none of an address.
    let query =
        address.match_indices('?').map(|(at, _)| at).find(|at| !address.get(..*at).unwrap_or_default().ends_with(':'));
    query.map_or_else(|| address.to_owned(), |at| format!("{}?…", address.get(..at).unwrap_or_default()))
}

fn target(target: TargetKind) -> String {
    format!("{}: a write's target of this type may choose it", word(target))
}

fn trim(rate: f64) -> String {
    let text = format!("{rate:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The schedule, wait by wait.
fn retry(retry: &Retry) -> String {
    if retry.attempts <= 1 {
        return format!(
            "none; a record that fails while the target takes others is dead, at the latest after {}",
            span(retry.give_up)
        );
    }
    let mut waits: Vec<String> =
        (1..retry.attempts.min(7)).map(|failures| span(retry.longest_wait(failures))).collect();
    if retry.attempts > 7 {
        waits.push("…".to_owned());
    }
    let how = match retry.jitter {
        Jitter::Full => "up to ",
        Jitter::None => "",
    };
    format!(
        "{} attempts; waits {how}{}: {how}{} in all; given up after {} in which the branch was open",
        retry.attempts,
        waits.join(", "),
        span(retry.longest_total()),
        span(retry.give_up)
    )
}
