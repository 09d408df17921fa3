//! walflow, the program: parse, call, exit.

fn main() {}
