//! JSON bytes to a script's values and back, with no other form in between.
//!
//! Takes bytes and gives [`Parsed`]; takes a value and gives bytes; tells whether a value is still what the bytes say.
//! Never changes a number in silence: what a script's integers cannot hold is marked, and an error once it would be
//! written.

use std::fmt;

use rhai::{Array, Dynamic, FLOAT, INT, ImmutableString, Map};
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::depth::MAX_DEPTH;

/// A payload in the form that scripts work on.
#[derive(Clone, Debug, Default)]
pub(super) struct Parsed {
    pub(super) value: Dynamic,
    /// It holds a number beyond 64 bits or a float so large that it may have been one.
    pub(super) wide: bool,
    /// An object names a field twice; the last one is in `value`.
    pub(super) repeated: bool,
}

/// A value cannot be written as JSON.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotWritable {
    #[error("a value of type {0} is no JSON")]
    Kind(Box<str>),
    #[error("{0} is no JSON number")]
    Number(Box<str>),
    #[error("it is nested deeper than {MAX_DEPTH} levels")]
    Depth,
}

/// Reads JSON.
///
/// # Errors
/// When it is not JSON or nested deeper than [`MAX_DEPTH`].
pub(super) fn parse(bytes: &[u8]) -> Result<Parsed, serde_json::Error> {
    // One look at the whole text is cheaper than one at each piece of it.
    let Ok(text) = str::from_utf8(bytes) else { return Err(not_text(bytes)) };
    let mut notes = Notes::default();
    let mut reader = serde_json::Deserializer::from_str(text);
    let value = Build { notes: &mut notes, depth: 0 }.deserialize(&mut reader)?;
    reader.end()?;
    Ok(Parsed { value, wide: notes.wide, repeated: notes.repeated })
}

/// Where bytes that are no UTF-8 cease to be JSON.
#[cold]
fn not_text(bytes: &[u8]) -> serde_json::Error {
    let error = serde_json::from_slice::<serde_json::Value>(bytes).err();
    error.unwrap_or_else(|| serde_json::Error::custom("it is no UTF-8"))
}

/// Whether `parsed` is still what `bytes` say, to the last bit of each number.
pub(super) fn same(bytes: &[u8], parsed: &Parsed) -> bool {
    if parsed.repeated {
        // The comparison below would stumble over the field's first value.
        return parse(bytes).is_ok_and(|fresh| {
            match (write(&fresh.value, bytes.len()), write(&parsed.value, bytes.len())) {
                (Ok(fresh), Ok(now)) => fresh == now,
                _ => false,
            }
        });
    }
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    Same(&parsed.value).deserialize(&mut reader).is_ok()
}

/// Writes a value as compact JSON of about `expected` bytes; the fields of objects come in alphabetical order.
///
/// # Errors
/// When something in it is no JSON, or it is nested deeper than [`MAX_DEPTH`].
pub(super) fn write(value: &Dynamic, expected: usize) -> Result<Vec<u8>, NotWritable> {
    let mut out = Vec::with_capacity(expected.saturating_add(expected / 8));
    write_to(&mut out, value, 0)?;
    Ok(out)
}

/// Whether a JSON text holds an integer that a script cannot hold.
pub(super) fn has_wide_integer(bytes: &[u8]) -> bool {
    let mut rest = bytes.iter().copied().peekable();
    while let Some(byte) = rest.next() {
        match byte {
            b'"' => {
                while let Some(byte) = rest.next() {
                    match byte {
                        b'\\' => {
                            rest.next();
                        }
                        b'"' => break,
                        _ => {}
                    }
                }
            }
            b'-' | b'0'..=b'9' => {
                let mut number = String::from(char::from(byte));
                while let Some(next) = rest.next_if(|c| matches!(c, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-')) {
                    number.push(char::from(next));
                }
                if !number.contains(['.', 'e', 'E']) && number.parse::<i64>().is_err() {
                    return true;
                }
            }
            _ => {}
        }
    }
    false
}

#[derive(Default)]
struct Notes {
    wide: bool,
    repeated: bool,
}

struct Build<'a> {
    notes: &'a mut Notes,
    depth: usize,
}

impl Build<'_> {
    fn deeper<E: serde::de::Error>(&self) -> Result<usize, E> {
        if self.depth < MAX_DEPTH { Ok(self.depth + 1) } else { Err(E::custom(NotWritable::Depth)) }
    }
}

impl<'de> DeserializeSeed<'de> for Build<'_> {
    type Value = Dynamic;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Dynamic, D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// From 2^63 on, a float may stand for an integer that i64 cannot hold.
const WIDE: FLOAT = 9_223_372_036_854_775_808.0;

impl<'de> Visitor<'de> for Build<'_> {
    type Value = Dynamic;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Dynamic, E> {
        Ok(Dynamic::UNIT)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Dynamic, E> {
        Ok(Dynamic::from_bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Dynamic, E> {
        Ok(Dynamic::from_int(value))
    }

    #[expect(clippy::cast_precision_loss, reason = "marked as wide, and refused when it would be written")]
    fn visit_u64<E>(self, value: u64) -> Result<Dynamic, E> {
        if let Ok(value) = INT::try_from(value) {
            Ok(Dynamic::from_int(value))
        } else {
            self.notes.wide = true;
            Ok(Dynamic::from_float(value as FLOAT))
        }
    }

    fn visit_f64<E>(self, value: f64) -> Result<Dynamic, E> {
        self.notes.wide |= value.abs() >= WIDE;
        Ok(Dynamic::from_float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Dynamic, E> {
        Ok(ImmutableString::from(value).into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Dynamic, A::Error> {
        let depth = self.deeper()?;
        let mut array = Array::new();
        while let Some(value) = access.next_element_seed(Build { notes: self.notes, depth })? {
            array.push(value);
        }
        Ok(Dynamic::from_array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Dynamic, A::Error> {
        let depth = self.deeper()?;
        let mut map = Map::new();
        while let Some(field) = access.next_key_seed(name(&map))? {
            let value = access.next_value_seed(Build { notes: self.notes, depth })?;
            self.notes.repeated |= map.insert(field, value).is_some();
        }
        Ok(Dynamic::from_map(map))
    }
}

/// A field's name in the form that the scripts' maps want, which rhai keeps to itself.
struct Name<T>(std::marker::PhantomData<T>);

fn name<T>(_: &std::collections::BTreeMap<T, Dynamic>) -> Name<T> {
    Name(std::marker::PhantomData)
}

impl<'de, T: for<'a> From<&'a str>> DeserializeSeed<'de> for Name<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<T: for<'a> From<&'a str>> Visitor<'_> for Name<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field's name")
    }

    fn visit_str<E>(self, value: &str) -> Result<T, E> {
        Ok(value.into())
    }
}

/// Walks the bytes beside a value and fails at the first difference.
struct Same<'a>(&'a Dynamic);

impl Same<'_> {
    fn settle<E: serde::de::Error>(equal: bool) -> Result<(), E> {
        if equal { Ok(()) } else { Err(E::custom("changed")) }
    }
}

impl<'de> DeserializeSeed<'de> for Same<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Same<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the same JSON")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        Self::settle(self.0.is_unit())
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        Self::settle(self.0.as_bool() == Ok(value))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<(), E> {
        Self::settle(self.0.as_int() == Ok(value))
    }

    #[expect(clippy::cast_precision_loss, reason = "the same loss as when it was read")]
    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        match INT::try_from(value) {
            Ok(value) => self.visit_i64(value),
            Err(_) => self.visit_f64(value as f64),
        }
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        Self::settle(self.0.as_float().is_ok_and(|float| float.to_bits() == value.to_bits()))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        Self::settle(self.0.as_immutable_string_ref().is_ok_and(|text| text.as_str() == value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        let array = self.0.as_array_ref().map_err(A::Error::custom)?;
        for value in array.iter() {
            if access.next_element_seed(Same(value))?.is_none() {
                return Self::settle(false);
            }
        }
        Self::settle(access.next_element::<serde::de::IgnoredAny>()?.is_none())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        let map = self.0.as_map_ref().map_err(A::Error::custom)?;
        let mut left = map.len();
        while let Some(field) = access.next_key_seed(name(&map))? {
            let Some(value) = map.get(&field) else { return Self::settle(false) };
            access.next_value_seed(Same(value))?;
            left = left.saturating_sub(1);
        }
        Self::settle(left == 0)
    }
}

fn write_to(out: &mut Vec<u8>, value: &Dynamic, depth: usize) -> Result<(), NotWritable> {
    // Asked for before it is taken: to be refused costs a look at the type's name.
    if value.is_string()
        && let Ok(text) = value.as_immutable_string_ref()
    {
        write_text(out, &text);
    } else if value.is_map()
        && let Ok(map) = value.as_map_ref()
    {
        let depth = deeper(depth)?;
        out.push(b'{');
        for (at, (name, value)) in map.iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            write_text(out, name);
            out.push(b':');
            write_to(out, value, depth)?;
        }
        out.push(b'}');
    } else if value.is_array()
        && let Ok(array) = value.as_array_ref()
    {
        let depth = deeper(depth)?;
        out.push(b'[');
        for (at, value) in array.iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            write_to(out, value, depth)?;
        }
        out.push(b']');
    } else if let Ok(number) = value.as_int() {
        write_scalar(out, &number);
    } else if let Ok(value) = value.as_bool() {
        out.extend_from_slice(if value { b"true" } else { b"false" });
    } else if value.is_unit() {
        out.extend_from_slice(b"null");
    } else if let Ok(number) = value.as_float() {
        if !number.is_finite() {
            return Err(NotWritable::Number(number.to_string().into()));
        }
        write_scalar(out, &number);
    } else if let Ok(letter) = value.as_char() {
        write_text(out, letter.encode_utf8(&mut [0; 4]));
    } else {
        return Err(NotWritable::Kind(value.type_name().into()));
    }
    Ok(())
}

fn deeper(depth: usize) -> Result<usize, NotWritable> {
    if depth < MAX_DEPTH { Ok(depth + 1) } else { Err(NotWritable::Depth) }
}

fn write_text(out: &mut Vec<u8>, text: &str) {
    let bytes = text.as_bytes();
    if is_plain(bytes) {
        out.reserve(bytes.len() + 2);
        out.push(b'"');
        out.extend_from_slice(bytes);
        out.push(b'"');
    } else {
        write_scalar(out, text);
    }
}

/// Whether JSON writes these bytes as they are; eight are looked at in one step.
fn is_plain(bytes: &[u8]) -> bool {
    const ONES: u64 = u64::MAX / 0xFF;
    const TOPS: u64 = ONES << 7;
    /// The top bit of each byte that is less than `than`, which is at most 128; above the first such byte it may err.
    const fn less(eight: u64, than: u64) -> u64 {
        eight.wrapping_sub(ONES * than) & !eight & TOPS
    }
    let (eights, rest) = bytes.as_chunks::<8>();
    let odd = eights.iter().fold(0, |odd, eight| {
        let eight = u64::from_ne_bytes(*eight);
        odd | less(eight, 0x20) | less(eight ^ (ONES * 0x22), 1) | less(eight ^ (ONES * 0x5C), 1)
    });
    odd == 0 && rest.iter().all(|byte| *byte >= b' ' && *byte != b'"' && *byte != b'\\')
}

fn write_scalar<T: serde::Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    // Neither text nor a finite number can fail, nor can a vector.
    let _: Result<(), serde_json::Error> = serde_json::to_writer(out, value);
}

/// Whether the value is nested deeper than [`MAX_DEPTH`]; looks no deeper than that.
pub(super) fn too_deep(value: &Dynamic) -> bool {
    fn beyond(value: &Dynamic, left: usize) -> bool {
        if let Ok(map) = value.as_map_ref() {
            return left == 0 || map.values().any(|value| beyond(value, left - 1));
        }
        if let Ok(array) = value.as_array_ref() {
            return left == 0 || array.iter().any(|value| beyond(value, left - 1));
        }
        false
    }
    beyond(value, MAX_DEPTH)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_filter("JSON has no NaN", |n| n.is_finite()).prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(6, 60, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::Array),
                prop::collection::vec((".{0,30}", inner), 0..5)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_read_and_written_is_the_same_json(value in json_value(), pretty in any::<bool>()) {
            let bytes = if pretty { serde_json::to_vec_pretty(&value) } else { serde_json::to_vec(&value) }.unwrap();
            let parsed = parse(&bytes).unwrap();
            prop_assert!(same(&bytes, &parsed));
            let written = write(&parsed.value, 0).unwrap();
            prop_assert_eq!(serde_json::from_slice::<Value>(&written).unwrap(), value);
        }

        #[test]
        fn same_is_equality_of_the_json(one in json_value(), other in json_value()) {
            let bytes = serde_json::to_vec(&one).unwrap();
            let parsed = parse(&serde_json::to_vec(&other).unwrap()).unwrap();
            prop_assert_eq!(same(&bytes, &parsed), one == other);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let read = parse(&bytes);
            prop_assert_eq!(read.is_ok(), serde_json::from_slice::<Value>(&bytes).is_ok());
            has_wide_integer(&bytes);
        }
    }

    #[test]
    fn a_small_change_is_seen_wherever_it_is() {
        let bytes = br#"{"a":{"b":[1,2,{"c":"x"}]},"d":1.5,"e":null,"f":true}"#;
        for changed in [
            r#"{"a":{"b":[1,2,{"c":"y"}]},"d":1.5,"e":null,"f":true}"#,
            r#"{"a":{"b":[1,2,{"c":"x"},3]},"d":1.5,"e":null,"f":true}"#,
            r#"{"a":{"b":[1,2]},"d":1.5,"e":null,"f":true}"#,
            r#"{"a":{"b":[1,2,{"c":"x"}]},"d":1,"e":null,"f":true}"#,
            r#"{"a":{"b":[1,2,{"c":"x"}]},"d":1.5,"f":true}"#,
            r#"{"a":{"b":[1,2,{"c":"x"}]},"d":1.5,"e":null,"f":true,"g":0}"#,
        ] {
            assert!(!same(bytes, &parse(changed.as_bytes()).unwrap()), "{changed}");
        }
    }

    #[test]
    fn a_field_named_twice_is_still_the_same() {
        let bytes = br#"{"a":1,"a":2}"#;
        let mut parsed = parse(bytes).unwrap();
        assert!(parsed.repeated && same(bytes, &parsed));
        parsed.value = parse(br#"{"a":1}"#).unwrap().value;
        assert!(!same(bytes, &parsed));
    }

    #[test]
    fn integers_beyond_64_bits_are_marked_and_floats_are_not_taken_for_them() {
        for (text, wide) in [
            ("9223372036854775807", false),
            ("-9223372036854775808", false),
            ("9223372036854775808", true),
            ("[{\"a\":123456789012345678901234567890}]", true),
            ("1e300", false),
            ("\"99999999999999999999\"", false),
        ] {
            let parsed = parse(text.as_bytes()).unwrap();
            assert_eq!(parsed.wide && has_wide_integer(text.as_bytes()), wide, "{text}");
        }
    }

    #[test]
    fn sixty_four_levels_are_read_and_written_and_no_more() {
        let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        let deepest = parse(nested(MAX_DEPTH).as_bytes()).unwrap();
        assert!(parse(nested(MAX_DEPTH + 1).as_bytes()).is_err());
        assert!(!too_deep(&deepest.value) && write(&deepest.value, 0).is_ok());
        let deeper = Dynamic::from_array(vec![deepest.value]);
        assert!(too_deep(&deeper));
        assert_eq!(write(&deeper, 0).unwrap_err(), NotWritable::Depth);
    }

    #[test]
    fn text_is_escaped_wherever_it_needs_to_be() {
        for len in 1..=17 {
            for at in 0..len {
                for odd in (0..=0x7F).map(char::from).chain(['é', '\u{80}', '\u{2028}', '😀']) {
                    let text: String = (0..len).map(|place| if place == at { odd } else { 'x' }).collect();
                    let written = write(&Dynamic::from(text.clone()), 0).unwrap();
                    assert_eq!(written, serde_json::to_vec(&text).unwrap(), "{text:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_utf_8_is_no_json_and_its_place_is_named() {
        let error = parse(b"{\"a\":\n\"\xff\"}").unwrap_err();
        assert_eq!(error.line(), 2, "{error}");
        parse(b"[1,2]\xff").unwrap_err();
    }

    #[test]
    fn what_is_no_json_is_refused() {
        assert!(matches!(write(&Dynamic::from_float(f64::NAN), 0), Err(NotWritable::Number(_))));
        assert!(matches!(write(&Dynamic::from(std::time::Duration::ZERO), 0), Err(NotWritable::Kind(_))));
        assert_eq!(write(&Dynamic::from('"'), 0).unwrap(), serde_json::to_vec(&json!("\"")).unwrap());
    }
}
