//! `file`: each record as one line of an NDJSON file, synced before it counts as delivered.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `file:` — each record's payload as one line; synced before it counts as delivered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileSpec {
    /// Where, a template with a literal first folder or name: `out/{payload.kind}.ndjson`. Relative to the working folder.
    pub path: String,
}
