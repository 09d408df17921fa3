//! `postgres` with a server of its own: killed in the middle of a transaction, and one whose certificate is out of date.

use std::time::Duration;

use serde_json::json;
use tokio_postgres::{Client, NoTls};
use walflow::sink::{Operation, Sink, Verdict};

use super::postgres::{one, sink};
use super::postgres_copy::MANY;
use super::{operation, verdicts};
use crate::servers::Server;

async fn connect(server: &Server) -> Client {
    let url = format!("postgres://postgres@{}/postgres", server.address());
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

#[tokio::test]
#[ignore = "needs servers: run tests/run"]
async fn a_server_that_is_killed_in_a_transaction_has_nothing_of_it_and_gets_all_of_it() {
    let server = Server::start("postgres").await;
    let (locker, watcher) = (connect(&server).await, connect(&server).await);
    locker.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let sink = sink(json!({
        "url": format!("postgres://postgres@{}/postgres", server.address()),
        "cases": [
            { "when": format!("payload.id <= {MANY}"), "insert": { "table": "t" } },
            { "upsert": { "table": "t", "key": ["id"] } },
        ],
    }));
    // Many rows are copied, the last waits for a lock: the middle of a transaction.
    locker.batch_execute("BEGIN; INSERT INTO t VALUES (1001)").await.unwrap();
    let mut batch: Vec<Operation> =
        (1..=MANY + 1).map(|number| operation(number, &json!({ "id": number }).to_string())).collect();
    batch[usize::from(MANY)].case = 1;
    let waits =
        "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%ON CONFLICT%'";
    let kill = async {
        while one(&watcher, waits).await == "0" {}
        server.kill().await;
    };
    let (written, ()) = tokio::join!(sink.write(&batch), kill);
    assert_eq!(written.failed.len(), batch.len());
    assert!(written.failed.iter().all(|(_, failure)| failure.verdict == Verdict::Down), "{written:?}");
    assert!(sink.write(&batch).await.failed.iter().all(|(_, failure)| failure.verdict == Verdict::Down));
    server.restart().await;
    let client = connect(&server).await;
    assert_eq!(one(&client, "SELECT count(*)::text FROM t").await, "0");
    // Were one row of it there, a plain insert of the same would be refused.
    assert_eq!(verdicts(&sink.write(&batch).await), []);
    assert_eq!(one(&client, "SELECT concat_ws(' ', count(*), min(id), max(id)) FROM t").await, "1001 1 1001");
}

/// Writes a certificate and its key to where the server looks for them, as the server's own user.
async fn give(client: &Client, certificate: &[u8], key: &[u8]) {
    for (name, bytes) in [("server.crt", certificate), ("server.key", key)] {
        let text = std::str::from_utf8(bytes).unwrap();
        client
            .batch_execute(&format!(
                "COPY (SELECT unnest(string_to_array('{text}', chr(10)))) TO PROGRAM 'umask 077; cat > {name}'"
            ))
            .await
            .unwrap();
    }
    client.batch_execute("ALTER SYSTEM SET ssl = on").await.unwrap();
    client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
}

#[tokio::test]
#[ignore = "needs servers: run tests/run"]
async fn a_certificate_that_is_not_taken_is_named_in_one_line_and_a_good_one_is_found_by_itself() {
    let server = Server::start("postgres").await;
    let client = connect(&server).await;
    client.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let ca_file = folder.path().join("ca.pem");
    std::fs::write(&ca_file, [&include_bytes!("ca.pem")[..], include_bytes!("client_ca.pem")].concat()).unwrap();
    let port = server.address().rsplit(':').next().unwrap().to_owned();
    let to = |host: &str, parameters: &str, ca_file: Option<&std::path::Path>| {
        let url = format!("postgres://postgres:geheim@{host}:{port}/postgres?{parameters}");
        sink(json!({ "url": url, "ca_file": ca_file, "insert": { "table": "t", "on_conflict": "ignore" } }))
    };
    let strict = to("localhost", "sslmode=require", Some(&ca_file));
    let batch = [operation(1, r#"{"id": 1}"#)];
    let why = async |sink: &dyn Sink| {
        let written = sink.write(&batch).await;
        assert_eq!(verdicts(&written), [(0, Verdict::Down)]);
        let message = written.failed[0].1.message.to_string();
        assert!(!message.contains('\n') && !message.contains("geheim"), "{message}");
        message
    };
    let until = async |told: &str| {
        let seen = async { while !why(&*strict).await.contains(told) {} };
        tokio::time::timeout(Duration::from_secs(20), seen).await.expect(told);
    };
    until("server does not support TLS").await;
    give(&client, include_bytes!("expired.pem"), include_bytes!("expired.key")).await;
    until("the server's certificate has expired").await;
    assert!(!strict.probe().await[0].ok && strict.probe().await[0].found.contains("has expired"));
    // Who names no mode gets the same check; who wants none has to say so.
    assert!(why(&*to("localhost", "", Some(&ca_file))).await.contains("has expired"));
    assert_eq!(verdicts(&to("localhost", "sslmode=disable", None).write(&batch).await), []);
    give(&client, include_bytes!("server.pem"), include_bytes!("server.key")).await;
    let back = async { while !strict.write(&batch).await.failed.is_empty() {} };
    tokio::time::timeout(Duration::from_secs(20), back).await.expect("the good certificate is found");
    // `require` checks as much as `verify-full`.
    let stranger = why(&*to("localhost", "sslmode=require", None)).await;
    assert!(stranger.contains("ca_file") && stranger.contains("as verify-full does"), "{stranger}");
    let named = why(&*to("elsewhere.invalid", "hostaddr=127.0.0.1&sslmode=require", Some(&ca_file))).await;
    assert!(named.contains("for another host name") && named.contains("as verify-full does"), "{named}");
}
