//! What scripts can call besides the language's own library.
//!
//! All of them give the same for the same record, save `wall_clock`. What each takes, gives and refuses is said in
//! [`table`]; a test holds the two together.

mod pattern;
mod table;
mod time;

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use rhai::{Dynamic, Engine, FLOAT, INT, ImmutableString, Map};
use sha2::{Digest, Sha256, Sha512};

use super::convert;
use super::engine::{Answer, afford, end, kind, raise};
use super::guard::{self, Ended, MAX_CHILDREN, NewChild, Run};
use crate::record::{Headers, LONGEST_KEY, MOST_HEADERS};

pub use table::functions_table;

/// What a value's JSON takes at first, in bytes.
const SMALL: usize = 128;

/// Registers every function of the table.
pub(super) fn register(engine: &mut Engine) {
    control(engine);
    time::register(engine);
    pattern::register(engine);
    engine.register_fn("uuid", || in_run(|run| Ok(uuid_of(draw(run)))));
    engine.register_fn("random", || in_run(|run| Ok(fraction(draw(run)))));
    engine.register_fn("random", |low: INT, high: INT| in_run(|run| between(low, high, draw(run))));
    engine.register_fn("sha256", |value: Dynamic| -> Answer<String> { Ok(hex(&Sha256::digest(bytes_of(&value)?))) });
    engine.register_fn("sha512", |value: Dynamic| -> Answer<String> { Ok(hex(&Sha512::digest(bytes_of(&value)?))) });
    engine.register_fn("hmac_sha256", |key: &str, value: Dynamic| -> Answer<String> {
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key.as_bytes()) else { return raise("no key") };
        mac.update(&bytes_of(&value)?);
        Ok(hex(&mac.finalize().into_bytes()))
    });
    engine.register_fn("base64_encode", |text: &str| STANDARD.encode(text));
    engine.register_fn("base64_decode", |text: &str| text_of(STANDARD.decode(text)));
    engine.register_fn("base64url_encode", |text: &str| URL_SAFE_NO_PAD.encode(text));
    engine.register_fn("base64url_decode", |text: &str| text_of(URL_SAFE_NO_PAD.decode(text)));
    engine.register_fn("json_parse", |text: &str| -> Answer<Dynamic> {
        // A value takes far more than its text; what is over the budget ends at the next step.
        afford(text.len().saturating_mul(8))?;
        convert::parse(text.as_bytes()).map(|parsed| parsed.value).or_else(|error| raise(format!("no JSON: {error}")))
    });
    engine.register_fn("json_format", |value: Dynamic| -> Answer<String> {
        String::from_utf8(json(&value)?).or_else(|error| raise(error.to_string()))
    });
    engine.register_fn("redact", |value: Dynamic| if value.is_unit() { value } else { Dynamic::from("***") });
    engine.register_fn("redact", |text: &str, keep: INT| {
        let keep = usize::try_from(keep).unwrap_or(0);
        let letters = text.chars().count();
        let keep = if letters >= keep.saturating_mul(3) { keep } else { 0 };
        let shown: String = text.chars().skip(letters - keep).collect();
        format!("***{shown}")
    });
    engine.register_fn("env", |name: &str| {
        in_run(|run| match run.around.env.get(name) {
            Some(value) => Ok(value.as_deref().map_or(Dynamic::UNIT, |text| Dynamic::from(text.to_owned()))),
            None => raise(format!("env(\"{name}\") is not allowed here: add {name} to the stage's `env:` list")),
        })
    });
}

/// The functions that end a script or add to what it makes.
fn control(engine: &mut Engine) {
    engine.register_fn("drop", || -> Answer<()> {
        guard::with_run(|run| run.end(Ended::Dropped));
        end()
    });
    engine.register_fn("fail", |why: &str| -> Answer<()> {
        guard::with_run(|run| run.end(Ended::Failed(why.into())));
        end()
    });
    engine.register_fn("emit", |child: Map| -> Answer<()> {
        let child = new_child(child)?;
        in_run(|run| {
            if run.children.len() >= MAX_CHILDREN {
                run.end(Ended::Failed(format!("emit made more than {MAX_CHILDREN} children").into()));
                return end();
            }
            if child.payload.len() > run.around.record_limit {
                let (got, limit) = (child.payload.len(), run.around.record_limit);
                return raise(format!("a child of {got} bytes is over the limit of {limit} (source.limits.record)"));
            }
            run.children.push(child);
            Ok(())
        })
    });
}

fn new_child(mut child: Map) -> Answer<NewChild> {
    let Some(payload) = child.remove("payload") else { return raise("emit needs a map with a `payload`") };
    let payload = json(&payload)?.into();
    let key = match child.remove("key") {
        Some(key) => Some(key_of(&key).or_else(raise)?),
        None => None,
    };
    let headers = match child.remove("headers") {
        Some(headers) => Some(headers_of(&headers).or_else(raise)?),
        None => None,
    };
    match child.keys().next() {
        Some(name) => raise(format!("emit knows payload, key and headers, not `{name}`")),
        None => Ok(NewChild { payload, key, headers }),
    }
}

/// A key as a script leaves it: text, a number's or bool's JSON text, or `()` for none.
pub(super) fn key_of(key: &Dynamic) -> Result<Option<std::sync::Arc<str>>, String> {
    if let Ok(text) = key.as_immutable_string_ref() {
        if text.len() > LONGEST_KEY {
            return Err(format!("a key of {} bytes is over the limit of {LONGEST_KEY}", text.len()));
        }
        return Ok(Some(text.as_str().into()));
    }
    if key.is_unit() {
        return Ok(None);
    }
    if key.is_int() || key.is_float() || key.is_bool() {
        return Ok(Some(key.to_string().into()));
    }
    Err(format!("a key is text, a number, a bool or (), not {}", kind(key)))
}

/// Headers as a script leaves them: `()` removes one, what is no text becomes compact JSON.
pub(super) fn headers_of(headers: &Dynamic) -> Result<Headers, String> {
    let map = headers.as_map_ref().map_err(|_| format!("headers are a map, not {}", kind(headers)))?;
    let mut list = Headers::with_capacity(map.len());
    let mut size = 0_usize;
    for (name, value) in map.iter().filter(|(_, value)| !value.is_unit()) {
        let text: Box<str> = match value.as_immutable_string_ref() {
            Ok(text) => text.as_str().into(),
            Err(_) => {
                let bytes = convert::write(value, SMALL).map_err(|error| format!("header {name}: {error}"))?;
                String::from_utf8(bytes).map_err(|error| error.to_string())?.into()
            }
        };
        size = size.saturating_add(name.len()).saturating_add(text.len());
        if size > MOST_HEADERS {
            return Err(format!("headers are over the limit of {MOST_HEADERS} bytes"));
        }
        list.push((name.as_str().into(), text));
    }
    Ok(list)
}

fn in_run<T>(work: impl FnOnce(&mut Run) -> Answer<T>) -> Answer<T> {
    guard::with_run(work).unwrap_or_else(|| raise("only a running script has a record"))
}

/// 32 bytes from the record's id, the child's number and the number of the call: stable for ever.
fn draw(run: &mut Run) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(run.record.id.as_bytes());
    hash.update(run.child.to_le_bytes());
    hash.update(run.calls.to_le_bytes());
    run.calls = run.calls.wrapping_add(1);
    hash.finalize().into()
}

fn uuid_of(drawn: [u8; 32]) -> String {
    let (bytes, ()) = drawn.split_first_chunk::<16>().map_or(([0; 16], ()), |(first, _)| (*first, ()));
    uuid::Builder::from_random_bytes(bytes).into_uuid().to_string()
}

fn number_of(drawn: [u8; 32]) -> u64 {
    drawn.first_chunk::<8>().copied().map_or(0, u64::from_le_bytes)
}

#[expect(clippy::cast_precision_loss, reason = "53 bits fit a float exactly")]
fn fraction(drawn: [u8; 32]) -> FLOAT {
    (number_of(drawn) >> 11) as FLOAT / (1_u64 << 53) as FLOAT
}

fn between(low: INT, high: INT, drawn: [u8; 32]) -> Answer<INT> {
    if low > high {
        return raise(format!("random({low}, {high}): the first must not be the greater"));
    }
    let span = u128::from(high.abs_diff(low)) + 1;
    let step = u64::try_from(u128::from(number_of(drawn)) % span).unwrap_or(0);
    Ok(low.wrapping_add_unsigned(step))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        let _: std::fmt::Result = write!(out, "{byte:02x}");
        out
    })
}

fn json(value: &Dynamic) -> Answer<Vec<u8>> {
    convert::write(value, SMALL).or_else(|error| raise(error.to_string()))
}

fn bytes_of(value: &Dynamic) -> Answer<Vec<u8>> {
    match value.as_immutable_string_ref() {
        Ok(text) => Ok(text.as_bytes().to_vec()),
        Err(_) => json(value),
    }
}

fn text_of(decoded: Result<Vec<u8>, base64::DecodeError>) -> Answer<ImmutableString> {
    let bytes = decoded.or_else(|error| raise(format!("no base64: {error}")))?;
    String::from_utf8(bytes).map(ImmutableString::from).or_else(|_| raise("what is in the base64 is no UTF-8 text"))
}
