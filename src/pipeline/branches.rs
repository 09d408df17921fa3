//! The branches of a plan: regions × sinks, each with its settings after the regions' overrides.
//!
//! Takes the file's spec and value, gives a plan for each branch. Reports an override that does not fit at the
//! override's own place. Opens nothing.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::make::Maker;
use super::plan::{BatchPlan, BranchPlan};
use crate::retry::Retry;
use crate::sink::{self, Kind};
use crate::source::BranchName;
use crate::spec::check::{Checked, check};
use crate::spec::code::Code;
use crate::spec::expand::child;
use crate::spec::grammar::{self, SINK_KINDS};
use crate::spec::sink::{ArmSpec, BatchSpec, SinkSpec};
use crate::spec::{PipelineSpec, RegionSpec};
use crate::transform::{Predicate, Transform};

/// Makes the branches of one file.
pub(super) struct Branches<'a, 'b> {
    pub(super) maker: &'a mut Maker<'b>,
    pub(super) spec: &'a PipelineSpec,
}

/// One sink of the file: the only one, or an arm.
struct SinkHere {
    pointer: String,
    name: String,
    kind: &'static str,
    arm: ArmSpec,
    number: usize,
    transform: Transform,
    cases: Vec<Option<Predicate>>,
}

/// One region of the file, or the unnamed one.
struct RegionHere<'a> {
    name: Option<&'a str>,
    spec: Option<&'a RegionSpec>,
    transform: Transform,
}

impl Branches<'_, '_> {
    pub(super) fn make(mut self) -> Vec<BranchPlan> {
        let spec = self.spec;
        let sinks = self.sinks();
        let mut regions = Vec::new();
        match &spec.replicate {
            None => regions.push(RegionHere { name: None, spec: None, transform: Transform::default() }),
            Some(replicate) => {
                for (name, region) in &replicate.regions {
                    let pointer = child(&child("/replicate/regions", name), "transform");
                    let transform = self.maker.stages(&pointer, &region.transform);
                    regions.push(RegionHere { name: Some(name), spec: Some(region), transform });
                    self.names_of_overrides(name, &sinks);
                }
            }
        }
        let mut branches = Vec::new();
        for sink in &sinks {
            for region in &regions {
                branches.extend(self.branch(sink, region));
            }
        }
        branches
    }

    fn kind_at(&self, pointer: &str) -> Option<&'static str> {
        let is = |kind: &&&'static str| {
            self.maker.loaded.value.pointer(&child(pointer, kind)).is_some_and(|value| !value.is_null())
        };
        SINK_KINDS.iter().find(is).copied()
    }

    fn sinks(&mut self) -> Vec<SinkHere> {
        let spec = self.spec;
        let mut written: Vec<(String, Option<String>, ArmSpec)> = Vec::new();
        if let Some(arms) = &spec.sink.route {
            for (index, arm) in arms.iter().enumerate() {
                let name = arm.name.clone().unwrap_or_default();
                written.push((format!("/sink/route/{index}"), Some(name), inherit(arm, &spec.sink)));
            }
        } else if let Some(arms) = &spec.sink.fan_out {
            for (name, arm) in arms {
                written.push((child("/sink/fan_out", name), Some(name.clone()), inherit(arm, &spec.sink)));
            }
        } else {
            written.push(("/sink".to_owned(), None, as_arm(&spec.sink)));
        }
        let mut sinks = Vec::new();
        for (number, (pointer, name, arm)) in written.into_iter().enumerate() {
            let Some(kind) = self.kind_at(&pointer) else { continue };
            let transform = self.maker.stages(&child(&pointer, "transform"), &arm.transform);
            let cases = self.cases(&pointer, &arm);
            let name = name.unwrap_or_else(|| kind.to_owned());
            sinks.push(SinkHere { pointer, name, kind, arm, number, transform, cases });
        }
        sinks
    }

    fn cases(&mut self, pointer: &str, arm: &ArmSpec) -> Vec<Option<Predicate>> {
        let (kind, conditions): (_, Vec<Option<&str>>) = match (&arm.redis, &arm.postgres) {
            (Some(redis), _) => ("redis", redis.cases.iter().map(|case| case.when.as_deref()).collect()),
            (_, Some(postgres)) => ("postgres", postgres.cases.iter().map(|case| case.when.as_deref()).collect()),
            _ => return Vec::new(),
        };
        let compiled = conditions.into_iter().enumerate().map(|(index, when)| {
            let here = format!("{pointer}/{kind}/cases/{index}/when");
            when.and_then(|text| self.maker.predicate(&here, text))
        });
        compiled.collect()
    }

    /// With several sinks a region's map is keyed by their names.
    fn names_of_overrides(&mut self, region: &str, sinks: &[SinkHere]) {
        if self.spec.sink.route.is_none() && self.spec.sink.fan_out.is_none() {
            return;
        }
        let pointer = child("/replicate/regions", region);
        let loaded = self.maker.loaded;
        let Some(Value::Object(map)) = loaded.value.pointer(&pointer) else { return };
        for (key, value) in map.iter().filter(|(key, _)| !matches!(key.as_str(), "transform" | "was")) {
            let here = child(&pointer, key);
            if !sinks.iter().any(|sink| sink.name == *key) {
                let names: Vec<&str> = sinks.iter().map(|sink| sink.name.as_str()).collect();
                let found =
                    loaded.diagnostic(Code::BadOverride, &here, true, format!("'{key}' is the name of no sink"));
                let help = crate::spec::check::nearest(key, names.iter().copied()).map_or_else(
                    || format!("the sinks are {}", names.join(", ")),
                    |near| format!("did you mean '{near}'?"),
                );
                self.maker.found.push(found.help(help));
            } else if !value.is_object() {
                let found =
                    loaded.diagnostic(Code::BadOverride, &here, true, format!("'{key}' needs the fields to override"));
                self.maker.found.push(found.help("write a map, for example { url: … }"));
            }
        }
    }

    /// The pointer of a region's overrides for a sink, and the overrides.
    fn overrides(&self, sink: &SinkHere, region: Option<&str>) -> (String, Map<String, Value>) {
        let Some(region) = region else { return (String::new(), Map::new()) };
        let mut pointer = child("/replicate/regions", region);
        if sink.pointer != "/sink" {
            pointer = child(&pointer, &sink.name);
        }
        let value = self.maker.loaded.value.pointer(&pointer).and_then(Value::as_object);
        let mut map = value.cloned().unwrap_or_default();
        if sink.pointer == "/sink" {
            map.shift_remove("transform");
            map.shift_remove("was");
        }
        (pointer, map)
    }

    /// The settings of a sink's kind in a region.
    fn settings(&mut self, sink: &SinkHere, region: Option<&str>) -> Option<(String, Value)> {
        let loaded = self.maker.loaded;
        let base = loaded.value.pointer(&child(&sink.pointer, sink.kind)).cloned().unwrap_or(Value::Null);
        let (pointer, mut overrides) = self.overrides(sink, region);
        let mut fits = true;
        if let Some(word) = overrides.keys().find(|key| SINK_KINDS.contains(&key.as_str())).cloned() {
            let message = format!("'{word}' does not stand in a region");
            let found = loaded.diagnostic(Code::BadOverride, &child(&pointer, &word), true, message);
            let help = format!("a region holds the fields of '{}' directly", sink.kind);
            self.maker.found.push(found.help(help));
            overrides.shift_remove(&word);
            fits = false;
        }
        let mut overrides = Value::Object(overrides);
        let mut checked = Checked::default();
        check(grammar::kind(sink.kind), &mut overrides, &pointer, false, &mut checked);
        for finding in &checked.findings {
            fits = false;
            // Of what could not be expanded the file has heard.
            if loaded.is_pruned(&finding.pointer) {
                continue;
            }
            let mut found = loaded.diagnostic(finding.code, &finding.pointer, finding.at_key, finding.message.clone());
            found.help.clone_from(&finding.help);
            self.maker.found.push(found);
        }
        let mut merged = base;
        merge(&mut merged, overrides);
        let mut checked = Checked::default();
        let here = child(&sink.pointer, sink.kind);
        check(grammar::kind(sink.kind), &mut merged, &here, true, &mut checked);
        let address = match sink.kind {
            "http" | "redis" | "postgres" => Some("url"),
            "file" => Some("path"),
            "kafka" => Some("brokers"),
            "sqs" => Some("queue"),
            _ => None,
        };
        if let Some(address) = address
            && !merged.get(address).is_some_and(Value::is_string)
            && merged.get("cluster").and_then(Value::as_array).is_none_or(Vec::is_empty)
            && ![address, "cluster"].iter().any(|field| loaded.is_pruned(&child(&here, field)))
        {
            fits = false;
            let where_to = region.map_or(String::new(), |region| format!(" in the region {region}"));
            let message = format!("'{}' has no {address}{where_to}", sink.name);
            let help = if region.is_some() {
                format!("give '{address}' under '{}', or for each region", sink.kind)
            } else {
                format!("give '{address}' under '{}'", sink.kind)
            };
            let found = loaded.diagnostic(Code::MissingAddress, &here, true, message);
            self.maker.found.push(found.help(help));
        }
        fits.then_some((pointer, merged))
    }

    fn kind(&mut self, sink: &SinkHere, region: Option<&str>) -> Option<Kind> {
        let (over, settings) = self.settings(sink, region)?;
        let here = child(&sink.pointer, sink.kind);
        let kind = match sink.kind {
            "stdout" => Kind::Stdout(self.read(settings, &here)?),
            "file" => Kind::File(self.read(settings, &here)?),
            "http" => Kind::Http { spec: self.read(settings, &here)?, batched: sink.arm.batch.is_some() },
            "postgres" => Kind::Postgres(self.read(settings, &here)?),
            "kafka" => Kind::Kafka(self.read(settings, &here)?),
            "sqs" => Kind::Sqs(self.read(settings, &here)?),
            _ => Kind::Redis(self.read(settings, &here)?),
        };
        self.faults(&kind, &over, &here);
        Some(kind)
    }

    /// What the sink's own check says, at the override's place where the region gave the field.
    fn faults(&mut self, kind: &Kind, over: &str, here: &str) {
        let loaded = self.maker.loaded;
        for fault in sink::check(kind) {
            let field = fault.pointer.split('/').nth(1).unwrap_or_default();
            let overridden = !over.is_empty() && loaded.value.pointer(&format!("{over}/{field}")).is_some();
            let pointer = format!("{}{}", if overridden { over } else { here }, fault.pointer);
            // An address may stand in either.
            let other_address =
                field == "url" && [over, here].iter().any(|place| loaded.is_pruned(&child(place, "cluster")));
            if !loaded.is_pruned(&pointer) && !other_address {
                let found = loaded.diagnostic(Code::SinkSetting, &pointer, false, fault.message);
                self.maker.found.push(found.help(fault.help));
            }
        }
    }

    fn read<T: DeserializeOwned>(&mut self, settings: Value, pointer: &str) -> Option<T> {
        match serde_json::from_value(settings) {
            Ok(spec) => Some(spec),
            Err(error) => {
                if !self.maker.loaded.is_pruned(pointer) {
                    let found = self.maker.loaded.diagnostic(Code::Refused, pointer, true, error.to_string());
                    self.maker.found.push(found);
                }
                None
            }
        }
    }

    fn branch(&mut self, sink: &SinkHere, region: &RegionHere<'_>) -> Option<BranchPlan> {
        let kind = self.kind(sink, region.name)?;
        let arm = &sink.arm;
        if let Some(also) = arm.dead_letters.as_ref().and_then(|letters| letters.also.as_ref()) {
            let own = format!("{}/dead_letters", sink.pointer);
            let set_here = self.maker.loaded.value.pointer(&own).is_some();
            let here = format!("{}/also/file", if set_here { own.as_str() } else { "/sink/dead_letters" });
            self.faults(&Kind::File(also.file.clone()), "", &here);
        }
        let limits = arm.limits.clone().unwrap_or_default();
        let http = sink.kind == "http";
        let schedule = sink::retry_default(&kind);
        let batch = arm.batch.clone().unwrap_or_else(|| BatchSpec {
            records: if http { 1 } else { BatchSpec::default().records },
            ..BatchSpec::default()
        });
        let was_region = region.spec.and_then(|region| region.was.as_deref());
        let was = (arm.was.is_some() || was_region.is_some())
            .then(|| BranchName::new(arm.was.as_deref().unwrap_or(&sink.name), was_region.or(region.name)));
        let target = arm.target.unwrap_or_else(|| sink::target_kind(&kind));
        Some(BranchPlan {
            name: BranchName::new(&sink.name, region.name),
            sink: sink.name.as_str().into(),
            region: region.name.map(Into::into),
            was,
            arm: sink.number,
            transforms: [region.transform.clone(), sink.transform.clone()],
            kind,
            cases: sink.cases.clone(),
            target,
            rate: limits
                .rate
                .map(|rate| (rate.per_second(), limits.burst.unwrap_or_else(|| one_second(rate.per_second())))),
            concurrency: limits.concurrency as usize,
            batch: BatchPlan {
                records: batch.records as usize,
                bytes: usize::try_from(batch.bytes.0).unwrap_or(usize::MAX),
                linger: batch.linger.0,
            },
            retry: Retry::plan(&arm.retry.clone().unwrap_or_default(), &schedule),
            ordering: arm.ordering.unwrap_or_default(),
            dead_letters: arm.dead_letters.clone().unwrap_or_default(),
            start: arm.start,
        })
    }
}

/// One second's worth of a rate, at least one.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to what fits")]
fn one_second(rate: f64) -> u32 {
    rate.ceil().clamp(1.0, f64::from(u32::MAX)) as u32
}

/// The only sink as an arm.
fn as_arm(sink: &SinkSpec) -> ArmSpec {
    ArmSpec {
        stdout: sink.stdout.clone(),
        file: sink.file.clone(),
        http: sink.http.clone(),
        redis: sink.redis.clone(),
        postgres: sink.postgres.clone(),
        kafka: sink.kafka.clone(),
        sqs: sink.sqs.clone(),
        target: sink.target,
        limits: sink.limits.clone(),
        batch: sink.batch.clone(),
        retry: sink.retry.clone(),
        ordering: sink.ordering,
        dead_letters: sink.dead_letters.clone(),
        ..ArmSpec::default()
    }
}

/// An arm with what the sink says for all of its arms.
fn inherit(arm: &ArmSpec, sink: &SinkSpec) -> ArmSpec {
    ArmSpec {
        target: arm.target.or(sink.target),
        limits: arm.limits.clone().or_else(|| sink.limits.clone()),
        batch: arm.batch.clone().or_else(|| sink.batch.clone()),
        retry: arm.retry.clone().or_else(|| sink.retry.clone()),
        ordering: arm.ordering.or(sink.ordering),
        dead_letters: arm.dead_letters.clone().or_else(|| sink.dead_letters.clone()),
        ..arm.clone()
    }
}

/// Puts the fields of one map over those of another, maps within maps too; lists replace.
fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}
