//! One case of a `postgres:`: the row that a record is to it, and the statement that takes many.

use std::collections::HashMap;
use std::error::Error;
use std::ops::Range;
use std::time::Duration;

use bytes::BytesMut;
use indexmap::IndexMap;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio_postgres::Transaction;
use tokio_postgres::types::{Format, IsNull, Kind, ToSql, Type, to_sql_checked};

use super::refusal::kind;
use super::value::{self, Way};
use super::verdict::{Ended, within};
use super::{DeleteSpec, InsertSpec, OnConflict, PostgresCaseSpec, StatementSpec, UpsertSpec, document};
use crate::sink::template::{Document, Scope};
use crate::sink::{Failure, Operation, SpecFault};

/// Columns of a table at most, and bytes of a column's name.
const MOST_COLUMNS: usize = 1_600;
const LONGEST_NAME: usize = 63;
/// As many parameters as PostgreSQL takes.
const MOST_PARAMETERS: usize = 65_535;

/// What cannot work in a case.
pub(super) fn check(case: &PostgresCaseSpec, here: &str, faults: &mut Vec<SpecFault>) {
    let help = "one of upsert, insert, delete and statement";
    match case.operations() {
        1 => {}
        0 => return faults.push(SpecFault::new(here, "this case does nothing", help)),
        _ => return faults.push(SpecFault::new(here, "this case does several things", help)),
    }
    let mut table = |at: String, name: &str| {
        if !is_table(name) {
            let message = format!("'{name}' is no name for a table");
            faults.push(SpecFault::new(at, message, "orders, or shop.orders; it is quoted, so upper case counts"));
        }
    };
    let mut columns: Vec<(String, &IndexMap<String, Value>)> = Vec::new();
    let mut keys: Vec<(String, &[String])> = Vec::new();
    if let Some(upsert) = &case.upsert {
        table(format!("{here}/upsert/table"), &upsert.table);
        columns.push((format!("{here}/upsert/columns"), &upsert.columns));
        keys.push((format!("{here}/upsert/key"), &upsert.key));
    }
    if let Some(insert) = &case.insert {
        table(format!("{here}/insert/table"), &insert.table);
        columns.push((format!("{here}/insert/columns"), &insert.columns));
    }
    if let Some(delete) = &case.delete {
        table(format!("{here}/delete/table"), &delete.table);
        columns.push((format!("{here}/delete/columns"), &delete.columns));
        keys.push((format!("{here}/delete/key"), &delete.key));
    }
    for (at, key) in keys {
        if key.is_empty() {
            faults.push(SpecFault::new(at, "there is no key, so no row could be found", "key: [id], for example"));
        }
    }
    for (at, columns) in columns {
        for (name, value) in columns {
            document(&format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")), value, faults);
        }
    }
    if let Some(statement) = &case.statement {
        for (index, value) in statement.params.iter().enumerate() {
            document(&format!("{here}/statement/params/{index}"), value, faults);
        }
        let wanted = (1..=MOST_PARAMETERS).take_while(|number| mentions(&statement.sql, *number)).count();
        if wanted != statement.params.len() {
            let message =
                format!("the statement has ${wanted} at most, and there are {} params", statement.params.len());
            faults.push(SpecFault::new(format!("{here}/statement/params"), message, "one for each of $1, $2 …"));
        }
    }
}

/// Whether `$number` stands in a statement.
fn mentions(sql: &str, number: usize) -> bool {
    let mark = format!("${number}");
    sql.match_indices(&mark)
        .any(|(at, _)| !sql.get(at + mark.len()..).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())))
}

fn is_table(name: &str) -> bool {
    let parts: Vec<&str> = name.split('.').collect();
    parts.len() <= 2
        && parts.iter().all(|part| !part.is_empty() && part.len() <= 63 && !part.contains(['\0', '{', '}']))
}

/// A name, or `schema.name`, in quotes.
pub(super) fn quoted(name: &str) -> String {
    name.split('.').map(column).collect::<Vec<_>>().join(".")
}

/// Names of columns, in quotes.
pub(super) fn list(names: &[String]) -> String {
    names.iter().map(|name| column(name)).collect::<Vec<_>>().join(", ")
}

fn column(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// What a record is to a case.
#[derive(Debug)]
pub(super) struct Row {
    case: usize,
    /// The columns, in the order of the row; rows of one statement have the same.
    pub(super) columns: Vec<String>,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// A value for each column, and the key's.
    Values { values: Vec<Box<RawValue>>, key: Vec<String> },
    /// The parameters of a statement, as JSON.
    Parameters(Vec<Box<RawValue>>),
}

impl Row {
    /// The values, one for each column; none of a statement's parameters.
    pub(super) fn values(&self) -> &[Box<RawValue>] {
        match &self.content {
            Content::Values { values, .. } => values,
            Content::Parameters(_) => &[],
        }
    }

    /// The parameters of a statement.
    pub(super) fn parameters(&self) -> &[Box<RawValue>] {
        match &self.content {
            Content::Values { .. } => &[],
            Content::Parameters(values) => values,
        }
    }

    /// What a column was given, in kind; nobody knows of a statement's.
    pub(super) fn given(&self, name: &str) -> Option<String> {
        let Content::Values { values, .. } = &self.content else { return None };
        let value = self.columns.iter().position(|column| column == name).and_then(|at| values.get(at));
        Some(value.map_or_else(|| "not given".to_owned(), |value| format!("given {}", kind(value.get()))))
    }

    /// A row of some of the columns.
    pub(super) fn part(&self, columns: Range<usize>) -> Self {
        let names = self.columns.get(columns.clone()).unwrap_or_default().to_vec();
        let values = self.values().get(columns).unwrap_or_default().to_vec();
        Self { case: self.case, columns: names, content: Content::Values { values, key: Vec::new() } }
    }
}

/// Rows that one statement takes, in order, each with its index in the batch.
pub(super) struct Run {
    pub(super) case: usize,
    pub(super) rows: Vec<(usize, Row)>,
    /// It may be tried with COPY.
    pub(super) bulk: bool,
}

impl Run {
    /// Keeps the first half and gives the second.
    pub(super) fn split(&mut self) -> Self {
        Self { case: self.case, rows: self.rows.split_off(self.rows.len() / 2), bulk: false }
    }
}

/// Neighbours of one case and with the same columns go together.
pub(super) fn runs(rows: Vec<(usize, Row)>, bulk: bool) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (index, row) in rows {
        match runs.last_mut() {
            Some(run)
                if run.case == row.case && run.rows.first().is_some_and(|(_, first)| first.columns == row.columns) =>
            {
                run.rows.push((index, row));
            }
            _ => runs.push(Run { case: row.case, rows: vec![(index, row)], bulk }),
        }
    }
    runs
}

/// A case, its templates parsed.
pub(super) enum Case {
    Upsert { table: String, key: Vec<String>, columns: Columns },
    Insert { table: String, columns: Columns, ignore: bool },
    Delete { table: String, key: Vec<String>, columns: Columns },
    Statement { sql: String, params: Vec<Document> },
}

type Columns = Vec<(String, Document)>;

fn columns(columns: &IndexMap<String, Value>) -> Result<Columns, Box<str>> {
    let parse = |(name, value): (&String, &Value)| {
        let document = Document::parse(value).map_err(|error| Box::<str>::from(error.error.to_string()))?;
        Ok((name.clone(), document))
    };
    columns.iter().map(parse).collect()
}

impl Case {
    pub(super) fn parse(spec: &PostgresCaseSpec) -> Result<Self, Box<str>> {
        Ok(match spec {
            PostgresCaseSpec { upsert: Some(UpsertSpec { table, key, columns: own }), .. } => {
                Self::Upsert { table: quoted(table), key: key.clone(), columns: columns(own)? }
            }
            PostgresCaseSpec { insert: Some(InsertSpec { table, columns: own, on_conflict }), .. } => Self::Insert {
                table: quoted(table),
                columns: columns(own)?,
                ignore: *on_conflict == Some(OnConflict::Ignore),
            },
            PostgresCaseSpec { delete: Some(DeleteSpec { table, key, columns: own }), .. } => {
                Self::Delete { table: quoted(table), key: key.clone(), columns: columns(own)? }
            }
            PostgresCaseSpec { statement: Some(StatementSpec { sql, params }), .. } => {
                let parse = |value| Document::parse(value).map_err(|error| Box::<str>::from(error.error.to_string()));
                Self::Statement { sql: sql.clone(), params: params.iter().map(parse).collect::<Result<_, _>>()? }
            }
            _ => return Err("a case does nothing".into()),
        })
    }

    /// What the record is to this case.
    pub(super) fn row(&self, number: usize, scope: &Scope<'_>, operation: &Operation) -> Result<Row, Failure> {
        let (own, key): (&Columns, &[String]) = match self {
            Self::Upsert { columns, key, .. } | Self::Delete { columns, key, .. } => (columns, key),
            Self::Insert { columns, .. } => (columns, &[]),
            Self::Statement { params, .. } => {
                let values = params.iter().zip(1..).map(|(param, number)| parameter(param, number, scope));
                let values = values.collect::<Result<_, _>>()?;
                return Ok(Row { case: number, columns: Vec::new(), content: Content::Parameters(values) });
            }
        };
        if operation.event.record.binary && own.is_empty() {
            return Err(Failure::rendering("the payload is no JSON, so it has no fields; name `columns`"));
        }
        let mut fields: IndexMap<String, Box<RawValue>> = IndexMap::new();
        if own.is_empty() {
            let payload = scope.payload();
            fields = serde_json::from_slice(payload)
                .map_err(|_| Failure::rendering("the payload is no JSON object, so it has no fields for columns"))?;
            if let Self::Delete { .. } = self {
                fields.retain(|name, _| key.contains(name));
            }
        }
        for (name, document) in own {
            let mut out = Vec::new();
            let rendered = document.render_json(scope, &mut out);
            rendered.map_err(|error| Failure::rendering(format!("column {name}: {error}")))?;
            let text = String::from_utf8(out).map_err(|_| Failure::rendering(format!("column {name} is no text")))?;
            let raw =
                RawValue::from_string(text).map_err(|_| Failure::rendering(format!("column {name} is no JSON")))?;
            fields.insert(name.clone(), raw);
        }
        fit_a_table(&fields)?;
        let mut key_values = Vec::with_capacity(key.len());
        for name in key {
            match fields.get(name) {
                Some(value) if value.get() != "null" => key_values.push(value.get().to_owned()),
                _ => return Err(Failure::rendering(format!("the key column {name} has no value"))),
            }
        }
        fields.sort_unstable_keys();
        let (columns, values) = fields.into_iter().unzip();
        Ok(Row { case: number, columns, content: Content::Values { values, key: key_values } })
    }

    /// A failure with the table that it is about.
    pub(super) fn placed(&self, failure: Failure) -> Failure {
        let message = self.table().map(|table| format!("table {table}: {}", failure.message).into());
        Failure { message: message.unwrap_or(failure.message), ..failure }
    }

    /// Whether the record says which columns there are, and not the file.
    pub(super) fn record_names_columns(&self) -> bool {
        match self {
            Self::Upsert { columns, .. } | Self::Insert { columns, .. } => columns.is_empty(),
            // Its columns are those of the key, which the file names.
            Self::Delete { .. } | Self::Statement { .. } => false,
        }
    }

    /// Runs the statement for rows of this case.
    pub(super) async fn execute(
        &self,
        transaction: &Transaction<'_>,
        run: &Run,
        longest: Duration,
    ) -> Result<(), Ended> {
        let Some((_, first)) = run.rows.first() else { return Ok(()) };
        if let Self::Statement { sql, .. } = self {
            let statement = within(longest, transaction.prepare(sql)).await?;
            for (_, row) in &run.rows {
                let texts: Vec<Option<String>> = row
                    .parameters()
                    .iter()
                    .zip(statement.params())
                    .map(|(value, of)| as_text(value.get(), of))
                    .collect();
                let texts: Vec<AsText<'_>> = texts.iter().map(|text| AsText(text.as_deref())).collect();
                let parameters: Vec<&(dyn ToSql + Sync)> =
                    texts.iter().map(|text| text as &(dyn ToSql + Sync)).collect();
                within(longest, transaction.execute(&statement, &parameters)).await?;
            }
            return Ok(());
        }
        let rows = match self {
            // A statement may not touch a row twice: of one key the last counts.
            Self::Upsert { .. } => folded(&run.rows),
            _ => run.rows.iter().map(|(_, row)| row).collect(),
        };
        let json = array(&first.columns, &rows);
        let sql = self.sql(&first.columns);
        let statement = within(longest, transaction.prepare(&sql)).await?;
        let rows = AsText(Some(&json));
        within(longest, transaction.execute(&statement, &[&rows])).await.map(|_| ())
    }

    /// The table, as SQL names it.
    pub(super) fn quoted_table(&self) -> Option<&str> {
        match self {
            Self::Upsert { table, .. } | Self::Insert { table, .. } | Self::Delete { table, .. } => Some(table),
            Self::Statement { .. } => None,
        }
    }

    /// The table, as a person names it.
    pub(super) fn table(&self) -> Option<String> {
        self.quoted_table().map(|table| table.replace('"', ""))
    }

    /// The table, if the case is an insert and a row that is in its way is an error: what COPY does.
    pub(super) fn plain_insert(&self) -> Option<&str> {
        match self {
            Self::Insert { table, ignore: false, .. } => Some(table),
            _ => None,
        }
    }

    fn sql(&self, names: &[String]) -> String {
        let all = list(names);
        let from = |table: &str| format!("json_populate_recordset(NULL::{table}, $1::json)");
        match self {
            Self::Upsert { table, key, .. } => {
                let rest = names.iter().filter(|name| !key.contains(name));
                let set: Vec<String> = rest.map(|name| format!("{0} = excluded.{0}", column(name))).collect();
                let act = if set.is_empty() { "NOTHING".to_owned() } else { format!("UPDATE SET {}", set.join(", ")) };
                let target = list(key);
                format!("INSERT INTO {table} ({all}) SELECT {all} FROM {} ON CONFLICT ({target}) DO {act}", from(table))
            }
            Self::Insert { table, ignore, .. } => {
                let act = if *ignore { " ON CONFLICT DO NOTHING" } else { "" };
                format!("INSERT INTO {table} ({all}) SELECT {all} FROM {}{act}", from(table))
            }
            Self::Delete { table, key, .. } => {
                let equal: Vec<String> = key.iter().map(|name| format!("t.{0} = r.{0}", column(name))).collect();
                format!("DELETE FROM {table} AS t USING {} AS r WHERE {}", from(table), equal.join(" AND "))
            }
            Self::Statement { sql, .. } => sql.clone(),
        }
    }

    /// Looks whether the table is there, has the columns and may be written to; or whether the statement can be prepared.
    pub(super) async fn probe(&self, client: &tokio_postgres::Client) -> Result<(), String> {
        let explain = |error: tokio_postgres::Error| crate::connection::postgres::explain(&error);
        let (table, rights, own, key): (_, &[&str], _, &[String]) = match self {
            Self::Statement { sql, .. } => {
                return client.prepare(sql).await.map(|_| ()).map_err(|error| format!("{}: {sql}", explain(error)));
            }
            Self::Upsert { table, columns, key } => (table, &["INSERT", "UPDATE", "SELECT"], columns, key),
            Self::Insert { table, columns, .. } => (table, &["INSERT"], columns, &[]),
            Self::Delete { table, columns, key } => (table, &["DELETE", "SELECT"], columns, key),
        };
        let there = client.query_one("SELECT to_regclass($1) IS NOT NULL", &[table]).await.map_err(explain)?;
        if !there.try_get::<_, bool>(0).map_err(explain)? {
            return Err(format!("there is no table {table}: make it, or correct its name"));
        }
        for right in rights {
            let may = client.query_one("SELECT has_table_privilege($1, $2)", &[table, right]).await.map_err(explain)?;
            if !may.try_get::<_, bool>(0).map_err(explain)? {
                return Err(format!("this user may not {right} on {table}: GRANT {right} ON {table}"));
            }
        }
        let known = client
            .query(
                "SELECT attname FROM pg_attribute
                 WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped",
                &[table],
            )
            .await
            .map_err(explain)?;
        let known: Vec<&str> = known.iter().filter_map(|row| row.try_get(0).ok()).collect();
        let mut wanted: Vec<String> = own.iter().map(|(name, _)| name).chain(key).cloned().collect();
        wanted.sort_unstable();
        wanted.dedup();
        let missing: Vec<&str> = wanted.iter().map(String::as_str).filter(|name| !known.contains(name)).collect();
        if !missing.is_empty() {
            return Err(format!("{table} has no column {}", missing.join(", ")));
        }
        if let Self::Upsert { .. } = self {
            // Only planning looks for the constraint; nothing is run.
            let plan = format!("EXPLAIN {}", self.sql(&wanted).replace("$1::json", "'[]'::json"));
            client.batch_execute(&plan).await.map_err(explain)?;
        }
        Ok(())
    }
}

/// Whether these can be the columns of a row: a statement with others would be refused as a whole.
fn fit_a_table(fields: &IndexMap<String, Box<RawValue>>) -> Result<(), Failure> {
    if fields.is_empty() {
        return Err(Failure::rendering("the payload has no fields, so there is no row"));
    }
    if fields.len() > MOST_COLUMNS {
        let why = format!("the payload has {} fields, and a table {MOST_COLUMNS} columns at most", fields.len());
        return Err(Failure::rendering(why));
    }
    let wrong = |name: &&String| name.is_empty() || name.len() > LONGEST_NAME || name.contains('\0');
    match fields.keys().find(wrong) {
        Some(name) => {
            let shown: String = name.chars().take(LONGEST_NAME).collect();
            Err(Failure::rendering(format!("{shown:?} is no name for a column: 1 to {LONGEST_NAME} bytes, no NUL")))
        }
        None => Ok(()),
    }
}

/// The rows as a JSON array of objects.
pub(super) fn array(columns: &[String], rows: &[&Row]) -> String {
    let names: Vec<String> = columns.iter().map(|name| Value::from(name.as_str()).to_string()).collect();
    let object = |row: &&Row| {
        let fields = names.iter().zip(row.values()).map(|(name, value)| format!("{name}:{}", value.get()));
        format!("{{{}}}", fields.collect::<Vec<_>>().join(","))
    };
    format!("[{}]", rows.iter().map(object).collect::<Vec<_>>().join(","))
}

/// Of rows with one key only the last, at the place of the last.
fn folded(rows: &[(usize, Row)]) -> Vec<&Row> {
    let mut last: HashMap<&[String], usize> = HashMap::new();
    for (at, (_, row)) in rows.iter().enumerate() {
        if let Content::Values { key, .. } = &row.content {
            last.insert(key, at);
        }
    }
    let is_last = |(at, (_, row)): &(usize, &(usize, Row))| match &row.content {
        Content::Values { key, .. } => last.get(key.as_slice()) == Some(at),
        Content::Parameters(_) => true,
    };
    rows.iter().enumerate().filter(is_last).map(|(_, (_, row))| row).collect()
}

/// A parameter as JSON.
fn parameter(document: &Document, number: usize, scope: &Scope<'_>) -> Result<Box<RawValue>, Failure> {
    let wrong = |why: &str| Failure::rendering(format!("parameter ${number}{why}"));
    let mut out = Vec::new();
    document.render_json(scope, &mut out).map_err(|error| wrong(&format!(": {error}")))?;
    let value: Box<RawValue> = serde_json::from_slice(&out).map_err(|_| wrong(" is no JSON"))?;
    if value.get().starts_with('"') && serde_json::from_str::<String>(value.get()).is_err() {
        return Err(wrong(" is no text"));
    }
    Ok(value)
}

/// JSON as the text of a value of this type; none is null. Of an array that cannot be one the server says so.
fn as_text(json: &str, of: &Type) -> Option<String> {
    match json {
        "null" => None,
        json if matches!(*of, Type::JSON | Type::JSONB) => Some(json.to_owned()),
        text if text.starts_with('"') => serde_json::from_str(text).ok(),
        list if list.starts_with('[') => match of.kind() {
            Kind::Array(inner) => {
                let way = if matches!(*inner, Type::JSON | Type::JSONB) { Way::Json } else { Way::Text };
                value::array(way, list).or_else(|| Some(list.to_owned()))
            }
            _ => Some(list.to_owned()),
        },
        other => Some(other.to_owned()),
    }
}

/// A value that the server reads from text, whatever the parameter's type.
#[derive(Debug)]
struct AsText<'a>(Option<&'a str>);

impl ToSql for AsText<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        let Some(text) = self.0 else { return Ok(IsNull::Yes) };
        out.extend_from_slice(text.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        Format::Text
    }

    to_sql_checked!();
}
