//! Every integration test, one file a promise, in one binary.

mod crash;
mod harness;
mod hostile;
mod outage;
mod quickstart;
mod real_data;
mod reload;
mod shutdown;
mod sink_conformance;
mod spec_errors;
mod tree;
