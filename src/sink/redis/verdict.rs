//! What a Redis error means for a record.
//!
//! Takes an error, gives a failure with its verdict. What the server says of the record (its type, its number) is the
//! record's; what it says of itself (memory, loading, a replica, permissions) is an outage.

use redis::{ErrorKind, RedisError};

use crate::sink::{Failure, Verdict};

/// Errors that the server reports of itself.
const OF_THE_SERVER: [&str; 17] = [
    "OOM",
    "LOADING",
    "BUSY",
    "READONLY",
    "CLUSTERDOWN",
    "MASTERDOWN",
    "NOAUTH",
    "WRONGPASS",
    "NOPERM",
    "MISCONF",
    "NOREPLICAS",
    "MOVED",
    "ASK",
    "NOMASTERLINK",
    "DENIED",
    "NOPROTO",
    "UNKILLABLE",
];

/// What an error means.
pub(super) fn judge(shown: &str, error: &RedisError) -> Failure {
    let detail = error.detail().unwrap_or_default();
    let verdict = match error.code() {
        Some(code) => of_code(code, detail),
        None => match error.kind() {
            ErrorKind::Io if error.is_timeout() => Verdict::Backoff,
            ErrorKind::Parse | ErrorKind::UnexpectedReturnType => Verdict::Backoff,
            _ => Verdict::Down,
        },
    };
    let what = error.code().map_or_else(|| error.to_string(), |code| format!("{code} {detail}"));
    let what: String = what.trim().chars().take(200).flat_map(escaped).collect();
    Failure::new(verdict, format!("{shown}: {what}"))
}

fn of_code(code: &str, detail: &str) -> Verdict {
    match code {
        code if OF_THE_SERVER.contains(&code) => Verdict::Down,
        "ERR"
            if [
                "max number of clients",
                "unknown command",
                "unknown subcommand",
                "DB index",
                "operation not permitted",
            ]
            .iter()
            .any(|of_the_server| detail.contains(of_the_server)) =>
        {
            Verdict::Down
        }
        "ERR" | "WRONGTYPE" | "INVALIDOBJ" | "CROSSSLOT" => Verdict::Never,
        // TRYAGAIN, and what a newer server or a module may say.
        _ => Verdict::Backoff,
    }
}

fn escaped(character: char) -> impl Iterator<Item = char> {
    let text: String = if character.is_control() { character.escape_default().collect() } else { character.into() };
    text.chars().collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_speaks_of_itself_or_of_the_record() {
        for (code, detail, verdict) in [
            ("WRONGTYPE", "Operation against a key holding the wrong kind of value", Verdict::Never),
            ("ERR", "value is not an integer or out of range", Verdict::Never),
            ("ERR", "max number of clients reached", Verdict::Down),
            ("ERR", "unknown command 'XADD', with args beginning with:", Verdict::Down),
            ("OOM", "command not allowed when used memory > 'maxmemory'.", Verdict::Down),
            ("LOADING", "Redis is loading the dataset in memory", Verdict::Down),
            ("READONLY", "You can't write against a read only replica.", Verdict::Down),
            ("NOAUTH", "Authentication required.", Verdict::Down),
            ("TRYAGAIN", "", Verdict::Backoff),
            ("NEWCODE", "", Verdict::Backoff),
        ] {
            assert_eq!(of_code(code, detail), verdict, "{code} {detail}");
        }
    }

    #[test]
    fn a_broken_connection_is_an_outage_and_a_late_answer_is_not() {
        let io = |kind: std::io::ErrorKind| judge("redis h:1", &RedisError::from(std::io::Error::from(kind))).verdict;
        assert_eq!(io(std::io::ErrorKind::ConnectionReset), Verdict::Down);
        assert_eq!(io(std::io::ErrorKind::ConnectionRefused), Verdict::Down);
        assert_eq!(io(std::io::ErrorKind::TimedOut), Verdict::Backoff);
    }
}
