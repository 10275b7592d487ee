//! HTTP/2 and gRPC below the messages, at the ports of coordinator and worker: wrong protocols, wrong framing, bytes
//! that are no protobuf, too much of everything, deadlines.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use attnd_wire::limits;
use http::StatusCode;
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::Code;

use super::call::{Draft, dims};
use super::http2::{
    ATTEND, COMPUTE, CONTINUATION, DATA, END_HEADERS, GOAWAY, HEADERS, JOIN, RST_STREAM, RawConnection,
    RawRequest, STATUS, frame, framed, honest, literal_field, request_fields,
};
use super::scene::{Refusal, Scene, within};

/// Streaming methods, the unary one, and the largest message each takes.
const METHODS: [(&str, u32); 4] =
    [(ATTEND, 8 << 20), (STATUS, 8 << 20), (JOIN, 64 << 10), (COMPUTE, 7 << 20)];

/// The port that serves a method.
async fn port_of(scene: &Scene, path: &str) -> SocketAddr {
    if path == COMPUTE { scene.worker().await } else { scene.coordinator() }
}

/// Row 1.
#[tokio::test]
async fn unknown_methods_and_services() {
    let mut scene = Scene::open().await;
    let refusal = Refusal::new(Code::Unimplemented, "METHOD: no such service or method");
    let worker = scene.worker().await;
    for (to, path) in [
        (scene.coordinator(), "/attnd.v1.Attention/Nope"),
        (scene.coordinator(), "/attnd.v2.Attention/Attend"),
        (scene.coordinator(), COMPUTE),
        (scene.coordinator(), "/"),
        (worker, ATTEND),
        (worker, JOIN),
        (worker, "/attnd.v1.Worker/Nope"),
    ] {
        scene.refuses_raw(path, to, RawRequest::new(path, honest(&[])), &refusal).await;
    }
    scene.close().await;
}

/// Row 2. The promise is 100 ms; a machine that is busy with other tests gets more.
#[tokio::test]
async fn other_protocols_are_hung_up_on() {
    const HANG_UP: Duration = Duration::from_secs(2);
    let mut scene = Scene::open().await;
    let mut random = StdRng::seed_from_u64(5);
    let noise: Vec<u8> = (0..1 << 16).map(|_| random.random()).collect();
    let tls_hello = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &noise[..501]].concat();
    let almost = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\r";
    let mut broken_frame = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    broken_frame.extend(frame(4, 0, 0, &[0; 5]));
    let greetings: [(&str, &[u8]); 7] = [
        ("HTTP/1.1", b"POST /attnd.v1.Attention/Attend HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"),
        ("HTTP/1.0", b"GET / HTTP/1.0\r\n\r\n"),
        ("TLS", &tls_hello),
        ("64 KiB of noise", &noise),
        ("8 bytes of noise", &noise[..8]),
        ("a preface with a wrong end", almost),
        ("settings of 5 bytes", &broken_frame),
    ];
    for to in [scene.coordinator(), scene.worker().await] {
        for (row, greeting) in greetings {
            let begun = Instant::now();
            let hang_up = async {
                let mut stream = TcpStream::connect(to).await.unwrap();
                // Either may fail: the server hangs up as soon as it has seen enough.
                let _written = stream.write_all(greeting).await;
                let mut said = Vec::new();
                let _closed_or_reset = stream.read_to_end(&mut said).await;
                said
            };
            let said = within(row, hang_up).await;
            assert!(begun.elapsed() < HANG_UP, "{row}: closed after {:?}", begun.elapsed());
            assert!(!said.starts_with(b"HTTP/1"), "{row}: {said:?}");
            scene.recovers(row).await;
        }
    }
    scene.close().await;
}

/// Rows 3 to 5, 7, 8 and 13: messages that lie about themselves.
#[tokio::test]
async fn framing_that_lies() {
    let mut scene = Scene::open().await;
    for (path, limit) in METHODS {
        let to = port_of(&scene, path).await;
        let too_large = |length: u64| {
            Refusal::new(Code::ResourceExhausted, format!("MESSAGE_TOO_LARGE: {length} > {limit}"))
        };
        let eof = Refusal::new(Code::Internal, "PROTOCOL: Unexpected EOF decoding stream.");
        let rows = [
            (
                "flag 2",
                RawRequest::new(path, framed(2, 0, &[])),
                Refusal::with(Code::Internal, "PROTOCOL: ", "invalid compression flag: 2"),
            ),
            (
                "flag 1 without grpc-encoding",
                RawRequest::new(path, framed(1, 0, &[])),
                Refusal::with(Code::Internal, "PROTOCOL: ", "compressed-flag but no grpc-encoding"),
            ),
            (
                "gzip",
                RawRequest::new(path, framed(1, 0, &[])).with_header("grpc-encoding", "gzip"),
                Refusal::new(Code::Unimplemented, "ENCODING: 'gzip' not accepted"),
            ),
            ("4 GiB announced", RawRequest::new(path, framed(0, u32::MAX, &[])), too_large(u32::MAX.into())),
            (
                "a byte over the limit",
                RawRequest::new(path, framed(0, limit + 1, &[])),
                too_large(u64::from(limit) + 1),
            ),
            (
                "the limit announced and 10 bytes sent",
                RawRequest::new(path, framed(0, limit, &[0; 10])),
                eof.clone(),
            ),
            ("half a prefix", RawRequest::new(path, [0, 0]), eof),
        ];
        for (row, request, refusal) in rows {
            scene.refuses_raw(&format!("{path}, {row}"), to, request, &refusal).await;
        }
    }
    let refusal = Refusal::new(Code::Internal, "PROTOCOL: Missing request message.");
    scene.refuses_raw("no message", scene.coordinator(), RawRequest::new(STATUS, []), &refusal).await;
    scene.close().await;
}

/// Row 9.
#[tokio::test]
async fn messages_that_are_no_protobuf() {
    const LIBRARY: &str = "DECODE: failed to decode Protobuf message: ";
    let mut scene = Scene::open().await;
    let no_text: &[u8] = &[0x0a, 3, 0x0a, 1, 0xff];
    for (path, _) in METHODS {
        let to = port_of(&scene, path).await;
        let mut rows: Vec<(&str, &[u8], &str)> = vec![
            ("tags without end", &[0xff; 16], ""),
            ("field 0", &[0x00, 0x00], ""),
            ("groups nested 200 deep", &[0x7b; 200], "recursion limit"),
            ("a field longer than its message", &[0x7a, 0x7f, 0x00], ""),
        ];
        match path {
            ATTEND => rows.push(("Begin with a shape longer than Begin", &[0x0a, 2, 0x0a, 0x7f], "")),
            // Hello.worker_id and ComputeBegin.kernel_id.
            JOIN => rows.push(("an id that is no UTF-8", no_text, "UTF-8")),
            COMPUTE => rows.push(("a kernel id that is no UTF-8", &[0x0a, 3, 0x4a, 1, 0xff], "UTF-8")),
            _ => {}
        }
        for (row, payload, part) in rows {
            let row = format!("{path}, {row}");
            let request = RawRequest::new(path, honest(payload));
            scene.refuses_raw(&row, to, request, &Refusal::with(Code::Internal, LIBRARY, part)).await;
        }
    }
    scene.close().await;
}

/// Row 10, for the public port: it has no repeated field, so what repeats is Begin itself, and a field that nobody
/// knows. As much of it as a message holds; the worker's repeated field is in [`super::worker_port`].
#[tokio::test]
async fn messages_full_of_tiny_fields() {
    let mut scene = Scene::open().await;
    let full = |field: [u8; 2]| honest(&field.repeat(4 << 20));
    for (row, body, text) in [
        ("4 Mi empty Begins", full([0x0a, 0]), "SHAPE_ZERO: batch"),
        ("4 Mi unknown fields", full([0x78, 0]), "STREAM_ORDER: empty frame"),
        ("32 Ki empty Begins", honest(&[0x0a, 0].repeat(32 << 10)), "SHAPE_ZERO: batch"),
    ] {
        let request = RawRequest::new(ATTEND, body);
        scene.refuses_raw(row, scene.coordinator(), request, &Refusal::invalid(text)).await;
    }
    scene.close().await;
}

/// Row 11: refused by HTTP/2 itself, no handler runs. It answers 431 while the rest of the headers is bearable, and
/// closes the connection on more.
#[tokio::test]
async fn headers_over_the_limit() {
    let mut scene = Scene::open().await;
    for path in [ATTEND, STATUS, COMPUTE] {
        let to = port_of(&scene, path).await;
        for kib in [17, 64] {
            let row = format!("{path}, {kib} KiB of metadata");
            let ended = scene.calls_ended().await;
            let request = RawRequest::new(path, honest(&[])).with_header("x", "y".repeat(kib << 10));
            match within(&row, request.send(to)).await {
                Ok((http, headers)) if kib == 17 => {
                    assert_eq!(http, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "{row}");
                    assert!(!headers.contains_key("grpc-status"), "{row}: {headers:?}");
                }
                Err(error) if kib == 64 => {
                    assert!(error.is_go_away() && error.is_remote(), "{row}: {error}");
                    assert_eq!(error.reason(), Some(h2::Reason::ENHANCE_YOUR_CALM), "{row}");
                }
                other => panic!("{row}: {other:?}"),
            }
            assert_eq!(scene.calls_ended().await, ended, "{row}: calls that a handler saw");
            scene.recovers(&row).await;
        }
    }
    scene.close().await;
}

/// Row 12: the 201st stream of a connection is refused, the others live on.
#[tokio::test]
async fn streams_over_the_limit() {
    const REFUSED_STREAM: [u8; 4] = [0, 0, 0, 7];
    let mut scene = Scene::open().await;
    for path in [ATTEND, COMPUTE] {
        let to = port_of(&scene, path).await;
        let refused = async {
            let mut connection = RawConnection::open(to).await;
            for call in 0..=limits::MAX_STREAMS {
                connection.write(&frame(HEADERS, END_HEADERS, call * 2 + 1, &request_fields(path))).await;
            }
            loop {
                let next = connection.next().await.expect("the connection lives on");
                if next.kind == RST_STREAM {
                    break (next.stream, next.payload);
                }
                assert_ne!(next.kind, GOAWAY, "the connection lives on");
            }
        };
        let (stream, code) = within(path, refused).await;
        assert_eq!((stream, &code[..]), (limits::MAX_STREAMS * 2 + 1, &REFUSED_STREAM[..]), "{path}");
        // More streams than calls that may run: until they are gone, a good call is one too many.
        scene.no_call_is_left(path).await;
        scene.recovers(path).await;
    }
    scene.close().await;
}

/// Floods of frames that cost the sender little. The server may serve them or hang up, and grows in neither case.
#[tokio::test]
async fn floods_of_frames() {
    const FRAMES: u32 = 20_000;
    let mut scene = Scene::open().await;
    for to in [scene.coordinator(), scene.worker().await] {
        let fields = request_fields(if to == scene.coordinator() { ATTEND } else { COMPUTE });
        let resets = (0..FRAMES).flat_map(|call| {
            let stream = call * 2 + 1;
            [frame(HEADERS, END_HEADERS, stream, &fields), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])]
                .concat()
        });
        let mut empty_data = frame(HEADERS, END_HEADERS, 1, &fields);
        empty_data.extend(frame(DATA, 0, 1, &[]).repeat(FRAMES as usize));
        let header = literal_field("x", &"y".repeat(100)).repeat(100);
        let mut continuations = frame(HEADERS, 0, 1, &fields);
        continuations.extend(frame(CONTINUATION, 0, 1, &header).repeat(2000));
        for (row, flood) in [
            ("streams reset at once", resets.collect::<Vec<u8>>()),
            ("empty data", empty_data),
            ("headers without end", continuations),
        ] {
            let mut connection = within(row, RawConnection::open(to)).await;
            // A server that has hung up reads no further.
            let _served = within(row, connection.write(&flood)).await;
            drop(connection);
            scene.no_call_is_left(row).await;
            scene.recovers(row).await;
        }
    }
    scene.close().await;
}

/// Rows 14 and 15, and a deadline that passes while the call waits for its client.
#[tokio::test]
async fn deadlines() {
    let mut scene = Scene::open().await;
    for (path, _) in METHODS {
        let to = port_of(&scene, path).await;
        let timeout = |value: &str| RawRequest::new(path, honest(&[])).with_header("grpc-timeout", value);
        for value in ["10X", "-1S", "123456789S", "S", "1.5S", "0x1S"] {
            let refusal = Refusal::invalid(format!("DEADLINE_FORMAT: '{value}'"));
            scene.refuses_raw(&format!("{path}, {value}"), to, timeout(value), &refusal).await;
        }
        for value in ["0m", "0H", "00000000n"] {
            let refusal = Refusal::new(Code::DeadlineExceeded, "DEADLINE: expired on arrival");
            scene.refuses_raw(&format!("{path}, {value}"), to, timeout(value), &refusal).await;
        }
    }
    let refusal = Refusal::new(Code::DeadlineExceeded, "DEADLINE: expired");
    let draft = Draft::random(dims([2, 2, 3, 40, 8, 4]), 6);
    let frames: Vec<u8> =
        draft.frames()[..2].iter().flat_map(|frame| honest(&frame.encode_to_vec())).collect();
    for (row, path, body) in [
        ("before Begin", ATTEND, vec![]),
        ("after a chunk", ATTEND, frames),
        ("before Begin, at a worker", COMPUTE, vec![]),
    ] {
        let to = port_of(&scene, path).await;
        let begun = Instant::now();
        let request = RawRequest::new(path, body).with_header("grpc-timeout", "300m").left_open();
        scene.refuses_raw(row, to, request, &refusal).await;
        assert!(begun.elapsed() < Duration::from_secs(5), "{row}: {:?}", begun.elapsed());
    }
    scene.close().await;
}
