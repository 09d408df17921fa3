//! `http` over TLS: whose certificate is taken, which one is shown, and that a failure is the target's, in clear words.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use walflow::sink::{self, Kind, Sink, Verdict};

use super::{context, open, operation};

/// A server at `address` that answers 200 to whoever gets so far; with `clients` it asks for a certificate of that authority.
fn serve(address: &str, certificate: &[u8], key: &[u8], clients: Option<&[u8]>) -> u16 {
    walflow::connection::tls::provider();
    let certificate = CertificateDer::from_pem_slice(certificate).unwrap();
    let key = PrivateKeyDer::from_pem_slice(key).unwrap();
    let builder = match clients {
        None => ServerConfig::builder().with_no_client_auth(),
        Some(authority) => {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(authority).unwrap()).unwrap();
            ServerConfig::builder()
                .with_client_cert_verifier(WebPkiClientVerifier::builder(roots.into()).build().unwrap())
        }
    };
    let config = Arc::new(builder.with_single_cert(vec![certificate], key).unwrap());
    let listener = TcpListener::bind(address).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = StreamOwned::new(ServerConnection::new(config.clone()).unwrap(), stream.unwrap());
            // A client that does not trust the certificate, or is not trusted, comes no further than this.
            if stream.read(&mut [0; 4096]).is_ok() {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            }
        }
    });
    port
}

/// The files that a `tls:` names.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        for (name, bytes) in [
            ("ca.pem", &include_bytes!("ca.pem")[..]),
            ("clients.pem", include_bytes!("client_ca.pem")),
            ("client.pem", include_bytes!("client.pem")),
            ("client.key", include_bytes!("client.key")),
            ("server.key", include_bytes!("server.key")),
        ] {
            std::fs::write(files.path(name), bytes).unwrap();
        }
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn tls(&self, settings: &[(&str, &str)]) -> Value {
        settings.iter().map(|(key, name)| ((*key).to_owned(), json!(self.path(name)))).collect()
    }
}

fn kind(url: &str, tls: &Value) -> Kind {
    Kind::Http { spec: Box::new(serde_json::from_value(json!({ "url": url, "tls": tls })).unwrap()), batched: false }
}

async fn one(url: &str, tls: &Value) -> Result<(), (Verdict, String)> {
    let sink: Box<dyn Sink> = open(&kind(url, tls), "".into());
    let failed = sink.write(&[operation(1, "{}")]).await.failed.into_iter().next();
    failed.map_or(Ok(()), |(_, failure)| Err((failure.verdict, failure.message.into())))
}

#[track_caller]
fn down(result: Result<(), (Verdict, String)>, words: &[&str]) {
    let (verdict, message) = result.unwrap_err();
    assert_eq!(verdict, Verdict::Down, "{message}");
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
}

#[tokio::test]
async fn a_server_is_taken_by_authority_name_and_date_and_anything_else_is_an_outage() {
    let files = Files::new();
    let port = serve("127.0.0.1:0", include_bytes!("server.pem"), include_bytes!("server.key"), None);
    let ours = files.tls(&[("ca_file", "ca.pem")]);
    assert_eq!(one(&format!("https://localhost:{port}/"), &ours).await, Ok(()));
    down(one(&format!("https://localhost:{port}/"), &json!({})).await, &["POST localhost", "certificate"]);
    let elsewhere = serve("127.0.0.2:0", include_bytes!("server.pem"), include_bytes!("server.key"), None);
    down(one(&format!("https://127.0.0.2:{elsewhere}/"), &ours).await, &["certificate", "127.0.0.2"]);
    let expired = serve("127.0.0.1:0", include_bytes!("expired.pem"), include_bytes!("expired.key"), None);
    let other = files.tls(&[("ca_file", "clients.pem")]);
    down(one(&format!("https://localhost:{expired}/"), &other).await, &["certificate expired"]);
    // A server that speaks no TLS.
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = plain.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in plain.incoming() {
            let _ = stream.unwrap().write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    down(one(&format!("https://{address}/"), &ours).await, &["POST 127.0.0.1"]);
}

#[tokio::test]
async fn a_server_that_asks_for_a_certificate_gets_the_files() {
    let files = Files::new();
    let clients = include_bytes!("client_ca.pem");
    let port = serve("127.0.0.1:0", include_bytes!("server.pem"), include_bytes!("server.key"), Some(clients));
    let url = format!("https://localhost:{port}/");
    let with = files.tls(&[("ca_file", "ca.pem"), ("cert_file", "client.pem"), ("key_file", "client.key")]);
    assert_eq!(one(&url, &with).await, Ok(()));
    // Without one the server says no only when the request is on its way: still nobody's fault but the file's.
    down(one(&url, &files.tls(&[("ca_file", "ca.pem")])).await, &["POST localhost"]);
}

#[tokio::test]
async fn files_that_do_not_fit_are_named_and_nothing_of_a_key_is_shown() {
    let files = Files::new();
    std::fs::write(files.path("empty.pem"), "").unwrap();
    for (settings, named) in [
        (&[("ca_file", "missing.pem")][..], "missing.pem"),
        (&[("ca_file", "client.key")], "client.key"),
        (&[("cert_file", "client.pem"), ("key_file", "empty.pem")], "client.pem"),
        (&[("cert_file", "empty.pem"), ("key_file", "client.key")], "empty.pem"),
    ] {
        let error =
            sink::open(&kind("https://h/", &files.tls(settings)), &context("".into())).err().unwrap().to_string();
        assert!(error.contains(named) && !error.contains("MIGH"), "{settings:?}: {error}");
    }
    // A key of another certificate is found when the first connection is made.
    let mixed = files.tls(&[("cert_file", "client.pem"), ("key_file", "server.key")]);
    match sink::open(&kind("https://127.0.0.1:1/", &mixed), &context("".into())) {
        Err(error) => assert!(error.to_string().contains("client.pem"), "{error}"),
        Ok(_) => down(one("https://127.0.0.1:1/", &mixed).await, &["POST 127.0.0.1:1"]),
    }
}
