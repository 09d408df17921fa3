//! What is wrong with a broker's certificate: the client says only that TLS failed, so a handshake of our own asks.

use std::io;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CertificateError, ClientConfig, ClientConnection, RootCertStore};

use super::{Cluster, TlsSpec};
use crate::connection::tls;

/// How long a broker may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// The first fault that one of the brokers' certificates has, and what to do; `None` = none that is seen from here. Blocks.
pub(super) fn fault(cluster: &Cluster) -> Option<String> {
    let ca_file = match &cluster.tls {
        None | Some(TlsSpec::On(false)) => return None,
        Some(TlsSpec::On(true)) => None,
        Some(TlsSpec::Files(files)) => files.ca_file.as_deref(),
    };
    let roots = match roots(ca_file) {
        Ok(roots) => Arc::new(roots),
        Err(why) => return Some(why),
    };
    cluster.shown().split(',').map(str::trim).find_map(|broker| {
        let error = shake(broker, &roots).err()?;
        said(broker, ca_file, error.get_ref()?.downcast_ref::<rustls::Error>()?)
    })
}

fn roots(ca_file: Option<&str>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let Some(file) = ca_file else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        return Ok(roots);
    };
    let unusable = |why: String| format!("tls.ca_file {file} cannot be used: {why}");
    let certificates = CertificateDer::pem_file_iter(Path::new(file)).map_err(|error| unusable(error.to_string()))?;
    for certificate in certificates {
        roots
            .add(certificate.map_err(|error| unusable(error.to_string()))?)
            .map_err(|error| unusable(error.to_string()))?;
    }
    Ok(roots)
}

/// A handshake, with a bound.
fn shake(broker: &str, roots: &Arc<RootCertStore>) -> io::Result<()> {
    tls::provider();
    let host = broker.rsplit_once(':').map_or(broker, |(host, _)| host).trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let config = ClientConfig::builder().with_root_certificates(Arc::clone(roots)).with_no_client_auth();
    let mut connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    let address = broker.to_socket_addrs()?.next().ok_or(io::ErrorKind::NotFound)?;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    Ok(())
}

fn said(broker: &str, ca_file: Option<&str>, error: &rustls::Error) -> Option<String> {
    use CertificateError as Wrong;
    let (what, help) = match error {
        rustls::Error::InvalidCertificate(Wrong::Expired | Wrong::ExpiredContext { .. }) => {
            ("has expired".to_owned(), "renew it on the broker".to_owned())
        }
        rustls::Error::InvalidCertificate(Wrong::NotValidYet | Wrong::NotValidYetContext { .. }) => {
            ("is not valid yet".to_owned(), "is the clock right, here and there?".to_owned())
        }
        rustls::Error::InvalidCertificate(Wrong::UnknownIssuer | Wrong::BadSignature) => {
            let by =
                ca_file.map_or_else(|| "the system's certificates".to_owned(), |file| format!("tls.ca_file {file}"));
            (format!("is vouched for by nobody in {by}"), "put the certificate of its CA there".to_owned())
        }
        rustls::Error::InvalidCertificate(Wrong::NotValidForName | Wrong::NotValidForNameContext { .. }) => (
            "is not for this name".to_owned(),
            "name the broker as its certificate does, or give it another".to_owned(),
        ),
        rustls::Error::InvalidCertificate(other) => (format!("is not accepted: {other}"), "give it another".to_owned()),
        rustls::Error::InvalidMessage(_) => {
            return Some(format!("no TLS is spoken at {broker}: correct the port, or leave `tls` out"));
        }
        _ => return None,
    };
    Some(format!("the certificate of the broker {broker} {what}: {help}"))
}
