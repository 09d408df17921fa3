//! Writing to the terminal: data to standard output, notices to standard error.
//!
//! Takes text, gives lines. Never panics when nobody reads.

use std::io::{self, Write};

use serde_json::Value;

/// Prints `text` and a line end to standard output.
pub(super) fn data(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Prints `value` as indented JSON to standard output.
pub(super) fn json(value: &Value) -> io::Result<()> {
    data(&format!("{value:#}"))
}

/// Prints `text` to standard error; nobody can be told when that fails.
pub(super) fn notice(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// The field `name` as a person reads it: text without quotes, `-` for what is not there.
pub(super) fn field(value: &Value, name: &str) -> String {
    match value.get(name) {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// Rows under a header, each column as wide as its widest cell, two spaces between.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(header.get(column).map(|cell| cell.len())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&mut header.iter().copied())];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".to_owned(), "long cell".to_owned()], vec!["wider".to_owned(), "b".to_owned()]];
        assert_eq!(table(&["X", "Y"], &rows), "X      Y\na      long cell\nwider  b");
    }
}
