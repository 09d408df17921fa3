//! The contract of the HTTP interface, as OpenAPI 3.1, and a page that shows it.

use std::sync::Arc;

use http::StatusCode;
use utoipa::OpenApi as _;

use super::Answer;
use crate::ingest::reply::{self, Problem};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "walflow",
        description = "One HTTP call makes a write durable; a YAML file per namespace says what happens then."
    ),
    components(schemas(
        crate::ingest::reply::Durable,
        crate::record::TargetKind,
        crate::source::DeadReason,
        crate::source::Replayed,
    ))
)]
struct Contract;

/// The description as JSON.
pub fn openapi() -> String {
    // The types are plain data, which always has a JSON form.
    Contract::openapi().to_pretty_json().unwrap_or_default()
}

/// The page and its files; nothing comes from the network.
pub(super) fn docs(rest: &[&str]) -> Answer {
    let config = Arc::new(utoipa_swagger_ui::Config::from("/api/openapi.json"));
    let path = rest.join("/");
    if path.is_empty() {
        let page = utoipa_swagger_ui::serve("index.html", config);
        let page = page.ok().flatten().map(|file| String::from_utf8_lossy(&file.bytes).into_owned());
        // The page names its files relative to itself, and its own address may lack the last slash.
        let page = page.map(|page| page.replace("\"./", "\"/api/docs/"));
        return page
            .map(|page| reply::bytes(StatusCode::OK, "text/html; charset=utf-8", page.into_bytes()))
            .ok_or_else(missing);
    }
    let file = utoipa_swagger_ui::serve(&path, config).ok().flatten().ok_or_else(missing)?;
    let kind = match path.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css",
        Some("js") => "text/javascript",
        Some("png") => "image/png",
        _ => "application/octet-stream",
    };
    Ok(reply::bytes(StatusCode::OK, kind, file.bytes.into_owned()))
}

fn missing() -> Problem {
    Problem::not_found("no_route", "there is no such page")
}
