//! What the Secrets hold. All that the renewal knows stands in them.

use std::collections::BTreeMap;
use std::time::Duration;

use lvm::duration::parse_duration;

use super::issue::{CLOCK_SKEW, Lifetime, Pair, is_pair};
use super::sides::{BUNDLES, Bundle, Side};
use crate::names::AUTHORITIES_SECRET;
use crate::tls::{CERTIFICATE, KEY};
use crate::x509::{self, Validity};

/// Key of the lifetime of certificates.
pub const LIFETIME: &str = "lifetime";
/// Key of a time: what was made before it is to be renewed.
pub const RENEW: &str = "renew";

/// How long certificates live where nothing else is said.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
/// Shorter ones could not be renewed before kubelet has brought them.
pub const SHORTEST_LIFETIME: Duration = Duration::from_secs(60);

/// A certificate, in DER.
pub type Der = Vec<u8>;

/// The `data` of a Secret.
pub type Data = BTreeMap<String, Vec<u8>>;

/// Which of a side's two authorities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// The one that signs.
    Current,
    /// The one that will, once it has been trusted for long enough.
    Next,
}

/// Keys of an authority in its Secret.
pub struct Keys {
    /// Its certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
    /// From when on it may sign. Empty: some that have to trust it do not yet.
    pub signs: String,
}

impl Slot {
    /// Where this authority of a side stands.
    pub fn keys(self, side: Side) -> Keys {
        let infix = match self {
            Self::Current => "",
            Self::Next => "-next",
        };
        let key = |suffix: &str| format!("{}{infix}.{suffix}", side.name());
        Keys { certificate: key("crt"), key: key("key"), signs: key("signs") }
    }
}

/// Key of the authorities that sign no more, and are trusted until they end.
pub fn old_key(side: Side) -> String {
    format!("{}-old.crt", side.name())
}

/// A certificate that is of some use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The certificate.
    pub der: Der,
    /// When it is valid.
    pub validity: Validity,
}

impl Seen {
    fn new(der: Der) -> Option<Self> {
        Some(Self { validity: x509::validity(&der)?, der })
    }

    /// Whether it is valid now.
    pub fn is_valid(&self, now: i64) -> bool {
        (self.validity.not_before..=self.validity.not_after).contains(&now)
    }

    /// Whether nobody takes it for valid any more, whose clock is not too wrong.
    pub fn is_over(&self, now: i64) -> bool {
        self.validity.not_after + CLOCK_SKEW < now
    }

    /// When it was made.
    pub fn made(&self, lifetime: Lifetime) -> i64 {
        self.validity.not_before + lifetime.backdated()
    }
}

/// The Secrets. None: it is not there.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secrets {
    /// That of the authorities.
    pub authorities: Option<Data>,
    /// Those of the sides, in the order of [`Side::ALL`].
    pub leaves: [Option<Data>; 3],
}

impl Secrets {
    /// The Secret of that name.
    pub fn named_mut(&mut self, name: &str) -> Option<&mut Option<Data>> {
        if name == AUTHORITIES_SECRET {
            return Some(&mut self.authorities);
        }
        let at = Side::ALL.iter().position(|side| side.secret() == name)?;
        Some(&mut self.leaves[at])
    }

    /// The Secret of a side.
    pub fn of(&self, side: Side) -> Option<&Data> {
        self.leaves[side as usize].as_ref()
    }

    /// A value of the authorities' Secret. Empty as when it is not there.
    pub fn value(&self, key: &str) -> &[u8] {
        self.authorities.as_ref().and_then(|data| data.get(key)).map_or(&[], Vec::as_slice)
    }

    fn text(&self, key: &str) -> Option<&str> {
        std::str::from_utf8(self.value(key)).ok().map(str::trim).filter(|text| !text.is_empty())
    }

    fn time(&self, key: &str) -> Option<i64> {
        x509::parse_time(self.text(key)?)
    }

    /// How long certificates live. None: what is said is of no use.
    pub fn said_lifetime(&self) -> Option<Lifetime> {
        let said = parse_duration(self.text(LIFETIME)?).ok()?;
        (said >= SHORTEST_LIFETIME).then(|| Lifetime::new(said))
    }

    /// How long certificates live.
    pub fn lifetime(&self) -> Lifetime {
        self.said_lifetime().unwrap_or_else(|| Lifetime::new(DEFAULT_LIFETIME))
    }

    /// What was made before this time is to be renewed.
    pub fn renew(&self) -> Option<i64> {
        self.time(RENEW)
    }

    /// The certificate of an authority, whether it can sign or not.
    pub fn authority(&self, side: Side, slot: Slot) -> Option<Seen> {
        let all = x509::from_pem(self.value(&slot.keys(side).certificate))?;
        Seen::new(all.first()?.to_vec())
    }

    /// An authority with its key, if it can sign.
    pub fn signer(&self, side: Side, slot: Slot, now: i64) -> Option<(Seen, Pair)> {
        let keys = slot.keys(side);
        let seen = self.authority(side, slot).filter(|seen| seen.is_valid(now))?;
        let pair =
            Pair { certificate: self.text(&keys.certificate)?.to_owned(), key: self.text(&keys.key)?.to_owned() };
        is_pair(&seen.der, &pair.key).then_some((seen, pair))
    }

    /// From when on this authority may sign, since all that have to trust it
    /// have had it in their Secrets for long enough by then.
    pub fn signs_from(&self, side: Side, slot: Slot) -> Option<i64> {
        self.time(&slot.keys(side).signs)
    }

    /// Authorities that sign no more.
    pub fn old(&self, side: Side) -> Vec<Seen> {
        all_in(self.value(&old_key(side)))
    }

    /// The certificate of a side, where it has its key.
    pub fn leaf(&self, side: Side) -> Option<Seen> {
        let data = self.of(side)?;
        let seen = Seen::new(x509::from_pem(data.get(CERTIFICATE)?)?.first()?.to_vec())?;
        let key = std::str::from_utf8(data.get(KEY)?).ok()?;
        is_pair(&seen.der, key).then_some(seen)
    }

    /// Whom a holder trusts.
    pub fn trusted(&self, bundle: &Bundle) -> Vec<Seen> {
        self.of(bundle.holder).and_then(|data| data.get(bundle.file)).map_or(Vec::new(), |pem| all_in(pem))
    }

    /// Whether something in a file of authorities cannot be read.
    pub fn is_damaged(&self, bundle: &Bundle) -> bool {
        let content = self.of(bundle.holder).and_then(|data| data.get(bundle.file));
        content.is_none_or(|pem| x509::from_pem(pem).is_none_or(|all| all.len() != all_in(pem).len()))
    }

    /// Whether all that have to trust an authority have it in their Secrets.
    /// `missing`: what is said of a Secret that is not there.
    pub fn is_trusted(&self, side: Side, authority: &Seen, missing: bool) -> bool {
        BUNDLES.iter().filter(|bundle| bundle.of == side).all(|bundle| match self.of(bundle.holder) {
            Some(_) => self.trusted(bundle).contains(authority),
            None => missing || bundle.holder.is_optional(),
        })
    }
}

/// All certificates that can be read.
fn all_in(pem: &[u8]) -> Vec<Seen> {
    x509::readable(pem).filter_map(|der| Seen::new(der.to_vec())).collect()
}

#[cfg(test)]
/// Tests, and what those of others need.
pub mod tests {
    use super::*;
    use crate::certificates::Certificates;

    /// As `kubectl apply` leaves them.
    pub fn secrets_of(made: &Certificates) -> Secrets {
        let mut secrets = Secrets::default();
        for (name, values) in made.secrets() {
            let data = values.into_iter().map(|(key, value)| (key, value.into_bytes())).collect();
            *secrets.named_mut(name).unwrap() = Some(data);
        }
        secrets
    }

    #[test]
    fn a_lifetime_that_is_none_is_the_usual_one() {
        let with = |text: &str| Secrets {
            authorities: Some(Data::from([(LIFETIME.to_owned(), text.as_bytes().to_vec())])),
            ..Secrets::default()
        };
        assert_eq!(with("3m\n").said_lifetime(), Some(Lifetime::new(Duration::from_secs(180))));
        for bad in ["", "soon", "59s", "-1d"] {
            assert_eq!(with(bad).said_lifetime(), None, "{bad}");
            assert_eq!(with(bad).lifetime(), Lifetime::new(DEFAULT_LIFETIME));
        }
    }
}
