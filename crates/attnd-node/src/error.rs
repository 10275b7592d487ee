//! Why a node could not start or did not end well. Errors of single calls are `attnd_wire::Error`, not these.

use std::time::Duration;

use crate::coordinator::meta_store::MetaError;

/// Ends of a node that its operator has to know about.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The listening socket is of no use.
    #[error("use the listening socket: {0}")]
    Listen(#[source] std::io::Error),
    /// The address that others should use can't be derived from the listening socket.
    #[error(
        "listening on {listen}, which is no address to reach this worker under; say --advertise http://HOST:PORT"
    )]
    Advertise {
        /// The wildcard address.
        listen: std::net::SocketAddr,
    },
    /// The address that others should use is on this machine, and the coordinator isn't.
    #[error(
        "{address} is no address under which the coordinator at {coordinator} reaches this worker; say --listen \
         0.0.0.0:PORT --advertise http://HOST:PORT, or --coordinator http://127.0.0.1:PORT if that is on this machine"
    )]
    Loopback {
        /// What would be advertised.
        address: String,
        /// URL of the coordinator.
        coordinator: String,
    },
    /// A URL that isn't one.
    #[error("{url:?} is no URL such as http://127.0.0.1:7400")]
    Url {
        /// What was given.
        url: String,
    },
    /// A worker id that isn't one.
    #[error(transparent)]
    WorkerId(#[from] attnd_plan::WorkerIdError),
    /// A failure domain that isn't one.
    #[error("host {host:?} must be 1 to 64 of A-Z a-z 0-9 . _ -; say --host LABEL")]
    Host {
        /// What was given.
        host: String,
    },
    /// The instruction set that was asked for is not there.
    #[error(transparent)]
    Isa(#[from] attnd_kernel::IsaError),
    /// The compute threads could not be started.
    #[error("start {threads} compute threads: {source}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system said.
        source: rayon::ThreadPoolBuildError,
    },
    /// A thread could not be started.
    #[error("start a thread: {0}")]
    Thread(#[source] std::io::Error),
    /// What is to outlive this process can't be kept.
    #[error(transparent)]
    State(#[from] MetaError),
    /// What is to outlive this process can't be kept any more.
    #[error(
        "the store of sessions fails and takes nothing more ({0}); start the coordinator again once that is mended"
    )]
    StateFailed(#[source] MetaError),
    /// Another coordinator has taken the sessions of this one over.
    #[error(
        "another coordinator has taken over {worker} ({why}): this one ends, since nothing that it says counts there"
    )]
    Replaced {
        /// Which worker says so.
        worker: attnd_plan::WorkerId,
        /// What it says.
        why: String,
    },
    /// The gRPC server ended by itself.
    #[error("serve: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// The coordinator refused this worker for good.
    #[error("the coordinator refuses this worker: {0}")]
    Refused(String),
    /// Calls were still running when the drain deadline passed; they were cut.
    #[error("{calls} calls still ran {deadline:?} after the request to stop, and were cut")]
    DrainDeadline {
        /// Calls in flight at that moment.
        calls: usize,
        /// How long the node waited.
        deadline: Duration,
    },
    /// A part of the node that the rest depends on is gone.
    #[error("the {0} is gone")]
    ActorGone(&'static str),
}

impl NodeError {
    /// The process exit code that says what kind of end this was, after sysexits.h.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Advertise { .. }
            | Self::Loopback { .. }
            | Self::Url { .. }
            | Self::WorkerId(_)
            | Self::Host { .. }
            | Self::State(MetaError::InUse { .. } | MetaError::Corrupt { .. } | MetaError::Version { .. })
            | Self::Isa(_) => 2,
            Self::DrainDeadline { .. } => 75,
            Self::ActorGone(_) | Self::StateFailed(_) => 70,
            Self::Replaced { .. } => 71,
            Self::Listen(_)
            | Self::Threads { .. }
            | Self::Thread(_)
            | Self::State(_)
            | Self::Serve(_)
            | Self::Refused(_) => 1,
        }
    }
}
