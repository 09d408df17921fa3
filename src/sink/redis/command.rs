//! One case of a `redis:` and the command that it makes of a record.
//!
//! Takes a record, gives a command with its arguments as bytes. Values are what the record holds: text as text, the payload
//! as its own bytes, anything else as JSON. Never builds a command out of text.

use std::time::Duration;

use bytes::Bytes;
use redis::Cmd;
use serde_json::Value;

use super::{RedisCaseSpec, RedisCommand};
use crate::sink::template::{Document, Scope, Template};
use crate::sink::{Failure, SpecFault};

/// What cannot work in a case.
pub(super) fn check(case: &RedisCaseSpec, here: &str, faults: &mut Vec<SpecFault>) {
    let command = case.command.unwrap_or_default();
    match Template::parse(&case.key) {
        Err(error) => {
            faults.push(SpecFault::new(format!("{here}/key"), error.to_string(), "cache:{key}, for example"));
        }
        Ok(template) if template.literal_prefix().is_empty() => {
            let message = "the key begins with no literal text, so a record could name any key of the server";
            faults.push(SpecFault::new(format!("{here}/key"), message, "cache:{key}, for example"));
        }
        Ok(_) => {}
    }
    let mut document = |place: &str, value: &Value| {
        if let Err(error) = Document::parse(value) {
            let help = "{payload.a}, for example; {{ is a literal brace";
            faults.push(SpecFault::new(format!("{here}{place}{}", error.pointer), error.error.to_string(), help));
        }
    };
    for (place, value) in [("/value", &case.value), ("/by", &case.by)] {
        if let Some(value) = value {
            document(place, value);
        }
    }
    for (name, value) in &case.fields {
        document(&format!("/fields/{}", name.replace('~', "~0").replace('/', "~1")), value);
    }
    let word = match command {
        RedisCommand::Set => "set",
        RedisCommand::Del => "del",
        RedisCommand::Hset => "hset",
        RedisCommand::Incrby => "incrby",
        RedisCommand::Xadd => "xadd",
    };
    let takes_fields = matches!(command, RedisCommand::Hset | RedisCommand::Xadd);
    for (name, given, fits, help) in [
        (
            "value",
            case.value.is_some(),
            command == RedisCommand::Set,
            "only `set` has a value; `hset` and `xadd` have fields",
        ),
        ("ttl", case.ttl.is_some(), command == RedisCommand::Set, "only `set` takes a ttl"),
        ("fields", !case.fields.is_empty(), takes_fields, "only `hset` and `xadd` have fields"),
        ("by", case.by.is_some(), command == RedisCommand::Incrby, "only `incrby` has `by`"),
    ] {
        if given && !fits {
            faults.push(SpecFault::new(format!("{here}/{name}"), format!("`{word}` has no `{name}`"), help));
        }
    }
    if command == RedisCommand::Hset && case.fields.is_empty() {
        let help = "fields: { name: \"{payload.name}\" }";
        faults.push(SpecFault::new(format!("{here}/command"), "`hset` needs fields", help));
    }
    if case.ttl.is_some_and(|ttl| ttl.0.is_zero()) {
        faults.push(SpecFault::new(format!("{here}/ttl"), "what lives for no time is never there", "1h, or use del"));
    }
    if let Some(Value::Number(by)) = &case.by
        && by.as_i64().is_none()
    {
        faults.push(SpecFault::new(format!("{here}/by"), "incrby takes whole numbers", "1, for example"));
    }
}

/// A case, its templates parsed.
pub(super) struct Case {
    command: RedisCommand,
    key: Template,
    value: Option<Document>,
    ttl: Option<Duration>,
    fields: Vec<(Box<str>, Document)>,
    by: Option<Document>,
}

impl Case {
    /// Parses a case; a fault comes with its place.
    pub(super) fn parse(spec: &RedisCaseSpec) -> Result<Self, (String, Box<str>)> {
        let document = |place: &str, value: &Value| {
            Document::parse(value).map_err(|error| (format!("{place}{}", error.pointer), error.error.message))
        };
        let option =
            |place: &str, value: &Option<Value>| value.as_ref().map(|value| document(place, value)).transpose();
        let fields = spec.fields.iter().map(|(name, value)| Ok((name.as_str().into(), document("/fields", value)?)));
        Ok(Self {
            command: spec.command.unwrap_or_default(),
            key: Template::parse(&spec.key).map_err(|error| ("/key".to_owned(), error.message))?,
            value: option("/value", &spec.value)?,
            ttl: spec.ttl.map(|span| span.0),
            fields: fields.collect::<Result<_, _>>()?,
            by: option("/by", &spec.by)?,
        })
    }

    /// The command for a record.
    pub(super) fn command(&self, scope: &Scope<'_>) -> Result<Cmd, Failure> {
        let key = self.key.render_text(scope)?;
        let mut command = redis::cmd(match self.command {
            RedisCommand::Set => "SET",
            RedisCommand::Del => "DEL",
            RedisCommand::Hset => "HSET",
            RedisCommand::Incrby => "INCRBY",
            RedisCommand::Xadd => "XADD",
        });
        command.arg(key);
        match self.command {
            RedisCommand::Del => {}
            RedisCommand::Set => {
                let value = match &self.value {
                    Some(document) => document.render_bytes(scope)?,
                    None => scope.payload().clone(),
                };
                command.arg(&*value);
                if let Some(ttl) = self.ttl {
                    if ttl.subsec_millis() == 0 {
                        command.arg("EX").arg(ttl.as_secs());
                    } else {
                        command.arg("PX").arg(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
                    }
                }
            }
            RedisCommand::Incrby => {
                let by = match &self.by {
                    Some(document) => document.render_bytes(scope)?,
                    None => Bytes::from_static(b"1"),
                };
                let number = std::str::from_utf8(&by).ok().and_then(|text| text.trim().parse::<i64>().ok());
                let number =
                    number.ok_or_else(|| Failure::rendering("`by` is no whole number between -2^63 and 2^63-1"))?;
                command.arg(number);
            }
            RedisCommand::Hset | RedisCommand::Xadd => {
                if self.command == RedisCommand::Xadd {
                    command.arg("*");
                    if self.fields.is_empty() {
                        command.arg("id").arg(scope.delivery_id()).arg("payload").arg(&**scope.payload());
                    }
                }
                for (name, document) in &self.fields {
                    let value = document.render_bytes(scope)?;
                    command.arg(&**name).arg(&*value);
                }
            }
        }
        Ok(command)
    }
}

pub(super) fn key_of(command: &Cmd) -> &[u8] {
    match command.args_iter().nth(1) {
        Some(redis::Arg::Simple(key)) => key,
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sink::testing::{context, operation_with};

    fn packed(case: &Value) -> Result<String, Failure> {
        let case = Case::parse(&serde_json::from_value(case.clone()).unwrap()).unwrap();
        let operation = operation_with(r#"{"v": "a b", "n": 5, "o": {"x": 1}, "big": 1e3}"#, |record| {
            record.key = Some("user:1".into());
        });
        let context = context();
        let command = case.command(&Scope::new(&operation, &context))?;
        let words = command.args_iter().map(|word| match word {
            redis::Arg::Simple(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            _ => "?".to_owned(),
        });
        Ok(words.collect::<Vec<_>>().join("|").replace(&operation.delivery_id(), "ID"))
    }

    #[test]
    fn every_command_carries_what_the_record_holds() {
        let payload = r#"{"v": "a b", "n": 5, "o": {"x": 1}, "big": 1e3}"#;
        for (case, words) in [
            (json!({"key": "c:{key}"}), format!("SET|c:user:1|{payload}")),
            (json!({"key": "c", "value": "{payload.v}", "ttl": "1h"}), "SET|c|a b|EX|3600".to_owned()),
            (json!({"key": "c", "value": "{payload.o}", "ttl": "1500ms"}), r#"SET|c|{"x":1}|PX|1500"#.to_owned()),
            (json!({"key": "c", "value": {"o": "{payload.o.x}"}}), r#"SET|c|{"o":1}"#.to_owned()),
            (json!({"command": "del", "key": "c:{payload.v}"}), "DEL|c:a b".to_owned()),
            (
                json!({"command": "hset", "key": "h", "fields": {"v": "{payload.v}", "n": 7}}),
                "HSET|h|v|a b|n|7".to_owned(),
            ),
            (json!({"command": "incrby", "key": "i"}), "INCRBY|i|1".to_owned()),
            (json!({"command": "incrby", "key": "i", "by": -3}), "INCRBY|i|-3".to_owned()),
            (json!({"command": "incrby", "key": "i", "by": "{payload.n}"}), "INCRBY|i|5".to_owned()),
            (json!({"command": "xadd", "key": "x"}), format!("XADD|x|*|id|ID|payload|{payload}")),
            (json!({"command": "xadd", "key": "x", "fields": {"a": "{payload}"}}), format!("XADD|x|*|a|{payload}")),
        ] {
            assert_eq!(packed(&case).unwrap(), words, "{case}");
        }
        for case in [
            json!({"command": "incrby", "key": "i", "by": "{payload.big}"}),
            json!({"command": "incrby", "key": "i", "by": "{payload.v}"}),
            json!({"key": "c:{payload.zz}"}),
        ] {
            assert!(packed(&case).unwrap_err().rendering, "{case}");
        }
    }

    #[test]
    fn what_does_not_fit_a_command_is_found() {
        for (case, place) in [
            (json!({"key": "{key}"}), "/key"),
            (json!({"key": ""}), "/key"),
            (json!({"key": "c:{key"}), "/key"),
            (json!({"key": "c", "value": {"a": "{payload.}"}}), "/value/a"),
            (json!({"key": "c", "fields": {"a": 1}}), "/fields"),
            (json!({"key": "c", "by": 1}), "/by"),
            (json!({"key": "c", "ttl": "0s"}), "/ttl"),
            (json!({"command": "del", "key": "c", "value": "x"}), "/value"),
            (json!({"command": "hset", "key": "c"}), "/command"),
            (json!({"command": "hset", "key": "c", "ttl": "1s", "fields": {"a": 1}}), "/ttl"),
            (json!({"command": "incrby", "key": "c", "by": 1.5}), "/by"),
        ] {
            let mut faults = Vec::new();
            check(&serde_json::from_value(case.clone()).unwrap(), "/cases/0", &mut faults);
            let places: Vec<&str> = faults.iter().map(|fault| fault.pointer.as_str()).collect();
            assert_eq!(places, [format!("/cases/0{place}")], "{case}");
        }
    }
}
