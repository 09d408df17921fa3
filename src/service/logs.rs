//! The logs under the namespaces: one embedded log for all, a log of its own for each that asks for one.
//!
//! Takes the data folder, gives each namespace its pair of [`Log`] and [`Shelf`]. The embedded log is the lock on the
//! folder: whoever comes second is told who holds it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

use super::ServiceError;
use super::moving::is_left_behind;
use crate::clock::Clock;
use crate::pipeline::plan::{Plan, ShelfKind, SourceKind, SourcePlan};
use crate::record::Namespace;
use crate::source::embedded::{Counters, Embedded, EmbeddedNamespace, NamespaceSettings, OpenError, Options};
use crate::source::foreign::open::Context;
use crate::source::foreign::store::Store;
use crate::source::foreign::{First, Foreign, Settings};
use crate::source::kafka::{self, KafkaStart};
use crate::source::memory::Memory;
use crate::source::{Log, LogError, Shelf};
use crate::source::{postgres, redis, sqs};
use crate::spec::OnFull;

/// Every log of the instance.
pub(super) struct Logs {
    embedded: Arc<Embedded>,
    memory: Mutex<BTreeMap<Namespace, Arc<Memory>>>,
    foreign: Mutex<BTreeMap<Namespace, OnBroker>>,
    clock: Clock,
    strict: bool,
}

/// A pair that others keep, and the settings that it was opened with.
struct OnBroker {
    pair: Foreign,
    settings: Address,
}

/// What a file says of its log and its shelf, to be compared.
#[derive(Clone, PartialEq, Eq)]
struct Address {
    shown: String,
    /// Of all of it, secrets too.
    digest: [u8; 32],
}

impl Address {
    fn of(source: &SourcePlan) -> Self {
        let whole = serde_json::to_vec(&(&source.kind, &source.shelf)).unwrap_or_default();
        Self { shown: format!("{:?} {:?}", source.kind, source.shelf), digest: Sha256::digest(whole).into() }
    }

    /// Why a namespace that runs on this one cannot take the other.
    fn refuses(&self, other: &Self) -> Option<&'static str> {
        match (self == other, self.shown == other.shown) {
            (true, _) => None,
            (_, true) => Some(OTHER_LOGIN),
            _ => Some(OTHER_LOG),
        }
    }
}

/// One namespace's pair.
pub(super) struct Opened {
    pub(super) log: Arc<dyn Log>,
    pub(super) shelf: Arc<dyn Shelf>,
}

fn settings(plan: &Plan) -> NamespaceSettings {
    let source = &plan.source;
    NamespaceSettings {
        retention_age: source.retention.age.0,
        retention_bytes: source.retention.size.0,
        backlog_bytes: source.backlog.size.0,
        backlog_age: source.backlog.age.0,
        drop_oldest: source.backlog.on_full == OnFull::Drop,
        key_window: source.idempotency.window.0,
        key_max: source.idempotency.max.0,
        max_record_bytes: source.limits.record.0,
    }
}

const OTHER_LOGIN: &str = "the login, or another part of the address, of the source or the shelf has changed, and a namespace that runs keeps \
                           the one that it was started with: restart walflow to use the new one";
const OTHER_LOG: &str = "the source and the shelf of a namespace that runs cannot be changed: restart walflow for another address of the same \
                         log, or use `walflow namespace move` for another log";

/// The number of a namespace that no data folder counts: the same on every instance that shares it. The upper half, so that it
/// is none of the embedded log's.
fn shared_number(name: &Namespace) -> u32 {
    let mut hash: u32 = 0x811c_9dc5;
    for byte in name.as_str().bytes() {
        hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    }
    0x0080_0000 | (hash & 0x007F_FFFF)
}

impl Logs {
    /// Opens the folder and repairs what the last stop left behind.
    pub(super) async fn open(data: &Path, clock: Clock, strict: bool) -> Result<Self, ServiceError> {
        let options = Options::new(data.to_owned(), clock.clone());
        let failed = |reason: String| ServiceError::Log { data: data.to_owned(), reason };
        let opened = tokio::task::spawn_blocking(move || Embedded::open(options)).await;
        match opened.map_err(|panic| failed(panic.to_string()))? {
            Ok(embedded) => Ok(Self { embedded, memory: Mutex::default(), foreign: Mutex::default(), clock, strict }),
            Err(error @ OpenError::Held { .. }) => Err(ServiceError::Held { reason: error.to_string() }),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// The namespaces that the logs hold.
    pub(super) fn names(&self) -> Vec<Namespace> {
        let mut names = self.embedded.namespace_names();
        names.extend(self.memory.lock().keys().cloned());
        names.extend(self.foreign.lock().keys().cloned());
        names
    }

    /// The pair of a namespace; `plan` gives its bounds, and without one it keeps those that it has.
    pub(super) async fn namespace(&self, name: &Namespace, plan: Option<&Plan>) -> Result<Opened, LogError> {
        match plan.map(|plan| (plan, &plan.source.kind)) {
            Some((plan, SourceKind::Memory)) => {
                let mut memory = self.memory.lock();
                let number = u32::try_from(memory.len() + 1).unwrap_or(u32::MAX);
                let pair = memory.entry(name.clone()).or_insert_with(|| Memory::new(number, self.clock.clone()));
                pair.remember_keys_for(plan.source.idempotency.window.0);
                return Ok(Opened { log: Arc::clone(pair) as Arc<dyn Log>, shelf: Arc::clone(pair) as Arc<dyn Shelf> });
            }
            Some((plan, kind)) if kind.is_foreign() => return self.on_broker(name, plan, false).await,
            _ => {}
        }
        if plan.is_none()
            && let Some(known) = self.foreign.lock().get(name)
        {
            return Ok(both(&known.pair));
        }
        let held = if plan.is_none() { self.embedded.held(name)? } else { None };
        let pair = match held {
            Some(held) => held,
            None => self.embedded.namespace(name, plan.map(settings).unwrap_or_default())?,
        };
        Ok(Opened { log: Arc::clone(&pair) as Arc<dyn Log>, shelf: pair })
    }

    /// What the embedded log holds of a namespace that is somewhere else by its file: nothing, or what a move has left.
    async fn leave_behind(&self, name: &Namespace, left: &EmbeddedNamespace) -> Result<(), LogError> {
        let counts = left.counts();
        let aside: u64 = counts.aside.iter().map(|(_, rows)| rows).sum();
        let dead: u64 = counts.dead.iter().map(|(_, letters, _)| letters).sum();
        let open: u64 = left.branches().iter().map(|branch| left.lag(branch).records).sum();
        if !is_left_behind(left) && open + counts.parked + aside + dead > 0 {
            return Err(LogError::Damaged(
                format!(
                    "by its file `{name}` is on another log, but the embedded log still holds {open} records without an end, {} \
                     parked, {aside} set aside and {dead} dead letters of it: put `source: {{ embedded: {{}} }}` back and use \
                     `walflow namespace move {name} --to FILE`",
                    counts.parked
                )
                .into(),
            ));
        }
        tracing::info!(ns = %name, "deleting what a move has left on the embedded log");
        self.delete_embedded(name).await
    }

    async fn on_broker(&self, name: &Namespace, plan: &Plan, moving: bool) -> Result<Opened, LogError> {
        let source = &plan.source;
        if !moving && let Some(left) = self.embedded.held(name)? {
            self.leave_behind(name, &left).await?;
        }
        let settings = Address::of(source);
        let known = self.foreign.lock().get(name).map(|known| (known.pair.clone(), known.settings == settings));
        match known {
            Some((pair, true)) => return Ok(both(&pair)),
            // Nothing runs on it, or [`Self::same_log`] would have refused: with these settings it never came so far.
            Some((pair, false)) => {
                self.foreign.lock().remove(name);
                pair.close().await;
            }
            None => {}
        }
        let number = shared_number(name);
        let context = Context {
            namespace: name.clone(),
            number,
            clock: self.clock.clone(),
            record_bytes: source.limits.record.0,
            key_window: source.idempotency.window.0,
            backlog_bytes: source.backlog.size.0,
            strict: self.strict,
        };
        let store: Option<Arc<dyn Store>> = match &source.shelf {
            ShelfKind::Own | ShelfKind::None => None,
            ShelfKind::Postgres(spec) => Some(postgres::open(spec, &context).await?),
            ShelfKind::Redis(spec) => Some(redis::shelf::open(spec, &context).await?),
        };
        let (broker, first) = match &source.kind {
            SourceKind::Kafka(spec) => {
                let first = match spec.start {
                    KafkaStart::Earliest => First::Earliest,
                    KafkaStart::Latest => First::Latest,
                    KafkaStart::Time(time) => First::Time(time),
                };
                (kafka::open(spec, &context)?, first)
            }
            SourceKind::Redis(spec) => (redis::open(spec, &context)?, First::Earliest),
            SourceKind::Sqs(spec) => (sqs::open(spec, &context)?, First::Earliest),
            SourceKind::Embedded | SourceKind::Memory => return Err(LogError::Unsupported("this log has no broker")),
        };
        let one_place_for_keys = match (&source.kind, &source.shelf) {
            (SourceKind::Redis(streams), ShelfKind::Redis(waits)) => waits.is_beside(streams),
            _ => false,
        };
        let settings_of_pair = Settings { key_window: context.key_window, number, first, one_place_for_keys };
        let pair = Foreign::new(broker, store, settings_of_pair, self.clock.clone());
        let opened = both(&pair);
        self.foreign.lock().insert(name.clone(), OnBroker { pair, settings });
        Ok(opened)
    }

    /// Refuses a plan that would have a namespace that runs change its log.
    pub(super) fn same_log(now: &Plan, next: &Plan) -> Result<(), &'static str> {
        Address::of(&now.source).refuses(&Address::of(&next.source)).map_or(Ok(()), Err)
    }

    /// The namespace on the embedded log, if that holds it.
    pub(super) fn embedded(&self, name: &Namespace) -> Result<Option<Arc<EmbeddedNamespace>>, LogError> {
        self.embedded.held(name)
    }

    /// Deletes what the embedded log holds of a namespace.
    pub(super) async fn delete_embedded(&self, name: &Namespace) -> Result<(), LogError> {
        self.embedded.delete_namespace(name).await.map(|_| ())
    }

    /// The pair of a namespace that is to move to it.
    pub(super) async fn open_pair(&self, name: &Namespace, plan: &Plan) -> Result<Foreign, LogError> {
        self.on_broker(name, plan, true).await?;
        let pair = self.foreign.lock().get(name).map(|known| known.pair.clone());
        pair.ok_or(LogError::Unsupported("the pair was closed meanwhile"))
    }

    /// Takes back a pair to which nothing has moved.
    pub(super) async fn drop_pair(&self, name: &Namespace) -> Result<(), LogError> {
        let known = self.foreign.lock().remove(name);
        let Some(known) = known else { return Ok(()) };
        let deleted = known.pair.delete().await;
        known.pair.close().await;
        deleted
    }

    /// Deletes a namespace with all that it holds.
    pub(super) async fn delete(&self, name: &Namespace) -> Result<(), LogError> {
        self.memory.lock().remove(name);
        let foreign = self.foreign.lock().remove(name);
        if let Some(foreign) = foreign {
            foreign.pair.delete().await?;
            foreign.pair.close().await;
        }
        self.embedded.delete_namespace(name).await.map(|_| ())
    }

    /// What durable means here, and what is wrong with the log.
    pub(super) fn durable(&self) -> Vec<String> {
        let health = self.embedded.health();
        let mut facts = vec!["embedded: on this machine's disk, synced before the answer".to_owned()];
        if health.disk_full {
            facts.push("the disk is full: writes are refused, reading and acking go on".to_owned());
        }
        facts.extend(health.damaged.iter().map(|damage| format!("damaged: {damage}")));
        for (name, foreign) in self.foreign.lock().iter() {
            facts.extend(foreign.pair.facts().into_iter().map(|fact| format!("{name}: {fact}")));
        }
        facts
    }

    /// What the embedded log counts.
    pub(super) fn counters(&self) -> &Counters {
        self.embedded.counters()
    }

    /// Waits until the log has failed for good; gives why.
    pub(super) async fn fenced(&self) -> String {
        self.embedded.fenced().await.to_string()
    }

    /// Makes everything durable and lets the folder go.
    pub(super) async fn close(&self) {
        self.memory.lock().values().for_each(|memory| memory.close());
        let foreign = std::mem::take(&mut *self.foreign.lock());
        futures::future::join_all(foreign.values().map(|foreign| foreign.pair.close())).await;
        self.embedded.close().await;
    }
}

fn both(pair: &Foreign) -> Opened {
    Opened { log: Arc::new(pair.clone()), shelf: Arc::new(pair.clone()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::make;
    use crate::spec::environment::Environment;
    use crate::spec::text::Text;
    use crate::spec::{Neighbours, load_text};
    use crate::transform::Compiler;

    fn plan(source: &str) -> Plan {
        let text = Text::new("a.yaml", &format!("namespace: a\nsource: {{ {source} }}\nsink: {{ stdout: {{}} }}\n"));
        let environment = Environment::default();
        let loaded = load_text(text, Neighbours::kept(BTreeMap::new()), &environment);
        let made = make(&loaded, &environment, &Compiler::new(Clock::system(), BTreeMap::new()));
        made.plan.unwrap_or_else(|| panic!("{source}: {:?}", made.diagnostics))
    }

    #[tokio::test]
    async fn what_never_ran_takes_another_login() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::open(folder.path(), Clock::system(), false).await.unwrap();
        let kafka = |password: &str| {
            let sasl = format!("{{ mechanism: plain, username: u, password: {password} }}");
            plan(&format!("kafka: {{ brokers: '127.0.0.1:1', topic: t, sasl: {sasl} }}"))
        };
        let (name, first, second) = ("a".parse().unwrap(), kafka("one"), kafka("two"));
        let digest = || logs.foreign.lock().get(&name).map(|known| known.settings.clone());
        logs.namespace(&name, Some(&first)).await.unwrap();
        assert!(digest().unwrap() == Address::of(&first.source));
        logs.namespace(&name, Some(&second)).await.unwrap();
        assert!(digest().unwrap() == Address::of(&second.source));
        logs.close().await;
    }

    #[test]
    fn another_login_is_refused_on_every_log_and_shelf() {
        let kafka =
            "kafka: { brokers: 'k:9092', topic: t, tls: true, sasl: { mechanism: plain, username: u, password: P } }";
        let sqs = "sqs: { queue: q, region: r, access_key_id: i, secret_access_key: P }";
        for source in [
            kafka,
            sqs,
            "redis: { url: 'redis://u:P@r/1' }",
            "redis: { sentinel: { urls: ['redis://s:1'], master: m, password: P } }",
            &format!("{sqs}, shelf: {{ redis: {{ url: 'redis://:P@r' }} }}"),
            &format!("{sqs}, shelf: {{ postgres: {{ url: 'postgres://u:P@p/d' }} }}"),
        ] {
            let (now, same, next) = (plan(source), plan(source), plan(&source.replacen(['P'], "canary", 1)));
            assert!(Logs::same_log(&now, &same).is_ok(), "{source}");
            let refused = Logs::same_log(&now, &next).expect_err(source);
            assert!(refused.starts_with("the login") && refused.contains("restart walflow"), "{source}: {refused}");
        }
        let other = Logs::same_log(&plan("redis: { url: 'redis://r/1' }"), &plan("memory: {}")).unwrap_err();
        assert!(other.contains("namespace move"), "{other}");
        assert!(
            Logs::same_log(&plan("redis: { url: 'redis://r/1' }"), &plan("redis: { url: 'redis://r/2' }")).is_err()
        );
        assert!(Logs::same_log(&plan("backlog: { age: 1d }"), &plan("backlog: { age: 2d }")).is_ok());
    }
}
