//! What this node's volume groups hold: known at any time, asked of LVM only
//! after a change.
//!
//! One report at start, then one after each change or burst of changes. Where
//! nothing changes, no lvm process runs.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, stream};
use lvm::names::VgName;
use lvm::report::{ReportError, VolumeGroup};
use lvprov_proto::lvprov as wire;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{info, warn};

use super::changes::{Changes, ChangesError};
use super::trouble::Failing;

/// A change is reported once this long nothing more has changed.
const QUIET: Duration = Duration::from_millis(50);
/// Changes without end are reported this often.
const AT_MOST: Duration = Duration::from_secs(1);
/// LVM that does not answer is asked again after 1, 2, 4… seconds, up to this.
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);

/// All volume groups served, in order of name.
pub type Groups = Arc<[VolumeGroup]>;

/// The latest report. Clones share it.
#[derive(Debug, Clone)]
pub struct Capacity {
    node: Arc<str>,
    groups: watch::Receiver<Option<Groups>>,
}

impl Capacity {
    /// The latest report. None: LVM has not answered yet.
    pub fn latest(&self) -> Option<Groups> {
        self.groups.borrow().clone()
    }

    /// One group of the latest report.
    pub fn group(&self, vg: &VgName) -> Option<VolumeGroup> {
        self.latest()?.iter().find(|group| group.name == *vg).cloned()
    }

    /// The latest report at once, with the unmounts that fail, then every one
    /// that differs in either. Ends when the [`Reporter`] does.
    pub fn reports(&self, failing: Failing) -> impl Stream<Item = wire::CapacityReport> + Send + use<> {
        let mut capacity = self.clone();
        capacity.groups.mark_changed();
        stream::unfold((capacity, failing), async |(mut capacity, mut failing)| {
            loop {
                tokio::select! {
                    changed = capacity.groups.changed() => changed.ok()?,
                    // Where they are not watched, the groups still are.
                    Ok(()) = failing.changed() => {}
                }
                let latest = capacity.groups.borrow_and_update().clone();
                if let Some(groups) = latest {
                    let report = to_wire(&capacity.node, &groups, &failing);
                    return Some((report, (capacity, failing)));
                }
            }
        })
    }
}

fn to_wire(node: &str, groups: &[VolumeGroup], failing: &Failing) -> wire::CapacityReport {
    wire::CapacityReport {
        node: node.to_owned(),
        volume_groups: groups
            .iter()
            .map(|group| wire::VolumeGroup {
                name: group.name.to_string(),
                size_bytes: group.size,
                free_bytes: group.free,
                extent_bytes: group.extent_size,
            })
            .collect(),
        failing_unmounts: failing.latest().to_vec(),
    }
}

/// Keeps the latest report up to date.
#[derive(Debug)]
pub struct Reporter<F> {
    report: F,
    operations: watch::Receiver<usize>,
    groups: watch::Sender<Option<Groups>>,
}

impl<F> Reporter<F>
where
    F: Fn() -> Result<Vec<VolumeGroup>, ReportError> + Clone + Send + Sync + 'static,
{
    /// `report` asks LVM and may block. `operations` is how many of our own
    /// operations are under way: a burst of them is reported at its end.
    pub fn new(node: &str, operations: watch::Receiver<usize>, report: F) -> (Self, Capacity) {
        let groups = watch::Sender::new(None);
        let capacity = Capacity { node: node.into(), groups: groups.subscribe() };
        (Self { report, operations, groups }, capacity)
    }

    /// Reports until dropped.
    ///
    /// # Errors
    /// When changes cannot be watched any more.
    pub async fn run(mut self, lock_directory: &Path, backup_directory: &Path) -> Result<(), ChangesError> {
        // Before the first report, so that no change is missed.
        let mut changes = Changes::watch(lock_directory, backup_directory)?;
        loop {
            self.report().await;
            changes.next().await?;
            self.settle(&mut changes).await?;
        }
    }

    /// Waits for the end of a burst of changes, but not for ever.
    async fn settle(&mut self, changes: &mut Changes) -> Result<(), ChangesError> {
        let deadline = Instant::now() + AT_MOST;
        loop {
            let quiet = deadline.min(Instant::now() + QUIET);
            match timeout_at(quiet, changes.next()).await {
                Ok(change) => change?,
                Err(_) if Instant::now() >= deadline => return Ok(()),
                Err(_) => {
                    let idle = timeout_at(deadline, self.operations.wait_for(|count| *count == 0)).await;
                    if idle.is_err() || !changes.pending() {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn report(&self) {
        let mut pause = Duration::from_secs(1);
        loop {
            let report = self.report.clone();
            match tokio::task::spawn_blocking(report).await {
                Ok(Ok(mut groups)) => {
                    groups.sort_by(|a, b| a.name.cmp(&b.name));
                    self.publish(groups.into());
                    return;
                }
                Ok(Err(error)) => warn!(%error, "cannot report the volume groups; trying again"),
                Err(error) => warn!(%error, "the report of the volume groups broke off; trying again"),
            }
            sleep(pause).await;
            pause = LONGEST_BACKOFF.min(pause * 2);
        }
    }

    fn publish(&self, groups: Groups) {
        self.groups.send_if_modified(|latest| {
            let changed = latest.as_ref() != Some(&groups);
            if changed {
                for group in groups.iter() {
                    info!(vg = %group.name, size = group.size, free = group.free, "volume group");
                }
                *latest = Some(groups);
            }
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures::StreamExt;
    use lvm::names::PodUid;
    use lvm::trouble::Notes;
    use tokio::time::timeout;

    use super::*;
    use crate::node::trouble::Watcher;

    const GIB: u64 = 1 << 30;

    fn group(name: &str, free: u64) -> VolumeGroup {
        VolumeGroup { name: VgName::parse(name).unwrap(), size: 10 * GIB, free, extent_size: 4 << 20 }
    }

    /// A reporter over temporary directories, whose "LVM" counts its reports.
    struct Bench {
        directory: tempfile::TempDir,
        reports: Arc<AtomicU64>,
        capacity: Capacity,
        operations: watch::Sender<usize>,
    }

    impl Bench {
        fn start(answer: impl Fn(u64) -> Vec<VolumeGroup> + Clone + Send + Sync + 'static) -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("backup")).unwrap();
            let reports = Arc::new(AtomicU64::new(0));
            let counted = Arc::clone(&reports);
            let operations = watch::Sender::new(0);
            let (reporter, capacity) = Reporter::new("n1", operations.subscribe(), move || {
                Ok(answer(counted.fetch_add(1, Ordering::SeqCst) + 1))
            });
            let (locks, backup) = (directory.path().join("locks"), directory.path().join("backup"));
            tokio::spawn(async move { reporter.run(&locks, &backup).await });
            Self { directory, reports, capacity, operations }
        }

        fn change(&self, vg: &str) {
            fs::write(self.directory.path().join("locks").join(format!("vg-{vg}.lock")), "changed\n").unwrap();
        }

        fn count(&self) -> u64 {
            self.reports.load(Ordering::SeqCst)
        }
    }

    async fn next(stream: &mut (impl Stream<Item = wire::CapacityReport> + Unpin)) -> u64 {
        let report = timeout(Duration::from_secs(10), stream.next()).await.unwrap().unwrap();
        assert_eq!(report.node, "n1");
        report.volume_groups[0].free_bytes
    }

    #[tokio::test]
    async fn one_report_at_start_and_none_while_nothing_changes() {
        let bench = Bench::start(|count| vec![group("vg0", count)]);
        let mut stream = Box::pin(bench.capacity.reports(Failing::none()));
        assert_eq!(next(&mut stream).await, 1);
        sleep(AT_MOST + QUIET * 2).await;
        assert_eq!(bench.count(), 1);
        // A second caller gets the first message at once and costs no report.
        assert_eq!(next(&mut Box::pin(bench.capacity.reports(Failing::none()))).await, 1);
        assert_eq!(bench.count(), 1);
    }

    #[tokio::test]
    async fn burst_of_changes_is_one_report() {
        let bench = Bench::start(|count| vec![group("vg0", count)]);
        let mut stream = Box::pin(bench.capacity.reports(Failing::none()));
        assert_eq!(next(&mut stream).await, 1);
        for _ in 0..20 {
            bench.change("vg0");
        }
        assert_eq!(next(&mut stream).await, 2);
        sleep(QUIET * 4).await;
        assert_eq!(bench.count(), 2);
        bench.change("vg0");
        assert_eq!(next(&mut stream).await, 3);
    }

    #[tokio::test]
    async fn change_during_our_own_operations_waits_for_their_end() {
        let bench = Bench::start(|count| vec![group("vg0", count)]);
        let mut stream = Box::pin(bench.capacity.reports(Failing::none()));
        assert_eq!(next(&mut stream).await, 1);
        bench.operations.send_replace(2);
        bench.change("vg0");
        sleep(QUIET * 4).await;
        assert_eq!(bench.count(), 1);
        bench.change("vg0");
        bench.operations.send_replace(0);
        assert_eq!(next(&mut stream).await, 2);
        // Operations without end do not keep the report back for ever.
        bench.operations.send_replace(1);
        bench.change("vg0");
        assert_eq!(next(&mut stream).await, 3);
    }

    #[tokio::test]
    async fn change_by_others_is_seen_in_lvms_backup_directory() {
        let bench = Bench::start(|count| vec![group("vg0", count)]);
        let mut stream = Box::pin(bench.capacity.reports(Failing::none()));
        assert_eq!(next(&mut stream).await, 1);
        let backup = bench.directory.path().join("backup");
        fs::write(backup.join(".lvm_n1_7_1"), "new").unwrap();
        fs::rename(backup.join(".lvm_n1_7_1"), backup.join("vg1")).unwrap();
        assert_eq!(next(&mut stream).await, 2);
        fs::remove_file(backup.join("vg1")).unwrap();
        assert_eq!(next(&mut stream).await, 3);
    }

    #[tokio::test]
    async fn same_answer_is_no_message() {
        let bench = Bench::start(|count| vec![group("vg0", if count < 3 { 1 } else { 9 })]);
        let mut stream = Box::pin(bench.capacity.reports(Failing::none()));
        assert_eq!(next(&mut stream).await, 1);
        bench.change("vg0");
        while bench.count() < 2 {
            sleep(Duration::from_millis(5)).await;
        }
        bench.change("vg0");
        assert_eq!(next(&mut stream).await, 9);
    }

    #[tokio::test]
    async fn unmounts_that_fail_come_with_the_next_report() {
        let bench = Bench::start(|_| vec![group("vg0", 7)]);
        let notes = Notes::at(&bench.directory.path().join("unmounts"));
        let (watcher, failing) = Watcher::new(notes.clone());
        let mut stream = Box::pin(bench.capacity.reports(failing));
        assert_eq!(next(&mut stream).await, 7);
        tokio::spawn(watcher.run());
        for _ in 0..3 {
            notes.note_failed_unmount(Path::new("/proc"), &PodUid::parse("1111").unwrap(), "busy");
        }
        let report = timeout(Duration::from_secs(20), stream.next()).await.unwrap().unwrap();
        assert_eq!((report.volume_groups[0].free_bytes, report.failing_unmounts.len()), (7, 1));
        assert_eq!(report.failing_unmounts[0].message, "busy");
        assert_eq!(bench.count(), 1, "LVM was asked");
    }

    #[tokio::test]
    async fn groups_are_found_by_name_and_sorted() {
        let bench = Bench::start(|_| vec![group("b", 2), group("a", 1)]);
        assert_eq!(next(&mut Box::pin(bench.capacity.reports(Failing::none()))).await, 1);
        assert_eq!(bench.capacity.group(&VgName::parse("b").unwrap()).unwrap().free, 2);
        assert_eq!(bench.capacity.group(&VgName::parse("c").unwrap()), None);
    }
}
