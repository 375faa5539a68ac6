//! Certificates, as the API server sees their renewal.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::ByteString;
use kube::Client;
use serde_json::{Value, json};

use super::super::events::Events;
use super::super::renewal::{Renewal, RenewalError};
use super::ApiServer;
use crate::certificates::Certificates;
use crate::certificates::cluster::NAMES;
use crate::certificates::state::Data;
use crate::x509;

const DAY: i64 = 24 * 3600;

/// The Secrets at the API server.
struct Bench {
    api: ApiServer,
    secrets: BTreeMap<&'static str, Data>,
    version: u64,
}

impl Bench {
    /// Secrets with a lifetime of 90 days that were made so long ago.
    fn new(age: i64) -> (Self, Renewal, Events) {
        crate::tls::install_crypto();
        let made = Certificates::generate_at(Duration::from_secs(90 * DAY as u64), x509::now() - age).unwrap();
        let data = |values: Vec<(String, String)>| values.into_iter().map(|(key, value)| (key, value.into())).collect();
        let secrets = made.secrets().into_iter().map(|(name, values)| (name, data(values))).collect();
        let (service, handle) = tower_test::mock::pair();
        let client = Client::new(service, "default");
        let renewal = Renewal::new(client.clone(), "storage");
        (Self { api: ApiServer { handle }, secrets, version: 1 }, renewal, Events::new(client, "test".into()))
    }

    fn path(name: &str) -> String {
        format!("/api/v1/namespaces/storage/secrets/{name}")
    }

    fn metadata(&self, name: &str) -> Value {
        json!({"name": name, "namespace": "storage", "uid": name, "resourceVersion": self.version.to_string()})
    }

    /// All four are read.
    async fn answer_reads(&mut self) {
        for name in NAMES {
            let asked = self.api.expect("GET", &Self::path(name)).await;
            let Some(data) = self.secrets.get(name) else {
                asked.refuse(404, "NotFound");
                continue;
            };
            let data: BTreeMap<_, _> =
                data.iter().map(|(key, value)| (key.clone(), ByteString(value.clone()))).collect();
            let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": self.metadata(name), "data": data});
            asked.answer(200, secret);
        }
    }

    /// The question what time it is, with a clock that is so much ahead.
    async fn answer_clock(&mut self, ahead: i64) {
        let asked = self.api.expect("PATCH", &Self::path(NAMES[0])).await;
        assert!(
            asked.query.contains("dryRun=All") && asked.query.contains("fieldManager=lvprov-clock"),
            "{}",
            asked.query
        );
        let mut metadata = self.metadata(NAMES[0]);
        metadata["managedFields"] = json!([
            {"manager": "kubectl", "operation": "Update", "time": "2001-01-01T00:00:00Z"},
            {"manager": "lvprov-clock", "operation": "Update", "time": x509::show_time(x509::now() + ahead)},
        ]);
        let answer = json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": metadata});
        asked.answer(200, answer);
    }

    /// One write, which is taken; what was written.
    async fn answer_write(&mut self, name: &'static str) -> BTreeMap<String, ByteString> {
        let asked = self.api.expect("PATCH", &Self::path(name)).await;
        assert!(!asked.query.contains("dryRun"), "{}", asked.query);
        assert_eq!(asked.body["metadata"], json!({"resourceVersion": self.version.to_string()}));
        let data: BTreeMap<String, ByteString> = serde_json::from_value(asked.body["data"].clone()).unwrap();
        self.secrets.get_mut(name).unwrap().extend(data.iter().map(|(key, value)| (key.clone(), value.0.clone())));
        self.version += 1;
        let answer =
            json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": self.metadata(name)});
        asked.answer(200, answer);
        data
    }
}

#[tokio::test]
async fn what_is_young_costs_four_reads_and_nothing_else() {
    let (mut bench, mut renewal, events) = Bench::new(DAY);
    let (wait, ()) = tokio::join!(renewal.renew(&events), bench.answer_reads());
    assert_eq!(wait.unwrap(), Duration::from_secs(DAY as u64));
    bench.api.expect_nothing_more().await;
}

#[tokio::test]
async fn without_authorities_nothing_is_written_however_old_the_rest_is() {
    let (mut bench, mut renewal, events) = Bench::new(1000 * DAY);
    bench.secrets.remove(NAMES[0]);
    for _ in 0..2 {
        let (wait, ()) = tokio::join!(renewal.renew(&events), bench.answer_reads());
        assert_eq!(wait.unwrap(), Duration::from_secs(DAY as u64));
    }
    bench.api.expect_nothing_more().await;
}

#[tokio::test]
async fn a_certificate_is_renewed_in_one_write_and_its_secret_is_told() {
    let (mut bench, mut renewal, events) = Bench::new(61 * DAY);
    let server = async {
        bench.answer_reads().await;
        bench.answer_clock(0).await;
        for name in &NAMES[1..] {
            let written = bench.answer_write(name).await;
            assert_eq!(written.keys().collect::<Vec<_>>(), ["tls.crt", "tls.key"]);
            let note = bench.api.expect_event("storage", "CertificateRenewed").await;
            assert!(note.contains("without a restart"), "{note}");
            bench.answer_reads().await;
        }
    };
    let (wait, ()) = tokio::join!(renewal.renew(&events), server);
    assert_eq!(wait.unwrap(), Duration::from_secs(DAY as u64));
    bench.api.expect_nothing_more().await;
}

#[tokio::test]
async fn what_somebody_else_has_changed_is_looked_at_again() {
    let (mut bench, mut renewal, events) = Bench::new(61 * DAY);
    let server = async {
        bench.answer_reads().await;
        bench.answer_clock(60).await;
        let asked = bench.api.expect("PATCH", &Bench::path(NAMES[1])).await;
        asked.refuse(409, "Conflict");
        // Another controller has done all of it.
        let (other, ..) = Bench::new(0);
        bench.secrets = other.secrets;
        bench.answer_reads().await;
    };
    let (wait, ()) = tokio::join!(renewal.renew(&events), server);
    wait.unwrap();
    bench.api.expect_nothing_more().await;
}

#[tokio::test]
async fn nothing_is_written_while_the_clocks_differ() {
    for ahead in [-2 * 3600, 30 * DAY] {
        let (mut bench, mut renewal, events) = Bench::new(61 * DAY);
        let server = async {
            bench.answer_reads().await;
            bench.answer_clock(ahead).await;
            bench.api.expect_event("storage", "CertificateNotRenewed").await
        };
        let (done, note) = tokio::join!(renewal.renew(&events), server);
        assert!(matches!(done, Err(RenewalError::Clock { .. })));
        assert!(note.contains("clocks of the controller and of the API server differ by"), "{note}");
        bench.api.expect_nothing_more().await;
    }
}

#[tokio::test]
async fn a_role_that_lacks_the_right_is_named() {
    let (mut bench, mut renewal, events) = Bench::new(DAY);
    let server = async { bench.api.expect("GET", &Bench::path(NAMES[0])).await.refuse(403, "Forbidden") };
    let (done, ()) = tokio::join!(renewal.renew(&events), server);
    let text = crate::with_causes(&done.unwrap_err());
    assert!(text.contains("deploy/manifests/10-rbac.yaml") && text.contains("Forbidden"), "{text}");
}

#[tokio::test]
async fn a_secret_that_is_gone_is_told_and_the_others_are_renewed() {
    let (mut bench, mut renewal, events) = Bench::new(61 * DAY);
    bench.secrets.remove(NAMES[2]);
    let server = async {
        bench.answer_reads().await;
        bench.answer_clock(0).await;
        for name in [NAMES[1], NAMES[3]] {
            bench.answer_write(name).await;
            bench.api.expect_event("storage", "CertificateRenewed").await;
            bench.answer_reads().await;
        }
        bench.api.expect_event("storage", "CertificateNotRenewed").await
    };
    let (done, note) = tokio::join!(renewal.renew(&events), server);
    done.unwrap();
    assert!(note.contains("kubectl create secret generic lvprov-node-tls"), "{note}");
}
