//! What a script's text can touch at all, told from the text alone.
//!
//! There is no `eval`, so a name that a text does not hold is one that it cannot reach: what is not named is not made.
//! Every answer errs to the careful side; nothing here decides what a script means.

/// What a text may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Uses {
    pub(super) payload: bool,
    pub(super) key: bool,
    pub(super) headers: bool,
    pub(super) record: bool,
    /// It may run a part of itself again and again, and so build or nest without end.
    pub(super) repeats: bool,
    /// It cannot change what it is given.
    pub(super) only_reads: bool,
}

/// Functions that leave their first argument alone.
const READING: &[&str] = &[
    "abs",
    "base64_decode",
    "base64_encode",
    "base64url_decode",
    "base64url_encode",
    "ceiling",
    "contains",
    "ends_with",
    "env",
    "floor",
    "get",
    "hmac_sha256",
    "index_of",
    "is_def_var",
    "is_empty",
    "json_format",
    "json_parse",
    "keys",
    "len",
    "max",
    "min",
    "now",
    "parse_float",
    "parse_int",
    "random",
    "redact",
    "regex_captures",
    "regex_find",
    "regex_match",
    "regex_replace",
    "round",
    "sha256",
    "sha512",
    "split",
    "sqrt",
    "starts_with",
    "sub_string",
    "time_add",
    "time_diff",
    "time_format",
    "time_from_unix",
    "time_parse",
    "time_unix",
    "to_float",
    "to_int",
    "to_lower",
    "to_string",
    "to_upper",
    "type_of",
    "uuid",
    "values",
    "wall_clock",
];
/// Words before `(` that call nothing.
const KEYWORDS: &[&str] = &["else", "if", "in", "return", "switch", "throw", "while"];

/// Looks through a text.
pub(super) fn uses(text: &str) -> Uses {
    let mentions = |name: &str| text.contains(name);
    let words = || text.split(|c: char| !(c.is_alphanumeric() || c == '_'));
    let again = ["loop", "while", "for", "do", "fn", "Fn", "curry", "call"];
    Uses {
        payload: mentions("payload"),
        key: mentions("key"),
        headers: mentions("headers"),
        record: mentions("record"),
        repeats: words().any(|word| again.contains(&word)) || has_closure(text),
        only_reads: only_reads(text),
    }
}

/// Whether a bar may open a closure: any single one, and two where an operand is due.
fn has_closure(text: &str) -> bool {
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        if *byte == b'|' {
            if bytes.get(at + 1) != Some(&b'|') || !after_operand(text.get(..at).unwrap_or_default()) {
                return true;
            }
            at += 1;
        }
        at += 1;
    }
    false
}

/// Whether a text ends where an operator may follow.
fn after_operand(before: &str) -> bool {
    let before = before.trim_end();
    let word = before.rsplit(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap_or_default();
    before.ends_with([')', ']', '"', '\'', '`']) || (!word.is_empty() && !KEYWORDS.contains(&word))
}

fn only_reads(text: &str) -> bool {
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let taken = match first {
            '"' => match quoted(rest) {
                Some(len) => len,
                None => return false,
            },
            // Text with code in it, raw text, character literals, maps and comments are left to the careful side.
            '`' | '#' | '\'' | ';' => return false,
            '/' if rest.starts_with("//") || rest.starts_with("/*") => return false,
            '<' | '>' if rest.starts_with("<<=") || rest.starts_with(">>=") => return false,
            '=' | '!' | '<' | '>' if matches!(rest.as_bytes().get(1), Some(b'=')) => 2,
            '=' if rest.starts_with("=>") => 2,
            '=' => return false,
            '|' if rest.starts_with("||") && after_operand(text.get(..text.len() - rest.len()).unwrap_or_default()) => {
                2
            }
            '|' => return false,
            c if c.is_alphabetic() || c == '_' => {
                let len = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
                let (word, after) = rest.split_at_checked(len).unwrap_or((rest, ""));
                let called = after.trim_start().starts_with('(');
                if word == "this" || (called && !READING.contains(&word) && !KEYWORDS.contains(&word)) {
                    return false;
                }
                len
            }
            c => c.len_utf8(),
        };
        rest = rest.get(taken..).unwrap_or_default();
    }
    true
}

/// The length of the quoted text that `rest` begins with.
fn quoted(rest: &str) -> Option<usize> {
    let mut bytes = rest.bytes().enumerate().skip(1);
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'\\' => {
                bytes.next();
            }
            b'"' => return Some(at + 1),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_conditions_only_read() {
        for text in [
            r#"payload.operation != "NOOP""#,
            "payload.a == 1 && (payload.b >= 2 || !payload.c) && payload?.d?.e <= 3",
            r#"payload.tags.contains("x=1;") || key.starts_with("a")"#,
            "if payload.vip { 0 } else { 3600 }",
            r#"switch payload.kind { "a" => true, _ => false }"#,
        ] {
            assert!(uses(text).only_reads && !uses(text).repeats, "{text}");
        }
    }

    #[test]
    fn whatever_may_change_something_is_not_taken_for_reading() {
        for text in [
            "payload.a = 1",
            "payload.a += 1",
            "payload.a <<= 1",
            "payload.tags.clear()",
            "clear(payload)",
            "payload.tags.some(|t| t == 1)",
            "payload.tags.for_each(|| this.x)",
            "`${payload.remove(\"a\")}` != \"\"",
            "payload.a == 1 /* ( */",
            "\"open",
        ] {
            assert!(!uses(text).only_reads, "{text}");
        }
    }

    #[test]
    fn loops_and_closures_repeat_and_an_or_does_not() {
        for text in ["loop { x(); }", "for i in 0..9 { }", "a.map(|x| x)", "let f = || 1;", "fn f() { f() }"] {
            assert!(uses(text).repeats, "{text}");
        }
        for text in ["payload.a || payload.b", "payload[\"a\"] || f(1) || before", "payload.format = 1;"] {
            assert!(!uses(text).repeats, "{text}");
        }
    }

    #[test]
    fn what_is_not_named_is_not_used() {
        let used = uses("key = \"a\";");
        assert!(used.key && !used.payload && !used.headers && !used.record);
    }
}
