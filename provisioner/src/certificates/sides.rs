//! The three sides, each with an authority of its own, and who trusts it.

use crate::names::{
    CONTROLLER_CLIENT_NAME, CONTROLLER_TLS_SECRET, METRICS_TLS_SECRET, NODE_SERVER_NAME, NODE_TLS_SECRET,
};
use crate::tls::{CA, METRICS_CA};

/// Who has a certificate, signed by an authority that signs no other's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// The controller and the admin's commands. They call nodes.
    Controller,
    /// All nodes. They are called.
    Node,
    /// Who reads the nodes' metrics.
    Metrics,
}

/// A file of a Secret that says whom its holder trusts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bundle {
    /// Who trusts.
    pub holder: Side,
    /// The file.
    pub file: &'static str,
    /// Whose authorities.
    pub of: Side,
}

/// Who trusts whom.
pub const BUNDLES: [Bundle; 4] = [
    Bundle { holder: Side::Node, file: CA, of: Side::Controller },
    Bundle { holder: Side::Node, file: METRICS_CA, of: Side::Metrics },
    Bundle { holder: Side::Controller, file: CA, of: Side::Node },
    Bundle { holder: Side::Metrics, file: CA, of: Side::Node },
];

impl Side {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Controller, Self::Node, Self::Metrics];

    /// The Secret with its certificate.
    pub const fn secret(self) -> &'static str {
        match self {
            Self::Controller => CONTROLLER_TLS_SECRET,
            Self::Node => NODE_TLS_SECRET,
            Self::Metrics => METRICS_TLS_SECRET,
        }
    }

    /// In names of files and of keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Node => "node",
            Self::Metrics => "metrics",
        }
    }

    /// The name in its authority.
    pub fn authority_name(self) -> &'static str {
        match self {
            Self::Controller => "lvprov controller CA",
            Self::Node => "lvprov node CA",
            Self::Metrics => "lvprov metrics CA",
        }
    }

    /// The name in its certificate. Who reads metrics is not asked for one.
    pub fn leaf_name(self) -> &'static str {
        match self {
            Self::Controller => CONTROLLER_CLIENT_NAME,
            Self::Node => NODE_SERVER_NAME,
            Self::Metrics => "metrics.lvprov.io",
        }
    }

    /// Whether lvprov works without its Secret.
    pub fn is_optional(self) -> bool {
        self == Self::Metrics
    }
}
