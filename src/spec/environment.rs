//! The environment that a file may refer to, and the expansion of its references in one scalar.
//!
//! The variables are handed in, never read from the process. Expanded text is text: it can become neither YAML
//! structure nor a template. Never shows a value: `Debug` names variables only.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use super::code::Code;

/// The largest file that `${file:…}` reads.
const LARGEST_SECRET: u64 = 64 << 10;

/// Variables by name.
#[derive(Clone, Default)]
pub struct Environment {
    variables: BTreeMap<String, String>,
}

impl Environment {
    /// These variables.
    pub fn new(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        Self { variables: variables.into_iter().collect() }
    }

    /// All variables, for the compiler: scripts see those that their stage allows.
    pub fn variables(&self) -> BTreeMap<String, String> {
        self.variables.clone()
    }

    /// A variable's value.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str)
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.variables.keys()).finish()
    }
}

/// One reference that was expanded.
#[derive(Clone, PartialEq, Eq)]
pub struct Used {
    /// The variable's name, or `file:/path`.
    pub name: String,
    /// What came from outside; `None` when the default was taken.
    pub value: Option<String>,
}

impl fmt::Debug for Used {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.name, if self.value.is_some() { "" } else { " (default)" })
    }
}

/// A scalar after expansion.
#[derive(Clone, Default)]
pub struct Expanded {
    /// The text now.
    pub text: String,
    /// The references that were in it.
    pub used: Vec<Used>,
    /// The scalar is exactly one reference.
    pub whole: bool,
}

impl fmt::Debug for Expanded {
    /// The text holds what came from outside.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Expanded").field("used", &self.used).field("whole", &self.whole).finish_non_exhaustive()
    }
}

/// A reference that cannot be expanded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadReference {
    /// Its code.
    pub code: Code,
    /// The bytes of the scalar where it stands.
    pub range: std::ops::Range<usize>,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub help: String,
}

/// The end of a reference whose body begins at `from`: the brace that closes it.
fn closing(text: &str, from: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, byte) in text.bytes().enumerate().skip(from) {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 0 => return Some(at),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// Expands every reference of a scalar. With `template` the text that comes in is kept from being a template.
///
/// # Errors
/// Every reference that cannot be expanded.
pub fn expand(text: &str, environment: &Environment, template: bool) -> Result<Expanded, Vec<BadReference>> {
    let mut out = Expanded::default();
    let mut bad = Vec::new();
    let mut at = 0;
    while let Some(found) = text.get(at..).and_then(|rest| rest.find('$')).map(|offset| at + offset) {
        out.text.push_str(text.get(at..found).unwrap_or_default());
        let rest = text.get(found..).unwrap_or_default();
        if rest.starts_with("$${") {
            out.text.push_str(if template { "${{" } else { "${" });
            at = found + 3;
        } else if rest.starts_with("${") {
            let Some(end) = closing(text, found + 2) else {
                bad.push(BadReference {
                    code: Code::BadReference,
                    range: found..text.len(),
                    message: "a reference begins with '${' and has no '}'".to_owned(),
                    help: "write ${NAME}, or $${ for the text itself".to_owned(),
                });
                return Err(bad);
            };
            match resolve(text.get(found + 2..end).unwrap_or_default(), environment) {
                Ok((value, used)) => {
                    out.whole = found == 0 && end + 1 == text.len();
                    if template {
                        out.text.push_str(&value.replace('{', "{{"));
                    } else {
                        out.text.push_str(&value);
                    }
                    out.used.push(used);
                }
                Err((code, message, help)) => bad.push(BadReference { code, range: found..end + 1, message, help }),
            }
            at = end + 1;
        } else {
            out.text.push('$');
            at = found + 1;
        }
    }
    out.text.push_str(text.get(at..).unwrap_or_default());
    if bad.is_empty() { Ok(out) } else { Err(bad) }
}

type Unresolved = (Code, String, String);

fn resolve(body: &str, environment: &Environment) -> Result<(String, Used), Unresolved> {
    if let Some(path) = body.strip_prefix("file:") {
        let value = read_secret(Path::new(path)).map_err(|why| {
            (Code::SecretFile, format!("${{file:{path}}}: {why}"), "create the file, or correct its path".to_owned())
        })?;
        return Ok((value.clone(), Used { name: body.to_owned(), value: Some(value) }));
    }
    let (name, rest) = body.split_once(':').map_or((body, None), |(name, rest)| (name, Some(rest)));
    if !is_name(name) {
        return Err((
            Code::BadReference,
            format!("'{name}' is no name of an environment variable"),
            "a name is letters, digits and '_'; write $${ for the text '${' itself".to_owned(),
        ));
    }
    let value = environment.get(name);
    let used = |value: Option<&str>| Used { name: name.to_owned(), value: value.map(ToOwned::to_owned) };
    let filled = value.filter(|value| !value.is_empty());
    match rest.map(|rest| rest.split_at_checked(1).unwrap_or((rest, ""))) {
        None => value.map(|value| (value.to_owned(), used(Some(value)))).ok_or_else(|| {
            let help = format!("set it, or give a default: ${{{name}:-default}}");
            (Code::UnsetVariable, format!("the environment variable {name} is not set"), help)
        }),
        Some(("-", default)) => Ok((filled.unwrap_or(default).to_owned(), used(filled))),
        Some(("?", message)) => filled.map(|value| (value.to_owned(), used(Some(value)))).ok_or_else(|| {
            (
                Code::UnsetVariable,
                format!("the environment variable {name} is not set: {message}"),
                format!("set {name}"),
            )
        }),
        Some(_) => Err((
            Code::BadReference,
            format!("'${{{body}}}' is no reference"),
            format!("known are ${{{name}}}, ${{{name}:-default}} and ${{{name}:?message}}"),
        )),
    }
}

fn read_secret(path: &Path) -> Result<String, String> {
    let size = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !size.is_file() {
        return Err("it is no regular file".to_owned());
    }
    if size.len() > LARGEST_SECRET {
        return Err("the file is larger than 64 KiB".to_owned());
    }
    let mut text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment() -> Environment {
        Environment::new([("A", "1"), ("EMPTY", ""), ("T", "{payload.x}")].map(|(n, v)| (n.to_owned(), v.to_owned())))
    }

    fn text(from: &str) -> String {
        expand(from, &environment(), false).unwrap().text
    }

    #[test]
    fn every_form_of_reference_is_expanded() {
        for (from, to) in [
            ("plain $A and $", "plain $A and $"),
            ("${A}-${A}", "1-1"),
            ("${EMPTY}", ""),
            ("${EMPTY:-d}", "d"),
            ("${NONE:-a{b}c}", "a{b}c"),
            ("${A:?why}", "1"),
            ("$${A}", "${A}"),
            ("é${A}é", "é1é"),
        ] {
            assert_eq!(text(from), to, "{from}");
        }
    }

    #[test]
    fn every_bad_reference_is_reported_at_its_place() {
        let bad = expand("x${NONE}y${b.c}${A:+x}${NONE:?set it}", &environment(), false).unwrap_err();
        let codes: Vec<&str> = bad.iter().map(|bad| bad.code.as_str()).collect();
        assert_eq!(codes, ["WF0301", "WF0302", "WF0302", "WF0301"]);
        assert_eq!(bad[0].range, 1..8);
        assert!(bad[3].message.ends_with("set it"));
        assert_eq!(expand("${A", &environment(), false).unwrap_err()[0].code, Code::BadReference);
        assert_eq!(expand("${file:/no/such}", &environment(), false).unwrap_err()[0].code, Code::SecretFile);
    }

    #[test]
    fn what_comes_from_outside_is_no_template() {
        let expanded = expand("x/${T}/{payload.y}$${payload.z}", &environment(), true).unwrap();
        assert_eq!(expanded.text, "x/{{payload.x}/{payload.y}${{payload.z}");
    }

    #[test]
    fn one_trailing_newline_of_a_file_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        std::fs::write(&path, "secret\n\n").unwrap();
        let reference = format!("${{file:{}}}", path.display());
        assert_eq!(text(&reference), "secret\n");
    }

    #[test]
    fn debug_names_variables_and_shows_no_value() {
        let shown = format!(
            "{:?} {:?}",
            Environment::new([("N".to_owned(), "CANARY".to_owned())]),
            Used { name: "N".into(), value: Some("CANARY".into()) }
        );
        assert!(shown.contains('N') && !shown.contains("CANARY"));
    }
}
