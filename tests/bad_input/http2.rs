//! Requests as raw bytes: gRPC messages with lies in them, and HTTP/2 frames that no client library sends.

use std::net::SocketAddr;

use attnd_wire::Status;
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

pub(crate) const ATTEND: &str = "/attnd.v1.Attention/Attend";
pub(crate) const STATUS: &str = "/attnd.v1.Attention/Status";
pub(crate) const JOIN: &str = "/attnd.v1.Cluster/Join";
pub(crate) const COMPUTE: &str = "/attnd.v1.Worker/Compute";

/// One request: path, extra headers, and a body, after which the stream ends or stays open.
#[derive(Clone, Debug)]
pub(crate) struct RawRequest {
    path: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    ends: bool,
}

impl RawRequest {
    pub(crate) fn new(path: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self { path, headers: Vec::new(), body: body.into(), ends: true }
    }

    pub(crate) fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Leaves the stream open.
    pub(crate) fn left_open(mut self) -> Self {
        self.ends = false;
        self
    }

    /// Sends it on a connection of its own; returns the HTTP status and the headers with the gRPC status.
    ///
    /// # Errors
    /// What HTTP/2 says where the connection or the stream is broken off.
    pub(crate) async fn send(self, to: SocketAddr) -> Result<(StatusCode, HeaderMap), h2::Error> {
        let stream = TcpStream::connect(to).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        let connection = tokio::spawn(connection);
        let mut request = Request::post(format!("http://{to}{}", self.path))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in self.headers {
            request = request.header(name, value);
        }
        let mut client = client.ready().await.unwrap();
        let (response, mut sender) = client.send_request(request.body(()).unwrap(), false).unwrap();
        // The server may have refused already.
        let _early_answer = sender.send_data(self.body.into(), self.ends);
        let answer = read(response).await;
        connection.abort();
        answer
    }

    /// Sends it; returns the gRPC status, which must be there.
    pub(crate) async fn status(self, to: SocketAddr) -> Status {
        let (http, headers) = self.send(to).await.unwrap();
        assert_eq!(http, StatusCode::OK);
        Status::from_header_map(&headers).expect("an answer with a gRPC status")
    }
}

/// Reads an answer to its end: the HTTP status and the headers or trailers with the gRPC status.
async fn read(
    response: impl Future<Output = Result<http::Response<h2::RecvStream>, h2::Error>>,
) -> Result<(StatusCode, HeaderMap), h2::Error> {
    let (head, mut body) = response.await?.into_parts();
    while let Some(data) = body.data().await {
        let data: Bytes = data?;
        body.flow_control().release_capacity(data.len())?;
    }
    Ok((head.status, body.trailers().await?.unwrap_or(head.headers)))
}

/// A request whose stream stays open.
pub(crate) struct OpenRequest {
    connection: tokio::task::JoinHandle<Result<(), h2::Error>>,
    client: h2::client::SendRequest<Bytes>,
    body: h2::SendStream<Bytes>,
    response: h2::client::ResponseFuture,
}

impl OpenRequest {
    pub(crate) async fn send(to: SocketAddr, path: &str, body: &[u8]) -> Self {
        let stream = TcpStream::connect(to).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        let connection = tokio::spawn(connection);
        let request = Request::post(format!("http://{to}{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        let mut client = client.ready().await.unwrap();
        let (response, mut sender) = client.send_request(request.body(()).unwrap(), false).unwrap();
        sender.send_data(Bytes::copy_from_slice(body), false).unwrap();
        Self { connection, client, body: sender, response }
    }

    /// Waits for `begun`, which must come before any answer.
    pub(crate) async fn wait_for(&mut self, begun: impl Future<Output = ()>) {
        tokio::select! {
            () = begun => {}
            answer = read(&mut self.response) => panic!("answered too early: {answer:?}"),
        }
    }

    /// Resets the stream and then closes the connection in order.
    pub(crate) async fn reset(mut self) {
        self.body.send_reset(h2::Reason::CANCEL);
        drop((self.body, self.client, self.response));
        // With no handle left, the connection says goodbye and ends.
        self.connection.await.unwrap().unwrap();
    }

    /// Closes the connection without a word.
    pub(crate) fn hang_up(self) {
        self.connection.abort();
    }
}

/// A gRPC message with any flag and any claimed length.
pub(crate) fn framed(flag: u8, length: u32, payload: &[u8]) -> Vec<u8> {
    [&[flag][..], &length.to_be_bytes(), payload].concat()
}

/// A gRPC message as it should be.
pub(crate) fn honest(payload: &[u8]) -> Vec<u8> {
    framed(0, u32::try_from(payload.len()).unwrap(), payload)
}

// === HTTP/2 by hand ===

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Header fields of a gRPC request, literal and without indexing.
pub(crate) fn request_fields(path: &str) -> Vec<u8> {
    [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "x"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]
    .into_iter()
    .flat_map(|(name, value)| literal_field(name, value))
    .collect()
}

/// One header field of less than 127 bytes per part.
pub(crate) fn literal_field(name: &str, value: &str) -> Vec<u8> {
    let part = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    assert!(name.len() < 127 && value.len() < 127);
    [vec![0], part(name), part(value)].concat()
}

/// A connection whose frames are written by hand. The settings of both sides are exchanged.
pub(crate) struct RawConnection {
    stream: TcpStream,
}

pub(crate) struct RawFrame {
    pub(crate) kind: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

impl RawConnection {
    pub(crate) async fn open(to: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(to).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        let mut connection = Self { stream };
        // The server's limits hold from the moment its acknowledgement is here.
        loop {
            let (flags, frame) = connection.next_with_flags().await.expect("the server's settings");
            if frame.kind == SETTINGS && flags & ACK == 0 {
                break;
            }
        }
        connection.write(&frame(SETTINGS, ACK, 0, &[])).await;
        connection
    }

    /// Writes bytes; a server that has hung up is no error here.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).await.is_ok()
    }

    /// The next frame, or `None` at the end of the connection.
    pub(crate) async fn next(&mut self) -> Option<RawFrame> {
        self.next_with_flags().await.map(|(_, frame)| frame)
    }

    async fn next_with_flags(&mut self) -> Option<(u8, RawFrame)> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await.ok()?;
        let [a, b, c, kind, flags, id @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.stream.read_exact(&mut payload).await.ok()?;
        Some((flags, RawFrame { kind, stream: u32::from_be_bytes(id), payload }))
    }
}
