//! Signatures after Standard Webhooks: `v1,` and the HMAC-SHA256 of `id.timestamp.body`, one for each secret.
//!
//! Takes secrets as they are written (`whsec_` and base64, several with spaces between them while they are rotated). Never
//! shows one, not in an error and not by `Debug`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretBox};
use sha2::Sha256;

/// A text holds no usable secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SecretError {
    #[error("the secret is empty")]
    Empty,
    #[error("a secret is `whsec_` and base64; this one is no base64")]
    NotBase64,
    #[error("a secret is 24 to 64 bytes in base64; this one has {0}")]
    Length(usize),
}

/// The secrets that sign, the newest first.
#[derive(Debug)]
pub(super) struct Secrets(Vec<SecretBox<[u8]>>);

impl Secrets {
    pub(super) fn parse(text: &str) -> Result<Self, SecretError> {
        let secrets = text.split_ascii_whitespace().map(|secret| {
            let encoded = secret.strip_prefix("whsec_").unwrap_or(secret);
            let bytes = STANDARD.decode(encoded).map_err(|_| SecretError::NotBase64)?;
            match bytes.len() {
                24..=64 => Ok(SecretBox::from(bytes.into_boxed_slice())),
                length => Err(SecretError::Length(length)),
            }
        });
        let secrets = secrets.collect::<Result<Vec<_>, _>>()?;
        if secrets.is_empty() { Err(SecretError::Empty) } else { Ok(Self(secrets)) }
    }

    /// The value of `webhook-signature`.
    pub(super) fn sign(&self, id: &str, timestamp: &str, body: &[u8]) -> String {
        let signatures = self.0.iter().filter_map(|secret| {
            // A key of any length is a key.
            let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose_secret()).ok()?;
            for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
                mac.update(part);
            }
            Some(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
        });
        signatures.collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    #[test]
    fn the_published_example_is_signed_as_published() {
        let signature = Secrets::parse(SECRET).unwrap().sign(
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            "1614265330",
            br#"{"test": 2432232314}"#,
        );
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn each_secret_signs_while_they_are_rotated() {
        let other = format!("whsec_{}", STANDARD.encode([7; 24]));
        let both = Secrets::parse(&format!("{other}  {SECRET}\n")).unwrap().sign("i", "1", b"b");
        let parts: Vec<&str> = both.split(' ').collect();
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[0], Secrets::parse(&other).unwrap().sign("i", "1", b"b"));
        assert_eq!(parts[1], Secrets::parse(SECRET).unwrap().sign("i", "1", b"b"));
        assert_ne!(parts[0], parts[1]);
    }

    #[test]
    fn a_wrong_secret_is_refused_without_being_shown() {
        assert_eq!(Secrets::parse(" ").unwrap_err(), SecretError::Empty);
        assert_eq!(Secrets::parse("whsec_???canary").unwrap_err(), SecretError::NotBase64);
        assert_eq!(Secrets::parse(&STANDARD.encode([1; 23])).unwrap_err(), SecretError::Length(23));
        assert_eq!(Secrets::parse(&STANDARD.encode([1; 65])).unwrap_err(), SecretError::Length(65));
        assert!(Secrets::parse(&STANDARD.encode([1; 64])).is_ok());
        assert!(!format!("{:?}", Secrets::parse(SECRET).unwrap()).contains("MfKQ"));
        assert!(!SecretError::NotBase64.to_string().contains("canary"));
    }
}
