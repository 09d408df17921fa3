//! `walflow status` and `walflow healthcheck`: how a running walflow is.

use clap::Args;
use reqwest::Method;
use serde_json::Value;

use super::branch::branch_table;
use super::client::{Remote, segment};
use super::{Output, Stop, output};

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Only this namespace, with its branches
    namespace: Option<String>,
    /// How to print the answer
    #[arg(long, env = "WALFLOW_OUTPUT", value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, Args)]
pub(super) struct HealthcheckArgs {
    #[command(flatten)]
    remote: Remote,
}

pub(super) async fn status(args: StatusArgs) -> Result<(), Stop> {
    let Some(namespace) = &args.namespace else {
        let answer = args.remote.get("/api/v1/wal/namespaces").await?;
        if args.output == Output::Json {
            return Ok(output::json(&answer)?);
        }
        let items = answer.get("namespaces").unwrap_or(&answer);
        let names: Vec<String> = items
            .as_array()
            .into_iter()
            .flatten()
            .map(|item| item.as_str().map_or_else(|| output::field(item, "namespace"), ToOwned::to_owned))
            .collect();
        for name in names {
            let status = args.remote.get(&format!("/api/v1/wal/namespace/{}/status", segment(&name))).await?;
            output::data(&describe(&name, &status))?;
        }
        return Ok(());
    };
    let answer = args.remote.get(&format!("/api/v1/wal/namespace/{}/status", segment(namespace))).await?;
    match args.output {
        Output::Json => output::json(&answer)?,
        Output::Text => output::data(&describe(namespace, &answer))?,
    }
    Ok(())
}

fn describe(name: &str, status: &Value) -> String {
    let table = branch_table(status.get("branches").unwrap_or(&Value::Null)).replace('\n', "\n  ");
    format!("{name}: config {}, parked {}\n  {table}", output::field(status, "config"), output::field(status, "parked"))
}

pub(super) async fn healthcheck(args: HealthcheckArgs) -> Result<(), Stop> {
    let answer = args.remote.ask(Method::GET, "/readyz", None).await?;
    if answer.status.is_success() {
        return Ok(());
    }
    Err(Stop::new(Stop::FAILED, format!("not ready: {}", answer.body)))
}
