//! What stands in certificates. Times are in seconds since 1970.

pub use lvm::clock::now;

use pem::{EncodeConfig, LineEnding, Pem};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::parse_x509_certificate;

/// From when until when a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub not_before: i64,
    /// The last second.
    pub not_after: i64,
}

impl Validity {
    /// In seconds.
    pub fn length(self) -> i64 {
        self.not_after - self.not_before
    }

    /// Whether it should have been renewed: that is done when a third of the
    /// time is left.
    pub fn ends_soon(&self, now: i64) -> bool {
        now >= self.not_after - self.length() / 6
    }
}

/// All certificates of a PEM text, in its order. None: something in it is not
/// PEM, or there is none.
pub fn from_pem(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().ok()?;
    (!all.is_empty()).then_some(all)
}

/// The certificates of a PEM text that can be read, in its order.
pub fn readable(pem: &[u8]) -> impl Iterator<Item = CertificateDer<'static>> + '_ {
    CertificateDer::pem_slice_iter(pem).filter_map(Result::ok)
}

/// Certificates as a PEM text, one after the other.
pub fn to_pem(certificates: impl IntoIterator<Item = impl AsRef<[u8]>>) -> String {
    let pems = certificates.into_iter().map(|certificate| Pem::new("CERTIFICATE", certificate.as_ref()));
    pems.map(|pem| pem::encode_config(&pem, EncodeConfig::new().set_line_ending(LineEnding::LF))).collect()
}

/// None: it is no certificate.
pub fn validity(certificate: &[u8]) -> Option<Validity> {
    let (_, parsed) = parse_x509_certificate(certificate).ok()?;
    let validity = parsed.validity();
    Some(Validity { not_before: validity.not_before.timestamp(), not_after: validity.not_after.timestamp() })
}

/// Whether the key of `authority` has signed it.
pub fn is_signed_by(certificate: &[u8], authority: &[u8]) -> bool {
    let (Ok((_, certificate)), Ok((_, authority))) =
        (parse_x509_certificate(certificate), parse_x509_certificate(authority))
    else {
        return false;
    };
    certificate.verify_signature(Some(authority.public_key())).is_ok()
}

/// Whether it is of this key, whose DER form is that of a SubjectPublicKeyInfo.
pub fn has_key(certificate: &[u8], key: &[u8]) -> bool {
    parse_x509_certificate(certificate).is_ok_and(|(_, parsed)| parsed.public_key().raw == key)
}

/// A time as [`show_time`] gives it.
pub fn parse_time(text: &str) -> Option<i64> {
    Some(text.parse::<jiff::Timestamp>().ok()?.as_second())
}

/// A time for people.
pub fn show_time(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).map_or_else(|_| format!("{seconds} s"), |time| time.to_string())
}
