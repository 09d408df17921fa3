//! How to reach a PostgreSQL server: the address, TLS, and what its errors mean to a person.

use std::io;
use std::path::Path;
use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, PoolError, RecyclingMethod, Runtime, Timeouts};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{CertificateError, ClientConfig, RootCertStore};
use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::tls;

/// A server that can be connected to.
#[derive(Clone)]
pub struct Address {
    config: tokio_postgres::Config,
    tls: MakeRustlsConnect,
    shown: Arc<str>,
}

/// Checks an address without using it. The text itself is never shown: it may hold a password.
///
/// # Errors
/// What is wrong with it.
pub fn check(url: &str) -> Result<(), String> {
    parse(url).map(|_| ())
}

fn parse(url: &str) -> Result<tokio_postgres::Config, String> {
    if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
        return Err("the URL does not begin with postgres://".to_owned());
    }
    for parameter in url.split(['?', '&']).skip(1) {
        match parameter.split_once('=') {
            // To those who write them they mean a certificate that nobody looks at.
            Some(("sslmode", mode @ ("prefer" | "allow"))) => {
                return Err(format!(
                    "sslmode={mode} takes whatever the server offers, also a certificate for which nobody vouches, and that \
                     walflow never does: write sslmode=require for TLS only (certificate and host name are checked), \
                     sslmode=disable for none, or leave it out for TLS, with the same check, where the server offers it"
                ));
            }
            Some(("sslrootcert", _)) => return Err("sslrootcert does not go into the URL: write ca_file".to_owned()),
            Some((name @ ("sslcert" | "sslkey"), _)) => {
                return Err(format!("{name} does not work: a client's certificate is not supported, write a password"));
            }
            _ => {}
        }
    }
    // The certificate is always checked where there is TLS, so these all mean the same here.
    let url = url.replace("sslmode=verify-full", "sslmode=require").replace("sslmode=verify-ca", "sslmode=require");
    let config = tokio_postgres::Config::from_str(&url).map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        format!("the URL does not work: {}", cause.unwrap_or_else(|| "it is malformed".to_owned()))
    })?;
    if config.get_hosts().is_empty() {
        return Err("the URL names no host".to_owned());
    }
    Ok(config)
}

/// Host, port and database of an address, for messages; nothing of one that cannot be read, for where its password begins
/// and ends nobody knows.
pub fn place(url: &str) -> String {
    parse(url).map_or_else(|_| "with an address that cannot be read".to_owned(), |config| place_of(&config))
}

fn place_of(config: &tokio_postgres::Config) -> String {
    let host = match config.get_hosts().first() {
        Some(tokio_postgres::config::Host::Tcp(host)) => host,
        _ => "its socket",
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let database = config.get_dbname().or(config.get_user()).unwrap_or_default();
    format!("{host}:{port}/{database}")
}

impl Address {
    /// Reads an address and the certificates that vouch for it; connects to nothing.
    ///
    /// # Errors
    /// What is wrong with the address or the file.
    pub fn new(url: &str, ca_file: Option<&str>, timeout: Duration) -> Result<Self, String> {
        tls::provider();
        let mut config = parse(url)?;
        config.connect_timeout(timeout.min(Duration::from_secs(10)));
        config
            .tcp_user_timeout(timeout)
            .keepalives(true)
            .keepalives_idle(Duration::from_secs(30))
            .application_name("walflow");
        config.options(format!(
            "{} -c statement_timeout={} -c idle_in_transaction_session_timeout=60000",
            config.get_options().unwrap_or_default(),
            timeout.as_millis()
        ));
        let mut roots = RootCertStore::empty();
        if let Some(file) = ca_file {
            let unusable = |why: String| format!("{file}: {why}");
            let certificates =
                CertificateDer::pem_file_iter(Path::new(file)).map_err(|error| unusable(error.to_string()))?;
            for certificate in certificates {
                let certificate = certificate.map_err(|error| unusable(error.to_string()))?;
                roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
            }
        } else if config.get_ssl_mode() != SslMode::Disable {
            // One that cannot be read vouches for nobody; the others still do.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        let client = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let shown = format!("postgres {}", place_of(&config)).into();
        Ok(Self { config, tls: MakeRustlsConnect::new(client), shown })
    }

    /// Host, port and database, for messages.
    pub const fn shown(&self) -> &Arc<str> {
        &self.shown
    }

    /// The user, for messages.
    pub fn user(&self) -> &str {
        self.config.get_user().unwrap_or_default()
    }

    /// Connections that are kept and lent. Connects when they are asked for.
    ///
    /// # Errors
    /// When a pool cannot be made of these settings.
    pub fn pool(&self, size: usize, timeout: Duration) -> Result<Pool, String> {
        let manager = Manager::from_config(
            self.config.clone(),
            self.tls.clone(),
            ManagerConfig { recycling_method: RecyclingMethod::Fast },
        );
        let timeouts = Timeouts { wait: Some(timeout), create: Some(timeout), recycle: Some(timeout) };
        let pool = Pool::builder(manager).max_size(size).runtime(Runtime::Tokio1).timeouts(timeouts);
        pool.build().map_err(|error| error.to_string())
    }

    /// A connection of its own, and what drives it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub async fn connect(
        &self,
    ) -> Result<
        (
            tokio_postgres::Client,
            tokio_postgres::Connection<
                tokio_postgres::Socket,
                <MakeRustlsConnect as tokio_postgres::tls::MakeTlsConnect<tokio_postgres::Socket>>::Stream,
            >,
        ),
        tokio_postgres::Error,
    > {
        self.config.connect(self.tls.clone()).await
    }
}

/// What an error means to a person, and what to do.
pub fn explain(error: &tokio_postgres::Error) -> String {
    let Some(said) = error.as_db_error() else {
        if let Some(why) = of_certificate(error) {
            return why;
        }
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        return text;
    };
    let hint = match said.code() {
        &SqlState::INVALID_PASSWORD | &SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
            "the user or the password is wrong"
        }
        &SqlState::INVALID_CATALOG_NAME => "there is no such database: make it, or correct its name",
        &SqlState::INSUFFICIENT_PRIVILEGE => "this user lacks a right: GRANT it",
        &SqlState::UNDEFINED_TABLE => "there is no such table: make it, or correct its name",
        &SqlState::INVALID_COLUMN_REFERENCE if said.message().contains("ON CONFLICT") => {
            "no unique constraint has just the columns of `key`: CREATE UNIQUE INDEX, or name other columns"
        }
        &SqlState::TOO_MANY_CONNECTIONS => "the server takes no more connections: raise max_connections, or use fewer",
        &SqlState::DISK_FULL => "the server's disk is full",
        &SqlState::READ_ONLY_SQL_TRANSACTION => "the server takes no writes: is it a standby?",
        _ => return format!("{} (SQLSTATE {})", said.message(), said.code().code()),
    };
    format!("{hint} ({}, SQLSTATE {})", said.message(), said.code().code())
}

/// What is wrong with the server's certificate, if that is why there is no connection.
fn of_certificate(error: &tokio_postgres::Error) -> Option<String> {
    let mut cause = std::error::Error::source(error);
    let found = loop {
        let inner = cause?;
        // A handshake fails as an I/O error, and that hides what it holds from `source`.
        let held = inner.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let found = held
            .and_then(|held| held.downcast_ref::<rustls::Error>())
            .or_else(|| inner.downcast_ref::<rustls::Error>());
        match found {
            Some(rustls::Error::InvalidCertificate(found)) => break found,
            _ => cause = inner.source(),
        }
    };
    let hint = match found {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "the server's certificate has expired: give the server a new one, it is tried again"
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "the server's certificate is not valid yet: do the clocks agree?"
        }
        CertificateError::UnknownIssuer => {
            "nobody known here vouches for the server's certificate: name who does in ca_file, or write sslmode=disable \
             if it may go in the clear; every other sslmode checks it, as verify-full does"
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "the server's certificate is for another host name: write that one in the URL; every sslmode but disable checks it, \
             as verify-full does"
        }
        _ => "the server's certificate is not taken",
    };
    Some(format!("{hint} ({found})"))
}

/// The same of a pool's error.
pub fn explain_pool(error: &PoolError) -> String {
    match error {
        PoolError::Backend(error) => explain(error),
        PoolError::Timeout(_) => "no connection could be had in time".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_sslmode_means_here_is_what_its_writer_means_or_it_is_refused() {
        for (parameters, mode) in [
            ("", SslMode::Prefer),
            ("?sslmode=disable", SslMode::Disable),
            ("?sslmode=require", SslMode::Require),
            ("?sslmode=verify-ca", SslMode::Require),
            ("?connect_timeout=3&sslmode=verify-full", SslMode::Require),
        ] {
            let config = parse(&format!("postgres://u:geheim@h/db{parameters}")).unwrap();
            assert_eq!(config.get_ssl_mode(), mode, "{parameters}");
        }
        for (parameters, instead) in [
            ("?sslmode=prefer", "write sslmode=require"),
            ("?connect_timeout=3&sslmode=allow", "sslmode=disable for none"),
            ("?sslrootcert=/etc/ca.pem", "write ca_file"),
            ("?sslcert=/etc/own.pem&sslmode=require", "not supported"),
            ("?sslmode=never", "sslmode"),
        ] {
            let why = check(&format!("postgres://u:geheim@h/db{parameters}")).unwrap_err();
            assert!(why.contains(instead) && !why.contains("geheim"), "{parameters}: {why}");
        }
    }
}
