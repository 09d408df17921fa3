//! The rules across keys: what each key alone cannot say.
//!
//! Takes a file whose grammar was checked, adds what is wrong or worth a warning. Never opens anything; scripts,
//! schemas and the sinks' own settings are checked where the plan is made.

mod sink;

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

use super::code::Code;
use super::diagnostic::Diagnostic;
use super::expand::child;
use super::grammar::{SOURCE_KINDS, STAGE_KINDS};
use super::load::Loaded;
use super::{OnFull, PipelineSpec, SourceSpec, StageSpec};
use crate::units::ByteSize;

/// Problems that are told; a file that has more is no pipeline file.
const MOST_PROBLEMS: usize = 101;

/// The largest payload that may be allowed.
const LARGEST_RECORD: ByteSize = ByteSize(16 << 20);

/// Checks the rules between files: a namespace is one file.
pub(super) fn across(files: &mut [Loaded]) {
    let mut first: BTreeMap<String, (String, usize)> = BTreeMap::new();
    for file in files {
        let Some(namespace) = &file.namespace else { continue };
        let name = namespace.as_str().to_owned();
        let here = file.diagnostic(Code::DuplicateNamespace, "/namespace", false, "");
        if let Some((other, line)) = first.get(&name) {
            let message = format!("the namespace '{name}' is declared by two files");
            let diagnostic = Diagnostic { message, namespace: Some(name.as_str().into()), ..here };
            file.diagnostics.push(diagnostic.help(format!("the other is {other}:{line}")));
        } else {
            first.insert(name, (file.text.name().to_string(), here.line));
        }
    }
}

/// Checks the rules within one file.
pub(super) fn within(file: &mut Loaded) {
    let Some(spec) = file.spec.clone() else { return };
    let mut rules = Rules { file, spec: &spec, found: Vec::new() };
    rules.names();
    rules.source();
    rules.bounds_of_others();
    rules.delay();
    rules.stages("/transform", &spec.transform);
    rules.sink();
    rules.regions();
    rules.succession();
    let mut found = rules.found;
    file.diagnostics.append(&mut found);
}

/// True for a name of a region, sink or arm.
fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'))
}

/// True for a JSON pointer as RFC 6901 writes it.
fn is_pointer(text: &str) -> bool {
    let escapes = text.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']));
    escapes && (text.is_empty() || text.starts_with('/'))
}

struct Rules<'a> {
    file: &'a Loaded,
    spec: &'a PipelineSpec,
    found: Vec<Diagnostic>,
}

impl Rules<'_> {
    fn error(&mut self, code: Code, pointer: &str, at_key: bool, message: impl Into<String>, help: &str) {
        if self.found.len() < MOST_PROBLEMS && !self.file.is_pruned(pointer) {
            self.found.push(self.file.diagnostic(code, pointer, at_key, message).help(help));
        }
    }

    fn warning(&mut self, code: Code, pointer: &str, message: impl Into<String>, help: &str) {
        if self.found.len() < MOST_PROBLEMS && !self.file.is_pruned(pointer) {
            self.found.push(self.file.diagnostic(code, pointer, true, message).help(help).warning());
        }
    }

    fn written(&self, pointer: &str) -> Option<&Value> {
        self.file.value.pointer(pointer)
    }

    fn names(&mut self) {
        if let Some(Value::String(name)) = self.written("/namespace")
            && self.file.namespace.is_none()
        {
            let message = format!("'{name}' is no name for a namespace");
            self.error(Code::BadName, "/namespace", false, message, "1 to 63 of a-z, 0-9 and '-'");
        }
        if let Some(shard) = &self.spec.shard
            && !is_name(shard)
        {
            let message = format!("'{shard}' is no name for a shard");
            self.error(Code::BadName, "/shard", false, message, "1 to 63 of a-z, 0-9, '_' and '-'");
        }
    }

    fn name(&mut self, what: &str, name: &str, pointer: &str, at_key: bool) {
        if !is_name(name) {
            let message = format!("'{name}' is no name for {what}");
            self.error(Code::BadName, pointer, at_key, message, "1 to 63 of a-z, 0-9, '_' and '-'");
        }
    }

    fn source(&mut self) {
        let source = &self.spec.source;
        let given = |kind: &&&str| self.written(&child("/source", kind)).is_some_and(|value| !value.is_null());
        let kinds: Vec<&str> = SOURCE_KINDS.iter().filter(given).copied().collect();
        if let [_, second, ..] = kinds[..] {
            let message = format!("a source is of one kind; this one is {}", kinds.join(" and "));
            self.error(Code::OneKind, &child("/source", second), true, message, "keep one of them");
        }
        for (pointer, value) in [("/source/key", &source.key), ("/source/idempotency/from", &source.idempotency.from)] {
            if let Some(value) = value
                && !is_pointer(value)
            {
                let message = format!("'{value}' is no JSON pointer");
                self.error(
                    Code::BadPointer,
                    pointer,
                    false,
                    message,
                    &format!("did you mean '/{}'?", value.trim_start_matches("payload.").replace('.', "/")),
                );
            }
        }
        let (record, backlog) = (source.limits.record, source.backlog.size);
        if record > LARGEST_RECORD {
            self.error(
                Code::OutOfRange,
                "/source/limits/record",
                false,
                format!("{record} is too large for 'record'"),
                &format!("the most is {LARGEST_RECORD}"),
            );
        }
        if record.0 == 0 {
            self.error(
                Code::OutOfRange,
                "/source/limits/record",
                false,
                "no payload fits into 0 bytes",
                "the default is 1MiB",
            );
        }
        if backlog < record {
            let message = format!("one record of {record} is more than the backlog of {backlog}");
            self.error(
                Code::Bounds,
                "/source/backlog/size",
                false,
                message,
                "make the backlog larger than limits.record",
            );
        }
        if source.limits.in_flight < record {
            let message =
                format!("one record of {record} is more than the {} that may be in flight", source.limits.in_flight);
            self.error(
                Code::Bounds,
                "/source/limits/in_flight",
                false,
                message,
                "make in_flight larger than limits.record",
            );
        }
        let retention = source.embedded.clone().unwrap_or_default().retention;
        if retention.size < record {
            let message =
                format!("one record of {record} is more than the {} that are kept of finished records", retention.size);
            self.warning(
                Code::Bounds,
                "/source/embedded/retention/size",
                message,
                "nothing finished can be looked up; the default is 1GiB",
            );
        }
        if source.idempotency.window.0.is_zero() && self.written("/source/idempotency/from").is_some() {
            self.warning(
                Code::NoEffect,
                "/source/idempotency/from",
                "with a window of 0s no key is remembered",
                "the default window is 24h",
            );
        }
    }

    /// What others keep is bounded by them. A default for all pipelines means those where it holds.
    fn bounds_of_others(&mut self) {
        let source = &self.spec.source;
        let mut idle = Vec::new();
        match source {
            SourceSpec { kafka: Some(_), .. } => idle.push((
                "/source/backlog",
                "a topic keeps what its own settings say: this bounds nothing",
                "take it out; the bound is retention.ms",
            )),
            SourceSpec { sqs: Some(_), .. } => idle.push((
                "/source/backlog",
                "a queue keeps what its own settings say: this bounds nothing",
                "take it out; the bound is MessageRetentionPeriod",
            )),
            SourceSpec { redis: Some(_), .. } => {
                idle.push((
                    "/source/backlog/age",
                    "streams in Redis are bounded by size, not by age",
                    "take it out; the bound is backlog.size",
                ));
                if source.backlog.on_full == OnFull::Drop {
                    let message = "streams in Redis drop nothing: at the bound new writes hear 503";
                    idle.push(("/source/backlog/on_full", message, "take it out"));
                }
            }
            _ => return,
        }
        let message = "keys are kept there for their time, however many they are";
        idle.push(("/source/idempotency/max", message, "take it out; the bound is idempotency.window"));
        for (pointer, message, help) in idle {
            let own = self.file.range(pointer, true).start < self.file.text.beyond();
            if own && self.written(pointer).is_some_and(|value| !value.is_null()) {
                self.warning(Code::NoEffect, pointer, message, help);
            }
        }
    }

    fn delay(&mut self) {
        let Some(delay) = &self.spec.delay else { return };
        if delay.for_.is_some() && delay.until.is_some() {
            self.error(
                Code::DelayRule,
                "/delay/until",
                true,
                "a delay has one rule; this one has `for` and `until`",
                "keep one of them",
            );
        }
        if delay.for_.is_none() && delay.until.is_none() && delay.max.is_none() && delay.jitter.0.is_zero() {
            self.error(
                Code::DelayRule,
                "/delay",
                true,
                "a delay needs `for`, `until` or `max`",
                "for: 5s, or max: 24h where only requests delay",
            );
        }
        if let (Some(super::DelayFor::Fixed(fixed)), Some(max)) = (&delay.for_, delay.max)
            && *fixed > max
        {
            let message = format!("every record would wait {fixed}, and max allows {max}");
            self.error(Code::Bounds, "/delay/for", false, message, "raise max, or shorten the delay");
        }
    }

    fn stages(&mut self, pointer: &str, stages: &[StageSpec]) {
        for (index, stage) in stages.iter().enumerate() {
            let here = child(pointer, &index.to_string());
            let kinds: Vec<&str> = STAGE_KINDS
                .iter()
                .copied()
                .filter(|kind| self.written(&child(&here, kind)).is_some_and(|value| !value.is_null()))
                .collect();
            match kinds.as_slice() {
                [_] => {}
                [] => self.error(
                    Code::OneKind,
                    &here,
                    false,
                    "a stage needs one of filter, script and inline",
                    "write `- filter: 'payload.x == 1'`, for example",
                ),
                [_, second, ..] => {
                    let second = child(&here, second);
                    self.error(
                        Code::OneKind,
                        &second,
                        true,
                        format!("a stage is of one kind; this one is {}", kinds.join(" and ")),
                        "begin a stage of its own with '- '",
                    );
                }
            }
            if !stage.env.is_empty() && stage.filter.is_some() {
                self.warning(
                    Code::NoEffect,
                    &child(&here, "env"),
                    "a filter has no env()",
                    "use a script or inline stage",
                );
            }
        }
    }

    fn regions(&mut self) {
        let Some(replicate) = &self.spec.replicate else { return };
        if replicate.regions.is_empty() {
            self.error(
                Code::MissingKey,
                "/replicate",
                true,
                "'regions' is missing in 'replicate'",
                "regions: { us-east-1: {}, eu-west-1: {} }, for example",
            );
        }
        if let Some(origin) = &replicate.origin
            && !replicate.regions.contains_key(origin)
        {
            let message = format!("'{origin}' is none of the regions");
            let known = replicate.regions.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            self.warning(Code::NoEffect, "/replicate/origin", message, &format!("the regions are {known}"));
        }
        for (name, region) in &replicate.regions {
            let here = child("/replicate/regions", name);
            self.name("a region", name, &here, true);
            self.stages(&child(&here, "transform"), &region.transform);
        }
    }

    /// Names of the past: each taken over once, or ended.
    fn succession(&mut self) {
        let sinks: Vec<String> = {
            let sink = &self.spec.sink;
            let route = sink.route.iter().flatten().filter_map(|arm| arm.name.clone());
            let fan_out = sink.fan_out.iter().flatten().map(|(name, _)| name.clone());
            route.chain(fan_out).chain(self.kinds("/sink").iter().map(|kind| (*kind).to_owned())).collect()
        };
        let regions: Vec<String> =
            self.spec.replicate.iter().flat_map(|replicate| replicate.regions.keys().cloned()).collect();
        let mut former: Vec<(String, String, bool)> = Vec::new();
        for (index, arm) in self.spec.sink.route.iter().flatten().enumerate() {
            former.extend(arm.was.clone().map(|was| (format!("/sink/route/{index}/was"), was, true)));
        }
        for (name, arm) in self.spec.sink.fan_out.iter().flatten() {
            former.extend(arm.was.clone().map(|was| (child(&child("/sink/fan_out", name), "was"), was, true)));
        }
        for (name, region) in self.spec.replicate.iter().flat_map(|replicate| &replicate.regions) {
            former.extend(region.was.clone().map(|was| (child(&child("/replicate/regions", name), "was"), was, false)));
        }
        let mut seen = HashSet::new();
        for (pointer, was, of_sink) in former {
            let taken = if of_sink { sinks.contains(&was) } else { regions.contains(&was) };
            if taken {
                self.error(
                    Code::Succession,
                    &pointer,
                    false,
                    format!("'{was}' is still there under its own name"),
                    "`was` names one that the file no longer has",
                );
            } else if !seen.insert((was.clone(), of_sink)) {
                self.error(
                    Code::Succession,
                    &pointer,
                    false,
                    format!("'{was}' is taken over twice"),
                    "one successor goes on with its progress",
                );
            }
        }
        let branches: HashSet<String> = sinks
            .iter()
            .flat_map(|sink| {
                if regions.is_empty() {
                    vec![sink.clone()]
                } else {
                    regions.iter().map(|region| format!("{sink}@{region}")).collect()
                }
            })
            .collect();
        for name in self.spec.retired.keys() {
            if branches.contains(name) {
                self.error(
                    Code::Succession,
                    &child("/retired", name),
                    true,
                    format!("the branch '{name}' is still in the file"),
                    "`retired` ends a branch that the file no longer has",
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::environment::Environment;
    use super::super::load::{Neighbours, load_text};
    use super::super::text::Text;

    fn found(yaml: &str) -> Vec<String> {
        let file = load_text(Text::new("a.yaml", yaml), Neighbours::kept(BTreeMap::new()), &Environment::default());
        file.diagnostics.iter().map(|d| format!("{} {}", d.code, d.pointer)).collect()
    }

    #[track_caller]
    fn expect(yaml: &str, wanted: &[&str]) {
        assert_eq!(found(&format!("namespace: a\n{yaml}\n")), wanted, "{yaml}");
    }

    #[test]
    fn a_sink_an_arm_and_a_stage_are_of_one_kind() {
        expect("sink: {}", &["WF0401 /sink"]);
        expect("sink: { stdout: , file: { path: x } }", &["WF0401 /sink/file"]);
        expect("sink: { stdout: {}, fan_out: { a: { stdout: {} } } }", &["WF0401 /sink/fan_out"]);
        expect("sink: { fan_out: { a: {} } }", &["WF0401 /sink/fan_out/a"]);
        expect("sink: { stdot: {} }", &["WF0201 /sink/stdot"]);
        expect("transform: [{}]\nsink: { stdout: {} }", &["WF0401 /transform/0"]);
        expect("transform: [{ filter: 'true', inline: '1' }]\nsink: { stdout: {} }", &["WF0401 /transform/0/inline"]);
        expect("source: { embedded: {}, memory: {} }\nsink: { stdout: {} }", &["WF0401 /source/memory"]);
    }

    #[test]
    fn a_route_says_what_becomes_of_everything() {
        expect("sink: { route: [{ name: a, when: 'true', stdout: {} }] }", &[]);
        expect("sink: { route: [] }", &["WF0401 /sink/route"]);
        expect("sink: { otherwise: drop, route: [{ name: a, when: 'true', stdout: {} }] }", &[]);
        expect("sink: { otherwise: drop, route: [{ name: a, stdout: {} }] }", &["WF0413 /sink/otherwise"]);
        expect("sink: { route: [{ name: a, stdout: {} }, { name: b, stdout: {} }] }", &["WF0404 /sink/route/0"]);
        expect(
            "sink: { route: [{ name: a, when: 'true', stdout: {} }, { name: a, stdout: {} }] }",
            &["WF0403 /sink/route/1/name"],
        );
        expect("sink: { route: [{ stdout: {} }] }", &["WF0203 /sink/route/0"]);
        expect("sink: { route: [{ name: A, stdout: {} }] }", &["WF0402 /sink/route/0/name"]);
    }

    #[test]
    fn two_arms_on_one_target_are_a_warning_that_names_cases() {
        let yaml = |more: &str| {
            format!(
                "sink: {{ fan_out: {{ a: {{ redis: {{ url: 'redis://h', cases: [] }} }}, b: {{ redis: {{ url: 'redis://h', cases: [] }}{more} }} }} }}"
            )
        };
        expect(&yaml(""), &["WF0410 /sink/fan_out/b/redis"]);
        expect(&yaml(", ordering: none"), &[]);
        let cluster = yaml("").replace("url: 'redis://h'", "cluster: ['redis://h', 'redis://i']");
        expect(&cluster, &["WF0410 /sink/fan_out/b/redis"]);
    }

    #[test]
    fn bounds_that_contradict_each_other_are_named() {
        expect("source: { limits: { record: 32MiB } }\nsink: { stdout: {} }", &["WF0206 /source/limits/record"]);
        expect("source: { backlog: { size: 1KiB } }\nsink: { stdout: {} }", &["WF0411 /source/backlog/size"]);
        expect("source: { limits: { in_flight: 1KiB } }\nsink: { stdout: {} }", &["WF0411 /source/limits/in_flight"]);
        expect("delay: { for: 5h, max: 1h }\nsink: { stdout: {} }", &["WF0411 /delay/for"]);
        expect("delay: { for: 5s, until: x }\nsink: { stdout: {} }", &["WF0408 /delay/until"]);
        expect("delay: {}\nsink: { stdout: {} }", &["WF0408 /delay"]);
        expect("source: { key: payload.id }\nsink: { stdout: {} }", &["WF0412 /source/key"]);
        expect("sink: { stdout: {}, limits: { burst: 5 } }", &["WF0413 /sink/limits/burst"]);
    }

    #[test]
    fn names_of_the_past_are_taken_over_once() {
        expect("sink: { fan_out: { a: { was: b, stdout: {} }, b: { stdout: {} } } }", &["WF0409 /sink/fan_out/a/was"]);
        expect(
            "sink: { fan_out: { a: { was: c, stdout: {} }, b: { was: c, stdout: {} } } }",
            &["WF0409 /sink/fan_out/b/was"],
        );
        expect("sink: { stdout: {} }\nretired: { stdout: drop }", &["WF0409 /retired/stdout"]);
        expect(
            "replicate: { regions: { x: {} } }\nsink: { stdout: {} }\nretired: { stdout: drop, 'stdout@y': drop }",
            &[],
        );
    }
}
