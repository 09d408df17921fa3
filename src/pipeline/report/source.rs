//! What a plan says of the log, the shelf and the delay.

use super::{Fact, brief, fact, span};
use crate::delay::DelayRule;
use crate::pipeline::plan::{Plan, ShelfKind, SourceKind};
use crate::source::kafka::KafkaStart;
use crate::spec::OnFull;

/// The log, what durable means on it, and what is accepted.
pub(super) fn source(plan: &Plan) -> Vec<Fact> {
    let source = &plan.source;
    let (kind, durable) = match &source.kind {
        SourceKind::Embedded => {
            ("embedded log", "written and synced to this instance's disk (one fdatasync for a group) before the answer")
        }
        SourceKind::Memory => ("log in memory", "nothing: what is written is lost at exit; for tests and benchmarks"),
        SourceKind::Kafka(_) => (
            "Kafka topic",
            "acknowledged by every replica in sync (acks=all) before the answer; brokers do not sync their disks for it",
        ),
        SourceKind::Redis(_) => (
            "Redis Streams",
            "on the server's disk as its own settings say (appendfsync always, or WAITAOF) before the answer; replicas get it afterwards, so a \
             failover may lose what was answered last",
        ),
        SourceKind::Sqs(_) => ("SQS queue", "listed under Successful by SQS before the answer"),
    };
    let mut facts = vec![fact("kind", kind), fact("durable", durable)];
    facts.extend(foreign(plan));
    let key = source.key.as_ref().map_or_else(
        || "the request's key; without one a record has no order".to_owned(),
        |pointer| format!("the request's key, else {pointer} of the payload; a key's records keep their order"),
    );
    facts.push(fact("key", key));
    let keys = &source.idempotency;
    let from = keys.from.as_ref().map_or(String::new(), |pointer| format!(", else {pointer} of the payload"));
    let most = if source.kind.is_foreign() { String::new() } else { format!(", {} at most", keys.max) };
    facts.push(fact("idempotency", format!("keys of the last {}{most}; the request's{from}", keys.window)));
    let limits = &source.limits;
    let rate = limits.rate.map_or(String::new(), |rate| format!(", {rate}"));
    let in_flight = limits.in_flight;
    facts.push(fact(
        "accepts",
        format!("payloads up to {}{rate}; {in_flight} not yet durable, then 429", limits.record),
    ));
    if let Some(schema) = &source.schema {
        facts.push(fact("schema", format!("{}; a payload that does not match is a 422", schema.path())));
    }
    facts.extend(kept(plan));
    facts
}

/// How much may wait, and what becomes of it when it is finished.
fn kept(plan: &Plan) -> [Fact; 2] {
    let source = &plan.source;
    let (backlog, retention) = match &source.kind {
        SourceKind::Embedded | SourceKind::Memory => {
            let full = match source.backlog.on_full {
                OnFull::Refuse => "new writes hear 503",
                OnFull::Drop => "the oldest are dropped, counted",
            };
            (
                format!("unfinished records up to {} and {}, then {full}", source.backlog.size, source.backlog.age),
                format!("finished records for {} and up to {}", source.retention.age, source.retention.size),
            )
        }
        SourceKind::Redis(_) => (
            format!("the streams up to {} of the server's memory, then new writes hear 503", source.backlog.size),
            "finished entries for 30 s, less where they take much memory".to_owned(),
        ),
        SourceKind::Kafka(_) => (
            "as much as the topic holds; what it removes before it was delivered stops the branch with an alarm"
                .to_owned(),
            "the topic's own settings (retention.ms, retention.bytes)".to_owned(),
        ),
        SourceKind::Sqs(_) => (
            "as much as the queue holds; it removes a message after its own retention, delivered or not".to_owned(),
            "a finished message is deleted at once".to_owned(),
        ),
    };
    [fact("backlog", backlog), fact("retention", retention)]
}

/// What there is to know of a log that others keep.
fn foreign(plan: &Plan) -> Vec<Fact> {
    let source = &plan.source;
    let mut facts = Vec::new();
    if let SourceKind::Kafka(kafka) = &source.kind {
        let branches: Vec<&str> = plan.branches.iter().map(|branch| branch.name.as_str()).collect();
        facts.push(fact("topic", format!("{} at {}", kafka.topic, kafka.cluster().shown())));
        let groups = branches.iter().map(|branch| kafka.group(plan.namespace.as_str(), branch));
        facts.push(fact("groups", groups.collect::<Vec<_>>().join(", ")));
        let start = match kafka.start {
            KafkaStart::Earliest => "a group without an offset begins at the oldest record that is kept".to_owned(),
            KafkaStart::Latest => "a group without an offset begins with what comes after the start".to_owned(),
            KafkaStart::Time(time) => format!(
                "a group without an offset begins at the first record of {time} or later, in a partition that has none at its end"
            ),
        };
        facts.push(fact("start", start));
        if kafka.topics.create {
            let made = &kafka.topics;
            let replicas =
                made.replicas.map_or("as many replicas as brokers, 3 at most".to_owned(), |n| format!("{n} replicas"));
            facts.push(fact("made", format!("if it is not there: {} partitions, {replicas}", made.partitions)));
        } else {
            facts.push(fact("made", "never; somebody with the rights runs:".to_owned()));
            let commands = kafka.commands(plan.namespace.as_str(), &branches);
            facts.extend(commands.into_iter().map(|command| fact("", command)));
        }
    }
    if let SourceKind::Sqs(sqs) = &source.kind {
        let order = if sqs.is_fifo() {
            "a key's records keep their order (FIFO)"
        } else {
            "no order: the queue is a standard one"
        };
        facts.push(fact("queue", format!("{}; {order}", sqs.queue)));
    }
    if let SourceKind::Redis(redis) = &source.kind {
        facts.push(fact("streams", format!("{redis:?}")));
    }
    if let ShelfKind::Redis(shelf) = &source.shelf {
        facts.push(fact("shelf", format!("in Redis, in memory there and bounded by it: {shelf:?}")));
        let twice = if matches!(&source.kind, SourceKind::Redis(streams) if shelf.is_beside(streams)) {
            "one record, exactly"
        } else {
            "one record, except after a crash in between: then it may be appended twice, under one id"
        };
        facts.push(fact("a key again", twice));
    }
    if let ShelfKind::Postgres(shelf) = &source.shelf {
        let host = crate::source::postgres::shown(shelf);
        facts.push(fact("shelf", format!("{host}: what waits, what is dead, keys and revisions of the file")));
        facts.push(fact(
            "a key again",
            "one record, except after a crash in between: then it may be appended twice, under one id",
        ));
    }
    if source.kind.is_foreign() && matches!(source.shelf, ShelfKind::None) {
        let delayed = match &source.kind {
            SourceKind::Sqs(sqs) if !sqs.is_fifo() => "a write with a delay of more than 15 min",
            _ if plan.holds() => "a write with a delay of its own",
            _ => "a write with a delay",
        };
        facts.push(fact(
            "shelf",
            format!("none: {delayed} is a 501, a failing key holds what is behind it, dead letters go to the broker"),
        ));
        if matches!(source.kind, SourceKind::Sqs(_)) {
            facts.push(fact("a pause", "ends when the process does"));
        }
        facts.push(fact("a key again", "may be appended twice; the key goes on to the sink"));
    }
    facts
}

/// When a record is due.
pub(super) fn delay(plan: &Plan) -> Vec<Fact> {
    let Some(delay) = &plan.delay else {
        return vec![fact(
            "due",
            format!("at once, unless the request asks for a delay (up to {})", span(crate::delay::DEFAULT_MAX)),
        )];
    };
    let rule = match &delay.rule {
        None => "at once, unless the request asks for a delay".to_owned(),
        Some(DelayRule::Fixed(wait)) => {
            format!("{} after it was written, unless the request says otherwise", span(*wait))
        }
        Some(DelayRule::For(expression)) => format!("after so many seconds: {}", brief(expression.source())),
        Some(DelayRule::Until(expression)) => format!("at the time: {}", brief(expression.source())),
    };
    let mut facts = vec![fact("due", rule)];
    if plan.holds() {
        let whose = match plan.source.shelf {
            ShelfKind::None => "every record",
            _ => "what other programs write to the topic",
        };
        facts.push(fact(
            "held",
            format!(
                "{whose} waits in its partition, from the broker's time on: what is behind a record that is not due waits with it, other partitions go on"
            ),
        ));
    }
    if !delay.jitter.is_zero() {
        facts.push(fact("jitter", format!("up to {} more, the same for all records of a key", span(delay.jitter))));
    }
    facts.push(fact("longest", format!("{}; more is a 422", span(delay.max))));
    facts
}
