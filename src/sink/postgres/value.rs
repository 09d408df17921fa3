//! A value as text from which the server reads what it reads from its JSON.
//!
//! Takes what `json_populate_recordset` would get, gives what it hands to the type's input, for where the server is given
//! text: a parameter, and COPY. None for what only the server can judge.

use std::borrow::Cow;

use serde_json::value::RawValue;

/// How values are written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// For any type but the next.
    Text,
    /// For `json` and `jsonb`.
    Json,
}

/// As many dimensions as an array has at most.
const DIMENSIONS: usize = 6;
/// Deeper JSON the server may refuse to read, and with COPY it would not read what goes into a text column.
const DEEPEST: usize = 256;

/// A value that is not null.
pub(super) fn text(way: Way, json: &str) -> Option<Cow<'_, str>> {
    let Some(inner) = json.strip_prefix('"') else {
        return is_read_alike(json).then_some(Cow::Borrowed(json));
    };
    let inner = inner.strip_suffix('"')?;
    if !inner.contains('\\') {
        return Some(Cow::Borrowed(if way == Way::Text { inner } else { json }));
    }
    let text: String = serde_json::from_str(json).ok().filter(|text: &String| !text.contains('\0'))?;
    Some(Cow::Owned(match way {
        Way::Text => text,
        // What the server makes of a string for a column of JSON: only what must be is escaped.
        Way::Json => serde_json::to_string(&text).ok()?,
    }))
}

/// An array, its elements written that way: `{"1",NULL,"a"}`. None also where sub-arrays differ in length or are empty.
pub(super) fn array(way: Way, json: &str) -> Option<String> {
    let mut shape = Vec::new();
    let mut first = json;
    // The first element of all says how deep the array is; what lies deeper is an element's own JSON.
    while first.starts_with('[') {
        let items: Vec<&RawValue> = serde_json::from_str(first).ok()?;
        shape.push(items.len());
        let Some(next) = items.first() else { break };
        first = next.get();
    }
    if shape == [0] {
        return Some("{}".to_owned());
    }
    if shape.is_empty() || shape.len() > DIMENSIONS || shape.contains(&0) {
        return None;
    }
    let mut out = String::with_capacity(json.len() + json.len() / 2);
    part(way, json, &shape, &mut out)?;
    Some(out)
}

fn part(way: Way, json: &str, shape: &[usize], out: &mut String) -> Option<()> {
    let Some((length, inner)) = shape.split_first() else {
        if json == "null" {
            out.push_str("NULL");
            return Some(());
        }
        out.push('"');
        for letter in text(way, json)?.chars() {
            if matches!(letter, '"' | '\\') {
                out.push('\\');
            }
            out.push(letter);
        }
        out.push('"');
        return Some(());
    };
    let items: Vec<&RawValue> = serde_json::from_str(json).ok()?;
    if items.len() != *length {
        return None;
    }
    out.push('{');
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        part(way, item.get(), inner, out)?;
    }
    out.push('}');
    Some(())
}

/// True for JSON that every server reads: not deep, and no escape that stands for no character.
fn is_read_alike(json: &str) -> bool {
    let (mut depth, mut in_string, mut pairs) = (0_usize, false, false);
    let mut bytes = json.as_bytes().iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => in_string = !in_string,
            b'\\' => {
                let is_code = bytes.next() == Some(&b'u');
                let code = bytes.as_slice();
                if is_code && code.starts_with(b"0000") {
                    return false;
                }
                pairs |= is_code && matches!(code.first(), Some(b'd' | b'D'));
            }
            b'[' | b'{' if !in_string => {
                depth += 1;
                if depth > DEEPEST {
                    return false;
                }
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    // It may be half of a pair.
    !pairs || serde_json::from_str::<serde_json::Value>(json).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_may_refuse_to_read_as_json_is_left_to_it() {
        let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        for json in [r#""a\u0000b""#, r#""\ud800""#, r#"{"a":"\u0000"}"#, r#"["\ud800"]"#, r#"["\uDFFF"]"#, &deep(257)]
        {
            assert_eq!((text(Way::Text, json), text(Way::Json, json)), (None, None), "{json}");
        }
        let many = format!("[{}]", vec![deep(2); 300].join(","));
        for json in [r#"["\\u0000"]"#, r#"["\\\"[["]"#, r#"["\ud83d\ude00 \ud7ff"]"#, &deep(256), &many] {
            assert!(text(Way::Text, json).is_some(), "{json}");
        }
    }

    #[test]
    fn an_array_is_written_as_the_server_would_read_it_from_json() {
        for (json, expected) in [
            ("[]", Some("{}")),
            ("[ 1, 9007199254740993 ]", Some(r#"{"1","9007199254740993"}"#)),
            (r#"[null, "NULL", "", "a,b", "q\"\\"]"#, Some(r#"{NULL,"NULL","","a,b","q\"\\"}"#)),
            ("[[1,2],[3,null]]", Some(r#"{{"1","2"},{"3",NULL}}"#)),
            // Deeper than the first element: an element of its own.
            (r#"[1, [2, "x"]]"#, Some(r#"{"1","[2, \"x\"]"}"#)),
            (r#"["a\u0000"]"#, None),
            ("[[1],[2,3]]", None),
            ("[[1],2]", None),
            ("[[]]", None),
            ("[[[[[[[1]]]]]]]", None),
            ("{}", None),
        ] {
            assert_eq!(array(Way::Text, json).as_deref(), expected, "{json}");
        }
        assert_eq!(array(Way::Json, r#"["é\n",{"a":1},null]"#).as_deref(), Some(r#"{"\"é\\n\"","{\"a\":1}",NULL}"#));
    }
}
