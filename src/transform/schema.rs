//! The JSON Schema that a namespace's payloads must match.
//!
//! Takes the schema file through a reader that the caller gives, and the neighbours that it names by a relative
//! `$ref` through the same reader; never reaches out to the network, and runs every pattern in linear time.

mod files;
#[cfg(test)]
mod tests;

use std::path::Path;

use jsonschema::{PatternOptions, Validator};
use serde_json::Value;

use files::Files;

/// A schema file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// A file could not be read.
    #[error("cannot read the schema {path}: {error}")]
    Read {
        /// Which file.
        path: Box<str>,
        /// Why.
        #[source]
        error: std::io::Error,
    },
    /// A file is not JSON.
    #[error("the schema {path} is not JSON: {error}")]
    Json {
        /// Which file.
        path: Box<str>,
        /// Why.
        #[source]
        error: serde_json::Error,
    },
    /// A file is JSON but no schema.
    #[error("{path} is not a JSON Schema: {message}")]
    Schema {
        /// Which file.
        path: Box<str>,
        /// Why.
        message: Box<str>,
    },
    /// A schema and the files that it refers to are too many.
    #[error("the schema {path} refers to more than {most} files")]
    Many {
        /// The schema itself.
        path: Box<str>,
        /// How many are taken.
        most: usize,
    },
}

/// One thing that a payload does not match.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
pub struct SchemaFault {
    /// Where in the payload, as a JSON pointer; empty = the whole.
    #[schema(value_type = String)]
    pub pointer: Box<str>,
    /// What is wrong there.
    #[schema(value_type = String)]
    pub message: Box<str>,
}

/// A JSON Schema, compiled, for payloads.
#[derive(Debug)]
pub struct PayloadSchema {
    path: Box<str>,
    validator: Validator,
}

impl PayloadSchema {
    /// Compiles the schema at `path`; `read` gives the text of it and of each neighbour that it refers to.
    ///
    /// # Errors
    /// When a file cannot be read, is not JSON or no schema.
    pub fn load(path: &Path, read: &mut dyn FnMut(&Path) -> std::io::Result<Vec<u8>>) -> Result<Self, SchemaError> {
        let shown: Box<str> = path.display().to_string().into();
        let (schema, files) = Files::gather(path, read)?;
        let validator = jsonschema::options()
            .should_validate_formats(true)
            .with_pattern_options(PatternOptions::regex())
            .with_retriever(files)
            .build(&schema)
            .map_err(|error| SchemaError::Schema { path: shown.clone(), message: error.to_string().into() })?;
        Ok(Self { path: shown, validator })
    }

    /// The file it came from, as the pipeline file names it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether the payload matches.
    ///
    /// # Errors
    /// What does not, each with its place in the payload.
    pub fn check(&self, payload: &[u8]) -> Result<(), Vec<SchemaFault>> {
        let value: Value = serde_json::from_slice(payload)
            .map_err(|error| vec![SchemaFault { pointer: "".into(), message: error.to_string().into() }])?;
        if self.validator.is_valid(&value) {
            return Ok(());
        }
        Err(self
            .validator
            .iter_errors(&value)
            .take(32)
            .map(|error| SchemaFault {
                pointer: error.instance_path().to_string().into(),
                message: error.to_string().into(),
            })
            .collect())
    }
}
