//! `postgres` with many rows: COPY means what the INSERT means, takes over only where it does, and finds the same bad rows.

use serde_json::{Value, json};
use tokio_postgres::Client;
use walflow::sink::{Operation, Verdict};

use super::postgres::{client, one, sink, table, url};
use super::{keyed, operation, verdicts};

pub(super) const MANY: u16 = 1_000;

/// Makes a table whose statements are kept, `COPY` or `INSERT` each, in the table `{name}_log`.
pub(super) async fn watched(client: &Client, name: &str, columns: &str) {
    let make = format!(
        "CREATE TABLE {name} ({columns});
         CREATE TABLE {name}_log (n serial, act text);
         GRANT ALL ON {name}_log, {name}_log_n_seq TO public;
         CREATE FUNCTION {name}_note() RETURNS trigger LANGUAGE plpgsql AS $$
           BEGIN INSERT INTO {name}_log (act) VALUES (split_part(current_query(), ' ', 1)); RETURN NULL; END $$;
         CREATE TRIGGER note AFTER INSERT ON {name} FOR EACH STATEMENT EXECUTE FUNCTION {name}_note()"
    );
    client.batch_execute(&make).await.unwrap();
}

/// The statements that took effect since the last call.
pub(super) async fn acts(client: &Client, name: &str) -> String {
    let query = format!(
        "WITH gone AS (DELETE FROM {name}_log RETURNING n, act) SELECT coalesce(string_agg(act, ' ' ORDER BY n), '') FROM gone"
    );
    one(client, &query).await
}

async fn count(client: &Client, name: &str) -> String {
    one(client, &format!("SELECT count(*)::text FROM {name}")).await
}

fn numbered(row: impl Fn(u16) -> Value) -> Vec<Operation> {
    (1..=MANY).map(|number| operation(number, &row(number).to_string())).collect()
}

fn ids() -> Vec<Operation> {
    numbered(|number| json!({ "id": number }))
}

/// Written as JSON, so that escapes and digits stay as they stand here.
const ODD_ROWS: [&str; 8] = [
    r#""s":"a\tb\r\nc\\d","j":"a\tb\u00e9\u001f\/\"","jb":"x\ny","n":1.10,"at":"2026-11-27T20:00:00.123456+02:00","d":"2026-02-28""#,
    r#""s":"\\N","j":{ "a" : [1,2.50,"\\"] },"jb":{"b":1,"a":[ ]},"n":"12345678901234567890.123456789","at":"now","d":"today""#,
    r#""s":"\\.","j":[1,"\ud83d\ude00"],"jb":["\ud83d\ude00"],"n":1e20,"at":"epoch","d":"infinity""#,
    r#""s":1.10,"j":1.10,"jb":1.10,"n":-0.0,"at":null,"d":null"#,
    r#""s":{ "k" : "v\n" },"j":null,"jb":null,"n":null,"at":"2026-01-01","d":"20260101""#,
    r#""s":true,"j":true,"jb":false,"n":"NaN","at":"1 Jan 2026 00:00 PST","d":"Jan 2, 2026""#,
    r#""s":"","j":"","jb":"","n":" 7 ","at":"-infinity","d":" 2026-03-04 ""#,
    r#""s":"\ud83d\ude00é","j":"é\u0001","jb":"\u00e9","n":1E-3,"at":"1999-01-08 04:05:06","d":null"#,
];
const MORE: &str = r#""b":"\\x00ff","u":"019a0b1c-2d3e-7f00-8000-000000000000","i":"10.0.0.1/8","m":"sad","r":"[1,5)",
    "c":"ab","v":"abc","f":"t","x":"1.5e300","o":"1 day 2:03","bits":"101""#;

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn many_rows_go_by_copy_in_order_and_arrive_as_inserts_would() {
    let (client, copied) = (client().await, table("copied"));
    let inserted = format!("{copied}_slow");
    client
        .batch_execute(&format!("CREATE TYPE {copied}_m AS ENUM ('ok', 'sad'); CREATE DOMAIN {copied}_d AS int"))
        .await
        .unwrap();
    let columns = format!(
        "n0 bigserial, id int PRIMARY KEY, s text, j json, jb jsonb, n numeric, at timestamptz, d date, b bytea, u uuid,
         i inet, m {copied}_m, r int4range, c char(4), v varchar(3), f bool, x double precision, o interval, bits bit(3),
         made text DEFAULT 'here', twice int GENERATED ALWAYS AS (id * 2) STORED"
    );
    watched(&client, &copied, &columns).await;
    // A domain keeps COPY away.
    watched(&client, &inserted, &format!("{columns}, away {copied}_d")).await;
    let rows: Vec<Operation> = (0..MANY)
        .map(|number| {
            let odd = ODD_ROWS[usize::from(number) % ODD_ROWS.len()];
            operation(number, &format!("{{\"id\":{},{odd},{MORE}}}", 1_000 - number))
        })
        .collect();
    // `now` is the time of a transaction, so that differs; everything else is compared as text.
    for (name, act) in [(&copied, "COPY"), (&inserted, "INSERT")] {
        assert_eq!(verdicts(&sink(json!({ "insert": { "table": name } })).write(&rows).await), [], "{name}");
        assert_eq!(acts(&client, name).await, act);
        assert_eq!(count(&client, name).await, MANY.to_string());
        let out_of_order = format!("SELECT count(*)::text FROM {name} WHERE n0 + id <> 1001");
        assert_eq!(one(&client, &out_of_order).await, "0", "{name} in the batch's order");
        client
            .batch_execute(&format!(
                "UPDATE {name} SET at = 'epoch' WHERE at > now() - interval '1 hour' AND at < 'infinity'"
            ))
            .await
            .unwrap();
    }
    let shared = "n0, id, s, j::text, jb, n, at, d, b, u, i, m, r, c, v, f, x, o, bits, made, twice";
    let differ = format!(
        "SELECT coalesce(string_agg(r::text, E'\\n'), 'same') FROM
         (SELECT {shared} FROM {copied} EXCEPT SELECT {shared} FROM {inserted}) AS r"
    );
    assert_eq!(one(&client, &differ).await, "same");
    let first = format!("SELECT concat_ws('|', s, j, n) FROM {copied} WHERE id = 1000");
    assert_eq!(one(&client, &first).await, "a\tb\r\nc\\d|\"a\\tb\u{e9}\\u001f/\\\"\"|1.10");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn of_many_rows_the_bad_ones_alone_are_refused() {
    let (client, table) = (client().await, table("checked"));
    watched(&client, &table, "n bigserial, id int PRIMARY KEY, s text CHECK (s <> 'bad')").await;
    let sink = sink(json!({ "insert": { "table": table } }));
    let payload = |number: u16| match number {
        37 => json!({ "id": number, "s": "bad" }),
        80 => json!({ "id": "eighty", "s": "x" }),
        90 => json!({ "id": 1, "s": "there already" }),
        _ => json!({ "id": number, "s": "x" }),
    };
    let batch: Vec<Operation> = (1..=MANY)
        .map(|number| {
            let key = if matches!(number, 37 | 200) { "same" } else { "" };
            keyed(number, Some(key).filter(|key| !key.is_empty()), &payload(number).to_string())
        })
        .collect();
    let written = sink.write(&batch).await;
    let never = Verdict::Never;
    assert_eq!(verdicts(&written), [(36, never), (79, never), (89, never), (199, Verdict::Backoff)]);
    for ((_, failure), told) in written.failed.iter().zip(["23514", "22P02", "23505"]) {
        assert!(failure.message.contains(told), "{told}: {failure}");
    }
    assert_eq!(count(&client, &table).await, (MANY - 4).to_string());
    assert!(!acts(&client, &table).await.contains("COPY"), "what was copied with a bad row is undone");
    let order = format!("SELECT (array_agg(id ORDER BY n) = array_agg(id ORDER BY id))::text FROM {table}");
    assert_eq!(one(&client, &order).await, "true");
    // What no COPY can carry.
    let nul = numbered(|number| json!({ "id": 1_000 + number, "s": if number == 7 { "nul\0" } else { "x" } }));
    let written = sink.write(&nul).await;
    assert_eq!(verdicts(&written), [(6, never)]);
    assert!(written.failed[0].1.message.contains("22P05"), "{written:?}");
    // One that is checked when the transaction ends, long after the rows were copied.
    let late = format!("{table}_late");
    watched(
        &client,
        &late,
        &format!("id int PRIMARY KEY, up int REFERENCES {table} (id) DEFERRABLE INITIALLY DEFERRED"),
    )
    .await;
    let sink = super::postgres::sink(json!({ "insert": { "table": late } }));
    let batch = numbered(|number| json!({ "id": number, "up": if number == 140 { 9_999 } else { 1 } }));
    let written = sink.write(&batch).await;
    assert_eq!(verdicts(&written), [(139, Verdict::Never)]);
    assert!(written.failed[0].1.message.contains("23503"), "{written:?}");
    assert_eq!(count(&client, &late).await, (MANY - 1).to_string());
    let sink = super::postgres::sink(json!({ "insert": { "table": late } }));
    let good: Vec<Operation> =
        (2_000..2_000 + MANY).map(|number| operation(number, &json!({ "id": number, "up": 1 }).to_string())).collect();
    acts(&client, &late).await;
    assert_eq!(verdicts(&sink.write(&good).await), []);
    assert_eq!(acts(&client, &late).await, "COPY");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn where_copy_would_mean_something_else_rows_are_inserted() {
    let (client, base) = (client().await, table("special"));
    let name = |kind: &str| format!("{base}_{kind}");
    client.batch_execute(&format!("CREATE DOMAIN {base}_d AS int CHECK (value IS NOT NULL)")).await.unwrap();
    for (kind, columns, row) in [
        ("ragged", "id int, tags text[]", json!({ "id": 1, "tags": [[]] })),
        ("point", "id int, at point", json!({ "id": 1, "at": "(1,2)" })),
        ("few", "id int", json!({ "id": 1 })),
    ] {
        watched(&client, &name(kind), columns).await;
        let mut batch = numbered(|_| row.clone());
        if kind == "few" {
            batch.truncate(usize::from(MANY) - 1);
        }
        let written = sink(json!({ "insert": { "table": name(kind) } })).write(&batch).await;
        assert_eq!(verdicts(&written), [], "{kind}");
        assert_eq!(acts(&client, &name(kind)).await, "INSERT", "{kind}");
    }
    // Reading a JSON row, a server checks this domain though the record does not name its column.
    watched(&client, &name("domain"), &format!("id int, other {base}_d DEFAULT 5")).await;
    let written = sink(json!({ "insert": { "table": name("domain") } })).write(&ids()).await;
    assert_eq!(written.failed.len(), usize::from(MANY), "refused as a few rows are");
    assert_eq!(count(&client, &name("domain")).await, "0");
    // Over an identity COPY would write, and a generated column it refuses in its own words.
    for (kind, columns) in [
        ("identity", "id int GENERATED ALWAYS AS IDENTITY"),
        ("generated", "a int, id int GENERATED ALWAYS AS (a) STORED"),
    ] {
        watched(&client, &name(kind), columns).await;
        let fixed = json!({ "insert": { "table": name(kind), "columns": { "id": "{payload.id}" } } });
        let written = sink(fixed).write(&ids()).await;
        assert!(written.failed.iter().all(|(_, failure)| failure.verdict == Verdict::Down), "{kind}: {written:?}");
        assert!(written.failed[0].1.message.contains("428C9"), "{kind}: {written:?}");
        assert_eq!(count(&client, &name(kind)).await, "0", "{kind}");
    }
    // A rule, and a view.
    watched(&client, &name("ruled"), "id int").await;
    watched(&client, &name("instead"), "id int").await;
    client
        .batch_execute(&format!(
            "CREATE RULE elsewhere AS ON INSERT TO {base}_ruled DO INSTEAD INSERT INTO {base}_instead VALUES (new.id);
             CREATE VIEW {base}_view AS SELECT id FROM {base}_instead"
        ))
        .await
        .unwrap();
    for kind in ["ruled", "view"] {
        assert_eq!(verdicts(&sink(json!({ "insert": { "table": name(kind) } })).write(&ids()).await), [], "{kind}");
        assert_eq!(acts(&client, &name("instead")).await, "INSERT", "{kind}");
    }
    assert_eq!(count(&client, &name("instead")).await, (2 * MANY).to_string());
    assert_eq!(count(&client, &name("ruled")).await, "0");
    // What is there stays, and what was delivered is not delivered again.
    watched(&client, &name("once"), "id int PRIMARY KEY").await;
    let ignoring = sink(json!({ "insert": { "table": name("once"), "on_conflict": "ignore" } }));
    let guarded = sink(json!({ "insert": { "table": name("once") }, "barrier": { "table": name("seen") } }));
    for sink in [&ignoring, &ignoring] {
        assert_eq!(verdicts(&sink.write(&ids()).await), []);
    }
    client.batch_execute(&format!("TRUNCATE {}", name("once"))).await.unwrap();
    for sink in [&guarded, &guarded] {
        assert_eq!(verdicts(&sink.write(&ids()).await), []);
    }
    assert!(!acts(&client, &name("once")).await.contains("COPY"));
    assert_eq!(count(&client, &name("once")).await, MANY.to_string());
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn a_table_that_is_altered_between_two_batches_is_seen_as_it_is() {
    let (client, table) = (client().await, table("altering"));
    watched(&client, &table, "id int NOT NULL, other text").await;
    let sink = sink(json!({ "insert": { "table": table, "columns": { "id": "{payload.id}" } } }));
    assert_eq!(verdicts(&sink.write(&ids()).await), []);
    assert_eq!(acts(&client, &table).await, "COPY");
    client.batch_execute(&format!("ALTER TABLE {table} ALTER id ADD GENERATED ALWAYS AS IDENTITY")).await.unwrap();
    let written = sink.write(&ids()).await;
    assert!(written.failed.len() == usize::from(MANY) && written.failed[0].1.message.contains("428C9"), "{written:?}");
    assert_eq!(count(&client, &table).await, MANY.to_string(), "no identity is written over");
    client.batch_execute(&format!("ALTER TABLE {table} ALTER id DROP IDENTITY")).await.unwrap();
    // A rule: COPY goes past it.
    let sink = super::postgres::sink(json!({ "insert": { "table": table } }));
    acts(&client, &table).await;
    assert_eq!(verdicts(&sink.write(&ids()).await), []);
    assert_eq!(acts(&client, &table).await, "COPY");
    let copy = format!(
        "CREATE TABLE {table}_copy (id int);
         CREATE RULE also AS ON INSERT TO {table} DO ALSO INSERT INTO {table}_copy VALUES (new.id)"
    );
    client.batch_execute(&copy).await.unwrap();
    assert_eq!(verdicts(&sink.write(&ids()).await), []);
    assert_eq!(count(&client, &format!("{table}_copy")).await, MANY.to_string());
    assert_eq!(count(&client, &table).await, (3 * MANY).to_string());
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn rights_count_for_many_rows_as_for_few() {
    let (client, table) = (client().await, table("owned"));
    let user = format!("{table}_user");
    watched(&client, &table, "id int, whose text DEFAULT current_user").await;
    client.batch_execute(&format!("CREATE ROLE {user} LOGIN")).await.unwrap();
    let url = url().replace("//postgres@", &format!("//{user}@"));
    let spec = json!({ "url": url, "insert": { "table": table } });
    let sink = sink(spec.clone());
    let refused = |written: &walflow::sink::Written| {
        assert!(written.failed.iter().all(|(_, failure)| failure.verdict == Verdict::Down), "{written:?}");
        assert!(
            written.failed.len() == usize::from(MANY) && written.failed[0].1.message.contains("GRANT"),
            "{written:?}"
        );
    };
    refused(&sink.write(&ids()).await);
    client.batch_execute(&format!("GRANT INSERT (id) ON {table} TO {user}")).await.unwrap();
    assert_eq!(verdicts(&sink.write(&ids()).await), []);
    client.batch_execute(&format!("GRANT INSERT ON {table} TO {user}")).await.unwrap();
    acts(&client, &table).await;
    assert_eq!(verdicts(&sink.write(&ids()).await), []);
    assert_eq!(acts(&client, &table).await, "COPY");
    // Row security: COPY is refused before it begins, an INSERT is measured by the policy.
    client
        .batch_execute(&format!(
            "ALTER TABLE {table} ENABLE ROW LEVEL SECURITY;
             CREATE POLICY even ON {table} FOR INSERT WITH CHECK (id % 2 = 0)"
        ))
        .await
        .unwrap();
    let even = numbered(|number| json!({ "id": 2 * number }));
    for _ in 0..2 {
        assert_eq!(verdicts(&sink.write(&even).await), []);
        assert_eq!(acts(&client, &table).await, "INSERT");
    }
    client.batch_execute(&format!("ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")).await.unwrap();
    // Taken away again.
    let sink = super::postgres::sink(spec);
    assert_eq!(verdicts(&sink.write(&ids()).await), []);
    assert_eq!(acts(&client, &table).await, "COPY");
    client
        .batch_execute(&format!("REVOKE INSERT ON {table} FROM {user}; REVOKE INSERT (id) ON {table} FROM {user}"))
        .await
        .unwrap();
    for _ in 0..2 {
        refused(&sink.write(&ids()).await);
    }
    client.batch_execute(&format!("DROP OWNED BY {user}; DROP ROLE {user}")).await.unwrap();
}
