//! One problem of a pipeline file, as a user reads it: code, place, excerpt with a caret, and what would be right.
//!
//! Takes a text and a byte range, gives text for people, one line for editors, or JSON. Never prints a secret: the
//! excerpt is masked where a credential stands literally, and values from the environment never get here.

use std::fmt::Write as _;
use std::ops::Range;
use std::sync::{Arc, LazyLock};

use regex::Regex;
use serde::Serialize;

use super::code::Code;
use super::text::Text;

/// How much of a long line is shown.
const WIDEST: usize = 120;
/// How much of it, on either side, is looked at for credentials.
const NEIGHBOURHOOD: usize = 500;
/// The longest message, in characters.
const LONGEST: usize = 400;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The file cannot run.
    Error,
    /// The file runs; its author should know.
    Warning,
}

impl Severity {
    const fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// The line of a file where a problem stands, and the part of it that is meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Excerpt {
    /// The line, with credentials masked.
    pub text: String,
    /// Characters before the part that is meant.
    pub before: usize,
    /// Characters of the part that is meant, at least 1.
    pub length: usize,
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// What kind of problem.
    pub code: Code,
    /// How bad.
    pub severity: Severity,
    /// The file, as the user named it.
    pub file: Arc<str>,
    /// The line, from 1; 0 when the whole file is meant.
    pub line: usize,
    /// The column in characters, from 1; 0 when the whole file is meant.
    pub column: usize,
    /// The JSON pointer of what is meant, in the pipeline file.
    pub pointer: String,
    /// The namespace, where it is known.
    pub namespace: Option<Arc<str>>,
    /// What is wrong.
    pub message: String,
    /// The line itself.
    pub excerpt: Option<Excerpt>,
    /// What would be right.
    pub help: Option<String>,
}

impl Diagnostic {
    /// A problem with a file as a whole.
    pub fn of_file(code: Code, file: &str, message: impl Into<String>) -> Self {
        Self {
            code,
            severity: Severity::Error,
            file: file.into(),
            line: 0,
            column: 0,
            pointer: String::new(),
            namespace: None,
            message: cut(message.into()),
            excerpt: None,
            help: None,
        }
    }

    /// A problem at a place of a file.
    pub fn at(code: Code, text: &Text, range: &Range<usize>, message: impl Into<String>) -> Self {
        let (text, range) = text.part(range.clone());
        let (line, column) = (text.line_of(range.start), text.column_of(range.start));
        let on_line = text.slice(range).lines().next().unwrap_or_default().trim_end().chars().count();
        Self {
            line,
            column,
            excerpt: Some(excerpt(text.line(line), column.saturating_sub(1), on_line.max(1))),
            ..Self::of_file(code, text.name(), message)
        }
    }

    /// The same as a warning.
    #[must_use]
    pub fn warning(mut self) -> Self {
        self.severity = Severity::Warning;
        self
    }

    /// The same with what would be right.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(cut(help.into()));
        self
    }

    /// The same about a place of the file's tree.
    #[must_use]
    pub fn pointer(mut self, pointer: impl Into<String>) -> Self {
        self.pointer = pointer.into();
        self
    }

    /// True when the file cannot run.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// One line for editors: `file:line:column: error[CODE]: message`.
    pub fn short(&self) -> String {
        let message = self.message.replace('\n', " ");
        let place = match self.line {
            0 => self.file.to_string(),
            line => format!("{}:{line}:{}", self.file, self.column),
        };
        format!("{place}: {}[{}]: {message}", self.severity.word(), self.code)
    }

    /// The whole for people, as a compiler shows it. Colour is for terminals.
    pub fn render(&self, colour: bool) -> String {
        let paint = |style: &str, text: &str| {
            if colour { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_owned() }
        };
        let tone = if self.is_error() { "1;31" } else { "1;33" };
        let head = paint(tone, &format!("{}[{}]", self.severity.word(), self.code));
        let mut out = format!("{head}: {}\n", paint("1", &self.message));
        let width = self.line.to_string().len();
        let gutter = " ".repeat(width);
        let place = match self.line {
            0 => self.file.to_string(),
            line => format!("{}:{line}:{}", self.file, self.column),
        };
        let _ = writeln!(out, "{gutter}{} {place}", paint("1;34", "-->"));
        if let Some(excerpt) = &self.excerpt {
            let bar = paint("1;34", "|");
            let number = paint("1;34", &self.line.to_string());
            let caret = paint(tone, &"^".repeat(excerpt.length));
            let _ = writeln!(out, "{gutter} {bar}");
            let _ = writeln!(out, "{}", format!("{number} {bar} {}", excerpt.text).trim_end());
            let _ = writeln!(out, "{gutter} {bar} {}{caret}", " ".repeat(excerpt.before));
        }
        if let Some(help) = &self.help {
            let _ = writeln!(out, "{gutter} {} {}: {help}", paint("1;34", "="), paint("1", "help"));
        }
        out
    }

    /// Takes values out of the words, each for the reference that it came from.
    pub(crate) fn scrub<'a>(&mut self, values: impl Iterator<Item = (&'a str, &'a str)>) {
        for (value, reference) in values {
            for text in [Some(&mut self.message), self.help.as_mut()].into_iter().flatten() {
                if text.contains(value) {
                    *text = text.replace(value, reference);
                }
            }
        }
    }
}

/// A text that is not longer than a person reads.
fn cut(mut text: String) -> String {
    if let Some((at, _)) = text.char_indices().nth(LONGEST) {
        text.truncate(at);
        text.push('…');
    }
    text
}

static CREDENTIALS: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(
        r#"(?xi) whsec_ (?<a> [^\s"',}]+ )
        | :// [^/@\s"']*? : (?<b> [^/@\s"']+ ) @
        | \b (?: secret (?:_access_key)? | password | passwd | token | authorization | api[_-]?keys? ) ["']? \s* : \s* (?<c> [^$\s\#{] [^\#]* )"#,
    )
    .ok()
});

/// Masks credentials that stand literally, keeping every column where it is.
pub fn mask(line: &str) -> String {
    let Some(credentials) = CREDENTIALS.as_ref() else { return String::new() };
    let mut out = line.to_owned();
    for found in credentials.captures_iter(line) {
        for name in ["a", "b", "c"] {
            if let Some(part) = found.name(name) {
                let stars: String = part
                    .as_str()
                    .chars()
                    .map(|c| if c.is_ascii() { "*".to_owned() } else { "*".repeat(c.len_utf8()) })
                    .collect();
                out.replace_range(part.range(), &stars);
            }
        }
    }
    out
}

/// The part of a line around what is meant.
fn excerpt(line: &str, before: usize, length: usize) -> Excerpt {
    // Only the neighbourhood is looked at: a line may be a mebibyte long, and hold a thousand problems.
    let skipped = before.saturating_sub(NEIGHBOURHOOD);
    let near: String = line.chars().skip(skipped).take(2 * NEIGHBOURHOOD).collect();
    let before = before - skipped;
    let clean: Vec<char> = mask(&near).chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let from = if before + 20 > WIDEST { before.saturating_sub(WIDEST / 2) } else { 0 };
    let shown: String = clean.iter().skip(from).take(WIDEST).collect();
    let before = before - from;
    let (head, tail) = (if from + skipped > 0 { "…" } else { "" }, if clean.len() > from + WIDEST { "…" } else { "" });
    Excerpt {
        text: format!("{head}{}{tail}", shown.trim_end()),
        before: before + head.chars().count(),
        length: length.clamp(1, WIDEST.saturating_sub(before).max(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> Text {
        Text::new("pipelines/a.yaml", "namespace: a\nsink:\n  retires: { attempts: 3 }\n")
    }

    #[test]
    fn a_problem_reads_like_a_compilers() {
        let diagnostic =
            Diagnostic::at(Code::UnknownKey, &text(), &(21..28), "unknown key 'retires'").help("did you mean 'retry'?");
        assert_eq!(
            diagnostic.render(false),
            "error[WF0201]: unknown key 'retires'\n --> pipelines/a.yaml:3:3\n  |\n3 |   retires: { attempts: 3 }\n  |   ^^^^^^^\n  = help: did you mean 'retry'?\n"
        );
        assert_eq!(diagnostic.short(), "pipelines/a.yaml:3:3: error[WF0201]: unknown key 'retires'");
        assert!(diagnostic.render(true).contains("\x1b[1;31merror"));
        let json = serde_json::to_value(&diagnostic).unwrap();
        assert_eq!((json["code"].as_str(), json["line"].as_u64()), (Some("WF0201"), Some(3)));
    }

    #[test]
    fn literal_credentials_are_masked_in_the_excerpt() {
        for line in [
            "  sign: { secret: whsec_CANARY }",
            "url: redis://user:CANARY@host/1",
            "url: redis://:CANARY@host/1",
            "password: CANARY",
            "secret_access_key: CANARY",
            "api_keys: [CANARY]",
            "  Authorization: \"Bearer CANARY\"",
        ] {
            let text = Text::new("a", line);
            let shown = Diagnostic::at(Code::WrongType, &text, &(0..3), "m").render(false);
            assert!(!shown.contains("CANARY"), "{shown}");
        }
    }

    #[test]
    fn a_long_line_is_cut_around_its_caret() {
        let line = format!("{}here{}", "x".repeat(500), "y".repeat(500));
        let shown = Diagnostic::at(Code::WrongType, &Text::new("a", &line), &(500..504), "m").excerpt.unwrap();
        let part: String = shown.text.chars().skip(shown.before).take(shown.length).collect();
        assert_eq!(part, "here");
        assert!(shown.text.chars().count() <= WIDEST + 2);
    }
}
