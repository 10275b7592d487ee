//! The actor alone: workers are channels that nobody answers.

use attnd_kernel::{AttnShape, Causal, Dims, Dtype, Operator};
use attnd_plan::Piece;
use attnd_plan::membership::MAX_FLAPS;
use attnd_wire::join::{GENERAL_PATH, OPERATORS};
use attnd_wire::{ComputeBegin, ComputeReply, Deadline, Link, limits};
use kameo::error::SendError;

use super::super::worker_actor::OpenShare;
use super::*;

fn compute_begin() -> ComputeBegin {
    let dims = Dims { batch: 1, heads: 1, kv_heads: 1, queries: 1, keys: 1, head_dim: 1, value_dim: 1 };
    ComputeBegin {
        call_id: 1,
        shape: AttnShape::new(dims).unwrap(),
        dtype: Dtype::F32,
        operator: Arc::new(Operator::plain(1.0, Causal::None)),
        outputs: None,
        sides: attnd_plan::Sides::default(),
        allow_non_finite: false,
        pieces: vec![Piece { groups: 0..1, slots: 0..64 }],
        tokens_per_cell: 1,
    }
}

fn hello(incarnation: u64) -> Hello {
    Hello {
        worker: "w1".parse().unwrap(),
        incarnation,
        address: "http://127.0.0.1:1".into(),
        wire_version: *WIRE_VERSIONS.end(),
        kernel_id: KERNEL_ID.into(),
        isa: "portable".into(),
        threads: 1,
        gflops: 100.0,
        memory_budget_bytes: 1000,
        version: "test".into(),
        host: "h1".into(),
        session_memory_bytes: 500,
    }
}

/// A Join over a channel that is never used.
fn join(incarnation: u64) -> Join {
    join_as("w1", incarnation)
}

fn join_as(worker: &str, incarnation: u64) -> Join {
    let hello = Hello { worker: worker.parse().unwrap(), ..hello(incarnation) };
    let channel = limits::endpoint(&hello.address, Link::Cluster).unwrap().connect_lazy();
    Join { hello, bulk: channel.clone(), channel }
}

async fn candidates(cluster: &ActorRef<MembershipActor>) -> Candidates {
    cluster.ask(Capacities { least_version: 1 }).send().await.unwrap()
}

#[tokio::test]
async fn a_candidate_says_where_it_is_and_what_sessions_leave_free() {
    let cluster = MembershipActor::spawn(watch::Sender::default());
    cluster.ask(join(5)).send().await.unwrap();
    let free = async || candidates(&cluster).await.usable.remove(0).keeper;
    let keeper = free().await;
    assert_eq!(
        (keeper.holder.worker.as_str(), keeper.holder.incarnation, keeper.host.as_str()),
        ("w1", 5, "h1")
    );
    assert_eq!((keeper.gflops, keeper.free_bytes), (100.0, 500));
    for (session_used_bytes, left) in [(200, 300), (501, 0)] {
        let heartbeat = Heartbeat { session_used_bytes, ..Heartbeat::default() };
        cluster.ask(Beat { worker: "w1".parse().unwrap(), incarnation: 5, heartbeat }).send().await.unwrap();
        assert_eq!(free().await.free_bytes, left);
        let seen = cluster.ask(Roster).send().await.unwrap().remove(0);
        assert_eq!((seen.host.as_str(), seen.session_memory_bytes), ("h1", 500));
        assert_eq!(seen.session_used_bytes, session_used_bytes);
    }
}

/// What a panic of the actor of a worker does, without the panic: the worker is dead.
async fn bury(cluster: &ActorRef<MembershipActor>, actor: &ActorRef<WorkerActor>) {
    actor.kill();
    let buried = async {
        while !cluster.ask(Roster).send().await.unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), buried).await.unwrap();
}

#[tokio::test]
async fn a_worker_whose_actor_dies_is_dead_and_may_come_back_as_another() {
    let cluster = MembershipActor::spawn(watch::Sender::default());
    let actor = cluster.ask(join(1)).send().await.unwrap();
    assert_eq!(candidates(&cluster).await.usable.len(), 1);
    bury(&cluster, &actor).await;
    match cluster.ask(join(1)).send().await {
        Err(SendError::HandlerError(error)) => assert_eq!(error.reason, Reason::IncarnationDead),
        other => panic!("{other:?}"),
    }
    assert!(cluster.ask(join(2)).send().await.is_ok());
    assert!(cluster.is_alive());
}

#[tokio::test]
async fn reserved_memory_is_not_offered_again() {
    let cluster = MembershipActor::spawn(watch::Sender::default());
    cluster.ask(join(1)).send().await.unwrap();
    let free = async || candidates(&cluster).await.usable[0].capacity.free_bytes;
    let usable = candidates(&cluster).await.usable;
    let held = usable[0].memory.reserve(600).unwrap();
    assert_eq!(free().await, 400);
    assert!(usable[0].memory.reserve(401).is_err(), "two calls can't plan on the same bytes");
    drop(held);
    assert_eq!(free().await, 1000);
}

#[tokio::test]
async fn a_quarantined_worker_is_used_where_there_is_no_other() {
    let cluster = MembershipActor::spawn(watch::Sender::default());
    for life in 0..=MAX_FLAPS as u64 {
        let actor = cluster.ask(join(life)).send().await.unwrap();
        if life < MAX_FLAPS as u64 {
            bury(&cluster, &actor).await;
        }
    }
    assert_eq!(cluster.ask(Roster).send().await.unwrap()[0].state, "QUARANTINED");
    let alone = candidates(&cluster).await;
    assert_eq!((alone.usable.len(), alone.unused), (1, Unused::default()));
    cluster.ask(join_as("w2", 9)).send().await.unwrap();
    let Candidates { usable, unused } = candidates(&cluster).await;
    assert_eq!((usable.len(), usable[0].capacity.id.to_string()), (1, "w2".into()));
    assert_eq!(unused.to_string(), "1 quarantined");
}

#[tokio::test]
async fn a_worker_that_a_share_cannot_connect_to_gets_nothing_for_a_while() {
    let cluster = MembershipActor::spawn(watch::Sender::default());
    cluster.ask(join(1)).send().await.unwrap();
    let candidate = candidates(&cluster).await.usable.remove(0);
    // Port 1 of this machine: nobody listens.
    let share = OpenShare {
        begin: compute_begin(),
        memory: candidate.memory.reserve(1).unwrap(),
        deadline: Deadline::after(Instant::now(), Duration::from_secs(5)),
    };
    let mut opened = candidate.actor.ask(share).send().await.unwrap();
    let error = opened.replies.recv().await.unwrap().unwrap_err();
    assert_eq!(error.message(), "TRANSPORT: connect failed");
    let Candidates { usable, unused } = candidates(&cluster).await;
    assert_eq!((usable.len(), unused.to_string()), (0, "1 not connected".into()));
}

/// Has a worker leave, with a goodbye or without, while a share waits for its answer; returns what the share hears of it.
async fn share_of_one_who_leaves(draining: bool) -> Option<Result<ComputeReply, Error>> {
    // Accepts connections and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", silent.local_addr().unwrap());
    let cluster = MembershipActor::spawn(watch::Sender::default());
    let channel = limits::endpoint(&address, Link::Cluster).unwrap().connect_lazy();
    let of = Join { hello: Hello { address, ..hello(1) }, bulk: channel.clone(), channel };
    let id = of.hello.worker.clone();
    cluster.ask(of).send().await.unwrap();
    let candidate = candidates(&cluster).await.usable.remove(0);
    let share = OpenShare {
        begin: compute_begin(),
        memory: candidate.memory.reserve(1).unwrap(),
        deadline: Deadline::after(Instant::now(), Duration::from_secs(60)),
    };
    let mut opened = candidate.actor.ask(share).send().await.unwrap();
    drop(candidate);
    let connection = silent.accept().await.unwrap();
    let heartbeat = Heartbeat { calls_in_flight: 1, draining, ..Heartbeat::default() };
    cluster.ask(Beat { worker: id.clone(), incarnation: 1, heartbeat }).send().await.unwrap();
    cluster.ask(Closed { worker: id, incarnation: 1 }).send().await.unwrap();
    assert!(cluster.ask(Roster).send().await.unwrap().is_empty());
    let hears = tokio::time::timeout(Duration::from_millis(100), opened.replies.recv()).await;
    match hears {
        Ok(at_once) => at_once,
        Err(_nothing_yet) => {
            drop((connection, silent));
            tokio::time::timeout(Duration::from_secs(5), opened.replies.recv()).await.unwrap()
        }
    }
}

#[tokio::test]
async fn what_a_drained_worker_said_last_is_still_read() {
    assert!(share_of_one_who_leaves(false).await.is_none(), "nobody waits for a dead worker");
    let until_the_connection_ended = share_of_one_who_leaves(true).await.unwrap();
    assert_eq!(until_the_connection_ended.unwrap_err().reason, Reason::Transport);
}

#[tokio::test]
async fn a_worker_of_an_older_version_gets_no_call_that_it_cannot_compute() {
    let cluster = MembershipActor::spawn(watch::Sender::default());
    let old = join(1);
    let old = Join { hello: Hello { wire_version: 1, ..old.hello }, ..old };
    cluster.ask(old).send().await.unwrap();
    assert_eq!(candidates(&cluster).await.usable.len(), 1);
    let Candidates { usable, unused } =
        cluster.ask(Capacities { least_version: OPERATORS }).send().await.unwrap();
    assert_eq!((usable.len(), unused.to_string()), (0, "1 too old for such a call".into()));
    cluster.ask(join_as("w2", 1)).send().await.unwrap();
    let Candidates { usable, .. } =
        cluster.ask(Capacities { least_version: OPERATORS }).send().await.unwrap();
    assert_eq!((usable.len(), usable[0].capacity.id.to_string()), (1, "w2".into()));

    let second = join_as("w3", 1);
    let second = Join { hello: Hello { wire_version: OPERATORS, ..second.hello }, ..second };
    cluster.ask(second).send().await.unwrap();
    let able = |least_version| cluster.ask(Capacities { least_version }).send();
    let Candidates { usable, .. } = able(OPERATORS).await.unwrap();
    assert_eq!(usable.len(), 2);
    let Candidates { usable, unused } = able(GENERAL_PATH).await.unwrap();
    assert_eq!((usable.len(), unused.to_string()), (1, "2 too old for such a call".into()));
}

#[tokio::test]
async fn there_is_an_end_to_joining() {
    let cluster = MembershipActor::spawn(watch::Sender::default());
    for n in 0..MAX_MEMBERS {
        cluster.ask(join_as(&format!("w{n}"), 1)).send().await.unwrap();
    }
    match cluster.ask(join_as("late", 1)).send().await {
        Err(SendError::HandlerError(error)) => {
            assert_eq!(error.message(), "OVERLOADED: 500 workers have joined");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn only_reasons_that_there_are_are_named() {
    let unused = Unused { suspect: 2, quarantined: 0, draining: 1, not_connected: 3, too_old: 0 };
    assert_eq!(unused.to_string(), "2 suspect, 1 draining, 3 not connected");
    assert_eq!(Unused::default().to_string(), "");
}
