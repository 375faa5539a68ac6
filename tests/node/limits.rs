//! What the node's configuration allows, and gives where a pod does not say.

use crate::configured;
use anyhow::{Result, ensure};
use lvprov_tests::Test;
use lvprov_tests::driver::Call;
use xtask::testbed::Node;

pub const TESTS: [Test<Node>; 6] = [
    ("limits::defaults_count_where_the_pod_does_not_say", defaults),
    ("limits::a_volume_past_the_bound_is_told_the_bound", largest),
    ("limits::a_namespace_past_its_bound_is_told_what_is_left", per_namespace),
    ("limits::a_retention_past_the_bound_is_told_the_bound", retention),
    ("limits::a_broken_configuration_mounts_nothing_and_unmounts_all", broken),
    ("limits::calls_are_in_the_log_as_its_level_says", log),
];

fn defaults(node: &Node) -> Result<()> {
    let call = Call::log("limits", "web-0", "limits-1", "defaults").without("size").without("quota");
    call.mount(node)?.failure(&["option size is missing"])?;
    configured(node, r#""logVolumes":{"defaultSize":"512Mi","defaultQuota":"8Mi"}"#, || {
        call.mount(node)?.success()?;
        let fill = format!("of={}/fill", call.directory());
        ensure!(!node.exec(["dd", "if=/dev/zero", &fill, "bs=1M", "count=12"])?.success(), "12 MiB fit into 8");
        call.unmount(node)?.success()
    })?;
    let size = node.sh("lvs --noheadings --units m --nosuffix -o lv_size @lvprov.io/log=limits/defaults")?;
    ensure!(size.trim() == "512.00", "{size}");
    Ok(())
}

fn largest(node: &Node) -> Result<()> {
    let call = Call::log("limits", "web-0", "limits-2", "largest");
    configured(node, r#""logVolumes":{"maxSize":"1Gi"}"#, || {
        call.clone().with("size", "2Gi").mount(node)?.failure(&["1 GiB", "maxSize", "2 GiB was asked for"])?;
        ensure!(node.sh("lvs --noheadings -o lv_name @lvprov.io/log=limits/largest")?.trim().is_empty());
        call.mount(node)?.success()?;
        call.unmount(node)?.success()?;
        // Nor does one grow past it.
        call.clone().with("size", "2Gi").mount(node)?.failure(&["maxSize"])
    })?;
    // A bound that comes later does not take away what is there.
    configured(node, r#""logVolumes":{"maxSize":"400Mi"}"#, || {
        call.mount(node)?.success()?;
        call.unmount(node)?.success()
    })
}

fn per_namespace(node: &Node) -> Result<()> {
    let call = |volume: &str| Call::log("limited", "web-0", &format!("limits-3-{volume}"), volume);
    configured(node, r#""logVolumes":{"maxPerNamespace":"2560Mi"}"#, || {
        for volume in ["one", "two"] {
            call(volume).mount(node)?.success()?;
            call(volume).unmount(node)?.success()?;
        }
        call("three").mount(node)?.failure(&[
            "namespace limited",
            "512 MiB are left",
            "1 GiB more",
            "maxPerNamespace",
        ])?;
        ensure!(node.sh("lvs --noheadings -o lv_name @lvprov.io/log=limited/three")?.trim().is_empty());
        call("one").with("size", "2Gi").mount(node)?.failure(&["512 MiB are left"])?;
        call("one").with("size", "1536Mi").mount(node)?.success()?;
        call("one").unmount(node)?.success()?;
        // Another namespace has its own.
        let other = Call::log("limited-too", "web-0", "limits-3-other", "one");
        other.mount(node)?.success()?;
        other.unmount(node)?.success()
    })?;
    // At once, too: only as many are made as the bound has room for.
    configured(node, r#""logVolumes":{"maxPerNamespace":"2Gi"}"#, || {
        let calls: Vec<Call> =
            (0..5).map(|i| Call::log("crowded", "web-0", &format!("limits-3c-{i}"), &format!("v{i}"))).collect();
        let made = std::thread::scope(|scope| {
            let all: Vec<_> = calls.iter().map(|call| scope.spawn(|| call.mount(node))).collect();
            all.into_iter().filter_map(|one| one.join().ok()).collect::<Result<Vec<_>>>()
        })?;
        let made = made.iter().filter(|answer| answer.status == "Success").count();
        ensure!(made == 2, "{made} volumes of 1 GiB in 2 GiB");
        calls.iter().try_for_each(|call| call.unmount(node)?.success())
    })
}

fn retention(node: &Node) -> Result<()> {
    configured(node, r#""logVolumes":{"maxRetention":"24h","defaultRetention":"1h"}"#, || {
        let call = Call::log("limits", "web-0", "limits-4", "retention");
        call.clone().with("retention", "7d").mount(node)?.failure(&["1d", "maxRetention", "7d was asked for"])?;
        call.mount(node)?.success()?;
        let path = "/var/log/lvprov/limits/retention/web-0";
        let read = format!("import os; print(os.getxattr('{path}', 'trusted.lvprov.record').decode())");
        let record = node.run(["python3", "-c", &read])?;
        ensure!(record.contains(r#""retention":3600"#), "{record}");
        call.unmount(node)?.success()
    })
}

fn broken(node: &Node) -> Result<()> {
    let call = Call::log("limits", "web-0", "limits-5", "broken");
    call.mount(node)?.success()?;
    configured(node, r#""volumegroup":"vg0""#, || {
        let other = Call::log("limits", "web-1", "limits-5b", "broken");
        other.mount(node)?.failure(&["node.json", "volumegroup"])?;
        call.unmount(node)?.success()
    })?;
    ensure!(!call.is_mounted(node)?);
    Ok(())
}

fn log(node: &Node) -> Result<()> {
    const LOG: &str = "/run/lvprov-driver.log";
    let call = Call::log("limits", "web-0", "limits-6", "logged");
    let lines = |level: &str| -> Result<String> {
        node.sh(&format!("rm -f {LOG}"))?;
        configured(node, &format!(r#""logFile":"{LOG}","logLevel":"{level}""#), || {
            call.mount(node)?.success()?;
            call.mount(node)?.success()?;
            call.clone().with("quota", "9Gi").mount(node)?.failure(&["quota"])?;
            call.unmount(node)?.success()
        })?;
        node.sh(&format!("cat {LOG} 2>/dev/null || true"))
    };
    let info = lines("info")?;
    ensure!(info.lines().count() == 3, "{info}");
    ensure!(info.contains("mount of volume logs for pod limits/web-0: done in"), "{info}");
    ensure!(info.contains("for pod limits/web-0 failed after") && info.contains("quota"), "{info}");
    ensure!(info.contains("unmount of volume logs for pod limits-6: done"), "{info}");
    ensure!(lines("error")?.lines().count() == 1);
    ensure!(lines("debug")?.lines().count() == 4);
    ensure!(lines("off")?.is_empty());
    Ok(())
}
