//! Quantities as people write them in YAML: `5s`, `1GiB`, `500/s`, `10M`.
//!
//! Each type parses its text, shows itself in the same form, and describes itself to the JSON Schema.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A text that is not the quantity it should be; says what would be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct NotAQuantity {
    text: String,
    expected: &'static str,
}

/// A length of time: `250ms`, `5s`, `2m`, `24h`, `7d`, `1h30m`; a bare number is seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, utoipa::ToSchema)]
#[schema(value_type = String, example = "30s")]
pub struct Span(pub Duration);

/// A number of bytes: `512`, `64KiB`, `1MB`, `20GiB`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// A number of things: `10000`, `10k`, `10M`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Count(pub u64);

/// So many in a time: `500/s`, `30/m`, `1000/h`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// How many.
    pub count: u64,
    /// In how long.
    pub per: Duration,
}

impl Rate {
    /// The same rate as a number a second.
    #[expect(clippy::cast_precision_loss, reason = "a rate above 2^52 a second is no rate")]
    pub fn per_second(self) -> f64 {
        self.count as f64 / self.per.as_secs_f64()
    }
}

const SPAN: &str = "a duration such as 250ms, 5s, 2m, 24h or 7d";
const SIZE: &str = "a size in bytes such as 64KiB, 1MiB or 20GiB";
const COUNT: &str = "a number such as 500, 10k or 10M";
const RATE: &str = "a rate such as 500/s, 30/m or 1000/h";

fn refuse(text: &str, expected: &'static str) -> NotAQuantity {
    NotAQuantity { text: text.to_owned(), expected }
}

/// Splits a leading decimal number from what follows it.
fn number_and_rest(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, rest) = text.split_at_checked(end)?;
    Some((number.parse().ok()?, rest))
}

impl FromStr for Span {
    type Err = NotAQuantity;

    fn from_str(text: &str) -> Result<Self, NotAQuantity> {
        let wrong = || refuse(text, SPAN);
        let mut rest = text.trim();
        if rest.is_empty() {
            return Err(wrong());
        }
        let mut total = 0.0;
        while !rest.is_empty() {
            let (number, after) = number_and_rest(rest).ok_or_else(wrong)?;
            let end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
            let (unit, next) = after.split_at_checked(end).ok_or_else(wrong)?;
            let seconds = match unit.trim() {
                "ms" => 0.001,
                "s" => 1.0,
                "" if rest == text.trim() => 1.0,
                "m" => 60.0,
                "h" => 3_600.0,
                "d" => 86_400.0,
                _ => return Err(wrong()),
            };
            total += number * seconds;
            rest = next;
        }
        // Rounded to the millisecond, the finest time there is here.
        Duration::try_from_secs_f64((total * 1_000.0).round() / 1_000.0).map(Self).map_err(|_| wrong())
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        if millis == 0 {
            return f.write_str("0s");
        }
        let mut rest = millis;
        for (unit, size) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
            if rest >= size {
                write!(f, "{}{unit}", rest / size)?;
                rest %= size;
            }
        }
        Ok(())
    }
}

impl FromStr for ByteSize {
    type Err = NotAQuantity;

    fn from_str(text: &str) -> Result<Self, NotAQuantity> {
        let size: bytesize::ByteSize = text.trim().parse().map_err(|_| refuse(text, SIZE))?;
        Ok(Self(size.as_u64()))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, size) in [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
            if self.0 >= size && self.0.is_multiple_of(size) {
                return write!(f, "{}{unit}", self.0 / size);
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl FromStr for Count {
    type Err = NotAQuantity;

    fn from_str(text: &str) -> Result<Self, NotAQuantity> {
        let wrong = || refuse(text, COUNT);
        let text = text.trim();
        let (digits, factor) = match text.strip_suffix(['k', 'K']) {
            Some(digits) => (digits, 1_000),
            None => text.strip_suffix('M').map_or((text, 1), |digits| (digits, 1_000_000)),
        };
        let number: u64 = digits.trim().replace('_', "").parse().map_err(|_| wrong())?;
        number.checked_mul(factor).map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n >= 1_000_000 && n.is_multiple_of(1_000_000) => write!(f, "{}M", n / 1_000_000),
            n if n >= 1_000 && n.is_multiple_of(1_000) => write!(f, "{}k", n / 1_000),
            n => write!(f, "{n}"),
        }
    }
}

impl FromStr for Rate {
    type Err = NotAQuantity;

    fn from_str(text: &str) -> Result<Self, NotAQuantity> {
        let wrong = || refuse(text, RATE);
        let (count, unit) = text.trim().split_once('/').ok_or_else(wrong)?;
        let per = match unit.trim() {
            "s" => 1,
            "m" => 60,
            "h" => 3_600,
            _ => return Err(wrong()),
        };
        match count.parse::<Count>() {
            Ok(Count(count)) if count > 0 => Ok(Self { count, per: Duration::from_secs(per) }),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.per.as_secs() {
            60 => "m",
            3_600 => "h",
            _ => "s",
        };
        write!(f, "{}/{unit}", self.count)
    }
}

/// A YAML or JSON scalar on its way into a quantity.
#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar<'a> {
    Integer(u64),
    Float(f64),
    Text(Cow<'a, str>),
}

impl Scalar<'_> {
    fn into_text(self) -> String {
        match self {
            Scalar::Integer(number) => number.to_string(),
            Scalar::Float(number) => number.to_string(),
            Scalar::Text(text) => text.into_owned(),
        }
    }
}

macro_rules! quantity {
    ($name:ident, $expected:expr, $pattern:literal) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let scalar = Scalar::deserialize(deserializer)
                    .map_err(|_| serde::de::Error::custom(concat!("expected ", stringify!($name))))?;
                scalar.into_text().parse().map_err(serde::de::Error::custom)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                // A reference to the environment may stand wherever a value does.
                json_schema!({
                    "description": $expected,
                    "anyOf": [
                        { "type": "number", "minimum": 0 },
                        { "type": "string", "pattern": $pattern },
                        { "type": "string", "pattern": "\\$\\{.+\\}" },
                    ],
                })
            }
        }
    };
}

quantity!(Span, SPAN, "^ *([0-9.]+ *(ms|s|m|h|d)? *)+$");
quantity!(ByteSize, SIZE, "^ *[0-9.]+ *([kKmMgGtT]i?)?[bB]? *$");
quantity!(Count, COUNT, "^ *[0-9_]+ *[kKM]? *$");
quantity!(Rate, RATE, "^ *[0-9_]+ *[kKM]? */ *(s|m|h) *$");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_and_shown_in_the_same_form() {
        for (text, millis) in
            [("250ms", 250), ("5s", 5_000), ("2m", 120_000), ("1h30m", 5_400_000), ("7d", 604_800_000)]
        {
            let span: Span = text.parse().unwrap();
            assert_eq!(span.0.as_millis(), millis, "{text}");
            assert_eq!(span.to_string(), text);
        }
        assert_eq!("1.5".parse::<Span>().unwrap().0.as_millis(), 1_500);
        for wrong in ["", "5x", "s", "-1s", "1s2", "1e9d"] {
            assert!(wrong.parse::<Span>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_counts_and_rates_are_read_and_shown_in_the_same_form() {
        assert_eq!("1GiB".parse::<ByteSize>().unwrap(), ByteSize(1 << 30));
        assert_eq!(ByteSize(1 << 20).to_string(), "1MiB");
        assert_eq!("10M".parse::<Count>().unwrap(), Count(10_000_000));
        assert_eq!("500/s".parse::<Rate>().unwrap().to_string(), "500/s");
        assert!((("30/m").parse::<Rate>().unwrap().per_second() - 0.5).abs() < f64::EPSILON);
        assert!("0/s".parse::<Rate>().is_err());
        assert!("lots".parse::<ByteSize>().is_err());
    }

    #[test]
    fn a_wrong_quantity_in_yaml_says_what_would_be_right() {
        let error = serde_yaml::from_str::<Span>("soon").unwrap_err();
        assert!(error.to_string().contains("a duration such as 250ms"), "{error}");
    }
}
