//! What is around a process: the network, chance and time. The machine's own, unless a simulation gives others.
//!
//! A simulation runs nodes and clients as they are, in one thread and in a time of its own, again and again the same way. So whoever
//! connects, draws lots or looks at the clock does it by what is here.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures::future::BoxFuture;
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::{Channel, Endpoint};
use tower::Service;

/// The network and chance of a simulation.
pub trait Simulated: Debug + Send + Sync {
    /// Connects to what `to` names, by its host and port.
    fn connect(&self, to: Uri) -> BoxFuture<'static, io::Result<Pipe>>;

    /// The next number of those that decide what is left to chance.
    fn random(&self) -> u64;
}

/// Both directions of a connection.
pub type Pipe = Box<dyn Both>;

/// What can be read and written.
pub trait Both: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Both for T {}

/// What is around a process. The default is the machine that it runs on.
#[derive(Clone, Debug, Default)]
pub struct Surroundings(Option<Arc<dyn Simulated>>);

impl Surroundings {
    /// Those of a simulation.
    pub fn simulated(by: Arc<dyn Simulated>) -> Self {
        Self(Some(by))
    }

    /// A channel that connects when it is first used, and again when the connection was lost.
    pub fn channel(&self, endpoint: &Endpoint) -> Channel {
        match &self.0 {
            None => endpoint.connect_lazy(),
            Some(simulated) => endpoint.connect_with_connector_lazy(Connector(Arc::clone(simulated))),
        }
    }

    /// A channel that is connected.
    ///
    /// # Errors
    /// What keeps it from connecting.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Channel, tonic::transport::Error> {
        match &self.0 {
            None => endpoint.connect().await,
            Some(simulated) => endpoint.connect_with_connector(Connector(Arc::clone(simulated))).await,
        }
    }

    /// A number like no other.
    pub fn random(&self) -> u64 {
        match &self.0 {
            None => rand::random(),
            Some(simulated) => simulated.random(),
        }
    }

    /// One of the numbers from 0 up to 1, each as likely.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    pub fn fraction(&self) -> f64 {
        (self.random() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// What time it is, for all but measurements of the machine itself.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[derive(Clone, Debug)]
struct Connector(Arc<dyn Simulated>);

impl Service<Uri> for Connector {
    type Response = TokioIo<Pipe>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<TokioIo<Pipe>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let connecting = self.0.connect(to);
        Box::pin(async { connecting.await.map(TokioIo::new) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_are_below_one() {
        #[derive(Debug)]
        struct Fixed(u64);
        impl Simulated for Fixed {
            fn connect(&self, _: Uri) -> BoxFuture<'static, io::Result<Pipe>> {
                Box::pin(async { Err(io::ErrorKind::NotFound.into()) })
            }
            fn random(&self) -> u64 {
                self.0
            }
        }
        let fraction = |drawn| Surroundings::simulated(Arc::new(Fixed(drawn))).fraction();
        assert_eq!((fraction(0), fraction(1 << 63)), (0.0, 0.5));
        assert!(fraction(u64::MAX) < 1.0);
        assert!((0.0..1.0).contains(&Surroundings::default().fraction()));
    }

    #[tokio::test(start_paused = true)]
    async fn time_is_the_runtimes() {
        let begun = now();
        tokio::time::sleep(std::time::Duration::from_secs(1000)).await;
        assert!(now() - begun >= std::time::Duration::from_secs(1000));
    }
}
