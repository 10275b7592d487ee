//! The network of a simulation, as nodes and clients see it, and its chance.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use attnd_node::listen::Listener;
use attnd_wire::Surroundings;
use attnd_wire::surroundings::{Pipe, Simulated};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tonic::transport::Uri;
use turmoil::net::{TcpListener, TcpStream};

/// Whatever is drawn in one run, by whomever.
#[derive(Debug)]
pub(super) struct Chance(Mutex<SmallRng>);

impl Chance {
    pub(super) fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self(Mutex::new(SmallRng::seed_from_u64(seed))))
    }

    /// What nodes and clients have around them.
    pub(super) fn surroundings(self: &Arc<Self>) -> Surroundings {
        Surroundings::simulated(Arc::<Self>::clone(self))
    }
}

impl Simulated for Chance {
    fn connect(&self, to: Uri) -> Pin<Box<dyn Future<Output = io::Result<Pipe>> + Send>> {
        Box::pin(async move {
            let authority = to.authority().map(ToString::to_string).unwrap_or_default();
            let stream = TcpStream::connect(authority).await?;
            Ok(Box::new(stream) as Pipe)
        })
    }

    fn random(&self) -> u64 {
        self.0.lock().unwrap().random()
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
