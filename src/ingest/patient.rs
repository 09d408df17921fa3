//! A connection that is not waited for without end: for its first bytes, and for whoever leaves an answer unread.
//!
//! The HTTP library bounds the time for a request's head only once it knows which version is spoken, and has no bound for
//! writing at all. Never looks at more than the bytes that tell the version.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// What opens HTTP/2. As long as all that has come is a part of it, the version is not known.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A stream with bounds on its waits.
pub(super) struct Patient<S> {
    stream: S,
    /// How many bytes of the preface have come, and how long the rest may take; `None` = the version is known.
    opening: Option<(usize, Pin<Box<Sleep>>)>,
    unread: Duration,
    /// Runs while nothing can be written.
    writing: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    /// Waits `head` for the first bytes, and `unread` for room to write.
    pub(super) fn new(stream: S, head: Duration, unread: Duration) -> Self {
        Self { stream, opening: Some((0, Box::pin(sleep(head)))), unread, writing: None }
    }

    /// Passes on what a write gave; a wait that takes too long is an error.
    fn written<T>(&mut self, context: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.writing = None;
            return poll;
        }
        let unread = self.unread;
        let waiting = self.writing.get_or_insert_with(|| Box::pin(sleep(unread)));
        ready!(waiting.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let poll = Pin::new(&mut this.stream).poll_read(context, buffer);
        let Some((come, patience)) = &mut this.opening else { return poll };
        if poll.is_pending() {
            ready!(patience.as_mut().poll(context));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let new = buffer.filled().get(before..).unwrap_or_default();
        let left = PREFACE.get(*come..).unwrap_or_default();
        if new.len() < left.len() && left.starts_with(new) {
            *come += new.len();
        } else {
            this.opening = None;
        }
        poll
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let poll = Pin::new(&mut this.stream).poll_write(context, bytes);
        this.written(context, poll)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let poll = Pin::new(&mut this.stream).poll_write_vectored(context, slices);
        this.written(context, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let poll = Pin::new(&mut this.stream).poll_flush(context);
        this.written(context, poll)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let poll = Pin::new(&mut this.stream).poll_shutdown(context);
        this.written(context, poll)
    }
}
