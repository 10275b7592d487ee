//! What a client makes of servers and connections that break off.

use attnd_wire::{Error, Outcome, Reason};
use bytes::Bytes;
use http::Request;
use tokio::net::TcpStream;
use tonic::{Code, Response, Streaming};

use super::*;

/// Calls Attend on `address` as the client crate does; returns the first error of the call or its stream.
async fn call(address: SocketAddr, timeout: Option<Duration>) -> Error {
    let exchange = async {
        let endpoint = limits::endpoint(&format!("http://{address}"), Link::Cluster).unwrap();
        let mut request = tonic::Request::new(futures::stream::pending());
        if let Some(timeout) = timeout {
            request.set_timeout(timeout);
        }
        let mut client = limits::attention_client(endpoint.connect_lazy());
        let mut replies = match client.attend(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => return Error::from(status),
        };
        loop {
            match replies.message().await {
                Ok(Some(_reply)) => {}
                Ok(None) => panic!("the call ended well"),
                Err(status) => return Error::from(status),
            }
        }
    };
    tokio::time::timeout(PATIENCE, exchange).await.expect("an error")
}

/// A server that takes one request and answers it with `answer`.
async fn breaking(answer: impl FnOnce(h2::server::SendResponse<Bytes>) + Send + 'static) -> SocketAddr {
    let (listener, address) = listen().await;
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (_request, respond) = connection.accept().await.unwrap().unwrap();
        answer(respond);
        // Drives the connection until the client is gone.
        while let Some(Ok(_another)) = connection.accept().await {}
    });
    address
}

fn headers(status: u16) -> http::Response<()> {
    http::Response::builder().status(status).header("content-type", "application/grpc").body(()).unwrap()
}

#[tokio::test]
async fn nobody_listens() {
    let (listener, address) = listen().await;
    drop(listener);
    let error = call(address, None).await;
    assert_eq!(
        (error.message().as_str(), error.outcome),
        ("TRANSPORT: connect failed", Outcome::NotExecuted)
    );
    assert!(error.is_retryable());
}

#[tokio::test]
async fn refused_streams_were_not_executed() {
    let address = breaking(|mut respond| respond.send_reset(h2::Reason::REFUSED_STREAM)).await;
    let error = call(address, None).await;
    assert_eq!(
        (error.message().as_str(), error.outcome),
        ("TRANSPORT: stream refused", Outcome::NotExecuted)
    );
}

#[tokio::test]
async fn reset_streams_may_have_been_executed() {
    for reason in [
        h2::Reason::CANCEL,
        h2::Reason::NO_ERROR,
        h2::Reason::INTERNAL_ERROR,
        h2::Reason::PROTOCOL_ERROR,
        h2::Reason::ENHANCE_YOUR_CALM,
        h2::Reason::STREAM_CLOSED,
    ] {
        let before = breaking(move |mut respond| respond.send_reset(reason)).await;
        let amid = breaking(move |mut respond| {
            let mut body = respond.send_response(headers(200), false).unwrap();
            body.send_reset(reason);
        })
        .await;
        for (place, address) in [("before", before), ("amid", amid)] {
            let error = call(address, None).await;
            assert_eq!(
                (error.reason, error.outcome),
                (Reason::Transport, Outcome::Unknown),
                "{reason} {place}: {error}"
            );
        }
    }
}

#[tokio::test]
async fn a_stream_without_a_status_is_a_lost_connection() {
    let address = breaking(|mut respond| {
        respond.send_response(headers(200), true).unwrap();
    })
    .await;
    let error = call(address, None).await;
    let text = "TRANSPORT: stream ended without a status";
    assert_eq!((error.message().as_str(), error.outcome), (text, Outcome::Unknown));
}

#[tokio::test]
async fn proxies_answer_in_http() {
    for (http, text) in [
        (502, "TRANSPORT: HTTP status 502 without a gRPC status"),
        (418, "TRANSPORT: HTTP status 418 without a gRPC status"),
        (431, "METADATA_TOO_LARGE: request headers refused"),
    ] {
        let address = breaking(move |mut respond| {
            respond.send_response(headers(http), true).unwrap();
        })
        .await;
        assert_eq!(call(address, None).await.message(), text);
    }
}

#[tokio::test]
async fn a_connection_that_dies_before_the_answer_is_lost() {
    let (listener, address) = listen().await;
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_zero_linger().unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let _request = connection.accept().await.unwrap().unwrap();
    });
    let error = call(address, None).await;
    assert_eq!((error.message().as_str(), error.outcome), ("TRANSPORT: connection lost", Outcome::Unknown));
}

#[tokio::test]
async fn a_connection_that_dies_amid_the_answer_is_lost() {
    let (listener, address) = listen().await;
    let server = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_zero_linger().unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (_request, mut respond) = connection.accept().await.unwrap().unwrap();
        let _body = respond.send_response(headers(200), false).unwrap();
        let _until_aborted = connection.accept().await;
    });
    let exchange = async {
        let endpoint = limits::endpoint(&format!("http://{address}"), Link::Cluster).unwrap();
        let mut client = limits::attention_client(endpoint.connect_lazy());
        let mut replies = client.attend(futures::stream::pending()).await.unwrap().into_inner();
        server.abort();
        Error::from(replies.message().await.unwrap_err())
    };
    let error = tokio::time::timeout(PATIENCE, exchange).await.expect("an error");
    assert_eq!((error.message().as_str(), error.outcome), ("TRANSPORT: connection lost", Outcome::Unknown));
}

#[tokio::test]
async fn time_runs_out_at_the_client() {
    let address = breaking(std::mem::forget).await;
    let error = call(address, Some(Duration::from_millis(50))).await;
    assert_eq!((error.message().as_str(), error.outcome), ("DEADLINE: expired", Outcome::Unknown));
    assert_eq!(error.reason.code(), Code::DeadlineExceeded);
}

/// A server whose handler neither answers nor ends.
struct Silent;

#[tonic::async_trait]
impl Attention for Silent {
    type AttendStream = Answers;

    async fn attend(
        &self,
        _request: tonic::Request<Streaming<proto::AttendRequest>>,
    ) -> Result<Response<Answers>, Status> {
        futures::future::pending().await
    }

    async fn status(
        &self,
        _request: tonic::Request<proto::StatusRequest>,
    ) -> Result<Response<proto::StatusReply>, Status> {
        Ok(Response::new(proto::StatusReply { version: "x".repeat(9 << 20), ..Default::default() }))
    }
}

#[tokio::test]
async fn time_runs_out_at_the_server() {
    let address = serve(Silent).await;
    let exchange = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let request = Request::post(format!("http://{address}{ATTEND}"))
            .header("content-type", "application/grpc")
            .header("grpc-timeout", "50m")
            .body(())
            .unwrap();
        let mut client = client.ready().await.unwrap();
        let (response, _sender) = client.send_request(request, false).unwrap();
        response.await.unwrap().headers().clone()
    };
    let headers = tokio::time::timeout(PATIENCE, exchange).await.unwrap();
    // The library's timer is outside of every layer: its words reach the client, who translates them.
    let status = Status::from_header_map(&headers).unwrap();
    assert_eq!((status.code(), status.message()), (Code::Cancelled, "Timeout expired"));
    assert_eq!(Error::from_status(&status).message(), "DEADLINE: expired");
}

#[tokio::test]
async fn answers_over_the_limit() {
    let address = serve(Silent).await;
    let endpoint = limits::endpoint(&format!("http://{address}"), Link::Client).unwrap();
    let mut client = limits::attention_client(endpoint.connect().await.unwrap());
    let status =
        tokio::time::timeout(PATIENCE, client.status(proto::StatusRequest {})).await.unwrap().unwrap_err();
    let error = Error::from(status);
    assert_eq!(error.reason, Reason::MessageTooLarge);
    assert!(error.detail.ends_with(" > 8388608"), "{error}");
}

#[tokio::test]
async fn answers_that_are_no_protobuf() {
    let address = breaking(|mut respond| {
        let mut body = respond.send_response(headers(200), false).unwrap();
        body.send_data(message(0, 2, &[0xff; 2]).into(), false).unwrap();
    })
    .await;
    let error = call(address, None).await;
    assert_eq!(error.reason, Reason::Decode);
}

#[tokio::test]
async fn a_silent_peer_is_noticed_by_its_pings() {
    let (listener, address) = listen().await;
    let silent = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let request = connection.accept().await;
        // The connection stays open and nobody drives it.
        futures::future::pending::<()>().await;
        drop((connection, request));
    });
    let error = call(address, None).await;
    assert_eq!(
        (error.message().as_str(), error.outcome),
        ("TRANSPORT: no answer to pings", Outcome::Unknown)
    );
    silent.abort();
}
