//! How a node tells the controller what its volume groups have free: over a TLS
//! connection of its own, without HTTP.
//!
//! There is one to each node for as long as the node lives, and nothing happens
//! on most of them for hours. As a stream of a gRPC call each takes some 100 KiB
//! of the controller's memory, mostly buffers; so it takes a tenth. Both sides
//! choose it by ALPN in the handshake, with the certificates of all other calls.
//! The node then sends messages `CapacityReport`, each after its length as a
//! varint (as Protocol Buffers delimit messages), and an empty one when it has
//! had nothing to say for a while. The controller sends nothing.

use std::io;
use std::pin::pin;
use std::time::Duration;

use futures::stream::{Stream, StreamExt};
use lvprov_proto::lvprov::CapacityReport;
use prost::Message;
use prost::bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{interval, timeout};

/// As it is called in the handshake.
pub const PROTOCOL: &[u8] = b"lvprov-reports/1";

/// A node is heard of at least this often…
const BEAT: Duration = Duration::from_secs(10);
/// …or counts as silent, after this long.
const SILENCE: Duration = Duration::from_secs(16);
/// Who takes nothing for so long is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// No report is longer, in bytes.
const LONGEST: usize = 4 << 20;
/// A length as a varint takes no more, in bytes.
const LONGEST_DELIMITER: usize = 10;
/// Reads ask for this much at once, in bytes: most reports fit.
const ROOM: usize = 512;

/// Sends all of `reports`, until they end or the other side does.
///
/// # Errors
/// When the connection breaks, or takes nothing.
pub async fn send<C>(mut connection: C, reports: impl Stream<Item = CapacityReport>) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let mut reports = pin!(reports);
    let mut beat = interval(BEAT);
    beat.reset();
    let mut said = [0];
    loop {
        let message = tokio::select! {
            report = reports.next() => match report {
                Some(report) => report.encode_length_delimited_to_vec(),
                None => return connection.shutdown().await,
            },
            _ = beat.tick() => vec![0],
            read = connection.read(&mut said) => return match read? {
                0 => Ok(()),
                _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the listener has said something")),
            },
        };
        let written = async {
            connection.write_all(&message).await?;
            connection.flush().await
        };
        timeout(WRITE_TIMEOUT, written).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        beat.reset();
    }
}

/// Reports as they come.
#[derive(Debug)]
pub struct Reports<C> {
    connection: C,
    read: BytesMut,
}

impl<C: AsyncRead + Unpin> Reports<C> {
    /// From a node that [`send`]s on the other side.
    pub fn new(connection: C) -> Self {
        Self { connection, read: BytesMut::new() }
    }

    /// The next one. Nothing is lost where this is not waited for to its end.
    ///
    /// # Errors
    /// When the connection has ended or broken, or nothing was heard for too
    /// long.
    pub async fn next(&mut self) -> io::Result<CapacityReport> {
        loop {
            while let Some(message) = self.message()? {
                if let Some(report) = message {
                    return Ok(report);
                }
            }
            self.read.reserve(ROOM);
            let read = timeout(SILENCE, self.connection.read_buf(&mut self.read)).await.map_err(|_| {
                io::Error::new(io::ErrorKind::TimedOut, format!("it has said nothing for {} s", SILENCE.as_secs()))
            })??;
            if read == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has ended the stream of its capacity"));
            }
        }
    }

    /// A whole message, if there is one; within it, a report, if it is no mere
    /// sign of life.
    fn message(&mut self) -> io::Result<Option<Option<CapacityReport>>> {
        let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let mut rest = &self.read[..];
        let length = match prost::decode_length_delimiter(&mut rest) {
            Ok(length) if length <= LONGEST => length,
            Ok(length) => return Err(wrong(format!("a report of {length} bytes"))),
            Err(_) if self.read.len() < LONGEST_DELIMITER => return Ok(None),
            Err(error) => return Err(wrong(format!("what it sends is no report: {error}"))),
        };
        if rest.len() < length {
            return Ok(None);
        }
        let begins = self.read.len() - rest.len();
        let report = match length {
            0 => None,
            _ => Some(CapacityReport::decode(&rest[..length]).map_err(|error| wrong(format!("no report: {error}")))?),
        };
        self.read.advance(begins + length);
        if self.read.is_empty() {
            // Thousands wait for their next one.
            self.read = BytesMut::new();
        }
        Ok(Some(report))
    }
}

#[cfg(test)]
mod tests {
    use lvprov_proto::lvprov::VolumeGroup;
    use tokio::io::duplex;
    use tokio::sync::mpsc;
    use tokio::time::{Instant, sleep};
    use tokio_stream::wrappers::UnboundedReceiverStream;

    use super::*;

    fn report(free_bytes: u64) -> CapacityReport {
        // Longer than one read.
        let disk_free_bytes = vec![free_bytes; 200];
        let group = VolumeGroup { name: "vg0".into(), free_bytes, disk_free_bytes, ..VolumeGroup::default() };
        CapacityReport { node: "n1".into(), volume_groups: vec![group], failing_unmounts: Vec::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn reports_come_as_they_are_sent_and_silence_between_them_is_none() {
        let (ours, theirs) = duplex(64);
        let (tell, told) = mpsc::unbounded_channel();
        let sending = tokio::spawn(send(ours, UnboundedReceiverStream::new(told)));
        let mut reports = Reports::new(theirs);
        for free in [1 << 40, 3] {
            tell.send(report(free)).unwrap();
        }
        assert_eq!(reports.next().await.unwrap(), report(1 << 40));
        assert_eq!(reports.next().await.unwrap(), report(3));
        assert_eq!(reports.read.capacity(), 0);
        tokio::spawn(async move {
            sleep(Duration::from_secs(3600)).await;
            tell.send(report(7)).unwrap();
        });
        assert_eq!(reports.next().await.unwrap(), report(7));
        let error = reports.next().await.unwrap_err().to_string();
        assert!(error.contains("has ended the stream"), "{error}");
        sending.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_waited_for_in_vain_is_not_lost() {
        let (mut ours, theirs) = duplex(64);
        let mut reports = Reports::new(theirs);
        let sent = report(5).encode_length_delimited_to_vec();
        let (first, second) = sent.split_at(sent.len() / 2);
        let both = async {
            ours.write_all(first).await.unwrap();
            sleep(Duration::from_secs(2)).await;
            ours.write_all(second).await.unwrap();
        };
        let received = async {
            assert!(timeout(Duration::from_secs(1), reports.next()).await.is_err());
            assert_eq!(reports.next().await.unwrap(), report(5));
        };
        tokio::join!(both, received);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_node_is_noticed_and_so_is_a_listener_that_has_gone() {
        let begun = Instant::now();
        let (_ours, theirs) = duplex(64);
        let error = Reports::new(theirs).next().await.unwrap_err().to_string();
        assert!(error.contains("said nothing for 16 s") && begun.elapsed() < Duration::from_secs(17), "{error}");
        let (ours, theirs) = duplex(64);
        drop(theirs);
        send(ours, futures::stream::pending()).await.unwrap();
        // It is there, and takes nothing.
        let (ours, _theirs) = duplex(64);
        let error = send(ours, futures::stream::once(async { report(1) })).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn nonsense_is_refused_and_takes_no_memory() {
        for (sent, what) in [
            (&[0xff; 11][..], "what it sends is no report"),
            (&[0xff, 0xff, 0xff, 0x7f], "a report of 268435455 bytes"),
            (b"\x02\xff\xff", "no report"),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "has ended"),
        ] {
            let (mut ours, theirs) = duplex(64);
            ours.write_all(sent).await.unwrap();
            drop(ours);
            let error = Reports::new(theirs).next().await.unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        let (mut ours, theirs) = duplex(64);
        ours.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        send(theirs, futures::stream::pending()).await.unwrap_err();
    }
}
