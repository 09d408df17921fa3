//! Redis Streams with the shelf in Redis, on the server that `WALFLOW_TEST_REDIS` names; one stream, so that there is one order.

use std::sync::Arc;

use super::shared::Shared;
use super::{KEY_WINDOW, Kind, clock};
use crate::clock::Clock;
use crate::source::foreign::open::Context;
use crate::source::foreign::{First, Foreign, Settings};
use crate::source::redis::{RedisShelfSpec, RedisSourceSpec, open, shelf};
use crate::source::{Log, Shelf};

/// One namespace, of a name that nothing else has.
pub(super) struct OnRedis {
    pair: Arc<Foreign>,
    namespace: String,
    clock: Clock,
}

impl OnRedis {
    async fn pair(namespace: String, clock: Clock) -> Self {
        let url = Some(std::env::var("WALFLOW_TEST_REDIS").expect("WALFLOW_TEST_REDIS names a Redis server"));
        let context = Context {
            namespace: namespace.parse().unwrap(),
            number: 1,
            clock: clock.clone(),
            record_bytes: 1 << 20,
            key_window: KEY_WINDOW,
            backlog_bytes: 1 << 30,
            strict: false,
        };
        let source = RedisSourceSpec { url, streams: Some(1), ..RedisSourceSpec::default() };
        let store = shelf::open(&RedisShelfSpec::default().beside(&source), &context).await.unwrap();
        let broker = open(&source, &context).unwrap();
        // What it knows of the end is of the last look.
        broker.place().await.unwrap();
        let settings = Settings { key_window: KEY_WINDOW, number: 1, first: First::Earliest, one_place_for_keys: true };
        let pair = Arc::new(Foreign::new(broker, Some(store), settings, clock.clone()));
        Self { pair, namespace, clock }
    }
}

impl Kind for OnRedis {
    async fn start() -> Self {
        Self::pair(format!("conformance-{:012x}", fastrand::u64(..) >> 16), clock()).await
    }

    async fn reopen(self) -> Self {
        self.pair.close().await;
        Self::pair(self.namespace, self.clock).await
    }

    // Keys go by themselves.
    async fn tidy(&self) {}

    async fn close(&self) {
        self.pair.close().await;
    }

    fn log(&self) -> Arc<dyn Log> {
        Arc::clone(&self.pair) as Arc<dyn Log>
    }

    fn shelf(&self) -> Arc<dyn Shelf> {
        Arc::clone(&self.pair) as Arc<dyn Shelf>
    }

    fn clock(&self) -> &Clock {
        &self.clock
    }
}

impl Shared for OnRedis {
    async fn another(&self) -> Self {
        Self::pair(self.namespace.clone(), self.clock.clone()).await
    }
}
