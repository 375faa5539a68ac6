//! What the API server knows of volumes, claims and pods, all of it or none.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;

use k8s_openapi::api::core::v1::{Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, PartialObjectMeta};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tracing::warn;

use super::AdminError;
use super::fleet::FleetNode;
use crate::controller::nodes::address_of;
use crate::controller::volume::logical_volume_of;
use crate::names::{STATIC_POD_UID, TOPOLOGY_NODE};

/// Objects a page.
const PAGE: u32 = 500;

/// What is still in use, as the API server says.
#[derive(Debug, Default)]
pub struct ClusterView {
    /// UID of kube-system.
    pub id: String,
    /// What PVs refer to, by the PV's name.
    pub volumes: HashMap<String, Reference>,
    /// Claims by UID.
    pub claims: HashMap<String, Claim>,
    /// Names of the logical volumes of snapshots that VolumeSnapshotContents
    /// refer to, or will. None: the cluster has no such API, or does not show it.
    pub snapshots: Option<HashSet<String>>,
    /// UIDs of pods, both of a static one's.
    pub pods: HashSet<String>,
    /// `<namespace>/<name>` of pods.
    pub pod_names: HashSet<String>,
}

/// A logical volume that a PV refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// None where the PV does not say on which node: then on any.
    pub topology: Option<String>,
    /// The volume group.
    pub volume_group: String,
    /// The logical volume.
    pub logical_volume: String,
}

/// A claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// `<namespace>/<name>`
    pub name: String,
    /// The PV that it is bound to, or empty.
    pub volume: String,
}

impl ClusterView {
    /// Asks the API server.
    ///
    /// # Errors
    /// When any part of it cannot be had: then nothing may be concluded.
    pub async fn ask(client: &Client) -> Result<Self, AdminError> {
        let mut view = Self { id: cluster_id(client).await?, ..Self::default() };
        for volume in list::<PersistentVolume>(client, "PersistentVolumes").await? {
            if let Some(reference) = reference_of(&volume) {
                view.volumes.insert(volume.name_any(), reference);
            }
        }
        for claim in list::<PersistentVolumeClaim>(client, "PersistentVolumeClaims").await? {
            let name = format!("{}/{}", claim.namespace().unwrap_or_default(), claim.name_any());
            let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).unwrap_or_default();
            view.claims.insert(claim.uid().unwrap_or_default(), Claim { name, volume });
        }
        view.snapshots = contents(client).await?;
        for pod in list_metadata::<Pod>(client, "pods").await? {
            view.add_pod(&pod);
        }
        Ok(view)
    }

    fn add_pod(&mut self, pod: &PartialObjectMeta<Pod>) {
        self.pods.extend(pod.uid());
        self.pods.extend(pod.annotations().get(STATIC_POD_UID).cloned());
        self.pod_names.insert(format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()));
    }
}

/// The snapshots of ours that VolumeSnapshotContents refer to: by the handle,
/// and by the VolumeSnapshot, whose handle may not be known yet.
async fn contents(client: &Client) -> Result<Option<HashSet<String>>, AdminError> {
    let what = "VolumeSnapshotContents";
    let kind = GroupVersionKind::gvk("snapshot.storage.k8s.io", "v1", "VolumeSnapshotContent");
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &ApiResource::from_gvk(&kind));
    let mut all = HashSet::new();
    let mut parameters = ListParams::default().limit(PAGE);
    loop {
        let page = match api.list(&parameters).await {
            Ok(page) => page,
            Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => return Ok(None),
            Err(source) => return Err(AdminError::Api { what, source: Box::new(source) }),
        };
        for content in &page.items {
            let spec = &content.data["spec"];
            let handles = [&spec["source"]["snapshotHandle"], &content.data["status"]["snapshotHandle"]];
            let names = handles.into_iter().filter_map(|handle| handle.as_str()?.rsplit('/').next());
            all.extend(names.map(str::to_owned));
            all.extend(spec["volumeSnapshotRef"]["uid"].as_str().map(|uid| format!("snap-{uid}")));
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => return Ok(Some(all)),
        }
    }
}

/// Nodes that have a node service, in order of name.
///
/// # Errors
/// When they cannot be listed.
pub async fn nodes(client: &Client) -> Result<Vec<FleetNode>, AdminError> {
    let mut nodes: Vec<FleetNode> = list::<Node>(client, "nodes").await?.iter().filter_map(served).collect();
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(nodes)
}

/// A node that has a node service: kubelet has set the label to its name. With
/// another value the label was copied from some other node.
fn served(node: &Node) -> Option<FleetNode> {
    let (name, label) = (node.name_any(), node.labels().get(TOPOLOGY_NODE)?);
    if *label != name {
        warn!(node = name, label, "node left out: its label {TOPOLOGY_NODE} is not its name");
        return None;
    }
    Some(FleetNode { name, address: address_of(node) })
}

/// What a PV refers to, whoever made it: one made by hand keeps its logical
/// volume as well.
fn reference_of(volume: &PersistentVolume) -> Option<Reference> {
    let spec = volume.spec.as_ref()?;
    let (volume_group, logical_volume) = logical_volume_of(spec)?;
    let topology = spec
        .node_affinity
        .iter()
        .flat_map(|affinity| &affinity.required)
        .flat_map(|selector| &selector.node_selector_terms)
        .flat_map(|term| term.match_expressions.iter().flatten())
        .filter(|requirement| requirement.key == TOPOLOGY_NODE && requirement.operator == "In")
        .flat_map(|requirement| requirement.values.iter().flatten())
        .collect::<Vec<_>>();
    // Several values, or none: it may be on any of them.
    let topology = match topology.as_slice() {
        [one] => Some((*one).clone()),
        _ => None,
    };
    Some(Reference { topology, volume_group, logical_volume })
}

async fn cluster_id(client: &Client) -> Result<String, AdminError> {
    let api: Api<Namespace> = Api::all(client.clone());
    let namespace = api
        .get("kube-system")
        .await
        .map_err(|source| AdminError::Api { what: "namespace kube-system", source: Box::new(source) })?;
    Ok(namespace.uid().unwrap_or_default())
}

async fn list<K>(client: &Client, what: &'static str) -> Result<Vec<K>, AdminError>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    let api: Api<K> = Api::all(client.clone());
    let mut all = Vec::new();
    let mut parameters = ListParams::default().limit(PAGE);
    loop {
        let page = api.list(&parameters).await.map_err(|source| AdminError::Api { what, source: Box::new(source) })?;
        all.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => return Ok(all),
        }
    }
}

async fn list_metadata<K>(client: &Client, what: &'static str) -> Result<Vec<PartialObjectMeta<K>>, AdminError>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    let api: Api<K> = Api::all(client.clone());
    let mut all = Vec::new();
    let mut parameters = ListParams::default().limit(PAGE);
    loop {
        let page = api
            .list_metadata(&parameters)
            .await
            .map_err(|source| AdminError::Api { what, source: Box::new(source) })?;
        all.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => return Ok(all),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::client::Body;
    use serde_json::{Value, json};

    fn volume(source: Value, values: &[&str]) -> PersistentVolume {
        let mut spec = source;
        spec["nodeAffinity"] = json!({"required": {"nodeSelectorTerms": [{"matchExpressions": [
            {"key": "topology.lvprov.io/node", "operator": "In", "values": values},
        ]}]}});
        serde_json::from_value(json!({"metadata": {"name": "v"}, "spec": spec})).unwrap()
    }

    #[test]
    fn a_pv_keeps_its_volume_whoever_made_it() {
        let flex = json!({"flexVolume": {
            "driver": "lvprov.io/lvm",
            "options": {"volumeGroup": "vg0", "logicalVolume": "pvc-1"},
        }});
        let csi = json!({"csi": {"driver": "lvm.lvprov.io", "volumeHandle": "vg0/pvc-1"}});
        for source in [flex, csi] {
            let reference = reference_of(&volume(source.clone(), &["a"])).unwrap();
            assert_eq!((reference.volume_group.as_str(), reference.logical_volume.as_str()), ("vg0", "pvc-1"));
            assert_eq!(reference.topology.as_deref(), Some("a"));
            assert_eq!(reference_of(&volume(source.clone(), &["a", "b"])).unwrap().topology, None);
            assert_eq!(reference_of(&volume(source, &[])).unwrap().topology, None);
        }
        let foreign = json!({"csi": {"driver": "example.com/other", "volumeHandle": "vg0/pvc-1"}});
        assert_eq!(reference_of(&volume(foreign, &["a"])), None);
    }

    #[test]
    fn a_node_with_the_label_of_another_is_left_out() {
        let node = |labels: Value| -> Node {
            serde_json::from_value(json!({
                "metadata": {"name": "worker-2", "labels": labels},
                "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.2"}]},
            }))
            .unwrap()
        };
        let found = served(&node(json!({"topology.lvprov.io/node": "worker-2"}))).unwrap();
        assert_eq!((found.name.as_str(), found.address), ("worker-2", "192.0.2.2".parse().ok()));
        assert_eq!(served(&node(json!({"topology.lvprov.io/node": "worker-1"}))), None);
        assert_eq!(served(&node(json!({}))), None);
    }

    /// An API server that answers the next requests so, in this order.
    async fn answering(answers: Vec<(&str, u16, Value)>) -> Result<ClusterView, AdminError> {
        let (service, mut handle) = tower_test::mock::pair::<http::Request<Body>, http::Response<Body>>();
        let client = Client::new(service, "default");
        let asking = tokio::spawn(async move { ClusterView::ask(&client).await });
        for (address, status, body) in answers {
            let (request, answer) = handle.next_request().await.expect("asked for less");
            assert_eq!(request.uri().path_and_query().unwrap().as_str(), address);
            let body = Body::from(serde_json::to_vec(&body).unwrap());
            answer.send_response(http::Response::builder().status(status).body(body).unwrap());
        }
        drop(handle);
        asking.await.unwrap()
    }

    fn page(items: Value, next: &str) -> Value {
        json!({"metadata": {"continue": next}, "items": items})
    }

    const KUBE_SYSTEM: &str = "/api/v1/namespaces/kube-system";
    const VOLUMES: &str = "/api/v1/persistentvolumes?&limit=500";
    const CLAIMS: &str = "/api/v1/persistentvolumeclaims?&limit=500";
    const PODS: &str = "/api/v1/pods?&limit=500";
    const CONTENTS: &str = "/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents?&limit=500";

    fn failure(code: u16) -> Value {
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": "no"})
    }

    fn kube_system() -> Value {
        json!({"metadata": {"name": "kube-system", "uid": "cluster"}})
    }

    #[tokio::test]
    async fn all_pages_are_read() {
        let pod = |uid: &str| json!([{"metadata": {"namespace": "shop", "name": uid, "uid": uid}}]);
        let view = answering(vec![
            (KUBE_SYSTEM, 200, kube_system()),
            (VOLUMES, 200, page(json!([]), "")),
            (CLAIMS, 200, page(json!([]), "")),
            (CONTENTS, 404, failure(404)),
            (PODS, 200, page(pod("one"), "more")),
            ("/api/v1/pods?&limit=500&continue=more", 200, page(pod("two"), "")),
        ])
        .await
        .unwrap();
        assert_eq!(view.id, "cluster");
        assert!(view.pods.contains("one") && view.pods.contains("two"));
        assert_eq!(view.snapshots, None);
    }

    #[tokio::test]
    async fn snapshots_are_known_by_handle_and_by_what_asked_for_them() {
        let content = json!([
            {"metadata": {"name": "a"}, "spec": {"source": {"volumeHandle": "vg0/pvc-1"},
                "volumeSnapshotRef": {"uid": "one"}}, "status": {"snapshotHandle": "n1/vg0/snap-one"}},
            {"metadata": {"name": "b"}, "spec": {"source": {"snapshotHandle": "n1/vg0/snap-kept"},
                "volumeSnapshotRef": {"name": "x"}}},
            {"metadata": {"name": "c"}, "spec": {"source": {"volumeHandle": "vg0/pvc-2"},
                "volumeSnapshotRef": {"uid": "new"}}},
        ]);
        let view = answering(vec![
            (KUBE_SYSTEM, 200, kube_system()),
            (VOLUMES, 200, page(json!([]), "")),
            (CLAIMS, 200, page(json!([]), "")),
            (CONTENTS, 200, page(content, "")),
            (PODS, 200, page(json!([]), "")),
        ])
        .await
        .unwrap();
        let mut known: Vec<String> = view.snapshots.unwrap().into_iter().collect();
        known.sort_unstable();
        assert_eq!(known, ["snap-kept", "snap-new", "snap-one"]);
    }

    #[tokio::test]
    async fn half_an_answer_is_none() {
        let begun = || vec![(KUBE_SYSTEM, 200, kube_system()), (VOLUMES, 200, page(json!([]), ""))];
        // The list has changed so much that its second page is no longer to be had.
        let mut expired = begun();
        expired.push((CLAIMS, 200, page(json!([]), "more")));
        expired.push(("/api/v1/persistentvolumeclaims?&limit=500&continue=more", 410, failure(410)));
        let mut forbidden = begun();
        forbidden.push((CLAIMS, 200, page(json!([]), "")));
        forbidden.push((CONTENTS, 403, failure(403)));
        forbidden.push((PODS, 403, failure(403)));
        for (answers, what) in [(expired, "PersistentVolumeClaims"), (forbidden, "pods")] {
            let error = answering(answers).await.unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("nothing was changed"), "{error}");
        }
        // The connection breaks.
        assert!(answering(begun()).await.is_err());
    }

    #[test]
    fn a_static_pod_is_known_by_both_its_uids() {
        let mut view = ClusterView::default();
        let pod: PartialObjectMeta<Pod> = serde_json::from_value(json!({"metadata": {
            "namespace": "kube-system",
            "name": "etcd-a",
            "uid": "in-the-api",
            "annotations": {"kubernetes.io/config.hash": "on-the-node"},
        }}))
        .unwrap();
        view.add_pod(&pod);
        assert!(view.pods.contains("in-the-api") && view.pods.contains("on-the-node"));
        assert!(view.pod_names.contains("kube-system/etcd-a"));
    }
}
