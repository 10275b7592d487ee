//! Clusters of real processes on this machine: one coordinator and some workers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use attnd_client::{Client, ClusterStatus};
use attnd_kernel::Isa;

use super::eventually;
use super::process::{Alone, Process, alone};
use super::tap::Tap;

/// Time for a worker to join, or for a lost one to be missed.
const SETTLE: Duration = Duration::from_secs(20);

/// What a worker is started with.
#[derive(Clone)]
pub(crate) struct WorkerSpec {
    /// Its instruction set; the fastest of this machine if `None`.
    pub(crate) isa: Option<Isa>,
    /// Compute threads.
    pub(crate) threads: usize,
    /// MiB that sessions may take; what the program makes of it if `None`.
    pub(crate) session_mib: Option<u64>,
    /// What the coordinator connects to in its place.
    pub(crate) tap: Option<Arc<Tap>>,
}

impl Default for WorkerSpec {
    fn default() -> Self {
        Self { isa: None, threads: 1, session_mib: None, tap: None }
    }
}

/// A coordinator and its workers. All of them end with this value.
pub(crate) struct Cluster {
    // Fields are dropped in this order: workers first, and the machine is given to the next test last.
    workers: Vec<Worker>,
    coordinator: Process,
    url: String,
    client: Client,
    _alone: Alone,
}

struct Worker {
    spec: WorkerSpec,
    id: String,
    /// How often it was started.
    lives: u32,
    /// The process and the URL of its own service; `None` once it is killed.
    running: Option<(Process, String)>,
}

impl Worker {
    /// Starts it under a name that no earlier life had: a name that dies three times a minute is quarantined.
    fn start(&mut self, coordinator: &str) {
        self.lives += 1;
        let name = self.name();
        let threads = self.spec.threads.to_string();
        let args = ["worker", "--coordinator", coordinator, "--listen", "127.0.0.1:0"];
        let memory = self.spec.session_mib.map(|mib| format!("{mib}MiB"));
        let memory: Vec<&str> = memory.iter().flat_map(|bytes| ["--session-memory", bytes]).collect();
        let mut args = [&args[..], &["--id", &name, "--threads", &threads], &memory].concat();
        if let Some(tap) = &self.spec.tap {
            args.extend(["--advertise", tap.url()]);
        }
        let isa = self.spec.isa.map(Isa::name);
        let env: Vec<(&str, &str)> = isa.map(|isa| ("ATTND_ISA", isa)).into_iter().collect();
        let process = Process::start_bound(&name, &args, &env);
        let listens = process.url();
        let url = match &self.spec.tap {
            Some(tap) => {
                tap.lead_to(&listens);
                tap.url().to_owned()
            }
            None => listens,
        };
        self.running = Some((process, url));
    }

    /// Of this life.
    fn name(&self) -> String {
        if self.lives == 1 { self.id.clone() } else { format!("{}-{}", self.id, self.lives) }
    }

    fn process(&mut self) -> &mut Process {
        let id = &self.id;
        &mut self.running.as_mut().unwrap_or_else(|| panic!("{id} doesn't run")).0
    }
}

impl Cluster {
    /// A cluster of `workers` workers with one thread each.
    pub(crate) async fn start(workers: usize) -> Self {
        Self::with(vec![WorkerSpec::default(); workers]).await
    }

    /// A cluster with these workers, `w0`, `w1` and so on, all of them joined.
    pub(crate) async fn with(specs: Vec<WorkerSpec>) -> Self {
        let alone = alone();
        let coordinator =
            Process::start_bound("coordinator", &["coordinator", "--listen", "127.0.0.1:0"], &[]);
        let url = coordinator.url();
        let client = Client::connect(&url).expect("the coordinator prints a URL");
        let workers = specs.into_iter().enumerate();
        let workers =
            workers.map(|(i, spec)| Worker { spec, id: format!("w{i}"), lives: 0, running: None }).collect();
        let mut cluster = Self { workers, coordinator, url, client, _alone: alone };
        for i in 0..cluster.workers.len() {
            cluster.start_worker(i);
        }
        cluster.wait_until_settled().await;
        cluster
    }

    /// A client of its own.
    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.url).expect("the coordinator prints a URL")
    }

    /// Where the coordinator listens.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// The coordinator's process.
    pub(crate) fn coordinator(&mut self) -> &mut Process {
        &mut self.coordinator
    }

    /// Names of the workers that run.
    pub(crate) fn names(&self) -> BTreeSet<String> {
        self.workers.iter().filter(|worker| worker.running.is_some()).map(Worker::name).collect()
    }

    /// A worker's process.
    pub(crate) fn worker(&mut self, i: usize) -> &mut Process {
        self.workers[i].process()
    }

    /// Starts a worker that is not running; from its second life on it has a name of its own, such as `w0-2`.
    pub(crate) fn start_worker(&mut self, i: usize) {
        self.workers[i].start(&self.url);
    }

    /// Starts one worker more, the last of all.
    pub(crate) fn add_worker(&mut self, spec: WorkerSpec) {
        let id = format!("w{}", self.workers.len());
        self.workers.push(Worker { spec, id, lives: 0, running: None });
        self.start_worker(self.workers.len() - 1);
    }

    /// Ends a worker with SIGKILL.
    pub(crate) fn kill_worker(&mut self, i: usize) {
        self.workers[i].process().kill();
        self.workers[i].running = None;
    }

    /// Stops a worker from running at all, until [`Self::resume`].
    pub(crate) fn pause(&mut self, i: usize) {
        self.workers[i].process().signal("STOP");
    }

    /// Lets a paused worker go on.
    pub(crate) fn resume(&mut self, i: usize) {
        self.workers[i].process().signal("CONT");
    }

    /// What the coordinator says about itself.
    pub(crate) async fn status(&self) -> ClusterStatus {
        self.client
            .status()
            .await
            .unwrap_or_else(|error| panic!("status: {error}\n{}", self.coordinator.log()))
    }

    /// Waits until the coordinator counts exactly the workers that run, all of them active.
    pub(crate) async fn wait_until_settled(&self) {
        let running: BTreeSet<&str> =
            self.workers.iter().filter_map(|worker| Some(worker.running.as_ref()?.1.as_str())).collect();
        eventually(&format!("workers {running:?}"), SETTLE, async || {
            let status = self.status().await;
            let active = status.workers.iter().filter(|worker| worker.state.eq_ignore_ascii_case("active"));
            let active: BTreeSet<&str> = active.map(|worker| worker.address.as_str()).collect();
            (active == running && status.workers.len() == running.len()).then_some(())
        })
        .await;
    }

    /// Waits until no call is in flight and every worker has said, from now on, that it holds no memory and computes
    /// nothing; gives up after `limit`.
    pub(crate) async fn wait_until_idle(&self, limit: Duration) {
        let begun = Instant::now();
        eventually("memory and calls are gone", limit, async || {
            let status = self.status().await;
            let idle = status.workers.iter().all(|worker| {
                let said_since = worker.since_heartbeat < begun.elapsed();
                said_since && worker.memory_used_bytes == 0 && worker.calls_in_flight == 0
            });
            (idle && status.calls_in_flight == 0).then_some(())
        })
        .await;
    }
}
