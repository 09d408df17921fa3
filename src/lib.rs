#![doc = include_str!("ARCHITECTURE.md")]

pub mod clock;

pub mod telemetry;
pub mod units;

pub mod connection;
pub mod record;
pub mod retry;

pub mod source;

pub mod transform;

pub mod sink;

pub mod delay;

pub mod replicate;

pub mod ingest;

pub mod spec;

pub mod pipeline;

pub mod console;

pub mod service;

pub mod cli;

#[cfg(test)]
mod testing;
