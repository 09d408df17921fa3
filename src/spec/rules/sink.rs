//! The rules of `sink:`: one kind, arms that can be told apart, and no two that race for one target.

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

use super::Rules;
use crate::spec::code::Code;
use crate::spec::expand::child;
use crate::spec::grammar::SINK_KINDS;
use crate::spec::sink::{ArmSpec, BatchSpec, Ordering, SinkLimitsSpec, SinkSpec};

impl Rules<'_> {
    /// The kinds that a sink or arm has.
    pub(super) fn kinds(&self, pointer: &str) -> Vec<&'static str> {
        let of = |kind: &&'static str| self.written(&child(pointer, kind)).is_some_and(|value| !value.is_null());
        SINK_KINDS.iter().copied().filter(of).collect()
    }

    fn one_kind(&mut self, what: &str, pointer: &str, kinds: &[&'static str]) {
        let known = SINK_KINDS.join(", ");
        match kinds {
            [_] => {}
            [] => self.error(
                Code::OneKind,
                pointer,
                true,
                format!("{what} needs a kind: one of {known}"),
                "write `stdout: {}`, for example",
            ),
            [_, second, ..] => {
                let message = format!("{what} is of one kind; this one is {}", kinds.join(" and "));
                self.error(
                    Code::OneKind,
                    &child(pointer, second),
                    true,
                    message,
                    "several sinks stand under `route:` or `fan_out:`, each with a name",
                );
            }
        }
    }

    pub(super) fn sink(&mut self) {
        let sink: &SinkSpec = &self.spec.sink;
        if self.written("/sink").is_none() {
            return;
        }
        let mut kinds = self.kinds("/sink");
        for several in ["route", "fan_out"] {
            if self.written(&format!("/sink/{several}")).is_some_and(|value| !value.is_null()) {
                kinds.push(several);
            }
        }
        self.one_kind("a sink", "/sink", &kinds);
        self.settings("/sink", self.spec.sink.batch.as_ref(), sink.limits.as_ref(), kinds.first().copied());
        if let Some(arms) = &sink.route {
            let mut names = HashSet::new();
            for (index, arm) in arms.iter().enumerate() {
                let here = format!("/sink/route/{index}");
                match &arm.name {
                    None => self.error(
                        Code::MissingKey,
                        &here,
                        false,
                        "an arm of a route needs a name",
                        "name: orders, for example; progress and dead letters are kept under it",
                    ),
                    Some(name) => {
                        self.name("an arm", name, &child(&here, "name"), false);
                        if !names.insert(name.clone()) {
                            self.error(
                                Code::DuplicateName,
                                &child(&here, "name"),
                                false,
                                format!("the name '{name}' is taken by an arm above"),
                                "each arm has a name of its own",
                            );
                        }
                    }
                }
                self.arm(&here, arm);
                if arm.when.is_none() && index + 1 < arms.len() {
                    self.error(
                        Code::RouteEnd,
                        &here,
                        false,
                        "this arm takes everything, so those after it take nothing",
                        "give it a `when`, or make it the last",
                    );
                }
            }
            let open = arms.last().is_none_or(|arm| arm.when.is_some());
            if arms.is_empty() {
                self.error(
                    Code::OneKind,
                    "/sink/route",
                    true,
                    "a route needs at least one arm",
                    "- { name: all, stdout: {} }",
                );
            } else if !open && sink.otherwise.is_some() {
                self.warning(
                    Code::NoEffect,
                    "/sink/otherwise",
                    "the last arm takes everything, so `otherwise` has no effect",
                    "remove it, or give the last arm a `when`",
                );
            }
        } else if sink.otherwise.is_some() {
            self.warning(
                Code::NoEffect,
                "/sink/otherwise",
                "`otherwise` only has a meaning beside `route:`",
                "remove it",
            );
        }
        if let Some(arms) = &sink.fan_out {
            if arms.is_empty() {
                self.error(
                    Code::OneKind,
                    "/sink/fan_out",
                    true,
                    "a fan_out needs at least one sink",
                    "cache: { redis: { … } }, for example",
                );
            }
            for (name, arm) in arms {
                let here = child("/sink/fan_out", name);
                self.name("a sink", name, &here, true);
                if arm.name.as_ref().is_some_and(|own| own != name) {
                    self.error(
                        Code::BadName,
                        &child(&here, "name"),
                        false,
                        "in a fan_out the key is the name",
                        "remove `name`",
                    );
                }
                self.arm(&here, arm);
            }
        }
        self.shared_targets();
    }

    fn arm(&mut self, here: &str, arm: &ArmSpec) {
        let kinds = self.kinds(here);
        self.one_kind("an arm", here, &kinds);
        self.stages(&child(here, "transform"), &arm.transform);
        self.settings(here, arm.batch.as_ref(), arm.limits.as_ref(), kinds.first().copied());
    }

    fn settings(&mut self, here: &str, batch: Option<&BatchSpec>, limits: Option<&SinkLimitsSpec>, kind: Option<&str>) {
        if let Some(limits) = limits
            && limits.burst.is_some()
            && limits.rate.is_none()
        {
            let at = child(&child(here, "limits"), "burst");
            self.warning(
                Code::NoEffect,
                &at,
                "`burst` has no effect without `rate`",
                "add rate: 500/s, for example, or remove it",
            );
        }
        if let Some(batch) = batch {
            if batch.bytes.0 == 0 {
                let at = child(&child(here, "batch"), "bytes");
                self.error(Code::OutOfRange, &at, false, "no batch fits into 0 bytes", "the default is 1MiB");
            }
            if batch.records == 1 && self.written(&format!("{here}/batch/linger")).is_some() {
                let at = child(&child(here, "batch"), "linger");
                self.warning(
                    Code::NoEffect,
                    &at,
                    "a batch of one record waits for no other",
                    "raise `records`, or remove `linger`",
                );
            }
        }
        let format = format!("{here}/http/format");
        if kind == Some("http") && batch.is_none() && self.written(&format).is_some_and(|value| !value.is_null()) {
            self.warning(
                Code::NoEffect,
                &format,
                "`format` has no effect without `batch:`",
                "without it each request carries one record's bytes",
            );
        }
    }

    /// Two arms that write one place while the order of keys is to be kept.
    fn shared_targets(&mut self) {
        let sink = &self.spec.sink;
        let route = sink
            .route
            .iter()
            .flatten()
            .enumerate()
            .map(|(index, arm)| (format!("/sink/route/{index}"), arm.name.clone().unwrap_or_default(), arm));
        let fan_out =
            sink.fan_out.iter().flatten().map(|(name, arm)| (child("/sink/fan_out", name), name.clone(), arm));
        let mut seen: BTreeMap<(&str, String), String> = BTreeMap::new();
        let mut warnings = Vec::new();
        for (pointer, name, arm) in route.chain(fan_out) {
            if arm.ordering.or(sink.ordering).unwrap_or_default() != Ordering::Key {
                continue;
            }
            let Some(kind) = self.kinds(&pointer).first().copied() else { continue };
            let address = match kind {
                "redis" => self
                    .written(&format!("{pointer}/redis/url"))
                    .filter(|url| url.is_string())
                    .or_else(|| self.written(&format!("{pointer}/redis/cluster/0"))),
                "http" | "postgres" => self.written(&format!("{pointer}/{kind}/url")),
                "file" => self.written(&format!("{pointer}/file/path")),
                _ => continue,
            };
            let Some(Value::String(address)) = address else { continue };
            if let Some(first) = seen.get(&(kind, address.clone())) {
                warnings.push((child(&pointer, kind), kind, first.clone(), name));
            } else {
                seen.insert((kind, address.clone()), name);
            }
        }
        for (pointer, kind, first, second) in warnings {
            let help = if matches!(kind, "redis" | "postgres") {
                "make it one sink with `cases`, which keeps each key's order; or say `ordering: none`"
            } else {
                "make it one sink (several operations on one target are `cases`, where the kind has them); or say `ordering: none`"
            };
            let message = format!("'{first}' and '{second}' write one target, and between them no order is kept");
            self.warning(Code::SharedTarget, &pointer, message, help);
        }
    }
}
