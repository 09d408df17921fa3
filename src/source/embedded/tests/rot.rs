//! Bytes that are not what was written: a torn tail cut at every byte, a bit flipped in every byte of a small log.
//!
//! A start either refuses and names the file, or gives exactly what was acknowledged. One case no log on one disk can
//! tell from a torn tail: damage in the very last group. Then that group is cut, kept aside and told, and nothing else
//! is missing. `state.db` is not flipped here: its rows carry checksums, which tests of its own hold.

use std::path::PathBuf;

use super::double::Double;
use super::small::{Found, look, small, start};
use super::*;
use crate::source::embedded::frame::{HEADER_BYTES, Header};
use crate::source::embedded::journal::{DATA_START, FileHeader};

/// The newest journal file, where each of its groups starts and where the last one ends.
fn groups(double: &Double) -> (PathBuf, Vec<usize>, usize) {
    let files = double.contents();
    let newest = files.keys().filter(|path| path.extension().is_some_and(|ending| ending == "wal")).max().unwrap();
    let bytes = &files[newest];
    let salt = FileHeader::decode(bytes).unwrap().salt;
    let (mut at, mut starts) = (usize::try_from(DATA_START).unwrap(), Vec::new());
    while let Ok(header) = Header::decode(&bytes[at..], salt) {
        if header.first {
            starts.push(at);
        }
        at += header.frame_bytes();
    }
    (newest.clone(), starts, at)
}

/// `whole` without what the last `groups` groups of the journal brought.
fn without_last(whole: &Found, groups: usize) -> Found {
    let mut less = whole.clone();
    // Each of them is two records.
    less.records.truncate(whole.records.len() - 2 * groups);
    less.changes.truncate(whole.changes.len() - 2 * groups);
    less
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_tail_at_every_byte_of_the_last_three_groups_is_cut_and_nothing_before_it_is_lost() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let killed = small(folder.path(), &clock).await;
    let whole = look(&start(&killed.again(), folder.path(), &clock).unwrap()).unwrap();
    let (journal, mut bounds, end) = groups(&killed);
    bounds.push(end);
    let bytes = &killed.contents()[&journal];
    let last_three = &bounds[bounds.len() - 4..];
    for cut in last_three[0]..end {
        let torn = killed.again();
        torn.damage(&journal, |bytes| bytes[cut..].fill(0));
        let found = look(&start(&torn, folder.path(), &clock).unwrap()).unwrap();
        // A frame may end with zeros of its own.
        let is_torn = |group: &&[usize]| bytes[cut.clamp(group[0], group[1])..group[1]].iter().any(|byte| *byte != 0);
        let lost = last_three.windows(2).filter(is_torn).count();
        assert_eq!(found, without_last(&whole, lost), "cut at {cut}");
        // The next start begins where this one has written anew.
        let again = look(&start(&torn, folder.path(), &clock).unwrap()).unwrap();
        assert_eq!(again, found, "cut at {cut}, started twice");
    }
}

/// The bytes of a file that are worth a flip: of a journal file those that were ever written, and some of its zeros.
fn places(path: &Path, bytes: &[u8]) -> Vec<usize> {
    let written = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let journal = path.extension().is_some_and(|ending| ending == "wal");
    let data = usize::try_from(DATA_START).unwrap();
    (0..bytes.len())
        .filter(|at| !journal || *at < 48 || (data..written + HEADER_BYTES).contains(at) || at % 128 == 0)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_any_byte_is_named_or_harms_nothing() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), clock());
    let killed = small(folder.path(), &clock).await;
    let whole = look(&start(&killed.again(), folder.path(), &clock).unwrap()).unwrap();
    let (journal, starts, _) = groups(&killed);
    let (mut refused, mut same, mut cut) = (0, 0, 0);
    for (path, bytes) in killed.contents() {
        let name = path.file_name().unwrap().to_str().unwrap();
        for at in places(&path, &bytes) {
            let damaged = killed.again();
            damaged.damage(&path, |bytes| bytes[at] ^= 1 << (at % 8));
            let what = format!("byte {at} of {}", path.display());
            match start(&damaged, folder.path(), &clock).and_then(|recovered| look(&recovered)) {
                Err(said) => {
                    assert!(
                        said.contains(name) || name == "FORMAT" && said.contains("has the format"),
                        "{what}: {said}"
                    );
                    refused += 1;
                }
                Ok(found) if found == whole => same += 1,
                Ok(found) => {
                    assert!(path == journal && at >= *starts.last().unwrap(), "{what} is silently another: {found:#?}");
                    assert_eq!(found, without_last(&whole, 1), "{what}");
                    let kept =
                        format!("cut/{}-{}.bytes", journal.file_stem().unwrap().display(), starts.last().unwrap());
                    assert!(damaged.contents().contains_key(Path::new(&kept)), "{what}: nothing tells of the cut");
                    cut += 1;
                }
            }
        }
    }
    // Each of the three has happened, or the test has lost its grip.
    assert!(refused > 1_000 && same > 300 && cut > 100, "{refused} refused, {same} the same, {cut} cut");
}
