//! The one TLS implementation of the process, chosen once.
//!
//! Several libraries share rustls and bring no cryptography of their own; without a choice their first connection panics.

use std::sync::Once;

/// Chooses the cryptography for every TLS connection of the process; calling it again does nothing.
pub fn provider() {
    static CHOSEN: Once = Once::new();
    CHOSEN.call_once(|| {
        // It fails only when somebody chose before, which serves as well.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    });
}
