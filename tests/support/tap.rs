//! A wire tap: passes the bytes of connections on as they come, and counts the gRPC messages in them, in each direction.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Sent by a client before its first frame (RFC 9113, section 3.4).
const PREFACE: usize = 24;

/// A tap in front of a server.
pub(crate) struct Tap {
    url: String,
    target: watch::Sender<Option<String>>,
    counted: Arc<[AtomicU64; 2]>,
    _connections: JoinSet<()>,
}

impl Tap {
    /// Listens; whoever connects waits until there is a [`Self::lead_to`].
    pub(crate) async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("it listens"));
        let (target, known) = watch::channel(None);
        let counted: Arc<[AtomicU64; 2]> = Arc::default();
        let mut connections = JoinSet::new();
        let counts = Arc::clone(&counted);
        connections.spawn(async move {
            let mut passing = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                passing.spawn(pass(client, known.clone(), Arc::clone(&counts)));
            }
        });
        Self { url, target, counted, _connections: connections }
    }

    /// Where to connect to.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Says which server is behind it.
    pub(crate) fn lead_to(&self, url: &str) {
        let address = url.trim_start_matches("http://").to_owned();
        self.target.send_replace(Some(address));
    }

    /// Messages to the server, and back from it, since it began.
    pub(crate) fn messages(&self) -> [u64; 2] {
        [&self.counted[0], &self.counted[1]].map(|counted| counted.load(Ordering::SeqCst))
    }
}

async fn pass(client: TcpStream, mut known: watch::Receiver<Option<String>>, counts: Arc<[AtomicU64; 2]>) {
    let target = known.wait_for(Option::is_some).await.ok().and_then(|target| target.clone());
    let Some(target) = target else { return };
    let Ok(server) = TcpStream::connect(&target).await else { return };
    for stream in [&client, &server] {
        stream.set_nodelay(true).expect("a socket");
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::join!(
        forward(from_client, to_server, Messages::of_client(), &counts[0]),
        forward(from_server, to_client, Messages::of_server(), &counts[1]),
    );
}

async fn forward(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut messages: Messages, count: &AtomicU64) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(n) = from.read(&mut buffer).await else { return };
        // Counted before they arrive, so that whoever has an answer finds its messages counted.
        count.fetch_add(messages.take(&buffer[..n]), Ordering::SeqCst);
        if n == 0 || to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

/// Counts the messages in one direction of a connection: gRPC's length-prefixed messages in the DATA frames of HTTP/2.
struct Messages {
    /// Bytes before the first frame.
    preface: usize,
    head: Vec<u8>,
    frame: Option<Frame>,
    /// Of each stream, what has come of a message: of its prefix, and how much of it is missing.
    streams: BTreeMap<u32, (Vec<u8>, usize)>,
}

struct Frame {
    is_data: bool,
    stream: u32,
    left: usize,
}

impl Messages {
    fn of_client() -> Self {
        Self { preface: PREFACE, head: Vec::new(), frame: None, streams: BTreeMap::new() }
    }

    fn of_server() -> Self {
        Self { preface: 0, ..Self::of_client() }
    }

    /// Takes what comes next; returns how many messages it completes.
    fn take(&mut self, mut bytes: &[u8]) -> u64 {
        let mut complete = 0;
        let of_preface = self.preface.min(bytes.len());
        self.preface -= of_preface;
        bytes = &bytes[of_preface..];
        while !bytes.is_empty() {
            let Some(frame) = &mut self.frame else {
                let (head, rest) = bytes.split_at(bytes.len().min(9 - self.head.len()));
                self.head.extend_from_slice(head);
                bytes = rest;
                if let [a, b, c, kind, flags, s0, s1, s2, s3] = self.head[..] {
                    let left = u32::from_be_bytes([0, a, b, c]) as usize;
                    let is_data = kind == 0;
                    assert!(!is_data || flags & 0x8 == 0, "padding, which nobody here sends");
                    let stream = u32::from_be_bytes([s0, s1, s2, s3]) & 0x7fff_ffff;
                    self.head.clear();
                    self.frame = (left > 0).then_some(Frame { is_data, stream, left });
                }
                continue;
            };
            let (data, rest) = bytes.split_at(bytes.len().min(frame.left));
            bytes = rest;
            frame.left -= data.len();
            if frame.is_data {
                complete += of_stream(self.streams.entry(frame.stream).or_default(), data);
            }
            if frame.left == 0 {
                self.frame = None;
            }
        }
        complete
    }
}

/// Takes bytes of one stream; returns how many messages they complete.
fn of_stream((prefix, missing): &mut (Vec<u8>, usize), mut data: &[u8]) -> u64 {
    let mut complete = 0;
    loop {
        if *missing > 0 {
            let (_, rest) = data.split_at(data.len().min(*missing));
            *missing -= data.len() - rest.len();
            data = rest;
            complete += u64::from(*missing == 0);
        }
        if data.is_empty() {
            return complete;
        }
        let (part, rest) = data.split_at(data.len().min(5 - prefix.len()));
        prefix.extend_from_slice(part);
        data = rest;
        if let [_compressed, a, b, c, d] = prefix[..] {
            *missing = u32::from_be_bytes([a, b, c, d]) as usize;
            prefix.clear();
            // An empty message has come with its prefix.
            complete += u64::from(*missing == 0);
        }
    }
}

#[test]
fn messages_are_counted_however_the_bytes_come() {
    let message = |len: usize| [&[0][..], &(len as u32).to_be_bytes(), &vec![7; len]].concat();
    let frame = |kind: u8, stream: u32, payload: &[u8]| {
        let len = (payload.len() as u32).to_be_bytes();
        [&len[1..], &[kind, 0], &stream.to_be_bytes(), payload].concat()
    };
    let (long, short) = (message(300), message(10));
    let bytes = [
        vec![1; PREFACE],
        frame(4, 0, &[0; 6]),
        frame(0, 1, &long[..100]),
        frame(0, 3, &[&short[..], &message(0), &short[..3]].concat()),
        frame(8, 0, &[0; 4]),
        frame(0, 1, &[&long[100..], &short[..]].concat()),
        frame(0, 3, &short[3..]),
        frame(0, 3, &[]),
    ]
    .concat();
    for size in [1, 2, 7, 64, bytes.len()] {
        let mut messages = Messages::of_client();
        let counted: u64 = bytes.chunks(size).map(|part| messages.take(part)).sum();
        assert_eq!(counted, 5, "in pieces of {size}");
    }
}
