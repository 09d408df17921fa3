//! `postgres` on a bad day: records that no table can hold, a server that falls silent or restarts, rights that are missing.

use std::cell::Cell;
use std::time::Duration;

use serde_json::json;
use walflow::sink::Verdict;

use super::postgres::{client, one, sink, table, url};
use super::postgres_copy::MANY;
use super::{operation, verdicts};
use crate::proxy::{Proxy, Way};

/// `host:port` of the server.
fn server() -> String {
    let address = url();
    address.rsplit('@').next().unwrap().split('/').next().unwrap().to_owned()
}

fn through(proxy: &Proxy) -> String {
    url().replace(&server(), &proxy.address().to_string())
}

/// Text that does not compress, too long for an index.
fn noise() -> String {
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    let mut letter = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(b'0' + u8::try_from(state % 64).unwrap())
    };
    (0..20_000).map(|_| letter()).filter(char::is_ascii_alphanumeric).collect()
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_record_that_no_table_can_hold_is_refused_alone_and_stops_nobody() {
    let (client, table) = (client().await, table("odd"));
    client.batch_execute(&format!("CREATE TABLE {table} (id int PRIMARY KEY, s text UNIQUE)")).await.unwrap();
    let sink = sink(json!({ "insert": { "table": table, "on_conflict": "ignore" } }));
    let many: serde_json::Map<_, _> = (0..1_700).map(|number| (format!("c{number}"), number.into())).collect();
    for (payload, told) in [
        ("{}".to_owned(), "no fields"),
        (r#"{"id": 5, "": 1}"#.to_owned(), "no name for a column"),
        (r#"{"id": 5, "a\u0000b": 1}"#.to_owned(), "no name for a column"),
        (json!({ "id": 5, "s".repeat(64): 1 }).to_string(), "no name for a column"),
        (serde_json::Value::from(many).to_string(), "1600"),
        (json!({ "id": 5, "s": noise() }).to_string(), "54000"),
        (r#"{"id": 5, "s": "a\u0000b"}"#.to_owned(), "22P05"),
    ] {
        let batch = [operation(1, r#"{"id": 1}"#), operation(2, &payload), operation(3, r#"{"id": 3}"#)];
        let written = sink.write(&batch).await;
        let shown: String = payload.chars().take(40).collect();
        assert_eq!(verdicts(&written), [(1, Verdict::Never)], "{shown}: {written:?}");
        assert!(written.failed[0].1.message.contains(told), "{shown}: {written:?}");
    }
    assert_eq!(one(&client, &format!("SELECT string_agg(id::text, ',' ORDER BY id) FROM {table}")).await, "1,3");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_column_that_the_file_names_wrongly_is_no_records_fault() {
    let (client, table) = (client().await, table("altered"));
    client.batch_execute(&format!("CREATE TABLE {table} (id int PRIMARY KEY)")).await.unwrap();
    for spec in [
        json!({ "insert": { "table": table, "columns": { "id": "{payload.id}", "colour": "{payload.id}" } } }),
        json!({ "statement": { "sql": format!("UPDATE {table} SET colour = $1"), "params": ["{payload.id}"] } }),
    ] {
        let written = sink(spec).write(&[operation(1, r#"{"id": 1}"#), operation(2, r#"{"id": 2}"#)]).await;
        assert_eq!(verdicts(&written), [(0, Verdict::Down), (1, Verdict::Down)]);
        assert!(written.failed[0].1.message.contains("colour"), "{written:?}");
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_constraint_that_is_checked_at_the_end_still_finds_its_row() {
    let (client, table) = (client().await, table("late"));
    client
        .batch_execute(&format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, parent int REFERENCES {table} DEFERRABLE INITIALLY DEFERRED)"
        ))
        .await
        .unwrap();
    let sink = sink(json!({ "insert": { "table": table } }));
    let batch = [
        operation(1, r#"{"id": 1, "parent": null}"#),
        operation(2, r#"{"id": 2, "parent": 77}"#),
        operation(3, r#"{"id": 3, "parent": 1}"#),
    ];
    let written = sink.write(&batch).await;
    assert_eq!(verdicts(&written), [(1, Verdict::Never)], "{written:?}");
    assert!(written.failed[0].1.message.contains("23503"), "{written:?}");
    assert_eq!(one(&client, &format!("SELECT string_agg(id::text, ',' ORDER BY id) FROM {table}")).await, "1,3");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_server_that_falls_silent_holds_nobody_longer_than_the_timeout() {
    let (client, table) = (client().await, table("silent"));
    client.batch_execute(&format!("CREATE TABLE {table} (id int PRIMARY KEY)")).await.unwrap();
    let mut proxy = Proxy::start(&server()).await;
    let sink = sink(json!({ "url": through(&proxy), "timeout": "1s", "upsert": { "table": table, "key": ["id"] } }));
    assert_eq!(verdicts(&sink.write(&[operation(1, r#"{"id": 1}"#)]).await), []);
    proxy.stall(Way::Down);
    let batch = [operation(2, r#"{"id": 2}"#)];
    let written = tokio::time::timeout(Duration::from_secs(30), sink.write(&batch)).await.expect("an end");
    assert_eq!(verdicts(&written), [(0, Verdict::Backoff)]);
    assert!(written.failed[0].1.message.contains("no answer within 1s"), "{written:?}");
    proxy.restore().await;
    assert_eq!(verdicts(&sink.write(&batch).await), []);
    assert_eq!(one(&client, &format!("SELECT count(*)::text FROM {table}")).await, "2");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_connection_that_ends_in_a_transaction_leaves_nothing_half_done() {
    let (locker, watcher, table) = (client().await, client().await, table("torn"));
    locker.batch_execute(&format!("CREATE TABLE {table} (id int PRIMARY KEY)")).await.unwrap();
    let proxy = Proxy::start(&server()).await;
    let sink = sink(json!({
        "url": through(&proxy),
        "cases": [
            { "when": "payload.id == 1", "insert": { "table": table } },
            { "upsert": { "table": table, "key": ["id"] } },
        ],
    }));
    // The first row is written, the second waits for a lock: the middle of a transaction.
    locker.batch_execute(&format!("BEGIN; INSERT INTO {table} VALUES (2)")).await.unwrap();
    let mut second = operation(2, r#"{"id": 2}"#);
    second.case = 1;
    let batch = [operation(1, r#"{"id": 1}"#), second];
    let waits = format!(
        "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%{table}%'"
    );
    let reset = async {
        while one(&watcher, &waits).await == "0" {}
        proxy.reset();
    };
    let (written, ()) = tokio::join!(sink.write(&batch), reset);
    assert_eq!(verdicts(&written), [(0, Verdict::Down), (1, Verdict::Down)]);
    locker.batch_execute("ROLLBACK").await.unwrap();
    // That server process finds its client gone only when it answers; then the first row is gone too.
    assert_eq!(verdicts(&sink.write(&batch).await), []);
    assert_eq!(one(&watcher, &format!("SELECT string_agg(id::text, ',') FROM {table}")).await, "1,2");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_probe_finds_what_is_missing_and_changes_nothing() {
    let (client, table, seen) = (client().await, table("probed"), table("unseen"));
    client.batch_execute(&format!("CREATE TABLE {table} (id int PRIMARY KEY, s text)")).await.unwrap();
    for (spec, told) in [
        (json!({ "upsert": { "table": table, "key": ["id"] } }), None),
        (json!({ "upsert": { "table": table, "key": ["s"] } }), Some("unique")),
        (json!({ "delete": { "table": table, "key": ["colour"] } }), Some("no column colour")),
        (json!({ "insert": { "table": table, "columns": { "colour": 1 } } }), Some("no column colour")),
        (json!({ "insert": { "table": format!("{table}_not") } }), Some("there is no table")),
        (json!({ "statement": { "sql": "SELEC 1" } }), Some("SELEC")),
    ] {
        let mut spec = spec;
        spec["barrier"] = json!({ "table": seen });
        let probed = sink(spec).probe().await;
        assert_eq!(probed[0].ok, told.is_none(), "{probed:?}");
        assert!(probed[0].found.contains(told.unwrap_or("clocks agree")), "{probed:?}");
    }
    assert_eq!(one(&client, &format!("SELECT (to_regclass('{seen}') IS NULL)::text")).await, "true");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn who_lacks_a_right_is_told_what_to_run() {
    let (client, table, user) = (client().await, table("guarded"), table("reader"));
    client
        .batch_execute(&format!("CREATE TABLE {table} (id int PRIMARY KEY); CREATE ROLE {user} LOGIN"))
        .await
        .unwrap();
    let url = format!("postgres://{user}@{}/postgres", server());
    let plain = sink(json!({ "url": url, "insert": { "table": table } }));
    let written = plain.write(&[operation(1, r#"{"id": 1}"#)]).await;
    assert_eq!(verdicts(&written), [(0, Verdict::Down)]);
    assert!(written.failed[0].1.message.contains("GRANT"), "{written:?}");
    assert!(plain.probe().await[0].found.contains("GRANT INSERT ON"), "the right is named");
    client.batch_execute(&format!("GRANT INSERT ON {table} TO {user}")).await.unwrap();
    assert_eq!(verdicts(&plain.write(&[operation(1, r#"{"id": 1}"#)]).await), [], "found again by itself");
    let seen = crate::kafka::unique("kept").replace('-', "_");
    let guarded = sink(json!({ "url": url, "insert": { "table": table }, "barrier": { "table": seen } }));
    let batch = [operation(2, r#"{"id": 2}"#)];
    let written = guarded.write(&batch).await;
    assert_eq!(verdicts(&written), [(0, Verdict::Down)]);
    let make = format!("CREATE TABLE IF NOT EXISTS \"{seen}\"");
    assert!(written.failed[0].1.message.contains(&make), "{written:?}");
    client
        .batch_execute(&format!(
            "CREATE TABLE {seen} (id text PRIMARY KEY, at timestamptz NOT NULL DEFAULT now());
             GRANT SELECT, INSERT, DELETE ON {seen} TO {user}"
        ))
        .await
        .unwrap();
    assert_eq!(verdicts(&guarded.write(&batch).await), []);
    client.batch_execute(&format!("DROP OWNED BY {user}; DROP ROLE {user}")).await.unwrap();
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_table_that_is_dropped_under_load_and_made_again_is_an_outage_and_loses_nothing_after_it() {
    let (client, table) = (client().await, table("under"));
    let make = |kind: &str| format!("CREATE TABLE {table} (id text PRIMARY KEY, s {kind})");
    client.batch_execute(&make("json")).await.unwrap();
    let sink = sink(json!({ "insert": { "table": table } }));
    let (made_again, down, before) = (Cell::new(false), Cell::new(0), Cell::new(0));
    // Batches by COPY and by INSERT, each sent until it is taken; those begun after the table was made again have to be there.
    let writer = async |number: usize, rows: u16| {
        let mut owed = Vec::new();
        for round in 0.. {
            if owed.len() >= 3 {
                break;
            }
            let name = format!("{number}/{round}");
            let row = |row| operation(row, &json!({ "id": format!("{name}/{row}"), "s": "a\u{e9}" }).to_string());
            let batch: Vec<_> = (0..rows).map(row).collect();
            let late = made_again.get();
            loop {
                let written = sink.write(&batch).await;
                if written.failed.is_empty() {
                    break;
                }
                assert_eq!(written.failed.len(), batch.len(), "all or none");
                for (_, failure) in &written.failed {
                    assert_eq!(failure.verdict, Verdict::Down, "{failure}");
                }
                down.set(down.get() + 1);
                tokio::task::yield_now().await;
            }
            before.set(before.get() + 1);
            if late {
                owed.push((name, rows));
            }
        }
        owed
    };
    let operator = async {
        while before.get() < 8 {
            tokio::task::yield_now().await;
        }
        client.batch_execute(&format!("DROP TABLE {table}")).await.unwrap();
        while down.get() < 8 {
            tokio::task::yield_now().await;
        }
        client.batch_execute(&make("text")).await.unwrap();
        made_again.set(true);
    };
    let all = async { tokio::join!(writer(1, MANY), writer(2, MANY), writer(3, 10), writer(4, 1), operator) };
    let (first, second, third, fourth, ()) = tokio::time::timeout(Duration::from_secs(60), all).await.expect("an end");
    for (name, rows) in [first, second, third, fourth].concat() {
        let there = format!("SELECT count(*)::text FROM {table} WHERE id LIKE '{name}/%' AND s = 'a\u{e9}'");
        assert_eq!(one(&client, &there).await, rows.to_string(), "{name}");
    }
}
