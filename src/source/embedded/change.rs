//! What a frame's body says: one change of one namespace. The journal carries these; views apply them.

use bytes::Bytes;

use crate::clock::Timestamp;
use crate::record::{Position, RecordId};
use crate::source::{AsideRow, BranchName, DeadLetter, IdempotencyKey, RowKey, StoredPause};

/// A place in the journal: counts frames of all namespaces, from 1. Never used twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sequence(pub u64);

/// A namespace's number; never reused, 24 bits, starts at 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceNumber(pub u32);

/// A parked row's name: the sequence of the frame that parked (or moved) it.
pub type ParkedAt = Sequence;

/// One change. A frame carries all that each view needs: no view reads another to replay (LOG.md 3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A record entered the log.
    Append {
        /// Its place in the namespace's log.
        position: Position,
        /// The encoded record.
        record: Bytes,
        /// The idempotency key that came with it.
        idempotency: Option<IdempotencyKey>,
    },
    /// A record was parked until it is due.
    Park {
        /// When it is due.
        due_at: Timestamp,
        /// The encoded record.
        record: Bytes,
        /// The idempotency key that came with it.
        idempotency: Option<IdempotencyKey>,
    },
    /// A parked record entered the log.
    Release {
        /// Its place in the namespace's log.
        position: Position,
        /// The row that is released.
        parked: ParkedAt,
        /// When it was due.
        due_at: Timestamp,
        /// The encoded record, again.
        record: Bytes,
    },
    /// A parked record was cancelled.
    Cancel {
        /// The row that is cancelled.
        parked: ParkedAt,
        /// When it was due.
        due_at: Timestamp,
        /// Its id, for look-ups.
        id: RecordId,
    },
    /// A parked record moved to another time.
    Move {
        /// The row that moves; the new row's name is this frame's sequence.
        parked: ParkedAt,
        /// When it was due.
        from: Timestamp,
        /// When it is due now.
        due_at: Timestamp,
        /// The encoded record, again.
        record: Bytes,
    },
    /// A branch's frontier moved.
    Cursor {
        /// The branch.
        branch: BranchName,
        /// Everything at or below has ended.
        position: Position,
    },
    /// A delivery was set aside, or its attempts and next try changed.
    Aside {
        /// The branch.
        branch: BranchName,
        /// The row, with the record.
        row: Box<AsideRow>,
    },
    /// A set-aside delivery ended well.
    Returned {
        /// The branch.
        branch: BranchName,
        /// The row.
        row: RowKey,
    },
    /// A delivery ended in the dead letters.
    Dead {
        /// The letter, with the record and the branch.
        letter: Box<DeadLetter>,
    },
    /// A dead letter's key has moved on.
    Overtaken {
        /// The branch.
        branch: BranchName,
        /// The row.
        row: RowKey,
    },
    /// A dead letter went back to its branch: it leaves the dead letters and is set aside as `row`.
    Replay {
        /// The branch.
        branch: BranchName,
        /// The row, with the record.
        row: Box<AsideRow>,
    },
    /// A dead letter was deleted. A tombstone stays until the cursor has passed (LOG.md 10).
    Purge {
        /// The branch.
        branch: BranchName,
        /// The row.
        row: RowKey,
    },
    /// A filter or script ended a delivery without sending it.
    Dropped {
        /// The branch.
        branch: BranchName,
        /// The record's place.
        position: Position,
        /// By what.
        reason: Box<str>,
    },
    /// Careful mode: the branch is about to try this record.
    Mark {
        /// The branch.
        branch: BranchName,
        /// The record's place.
        position: Position,
    },
    /// A pause that survives restarts was set or cleared.
    Pause {
        /// The branch.
        branch: BranchName,
        /// The pause; `None` = cleared.
        pause: Option<StoredPause>,
    },
    /// A branch exists from here on.
    BranchOpened {
        /// The branch.
        branch: BranchName,
        /// Its first cursor.
        position: Position,
    },
    /// A branch and all its rows are gone.
    BranchForgotten {
        /// The branch.
        branch: BranchName,
    },
    /// A branch goes on under another name.
    BranchRenamed {
        /// What it was called.
        from: BranchName,
        /// What it is called now.
        to: BranchName,
    },
    /// A revision of the pipeline file is in force for records after this position.
    Epoch {
        /// Its number.
        number: u32,
        /// The newest position when it came.
        after: Position,
        /// The files, unexpanded.
        files: Bytes,
    },
    /// Records up to here were trimmed away by retention (LOG.md 5).
    Trim {
        /// The first position that is kept.
        first: Position,
    },
    /// A namespace was created under this frame's number.
    NamespaceCreated {
        /// Its name.
        name: Box<str>,
    },
    /// A namespace and all it had is gone.
    NamespaceDeleted,
    /// The instance started; `clean` says whether the last stop was orderly. Counts unclean stops (LOG.md 15).
    Started {
        /// The last stop was orderly.
        clean: bool,
    },
    /// The instance stops orderly.
    Stopped,
}

/// One frame, decoded: its place and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its place in the journal.
    pub sequence: Sequence,
    /// Whose change it is; 0 = the instance's own.
    pub namespace: NamespaceNumber,
    /// When it was written: the log's monotonic time, the one from which ids are drawn (LOG.md 18).
    pub time: Timestamp,
    /// What it says.
    pub change: Change,
}
