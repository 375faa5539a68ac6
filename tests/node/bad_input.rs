//! What is refused: with words that help, and with nothing changed.

use crate::uid;
use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::{Call, call};
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 3] = [
    ("bad_input::options_that_make_no_sense", options),
    ("bad_input::arguments_that_make_no_sense", arguments),
    ("bad_input::a_link_in_place_of_a_pods_directory", planted_link),
];

/// All that a refused call could have changed.
fn state(node: &Node) -> Result<String> {
    node.sh("lvs --noheadings -o lv_full_name,lv_size vg0; grep -c . /proc/self/mountinfo; find /var/log/lvprov -maxdepth 2 2>/dev/null || true")
}

fn options(node: &Node) -> Result<()> {
    let log = || Call::log("bad", "web-a", "bad-1", "logs");
    let data = || Call::data("bad", "web-0", "bad-1", &uid(0x200));
    let cases: Vec<(Call, &[&str])> = vec![
        (log().without("type"), &["type", "data or log"]),
        (log().without("volume"), &["option volume is missing"]),
        (log().without("size"), &["option size is missing"]),
        (log().without("quota"), &["option quota is missing"]),
        (log().with("volume", "a/b"), &["log volume name", "a/b"]),
        (log().with("volume", ".."), &["log volume name"]),
        (log().with("volume", "../../etc"), &["log volume name"]),
        (log().with("volume", ""), &["log volume name"]),
        (log().with("size", "0"), &["size", "more than 0"]),
        (log().with("size", "-1Gi"), &["size", "out of range"]),
        (log().with("size", "much"), &["size", "quantity"]),
        (log().with("size", "100Mi").with("quota", "1Mi"), &["too small for xfs", "300 MiB"]),
        (log().with("size", "900Gi"), &["vg0", "900 GiB was asked for", "missing"]),
        (log().with("quota", "0"), &["quota", "more than 0"]),
        (log().with("quota", "2Gi"), &["quota", "size"]),
        (log().with("volumeGroup", "nosuch"), &["volume group nosuch is not open", "vg0"]),
        (log().with("volumeGroup", "--help"), &["volume group", "--help"]),
        (log().with("retention", "soon"), &["retention", "24h"]),
        (log().with("qouta", "1Gi"), &["qouta", "not known"]),
        (log().fs("ntfs"), &["ntfs", "xfs, ext4 or btrfs"]),
        (log().with("kubernetes.io/pod.uid", "somebody-else"), &["bad-1", "somebody-else"]),
        (log().without("kubernetes.io/pod.namespace"), &["pod.namespace", "missing"]),
        (log().with("kubernetes.io/pod.namespace", "../x"), &["namespace"]),
        (log().with("kubernetes.io/pod.name", "a/b"), &["pod name"]),
        (data().without("volumeGroup"), &["option volumeGroup is missing"]),
        (data().with("logicalVolume", "../../etc/passwd"), &["logical volume"]),
        (data().with("claimUID", "x"), &["claim UID"]),
        (data().with("mountOptions", "suid"), &["suid", "noatime"]),
    ];
    let before = state(node)?;
    for (call, words) in cases {
        let json = call.json();
        call.mount(node)?.failure(words).with_context(|| json.clone())?;
        ensure!(!call.is_mounted(node)?, "mounted: {json}");
    }
    let after = state(node)?;
    ensure!(before == after, "before:\n{before}\nafter:\n{after}");
    Ok(())
}

fn arguments(node: &Node) -> Result<()> {
    let log = Call::log("bad", "web-a", "bad-2", "logs");
    let (directory, json) = (log.directory(), log.json());
    let before = state(node)?;
    for args in [
        &[][..],
        &["mount"],
        &["mount", &directory],
        &["mount", &directory, &json, "more"],
        &["mount", &directory, "{"],
        &["mount", &directory, "[]"],
        &["mount", &directory, r#"{"a":1}"#],
        &["mount", "/etc", &json],
        &["mount", "/var/lib/kubelet/pods/bad-2/volumes/lvprov.io~lvm/../../../..", &json],
        &["mount", "relative", &json],
        &["unmount"],
        &["unmount", "/"],
        &["unmount", "/var"],
        &["unmount", &directory, "more"],
        &["expandfs", &json, "", &directory, "1073741824", "0"],
        &["expandfs", &json, "", &directory, "-1", "0"],
        &["expandfs", "{}", "", &directory, "1", "0"],
    ] {
        call(node, args)?.failure(&[]).with_context(|| format!("{args:?}"))?;
    }
    let after = state(node)?;
    ensure!(before == after, "before:\n{before}\nafter:\n{after}");
    Ok(())
}

fn planted_link(node: &Node) -> Result<()> {
    let first = Call::log("bad", "web-a", "bad-3", "links");
    first.mount(node)?.success()?;
    node.run(["ln", "-s", "/etc", "/var/log/lvprov/bad/links/web-b"])?;
    let second = Call::log("bad", "web-b", "bad-3b", "links");
    second.mount(node)?.failure(&["cannot open"])?;
    ensure!(!second.is_mounted(node)?);
    node.run(["rm", "/var/log/lvprov/bad/links/web-b"])?;
    second.mount(node)?.success()?;
    second.unmount(node)?.success()?;
    first.unmount(node)?.success()
}
