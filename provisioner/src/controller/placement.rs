//! Whether any node has the room that a claim needs, and if not, how much is
//! missing where. Pure.

use lvm::size::{human, round_up};

use super::nodes::{State, View};
use super::validate::Request;

/// How many nodes a text names at most.
const NAMED: usize = 5;

/// Why the claim fits on no node, for its Event. None where it fits somewhere,
/// or where not enough is known to say.
pub fn fits_nowhere(request: &Request, nodes: &[View]) -> Option<String> {
    let group = request.volume_group.as_str();
    if nodes.is_empty() {
        return Some(format!(
            "no node has an lvprov node service yet, so nothing can be made in volume group {group}. \
             Look at the pods of DaemonSet lvprov-node"
        ));
    }
    let mut short = Vec::new();
    let mut silent = Vec::new();
    for node in nodes {
        match &node.state {
            State::Connecting => return None,
            State::Down { .. } => silent.push(node.name.as_str()),
            State::Up(_) => {
                let Some(found) = node.group(group) else {
                    continue;
                };
                let needed = round_up(request.bytes, found.extent.max(1)).unwrap_or(u64::MAX);
                match needed.checked_sub(found.free) {
                    None | Some(0) => return None,
                    Some(missing) => short.push((missing, found.free, node.name.as_str())),
                }
            }
        }
    }
    let silence = match silent.as_slice() {
        [] => String::new(),
        names => format!(" Not counted: {}, which do not answer.", listed(names.iter().copied())),
    };
    if short.is_empty() {
        return Some(format!(
            "no node has volume group {group}.{silence} Make it on a node (vgcreate), or use a \
             StorageClass with a volumeGroup that `lvprov capacity` shows"
        ));
    }
    // The nearest miss first: that is where to add a disk.
    short.sort_unstable();
    let nodes = listed(
        short
            .iter()
            .map(|(missing, free, name)| format!("{name} has {} free, {} missing", human(*free), human(*missing))),
    );
    Some(format!(
        "{} in volume group {group} fit on no node: {nodes}.{silence} Ask for less, delete volumes, or \
         add a disk to the volume group (vgextend)",
        human(request.bytes)
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
    use super::*;
    use lvm::filesystem::FsType;
    use lvm::names::VgName;
    use std::time::Instant;

    const GIB: u64 = 1 << 30;

    fn request(bytes: u64) -> Request {
        Request {
            volume_group: VgName::parse("vg0").unwrap(),
            fs_type: FsType::Xfs,
            mount_options: String::new(),
            bytes,
            access_modes: vec!["ReadWriteOnce".into()],
        }
    }

    fn node(name: &str, state: State) -> View {
        View { name: name.into(), topology: name.into(), state }
    }

    fn up(name: &str, group: &str, free: u64) -> View {
        node(name, State::Up(vec![Group { name: group.into(), size: 100 * GIB, free, extent: 4 << 20 }]))
    }

    fn down(name: &str) -> View {
        let since = Instant::now();
        node(name, State::Down { since, why: "refused".into() })
    }

    #[test]
    fn nothing_is_said_where_it_fits() {
        let nodes = [up("a", "vg0", GIB), up("b", "vg0", 2 * GIB)];
        assert_eq!(fits_nowhere(&request(2 * GIB), &nodes), None);
    }

    #[test]
    fn a_volume_is_whole_extents() {
        let nodes = [up("a", "vg0", 2 * GIB)];
        let text = fits_nowhere(&request(2 * GIB + 1), &nodes).unwrap();
        assert!(text.contains("a has 2 GiB free, 4 MiB missing"), "{text}");
    }

    #[test]
    fn what_is_missing_where_the_nearest_miss_first() {
        let nodes = [up("a", "vg0", GIB), up("b", "vg0", 2 * GIB), up("c", "other", 9 * GIB)];
        let text = fits_nowhere(&request(4 * GIB), &nodes).unwrap();
        assert!(text.contains("b has 2 GiB free, 2 GiB missing; a has 1 GiB free, 3 GiB missing."), "{text}");
    }

    #[test]
    fn many_nodes_are_summed_up() {
        let nodes: Vec<_> = (0..9).map(|i| up(&format!("n{i}"), "vg0", i)).collect();
        let text = fits_nowhere(&request(GIB), &nodes).unwrap();
        assert!(text.contains("; and 4 more"), "{text}");
        assert!(text.len() < 1000, "{text}");
    }

    #[test]
    fn no_node_has_the_group() {
        let text = fits_nowhere(&request(GIB), &[up("a", "other", 9 * GIB)]).unwrap();
        assert!(text.contains("no node has volume group vg0"), "{text}");
        assert!(fits_nowhere(&request(GIB), &[]).unwrap().contains("DaemonSet"));
    }

    #[test]
    fn silent_nodes_are_told_of_and_unknown_ones_waited_for() {
        let text = fits_nowhere(&request(4 * GIB), &[up("a", "vg0", GIB), down("b")]).unwrap();
        assert!(text.contains("Not counted: b"), "{text}");
        let nodes = [up("a", "vg0", GIB), node("b", State::Connecting)];
        assert_eq!(fits_nowhere(&request(4 * GIB), &nodes), None);
    }
}
