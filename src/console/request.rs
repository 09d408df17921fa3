//! What a request says: the segments of its path, its query, its small JSON body.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::clock::Timestamp;
use crate::ingest::reply::Problem;
use crate::ingest::{Asked, read_all};
use crate::record::RecordId;

/// The largest body of an order.
const LARGEST_BODY: u64 = 64 << 10;

/// The decoded segments of a path.
pub(super) fn segments(path: &str) -> Result<Vec<String>, Problem> {
    path.split('/').filter(|segment| !segment.is_empty()).map(decode).collect()
}

fn decode(text: &str) -> Result<String, Problem> {
    let malformed = || Problem::malformed("a percent sign is followed by two hex digits, and the text is UTF-8");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else { return Err(malformed()) };
        bytes.extend(u8::try_from(high * 16 + low));
    }
    String::from_utf8(bytes).map_err(|_| malformed())
}

/// The parameters of a request.
pub(super) struct Query(BTreeMap<String, String>);

impl Query {
    pub(super) fn new(text: &str) -> Result<Self, Problem> {
        let mut pairs = BTreeMap::new();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            pairs.insert(decode(name)?, decode(&value.replace('+', " "))?);
        }
        Ok(Self(pairs))
    }

    pub(super) fn text(&self, name: &str) -> Option<String> {
        self.0.get(name).filter(|value| !value.is_empty()).cloned()
    }

    pub(super) fn time(&self, name: &str) -> Result<Option<Timestamp>, Problem> {
        let parsed = self.text(name).map(|text| text.parse());
        parsed.transpose().map_err(|error: crate::clock::NotATime| Problem::malformed(format!("{name}: {error}")))
    }

    pub(super) fn id(&self, name: &str) -> Result<Option<RecordId>, Problem> {
        self.text(name).map(|text| id(&text)).transpose()
    }

    /// How many rows: 1 to 1,000, 100 where nothing is said.
    pub(super) fn limit(&self) -> Result<usize, Problem> {
        let Some(text) = self.text("limit") else { return Ok(100) };
        let limit: usize = text.parse().map_err(|_| Problem::malformed("limit is a number from 1 to 1000"))?;
        Ok(limit.clamp(1, 1_000))
    }
}

/// A record's id.
pub(super) fn id(text: &str) -> Result<RecordId, Problem> {
    text.parse().map_err(|error: crate::record::NotAnId| Problem::malformed(error.to_string()))
}

/// The body of an order; none at all is an empty one.
pub(super) async fn body<T: DeserializeOwned>(asked: &mut Asked) -> Result<T, Problem> {
    let bytes = read_all(&asked.headers, &mut asked.body, LARGEST_BODY).await?;
    let bytes = if bytes.is_empty() { Bytes::from_static(b"{}") } else { bytes };
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return Err(Problem::malformed("the body is a JSON object"));
    }
    serde_json::from_slice(&bytes).map_err(|error| Problem::malformed(format!("the body: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_queries_are_decoded_once() {
        assert_eq!(segments("/a%2Fb//c%20d").unwrap(), ["a/b", "c d"]);
        assert!(segments("/%zz").is_err() && segments("/%ff").is_err());
        let query = Query::new("limit=5000&key=a%26b+c&empty=").unwrap();
        assert_eq!(query.limit().unwrap(), 1_000);
        assert_eq!(query.text("key").unwrap(), "a&b c");
        assert_eq!(query.text("empty"), None);
    }
}
