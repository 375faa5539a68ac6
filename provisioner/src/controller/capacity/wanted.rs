//! Which capacities should be published.
//!
//! For each pod the scheduler goes, for each node that it looks at, through all
//! capacities, and makes a selector of each: with 5,000 nodes and an object for
//! each of them that took more than five seconds. So where there are many nodes, those
//! of about the same room share an object. Its nodes can never be changed, so
//! that a node that comes into another group costs new objects for both.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::storage::v1::StorageClass;
use kube::ResourceExt;
use sha2::{Digest, Sha256};

use crate::controller::nodes::{State, View};
use crate::controller::validate::Template;
use crate::names::DRIVER;

/// So many nodes share an object at most: with the longest names it is still
/// below what etcd takes.
const MOST_NODES: usize = 2000;

/// One of so many nodes that is not heard of yet holds up nobody.
const FEW_OF: usize = 8;

/// What there is on a node, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Room {
    /// What volumes of the class can have together there.
    pub free: u64,
    /// The largest volume that fits: whole extents and stripes.
    pub largest: u64,
}

impl Room {
    /// By an eighth less at most: what is said is there.
    fn rounded(self) -> Self {
        let round = |bytes: u64| {
            let spare = (u64::BITS - bytes.leading_zeros()).saturating_sub(4);
            bytes >> spare << spare
        };
        Self { free: round(self.free), largest: round(self.largest) }
    }
}

/// A capacity that should be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The StorageClass.
    pub class: String,
    /// Values of the topology label of the nodes that have it, in order.
    pub nodes: Vec<String>,
    /// What each of them has, or a little less.
    pub room: Room,
}

/// What there should be, by object name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// To be there, with these sizes.
    pub publish: BTreeMap<String, Published>,
    /// Classes and nodes whose objects are to be left as they are, also one that a
    /// node still shares with others: the nodes are silent, but not for long.
    pub keep: BTreeSet<(String, String)>,
    /// All objects of these classes are to be left, for the same reason.
    pub keep_all_of: BTreeSet<String>,
    /// The classes whose nodes share objects.
    pub shared: BTreeSet<String>,
    /// When to look again although nothing has happened.
    pub again: Option<Duration>,
}

/// Whether enough is known for the CSIDriver to do no harm: some node has
/// reported, and none is still being connected to.
pub fn settled<V: Borrow<View>>(nodes: &[V]) -> bool {
    let states = || nodes.iter().map(|node| &node.borrow().state);
    states().any(|state| matches!(state, State::Up(_))) && !states().any(|state| *state == State::Connecting)
}

/// The name of an object: classes and nodes have longer names than fit. Always
/// another one for other nodes.
fn object_name(class: &str, nodes: &[impl AsRef<str>]) -> String {
    let mut digest = Sha256::new();
    digest.update(class);
    for node in nodes {
        digest.update([0]);
        digest.update(node.as_ref());
    }
    let hex: String = digest.finalize().iter().take(10).map(|byte| format!("{byte:02x}")).collect();
    format!("lvprov-{hex}")
}

/// What is known of a node, as far as a class is concerned.
enum Known {
    NotYet,
    /// Silent, but for so long it may be.
    Silent(Duration),
    Has(Room),
}

/// Decides what should be published. Where a class has `share_from` nodes or
/// more (0: never), those of about the same room share an object; `said` is what
/// is published of each node by now, by class and node.
pub fn wanted<V: Borrow<View>>(
    classes: &[Arc<StorageClass>],
    nodes: &[V],
    patience: Duration,
    share_from: usize,
    said: &HashMap<(&str, &str), Room>,
) -> Wanted {
    let mut wanted = Wanted::default();
    for class in classes.iter().filter(|class| class.provisioner == DRIVER) {
        // No claim of such a class can be served, anywhere.
        let Ok(template) = Template::of(class) else {
            continue;
        };
        let allowed = nodes.iter().map(Borrow::borrow).filter(|node| template.topologies.allow(&node.labels));
        let known = allowed.filter_map(|node| {
            let known = match &node.state {
                State::Connecting => Known::NotYet,
                State::Down { since, .. } => {
                    let left = patience.saturating_sub(since.elapsed());
                    Known::Silent(Some(left).filter(|left| !left.is_zero())?)
                }
                State::Up(_) => {
                    let group = node.chosen(&template.volume_group).filter(|group| group.serves(template.layout))?;
                    Known::Has(Room { free: group.total(template.layout), largest: group.largest(template.layout) })
                }
            };
            Some((node.topology.as_str(), known))
        });
        let known: Vec<(&str, Known)> = known.collect();
        let class = class.name_any();
        if share_from > 0 && known.len() >= share_from {
            wanted.share(class, &known, said);
        } else {
            wanted.each(&class, &known);
        }
    }
    wanted
}

impl Wanted {
    fn publish(&mut self, class: String, nodes: Vec<String>, room: Room) {
        self.publish.insert(object_name(&class, &nodes), Published { class, nodes, room });
    }

    fn look_within(&mut self, left: Duration) {
        self.again = Some(self.again.map_or(left, |again| again.min(left)));
    }

    fn each(&mut self, class: &str, known: &[(&str, Known)]) {
        for (node, known) in known {
            if !matches!(known, Known::Has(_)) {
                self.keep.insert((class.to_owned(), (*node).to_owned()));
            }
            match known {
                Known::NotYet => {}
                Known::Silent(left) => self.look_within(*left),
                Known::Has(room) => self.publish(class.to_owned(), vec![(*node).to_owned()], *room),
            }
        }
    }

    fn share(&mut self, class: String, known: &[(&str, Known)], said: &HashMap<(&str, &str), Room>) {
        // After a start there will be another report in a moment, and thousands of moments. Later a
        // few new nodes must not keep what is known of all others from being told.
        if known.iter().filter(|(_, known)| matches!(known, Known::NotYet)).count() * FEW_OF > known.len() {
            self.keep_all_of.insert(class);
            return;
        }
        let parts = known.len().div_ceil(MOST_NODES).next_power_of_two() as u64;
        let part = |node: &str| {
            let mut hasher = DefaultHasher::new();
            node.hash(&mut hasher);
            hasher.finish() % parts
        };
        let mut groups: BTreeMap<(Room, u64), Vec<String>> = BTreeMap::new();
        for (node, known) in known {
            let room = match known {
                Known::Has(room) => Some(room.rounded()),
                Known::Silent(_) | Known::NotYet => said.get(&(class.as_str(), node)).map(|room| room.rounded()),
            };
            if let Known::Silent(left) = known {
                self.look_within(*left);
            }
            if let Some(room) = room {
                groups.entry((room, part(node))).or_default().push((*node).to_owned());
            }
        }
        self.shared.insert(class.clone());
        for ((room, _), mut nodes) in groups {
            nodes.sort_unstable();
            self.publish(class.clone(), nodes, room);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::json;

    use super::*;
    use crate::controller::nodes::Group;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn class(name: &str, group: &str) -> Arc<StorageClass> {
        let class = json!({
            "metadata": {"name": name},
            "provisioner": DRIVER,
            "parameters": {"volumeGroup": group},
            "volumeBindingMode": "WaitForFirstConsumer",
        });
        Arc::new(serde_json::from_value(class).unwrap())
    }

    fn each(classes: &[Arc<StorageClass>], nodes: &[View]) -> Wanted {
        wanted(classes, nodes, PATIENCE, 0, &HashMap::new())
    }

    fn node(name: &str, state: State) -> View {
        View::of(name, state)
    }

    fn up(name: &str, group: &str, free: u64) -> View {
        let group = Group::of(group, 1 << 40, free, 4 << 20);
        node(name, State::Up(vec![group]))
    }

    fn down(name: &str, ago: Duration) -> View {
        node(name, State::Down { since: Instant::now().checked_sub(ago).unwrap(), why: String::new() })
    }

    #[test]
    fn one_object_for_each_class_and_node_with_its_group() {
        let classes = [class("fast", "vg0"), class("slow", "hdd")];
        let nodes = [up("a", "vg0", 5 << 30), up("b", "vg0", 1), up("c", "hdd", 0)];
        let wanted = each(&classes, &nodes);
        let published: Vec<_> = wanted
            .publish
            .values()
            .map(|one| (one.class.as_str(), one.nodes[0].as_str(), one.room.free, one.room.largest))
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        assert_eq!(published, [("fast", "a", 5 << 30, 5 << 30), ("fast", "b", 1, 0), ("slow", "c", 0, 0)]);
        assert!(wanted.keep.is_empty() && wanted.again.is_none());
    }

    #[test]
    fn a_node_that_the_class_does_not_allow_has_no_object_whatever_its_state() {
        let mut zoned = (*class("zoned", "vg0")).clone();
        zoned.allowed_topologies = serde_json::from_value(json!([
            {"matchLabelExpressions": [{"key": "zone", "values": ["a"]}]},
        ]))
        .unwrap();
        let classes = [class("fast", "vg0"), Arc::new(zoned)];
        let in_zone = |zone: &str, view: View| {
            let labels = Arc::new(BTreeMap::from([("zone".to_owned(), zone.to_owned())]));
            View { labels, ..view }
        };
        let nodes = [
            in_zone("a", up("a", "vg0", 1)),
            in_zone("b", up("b", "vg0", 1)),
            in_zone("b", node("new", State::Connecting)),
            in_zone("b", down("late", Duration::ZERO)),
            up("c", "vg0", 1),
        ];
        let wanted = each(&classes, &nodes);
        let of =
            |class: &str| wanted.publish.values().filter(|one| one.class == class).map(|one| &*one.nodes[0]).collect();
        let (fast, zoned): (BTreeSet<&str>, BTreeSet<&str>) = (of("fast"), of("zoned"));
        assert_eq!((fast, zoned), (BTreeSet::from(["a", "b", "c"]), BTreeSet::from(["a"])));
        assert_eq!(wanted.keep, ["new", "late"].map(|node| ("fast".to_owned(), node.to_owned())).into());
    }

    #[test]
    fn classes_that_are_not_ours_or_cannot_be_served_are_not_published() {
        let mut foreign = (*class("other", "vg0")).clone();
        foreign.provisioner = "example.com/other".into();
        let mut immediate = (*class("now", "vg0")).clone();
        immediate.volume_binding_mode = None;
        let classes = [Arc::new(foreign), Arc::new(immediate)];
        assert_eq!(each(&classes, &[up("a", "vg0", 1)]), Wanted::default());
    }

    #[test]
    fn a_silent_nodes_objects_stay_for_a_while() {
        let classes = [class("fast", "vg0")];
        let nodes = [
            node("new", State::Connecting),
            down("late", Duration::from_secs(10)),
            down("lost", Duration::from_secs(31)),
        ];
        let wanted = each(&classes, &nodes);
        assert!(wanted.publish.is_empty());
        let kept: BTreeSet<_> = ["new", "late"].map(|node| ("fast".to_owned(), node.to_owned())).into();
        assert_eq!(wanted.keep, kept);
        let again = wanted.again.unwrap();
        assert!(again > Duration::from_secs(15) && again <= Duration::from_secs(20), "{again:?}");
    }

    fn shared(nodes: &[View], said: &HashMap<(&str, &str), Room>) -> Wanted {
        wanted(&[class("fast", "vg0")], nodes, PATIENCE, 3, said)
    }

    fn groups(wanted: &Wanted) -> Vec<(Vec<&str>, u64)> {
        let mut groups: Vec<_> = wanted
            .publish
            .values()
            .map(|one| (one.nodes.iter().map(String::as_str).collect(), one.room.largest))
            .collect();
        groups.sort();
        groups
    }

    #[test]
    fn many_nodes_of_about_the_same_room_share_an_object_that_promises_less() {
        const GIB: u64 = 1 << 30;
        let nodes = [up("c", "vg0", 101 * GIB), up("a", "vg0", 100 * GIB), up("b", "vg0", 80 * GIB), up("d", "vg0", 3)];
        let wanted = shared(&nodes, &HashMap::new());
        assert_eq!(groups(&wanted), [(vec!["a", "c"], 96 * GIB), (vec!["b"], 80 * GIB), (vec!["d"], 0)]);
        // What a claim takes, mostly, changes nothing.
        let after = [up("c", "vg0", 97 * GIB), up("a", "vg0", 100 * GIB), up("b", "vg0", 80 * GIB), up("d", "vg0", 3)];
        assert_eq!(shared(&after, &HashMap::new()), wanted);
        // Other nodes, another object: that of an object cannot be changed.
        let moved = [up("c", "vg0", 95 * GIB), up("a", "vg0", 100 * GIB), up("b", "vg0", 80 * GIB), up("d", "vg0", 3)];
        let moved = shared(&moved, &HashMap::new());
        assert_eq!(
            groups(&moved),
            [(vec!["a"], 96 * GIB), (vec!["b"], 80 * GIB), (vec!["c"], 88 * GIB), (vec!["d"], 0)]
        );
        let (before, after): (BTreeSet<_>, BTreeSet<_>) =
            (wanted.publish.keys().collect(), moved.publish.keys().collect());
        assert_eq!(before.intersection(&after).count(), 2);
        // With less of them each has its own, with all that it has.
        assert_eq!(groups(&shared(&nodes[..2], &HashMap::new())), [(vec!["a"], 100 * GIB), (vec!["c"], 101 * GIB)]);
    }

    #[test]
    fn a_silent_node_stays_in_its_group_for_a_while_and_one_not_heard_of_yet_holds_all() {
        let said = HashMap::from([
            (("fast", "late"), Room { free: 96, largest: 96 }),
            (("slow", "late"), Room { free: 1, largest: 1 }),
        ]);
        let nodes = [
            up("a", "vg0", 0),
            down("late", Duration::from_secs(10)),
            down("new", Duration::ZERO),
            down("lost", PATIENCE),
        ];
        let wanted = shared(&nodes, &said);
        assert_eq!(groups(&wanted), [(vec!["a"], 0), (vec!["late"], 96)]);
        assert!(wanted.again.is_some_and(|again| again <= Duration::from_secs(20)));
        let connecting = [up("a", "vg0", 0), up("b", "vg0", 0), node("new", State::Connecting)];
        let wanted = shared(&connecting, &said);
        assert!(wanted.publish.is_empty() && wanted.keep.is_empty());
        assert_eq!(wanted.keep_all_of, BTreeSet::from(["fast".to_owned()]));
    }

    #[test]
    fn a_few_nodes_not_heard_of_yet_hold_up_nobody() {
        let said = HashMap::from([(("fast", "back"), Room { free: 96, largest: 96 })]);
        let many = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n"];
        let mut nodes: Vec<View> = many.iter().map(|name| up(name, "vg0", 0)).collect();
        nodes.extend([node("back", State::Connecting), node("new", State::Connecting)]);
        let wanted = shared(&nodes, &said);
        assert_eq!(groups(&wanted), [(many.to_vec(), 0), (vec!["back"], 96)]);
        assert!(wanted.keep_all_of.is_empty());
        nodes.push(node("newer", State::Connecting));
        assert_eq!(shared(&nodes, &said).keep_all_of, BTreeSet::from(["fast".to_owned()]));
    }

    #[test]
    fn the_driver_waits_for_the_first_capacities() {
        assert!(!settled::<View>(&[]));
        assert!(!settled(&[down("a", PATIENCE)]));
        assert!(!settled(&[up("a", "vg0", 1), node("b", State::Connecting)]));
        assert!(settled(&[up("a", "vg0", 1), down("b", Duration::ZERO)]));
    }

    #[test]
    fn what_is_rounded_is_less_by_an_eighth_at_most() {
        for bytes in [0, 1, 15, 16, 17, 31, 1 << 30, (1 << 40) - 1, u64::MAX] {
            let Room { free, largest } = Room { free: bytes, largest: bytes }.rounded();
            assert!(free == largest && free <= bytes && bytes - free <= bytes / 8, "{bytes} became {free}");
        }
    }

    #[test]
    fn thousands_of_nodes_are_in_more_than_one_object() {
        let nodes: Vec<View> = (0..5000).map(|number| up(&format!("node-{number}"), "vg0", 1 << 30)).collect();
        let wanted = shared(&nodes, &HashMap::new());
        let sizes: Vec<usize> = wanted.publish.values().map(|one| one.nodes.len()).collect();
        assert!(sizes.len() == 4 && sizes.iter().sum::<usize>() == 5000, "{sizes:?}");
    }

    #[test]
    fn names_of_objects_fit_and_differ() {
        let long = object_name(&"c".repeat(253), &["n".repeat(63)]);
        assert!(long.len() < 63);
        assert_ne!(object_name("a", &["bc"]), object_name("ab", &["c"]));
        assert_ne!(object_name("a", &["b", "c"]), object_name("a", &["bc"]));
    }
}
