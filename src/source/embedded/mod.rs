//! The embedded log and shelf: one journal for every namespace, with segments and `state.db` settling behind it.

pub mod change;
