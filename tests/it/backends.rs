//! The pipelines of the repository as they are, each from a write to its target, on real servers.

use std::path::Path;

use serde_json::json;

use crate::harness::{Place, Receiver, Running, until, until_status};
use crate::kafka::unique;

fn server(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("{variable} names a server: run tests/run"))
}

pub fn sqs() -> aws_sdk_sqs::Client {
    use aws_sdk_sqs::config::{BehaviorVersion, Credentials, Region};
    let config = aws_sdk_sqs::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .credentials_provider(Credentials::new("x", "x", None, None, "test"))
        .endpoint_url(server("WALFLOW_TEST_SQS"));
    aws_sdk_sqs::Client::from_conf(config.build())
}

/// A database of the test's own on the shared server; gives its address.
async fn database(tables: &str) -> String {
    let name = unique("pipelines").replace('-', "_");
    let client = crate::sink_conformance::postgres::client().await;
    client.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
    let address = server("WALFLOW_TEST_POSTGRES");
    let address = format!("{}/{name}", address.rsplit_once('/').unwrap().0);
    let (client, connection) = tokio_postgres::connect(&address, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client.batch_execute(tables).await.unwrap();
    address
}

async fn ask(address: &str, query: &str) -> String {
    let (client, connection) = tokio_postgres::connect(address, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client.query_one(query, &[]).await.unwrap().get::<_, Option<String>>(0).unwrap_or_default()
}

async fn until_row(address: &str, query: &str, expected: &str) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let found = ask(address, query).await;
        if found == expected {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{query}: {found}, not {expected}");
        tokio::task::yield_now().await;
    }
}

/// The repository's own file.
fn place(file: &str) -> Place {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines").join(file);
    assert!(path.exists());
    Place::new().arg(path.to_str().unwrap())
}

async fn write(running: &Running, namespace: &str, payload: serde_json::Value) {
    running.accepted(namespace, None, payload).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Kafka, Redis and PostgreSQL: run tests/run"]
async fn a_cache_is_replicated_from_kafka_to_three_redis() {
    let shelf = database("").await;
    let redis = server("WALFLOW_TEST_REDIS");
    let place = place("user-cache-replication.yaml")
        .environment("KAFKA_BROKERS", &server("WALFLOW_TEST_KAFKA"))
        .environment("USER_CACHE_TOPIC", &unique("user-cache"))
        .environment("SHELF_URL", &shelf)
        .environment("REDIS_US_EAST_1", &format!("{redis}/4"))
        .environment("REDIS_EU_WEST_1", &format!("{redis}/5"))
        .environment("REDIS_AP_SOUTHEAST_1", &format!("{redis}/6"));
    let running = place.start().await;
    let key = unique("user:");
    let value = json!({"name": "John Doe", "email": "john@example.org"});
    write(&running, "user-cache-replication", json!({"operation": "SET", "key": key, "value": value})).await;
    for database in 4..=6 {
        let client = redis::Client::open(format!("{redis}/{database}")).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        loop {
            let found: Option<String> =
                redis::cmd("GET").arg(format!("cache:{key}")).query_async(&mut connection).await.unwrap();
            if let Some(found) = found {
                assert_eq!(found, r#"{"email":"***","name":"John Doe"}"#);
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{}", running.log());
            tokio::task::yield_now().await;
        }
    }
    let bad = json!({"namespace": "user-cache-replication", "payload": {"operation": "NEVER"}});
    assert_eq!(running.write(&bad).await.unwrap().0, 422, "the schema holds on every source");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Redis: run tests/run"]
async fn notifications_go_from_redis_streams_to_a_service() {
    let receiver = Receiver::start().await;
    let place = place("notification-events.yaml")
        .environment("REDIS_URL", &format!("{}/7", server("WALFLOW_TEST_REDIS")))
        .environment("NOTIFICATIONS_URL", &receiver.url);
    let running = place.start().await;
    let user = unique("user");
    let event = |urgent: bool| json!({"user_id": user, "channel": "push", "body": "Hello", "urgent": urgent});
    write(&running, "notification-events", event(true)).await;
    // The streams are shared: what an earlier run did not acknowledge comes again.
    let ours = || receiver.accepted().iter().filter(|got| String::from_utf8_lossy(&got.body).contains(&user)).count();
    until("the urgent one arrives", || (ours() == 1).then_some(())).await;
    write(&running, "notification-events", event(false)).await;
    until_status(&running, "notification-events", "the other one waits", |status| status["parked"] == 1).await;
    let scheduled = format!("{}/api/v1/wal/namespace/notification-events/scheduled?key={user}", running.url);
    assert_eq!(running.client.delete(scheduled).send().await.unwrap().status(), 200);
    until_status(&running, "notification-events", "it is cancelled", |status| status["parked"] == 0).await;
    assert_eq!(ours(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs SQS and PostgreSQL: run tests/run"]
async fn transactions_go_from_sqs_to_rows() {
    let queue = format!("{}.fifo", unique("transactions"));
    let make = sqs().create_queue().queue_name(&queue);
    make.attributes(aws_sdk_sqs::types::QueueAttributeName::FifoQueue, "true").send().await.unwrap();
    let ledger = database(
        "CREATE TABLE transactions (transaction_id text PRIMARY KEY, account_id text NOT NULL, amount numeric NOT NULL,
         currency text NOT NULL, details jsonb NOT NULL, recorded_at timestamptz NOT NULL)",
    )
    .await;
    let place = place("transaction-logging.yaml")
        .environment("TRANSACTIONS_QUEUE", &queue)
        .environment("AWS_REGION", "us-east-1")
        .environment("SQS_ENDPOINT", &server("WALFLOW_TEST_SQS"))
        .environment("AWS_ACCESS_KEY_ID", "x")
        .environment("AWS_SECRET_ACCESS_KEY", "x")
        .environment("SHELF_URL", &ledger)
        .environment("LEDGER_URL", &ledger);
    let running = place.start().await;
    let payment = json!({"transaction_id": "t-1", "account_id": "a-1", "amount": 12.50, "currency": "EUR", "card": {"number": "4111111111111111"}});
    write(&running, "transaction-logging", payment.clone()).await;
    write(&running, "transaction-logging", payment).await;
    write(&running, "transaction-logging", json!({"transaction_id": "t-2", "account_id": "a-1", "amount": 0})).await;
    write(&running, "transaction-logging", json!({"transaction_id": "t-3", "account_id": "a-1", "amount": 7})).await;
    let all = "SELECT string_agg(concat_ws(' ', transaction_id, amount, currency, details #>> '{card,number}'), ', ' ORDER BY 1) FROM transactions";
    until_row(&ledger, all, "t-1 12.5 EUR ************1111, t-3 7 unknown").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs SQS and PostgreSQL: run tests/run"]
async fn deletes_wait_on_the_shelf_and_then_take_rows_away() {
    let queue = unique("deletes");
    sqs().create_queue().queue_name(&queue).send().await.unwrap();
    let storage = database(
        "CREATE TABLE sessions (id text PRIMARY KEY); CREATE TABLE carts (id bigint PRIMARY KEY);
         INSERT INTO sessions VALUES ('1'), ('2'), ('3'); INSERT INTO carts VALUES (7), (8)",
    )
    .await;
    let place = place("bulk-delete.yaml")
        .environment("DELETES_QUEUE", &queue)
        .environment("AWS_REGION", "us-east-1")
        .environment("SQS_ENDPOINT", &server("WALFLOW_TEST_SQS"))
        .environment("AWS_ACCESS_KEY_ID", "x")
        .environment("AWS_SECRET_ACCESS_KEY", "x")
        .environment("SHELF_URL", &storage)
        .environment("STORAGE_URL", &storage);
    let running = place.start().await;
    let delete = |table: &str, id: serde_json::Value, seconds: u32| json!({"namespace": "bulk-delete", "payload": {"table": table, "id": id}, "lifecycle": {"delay": seconds, "jitter": 0}});
    for body in [delete("sessions", json!("1"), 1), delete("carts", json!(7), 1), delete("sessions", json!("2"), 3600)]
    {
        let (status, answer) = running.write(&body).await.unwrap();
        assert_eq!(status, 202, "{answer}");
        assert!(answer["deliverAt"].is_string(), "{answer}");
    }
    until_row(&storage, "SELECT string_agg(id, ',' ORDER BY id) FROM sessions", "2,3").await;
    until_row(&storage, "SELECT string_agg(id::text, ',') FROM carts", "8").await;
    let status = until_status(&running, "bulk-delete", "one waits", |status| status["parked"] == 1).await;
    assert_eq!(status["branches"].as_array().unwrap().len(), 1);
    let (code, told, _) = running.cli(&place, &["dead-letters", "list", "bulk-delete"]);
    assert_eq!(code, 0, "{told}");
    let cancel = running.client.delete(format!("{}/api/v1/wal/namespace/bulk-delete/scheduled?key=2", running.url));
    let answer = cancel.send().await.unwrap();
    assert_eq!(answer.status(), 200);
    until_status(&running, "bulk-delete", "it is cancelled", |status| status["parked"] == 0).await;
    until("its shelf is closed in order", || running.log().contains("ready").then_some(())).await;
}
