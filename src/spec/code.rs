//! The stable codes of everything that can be wrong with a pipeline file, each with its explanation.
//!
//! A code never changes its meaning and is never used again for another. Never says where: that is the diagnostic's.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

macro_rules! codes {
    ($($name:ident $code:literal $title:literal $explanation:literal)*) => {
        /// What kind of problem it is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code {
            $(#[doc = $title] $name,)*
        }

        impl Code {
            /// Every code, in order.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Its stable text.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $code,)* }
            }

            /// What it says, in a few words.
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)* }
            }

            /// Why it is a problem and what to do.
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$name => $explanation,)* }
            }
        }
    };
}

codes! {
    Unreadable "WF0101" "a file cannot be read."
        "The file or folder does not exist, is no regular file, or may not be read by this user. Check the path that was given, and the permissions."
    TooLarge "WF0102" "a file is larger than 1 MiB."
        "A pipeline file is a page or two. The bound keeps a wrong file (a log, a dump) from being read into memory. Give the folder of pipeline files, not that of data."
    NotUtf8 "WF0103" "a file is not UTF-8 text."
        "YAML files are text in UTF-8. The file holds other bytes at the place that is named: save it as UTF-8."
    Syntax "WF0104" "a file is not YAML."
        "The text cannot be read as YAML from the place that is named. Most often a quote or bracket is not closed, the indentation differs from the line before, or a tab stands where spaces should."
    TooComplex "WF0105" "a file is nested too deeply or repeats itself too much."
        "Aliases (*name) that repeat other aliases, an alias within its own value, more than 32 levels or more than 20,000 values are refused before anything is built, because such a file can take all memory."
    Documents "WF0106" "a file does not hold exactly one document."
        "One file is one namespace. Put what follows `---` into a file of its own; an empty file should be removed."
    DuplicateKey "WF0107" "a key stands twice in one map."
        "YAML readers disagree on which of the two counts, so neither is taken. Keep one."
    Tag "WF0108" "a YAML tag has no meaning here."
        "A word that begins with '!' before a value is a tag. Pipelines use none; a text that begins with '!' needs quotes."
    UnquotedReference "WF0109" "a reference stands without quotes."
        "`{payload.x}` without quotes is a map to YAML, not a text. Write \"{payload.x}\"."
    NoFiles "WF0110" "there is no pipeline file."
        "The paths that were given hold no file that ends in .yaml or .yml (files that begin with a dot are skipped). Without paths the folder pipelines/ is read."
    UnknownKey "WF0201" "a key is not known here."
        "Keys that are not known are refused, because a key with a typing error would otherwise silently have no effect. The keys that are known at the place are in the JSON Schema (`walflow schema`)."
    MisplacedKey "WF0202" "a key belongs to another level."
        "The key exists, but at another place of the file. Most often the line is indented too little or too much."
    MissingKey "WF0203" "a key that must be there is missing."
        "The part that is named cannot work without this key."
    WrongType "WF0204" "a value is of another type."
        "A map, list, text, number or bool stands where another is expected. A text that looks like a number or bool (`1`, `true`) needs quotes."
    WrongValue "WF0205" "a value is not one that is understood."
        "The value has the right type but is none of the words, durations, sizes or rates that are understood at the place."
    OutOfRange "WF0206" "a number is too small or too large."
        "The value lies outside of the bounds in the documentation of the key."
    Refused "WF0208" "a value was refused."
        "The value passed the grammar but could not be read. The message says why."
    UnsetVariable "WF0301" "an environment variable is not set."
        "`${VAR}` needs the variable, `${VAR:?message}` says why it is needed. Set it, or give a default: `${VAR:-default}`. To write the text itself, write `$${`."
    BadReference "WF0302" "a reference to the environment is malformed."
        "Known are ${VAR}, ${VAR:-default}, ${VAR:?message} and ${file:/path}. A name is letters, digits and '_'. To write the text itself, write `$${`."
    SecretFile "WF0303" "a file that a value refers to cannot be read."
        "`${file:/path}` takes the content of the file without one trailing newline. It must exist, be text in UTF-8 and at most 64 KiB."
    OneKind "WF0401" "exactly one kind is needed."
        "A sink, an arm, a stage or a source is of exactly one kind; the kind is the key. Two kinds in one map, or none, leave open what was meant. Several sinks stand under `route:` or `fan_out:`."
    BadName "WF0402" "a name is not allowed."
        "Namespaces are 1 to 63 of a-z, 0-9 and '-'. Regions, sinks and arms are 1 to 63 of a-z, 0-9, '_' and '-'. They become part of file names, metrics and URLs."
    DuplicateName "WF0403" "a name is used twice."
        "Arms are told apart by their names: progress, retries and dead letters are kept under them."
    RouteEnd "WF0404" "an arm of a route can take nothing."
        "The first arm that matches takes the record. An arm without `when` takes everything, so nothing can follow it: make it the last, or give it a `when`."
    DuplicateNamespace "WF0405" "two files declare one namespace."
        "A namespace is one file. Rename one of the two, or remove the one that is stale."
    BadOverride "WF0406" "a region's override does not fit."
        "With one sink a region's map overrides the fields of the sink's kind. With several it is keyed by sink name, and each value overrides the fields of that sink's kind."
    MissingAddress "WF0407" "a sink has no address."
        "Neither the sink nor the region gives the field that says where records go. Every branch needs it once the regions' overrides are applied."
    DelayRule "WF0408" "a delay has two rules or none."
        "`for` is a length of time, `until` a point in time: one of them decides. Without either, `delay` only sets the bound for delays that requests ask for, with `max`."
    Succession "WF0409" "a former or retired name is still in use."
        "`was: OLD` takes over the progress of a name that the file no longer has, once. `retired: {NAME: drop}` ends a branch that the file no longer has."
    SharedTarget "WF0410" "two arms write one target."
        "Two arms are two branches, and between branches there is no order: for one key the later record may reach the target first. Several operations on one target belong into one sink with `cases`, where the order of each key is kept."
    Bounds "WF0411" "bounds contradict each other."
        "One bound makes another meaningless, for example a record limit above the backlog's size. The message names both."
    BadPointer "WF0412" "a JSON pointer is malformed."
        "A JSON pointer is empty or begins with '/': `/user/id`. In a name '~' is written ~0 and '/' is written ~1."
    NoEffect "WF0413" "a setting has no effect."
        "The setting is understood, but something else in the file keeps it from mattering."
    Connection "WF0420" "a connection cannot be used."
        "`use: NAME` takes the fields of a connection under `connections:` in walflow.yaml, which is of the same kind as the map that it stands in. walflow.yaml is found by --config or WALFLOW_CONFIG, else in the working folder, else in /etc/walflow."
    ScriptError "WF0501" "a script or expression does not compile."
        "The place is the line of the script in the YAML file or in the script's own file. Expressions are Rhai; only the documented functions exist."
    ScriptFile "WF0502" "a script file cannot be read."
        "The path is relative to the pipeline file. It must exist, be text in UTF-8 and at most 1 MiB."
    SchemaFile "WF0503" "a payload schema cannot be used."
        "The path is relative to the pipeline file. The file must be a JSON Schema; it may refer to itself, but not to the network or to other files."
    SinkSetting "WF0601" "a sink's setting does not work."
        "A template, address or option of the sink was checked without touching the network and cannot work as written. The message says why."
    SourceSetting "WF0602" "a source's or shelf's setting does not work."
        "An address, name or option of the source or of its shelf was checked without touching the network and cannot work as written. The message says why."
    NeedsRestart "WF0603" "a namespace that runs cannot take another log, shelf or login."
        "A namespace keeps the log and the shelf that it was started with, and the connections to them: with another address, login or option of its source or shelf the file is not in force, and the last good one goes on. Restart walflow to use it. To go to another log with all that waits, put the file back and use `walflow namespace move`."
}

/// The text is no code of walflow's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no code of walflow's; codes look like WF0201")]
pub struct NotACode(Box<str>);

impl FromStr for Code {
    type Err = NotACode;

    fn from_str(text: &str) -> Result<Self, NotACode> {
        let found = Self::ALL.iter().find(|code| code.as_str().eq_ignore_ascii_case(text.trim()));
        found.copied().ok_or_else(|| NotACode(text.into()))
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// What `walflow explain CODE` prints.
///
/// # Errors
/// When there is no such code.
pub fn explain(code: &str) -> Result<String, NotACode> {
    let code: Code = code.parse()?;
    Ok(format!("{code}: {}\n\n{}\n", code.title(), code.explanation()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_ordered_and_explained() {
        for pair in Code::ALL.windows(2) {
            assert!(pair[0].as_str() < pair[1].as_str(), "{} comes before {}", pair[1], pair[0]);
        }
        for code in Code::ALL {
            let text = explain(code.as_str()).unwrap();
            assert!(text.starts_with(code.as_str()) && text.len() > 80, "{text}");
            assert!(code.title().ends_with('.') && code.explanation().ends_with(['.', '`']), "{code}");
        }
        assert!(explain("WF9999").unwrap_err().to_string().contains("WF0201"));
    }
}
