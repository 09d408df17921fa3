//! Which request goes where: the two routes for writes, and everything else to the console.

use std::sync::Arc;

use futures::future::BoxFuture;
use http::{HeaderMap, Method};
use warp::Filter as _;
use warp::filters::BoxedFilter;

use super::{Directory, Incoming, batch, write};

/// All routes as one filter.
pub type BoxedRoutes = BoxedFilter<(warp::reply::Response,)>;

/// The paths for writes, all by POST.
pub const WRITES: [&str; 2] = ["/api/v1/wal/write", "/api/v1/wal/write/batch"];

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
    let single = Arc::clone(&directory);
    let single = warp::path!("api" / "v1" / "wal" / "write")
        .and(warp::post())
        .and(warp::header::headers_cloned())
        .and(warp::body::stream())
        .then(move |headers, body| write::write(Arc::clone(&single), headers, Incoming::new(body)));
    let many = warp::path!("api" / "v1" / "wal" / "write" / "batch")
        .and(warp::post())
        .and(warp::header::headers_cloned())
        .and(warp::body::stream())
        .map(move |headers: HeaderMap, body| batch::batch(Arc::clone(&directory), &headers, Incoming::new(body)));
    let query = warp::query::raw().or(warp::any().map(String::new)).unify();
    let other = warp::method()
        .and(warp::path::full())
        .and(query)
        .and(warp::header::headers_cloned())
        .and(warp::body::stream())
        .and_then(move |method, path: warp::path::FullPath, query, headers, body| {
            let path = path.as_str().to_owned();
            let answer = other(Asked { method, path, query, headers, body: Incoming::new(body) });
            async move { Ok::<_, warp::Rejection>(answer.await) }
        });
    single.or(many).unify().or(other).unify().boxed()
}
