//! Who may call: nobody is asked where there are no keys, everybody where there are.

use http::{HeaderMap, StatusCode};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::reply::Problem;

/// The keys, as digests.
#[derive(Clone, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// These keys.
    pub fn new(keys: &[SecretString]) -> Self {
        Self(keys.iter().map(|key| Sha256::digest(key.expose_secret().as_bytes()).into()).collect())
    }

    /// Lets the caller through, or not. Takes the same time for every wrong key.
    ///
    /// # Errors
    /// 401.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), Problem> {
        if self.0.is_empty() {
            return Ok(());
        }
        let bearer = || {
            let text = headers.get("authorization")?.to_str().ok()?;
            let (scheme, key) = text.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
        };
        let given = headers.get("x-api-key").and_then(|key| key.to_str().ok()).or_else(bearer).unwrap_or_default();
        let digest: [u8; 32] = Sha256::digest(given.as_bytes()).into();
        let mut known = subtle::Choice::from(0);
        for key in &self.0 {
            known |= key.ct_eq(&digest);
        }
        if bool::from(known) {
            return Ok(());
        }
        let detail = "give a key in the header X-API-Key, or as Authorization: Bearer";
        Err(Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", detail))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_known_key_is_let_through_and_without_keys_everybody() {
        let keys = Keys::new(&["one".to_owned().into(), "two".to_owned().into()]);
        let with = |name: &'static str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            headers
        };
        assert!(keys.check(&with("x-api-key", "two")).is_ok());
        assert!(keys.check(&with("authorization", "Bearer one")).is_ok());
        for headers in
            [HeaderMap::new(), with("x-api-key", ""), with("x-api-key", "three"), with("authorization", "one")]
        {
            assert_eq!(keys.check(&headers).unwrap_err().status.as_u16(), 401);
        }
        assert!(Keys::default().check(&HeaderMap::new()).is_ok());
    }
}
