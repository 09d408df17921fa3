//! Where a write is: waiting for its time, in the log and what each branch made of it, cancelled.

use http::StatusCode;
use serde_json::{Map, Value, json};

use super::{Answer, Instance, View, request};
use crate::ingest::reply::{self, Problem};
use crate::source::Found;

pub(super) async fn find(instance: &dyn Instance, id: &str) -> Answer {
    let id = request::id(id)?;
    for view in instance.views() {
        if !view.log.caps().look_up {
            continue;
        }
        if let Some(found) = view.log.find(id).await? {
            let mut body = json!({"messageId": id, "namespace": view.namespace.as_str()});
            if let Some(map) = body.as_object_mut() {
                describe(&view, found, map);
            }
            return Ok(reply::json(StatusCode::OK, &body));
        }
    }
    Err(Problem::not_found(
        "no_message",
        "no log knows this id: it never was accepted, or it ended longer ago than is kept",
    ))
}

fn describe(view: &View, found: Found, body: &mut Map<String, Value>) {
    let mut put = |name: &str, value: Value| body.insert(name.to_owned(), value);
    match found {
        Found::Parked { record, due_at } => {
            put("state", json!("parked"));
            put("writtenAt", json!(record.written_at));
            put("deliverAt", json!(due_at));
        }
        Found::InLog { record, position, branches } => {
            put("state", json!("in_log"));
            put("writtenAt", json!(record.written_at));
            put("position", json!(position));
            let branches = branches.iter().map(|(name, fate)| {
                let mut value = json!(fate);
                if let Some(map) = value.as_object_mut() {
                    map.insert("branch".to_owned(), json!(name));
                }
                value
            });
            put("branches", branches.collect());
        }
        Found::Cancelled => {
            put("state", json!("cancelled"));
        }
    }
    put("revision", json!(view.plan.revision));
}
