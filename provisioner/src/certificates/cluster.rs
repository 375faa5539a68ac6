//! The Secrets at the API server. Each is asked for by its name, since that is
//! all that the controller may do.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;

use super::plan::Write;
use super::sides::Side;
use super::state::Secrets;
use crate::names::AUTHORITIES_SECRET;
use crate::x509;

/// The names of all of them.
pub const NAMES: [&str; 4] =
    [AUTHORITIES_SECRET, Side::Controller.secret(), Side::Node.secret(), Side::Metrics.secret()];

/// Who writes them, in their `managedFields`.
const FIELD_MANAGER: &str = "lvprov-renewal";
/// Who asks for the time, there.
const CLOCK_MANAGER: &str = "lvprov-clock";

/// The API server did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} the Secret {name}; may it be read and patched (deploy/manifests/10-rbac.yaml)?")]
pub struct ApiError {
    /// What was to be done.
    pub verb: &'static str,
    /// The Secret.
    pub name: &'static str,
    /// What the API server, or the connection, says.
    #[source]
    pub source: Box<kube::Error>,
}

/// The Secrets as they were when they were read.
#[derive(Default)]
pub struct Live {
    /// What they hold.
    pub secrets: Secrets,
    /// What else is known of them, by name.
    pub metadata: BTreeMap<&'static str, ObjectMeta>,
}

impl Live {
    /// To tell Events of. None: it is not there.
    pub fn object(&self, name: &str) -> Option<Secret> {
        Some(Secret { metadata: self.metadata.get(name)?.clone(), ..Secret::default() })
    }
}

/// Reads all of them.
///
/// # Errors
/// When one cannot be read. That it is not there is no error.
pub async fn read(api: &Api<Secret>) -> Result<Live, ApiError> {
    let mut live = Live::default();
    for name in NAMES {
        let error = |source| ApiError { verb: "read", name, source: Box::new(source) };
        let Some(secret) = api.get_opt(name).await.map_err(error)? else { continue };
        let data = secret.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0)).collect();
        if let Some(at) = live.secrets.named_mut(name) {
            *at = Some(data);
        }
        let metadata = ObjectMeta { managed_fields: None, annotations: None, ..secret.metadata };
        live.metadata.insert(name, metadata);
    }
    Ok(live)
}

/// Writes to one of them, if it is still what was read.
///
/// # Errors
/// When it is not, or cannot be written.
pub async fn write(api: &Api<Secret>, live: &Live, write: Write) -> Result<(), ApiError> {
    let name = write.secret;
    let version = live.metadata.get(name).and_then(|metadata| metadata.resource_version.clone());
    let data: BTreeMap<_, _> = write.values.into_iter().map(|(key, value)| (key, ByteString(value))).collect();
    let patch = json!({"metadata": {"resourceVersion": version}, "data": data});
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    api.patch_metadata(name, &params, &Patch::Merge(patch)).await.map(|_| ()).map_err(|source| ApiError {
        verb: "write",
        name,
        source: Box::new(source),
    })
}

/// What the clock of the API server says, in seconds since 1970; where it
/// tells. It stamps who has written: nothing is written for this.
///
/// # Errors
/// When it does not answer.
pub async fn server_time(api: &Api<Secret>) -> Result<Option<i64>, ApiError> {
    let name = AUTHORITIES_SECRET;
    let asked = x509::show_time(x509::now());
    let patch = json!({"metadata": {"annotations": {"lvprov.io/clock": asked}}});
    let manager = Some(CLOCK_MANAGER.to_owned());
    let params = PatchParams { dry_run: true, field_manager: manager.clone(), ..PatchParams::default() };
    let error = |source| ApiError { verb: "read", name, source: Box::new(source) };
    let answer = api.patch_metadata(name, &params, &Patch::Merge(patch)).await.map_err(error)?;
    let stamps = answer.managed_fields().iter().filter(|entry| entry.manager == manager);
    Ok(stamps.filter_map(|entry| Some(entry.time.as_ref()?.0.as_second())).max())
}
