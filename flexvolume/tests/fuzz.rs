//! Whatever the driver is called with, it answers with one valid JSON object.
//! `cargo xtask fuzz` does it for long.

#![allow(clippy::unwrap_used)]

#[path = "../../lvm/tests/fuzzing/mod.rs"]
mod fuzzing;

use fuzzing::{fuzz, mutated};
use lvm::config::NodeConfig;
use lvm::options::Options;
use lvprov_flexvolume::{PodPath, answer};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::TestCaseResult;
use serde_json::{Map, Value, json};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path};
use std::process::{Command, Stdio};

/// The longest argument that exec(2) takes is 128 KiB.
const LONG: usize = 100_000;

fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..most)
}

/// Paths that are nearly those of a pod's volume; nothing is at any of them.
fn path() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        6 => select(vec!["pods", "volumes", "lvprov.io~lvm", "v", "a-uid"]).prop_map(|part| part.as_bytes().to_vec()),
        2 => select(vec!["", ".", "..", "*", " "]).prop_map(|part| part.as_bytes().to_vec()),
        1 => bytes(30),
    ];
    let near = vec(part, 0..9).prop_map(|parts| [b"/nowhere/", parts.join(&b'/').as_slice()].concat());
    let sample: &[u8] = b"/nowhere/kubelet/pods/2c03bdd00561704f5934b4088a3cd664/volumes/lvprov.io~lvm/v";
    prop_oneof![near, mutated(&[sample]), bytes(60)]
}

const KEYS: [&str; 19] = [
    "type",
    "volume",
    "size",
    "quota",
    "retention",
    "volumeGroup",
    "logicalVolume",
    "claimUID",
    "onePod",
    "mountOptions",
    "subPath",
    "inodes",
    "mode",
    "owner",
    "kubernetes.io/fsType",
    "kubernetes.io/readwrite",
    "kubernetes.io/pod.name",
    "kubernetes.io/pod.namespace",
    "kubernetes.io/pod.uid",
];
const VALUES: [&str; 26] = [
    "data",
    "log",
    "web-logs",
    "1Gi",
    "100Mi",
    "0",
    "-1",
    "1e999",
    "18446744073709551615",
    "7d",
    "0s",
    "99999999999999999999d",
    "vg0",
    "--help",
    "pvc-0f0e7f0a-1111-4222-8333-444455556666",
    "0f0e7f0a-1111-4222-8333-444455556666",
    "noatime,discard",
    "suid",
    "{namespace}/{pod}",
    "../..",
    "{",
    "0777",
    "xfs",
    "rw",
    "shop",
    "a-uid",
];

fn options() -> impl Strategy<Value = std::collections::BTreeMap<String, String>> {
    let key = prop_oneof![9 => select(KEYS.to_vec()).prop_map(str::to_owned), 1 => "\\PC{0,12}"];
    let value = prop_oneof![9 => select(VALUES.to_vec()).prop_map(str::to_owned), 1 => "\\PC{0,40}"];
    btree_map(key, value, 0..12)
}

/// With an option that nobody knows: no call with it gets as far as LVM.
fn json_options() -> impl Strategy<Value = Vec<u8>> {
    let valid = json!({
        "not-an-option": "x", "type": "log", "volume": "web-logs", "size": "1Gi", "quota": "100Mi",
        "kubernetes.io/fsType": "xfs", "kubernetes.io/pod.name": "web-a", "kubernetes.io/pod.namespace": "default",
        "kubernetes.io/pod.uid": "a-uid", "kubernetes.io/readwrite": "rw", "kubernetes.io/pvOrVolumeName": "v",
    });
    prop_oneof![
        options().prop_map(|mut options| {
            options.insert("not-an-option".to_owned(), "x".to_owned());
            serde_json::to_vec(&options).unwrap()
        }),
        mutated(&[valid.to_string().as_bytes(), b"{}", b"null", b"[[[[", b"{\"a\":{\"b\":1}}"]),
        (select(vec![b'[', b'"', b'{', b'x', b'9']), 0..LONG).prop_map(|(byte, count)| vec![byte; count]),
        (0..LONG).prop_map(|count| json!(["x".repeat(count)]).to_string().into_bytes()),
        (0..LONG).prop_map(|count| json!("x".repeat(count)).to_string().into_bytes()),
    ]
}

fn arguments() -> impl Strategy<Value = Vec<OsString>> {
    const VERBS: [&str; 12] = [
        "init",
        "mount",
        "unmount",
        "expandfs",
        "attach",
        "detach",
        "waitforattach",
        "isattached",
        "mountdevice",
        "unmountdevice",
        "getvolumename",
        "expandvolume",
    ];
    let verb = prop_oneof![9 => select(VERBS.to_vec()).prop_map(|verb| verb.as_bytes().to_vec()), 1 => bytes(50)];
    let number = any::<i128>().prop_map(|number| number.to_string().into_bytes());
    let argument = || prop_oneof![path(), json_options(), number.clone(), bytes(40)];
    let mount = (path(), json_options()).prop_map(|(path, json)| vec![b"mount".to_vec(), path, json]);
    let expand = (json_options(), path(), number.clone())
        .prop_map(|(json, path, number)| vec![b"expandfs".to_vec(), json, Vec::new(), path, number, b"0".to_vec()]);
    let any = (verb, vec(argument(), 0..6)).prop_map(|(verb, rest)| [vec![verb], rest].concat());
    prop_oneof![mount, expand, any, vec(argument(), 0..3)]
        .prop_map(|arguments| arguments.into_iter().map(OsString::from_vec).collect())
}

/// A mount namespace of this thread's own, and of what it starts, where it may
/// have one: whatever a call does, it does not do it to this machine.
fn keep_to_itself() {
    let none = None::<&str>;
    let private = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none));
    if private.is_ok() {
        for directory in ["/run", "/var/log"] {
            mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        }
    }
}

/// Kubelet's rules for what is on standard output.
fn check_answer(verb: Option<&OsString>, stdout: &[u8], success: bool) -> TestCaseResult {
    prop_assert_eq!(stdout.iter().filter(|byte| **byte == b'\n').count(), 1);
    let answer: Map<String, Value> =
        serde_json::from_slice(stdout).map_err(|error| TestCaseError::fail(error.to_string()))?;
    prop_assert!(answer.keys().all(|key| ["status", "message", "capabilities"].contains(&key.as_str())));
    let message = answer.get("message").map_or("", |message| message.as_str().unwrap());
    // It becomes part of an Event.
    prop_assert!(message.len() < 2000, "a message of {} bytes", message.len());
    let verb = verb.and_then(|verb| verb.to_str());
    match answer["status"].as_str() {
        Some("Success") => prop_assert!(success && matches!(verb, Some("init" | "unmount")), "{verb:?}"),
        Some("Failure") => prop_assert!(!success && !message.is_empty() && verb != Some("init")),
        Some("Not supported") => prop_assert!(!success),
        other => prop_assert!(false, "status {other:?}"),
    }
    prop_assert_eq!(answer.contains_key("capabilities"), verb == Some("init"));
    Ok(())
}

#[test]
fn paths() {
    fuzz("paths", path(), |bytes| {
        if let Ok(taken) = PodPath::parse(OsStr::from_bytes(&bytes)) {
            let parts: Vec<Component<'_>> = taken.path.components().collect();
            prop_assert!(parts.len() >= 6 && parts[0] == Component::RootDir);
            prop_assert!(parts[1..].iter().all(|part| matches!(part, Component::Normal(_))));
            prop_assert_eq!(parts[parts.len() - 4].as_os_str(), taken.uid.as_str());
            prop_assert_eq!(taken.path.file_name(), Path::new(OsStr::from_bytes(&bytes)).file_name());
            prop_assert_eq!(PodPath::parse(taken.path.as_os_str()).unwrap(), taken);
        }
        Ok(())
    });
}

#[test]
fn user_options() {
    let limits = NodeConfig::default().logs;
    fuzz("options", options(), |options| {
        match Options::parse(options.iter().map(|(key, value)| (key.as_str(), value.as_str())), &limits) {
            Ok(Options::Log(log)) => prop_assert!(log.quota > 0 && log.quota <= log.size, "{log:?}"),
            Ok(Options::Data { .. }) => prop_assert!(options.contains_key("claimUID")),
            Err(error) => prop_assert!(error.to_string().len() < 1000, "{error}"),
        }
        Ok(())
    });
}

#[test]
fn answers() {
    keep_to_itself();
    fuzz("answers", arguments(), |arguments| {
        let answer = answer(&arguments);
        check_answer(arguments.first(), &answer.to_json(), answer.is_success())
    });
}

#[test]
fn binary() {
    keep_to_itself();
    let directory = tempfile::tempdir().unwrap();
    let without_nul = |arguments: &Vec<OsString>| arguments.iter().all(|one| !one.as_bytes().contains(&0));
    fuzz("binary", arguments().prop_filter("exec takes no NUL", without_nul), |arguments| {
        let output = Command::new(env!("CARGO_BIN_EXE_lvprov-flexvolume"))
            .args(&arguments)
            .current_dir(directory.path())
            .env_clear()
            .env("RUST_BACKTRACE", "full")
            .stdin(Stdio::null())
            .output()?;
        prop_assert!(output.stderr.is_empty(), "it wrote to standard error");
        prop_assert!(std::fs::read_dir(directory.path())?.next().is_none(), "it left a file behind");
        check_answer(arguments.first(), &output.stdout, output.status.success())
    });
}
