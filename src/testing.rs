//! What unit tests of several parts share.

use std::fs;
use std::path::Path;

use bytes::Bytes;

use crate::clock::Timestamp;
use crate::record::{Record, RecordId};

/// The binary's own, since scripts are bounded by its count.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// 2021-01-01T00:00:00Z.
pub(crate) const NEW_YEAR: Timestamp = Timestamp::from_millis(1_609_459_200_000);

/// A record written at [`NEW_YEAR`] with this payload and nothing else.
pub(crate) fn record(payload: &str) -> Record {
    let payload = Bytes::copy_from_slice(payload.as_bytes());
    Record { epoch: 1, ..Record::new(RecordId::new(NEW_YEAR, 1, 7, 42), NEW_YEAR, payload) }
}

/// Compares a generated text with the file that is checked in; `WALFLOW_REGENERATE=1` writes the file anew.
pub(crate) fn checked_in(path: &str, generated: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("WALFLOW_REGENERATE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, generated).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    let how = "run `WALFLOW_REGENERATE=1 cargo test --lib checked_in` and look at the difference";
    assert!(found == generated, "{} differs from the code; {how}", path.display());
}
