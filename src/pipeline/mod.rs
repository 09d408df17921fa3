//! A namespace's compiled chain: the plan (pure, printable) and the tasks that run it.

pub mod plan;
pub mod revisions;
