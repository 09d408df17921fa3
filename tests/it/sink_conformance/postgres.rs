//! `postgres` against a real server, behind a proxy that can cut the connection.

use serde_json::{Value, json};
use tokio_postgres::{Client, NoTls};
use walflow::sink::{Kind, Sink, Verdict};

use super::{Target, conforms, keyed, open, operation, verdicts};
use crate::kafka::unique;
use crate::proxy::Proxy;

pub(super) fn url() -> String {
    std::env::var("WALFLOW_TEST_POSTGRES").expect("WALFLOW_TEST_POSTGRES names a server: run tests/run")
}

pub(crate) async fn client() -> Client {
    let (client, connection) = tokio_postgres::connect(&url(), NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// A name for a table that no other test has.
pub(super) fn table(name: &str) -> String {
    unique(name).replace('-', "_")
}

pub(super) fn sink(spec: Value) -> Box<dyn Sink> {
    let mut spec = spec;
    spec["url"] = spec.get("url").cloned().unwrap_or_else(|| url().into());
    open(&Kind::Postgres(Box::new(serde_json::from_value(spec).unwrap())), "".into())
}

pub(super) async fn one(client: &Client, query: &str) -> String {
    client.query_one(query, &[]).await.unwrap().get(0)
}

/// A table to which every record appends itself.
struct Rows {
    client: Client,
    proxy: Proxy,
    table: String,
    read: i64,
}

impl Target for Rows {
    fn sink(&self) -> Box<dyn Sink> {
        let address = url();
        let behind = address.rsplit('@').next().unwrap().split('/').next().unwrap();
        let address = address.replace(behind, &self.proxy.address().to_string());
        sink(json!({
            "url": address,
            "timeout": "5s",
            "insert": { "table": self.table, "columns": { "dest": "{payload.to}", "body": "{payload}" } },
        }))
    }

    fn refused(&self) -> Option<String> {
        Some(r#"{"to":"nobody"}"#.to_owned())
    }

    async fn arrived(&mut self) -> Vec<String> {
        let query = format!("SELECT n, body FROM {} WHERE n > $1 ORDER BY n", self.table);
        let rows = self.client.query(&query, &[&self.read]).await.unwrap();
        self.read = rows.last().map_or(self.read, |row| row.get(0));
        rows.iter().map(|row| row.get(1)).collect()
    }

    async fn stop(&mut self) {
        self.proxy.cut().await;
    }

    async fn start(&mut self) {
        self.proxy.restore().await;
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn postgres_conforms() {
    let client = client().await;
    let table = table("rows");
    let make = format!(
        "CREATE TABLE {table} (n bigserial PRIMARY KEY, dest text CHECK (dest <> 'nobody'), body text NOT NULL)"
    );
    client.batch_execute(&make).await.unwrap();
    let address = url();
    let behind = address.rsplit('@').next().unwrap().split('/').next().unwrap().to_owned();
    let proxy = Proxy::start(&behind).await;
    conforms(Rows { client, proxy, table, read: 0 }).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn every_type_arrives_exact() {
    let (client, table) = (client().await, table("types"));
    let make = format!(
        "CREATE TABLE {table} (id bigint PRIMARY KEY, amount numeric, at timestamptz, ref uuid, doc jsonb, bytes bytea,
         tags text[], counts int[], note text, flag bool, ratio double precision)"
    );
    client.batch_execute(&make).await.unwrap();
    let sink = sink(json!({ "upsert": { "table": table, "key": ["id"] } }));
    let full = r#"{"id": 9223372036854775807, "amount": 12345678901234567890.123456789, "at": "2026-11-27T20:00:00.123+02:00",
        "ref": "019a0b1c-2d3e-7f00-8000-000000000000", "doc": {"a": [1, 2.50, null]}, "bytes": "\\x00ff", "tags": ["a", "b,c"],
        "counts": [1, 2], "note": null, "flag": true, "ratio": 0.1}"#;
    assert_eq!(verdicts(&sink.write(&[operation(1, full)]).await), []);
    let row = format!(
        "SELECT concat_ws('|', id, amount, at AT TIME ZONE 'UTC', ref, doc, encode(bytes, 'hex'), tags, counts, note IS NULL, flag,
         ratio) FROM {table}"
    );
    let expected = "9223372036854775807|12345678901234567890.123456789|2026-11-27 18:00:00.123|\
                    019a0b1c-2d3e-7f00-8000-000000000000|{\"a\": [1, 2.50, null]}|00ff|{a,\"b,c\"}|{1,2}|t|t|0.1";
    assert_eq!(one(&client, &row).await, expected);
    // What does not fit is that record's alone, and its text says where.
    for (payload, place) in [
        (r#"{"id": 9223372036854775808}"#, "out of range"),
        (r#"{"id": 1, "ref": "no uuid"}"#, "uuid"),
        (r#"{"id": 1, "at": "yesterday-ish"}"#, "timestamp"),
        (r#"{"id": 1, "colour": "red"}"#, "colour"),
        (r#"{"id": null}"#, "key column id"),
        ("[1]", "no JSON object"),
    ] {
        let batch = [operation(2, r#"{"id": 2, "note": "fine"}"#), operation(3, payload)];
        let written = sink.write(&batch).await;
        assert_eq!(verdicts(&written), [(1, Verdict::Never)], "{payload}");
        assert!(written.failed[0].1.message.contains(place), "{payload}: {}", written.failed[0].1.message);
    }
    assert_eq!(one(&client, &format!("SELECT note FROM {table} WHERE id = 2")).await, "fine");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn records_of_one_key_in_a_batch_are_folded_in_order_and_one_bad_row_is_alone() {
    let (client, table) = (client().await, table("orders"));
    client
        .batch_execute(&format!("CREATE TABLE {table} (id int PRIMARY KEY, state text CHECK (state <> 'bad'))"))
        .await
        .unwrap();
    let sink = sink(json!({ "cases": [
        { "when": "payload.state != ()", "upsert": { "table": table, "key": ["id"], "columns": { "id": "{payload.id}", "state": "{payload.state}" } } },
        { "delete": { "table": table, "key": ["id"] } },
    ] }));
    let put = |number, id: u32, state: &str| operation(number, &json!({"id": id, "state": state}).to_string());
    let mut gone = put(3, 2, "x");
    gone.case = 1;
    let batch = [
        put(1, 1, "new"),
        put(2, 1, "paid"),
        put(4, 2, "new"),
        gone,
        put(5, 3, "bad"),
        put(6, 4, "new"),
        put(7, 1, "sent"),
    ];
    let written = sink.write(&batch).await;
    assert_eq!(verdicts(&written), [(4, Verdict::Never)]);
    let why = &written.failed[0].1.message;
    assert!(why.contains("23514") && why.contains(&format!("constraint {table}_state_check")), "{why}");
    let all = format!("SELECT string_agg(id || '=' || state, ',' ORDER BY id) FROM {table}");
    assert_eq!(one(&client, &all).await, "1=sent,4=new");
    // Keys that are one to the table and written differently; and a run that only neighbours may join.
    let mut gone = put(14, 6, "x");
    gone.case = 1;
    let batch = [
        operation(11, r#"{"id": "7", "state": "z"}"#),
        put(12, 7, "a"),
        put(13, 7, "b"),
        put(15, 6, "old"),
        gone,
        put(16, 6, "again"),
        put(17, 8, "first"),
        put(18, 8, "last"),
    ];
    assert_eq!(verdicts(&sink.write(&batch).await), []);
    assert_eq!(one(&client, &all).await, "1=sent,4=new,6=again,7=b,8=last");
    // Of a key, nothing overtakes what was refused.
    let with_key =
        |number: u16, state: &str| keyed(number, Some("k"), &json!({"id": number, "state": state}).to_string());
    let written = sink.write(&[with_key(8, "new"), with_key(9, "bad"), with_key(10, "sent")]).await;
    assert_eq!(verdicts(&written), [(1, Verdict::Never), (2, Verdict::Backoff)]);
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_table_that_is_dropped_is_an_outage_until_it_is_back() {
    let (client, table) = (client().await, table("gone"));
    let make = format!("CREATE TABLE {table} (id int PRIMARY KEY)");
    client.batch_execute(&make).await.unwrap();
    let sink = sink(json!({ "insert": { "table": table, "on_conflict": "ignore" } }));
    let batch = [operation(1, r#"{"id": 1}"#)];
    assert_eq!(verdicts(&sink.write(&batch).await), []);
    client.batch_execute(&format!("DROP TABLE {table}")).await.unwrap();
    let written = sink.write(&batch).await;
    assert_eq!(verdicts(&written), [(0, Verdict::Down)]);
    assert!(written.failed[0].1.message.contains("there is no such table"), "{written:?}");
    client.batch_execute(&make).await.unwrap();
    assert_eq!(verdicts(&sink.write(&batch).await), []);
    assert_eq!(verdicts(&sink.write(&batch).await), [], "what is there stays");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn with_a_barrier_a_second_delivery_does_nothing() {
    let (client, table, seen) = (client().await, table("counted"), table("seen"));
    client.batch_execute(&format!("CREATE TABLE {table} (id int PRIMARY KEY, n int NOT NULL)")).await.unwrap();
    client.batch_execute(&format!("INSERT INTO {table} VALUES (1, 0)")).await.unwrap();
    let sink = sink(json!({
        "statement": {
            "sql": format!("UPDATE {table} SET n = n + $1 WHERE id = $2 AND $3::jsonb IS NOT NULL"),
            "params": ["{payload.by}", "{payload.id}", { "a": "{payload.by}" }],
        },
        "barrier": { "table": seen },
    }));
    let add = |number, by: &str| operation(number, &format!(r#"{{"id": 1, "by": {by}}}"#));
    for _ in 0..3 {
        assert_eq!(verdicts(&sink.write(&[add(1, "5"), add(2, "7")]).await), []);
    }
    // What is refused was not delivered, and may come again.
    for _ in 0..2 {
        assert_eq!(verdicts(&sink.write(&[add(3, "1"), add(4, "\"much\"")]).await), [(1, Verdict::Never)]);
    }
    assert_eq!(one(&client, &format!("SELECT n::text FROM {table}")).await, "13");
    assert_eq!(one(&client, &format!("SELECT count(*)::text FROM {seen}")).await, "3");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn what_is_wrong_with_the_target_is_said_without_its_password() {
    let address = url();
    let behind = address.rsplit('@').next().unwrap();
    let host = behind.split('/').next().unwrap();
    let insert = json!({ "table": "t" });
    for (url, told) in [
        (format!("postgres://nobody:geheim@{host}/postgres"), "28000"),
        (format!("postgres://postgres:geheim@{host}/nowhere"), "there is no such database"),
        ("postgres://postgres:geheim@127.0.0.1:1/postgres".to_owned(), "onnection refused"),
    ] {
        let sink = sink(json!({ "url": url, "insert": insert, "timeout": "5s" }));
        let written = sink.write(&[operation(1, "{\"id\": 1}")]).await;
        assert_eq!(verdicts(&written), [(0, Verdict::Down)], "{url}");
        let message = &written.failed[0].1.message;
        assert!(message.contains(told) && !message.contains("geheim"), "{message}");
        let probed = sink.probe().await;
        assert!(!probed[0].ok && !probed[0].found.contains("geheim"), "{probed:?}");
    }
}
