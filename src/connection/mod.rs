//! How to reach servers that both a source and a sink may speak to: addresses, TLS, who we are, shared clients.
//!
//! Knows no record and no pipeline. A connection is made when it is needed and made again when it breaks.

pub mod kafka;
pub mod postgres;
pub mod probe;
pub mod sqs;
pub mod tls;
