//! TLS and passwords of a real Kafka broker: each way to say who we are works for source and sink, and what is wrong is told in
//! one line, shows no secret, and is over by itself once it is put right.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Place, Running, until, until_status};
use crate::kafka::unique;
use crate::servers::{Server, free_ports, installed};

const PASSWORD: &str = "geheim-4711";

/// Authorities and a broker's certificate, made with `openssl`.
struct Certificates(TempDir);

impl Certificates {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("tls.").tempdir().unwrap();
        let made = Self(folder);
        for authority in ["ca", "other"] {
            made.openssl(&format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={authority} -keyout {authority}.key -out {authority}.pem"
            ));
        }
        made.openssl(
            "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=broker -keyout broker.key -out broker.csr",
        );
        fs::write(made.path("index"), "").unwrap();
        fs::write(made.path("names"), "subjectAltName=IP:127.0.0.1\n").unwrap();
        let settings = "[ca]\ndefault_ca=d\n[d]\ndatabase=index\nnew_certs_dir=.\nrand_serial=yes\nunique_subject=no\ndefault_md=sha256\npolicy=p\n[p]\ncommonName=supplied\n";
        fs::write(made.path("settings"), settings).unwrap();
        made.broker("ca", "20500101000000Z");
        made
    }

    /// Gives the broker a certificate by this authority that ends then.
    fn broker(&self, authority: &str, end: &str) {
        self.openssl(&format!(
            "ca -batch -notext -config settings -in broker.csr -cert {authority}.pem -keyfile {authority}.key -startdate 20200101000000Z -enddate {end} -extfile names -out broker.crt"
        ));
        let both = [fs::read(self.path("broker.key")).unwrap(), fs::read(self.path("broker.crt")).unwrap()].concat();
        fs::write(self.path("broker.pem"), both).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl").current_dir(self.0.path()).args(arguments.split(' ')).output().unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A broker that asks for passwords on one port, and for TLS too on another.
struct Secured {
    server: Server,
    port: u16,
}

impl Secured {
    async fn start(certificates: &Certificates) -> Self {
        let port = free_ports(4);
        let [plain, control, password, tls] = [port, port + 1, port + 2, port + 3];
        let mut lines = vec![
            "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PW:SASL_PLAINTEXT,PWTLS:SASL_SSL"
                .to_owned(),
            format!(
                "listeners=PLAINTEXT://127.0.0.1:{plain},CONTROLLER://127.0.0.1:{control},PW://127.0.0.1:{password},PWTLS://127.0.0.1:{tls}"
            ),
            format!(
                "advertised.listeners=PLAINTEXT://127.0.0.1:{plain},PW://127.0.0.1:{password},PWTLS://127.0.0.1:{tls}"
            ),
            "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512".to_owned(),
            "listener.name.pwtls.ssl.keystore.type=PEM".to_owned(),
            format!("listener.name.pwtls.ssl.keystore.location={}", certificates.path("broker.pem").display()),
        ];
        for listener in ["pw", "pwtls"] {
            let modules = "org.apache.kafka.common.security";
            lines.push(format!(
                "listener.name.{listener}.plain.sasl.jaas.config={modules}.plain.PlainLoginModule required user_wal-plain=\"{PASSWORD}\";"
            ));
            for mechanism in ["scram-sha-256", "scram-sha-512"] {
                lines.push(format!(
                    "listener.name.{listener}.{mechanism}.sasl.jaas.config={modules}.scram.ScramLoginModule required;"
                ));
            }
        }
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        Self { server: Server::start_at("kafka", port, &lines).await, port }
    }

    /// Gives the users of SCRAM this password. Each mechanism has a user whom no other one knows, so that none stands in for
    /// another.
    async fn scram(&self, password: &str) {
        for mechanism in ["SCRAM-SHA-256", "SCRAM-SHA-512"] {
            let user = format!("wal-{}", mechanism.to_lowercase());
            let mut command = Command::new("java");
            command.args(["-XX:TieredStopAtLevel=1", "-cp", &format!("{}/*", installed("jars/kafka").display())]);
            command.args(["kafka.admin.ConfigCommand", "--bootstrap-server", &format!("127.0.0.1:{}", self.port)]);
            command.args(["--alter", "--entity-type", "users", "--entity-name", &user]);
            command.args(["--add-config", &format!("{mechanism}=[password={password}]")]);
            let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }

    /// A cluster's settings as YAML; with TLS where there is a file of authorities.
    fn connection(&self, mechanism: &str, ca_file: Option<&PathBuf>) -> String {
        let port = self.port + if ca_file.is_some() { 3 } else { 2 };
        let tls = ca_file.map_or(String::new(), |file| format!("tls: {{ ca_file: {} }}, ", file.display()));
        format!(
            "brokers: \"127.0.0.1:{port}\", {tls}sasl: {{ mechanism: {mechanism}, username: wal-{mechanism}, password: \"${{KAFKA_PASSWORD}}\" }}"
        )
    }
}

/// `in-NAME` reads a topic and writes a file; `out-NAME` has its own log and writes the topic.
fn through(place: Place, name: &str, connection: &str) -> Place {
    let source = format!(
        "namespace: in-{name}\nsource: {{ kafka: {{ {connection}, topic: {name} }} }}\nsink: {{ file: {{ path: {name}.ndjson }} }}\n"
    );
    let sink = format!(
        "namespace: out-{name}\nsink:\n  kafka: {{ {connection}, topic: {name}, timeout: 2s }}\n  retry: {{ backoff: {{ first: 100ms, max: 1s }} }}\n"
    );
    place
        .environment("KAFKA_PASSWORD", PASSWORD)
        .pipeline(&format!("in-{name}.yaml"), &source)
        .pipeline(&format!("out-{name}.yaml"), &sink)
}

async fn arrives(place: &Place, running: &Running, name: &str) {
    until(name, || (place.values(&format!("{name}.ndjson")).contains(&json!({"n": 1}))).then_some(())).await;
    for namespace in [format!("in-{name}"), format!("out-{name}")] {
        let fine = |status: &Value| status["branches"][0]["lagRecords"] == 0;
        until_status(running, &namespace, "nothing is left", fine).await;
    }
    // The second comes by the way in of the source.
    running.accepted(&format!("in-{name}"), None, json!({"n": 2})).await;
    until(name, || (place.values(&format!("{name}.ndjson")).contains(&json!({"n": 2}))).then_some(())).await;
}

/// Both namespaces say so in one line: the source's why it has not begun, the sink's branch as its last error.
async fn told(running: &Running, name: &str, words: &[&str]) {
    let namespace = format!("out-{name}");
    let said = |status: &Value| status["branches"][0]["lastError"].as_str().unwrap_or_default().to_owned();
    let fine = |status: &Value| words.iter().all(|word| said(status).contains(word));
    let status = until_status(running, &namespace, &format!("the sink says {words:?}"), fine).await;
    let reason = until_reason(running, &format!("in-{name}"), words).await;
    for text in [said(&status), reason] {
        assert!(!text.contains('\n'), "{text}");
        assert!(!text.contains(PASSWORD), "{text}");
    }
}

/// Waits until a namespace that has not begun has a reason with these words.
async fn until_reason(running: &Running, namespace: &str, words: &[&str]) -> String {
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        let (_, answer) = running.write(&json!({"namespace": namespace, "payload": 0})).await.unwrap();
        let reason = answer["detail"].as_str().unwrap_or_default().to_owned();
        if words.iter().all(|word| reason.contains(word)) {
            return reason;
        }
        assert!(Instant::now() < deadline, "it does not say {words:?}: {answer}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn shows_no_secret(place: &Place, running: &Running) {
    let (_, plan, _) = running.cli(place, &["run", "pipelines", "--dry-run"]);
    assert!(plan.contains("Kafka topic"), "{plan}");
    for (what, text) in [("log", running.log()), ("plan", plan)] {
        assert!(!text.contains(PASSWORD), "the {what} has the password: {text}");
    }
}

#[tokio::test]
#[ignore = "needs Kafka: run tests/run"]
async fn every_way_to_say_who_we_are_works_with_and_without_tls() {
    let certificates = Certificates::new();
    let broker = Secured::start(&certificates).await;
    broker.scram(PASSWORD).await;
    let ca = certificates.path("ca.pem");
    let mut place = Place::new();
    let mut names = Vec::new();
    for (mechanism, tls) in
        ["plain", "scram-sha-256", "scram-sha-512"].into_iter().flat_map(|one| [(one, None), (one, Some(&ca))])
    {
        let name = unique(&format!("{mechanism}{}", if tls.is_some() { "-tls" } else { "" }));
        place = through(place, &name, &broker.connection(mechanism, tls));
        names.push(name);
    }
    let running = place.start().await;
    for name in &names {
        running.accepted(&format!("out-{name}"), None, json!({"n": 1})).await;
    }
    for name in &names {
        arrives(&place, &running, name).await;
    }
    shows_no_secret(&place, &running);
}

#[tokio::test]
#[ignore = "needs Kafka: run tests/run"]
async fn a_wrong_password_is_told_and_is_over_once_it_is_put_right() {
    let certificates = Certificates::new();
    let broker = Secured::start(&certificates).await;
    broker.scram("another").await;
    let name = unique("password");
    let place = through(Place::new(), &name, &broker.connection("scram-sha-256", None));
    let running = place.start().await;
    running.accepted(&format!("out-{name}"), None, json!({"n": 1})).await;
    told(&running, &name, &["the user or the password is wrong", &format!("127.0.0.1:{}", broker.port + 2)]).await;
    broker.scram(PASSWORD).await;
    arrives(&place, &running, &name).await;
    shows_no_secret(&place, &running);
}

#[tokio::test]
#[ignore = "needs Kafka: run tests/run"]
async fn an_authority_that_is_not_known_is_told_and_its_file_is_read_again() {
    let certificates = Certificates::new();
    let broker = Secured::start(&certificates).await;
    let name = unique("unknown");
    let file = certificates.path("trusted.pem");
    fs::copy(certificates.path("other.pem"), &file).unwrap();
    let place = through(Place::new(), &name, &broker.connection("plain", Some(&file)));
    let running = place.start().await;
    running.accepted(&format!("out-{name}"), None, json!({"n": 1})).await;
    let broker = format!("127.0.0.1:{}", broker.port + 3);
    told(&running, &name, &[&broker, "is vouched for by nobody in tls.ca_file", "trusted.pem"]).await;
    fs::copy(certificates.path("ca.pem"), &file).unwrap();
    arrives(&place, &running, &name).await;
    shows_no_secret(&place, &running);
}

#[tokio::test]
#[ignore = "needs Kafka: run tests/run"]
async fn a_certificate_that_has_expired_is_told_and_a_new_one_is_taken() {
    let certificates = Certificates::new();
    certificates.broker("ca", "20200201000000Z");
    let broker = Secured::start(&certificates).await;
    let name = unique("expired");
    let place = through(Place::new(), &name, &broker.connection("plain", Some(&certificates.path("ca.pem"))));
    let running = place.start().await;
    running.accepted(&format!("out-{name}"), None, json!({"n": 1})).await;
    let address = format!("127.0.0.1:{}", broker.port + 3);
    told(&running, &name, &[&address, "has expired: renew it on the broker"]).await;
    certificates.broker("ca", "20500101000000Z");
    broker.server.stop().await;
    broker.server.restart().await;
    arrives(&place, &running, &name).await;
    shows_no_secret(&place, &running);
}
