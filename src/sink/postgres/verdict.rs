//! What an error of the server means: the record's, the moment's, or the target's.

use std::future::Future;
use std::time::Duration;

use deadpool_postgres::PoolError;
use tokio_postgres::error::SqlState;

use crate::connection::postgres::{explain, explain_pool};
use crate::sink::{Failure, Verdict};

/// The server itself ends a statement after the timeout; so much later its word should be here.
const GRACE: Duration = Duration::from_millis(500);

/// Quotation marks of the languages in which servers speak.
const MARKS: [char; 8] = ['"', '«', '»', '„', '“', '”', '‘', '’'];

/// How a call to the server ended that brought nothing.
#[derive(Debug)]
pub(super) enum Ended {
    /// The server, or the connection, said why.
    Said(tokio_postgres::Error),
    /// Nobody said anything within this time; the connection is good for nothing any more.
    Silent(Duration),
    /// A COPY was refused before it began; the connection is good for nothing any more, for the protocol's library has sent
    /// one message too many and takes the answer to it for that to the next.
    NotCopied(tokio_postgres::Error),
}

impl From<tokio_postgres::Error> for Ended {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Said(error)
    }
}

impl Ended {
    /// The failure that it is.
    pub(super) fn judge(&self, shown: &str) -> Failure {
        match self {
            Self::Said(error) | Self::NotCopied(error) => judge(shown, error),
            Self::Silent(longest) => {
                Failure::new(Verdict::Backoff, format!("{shown}: no answer within {longest:?}; it may be done or not"))
            }
        }
    }
}

/// Waits for the server's answer, little longer than `longest`. A network that swallows bytes tells nobody.
pub(super) async fn within<T>(
    longest: Duration,
    call: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, Ended> {
    match tokio::time::timeout(longest + GRACE, call).await {
        Ok(answer) => answer.map_err(Ended::Said),
        Err(_) => Err(Ended::Silent(longest)),
    }
}

/// True for an error that the values of a row caused: without that row the others go through.
pub(super) fn is_the_values(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(of_values)
}

/// True for an error about the columns of a row; whose fault that is depends on who named them.
pub(super) fn is_the_columns(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| {
        matches!(*code, SqlState::UNDEFINED_COLUMN | SqlState::DATATYPE_MISMATCH | SqlState::GENERATED_ALWAYS)
    })
}

/// True for an error of a COPY that the same rows may not meet in an INSERT, or that an INSERT says better.
pub(super) fn is_for_insert(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| of_values(code) || matches!(code.code().get(..2), Some("0A" | "42")))
}

fn of_values(code: &SqlState) -> bool {
    // Data, constraints, views with a check, and limits: a text too long for an index, JSON too deep.
    matches!(code.code().get(..2), Some("22" | "23" | "44" | "54"))
        || matches!(*code, SqlState::CARDINALITY_VIOLATION | SqlState::RAISE_EXCEPTION)
}

fn of_code(code: &SqlState) -> Verdict {
    match code.code().get(..2) {
        _ if of_values(code) => Verdict::Never,
        // Serialisation, deadlocks, locks, cancelled for time.
        Some("40" | "55") => Verdict::Backoff,
        _ if *code == SqlState::QUERY_CANCELED => Verdict::Backoff,
        // Resources, shutdown, connection, rights, a table or column that is not there: the target's trouble, for every
        // record.
        _ => Verdict::Down,
    }
}

/// The failure that an error is.
fn judge(shown: &str, error: &tokio_postgres::Error) -> Failure {
    let Some(said) = error.as_db_error() else {
        // Nobody can say what took effect; a closed connection is an outage, and so is one that cannot be made.
        return Failure::new(Verdict::Down, format!("{shown}: {}", explain(error)));
    };
    let place = [
        said.table().map(|table| format!("table {table}")),
        said.column().map(|column| format!("column {column}")),
        said.constraint().map(|constraint| format!("constraint {constraint}")),
    ];
    Failure::new(of_code(said.code()), format!("{shown}: {}", told(error, place)))
}

/// What the server said, and where. Not the value that it said it of.
pub(super) fn told(error: &tokio_postgres::Error, place: impl IntoIterator<Item = Option<String>>) -> String {
    let of_data = error.code().is_some_and(|code| code.code().starts_with("22"));
    let said = if of_data { without_values(&explain(error)) } else { explain(error) };
    let place = place.into_iter().flatten().collect::<Vec<_>>().join(", ");
    if place.is_empty() { said } else { format!("{said} [{place}]") }
}

/// The server's words without what it quotes: of errors of this class that is the value.
fn without_values(message: &str) -> String {
    let (first, last) = (message.find(MARKS), message.rfind(MARKS));
    let Some((first, last)) = first.zip(last).filter(|(first, last)| first < last) else { return message.to_owned() };
    let (before, rest) = (message.get(..first).unwrap_or_default(), message.get(last..).unwrap_or_default());
    let after: String = rest.chars().skip(1).collect();
    format!("{before}…{after}")
}

/// The failure of not getting a connection.
pub(super) fn judge_pool(shown: &str, error: &PoolError) -> Failure {
    Failure::new(Verdict::Down, format!("{shown}: {}", explain_pool(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_quotes_is_not_repeated() {
        for (said, told) in [
            (r#"invalid input syntax for type uuid: "geheim""#, "invalid input syntax for type uuid: …"),
            (r#"invalid input syntax for type uuid: "a "geheim" b""#, "invalid input syntax for type uuid: …"),
            (r#"value "1234" is out of range for type bigint"#, "value … is out of range for type bigint"),
            ("ungültige Eingabesyntax für Typ uuid: »geheim«", "ungültige Eingabesyntax für Typ uuid: …"),
            ("numeric field overflow", "numeric field overflow"),
            ("a lone \" is kept", "a lone \" is kept"),
        ] {
            assert_eq!(without_values(said), told);
        }
    }

    #[test]
    fn the_server_speaks_of_the_row_of_the_moment_or_of_itself() {
        for (code, verdict) in [
            ("22P02", Verdict::Never),
            ("23505", Verdict::Never),
            ("54000", Verdict::Never),
            ("P0001", Verdict::Never),
            ("40001", Verdict::Backoff),
            ("40P01", Verdict::Backoff),
            ("55P03", Verdict::Backoff),
            ("57014", Verdict::Backoff),
            ("57P01", Verdict::Down),
            ("08006", Verdict::Down),
            ("53300", Verdict::Down),
            ("42P01", Verdict::Down),
            ("42703", Verdict::Down),
            ("42501", Verdict::Down),
            ("28P01", Verdict::Down),
            ("3D000", Verdict::Down),
            ("25006", Verdict::Down),
        ] {
            assert_eq!(of_code(&SqlState::from_code(code)), verdict, "{code}");
        }
    }
}
