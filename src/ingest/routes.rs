//! Which request goes where: the two routes for writes, and everything else to the console.
//!
//! One filter takes every request, with its head as the accept loop handed it over: on the way of a write each filter more
//! would cost as much as the decoding.

use std::sync::Arc;

use futures::future::BoxFuture;
use http::{HeaderMap, Method, Uri};
use warp::Filter as _;
use warp::filters::BoxedFilter;

use super::{Directory, Incoming, batch, write};

/// All routes as one filter. A request must carry its [`Head`] as an extension.
pub type BoxedRoutes = BoxedFilter<(warp::reply::Response,)>;

const WRITE: &str = "/api/v1/wal/write";
const BATCH: &str = "/api/v1/wal/write/batch";

/// The paths for writes, all by POST.
pub const WRITES: [&str; 2] = [WRITE, BATCH];

/// What stands before a request's body.
#[derive(Debug)]
pub struct Head {
    /// Its method.
    pub method: Method,
    /// Its path and query.
    pub uri: Uri,
    /// Its headers.
    pub headers: HeaderMap,
}

/// A request that is no write.
pub struct Asked {
    /// Its method.
    pub method: Method,
    /// Its path, as it came.
    pub path: String,
    /// Its query, without the question mark.
    pub query: String,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Incoming,
}

/// The routes for writes; `other` answers the rest.
pub fn routes<F>(directory: Arc<dyn Directory>, other: F) -> BoxedRoutes
where
    F: Fn(Asked) -> BoxFuture<'static, warp::reply::Response> + Clone + Send + Sync + 'static,
{
    warp::ext::get::<Arc<Head>>()
        .and(warp::body::stream())
        .then(move |head: Arc<Head>, body| {
            let (directory, other, body) = (Arc::clone(&directory), other.clone(), Incoming::new(body));
            async move {
                match (&head.method, head.uri.path()) {
                    (&Method::POST, WRITE) => write::write(directory, head, body).await,
                    (&Method::POST, BATCH) => batch::batch(directory, &head.headers, body),
                    (method, path) => {
                        let (method, path) = (method.clone(), path.to_owned());
                        let query = head.uri.query().unwrap_or_default().to_owned();
                        other(Asked { method, path, query, headers: head.headers.clone(), body }).await
                    }
                }
            }
        })
        .boxed()
}
