//! Every integration test, one file a promise, in one binary.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::print_stderr,
    clippy::format_push_string,
    reason = "a test that cannot go on fails, and says what it saw"
)]
#![expect(unreachable_pub, reason = "the files share what the harness offers")]

mod backends;
mod command;
mod config;
mod crash;
mod dead_letters;
mod epochs;
mod harness;
mod hop;
mod hostile;
mod http;
mod kafka;
mod kafka_faults;
mod kafka_security;
mod moving;
mod outage;
mod proxy;
mod quickstart;
mod real_data;
mod redis_owner;
mod redis_shelf;
mod redis_source;
mod reload;
mod secrets;
mod servers;
mod settings;
mod sharing;
mod shutdown;
mod sink_conformance;
mod source_faults;
mod spec_errors;
mod tree;
