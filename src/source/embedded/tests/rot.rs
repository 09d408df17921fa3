//! Bytes that are not what was written: a torn tail cut at every byte, a bit flipped in every byte of a small log.
//!
//! A start either refuses and names the file, or gives exactly what was acknowledged. One case no log on one disk can
//! tell from a torn tail: damage in the very last group. Then that group is cut, kept aside and told, and nothing else
//! is missing. `state.db` is not flipped here: its rows carry checksums, which tests of its own hold.

use std::path::PathBuf;

use super::double::Double;
use super::*;
use crate::record::Record;
use crate::source::Settlement;
use crate::source::embedded::change::Frame;
use crate::source::embedded::frame::{HEADER_BYTES, Header};
use crate::source::embedded::journal::{DATA_START, FileHeader};
use crate::source::embedded::reader::from_segments_at;
use crate::source::embedded::recovery::{Recovered, recover};

fn on(double: &Double, folder: &Path, clock: &Clock) -> Options {
    Options {
        disk: Arc::new(double.clone()),
        journal_file_bytes: 8 << 10,
        journal_spares: 0,
        checkpoint_bytes: 1 << 30,
        ballast_bytes: 0,
        segment_bytes: 600,
        ..options(folder, clock)
    }
}

/// Everything that a start up to its threads has found.
#[derive(Clone, Debug, PartialEq)]
struct State {
    /// The records that can be read, from memory or segments.
    records: Vec<(Position, Record)>,
    /// The changes that the views still have to take in.
    changes: Vec<Frame>,
}

/// Reads all there is, or says what is damaged.
fn look(recovered: &Recovered) -> Result<State, String> {
    let space = recovered.shared.spaces.read().by_name[&"orders".parse().unwrap()].clone();
    let (mut records, mut from) = (Vec::new(), Position(1));
    while from <= space.end() {
        let entries = match space.recent(from, 100, 1 << 20) {
            Some(entries) => entries,
            None => from_segments_at(&recovered.shared, &space, from, 100).map_err(|error| error.to_string())?,
        };
        let Some(last) = entries.last() else { return Err(format!("nothing is at {from:?}")) };
        from = last.position.next();
        records.extend(entries.into_iter().map(|entry| (entry.position, Record::clone(&entry.record))));
    }
    let frames = recovered.commits.iter().flat_map(|commit| &commit.frames);
    Ok(State { records, changes: frames.map(|durable| durable.frame.clone()).collect() })
}

/// A small log with all that has a place of its own: sealed segments with sidecars, a release, a drop, a group of two, keys,
/// parked records; half of it behind a checkpoint, and killed.
async fn small(folder: &Path, clock: &Clock) -> Double {
    let first = tempfile::tempdir().unwrap();
    let double = Double::new(first.path());
    let log = Embedded::open(on(&double, first.path(), clock)).unwrap();
    let namespace = orders(&log);
    let mut start = namespace.open_branch(&sink(), Start::Earliest).await.unwrap();
    let soon = Some(clock.now().saturating_add(Duration::from_secs(10)));
    namespace.admit(vec![Write { due_at: soon, ..write(Some("late"), "\"late\"") }]).await.unwrap();
    append(&namespace, 0..6).await;
    clock.advance(Duration::from_secs(10));
    read(&mut *start.subscription, 7).await;
    let dropped = vec![(Position(2), "filter".into())];
    namespace
        .settle(&sink(), Settlement { frontier: Some(Position(3)), dropped, ..Settlement::default() })
        .await
        .unwrap();
    log.close().await;
    drop((namespace, start, log));
    let log = Embedded::open(on(&double, first.path(), clock)).unwrap();
    let namespace = orders(&log);
    let later = Some(clock.now().saturating_add(Duration::from_secs(3_600)));
    namespace.admit(vec![Write { due_at: later, ..write(None, "\"later\"") }]).await.unwrap();
    let key = crate::source::IdempotencyKey { key: "once".into(), fingerprint: [7; 16] };
    namespace.admit(vec![Write { idempotency: Some(key), ..write(None, "\"keyed\"") }]).await.unwrap();
    for number in 10..13u32 {
        namespace.admit(vec![write(Some("k"), &number.to_string()), write(None, "\"second\"")]).await.unwrap();
    }
    let killed = double.kill(folder);
    log.close().await;
    killed
}

fn start(double: &Double, folder: &Path, clock: &Clock) -> Result<Recovered, String> {
    recover(on(double, folder, clock)).map_err(|error| error.to_string())
}

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
fn without_last(whole: &State, groups: usize) -> State {
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
