//! A coordinator and its workers, in a simulation.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use attnd_node::coordinator::meta_store::{InMemory, MetaStore};
use attnd_node::coordinator::{self, CoordinatorConfig};
use attnd_node::simulation::take_left;
use attnd_node::worker::{self, WorkerConfig};
use attnd_node::{Computing, NodeError, Platform};
use attnd_plan::WorkerId;
use tokio::sync::Notify;
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

/// The lives of all nodes: each is one process.
#[derive(Clone, Debug, Default)]
pub(super) struct Lives(Rc<RefCell<BTreeMap<String, Life>>>);

/// The life of a node that runs, or ran last.
#[derive(Debug)]
struct Life {
    stop: Rc<Notify>,
    ended: Option<Result<(), String>>,
}

impl Lives {
    /// A node begins; what it waits for to be asked to end.
    fn begin(&self, name: &str) -> Rc<Notify> {
        let stop = Rc::new(Notify::new());
        let life = Life { stop: Rc::clone(&stop), ended: None };
        self.0.borrow_mut().insert(name.to_owned(), life);
        stop
    }

    /// Asks a node to end, as SIGTERM does.
    pub(super) fn stop(&self, name: &str) {
        if let Some(life) = self.0.borrow().get(name) {
            life.stop.notify_one();
        }
    }

    /// How a node has ended by itself, if it has since this was asked.
    pub(super) fn ended(&self, name: &str) -> Option<Result<(), String>> {
        self.0.borrow_mut().get_mut(name)?.ended.take()
    }

    /// A node is at its end. Its process is, once its connections are closed from outside.
    async fn end(&self, name: &str, ended: Result<(), NodeError>, left: usize) {
        let ended = match ended {
            Ok(()) if left > 0 => Err(format!("{left} shards are left")),
            ended => ended.map_err(|error| error.to_string()),
        };
        if let Some(life) = self.0.borrow_mut().get_mut(name) {
            life.ended = Some(ended);
        }
        std::future::pending::<()>().await;
    }
}

/// Adds a coordinator, which has a store that outlives it, and its workers.
pub(super) fn build(sim: &mut Sim<'_>, chance: &Arc<Chance>, workers: usize) -> (Lives, Arc<dyn MetaStore>) {
    let lives = Lives::default();
    let meta: Arc<dyn MetaStore> = Arc::new(InMemory::counting_from(chance.random() >> 2));
    let computing = Computing::Tasks { gflops: 10.0 };
    let platform = Platform { surroundings: chance.surroundings(), computing, meta: Some(Arc::clone(&meta)) };
    let (on, all) = (platform.clone(), lives.clone());
    sim.host(COORDINATOR, move || {
        let (platform, lives) = (on.clone(), all.clone());
        async move {
            let stop = lives.begin(COORDINATOR);
            let config = CoordinatorConfig { merge_threads: 1, ..CoordinatorConfig::default() };
            let port = Port::open(COORDINATOR_PORT).await?;
            let ended = coordinator::run_on(platform, port, config, stop.notified()).await;
            lives.end(COORDINATOR, ended, 0).await;
            Ok(())
        }
    });
    for n in 0..workers {
        let (platform, all) = (Platform { meta: None, ..platform.clone() }, lives.clone());
        sim.host(worker_name(n), move || {
            let (platform, lives) = (platform.clone(), all.clone());
            async move {
                let name = worker_name(n);
                let (stop, id) = (lives.begin(&name), WorkerId::new(&*name)?);
                let config = WorkerConfig {
                    coordinator: COORDINATOR_URL.to_owned(),
                    advertise: Some(worker_url(n)),
                    id: Some(id.clone()),
                    threads: 1,
                    memory_budget: 64 << 20,
                    host: name.clone(),
                    session_memory: 64 << 20,
                    scrub_interval: Duration::ZERO,
                };
                let port = Port::open(WORKER_PORT).await?;
                let ended = worker::run_on(platform, port, config, stop.notified()).await;
                lives.end(&name, ended, take_left(&id)).await;
                Ok(())
            }
        });
    }
    (lives, meta)
}
