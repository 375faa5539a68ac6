//! Connections over TLS, as tonic takes them.
//!
//! tonic's own TLS keeps the certificates that it was started with; this asks
//! for them at each handshake.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::{self, Stream};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::reports;

/// How long a peer may take for its side of the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// After a connection could not be accepted: mostly there are too many.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long what is under way on a connection may take once it is too old.
const GRACE: Duration = Duration::from_secs(300);

/// A connection whose peer has shown its certificate. It breaks at the end of
/// its time, so that no certificate serves for longer than it is valid, or
/// trusted, and this time.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    end: Pin<Box<Sleep>>,
}

/// Connections to `listener`, each with the configuration that `config` gives
/// at that moment. A connection is cut [`GRACE`] after `longest`.
pub fn connections(
    listener: TcpListener,
    longest: Duration,
    config: impl Fn() -> Arc<ServerConfig> + Send + 'static,
) -> impl Stream<Item = io::Result<Connection>> + Send {
    connections_but(listener, longest, config, drop)
}

/// As [`connections`], but those of who only listens to reports go to `report`.
pub fn connections_but(
    listener: TcpListener,
    longest: Duration,
    config: impl Fn() -> Arc<ServerConfig> + Send + 'static,
    report: impl Fn(Connection) + Send + 'static,
) -> impl Stream<Item = io::Result<Connection>> + Send {
    let state = (listener, JoinSet::new(), config, report);
    stream::unfold(state, move |(listener, mut handshakes, config, report)| async move {
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        handshakes.spawn(timeout(HANDSHAKE_TIMEOUT, handshake(stream, config())));
                    }
                    Err(error) => {
                        warn!(%error, "cannot accept a connection");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(done) = handshakes.join_next() => match done {
                    Ok(Ok(Ok(stream))) => {
                        let end = Box::pin(sleep(longest.saturating_add(GRACE)));
                        let listens = stream.get_ref().1.alpn_protocol() == Some(reports::PROTOCOL);
                        let connection = Connection { stream, end };
                        if listens {
                            report(connection);
                        } else {
                            return Some((Ok(connection), (listener, handshakes, config, report)));
                        }
                    }
                    Ok(Ok(Err(error))) => debug!(%error, "no handshake"),
                    Ok(Err(_)) => debug!("no handshake in time"),
                    Err(error) => warn!(%error, "a handshake broke off"),
                },
            }
        }
    })
}

async fn handshake(stream: TcpStream, config: Arc<ServerConfig>) -> io::Result<TlsStream<TcpStream>> {
    stream.set_nodelay(true)?;
    TlsAcceptor::from(config).accept(stream).await
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // A server always reads, so that this is looked at in time.
        if self.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the connection is too old")));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
