//! What unit tests of several parts share.

use std::fs;
use std::path::Path;

/// Compares a generated text with the file that is checked in; `WALFLOW_REGENERATE=1` writes the file anew.
pub(crate) fn checked_in(path: &str, generated: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("WALFLOW_REGENERATE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, generated).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    let how = "run `WALFLOW_REGENERATE=1 cargo test --lib checked_in` and look at the difference";
    assert!(found == generated, "{} differs from the code; {how}", path.display());
}
