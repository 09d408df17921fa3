#![doc = include_str!("ARCHITECTURE.md")]

pub mod clock;
pub mod record;
pub mod sink;
pub mod source;
pub mod transform;
pub mod units;
