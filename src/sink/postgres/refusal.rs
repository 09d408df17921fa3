//! What is said of a row that the server refuses: table and column, and what was given in kind. Never the value itself, which
//! may be nobody's business and would stand in logs and status.

use std::ops::Range;
use std::time::Duration;

use tokio_postgres::Transaction;
use tokio_postgres::error::{DbError, SqlState};

use super::statement::{Case, Row, array};
use super::verdict::{Ended, is_the_columns, told, within};

/// Why the server refuses this row.
pub(super) async fn explain(
    transaction: &mut Transaction<'_>,
    case: &Case,
    row: &Row,
    error: &tokio_postgres::Error,
    longest: Duration,
) -> Result<String, Ended> {
    let Some(said) = error.as_db_error() else { return Ok(error.to_string()) };
    let of_data = said.code().code().starts_with("22");
    let column = match said.column() {
        Some(column) => Some(column.to_owned()),
        None if is_the_columns(error) => row.columns.iter().find(|name| names(said, name)).cloned(),
        None if of_data => column_at_fault(transaction, case, row, said.code(), longest).await?,
        None => None,
    };
    let place = [
        said.table().map(str::to_owned).or_else(|| case.table()).map(|table| format!("table {table}")),
        column.as_deref().map(|column| format!("column {column}")),
        said.constraint().map(|constraint| format!("constraint {constraint}")),
        column.as_deref().and_then(|column| row.given(column)),
        Some(parameters(row, said)).filter(|_| of_data && case.quoted_table().is_none()),
    ];
    Ok(told(error, place))
}

/// What was given, by what it is.
pub(super) fn kind(json: &str) -> String {
    match json.bytes().next() {
        Some(b'"') => {
            let text: Option<String> = serde_json::from_str(json).ok();
            text.map_or("a string".to_owned(), |text| format!("a string of {} characters", text.chars().count()))
        }
        Some(b'{') => "an object".to_owned(),
        Some(b'[') => "an array".to_owned(),
        Some(b't' | b'f') => "a bool".to_owned(),
        Some(b'n') | None => "null".to_owned(),
        Some(_) => "a number".to_owned(),
    }
}

fn names(said: &DbError, column: &str) -> bool {
    said.message().contains(&format!("\"{column}\""))
}

/// The parameter that it is about; where the server does not say which, all.
fn parameters(row: &Row, said: &DbError) -> String {
    let number = said.where_().and_then(|text| {
        let (_, rest) = text.split_once("parameter $")?;
        rest.split(|letter: char| !letter.is_ascii_digit()).next()?.parse::<usize>().ok()
    });
    let values = row.parameters().iter().zip(1..).filter(|(_, at)| number.is_none_or(|number| number == *at));
    let told: Vec<String> = values.map(|(value, at)| format!("parameter ${at} given {}", kind(value.get()))).collect();
    told.join(", ")
}

/// The column whose value the server cannot take, if it is one alone: it does not say which, so it is asked, half by half.
async fn column_at_fault(
    transaction: &mut Transaction<'_>,
    case: &Case,
    row: &Row,
    code: &SqlState,
    longest: Duration,
) -> Result<Option<String>, Ended> {
    let Some(table) = case.quoted_table() else { return Ok(None) };
    let mut at = 0..row.columns.len();
    while at.len() > 1 {
        let half = at.start..at.start + at.len() / 2;
        at = if fails(transaction, table, row, half.clone(), code, longest).await? { half } else { half.end..at.end };
    }
    let is_it = fails(transaction, table, row, at.clone(), code, longest).await?;
    Ok(row.columns.get(at.start).filter(|_| is_it).cloned())
}

/// Whether these columns alone meet the same error.
async fn fails(
    transaction: &mut Transaction<'_>,
    table: &str,
    row: &Row,
    columns: Range<usize>,
    code: &SqlState,
    longest: Duration,
) -> Result<bool, Ended> {
    let part = row.part(columns);
    let json = array(&part.columns, &[&part]);
    let savepoint = within(longest, transaction.savepoint("walflow_look")).await?;
    let text = format!("SELECT count(r) FROM json_populate_recordset(NULL::{table}, $1::text::json) AS r");
    let ended = within(longest, savepoint.query_one(&text, &[&json])).await;
    match ended {
        Ok(_) => within(longest, savepoint.commit()).await.map(|()| false),
        Err(Ended::Said(error)) if error.as_db_error().is_some() => {
            within(longest, savepoint.rollback()).await?;
            Ok(error.code() == Some(code))
        }
        Err(ended) => Err(ended),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_told_by_its_kind() {
        let told = [r#""grün""#, "-1.5", "true", "null", "[1]", r#"{"a":1}"#, r#""\ud800""#].map(kind);
        let expected = ["a string of 4 characters", "a number", "a bool", "null", "an array", "an object", "a string"];
        assert_eq!(told, expected);
    }
}
