//! The cluster's certificates, keys and tokens.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::json;

use crate::hex;

/// Who speaks to the API server: kubeconfig's name, user, group.
pub const ADMIN: Identity = Identity("admin", "admin", "system:masters");
/// The controller manager.
pub const CONTROLLER_MANAGER: Identity = Identity("controller-manager", "system:kube-controller-manager", "");
/// The scheduler.
pub const SCHEDULER: Identity = Identity("scheduler", "system:kube-scheduler", "");

/// lvprov's controller, outside of a pod.
pub const LVPROV: Identity = Identity("lvprov", "system:serviceaccount:lvprov-system:lvprov-controller", "");

/// Name of a kubeconfig, user and group behind it.
#[derive(Debug, Clone, Copy)]
pub struct Identity(pub &'static str, pub &'static str, pub &'static str);

/// The directory they are in.
#[derive(Debug, Clone)]
pub struct Pki {
    directory: PathBuf,
}

impl Pki {
    /// The one in this directory, made already.
    pub fn at(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Makes all of them.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn create(directory: PathBuf, addresses: &[Ipv4Addr], nodes: &[(String, Ipv4Addr)]) -> Result<Self> {
        fs::create_dir_all(&directory)?;
        let pki = Self { directory };

        let mut authority = parameters("lvprov test bed", None);
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = authority.self_signed(&key)?;
        fs::write(pki.file("ca.crt"), certificate.pem())?;
        let issuer = Issuer::new(authority, key);

        let mut server = parameters("kube-apiserver", None);
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        for name in ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"] {
            server.subject_alt_names.push(SanType::DnsName(name.try_into()?));
        }
        for address in addresses {
            server.subject_alt_names.push(SanType::IpAddress((*address).into()));
        }
        pki.issue("apiserver", server, &issuer)?;

        let mut client = parameters("kube-apiserver", Some("system:masters"));
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        pki.issue("kubelet-client", client, &issuer)?;

        let accounts = KeyPair::generate()?;
        fs::write(pki.file("service-accounts.key"), accounts.serialize_pem())?;
        fs::write(pki.file("service-accounts.pub"), accounts.public_key_pem())?;

        let mut tokens = String::new();
        for (node, address) in nodes {
            // kubelet would make its own, and not start again where a power cut spoils that.
            let mut server = parameters(node, None);
            server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            server.subject_alt_names.push(SanType::IpAddress((*address).into()));
            pki.issue(node, server, &issuer)?;
        }
        let nodes =
            nodes.iter().map(|(node, _)| (node.clone(), format!("system:node:{node}"), "system:nodes".to_string()));
        let fixed =
            [ADMIN, CONTROLLER_MANAGER, SCHEDULER, LVPROV].map(|Identity(a, b, c)| (a.into(), b.into(), c.into()));
        for (name, user, group) in fixed.into_iter().chain(nodes) {
            let token = token()?;
            tokens.push_str(&format!("{token},{user},{user},\"{group}\"\n"));
            fs::write(pki.kubeconfig(&name), kubeconfig(addresses[0], &pki.file("ca.crt"), &name, &token)?)?;
        }
        fs::write(pki.file("tokens.csv"), tokens)?;
        Ok(pki)
    }

    fn issue(&self, name: &str, parameters: CertificateParams, issuer: &Issuer<'_, KeyPair>) -> Result<()> {
        let key = KeyPair::generate()?;
        fs::write(self.file(&format!("{name}.crt")), parameters.signed_by(&key, issuer)?.pem())?;
        fs::write(self.file(&format!("{name}.key")), key.serialize_pem())?;
        Ok(())
    }

    /// A file of it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The kubeconfig of an identity, or of the node of that name.
    pub fn kubeconfig(&self, name: &str) -> PathBuf {
        self.file(&format!("{name}.kubeconfig"))
    }
}

fn parameters(name: &str, organization: Option<&str>) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    if let Some(organization) = organization {
        subject.push(DnType::OrganizationName, organization);
    }
    parameters.distinguished_name = subject;
    parameters
}

fn token() -> Result<String> {
    let mut bytes = [0; 16];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(hex(&bytes))
}

fn kubeconfig(server: Ipv4Addr, authority: &Path, name: &str, token: &str) -> Result<String> {
    // JSON is YAML.
    Ok(serde_json::to_string_pretty(&json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "testbed", "cluster": {
            "server": format!("https://{server}"),
            "certificate-authority": authority,
        }}],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": name}}],
        "current-context": "testbed",
    }))?)
}
