//! What scripts can call besides the language's own library: one table, with the docs of each function.
//!
//! All of them give the same for the same record, save `wall_clock`. `FUNCTIONS.md` is rendered from the table; a test
//! holds it to that.

mod pattern;
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

/// What a value's JSON takes at first, in bytes.
const SMALL: usize = 128;

/// One function's entry in the docs.
struct Entry {
    signature: &'static str,
    does: &'static str,
}

const fn entry(signature: &'static str, does: &'static str) -> Entry {
    Entry { signature, does }
}

/// Every function, in the order of the docs. A signature's name and number of arguments are those registered.
const TABLE: &[Entry] = &[
    entry("drop()", "Ends the script and drops the record, counted. Cannot be caught."),
    entry(
        "emit(child: map)",
        "Adds a child `#{payload, key?, headers?}`; the children replace the record, at most 1,000.",
    ),
    entry("fail(why: text)", "Ends the script; the record becomes a dead letter with this reason. Cannot be caught."),
    entry("now() -> text", "When the record was accepted: RFC 3339, UTC, milliseconds. The same on every retry."),
    entry("wall_clock() -> text", "The real time: differs between retries and regions."),
    entry("uuid() -> text", "A UUID drawn from the record's id and the number of the call: the same on every retry."),
    entry("random() -> float", "From 0 up to, not including, 1; drawn as `uuid`."),
    entry("random(low: int, high: int) -> int", "From `low` to `high`, both included; drawn as `uuid`."),
    entry("sha256(value) -> text", "SHA-256 in hex of a text, or of another value's JSON."),
    entry("sha512(value) -> text", "SHA-512 in hex of a text, or of another value's JSON."),
    entry("hmac_sha256(key: text, value) -> text", "HMAC-SHA-256 in hex of a text, or of another value's JSON."),
    entry("base64_encode(text: text) -> text", "Standard alphabet with padding."),
    entry("base64_decode(text: text) -> text", "The reverse; an error if it is no base64 of UTF-8."),
    entry("base64url_encode(text: text) -> text", "URL-safe alphabet without padding."),
    entry("base64url_decode(text: text) -> text", "The reverse; an error if it is no base64 of UTF-8."),
    entry("json_parse(text: text) -> value", "Reads JSON, nested at most 64 levels."),
    entry("json_format(value) -> text", "Writes compact JSON; fields in alphabetical order."),
    entry("regex_match(text: text, pattern: text) -> bool", "Whether the pattern matches anywhere. Linear time."),
    entry("regex_find(text: text, pattern: text) -> text | ()", "The first match, or `()`."),
    entry("regex_captures(text: text, pattern: text) -> array", "The first match and its groups, or an empty array."),
    entry(
        "regex_replace(text: text, pattern: text, with: text) -> text",
        "Replaces every match; `$1` or `${name}` is a group.",
    ),
    entry(
        "time_parse(text: text, format: text) -> text",
        "Reads a time by a strftime format and gives RFC 3339; UTC where no offset is read.",
    ),
    entry("time_format(time: text, format: text) -> text", "Writes an RFC 3339 time by a strftime format, in UTC."),
    entry(
        "time_add(time: text, by) -> text",
        "Adds seconds (a number) or a duration such as `\"5m\"` or `\"-1h30m\"`.",
    ),
    entry("time_diff(later: text, earlier: text) -> float", "The seconds between two times."),
    entry("time_unix(time: text) -> int", "Whole seconds since 1970."),
    entry("time_from_unix(seconds) -> text", "The time so many seconds after 1970."),
    entry("redact(value) -> text", "`***`, whatever the value; `()` stays `()`."),
    entry(
        "redact(text: text, keep: int) -> text",
        "`***` and the last `keep` letters, if at least twice as many are hidden.",
    ),
    entry(
        "env(name: text) -> text | ()",
        "An environment variable that the stage's `env:` list names; `()` if it is not set.",
    ),
];

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

/// Every function with its signature, as a table in Markdown.
pub fn functions_table() -> String {
    let mut out = String::from(
        "# Functions for scripts and expressions\n\nGenerated from the code; see `src/transform/functions.rs`.\n\n| function | what it gives |\n|---|---|\n",
    );
    for Entry { signature, does } in TABLE {
        let _: std::fmt::Result =
            writeln!(out, "| `{}` | {} |", signature.replace('|', "\\|"), does.replace('|', "\\|"));
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_that_is_checked_in_is_that_of_the_code() {
        crate::testing::checked_in("src/transform/FUNCTIONS.md", &functions_table());
    }

    /// The name in a signature and how many arguments it takes.
    fn shape(signature: &str) -> (String, usize) {
        let (name, rest) = signature.split_once('(').unwrap();
        let arguments = rest.split_once(')').unwrap().0;
        let count = arguments.split(',').filter(|argument| !argument.trim().is_empty()).count();
        (name.trim().to_owned(), count)
    }

    #[test]
    fn the_table_names_what_is_registered_and_nothing_else() {
        let mut engine = Engine::new_raw();
        register(&mut engine);
        let registered: BTreeSet<_> = engine.gen_fn_signatures(false).iter().map(|line| shape(line)).collect();
        let listed: BTreeSet<_> = TABLE.iter().map(|entry| shape(entry.signature)).collect();
        assert_eq!(registered, listed);
        assert!(listed.len() > 25, "the signatures were not read");
    }
}
