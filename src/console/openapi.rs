//! The contract of the HTTP interface, as OpenAPI 3.1, and a page that shows it.

use std::sync::{Arc, LazyLock};

use http::StatusCode;
use utoipa::OpenApi as _;
use utoipa::openapi::path::Operation;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{Content, Ref, RefOr, Response};

use super::{Answer, branches, dead_letters, message, metrics, scheduled, status};
use crate::ingest;
use crate::ingest::reply::{self, Problem};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "walflow",
        description = "One HTTP call makes a write durable; a YAML file per namespace says what happens then.\n\nEvery refusal is a problem body after RFC 9457 with a stable `code`; on writes it also says whether the write may be in the log all the same."
    ),
    paths(
        status::live,
        status::ready,
        status::health,
        metrics::answer,
        contract,
        status::namespaces,
        status::of,
        super::delete,
        super::moving::to,
        message::find,
        scheduled::list,
        scheduled::cancel,
        scheduled::cancel_one,
        scheduled::reschedule,
        dead_letters::list,
        dead_letters::replay,
        dead_letters::purge,
        status::branches,
        branches::pause,
        branches::resume,
        branches::skip,
    ),
    modifiers(&Keys),
    security(("X-API-Key" = []), ("Bearer" = []))
)]
struct Contract;

/// The two ways to hand in a key.
struct Keys;

impl utoipa::Modify for Keys {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let components = openapi.components.get_or_insert_default();
        let header = ApiKeyValue::with_description("X-API-Key", "Needed where the instance has keys");
        components.add_security_scheme("X-API-Key", SecurityScheme::ApiKey(ApiKey::Header(header)));
        components.add_security_scheme("Bearer", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    }
}

/// The description as JSON.
pub fn openapi() -> String {
    let mut all = ingest::Contract::openapi();
    let mut own = Contract::openapi();
    all.info = std::mem::take(&mut own.info);
    all.merge(own);
    for (path, item) in &mut all.paths.paths {
        [&mut item.get, &mut item.post, &mut item.delete]
            .into_iter()
            .flatten()
            .for_each(|operation| add_refusals(path, operation));
    }
    // The types are plain data, which always has a JSON form.
    all.to_pretty_json().unwrap_or_default() + "\n"
}

/// Adds what every route of its kind refuses, and the body that all refusals have.
fn add_refusals(path: &str, operation: &mut Operation) {
    let responses = &mut operation.responses.responses;
    if operation.security.is_none() {
        let mut add = |status: &str, description: &str| {
            let common = || RefOr::T(Response::new(description));
            responses.entry(status.to_owned()).or_insert_with(common);
        };
        add("400", "`malformed`: the request cannot be read");
        add("401", "`unauthorized`: no key, or a wrong one");
        if path.contains("{ns}") {
            add("404", "`no_namespace`");
        }
        if path.starts_with("/api/v1/wal/") {
            add("503", "`log`: the log has failed; see Retry-After");
        }
    }
    for (_, response) in responses.iter_mut().filter(|(status, _)| status.starts_with(['4', '5'])) {
        if let RefOr::T(response) = response
            && response.content.is_empty()
        {
            let body = Content::new(Some(Ref::from_schema_name("Problem")));
            response.content.insert("application/problem+json".to_owned(), RefOr::T(body));
        }
    }
}

/// Describes this interface
#[utoipa::path(get, path = "/api/openapi.json", tag = "health", security(()),
    responses((status = 200, description = "OpenAPI 3.1", body = Object)))]
pub(super) fn contract() -> warp::reply::Response {
    static TEXT: LazyLock<String> = LazyLock::new(openapi);
    reply::bytes(StatusCode::OK, "application/json", TEXT.clone().into_bytes())
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::super::route::ROUTES;
    use super::*;

    fn described() -> BTreeSet<(String, String, bool)> {
        let all: Value = serde_json::from_str(&openapi()).unwrap();
        let mut described = BTreeSet::new();
        for (path, methods) in all["paths"].as_object().unwrap() {
            for (method, operation) in methods.as_object().unwrap() {
                let open = operation["security"] == serde_json::json!([{}]);
                described.insert((method.to_uppercase(), path.clone(), open));
            }
        }
        described
    }

    #[test]
    fn the_contract_has_exactly_the_routes_that_are_answered() {
        let own = ROUTES.iter().filter(|route| !route.path.contains("{*"));
        let own = own.map(|route| (route.method.to_string(), route.path.to_owned(), route.open));
        let writes = ingest::WRITES.iter().map(|path| ("POST".to_owned(), (*path).to_owned(), false));
        assert_eq!(described(), own.chain(writes).collect());
    }

    #[test]
    fn the_contract_that_is_checked_in_is_that_of_the_code() {
        crate::testing::checked_in("schemas/openapi.json", &openapi());
    }

    #[test]
    fn every_reference_of_the_contract_leads_somewhere() {
        let all: Value = serde_json::from_str(&openapi()).unwrap();
        assert_eq!(all["openapi"].as_str().unwrap().split('.').take(2).collect::<Vec<_>>(), ["3", "1"]);
        let mut left = vec![&all];
        while let Some(value) = left.pop() {
            match value {
                Value::Object(map) => {
                    if let Some(to) = map.get("$ref").and_then(Value::as_str) {
                        assert!(all.pointer(to.trim_start_matches('#')).is_some(), "{to} leads nowhere");
                    }
                    left.extend(map.values());
                }
                Value::Array(items) => left.extend(items),
                _ => {}
            }
        }
    }
}
