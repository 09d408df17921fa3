//! Redis as a log, on real servers.
