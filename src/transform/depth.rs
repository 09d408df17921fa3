//! How deep a JSON text is nested, found without parsing it.
//!
//! A parser that skips values (`RawValue`) lets any depth pass; what later builds the value would then be in danger.

/// The deepest nesting that walflow takes.
pub const MAX_DEPTH: usize = 64;

/// How many arrays and objects lie inside each other at the deepest place: 0 for a scalar, 1 for `[]`.
///
/// Counts brackets outside of strings, in one pass and without memory; of a text that is no JSON it says nothing.
pub fn json_depth(text: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0_usize);
    let mut rest = text;
    while let [byte, after @ ..] = rest {
        rest = after;
        match byte {
            b'[' | b'{' => {
                depth = depth.saturating_add(1);
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => rest = after_string(rest),
            _ => {}
        }
    }
    deepest
}

/// What comes after the end of a string. Most of a payload is strings, so they are not looked at byte by byte.
fn after_string(mut rest: &[u8]) -> &[u8] {
    while let Some(at) = memchr::memchr2(b'"', b'\\', rest) {
        let ends = rest.get(at) == Some(&b'"');
        rest = rest.get(at + if ends { 1 } else { 2 }..).unwrap_or_default();
        if ends {
            return rest;
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn depth_of(value: &Value) -> usize {
        match value {
            Value::Array(items) => 1 + items.iter().map(depth_of).max().unwrap_or(0),
            Value::Object(fields) => 1 + fields.values().map(depth_of).max().unwrap_or(0),
            _ => 0,
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![Just(json!(null)), any::<i64>().prop_map(|n| json!(n)), ".*".prop_map(|s| json!(s))];
        leaf.prop_recursive(6, 40, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
                prop::collection::vec(("[\\[\\]{}\"\\\\a]{0,4}", inner), 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn it_is_the_depth_of_the_parsed_value(value in value()) {
            prop_assert_eq!(json_depth(value.to_string().as_bytes()), depth_of(&value));
        }
    }

    #[test]
    fn a_hundred_thousand_brackets_are_counted_and_nonsense_does_no_harm() {
        assert_eq!(json_depth("[".repeat(100_000).as_bytes()), 100_000);
        for nonsense in ["]]]", "\"", "\"\\", "}{", ""] {
            assert!(json_depth(nonsense.as_bytes()) <= 1, "{nonsense}");
        }
    }
}
