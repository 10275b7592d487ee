//! Clusters of real processes on this machine: one coordinator and some workers.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use attnd_client::session::{Sessions, ShardDescription, ShardHealth};
use attnd_client::{Client, ClusterStatus, Reason};
use attnd_kernel::Isa;

use super::eventually;
use super::process::{Machine, Process, program};
use super::proxy::Proxy;
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
    /// The coordinator reaches it through a proxy of its own.
    pub(crate) behind_proxy: bool,
}

impl Default for WorkerSpec {
    fn default() -> Self {
        Self { isa: None, threads: 1, session_mib: None, tap: None, behind_proxy: false }
    }
}

/// A coordinator and its workers. All of them end with this value.
pub(crate) struct Cluster {
    // Fields are dropped in this order: workers first, and the machine is given to the next test last.
    workers: Vec<Worker>,
    coordinator: Process,
    state: Option<PathBuf>,
    url: String,
    client: Client,
    _machine: Machine,
}

struct Worker {
    spec: WorkerSpec,
    id: String,
    proxy: Option<Proxy>,
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
        self.start_as(&name, coordinator);
    }

    fn start_as(&mut self, name: &str, coordinator: &str) {
        let threads = self.spec.threads.to_string();
        let args = ["worker", "--coordinator", coordinator, "--listen", "127.0.0.1:0"];
        let memory = self.spec.session_mib.map(|mib| format!("{mib}MiB"));
        let memory: Vec<&str> = memory.iter().flat_map(|bytes| ["--session-memory", bytes]).collect();
        let mut args = [&args[..], &["--id", name, "--threads", &threads], &memory].concat();
        args.extend(self.spec.tap.iter().flat_map(|tap| ["--advertise", tap.url()]));
        args.extend(self.proxy.iter().flat_map(|proxy| ["--advertise", proxy.url()]));
        let isa = self.spec.isa.map(Isa::name);
        let env: Vec<(&str, &str)> = isa.map(|isa| ("ATTND_ISA", isa)).into_iter().collect();
        let process = Process::start_bound(name, &args, &env);
        let mut url = process.url();
        if let Some(tap) = &self.spec.tap {
            tap.lead_to(&url);
            url = tap.url().to_owned();
        }
        if let Some(proxy) = &self.proxy {
            proxy.set_target(&url);
            url = proxy.url().to_owned();
        }
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
        Self::on(Machine::shared(), specs, None).await
    }

    /// The same, whose coordinator keeps its state in this directory, or nowhere, and with no other test's beside it.
    pub(crate) async fn alone(specs: Vec<WorkerSpec>, state: Option<&Path>) -> Self {
        Self::on(Machine::alone(), specs, state).await
    }

    async fn on(machine: Machine, specs: Vec<WorkerSpec>, state: Option<&Path>) -> Self {
        let coordinator = start_coordinator("127.0.0.1:0", state);
        let url = coordinator.url();
        let client = Client::connect(&url).expect("the coordinator prints a URL");
        let mut workers = Vec::new();
        for (i, spec) in specs.into_iter().enumerate() {
            let proxy = if spec.behind_proxy { Some(Proxy::start().await) } else { None };
            workers.push(Worker { spec, id: format!("w{i}"), proxy, lives: 0, running: None });
        }
        let state = state.map(Path::to_owned);
        let mut cluster = Self { workers, coordinator, state, url, client, _machine: machine };
        for i in 0..cluster.workers.len() {
            cluster.start_worker(i);
        }
        cluster.wait_until_settled().await;
        cluster
    }

    /// Ends the coordinator with SIGKILL.
    pub(crate) fn kill_coordinator(&mut self) {
        self.coordinator.kill();
    }

    /// Starts it again, where it was and with the state that it had.
    pub(crate) fn start_coordinator(&mut self) {
        self.coordinator = start_coordinator(self.url.trim_start_matches("http://"), self.state.as_deref());
        assert_eq!(self.coordinator.url(), self.url);
    }

    /// The same, and no file of its may become larger than so many bytes.
    pub(crate) fn start_coordinator_on_a_full_disk(&mut self, most: u64) {
        let args = coordinator_args(self.url.trim_start_matches("http://"), self.state.as_deref());
        let mut command = Command::new("sh");
        // In units of 512 bytes. What is larger is an error (EFBIG) where the signal for it is ignored.
        let limited =
            format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\" --exit-with-parent", most / 512);
        command.arg("-c").arg(limited).arg(program()).args(args);
        self.coordinator = Process::spawn("coordinator", command, &[]);
        assert_eq!(self.coordinator.url(), self.url);
    }

    /// The proxy before a worker.
    pub(crate) fn proxy(&self, i: usize) -> &Proxy {
        self.workers[i].proxy.as_ref().expect("a worker behind a proxy")
    }

    /// Starts a worker that is not running under the name that it had in its first life.
    pub(crate) fn start_worker_again(&mut self, i: usize) {
        let name = self.workers[i].id.clone();
        self.workers[i].start_as(&name, &self.url);
    }

    /// Waits until no worker holds more of sessions than one spare chunk.
    pub(crate) async fn wait_until_sessions_are_gone(&self) {
        eventually("the memory of sessions comes back", SETTLE, async || {
            let status = self.status().await;
            let is_empty = status.workers.iter().all(|worker| worker.session_used_bytes <= 2 << 20);
            is_empty.then_some(())
        })
        .await;
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
        assert!(!spec.behind_proxy, "only those of the beginning have proxies");
        let id = format!("w{}", self.workers.len());
        self.workers.push(Worker { spec, id, proxy: None, lives: 0, running: None });
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

    /// Waits until every shard of every session has all its replicas, on workers that run; gives up after `limit`. Returns how long it took.
    pub(crate) async fn wait_until_repaired(
        &self,
        sessions: &Sessions,
        limit: Duration,
        what: &str,
    ) -> Duration {
        let (begun, names) = (Instant::now(), self.names());
        loop {
            let missing = self.unrepaired(sessions, &names).await;
            let Some(missing) = missing else { return begun.elapsed() };
            assert!(
                begun.elapsed() < limit,
                "{what}: not repaired within {limit:?}: {missing}, on {names:?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// A session that lacks a replica, or isn't known not to.
    async fn unrepaired(&self, sessions: &Sessions, names: &BTreeSet<String>) -> Option<String> {
        let all = match sessions.list().await {
            Ok(all) => all,
            Err(error) => return Some(format!("no list: {error}")),
        };
        for name in all {
            match sessions.describe(name.as_str()).await {
                Ok(description) => {
                    let is_whole = |shard: &ShardDescription| {
                        shard.health == ShardHealth::Open
                            && shard.workers.len() == description.spec.replicas
                            && shard.workers.iter().all(|worker| names.contains(worker.as_str()))
                    };
                    if !description.shards.iter().all(is_whole) {
                        return Some(format!("{description:?}"));
                    }
                }
                // It was closed meanwhile.
                Err(error) if error.reason == Reason::Session => {}
                Err(error) => return Some(format!("{name}: {error}")),
            }
        }
        None
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

fn start_coordinator(listen: &str, state: Option<&Path>) -> Process {
    Process::start_bound("coordinator", &coordinator_args(listen, state), &[])
}

fn coordinator_args<'a>(listen: &'a str, state: Option<&'a Path>) -> Vec<&'a str> {
    let mut args = vec!["coordinator", "--listen", listen];
    args.extend(state.iter().flat_map(|state| ["--state", state.to_str().expect("a path that is text")]));
    args
}
