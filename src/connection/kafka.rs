//! What every client of a Kafka cluster shares: addresses, TLS, who we are, and one set of connections for equal settings.

mod certificate;
mod lasting;
mod listener;

pub use self::lasting::{Lasting, let_go};
pub use self::listener::Listener;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How to reach a cluster. Stands in a `kafka:` of a source or a sink, or under `connections:`.
#[derive(Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    /// Where to begin: `host:port`, several with commas.
    pub brokers: Option<String>,
    /// Encrypts the connection. Default: off.
    pub tls: Option<TlsSpec>,
    /// Who we are.
    pub sasl: Option<SaslSpec>,
}

/// `tls:` of a Kafka connection: `true`, or the files to use.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TlsSpec {
    /// With the system's certificates, or not at all.
    On(bool),
    /// With these files.
    Files(TlsFiles),
}

/// Files of a TLS connection, each in PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TlsFiles {
    /// Certificates of those who may vouch for the brokers. Default: the system's.
    pub ca_file: Option<String>,
    /// Our own certificate.
    pub cert_file: Option<String>,
    /// Its key.
    pub key_file: Option<String>,
}

/// `sasl:` of a Kafka connection.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SaslSpec {
    /// How to say who we are.
    pub mechanism: Mechanism,
    /// The user.
    pub username: String,
    /// The password.
    pub password: String,
}

impl fmt::Debug for SaslSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SaslSpec")
            .field("mechanism", &self.mechanism)
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("brokers", &self.brokers)
            .field("tls", &self.tls)
            .field("sasl", &self.sasl)
            .finish()
    }
}

/// `sasl.mechanism:`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mechanism {
    /// PLAIN; only sensible with TLS.
    Plain,
    /// SCRAM-SHA-256.
    #[serde(rename = "scram-sha-256")]
    ScramSha256,
    /// SCRAM-SHA-512.
    #[serde(rename = "scram-sha-512")]
    ScramSha512,
}

impl Mechanism {
    const fn name(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::ScramSha256 => "SCRAM-SHA-256",
            Self::ScramSha512 => "SCRAM-SHA-512",
        }
    }
}

impl Cluster {
    /// What cannot work as written: where (relative to the map that holds these keys), what, and what would be right.
    pub fn faults(&self) -> Vec<(&'static str, String, &'static str)> {
        let mut faults = Vec::new();
        let help = "brokers: \"127.0.0.1:9092\", several with commas";
        match &self.brokers {
            None => faults.push(("/brokers", "there is no broker".to_owned(), help)),
            Some(brokers) => {
                let port = |one: &str| {
                    one.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
                };
                if let Some(wrong) = brokers.split(',').map(str::trim).find(|one| !port(one)) {
                    faults.push(("/brokers", format!("'{wrong}' is no host with a port"), help));
                }
            }
        }
        if let Some(TlsSpec::Files(files)) = &self.tls
            && files.cert_file.is_some() != files.key_file.is_some()
        {
            let message = "a client certificate needs both cert_file and key_file".to_owned();
            faults.push(("/tls", message, "give both, or neither"));
        }
        faults
    }

    /// Where it is, for logs, plans and errors.
    pub fn shown(&self) -> &str {
        self.brokers.as_deref().unwrap_or_default()
    }

    /// The settings that every client of the cluster starts from.
    pub fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.shown().replace(' ', ""));
        config.set("client.id", "walflow");
        // Reconnects by itself; quick enough that an outage of seconds is one of seconds.
        config.set("reconnect.backoff.ms", "100").set("reconnect.backoff.max.ms", "5000");
        config.set("socket.keepalive.enable", "true").set("socket.nagle.disable", "true");
        config.set("topic.metadata.refresh.interval.ms", "30000");
        config.set("allow.auto.create.topics", "false");
        config.set_log_level(RDKafkaLogLevel::Warning);
        let tls = match &self.tls {
            None | Some(TlsSpec::On(false)) => None,
            Some(TlsSpec::On(true)) => Some(TlsFiles::default()),
            Some(TlsSpec::Files(files)) => Some(files.clone()),
        };
        let protocol = match (tls.is_some(), self.sasl.is_some()) {
            (false, false) => "plaintext",
            (true, false) => "ssl",
            (false, true) => "sasl_plaintext",
            (true, true) => "sasl_ssl",
        };
        config.set("security.protocol", protocol);
        for (name, file) in tls.iter().flat_map(|files| {
            [
                ("ssl.ca.location", &files.ca_file),
                ("ssl.certificate.location", &files.cert_file),
                ("ssl.key.location", &files.key_file),
            ]
        }) {
            if let Some(file) = file {
                config.set(name, file);
            }
        }
        if let Some(sasl) = &self.sasl {
            config.set("sasl.mechanism", sasl.mechanism.name());
            config.set("sasl.username", &sasl.username).set("sasl.password", &sasl.password);
        }
        config
    }
}

/// What an error of the client means to a person.
pub fn explain(error: &KafkaError) -> String {
    use RDKafkaErrorCode as Code;
    let hint = match error.rdkafka_error_code() {
        Some(Code::UnknownTopicOrPartition | Code::UnknownTopic) => {
            "the topic does not exist: make it, or correct its name"
        }
        Some(Code::TopicAuthorizationFailed) => "this user may not use the topic: give it the right (kafka-acls)",
        Some(Code::GroupAuthorizationFailed) => {
            "this user may not use the consumer group: give it READ on it (kafka-acls)"
        }
        Some(Code::ClusterAuthorizationFailed) => "this user lacks a right on the cluster (kafka-acls)",
        Some(Code::Authentication | Code::SaslAuthenticationFailed) => {
            "the user or the password is wrong: correct `sasl`, or the user at the broker"
        }
        Some(Code::SSL) => "TLS failed: is the certificate valid, and does tls.ca_file vouch for it?",
        Some(Code::AllBrokersDown | Code::BrokerTransportFailure) => "no broker can be reached",
        Some(Code::NotEnoughReplicas | Code::NotEnoughReplicasAfterAppend) => {
            "fewer replicas are in sync than min.insync.replicas asks for"
        }
        Some(Code::MessageSizeTooLarge) => "the broker takes no message of this size (max.message.bytes)",
        _ => return error.to_string(),
    };
    format!("{hint} ({error})")
}

/// Things that are shared while anybody holds one: one for each key.
pub struct Shared<K, V>(LazyLock<Mutex<HashMap<K, Weak<V>>>>);

impl<K: std::hash::Hash + Eq, V> Shared<K, V> {
    /// Holds nothing yet.
    pub const fn new() -> Self {
        Self(LazyLock::new(|| Mutex::new(HashMap::new())))
    }

    /// The one for `key`, made if nobody holds one.
    ///
    /// # Errors
    /// What making it said.
    pub fn get<E>(&self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<Arc<V>, E> {
        let mut held = self.0.lock();
        held.retain(|_, weak| weak.strong_count() > 0);
        if let Some(known) = held.get(&key).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let fresh = Arc::new(make()?);
        held.insert(key, Arc::downgrade(&fresh));
        Ok(fresh)
    }
}

impl<K: std::hash::Hash + Eq, V> Default for Shared<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

/// How long a call for metadata, offsets or topics may take.
pub const METADATA_TIMEOUT: Duration = Duration::from_secs(10);
