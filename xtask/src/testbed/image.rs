//! Container images made of static binaries: one layer, as a docker archive.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::hex;

/// A file in an image.
#[derive(Debug, Clone)]
pub enum Entry {
    /// An executable: path in the image, file it is copied from.
    Program(String, PathBuf),
    /// A symbolic link: path in the image, what it points to.
    Link(String, String),
    /// A directory anybody may write to.
    Directory(String),
}

/// An image to be.
#[derive(Debug, Clone)]
pub struct Image {
    /// Name with tag.
    pub name: String,
    /// What is run.
    pub entrypoint: Vec<String>,
    /// What is in it.
    pub entries: Vec<Entry>,
}

impl Image {
    /// The image that lvprov is installed from: its binaries, from `tools`.
    pub fn lvprov(tools: &Path) -> Self {
        let program = |name: &str| Entry::Program(format!("/{name}"), tools.join(name));
        Self {
            name: "lvprov.io/lvprov:latest".into(),
            entrypoint: vec!["/lvprov".into()],
            entries: vec![program("lvprov"), program("lvprov-node"), program("lvprov-flexvolume")],
        }
    }

    /// An image for test pods, with a shell and the usual tools.
    ///
    /// # Errors
    /// When this machine's busybox cannot be run.
    pub fn busybox() -> Result<Self> {
        let listed = Command::new("/bin/busybox").arg("--list").output().context("cannot run /bin/busybox")?;
        let mut entries =
            vec![Entry::Program("/bin/busybox".into(), "/bin/busybox".into()), Entry::Directory("/tmp".into())];
        for applet in String::from_utf8_lossy(&listed.stdout).lines().filter(|applet| *applet != "busybox") {
            entries.push(Entry::Link(format!("/bin/{applet}"), "busybox".into()));
        }
        Ok(Self { name: "lvprov.io/busybox:latest".into(), entrypoint: Vec::new(), entries })
    }

    /// What keeps a pod's namespaces.
    pub fn pause() -> Self {
        Self {
            name: PAUSE.into(),
            entrypoint: vec!["/bin/busybox".into(), "sleep".into(), "2147483647".into()],
            entries: vec![Entry::Program("/bin/busybox".into(), "/bin/busybox".into())],
        }
    }
}

/// Name of the pause image.
pub const PAUSE: &str = "lvprov.io/pause:latest";

/// Writes images into one archive that `ctr images import` takes. Gives the ids
/// that a container runtime knows them by: the digests of their configurations.
///
/// # Errors
/// When a program is missing or the archive cannot be written.
pub fn write_archive(images: &[Image], archive: &Path) -> Result<Vec<String>> {
    let mut outer = Builder::new(File::create(archive)?);
    let mut manifest = Vec::new();
    let mut ids = Vec::new();
    for (index, image) in images.iter().enumerate() {
        let layer = layer(image, archive)?;
        let digest = hex(&Sha256::digest(&layer));
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = serde_json::to_vec(&json!({
            "architecture": architecture,
            "os": "linux",
            "config": {"Entrypoint": image.entrypoint, "Env": ["PATH=/bin:/"]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
            "history": [{"created_by": "xtask"}],
        }))?;
        let (config_name, layer_name) = (format!("{index}.json"), format!("{index}/layer.tar"));
        ids.push(format!("sha256:{}", hex(&Sha256::digest(&config))));
        append(&mut outer, &config_name, &config)?;
        append(&mut outer, &layer_name, &layer)?;
        manifest.push(json!({"Config": config_name, "RepoTags": [image.name], "Layers": [layer_name]}));
    }
    append(&mut outer, "manifest.json", &serde_json::to_vec(&manifest)?)?;
    outer.into_inner()?.flush()?;
    Ok(ids)
}

fn append(to: &mut Builder<File>, name: &str, content: &[u8]) -> io::Result<()> {
    let mut header = Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    to.append_data(&mut header, name, content)
}

fn layer(image: &Image, archive: &Path) -> Result<Vec<u8>> {
    let mut layer = Builder::new(Vec::new());
    for entry in &image.entries {
        let mut header = Header::new_ustar();
        header.set_mode(0o755);
        let inside = |path: &str| path.trim_start_matches('/').to_string();
        match entry {
            Entry::Program(path, from) => {
                let content = stripped(from, archive)?;
                header.set_size(content.len() as u64);
                layer.append_data(&mut header, inside(path), content.as_slice())?;
            }
            Entry::Link(path, target) => {
                header.set_entry_type(EntryType::Symlink);
                header.set_size(0);
                layer.append_link(&mut header, inside(path), target)?;
            }
            Entry::Directory(path) => {
                header.set_entry_type(EntryType::Directory);
                header.set_size(0);
                header.set_mode(0o1777);
                layer.append_data(&mut header, format!("{}/", inside(path)), io::empty())?;
            }
        }
    }
    Ok(layer.into_inner()?)
}

/// The program without its symbols, which in a debug build are most of it.
fn stripped(program: &Path, archive: &Path) -> Result<Vec<u8>> {
    let scratch = archive.with_extension("stripped");
    let done = Command::new("strip").arg("-o").arg(&scratch).arg(program).output();
    let content = match done {
        Ok(output) if output.status.success() => fs::read(&scratch)?,
        _ => fs::read(program).with_context(|| format!("{} is not there: build it first", program.display()))?,
    };
    let _ = fs::remove_file(scratch);
    if content.is_empty() {
        bail!("{} is empty", program.display());
    }
    Ok(content)
}
