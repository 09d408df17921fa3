//! JSON as bytes: one value picked out of a payload, or a payload put on one line, with nothing rewritten.
//!
//! Takes bytes that ingest or a script left; gives slices of them. Never turns a number into another: what is copied is
//! the text as it stands, so amounts and long ids stay exact. Never recurses deeper than the path that is asked for.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// One step into a JSON value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A member of an object.
    Field(Box<str>),
    /// An element of an array.
    Index(usize),
}

/// The value at a path, as it stands in the text; `None` when there is none.
pub(super) fn find<'a>(json: &'a [u8], path: &[Step]) -> Result<Option<&'a RawValue>, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let found = serde::de::DeserializeSeed::deserialize(Walk(path), &mut deserializer)?;
    deserializer.end()?;
    Ok(found)
}

#[derive(Clone, Copy)]
struct Walk<'p>(&'p [Step]);

impl<'de> serde::de::DeserializeSeed<'de> for Walk<'_> {
    type Value = Option<&'de RawValue>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        if self.0.is_empty() {
            <&RawValue>::deserialize(deserializer).map(Some)
        } else {
            deserializer.deserialize_any(self)
        }
    }
}

/// True when a member's name is the one that is looked for.
struct IsNamed<'n>(&'n str);

impl<'de> serde::de::DeserializeSeed<'de> for IsNamed<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for IsNamed<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E>(self, name: &str) -> Result<bool, E> {
        Ok(name == self.0)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = Option<&'de RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let Some((Step::Field(name), rest)) = self.0.split_first() else {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(None);
        };
        let mut found = None;
        while let Some(named) = map.next_key_seed(IsNamed(name))? {
            if named {
                // The last of several members of one name counts, as it does for scripts.
                found = map.next_value_seed(Walk(rest))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        if let Some((Step::Index(wanted), rest)) = self.0.split_first() {
            let mut at = 0;
            loop {
                if at == *wanted {
                    found = list.next_element_seed(Walk(rest))?.flatten();
                    break;
                }
                if list.next_element::<IgnoredAny>()?.is_none() {
                    return Ok(None);
                }
                at += 1;
            }
        }
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(found)
    }
}

const fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\n' | b'\r' | b'\t')
}

/// The same JSON without blanks between its tokens; borrowed when there are none.
pub(super) fn compact(json: &[u8]) -> Cow<'_, [u8]> {
    let mut in_text = false;
    let mut escaped = false;
    let mut keep = |byte: u8| {
        if in_text {
            if escaped {
                escaped = false;
            } else if byte == b'\\' {
                escaped = true;
            } else if byte == b'"' {
                in_text = false;
            }
            true
        } else {
            in_text = byte == b'"';
            !is_blank(byte)
        }
    };
    let Some(first) = json.iter().position(|byte| !keep(*byte)) else {
        return Cow::Borrowed(json);
    };
    let (clean, rest) = json.split_at(first);
    let mut out = Vec::with_capacity(json.len());
    out.extend_from_slice(clean);
    // The blank at `first` has been seen; it changes no state.
    out.extend(rest.iter().skip(1).copied().filter(|byte| keep(*byte)));
    Cow::Owned(out)
}

/// A payload on one line: its own bytes where it is on one already.
pub(super) fn one_line(json: &[u8]) -> Cow<'_, [u8]> {
    if json.iter().any(|byte| matches!(byte, b'\n' | b'\r')) { compact(json) } else { Cow::Borrowed(json) }
}

/// Bytes that are not JSON as a JSON string in base64.
pub(super) fn base64_text(bytes: &[u8]) -> Vec<u8> {
    use base64::Engine as _;
    let mut out = Vec::with_capacity(bytes.len() / 3 * 4 + 6);
    out.push(b'"');
    out.extend_from_slice(base64::engine::general_purpose::STANDARD.encode(bytes).as_bytes());
    out.push(b'"');
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn path(steps: &[&str]) -> Vec<Step> {
        steps.iter().map(|step| step.parse().map_or_else(|_| Step::Field((*step).into()), Step::Index)).collect()
    }

    fn at(json: &str, steps: &[&str]) -> Option<String> {
        find(json.as_bytes(), &path(steps)).unwrap().map(|raw| raw.get().to_owned())
    }

    #[test]
    fn a_value_is_found_as_it_stands() {
        let json = r#"{"a": {"b": [1, {"c": 12345678901234567890.10}]}, "n": null, "a\u0062": 1, "d": 1, "d": 2}"#;
        assert_eq!(at(json, &["a", "b", "1", "c"]).as_deref(), Some("12345678901234567890.10"));
        assert_eq!(at(json, &["n"]).as_deref(), Some("null"));
        assert_eq!(at(json, &["ab"]).as_deref(), Some("1"));
        assert_eq!(at(json, &["d"]).as_deref(), Some("2"));
        for missing in [&["x"][..], &["a", "0"], &["a", "b", "c"], &["a", "b", "7"], &["n", "x"], &["d", "x"]] {
            assert_eq!(at(json, missing), None, "{missing:?}");
        }
        assert!(find(b"{\"a\": 1", &path(&["a"])).is_err());
        assert!(find(b"{\"a\": 1} 2", &path(&["a"])).is_err());
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::vec(("[a-c]", inner), 0..4)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn compacting_is_what_a_parse_and_print_gives(value in json()) {
            let pretty = serde_json::to_vec_pretty(&value).unwrap();
            let line = serde_json::to_vec(&value).unwrap();
            let out = compact(&pretty);
            prop_assert_eq!(&*out, &*line);
            prop_assert!(matches!(compact(&line), Cow::Borrowed(_)));
        }

        #[test]
        fn finding_agrees_with_a_parsed_value(value in json(), steps in proptest::collection::vec("[a-c]|[0-3]", 0..4)) {
            let text = value.to_string();
            let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
            let model = path(&steps).iter().try_fold(&value, |value, step| match step {
                Step::Field(name) => value.as_object()?.get(&**name),
                Step::Index(index) => value.as_array()?.get(*index),
            });
            prop_assert_eq!(at(&text, &steps), model.map(Value::to_string));
        }
    }
}
