//! What LVM, the kernel and users write, and what could be in its place: read
//! or refused, and never a panic. `cargo xtask fuzz` does it for long.

#![allow(clippy::unwrap_used)]

mod fuzzing;

use fuzzing::{fuzz, mutated};
use lvm::command::Runner;
use lvm::config::NodeConfig;
use lvm::filesystem::{self, MountOptions};
use lvm::identity::Owner;
use lvm::names::{ClaimUid, LogVolumeName, LvName, Namespace, PodName, PodUid, VgName, dm_name, split_dm_name};
use lvm::size::{human, parse_quantity};
use lvm::{mounts, report};
use proptest::collection::vec;
use proptest::prelude::*;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const MOUNTINFO: &[u8] = b"\
21 0 0:20 / / rw,relatime shared:1 - overlay overlay rw,lowerdir=/,upperdir=/mnt/u\n\
64 21 253:3 / /var/log/lvprov/shop/web-logs rw,nosuid,nodev,noexec shared:31 - xfs /dev/mapper/vg0-log rw,prjquota\n\
78 21 8:1 / /mnt/with\\040space\\134x rw master:1 propagate_from:2 - ext4 /dev/sda1 rw\n";

/// A field of mountinfo, as the kernel writes it.
fn escaped(path: &[u8]) -> Vec<u8> {
    let escape = |byte: &u8| match byte {
        b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
        byte => vec![*byte],
    };
    path.iter().flat_map(escape).collect()
}

#[test]
fn mountinfo() {
    let text = prop_oneof![mutated(&[MOUNTINFO]), vec(any::<u8>(), 0..300)];
    let path = vec(any::<u8>().prop_filter("no NUL", |byte| *byte != 0), 0..40);
    fuzz("mountinfo", (text, any::<(u16, u16)>(), path.clone(), path), |(text, (major, minor), root, target)| {
        let lines = text.split(|byte| *byte == b'\n').count();
        prop_assert!(mounts::parse(&text).len() <= lines);
        // What the kernel would write is read back, whatever stands around it.
        let (root, target) = ([b"/", root.as_slice()].concat(), [b"/", target.as_slice()].concat());
        let mut line = format!("1 2 {major}:{minor} ").into_bytes();
        line.extend(
            [escaped(&root), b" ".to_vec(), escaped(&target), b" rw shared:1 - xfs /dev/x rw\n".to_vec()].concat(),
        );
        let read = mounts::parse(&line);
        prop_assert_eq!(read.len(), 1);
        prop_assert_eq!(read[0].device, (u32::from(major), u32::from(minor)));
        prop_assert_eq!(read[0].root.as_os_str().as_bytes(), root.as_slice());
        prop_assert_eq!(read[0].target.as_os_str().as_bytes(), target.as_slice());
        Ok(())
    });
}

#[test]
fn reports() {
    let samples: [&[u8]; 4] = [
        include_bytes!("../captures/lvs.json"),
        include_bytes!("../captures/lvs-empty.json"),
        include_bytes!("../captures/lvs-missing-group.json"),
        include_bytes!("../captures/vgs.json"),
    ];
    fuzz("reports", prop_oneof![9 => mutated(&samples), 1 => vec(any::<u8>(), 0..300)], |text| {
        let _ = report::volume_groups(&text);
        for volume in report::volumes(&text).unwrap_or_default() {
            // Only what carries all of our tags is ever listed.
            prop_assert!(String::from_utf8_lossy(&text).contains("lvprov.io/kind="), "{:?}", volume);
        }
        Ok(())
    });
}

#[test]
fn tags() {
    let samples: [&[u8]; 2] = [
        b"lvprov.io/kind=data,lvprov.io/cluster=11111111-2222-4333-8444-555555555555,\
          lvprov.io/claim-uid=0f0e7f0a-1111-4222-8333-444455556666,lvprov.io/claim=shop/data-web-0",
        b"lvprov.io/kind=log,lvprov.io/log=shop/web-logs",
    ];
    fuzz("tags", mutated(&samples), |text| {
        let text = String::from_utf8_lossy(&text).into_owned();
        if let Some(owner) = Owner::from_tags(text.split(',')) {
            let tags = owner.to_tags();
            prop_assert_eq!(Owner::from_tags(tags.iter().map(String::as_str)), Some(owner));
        }
        Ok(())
    });
}

#[test]
fn superblocks() {
    let mut xfs = vec![0; 2048];
    xfs[..4].copy_from_slice(b"XFSB");
    let mut ext4 = vec![0; 2048];
    ext4[1080..1082].copy_from_slice(&[0x53, 0xef]);
    let device = std::cell::RefCell::new(tempfile::NamedTempFile::new().unwrap());
    let runner = Runner::default();
    let uuid = "0f0e7f0a-1111-8222-8333-444455556666".parse().unwrap();
    let head = prop_oneof![mutated(&[&xfs, &ext4, b"lvprov new vol 1"]), vec(any::<u8>(), 0..3000)];
    fuzz("superblocks", head, |head| {
        let mut device = device.borrow_mut();
        device.as_file().set_len(0)?;
        device.seek(SeekFrom::Start(0))?;
        device.write_all(&head)?;
        let found = filesystem::superblock(&runner, device.path())?;
        prop_assert!(found.is_none() || head.len() >= 2048);
        prop_assert!(!filesystem::is_new(&runner, device.path(), uuid).unwrap_or(false), "nobody has marked it");
        Ok(())
    });
}

#[test]
fn names() {
    let text = prop_oneof!["[a-z0-9A-Z+_.-]{0,140}", "\\PC{0,80}", "[a-z./-]{0,20}"];
    fuzz("names", (text.clone(), text), |(one, two)| {
        let is_safe =
            |name: &str| !name.is_empty() && !name.contains(['/', ' ', '\n', '\0']) && !name.starts_with(['-', '.']);
        let _ = split_dm_name(&one);
        for accepted in [
            VgName::parse(&one).ok().map(|name| name.to_string()),
            LvName::parse(&one).ok().map(|name| name.to_string()),
            Namespace::parse(&one).ok().map(|name| name.to_string()),
            PodName::parse(&one).ok().map(|name| name.to_string()),
            ClaimUid::parse(&one).ok().map(|name| name.to_string()),
            LogVolumeName::parse(&one).ok().map(|name| name.to_string()),
        ]
        .into_iter()
        .flatten()
        {
            prop_assert!(is_safe(&accepted) && accepted == one, "{accepted:?}");
        }
        if let Ok(uid) = PodUid::parse(&one) {
            prop_assert_eq!(Path::new(uid.as_str()).components().count(), 1);
        }
        if let (Ok(vg), Ok(lv)) = (VgName::parse(&one), LvName::parse(&two))
            && !vg.as_str().ends_with('-')
        {
            prop_assert_eq!(split_dm_name(&dm_name(&vg, &lv)), Some((vg, lv)));
        }
        Ok(())
    });
}

#[test]
fn quantities() {
    let text = prop_oneof![
        "[0-9.]{0,40}([kKMGTPE]i?|[eE][+-]?[0-9]{1,6}|[num])?",
        "[+-]?\\PC{0,20}",
        any::<u64>().prop_map(|n| n.to_string())
    ];
    fuzz("quantities", text, |text| {
        if let Ok(bytes) = parse_quantity(&text) {
            prop_assert!(!human(bytes).is_empty());
            prop_assert!(!text.parse::<u64>().is_ok_and(|number| number != bytes), "{text} is {bytes}");
            prop_assert_eq!(parse_quantity(&bytes.to_string()), Ok(bytes));
        } else {
            prop_assert!(text.parse::<u64>().is_err(), "{text} was refused");
        }
        Ok(())
    });
}

#[test]
fn settings() {
    let sample =
        br#"{"volumeGroup":"fast","moreVolumeGroups":["slow","vg-2"],"logRoot":"/srv/logs","commandLog":"/run/x",
        "nodeName":"n1","deadline":"90s","repair":"safe","logLevel":"debug","logFile":"/run/y","logVolumes":{
        "defaultSize":"1Gi","defaultQuota":"100Mi","defaultRetention":"7d","maxSize":"2Gi","maxPerNamespace":"3Gi"}}"#;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("node.json");
    fuzz("settings", (mutated(&[sample]), "\\PC{0,40}"), |(text, options)| {
        let _ = MountOptions::parse(&options);
        std::fs::write(&file, &text)?;
        match NodeConfig::load_from(&file) {
            Ok(config) => prop_assert!(config.log_root.is_absolute(), "{config:?}"),
            Err(error) => prop_assert!(error.to_string().contains("node.json"), "{error}"),
        }
        Ok(())
    });
}
