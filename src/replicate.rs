//! Regions: which branch a record is meant for, by the client's wish and by where it came from.
//!
//! Takes a record and a branch's region, sink and kind of target; says whether the branch may take it. It only
//! narrows: no record reaches a target that the file does not declare.

use crate::record::{Record, TargetKind};

/// Whether a branch is meant for a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meant {
    /// Yes.
    Here,
    /// The write's `target` chose others.
    Elsewhere,
    /// The record came from this very region: sending it back would make a loop.
    CameFromHere,
}

/// Whether the branch of `sink` in `region`, a target of `kind`, is meant for the record.
pub fn meant_for(record: &Record, sink: &str, region: Option<&str>, kind: TargetKind) -> Meant {
    if record.origin.is_some() && record.origin.as_deref() == region {
        return Meant::CameFromHere;
    }
    let Some(target) = &record.target else { return Meant::Here };
    let kind_fits = target.kind.is_none_or(|wanted| wanted == kind);
    let region_fits =
        target.regions.is_empty() || region.is_none_or(|region| target.regions.iter().any(|wanted| wanted == region));
    let sink_fits = target.sinks.is_empty() || target.sinks.iter().any(|wanted| wanted == sink);
    if kind_fits && region_fits && sink_fits { Meant::Here } else { Meant::Elsewhere }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::clock::Timestamp;
    use crate::record::{RecordId, Target};

    fn record(target: Option<Target>, origin: Option<&str>) -> Record {
        let bare = Record::new(RecordId::new(Timestamp::MIN, 0, 1, 0), Timestamp::MIN, Bytes::new());
        Record { target, origin: origin.map(Into::into), ..bare }
    }

    #[test]
    fn a_write_without_a_target_goes_everywhere_but_to_where_it_came_from() {
        assert_eq!(meant_for(&record(None, None), "redis", Some("eu"), TargetKind::Cache), Meant::Here);
        assert_eq!(meant_for(&record(None, Some("eu")), "redis", Some("eu"), TargetKind::Cache), Meant::CameFromHere);
        assert_eq!(meant_for(&record(None, Some("us")), "redis", None, TargetKind::Cache), Meant::Here);
    }

    #[test]
    fn kind_regions_and_sinks_each_narrow() {
        let target = |kind, regions: &[&str], sinks: &[&str]| {
            let texts = |words: &[&str]| words.iter().map(ToString::to_string).collect();
            record(Some(Target { kind, regions: texts(regions), sinks: texts(sinks) }), None)
        };
        let fits = |record: &Record| meant_for(record, "redis", Some("eu"), TargetKind::Cache) == Meant::Here;
        assert!(fits(&target(Some(TargetKind::Cache), &["us", "eu"], &["redis"])));
        assert!(!fits(&target(Some(TargetKind::Database), &[], &[])));
        assert!(!fits(&target(None, &["us"], &[])));
        assert!(!fits(&target(None, &[], &["audit"])));
    }
}
