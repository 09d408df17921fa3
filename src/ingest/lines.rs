//! The lines of a body, cut out of its parts as they come in.
//!
//! A line that lies within one part is a slice of it; only one that spans parts is put together. Never holds more than one
//! part and one begun line.

use bytes::{Bytes, BytesMut};

/// What of a body has come in and was not given out yet.
#[derive(Debug, Default)]
pub(super) struct Lines {
    part: Bytes,
    begun: BytesMut,
}

impl Lines {
    /// Takes the next part; the one before has been given out.
    pub(super) fn feed(&mut self, part: Bytes) {
        debug_assert!(self.part.is_empty(), "each part is given out before the next comes");
        self.part = part;
    }

    /// The next whole line, white space at both ends left out; `None` = another part is needed.
    pub(super) fn next(&mut self) -> Option<Bytes> {
        let Some(end) = memchr::memchr(b'\n', &self.part) else {
            self.begun.extend_from_slice(&std::mem::take(&mut self.part));
            return None;
        };
        let line = self.part.split_to(end + 1);
        if self.begun.is_empty() {
            return Some(trimmed(&line));
        }
        self.begun.extend_from_slice(&line);
        Some(self.last())
    }

    /// Bytes of the line that has begun.
    pub(super) fn begun(&self) -> usize {
        self.begun.len()
    }

    /// The line that has begun, as it is.
    pub(super) fn last(&mut self) -> Bytes {
        trimmed(&std::mem::take(&mut self.begun).freeze())
    }
}

fn trimmed(line: &Bytes) -> Bytes {
    line.slice_ref(line.trim_ascii())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn however_a_body_is_cut_its_lines_are_the_same(body in "[ab \r\n]{0,40}", cuts in prop::collection::vec(0..40_usize, 0..8)) {
            let expected: Vec<&str> = body.split('\n').map(str::trim_ascii).collect();
            let mut ends: Vec<usize> = cuts.into_iter().map(|cut| cut.min(body.len())).chain([0, body.len()]).collect();
            ends.sort_unstable();
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            for pair in ends.windows(2) {
                lines.feed(Bytes::copy_from_slice(&body.as_bytes()[pair[0]..pair[1]]));
                found.extend(std::iter::from_fn(|| lines.next()));
            }
            found.push(lines.last());
            prop_assert_eq!(found, expected);
        }
    }
}
