//! Accepting connections: capped, also for each peer, handed on once they speak HTTP/2, and patient when the process
//! runs out of file descriptors.
//!
//! Written by hand because tonic's own accept loop retries at once after EMFILE and so spins until a descriptor
//! comes free, and because a connection that says nothing would keep its place for ever: HTTP/2 pings only begin after
//! the preface.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use attnd_wire::surroundings::now;
use bytes::Bytes;
use futures::Stream;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::transport::server::Connected;

/// Connections that one node keeps at a time; the next ones wait in the system's backlog.
pub const MAX_CONNECTIONS: usize = 1000;
/// One peer may have one in so many of a node's connections; more of it are closed. So many workers at most can join a
/// coordinator from one address, such as that of a gateway that hides theirs.
const PEER_FRACTION: usize = 4;
/// What a client says first, RFC 9113 section 3.4.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Time for the preface to be here.
const GREETING: Duration = Duration::from_secs(5);
/// Once in this time, it is said that a peer has too many connections.
const SAY_AGAIN: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Where connections come in: a socket, or one of a simulation.
pub trait Listener: Send + Sync {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// The next connection, and whose it is.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, SocketAddr)>> + Send;

    /// Where it listens.
    ///
    /// # Errors
    /// The system's.
    fn local_addr(&self) -> io::Result<SocketAddr>;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, peer) = TcpListener::accept(self).await?;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "set TCP_NODELAY");
        }
        Ok((stream, peer))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        TcpListener::local_addr(self)
    }
}

/// An accepted connection. It gives its places back when it is dropped.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    /// What was read already: the preface.
    greeting: Bytes,
    // Before the place, so that whoever takes that finds the seat free.
    _seat: Arc<()>,
    _place: OwnedSemaphorePermit,
}

/// Connections that speak HTTP/2 as they arrive, at most `max_connections` at a time and a quarter of them from one
/// peer, counting those that haven't spoken yet. It never ends and never yields an error.
pub fn incoming<L: Listener>(
    listener: L,
    max_connections: usize,
) -> impl Stream<Item = io::Result<Connection<L::Stream>>> + Send {
    incoming_within(GREETING, listener, max_connections)
}

fn incoming_within<L: Listener>(
    greeting: Duration,
    listener: L,
    max_connections: usize,
) -> impl Stream<Item = io::Result<Connection<L::Stream>>> + Send {
    let door = Door {
        listener,
        greeting,
        places: Arc::new(Semaphore::new(max_connections)),
        peers: Peers { most: max_connections.div_ceil(PEER_FRACTION), of: HashMap::new() },
        greetings: FuturesUnordered::new(),
    };
    futures::stream::unfold(door, async |mut door| Some((Ok(door.next().await?), door)))
}

struct Door<L: Listener> {
    listener: L,
    /// Time for the preface.
    greeting: Duration,
    places: Arc<Semaphore>,
    peers: Peers,
    /// Connections that haven't spoken yet.
    greetings: FuturesUnordered<BoxFuture<'static, Option<Connection<L::Stream>>>>,
}

impl<L: Listener> Door<L> {
    /// The next connection that speaks HTTP/2. The semaphore is never closed, so there always is one.
    async fn next(&mut self) -> Option<Connection<L::Stream>> {
        loop {
            tokio::select! {
                biased;
                Some(greeted) = self.greetings.next() => if greeted.is_some() {
                    return greeted;
                },
                accepted = accept(&self.listener, &self.places) => {
                    let (stream, peer, place) = accepted?;
                    match self.peers.seat(peer.ip(), now()) {
                        Ok(seat) => self.greetings.push(Box::pin(greet(self.greeting, stream, place, seat))),
                        Err(Full { is_news: true }) => tracing::warn!(
                            %peer,
                            most = self.peers.most,
                            "a peer has as many connections as one may have, and more of it are closed"
                        ),
                        Err(Full { is_news: false }) => tracing::debug!(%peer, "one connection more is closed"),
                    }
                }
            }
        }
    }
}

/// Counts the connections of each peer: each holds a seat of its peer.
struct Peers {
    most: usize,
    of: HashMap<IpAddr, Peer>,
}

/// A peer with connections.
#[derive(Default)]
struct Peer {
    seats: Weak<()>,
    /// When it was last said that it has too many.
    said: Option<Instant>,
}

/// A peer has too many connections.
#[derive(Debug, PartialEq, Eq)]
struct Full {
    /// It was not said lately.
    is_news: bool,
}

impl Peers {
    /// A seat for one more connection.
    fn seat(&mut self, peer: IpAddr, now: Instant) -> Result<Arc<()>, Full> {
        self.of.retain(|_, peer| peer.seats.strong_count() > 0);
        let Peer { seats, said } = self.of.entry(network_of(peer)).or_default();
        if seats.strong_count() >= self.most {
            let is_news = said.is_none_or(|said| now.saturating_duration_since(said) >= SAY_AGAIN);
            *said = if is_news { Some(now) } else { *said };
            return Err(Full { is_news });
        }
        let seat = seats.upgrade().unwrap_or_default();
        *seats = Arc::downgrade(&seat);
        Ok(seat)
    }
}

/// What counts as one peer: an IPv4 address, or the 64 bits of an IPv6 address that one host's addresses share.
fn network_of(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

/// A connection and its place.
async fn accept<L: Listener>(
    listener: &L,
    places: &Arc<Semaphore>,
) -> Option<(L::Stream, SocketAddr, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    let mut pause = FIRST_PAUSE;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => return Some((stream, peer, place)),
            Err(error) if concerns_one_connection(&error) => {
                tracing::debug!(%error, "a connection ended before it was accepted");
            }
            Err(error) => {
                tracing::warn!(%error, pause_ms = pause.as_millis() as u64, "accepting connections pauses");
                tokio::time::sleep(pause).await;
                pause = next_pause(pause);
            }
        }
    }
}

/// Waits for the preface; `None`, and the connection is closed, if something else comes or nothing.
async fn greet<S: AsyncRead + Unpin>(
    limit: Duration,
    mut stream: S,
    place: OwnedSemaphorePermit,
    seat: Arc<()>,
) -> Option<Connection<S>> {
    match tokio::time::timeout(limit, speaks_http2(&mut stream)).await {
        Ok(Ok(true)) => {}
        Ok(Ok(false)) => {
            tracing::debug!("a connection that does not speak HTTP/2");
            return None;
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "a connection ended before it said anything");
            return None;
        }
        Err(_elapsed) => {
            tracing::debug!(limit_ms = limit.as_millis() as u64, "a connection without an HTTP/2 preface");
            return None;
        }
    }
    Some(Connection { stream, greeting: Bytes::from_static(PREFACE), _seat: seat, _place: place })
}

/// Reads the preface, or up to where it is another text.
async fn speaks_http2<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<bool> {
    let mut stream = stream.take(PREFACE.len() as u64);
    let mut said = Vec::with_capacity(PREFACE.len());
    while said.len() < PREFACE.len() {
        if stream.read_buf(&mut said).await? == 0 || !PREFACE.starts_with(&said) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

fn next_pause(pause: Duration) -> Duration {
    (pause * 2).min(LONGEST_PAUSE)
}

impl<S> Connected for Connection<S> {
    /// Nothing asks who a call is from.
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.greeting.is_empty() {
            let n = self.greeting.len().min(buf.remaining());
            buf.put_slice(&self.greeting.split_to(n));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// The URL of a listening socket, where its address is one that others can use.
pub fn url_of(address: SocketAddr) -> Option<String> {
    (!address.ip().is_unspecified()).then(|| format!("http://{address}"))
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    async fn listen() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    /// A peer that says `greeting`.
    async fn peer(address: SocketAddr, greeting: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(greeting).await.unwrap();
        stream
    }

    /// Waits until the other end has closed `stream`.
    async fn closed(stream: &mut TcpStream) {
        let ended = tokio::time::timeout(SOON, stream.read(&mut [0])).await.expect("closed soon");
        assert!(!matches!(ended, Ok(1..)), "{ended:?}");
    }

    #[test]
    fn pauses_grow_to_a_second() {
        let pauses: Vec<Duration> =
            std::iter::successors(Some(FIRST_PAUSE), |p| Some(next_pause(*p))).take(12).collect();
        assert!(pauses.windows(2).all(|w| w[0] <= w[1]));
        assert_eq!(pauses.last(), Some(&LONGEST_PAUSE));
    }

    #[tokio::test]
    async fn a_full_house_waits_for_somebody_to_leave() {
        let (listener, address) = listen().await;
        let mut connections = std::pin::pin!(incoming(listener, 1));
        let _first_peer = peer(address, PREFACE).await;
        let first = connections.next().await.unwrap().unwrap();
        let _second_peer = peer(address, PREFACE).await;
        assert!(tokio::time::timeout(Duration::from_millis(50), connections.next()).await.is_err());
        drop(first);
        let second = tokio::time::timeout(SOON, connections.next()).await;
        assert!(second.is_ok(), "the freed place is given to the one who waits");
    }

    #[tokio::test]
    async fn what_is_handed_on_begins_with_the_preface_however_it_came() {
        let (listener, address) = listen().await;
        let mut connections = std::pin::pin!(incoming(listener, 8));
        let mut slow = peer(address, &PREFACE[..3]).await;
        assert!(tokio::time::timeout(Duration::from_millis(20), connections.next()).await.is_err());
        slow.write_all(&PREFACE[3..]).await.unwrap();
        slow.write_all(b"settings").await.unwrap();
        let mut connection = tokio::time::timeout(SOON, connections.next()).await.unwrap().unwrap().unwrap();
        let mut said = [0; 32];
        // In small pieces, so that the preface does not fit into the first.
        for piece in said.chunks_mut(10) {
            tokio::time::timeout(SOON, connection.read_exact(piece)).await.unwrap().unwrap();
        }
        assert_eq!((&said[..24], &said[24..]), (&PREFACE[..], &b"settings"[..]));
    }

    #[tokio::test]
    async fn whoever_says_something_else_is_closed_at_once() {
        let (listener, address) = listen().await;
        let mut noisy = peer(address, b"GET / HT").await;
        let mut connections = std::pin::pin!(incoming(listener, 8));
        tokio::select! {
            _ = connections.next() => panic!("that was not HTTP/2"),
            () = closed(&mut noisy) => {}
        }
    }

    #[tokio::test]
    async fn the_silent_lose_their_places() {
        const LIMIT: Duration = Duration::from_millis(100);
        let (listener, address) = listen().await;
        let mut connections = std::pin::pin!(incoming_within(LIMIT, listener, 1));
        let begun = std::time::Instant::now();
        let (mut mute, mut slow) = (peer(address, b"").await, peer(address, &PREFACE[..23]).await);
        for stream in [&mut mute, &mut slow] {
            tokio::select! {
                _ = connections.next() => panic!("nobody has said it all"),
                () = closed(stream) => {}
            }
        }
        assert!(begun.elapsed() >= 2 * LIMIT, "one place, two who held it: {:?}", begun.elapsed());
        let _speaker = peer(address, PREFACE).await;
        assert!(tokio::time::timeout(SOON, connections.next()).await.is_ok(), "the place is free");
    }

    #[tokio::test]
    async fn a_peer_has_a_quarter_of_the_places() {
        let (listener, address) = listen().await;
        let mut connections = std::pin::pin!(incoming(listener, 8));
        let (mut peers, mut kept) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            peers.push(peer(address, PREFACE).await);
            kept.push(tokio::time::timeout(SOON, connections.next()).await.unwrap().unwrap().unwrap());
        }
        let mut third = peer(address, PREFACE).await;
        tokio::select! {
            _ = connections.next() => panic!("three of 8"),
            () = closed(&mut third) => {}
        }
        kept.pop();
        peers.push(peer(address, PREFACE).await);
        assert!(tokio::time::timeout(SOON, connections.next()).await.is_ok(), "a seat came free");
    }

    #[test]
    fn that_a_peer_has_too_many_is_said_once_a_minute() {
        let mut peers = Peers { most: 2, of: HashMap::new() };
        let begun = Instant::now();
        let mut seat = |peer: &str, seconds| {
            let full = peers.seat(peer.parse().unwrap(), begun + Duration::from_secs(seconds));
            full.map_err(|full| full.is_news)
        };
        let _kept = [seat("10.0.0.1", 0).unwrap(), seat("10.0.0.1", 0).unwrap()];
        let _another = [seat("10.0.0.2", 0).unwrap(), seat("10.0.0.2", 0).unwrap()];
        let said = [0, 1, 59, 60, 61, 119, 120].map(|seconds| seat("10.0.0.1", seconds).unwrap_err());
        assert_eq!(said, [true, false, false, true, false, false, true]);
        assert_eq!(seat("10.0.0.2", 61), Err(true));
    }

    #[test]
    fn a_peer_is_an_address_or_a_network_of_one_host() {
        let network = |text: &str| network_of(text.parse().unwrap());
        assert_ne!(network("10.0.0.1"), network("10.0.0.2"));
        assert_eq!(network("::ffff:10.0.0.1"), network("10.0.0.1"));
        assert_eq!(network("2001:db8::1"), network("2001:db8::ffff:2"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
    }

    #[test]
    fn a_wildcard_is_no_address_for_others() {
        assert_eq!(url_of("0.0.0.0:7".parse().unwrap()), None);
        assert_eq!(url_of("[::1]:7".parse().unwrap()).as_deref(), Some("http://[::1]:7"));
    }
}
