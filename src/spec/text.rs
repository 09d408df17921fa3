//! A file's text with its lines: where a byte stands, and what a line says.
//!
//! Takes the text once, gives lines and columns (both from 1, columns in characters). Never reads a file.

use std::ops::Range;
use std::sync::Arc;

/// A file's name and text. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Text {
    name: Arc<str>,
    content: Arc<str>,
    starts: Arc<[usize]>,
    /// The byte of each character; empty when all are one byte.
    characters: Arc<[u32]>,
    behind: Option<Arc<Text>>,
}

impl Text {
    /// Text under the name that a user knows it by; a byte order mark is left out.
    pub fn new(name: &str, text: &str) -> Self {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let bytes = text.as_bytes();
        let starts = std::iter::once(0).chain(bytes.iter().enumerate().filter_map(|(at, byte)| match byte {
            b'\n' => Some(at + 1),
            b'\r' if bytes.get(at + 1) != Some(&b'\n') => Some(at + 1),
            _ => None,
        }));
        let characters = if text.is_ascii() {
            Arc::default()
        } else {
            text.char_indices().map(|(at, _)| u32::try_from(at).unwrap_or(u32::MAX)).collect()
        };
        Self { name: name.into(), content: text.into(), starts: starts.collect(), characters, behind: None }
    }

    /// The same with another text behind it: a byte range from [`Self::beyond`] on means that one.
    #[must_use]
    pub fn with_behind(mut self, other: Self) -> Self {
        self.behind = Some(Arc::new(other));
        self
    }

    /// The text behind this one.
    pub fn behind(&self) -> Option<&Self> {
        self.behind.as_deref()
    }

    /// Where the text behind this one begins.
    pub fn beyond(&self) -> usize {
        self.content.len() + 1
    }

    /// The text that a range means, and the range in it.
    pub fn part(&self, range: Range<usize>) -> (&Self, Range<usize>) {
        match &self.behind {
            Some(other) if range.start >= self.beyond() => {
                let base = self.beyond();
                (other, range.start - base..range.end.saturating_sub(base))
            }
            _ => (self, range),
        }
    }

    /// The name that a user knows it by.
    pub const fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// All of it.
    pub fn as_str(&self) -> &str {
        &self.content
    }

    /// The bytes of a range; empty when it is none.
    pub fn slice(&self, range: Range<usize>) -> &str {
        let (text, range) = self.part(range);
        text.content.get(range).unwrap_or_default()
    }

    /// The byte at a place.
    pub fn byte(&self, at: usize) -> Option<u8> {
        self.content.as_bytes().get(at).copied()
    }

    /// The end of what is no white space within a range.
    pub fn trim_end(&self, start: usize, end: usize) -> usize {
        start + self.content.get(start..end).unwrap_or_default().trim_end().len()
    }

    /// The byte of a character, by its number; the end when there are not so many.
    pub fn offset(&self, character: usize) -> usize {
        if self.characters.is_empty() {
            return character.min(self.content.len());
        }
        self.characters.get(character).map_or(self.content.len(), |at| *at as usize)
    }

    /// The byte at a line and a column in characters, both from 1; at most the line's end.
    pub fn offset_at(&self, line: usize, column: usize) -> usize {
        let start = line.checked_sub(1).and_then(|index| self.starts.get(index)).copied().unwrap_or(self.content.len());
        let text = self.line(line);
        start + text.char_indices().nth(column.saturating_sub(1)).map_or(text.len(), |(at, _)| at)
    }

    /// The line (from 1) of a byte.
    pub fn line_of(&self, at: usize) -> usize {
        self.starts.partition_point(|start| *start <= at)
    }

    /// The column (from 1, in characters) of a byte.
    pub fn column_of(&self, at: usize) -> usize {
        let start = self.starts.get(self.line_of(at).saturating_sub(1)).copied().unwrap_or(0);
        self.content.get(start..at).map_or(1, |before| before.chars().count() + 1)
    }

    /// A line (from 1) without its end.
    pub fn line(&self, line: usize) -> &str {
        let Some(start) = line.checked_sub(1).and_then(|index| self.starts.get(index)) else { return "" };
        let end = self.starts.get(line).copied().unwrap_or(self.content.len());
        self.content.get(*start..end).unwrap_or_default().trim_end_matches(['\n', '\r'])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_columns_count_from_one_and_in_characters() {
        let text = Text::new("a", "\u{feff}é: 1\r\nb: 2\n\nd");
        assert_eq!(
            (text.line(1), text.line(2), text.line(3), text.line(4), text.line(5)),
            ("é: 1", "b: 2", "", "d", "")
        );
        let at = text.offset(3);
        assert_eq!((text.slice(at..at + 1), text.line_of(at), text.column_of(at)), ("1", 1, 4));
        assert_eq!(text.slice(text.offset(6)..text.offset(99)), "b: 2\n\nd");
    }
}
