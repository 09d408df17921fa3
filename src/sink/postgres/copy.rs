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
use super::value::{Way, array, text};
use super::verdict::{Ended, is_for_insert, within};

/// Fewer values, rows times columns, are not worth the question what the table is like. Measured with optimized builds on two
/// busy cores: two columns break even at 400 to 1,000 rows, eight at 75 to 200.
const FEWEST: usize = 1_000;
/// By column how its values are written, and whether the table is one for COPY at all.
///
/// COPY differs from INSERT where a rule rewrites the INSERT, where row security is in force (COPY is refused), for views and
/// foreign tables, for a column GENERATED ALWAYS (COPY writes over an identity without a word), and for types with parts
/// (JSON is not how they are written) other than arrays of plain types. A table with a domain is left out too: reading a JSON row
/// the server checks the domains of all its columns, also of those that get their default.
const SHAPE: &str = "
    SELECT a.attname::text,
           CASE WHEN coalesce(e.typtype, t.typtype) NOT IN ('b', 'e', 'r', 'm') OR a.attidentity = 'a' OR a.attgenerated <> ''
                    OR (t.typelem <> 0 AND (e.typarray <> t.oid OR e.typelem <> 0 OR e.typdelim <> ','))
                THEN 'insert'
                ELSE CASE WHEN coalesce(e.oid, t.oid) IN ('json'::regtype, 'jsonb'::regtype) THEN 'json' ELSE 'text' END
                    || CASE WHEN t.typelem <> 0 THEN 's' ELSE '' END END,
           c.relkind IN ('r', 'p') AND NOT row_security_active(c.oid) AND t.typtype <> 'd'
               AND NOT EXISTS (SELECT FROM pg_rewrite AS w WHERE w.ev_class = c.oid AND w.ev_type = '3')
    FROM pg_class AS c
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN pg_type AS t ON t.oid = a.atttypid
    LEFT JOIN pg_type AS e ON e.oid = t.typelem
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
struct Column {
    way: Way,
    /// It holds arrays of such values.
    many: bool,
}

/// The columns that COPY can write.
#[derive(Clone, Default, PartialEq, Eq)]
struct Shape(HashMap<String, Column>);

impl Shape {
    /// How these columns are written, one by one; none if COPY cannot write one of them.
    fn columns(&self, columns: &[String]) -> Option<Vec<Column>> {
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
        if run.rows.len() * first.columns.len() < FEWEST {
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
        let Some(text) = shape.columns(&first.columns).and_then(|columns| lines(&columns, run)) else {
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
            let (way, many) = match column.try_get::<_, &str>(1)? {
                "text" => (Way::Text, false),
                "json" => (Way::Json, false),
                "texts" => (Way::Text, true),
                "jsons" => (Way::Json, true),
                _ => continue,
            };
            shape.0.insert(column.try_get(0)?, Column { way, many });
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
fn lines(columns: &[Column], run: &Run) -> Option<Bytes> {
    let mut out = Vec::new();
    for (_, row) in &run.rows {
        for (at, (column, value)) in columns.iter().zip(row.values()).enumerate() {
            if at > 0 {
                out.push(b'\t');
            }
            field(*column, value.get(), &mut out)?;
        }
        out.push(b'\n');
    }
    Some(out.into())
}

/// One value, as `json_populate_recordset` hands it to the column's type.
fn field(column: Column, json: &str, out: &mut Vec<u8>) -> Option<()> {
    if json == "null" {
        out.extend_from_slice(b"\\N");
    } else if !column.many {
        escape(&text(column.way, json)?, out);
    } else if json.starts_with('"') {
        // An array as the server itself writes one.
        escape(&text(Way::Text, json)?, out);
    } else {
        escape(&array(column.way, json)?, out);
    }
    Some(())
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
        field(Column { way, many: false }, json, &mut out).map(|()| String::from_utf8(out).unwrap())
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
}
