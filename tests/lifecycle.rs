//! How processes start, find each other, and end.

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use attnd_client::{AttendOptions, Client, Progress, WorkerChoice};
use attnd_kernel::{Dims, Kernels};
use tokio::sync::oneshot;

use crate::support::cases::{Answer, Case};
use crate::support::cluster::Cluster;
use crate::support::eventually;
use crate::support::process::{Machine, Process, ProcessName, descendants, program, signal};

fn case(seed: u64) -> Case {
    let dims =
        Dims { batch: 1, heads: 8, kv_heads: 4, queries: 1000, keys: 2500, head_dim: 64, value_dim: 64 };
    Case::plain(seed, dims)
}

fn computed_here(case: &Case) -> Answer {
    case.compute(Kernels::available()[0])
}

async fn assert_right(client: &Client, case: &Case, wanted: &Answer, workers: WorkerChoice, what: &str) {
    let attended = client.attend(&case.operands, &case.options(workers), &mut |_| {}).await;
    Answer::from(attended.unwrap_or_else(|error| panic!("{what}: {error}"))).assert_bits_of(wanted, what);
}

/// `attnd local` with three workers, and the processes it consists of.
async fn local() -> (Process, Vec<ProcessName>) {
    let mut command = Command::new(program());
    command.args(["local", "--workers", "3"]);
    // A terminal gives each command a process group of its own, and Ctrl-C goes to all of it.
    command.process_group(0);
    let local = Process::spawn("local", command, &[]);
    let url = local.url();
    let client = Client::connect(&url).unwrap_or_else(|error| panic!("{url}: {error}"));
    let status = client.status().await.expect("the endpoint answers");
    assert_eq!(status.workers.len(), 3, "all workers have joined when the endpoint is printed");

    let case = case(1);
    assert_right(&client, &case, &computed_here(&case), WorkerChoice::Exactly(3), "attnd local").await;
    let parts = descendants(local.id());
    assert_eq!(parts.len(), 4, "a coordinator and three workers: {parts:?}");
    assert!(parts.iter().all(|part| part.runs()));
    (local, parts)
}

async fn wait_until_gone(parts: &[ProcessName], limit: Duration) {
    eventually(&format!("none of {parts:?} runs"), limit, async || {
        parts.iter().all(|part| !part.runs()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ctrl_c_ends_a_local_cluster_and_all_its_processes() {
    let _machine = Machine::shared();
    let (mut local, parts) = local().await;
    signal(&format!("-{}", local.id()), "INT");
    let status = local.wait_for_end(Duration::from_secs(5)).await;
    assert_eq!(status.code(), Some(0), "{status}");
    // It has waited for its children.
    assert!(parts.iter().all(|part| !part.runs()), "{parts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_of_a_local_cluster_leaves_no_process_behind() {
    let _machine = Machine::shared();
    let (mut local, parts) = local().await;
    local.kill();
    wait_until_gone(&parts, Duration::from_secs(2)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_comes_before_its_coordinator_joins_it_later() {
    // Nobody else may take the port meanwhile.
    let _machine = Machine::alone();
    // Stands in for the coordinator until the worker has knocked once.
    let early = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = early.local_addr().expect("a bound socket").to_string();
    let url = format!("http://{address}");
    let args =
        ["worker", "--coordinator", &url, "--listen", "127.0.0.1:0", "--id", "early", "--threads", "1"];
    let worker = Process::start_bound("early", &args, &[]);
    worker.url();
    drop(early.accept().expect("the worker tries to join"));
    drop(early);

    let coordinator = Process::start_bound("coordinator", &["coordinator", "--listen", &address], &[]);
    assert_eq!(coordinator.url(), url);
    let client = Client::connect(&url).expect("a URL");
    eventually("the early worker joins", Duration::from_secs(10), async || {
        let status = client.status().await.expect("the coordinator answers");
        (status.workers.len() == 1).then_some(())
    })
    .await;
    let case = case(2);
    assert_right(&client, &case, &computed_here(&case), WorkerChoice::Auto, "after joining late").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_at_the_same_time_do_not_mix() {
    let cluster = Cluster::start(3).await;
    let (one, other) = (cluster.client(), cluster.client());
    let cases: Vec<(Case, Answer)> = (3..6)
        .map(case)
        .map(|case| {
            let wanted = computed_here(&case);
            (case, wanted)
        })
        .collect();
    for round in 0..5 {
        let what = format!("round {round}");
        let [a, b, c] = &cases[..] else { panic!("three cases") };
        tokio::join!(
            // Two on one connection, the third on another.
            assert_right(&one, &a.0, &a.1, WorkerChoice::Exactly(3), &what),
            assert_right(&one, &b.0, &b.1, WorkerChoice::Exactly(2), &what),
            assert_right(&other, &c.0, &c.1, WorkerChoice::Exactly(3), &what),
        );
    }
    cluster.wait_until_idle(Duration::from_secs(1)).await;
}

/// Makes a call, and completes `begun` when it is on its workers: all has left this process, more than fits into what
/// lies in between, and the last group isn't computed.
async fn attend_and_tell(
    client: &Client,
    case: &Case,
    options: &AttendOptions,
    begun: oneshot::Sender<()>,
) -> Answer {
    let mut begun = Some(begun);
    let mut progress = |progress: Progress| {
        if let Progress::Sent { bytes, total } = progress
            && bytes == total
            && let Some(begun) = begun.take()
        {
            begun.send(()).expect("somebody waits for the call");
        }
    };
    let attended = client.attend(&case.operands, options, &mut progress).await;
    let attended = attended.unwrap_or_else(|error| panic!("a call in flight: {error}"));
    assert_eq!(attended.attempts, 1, "a call in flight ends where it began");
    attended.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_lets_calls_in_flight_finish_and_exits_with_0() {
    let mut cluster = Cluster::start(2).await;
    let client = cluster.client();
    let dims =
        Dims { batch: 1, heads: 8, kv_heads: 8, queries: 2000, keys: 4000, head_dim: 128, value_dim: 128 };
    let case = Case::plain(7, dims);
    let wanted = computed_here(&case);

    // A worker.
    let (tell, begun) = oneshot::channel();
    let options = case.options(WorkerChoice::Exactly(2));
    let terminate = async {
        begun.await.expect("the call is sent");
        cluster.worker(1).signal("TERM");
    };
    let (answer, ()) = tokio::join!(attend_and_tell(&client, &case, &options, tell), terminate);
    answer.assert_bits_of(&wanted, "while a worker drains");
    let status = cluster.worker(1).wait_for_end(Duration::from_secs(5)).await;
    assert_eq!(status.code(), Some(0), "worker: {status}");

    // The other one is enough, at once.
    assert_right(&client, &case, &wanted, WorkerChoice::AtMost(2), "after a worker has left").await;

    // The coordinator.
    let (tell, begun) = oneshot::channel();
    let options = case.options(WorkerChoice::Auto);
    let terminate = async {
        begun.await.expect("the call is sent");
        cluster.coordinator().signal("TERM");
    };
    let (answer, ()) = tokio::join!(attend_and_tell(&client, &case, &options, tell), terminate);
    answer.assert_bits_of(&wanted, "while the coordinator drains");
    let status = cluster.coordinator().wait_for_end(Duration::from_secs(5)).await;
    assert_eq!(status.code(), Some(0), "coordinator: {status}");

    // A worker alone, idle, without a coordinator.
    cluster.worker(0).signal("TERM");
    let status = cluster.worker(0).wait_for_end(Duration::from_secs(5)).await;
    assert_eq!(status.code(), Some(0), "worker without a coordinator: {status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_stands_still_for_a_while_loses_neither_workers_nor_calls() {
    const PAUSE: Duration = Duration::from_secs(3);
    let mut cluster = Cluster::start(2).await;
    let client = cluster.client();
    let dims =
        Dims { batch: 1, heads: 8, kv_heads: 8, queries: 2000, keys: 4000, head_dim: 128, value_dim: 128 };
    let case = Case::plain(8, dims);
    let options = case.options(WorkerChoice::Exactly(2));
    let (tell, begun) = oneshot::channel();
    let pause = async {
        begun.await.expect("the call is sent");
        cluster.coordinator().signal("STOP");
        tokio::time::sleep(PAUSE).await;
        let left: Vec<String> =
            (0..2).map(|i| cluster.worker(i).log()).filter(|log| log.contains("not joined")).collect();
        cluster.coordinator().signal("CONT");
        left
    };
    let (answer, left) = tokio::join!(attend_and_tell(&client, &case, &options, tell), pause);
    assert!(left.is_empty(), "{left:?}");
    answer.assert_bits_of(&computed_here(&case), "while the coordinator stood still");
    // Each worker has beaten since, and nobody died in between.
    cluster.wait_until_idle(Duration::from_secs(1)).await;
    cluster.wait_until_settled().await;
    let log = cluster.coordinator().log();
    assert!(log.matches("change=Admit").count() == 2 && !log.contains("change=Dead"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_whose_parent_is_gone_ends() {
    let _machine = Machine::shared();
    // A shell between this test and the worker: when it is killed, the pipe to the worker closes.
    let url = "http://127.0.0.1:9";
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg("sleep 1000 | \"$0\" worker --coordinator \"$1\" --listen 127.0.0.1:0 --exit-with-parent")
        .arg(program())
        .arg(url);
    let shell = Process::spawn("shell", command, &[]);
    shell.url();
    let parts = descendants(shell.id());
    let (sleeper, worker): (Vec<ProcessName>, Vec<ProcessName>) =
        parts.iter().partition(|part| is_sleep(part.id));
    assert_eq!((sleeper.len(), worker.len()), (1, 1), "{parts:?}");
    signal(&sleeper[0].id.to_string(), "KILL");
    wait_until_gone(&worker, Duration::from_secs(2)).await;
}

fn is_sleep(id: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|name| name.trim() == "sleep")
}
