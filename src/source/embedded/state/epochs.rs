//! Revisions in `state.db`, and which of them nobody needs any more.

use rusqlite::{OptionalExtension as _, params};

use super::{State, StateError, failed};
use crate::source::embedded::change::NamespaceNumber;

/// The revision of the first record that some branch may still look at: the one after the lowest cursor, or an earlier
/// one that is set aside or dead. Each part is one seek; no branch at all means that one is about to be opened.
const NEEDED: &str = "
SELECT max(number) FROM epochs WHERE namespace = ?1 AND after < (SELECT min(position) FROM (
  SELECT cursor + 1 AS position FROM branches WHERE namespace = ?1
  UNION ALL SELECT (SELECT min(position) FROM aside WHERE namespace = ?1 AND branch = name) FROM branches WHERE namespace = ?1
  UNION ALL SELECT (SELECT min(position) FROM dead WHERE namespace = ?1 AND branch = name) FROM branches WHERE namespace = ?1))";

impl State {
    /// Forgets the revisions before the oldest that is needed. Gives the number of that one, when any went.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn forget_epochs(&mut self, namespace: NamespaceNumber) -> Result<Option<u32>, StateError> {
        let path = self.path.clone();
        let query = |state: &Self| {
            let mut needed = state.db.prepare_cached(NEEDED)?;
            let needed: Option<u32> = needed.query_row([namespace.0], |row| row.get(0)).optional()?.flatten();
            let Some(needed) = needed else { return Ok(None) };
            let mut older = state.db.prepare_cached("SELECT 1 FROM epochs WHERE namespace = ? AND number < ?")?;
            Ok(older.exists(params![namespace.0, needed])?.then_some(needed))
        };
        let Some(needed) = query(self).map_err(failed(&path, "look for old revisions"))? else { return Ok(None) };
        self.begin()?;
        let forget = "DELETE FROM epochs WHERE namespace = ? AND number < ?";
        self.db.execute(forget, params![namespace.0, needed]).map_err(failed(&path, "forget old revisions"))?;
        Ok(Some(needed))
    }
}
