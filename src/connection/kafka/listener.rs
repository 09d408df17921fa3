//! What a client last said of its connections, as one line for a person: what is wrong, where, and what to do.
//!
//! The client itself says only that no broker can be reached; why stands in the text of an error that came before. What TLS
//! refused even that text does not tell, so a connection of our own asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use rdkafka::client::ClientContext;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use super::{Cluster, certificate, explain};

/// Hears what one client, or several of a cluster, say. Cheap to clone.
#[derive(Clone)]
pub struct Listener(Arc<Heard>);

struct Heard {
    cluster: Cluster,
    trouble: Mutex<Option<Trouble>>,
    /// A question about a certificate is under way.
    asking: AtomicBool,
}

#[derive(Clone)]
struct Trouble {
    since: Instant,
    code: RDKafkaErrorCode,
    why: Arc<str>,
}

impl Listener {
    /// Has heard nothing yet.
    pub fn new(cluster: &Cluster) -> Self {
        let (trouble, asking) = (Mutex::default(), AtomicBool::default());
        Self(Arc::new(Heard { cluster: cluster.clone(), trouble, asking }))
    }

    /// Why the cluster cannot be used, if that is known.
    pub fn trouble(&self) -> Option<Arc<str>> {
        self.0.trouble.lock().as_ref().map(|trouble| Arc::clone(&trouble.why))
    }

    /// The same, with the time when it was last heard.
    pub fn heard(&self) -> Option<(Instant, Arc<str>)> {
        self.0.trouble.lock().as_ref().map(|trouble| (trouble.since, Arc::clone(&trouble.why)))
    }

    /// Whether it is one that a client made anew may not have: its files are read when it is made.
    pub fn is_about_files(&self) -> bool {
        self.0.trouble.lock().as_ref().is_some_and(|trouble| trouble.code == RDKafkaErrorCode::SSL)
    }

    /// The cluster answers.
    pub fn clear(&self) {
        *self.0.trouble.lock() = None;
    }

    /// What an error of a call means; that no broker can be reached has a reason that was heard before.
    pub fn explain(&self, error: &KafkaError) -> String {
        use RDKafkaErrorCode as Code;
        let silent = matches!(
            error.rdkafka_error_code(),
            Some(
                Code::AllBrokersDown
                    | Code::BrokerTransportFailure
                    | Code::MessageTimedOut
                    | Code::OperationTimedOut
                    | Code::RequestTimedOut
            )
        );
        let heard = if silent { self.trouble() } else { None };
        heard.map_or_else(|| explain(error), |heard| heard.to_string())
    }

    /// A client says something.
    pub fn hear(&self, error: &KafkaError, reason: &str) {
        use RDKafkaErrorCode as Code;
        let Some(code) = error.rdkafka_error_code() else { return };
        let mut trouble = self.0.trouble.lock();
        let known = trouble.as_ref().map(|trouble| trouble.code);
        let says = match code {
            Code::Authentication | Code::SSL => true,
            // Of what is known already it is the consequence.
            Code::AllBrokersDown => known.is_none(),
            // One broker of several is no trouble; where there is one it may have changed.
            Code::BrokerTransportFailure | Code::Resolve => known.is_some(),
            _ => false,
        };
        if let Some(trouble) = trouble.as_mut().filter(|trouble| !says || trouble.code == code) {
            trouble.since = Instant::now();
        }
        if !says || known == Some(code) {
            return;
        }
        let why: Arc<str> = if code == Code::SSL {
            format!("TLS failed at {}: {}", self.0.cluster.shown(), without_place(reason)).into()
        } else {
            explain(error).into()
        };
        tracing::warn!(brokers = self.0.cluster.shown(), %why, reason, "the Kafka cluster cannot be reached");
        *trouble = Some(Trouble { since: Instant::now(), code, why });
        drop(trouble);
        if code == Code::SSL && !self.0.asking.swap(true, Ordering::AcqRel) {
            let listener = self.clone();
            let ask = move || {
                listener.ask();
                listener.0.asking.store(false, Ordering::Release);
            };
            // Without it the client's own words stay.
            let _ = std::thread::Builder::new().name("kafka-tls".to_owned()).spawn(ask);
        }
    }

    /// Looks for itself what TLS refuses. Blocks, with a bound.
    pub fn ask(&self) {
        let Some(found) = certificate::fault(&self.0.cluster) else { return };
        if let Some(trouble) = self.0.trouble.lock().as_mut().filter(|trouble| trouble.code == RDKafkaErrorCode::SSL) {
            trouble.why = found.into();
        }
    }
}

/// The words after the client's own name of the connection: `ssl://host:port/bootstrap: `.
fn without_place(reason: &str) -> &str {
    reason.split_once(": ").filter(|(place, _)| place.contains("://")).map_or(reason, |(_, words)| words)
}

impl ClientContext for Listener {
    fn error(&self, error: KafkaError, reason: &str) {
        self.hear(&error, reason);
    }
}

impl ConsumerContext for Listener {}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(codes: &[RDKafkaErrorCode]) -> Option<Arc<str>> {
        let listener = Listener::new(&Cluster { brokers: Some("127.0.0.1:1".to_owned()), ..Cluster::default() });
        codes.iter().for_each(|code| listener.hear(&KafkaError::Global(*code), "why"));
        listener.trouble()
    }

    #[test]
    fn what_is_wrong_is_not_hidden_by_what_follows_from_it() {
        use RDKafkaErrorCode as Code;
        let wrong = told(&[Code::Authentication, Code::AllBrokersDown]).unwrap();
        assert!(wrong.contains("the user or the password is wrong"), "{wrong}");
        let gone = told(&[Code::Authentication, Code::BrokerTransportFailure]).unwrap();
        assert!(gone.contains("no broker can be reached"), "what is wrong may change: {gone}");
        assert_eq!(told(&[Code::BrokerTransportFailure]), None, "one broker of several");
        assert!(told(&[Code::AllBrokersDown]).is_some());
    }

    #[test]
    fn a_call_that_ran_out_of_time_is_told_with_its_reason() {
        let listener = Listener::new(&Cluster::default());
        let timed_out = KafkaError::MessageProduction(RDKafkaErrorCode::MessageTimedOut);
        assert_eq!(listener.explain(&timed_out), explain(&timed_out));
        listener.hear(&KafkaError::Global(RDKafkaErrorCode::Authentication), "no");
        assert!(listener.explain(&timed_out).contains("password"), "{}", listener.explain(&timed_out));
        let large = KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge);
        assert_eq!(listener.explain(&large), explain(&large), "another fault has its own words");
        listener.clear();
        assert_eq!(listener.explain(&timed_out), explain(&timed_out));
    }
}
