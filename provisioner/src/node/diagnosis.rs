//! What will hurt on this node: what the doctor of [`lvm`] finds, for whoever
//! asks over gRPC and for metrics.

use std::time::{SystemTime, UNIX_EPOCH};

use lvm::Lvm;
use lvm::doctor::{Finding, Scope, Severity};
use lvm::report::VolumeGroup;
use lvprov_proto::lvprov as wire;

use super::inventory::PodsDirectory;
use super::served::Served;

/// What is looked at.
pub fn scope(served: &Served, pods: &PodsDirectory) -> Scope {
    Scope { groups: served.named().to_vec(), kubelet_root: pods.kubelet_root().to_owned() }
}

/// As it is sent.
pub fn to_wire(findings: &[Finding]) -> wire::DiagnoseResponse {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    wire::DiagnoseResponse {
        findings: findings
            .iter()
            .map(|finding| wire::Finding {
                id: finding.id.to_owned(),
                severity: finding.severity.to_string(),
                object: finding.object.clone(),
                problem: finding.problem.clone(),
                remedy: finding.remedy.clone(),
            })
            .collect(),
        now_unix_millis: i64::try_from(now).unwrap_or(i64::MAX),
    }
}

/// How many findings there are of each severity, as far as that can be told
/// without a process: from the kernel, and from the latest report of the groups.
pub fn counts(lvm: &Lvm, scope: &Scope, groups: &[VolumeGroup]) -> [(Severity, u64); 3] {
    let mut found = lvm.diagnose_host(scope);
    found.extend(Lvm::diagnose_groups(groups));
    Severity::ALL.map(|severity| {
        let count = found.iter().filter(|finding| finding.severity == severity).count();
        (severity, u64::try_from(count).unwrap_or(u64::MAX))
    })
}
