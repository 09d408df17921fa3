//! A namespace's compiled chain: the plan (pure, printable) and the tasks that run it.

pub mod branch;
mod branches;
mod dry_run;
mod epoch;
mod make;
pub mod plan;
mod print;
mod report;
pub mod revisions;
mod sources;

pub use dry_run::{DryRun, dry_run, dry_run_with};
pub use epoch::{EpochError, from_epoch};
pub use make::{Made, make};
pub use report::{BranchReport, Fact, Figures, Report};
