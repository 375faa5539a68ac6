//! `lvprov controller`: claims in, volumes and PersistentVolumes out.
//!
//! One of several controllers acts, by a Lease. It is driven by watches: of
//! claims, PersistentVolumes, snapshots, classes and nodes at the API server,
//! and of capacity at each node. It keeps nothing on disk: all it knows it reads from
//! the API and the nodes again after a restart.

mod api;
mod calls;
mod capacity;
pub(crate) mod claim;
mod context;
pub(crate) mod error;
mod events;
mod growth;
mod lease;
mod leftovers;
mod loss;
pub(crate) mod names;
pub mod nodes;
mod objects;
mod placement;
mod quantity;
mod queue;
mod renewal;
#[cfg(test)]
mod scenarios;
mod slim;
pub(crate) mod snapshot;
mod topology;
mod trouble;
pub(crate) mod validate;
pub mod volume;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, Stream, StreamExt};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Node, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::runtime::controller::Controller;
use kube::runtime::reflector::{ObjectRef, store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::broadcast;
use tokio::task::JoinSet;
use tokio_stream::wrappers::BroadcastStream;
use tracing::{error, info, warn};

use crate::names::{NAMESPACE, NODE_PORT};
use crate::tls::TlsError;
use crate::with_causes;
use calls::Calls;
use claim::{ClassChanged, Held};
use context::{Context, Lately};
use error::{Error, Failures, Row};
use events::Events;
use lease::Election;
use nodes::{News, Nodes};
use objects::{Kept, Objects};
use queue::Action;
use snapshot::Snapshots;
use snapshot::types::VolumeSnapshotContent;

/// So much news is taken at once…
const MANY: usize = 1024;
/// …and if it is more than this, all that waits is looked at, instead of all
/// claims for each node.
const FEW: usize = 8;
/// Between attempts to reconcile what failed.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// What `lvprov controller` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory with tls.crt, tls.key and ca.crt, to call the nodes with
    #[arg(long, default_value = "/tls", value_name = "DIR")]
    pub tls_dir: PathBuf,
    /// Namespace of the Lease, of the CSIStorageCapacity objects and of the
    /// Secrets with certificates
    #[arg(long, default_value = NAMESPACE)]
    pub namespace: String,
    /// TCP port of the node service on every node
    #[arg(long, default_value_t = NODE_PORT, value_name = "PORT")]
    pub node_port: u16,
    /// How long a node may not answer before its claims are handed back to the
    /// scheduler and its capacity is withdrawn
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    pub node_patience: u64,
    /// Where a class has so many nodes, those of about the same room share a
    /// CSIStorageCapacity, which says up to an eighth less than there is; the
    /// scheduler needs far longer for one from each node. 0: never
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub capacities_shared_from: usize,
    /// How long a Node object has to be gone before its node counts as lost for
    /// good: claims of classes with onNodeLoss: recreate are made anew, and
    /// released volumes are given up. 0: never
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    pub node_lost_after: u64,
    /// So many claims of lost nodes are deleted in a minute at most
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub node_lost_claims_per_minute: u16,
    /// Where more than this share of all nodes is lost at once, nothing is done
    /// (one node always may be lost)
    #[arg(long, default_value_t = 20, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub node_lost_most_percent: u8,
    /// Deployment in the namespace that the CSIStorageCapacity objects belong
    /// to, so that they go with it
    #[arg(long, value_name = "NAME")]
    pub deployment: Option<String>,
    /// Name of this controller among those of the installation; the host's
    /// name unless given
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pub identity: Option<String>,
}

/// Why the controller ended.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// The asynchronous runtime cannot be started.
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    /// The files to call nodes with cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Neither in a cluster nor with a kubeconfig.
    #[error("cannot reach a cluster; run this in a pod with a ServiceAccount, or set KUBECONFIG")]
    Client(#[source] Box<kube::Error>),
    /// Something needed to start could not be read.
    #[error("cannot read {what}")]
    Read {
        /// What.
        what: String,
        /// What the API server says.
        #[source]
        source: Box<kube::Error>,
    },
    /// Another controller may be acting now.
    #[error(transparent)]
    Lost(#[from] lease::Lost),
    /// A part has ended that should run for ever.
    #[error("the part that looks after {0} has ended")]
    Ended(&'static str),
}

/// Runs the controller until it is told to stop.
///
/// # Errors
/// When it cannot start, or has to give up.
pub fn run(args: Args) -> Result<(), ControllerError> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(ControllerError::Runtime)?
        .block_on(serve(args))
}

async fn serve(args: Args) -> Result<(), ControllerError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ControllerError::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ControllerError::Runtime)?;
    let told_to_stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tokio::pin!(told_to_stop);

    let client = api::client().await.map_err(|error| ControllerError::Client(Box::new(error)))?;
    let identity = args.identity.clone().unwrap_or_else(host_name);
    let election = Election::new(client.clone(), &args.namespace, identity.clone());
    info!(identity, namespace = args.namespace, "waiting for the Lease");
    let since = tokio::select! {
        since = election.acquire() => since,
        () = &mut told_to_stop => return Ok(()),
    };
    // By itself: work that keeps a processor busy must not cost the Lease.
    let election = Arc::new(election);
    let mut keeping = JoinSet::new();
    keeping.spawn({
        let election = Arc::clone(&election);
        async move { election.keep(since).await }
    });
    let ended = tokio::select! {
        ended = act(&args, client, identity) => ended,
        Some(lost) = keeping.join_next() => return Err(lost.map_or(ControllerError::Ended("the Lease"), Into::into)),
        () = &mut told_to_stop => Ok(()),
    };
    keeping.shutdown().await;
    // Nothing is acting any more: all of it was dropped with the select.
    election.release().await;
    ended
}

fn host_name() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| "lvprov-controller".to_owned())
}

/// The work of the leader.
async fn act(args: &Args, client: Client, identity: String) -> Result<(), ControllerError> {
    let events = Events::new(client.clone(), identity);
    let tls = renewal::open(&args.tls_dir, &client, &events, &args.namespace).await?;
    // Ends with the runtime.
    tokio::spawn(Arc::clone(&tls).watch());
    let cluster = cluster_id(&client).await?;
    let owner = owner(args, &client).await?;
    let patience = Duration::from_secs(args.node_patience);
    let nodes = Nodes::new(Some(tls), args.node_port);

    let (classes, class_writer) = store::<StorageClass>();
    let (class_changed, _) = broadcast::channel(256);
    let (claims, volumes, node_objects) = (Objects::default(), Objects::default(), Objects::default());
    let (contents, content_writer) = store::<VolumeSnapshotContent>();
    let snapshots = Arc::new(Snapshots::new(contents.clone()));
    let ctx = Arc::new(Context {
        events,
        cluster,
        nodes: nodes.clone(),
        node_objects: node_objects.clone(),
        classes: classes.clone(),
        claims: claims.clone(),
        volumes: volumes.clone(),
        snapshots: snapshots.clone(),
        held: Held::default(),
        failures: Failures::default(),
        calls: Calls::default(),
        published: Lately::default(),
        grown: Lately::default(),
        patience,
        client: client.clone(),
    });
    // Before anything can happen that they tell of.
    let came_up = nodes.news();
    let unmounts = trouble::run(ctx.clone(), nodes.troubles());
    let renewing = renewal::run(&ctx.client, &ctx.events, &args.namespace);
    let ageing = renewal::tell_nodes(ctx.clone(), nodes.ageing());
    let claim_triggers = stream::select(watched(&client, &claims), claim_triggers(&ctx, &class_changed));
    let volume_triggers = stream::select(watched(&client, &volumes), volume_triggers(&ctx));
    let content_triggers = snapshot::triggers(&ctx);
    let content_watch =
        snapshot::watch(client.clone(), snapshots, snapshot::SELDOM).modify(slim::content).reflect(content_writer);
    let publisher = capacity::Publisher {
        client: client.clone(),
        namespace: args.namespace.clone(),
        owner,
        nodes: nodes.clone(),
        node_objects: node_objects.clone(),
        classes: classes.clone(),
        patience,
        share_from: args.capacities_shared_from,
    };
    let publishing = publisher.run(class_changed.subscribe());

    let node_watch = watcher(Api::<Node>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .modify(slim::node)
        .for_each(|event| {
            follow_node(&nodes, &node_objects, event);
            std::future::ready(())
        });
    let class_watch = watcher(Api::<StorageClass>::all(client), watcher::Config::default())
        .default_backoff()
        .modify(slim::object)
        .reflect(class_writer)
        .for_each(|event| {
            follow_class(&class_changed, event);
            std::future::ready(())
        });
    let work = async {
        // Without classes every claim is somebody else's, without PVs every
        // volume is still to be made.
        if classes.wait_until_ready().await.is_err() {
            return;
        }
        node_objects.wait_until_ready().await;
        let volumes = queue::run(&volumes, volume_triggers, async |volume: Arc<PersistentVolume>| {
            let done = volume::reconcile(volume.clone(), ctx.clone()).await;
            done.unwrap_or_else(|error| again(&*volume, &error, &ctx))
        });
        let claims = async {
            ctx.volumes.wait_until_ready().await;
            queue::run(&claims, claim_triggers, async |claim: Arc<PersistentVolumeClaim>| {
                let done = claim::reconcile(claim.clone(), ctx.clone()).await;
                done.unwrap_or_else(|error| again(&*claim, &error, &ctx))
            })
            .await;
        };
        let left = async {
            ctx.volumes.wait_until_ready().await;
            ctx.claims.wait_until_ready().await;
            futures::future::join(calls::run(ctx.clone()), leftovers::run(ctx.clone(), came_up)).await;
        };
        let lost = async {
            if args.node_lost_after == 0 {
                return;
            }
            let settings = loss::Settings {
                after: Duration::from_secs(args.node_lost_after),
                claims_per_minute: args.node_lost_claims_per_minute.into(),
                most_percent: args.node_lost_most_percent.into(),
            };
            ctx.volumes.wait_until_ready().await;
            loss::run(ctx.clone(), settings).await;
        };
        // Where there are none, this waits.
        let contents = async {
            ctx.volumes.wait_until_ready().await;
            Controller::for_stream(content_watch.applied_objects(), contents)
                .reconcile_on(content_triggers)
                .run(
                    async |content, ctx| snapshot::reconcile(content, ctx).await.map(Into::into),
                    |content, error, ctx| again(&*content, error, &ctx).into(),
                    ctx.clone(),
                )
                .for_each(report)
                .await;
        };
        futures::future::join5(volumes, claims, left, lost, contents).await;
    };
    tokio::select! {
        () = work => Err(ControllerError::Ended("claims and volumes")),
        () = publishing => Err(ControllerError::Ended("capacity")),
        () = renewing => Err(ControllerError::Ended("certificates")),
        () = ageing => Err(ControllerError::Ended("nodes' certificates")),
        () = unmounts => Err(ControllerError::Ended("unmounts that fail")),
        () = node_watch => Err(ControllerError::Ended("nodes")),
        () = class_watch => Err(ControllerError::Ended("StorageClasses")),
    }
}

/// What the watch of all objects of a kind brings, as it comes into `objects`.
fn watched<K: Kept>(client: &Client, objects: &Objects<K>) -> impl Stream<Item = ObjectRef<K>> + Send + 'static {
    objects.follow(watcher(Api::<K>::all(client.clone()), watcher::Config::default()).default_backoff())
}

/// The UID of kube-system: that namespace lives as long as the cluster.
async fn cluster_id(client: &Client) -> Result<String, ControllerError> {
    let what = || "namespace kube-system".to_owned();
    let api: Api<Namespace> = Api::all(client.clone());
    let namespace = api
        .get("kube-system")
        .await
        .map_err(|source| ControllerError::Read { what: what(), source: Box::new(source) })?;
    Ok(namespace.uid().unwrap_or_default())
}

async fn owner(args: &Args, client: &Client) -> Result<Option<OwnerReference>, ControllerError> {
    let Some(name) = &args.deployment else {
        return Ok(None);
    };
    let api: Api<Deployment> = Api::namespaced(client.clone(), &args.namespace);
    let deployment = api.get(name).await.map_err(|source| ControllerError::Read {
        what: format!("Deployment {}/{name}", args.namespace),
        source: Box::new(source),
    })?;
    Ok(deployment.owner_ref(&()))
}

/// Takes an event of the node watch to the node services.
fn follow_node(nodes: &Arc<Nodes>, objects: &Objects<Node>, event: watcher::Result<watcher::Event<Node>>) {
    let event = match event {
        Ok(event) => event,
        Err(error) => {
            warn!(%error, "cannot watch nodes");
            return;
        }
    };
    // News of a node come when it is there.
    objects.take(event.clone());
    match event {
        watcher::Event::Apply(node) | watcher::Event::InitApply(node) => nodes.observe(&node),
        watcher::Event::Delete(node) => nodes.forget(&node.name_any()),
        // What went while the watch was broken.
        watcher::Event::InitDone => nodes.retain(|name| objects.contains(&ObjectRef::new(name))),
        watcher::Event::Init => {}
    }
}

/// Tells of a changed class, once the store has it.
fn follow_class(changed: &broadcast::Sender<ClassChanged>, event: watcher::Result<watcher::Event<StorageClass>>) {
    let news = match event {
        Ok(watcher::Event::Apply(class) | watcher::Event::Delete(class)) => ClassChanged::One(class.name_any()),
        // Only now does the store have what came while the watch was broken,
        // and not any more what went.
        Ok(watcher::Event::InitDone) => ClassChanged::Any,
        Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => return,
        Err(error) => {
            warn!(%error, "cannot watch StorageClasses");
            return;
        }
    };
    // Nobody listening is no fault.
    let _ = changed.send(news);
}

/// Claims to look at again for what happened to a node or a class.
fn claim_triggers(
    ctx: &Arc<Context>,
    class_changed: &broadcast::Sender<ClassChanged>,
) -> impl Stream<Item = ObjectRef<PersistentVolumeClaim>> + Send + 'static {
    let all = ctx.clone();
    // Many at once are one look at all claims.
    let by_node = BroadcastStream::new(ctx.nodes.news()).ready_chunks(MANY).flat_map(move |news| {
        // An error: too much has happened to hear of each node.
        let news: Option<Vec<News>> = news.into_iter().collect::<Result<_, _>>().ok();
        for one in news.iter().flatten() {
            if let News::Up(node) = one {
                all.failures.heard_from(node);
                all.calls.look();
            }
        }
        let few = news.filter(|news| news.len() <= FEW);
        let each: Vec<Option<&News>> = match &few {
            Some(news) => news.iter().map(Some).collect(),
            None => vec![None],
        };
        let mut concerned = Vec::new();
        for news in each {
            concerned.extend(claim::concerned_by_node(news, &all));
            concerned.extend(growth::concerned_by_node(news, &all));
        }
        stream::iter(concerned)
    });
    let claims = ctx.claims.clone();
    let by_class = BroadcastStream::new(class_changed.subscribe())
        .flat_map(move |class| stream::iter(claim::concerned_by_class(&class.unwrap_or(ClassChanged::Any), &claims)));
    let all = ctx.clone();
    // An error: too much has happened to hear of each.
    let by_snapshot = BroadcastStream::new(ctx.snapshots.ready())
        .flat_map(move |snapshot| stream::iter(claim::concerned_by_snapshot(snapshot.ok().as_ref(), &all)));
    let all = ctx.clone();
    let by_snapshot_gone = BroadcastStream::new(ctx.snapshots.gone())
        .flat_map(move |node| stream::iter(growth::concerned_by_snapshot_gone(node.ok().as_deref(), &all)));
    let all = ctx.clone();
    let by_growth = stream::once(async move {
        all.volumes.wait_until_ready().await;
        all.claims.wait_until_ready().await;
        stream::iter(growth::to_be_tidied(&all.volumes))
    });
    let by_others = stream::select(by_class, by_growth.flatten());
    stream::select(stream::select(by_node, by_others), stream::select(by_snapshot, by_snapshot_gone))
}

/// Volumes to look at again for what happened to a node, or to a snapshot there:
/// those whose removal waits for it.
fn volume_triggers(ctx: &Context) -> impl Stream<Item = ObjectRef<PersistentVolume>> + Send + 'static {
    let (volumes, nodes) = (ctx.volumes.clone(), ctx.nodes.clone());
    let by_snapshot = BroadcastStream::new(ctx.snapshots.gone()).flat_map({
        let volumes = volumes.clone();
        move |node| {
            stream::iter(waiting_for_removal(&volumes, |topology| node.as_ref().ok().is_none_or(|it| it == topology)))
        }
    });
    let by_node = BroadcastStream::new(ctx.nodes.news()).ready_chunks(MANY).flat_map(move |news| {
        let mut up = HashSet::new();
        let mut any = false;
        for one in news {
            match one {
                Ok(News::Up(node)) => match nodes.view(&node) {
                    Some(view) => drop(up.insert(view.topology.clone())),
                    None => any = true,
                },
                Ok(News::Capacity(_) | News::Changed(_) | News::Down(_) | News::Gone(_)) => {}
                // Too much has happened to hear of each node.
                Err(_) => any = true,
            }
        }
        if up.is_empty() && !any {
            return stream::iter(Vec::new());
        }
        stream::iter(waiting_for_removal(&volumes, |topology| any || up.contains(topology)))
    });
    stream::select(by_node, by_snapshot)
}

fn waiting_for_removal(
    volumes: &Objects<PersistentVolume>,
    concerned: impl Fn(&String) -> bool,
) -> Vec<ObjectRef<PersistentVolume>> {
    let waits = |volume: &PersistentVolume| {
        volume::need(volume) == volume::Need::Removal
            && volume::place_of(volume).is_some_and(|place| concerned(&place.topology))
    };
    volumes.live(waits).iter().map(|volume| ObjectRef::from_obj(&**volume)).collect()
}

/// When to try again what has failed.
fn again<K: Resource<DynamicType = ()>>(object: &K, error: &Error, ctx: &Context) -> Action {
    let name = object.name_any();
    warn!(kind = %K::kind(&()), name, error = with_causes(error), "will be tried again");
    let key = object.uid().unwrap_or_default();
    Action::requeue(ctx.failures.note(&key, Row::Reconciliation, "", LONGEST_WAIT).wait)
}

async fn report<E: std::error::Error + 'static>(
    done: Result<
        (ObjectRef<VolumeSnapshotContent>, kube::runtime::controller::Action),
        kube::runtime::controller::Error<Error, E>,
    >,
) {
    use kube::runtime::controller::Error as Failed;
    match done {
        // Told by `again`, or gone meanwhile.
        Ok(_) | Err(Failed::ReconcilerFailed(..) | Failed::ObjectNotFound(_)) => {}
        Err(failed) => error!(error = with_causes(&failed), "cannot watch VolumeSnapshotContents"),
    }
}
