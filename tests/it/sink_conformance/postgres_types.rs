//! `postgres`, the map of types: each goes in by INSERT, by upsert, by a statement's parameter and by COPY, and stands there as
//! the same; what is no such value is refused alone, by table and column and in kind.

use serde_json::json;
use walflow::sink::{Operation, Sink, Verdict};

use super::postgres::{client, one, sink, table};
use super::postgres_copy::{MANY, acts, watched};
use super::{operation, verdicts};

/// By type: JSON and what then stands in the database, as text; JSON that is refused, in what kind, with the code.
struct Type {
    name: &'static str,
    taken: &'static [(&'static str, &'static str)],
    refused: &'static [(&'static str, &'static str, &'static str)],
}

/// What is refused says `geheim` wherever it can, and no text may repeat it.
const TYPES: &[Type] = &[
    Type {
        name: "int8",
        taken: &[
            ("9007199254740993", "9007199254740993"),
            ("9223372036854775807", "9223372036854775807"),
            ("-9223372036854775808", "-9223372036854775808"),
            (r#""42""#, "42"),
        ],
        refused: &[
            ("9223372036854775808", "a number", "22003"),
            ("1.5", "a number", "22P02"),
            ("true", "a bool", "22P02"),
            (r#""geheim""#, "a string of 6 characters", "22P02"),
            (r#"["geheim"]"#, "an array", "22P02"),
            (r#"{"a":"geheim"}"#, "an object", "22P02"),
        ],
    },
    Type {
        name: "numeric",
        taken: &[
            ("1234567890123456789012345678901234567890.5", "1234567890123456789012345678901234567890.5"),
            ("-0.10", "-0.10"),
            ("1e-30", "0.000000000000000000000000000001"),
            (r#""NaN""#, "NaN"),
            (r#""1234567890123456789012345678901234567890""#, "1234567890123456789012345678901234567890"),
        ],
        refused: &[(r#""geheim""#, "a string of 6 characters", "22P02"), ("1e999999", "a number", "22003")],
    },
    Type { name: "numeric(5,2)", taken: &[("999.994", "999.99")], refused: &[("1000", "a number", "22003")] },
    Type {
        name: "double precision",
        taken: &[("0.1", "0.1"), ("1.5e300", "1.5e+300"), (r#""-Infinity""#, "-Infinity"), ("-0.0", "-0")],
        refused: &[("1e400", "a number", "22003")],
    },
    Type {
        name: "bool",
        taken: &[("true", "true"), (r#""f""#, "false"), ("1", "true")],
        refused: &[("2", "a number", "22P02")],
    },
    Type {
        name: "timestamptz",
        taken: &[
            (r#""2026-11-27T20:00:00.123456+02:00""#, "2026-11-27 18:00:00.123456+00"),
            (r#""2026-11-27T20:00:00.1234567-05:30""#, "2026-11-28 01:30:00.123457+00"),
            (r#""1969-12-31T23:59:59.999Z""#, "1969-12-31 23:59:59.999+00"),
            (r#""infinity""#, "infinity"),
        ],
        refused: &[
            (r#""geheim""#, "a string of 6 characters", "22007"),
            (r#""2026-02-30T00:00:00Z""#, "a string of 20 characters", "22008"),
            ("1764000000", "a number", "22008"),
        ],
    },
    Type {
        name: "uuid",
        taken: &[(r#""019A0B1C-2D3E-7F00-8000-00000000000A""#, "019a0b1c-2d3e-7f00-8000-00000000000a")],
        refused: &[(r#""geheim""#, "a string of 6 characters", "22P02")],
    },
    Type {
        name: "jsonb",
        taken: &[
            (r#"{"b":1,"a":"é😀\n\u00e9"}"#, r#"{"a": "é😀\né", "b": 1}"#),
            ("[1.10,12345678901234567890123,null]", "[1.10, 12345678901234567890123, null]"),
            (r#""plain \"text\"""#, r#""plain \"text\"""#),
            ("1.10", "1.10"),
            ("false", "false"),
        ],
        refused: &[
            (r#""geheim\u0000""#, "a string of 7 characters", "22P05"),
            (r#"{"geheim":"\u0000"}"#, "an object", "22P05"),
        ],
    },
    Type {
        name: "json",
        taken: &[(r#"{"b":1.0,"a":"é"}"#, r#"{"b":1.0,"a":"é"}"#), (r#""x""#, r#""x""#)],
        refused: &[],
    },
    Type {
        name: "bytea",
        // Text that is not hex is what it says, letter by letter: base64 is not decoded.
        taken: &[(r#""\\x00ff""#, r"\x00ff"), (r#""\\x""#, r"\x"), (r#""YWJj""#, r"\x59574a6a")],
        refused: &[(r#""\\xgeheim""#, "a string of 8 characters", "22023")],
    },
    Type {
        name: "text",
        taken: &[
            ("1.10", "1.10"),
            (r#"{"k":"v"}"#, r#"{"k":"v"}"#),
            ("true", "true"),
            (r#""\u00e9\t\\N\n""#, "é\t\\N\n"),
            (r#""""#, ""),
        ],
        refused: &[],
    },
    Type {
        name: "varchar(3)",
        taken: &[(r#""äöü""#, "äöü")],
        refused: &[(r#""geheim""#, "a string of 6 characters", "22001")],
    },
    Type {
        name: "text[]",
        taken: &[
            (
                r#"["a","b,c","q\"uo\\te","{x}","",null,"NULL"," sp ","é\n"]"#,
                "{a,\"b,c\",\"q\\\"uo\\\\te\",\"{x}\",\"\",NULL,\"NULL\",\" sp \",\"é\n\"}",
            ),
            ("[]", "{}"),
            (r#"[["a","b"],["c",null]]"#, "{{a,b},{c,NULL}}"),
            (r#"[1.50,true,{"a":[1]}]"#, r#"{1.50,true,"{\"a\":[1]}"}"#),
            (r#""{x,\"y z\"}""#, r#"{x,"y z"}"#),
        ],
        refused: &[
            (r#"[["geheim"],["b","c"]]"#, "an array", "22P02"),
            (r#"{"a":"geheim"}"#, "an object", "22P02"),
            (r#""geheim""#, "a string of 6 characters", "22P02"),
        ],
    },
    Type {
        name: "int8[]",
        taken: &[
            (
                "[9223372036854775807,-9223372036854775808,null,9007199254740993]",
                "{9223372036854775807,-9223372036854775808,NULL,9007199254740993}",
            ),
            (r#"["1",2]"#, "{1,2}"),
            ("[[[1,2]],[[3,4]]]", "{{{1,2}},{{3,4}}}"),
            (r#""[0:1]={7,8}""#, "[0:1]={7,8}"),
        ],
        refused: &[
            ("[1,9223372036854775808]", "an array", "22003"),
            (r#"["geheim"]"#, "an array", "22P02"),
            ("[1.5]", "an array", "22P02"),
        ],
    },
    Type {
        name: "jsonb[]",
        taken: &[
            (r#"[{"a":[1,2.50]},"x",null,3]"#, r#"{"{\"a\": [1, 2.50]}","\"x\"",NULL,3}"#),
            ("[[1],[2]]", "{{1},{2}}"),
        ],
        refused: &[],
    },
    Type { name: "numeric[]", taken: &[(r#"["NaN",1.10,1e-5]"#, "{NaN,1.10,0.00001}")], refused: &[] },
    Type {
        name: "uuid[]",
        taken: &[(r#"["019A0B1C-2D3E-7F00-8000-00000000000A"]"#, "{019a0b1c-2d3e-7f00-8000-00000000000a}")],
        refused: &[],
    },
    Type { name: "bytea[]", taken: &[(r#"["\\x00ff",null]"#, r#"{"\\x00ff",NULL}"#)], refused: &[] },
    Type {
        name: "timestamptz[]",
        taken: &[(r#"["2026-11-27T20:00:00.5+02:00"]"#, r#"{"2026-11-27 18:00:00.5+00"}"#)],
        refused: &[(r#"["geheim"]"#, "an array", "22007")],
    },
    Type {
        name: "varchar(3)[]",
        taken: &[(r#"["abc"]"#, "{abc}")],
        refused: &[(r#"["geheim"]"#, "an array", "22001")],
    },
];

/// The ways into a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Insert,
    Upsert,
    Statement,
    Copy,
}

impl Way {
    fn sink(self, table: &str) -> Box<dyn Sink> {
        sink(match self {
            Self::Insert | Self::Copy => json!({ "insert": { "table": table } }),
            Self::Upsert => json!({ "upsert": { "table": table, "key": ["id"] } }),
            Self::Statement => json!({ "statement": {
                "sql": format!("INSERT INTO {table} (id, v) VALUES ($1, $2)"),
                "params": ["{payload.id}", "{payload.v}"],
            } }),
        })
    }

    /// Rows of the values, over and over where only many go this way.
    fn rows(self, values: &[&str]) -> Vec<Operation> {
        let count = if self == Self::Copy { usize::from(MANY) } else { values.len() };
        let rows = (0..).zip(values.iter().cycle().take(count));
        rows.map(|(id, value)| operation(id, &format!("{{\"id\":{id},\"v\":{value}}}"))).collect()
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn every_type_stands_there_as_it_was_given_whichever_way_it_went() {
    let (client, base) = (client().await, table("typed"));
    client.batch_execute("SET TimeZone = 'UTC'").await.unwrap();
    for (number, of) in TYPES.iter().enumerate() {
        let table = format!("{base}_{number}");
        watched(&client, &table, &format!("id int PRIMARY KEY, v {}", of.name)).await;
        for way in [Way::Insert, Way::Upsert, Way::Statement, Way::Copy] {
            let what = format!("{} by {way:?}", of.name);
            // A reference to null has no value, so a parameter cannot be null by one.
            let null: &[(&str, &str)] = if way == Way::Statement { &[] } else { &[("null", "NULL")] };
            let (values, expected): (Vec<&str>, Vec<&str>) = of.taken.iter().chain(null).copied().unzip();
            let rows = way.rows(&values);
            assert_eq!(verdicts(&way.sink(&table).write(&rows).await), [], "{what}");
            let went = acts(&client, &table).await;
            assert_eq!(went.starts_with("COPY"), way == Way::Copy, "{what}: {went}");
            let read = format!("SELECT coalesce(v::text, 'NULL') FROM {table} ORDER BY id");
            let found: Vec<String> = client.query(&read, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
            let expected: Vec<&str> = expected.iter().copied().cycle().take(rows.len()).collect();
            assert_eq!(found, expected, "{what}");
            client.batch_execute(&format!("TRUNCATE {table}")).await.unwrap();
        }
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn what_is_no_value_of_its_type_is_refused_alone_by_table_and_column_and_in_kind() {
    let (client, base) = (client().await, table("strict"));
    for (number, of) in TYPES.iter().enumerate() {
        let table = format!("{base}_{number}");
        client.batch_execute(&format!("CREATE TABLE {table} (id int PRIMARY KEY, v {})", of.name)).await.unwrap();
        for way in [Way::Insert, Way::Upsert, Way::Statement, Way::Copy] {
            for (value, kind, code) in of.refused {
                let what = format!("{value} as {} by {way:?}", of.name);
                let mut rows = way.rows(&[of.taken[0].0; 3]);
                rows[1] = operation(1, &format!("{{\"id\":1,\"v\":{value}}}"));
                let written = way.sink(&table).write(&rows).await;
                assert_eq!(verdicts(&written), [(1, Verdict::Never)], "{what}: {written:?}");
                let message = &written.failed[0].1.message;
                let place = match way {
                    Way::Statement => format!("parameter $2 given {kind}]"),
                    _ => format!("[table {table}, column v, given {kind}]"),
                };
                assert!(message.contains(&format!("SQLSTATE {code}")) && message.contains(&place), "{what}: {message}");
                assert!(!message.contains("geheim"), "{what}: {message}");
                let others = (rows.len() - 1).to_string();
                assert_eq!(one(&client, &format!("SELECT count(*)::text FROM {table}")).await, others, "{what}");
                client.batch_execute(&format!("TRUNCATE {table}")).await.unwrap();
            }
        }
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run tests/run"]
async fn what_a_table_refuses_for_another_reason_names_the_place_too_and_no_value() {
    let (client, table) = (client().await, table("named"));
    client
        .batch_execute(&format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, must int8 NOT NULL, name text UNIQUE CHECK (name <> 'geheim'), n int[])"
        ))
        .await
        .unwrap();
    let upsert = sink(json!({ "upsert": { "table": table, "key": ["id"] } }));
    let fixed =
        sink(json!({ "insert": { "table": table, "columns": { "id": "{payload.id}", "must": "{payload.must}" } } }));
    let delete = sink(json!({ "delete": { "table": table, "key": ["id"] } }));
    let statement = sink(json!({ "statement": {
        "sql": format!("UPDATE {table} SET n = $1, must = $2 WHERE id = 1"), "params": ["{payload.n}", null],
    } }));
    let good = operation(1, r#"{"id": 1, "must": 1, "name": "a", "n": [1]}"#);
    assert_eq!(verdicts(&upsert.write(std::slice::from_ref(&good)).await), []);
    for (sink, bad, told) in [
        (&upsert, r#"{"id": 2, "must": null}"#, format!("23502) [table {table}, column must, given null]")),
        (&upsert, r#"{"id": 2}"#, format!("23502) [table {table}, column must, not given]")),
        (
            &upsert,
            r#"{"id": 2, "must": 1, "name": "geheim"}"#,
            format!("[table {table}, constraint {table}_name_check]"),
        ),
        (&upsert, r#"{"id": 2, "must": 1, "name": "a"}"#, format!("[table {table}, constraint {table}_name_key]")),
        (
            &upsert,
            r#"{"id": 2, "must": 1, "colour": "geheim"}"#,
            format!("42703) [table {table}, column colour, given a string of 6 characters]"),
        ),
        (&upsert, r#"{"id": null}"#, format!("table {table}: the key column id has no value")),
        (&upsert, "[1]", format!("table {table}: the payload is no JSON object")),
        (&fixed, r#"{"id": 2}"#, format!("table {table}: column must: {{payload.must}} is missing")),
        (&delete, r#"{"id": "geheim"}"#, format!("22P02) [table {table}, column id, given a string of 6 characters]")),
        (&statement, r#"{"x": 1}"#, "parameter $1: {payload.n} is missing".to_owned()),
        (&statement, r#"{"n": [1]}"#, format!("23502) [table {table}, column must]")),
    ] {
        let written = sink.write(&[operation(2, bad)]).await;
        assert_eq!(verdicts(&written), [(0, Verdict::Never)], "{bad}: {written:?}");
        let message = &written.failed[0].1.message;
        assert!(message.contains(&told) && !message.contains("geheim"), "{bad}: {message}");
    }
    assert_eq!(one(&client, &format!("SELECT concat_ws('|', id, must, name, n) FROM {table}")).await, "1|1|a|{1}");
}
