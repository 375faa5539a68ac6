//! `lvprov reuse` and `lvprov import`: a volume that is there becomes that of a
//! claim.
//!
//! The claim has to be there, bound to nothing, and of a class of ours: all
//! that the PersistentVolume says follows from the two, as for a volume that is
//! made anew. The node checks the volume and makes it the claim's; then it gets
//! its PersistentVolume. All of it may be done again, wherever it was cut off.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{DeleteParams, ListParams, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use lvm::layout::Layout;
use lvm::size::human;
use lvprov_proto::lvprov::inventory_item::Item;
use lvprov_proto::lvprov::{AdoptRequest, DataVolume};
use serde::Serialize;

use super::cluster::ClusterView;
use super::fleet::{Fleet, FleetNode};
use super::report::{NodeReport, Report as _};
use super::{AdminError, Reach};
use crate::controller::claim::selected_node;
use crate::controller::error::{already_exists, is_not_found};
use crate::controller::names::volume_of;
use crate::controller::validate::{Request, class_name, validate};
use crate::controller::volume::{Made, build, place_of};
use crate::names::{DRIVER, context};

/// What `lvprov reuse` is told.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
VOLUME is a Released PersistentVolume with policy Retain, or <volume group>/<logical volume> of one whose \
PersistentVolume was deleted (`lvprov volumes` lists them). The claim has to be there, not bound, and of a StorageClass \
of lvprov with the same volume group and file system; it may be in any namespace. The data stays; the PersistentVolume \
is made anew, and the claim is bound to it.

Examples:
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov reuse pvc-0f0e… --claim shop/data-db-0
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov reuse vg0/pvc-0f0e… --node n1 --claim shop/data-db-0

A command that failed may be run again, with the same words.")]
pub struct ReuseArgs {
    #[command(flatten)]
    reach: Reach,
    /// A PersistentVolume, or a logical volume
    #[arg(value_name = "VOLUME")]
    volume: String,
    #[command(flatten)]
    to: To,
}

/// What `lvprov import` is told.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The logical volume must bear no tags of lvprov, be in use by nobody, and hold the file system that the StorageClass of \
the claim names; for a claim with volumeMode Block it may hold anything. The claim has to be there, not bound, and of a \
StorageClass of lvprov with the same volume group. The volume gets the claim's name, tags and file system UUID; its \
data stays.

Examples:
  kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov import vg0/mysql --node n1 --claim shop/data-db-0

A command that failed may be run again, with the same words.")]
pub struct ImportArgs {
    #[command(flatten)]
    reach: Reach,
    /// `<volume group>/<logical volume>`
    #[arg(value_name = "VG/LV")]
    volume: String,
    #[command(flatten)]
    to: To,
}

/// Where it is, and who is to have it.
#[derive(Debug, clap::Args)]
pub struct To {
    /// The claim that is to have it
    #[arg(long, value_name = "NAMESPACE/NAME")]
    claim: String,
    /// The node that has it, where that is not known
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs `lvprov reuse`.
///
/// # Errors
/// When the volume or the claim does not suit, or a node or the API server
/// does not answer.
pub fn reuse(args: ReuseArgs) -> Result<(), AdminError> {
    super::run(&args.reach, async |client, fleet| {
        let wanted = Wanted::of_claim(&client, &args.to.claim).await?;
        let view = ClusterView::ask(&client).await?;
        let (source, old) = match split(&args.volume) {
            Some((vg, lv)) => {
                let node = args.to.node.clone();
                (Source { vg: vg.to_owned(), lv: lv.to_owned(), node }, None)
            }
            None => {
                let (source, old) = of_volume(&client, &view, &args.volume, &wanted).await?;
                (Source { node: args.to.node.clone().or(source.node), ..source }, Some(old))
            }
        };
        let (node, found) = find(&fleet, &source, &wanted).await?;
        let except = old.as_ref().map(ResourceExt::name_any);
        let given = wanted.take(&client, &fleet, &view, &node, &source, &found.claim_uid, except.as_deref()).await?;
        // Its logical volume has another name by now.
        if let Some(old) = old {
            delete(&client, &old).await?;
        }
        wanted.publish(&client, &node, given).await?.print(args.to.json)
    })
}

/// Runs `lvprov import`.
///
/// # Errors
/// As of [`reuse`].
pub fn import(args: ImportArgs) -> Result<(), AdminError> {
    super::run(&args.reach, async |client, fleet| {
        let (vg, lv) = split(&args.volume)
            .ok_or_else(|| AdminError::Refused(format!("{:?} is not <volume group>/<logical volume>", args.volume)))?;
        let wanted = Wanted::of_claim(&client, &args.to.claim).await?;
        let view = ClusterView::ask(&client).await?;
        let source = Source { vg: vg.to_owned(), lv: lv.to_owned(), node: args.to.node.clone() };
        let node = match (&source.node, fleet.nodes()) {
            (Some(name), all) => all.iter().find(|node| node.name == *name).cloned(),
            (None, [only]) => Some(only.clone()),
            (None, _) => return Err(AdminError::Refused("say with --node on which node the volume is".to_owned())),
        };
        let node = node.ok_or_else(|| AdminError::NoNode(source.node.clone().unwrap_or_default()))?;
        let given = wanted.take(&client, &fleet, &view, &node, &source, "", None).await?;
        wanted.publish(&client, &node, given).await?.print(args.to.json)
    })
}

pub(super) fn split(volume: &str) -> Option<(&str, &str)> {
    volume.split_once('/').filter(|(vg, lv)| !vg.is_empty() && !lv.is_empty())
}

/// The volume that is to be given away.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub vg: String,
    pub lv: String,
    pub node: Option<String>,
}

/// The volume of a PV that nobody uses, and that is to be kept. One that an
/// earlier run has deleted is named by the claim's own by now.
async fn of_volume(
    client: &Client,
    view: &ClusterView,
    name: &str,
    wanted: &Wanted,
) -> Result<(Source, PersistentVolume), AdminError> {
    let refuse = |why: String| Err(AdminError::Refused(format!("PersistentVolume {name} cannot be reused: {why}")));
    let api: Api<PersistentVolume> = Api::all(client.clone());
    let volume = match api.get(name).await {
        Ok(volume) => volume,
        Err(error) if is_not_found(&error) => {
            return refuse(format!(
                "there is none of this name. Of one that was deleted, name the logical volume: lvprov reuse \
                 <volume group>/{name} --claim {}/{}",
                wanted.claim.namespace().unwrap_or_default(),
                wanted.claim.name_any()
            ));
        }
        Err(source) => return Err(object(format!("read PersistentVolume {name}"), source)),
    };
    let phase = volume.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default();
    if !matches!(phase.as_str(), "Released" | "Available" | "Failed") {
        return refuse(format!("it is {phase}. Delete its pod and its claim first"));
    }
    let policy = volume.spec.as_ref().and_then(|spec| spec.persistent_volume_reclaim_policy.clone());
    if policy.as_deref() != Some("Retain") {
        return refuse("its policy is Delete, so its volume is being removed. Set it to Retain first".to_owned());
    }
    let Some(reference) = view.volumes.get(name) else {
        return refuse("it is not a volume of lvprov".to_owned());
    };
    let (vg, lv) = (reference.volume_group.clone(), reference.logical_volume.clone());
    Ok((Source { vg, lv, node: reference.topology.clone() }, volume))
}

/// Looks for the volume on the nodes. One that was given to the claim already
/// counts as found.
async fn find(fleet: &Fleet, source: &Source, wanted: &Wanted) -> Result<(FleetNode, DataVolume), AdminError> {
    let mut unreached = Vec::new();
    let mut found = Vec::new();
    let name = volume_of(&wanted.uid());
    for answer in fleet.inventories().await {
        if source.node.as_ref().is_some_and(|node| *node != answer.node.name) {
            continue;
        }
        match answer.result {
            Err(why) => unreached.push(format!("node {} did not answer: {why}", answer.node.name)),
            Ok(items) => found.extend(items.into_iter().filter_map(|item| match item {
                Item::DataVolume(volume) if volume.volume_group == source.vg => {
                    let is_it = volume.logical_volume == source.lv
                        || (volume.logical_volume == name && volume.claim_uid == wanted.uid());
                    is_it.then(|| (answer.node.clone(), volume))
                }
                _ => None,
            })),
        }
    }
    let asked = format!("{}/{}", source.vg, source.lv);
    match found.len() {
        1 => Ok(found.remove(0)),
        0 if unreached.is_empty() => Err(AdminError::Refused(format!(
            "no node has a volume of lvprov {asked}. `lvprov volumes` and `lvprov trash list` show what there is; one \
             without lvprov's tags is given to a claim with `lvprov import`"
        ))),
        0 => Err(AdminError::Refused(format!("{asked} was not found, and {}", unreached.join("; ")))),
        _ => Err(AdminError::Refused(format!("more than one node has {asked}; say which with --node"))),
    }
}

/// A claim, and what it and its class ask for.
#[derive(Debug)]
pub(super) struct Wanted {
    pub claim: PersistentVolumeClaim,
    class: StorageClass,
    request: Request,
}

/// What a node has given to a claim.
#[derive(Debug)]
pub(super) struct Given {
    vg: String,
    lv: String,
    bytes: u64,
    layout: Layout,
}

impl Wanted {
    /// The claim of this name, if it waits for a volume of ours.
    pub async fn of_claim(client: &Client, claim: &str) -> Result<Self, AdminError> {
        let refuse = |why: String| AdminError::Refused(format!("claim {claim} cannot have the volume: {why}"));
        let (namespace, name) = split(claim).ok_or_else(|| refuse("it is not NAMESPACE/NAME".to_owned()))?;
        let api: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
        let claim = api.get_opt(name).await.map_err(|source| object(format!("read claim {claim}"), source))?;
        let claim = claim.ok_or_else(|| {
            refuse("there is none. Make it first, with a StorageClass of lvprov; no pod needs to use it".to_owned())
        })?;
        let bound = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).unwrap_or_default();
        if !bound.is_empty() && bound != volume_of(&claim.uid().unwrap_or_default()) {
            return Err(refuse(format!("it is bound to {bound}")));
        }
        if claim.metadata.deletion_timestamp.is_some() {
            return Err(refuse("it is being deleted".to_owned()));
        }
        let class = class_name(&claim).ok_or_else(|| refuse("it names no StorageClass".to_owned()))?.to_owned();
        Self::new(client, claim, &class).await
    }

    /// A claim of this class, which need not exist.
    pub async fn new(client: &Client, claim: PersistentVolumeClaim, class: &str) -> Result<Self, AdminError> {
        let class_of = |class: &str| ListParams::default().fields(&format!("metadata.name={class}"));
        let api: Api<StorageClass> = Api::all(client.clone());
        let found = api.list(&class_of(class)).await;
        let found = found.map_err(|source| object(format!("read StorageClass {class}"), source))?;
        let found = found.items.into_iter().find(|one| one.name_any() == class);
        let found = found.ok_or_else(|| AdminError::Refused(format!("there is no StorageClass {class}")))?;
        if found.provisioner != DRIVER {
            return Err(AdminError::Refused(format!("StorageClass {class} is not one of lvprov")));
        }
        let request = validate(&claim, &found).map_err(|refusal| AdminError::Refused(refusal.to_string()))?;
        if let Some(data) = &request.data {
            return Err(AdminError::Refused(format!(
                "the claim asks for the data of {data}, and the volume holds others. Make it again without \
                 spec.dataSource"
            )));
        }
        Ok(Self { claim, class: found, request })
    }

    pub fn uid(&self) -> String {
        self.claim.uid().unwrap_or_default()
    }

    /// Has the node make it the claim's. `except`: the PV that names it still.
    #[allow(clippy::too_many_arguments, reason = "each is another object")]
    pub async fn take(
        &self,
        client: &Client,
        fleet: &Fleet,
        view: &ClusterView,
        node: &FleetNode,
        source: &Source,
        from: &str,
        except: Option<&str>,
    ) -> Result<Given, AdminError> {
        let Source { vg, lv, .. } = source;
        let refuse = |why: String| Err(AdminError::Refused(format!("{vg}/{lv} cannot be given away: {why}")));
        if !self.request.volume_group.may_be(vg) {
            return refuse(format!("StorageClass {} has {}", self.class.name_any(), self.request.volume_group));
        }
        if let Some(selected) = selected_node(&self.claim)
            && selected != node.name
        {
            return refuse(format!(
                "the scheduler has chosen node {selected} for a pod of the claim, and the volume is on {}. Delete the \
                 pod first",
                node.name
            ));
        }
        let names_it = view.volumes.iter().find(|(name, one)| {
            let here = one.topology.as_ref().is_none_or(|topology| *topology == node.name);
            here && one.volume_group == *vg && one.logical_volume == *lv && Some(name.as_str()) != except
        });
        if let Some((name, _)) = names_it
            && *name != volume_of(&self.uid())
        {
            return refuse(format!("PersistentVolume {name} names it"));
        }
        self.check_volume(client, node, vg).await?;
        let request = &self.request;
        let answer = fleet.adopt(
            node,
            AdoptRequest {
                node: node.name.clone(),
                volume_group: vg.clone(),
                logical_volume: lv.clone(),
                from_claim_uid: from.to_owned(),
                cluster: view.id.clone(),
                claim_uid: self.uid(),
                claim_namespace: self.claim.namespace().unwrap_or_default(),
                claim_name: self.claim.name_any(),
                fs_type: if request.block { String::new() } else { request.fs_type.to_string() },
                delete_policy: request.end.delete_policy().unwrap_or_default(),
                trash_seconds: request.end.trash_time.as_secs(),
                storage_class: request.end.class.clone(),
                size_bytes: request.bytes,
            },
        );
        match answer.await {
            Ok(answer) => Ok(Given {
                vg: vg.clone(),
                lv: answer.logical_volume,
                bytes: answer.size_bytes,
                layout: answer.layout.parse().unwrap_or_default(),
            }),
            Err(why) => Err(AdminError::Refused(format!("node {}: {why}", node.name))),
        }
    }

    /// A PV of the claim's own name must be of this volume, or not there.
    async fn check_volume(&self, client: &Client, node: &FleetNode, vg: &str) -> Result<(), AdminError> {
        let name = volume_of(&self.uid());
        let api: Api<PersistentVolume> = Api::all(client.clone());
        let there = api.get_opt(&name).await;
        let there = there.map_err(|source| object(format!("read PersistentVolume {name}"), source))?;
        let is_it = |place: crate::controller::volume::Place| {
            place.topology == node.name && place.volume_group == vg && place.logical_volume == name
        };
        match there {
            Some(there) if !place_of(&there).is_some_and(is_it) => {
                Err(AdminError::Refused(format!("the claim has another volume already, PersistentVolume {name}")))
            }
            _ => Ok(()),
        }
    }

    /// Makes the PV.
    pub async fn publish(&self, client: &Client, node: &FleetNode, given: Given) -> Result<Report, AdminError> {
        let owner = [
            (context::CLAIM_NAMESPACE.to_owned(), self.claim.namespace().unwrap_or_default()),
            (context::CLAIM_UID.to_owned(), self.uid()),
        ];
        let made = Made {
            topology: node.name.clone(),
            volume_group: given.vg,
            logical_volume: given.lv,
            bytes: given.bytes,
            context: BTreeMap::from(owner),
        };
        // The PV says how the volume lies, whatever the class has for new ones.
        let request = Request { layout: given.layout, ..self.request.clone() };
        let mut volume = build(&self.claim, &self.class, &request, &made);
        // Without it the claim is one that was: whoever comes under its name has the volume.
        if self.claim.resource_version().is_none()
            && let Some(reference) = volume.spec.as_mut().and_then(|spec| spec.claim_ref.as_mut())
        {
            reference.uid = None;
        }
        let name = volume.name_any();
        let api: Api<PersistentVolume> = Api::all(client.clone());
        match api.create(&PostParams::default(), &volume).await {
            Ok(_) => {}
            Err(error) if already_exists(&error) => self.check_volume(client, node, &made.volume_group).await?,
            Err(source) => return Err(object(format!("create PersistentVolume {name}"), source)),
        }
        Ok(Report {
            schema: "lvprov.io/reuse/v1",
            node: node.name.clone(),
            logical_volume: format!("{}/{}", made.volume_group, made.logical_volume),
            size_bytes: made.bytes,
            persistent_volume: name,
            claim: format!("{}/{}", self.claim.namespace().unwrap_or_default(), self.claim.name_any()),
            claim_exists: self.claim.resource_version().is_some(),
        })
    }
}

async fn delete(client: &Client, volume: &PersistentVolume) -> Result<(), AdminError> {
    let name = volume.name_any();
    let api: Api<PersistentVolume> = Api::all(client.clone());
    let this_one = DeleteParams {
        preconditions: Some(Preconditions { uid: volume.uid(), resource_version: None }),
        ..DeleteParams::default()
    };
    match api.delete(&name, &this_one).await {
        Ok(_) => Ok(()),
        Err(error) if is_not_found(&error) => Ok(()),
        Err(source) => Err(object(format!("delete PersistentVolume {name}"), source)),
    }
}

fn object(what: String, source: kube::Error) -> AdminError {
    AdminError::Object { what, source: Box::new(source) }
}

/// The result, as `--json` prints it. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    schema: &'static str,
    node: String,
    logical_volume: String,
    size_bytes: u64,
    persistent_volume: String,
    claim: String,
    claim_exists: bool,
}

impl super::report::Report for Report {
    fn nodes(&self) -> impl Iterator<Item = &NodeReport> {
        std::iter::empty()
    }

    fn text(&self) -> String {
        let Self { node, logical_volume, persistent_volume, claim, .. } = self;
        let size = human(self.size_bytes);
        let who = match self.claim_exists {
            true => format!("belongs to claim {claim} now, which is bound to it in a moment"),
            false => format!("waits for a claim {claim}"),
        };
        format!("PersistentVolume {persistent_volume} ({logical_volume} on node {node}, {size}) {who}\n")
    }
}
