//! Every integration test, one file a promise, in one binary.

mod tree;
