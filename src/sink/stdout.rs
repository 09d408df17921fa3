//! `stdout`: each record as one line on standard output.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `stdout:` — each record as one line of JSON on standard output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StdoutSpec {}
