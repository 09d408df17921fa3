//! Regular expressions for scripts: linear in time, bounded in size, compiled once.

use std::collections::HashMap;
use std::sync::LazyLock;

use parking_lot::Mutex;
use regex::{Regex, RegexBuilder};
use rhai::{Array, Dynamic, Engine, ImmutableString};

use crate::transform::engine::{Answer, afford, raise};

/// Patterns that are kept compiled, over all scripts; when there are more, all are forgotten.
const KEPT: usize = 256;
/// Bytes that one compiled pattern may take.
const SIZE: usize = 256 << 10;

static COMPILED: LazyLock<Mutex<HashMap<Box<str>, Regex>>> = LazyLock::new(Mutex::default);

pub(super) fn register(engine: &mut Engine) {
    engine.register_fn("regex_match", |text: &str, pattern: &str| -> Answer<bool> {
        Ok(compiled(pattern)?.is_match(text))
    });
    engine.register_fn("regex_find", |text: &str, pattern: &str| -> Answer<Dynamic> {
        let found = compiled(pattern)?.find(text).map(|found| ImmutableString::from(found.as_str()));
        Ok(found.map_or(Dynamic::UNIT, Dynamic::from))
    });
    engine.register_fn("regex_captures", |text: &str, pattern: &str| -> Answer<Array> {
        let captures = compiled(pattern)?.captures(text);
        Ok(captures.map_or_else(Array::new, |captures| {
            let group = |group: Option<regex::Match<'_>>| {
                group.map_or(Dynamic::UNIT, |group| ImmutableString::from(group.as_str()).into())
            };
            captures.iter().map(group).collect()
        }))
    });
    engine.register_fn("regex_replace", |text: &str, pattern: &str, with: &str| replaced(text, pattern, with));
}

fn replaced(text: &str, pattern: &str, with: &str) -> Answer<ImmutableString> {
    let (mut out, mut last) = (String::new(), 0);
    let groups = with.matches('$').count();
    for captures in compiled(pattern)?.captures_iter(text) {
        let whole = captures.get_match();
        out.push_str(text.get(last..whole.start()).unwrap_or_default());
        // A replacement may name a group many times, no group is longer than the match, and the buffer may double.
        let most = with.len().saturating_add(groups.saturating_mul(whole.len()));
        afford(out.len().saturating_mul(2).saturating_add(most))?;
        captures.expand(with, &mut out);
        last = whole.end();
    }
    out.push_str(text.get(last..).unwrap_or_default());
    Ok(out.into())
}

fn compiled(pattern: &str) -> Answer<Regex> {
    if let Some(regex) = COMPILED.lock().get(pattern) {
        return Ok(regex.clone());
    }
    let built = RegexBuilder::new(pattern).size_limit(SIZE).dfa_size_limit(SIZE).nest_limit(64).build();
    let regex = built.or_else(|error| raise(format!("no pattern: {error}")))?;
    let mut kept = COMPILED.lock();
    if kept.len() >= KEPT {
        kept.clear();
    }
    kept.insert(pattern.into(), regex.clone());
    Ok(regex)
}
