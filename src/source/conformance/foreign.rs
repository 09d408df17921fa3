//! Pairs of a broker and a shelf, each on a real server that many tests share: a namespace of its own for each.

use std::sync::Arc;
use std::time::Duration;

use super::shared::Shared;
use super::{KEY_WINDOW, Kind, clock};
use crate::clock::Clock;
use crate::source::foreign::open::Context;
use crate::source::foreign::store::Store;
use crate::source::foreign::testing::MemoryBroker;
use crate::source::foreign::{First, Foreign, Settings};
use crate::source::kafka::{self, KafkaSourceSpec};
use crate::source::postgres::{self, PostgresShelfSpec};
use crate::source::{Log, Shelf};
use crate::units::Span;

/// The address of a server that `tests/run` has started.
pub(super) fn server(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("{variable} names a server: run tests/run"))
}

pub(super) fn context(clock: &Clock) -> Context {
    Context {
        namespace: format!("suite-{:012x}", fastrand::u64(..1 << 48)).parse().unwrap(),
        number: 1,
        clock: clock.clone(),
        record_bytes: 1 << 20,
        key_window: KEY_WINDOW,
        backlog_bytes: 1 << 30,
        strict: false,
    }
}

pub(super) const SETTINGS: Settings =
    Settings { key_window: KEY_WINDOW, number: 1, first: First::Earliest, one_place_for_keys: false };

/// A broker in memory with a shelf in PostgreSQL.
pub(super) struct OnPostgres {
    broker: Arc<MemoryBroker>,
    context: Context,
    pair: Foreign,
}

/// A time-out that nobody else has: handles with equal settings share their connections, which end with the runtime of the
/// test that made them.
fn of_its_own() -> Span {
    Span(Duration::from_millis(10_000 + fastrand::u64(..1_000_000)))
}

pub(super) async fn postgres_shelf(context: &Context) -> Arc<dyn Store> {
    let url = Some(server("WALFLOW_TEST_POSTGRES"));
    let timeout = Some(of_its_own());
    postgres::open(&PostgresShelfSpec { url, timeout, ..PostgresShelfSpec::default() }, context).await.unwrap()
}

impl Kind for OnPostgres {
    async fn start() -> Self {
        let clock = clock();
        let (broker, context) = (MemoryBroker::new(), context(&clock));
        let store = postgres_shelf(&context).await;
        let pair = Foreign::new(Arc::clone(&broker) as _, Some(store), SETTINGS, clock);
        Self { broker, context, pair }
    }

    async fn reopen(self) -> Self {
        self.pair.close().await;
        self.broker.reopen();
        let store = postgres_shelf(&self.context).await;
        let pair = Foreign::new(Arc::clone(&self.broker) as _, Some(store), SETTINGS, self.context.clock.clone());
        Self { pair, ..self }
    }

    // It forgets by itself.
    async fn tidy(&self) {}

    async fn close(&self) {
        self.pair.close().await;
    }

    fn log(&self) -> Arc<dyn Log> {
        Arc::new(self.pair.clone())
    }

    fn shelf(&self) -> Arc<dyn Shelf> {
        Arc::new(self.pair.clone())
    }

    fn clock(&self) -> &Clock {
        &self.context.clock
    }
}

/// A topic of one partition, with a shelf in PostgreSQL or without one.
pub(super) struct OnKafka<const SHELF: bool> {
    context: Context,
    pair: Foreign,
}

impl<const SHELF: bool> OnKafka<SHELF> {
    async fn open(context: Context) -> Self {
        let spec: KafkaSourceSpec = serde_json::from_value(serde_json::json!({
            "brokers": server("WALFLOW_TEST_KAFKA"),
            "topic": context.namespace.as_str(),
            "topics": { "partitions": 1 },
        }))
        .unwrap();
        let store = if SHELF { Some(postgres_shelf(&context).await) } else { None };
        let broker = kafka::open(&spec, &context).unwrap();
        let pair = Foreign::new(broker, store, SETTINGS, context.clock.clone());
        Self { context, pair }
    }
}

impl<const SHELF: bool> Kind for OnKafka<SHELF> {
    async fn start() -> Self {
        Self::open(context(&clock())).await
    }

    async fn reopen(self) -> Self {
        self.pair.close().await;
        Self::open(self.context).await
    }

    // The topic forgets by itself.
    async fn tidy(&self) {}

    async fn close(&self) {
        self.pair.close().await;
    }

    fn log(&self) -> Arc<dyn Log> {
        Arc::new(self.pair.clone())
    }

    fn shelf(&self) -> Arc<dyn Shelf> {
        Arc::new(self.pair.clone())
    }

    fn clock(&self) -> &Clock {
        &self.context.clock
    }
}

impl<const SHELF: bool> Shared for OnKafka<SHELF> {
    async fn another(&self) -> Self {
        Self::open(self.context.clone()).await
    }
}
