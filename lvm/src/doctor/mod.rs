//! What will hurt on this node, before it does: full metadata areas and thin
//! pools, settings of LVM that get in the way, mounts and devices in a state
//! that no call of ours gets out of, tools that are missing.
//!
//! A finding is something that was seen, never a guess: each names the object,
//! says what is wrong and what to do. LVM is asked twice, once for all that its
//! groups hold and once for its settings; all else is read from the kernel and
//! from files, and costs no process ([`Lvm::diagnose_host`]).

mod devices;
mod groups;
mod host;
mod mounted;
mod settings;

use crate::Lvm;
use crate::clock::now;
use crate::command::Kind;
use crate::config::NodeConfig;
use crate::names::VgName;
use crate::report::{self, VolumeGroup};
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know; nothing is wrong.
    Note,
    /// It works, and will not for long, or not for everything.
    Warning,
    /// Something does not work now.
    Error,
}

impl Severity {
    /// All of them, the least first.
    pub const ALL: [Self; 3] = [Self::Note, Self::Warning, Self::Error];

    /// As it is printed.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// Which kind of thing; never changes its meaning.
    pub id: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// Of what: a group, a volume, a file, a setting.
    pub object: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}

impl Finding {
    fn new(
        severity: Severity,
        id: &'static str,
        object: impl fmt::Display,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { id, severity, object: object.to_string(), problem: problem.into(), remedy: remedy.into() }
    }

    fn error(
        id: &'static str,
        object: impl fmt::Display,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::new(Severity::Error, id, object, problem, remedy)
    }

    fn warning(
        id: &'static str,
        object: impl fmt::Display,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::new(Severity::Warning, id, object, problem, remedy)
    }

    fn note(
        id: &'static str,
        object: impl fmt::Display,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::new(Severity::Note, id, object, problem, remedy)
    }
}

/// What is looked at.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The volume groups that are served; all, where there is none.
    pub groups: Vec<VgName>,
    /// kubelet's root directory.
    pub kubelet_root: PathBuf,
}

impl Scope {
    fn serves(&self, vg: &VgName) -> bool {
        self.groups.is_empty() || self.groups.contains(vg)
    }
}

impl Lvm {
    /// Everything that is found, the worst first. Two lvm commands; a third
    /// and fourth only where a group that should be here is not.
    pub fn diagnose(&self, scope: &Scope) -> Vec<Finding> {
        let mut found = self.diagnose_host(scope);
        mounted::look_elsewhere(scope, &mut found);
        if let Err(error) = NodeConfig::load() {
            found.push(Finding::error(
                "node-config",
                crate::config::CONFIG_PATH,
                error.to_string(),
                "put it right: until then no volume is mounted on this node",
            ));
        }
        let settings = self.settings(&mut found);
        self.look_at_groups(scope, &settings, &mut found);
        sort(&mut found);
        found
    }

    /// What can be seen without a process, and without a look at all others:
    /// for whoever asks often.
    pub fn diagnose_host(&self, scope: &Scope) -> Vec<Finding> {
        let mut found = Vec::new();
        devices::look(scope, &mut found);
        mounted::look(scope, &self.config.log_root, &mut found);
        host::look(&mut found);
        sort(&mut found);
        found
    }

    /// What the report of a group shows of it, that is asked for anyway.
    pub fn diagnose_groups(groups: &[VolumeGroup]) -> Vec<Finding> {
        let of = |group: &VolumeGroup| {
            let full = groups::metadata(&group.name, group.metadata.free, group.metadata.size);
            full.into_iter().chain(groups::partial(&group.name, group.metadata.missing_disks, &[]))
        };
        groups.iter().flat_map(of).collect()
    }

    /// LVM's settings, with all defaults; empty where it does not say.
    fn settings(&self, found: &mut Vec<Finding>) -> settings::Settings {
        let args = ["lvmconfig", "--typeconfig", "full"];
        let done = self.runner.run(Kind::Report, "lvm", &args, None).and_then(|done| done.success());
        match done {
            Ok(done) => settings::Settings::parse(&String::from_utf8_lossy(&done.stdout)),
            Err(error) => {
                found.push(Finding::error(
                    "lvm-config",
                    "lvm.conf",
                    error.to_string(),
                    "put /etc/lvm/lvm.conf right: every lvm command fails until then",
                ));
                settings::Settings::default()
            }
        }
    }

    fn look_at_groups(&self, scope: &Scope, settings: &settings::Settings, found: &mut Vec<Finding>) {
        let mut args = vec!["fullreport"];
        args.extend(report::FORMAT.iter().take(report::FORMAT.len() - 1));
        args.extend(groups::FIELDS);
        let ran = self.runner.run(Kind::Report, "lvm", &args, None);
        let groups = ran.map_err(|error| error.to_string()).and_then(|ran| {
            // It ends with an error also where only one of several groups is partial.
            let stderr = String::from_utf8_lossy(&ran.stderr).into_owned();
            match groups::parse(&ran.stdout) {
                Ok(groups) => Ok((groups, stderr)),
                Err(error) => Err(ran.success().err().map_or_else(|| error.to_string(), |failed| failed.to_string())),
            }
        });
        let (groups, stderr) = match groups {
            Ok(groups) => groups,
            Err(error) => {
                found.push(Finding::error(
                    "lvm-report",
                    "lvm",
                    error,
                    "until LVM answers, nothing is made, grown or removed on this node; look at its disks",
                ));
                return;
            }
        };
        settings::look(settings, scope, &groups, found);
        for group in groups.iter().filter(|group| scope.serves(&group.name)) {
            groups::look(group, settings, now(), found);
        }
        groups::look_at_warnings(&stderr, found);
        host::look_at_tools(&groups, settings, found);
        host::look_at_clock(&groups, now(), found);
        self.look_for_hidden(scope, settings, &groups, found);
    }

    /// Groups that a node is told to serve, or to put logs on, and that LVM
    /// does not show: on its disks all the same?
    fn look_for_hidden(
        &self,
        scope: &Scope,
        settings: &settings::Settings,
        shown: &[groups::Group],
        found: &mut Vec<Finding>,
    ) {
        let wanted = scope.groups.iter().chain([&self.config.volume_group]).chain(&self.config.more_volume_groups);
        let mut missing: Vec<&VgName> = wanted.filter(|vg| shown.iter().all(|group| group.name != **vg)).collect();
        missing.sort();
        missing.dedup();
        if missing.is_empty() {
            return;
        }
        let all = |lift: &str| -> Vec<VolumeGroup> {
            let config = format!("report/time_format=\"%s\" {lift}");
            let mut args = vec!["vgs"];
            args.extend(
                report::FORMAT.iter().map(|arg| if arg.starts_with("report/") { config.as_str() } else { *arg }),
            );
            args.push(report::VG_FIELDS);
            let ran = self.runner.run(Kind::Report, "lvm", &args, None);
            ran.ok().and_then(|ran| report::volume_groups(&ran.stdout).ok()).unwrap_or_default()
        };
        let has = |groups: &[VolumeGroup], vg: &VgName| groups.iter().any(|group| group.name == *vg);
        let without_file =
            if settings.flag("devices/use_devicesfile") { all(settings::NO_DEVICES_FILE) } else { vec![] };
        let without_filter = if missing.iter().all(|vg| has(&without_file, vg)) {
            vec![]
        } else {
            all(&format!("{} {}", settings::NO_DEVICES_FILE, settings::NO_FILTER))
        };
        for vg in missing {
            if has(&without_file, vg) {
                found.push(Finding::error(
                    "group-hidden",
                    format!("volume group {vg}"),
                    "it is on this node's disks, but they are not in LVM's devices file, so LVM does not see it",
                    format!("`vgimportdevices {vg}`, or `lvmdevices --adddev` for each of its disks"),
                ));
            } else if has(&without_filter, vg) {
                found.push(Finding::error(
                    "group-hidden",
                    format!("volume group {vg}"),
                    "it is on this node's disks, but `filter` or `global_filter` in lvm.conf hides them",
                    "let the filter accept its disks; `lvmconfig devices/filter devices/global_filter` shows it",
                ));
            } else if scope.groups.contains(vg) {
                found.push(Finding::error(
                    "group-missing",
                    format!("volume group {vg}"),
                    "the node service is told to serve it, and it is on none of this node's disks",
                    format!(
                        "make it (`lvprov vg create {vg} /dev/…`), or take --volume-group={vg} from the node service"
                    ),
                ));
            }
        }
    }
}

/// The worst first; what belongs together stays together.
fn sort(found: &mut [Finding]) {
    found.sort_by(|a, b| (b.severity, a.id, &a.object).cmp(&(a.severity, b.id, &b.object)));
}
