//! One frame's header: its layout in bytes, its checksums, and how a frame is written and read.
//!
//! The widths stand in the prose of this module's parent. The header's checksum is seeded with the salt of the file
//! that holds the frame and covers the body's checksum; the body's checksum is not seeded, so that a body is carried
//! from the journal to a segment with the checksum that it was born with. Nothing here does I/O, and no length is
//! trusted before the header's checksum has been found right.

use bytes::Bytes;

use super::body::MalformedBody;
use super::change::{Change, Frame, NamespaceNumber, Sequence};
use crate::clock::Timestamp;

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 52;
/// The two bytes that every frame starts with.
pub const MAGIC: [u8; 2] = *b"Wf";
/// The version of the layout that this build writes.
pub const VERSION: u8 = 1;
/// No body is longer; checked before anything is allocated.
pub const MAX_BODY_BYTES: u32 = 256 << 20;
/// The flag of a group's first frame.
const FIRST_OF_GROUP: u8 = 1;

/// A frame's header, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The number of the change's kind.
    pub kind: u8,
    /// It starts a group.
    pub first: bool,
    /// Bytes of the body that follow the header.
    pub body_bytes: u32,
    /// Whose change it is.
    pub namespace: NamespaceNumber,
    /// The frame's place in the journal.
    pub sequence: Sequence,
    /// What was already durable when the frame was written.
    pub durable: Sequence,
    /// Frames of its group that still follow.
    pub left: u32,
    /// When it was written.
    pub time: Timestamp,
    /// The checksum of the body.
    pub body_crc: u32,
}

/// Why bytes are no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAFrame {
    /// Fewer bytes than the header or body needs.
    #[error("the bytes end inside the frame")]
    Short,
    /// Zeros: space that was never written.
    #[error("nothing has been written here")]
    Empty,
    /// The header's magic or checksum is wrong.
    #[error("the frame's header does not match its checksum")]
    Header,
    /// A later build wrote it.
    #[error("the frame has version {0}, this build reads {VERSION}")]
    Version(u8),
    /// The body's checksum is wrong.
    #[error("the frame's body does not match its checksum")]
    Body,
    /// The checksums are right and the contents are not.
    #[error(transparent)]
    Malformed(#[from] MalformedBody),
}

fn crc(seed: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(seed, bytes)
}

impl Header {
    /// The header's bytes in a file with this salt.
    pub fn encode(&self, salt: u32) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            if let Some(place) = out.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
            at += bytes.len();
        };
        put(&MAGIC);
        put(&[VERSION, self.kind, if self.first { FIRST_OF_GROUP } else { 0 }, 0, 0, 0]);
        put(&self.body_bytes.to_le_bytes());
        put(&self.namespace.0.to_le_bytes());
        put(&self.sequence.0.to_le_bytes());
        put(&self.durable.0.to_le_bytes());
        put(&self.left.to_le_bytes());
        put(&self.time.as_millis().to_le_bytes());
        put(&self.body_crc.to_le_bytes());
        let sum = crc(salt, out.get(..HEADER_BYTES - 4).unwrap_or_default());
        if let Some(place) = out.get_mut(HEADER_BYTES - 4..) {
            place.copy_from_slice(&sum.to_le_bytes());
        }
        out
    }

    /// Reads a header at the start of `bytes`.
    ///
    /// # Errors
    /// When the bytes are short, empty, damaged, or from a later build.
    pub fn decode(bytes: &[u8], salt: u32) -> Result<Self, NotAFrame> {
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(if bytes.iter().all(|byte| *byte == 0) { NotAFrame::Empty } else { NotAFrame::Short });
        };
        if header.iter().all(|byte| *byte == 0) {
            return Err(NotAFrame::Empty);
        }
        let (covered, sum) = header.split_at(HEADER_BYTES - 4);
        if header.first_chunk() != Some(&MAGIC) || sum != crc(salt, covered).to_le_bytes() {
            return Err(NotAFrame::Header);
        }
        let mut read = Fields(covered);
        let [_, _, version, kind, flags, ..] = read.take::<8>()?;
        if version != VERSION {
            return Err(NotAFrame::Version(version));
        }
        let header = Self {
            kind,
            first: flags & FIRST_OF_GROUP != 0,
            body_bytes: u32::from_le_bytes(read.take()?),
            namespace: NamespaceNumber(u32::from_le_bytes(read.take()?)),
            sequence: Sequence(u64::from_le_bytes(read.take()?)),
            durable: Sequence(u64::from_le_bytes(read.take()?)),
            left: u32::from_le_bytes(read.take()?),
            time: Timestamp::from_millis(i64::from_le_bytes(read.take()?)),
            body_crc: u32::from_le_bytes(read.take()?),
        };
        if header.body_bytes > MAX_BODY_BYTES { Err(NotAFrame::Header) } else { Ok(header) }
    }

    /// Bytes of the whole frame.
    pub const fn frame_bytes(&self) -> usize {
        HEADER_BYTES + self.body_bytes as usize
    }

    /// Checks and decodes the body that belongs to this header.
    ///
    /// # Errors
    /// When the body is damaged or does not say what its kind needs.
    pub fn frame(&self, body: &Bytes) -> Result<Frame, NotAFrame> {
        if crc(0, body) != self.body_crc {
            return Err(NotAFrame::Body);
        }
        let change = Change::decode(self.kind, body)?;
        Ok(Frame { sequence: self.sequence, namespace: self.namespace, time: self.time, change })
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], NotAFrame> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(NotAFrame::Short)?;
        self.0 = rest;
        Ok(*head)
    }
}

/// Appends one frame to `out`: leaves room for the header, lets `fill` put the body, then writes the header.
///
/// `header.body_bytes` and `header.body_crc` are filled in here. Gives the finished header and what `fill` gave.
pub fn put_frame<T>(
    out: &mut Vec<u8>,
    salt: u32,
    mut header: Header,
    fill: impl FnOnce(&mut Vec<u8>) -> T,
) -> (Header, T) {
    let at = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    let start = out.len();
    let given = fill(out);
    let body = out.get(start..).unwrap_or_default();
    header.body_bytes = u32::try_from(body.len()).unwrap_or(u32::MAX);
    header.body_crc = crc(0, body);
    if let Some(place) = out.get_mut(at..start) {
        place.copy_from_slice(&header.encode(salt));
    }
    (header, given)
}

/// Reads the frame at the start of `bytes`, with its whole checks.
///
/// # Errors
/// When the bytes are no frame; see [`NotAFrame`].
pub fn read_frame(bytes: &Bytes, salt: u32) -> Result<(Header, Frame), NotAFrame> {
    let header = Header::decode(bytes, salt)?;
    if bytes.len() < header.frame_bytes() {
        return Err(NotAFrame::Short);
    }
    let frame = header.frame(&bytes.slice(HEADER_BYTES..header.frame_bytes()))?;
    Ok((header, frame))
}

/// Checks the frame at the start of `bytes` without decoding what it says. Gives its header.
///
/// # Errors
/// When the bytes are no frame; see [`NotAFrame`].
pub fn check_frame(bytes: &[u8], salt: u32) -> Result<Header, NotAFrame> {
    let header = Header::decode(bytes, salt)?;
    let body = bytes.get(HEADER_BYTES..header.frame_bytes()).ok_or(NotAFrame::Short)?;
    if crc(0, body) == header.body_crc { Ok(header) } else { Err(NotAFrame::Body) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::source::embedded::testing::every_change;

    fn header(sequence: u64) -> Header {
        Header {
            kind: 1,
            first: true,
            body_bytes: 0,
            namespace: NamespaceNumber(7),
            sequence: Sequence(sequence),
            durable: Sequence(sequence - 1),
            left: 3,
            time: Timestamp::from_millis(1_764_000_000_000),
            body_crc: 0,
        }
    }

    #[test]
    fn a_frame_of_every_kind_comes_back() {
        for change in every_change() {
            let mut out = Vec::new();
            let (written, ()) =
                put_frame(&mut out, 5, Header { kind: change.kind(), ..header(9) }, |out| change.encode(out));
            let (read, frame) = read_frame(&out.into(), 5).unwrap();
            assert_eq!(read, written);
            assert_eq!(frame.change, change);
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_and_every_cut_are_noticed() {
        let mut out = Vec::new();
        put_frame(&mut out, 5, header(9), |out| out.extend_from_slice(b"some body"));
        for bit in 0..out.len() * 8 {
            let mut damaged = out.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(check_frame(&damaged, 5).is_err(), "bit {bit}");
        }
        for cut in 0..out.len() {
            assert!(check_frame(&out[..cut], 5).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn row_06_a_frame_from_another_file_life_is_no_frame() {
        let mut out = Vec::new();
        put_frame(&mut out, 5, header(9), |out| out.extend_from_slice(b"some body"));
        assert_eq!(check_frame(&out, 6), Err(NotAFrame::Header));
    }

    #[test]
    fn a_length_at_its_limit_is_refused_before_it_is_trusted() {
        let wide = Header { body_bytes: MAX_BODY_BYTES + 1, ..header(9) };
        assert_eq!(Header::decode(&wide.encode(5), 5), Err(NotAFrame::Header));
        assert_eq!(Header::decode(&[0; HEADER_BYTES], 5), Err(NotAFrame::Empty));
    }

    proptest! {
        #[test]
        fn noise_is_never_a_frame(bytes in proptest::collection::vec(any::<u8>(), 0..200), salt: u32) {
            prop_assert!(read_frame(&bytes.into(), salt).is_err());
        }
    }
}
