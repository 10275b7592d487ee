//! Row by row: what a server answers to bad bytes.

use attnd_wire::{AttendRequest, Deadline, Error, Reason, normalise};
use bytes::Bytes;
use http::{HeaderMap, Request};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::{Code, Response, Streaming};

use super::frames::{HEADERS, RST_STREAM, SETTINGS, frame, read_frame, request_headers};
use super::*;

/// Reads a call to its end and refuses it; answers a status with its remaining seconds.
struct Reader;

#[tonic::async_trait]
impl Attention for Reader {
    type AttendStream = Answers;

    async fn attend(
        &self,
        request: tonic::Request<Streaming<proto::AttendRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let mut frames = request.into_inner();
        while let Some(frame) = frames.message().await.map_err(normalise)? {
            AttendRequest::decode(frame, None)?;
        }
        Err(Error::new(Reason::StreamTruncated, "0 chunks").into())
    }

    async fn status(
        &self,
        request: tonic::Request<proto::StatusRequest>,
    ) -> Result<Response<proto::StatusReply>, Status> {
        let deadline = request.extensions().get::<Deadline>().expect("the layer sets it");
        let left = deadline.remaining(std::time::Instant::now())?;
        Ok(Response::new(proto::StatusReply { uptime_seconds: left.as_secs_f64(), ..Default::default() }))
    }
}

/// Sends `body` as one request with extra headers; returns the HTTP status and the headers that hold the gRPC status.
async fn send(path: &str, extra: &[(&str, &str)], body: &[u8]) -> (http::StatusCode, HeaderMap) {
    let exchange = async {
        let address = serve(Reader).await;
        let stream = TcpStream::connect(address).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let mut request = Request::post(format!("http://{address}{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in extra {
            request = request.header(*name, *value);
        }
        let mut client = client.ready().await.unwrap();
        let (response, mut sender) = client.send_request(request.body(()).unwrap(), false).unwrap();
        // The server may have answered already.
        let _refused = sender.send_data(Bytes::copy_from_slice(body), true);
        let (head, mut body) = response.await.unwrap().into_parts();
        while let Some(data) = body.data().await {
            let data = data.unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
        }
        let trailers = body.trailers().await.unwrap_or_default();
        (head.status, trailers.unwrap_or(head.headers))
    };
    tokio::time::timeout(PATIENCE, exchange).await.unwrap()
}

/// The code and the text that a bad request gets, after a check that the reason travels with it.
async fn refusal(path: &str, extra: &[(&str, &str)], body: &[u8]) -> (Code, String) {
    let (_, headers) = send(path, extra, body).await;
    let status = Status::from_header_map(&headers).expect("a gRPC status");
    let error = Error::from_status(&status);
    assert_eq!(headers["attnd-reason"], error.reason.name());
    assert_eq!(headers["attnd-outcome"], error.outcome.name());
    assert_eq!((status.code(), status.message()), (error.reason.code(), error.message().as_str()));
    (status.code(), status.message().to_owned())
}

#[tokio::test]
async fn row_1_unknown_methods_and_services() {
    for path in ["/attnd.v1.Attention/Nope", "/nope.v1.Nope/Nope", "/"] {
        let (code, text) = refusal(path, &[], &[]).await;
        assert_eq!(
            (code, text.as_str()),
            (Code::Unimplemented, "METHOD: no such service or method"),
            "{path}"
        );
    }
}

#[tokio::test]
async fn row_2_other_protocols_are_hung_up_on() {
    let address = serve(Reader).await;
    for greeting in [&b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..], &[0x16; 64]] {
        let hang_up = async {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(greeting).await.unwrap();
            let mut rest = Vec::new();
            // Closed or reset, either will do.
            let _end = stream.read_to_end(&mut rest).await;
        };
        tokio::time::timeout(PATIENCE, hang_up).await.expect("the server closes the connection");
    }
}

#[tokio::test]
async fn row_3_invalid_compression_flags() {
    let (code, text) = refusal(ATTEND, &[], &message(2, 0, &[])).await;
    assert_eq!(code, Code::Internal);
    assert!(text.starts_with("PROTOCOL: ") && text.contains("invalid compression flag: 2"), "{text}");
}

#[tokio::test]
async fn row_4_compressed_without_an_encoding() {
    let (code, text) = refusal(ATTEND, &[], &message(1, 0, &[])).await;
    assert_eq!(code, Code::Internal);
    assert!(
        text.starts_with("PROTOCOL: ") && text.contains("compressed-flag but no grpc-encoding"),
        "{text}"
    );
}

#[tokio::test]
async fn row_5_encodings_that_are_not_accepted() {
    for path in [ATTEND, STATUS] {
        let (code, text) = refusal(path, &[("grpc-encoding", "gzip")], &message(1, 0, &[])).await;
        assert_eq!((code, text.as_str()), (Code::Unimplemented, "ENCODING: 'gzip' not accepted"));
    }
}

#[tokio::test]
async fn row_7_messages_over_the_limit() {
    for path in [ATTEND, STATUS] {
        let (code, text) = refusal(path, &[], &message(0, u32::MAX, &[])).await;
        assert_eq!(
            (code, text.as_str()),
            (Code::ResourceExhausted, "MESSAGE_TOO_LARGE: 4294967295 > 8388608")
        );
    }
}

#[tokio::test]
async fn row_8_messages_that_end_early() {
    for path in [ATTEND, STATUS] {
        let (code, text) = refusal(path, &[], &message(0, 1 << 20, &[0; 10])).await;
        assert_eq!((code, text.as_str()), (Code::Internal, "PROTOCOL: Unexpected EOF decoding stream."));
    }
}

#[tokio::test]
async fn row_9_payloads_that_are_no_protobuf() {
    // A Begin whose shape claims to be longer than the message; group tags deeper than the limit.
    let cases: [(&str, &[u8]); 5] = [
        (ATTEND, &[0x0a, 0x02, 0x0a, 0x7f]),
        (ATTEND, &[0xff; 16]),
        (ATTEND, &[0x1b; 200]),
        (STATUS, &[0xff; 16]),
        (STATUS, &[0x0b; 200]),
    ];
    for (path, payload) in cases {
        let (code, text) = refusal(path, &[], &message(0, payload.len() as u32, payload)).await;
        assert_eq!(code, Code::Internal, "{text}");
        assert!(text.starts_with("DECODE: failed to decode Protobuf message: "), "{text}");
    }
}

#[tokio::test]
async fn row_11_headers_over_the_limit() {
    let (http, headers) = send(ATTEND, &[("x", &"y".repeat(20 << 10))], &[]).await;
    assert_eq!(http, http::StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    assert!(!headers.contains_key("grpc-status"));
}

#[tokio::test]
async fn row_12_too_many_streams() {
    let address = serve(Reader).await;
    let refused = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        // The limit holds from the moment its acknowledgement arrives.
        loop {
            let (kind, flags, ..) = read_frame(&mut stream).await;
            if kind == SETTINGS && flags == 0 {
                break;
            }
        }
        stream.write_all(&frame(SETTINGS, 1, 0, &[])).await.unwrap();
        for call in 0..=limits::MAX_STREAMS {
            stream.write_all(&frame(HEADERS, 4, call * 2 + 1, &request_headers())).await.unwrap();
        }
        loop {
            if let (RST_STREAM, _, id, payload) = read_frame(&mut stream).await {
                break (id, payload);
            }
        }
    };
    let (id, payload) = tokio::time::timeout(PATIENCE, refused).await.expect("a stream is refused");
    assert_eq!(id, limits::MAX_STREAMS * 2 + 1);
    assert_eq!(payload, [0, 0, 0, 7], "REFUSED_STREAM");
}

#[tokio::test]
async fn row_13_unary_calls_without_a_message() {
    let (code, text) = refusal(STATUS, &[], &[]).await;
    assert_eq!((code, text.as_str()), (Code::Internal, "PROTOCOL: Missing request message."));
}

#[tokio::test]
async fn row_14_malformed_timeouts() {
    for timeout in ["10X", "-1S", "123456789S"] {
        let (code, text) = refusal(STATUS, &[("grpc-timeout", timeout)], &message(0, 0, &[])).await;
        assert_eq!((code, text), (Code::InvalidArgument, format!("DEADLINE_FORMAT: '{timeout}'")));
    }
}

#[tokio::test]
async fn row_15_timeouts_of_zero() {
    let (code, text) = refusal(STATUS, &[("grpc-timeout", "0m")], &message(0, 0, &[])).await;
    assert_eq!((code, text.as_str()), (Code::DeadlineExceeded, "DEADLINE: expired on arrival"));
}

#[tokio::test]
async fn good_requests_pass() {
    let (http, headers) = send(STATUS, &[("grpc-timeout", "5S")], &message(0, 0, &[])).await;
    assert_eq!((http, headers["grpc-status"].as_bytes()), (http::StatusCode::OK, &b"0"[..]));
}

#[tokio::test]
async fn errors_of_handlers_arrive_as_they_are() {
    let (code, text) = refusal(ATTEND, &[], &[]).await;
    assert_eq!((code, text.as_str()), (Code::Aborted, "STREAM_TRUNCATED: 0 chunks"));
    // An empty message is a frame without a part.
    let (code, text) = refusal(ATTEND, &[], &message(0, 0, &[])).await;
    assert_eq!((code, text.as_str()), (Code::InvalidArgument, "STREAM_ORDER: empty frame"));
}
