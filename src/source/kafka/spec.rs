//! `source.kafka:` as it is written: its grammar, what cannot work in it, and what a probe finds.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::topic::{self, TopicFacts};
use crate::clock::Timestamp;
use crate::connection::kafka::{Cluster, SaslSpec, TlsSpec, explain};
use crate::connection::probe::Probed;
use crate::source::foreign::open::SpecFault;

/// `source.kafka:` — a topic; made at the start unless `topics.create` is false.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KafkaSourceSpec {
    /// Where to begin: `host:port`, several with commas.
    pub brokers: Option<String>,
    /// Encrypts the connection. Default: off.
    pub tls: Option<TlsSpec>,
    /// Who we are.
    pub sasl: Option<SaslSpec>,
    /// The topic. Other programs may write to it too.
    pub topic: String,
    /// How the topic is made when it is not there.
    pub topics: TopicsSpec,
    /// Where the first branches begin in a topic that was there before: `earliest`, `latest`, or a time such as
    /// `2026-11-24T08:00:00Z`, in each partition at the first record so late. Default: earliest.
    pub start: KafkaStart,
    /// The consumer groups are called `PREFIX.NAMESPACE.BRANCH`. Default: walflow.
    pub group_prefix: Option<String>,
    /// Where dead letters go when there is no shelf. Default: the topic's name and `.dead-letters`.
    pub dead_letters: Option<String>,
}

/// `source.kafka.topics:`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TopicsSpec {
    /// Makes topics that are not there. Default: true.
    pub create: bool,
    /// Partitions of a topic that is made: how many processes may share it. Default: 4.
    pub partitions: u16,
    /// Replicas of a topic that is made. Default: 3, or as many as there are brokers.
    pub replicas: Option<u16>,
}

impl Default for TopicsSpec {
    fn default() -> Self {
        Self { create: true, partitions: 4, replicas: None }
    }
}

/// `source.kafka.start:` — `earliest`, `latest`, or a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KafkaStart {
    /// At the oldest record that the topic keeps.
    #[default]
    Earliest,
    /// With what comes after the start.
    Latest,
    /// In each partition at the first record that is as late; where none is, at the end.
    Time(Timestamp),
}

/// A text is no `start`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not earliest, latest or a time such as 2026-11-24T08:00:00Z")]
pub struct NotAStart(String);

impl FromStr for KafkaStart {
    type Err = NotAStart;

    fn from_str(text: &str) -> Result<Self, NotAStart> {
        match text {
            "earliest" => Ok(Self::Earliest),
            "latest" => Ok(Self::Latest),
            time => time.parse().map(Self::Time).map_err(|_| NotAStart(time.to_owned())),
        }
    }
}

impl fmt::Display for KafkaStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Earliest => f.write_str("earliest"),
            Self::Latest => f.write_str("latest"),
            Self::Time(time) => time.fmt(f),
        }
    }
}

impl Serialize for KafkaStart {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KafkaStart {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for KafkaStart {
    fn schema_name() -> Cow<'static, str> {
        "KafkaStart".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // A reference to the environment may stand wherever a value does.
        json_schema!({
            "description": "earliest, latest, or a time such as 2026-11-24T08:00:00Z",
            "anyOf": [
                { "type": "string", "enum": ["earliest", "latest"] },
                { "type": "string", "format": "date-time" },
                { "type": "string", "pattern": "\\$\\{.+\\}" },
            ],
        })
    }
}

impl KafkaSourceSpec {
    /// The cluster of the topic.
    pub fn cluster(&self) -> Cluster {
        Cluster { brokers: self.brokers.clone(), tls: self.tls.clone(), sasl: self.sasl.clone() }
    }

    fn prefix(&self) -> &str {
        self.group_prefix.as_deref().unwrap_or("walflow")
    }

    pub(super) fn dead_topic(&self) -> String {
        self.dead_letters.clone().unwrap_or_else(|| format!("{}.dead-letters", self.topic))
    }

    /// The consumer group of a branch.
    pub fn group(&self, namespace: &str, branch: &str) -> String {
        format!("{}.{namespace}.{branch}", self.prefix())
    }

    /// What somebody with the rights has to run where walflow may not make the topic.
    pub fn commands(&self, namespace: &str, branches: &[&str]) -> Vec<String> {
        let at = format!("--bootstrap-server {}", self.brokers.as_deref().unwrap_or_default());
        let replicas = self.topics.replicas.unwrap_or(3);
        let mut commands = vec![format!(
            "kafka-topics {at} --create --topic {} --partitions {} --replication-factor {replicas} --config min.insync.replicas={}",
            self.topic,
            self.topics.partitions,
            if replicas >= 3 { 2 } else { 1 }
        )];
        if let Some(sasl) = &self.sasl {
            let who = format!("--allow-principal User:{}", sasl.username);
            commands.push(format!(
                "kafka-acls {at} --add {who} --operation Read --operation Write --operation Describe --topic {}",
                self.topic
            ));
            for branch in branches {
                commands.push(format!(
                    "kafka-acls {at} --add {who} --operation Read --group {}",
                    self.group(namespace, branch)
                ));
            }
            commands.push(format!("kafka-acls {at} --add {who} --operation IdempotentWrite --cluster"));
        }
        commands
    }
}

/// What cannot work in a `kafka:`.
pub fn check(spec: &KafkaSourceSpec) -> Vec<SpecFault> {
    let mut faults: Vec<SpecFault> = spec
        .cluster()
        .faults()
        .into_iter()
        .map(|(pointer, message, help)| SpecFault::new(pointer, message, help))
        .collect();
    for (pointer, name) in [("/topic", Some(&spec.topic)), ("/dead_letters", spec.dead_letters.as_ref())] {
        let Some(name) = name else { continue };
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || name.len() > 249 || !name.chars().all(legal) || name == "." || name == ".." {
            let message = if name.is_empty() {
                "there is no topic".to_owned()
            } else {
                format!("'{name}' is no name for a topic")
            };
            faults.push(SpecFault::new(pointer, message, "1 to 249 of a-z, A-Z, 0-9, '.', '_' and '-'"));
        }
    }
    if spec.topics.partitions == 0 {
        faults.push(SpecFault::new("/topics/partitions", "a topic has at least one partition", "4, for example"));
    }
    faults
}

/// Looks whether the topic can be used as it is; makes nothing.
pub async fn probe(spec: &KafkaSourceSpec, namespace: &str, branches: &[String]) -> Vec<Probed> {
    let (spec, groups) =
        (spec.clone(), branches.iter().map(|branch| spec.group(namespace, branch)).collect::<Vec<_>>());
    let what = format!("Kafka topic {} at {}", spec.topic, spec.cluster().shown());
    let (cluster, topic) = (spec.cluster(), spec.topic.clone());
    let names: Vec<&str> = branches.iter().map(String::as_str).collect();
    let commands = spec.commands(namespace, &names).join("\n        ");
    let looked = tokio::task::spawn_blocking(move || -> Result<_, String> {
        let client = topic::observer(&cluster).map_err(|error| explain(&error))?;
        let facts = topic::look(&client, &topic).map_err(|error| topic::told(&client, &error))?;
        let wrong = match &facts {
            Some(facts) => topic::group_faults(&cluster, &topic, &facts.partitions, &groups),
            None => Vec::new(),
        };
        Ok((facts, wrong))
    })
    .await;
    match looked {
        Err(error) => vec![Probed::wrong(what, error.to_string())],
        Ok(Err(why)) => vec![Probed::wrong(what, why)],
        Ok(Ok((None, _))) if spec.topics.create => vec![Probed::fine(what, "it is not there and will be made")],
        Ok(Ok((None, _))) => {
            vec![Probed::wrong(what, format!("it does not exist; somebody with the rights runs:\n        {commands}"))]
        }
        Ok(Ok((Some(facts), wrong))) => {
            let facts = TopicFacts { settings: topic::settings(&spec.cluster(), &spec.topic).await, ..facts };
            let weak = facts.weaknesses();
            let found =
                if weak.is_empty() { facts.note() } else { format!("{}; weak: {}", facts.note(), weak.join("; ")) };
            std::iter::once(Probed::fine(what, found)).chain(wrong).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_work_are_told_with_their_place() {
        let spec = |text: &str| check(&serde_yaml::from_str(text).unwrap());
        let places = |text: &str| spec(text).into_iter().map(|fault| fault.pointer).collect::<Vec<_>>();
        assert_eq!(places("{ brokers: \"a:9092, b:9092\", topic: orders }"), [] as [&str; 0]);
        assert_eq!(places("{ topic: orders }"), ["/brokers"]);
        assert_eq!(places("{ brokers: a, topic: \"or ders\" }"), ["/brokers", "/topic"]);
        assert_eq!(places("{ brokers: \"a:1\", topic: t, topics: { partitions: 0 } }"), ["/topics/partitions"]);
        assert_eq!(places("{ brokers: \"a:1\", topic: t, tls: { cert_file: x } }"), ["/tls"]);
    }

    #[test]
    fn a_start_is_a_word_or_a_time() {
        let start = |text: &str| text.parse::<KafkaStart>().map_err(|error| error.to_string());
        assert_eq!(start("latest"), Ok(KafkaStart::Latest));
        let time = Timestamp::from_millis(1_764_000_000_000);
        assert_eq!(start("2025-11-24T17:00:00+01:00"), Ok(KafkaStart::Time(time)));
        assert_eq!(start(&KafkaStart::Time(time).to_string()), Ok(KafkaStart::Time(time)));
        assert_eq!(start("yesterday").unwrap_err(), NotAStart("yesterday".to_owned()).to_string());
    }

    #[test]
    fn who_may_not_make_topics_hears_what_to_run() {
        let text =
            "{ brokers: \"a:9092\", topic: orders, sasl: { mechanism: plain, username: wal, password: geheim } }";
        let spec: KafkaSourceSpec = serde_yaml::from_str(text).unwrap();
        let commands = spec.commands("orders", &["sink@eu"]).join("\n");
        assert!(
            commands.contains("kafka-topics --bootstrap-server a:9092 --create --topic orders --partitions 4"),
            "{commands}"
        );
        assert!(commands.contains("--operation Read --group walflow.orders.sink@eu"), "{commands}");
        assert!(!format!("{commands} {spec:?}").contains("geheim"), "{spec:?}");
    }
}
