//! A worker: keeps the keys and values of its share of each call in memory and computes partials where they lie.
//!
//! * `service.rs` reads Begin and reserves memory (`../budget.rs`); from then on the call belongs to its `shard.rs` actor.
//! * A shard feeds frames to `intake.rs`, which checks their order and lets `assembly.rs` put the operands together,
//!   and `side.rs` what travels beside them; complete groups go to `cells.rs`, which computes on the pool, first other
//!   keys where a score function wants them (`keys.rs`), or keys and values of rows that came in their place (`projection.rs`),
//!   then, in `slices.rs`, partials, and sends these. Rows that have merged come back to `second_pass.rs`, where more is
//!   wanted than the context.
//! * Shards of sessions stay: `store.rs` has them, `hold_service.rs` the streams on which coordinators work on them.
//! * `membership.rs` is the actor of the control channel; `supervisor.rs` is the root of all of them.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use attnd_kernel::{KERNEL_ID, Kernels};
use attnd_plan::WorkerId;
use attnd_plan::topology::is_host_label;
use attnd_wire::join::WIRE_VERSIONS;
use attnd_wire::{Hello, Link, limits};
use kameo::actor::Spawn;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::compute_pool::ComputePool;
use crate::listen::{self, Listener, MAX_CONNECTIONS};
use crate::shutdown::{Calls, DRAIN_DEADLINE, serve_until};
use crate::{NodeError, Platform};

pub(crate) mod assembly;
pub(crate) mod cells;
pub(crate) mod hold_service;
mod intake;
mod keys;
mod membership;
mod projection;
pub(crate) mod second_pass;
mod service;
mod shard;
pub(crate) mod side;
pub(crate) mod slices;
pub(crate) mod store;
mod supervisor;
#[cfg(test)]
mod tests;

use crate::budget::Budget;
use hold_service::HoldService;
use membership::{Leave, MembershipArgs};
use service::WorkerService;
use store::Store;
use supervisor::Supervisor;

/// How long the speed of the compute threads is measured at start.
const CALIBRATION: Duration = Duration::from_millis(20);
/// Cells in the compute pool at a time. A large one takes all threads; the second has work for those that find nothing
/// more to do at the end of the first. With more, a thread that waits inside of one could take up one after another.
const CELLS_AT_ONCE: usize = 2;

/// How long sessions stay without any coordinator: one that starts again, or takes over, finds them.
const KEEP_WITHOUT_COORDINATOR: Duration = Duration::from_secs(600);

/// What a worker is told by whoever starts it.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// URL of the coordinator to join.
    pub coordinator: String,
    /// URL under which the coordinator reaches this worker; by default that of the listening socket.
    pub advertise: Option<String>,
    /// Its name in the cluster; by default `worker-` and 8 random hex digits, another for each life.
    pub id: Option<WorkerId>,
    /// Compute threads, at least one.
    pub threads: usize,
    /// Bytes that operands and partials of all calls may take.
    pub memory_budget: u64,
    /// Its failure domain, 1 to 64 characters of `[A-Za-z0-9._-]`: replicas of a session's shard are on different ones.
    pub host: String,
    /// Bytes that keys and values of all sessions may take, beside those of calls.
    pub session_memory: u64,
    /// Each full page of sessions is looked at about once in this time whether it is as it was written; zero: never.
    pub scrub_interval: Duration,
}

/// What [`WorkerConfig::scrub_interval`] is unless somebody says otherwise.
pub const SCRUB_INTERVAL: Duration = Duration::from_secs(600);

/// What a worker knows about itself at any moment.
#[derive(Clone, Debug)]
pub(crate) struct Gauges {
    budget: Arc<Budget>,
    calls: Calls,
    pool: ComputePool,
    sessions: Store,
}

/// Whether only processes on this machine reach what has this URL. A name that isn't `localhost` may be anything.
fn is_loopback(url: &str) -> bool {
    let Ok(uri) = url.parse::<tonic::transport::Uri>() else { return false };
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    match host.parse::<IpAddr>() {
        // To connect to a wildcard address is to connect to this machine.
        Ok(ip) => ip.to_canonical().is_loopback() || ip.is_unspecified(),
        Err(_name) => host.eq_ignore_ascii_case("localhost"),
    }
}

/// Serves as a worker until `shutdown`, then drains.
///
/// # Errors
/// What keeps it from starting, a refusal by the coordinator that won't change, or calls that had to be cut at the end.
pub async fn run(
    listener: TcpListener,
    config: WorkerConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), NodeError> {
    run_on(Platform::default(), listener, config, shutdown).await
}

/// The same, on another platform than this machine.
///
/// # Errors
/// As [`run`].
pub async fn run_on<L: Listener>(
    platform: Platform,
    listener: L,
    config: WorkerConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), NodeError> {
    let address = match &config.advertise {
        Some(url) => url.clone(),
        None => {
            let listen = listener.local_addr().map_err(NodeError::Listen)?;
            listen::url_of(listen).ok_or(NodeError::Advertise { listen })?
        }
    };
    limits::endpoint(&address, Link::Cluster).map_err(|_shown| NodeError::Url { url: address.clone() })?;
    let endpoint = limits::endpoint(&config.coordinator, Link::Coordinator)
        .map_err(|_shown| NodeError::Url { url: config.coordinator.clone() })?;

    if !is_host_label(&config.host) {
        return Err(NodeError::Host { host: config.host });
    }
    if is_loopback(&address) && !is_loopback(&config.coordinator) {
        return Err(NodeError::Loopback { address, coordinator: config.coordinator });
    }

    let kernels = Kernels::from_env()?;
    let pool = platform.pool(config.threads, CELLS_AT_ONCE)?;
    let gflops = pool
        .peak_gflops(kernels, CALIBRATION)
        .await
        .map_err(|_panic| NodeError::ActorGone("compute pool"))?;
    let budget = Budget::new(config.memory_budget);
    let sessions = Store::new(kernels, pool.clone(), Arc::clone(&budget), config.session_memory);
    let gauges = Gauges { budget, calls: Calls::new(), pool: pool.clone(), sessions: sessions.clone() };
    let surroundings = platform.surroundings;
    let incarnation = surroundings.random();
    let worker = match config.id {
        Some(id) => id,
        None => membership::default_id(incarnation)?,
    };
    tracing::info!(id = %worker, host = %config.host, %address, isa = %kernels.isa(), threads = pool.threads(), gflops, "worker starts");

    #[cfg(feature = "simulation")]
    let name = worker.clone();
    let hello = Hello {
        worker,
        incarnation,
        address,
        wire_version: *WIRE_VERSIONS.end(),
        kernel_id: KERNEL_ID.to_owned(),
        isa: kernels.isa().to_string(),
        threads: pool.threads(),
        gflops,
        memory_budget_bytes: gauges.budget.limit(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        host: config.host,
        session_memory_bytes: config.session_memory,
    };
    let (refused, mut refusal) = watch::channel(None);
    let supervisor =
        Supervisor::spawn(MembershipArgs { endpoint, surroundings, hello, gauges: gauges.clone(), refused });

    let (health, health_service) = tonic_health::server::health_reporter();
    let service = limits::worker_server(WorkerService {
        kernels,
        gauges: gauges.clone(),
        supervisor: supervisor.clone(),
    });
    let shards = limits::shards_server(HoldService { store: sessions.clone(), calls: gauges.calls.clone() });
    health.set_serving::<WorkerServer>().await;
    // It is the coordinator who connects to a worker.
    let router = limits::server_builder(Link::Coordinator)
        .add_service(health_service)
        .add_service(service)
        .add_service(shards);
    let incoming = listen::incoming(listener, MAX_CONNECTIONS);
    let serve = |stop| router.serve_with_incoming_shutdown(incoming, stop);
    let on_drain = async {
        health.set_not_serving::<WorkerServer>().await;
        health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
        supervisor.tell(Leave).send().await.ok();
        sessions.handed_over().await;
        #[cfg(feature = "simulation")]
        crate::simulation::left(&name, sessions.len());
    };
    let served = serve_until(shutdown, &gauges.calls, DRAIN_DEADLINE, serve, on_drain);

    let ended = tokio::select! {
        biased;
        ended = served => ended,
        Ok(refused) = refusal.wait_for(Option::is_some) => {
            Err(NodeError::Refused(refused.as_ref().map_or_else(String::new, ToString::to_string)))
        }
        () = supervisor.wait_for_shutdown() => Err(NodeError::ActorGone("supervisor")),
        // Never ends by itself.
        () = sessions.forget_when_left(KEEP_WITHOUT_COORDINATOR) => Ok(()),
        () = sessions.scrub(config.scrub_interval) => Ok(()),
    };
    supervisor.kill();
    supervisor.wait_for_shutdown().await;
    ended
}

type WorkerServer = attnd_wire::proto::worker_server::WorkerServer<WorkerService>;
