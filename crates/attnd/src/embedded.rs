//! A cluster of real processes on this machine, and how such processes know that they are to end.
//!
//! The children are this same program. Each one's stdin is a pipe that the parent holds open and never writes to: when
//! the parent ends, however it ends, the system closes the pipe, and a child that runs with `--exit-with-parent` takes
//! that as a request to stop. So nothing is left behind even after kill -9.

use std::ffi::OsString;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Stdio;
use std::sync::OnceLock;
use std::task::Poll;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use attnd_client::{Client, ClientError};
use attnd_node::NodeError;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::args::variables_of_verbs;
use crate::exit::Insisted;
use crate::output;
use crate::verbs::worker::{cores, memory};

/// The program to run as children instead of this one, for tests.
pub const PROGRAM_ENV: &str = "ATTND_BIN";
/// See [`started_by`].
static STARTED_BY: OnceLock<(PathBuf, Vec<OsString>)> = OnceLock::new();
/// What a node prints when it listens, before its URL.
const LISTENING: &str = "listening on ";
/// Time for a process to listen, and for all workers to join.
const START: Duration = Duration::from_secs(20);
/// Time for a process to end after it was asked to; then it is killed.
const STOP: Duration = Duration::from_secs(5);
/// Time for the coordinator to close its sessions.
const FORGET: Duration = Duration::from_secs(3);
/// Signals this close together are one request: `timeout` sends its own twice, to a process and to its group.
const SAME_REQUEST: Duration = Duration::from_millis(200);
/// Time between two looks at the workers that have joined.
const LOOK: Duration = Duration::from_millis(10);

/// Says how this program is started where its executable is another one, such as Python's: by `program`, with `before` in front of its
/// own arguments. The first word counts.
pub fn started_by(program: PathBuf, before: Vec<OsString>) {
    // Whoever said it first knows.
    STARTED_BY.set((program, before)).ok();
}

/// How large a local cluster is.
#[derive(Debug, Clone, Copy)]
pub struct LocalOptions {
    /// Worker processes, at least one.
    pub workers: usize,
    /// Compute threads of each; by default the cores, divided evenly.
    pub threads_per_worker: Option<usize>,
}

/// A coordinator and its workers, as processes. [`LocalCluster::stop`] ends them in order; dropping kills them.
#[derive(Debug)]
pub struct LocalCluster {
    endpoint: String,
    coordinator: Node,
    workers: Vec<Node>,
}

impl LocalCluster {
    /// Starts a cluster on free ports and waits until every worker has joined.
    ///
    /// # Errors
    /// If a process doesn't start, ends, or takes too long; nothing is left running then.
    pub async fn start(options: LocalOptions) -> anyhow::Result<Self> {
        Self::start_at(options, SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await
    }

    /// As [`Self::start`], with the coordinator at `listen`.
    pub async fn start_at(options: LocalOptions, listen: SocketAddr) -> anyhow::Result<Self> {
        let deadline = Instant::now() + START;
        let listen = listen.to_string();
        let (coordinator, endpoint) =
            Node::start("coordinator", &["coordinator", "--listen", &listen], deadline).await?;

        let threads =
            options.threads_per_worker.unwrap_or(cores() / options.workers.max(1)).max(1).to_string();
        // Each worker's part of this machine, as the defaults of one alone would have it.
        let part =
            |of_machine: u64| (memory() / of_machine / options.workers.max(1) as u64).max(1).to_string();
        let (for_calls, for_sessions) = (part(2), part(4));
        let mut starting = JoinSet::new();
        for i in 0..options.workers {
            let (endpoint, threads) = (endpoint.clone(), threads.clone());
            let (for_calls, for_sessions) = (for_calls.clone(), for_sessions.clone());
            starting.spawn(async move {
                let id = format!("w{i}");
                let args = ["worker", "--coordinator", &endpoint, "--listen", "127.0.0.1:0", "--id", &id];
                let of_machine =
                    ["--threads", &threads, "--memory", &for_calls, "--session-memory", &for_sessions];
                let args = [&args[..], &of_machine].concat();
                Node::start(&id, &args, deadline).await.map(|(node, _url)| (i, node))
            });
        }
        let mut workers = Vec::new();
        while let Some(started) = starting.join_next().await {
            workers.push(started.context("start a worker")??);
        }
        workers.sort_by_key(|(i, _)| *i);
        let workers = workers.into_iter().map(|(_, node)| node).collect();

        let mut cluster = Self { endpoint, coordinator, workers };
        cluster.wait_for_workers(deadline).await?;
        Ok(cluster)
    }

    async fn wait_for_workers(&mut self, deadline: Instant) -> anyhow::Result<()> {
        let client = Client::connect(&self.endpoint)?;
        let all = self.workers.len();
        loop {
            let seen = match client.status().await {
                Ok(status) => status.workers.iter().filter(|worker| worker.state == "ACTIVE").count(),
                Err(error) if Instant::now() >= deadline => return Err(error.into()),
                Err(_not_yet) => 0,
            };
            if seen >= all {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("{seen} of {all} workers joined within {} s", START.as_secs());
            }
            tokio::select! {
                (_, error) = self.first_to_end() => return Err(error),
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// URL of the coordinator.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Process ids of the workers `w0`, `w1`, ..., in that order.
    pub fn worker_pids(&self) -> Vec<u32> {
        self.workers.iter().filter_map(|worker| worker.child.id()).collect()
    }

    /// Process id of the coordinator; `None` once it has ended.
    #[allow(dead_code, reason = "for tests that kill it")]
    pub fn coordinator_pid(&self) -> Option<u32> {
        self.coordinator.child.id()
    }

    /// Waits until the coordinator or the last worker ends by itself. A cluster goes on with the workers it has.
    pub async fn ended(&mut self) -> anyhow::Error {
        loop {
            let (which, error) = self.first_to_end().await;
            match which {
                Some(worker) if self.workers.len() > 1 => {
                    tracing::warn!(%error, "the cluster goes on without it");
                    self.workers.remove(worker);
                }
                _ => return error,
            }
        }
    }

    /// Waits until one of the processes ends by itself: the place of a worker, or `None` for the coordinator.
    async fn first_to_end(&mut self) -> (Option<usize>, anyhow::Error) {
        let workers = self.workers.iter_mut().enumerate().map(|(i, node)| (Some(i), node));
        let nodes = std::iter::once((None, &mut self.coordinator)).chain(workers);
        let mut ends: Vec<_> = nodes.map(|(which, node)| (which, Box::pin(node.ended()))).collect();
        std::future::poll_fn(|cx| {
            let first = ends.iter_mut().find_map(|(which, end)| match end.as_mut().poll(cx) {
                Poll::Ready(error) => Some((*which, error)),
                Poll::Pending => None,
            });
            first.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// Ends the workers, then the coordinator: first by asking, then by force. Sessions end before, as all that could take them ends
    /// too, and a worker would wait for somebody who does.
    pub async fn stop(self) {
        if let Err(error) = tokio::time::timeout(FORGET, close_sessions(&self.endpoint)).await {
            tracing::warn!(%error, "sessions were not closed");
        }
        let mut stopping: JoinSet<()> = self.workers.into_iter().map(Node::stop).collect();
        while stopping.join_next().await.is_some() {}
        self.coordinator.stop().await;
    }
}

/// Closes all sessions of a coordinator, as far as it is there.
async fn close_sessions(endpoint: &str) {
    let close_all = async {
        let sessions = Client::connect(endpoint)?.sessions();
        for name in sessions.list().await? {
            sessions.close(name.as_str()).await?;
        }
        Ok::<(), ClientError>(())
    };
    if let Err(error) = close_all.await {
        tracing::info!(%error, "sessions are not closed");
    }
}

/// A child process. It is killed when this is dropped.
#[derive(Debug)]
struct Node {
    name: String,
    child: Child,
    /// Its stdin; kept apart from `child`, which closes its own when it is waited for.
    alive: Option<ChildStdin>,
}

impl Node {
    /// Starts a process and waits until it listens; gives its URL.
    async fn start(name: &str, args: &[&str], deadline: Instant) -> anyhow::Result<(Self, String)> {
        let (program, before) = match (std::env::var_os(PROGRAM_ENV), STARTED_BY.get()) {
            (Some(program), _) => (PathBuf::from(program), &[][..]),
            (None, Some((program, before))) => (program.clone(), &before[..]),
            (None, None) => (std::env::current_exe().context("find this program")?, &[][..]),
        };
        let mut command = Command::new(&program);
        command
            .args(before)
            .args(args)
            .arg("--exit-with-parent")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        // Ctrl-C reaches a whole process group; these are to be ended in order, by their parent.
        command.process_group(0).kill_on_drop(true);
        // What a child is to be, its flags say; a variable set for some other node would contradict them.
        for variable in variables_of_verbs() {
            command.env_remove(variable);
        }
        if std::env::var_os("ATTND_LOG").is_none() {
            command.env("ATTND_LOG", "warn");
        }
        let mut child = command.spawn().with_context(|| format!("start {}", program.display()))?;
        let alive = child.stdin.take();
        let mut node = Self { name: name.to_owned(), child, alive };
        let url = tokio::time::timeout_at(deadline, node.listening()).await;
        let url =
            url.map_err(|_elapsed| anyhow!("{name} does not listen within {} s", START.as_secs()))??;
        Ok((node, url))
    }

    /// Reads the URL that the process prints when it listens.
    async fn listening(&mut self) -> anyhow::Result<String> {
        let stdout = self.child.stdout.take().ok_or_else(|| anyhow!("{} has no stdout", self.name))?;
        let mut line = String::new();
        BufReader::new(stdout)
            .read_line(&mut line)
            .await
            .with_context(|| format!("read from {}", self.name))?;
        match line.trim_end().strip_prefix(LISTENING) {
            Some(url) => Ok(url.to_owned()),
            None if line.is_empty() => Err(self.ended().await),
            None => Err(anyhow!("{} says {line:?} instead of where it listens", self.name)),
        }
    }

    async fn ended(&mut self) -> anyhow::Error {
        match self.child.wait().await {
            Ok(status) => anyhow!("{} ended by itself: {status}", self.name),
            Err(error) => anyhow!("wait for {}: {error}", self.name),
        }
    }

    async fn stop(mut self) {
        // The end of its stdin is what the process waits for.
        drop(self.alive.take());
        if tokio::time::timeout(STOP, self.child.wait()).await.is_err() {
            tracing::warn!(name = self.name, "did not end when asked to and is killed");
            if let Err(error) = self.child.kill().await {
                tracing::warn!(name = self.name, %error, "kill");
            }
        }
    }
}

/// Prints where a node listens, for whoever started it.
///
/// # Errors
/// If stdout can't be written.
pub fn announce(address: SocketAddr) -> anyhow::Result<()> {
    output::line(&format!("{LISTENING}http://{address}"))
}

/// What asks a process to stop: SIGTERM, Ctrl-C, and the end of its parent if it was started that way.
#[derive(Debug)]
pub struct StopSignal {
    terminate: Signal,
    interrupt: Signal,
    parent: Option<oneshot::Receiver<()>>,
    /// When the first signal came.
    signalled: Option<Instant>,
}

impl StopSignal {
    /// Starts listening for them; nothing that comes from now on is missed.
    ///
    /// # Errors
    /// If the system refuses a handler or a thread.
    pub fn install(exit_with_parent: bool) -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
            parent: exit_with_parent.then(watch_parent).transpose()?,
            signalled: None,
        })
    }

    /// Completes with the first request.
    pub async fn requested(&mut self) {
        let parent = async {
            match &mut self.parent {
                // A watcher that is gone has seen the end too.
                Some(ended) => drop(ended.await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => tracing::info!("SIGTERM"),
            _ = self.interrupt.recv() => tracing::info!("SIGINT"),
            () = parent => {
                tracing::info!("the parent process ended");
                self.parent = None;
                return;
            }
        }
        self.signalled = Some(Instant::now());
    }

    /// Completes with a second signal, which somebody sends who doesn't want to wait. The end of the parent doesn't
    /// count: a service manager signals children too, and their parent ends at the same time.
    pub async fn insisted(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => {}
                _ = self.interrupt.recv() => {}
            }
            if self.signalled.get_or_insert_with(Instant::now).elapsed() >= SAME_REQUEST {
                return;
            }
        }
    }

    /// Runs a node, made by `node` from what tells it to stop, until it ends or somebody insists.
    ///
    /// # Errors
    /// The node's own, or [`Insisted`].
    pub async fn serve<N>(
        mut self,
        node: impl FnOnce(Pin<Box<dyn Future<Output = ()> + Send>>) -> N,
    ) -> anyhow::Result<()>
    where
        N: Future<Output = Result<(), NodeError>>,
    {
        let (tell, told) = oneshot::channel();
        let node = node(Box::pin(async { drop(told.await) }));
        let insisted = async {
            self.requested().await;
            // A node that has ended needs no telling.
            tell.send(()).ok();
            self.insisted().await;
        };
        tokio::select! {
            ended = node => Ok(ended?),
            () = insisted => Err(Insisted.into()),
        }
    }
}

/// Completes when stdin ends. A thread of its own reads it: tokio's stdin would keep the runtime from shutting down.
fn watch_parent() -> anyhow::Result<oneshot::Receiver<()>> {
    let (tell, ended) = oneshot::channel();
    let watch = move || {
        let mut stdin = std::io::stdin().lock();
        let mut ignored = [0; 64];
        loop {
            match stdin.read(&mut ignored) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_unreadable) => break,
            }
        }
        // A process that stops already needs no telling.
        tell.send(()).ok();
    };
    std::thread::Builder::new().name("attnd-parent".into()).spawn(watch).context("start a thread")?;
    Ok(ended)
}
