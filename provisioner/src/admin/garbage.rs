//! Whether an item of an inventory is garbage. Pure, and in doubt it is not.

use std::collections::HashSet;
use std::time::Duration;

use lvprov_proto::lvprov::inventory_item::Item;
use lvprov_proto::lvprov::{DataVolume, LogDirectory, LogVolume, Mount, Snapshot};

use super::cluster::{ClusterView, Reference};
use super::table::age;

/// What an empty directory may use: its own block.
const EMPTY: u64 = 4096;

/// What is to become of an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Stays, because.
    Keep(Kept),
    /// Nothing owns it any more; why, for people.
    Garbage(String),
}

/// Why an item stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// Made by another cluster, or by nobody that is known.
    OtherCluster,
    /// Too young: what owns it may still be under way.
    Young,
    /// Mounted, or held open.
    InUse,
    /// A PersistentVolume refers to it.
    Volume,
    /// The claim is there, and has no other volume.
    Claim,
    /// A VolumeSnapshotContent refers to it.
    Snapshot,
    /// Its pod is there.
    Pod,
    /// Its retention has not ended.
    Retention,
    /// It has directories.
    Directories,
    /// Too little is known of it.
    Unknown,
}

/// The data volumes of this cluster that nodes have shown in this run.
#[derive(Debug, Default)]
pub struct Seen(HashSet<(String, String, String)>);

impl Seen {
    /// Notes what `node` has shown. Only data volumes count, and of them those
    /// of `cluster`.
    pub fn note(&mut self, node: &str, cluster: &str, items: &[Item]) {
        for item in items {
            if let Item::DataVolume(volume) = item
                && volume.cluster == cluster
            {
                self.0.insert((node.to_owned(), volume.volume_group.clone(), volume.logical_volume.clone()));
            }
        }
    }

    /// Whether a volume is where its PV says, and not merely said to be.
    fn confirms(&self, reference: &Reference) -> bool {
        reference.topology.as_ref().is_some_and(|node| {
            self.0.contains(&(node.clone(), reference.volume_group.clone(), reference.logical_volume.clone()))
        })
    }
}

/// What is judged, and when.
#[derive(Debug, Clone, Copy)]
pub struct Judge<'a> {
    /// The cluster.
    pub view: &'a ClusterView,
    /// The nodes.
    pub seen: &'a Seen,
    /// Seconds since 1970.
    pub now: i64,
    /// Nothing younger is garbage.
    pub older_than: Duration,
}

impl Judge<'_> {
    /// Decides about an item of this node.
    pub fn judge(&self, node: &str, item: &Item) -> Verdict {
        match item {
            Item::DataVolume(volume) => self.data(node, volume),
            Item::LogVolume(volume) => self.log(volume),
            Item::LogDirectory(directory) => self.directory(directory),
            Item::Mount(mount) => self.mount(mount),
            Item::Snapshot(one) => self.snapshot(one),
            // It goes when its time has passed.
            Item::Trashed(_) => Verdict::Keep(Kept::Retention),
        }
    }

    /// How old an item is, where that is known.
    pub fn age_of(&self, item: &Item) -> Option<Duration> {
        let since = match item {
            Item::DataVolume(volume) => volume.created_unix,
            Item::LogVolume(volume) => volume.created_unix,
            Item::LogDirectory(directory) => directory.last_used_unix,
            Item::Trashed(trashed) => trashed.trashed_unix,
            Item::Snapshot(one) => one.created_unix,
            Item::Mount(_) => 0,
        };
        self.elapsed(since)
    }

    fn elapsed(&self, since: i64) -> Option<Duration> {
        let elapsed = (since > 0).then(|| self.now.saturating_sub(since))?;
        u64::try_from(elapsed).ok().map(Duration::from_secs)
    }

    fn old_enough(&self, since: i64) -> bool {
        self.elapsed(since).is_some_and(|elapsed| elapsed >= self.older_than)
    }

    fn data(&self, node: &str, volume: &DataVolume) -> Verdict {
        if volume.cluster.is_empty() || volume.cluster != self.view.id {
            return Verdict::Keep(Kept::OtherCluster);
        }
        if !self.old_enough(volume.created_unix) {
            return Verdict::Keep(Kept::Young);
        }
        if volume.open {
            return Verdict::Keep(Kept::InUse);
        }
        // Its name is unique, since it is made of the claim's UID. So a PV that
        // has this name means this volume, also where it says another node or
        // group: disks are moved, nodes are installed anew under other names.
        let mut named = self.view.volumes.values().filter(|one| one.logical_volume == volume.logical_volume);
        let is_here = |one: &Reference| {
            one.volume_group == volume.volume_group && one.topology.as_deref().is_none_or(|name| name == node)
        };
        if named.clone().any(is_here) {
            return Verdict::Keep(Kept::Volume);
        }
        // Unless there are two of them, and the other one has just been seen
        // where the PV says: this one was made on a node that the scheduler
        // gave up afterwards.
        if !named.clone().all(|one| self.seen.confirms(one)) {
            return Verdict::Keep(Kept::Unknown);
        }
        let twin = named.next();
        let owner = format!("{}/{}", volume.claim_namespace, volume.claim_name);
        let place = |other: &Reference| {
            let node = other.topology.as_deref().unwrap_or("another node");
            format!("{}/{} on {node}", other.volume_group, other.logical_volume)
        };
        let Some(claim) = self.view.claims.get(&volume.claim_uid) else {
            return Verdict::Garbage(match twin {
                Some(other) => format!("its PersistentVolume has another volume: {}", place(other)),
                None => format!("no PersistentVolume, and its claim {owner} has gone"),
            });
        };
        match self.view.volumes.get(&claim.volume) {
            Some(other) => Verdict::Garbage(format!("its claim {owner} has another volume: {}", place(other))),
            None => Verdict::Keep(Kept::Claim),
        }
    }

    fn snapshot(&self, one: &Snapshot) -> Verdict {
        if one.cluster.is_empty() || one.cluster != self.view.id {
            return Verdict::Keep(Kept::OtherCluster);
        }
        if !self.old_enough(one.created_unix) {
            return Verdict::Keep(Kept::Young);
        }
        if one.open {
            return Verdict::Keep(Kept::InUse);
        }
        let asked_by = format!("{}/{}", one.snapshot_namespace, one.snapshot_name);
        if one.of_clone {
            // Its UID is that of the claim that the clone is for.
            return match self.view.claims.get(&one.snapshot_uid) {
                None => {
                    Verdict::Garbage(format!("a clone was copied from it, and the clone's claim {asked_by} has gone"))
                }
                Some(claim) if !claim.volume.is_empty() => {
                    Verdict::Garbage(format!("a clone was copied from it, and claim {asked_by} has its volume"))
                }
                Some(_) => Verdict::Keep(Kept::Claim),
            };
        }
        match &self.view.snapshots {
            // Not known, or nobody can have one.
            None => Verdict::Keep(Kept::Unknown),
            Some(all) if all.contains(&one.logical_volume) => Verdict::Keep(Kept::Snapshot),
            Some(_) => {
                Verdict::Garbage(format!("no VolumeSnapshotContent, and VolumeSnapshot {asked_by} is not its owner"))
            }
        }
    }

    fn log(&self, volume: &LogVolume) -> Verdict {
        // Without being mounted it does not say what is in it.
        if !volume.mounted {
            return Verdict::Keep(Kept::Unknown);
        }
        if volume.directories > 0 {
            return Verdict::Keep(Kept::Directories);
        }
        if !self.old_enough(volume.created_unix) {
            return Verdict::Keep(Kept::Young);
        }
        Verdict::Garbage("no pod's directory is left in it".to_owned())
    }

    fn directory(&self, directory: &LogDirectory) -> Verdict {
        if directory.mounted {
            return Verdict::Keep(Kept::InUse);
        }
        let name = format!("{}/{}", directory.namespace, directory.pod_name);
        if directory.pod_uid.is_empty() {
            // A mount that was broken off leaves an empty directory without a
            // record. With files in it, a person has to look.
            return if self.view.pod_names.contains(&name) {
                Verdict::Keep(Kept::Pod)
            } else if directory.used_bytes <= EMPTY {
                Verdict::Garbage("empty, without a record, and no pod of its name".to_owned())
            } else {
                Verdict::Keep(Kept::Unknown)
            };
        }
        if self.view.pods.contains(&directory.pod_uid) {
            return Verdict::Keep(Kept::Pod);
        }
        let Some(unused) = self.elapsed(directory.last_used_unix) else {
            return Verdict::Keep(Kept::Unknown);
        };
        let retention = Duration::from_secs(directory.retention_seconds);
        match unused.checked_sub(retention) {
            Some(over) if unused >= self.older_than => Verdict::Garbage(format!(
                "pod {name} has gone, and its retention of {} ended {} ago",
                age(retention),
                age(over)
            )),
            Some(_) => Verdict::Keep(Kept::Young),
            None => Verdict::Keep(Kept::Retention),
        }
    }

    fn mount(&self, mount: &Mount) -> Verdict {
        if mount.pod_uid.is_empty() {
            // A log volume's, and only listed where its volume group has gone.
            return Verdict::Garbage(mount.reason.clone());
        }
        if self.view.pods.contains(&mount.pod_uid) {
            return Verdict::Keep(Kept::Pod);
        }
        Verdict::Garbage(format!("its pod {} has gone", mount.pod_uid))
    }
}

#[cfg(test)]
mod tests {
    use super::super::cluster::{Claim, Reference};
    use super::*;

    const NOW: i64 = 1_800_000_000;
    const DAY: i64 = 86_400;

    fn view() -> ClusterView {
        let mut view = ClusterView { id: "cluster".into(), ..ClusterView::default() };
        view.pods.insert("living".into());
        view.pod_names.insert("shop/web-0".into());
        view
    }

    /// On node a, of whose peers nothing is known.
    fn judged(view: &ClusterView, item: Item) -> Verdict {
        judged_beside(view, &Seen::default(), item)
    }

    fn judged_beside(view: &ClusterView, seen: &Seen, item: Item) -> Verdict {
        Judge { view, seen, now: NOW, older_than: Duration::from_secs(300) }.judge("a", &item)
    }

    fn seen(node: &str, items: &[Item]) -> Seen {
        let mut seen = Seen::default();
        seen.note(node, "cluster", items);
        seen
    }

    fn garbage(verdict: &Verdict) -> &str {
        match verdict {
            Verdict::Garbage(why) => why,
            Verdict::Keep(kept) => panic!("kept: {kept:?}"),
        }
    }

    fn data(change: impl FnOnce(&mut DataVolume)) -> Item {
        let mut volume = DataVolume {
            volume_group: "vg0".into(),
            logical_volume: "pvc-u1".into(),
            size_bytes: 1 << 30,
            created_unix: NOW - DAY,
            claim_uid: "u1".into(),
            claim_namespace: "shop".into(),
            claim_name: "data-db-0".into(),
            cluster: "cluster".into(),
            open: false,
            layout: "linear".into(),
            ..DataVolume::default()
        };
        change(&mut volume);
        Item::DataVolume(volume)
    }

    fn reference(topology: Option<&str>, group: &str, volume: &str) -> Reference {
        Reference { topology: topology.map(str::to_owned), volume_group: group.into(), logical_volume: volume.into() }
    }

    #[test]
    fn a_data_volume_without_volume_and_claim_is_garbage() {
        let verdict = judged(&view(), data(|_| ()));
        assert_eq!(garbage(&verdict), "no PersistentVolume, and its claim shop/data-db-0 has gone");
    }

    #[test]
    fn another_clusters_data_is_kept() {
        for cluster in ["other", ""] {
            let verdict = judged(&view(), data(|volume| volume.cluster = cluster.into()));
            assert_eq!(verdict, Verdict::Keep(Kept::OtherCluster));
        }
        let nameless = ClusterView::default();
        let verdict = judged(&nameless, data(|volume| volume.cluster = String::new()));
        assert_eq!(verdict, Verdict::Keep(Kept::OtherCluster));
    }

    #[test]
    fn young_data_is_kept_and_that_of_unknown_age() {
        for created in [NOW - 299, NOW + DAY, 0] {
            let verdict = judged(&view(), data(|volume| volume.created_unix = created));
            assert_eq!(verdict, Verdict::Keep(Kept::Young), "{created}");
        }
    }

    #[test]
    fn open_data_is_kept() {
        assert_eq!(judged(&view(), data(|volume| volume.open = true)), Verdict::Keep(Kept::InUse));
    }

    #[test]
    fn data_of_a_persistent_volume_is_kept_under_whatever_name() {
        for (name, topology) in [("pvc-u1", Some("a")), ("made-by-hand", Some("a")), ("anywhere", None)] {
            let mut view = view();
            view.volumes.insert(name.into(), reference(topology, "vg0", "pvc-u1"));
            assert_eq!(judged(&view, data(|_| ())), Verdict::Keep(Kept::Volume), "{name}");
        }
    }

    #[test]
    fn data_of_a_claim_that_waits_or_has_lost_its_volume_is_kept() {
        for volume in ["", "pvc-u1"] {
            let mut view = view();
            view.claims.insert("u1".into(), Claim { name: "shop/data-db-0".into(), volume: volume.into() });
            assert_eq!(judged(&view, data(|_| ())), Verdict::Keep(Kept::Claim), "{volume:?}");
        }
    }

    /// The claim is bound to the volume of its name, on node b.
    fn bound_on_b() -> ClusterView {
        let mut view = view();
        view.claims.insert("u1".into(), Claim { name: "shop/data-db-0".into(), volume: "pvc-u1".into() });
        view.volumes.insert("pvc-u1".into(), reference(Some("b"), "vg0", "pvc-u1"));
        view
    }

    /// Node b was installed anew and is now called a: its only copy of the data
    /// is what a shows.
    #[test]
    fn data_that_came_back_under_another_node_name_is_kept() {
        let bound = bound_on_b();
        let mut retained = bound_on_b();
        retained.claims.clear();
        let other = data(|volume| volume.logical_volume = "pvc-u2".into());
        let strangers = data(|volume| volume.cluster = "other".into());
        let silent_or_without_it =
            [Seen::default(), seen("b", &[]), seen("b", &[other, strangers]), seen("c", &[data(|_| ())])];
        for seen in &silent_or_without_it {
            for view in [&bound, &retained] {
                let verdict = judged_beside(view, seen, data(|_| ()));
                assert_eq!(verdict, Verdict::Keep(Kept::Unknown), "{seen:?}");
            }
        }
    }

    #[test]
    fn data_whose_group_was_renamed_is_kept() {
        let mut view = bound_on_b();
        view.volumes.insert("pvc-u1".into(), reference(Some("a"), "old", "pvc-u1"));
        let itself = seen("a", &[data(|_| ())]);
        assert_eq!(judged_beside(&view, &itself, data(|_| ())), Verdict::Keep(Kept::Unknown));
    }

    #[test]
    fn data_that_was_made_twice_is_garbage_where_the_volume_is_not() {
        let mut view = bound_on_b();
        let there = seen("b", &[data(|_| ())]);
        let verdict = judged_beside(&view, &there, data(|_| ()));
        assert_eq!(garbage(&verdict), "its claim shop/data-db-0 has another volume: vg0/pvc-u1 on b");
        // A second PV of the same name that nobody has seen.
        view.volumes.insert("by-hand".into(), reference(Some("c"), "vg0", "pvc-u1"));
        assert_eq!(judged_beside(&view, &there, data(|_| ())), Verdict::Keep(Kept::Unknown));
        view.volumes.remove("by-hand");
        view.claims.clear();
        let verdict = judged_beside(&view, &there, data(|_| ()));
        assert_eq!(garbage(&verdict), "its PersistentVolume has another volume: vg0/pvc-u1 on b");
    }

    fn log(change: impl FnOnce(&mut LogVolume)) -> Item {
        let mut volume = LogVolume { created_unix: NOW - DAY, mounted: true, ..LogVolume::default() };
        change(&mut volume);
        Item::LogVolume(volume)
    }

    #[test]
    fn a_log_volume_goes_with_its_last_directory() {
        garbage(&judged(&view(), log(|_| ())));
        assert_eq!(judged(&view(), log(|volume| volume.directories = 1)), Verdict::Keep(Kept::Directories));
        assert_eq!(judged(&view(), log(|volume| volume.mounted = false)), Verdict::Keep(Kept::Unknown));
        assert_eq!(judged(&view(), log(|volume| volume.created_unix = NOW)), Verdict::Keep(Kept::Young));
    }

    fn directory(change: impl FnOnce(&mut LogDirectory)) -> Item {
        let mut directory = LogDirectory {
            namespace: "shop".into(),
            pod_name: "web-9".into(),
            directory: "web-9".into(),
            pod_uid: "dead".into(),
            used_bytes: 1 << 20,
            retention_seconds: 3 * DAY as u64,
            last_used_unix: NOW - 4 * DAY,
            ..LogDirectory::default()
        };
        change(&mut directory);
        Item::LogDirectory(directory)
    }

    #[test]
    fn a_log_directory_goes_when_pod_and_retention_have_gone() {
        let verdict = judged(&view(), directory(|_| ()));
        assert_eq!(garbage(&verdict), "pod shop/web-9 has gone, and its retention of 3d ended 1d ago");
        let kept = |change: fn(&mut LogDirectory)| judged(&view(), directory(change));
        assert_eq!(kept(|one| one.pod_uid = "living".into()), Verdict::Keep(Kept::Pod));
        assert_eq!(kept(|one| one.mounted = true), Verdict::Keep(Kept::InUse));
        assert_eq!(kept(|one| one.last_used_unix = NOW - 2 * DAY), Verdict::Keep(Kept::Retention));
        assert_eq!(kept(|one| one.last_used_unix = 0), Verdict::Keep(Kept::Unknown));
        // Retention 0 still leaves the time in which a pod is started.
        assert_eq!(kept(|one| (one.retention_seconds, one.last_used_unix) = (0, NOW - 10)), Verdict::Keep(Kept::Young));
    }

    #[test]
    fn a_directory_without_record_goes_only_when_empty_and_nobodys() {
        let lost = |change: fn(&mut LogDirectory)| {
            let item = directory(|one| {
                (one.pod_uid, one.used_bytes, one.last_used_unix) = (String::new(), 0, 0);
                change(one);
            });
            judged(&view(), item)
        };
        garbage(&lost(|_| ()));
        assert_eq!(lost(|one| one.used_bytes = 1 << 20), Verdict::Keep(Kept::Unknown));
        assert_eq!(lost(|one| one.pod_name = "web-0".into()), Verdict::Keep(Kept::Pod));
    }

    fn mount(pod: &str) -> Item {
        Item::Mount(Mount { pod_uid: pod.into(), reason: "its volume group is gone".into(), ..Mount::default() })
    }

    #[test]
    fn a_mount_goes_with_its_pod_or_its_volume() {
        assert_eq!(garbage(&judged(&view(), mount("dead"))), "its pod dead has gone");
        assert_eq!(garbage(&judged(&view(), mount(""))), "its volume group is gone");
        assert_eq!(judged(&view(), mount("living")), Verdict::Keep(Kept::Pod));
    }

    fn snapshot(change: impl FnOnce(&mut Snapshot)) -> Item {
        let mut one = Snapshot {
            volume_group: "vg0".into(),
            logical_volume: "snap-1".into(),
            cluster: "cluster".into(),
            created_unix: NOW - DAY,
            snapshot_uid: "1".into(),
            snapshot_namespace: "shop".into(),
            snapshot_name: "before-upgrade".into(),
            ..Snapshot::default()
        };
        change(&mut one);
        Item::Snapshot(one)
    }

    #[test]
    fn a_snapshot_is_garbage_only_where_it_is_known_that_nobody_has_it() {
        let mut view = view();
        assert_eq!(judged(&view, snapshot(|_| ())), Verdict::Keep(Kept::Unknown));
        view.snapshots = Some(HashSet::from(["snap-1".to_owned()]));
        assert_eq!(judged(&view, snapshot(|_| ())), Verdict::Keep(Kept::Snapshot));
        view.snapshots = Some(HashSet::new());
        assert!(garbage(&judged(&view, snapshot(|_| ()))).contains("shop/before-upgrade"));
        assert_eq!(judged(&view, snapshot(|one| one.cluster = "other".into())), Verdict::Keep(Kept::OtherCluster));
        assert_eq!(judged(&view, snapshot(|one| one.created_unix = NOW - 1)), Verdict::Keep(Kept::Young));
        assert_eq!(judged(&view, snapshot(|one| one.open = true)), Verdict::Keep(Kept::InUse));
    }

    #[test]
    fn what_a_clone_is_copied_from_is_kept_until_its_claim_has_a_volume() {
        let mut view = view();
        let of_clone = || snapshot(|one| one.of_clone = true);
        assert!(garbage(&judged(&view, of_clone())).contains("has gone"));
        let claim = |volume: &str| Claim { name: "shop/copy".into(), volume: volume.into() };
        view.claims.insert("1".into(), claim(""));
        assert_eq!(judged(&view, of_clone()), Verdict::Keep(Kept::Claim));
        view.claims.insert("1".into(), claim("pvc-1"));
        assert!(garbage(&judged(&view, of_clone())).contains("has its volume"));
    }
}
