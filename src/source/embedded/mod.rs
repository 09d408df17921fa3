//! The embedded log and shelf: one journal for every namespace, with segments and `state.db` settling behind it.
//!
//! # On disk
//!
//! ```text
//! data/LOCK                       held by the running process; says its pid
//! data/FORMAT                     the version of this layout
//! data/FENCED                     a sync failed: the next start copies state.db before it trusts it
//! data/journal/0000000007.wal     the truth of what is not yet checkpointed; made full of zeros, recycled
//! data/BALLAST                    given up when the disk is full, so that acks can be stored
//! data/journal/0000000003.spare   a file that is ready to become the next one
//! data/segments/12/00…01.seg      the records of namespace 12 from position 1 on, frames as in the journal
//! data/segments/12/00…01.idx      its sidecar: sparse places, ids out of order, what was dropped
//! data/state.db                   SQLite: what waits, what failed, cursors, keys, revisions
//! data/cut/…                      torn tails, kept for somebody who wants to look
//! ```
//!
//! All integers are little-endian. A journal file starts with a header block of 4,096 bytes (magic `walflowJ`, version u32,
//! salt u32, number u64, first sequence u64, CRC-32C u32), a segment with one of 32 (magic `walflowS`, version u32,
//! namespace u32, first position u64, salt u32, CRC-32C u32). Then frames follow:
//!
//! ```text
//! magic 2 · version 1 · kind 1 · flags 1 · reserved · body length 4 · namespace 4 · sequence 8 · durable 8 · left 4 ·
//! time 8 · body CRC 4 · header CRC 4            see `frame`; the header CRC is seeded with the file's salt
//! body: entries of tag 1 · length 4 · bytes     see `body`; unknown tags are skipped
//! ```
//!
//! `durable` is the sequence that was durable when the frame was written, so a later frame proves that earlier damage is
//! rot and no torn tail. `left` counts the frames of the same group that still follow: a group counts whole or not at all.

mod age;
mod ballast;
mod batch;
pub mod body;
pub mod change;
pub mod disk;
pub mod due;
pub mod frame;
mod gone;
pub mod index;
pub mod inspect;
pub mod journal;
pub mod keys;
mod log;
mod namespace;
pub mod options;
mod queue;
mod reader;
mod recovery;
mod retention;
mod salvage;
pub mod scan;
pub mod segment;
mod settle;
mod settling;
mod shared;
mod space;
pub mod state;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
mod writer;

pub use log::Embedded;
pub use namespace::EmbeddedNamespace;
pub use options::{NamespaceSettings, Options};
pub use recovery::OpenError;
pub use shared::{Counters, Health};

use log::scheduled_step;

/// The file that says that a sync has failed.
const FENCED: &str = "FENCED";

/// What fills a file that is made ahead, and what was never written to one.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Whether the disk, or the quota on it, is full.
fn is_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}
