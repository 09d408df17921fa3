//! `walflow dead-letters`: what could not be delivered, why, and the way back.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::client::{Remote, query, segment};
use super::{Output, Stop, output};

#[derive(Debug, Subcommand)]
pub(super) enum DeadLettersVerb {
    /// List a namespace's dead letters, oldest first
    List {
        #[command(flatten)]
        which: Which,
        /// At most so many
        #[arg(long, help_heading = "This call", default_value_t = 100)]
        limit: u32,
        /// Go on behind the page before; its end names this
        #[arg(long, help_heading = "This call", value_name = "TOKEN")]
        after: Option<String>,
        /// How to print the list
        #[arg(long, env = "WALFLOW_OUTPUT", value_enum, default_value_t)]
        output: Output,
        #[command(flatten)]
        remote: Remote,
    },
    /// Show everything about one record's dead letters: reason, attempts, last error, payload
    Show {
        /// The namespace
        namespace: String,
        /// The record's id
        id: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// Send dead letters back to the branch that failed, in their order
    Replay {
        #[command(flatten)]
        which: Which,
        /// Also those whose key has moved on: an old value may replace a newer one
        #[arg(long, help_heading = "This call")]
        force: bool,
        #[command(flatten)]
        remote: Remote,
    },
    /// Delete dead letters for good
    Purge {
        #[command(flatten)]
        which: Which,
        /// Really delete; without it nothing happens
        #[arg(long, help_heading = "This call")]
        yes: bool,
        #[command(flatten)]
        remote: Remote,
    },
}

/// Which dead letters: every flag narrows.
#[derive(Debug, Args)]
pub(super) struct Which {
    /// The namespace
    namespace: String,
    /// Only this record
    #[arg(long, help_heading = "This call")]
    id: Option<String>,
    /// Only this branch
    #[arg(long, help_heading = "This call")]
    branch: Option<String>,
    /// Only this reason: refused, exhausted, script, template, no_route, crash, skipped
    #[arg(long, help_heading = "This call")]
    reason: Option<String>,
    /// Only this key
    #[arg(long, help_heading = "This call")]
    key: Option<String>,
    /// Only those given up at or after this time
    #[arg(long, help_heading = "This call", value_name = "TIME")]
    from: Option<String>,
    /// Only those given up before this time
    #[arg(long, help_heading = "This call", value_name = "TIME")]
    to: Option<String>,
    /// Only those whose last error contains this
    #[arg(long, help_heading = "This call", value_name = "TEXT")]
    error_contains: Option<String>,
}

impl Which {
    fn path(&self) -> String {
        format!("/api/v1/wal/namespace/{}/dead-letters", segment(&self.namespace))
    }

    fn narrow(&self) -> [(&'static str, Option<String>); 7] {
        let copy = Clone::clone;
        [
            ("id", copy(&self.id)),
            ("branch", copy(&self.branch)),
            ("reason", copy(&self.reason)),
            ("key", copy(&self.key)),
            ("from", copy(&self.from)),
            ("to", copy(&self.to)),
            ("errorContains", copy(&self.error_contains)),
        ]
    }

    fn body(&self) -> Map<String, Value> {
        self.narrow().into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value?)))).collect()
    }
}

pub(super) async fn dead_letters(verb: DeadLettersVerb) -> Result<(), Stop> {
    match verb {
        DeadLettersVerb::List { which, limit, after, output, remote } => {
            list(&which, limit, after, output, &remote).await
        }
        DeadLettersVerb::Show { namespace, id, remote } => show(&namespace, &id, &remote).await,
        DeadLettersVerb::Replay { which, force, remote } => {
            let mut body = which.body();
            body.insert("force".to_owned(), json!(force));
            let path = format!("{}/replay", which.path());
            let answer = remote.ask(Method::POST, &path, Some(&Value::Object(body))).await?.success()?;
            let overtaken = answer.get("overtaken").and_then(Value::as_u64).unwrap_or(0);
            output::data(&format!("replayed {}", output::field(&answer, "replayed")))?;
            if overtaken > 0 {
                output::notice(&format!(
                    "{overtaken} stay: later records of their keys were delivered, and an old value would replace a newer one; --force sends them too"
                ));
            }
            Ok(())
        }
        DeadLettersVerb::Purge { which, yes, remote } => {
            if !yes {
                return Err(Stop::new(Stop::USAGE, "this deletes the dead letters that match for good; say --yes"));
            }
            let path = format!("{}/purge", which.path());
            let answer = remote.ask(Method::POST, &path, Some(&Value::Object(which.body()))).await?.success()?;
            Ok(output::data(&format!("purged {}", output::field(&answer, "purged")))?)
        }
    }
}

async fn list(which: &Which, limit: u32, after: Option<String>, form: Output, remote: &Remote) -> Result<(), Stop> {
    let mut pairs = which.narrow().to_vec();
    pairs.extend([("limit", Some(limit.to_string())), ("after", after)]);
    let answer = remote.get(&format!("{}{}", which.path(), query(&pairs))).await?;
    if form == Output::Json {
        return Ok(output::json(&answer)?);
    }
    let columns = [
        ("ID", "messageId"),
        ("BRANCH", "branch"),
        ("AT", "at"),
        ("REASON", "reason"),
        ("ATTEMPTS", "attempts"),
        ("LAST ERROR", "lastError"),
    ];
    let row = |letter: &Value| columns.iter().map(|(_, name)| output::field(letter, name)).collect();
    let rows: Vec<Vec<String>> = answer.get("items").and_then(Value::as_array).into_iter().flatten().map(row).collect();
    if rows.is_empty() {
        output::notice("no dead letters");
        return Ok(());
    }
    output::data(&output::table(&columns.map(|(title, _)| title), &rows))?;
    if let Some(next) = answer.get("next").and_then(Value::as_str) {
        output::notice(&format!("there are more; --after {next} goes on, or narrow the list"));
    }
    Ok(())
}

async fn show(namespace: &str, id: &str, remote: &Remote) -> Result<(), Stop> {
    let pairs = [("id", Some(id.to_owned()))];
    let path = format!("/api/v1/wal/namespace/{}/dead-letters{}", segment(namespace), query(&pairs));
    let answer = remote.get(&path).await?;
    match answer.get("items").and_then(Value::as_array) {
        Some(letters) if !letters.is_empty() => Ok(output::json(&json!(letters))?),
        _ => Err(Stop::new(Stop::FAILED, format!("no dead letter of `{namespace}` has the id {id}"))),
    }
}
