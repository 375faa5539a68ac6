//! What this node's volume groups hold: known at any time, asked of LVM only
//! after a change.
//!
//! One report at start, then one after each change or burst of changes. Where
//! nothing changes, no lvm process runs.
//!
//! Beside the report stands a ledger of what has been promised: volumes that are
//! being made, from the moment they are asked for until the first report that
//! must show them. What is told outside is what is free and not promised, so a
//! burst of claims sees its own room go. Whether a volume is made is not decided
//! here, but by LVM under its group's lock.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use futures::{Stream, stream};
use lvm::config::DeviceClasses;
use lvm::layout::Layout;
use lvm::names::VgName;
use lvm::report::{ReportError, VOLUME_METADATA, VolumeGroup, volumes_that_fit};
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

/// What is known of the groups.
#[derive(Debug, Default)]
struct Known {
    groups: Option<Groups>,
    promises: BTreeMap<u64, Entry>,
    /// The number of the next promise.
    next: u64,
    /// Bytes of what is in the trash of each group.
    trash: BTreeMap<VgName, u64>,
}

/// One volume in the ledger.
#[derive(Debug)]
struct Entry {
    vg: VgName,
    size: u64,
    layout: Layout,
    /// It is there: the next report that LVM is asked for shows it.
    kept: bool,
}

impl Known {
    /// What is left of a group's metadata area once all that is promised is made.
    fn metadata_free(&self, group: &VolumeGroup) -> u64 {
        let promised = self.promises.values().filter(|entry| entry.vg == group.name).count();
        let promised = u64::try_from(promised).unwrap_or(u64::MAX);
        group.metadata.free.saturating_sub(promised.saturating_mul(VOLUME_METADATA))
    }

    /// The groups with what is free and not promised.
    fn available(&self) -> Option<Groups> {
        let groups = self.groups.as_ref()?;
        if self.promises.is_empty() && groups.iter().all(|group| volumes_that_fit(group.metadata.free) > 0) {
            return Some(Arc::clone(groups));
        }
        let available = |group: &VolumeGroup| {
            let mut group = group.clone();
            let mut free = group.free_of_disks();
            for entry in self.promises.values().filter(|entry| entry.vg == group.name) {
                if entry.layout == Layout::Thin {
                    let size = entry.layout.whole(entry.size, group.extent_size).unwrap_or(u64::MAX);
                    group.thin_room = group.thin_room.map(|room| room.saturating_sub(size));
                    continue;
                }
                entry.layout.take(entry.size, &mut free, group.extent_size);
            }
            for (disk, left) in group.disks.iter_mut().zip(free) {
                disk.free = left;
            }
            group.free = group.disks.iter().fold(0, |sum, disk| sum.saturating_add(disk.free));
            // No volume fits into a group that cannot note it down.
            if volumes_that_fit(self.metadata_free(&group)) == 0 {
                group.free = 0;
                group.disks.iter_mut().for_each(|disk| disk.free = 0);
            }
            group
        };
        Some(groups.iter().map(available).collect())
    }
}

/// A volume that is being made. Dropped, it is one no more: it was not made, or
/// nobody knows, and then LVM's next report tells.
#[derive(Debug)]
pub struct Promise {
    ledger: Weak<watch::Sender<Known>>,
    number: u64,
}

impl Promise {
    /// The volume has been made: it counts until a report shows it.
    pub fn keep(self) {
        if let Some(known) = self.ledger.upgrade() {
            known.send_if_modified(|known| {
                let entry = known.promises.get_mut(&self.number);
                entry.map(|entry| entry.kept = true).is_some()
            });
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if let Some(known) = self.ledger.upgrade() {
            known.send_if_modified(|known| {
                let broken = known.promises.get(&self.number).is_some_and(|entry| !entry.kept);
                broken && known.promises.remove(&self.number).is_some()
            });
        }
    }
}

/// The latest report and the ledger. Clones share them.
#[derive(Debug, Clone)]
pub struct Capacity {
    node: Arc<str>,
    classes: Arc<DeviceClasses>,
    known: watch::Receiver<Known>,
    ledger: Weak<watch::Sender<Known>>,
}

impl Capacity {
    /// With the names that the node's configuration has for the groups.
    pub fn with_classes(self, classes: &DeviceClasses) -> Self {
        Self { classes: Arc::new(classes.clone()), ..self }
    }

    /// The latest report of LVM. None: it has not answered yet.
    pub fn latest(&self) -> Option<Groups> {
        self.known.borrow().groups.clone()
    }

    /// One group of the latest report of LVM.
    pub fn group(&self, vg: &VgName) -> Option<VolumeGroup> {
        self.latest()?.iter().find(|group| group.name == *vg).cloned()
    }

    /// What is left of a group's metadata area beside what is promised.
    pub fn metadata_free(&self, vg: &VgName) -> Option<u64> {
        let known = self.known.borrow();
        let group = known.groups.as_ref()?.iter().find(|group| group.name == *vg)?;
        Some(known.metadata_free(group))
    }

    /// The latest report, with what is free and not promised.
    pub fn available(&self) -> Option<Groups> {
        self.known.borrow().available()
    }

    /// What is in the trash now.
    pub fn set_trash(&self, trash: BTreeMap<VgName, u64>) {
        if let Some(known) = self.ledger.upgrade() {
            known.send_if_modified(|known| {
                let differs = known.trash != trash;
                known.trash = trash;
                differs
            });
        }
    }

    /// Enters a volume of `size` bytes that is about to be made.
    pub fn promise(&self, vg: &VgName, size: u64, layout: Layout) -> Promise {
        let mut number = 0;
        if let Some(known) = self.ledger.upgrade() {
            known.send_modify(|known| {
                number = known.next;
                known.next += 1;
                known.promises.insert(number, Entry { vg: vg.clone(), size, layout, kept: false });
            });
        }
        Promise { ledger: self.ledger.clone(), number }
    }

    /// What is available at once, with the unmounts that fail, then every time
    /// that either differs. Ends when the [`Reporter`] does.
    pub fn reports(&self, failing: Failing) -> impl Stream<Item = wire::CapacityReport> + Send + use<> {
        let mut capacity = self.clone();
        capacity.known.mark_changed();
        stream::unfold((capacity, failing, None), async |(mut capacity, mut failing, last)| {
            loop {
                tokio::select! {
                    changed = capacity.known.changed() => changed.ok()?,
                    // Where they are not watched, the groups still are.
                    Ok(()) = failing.changed() => {}
                }
                // A burst of promises is one message.
                if !capacity.known.borrow_and_update().promises.is_empty() {
                    sleep(QUIET).await;
                }
                let (available, trash) = {
                    let known = capacity.known.borrow_and_update();
                    (known.available(), known.trash.clone())
                };
                let Some(groups) = available else { continue };
                let report = to_wire(&capacity.node, &groups, &trash, &capacity.classes, &failing);
                if last.as_ref() != Some(&report) {
                    return Some((report.clone(), (capacity, failing, Some(report))));
                }
            }
        })
    }
}

fn to_wire(
    node: &str,
    groups: &[VolumeGroup],
    trash: &BTreeMap<VgName, u64>,
    classes: &DeviceClasses,
    failing: &Failing,
) -> wire::CapacityReport {
    // What the kernel has is looked for once: modules come with kernels.
    static KINDS: OnceLock<Vec<&str>> = OnceLock::new();
    let kinds = KINDS.get_or_init(Layout::kinds_here);
    let layouts = |group: &VolumeGroup| {
        let thin = group.thin_room.and(Some(Layout::Thin)).filter(|thin| thin.missing_module().is_none());
        kinds.iter().copied().chain(thin.map(Layout::kind)).map(str::to_owned).collect()
    };
    let disks = |group: &VolumeGroup| {
        let mut free = group.free_of_disks();
        free.sort_unstable_by(|a, b| b.cmp(a));
        free
    };
    wire::CapacityReport {
        node: node.to_owned(),
        volume_groups: groups
            .iter()
            .map(|group| wire::VolumeGroup {
                name: group.name.to_string(),
                size_bytes: group.size,
                free_bytes: group.free,
                extent_bytes: group.extent_size,
                disk_free_bytes: disks(group),
                layouts: layouts(group),
                thin_room_bytes: group.thin_room.unwrap_or(0),
                device_classes: classes.of(&group.name).map(ToString::to_string).collect(),
                default_device_class: classes.group(None) == Some(&group.name),
                trash_bytes: trash.get(&group.name).copied().unwrap_or(0),
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
    known: Arc<watch::Sender<Known>>,
}

impl<F> Reporter<F>
where
    F: Fn() -> Result<Vec<VolumeGroup>, ReportError> + Clone + Send + Sync + 'static,
{
    /// `report` asks LVM and may block. `operations` is how many of our own
    /// operations are under way: a burst of them is reported at its end.
    pub fn new(node: &str, operations: watch::Receiver<usize>, report: F) -> (Self, Capacity) {
        let known = Arc::new(watch::Sender::new(Known::default()));
        let (classes, ledger) = (Arc::default(), Arc::downgrade(&known));
        let capacity = Capacity { node: node.into(), classes, known: known.subscribe(), ledger };
        (Self { report, operations, known }, capacity)
    }

    /// Reports until dropped.
    ///
    /// # Errors
    /// When changes cannot be watched any more.
    pub async fn run(mut self, lock_directory: &Path, backup_directory: &Path) -> Result<(), ChangesError> {
        // Before the first report, so that no change is missed.
        let mut changes = Changes::watch(lock_directory, backup_directory)?;
        let mut known = self.known.subscribe();
        loop {
            self.report().await;
            tokio::select! {
                change = changes.next() => change?,
                // A volume whose change came before the last report, and its end after that.
                Ok(_) = known.wait_for(|known| known.promises.values().any(|entry| entry.kept)) => {}
            }
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
            // Volumes that are there before LVM is asked.
            let shown: Vec<u64> = {
                let known = self.known.borrow();
                known.promises.iter().filter(|(_, entry)| entry.kept).map(|(number, _)| *number).collect()
            };
            match tokio::task::spawn_blocking(report).await {
                Ok(Ok(mut groups)) => {
                    groups.sort_by(|a, b| a.name.cmp(&b.name));
                    self.publish(groups.into(), &shown);
                    return;
                }
                Ok(Err(error)) => warn!(%error, "cannot report the volume groups; trying again"),
                Err(error) => warn!(%error, "the report of the volume groups broke off; trying again"),
            }
            sleep(pause).await;
            pause = LONGEST_BACKOFF.min(pause * 2);
        }
    }

    fn publish(&self, groups: Groups, shown: &[u64]) {
        self.known.send_modify(|known| {
            if known.groups.as_ref() != Some(&groups) {
                for group in groups.iter() {
                    info!(vg = %group.name, size = group.size, free = group.free, "volume group");
                }
                known.groups = Some(groups);
            }
            // Both at once: a volume is never counted twice, nor not at all.
            known.promises.retain(|number, _| !shown.contains(number));
        });
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures::StreamExt;
    use lvm::names::PodUid;
    use lvm::report::{Disk, Metadata, RESERVED_METADATA};
    use lvm::trouble::Notes;
    use tokio::time::timeout;

    use super::*;
    use crate::node::trouble::Watcher;

    const GIB: u64 = 1 << 30;

    fn group(name: &str, free: u64) -> VolumeGroup {
        of_disks(name, &[free])
    }

    fn of_disks(name: &str, free: &[u64]) -> VolumeGroup {
        let disk = |(number, free): (usize, &u64)| Disk { name: format!("/dev/{number}"), free: *free };
        VolumeGroup {
            name: VgName::parse(name).unwrap(),
            size: 10 * GIB,
            free: free.iter().sum(),
            extent_size: 4 << 20,
            disks: free.iter().enumerate().map(disk).collect(),
            partial: false,
            metadata: Metadata::default(),
            thin_room: None,
        }
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
    async fn what_is_promised_is_not_available() {
        // Each report shows one volume more.
        let extent = 4 << 20;
        let bench = Bench::start(move |count| vec![group("vg0", GIB - (count - 1) * extent), group("vg1", GIB)]);
        let mut stream = Box::pin(bench.capacity.reports(Failing::none()));
        assert_eq!(next(&mut stream).await, GIB);
        let vg = VgName::parse("vg0").unwrap();
        // A burst is one message, in whole extents.
        let made = bench.capacity.promise(&vg, extent, Layout::Linear);
        let failed = bench.capacity.promise(&vg, 1, Layout::Linear);
        let huge = bench.capacity.promise(&VgName::parse("vg1").unwrap(), u64::MAX - extent, Layout::Linear);
        let report = timeout(Duration::from_secs(10), stream.next()).await.unwrap().unwrap();
        assert_eq!(report.volume_groups[0].free_bytes, GIB - 2 * extent);
        assert_eq!(report.volume_groups[1].free_bytes, 0);
        assert_eq!(bench.capacity.available().unwrap()[0].free, GIB - 2 * extent);
        assert_eq!(bench.capacity.group(&vg).unwrap().free, GIB);
        drop((failed, huge));
        assert_eq!(next(&mut stream).await, GIB - extent);
        // The report that shows a volume takes its promise's place: nothing is new.
        made.keep();
        bench.change("vg0");
        while bench.count() < 2 || bench.capacity.group(&vg).unwrap().free == GIB {
            sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(bench.capacity.available().unwrap()[0].free, GIB - extent);
        assert!(timeout(QUIET * 4, stream.next()).await.is_err());
    }

    #[tokio::test]
    async fn a_promised_thin_volume_takes_of_the_pool() {
        let bench = Bench::start(|_| vec![VolumeGroup { thin_room: Some(2 * GIB), ..of_disks("vg0", &[GIB]) }]);
        let mut stream = Box::pin(bench.capacity.reports(Failing::none()));
        assert_eq!(next(&mut stream).await, GIB);
        let made = bench.capacity.promise(&VgName::parse("vg0").unwrap(), GIB + 1, Layout::Thin);
        let report = timeout(Duration::from_secs(10), stream.next()).await.unwrap().unwrap();
        let group = &report.volume_groups[0];
        assert_eq!((group.free_bytes, group.thin_room_bytes), (GIB, GIB - (4 << 20)));
        drop(made);
    }

    #[tokio::test]
    async fn a_promised_mirror_takes_of_two_disks() {
        let bench = Bench::start(|_| vec![of_disks("vg0", &[GIB, 4 * GIB, 2 * GIB])]);
        let mut stream = Box::pin(bench.capacity.reports(Failing::none()));
        assert_eq!(next(&mut stream).await, 7 * GIB);
        let made = bench.capacity.promise(&VgName::parse("vg0").unwrap(), GIB, Layout::Raid1 { mirrors: 1 });
        let report = timeout(Duration::from_secs(10), stream.next()).await.unwrap().unwrap();
        let (group, leg) = (&report.volume_groups[0], GIB + (4 << 20));
        assert_eq!(group.disk_free_bytes, [4 * GIB - leg, GIB, 2 * GIB - leg]);
        assert_eq!(group.free_bytes, 7 * GIB - 2 * leg);
        drop(made);
        assert_eq!(next(&mut stream).await, 7 * GIB);
    }

    #[tokio::test]
    async fn a_group_that_can_note_down_no_further_volume_has_nothing_available() {
        let full = |count: u64| {
            let room = VOLUME_METADATA * if count < 2 { 2 } else { 0 };
            let metadata = Metadata { size: 1 << 20, free: RESERVED_METADATA + room, missing_disks: 0 };
            vec![VolumeGroup { metadata, ..group("vg0", GIB) }]
        };
        let bench = Bench::start(full);
        let mut stream = Box::pin(bench.capacity.reports(Failing::none()));
        assert_eq!(next(&mut stream).await, GIB);
        let vg = VgName::parse("vg0").unwrap();
        let one = bench.capacity.promise(&vg, 4 << 20, Layout::Linear);
        assert_eq!(next(&mut stream).await, GIB - (4 << 20));
        let two = bench.capacity.promise(&vg, 4 << 20, Layout::Linear);
        assert_eq!(next(&mut stream).await, 0);
        assert_eq!(bench.capacity.metadata_free(&vg), Some(RESERVED_METADATA));
        drop((one, two));
        assert_eq!(next(&mut stream).await, GIB);
        bench.change("vg0");
        assert_eq!(next(&mut stream).await, 0);
        assert_eq!(bench.capacity.group(&vg).unwrap().free, GIB);
    }

    /// LVM was asked before the volume was there, so its answer does not show it.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_promise_kept_during_a_report_counts_until_the_next() {
        let (asked, gate) = (Arc::new(AtomicU64::new(0)), Arc::new(std::sync::Mutex::new(())));
        let (counted, waits) = (Arc::clone(&asked), Arc::clone(&gate));
        let bench = Bench::start(move |count| {
            counted.store(count, Ordering::SeqCst);
            drop(waits.lock().unwrap());
            vec![group("vg0", if count < 3 { GIB } else { GIB / 2 })]
        });
        let vg = VgName::parse("vg0").unwrap();
        let mut stream = Box::pin(bench.capacity.reports(Failing::none()));
        assert_eq!(next(&mut stream).await, GIB);
        let promise = bench.capacity.promise(&vg, GIB / 2, Layout::Linear);
        assert_eq!(next(&mut stream).await, GIB / 2);
        let held = gate.lock().unwrap();
        bench.change("vg0");
        while asked.load(Ordering::SeqCst) < 2 {
            std::thread::sleep(Duration::from_millis(5));
        }
        promise.keep();
        drop(held);
        // Nothing more changes: it is asked for all the same.
        while bench.capacity.group(&vg).unwrap().free == GIB {
            assert_eq!(bench.capacity.available().unwrap()[0].free, GIB / 2);
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(bench.capacity.available().unwrap()[0].free, GIB / 2);
        assert!(timeout(QUIET * 4, stream.next()).await.is_err());
        assert_eq!(bench.count(), 3);
    }

    #[tokio::test]
    async fn groups_are_found_by_name_and_sorted() {
        let bench = Bench::start(|_| vec![group("b", 2), group("a", 1)]);
        assert_eq!(next(&mut Box::pin(bench.capacity.reports(Failing::none()))).await, 1);
        assert_eq!(bench.capacity.group(&VgName::parse("b").unwrap()).unwrap().free, 2);
        assert_eq!(bench.capacity.group(&VgName::parse("c").unwrap()), None);
    }
}
