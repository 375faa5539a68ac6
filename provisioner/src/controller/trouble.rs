//! Events on pods whose volumes cannot be unmounted.
//!
//! kubelet makes none: such a pod only stays in Terminating. Its node service
//! tells of it, and this finds the pod, since only the controller may ask the
//! API server. As long as the unmount fails the Event is repeated, seldom
//! enough to stay one that counts up.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, PartialObjectMeta};
use kube::{Api, ResourceExt};
use lvprov_proto::lvprov::FailingUnmount;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tracing::warn;

use super::context::Context;
use super::error::{Doing, Error};
use super::events::{QUIET, Reason};
use super::nodes::{State, Troubles};
use crate::names::STATIC_POD_UID;
use crate::with_causes;

/// Between looks at what is worth repeating, while there is anything.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// A text that has changed, as when other processes use the volume now, is told
/// after so long.
const SELDOM: Duration = Duration::from_secs(60);
/// So many of one node are taken.
const MOST: usize = 256;

/// A pod of a node, by the UID that its kubelet has.
type Key = (String, String);

/// What nodes have told last, and what was told of it.
#[derive(Default)]
pub struct Teller {
    failing: BTreeMap<String, Vec<FailingUnmount>>,
    told: HashMap<Key, (String, Instant)>,
}

/// Tells pods of it, for ever.
pub async fn run(ctx: Arc<Context>, mut reports: broadcast::Receiver<Troubles>) {
    let mut teller = Teller::default();
    loop {
        tokio::select! {
            report = reports.recv() => match report {
                Ok(report) => teller.take(report),
                // The next report of each node has all of it again.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
            () = tokio::time::sleep(LOOK_EVERY), if !teller.failing.is_empty() => {}
        }
        teller.tell(&ctx).await;
    }
}

impl Teller {
    /// A node's report: all that fails there now.
    pub fn take(&mut self, report: Troubles) {
        let Troubles { node, mut failing } = report;
        failing.truncate(MOST);
        if failing.is_empty() {
            self.failing.remove(&node);
        } else {
            self.failing.insert(node, failing);
        }
    }

    /// Tells what has not been told, or not for long.
    pub async fn tell(&mut self, ctx: &Context) {
        self.told.retain(|_, (_, at)| at.elapsed() < 2 * QUIET);
        let nodes = std::mem::take(&mut self.failing);
        for (node, failing) in &nodes {
            // A node that is silent may have put it right long ago.
            if !ctx.nodes.view(node).is_some_and(|view| matches!(view.state, State::Up(_))) {
                continue;
            }
            let due: Vec<(Key, String)> = notes(node, failing).filter(|(key, note)| self.is_due(key, note)).collect();
            if due.is_empty() {
                continue;
            }
            match pods_on(node, ctx).await {
                Ok(pods) => self.tell_pods(ctx, &pods, due).await,
                Err(error) => warn!(node, error = with_causes(&error), "cannot tell pods of unmounts that fail"),
            }
        }
        self.failing = nodes;
    }

    async fn tell_pods(&mut self, ctx: &Context, pods: &[PartialObjectMeta<Pod>], due: Vec<(Key, String)>) {
        for (key, note) in due {
            match pods.iter().find(|pod| is_pod(pod, &key.1)) {
                Some(pod) => ctx.events.tell(pod, Reason::FailedUnmount, note.clone()).await,
                // One that was deleted by force, most likely.
                None => warn!(node = key.0, pod = key.1, note, "a pod that is not in the API cannot be unmounted"),
            }
            self.told.insert(key, (note, Instant::now()));
        }
    }

    fn is_due(&self, key: &Key, note: &str) -> bool {
        match self.told.get(key) {
            None => true,
            Some((told, at)) if told == note => at.elapsed() >= QUIET,
            Some((_, at)) => at.elapsed() >= SELDOM,
        }
    }
}

/// One text for each pod, since Events of one reason on one object are taken
/// for a series.
fn notes(node: &str, failing: &[FailingUnmount]) -> impl Iterator<Item = (Key, String)> {
    let mut by_pod = BTreeMap::<&str, Vec<String>>::new();
    for unmount in failing {
        by_pod.entry(&unmount.pod_uid).or_default().push(sentence(node, unmount));
    }
    by_pod.into_iter().map(|(uid, sentences)| ((node.to_owned(), uid.to_owned()), sentences.join(" ")))
}

/// What fails, what is in the way, and what to do. Nothing in it changes from
/// one attempt to the next.
fn sentence(node: &str, unmount: &FailingUnmount) -> String {
    let FailingUnmount { target, message, users, .. } = unmount;
    // …/volumes/<driver>/<volume>; a CSI volume is mounted one directory further down.
    let volume = target.rsplit_once("/volumes/").and_then(|(_, below)| below.split('/').nth(1)).unwrap_or(target);
    let advice = match users.as_slice() {
        [] => format!(
            "Which process uses it was not found: look on node {node} with `fuser -vm {target}` and `findmnt -R {target}`."
        ),
        users => format!("It is used there by {}: end that, and the pod goes.", users.join(", ")),
    };
    format!("Volume {volume} cannot be unmounted on node {node}: {message}. {advice}")
}

/// The pods of one node, as little of each as will do.
async fn pods_on(node: &str, ctx: &Context) -> Result<Vec<PartialObjectMeta<Pod>>, Error> {
    let api: Api<Pod> = Api::all(ctx.client.clone());
    let of_node = ListParams::default().fields(&format!("spec.nodeName={node}"));
    let pods = api.list_metadata(&of_node).await.doing(|| format!("list the pods of node {node}"))?;
    Ok(pods.items)
}

/// A static pod has two UIDs, and its kubelet knows the one that its mirror in
/// the API has in an annotation.
fn is_pod(pod: &PartialObjectMeta<Pod>, uid: &str) -> bool {
    pod.uid().is_some_and(|own| own == uid) || pod.annotations().get(STATIC_POD_UID).is_some_and(|hash| hash == uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failing(pod: &str, volume: &str, users: &[&str]) -> FailingUnmount {
        FailingUnmount {
            pod_uid: pod.into(),
            target: format!("/var/lib/kubelet/pods/{pod}/volumes/lvprov.io~lvm/{volume}"),
            message: "cannot unmount it: EBUSY".into(),
            users: users.iter().map(|user| (*user).to_owned()).collect(),
            count: 3,
            ..FailingUnmount::default()
        }
    }

    fn texts(failing: &[FailingUnmount]) -> Vec<(String, String)> {
        notes("n1", failing).map(|((node, uid), note)| (format!("{node} {uid}"), note)).collect()
    }

    #[test]
    fn a_pod_gets_one_text_that_says_who_and_what_to_do() {
        let all = [
            failing("b", "logs", &["process 7 (tail)", "process 9 (sh)"]),
            failing("a", "data", &[]),
            failing("b", "more", &[]),
        ];
        let told = texts(&all);
        let keys: Vec<_> = told.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["n1 a", "n1 b"]);
        assert_eq!(
            told[0].1,
            "Volume data cannot be unmounted on node n1: cannot unmount it: EBUSY. Which process uses it was not \
             found: look on node n1 with `fuser -vm /var/lib/kubelet/pods/a/volumes/lvprov.io~lvm/data` and \
             `findmnt -R /var/lib/kubelet/pods/a/volumes/lvprov.io~lvm/data`."
        );
        assert!(told[1].1.contains("Volume logs") && told[1].1.contains("Volume more"), "{}", told[1].1);
        assert!(told[1].1.contains("used there by process 7 (tail), process 9 (sh): end that"), "{}", told[1].1);
        let csi = FailingUnmount {
            target: "/var/lib/kubelet/pods/c/volumes/kubernetes.io~csi/inline/mount".into(),
            ..failing("c", "", &[])
        };
        assert!(texts(&[csi])[0].1.starts_with("Volume inline cannot be unmounted"));
        // The same failure once more is the same text.
        let again = FailingUnmount { count: 9, last_unix: 77, ..failing("a", "data", &[]) };
        assert_eq!(texts(&[again])[0], told[0]);
    }

    #[test]
    fn a_node_that_fails_no_more_is_forgotten() {
        let mut teller = Teller::default();
        let node = || "n1".to_owned();
        teller.take(Troubles { node: node(), failing: vec![failing("a", "data", &[]); 1000] });
        assert_eq!(teller.failing["n1"].len(), MOST);
        teller.take(Troubles { node: node(), failing: Vec::new() });
        assert!(teller.failing.is_empty());
    }
}
