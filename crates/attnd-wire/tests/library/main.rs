//! What the real gRPC library makes of bad bytes and broken connections, and what attnd makes of that.
//!
//! `server.rs` sends raw HTTP/2 to a tonic server; `client.rs` lets a tonic client talk to servers that break off. An
//! upgrade of tonic, hyper or h2 that changes a code or a text fails here.
// The lint's exception for tests covers functions marked as such, not the ones they call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod client;
mod frames;
mod server;

use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use attnd_wire::limits::{self, Link};
use attnd_wire::proto::attention_server::Attention;
use attnd_wire::{Status, proto};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;

/// Longer than anything here takes; a test that reaches it has hung.
const PATIENCE: Duration = Duration::from_secs(10);
const ATTEND: &str = "/attnd.v1.Attention/Attend";
const STATUS: &str = "/attnd.v1.Attention/Status";

type Answers = Pin<Box<dyn futures::Stream<Item = Result<proto::AttendReply, Status>> + Send>>;

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn serve<T: Attention>(service: T) -> SocketAddr {
    let (listener, address) = listen().await;
    let router = limits::server_builder(Link::Client).add_service(limits::attention_server(service));
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

/// A gRPC message with any header.
fn message(flag: u8, length: u32, payload: &[u8]) -> Vec<u8> {
    [&[flag][..], &length.to_be_bytes(), payload].concat()
}
