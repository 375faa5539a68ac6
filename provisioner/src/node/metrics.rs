//! What Prometheus is told of this node: above all the log volumes, since
//! kubelet has no figures of inline volumes.
//!
//! All values are read when they are asked for, from the kernel (statfs,
//! quotactl) and from what the node service knows anyway. No process is
//! started and no lock is taken for them.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, StatusCode};
use axum::routing::get;
use lvm::doctor::{Scope, Severity};
use lvm::logs::{Directory, MountedLog, Space};
use lvm::report::VolumeGroup;
use lvm::trouble::Notes;
use lvm::{Lvm, command, mounts};
use tokio::sync::Mutex;
use tokio::task::JoinError;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::capacity::Capacity;
use super::diagnosis;
use super::exposition::{self, Exposition, Type};
use super::served::Served;
use super::trouble::persisting;
use super::wiper::Wiper;
use crate::tls::TlsDirectory;

/// How long a reader waits for another one. A disk that does not answer holds
/// up one thread, and not one for each reader.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// Someone else's reading has not come to an end.
    #[error("the metrics have been read for {} s and more; does a disk of this node not answer?", PATIENCE.as_secs())]
    Busy,
    /// The mount table could not be read.
    #[error("cannot read the mounts of this node")]
    Mounts(#[source] io::Error),
    /// The work broke off.
    #[error("the reading of the metrics broke off")]
    Interrupted(#[source] JoinError),
}

/// What the figures are taken from. Clones share it.
#[derive(Debug, Clone)]
pub struct Metrics {
    node_name: Arc<str>,
    lvm: Arc<Lvm>,
    served: Served,
    capacity: Capacity,
    notes: Notes,
    certificates: Option<Arc<TlsDirectory>>,
    scope: Option<Scope>,
    wiper: Option<Wiper>,
    reading: Arc<Mutex<()>>,
}

/// A log volume, and what was seen of it. None: it could not be looked at.
struct Seen {
    log: MountedLog,
    content: Option<(Space, Vec<Directory>)>,
}

impl Metrics {
    /// Of the Kubernetes node `node_name`; `notes`: of unmounts that fail.
    pub fn new(node_name: &str, lvm: Arc<Lvm>, served: Served, capacity: Capacity, notes: Notes) -> Self {
        let (node_name, reading) = (node_name.into(), Arc::default());
        Self { node_name, lvm, served, capacity, notes, certificates: None, scope: None, wiper: None, reading }
    }

    /// Also of these certificates.
    pub fn with_certificates(self, certificates: Arc<TlsDirectory>) -> Self {
        Self { certificates: Some(certificates), ..self }
    }

    /// Also of what the doctor sees there.
    pub fn with_findings(self, scope: Scope) -> Self {
        Self { scope: Some(scope), ..self }
    }

    /// Also of the trash, and of what is being overwritten.
    pub fn with_wiper(self, wiper: Wiper) -> Self {
        Self { wiper: Some(wiper), ..self }
    }

    /// Serves them at `/metrics`.
    pub fn router(self) -> Router {
        Router::new().route("/metrics", get(move || self.clone().answer()))
    }

    async fn answer(self) -> (StatusCode, [(HeaderName, &'static str); 1], String) {
        match self.read().await {
            Ok(text) => (StatusCode::OK, [(CONTENT_TYPE, exposition::CONTENT_TYPE)], text),
            Err(error) => {
                let error = crate::with_causes(&error);
                warn!(error, "no metrics");
                (StatusCode::SERVICE_UNAVAILABLE, [(CONTENT_TYPE, "text/plain; charset=utf-8")], format!("{error}\n"))
            }
        }
    }

    /// Reads all of them.
    ///
    /// # Errors
    /// When another reading does not come to an end, or the mount table cannot
    /// be read.
    pub async fn read(self) -> Result<String, MetricsError> {
        let turn = timeout(PATIENCE, Arc::clone(&self.reading).lock_owned()).await.map_err(|_| MetricsError::Busy)?;
        tokio::task::spawn_blocking(move || {
            let _turn = turn;
            self.text()
        })
        .await
        .map_err(MetricsError::Interrupted)?
    }

    fn text(&self) -> Result<String, MetricsError> {
        let mounts = mounts::all().map_err(MetricsError::Mounts)?;
        let logs = self.lvm.mounted_logs(&mounts).into_iter().filter(|log| self.served.includes(&log.vg));
        let seen: Vec<Seen> = logs
            .map(|log| {
                let content = self.lvm.look_into_log(&log, &mounts);
                let content = content.inspect_err(|error| debug!(%error, "a log volume is left out of the metrics"));
                Seen { log, content: content.ok() }
            })
            .collect();
        let failing = persisting(&self.notes).map_or(0, |failing| failing.len());

        let mut text = Exposition::default();
        let version = env!("CARGO_PKG_VERSION");
        text.metric("lvprov_node_info", Type::Gauge, "Always 1; the labels say which node service this is.")
            .sample(&[("node", &self.node_name), ("version", &version)], 1);
        write_groups(&mut text, self.capacity.latest().as_deref().unwrap_or_default());
        write_logs(&mut text, &seen);
        write_directories(&mut text, &seen);
        write_commands(&mut text, command::counts());
        text.metric(
            "lvprov_failing_unmounts",
            Type::Gauge,
            "Volume directories of pods whose unmounts keep failing; their pods hang in Terminating.",
        )
        .sample(&[], u64::try_from(failing).unwrap_or(u64::MAX));
        if let Some(scope) = &self.scope {
            let groups = self.capacity.latest().unwrap_or_default();
            write_findings(&mut text, &diagnosis::counts(&self.lvm, scope, &groups));
        }
        if let Some(certificates) = &self.certificates {
            write_certificates(&mut text, &certificates.now().expiries());
        }
        if let Some(wiper) = &self.wiper {
            write_trash(&mut text, wiper);
        }
        Ok(text.into_text())
    }
}

fn write_trash(text: &mut Exposition, wiper: &Wiper) {
    let trash = wiper.trash();
    let mut metric = text.metric("lvprov_trash_volumes", Type::Gauge, "Logical volumes in the trash.");
    for (vg, (count, _)) in &trash {
        metric.sample(&[("volume_group", vg)], *count);
    }
    let help = "What they take of the volume group until their time has passed.";
    let mut metric = text.metric("lvprov_trash_bytes", Type::Gauge, help);
    for (vg, (_, bytes)) in &trash {
        metric.sample(&[("volume_group", vg)], *bytes);
    }
    let figures = wiper.figures();
    let help = "What is left of the volume that is being overwritten or discarded now.";
    text.metric("lvprov_wipe_remaining_bytes", Type::Gauge, help).sample(&[], figures.left);
    let help = "Bytes of new raw volumes and of the trash overwritten or discarded since the node service started.";
    text.metric("lvprov_wiped_bytes_total", Type::Counter, help).sample(&[], figures.wiped);
}

fn write_certificates(text: &mut Exposition, expiries: &[(&'static str, i64)]) {
    let mut metric = text.metric(
        "lvprov_certificate_expiry_timestamp_seconds",
        Type::Gauge,
        "When the certificates of a file that the node service uses end; for authorities, the last of them.",
    );
    for (file, expiry) in expiries {
        metric.sample(&[("file", file)], u64::try_from(*expiry).unwrap_or(0));
    }
}

fn write_findings(text: &mut Exposition, counts: &[(Severity, u64)]) {
    let mut metric = text.metric(
        "lvprov_findings",
        Type::Gauge,
        "What `lvprov doctor` would say of this node, as far as no process is needed to know it.",
    );
    for (severity, count) in counts {
        metric.sample(&[("severity", severity)], *count);
    }
}

fn write_groups(text: &mut Exposition, groups: &[VolumeGroup]) {
    type Value = fn(&VolumeGroup) -> u64;
    let metrics: [(&str, &str, Value); 4] = [
        ("lvprov_volume_group_size_bytes", "Size of the volume group.", |group| group.size),
        ("lvprov_volume_group_free_bytes", "What no logical volume of the group has.", |group| group.free),
        (
            "lvprov_volume_group_metadata_free_bytes",
            "By so much the description of the group can grow; a volume takes about half a KiB.",
            |group| group.metadata.free,
        ),
        ("lvprov_volume_group_missing_disks", "Disks of the group that are not there.", |group| {
            group.metadata.missing_disks
        }),
    ];
    for (name, help, value) in metrics {
        let mut metric = text.metric(name, Type::Gauge, help);
        for group in groups {
            metric.sample(&[("volume_group", &group.name)], value(group));
        }
    }
}

fn write_logs(text: &mut Exposition, seen: &[Seen]) {
    type Value = fn(&Space) -> u64;
    let metrics: [(&str, &str, Value); 5] = [
        ("lvprov_log_volume_size_bytes", "What the log volume's file system has for files.", |space| space.size),
        ("lvprov_log_volume_used_bytes", "What is in use of it, by all its directories.", |space| space.used),
        ("lvprov_log_volume_available_bytes", "What can still be written to it.", |space| space.available),
        ("lvprov_log_volume_inodes", "Files and directories that there can be in it.", |space| space.files),
        ("lvprov_log_volume_inodes_free", "How many more of them there can be.", |space| space.free_files),
    ];
    for (name, help, value) in metrics {
        let mut metric = text.metric(name, Type::Gauge, help);
        for Seen { log, content } in seen {
            if let Some((space, _)) = content {
                let labels: [(&str, &dyn std::fmt::Display); 3] =
                    [("namespace", &log.namespace), ("volume", &log.volume), ("volume_group", &log.vg)];
                metric.sample(&labels, value(space));
            }
        }
    }
    let unreadable = seen.iter().filter(|seen| seen.content.is_none()).count();
    text.metric(
        "lvprov_log_volumes_unreadable",
        Type::Gauge,
        "Mounted log volumes that could not be looked at, and are left out: their disk hangs, or the kernel has shut their file system down.",
    )
    .sample(&[], u64::try_from(unreadable).unwrap_or(u64::MAX));
}

fn write_directories(text: &mut Exposition, seen: &[Seen]) {
    type Value = fn(&Directory) -> u64;
    let metrics: [(&str, &str, Value); 4] = [
        ("lvprov_log_directory_used_bytes", "What a pod's directory takes of its quota.", |one| one.usage.used),
        ("lvprov_log_directory_quota_bytes", "Its quota; 0 means none.", |one| one.usage.limit),
        ("lvprov_log_directory_inodes_used", "Files and directories in it.", |one| one.usage.files),
        ("lvprov_log_directory_inodes_quota", "How many there can be; 0 means no limit.", |one| one.usage.files_limit),
    ];
    for (name, help, value) in metrics {
        let mut metric = text.metric(name, Type::Gauge, help);
        for Seen { log, content } in seen {
            for directory in content.iter().flat_map(|(_, directories)| directories) {
                let labels: [(&str, &dyn std::fmt::Display); 4] = [
                    ("namespace", &log.namespace),
                    ("volume", &log.volume),
                    ("directory", &directory.name),
                    ("pod", &directory.pod()),
                ];
                metric.sample(&labels, value(directory));
            }
        }
    }
}

fn write_commands(text: &mut Exposition, counts: command::Counts) {
    text.metric(
        "lvprov_commands_total",
        Type::Counter,
        "Commands that this node service has run: lvm to change (mutate) or to read (report), or another tool.",
    )
    .sample(&[("kind", &"mutate")], counts.mutate)
    .sample(&[("kind", &"report")], counts.report)
    .sample(&[("kind", &"tool")], counts.tool);
}

#[cfg(test)]
mod tests {
    use lvm::config::NodeConfig;
    use lvm::names::{LogVolumeName, LvName, Namespace, VgName};
    use lvm::quota::Usage;

    use super::*;
    use crate::node::capacity::Reporter;
    use crate::node::in_progress::InProgress;

    fn metrics() -> Metrics {
        let in_progress = InProgress::default();
        let (_reporter, capacity) = Reporter::new("n1", in_progress.count(), || Ok(Vec::new()));
        let lvm = Arc::new(Lvm::new(NodeConfig::default()));
        Metrics::new("n1", lvm, Served::default(), capacity, Notes::at("/nonexistent".as_ref()))
    }

    fn seen(volume: &str, content: Option<(Space, Vec<Directory>)>) -> Seen {
        let (namespace, volume) = (Namespace::parse("shop").unwrap(), LogVolumeName::parse(volume).unwrap());
        let lv = LvName::for_log(&namespace, &volume);
        let path = format!("/var/log/lvprov/shop/{volume}").into();
        Seen { log: MountedLog { vg: VgName::parse("vg0").unwrap(), lv, namespace, volume, path }, content }
    }

    #[test]
    fn each_volume_and_directory_has_its_samples() {
        let space = Space { size: 1000, used: 300, available: 700, files: 50, free_files: 40 };
        let directory = Directory {
            name: "web-0".into(),
            path: "/var/log/lvprov/shop/web/web-0".into(),
            record: None,
            usage: Usage { used: 200, limit: 400, files: 3, files_limit: 256 },
            mounted: true,
        };
        let seen = [seen("web", Some((space, vec![directory]))), seen("broken", None)];
        let mut text = Exposition::default();
        write_logs(&mut text, &seen);
        write_directories(&mut text, &seen);
        let text = text.into_text();
        let volume = r#"{namespace="shop",volume="web",volume_group="vg0"}"#;
        let directory = r#"{namespace="shop",volume="web",directory="web-0",pod="web-0"}"#;
        for sample in [
            format!("lvprov_log_volume_size_bytes{volume} 1000"),
            format!("lvprov_log_volume_used_bytes{volume} 300"),
            format!("lvprov_log_volume_available_bytes{volume} 700"),
            format!("lvprov_log_volume_inodes{volume} 50"),
            format!("lvprov_log_volume_inodes_free{volume} 40"),
            format!("lvprov_log_directory_used_bytes{directory} 200"),
            format!("lvprov_log_directory_quota_bytes{directory} 400"),
            format!("lvprov_log_directory_inodes_used{directory} 3"),
            format!("lvprov_log_directory_inodes_quota{directory} 256"),
            "lvprov_log_volumes_unreadable 1".to_owned(),
        ] {
            assert!(text.lines().any(|line| line == sample), "no {sample} in\n{text}");
        }
        assert_eq!(text.lines().filter(|line| !line.starts_with('#')).count(), 10, "{text}");
    }

    #[tokio::test]
    async fn a_reading_that_does_not_end_holds_up_no_other_thread() {
        let metrics = metrics();
        assert!(metrics.clone().read().await.unwrap().contains("lvprov_node_info{node=\"n1\""));
        let _reading = metrics.reading.clone().lock_owned().await;
        tokio::time::pause();
        assert!(matches!(metrics.read().await, Err(MetricsError::Busy)));
    }
}
