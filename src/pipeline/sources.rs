//! What a file says of its log and its shelf, and what cannot be together.

use super::make::Maker;
use super::plan::{ShelfKind, SourceKind, SourcePlan};
use crate::source::foreign::open::SpecFault;
use crate::source::{kafka, postgres, redis, sqs};
use crate::spec::code::Code;
use crate::spec::{PipelineSpec, ShelfSpec, SourceSpec};

/// What a file has that names no shelf.
static NO_SHELF: ShelfSpec = ShelfSpec { embedded: None, redis: None, postgres: None };
const OWN_SHELF: &str = "the embedded log has a shelf of its own, which shares its durability";
const NO_NEED: &str = "leave the shelf out, or name a log that others keep: kafka, redis or sqs";

impl Maker<'_> {
    /// The log and the shelf as they are meant.
    pub(super) fn source(&mut self, spec: &PipelineSpec) -> SourcePlan {
        let source = &spec.source;
        let kind = match source {
            SourceSpec { kafka: Some(kafka), .. } => {
                self.source_faults("/source/kafka", kafka::check(kafka));
                SourceKind::Kafka(Box::new(kafka.clone()))
            }
            SourceSpec { redis: Some(redis), .. } => {
                self.source_faults("/source/redis", redis::check(redis));
                SourceKind::Redis(Box::new(redis.clone()))
            }
            SourceSpec { sqs: Some(sqs), .. } => {
                self.source_faults("/source/sqs", sqs::check(sqs));
                SourceKind::Sqs(Box::new(sqs.clone()))
            }
            SourceSpec { memory: Some(_), .. } => SourceKind::Memory,
            _ => SourceKind::Embedded,
        };
        let waiting = self.shelf(&kind, source.shelf.as_ref());
        SourcePlan {
            kind,
            shelf: waiting,
            retention: source.embedded.clone().unwrap_or_default().retention,
            backlog: source.backlog.clone(),
            idempotency: source.idempotency.clone(),
            limits: source.limits.clone(),
            key: source.key.as_deref().map(Into::into),
            schema: source.schema.as_deref().and_then(|path| self.schema(path)),
        }
    }

    fn shelf(&mut self, kind: &SourceKind, written: Option<&ShelfSpec>) -> ShelfKind {
        let written = written.unwrap_or(&NO_SHELF);
        if written.embedded.is_some() && kind.is_foreign() {
            let message = "the embedded shelf is that of the embedded log";
            let help = "name a database that every instance reaches: `postgres: { url: … }`";
            self.refused("/source/shelf/embedded", message, help);
        }
        if let Some(postgres) = &written.postgres {
            self.source_faults("/source/shelf/postgres", postgres::check(postgres));
            if !kind.is_foreign() {
                self.refused("/source/shelf/postgres", OWN_SHELF, NO_NEED);
            }
            return ShelfKind::Postgres(Box::new(postgres.clone()));
        }
        match (kind, &written.redis) {
            (SourceKind::Redis(source), own) => {
                // It has a shelf beside its streams unless the file names another.
                let waits = own.clone().unwrap_or_default().beside(source);
                // What is wrong with the source's own address is said there.
                if own.is_some() || redis::check(source).is_empty() {
                    self.source_faults("/source/shelf/redis", redis::check_shelf(&waits));
                }
                ShelfKind::Redis(Box::new(waits))
            }
            (kind, Some(waits)) if kind.is_foreign() => {
                self.source_faults("/source/shelf/redis", redis::check_shelf(waits));
                ShelfKind::Redis(Box::new(waits.clone()))
            }
            (_, Some(_)) => {
                self.refused("/source/shelf/redis", OWN_SHELF, NO_NEED);
                ShelfKind::Own
            }
            (kind, None) if kind.is_foreign() => ShelfKind::None,
            _ => ShelfKind::Own,
        }
    }

    /// A queue gives each message once, so it has one reader.
    pub(super) fn one_branch(&mut self, source: &SourcePlan, branches: usize) {
        if matches!(source.kind, SourceKind::Sqs(_)) && branches > 1 {
            let message = format!("a queue has one branch, and this file has {branches}: each message is given once");
            let help = "one sink in one region; or a queue and a file for each; or kafka, where every branch reads all";
            self.refused("/source/sqs", &message, help);
        }
    }

    fn source_faults(&mut self, here: &str, faults: Vec<SpecFault>) {
        for fault in faults {
            let pointer = format!("{here}{}", fault.pointer);
            if !self.loaded.is_pruned(&pointer) {
                let found = self.loaded.diagnostic(Code::SourceSetting, &pointer, false, fault.message);
                self.found.push(found.help(fault.help));
            }
        }
    }

    fn refused(&mut self, pointer: &str, message: &str, help: &str) {
        let found = self.loaded.diagnostic(Code::SourceSetting, pointer, true, message.to_owned());
        self.found.push(found.help(help.to_owned()));
    }
}
