//! A file of zeros that is given up when the disk is full, so that acks, trims and `state.db` still find room.
//!
//! It never holds anything; losing it loses nothing.

use std::io;

use super::ZEROS;
use super::disk::Access;
use super::options::Options;

/// Makes the ballast if it is not there, all of it or none.
///
/// # Errors
/// When the disk has no room for it.
pub(super) fn keep(options: &Options) -> io::Result<()> {
    let path = options.data.join("BALLAST");
    let wanted = options.ballast_bytes;
    if options.disk.open(&path, Access::Read).and_then(|file| file.size()).is_ok_and(|size| size >= wanted) {
        return Ok(());
    }
    let made = options.disk.open(&path, Access::Create).and_then(|file| {
        let mut at = 0;
        while at < wanted {
            let len = usize::try_from((wanted - at).min(ZEROS.len() as u64)).unwrap_or(ZEROS.len());
            file.write_all_at(ZEROS.get(..len).unwrap_or(&ZEROS), at)?;
            at += len as u64;
        }
        file.sync()
    });
    made.inspect_err(|_| give_up(options))
}

/// Gives its room back.
pub(super) fn give_up(options: &Options) {
    // Not being there is just as well.
    let _ = options.disk.remove(&options.data.join("BALLAST"));
}
