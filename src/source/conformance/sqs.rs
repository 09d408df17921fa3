//! Queues on the SQS server that `WALFLOW_TEST_SQS` names, each test with one of its own: standard or FIFO, with a shelf in
//! PostgreSQL or without one.

use std::sync::Arc;

use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::QueueAttributeName as Attribute;

use super::foreign::{SETTINGS, context, postgres_shelf, server};
use super::shared::Shared;
use super::{Kind, PATIENCE, clock};
use crate::clock::Clock;
use crate::source::foreign::Foreign;
use crate::source::foreign::open::Context;
use crate::source::sqs::{self, SqsSourceSpec};
use crate::source::{Log, Shelf};

pub(super) struct OnSqs<const FIFO: bool, const SHELF: bool> {
    client: Client,
    url: String,
    context: Context,
    pair: Foreign,
}

impl<const FIFO: bool, const SHELF: bool> OnSqs<FIFO, SHELF> {
    async fn open(context: Context) -> Self {
        let spec = SqsSourceSpec {
            queue: format!("{}{}", context.namespace, if FIFO { ".fifo" } else { "" }),
            endpoint: Some(server("WALFLOW_TEST_SQS")),
            // Who has equal settings shares a connection, which ends with the runtime of the test that made it.
            access_key_id: Some(format!("suite-{:012x}", fastrand::u64(..1 << 48))),
            secret_access_key: Some("secret".to_owned()),
            ..SqsSourceSpec::default()
        };
        let client = spec.account().connection().client().await.unwrap().clone();
        let make = client.create_queue().queue_name(&spec.queue);
        let make = if FIFO { make.attributes(Attribute::FifoQueue, "true") } else { make };
        // One that is there already is the same one.
        let url = make.send().await.unwrap().queue_url.unwrap();
        let store = if SHELF { Some(postgres_shelf(&context).await) } else { None };
        let broker = sqs::open(&spec, &context).unwrap();
        let pair = Foreign::new(broker, store, SETTINGS, context.clock.clone());
        Self { client, url, context, pair }
    }
}

impl<const FIFO: bool, const SHELF: bool> Kind for OnSqs<FIFO, SHELF> {
    async fn start() -> Self {
        Self::open(context(&clock())).await
    }

    async fn reopen(self) -> Self {
        self.pair.close().await;
        Self::open(self.context).await
    }

    // The queue forgets by itself.
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

    fn places(&self) -> bool {
        false
    }

    async fn until_holds(&self, _: &Arc<dyn Log>, count: u64) {
        let mut found = None;
        let held = async {
            while found != Some(count) {
                let asked = self.client.get_queue_attributes().queue_url(&self.url).attribute_names(Attribute::All);
                let counts = asked.send().await.unwrap().attributes.unwrap();
                let of = |name: Attribute| counts[&name].parse::<u64>().unwrap();
                let hidden = of(Attribute::ApproximateNumberOfMessagesNotVisible);
                found = Some(of(Attribute::ApproximateNumberOfMessages) + hidden);
            }
        };
        let done = tokio::time::timeout(PATIENCE, held).await;
        assert!(done.is_ok(), "the queue holds {found:?} messages, not {count}");
    }
}

impl<const FIFO: bool, const SHELF: bool> Shared for OnSqs<FIFO, SHELF> {
    async fn another(&self) -> Self {
        Self::open(self.context.clone()).await
    }
}
