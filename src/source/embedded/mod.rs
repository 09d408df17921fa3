//! The embedded log and shelf: one journal for every namespace, with segments and `state.db` settling behind it.

pub mod body;
pub mod change;
pub mod disk;
pub mod due;
pub mod frame;
pub mod keys;
pub mod state;
#[cfg(test)]
mod testing;
