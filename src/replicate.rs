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
    /// The record came over from another region, which has sent it to all others itself: it goes no further.
    CameOver,
}

/// Whether the branch of `sink` in `region`, a target of `kind`, is meant for the record; `here` is the region of this
/// instance, where the file names one.
///
/// With three regions that all send to each other it is not enough to send nothing back: the other two would go on
/// between them for ever.
pub fn meant_for(record: &Record, sink: &str, region: Option<&str>, kind: TargetKind, here: Option<&str>) -> Meant {
    if let (Some(origin), Some(region)) = (record.origin.as_deref(), region) {
        if origin == region {
            return Meant::CameFromHere;
        }
        if here.is_some_and(|here| here != origin && here != region) {
            return Meant::CameOver;
        }
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
        let meant = |origin, region| meant_for(&record(None, origin), "redis", region, TargetKind::Cache, None);
        assert_eq!(meant(None, Some("eu")), Meant::Here);
        assert_eq!(meant(Some("eu"), Some("eu")), Meant::CameFromHere);
        assert_eq!(meant(Some("us"), None), Meant::Here);
        assert_eq!(meant(Some("us"), Some("eu")), Meant::Here, "an instance of no region passes on");
    }

    #[test]
    fn in_a_full_mesh_each_region_gets_each_record_once_from_where_it_was_written() {
        let regions = ["ap", "eu", "us"];
        for written in regions {
            let mut arrived = Vec::new();
            let mut under_way = vec![written];
            while let Some(here) = under_way.pop() {
                for region in regions {
                    let record = record(None, Some(written));
                    let meant = meant_for(&record, "http", Some(region), TargetKind::Http, Some(here));
                    assert!(arrived.len() < 10, "it circulates: {arrived:?}");
                    match meant {
                        Meant::Here if region == here => arrived.push(region),
                        Meant::Here => under_way.push(region),
                        _ => {}
                    }
                }
            }
            arrived.sort_unstable();
            let others: Vec<&str> = regions.into_iter().filter(|region| *region != written).collect();
            assert_eq!(arrived, others, "written in {written}");
        }
    }

    #[test]
    fn kind_regions_and_sinks_each_narrow() {
        let target = |kind, regions: &[&str], sinks: &[&str]| {
            let texts = |words: &[&str]| words.iter().map(ToString::to_string).collect();
            record(Some(Target { kind, regions: texts(regions), sinks: texts(sinks) }), None)
        };
        let fits = |record: &Record| meant_for(record, "redis", Some("eu"), TargetKind::Cache, None) == Meant::Here;
        assert!(fits(&target(Some(TargetKind::Cache), &["us", "eu"], &["redis"])));
        assert!(!fits(&target(Some(TargetKind::Database), &[], &[])));
        assert!(!fits(&target(None, &["us"], &[])));
        assert!(!fits(&target(None, &[], &["audit"])));
    }
}
