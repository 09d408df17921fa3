//! A namespace's compiled chain: the plan (pure, printable) and the tasks that run it.

mod branches;
mod epoch;
mod make;
pub mod plan;
pub mod revisions;

pub use epoch::{EpochError, from_epoch};
pub use make::{Made, make};
