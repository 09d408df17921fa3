//! The accept loop: a bound on connections, on the time for a request's head, and on the wait at the end.

use std::sync::Arc;
use std::time::Duration;

use http::Request;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::patient::Patient;
use super::{BoxedRoutes, Head};

/// Requests at once on one HTTP/2 connection.
const MOST_STREAMS: u32 = 256;
/// The headers of one HTTP/2 request, in bytes.
const LARGEST_HEAD: u32 = 16 << 10;
/// HTTP/2 requests that were taken back before they were looked at.
const MOST_RESETS: usize = 20;
/// Bytes that a client may send ahead in one HTTP/2 request, and on its connection.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;

/// Bounds of the accept loop.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; more wait to be accepted.
    pub connections: usize,
    /// How long the head of a request may take, and how long a connection may lie idle.
    pub head: Duration,
    /// How long a client may leave an answer unread.
    pub unread: Duration,
    /// How long requests under way may take at the end.
    pub stop: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 8_192,
            head: Duration::from_secs(15),
            unread: Duration::from_secs(30),
            stop: Duration::from_secs(10),
        }
    }
}

/// Serves until `stop`, then lets what is under way end.
pub async fn serve(listener: TcpListener, routes: BoxedRoutes, limits: Limits, stop: CancellationToken) {
    let service = warp::service(routes);
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.head);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(limits.head))
        .keep_alive_timeout(limits.head)
        .max_concurrent_streams(MOST_STREAMS)
        .max_header_list_size(LARGEST_HEAD)
        .max_pending_accept_reset_streams(MOST_RESETS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let (builder, graceful) = (Arc::new(builder), GracefulShutdown::new());
    let room = Arc::new(Semaphore::new(limits.connections));
    loop {
        let accepted = async {
            let permit = Arc::clone(&room).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = stop.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Most often no file descriptor is left: whoever holds one needs time to give it back.
                warn!(%error, "could not accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let stream = Patient::new(stream, limits.head, limits.unread);
        let (builder, routes) = (Arc::clone(&builder), TowerToHyperService::new(service.clone()));
        let service = service_fn(move |request| routes.call(with_head(request)));
        let watcher = graceful.watcher();
        tokio::spawn(async move {
            let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
            if let Err(error) = watcher.watch(connection).await {
                debug!(error, "a connection ended early");
            }
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(limits.stop, graceful.shutdown()).await.is_err() {
        warn!("some requests did not end in time");
    }
}

/// Takes the head off a request and hands it on as an extension: a filter could only have copies of its parts.
fn with_head<B>(mut request: Request<B>) -> Request<B> {
    let head = Head {
        method: request.method().clone(),
        uri: request.uri().clone(),
        headers: std::mem::take(request.headers_mut()),
    };
    request.extensions_mut().insert(Arc::new(head));
    request
}
