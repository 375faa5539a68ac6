//! What a pod may say of its log volume, and the index that tells shippers.

use anyhow::{Context, Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::Call;
use serde_json::Value;
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 9] = [
    ("log_options::a_template_names_the_directory", template),
    ("log_options::a_directory_is_never_two_pods", two_owners),
    ("log_options::owner_and_mode_are_as_asked", owner_and_mode),
    ("log_options::exec_is_only_where_it_is_asked_for", exec),
    ("log_options::inodes_are_limited_as_asked", inodes),
    ("log_options::ext4_has_quotas_too", ext4),
    ("log_options::a_static_pod_is_a_pod", static_pod),
    ("log_options::the_index_tells_who_had_a_directory_and_when", index),
    ("log_options::a_lost_index_is_made_anew", lost_index),
];

fn namespace(pod: &str, uid: &str, volume: &str) -> Call {
    Call::log("options", pod, uid, volume)
}

fn template(node: &Node) -> Result<()> {
    let call = namespace("web-0", "options-1", "named").with("subPath", "{namespace}_{pod}_{uid}.{node}");
    call.mount(node)?.success()?;
    node.sh(&format!("echo line > {}/app.log", call.directory()))?;
    let host = node.run(["hostname"])?;
    let path = format!("/var/log/lvprov/options/named/options_web-0_options-1.{host}/app.log");
    ensure!(node.read_file(&path)? == "line");
    call.unmount(node)?.success()?;
    // The UID in the name: a pod made again has a directory of its own.
    let again = namespace("web-0", "options-1b", "named").with("subPath", "{pod}-{uid}");
    again.mount(node)?.success()?;
    ensure!(node.run(["ls", "-A", &again.directory()])?.is_empty());
    again.unmount(node)?.success()?;
    for bad in ["logs", "../{pod}", "a/{pod}", "{pod", ".{pod}"] {
        namespace("web-0", "options-1c", "named").with("subPath", bad).mount(node)?.failure(&["not valid"]).or_else(
            |_| namespace("web-0", "options-1c", "named").with("subPath", bad).mount(node)?.failure(&["subPath"]),
        )?;
    }
    ensure!(node.run(["ls", "/var/log/lvprov/options/named"])?.lines().count() == 2);
    Ok(())
}

/// Pod `a` with the template `{pod}-x` and pod `a-x` would meet.
fn two_owners(node: &Node) -> Result<()> {
    let first = namespace("a", "options-2", "meet").with("subPath", "{pod}-x");
    first.mount(node)?.success()?;
    let second = namespace("a-x", "options-2b", "meet");
    second.mount(node)?.failure(&["belongs to pod a;", "subPath"])?;
    ensure!(!second.is_mounted(node)?);
    first.unmount(node)?.success()?;
    // Its logs are not the other's to read either.
    second.mount(node)?.failure(&["belongs to pod a;"])
}

fn owner_and_mode(node: &Node) -> Result<()> {
    let stat = |call: &Call| node.run(["stat", "-c", "%u:%g %a", &call.directory()]);
    let call = namespace("web-0", "options-3", "owned").with("owner", "1000:2000").with("mode", "2750");
    call.mount(node)?.success()?;
    ensure!(stat(&call)? == "1000:2000 2750", "{}", stat(&call)?);
    call.unmount(node)?.success()?;
    // What is not said is left as it is; what is said counts from the next mount on.
    let bare = call.without("owner").without("mode");
    bare.mount(node)?.success()?;
    ensure!(stat(&bare)? == "1000:2000 2750", "{}", stat(&bare)?);
    bare.unmount(node)?.success()?;
    let other = bare.with("owner", "1001");
    other.mount(node)?.success()?;
    ensure!(stat(&other)? == "1001:2000 2750", "{}", stat(&other)?);
    other.unmount(node)?.success()?;
    let new = namespace("web-1", "options-3b", "owned");
    new.mount(node)?.success()?;
    ensure!(stat(&new)? == "0:0 777", "{}", stat(&new)?);
    new.unmount(node)?.success()
}

fn exec(node: &Node) -> Result<()> {
    let runs = |call: &Call| -> Result<bool> {
        node.sh(&format!("cp /bin/true {}/program", call.directory()))?;
        Ok(node.exec(["sh", "-c", &format!("{}/program", call.directory())])?.success())
    };
    let options = |call: &Call| node.run(["findmnt", "-n", "-o", "VFS-OPTIONS", &call.directory()]);
    let call = namespace("web-0", "options-4", "exec");
    call.mount(node)?.success()?;
    ensure!(!runs(&call)?, "a program on a log volume runs");
    call.unmount(node)?.success()?;
    let with = call.with("mountOptions", "exec,noatime");
    with.mount(node)?.success()?;
    ensure!(runs(&with)?, "exec was asked for: {}", options(&with)?);
    let shown = options(&with)?;
    for flag in ["nodev", "nosuid", "noatime"] {
        ensure!(shown.split(',').any(|o| o == flag), "{flag} is not in {shown}");
    }
    with.unmount(node)?.success()?;
    for bad in ["dev", "suid", "rw,remount", "bind"] {
        let refused = with.clone().with("mountOptions", bad);
        refused.mount(node)?.failure(&["mount option", "not served"])?;
    }
    Ok(())
}

fn inodes(node: &Node) -> Result<()> {
    let call = namespace("web-0", "options-5", "inodes").with("inodes", "20");
    call.mount(node)?.success()?;
    let script = format!("cd {} && for i in $(seq 40); do : > f$i || exit 0; done 2>/dev/null", call.directory());
    node.exec(["sh", "-c", &script])?;
    let files: u32 = node.sh(&format!("ls {} | wc -l", call.directory()))?.trim().parse()?;
    // The directory itself is one of them.
    ensure!(files == 19, "{files} files");
    call.unmount(node)?.success()
}

fn ext4(node: &Node) -> Result<()> {
    let call = namespace("web-0", "options-6", "ext4").fs("ext4").with("quota", "8Mi").with("inodes", "20");
    call.mount(node)?.success()?;
    ensure!(node.run(["findmnt", "-n", "-o", "FSTYPE", &call.directory()])? == "ext4");
    // As a container's root, which has not CAP_SYS_RESOURCE: that would pass over ext4's quotas.
    let dd = |count: &str| {
        let fill = format!("of={}/fill", call.directory());
        node.exec(["setpriv", "--bounding-set", "-sys_resource", "dd", "if=/dev/zero", &fill, "bs=1M", count])
    };
    ensure!(!dd("count=12")?.success(), "12 MiB fit into 8");
    node.run(["rm", &format!("{}/fill", call.directory())])?;
    let done = dd("count=6")?;
    ensure!(done.success(), "{}", done.stderr);
    call.unmount(node)?.success()?;
    // What is there counts: the volume is not made again as another.
    call.fs("xfs").mount(node)?.success()?;
    node.run(["umount", "/var/lib/kubelet/pods/options-6/volumes/lvprov.io~lvm/logs"])?;
    Ok(())
}

fn static_pod(node: &Node) -> Result<()> {
    let call = namespace("etcd-n1", "2c03bdd00561704f5934b4088a3cd664", "static");
    call.mount(node)?.success()?;
    node.sh(&format!("echo line > {}/etcd.log", call.directory()))?;
    call.unmount(node)?.success()?;
    ensure!(node.read_file("/var/log/lvprov/options/static/etcd-n1/etcd.log")? == "line");
    Ok(())
}

fn read_index(node: &Node, volume: &str) -> Result<Value> {
    let text = node.read_file(&format!("/var/log/lvprov/options/{volume}.json"))?;
    serde_json::from_str(&text).with_context(|| format!("the index is {text}"))
}

fn index(node: &Node) -> Result<()> {
    let first = namespace("web-0", "options-8", "indexed");
    first.mount(node)?.success()?;
    let of = |index: &Value| index["directories"]["web-0"].clone();
    let entry = of(&read_index(node, "indexed")?);
    ensure!(entry["path"] == "/var/log/lvprov/options/indexed/web-0", "{entry}");
    ensure!(entry["uses"][0]["uid"] == "options-8" && entry["uses"][0]["until"].is_null(), "{entry}");
    // The pod made again is there before the old one has gone.
    let second = namespace("web-0", "options-8b", "indexed");
    second.mount(node)?.success()?;
    node.sh("mkdir -p /var/lib/kubelet/pods/options-8/containers/app")?;
    first.unmount(node)?.success()?;
    let entry = of(&read_index(node, "indexed")?);
    ensure!(entry["uses"][0]["containers"][0] == "app" && entry["uses"][0]["until"].is_string(), "{entry}");
    ensure!(entry["uses"][1]["uid"] == "options-8b" && entry["uses"][1]["until"].is_null(), "{entry}");
    ensure!(entry["keepUntil"].is_null(), "{entry}");
    second.unmount(node)?.success()?;
    let index = read_index(node, "indexed")?;
    ensure!(of(&index)["keepUntil"].is_string() && index["namespace"] == "options", "{index}");
    Ok(())
}

fn lost_index(node: &Node) -> Result<()> {
    let (a, b) = (namespace("web-a", "options-9", "lost"), namespace("web-b", "options-9b", "lost"));
    a.mount(node)?.success()?;
    a.unmount(node)?.success()?;
    node.sh("echo '{' > /var/log/lvprov/options/lost.json")?;
    b.mount(node)?.success()?;
    let index = read_index(node, "lost")?;
    let gone = &index["directories"]["web-a"];
    ensure!(gone["uses"][0]["uid"] == "options-9" && gone["uses"][0]["until"].is_string(), "{index}");
    ensure!(gone["keepUntil"].is_string(), "{index}");
    ensure!(index["directories"]["web-b"]["uses"][0]["uid"] == "options-9b", "{index}");
    b.unmount(node)?.success()
}
