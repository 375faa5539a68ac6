//! The client of the API server.

use std::time::Duration;

use kube::client::ClientBuilder;
use kube::{Client, Config};
use tower::timeout::TimeoutLayer;

/// For an answer to begin. A server that has lost its power answers nothing, and
/// its connection would seem alive for a quarter of an hour.
const ANSWER: Duration = Duration::from_secs(60);
/// For more of it. Watches last 290 s, and bring bookmarks meanwhile.
const SILENCE: Duration = Duration::from_secs(320);

/// A client for wherever this runs: no request of it lasts for ever.
///
/// # Errors
/// When nothing says where the API server is, or that cannot be used.
pub async fn client() -> Result<Client, kube::Error> {
    limited(Config::infer().await.map_err(kube::Error::InferConfig)?, ANSWER)
}

fn limited(mut config: Config, answer: Duration) -> Result<Client, kube::Error> {
    config.read_timeout = Some(SILENCE);
    // A request on a connection that was idle has all of the time.
    config.reset_reader_on_write = true;
    Ok(ClientBuilder::try_from(config)?.with_layer(&TimeoutLayer::new(answer)).build())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Node;
    use kube::Api;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_server_that_takes_a_request_and_answers_nothing_is_given_up() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", server.local_addr().unwrap());
        let client = limited(Config::new(address.parse().unwrap()), Duration::from_millis(200)).unwrap();
        let api: Api<Node> = Api::all(client);
        let asked = tokio::spawn(async move { api.get("n1").await });
        let _connection = server.accept().await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(60), asked).await.expect("given up").unwrap();
        assert!(matches!(answer, Err(kube::Error::Service(_))), "{answer:?}");
    }
}
