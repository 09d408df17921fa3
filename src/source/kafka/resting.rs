//! The partitions that are paused because their readers hold enough of them, while the others go on.

use std::collections::BTreeSet;

use rdkafka::TopicPartitionList;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};

/// What the thread has paused, of one assignment.
#[derive(Default)]
pub(super) struct Resting {
    generation: u64,
    parts: BTreeSet<u16>,
}

impl Resting {
    /// Everything goes on again, by what the client was told otherwise.
    pub(super) fn forget(&mut self) {
        self.parts.clear();
    }

    /// Pauses the parts that are wanted so and lets the others go on. What cannot be done is tried again with the next call.
    pub(super) fn keep<C: ConsumerContext>(
        &mut self,
        consumer: &BaseConsumer<C>,
        topic: &str,
        generation: u64,
        wanted: BTreeSet<u16>,
    ) {
        if self.generation != generation {
            *self = Self { generation, parts: BTreeSet::new() };
        }
        let list = |parts: &BTreeSet<u16>| {
            let mut list = TopicPartitionList::new();
            for part in parts {
                list.add_partition(topic, i32::from(*part));
            }
            list
        };
        let more = &wanted - &self.parts;
        if !more.is_empty() && consumer.pause(&list(&more)).is_ok() {
            self.parts.extend(more);
        }
        let fewer = &self.parts - &wanted;
        if !fewer.is_empty() && consumer.resume(&list(&fewer)).is_ok() {
            self.parts.retain(|part| wanted.contains(part));
        }
    }
}
