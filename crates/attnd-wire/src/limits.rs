//! Every limit of the wire, and servers, channels and stubs that have them set. tonic's defaults are mostly "none".

use std::time::Duration;

use tonic::transport::{Channel, Endpoint, Server};

use crate::error::{Error, Reason};
use crate::layer::EdgeLayer;
use crate::proto::attention_client::AttentionClient;
use crate::proto::attention_server::{Attention, AttentionServer};
use crate::proto::cluster_client::ClusterClient;
use crate::proto::cluster_server::{Cluster, ClusterServer};
use crate::proto::sessions_client::SessionsClient;
use crate::proto::sessions_server::{Sessions, SessionsServer};
use crate::proto::shards_client::ShardsClient;
use crate::proto::shards_server::{Shards, ShardsServer};
use crate::proto::worker_client::WorkerClient;
use crate::proto::worker_server::{Worker, WorkerServer};

/// Largest message with tensor bytes in it, in bytes.
pub const MESSAGE_BYTES: usize = 8 << 20;
/// Largest message to a worker, in bytes: an operator and as much again as a chunk needs. Its tensor bytes are at most
/// [`CHUNK_BYTES`], and it has repeated fields, of which entries of two bytes take up to 24 in memory.
pub const COMPUTE_REQUEST_BYTES: usize = OPERATOR_BYTES + (2 << 20);
/// Largest operator, in bytes: parameters of its score function, tables, and lists of blocks and runs. A matrix of the largest
/// dimensions is 4 MiB.
pub const OPERATOR_BYTES: usize = 5 << 20;
/// Largest message of the control channel, in bytes.
pub const CONTROL_MESSAGE_BYTES: usize = 64 << 10;
/// Largest message to a worker about shards of sessions, in bytes: whatever a client's message has of one step fits, with what a worker is
/// told besides.
pub const HOLD_REQUEST_BYTES: usize = MESSAGE_BYTES + (64 << 10);
/// Tensor bytes that a sender puts into one message.
pub const CHUNK_BYTES: usize = 1 << 20;
/// HTTP/2 frames of this size carry 2 to 4 times the bytes per second of the default 16 KiB.
pub const FRAME_BYTES: u32 = 512 << 10;
/// How long a peer may leave a message where it waits for it, until its call is given up.
pub const STALL: Duration = Duration::from_secs(10);
/// Calls at once on one connection.
pub const MAX_STREAMS: u32 = 200;
/// Request headers, as HTTP/2 counts them, in bytes.
pub const HEADER_LIST_BYTES: u32 = 16 << 10;
/// Streams that a peer may reset before they are served, until the connection is closed on it (rapid reset).
pub const PENDING_RESETS: usize = 20;
/// Streams that this side may have to reset, until the connection is closed.
pub const LOCAL_RESETS: usize = 1024;
/// Time for a TCP connection to be made.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest number of entries of a repeated field.
pub const MAX_ENTRIES: usize = 1024;
/// Largest number of runs of documents, over all of a batch: those of queries, and those of keys.
pub const MAX_RUNS: usize = 65_536;
/// Largest number of blocks in a mask of them, and of rows of blocks.
pub const MAX_BLOCKS: usize = 1 << 20;
/// Largest number of buckets of a bias.
pub const MAX_BUCKETS: usize = 65_536;
/// Longest text that a peer may give for one field, in bytes.
pub const MAX_TEXT: usize = 256;

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// A worker, or whatever else is near: a silent one is noticed within two seconds.
    Cluster,
    /// The coordinator, for a worker. When it has stood still for some seconds, it blames nobody for the silence, so
    /// nobody may have hung up by then.
    Coordinator,
    /// A client, perhaps far away.
    Client,
}

impl Link {
    /// Time between HTTP/2 pings, and time for the answer.
    pub fn keepalive(self) -> (Duration, Duration) {
        match self {
            Self::Cluster => (Duration::from_secs(1), Duration::from_secs(1)),
            Self::Coordinator => (Duration::from_secs(1), Duration::from_secs(8)),
            Self::Client => (Duration::from_secs(30), Duration::from_secs(20)),
        }
    }

    /// Bytes that one stream, and one connection, may have in flight.
    ///
    /// A stream that nobody reads keeps its bytes of the connection's window, so the connection needs room for more
    /// stalled streams than there are. Between nodes one connection carries the calls of all clients: with 64 of
    /// them, as many as a coordinator runs unless told otherwise, none can take another one's room, and the worst
    /// that their unread bytes take is 1 MiB per call and worker, for [`STALL`] at most. The connection of a client
    /// carries its own calls alone, and there may be many such connections: a small window bounds their memory.
    pub fn windows(self) -> (u32, u32) {
        match self {
            Self::Cluster | Self::Coordinator => (1 << 20, 64 << 20),
            Self::Client => (2 << 20, 8 << 20),
        }
    }
}

/// What [`server_builder`] makes.
pub type EdgeServer = Server<tower::layer::util::Stack<EdgeLayer, tower::layer::util::Identity>>;

/// A server with all limits and the [`EdgeLayer`] set. TCP options belong to whoever makes the listener.
pub fn server_builder(link: Link) -> EdgeServer {
    let (interval, timeout) = link.keepalive();
    let (stream_window, connection_window) = link.windows();
    Server::builder()
        .initial_stream_window_size(stream_window)
        .initial_connection_window_size(connection_window)
        .max_frame_size(FRAME_BYTES)
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(HEADER_LIST_BYTES)
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS))
        .http2_max_local_error_reset_streams(Some(LOCAL_RESETS))
        .http2_keepalive_interval(Some(interval))
        .http2_keepalive_timeout(Some(timeout))
        .tcp_nodelay(true)
        .layer(EdgeLayer)
}

/// A channel's settings with all limits set, for `http://host:port`.
///
/// # Errors
/// [`Reason::Transport`] if `url` is no such URL.
pub fn endpoint(url: &str, link: Link) -> Result<Endpoint, Error> {
    let unusable = || Error::new(Reason::Transport, "the endpoint must look like http://host:port");
    // Parsed here, because the library also takes paths of sockets.
    let uri: http::Uri = url.parse().map_err(|_carries_no_more| unusable())?;
    if uri.scheme_str() != Some("http") || uri.host().is_none_or(str::is_empty) {
        return Err(unusable());
    }
    let (interval, timeout) = link.keepalive();
    let (stream_window, connection_window) = link.windows();
    Ok(Endpoint::from(uri)
        .initial_stream_window_size(stream_window)
        .initial_connection_window_size(connection_window)
        .max_frame_size(FRAME_BYTES)
        .http2_max_header_list_size(HEADER_LIST_BYTES)
        .http2_max_local_error_reset_streams(Some(LOCAL_RESETS))
        .http2_keep_alive_interval(interval)
        .keep_alive_timeout(timeout)
        // A worker's connection is silent between calls, and its loss must be noticed all the same.
        .keep_alive_while_idle(link != Link::Client)
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true))
}

/// The public service.
pub fn attention_server<T: Attention>(service: T) -> AttentionServer<T> {
    AttentionServer::new(service).max_decoding_message_size(MESSAGE_BYTES)
}

/// The public service of sessions.
pub fn sessions_server<T: Sessions>(service: T) -> SessionsServer<T> {
    SessionsServer::new(service).max_decoding_message_size(MESSAGE_BYTES)
}

/// The service of a worker about shards of sessions.
pub fn shards_server<T: Shards>(service: T) -> ShardsServer<T> {
    ShardsServer::new(service).max_decoding_message_size(HOLD_REQUEST_BYTES)
}

/// The control service of the coordinator.
pub fn cluster_server<T: Cluster>(service: T) -> ClusterServer<T> {
    ClusterServer::new(service).max_decoding_message_size(CONTROL_MESSAGE_BYTES)
}

/// The bulk service of a worker.
pub fn worker_server<T: Worker>(service: T) -> WorkerServer<T> {
    WorkerServer::new(service).max_decoding_message_size(COMPUTE_REQUEST_BYTES)
}

/// Bytes that an entry of a repeated field takes in its message, with its tag and its length.
pub fn entry_bytes(entry: &impl prost::Message) -> usize {
    1 + prost::length_delimiter_len(entry.encoded_len()) + entry.encoded_len()
}

/// A stub of the public service.
pub fn attention_client(channel: Channel) -> AttentionClient<Channel> {
    AttentionClient::new(channel).max_decoding_message_size(MESSAGE_BYTES)
}

/// A stub of the public service of sessions.
pub fn sessions_client(channel: Channel) -> SessionsClient<Channel> {
    SessionsClient::new(channel).max_decoding_message_size(MESSAGE_BYTES)
}

/// A stub of a worker's service about shards of sessions.
pub fn shards_client(channel: Channel) -> ShardsClient<Channel> {
    ShardsClient::new(channel).max_decoding_message_size(MESSAGE_BYTES)
}

/// A stub of the control service.
pub fn cluster_client(channel: Channel) -> ClusterClient<Channel> {
    ClusterClient::new(channel).max_decoding_message_size(CONTROL_MESSAGE_BYTES)
}

/// A stub of a worker's bulk service.
pub fn worker_client(channel: Channel) -> WorkerClient<Channel> {
    WorkerClient::new(channel).max_decoding_message_size(MESSAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_fits_its_message_and_its_window() {
        const {
            assert!(CHUNK_BYTES < MESSAGE_BYTES);
            assert!(CHUNK_BYTES < COMPUTE_REQUEST_BYTES);
            assert!(OPERATOR_BYTES < COMPUTE_REQUEST_BYTES && COMPUTE_REQUEST_BYTES < MESSAGE_BYTES);
        }
        for link in [Link::Cluster, Link::Coordinator, Link::Client] {
            let (stream, _) = link.windows();
            assert!(CHUNK_BYTES <= stream as usize && FRAME_BYTES <= stream, "{link:?}");
        }
    }

    #[test]
    fn stalled_calls_leave_room_on_the_connection_of_a_worker() {
        let (stream, connection) = Link::Cluster.windows();
        assert!(connection / stream >= 64);
    }

    #[test]
    fn endpoints_must_be_http_urls() {
        assert!(endpoint("http://127.0.0.1:1", Link::Client).is_ok());
        for bad in ["", "127.0.0.1:1", "https://a:1", "unix:/tmp/x", "http://", "http://a b", "ftp://a"] {
            let error = endpoint(bad, Link::Cluster).unwrap_err();
            assert_eq!(error.message(), "TRANSPORT: the endpoint must look like http://host:port");
        }
    }
}
