//! The open stream of one node, and the connection below it.

use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lvprov_proto::lvprov::node_admin_client::NodeAdminClient;
use lvprov_proto::lvprov::{CapacityReport, WatchCapacityRequest};
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use tracing::warn;

use super::connection::{Shown, connect_noting};
use super::{Nodes, explain};
use crate::with_causes;

/// For the first report on a connection.
const FIRST_REPORT_TIMEOUT: Duration = Duration::from_secs(15);
/// Between attempts to open a stream: the first wait, doubled up to the last.
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// A connection is replaced after this time, while it is in use, by one with
/// the certificates that both sides have by then; well before the node cuts it.
pub(super) const LONGEST_CONNECTION: Duration = Duration::from_secs(1800);
/// Until the next attempt, where that did not succeed.
const REPLACE_RETRY: Duration = Duration::from_secs(60);

/// An open stream, and its first report.
type Stream = (Streaming<CapacityReport>, CapacityReport);

/// Keeps the stream of one node open, until the task is aborted.
pub(super) async fn follow(nodes: Arc<Nodes>, name: String, address: IpAddr, mut channel: Channel, shown: Arc<Shown>) {
    let mut retry = FIRST_RETRY;
    loop {
        let started = Instant::now();
        let why = match open(&name, channel.clone()).await {
            Ok(stream) => {
                retry = FIRST_RETRY;
                let Err(why) = listen(&nodes, &name, address, &mut channel, &shown, stream).await;
                why
            }
            Err(status) => explain(&status),
        };
        nodes.down(&name, why, started);
        sleep(retry).await;
        retry = (retry * 2).min(LAST_RETRY);
    }
}

async fn open(name: &str, channel: Channel) -> Result<Stream, Status> {
    let mut client = NodeAdminClient::new(channel);
    let opening = async {
        let mut reports = client.watch_capacity(WatchCapacityRequest {}).await?.into_inner();
        let first = reports.message().await?;
        Ok::<_, Status>((reports, first))
    };
    let (reports, first) = timeout(FIRST_REPORT_TIMEOUT, opening)
        .await
        .map_err(|_| Status::deadline_exceeded("it has sent no report of its capacity"))??;
    let first = first.ok_or_else(|| Status::unavailable(ENDED))?;
    by(name, &first)?;
    Ok((reports, first))
}

const ENDED: &str = "it has ended the stream of its capacity";

/// Reads the stream until it breaks; says why. Meanwhile the connection is
/// replaced when it is old, without a moment in which there is none.
async fn listen(
    nodes: &Nodes,
    name: &str,
    address: IpAddr,
    channel: &mut Channel,
    shown: &Arc<Shown>,
    (mut reports, first): Stream,
) -> Result<Infallible, String> {
    nodes.report(name, first);
    nodes.look_at_certificate(name, shown);
    let old = sleep(spread(nodes.longest_connection));
    tokio::pin!(old);
    loop {
        tokio::select! {
            report = reports.message() => {
                let report = report.map_err(|status| explain(&status))?.ok_or(ENDED)?;
                by(name, &report).map_err(|status| explain(&status))?;
                nodes.report(name, report);
            }
            () = &mut old => match anew(nodes, name, address, shown).await {
                Ok((connection, (stream, first))) => {
                    // What is under way on the old one keeps it until it is done.
                    nodes.replace(name, connection.clone());
                    *channel = connection;
                    reports = stream;
                    nodes.report(name, first);
                    nodes.look_at_certificate(name, shown);
                    old.set(sleep(spread(nodes.longest_connection)));
                }
                Err(why) => {
                    warn!(node = name, why, "the node takes no new connection; the old one is used on");
                    old.set(sleep(REPLACE_RETRY.min(nodes.longest_connection)));
                }
            },
        }
    }
}

async fn anew(nodes: &Nodes, name: &str, address: IpAddr, shown: &Arc<Shown>) -> Result<(Channel, Stream), String> {
    let channel = connect_noting(address, nodes.port, nodes.tls.clone(), Arc::clone(shown))
        .map_err(|error| with_causes(&error))?;
    let stream = open(name, channel.clone()).await.map_err(|status| explain(&status))?;
    Ok((channel, stream))
}

/// The report must be this node's: the address may be another's by now.
fn by(name: &str, report: &CapacityReport) -> Result<(), Status> {
    if report.node == name {
        return Ok(());
    }
    Err(Status::unavailable(format!("at its address answers node {}", report.node)))
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
