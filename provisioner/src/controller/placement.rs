//! Whether any node has the room that a claim needs, and if not, how much is
//! missing where. Pure.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::time::Duration;

use lvm::layout::Layout;
use lvm::size::human;
use lvm::volume::trash_note;

use super::nodes::{State, View};
use super::validate::{GroupChoice, Request};

/// How many nodes a text names at most.
const NAMED: usize = 5;

/// Where a claim fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// On some node.
    Somewhere,
    /// On none; why, for its Event.
    Nowhere(String),
    /// Some node has not answered yet. If none of that changes, it is worth
    /// another look after this time.
    Unknown(Option<Duration>),
}

/// Looks for a node that has the room, among those that `class` allows and that
/// are not cordoned. A node that does not answer counts as unknown for the time
/// of `patience`, and not at all after that.
pub fn fit<V: Borrow<View>>(request: &Request, class: &str, nodes: &[V], patience: Duration) -> Fit {
    let group = &request.volume_group;
    if nodes.is_empty() {
        return Fit::Nowhere(format!(
            "no node has an lvprov node service yet, so nothing can be made in {group}. \
             Look at the pods of DaemonSet lvprov-node"
        ));
    }
    let nodes = nodes.iter().map(Borrow::borrow);
    let mut allowed = nodes.filter(|node| request.topologies.allow(&node.labels)).peekable();
    if allowed.peek().is_none() {
        return Fit::Nowhere(format!(
            "no node with an lvprov node service is among the allowedTopologies of StorageClass {class} ({}). Label a \
             node so, or use another StorageClass",
            request.topologies
        ));
    }
    let layout = request.layout;
    let (mut short, mut silent, mut cordoned, mut unable) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut unknown = None;
    for node in allowed {
        match &node.state {
            State::Up(_) if node.chosen(group).is_none() => {}
            _ if node.cordoned => cordoned.push(node.name.as_str()),
            State::Connecting => unknown = unknown.or(Some(None)),
            State::Down { since, .. } => match patience.saturating_sub(since.elapsed()) {
                Duration::ZERO => silent.push(node.name.as_str()),
                left => unknown = Some(Some(left)),
            },
            State::Up(_) => {
                let Some(found) = node.chosen(group) else {
                    continue;
                };
                if !found.serves(layout) {
                    unable.push(node.name.as_str());
                    continue;
                }
                let needed = layout.whole(request.bytes, found.extent).unwrap_or(u64::MAX);
                let free = found.largest(layout);
                match needed.checked_sub(free) {
                    None | Some(0) => return Fit::Somewhere,
                    Some(missing) => short.push((missing, free, node.name.as_str(), found.trash)),
                }
            }
        }
    }
    if let Some(again) = unknown {
        return Fit::Unknown(again);
    }
    let no_kernel = match layout {
        Layout::Thin => "they have no thin pool there (thinPools in /etc/lvprov/node.json)".to_owned(),
        _ => format!("their kernels have no module for layout {}", layout.kind()),
    };
    let not_counted: String =
        [("they do not answer", silent), ("they are cordoned", cordoned), (no_kernel.as_str(), unable)]
            .into_iter()
            .filter(|(_, names)| !names.is_empty())
            .map(|(why, names)| format!(" Not counted, since {why}: {}.", listed(names.iter().copied())))
            .collect();
    let allowed = match request.topologies.allow(&BTreeMap::new()) {
        true => String::new(),
        false => format!(" of those that StorageClass {class} allows"),
    };
    if short.is_empty() {
        return Fit::Nowhere(format!(
            "no node{allowed} has {group}.{not_counted} {}, or use a StorageClass with {} that `lvprov capacity` shows",
            match group {
                GroupChoice::Group(_) => "Make it on a node (vgcreate)",
                GroupChoice::Class(_) => "Name a node's volume group so (deviceClasses in /etc/lvprov/node.json)",
            },
            match group {
                GroupChoice::Group(_) => "a volumeGroup",
                GroupChoice::Class(_) => "a deviceClass",
            }
        ));
    }
    // The nearest miss first: that is where to add a disk.
    short.sort_unstable();
    let nodes = listed(short.iter().map(|(missing, free, name, trash)| {
        format!("{name} has {} free, {} missing{}", human(*free), human(*missing), trash_note(*trash))
    }));
    Fit::Nowhere(format!(
        "{} in {group}{how} fit on no node{allowed}: {nodes}.{not_counted} Ask for less, delete volumes, or \
         add a disk to the volume group (vgextend)",
        human(request.bytes),
        how = match layout.is_linear() {
            true => String::new(),
            false if layout == Layout::Thin => " in its thin pool".to_owned(),
            false => format!(" as {} ({} disks each)", layout.kind(), layout.legs()),
        }
    ))
}

fn listed<T: ToString>(items: impl ExactSizeIterator<Item = T>) -> String {
    let more = items.len().saturating_sub(NAMED);
    let mut text = items.take(NAMED).map(|item| item.to_string()).collect::<Vec<_>>().join("; ");
    if more > 0 {
        text.push_str(&format!("; and {more} more"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::nodes::Group;
    use super::super::topology::Topologies;
    use super::super::validate::Source;
    use super::*;
    use lvm::filesystem::FsType;
    use lvm::names::VgName;
    use serde_json::json;
    use std::sync::Arc;
    use std::time::Instant;

    const GIB: u64 = 1 << 30;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn nowhere(request: &Request, nodes: &[View]) -> String {
        match fit(request, "fast", nodes, PATIENCE) {
            Fit::Nowhere(why) => why,
            other => panic!("{other:?}"),
        }
    }

    fn request(bytes: u64) -> Request {
        Request {
            source: Source::default(),
            data: None,
            volume_group: GroupChoice::Group(VgName::parse("vg0").unwrap()),
            layout: Layout::Linear,
            fs_type: FsType::Xfs,
            block: false,
            end: Default::default(),
            mount_options: String::new(),
            mkfs_options: String::new(),
            bytes,
            access_modes: vec!["ReadWriteOnce".into()],
            topologies: Topologies::default(),
        }
    }

    fn node(name: &str, state: State) -> View {
        View::of(name, state)
    }

    fn up(name: &str, group: &str, free: u64) -> View {
        node(name, State::Up(vec![Group::of(group, 100 * GIB, free, 4 << 20)]))
    }

    fn down(name: &str, ago: u64) -> View {
        let since = Instant::now().checked_sub(Duration::from_secs(ago)).unwrap();
        node(name, State::Down { since, why: "refused".into() })
    }

    #[test]
    fn nothing_is_said_where_it_fits() {
        let nodes = [up("a", "vg0", GIB), up("b", "vg0", 2 * GIB)];
        assert_eq!(fit(&request(2 * GIB), "fast", &nodes, PATIENCE), Fit::Somewhere);
    }

    #[test]
    fn a_volume_is_whole_extents() {
        let nodes = [up("a", "vg0", 2 * GIB)];
        let text = nowhere(&request(2 * GIB + 1), &nodes);
        assert!(text.contains("a has 2 GiB free, 4 MiB missing"), "{text}");
    }

    #[test]
    fn a_mirror_needs_its_room_on_two_disks_and_a_kernel_that_can() {
        let raid1 = |bytes| Request { layout: Layout::Raid1 { mirrors: 1 }, ..request(bytes) };
        let disks = |name: &str, disks: &[u64]| {
            let group = Group { disks: disks.to_vec(), ..Group::of("vg0", 100 * GIB, disks.iter().sum(), 4 << 20) };
            node(name, State::Up(vec![group]))
        };
        let nodes = [disks("a", &[9 * GIB, GIB]), disks("b", &[20 * GIB])];
        assert_eq!(fit(&raid1(GIB - (4 << 20)), "fast", &nodes, PATIENCE), Fit::Somewhere);
        let text = nowhere(&raid1(GIB), &nodes);
        assert!(text.contains("1 GiB in volume group vg0 as raid1 (2 disks each) fit on no node"), "{text}");
        assert!(text.contains("a has 1020 MiB free, 4 MiB missing; b has 0 B free, 1 GiB missing."), "{text}");
        let mut old = disks("c", &[9 * GIB, 9 * GIB]);
        if let State::Up(groups) = &mut old.state {
            groups[0].layouts.clear();
        }
        assert_eq!(fit(&request(GIB), "fast", std::slice::from_ref(&old), PATIENCE), Fit::Somewhere);
        let text = nowhere(&raid1(GIB), &[nodes[0].clone(), old]);
        assert!(text.contains("Not counted, since their kernels have no module for layout raid1: c."), "{text}");
    }

    #[test]
    fn a_device_class_is_another_group_on_each_node() {
        let class = |name: Option<&str>| GroupChoice::Class(name.map(|name| name.parse().unwrap()));
        let request = |class| Request { volume_group: class, ..request(2 * GIB) };
        let named = |node_name: &str, group: &str, free: u64, default: bool| {
            let group = Group {
                device_classes: vec!["fast".into()],
                is_default: default,
                ..Group::of(group, 9 * GIB, free, 4 << 20)
            };
            node(node_name, State::Up(vec![Group::of("vg0", 9 * GIB, 9 * GIB, 4 << 20), group]))
        };
        let nodes = [named("a", "nvme", GIB, true), named("b", "ssd", 3 * GIB, false)];
        assert_eq!(fit(&request(class(Some("fast"))), "c", &nodes, PATIENCE), Fit::Somewhere);
        let text = nowhere(&request(class(None)), &nodes);
        assert!(text.contains("2 GiB in the default device class fit on no node: a has 1 GiB free"), "{text}");
        let text = nowhere(&request(class(Some("slow"))), &nodes);
        assert!(text.contains("no node has device class slow.") && text.contains("deviceClasses in"), "{text}");
    }

    #[test]
    fn what_is_missing_where_the_nearest_miss_first() {
        let nodes = [up("a", "vg0", GIB), up("b", "vg0", 2 * GIB), up("c", "other", 9 * GIB)];
        let text = nowhere(&request(4 * GIB), &nodes);
        assert!(text.contains("b has 2 GiB free, 2 GiB missing; a has 1 GiB free, 3 GiB missing."), "{text}");
    }

    #[test]
    fn many_nodes_are_summed_up() {
        let nodes: Vec<_> = (0..9).map(|i| up(&format!("n{i}"), "vg0", i)).collect();
        let text = nowhere(&request(GIB), &nodes);
        assert!(text.contains("; and 4 more"), "{text}");
        assert!(text.len() < 1000, "{text}");
    }

    #[test]
    fn no_node_has_the_group() {
        let text = nowhere(&request(GIB), &[up("a", "other", 9 * GIB)]);
        assert!(text.contains("no node has volume group vg0"), "{text}");
        assert!(nowhere(&request(GIB), &[]).contains("DaemonSet"));
    }

    #[test]
    fn silent_nodes_are_waited_for_and_then_told_of() {
        let text = nowhere(&request(4 * GIB), &[up("a", "vg0", GIB), down("b", 31)]);
        assert!(text.contains("do not answer: b."), "{text}");
        let connecting = [up("a", "vg0", GIB), node("b", State::Connecting)];
        assert_eq!(fit(&request(4 * GIB), "fast", &connecting, PATIENCE), Fit::Unknown(None));
        let Fit::Unknown(Some(again)) = fit(&request(4 * GIB), "fast", &[down("b", 20), up("a", "vg0", GIB)], PATIENCE)
        else {
            panic!("not waited for");
        };
        assert!(again > Duration::from_secs(5) && again <= Duration::from_secs(10), "{again:?}");
        // What is known to fit need not wait.
        assert_eq!(fit(&request(GIB), "fast", &[down("b", 1), up("a", "vg0", GIB)], PATIENCE), Fit::Somewhere);
    }
    fn of_zone(zone: &str, view: View) -> View {
        View { labels: Arc::new(BTreeMap::from([("zone".to_owned(), zone.to_owned())])), ..view }
    }

    #[test]
    fn room_where_the_class_allows_no_volume_is_none() {
        let class = json!({"metadata": {"name": "fast"}, "provisioner": "p", "allowedTopologies":
            [{"matchLabelExpressions": [{"key": "zone", "values": ["a"]}]}]});
        let topologies = Topologies::of(&serde_json::from_value(class).unwrap());
        let request = |bytes| Request { topologies: topologies.clone(), ..request(bytes) };
        let elsewhere = [of_zone("b", up("b", "vg0", 9 * GIB)), up("c", "vg0", 9 * GIB)];
        let text = nowhere(&request(GIB), &elsewhere);
        assert!(text.contains("allowedTopologies of StorageClass fast (zone in [a])"), "{text}");
        let mut nodes = elsewhere.to_vec();
        nodes.push(of_zone("a", up("a", "vg0", GIB)));
        assert_eq!(fit(&request(GIB), "fast", &nodes, PATIENCE), Fit::Somewhere);
        let text = nowhere(&request(2 * GIB), &nodes);
        assert!(text.contains("on no node of those that StorageClass fast allows: a has 1 GiB free"), "{text}");
        assert!(!text.contains("b has") && !text.contains("c has"), "{text}");
    }

    #[test]
    fn cordoned_nodes_are_told_of_and_not_counted() {
        let cordoned = |view: View| View { cordoned: true, ..view };
        let nodes = [cordoned(up("a", "vg0", 9 * GIB)), up("b", "vg0", GIB), cordoned(up("c", "other", 9 * GIB))];
        let text = nowhere(&request(4 * GIB), &nodes);
        assert!(text.contains("b has 1 GiB free, 3 GiB missing. Not counted, since they are cordoned: a."), "{text}");
        assert_eq!(fit(&request(GIB), "fast", &nodes, PATIENCE), Fit::Somewhere);
        // Nor waited for.
        let text = nowhere(&request(4 * GIB), &[cordoned(node("new", State::Connecting)), nodes[1].clone()]);
        assert!(text.contains("cordoned: new."), "{text}");
    }
}
