//! The network of a simulation, as nodes and clients see it, and its chance.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use attnd_node::listen::Listener;
use attnd_wire::Surroundings;
use attnd_wire::surroundings::{Pipe, Simulated};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::Uri;
use turmoil::net::{TcpListener, TcpStream};

use crate::support::tokens::is_last_byte;

/// Numbers in a row by which bytes are known for rows of tensors.
const RUN: usize = 8;
/// While bits flip, one in so many messages with rows has one.
const FLIPS: u64 = 30;

/// Whatever is drawn in one run, by whomever.
#[derive(Debug)]
pub(super) struct Chance {
    drawn: Mutex<SmallRng>,
    flips: AtomicBool,
}

impl Chance {
    pub(super) fn new(seed: u64) -> Arc<Self> {
        let (drawn, flips) = (Mutex::new(SmallRng::seed_from_u64(seed)), AtomicBool::new(false));
        Arc::new(Self { drawn, flips })
    }

    /// Whether bits of rows flip from now on. Those around them are what TLS is for.
    pub(super) fn flip(&self, flips: bool) {
        self.flips.store(flips, Ordering::Relaxed);
    }

    pub(super) fn random(&self) -> u64 {
        self.drawn.lock().unwrap().random()
    }

    /// The bytes with one bit flipped, if they shall have one.
    fn flipped(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        if !self.flips.load(Ordering::Relaxed) {
            return None;
        }
        let mut is_run = bytes.iter().enumerate().map(|(at, _)| {
            let ends = bytes[at..].iter().skip(3).step_by(4).take(RUN);
            ends.len() == RUN && ends.copied().all(is_last_byte)
        });
        let at = is_run.position(|is_run| is_run)?;
        let drawn = self.random();
        if !drawn.is_multiple_of(FLIPS) {
            return None;
        }
        let mut flipped = bytes.to_vec();
        let byte = at + usize::try_from(drawn >> 32).unwrap() % (4 * RUN);
        flipped[byte] ^= 1 << (drawn >> 8 & 7);
        Some(flipped)
    }

    /// What nodes and clients have around them.
    pub(super) fn surroundings(self: &Arc<Self>) -> Surroundings {
        Surroundings::simulated(Arc::new(Around(Arc::clone(self))))
    }
}

/// The network and this chance.
#[derive(Debug)]
struct Around(Arc<Chance>);

impl Simulated for Around {
    fn connect(&self, to: Uri) -> Pin<Box<dyn Future<Output = io::Result<Pipe>> + Send>> {
        let chance = self.0.clone();
        Box::pin(async move {
            let authority = to.authority().map(ToString::to_string).unwrap_or_default();
            let stream = TcpStream::connect(authority).await?;
            Ok(Box::new(Wire { stream, chance }) as Pipe)
        })
    }

    fn random(&self) -> u64 {
        self.0.random()
    }
}

/// A connection on which bits may flip on their way to whom it was made.
struct Wire {
    stream: TcpStream,
    chance: Arc<Chance>,
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.chance.flipped(bytes) {
            Some(flipped) => Pin::new(&mut self.stream).poll_write(cx, &flipped),
            None => Pin::new(&mut self.stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Where a simulated node listens.
pub(super) struct Port(TcpListener);

impl Port {
    pub(super) async fn open(port: u16) -> io::Result<Self> {
        TcpListener::bind(("0.0.0.0", port)).await.map(Self)
    }
}

impl Listener for Port {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        self.0.accept().await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}
