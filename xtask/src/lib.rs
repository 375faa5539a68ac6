//! The test bed of lvprov.
