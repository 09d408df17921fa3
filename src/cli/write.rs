//! `walflow write`: one record, from the command line or standard input.

use std::io::Read;

use anyhow::Context;
use clap::Args;
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::{Output, Stop, client::Remote, output};

#[derive(Debug, Args)]
pub(super) struct WriteArgs {
    /// The namespace to write to
    namespace: String,
    /// The payload, as JSON; - or nothing reads it from standard input
    payload: Option<String>,
    /// Records of one key keep their order
    #[arg(long, help_heading = "This call")]
    key: Option<String>,
    /// Deliver it this much later: 30s, 2h
    #[arg(long, help_heading = "This call", value_name = "DURATION")]
    delay: Option<crate::units::Span>,
    /// Repeating a write with the same idempotency key writes it once
    #[arg(long, help_heading = "This call", value_name = "KEY")]
    idempotency_key: Option<String>,
    /// How to print the answer
    #[arg(long, env = "WALFLOW_OUTPUT", value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    remote: Remote,
}

pub(super) async fn write(args: WriteArgs) -> Result<(), Stop> {
    let text = match args.payload.filter(|payload| payload != "-") {
        Some(text) => text,
        None => {
            let mut text = String::new();
            std::io::stdin().lock().read_to_string(&mut text).context("could not read standard input")?;
            text
        }
    };
    let payload: Value = serde_json::from_str(&text).map_err(|error| {
        Stop::new(Stop::USAGE, format!("the payload is not JSON: {error}; text needs quotes of its own"))
    })?;
    let mut body = Map::new();
    body.insert("namespace".to_owned(), json!(args.namespace));
    body.insert("payload".to_owned(), payload);
    if let Some(key) = args.key {
        body.insert("key".to_owned(), json!(key));
    }
    if let Some(delay) = args.delay {
        body.insert("lifecycle".to_owned(), json!({ "delay": delay.0.as_secs_f64() }));
    }
    let headers: Vec<(&str, &str)> = args.idempotency_key.iter().map(|key| ("idempotency-key", key.as_str())).collect();
    let answer = args.remote.send(Method::POST, "/api/v1/wal/write", Some(&Value::Object(body)), &headers).await?;
    let answer = answer.success()?;
    match args.output {
        Output::Json => output::json(&answer)?,
        Output::Text => output::data(&output::field(&answer, "messageId"))?,
    }
    Ok(())
}
