//! Makes authorities and the certificates that they sign.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use time::OffsetDateTime;

use super::sides::Side;
use crate::x509;

/// Clocks of a cluster may differ by so much, in seconds.
pub const CLOCK_SKEW: i64 = 3600;

/// An authority lives for so many lifetimes of the certificates that it signs.
pub const AUTHORITY_LIVES: i64 = 4;

/// A key or certificate that cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the certificate of {subject}")]
pub struct IssueError {
    /// Whose.
    pub subject: &'static str,
    /// What rcgen says.
    #[source]
    pub source: rcgen::Error,
}

/// A certificate and its key, in PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

// Not derived: the key must never reach a log.
impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// How long certificates live, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetime(i64);

impl Lifetime {
    /// Of a certificate that is no authority.
    pub fn new(leaf: Duration) -> Self {
        Self(i64::try_from(leaf.as_secs()).unwrap_or(i64::MAX / 16))
    }

    /// Of a certificate that is no authority.
    pub fn leaf(self) -> i64 {
        self.0
    }

    /// A certificate is renewed when so much of its time is left.
    pub fn renewed_at(self) -> i64 {
        self.0 / 3
    }

    /// Of an authority.
    pub fn authority(self) -> i64 {
        self.0 * AUTHORITY_LIVES
    }

    /// An authority gets a successor when so much of its time is left.
    pub fn succeeded_at(self) -> i64 {
        self.authority() / 2
    }

    /// An authority is trusted for so long before it signs. A node that has
    /// not read its Secret for so long loses nothing by it: the certificates
    /// of then are still valid, being renewed earlier than that.
    pub fn overlap(self) -> i64 {
        self.0 / 4
    }

    /// Certificates are valid so much earlier than they are made.
    pub fn backdated(self) -> i64 {
        CLOCK_SKEW.min(self.0 / 4)
    }
}

/// A new authority.
///
/// # Errors
/// When it cannot be made.
pub fn authority(side: Side, lifetime: Lifetime, now: i64) -> Result<Pair, IssueError> {
    let subject = side.authority_name();
    let error = |source| IssueError { subject, source };
    let valid = (now - lifetime.backdated(), now + lifetime.authority());
    let mut params = params(subject, Vec::new(), valid).map_err(error)?;
    // It signs leaves and no other authority.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(error)?;
    let certificate = params.self_signed(&key).map_err(error)?;
    Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// A new certificate of this side's authority. It ends with the authority at
/// the latest.
///
/// # Errors
/// When it cannot be made, or `authority` is none.
pub fn leaf(side: Side, authority: &Pair, lifetime: Lifetime, now: i64) -> Result<Pair, IssueError> {
    let subject = side.leaf_name();
    let error = |source| IssueError { subject, source };
    let signing = KeyPair::from_pem(&authority.key).map_err(error)?;
    let issuer = Issuer::from_ca_cert_pem(&authority.certificate, signing).map_err(error)?;
    let valid = (now - lifetime.backdated(), leaf_end(&authority.certificate, lifetime, now));
    let mut params = params(subject, vec![subject.to_owned()], valid).map_err(error)?;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![match side {
        Side::Node => ExtendedKeyUsagePurpose::ServerAuth,
        Side::Controller | Side::Metrics => ExtendedKeyUsagePurpose::ClientAuth,
    }];
    let key = KeyPair::generate().map_err(error)?;
    let certificate = params.signed_by(&key, &issuer).map_err(error)?;
    Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// Until when a certificate of this authority would be valid, made now.
pub fn leaf_end(authority: &str, lifetime: Lifetime, now: i64) -> i64 {
    let end = now + lifetime.leaf();
    let authority = x509::from_pem(authority.as_bytes()).and_then(|all| x509::validity(all.first()?));
    authority.map_or(end, |authority| end.min(authority.not_after))
}

/// Whether this is the key of this certificate.
pub fn is_pair(certificate: &[u8], key: &str) -> bool {
    use rcgen::PublicKeyData;
    KeyPair::from_pem(key).is_ok_and(|key| x509::has_key(certificate, &key.subject_public_key_info()))
}

fn params(common_name: &str, names: Vec<String>, valid: (i64, i64)) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    let time = |seconds| OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| rcgen::Error::Time);
    params.not_before = time(valid.0)?;
    params.not_after = time(valid.1)?;
    Ok(params)
}
