//! How much lies in `state.db`, counted as changes are applied, so that no scrape has to count rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use rusqlite::{Connection, params};

use super::super::change::NamespaceNumber;
use super::{number, sql};
use crate::source::BranchName;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Parked,
    Aside,
    Dead,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Parked, Self::Aside, Self::Dead];

    const fn name(self) -> &'static str {
        match self {
            Self::Parked => "parked",
            Self::Aside => "aside",
            Self::Dead => "dead",
        }
    }
}

type Counted = BTreeMap<(NamespaceNumber, Kind, BranchName), (u64, u64)>;

/// Rows and bytes by namespace and branch. Cheap to clone; shared.
#[derive(Clone, Debug, Default)]
pub struct Counts(Arc<Mutex<Counted>>);

impl Counts {
    pub(super) fn add(&self, namespace: NamespaceNumber, kind: Kind, branch: &BranchName, rows: i64, bytes: i64) {
        let mut counted = self.0.lock();
        let entry = counted.entry((namespace, kind, branch.clone())).or_default();
        entry.0 = entry.0.saturating_add_signed(rows);
        entry.1 = entry.1.saturating_add_signed(bytes);
    }

    pub(super) fn forget(&self, namespace: NamespaceNumber, branch: Option<&BranchName>) {
        self.0.lock().retain(|(of, kind, name), _| {
            *of != namespace || branch.is_some_and(|branch| branch != name || *kind == Kind::Parked)
        });
    }

    pub(super) fn rename(&self, namespace: NamespaceNumber, from: &BranchName, to: &BranchName) {
        let mut counted = self.0.lock();
        for kind in Kind::ALL {
            if let Some(count) = counted.remove(&(namespace, kind, from.clone())) {
                counted.insert((namespace, kind, to.clone()), count);
            }
        }
    }

    /// Parked records of a namespace and their bytes.
    pub fn parked(&self, namespace: NamespaceNumber) -> (u64, u64) {
        let key = (namespace, Kind::Parked, BranchName::from_stored(""));
        self.0.lock().get(&key).copied().unwrap_or_default()
    }

    /// The namespaces that have parked records.
    pub fn parking(&self) -> Vec<NamespaceNumber> {
        let counted = self.0.lock();
        let parking = counted.iter().filter(|((_, kind, _), (rows, _))| *kind == Kind::Parked && *rows > 0);
        parking.map(|((namespace, ..), _)| *namespace).collect()
    }

    fn by_branch(&self, namespace: NamespaceNumber, wanted: Kind) -> Vec<(BranchName, u64, u64)> {
        let counted = self.0.lock();
        let own = counted.iter().filter(|((of, kind, _), (rows, _))| *of == namespace && *kind == wanted && *rows > 0);
        own.map(|((_, _, branch), (rows, bytes))| (branch.clone(), *rows, *bytes)).collect()
    }

    /// By branch: rows set aside.
    pub fn aside(&self, namespace: NamespaceNumber) -> Vec<(BranchName, u64)> {
        self.by_branch(namespace, Kind::Aside).into_iter().map(|(branch, rows, _)| (branch, rows)).collect()
    }

    /// By branch: dead letters and their bytes.
    pub fn dead(&self, namespace: NamespaceNumber) -> Vec<(BranchName, u64, u64)> {
        self.by_branch(namespace, Kind::Dead)
    }

    pub(super) fn load(&self, db: &Connection) -> rusqlite::Result<()> {
        let mut counted = Counted::new();
        let mut rows = db.prepare("SELECT namespace, branch, kind, rows, bytes FROM counts")?;
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            let (namespace, branch): (u32, String) = (row.get(0)?, row.get(1)?);
            let name: String = row.get(2)?;
            if let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == name) {
                let key = (NamespaceNumber(namespace), kind, BranchName::from_stored(&branch));
                counted.insert(key, (number(row.get(3)?), number(row.get(4)?)));
            }
        }
        *self.0.lock() = counted;
        Ok(())
    }

    pub(super) fn store(&self, db: &Connection) -> rusqlite::Result<()> {
        let counted = self.0.lock().clone();
        db.execute("DELETE FROM counts", [])?;
        let mut insert =
            db.prepare_cached("INSERT INTO counts (namespace, branch, kind, rows, bytes) VALUES (?, ?, ?, ?, ?)")?;
        for ((namespace, kind, branch), (rows, bytes)) in counted.iter().filter(|(_, (rows, _))| *rows > 0) {
            insert.execute(params![namespace.0, branch.as_str(), kind.name(), sql(*rows), sql(*bytes)])?;
        }
        Ok(())
    }
}
