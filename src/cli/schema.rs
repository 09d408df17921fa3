//! `walflow schema`: the contracts as files, for editors and for clients.

use clap::{Args, ValueEnum};

use super::{Stop, output};

#[derive(Debug, Args)]
pub(super) struct SchemaArgs {
    /// Which contract
    #[arg(value_enum, default_value_t)]
    which: Which,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Which {
    /// The JSON Schema of pipeline files
    #[default]
    Pipeline,
    /// The JSON Schema of walflow.yaml
    Config,
    /// The OpenAPI 3.1 description of the HTTP interface
    Openapi,
}

pub(super) fn schema(args: &SchemaArgs) -> Result<(), Stop> {
    let text = match args.which {
        Which::Pipeline => crate::spec::json_schema(),
        Which::Config => crate::spec::shared_schema(),
        Which::Openapi => crate::console::openapi(),
    };
    Ok(output::data(text.trim_end())?)
}
