//! `lvprov certificates --list` and `--renew`: what the Secrets of a cluster
//! hold, and that it be renewed.

use std::io::Write as _;
use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use serde::Serialize;

use super::Args;
use super::cluster::{self, ApiError};
use super::plan::{Write, plan};
use super::sides::{BUNDLES, Side};
use super::state::{RENEW, Secrets, Seen, Slot};
use crate::admin::table;
use crate::names::AUTHORITIES_SECRET;
use crate::tls::CERTIFICATE;
use crate::x509;

/// Why the Secrets in the cluster cannot be shown or changed.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The asynchronous runtime cannot be started.
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    /// Neither in a cluster nor with a kubeconfig.
    #[error(
        "cannot reach a cluster; run this with `kubectl -n lvprov-system exec deploy/lvprov-controller -- /lvprov …`, \
         or set KUBECONFIG"
    )]
    Client(#[source] Box<kube::Error>),
    /// A Secret cannot be read, or not be written.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Nobody renews certificates here.
    #[error(
        "there is no Secret {AUTHORITIES_SECRET} in {0}, so the controller renews nothing; `lvprov certificates | \
         kubectl apply -f -` makes it, and all certificates anew"
    )]
    NoAuthorities(String),
    /// Standard output cannot be written.
    #[error("cannot write the result")]
    Output(#[source] std::io::Error),
}

/// Does what the command was asked for.
///
/// # Errors
/// When the Secrets cannot be read, or not be written.
pub fn run(args: &Args) -> Result<(), ClusterError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ClusterError::Runtime)?;
    runtime.block_on(async {
        let client = Client::try_default().await.map_err(|error| ClusterError::Client(Box::new(error)))?;
        let api: Api<Secret> = Api::namespaced(client, &args.namespace);
        let live = cluster::read(&api).await?;
        let text = if args.renew {
            if live.secrets.authorities.is_none() {
                return Err(ClusterError::NoAuthorities(args.namespace.clone()));
            }
            let now = x509::show_time(x509::now());
            let values = [(RENEW.to_owned(), now.clone().into_bytes())].into();
            cluster::write(&api, &live, Write { secret: AUTHORITIES_SECRET, values }).await?;
            format!(
                "what was made before {now} is renewed by the controller; new authorities sign after {} s\n",
                live.secrets.lifetime().overlap()
            )
        } else {
            let listing = Listing::new(&live.secrets, x509::now());
            if args.json { listing.json() } else { listing.text() }
        };
        std::io::stdout().write_all(text.as_bytes()).map_err(ClusterError::Output)
    })
}

/// All certificates. Fields are only ever added to its JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Listing {
    schema: &'static str,
    /// Whether the controller renews them.
    renewed: bool,
    /// When it looks at them next, if nothing happens before.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_look: Option<String>,
    certificates: Vec<Row>,
    #[serde(skip)]
    now: i64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    secret: &'static str,
    file: String,
    /// `certificate`, `authority` (signs), `next` (is to sign), `old`
    /// (signs no more), or `trusted`.
    kind: &'static str,
    /// None: there is none that could be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<String>,
    #[serde(skip)]
    expiry: Option<i64>,
}

impl Listing {
    /// Of these Secrets.
    pub fn new(secrets: &Secrets, now: i64) -> Self {
        let row = |secret, file: String, kind, seen: Option<&Seen>| {
            let expiry = seen.map(|seen| seen.validity.not_after);
            Row { secret, file, kind, expires: expiry.map(x509::show_time), expiry }
        };
        let renewed = secrets.authorities.is_some();
        let mut rows = Vec::new();
        for side in Side::ALL.into_iter().filter(|_| renewed) {
            for (slot, kind) in [(Slot::Current, "authority"), (Slot::Next, "next")] {
                let seen = secrets.authority(side, slot);
                if seen.is_some() || slot == Slot::Current {
                    rows.push(row(AUTHORITIES_SECRET, slot.keys(side).certificate, kind, seen.as_ref()));
                }
            }
            let file = super::state::old_key(side);
            rows.extend(secrets.old(side).iter().map(|seen| row(AUTHORITIES_SECRET, file.clone(), "old", Some(seen))));
        }
        for side in Side::ALL {
            rows.push(row(side.secret(), CERTIFICATE.to_owned(), "certificate", secrets.leaf(side).as_ref()));
            for bundle in BUNDLES.iter().filter(|bundle| bundle.holder == side) {
                let trusted = secrets.trusted(bundle);
                rows.extend(
                    trusted.iter().map(|seen| row(side.secret(), bundle.file.to_owned(), "trusted", Some(seen))),
                );
            }
        }
        let next_look = renewed.then(|| x509::show_time(plan(secrets, now).wake));
        Self { schema: "lvprov.io/certificates/v1", renewed, next_look, certificates: rows, now }
    }

    fn json(&self) -> String {
        // Nothing in it can fail to be JSON.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    fn text(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .certificates
            .iter()
            .map(|row| {
                let left = match row.expiry.map(|expiry| u64::try_from(expiry - self.now)) {
                    None => "of no use".to_owned(),
                    Some(Err(_)) => "expired".to_owned(),
                    Some(Ok(left)) => table::age(Duration::from_secs(left)),
                };
                let expires = row.expires.clone().unwrap_or_else(|| "-".to_owned());
                vec![row.secret.to_owned(), row.file.clone(), row.kind.to_owned(), expires, left]
            })
            .collect();
        let mut text = table::render(&["SECRET", "FILE", "KIND", "EXPIRES", "LEFT"], &rows);
        text.push_str(&match &self.next_look {
            Some(at) => format!("renewed by the controller, which looks again at {at}\n"),
            None => format!("renewed by nobody: there is no Secret {AUTHORITIES_SECRET}\n"),
        });
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificates::Certificates;
    use crate::certificates::state::tests::secrets_of;

    #[test]
    fn all_certificates_are_listed_and_no_key() {
        let now = x509::now();
        let made = Certificates::generate_at(Duration::from_secs(90 * 24 * 3600), now).unwrap();
        let mut secrets = secrets_of(&made);
        let listing = Listing::new(&secrets, now);
        let text = listing.text();
        assert_eq!(text.lines().count(), 1 + 3 + 3 + 4 + 1, "{text}");
        assert!(text.contains("lvprov-node-tls        tls.crt         certificate"), "{text}");
        assert!(text.contains("  90d\n") && text.contains("  360d\n"), "{text}");
        assert!(!listing.json().contains("PRIVATE"));
        secrets.authorities = None;
        secrets.leaves[0] = None;
        let text = Listing::new(&secrets, now + 100 * 24 * 3600).text();
        assert!(text.contains("renewed by nobody") && text.contains("of no use") && text.contains("expired"), "{text}");
    }
}
