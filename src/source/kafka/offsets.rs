//! What a group keeps: the next offset of each partition, and beside it a pause where no shelf keeps that.
//!
//! The note of a pause stands at every partition that was read when it was ordered, so whoever reads one of them next pauses too.

use rdkafka::{Offset, TopicPartitionList};

use super::message;
use crate::source::{Reach, StoredPause};

/// How the note of a pause begins; notes of other programs are none of ours.
const PAUSE: &str = "walflow pause ";
/// What an operator's words are cut to, in characters: a broker takes 4096 bytes by default, and one may become six.
const LONGEST_NOTE: usize = 500;

/// Where these parts go on.
pub(super) fn list(topic: &str, reach: &Reach, parts: &[u16]) -> TopicPartitionList {
    noted(topic, reach, parts, None)
}

/// The same as a group keeps it, with its pause.
pub(super) fn noted(topic: &str, reach: &Reach, parts: &[u16], pause: Option<&StoredPause>) -> TopicPartitionList {
    let note = pause.and_then(written);
    let mut list = TopicPartitionList::with_capacity(parts.len());
    for part in parts {
        let (partition, offset) = message::next_offset(reach.of(*part));
        let mut element = list.add_partition(topic, partition);
        // An offset that a partition cannot have is none of ours.
        let _ = element.set_offset(Offset::Offset(offset));
        if let Some(note) = &note {
            element.set_metadata(note);
        }
    }
    list
}

/// The pause that a group keeps at one of these partitions.
pub(super) fn pause(committed: &TopicPartitionList) -> Option<StoredPause> {
    committed.elements().iter().find_map(|part| serde_json::from_str(part.metadata().strip_prefix(PAUSE)?).ok())
}

fn written(pause: &StoredPause) -> Option<String> {
    let note: String = pause.note.chars().take(LONGEST_NOTE).collect();
    let pause = serde_json::to_string(&StoredPause { note: note.into(), ..pause.clone() }).ok()?;
    Some(format!("{PAUSE}{pause}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Position;
    use crate::testing::NEW_YEAR;

    fn of(note: &str) -> StoredPause {
        StoredPause { cause: "operator".into(), note: note.into(), since: NEW_YEAR }
    }

    #[test]
    fn a_pause_is_read_back_from_beside_the_offsets_and_notes_of_others_are_none() {
        let reach = Reach::from(Position::in_part(3, 8));
        let list = noted("t", &reach, &[3], Some(&of("moving \"house\"\0")));
        assert_eq!(pause(&list), Some(of("moving \"house\"\0")));
        assert_eq!(list.elements()[0].offset(), Offset::Offset(8));
        assert_eq!(pause(&noted("t", &reach, &[3], None)), None);
        let mut others = TopicPartitionList::new();
        others.add_partition("t", 0).set_metadata("{\"cause\":\"operator\"}");
        assert_eq!(pause(&others), None);
    }

    #[test]
    fn the_longest_words_fit_into_what_a_broker_takes() {
        let note = "\u{1}".repeat(10_000);
        let written = written(&of(&note)).unwrap();
        assert!(written.len() < 4_096, "{} bytes", written.len());
        assert!(pause(&noted("t", &Reach::none(), &[0], Some(&of(&note)))).is_some());
    }
}
