//! The coordinator: takes calls from clients, plans them, forwards their bytes to workers and merges what comes back.
//!
//! * `join_service.rs` holds the control stream of each worker and reports to `membership_actor.rs`, which knows who
//!   is alive and has a `worker_actor.rs` for each of them.
//! * `attention_service.rs` admits calls. Each is an `attend_call.rs` in a task of its own: `placement.rs` finds its
//!   workers, `incoming.rs` hears their shares, `backlog.rs` bounds the partials that wait, `finish.rs` turns partials
//!   into rows, with `value_means.rs` where rows that see no key are to be the mean of the values.
//! * `meta_store.rs` has what outlives the process: which sessions there are, who holds them, and the term of this coordinator.
//! * `ending.rs` is the end of a coordinator that can't keep its promises any more.
//! * `reply_stream.rs` is how a task answers a stream; `tasks.rs` holds those tasks.
//!
//! Decisions are `attnd-plan`'s; here are their clocks, sockets and queues.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use attnd_kernel::Kernels;
use attnd_plan::CostModel;
use attnd_wire::{Link, Surroundings, limits, proto};
use kameo::actor::{ActorRef, Spawn};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::compute_pool::ComputePool;
use crate::listen::{self, Listener, MAX_CONNECTIONS};
use crate::shutdown::{Calls, DRAIN_DEADLINE, serve_until};
use crate::{NodeError, Platform};

pub(crate) mod attend_call;
mod attention_service;
mod backlog;
mod ending;
pub(crate) mod finish;
pub(crate) mod heat_rows;
mod hold_link;
mod incoming;
mod join_service;
mod membership_actor;
pub mod meta_store;
mod placement;
mod reply_stream;
pub(crate) mod second_pass;
mod sessions;
mod tasks;
pub(crate) mod value_means;
mod worker_actor;

use attention_service::AttentionService;
use ending::Ending;
use join_service::JoinService;
use membership_actor::MembershipActor;
use meta_store::{InMemory, MetaStore, MetaThread, RedbStore};
use sessions::{Sessions, SessionsService};
use tasks::Tasks;

/// What a coordinator is told by whoever starts it.
#[derive(Clone, Debug)]
pub struct CoordinatorConfig {
    /// Calls that may run at a time; one more is refused.
    pub max_calls: usize,
    /// Threads that plan and merge, at least one.
    pub merge_threads: usize,
    /// What the planner assumes about the machines.
    pub costs: CostModel,
    /// How long calls in flight may go on after the request to stop.
    pub drain_deadline: Duration,
    /// Directory for what is to outlive the process: which sessions there are, and who holds them. Without one they are forgotten
    /// with it.
    pub state: Option<PathBuf>,
}

impl Default for CoordinatorConfig {
    fn default() -> Self {
        Self {
            max_calls: 64,
            // Merging is bound by memory; more threads than this don't make it faster.
            merge_threads: std::thread::available_parallelism().map_or(1, |cores| cores.get().min(4)),
            costs: CostModel::default(),
            drain_deadline: DRAIN_DEADLINE,
            state: None,
        }
    }
}

/// What every call uses.
#[derive(Debug)]
pub(crate) struct Hub {
    cluster: ActorRef<MembershipActor>,
    pool: ComputePool,
    kernels: &'static Kernels,
    costs: CostModel,
    surroundings: Surroundings,
    ending: Ending,
}

/// The store of sessions, and the term of this life of the coordinator.
async fn open_meta(
    directory: Option<PathBuf>,
    given: Option<Arc<dyn MetaStore>>,
    ending: &Ending,
) -> Result<(MetaThread, u64), NodeError> {
    if let Some(store) = given.filter(|_| directory.is_none()) {
        let term = store.bump_term()?;
        return Ok((MetaThread::at_once(store, ending.clone()), term));
    }
    let store: Arc<dyn MetaStore> = match directory {
        None => {
            tracing::info!("sessions end with this process, and its term is 1");
            Arc::new(InMemory::new())
        }
        Some(directory) => {
            tracing::info!(directory = %directory.display(), "sessions and the term of this coordinator are kept");
            // Nothing else runs yet, but whoever called may have other tasks on this thread.
            let opening = tokio::task::spawn_blocking(move || RedbStore::open(&directory));
            Arc::new(opening.await.map_err(|_panic| NodeError::ActorGone("store of sessions"))??)
        }
    };
    let meta = MetaThread::start(store, ending.clone())?;
    let term = meta.run(|store| store.bump_term()).await?;
    Ok((meta, term))
}

type AttentionServer = proto::attention_server::AttentionServer<AttentionService>;

/// Serves as the coordinator until `shutdown`, then drains.
///
/// # Errors
/// What keeps it from starting, a broken part, or calls that had to be cut at the end.
pub async fn run(
    listener: TcpListener,
    config: CoordinatorConfig,
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
    config: CoordinatorConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), NodeError> {
    let listen = listener.local_addr().map_err(NodeError::Listen)?;
    let kernels = Kernels::from_env()?;
    let ending = Ending::default();
    let (meta, term) = open_meta(config.state, platform.meta.clone(), &ending).await?;
    // Each piece of work takes one thread.
    let pool = platform.pool(config.merge_threads, config.merge_threads)?;
    let (roll, members) = watch::channel(Arc::default());
    let cluster = MembershipActor::spawn(roll);
    let surroundings = platform.surroundings;
    let (costs, around) = (config.costs, surroundings.clone());
    let hub = Arc::new(Hub {
        cluster: cluster.clone(),
        pool,
        kernels,
        costs,
        surroundings: around,
        ending: ending.clone(),
    });
    let (calls, tasks) = (Calls::new(), Tasks::default());
    tracing::info!(%listen, isa = %kernels.isa(), max_calls = config.max_calls, term, "coordinator starts");

    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<AttentionServer>().await;
    let sessions = Arc::new(Sessions::new(Arc::clone(&hub), tasks.clone(), term, meta));
    sessions.recover().await?;
    let attention =
        AttentionService::new(hub, calls.clone(), config.max_calls, tasks.clone(), Arc::clone(&sessions));
    let join = JoinService::new(cluster.clone(), surroundings, tasks.clone());
    tasks.spawn(sessions::write_members(Arc::clone(&sessions)));
    tasks.spawn(sessions::keep_links(Arc::clone(&sessions), members));
    tasks.spawn(sessions::watch(Arc::clone(&sessions)));
    let exchange = SessionsService::new(sessions, calls.clone(), tasks.clone());
    // Clients may be far away. A worker that falls silent on the same port is noticed by its missing beats.
    let router = limits::server_builder(Link::Client)
        .add_service(health_service)
        .add_service(limits::attention_server(attention))
        .add_service(limits::sessions_server(exchange))
        .add_service(limits::cluster_server(join));
    let incoming = listen::incoming(listener, MAX_CONNECTIONS);
    let serve = |stop| router.serve_with_incoming_shutdown(incoming, stop);
    let on_drain = async {
        health.set_not_serving::<AttentionServer>().await;
        health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
    };
    let served = serve_until(shutdown, &calls, config.drain_deadline, serve, on_drain);

    let ended = tokio::select! {
        biased;
        ended = served => ended,
        why = ending.reason() => Err(why),
        () = cluster.wait_for_shutdown() => Err(NodeError::ActorGone("membership")),
    };
    tasks.abort_all();
    cluster.kill();
    cluster.wait_for_shutdown().await;
    ended
}
