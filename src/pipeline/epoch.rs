//! What an epoch keeps of a plan: the unexpanded file with its scripts and schemas, so that the plan can be made again.
//!
//! Takes a file that was loaded, gives bytes; takes bytes, gives the plan. Keeps no value from the environment, only a
//! digest over all of them.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::make::{Made, hex, make};
use crate::spec::environment::Environment;
use crate::spec::shared::Shared;
use crate::spec::text::Text;
use crate::spec::{Loaded, Neighbours, load_text_with};
use crate::transform::Compiler;

/// The layout of the kept bytes: JSON of this version.
const VERSION: u32 = 1;
/// The layout with what came from walflow.yaml, which versions that know none must not read.
const SHARED: u32 = 2;

#[derive(Serialize, Deserialize)]
struct Kept {
    version: u32,
    name: String,
    text: String,
    files: BTreeMap<String, String>,
    environment: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shared: Option<KeptShared>,
}

/// What the file took from walflow.yaml.
#[derive(Serialize, Deserialize)]
struct KeptShared {
    name: String,
    text: String,
}

/// The kept bytes of an epoch are not what this version wrote.
#[derive(Debug, thiserror::Error)]
pub enum EpochError {
    /// They are not the JSON that they should be.
    #[error("the kept pipeline file cannot be read: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A later version of walflow wrote them.
    #[error("the kept pipeline file has the layout {0}; this version of walflow reads up to {SHARED}")]
    Version(u32),
}

/// What an epoch frame keeps of a file.
pub(super) fn keep(loaded: &Loaded, environment: [u8; 32]) -> Bytes {
    let shared = loaded
        .text
        .behind()
        .map(|shared| KeptShared { name: shared.name().to_string(), text: shared.as_str().to_owned() });
    let kept = Kept {
        version: if shared.is_some() { SHARED } else { VERSION },
        name: loaded.text.name().to_string(),
        text: loaded.text.as_str().to_owned(),
        files: loaded.neighbours.all(),
        environment: hex(&environment),
        shared,
    };
    // Text and maps of text always have a JSON form.
    serde_json::to_vec(&kept).unwrap_or_default().into()
}

/// Makes the plan of a kept file again. A variable that is missing now is among the diagnostics, and there is no plan.
///
/// # Errors
/// When the bytes are not what [`super::plan::Plan::files`] held.
pub fn from_epoch(files: &[u8], environment: &Environment, compiler: &Compiler) -> Result<Made, EpochError> {
    let kept: Kept = serde_json::from_slice(files)?;
    if ![VERSION, SHARED].contains(&kept.version) {
        return Err(EpochError::Version(kept.version));
    }
    let shared = kept.shared.map(|shared| Shared::of_text(Text::new(&shared.name, &shared.text), environment));
    let text = Text::new(&kept.name, &kept.text);
    let loaded = load_text_with(text, Neighbours::kept(kept.files), shared.as_ref(), environment);
    Ok(make(&loaded, environment, compiler))
}
