//! What an error of the server means: the record's, the moment's, or the target's.

use deadpool_postgres::PoolError;
use tokio_postgres::error::SqlState;

use crate::connection::postgres::{explain, explain_pool};
use crate::sink::{Failure, Verdict};

/// True for an error that the values of a row caused: without that row the others go through.
pub(super) fn is_the_record(error: &tokio_postgres::Error) -> bool {
    let Some(code) = error.code() else { return false };
    let class = code.code().get(..2).unwrap_or_default();
    matches!(class, "22" | "23" | "44")
        || matches!(
            *code,
            SqlState::UNDEFINED_COLUMN
                | SqlState::DATATYPE_MISMATCH
                | SqlState::CARDINALITY_VIOLATION
                | SqlState::RAISE_EXCEPTION
                | SqlState::GENERATED_ALWAYS
        )
}

/// The failure that an error is.
pub(super) fn judge(shown: &str, error: &tokio_postgres::Error) -> Failure {
    let Some(said) = error.as_db_error() else {
        // Nobody can say what took effect; a closed connection is an outage, and so is one that cannot be made.
        return Failure::new(Verdict::Down, format!("{shown}: {}", explain(error)));
    };
    let class = said.code().code().get(..2).unwrap_or_default();
    let verdict = match class {
        _ if is_the_record(error) => Verdict::Never,
        // Serialisation, deadlocks, locks, cancelled for time.
        "40" | "55" => Verdict::Backoff,
        _ if *said.code() == SqlState::QUERY_CANCELED => Verdict::Backoff,
        // Resources, shutdown, connection, rights, a table that is not there: the target's trouble, for every record.
        _ => Verdict::Down,
    };
    let place =
        [said.table().map(|table| format!("table {table}")), said.column().map(|column| format!("column {column}"))];
    let constraint = said.constraint().map(|constraint| format!("constraint {constraint}"));
    let place = place.into_iter().flatten().chain(constraint).collect::<Vec<_>>().join(", ");
    let place = if place.is_empty() { String::new() } else { format!(" [{place}]") };
    Failure::new(verdict, format!("{shown}: {}{place}", explain(error)))
}

/// The failure of not getting a connection.
pub(super) fn judge_pool(shown: &str, error: &PoolError) -> Failure {
    Failure::new(Verdict::Down, format!("{shown}: {}", explain_pool(error)))
}
