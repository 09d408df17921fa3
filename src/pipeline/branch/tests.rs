//! Each rule of a branch, on the log in memory with a scripted target.
