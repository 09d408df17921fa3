//! Many new rows at once, by `COPY … FROM STDIN`, where that means what the INSERT means.
//!
//! Takes a run of plain inserts. The text format, because there the server reads each value as the INSERT has it read, from
//! text: its own time zone, precision and words (`now`) stay its own, and no type is converted here. Never used for a table
//! or a column for which COPY differs; what those are the query [`SHAPE`] says. Whatever COPY does not take, the INSERT tries.

use std::collections::HashMap;

use bytes::Bytes;
use futures::SinkExt as _;
use parking_lot::Mutex;
use tokio_postgres::Transaction;
use tokio_postgres::types::Type;

use super::PostgresSink;
use super::statement::{Case, Run, list};
use super::verdict::{Ended, is_for_insert, within};

/// Fewer rows are not worth the question what the table is like.
const FEWEST: usize = 400;
/// Deeper JSON the server may refuse to read, and with COPY it would not read what goes into a text column.
const DEEPEST: usize = 256;

/// By column how its values are written, and whether the table is one for COPY at all.
///
/// COPY differs from INSERT where a rule rewrites the INSERT, where row security is in force (COPY is refused), for views and
/// foreign tables, for a column GENERATED ALWAYS (COPY writes over an identity without a word), and for types with parts,
/// arrays and composites first (JSON is not how they are written). A table with a domain is left out too: reading a JSON row
/// the server checks the domains of all its columns, also of those that get their default.
const SHAPE: &str = "
    SELECT a.attname::text,
           CASE WHEN t.typtype NOT IN ('b', 'e', 'r', 'm') OR t.typelem <> 0 OR a.attidentity = 'a' OR a.attgenerated <> ''
                THEN 'insert'
                WHEN a.atttypid IN ('json'::regtype, 'jsonb'::regtype) THEN 'json'
                ELSE 'text' END,
           c.relkind IN ('r', 'p') AND NOT row_security_active(c.oid) AND t.typtype <> 'd'
               AND NOT EXISTS (SELECT FROM pg_rewrite AS w WHERE w.ev_class = c.oid AND w.ev_type = '3')
    FROM pg_class AS c
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE c.oid = to_regclass($1)";

/// How it went.
pub(super) enum Copied {
    /// All rows are in.
    All,
    /// Nothing was sent.
    NotTried,
    /// Something was, and the savepoint has to be rolled back.
    InVain,
}

/// How the values of a column are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Text,
    Json,
}

/// The columns that COPY can write.
#[derive(Clone, Default, PartialEq, Eq)]
struct Shape(HashMap<String, Way>);

impl Shape {
    /// How these columns are written, one by one; none if COPY cannot write one of them.
    fn ways(&self, columns: &[String]) -> Option<Vec<Way>> {
        columns.iter().map(|column| self.0.get(column).copied()).collect()
    }
}

/// What was last seen of the tables, by case. It may be out of date: before a COPY counts, it is looked at again. One that is
/// not fit is not looked at again while the sink lives, for INSERT is never wrong.
#[derive(Default)]
pub(super) struct Tables(Mutex<HashMap<usize, Shape>>);

impl PostgresSink {
    /// Writes the rows of a run by COPY if they are many, and their case and table are fit for it.
    pub(super) async fn copy(&self, savepoint: &Transaction<'_>, case: &Case, run: &Run) -> Result<Copied, Ended> {
        let (Some(table), Some((_, first))) = (case.plain_insert(), run.rows.first()) else {
            return Ok(Copied::NotTried);
        };
        if run.rows.len() < FEWEST {
            return Ok(Copied::NotTried);
        }
        let known = self.tables.0.lock().get(&run.case).cloned();
        let shape = match known {
            Some(shape) => shape,
            None => match self.shape(savepoint, table, run.case).await {
                Ok(shape) => shape,
                // An old server, or another that speaks the protocol: it is not asked again.
                Err(Ended::Said(error)) if is_for_insert(&error) => {
                    self.tables.0.lock().insert(run.case, Shape::default());
                    return Ok(Copied::InVain);
                }
                Err(ended) => return Err(ended),
            },
        };
        let Some(text) = shape.ways(&first.columns).and_then(|ways| lines(&ways, run)) else {
            return Ok(Copied::NotTried);
        };
        let sql = format!("COPY {table} ({}) FROM STDIN", list(&first.columns));
        let sink = within(self.timeout, savepoint.copy_in::<_, Bytes>(&sql)).await.map_err(|ended| {
            self.tables.0.lock().remove(&run.case);
            match ended {
                Ended::Said(error) if error.as_db_error().is_some() => Ended::NotCopied(error),
                other => other,
            }
        })?;
        tokio::pin!(sink);
        let sent = async {
            sink.send(text).await?;
            sink.as_mut().finish().await
        };
        match within(self.timeout, sent).await {
            Ok(_) => {}
            Err(Ended::Said(error)) if is_for_insert(&error) => return Ok(Copied::InVain),
            Err(ended) => return Err(ended),
        }
        // From here on nobody can alter the table before this transaction ends; what was known may be older.
        let now = self.shape(savepoint, table, run.case).await?;
        Ok(if now == shape { Copied::All } else { Copied::InVain })
    }

    /// Looks what the table is like.
    async fn shape(&self, transaction: &Transaction<'_>, table: &str, case: usize) -> Result<Shape, Ended> {
        let columns = within(self.timeout, transaction.query_typed(SHAPE, &[(&table, Type::TEXT)])).await?;
        let mut shape = Shape(HashMap::with_capacity(columns.len()));
        let mut fit = true;
        for column in columns {
            fit &= column.try_get::<_, bool>(2)?;
            match column.try_get::<_, &str>(1)? {
                "text" => shape.0.insert(column.try_get(0)?, Way::Text),
                "json" => shape.0.insert(column.try_get(0)?, Way::Json),
                _ => None,
            };
        }
        if !fit {
            shape.0.clear();
        }
        // Of a table that is not there nothing is known.
        if !shape.0.is_empty() || !fit {
            self.tables.0.lock().insert(case, shape.clone());
        }
        Ok(shape)
    }
}

/// The rows in COPY's text format; none if one holds what only the INSERT can judge.
fn lines(ways: &[Way], run: &Run) -> Option<Bytes> {
    let mut out = Vec::new();
    for (_, row) in &run.rows {
        for (at, (way, value)) in ways.iter().zip(row.values()).enumerate() {
            if at > 0 {
                out.push(b'\t');
            }
            field(*way, value.get(), &mut out)?;
        }
        out.push(b'\n');
    }
    Some(out.into())
}

/// One value, as `json_populate_recordset` hands it to the column's type.
fn field(way: Way, json: &str, out: &mut Vec<u8>) -> Option<()> {
    if json == "null" {
        out.extend_from_slice(b"\\N");
    } else if let Some(inner) = json.strip_prefix('"') {
        let inner = inner.strip_suffix('"')?;
        match way {
            Way::Text if !inner.contains('\\') => escape(inner, out),
            Way::Json if !inner.contains('\\') => escape(json, out),
            _ => {
                let text: String = serde_json::from_str(json).ok().filter(|text: &String| !text.contains('\0'))?;
                match way {
                    Way::Text => escape(&text, out),
                    // What the server makes of a string for a column of JSON: only what must be is escaped.
                    Way::Json => escape(&serde_json::to_string(&text).ok()?, out),
                }
            }
        }
    } else if is_read_alike(json) {
        escape(json, out);
    } else {
        return None;
    }
    Some(())
}

/// True for JSON that every server reads: not deep, and no escape that stands for no character.
fn is_read_alike(json: &str) -> bool {
    let (mut depth, mut in_string, mut pairs) = (0_usize, false, false);
    let mut bytes = json.as_bytes().iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => in_string = !in_string,
            b'\\' => {
                let is_code = bytes.next() == Some(&b'u');
                let code = bytes.as_slice();
                if is_code && code.starts_with(b"0000") {
                    return false;
                }
                pairs |= is_code && matches!(code.first(), Some(b'd' | b'D'));
            }
            b'[' | b'{' if !in_string => {
                depth += 1;
                if depth > DEEPEST {
                    return false;
                }
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    // It may be half of a pair.
    !pairs || serde_json::from_str::<serde_json::Value>(json).is_ok()
}

/// Text in which nothing is taken for the end of a field, of a line, or of all.
fn escape(text: &str, out: &mut Vec<u8>) {
    let mut rest = text.as_bytes();
    while let Some(at) = rest.iter().position(|byte| matches!(byte, b'\\' | b'\t' | b'\n' | b'\r')) {
        let (plain, marked) = rest.split_at(at);
        out.extend_from_slice(plain);
        out.push(b'\\');
        out.push(match marked.first() {
            Some(b'\t') => b't',
            Some(b'\n') => b'n',
            Some(b'\r') => b'r',
            _ => b'\\',
        });
        rest = marked.get(1..).unwrap_or_default();
    }
    out.extend_from_slice(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(way: Way, json: &str) -> Option<String> {
        let mut out = Vec::new();
        field(way, json, &mut out).map(|()| String::from_utf8(out).unwrap())
    }

    #[test]
    fn a_value_is_written_as_the_server_would_read_it_from_json() {
        for (json, text, as_json) in [
            ("null", "\\N", "\\N"),
            (r#""\\N""#, r"\\N", r#""\\\\N""#),
            (r#""\\.""#, r"\\.", r#""\\\\.""#),
            (r#""a\tb\r\nc""#, r"a\tb\r\nc", r#""a\\tb\\r\\nc""#),
            (r#""\u00e9 \" \/ \u001f""#, "é \" / \u{1f}", "\"é \\\\\" / \\\\u001f\""),
            (r#""\ud83d\ude00""#, "😀", "\"😀\""),
            ("\"é\"", "é", "\"é\""),
            ("\"\"", "", "\"\""),
            ("1.10", "1.10", "1.10"),
            ("-0.0", "-0.0", "-0.0"),
            ("1e400", "1e400", "1e400"),
            ("true", "true", "true"),
            ("{ \"a\" : [1,\n\"\\n\"] }", "{ \"a\" : [1,\\n\"\\\\n\"] }", "{ \"a\" : [1,\\n\"\\\\n\"] }"),
        ] {
            assert_eq!(written(Way::Text, json).as_deref(), Some(text), "{json}");
            assert_eq!(written(Way::Json, json).as_deref(), Some(as_json), "{json}");
        }
    }

    #[test]
    fn what_a_server_may_refuse_to_read_as_json_is_left_to_the_insert() {
        let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        for json in [r#""a\u0000b""#, r#""\ud800""#, r#"{"a":"\u0000"}"#, r#"["\ud800"]"#, r#"["\uDFFF"]"#, &deep(257)]
        {
            assert_eq!((written(Way::Text, json), written(Way::Json, json)), (None, None), "{json}");
        }
        let many = format!("[{}]", vec![deep(2); 300].join(","));
        for json in [r#"["\\u0000"]"#, r#"["\\\"[["]"#, r#"["\ud83d\ude00 \ud7ff"]"#, &deep(256), &many] {
            assert!(written(Way::Text, json).is_some(), "{json}");
        }
    }
}
