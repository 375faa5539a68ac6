//! The connection to one node that its reports come over.

use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lvprov_proto::lvprov::CapacityReport;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::client::TlsStream;
use tracing::warn;

use super::Nodes;
use super::connection::{self, explain_error};
use crate::reports::Reports;
use crate::x509::Validity;

/// For the first report on a connection.
const FIRST_REPORT_TIMEOUT: Duration = Duration::from_secs(15);
/// Between attempts to connect: the first wait, doubled up to the last.
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// A connection is replaced after this time, while it is in use, by one with
/// the certificates that both sides have by then; well before the node cuts it.
pub(super) const LONGEST_CONNECTION: Duration = Duration::from_secs(1800);
/// Until the next attempt, where that did not succeed.
const REPLACE_RETRY: Duration = Duration::from_secs(60);

/// What a node says, from its first report on.
struct Heard {
    /// Boxed: a future has room for each place that it is moved to.
    reports: Box<Reports<TlsStream<TcpStream>>>,
    first: CapacityReport,
    certificate: Option<Validity>,
}

/// Listens to one node, until the task is aborted.
pub(super) async fn follow(nodes: Arc<Nodes>, name: String, address: IpAddr) {
    let mut retry = FIRST_RETRY;
    loop {
        let started = Instant::now();
        // Boxed: what it takes to connect is not kept for as long as the connection is.
        let why = match Box::pin(open(&nodes, &name, address)).await {
            Ok(heard) => {
                retry = FIRST_RETRY;
                let Err(why) = listen(&nodes, &name, address, heard).await;
                why
            }
            Err(why) => why,
        };
        nodes.down(&name, explain_error(&why), started);
        sleep(retry).await;
        retry = (retry * 2).min(LAST_RETRY);
    }
}

async fn open(nodes: &Nodes, name: &str, address: IpAddr) -> io::Result<Heard> {
    let tls = nodes.tls.as_ref().ok_or_else(|| io::Error::other("there are no certificates to call it with"))?;
    let (mut reports, certificate) = {
        let _turn = nodes.connecting.acquire().await.map_err(io::Error::other)?;
        connection::listen(address, nodes.port, tls).await?
    };
    let first = timeout(FIRST_REPORT_TIMEOUT, reports.next())
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it has sent no report of its capacity"))??;
    by(name, &first)?;
    Ok(Heard { reports: Box::new(reports), first, certificate })
}

/// Takes in reports until the connection breaks; says why. Meanwhile it is
/// replaced when it is old, without a moment in which there is none.
async fn listen(nodes: &Nodes, name: &str, address: IpAddr, heard: Heard) -> Result<Infallible, io::Error> {
    let begin = |heard: Heard| {
        nodes.report(name, heard.first);
        nodes.look_at_certificate(name, heard.certificate);
        heard.reports
    };
    let mut reports = begin(heard);
    let mut old = Box::pin(sleep(spread(nodes.longest_connection)));
    loop {
        tokio::select! {
            report = reports.next() => {
                let report = report?;
                by(name, &report)?;
                nodes.report(name, report);
            }
            () = &mut old => old = Box::pin(sleep(match Box::pin(open(nodes, name, address)).await {
                Ok(heard) => {
                    reports = begin(heard);
                    spread(nodes.longest_connection)
                }
                Err(error) => {
                    let why = explain_error(&error);
                    warn!(node = name, why, "the node takes no new connection; the old one is used on");
                    REPLACE_RETRY.min(nodes.longest_connection)
                }
            })),
        }
    }
}

/// The report must be this node's: the address may be another's by now.
fn by(name: &str, report: &CapacityReport) -> io::Result<()> {
    if report.node == name {
        return Ok(());
    }
    Err(io::Error::other(format!("at its address answers node {}", report.node)))
}

/// Between three quarters of the time and all of it: what began together is
/// not to be done again together.
fn spread(time: Duration) -> Duration {
    let quarter = time / 4;
    let random = RandomState::new().hash_one(()) % 1024;
    time - quarter.mul_f64(random as f64 / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_replaced_before_their_time_and_not_all_at_once() {
        let times: Vec<_> = (0..16).map(|_| spread(LONGEST_CONNECTION)).collect();
        assert!(times.iter().all(|time| (LONGEST_CONNECTION * 3 / 4..=LONGEST_CONNECTION).contains(time)), "{times:?}");
        assert!(times.iter().any(|time| *time != times[0]), "{times:?}");
        assert!(LONGEST_CONNECTION < crate::node::server::LONGEST_CONNECTION);
    }
}
