//! A coordinator and its workers, in a simulation.

use std::sync::Arc;

use attnd_node::coordinator::meta_store::{InMemory, MetaStore};
use attnd_node::coordinator::{self, CoordinatorConfig};
use attnd_node::worker::{self, WorkerConfig};
use attnd_node::{Computing, Platform};
use attnd_plan::WorkerId;
use turmoil::Sim;

use super::network::{Chance, Port};

pub(super) const COORDINATOR: &str = "coordinator";
pub(super) const COORDINATOR_URL: &str = "http://coordinator:7400";
const COORDINATOR_PORT: u16 = 7400;
const WORKER_PORT: u16 = 7500;

/// The name of a worker, on the network and in the cluster.
pub(super) fn worker_name(n: usize) -> String {
    format!("w{n}")
}

/// Where a worker is.
pub(super) fn worker_url(n: usize) -> String {
    format!("http://{}:{WORKER_PORT}", worker_name(n))
}

/// Adds a coordinator and its workers.
pub(super) fn build(sim: &mut Sim<'_>, chance: &Arc<Chance>, workers: usize) {
    let meta: Arc<dyn MetaStore> = Arc::new(InMemory::counting_from(chance.random() >> 2));
    let computing = Computing::Tasks { gflops: 10.0 };
    let platform = Platform { surroundings: chance.surroundings(), computing, meta: Some(meta) };
    let on = platform.clone();
    sim.host(COORDINATOR, move || {
        let platform = on.clone();
        async move {
            let config = CoordinatorConfig { merge_threads: 1, ..CoordinatorConfig::default() };
            let port = Port::open(COORDINATOR_PORT).await?;
            Ok(coordinator::run_on(platform, port, config, std::future::pending()).await?)
        }
    });
    for n in 0..workers {
        let platform = Platform { meta: None, ..platform.clone() };
        sim.host(worker_name(n), move || {
            let platform = platform.clone();
            async move {
                let name = worker_name(n);
                let config = WorkerConfig {
                    coordinator: COORDINATOR_URL.to_owned(),
                    advertise: Some(worker_url(n)),
                    id: Some(WorkerId::new(&*name)?),
                    threads: 1,
                    memory_budget: 64 << 20,
                    host: name,
                    session_memory: 64 << 20,
                };
                let port = Port::open(WORKER_PORT).await?;
                Ok(worker::run_on(platform, port, config, std::future::pending()).await?)
            }
        });
    }
}
