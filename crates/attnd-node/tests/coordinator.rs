//! A coordinator and workers in one process, over real sockets: exactness, refusals, and every way to lose a worker.

mod cluster;

use std::sync::Arc;
use std::time::{Duration, Instant};

use attnd_kernel::reference::reference_row;
use attnd_kernel::{AttnShape, Bias, Causal, Dims, Dtype, Operator, OperatorParts, slot};
use attnd_node::NodeError;
use attnd_node::coordinator::CoordinatorConfig;
use attnd_plan::{Element, SideLayout, SideTensor, Sides, WorkerChoice};
use attnd_wire::limits::STALL;
use attnd_wire::{AttendReply, AttendRequest, Commit, Error, Heartbeat, JoinRequest, Reason};
use cluster::{Cluster, Operands, begin, collect, eventually, masked};

/// Two batch elements, groups of two heads, an odd number of everything, more than one page of keys, and first rows
/// that see no key.
const DIMS: Dims =
    Dims { batch: 2, heads: 4, kv_heads: 2, queries: 1700, keys: 1501, head_dim: 9, value_dim: 7 };
const SEED: u64 = 0x5eed;

fn is_lost(error: &Error) -> bool {
    error.reason == Reason::WorkerLost && error.is_retryable()
}

/// The default scale and the causal rule of caches.
fn bottom_right(shape: &AttnShape) -> Arc<Operator> {
    Arc::new(Operator::plain(begin(shape).operator.scale(), Causal::BottomRight))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_exact_and_have_the_same_bits_on_one_and_two_workers() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 2).await;
    let shape = AttnShape::new(DIMS).unwrap();
    let operands = Operands::random(&shape, SEED);
    let mut answers = Vec::new();
    for workers in [WorkerChoice::Exactly(1), WorkerChoice::Exactly(2), WorkerChoice::Auto] {
        let begin = attnd_wire::Begin { workers, operator: bottom_right(&shape), ..begin(&shape) };
        let replies = cluster.attend(operands.requests(begin, 100_000), None).await.unwrap();
        let answer = collect(replies, &shape).await.unwrap();
        if let WorkerChoice::Exactly(n) = workers {
            assert_eq!(answer.plan.shares.len(), n);
        }
        assert_eq!(answer.done.empty_rows, 8 * 199);
        assert_eq!(answer.done.kernel_id, attnd_kernel::KERNEL_ID);
        let timings = answer.done.timings;
        for seconds in [timings.plan, timings.scatter, timings.compute, timings.gather, timings.merge] {
            assert!(seconds > 0.0 && seconds <= timings.total, "{timings:?}");
        }
        answers.push(answer);
    }
    let bits = |of: &[f32]| of.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for other in &answers[1..] {
        assert!(
            bits(&answers[0].context) == bits(&other.context) && bits(&answers[0].lse) == bits(&other.lse)
        );
    }
    let scale = f64::from(begin(&shape).operator.scale());
    let (q, k, v) = (&operands.q[..], &operands.k[..], &operands.v[..]);
    for head in 0..8 {
        for token in [0, 198, 199, 200, 1000, 1699] {
            let row = head * shape.n_queries() + token;
            let reference = reference_row(&shape, scale, Causal::BottomRight, (q, k, v), head, token);
            let context = &answers[0].context[row * shape.value_dim()..][..shape.value_dim()];
            let ratio = reference.worst_ratio(context, answers[0].lse[row]);
            assert!(ratio <= 1.0, "seed {SEED:#x} head {head} token {token}: {ratio} of the bound");
        }
    }
    let status = cluster.status().await;
    assert_eq!((status.calls_finished, status.calls_failed), (3, 0));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_call_is_named() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 1).await;
    let shape = AttnShape::new(Dims { queries: 5, keys: 3, ..DIMS }).unwrap();
    let operands = Operands::random(&shape, SEED);
    let all = || operands.requests(begin(&shape), 64);
    let bytes = operands.bytes() as u64;
    let chunks = all().len() as u32 - 2;

    let mut unordered = all();
    unordered.swap(3, 4);
    let mut twice = all();
    twice.insert(1, twice[0].clone());
    let mut too_long = all();
    too_long.push(too_long[1].clone());
    let mut short = all();
    short.remove(chunks as usize);
    short.pop();
    short.push(AttendRequest::Commit(Commit { chunks: chunks - 1, bytes: bytes - 4 }));
    let truncated = all()[..4].to_vec();
    let blind =
        attnd_wire::Begin { operator: bottom_right(&shape), forbid_empty_rows: true, ..begin(&shape) };
    let poisoned = {
        let mut operands = operands.clone();
        operands.k[20] = f32::NAN;
        operands.requests(begin(&shape), 64)
    };
    let overflowing = {
        let mut operands = operands.clone();
        operands.v.iter_mut().for_each(|x| *x = f32::MAX);
        operands.requests(begin(&shape), 1 << 20)
    };
    let too_many = attnd_wire::Begin { workers: WorkerChoice::Exactly(2), ..begin(&shape) };
    for (requests, text) in [
        (all()[1..].to_vec(), "STREAM_ORDER: expected Begin".to_owned()),
        (twice, "STREAM_ORDER: duplicate Begin".into()),
        (too_long, "STREAM_ORDER: frame after Commit".into()),
        (unordered, "CHUNK_ORDER: expected 2, got 3".into()),
        (short, format!("PAYLOAD_LENGTH: declared {}, got", bytes - 4)),
        (truncated, format!("STREAM_TRUNCATED: 3 chunks, 192 of {bytes} bytes, nothing applied")),
        (vec![], "STREAM_ORDER: expected Begin".into()),
        (operands.requests(blind, 64), "EMPTY_ROW: rows without a key: 16".into()),
        (poisoned, "NON_FINITE: k[h=0,pos=2,i=2] NaN".into()),
        (overflowing, "OUTPUT_OVERFLOW: head ".into()),
        (operands.requests(too_many, 64), "NO_WORKERS: 2 workers asked for, 1 alive".into()),
    ] {
        let replies = cluster.attend(requests, None).await.unwrap();
        let error = collect(replies, &shape).await.unwrap_err();
        assert!(error.message().starts_with(&text), "{} instead of {text}", error.message());
    }
    // After all of it, the cluster works.
    let replies = cluster.attend(all(), None).await.unwrap();
    collect(replies, &shape).await.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_too_many_is_refused_and_a_client_that_leaves_frees_everything() {
    let config = CoordinatorConfig { max_calls: 1, ..CoordinatorConfig::default() };
    let cluster = Cluster::start(config, 1).await;
    let shape = AttnShape::new(DIMS).unwrap();
    let operands = Operands::random(&shape, SEED);
    let (requests, mut replies) = cluster.begin_attend(begin(&shape)).await;
    // The first call has its place once its plan is here; a stream without Begin has none.
    assert!(replies.message().await.unwrap().is_some());
    let (no_begin, silent) = tokio::sync::mpsc::channel(1);
    let unbegun = cluster.open(silent, None).await.unwrap();
    let refused = cluster.attend(operands.requests(begin(&shape), 1 << 20), None).await.unwrap();
    let error = collect(refused, &shape).await.unwrap_err();
    assert_eq!(error.message(), "OVERLOADED: 1 running");
    assert!(error.is_retryable());
    eventually("the worker has memory reserved", || async {
        let workers = cluster.status().await.workers;
        workers[0].memory_used_bytes > 0 && workers[0].calls_in_flight == 1
    })
    .await;
    drop((requests, replies));
    eventually("its memory is back", || async {
        let status = cluster.status().await;
        // The stream without Begin is still there.
        status.calls_in_flight == 1 && status.workers[0].memory_used_bytes == 0
    })
    .await;
    let replies = cluster.attend(operands.requests(begin(&shape), 1 << 20), None).await.unwrap();
    collect(replies, &shape).await.unwrap();
    drop((no_begin, unbegun));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_dies_ends_its_calls_at_once_and_the_others_go_on() {
    let mut cluster = Cluster::start(CoordinatorConfig::default(), 2).await;
    let shape = AttnShape::new(DIMS).unwrap();
    let two = attnd_wire::Begin { workers: WorkerChoice::Exactly(2), ..begin(&shape) };
    let (requests, mut replies) = cluster.begin_attend(two).await;
    let planned = replies.message().await.unwrap().unwrap();
    assert!(
        matches!(AttendReply::decode(planned, &shape, None), Ok(AttendReply::Planned(plan)) if plan.shares.len() == 2)
    );
    let killed = Instant::now();
    cluster.kill_worker(1);
    let error = Error::from(replies.message().await.unwrap_err());
    assert!(is_lost(&error), "{error}");
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
    drop(requests);
    cluster.wait_for_workers(1).await;
    let operands = Operands::random(&shape, SEED);
    let replies = cluster.attend(operands.requests(begin(&shape), 1 << 20), None).await.unwrap();
    collect(replies, &shape).await.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whenever_a_worker_dies_the_answer_is_right_or_none() {
    const ROUNDS: usize = 12;
    let mut cluster = Cluster::start(CoordinatorConfig::default(), 1).await;
    let shape = AttnShape::new(Dims { keys: 6000, head_dim: 32, ..DIMS }).unwrap();
    let operands = Operands::random(&shape, SEED);
    let one = attnd_wire::Begin { workers: WorkerChoice::Exactly(1), ..begin(&shape) };
    let begun = Instant::now();
    let replies = cluster.attend(operands.requests(one.clone(), 1 << 20), None).await.unwrap();
    let right = collect(replies, &shape).await.unwrap();
    let whole = begun.elapsed();
    let two = attnd_wire::Begin { workers: WorkerChoice::Exactly(2), ..one };
    let mut lost = 0;
    for round in 1..=ROUNDS {
        cluster.start_worker().await;
        cluster.wait_for_workers(2).await;
        let replies = cluster.attend(operands.requests(two.clone(), 1 << 20), None).await.unwrap();
        let answer = tokio::spawn(async move { (collect(replies, &shape).await, Instant::now()) });
        tokio::time::sleep(whole * round as u32 / ROUNDS as u32).await;
        let killed = Instant::now();
        cluster.kill_worker(round);
        match answer.await.unwrap() {
            (Ok(answer), _) => assert!(answer.context == right.context && answer.lse == right.lse),
            (Err(error), at) => {
                assert!(is_lost(&error), "round {round}: {error}");
                let after = at.saturating_duration_since(killed);
                assert!(after < Duration::from_secs(1), "round {round}: {after:?}");
                lost += 1;
            }
        }
        cluster.wait_for_workers(1).await;
    }
    assert!(lost > 0, "every worker outlived its call");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_in_flight_are_finished_before_the_coordinator_ends() {
    let mut cluster = Cluster::start(CoordinatorConfig::default(), 1).await;
    let shape = AttnShape::new(Dims { queries: 5, keys: 3, ..DIMS }).unwrap();
    let (requests, replies) = cluster.begin_attend(begin(&shape)).await;
    eventually("the call runs", || async { cluster.status().await.calls_in_flight == 1 }).await;
    cluster.drain().await;
    let operands = Operands::random(&shape, SEED);
    for request in operands.requests(begin(&shape), 1 << 20).drain(1..) {
        requests.send(request.into()).await.unwrap();
    }
    collect(replies, &shape).await.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_do_not_finish_in_time_are_told_to_go_elsewhere() {
    let drain_deadline = Duration::from_millis(500);
    let config = CoordinatorConfig { drain_deadline, ..CoordinatorConfig::default() };
    let mut cluster = Cluster::start(config, 1).await;
    let shape = AttnShape::new(DIMS).unwrap();
    let (_requests, mut replies) = cluster.begin_attend(begin(&shape)).await;
    assert!(replies.message().await.unwrap().is_some());
    cluster.drain().await;
    let error = Error::from(replies.message().await.unwrap_err());
    assert_eq!(error.message(), "DRAINING: the time to finish is over");
    assert!(error.is_retryable());
    let ended = cluster.end_of_coordinator().await;
    assert!(matches!(ended, Err(NodeError::DrainDeadline { calls: 1, .. })), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_falls_silent_is_lost_within_its_time() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 0).await;
    let mute = cluster.join_mute_worker().await;
    let shape = AttnShape::new(DIMS).unwrap();
    let (requests, mut replies) = cluster.begin_attend(begin(&shape)).await;
    assert!(replies.message().await.unwrap().is_some());
    let error = tokio::time::timeout(Duration::from_secs(4), replies.message()).await.unwrap().unwrap_err();
    assert!(is_lost(&error.into()));
    cluster.wait_for_workers(0).await;
    drop((requests, mute));
    let (_requests, mut replies) = cluster.begin_attend(begin(&shape)).await;
    let error = Error::from(replies.message().await.unwrap_err());
    assert_eq!(error.message(), "NO_WORKERS: no worker is alive");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_leaves_its_join_stream_is_lost_at_once() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 0).await;
    let mute = cluster.join_mute_worker().await;
    let shape = AttnShape::new(DIMS).unwrap();
    let (_requests, mut replies) = cluster.begin_attend(begin(&shape)).await;
    assert!(replies.message().await.unwrap().is_some());
    let left = Instant::now();
    drop(mute);
    assert!(is_lost(&replies.message().await.unwrap_err().into()));
    assert!(left.elapsed() < Duration::from_millis(500), "{:?}", left.elapsed());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadlines_hold_although_a_worker_says_nothing() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 0).await;
    let mute = cluster.join_mute_worker().await;
    let shape = AttnShape::new(Dims { queries: 5, keys: 3, ..DIMS }).unwrap();
    let operands = Operands::random(&shape, SEED);
    let timeout = Duration::from_millis(300);
    let begun = Instant::now();
    let replies = cluster.attend(operands.requests(begin(&shape), 64), Some(timeout)).await.unwrap();
    let error = collect(replies, &shape).await.unwrap_err();
    assert_eq!(error.message(), "DEADLINE: expired");
    // Each hop keeps 5 ms for itself.
    let least = timeout - Duration::from_millis(10);
    assert!((least..Duration::from_secs(1)).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    drop(mute);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_reads_nothing_holds_the_client_back() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 0).await;
    let _mute = cluster.join_mute_worker().await;
    let shape = AttnShape::new(Dims { keys: 1 << 18, head_dim: 64, value_dim: 64, ..DIMS }).unwrap();
    let (requests, replies) = cluster.begin_attend(begin(&shape)).await;
    let data = bytes::Bytes::from(vec![0; 1 << 20]);
    let mut sent = 0;
    loop {
        let chunk = attnd_wire::TensorChunk {
            index: sent,
            tensor: attnd_plan::Tensor::K.into(),
            offset: None,
            data: data.clone(),
        };
        let sending = requests.send(AttendRequest::Chunk(chunk).into());
        match tokio::time::timeout(Duration::from_millis(300), sending).await {
            Ok(sent) => sent.unwrap(),
            Err(_held_back) => break,
        }
        sent += 1;
        // Queues of 4 on both sides, two windows of 2 MiB, and what is on its way between them.
        assert!(sent < 24, "{sent} chunks of 1 MiB are nowhere but in the coordinator's memory");
    }
    drop((requests, replies));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_beats_but_reads_nothing_is_lost_after_its_time() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 0).await;
    let _idle = cluster.join_idle_worker().await;
    let shape = AttnShape::new(Dims { keys: 1 << 15, head_dim: 64, value_dim: 64, ..DIMS }).unwrap();
    let operands = Operands::random(&shape, SEED);
    let begun = Instant::now();
    let replies = cluster.attend(operands.requests(begin(&shape), 1 << 20), None).await.unwrap();
    let error = tokio::time::timeout(STALL * 2, collect(replies, &shape)).await.unwrap().unwrap_err();
    assert_eq!(error.message(), "WORKER_LOST: idle: took no message for 10000 ms");
    assert!(error.is_retryable() && begun.elapsed() >= STALL, "{:?}", begun.elapsed());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_read_nothing_hold_nobody_up_and_lose_their_calls() {
    const STALLED: u64 = 9;
    let cluster = Cluster::start(CoordinatorConfig::default(), 1).await;
    // 32 MiB of context each: more than all queues and windows on its way take.
    let large =
        Dims { batch: 1, heads: 4, kv_heads: 4, queries: 1 << 14, keys: 1, head_dim: 1, value_dim: 128 };
    let large = AttnShape::new(large).unwrap();
    let operands = Operands::random(&large, SEED);
    let mut unread = Vec::new();
    for _ in 0..STALLED {
        let client = cluster.another_client().await;
        unread.push(cluster.attend_from(client, operands.requests(begin(&large), 1 << 20)).await);
    }
    // Every one of them has filled its queues: the worker has computed what it can hand over.
    eventually("the worker waits", || async {
        cluster.status().await.workers[0].calls_in_flight as u64 == STALLED
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(cluster.status().await.calls_in_flight, STALLED, "a call ended although nobody read it");
    let shape = AttnShape::new(DIMS).unwrap();
    let small = Operands::random(&shape, SEED).requests(begin(&shape), 1 << 20);
    let replies = cluster.attend(small, Some(Duration::from_secs(5))).await.unwrap();
    collect(replies, &shape).await.unwrap();
    let begun = Instant::now();
    while cluster.status().await.calls_failed < STALLED {
        assert!(begun.elapsed() < STALL * 2, "calls that nobody reads go on");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Their connections and streams are still there, and nobody reads them.
    eventually("nothing is left of them", || async { cluster.status().await.calls_in_flight == 0 }).await;
    for replies in unread {
        let error = collect(replies, &large).await.unwrap_err();
        assert_eq!(error.message(), "STREAM_IDLE: no reply taken for 10000 ms");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sums_that_overflow_both_ways_are_the_clients_doing() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 1).await;
    let dims = Dims { batch: 1, heads: 1, kv_heads: 1, queries: 2, keys: 512, head_dim: 1, value_dim: 1 };
    let shape = AttnShape::new(dims).unwrap();
    let mut operands = Operands::random(&shape, SEED);
    // All weights are equal: one page sums up to +inf, the other one to -inf, and both to NaN.
    operands.k.fill(0.0);
    operands.v[..256].fill(f32::MAX);
    operands.v[256..].fill(f32::MIN);
    let replies = cluster.attend(operands.requests(begin(&shape), 1 << 20), None).await.unwrap();
    let error = collect(replies, &shape).await.unwrap_err();
    assert_eq!(error.message(), "OUTPUT_OVERFLOW: head 0 row 0");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_doubles_may_not_join() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 0).await;
    let mute = cluster.join_mute_worker().await;
    let beat = || JoinRequest::Heartbeat(Heartbeat::default());
    assert_eq!(cluster.refusal_of_join(vec![beat()]).await.message(), "STREAM_ORDER: expected Hello");
    assert_eq!(cluster.refusal_of_join(vec![]).await.message(), "STREAM_ORDER: expected Hello");
    let hello = JoinRequest::Hello(mute.hello.clone());
    assert_eq!(cluster.refusal_of_join(vec![hello.clone()]).await.reason, Reason::WorkerId);
    let other = attnd_wire::Hello { worker: "other".parse().unwrap(), ..mute.hello.clone() };
    let foreign = JoinRequest::Hello(attnd_wire::Hello { kernel_id: "c2".into(), ..other.clone() });
    assert_eq!(cluster.refusal_of_join(vec![foreign]).await.reason, Reason::KernelMix);
    let newer = JoinRequest::Hello(attnd_wire::Hello { wire_version: 9, ..other.clone() });
    assert_eq!(cluster.refusal_of_join(vec![newer]).await.reason, Reason::Wire);
    let other = JoinRequest::Hello(other);
    assert_eq!(cluster.refusal_of_join(vec![other, hello]).await.message(), "STREAM_ORDER: duplicate Hello");
    cluster.wait_for_workers(1).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_cannot_be_reached_is_refused_and_fails_no_call() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 1).await;
    let mute = cluster.join_mute_worker().await;
    // Port 1 of this machine: nobody listens.
    let deaf = attnd_wire::Hello {
        worker: "deaf".parse().unwrap(),
        address: "http://127.0.0.1:1".into(),
        ..mute.hello.clone()
    };
    drop(mute);
    let error = cluster.refusal_of_join(vec![JoinRequest::Hello(deaf)]).await;
    assert_eq!(error.reason, Reason::Unreachable);
    let text = error.message();
    assert!(text.starts_with("UNREACHABLE: connect to the advertised address failed after "), "{text}");
    assert!(!text.contains("127.0.0.1"), "{text}");
    cluster.wait_for_workers(1).await;
    let shape = AttnShape::new(DIMS).unwrap();
    let operands = Operands::random(&shape, SEED);
    let replies = cluster.attend(operands.requests(begin(&shape), 1 << 20), None).await.unwrap();
    collect(replies, &shape).await.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_no_worker_may_be_used_it_is_said_who_is_there() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 0).await;
    let _mute = cluster.join_mute_worker().await;
    eventually("it missed its beats", || async { cluster.status().await.workers[0].state == "SUSPECT" })
        .await;
    let shape = AttnShape::new(DIMS).unwrap();
    let (_requests, mut replies) = cluster.begin_attend(begin(&shape)).await;
    let error = Error::from(replies.message().await.unwrap_err());
    assert_eq!(error.message(), "NO_WORKERS: no worker is alive; 1 suspect");
    cluster.stop().await;
}

/// Workers that count what they get, against what the elements of the mask say by themselves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mask_goes_to_the_workers_that_need_it_and_to_each_only_what_it_needs() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 0).await;
    let mut workers = Vec::new();
    for n in [1, 2, 4] {
        while workers.len() < n {
            workers.push(cluster.join_counting_worker(&format!("w{}", workers.len())).await);
        }
        cluster.wait_for_workers(n).await;
        for (kv_heads, dims, copies) in [
            (1, [1, 1, 40, 20_000], 1),
            (1, [1, 2, 40, 9_000], 1),
            (4, [1, 8, 1, 20_000], 1),
            (4, [1, 1, 40, 20_000], n as u64),
            (3, [1, 6, 40, 20_000], 1),
            (3, [1, 1, 40, 7_000], 0),
        ] {
            let heads = 2 * kv_heads;
            let keys = 20_000;
            let shape = Dims { batch: 1, heads, kv_heads, queries: 40, keys, head_dim: 1, value_dim: 1 };
            let shape = AttnShape::new(shape).unwrap();
            let begin = attnd_wire::Begin { workers: WorkerChoice::Exactly(n), ..masked(&shape, dims) };
            let operands = Operands::random(&shape, SEED);
            let whole: usize = dims.iter().product();
            let mut requests = operands.requests(begin, 1 << 20);
            let chunks: Vec<bytes::Bytes> =
                vec![1_u8; whole].chunks(300_000).map(bytes::Bytes::copy_from_slice).collect();
            // The mask before everything else, and all counted anew.
            for (at, data) in chunks.iter().enumerate() {
                let tensor = SideTensor::Mask.into();
                let chunk = attnd_wire::TensorChunk { index: 0, tensor, offset: None, data: data.clone() };
                requests.insert(1 + at, AttendRequest::Chunk(chunk));
            }
            for (index, request) in requests[1..].iter_mut().enumerate() {
                match request {
                    AttendRequest::Chunk(chunk) => chunk.index = index as u32,
                    AttendRequest::Commit(commit) => {
                        *commit = Commit { chunks: index as u32, bytes: commit.bytes + whole as u64 };
                    }
                    AttendRequest::Begin(_) => panic!("two Begins"),
                }
            }
            let mut replies = cluster.attend(requests, None).await.unwrap();
            let planned =
                AttendReply::decode(replies.message().await.unwrap().unwrap(), &shape, None).unwrap();
            let AttendReply::Planned(plan) = planned else { panic!("{planned:?}") };
            assert_eq!(plan.shares.len(), n);
            let mask = attnd_wire::proto::Tensor::Mask as i32;
            let got = |at: usize| workers[at].received().bytes.get(&mask).copied().unwrap_or(0);
            // What each share needs, element by element.
            let mut sum = 0;
            for (at, worker) in workers.iter().enumerate() {
                let share = plan.shares.iter().find(|share| share.worker.as_str() == worker.id).unwrap();
                let needs = |plane: usize, key: usize| {
                    share.pieces.iter().any(|piece| {
                        let group = |group: usize| dims[1] == 1 || plane / 2 == group;
                        piece.groups.clone().any(group)
                            && piece.slots.contains(&slot::slot_of_page(key / 256))
                    })
                };
                let keys = |plane: usize| (0..dims[3]).filter(|key| needs(plane, *key)).count();
                let wanted = (0..dims[1]).map(keys).sum::<usize>() * dims[2];
                eventually("the call is whole", || async { worker.received().is_whole }).await;
                assert_eq!(got(at), wanted as u64, "{n} workers, {dims:?}, worker {at}");
                sum += wanted as u64;
            }
            if copies > 0 {
                assert_eq!(sum, whole as u64 * copies, "{n} workers, {dims:?}");
            } else {
                // Of a plane for all heads, no more than each worker once, and everything somewhere.
                assert!((whole as u64..=(n * whole) as u64).contains(&sum), "{n} workers, {dims:?}");
            }
            drop(replies);
            let over = || async { cluster.status().await.calls_in_flight == 0 };
            eventually("the call is over", over).await;
            for worker in &workers {
                worker.forget();
            }
        }
    }
}

/// Memory of a bias is planned, so that one that doesn't fit is refused before a byte of it is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bias_that_does_not_fit_is_refused_with_numbers() {
    let cluster = Cluster::start(CoordinatorConfig::default(), 1).await;
    let dims =
        Dims { batch: 1, heads: 1, kv_heads: 1, queries: 65_536, keys: 65_536, head_dim: 1, value_dim: 1 };
    let shape = AttnShape::new(dims).unwrap();
    let parts = OperatorParts { biases: vec![Bias::Dense], ..OperatorParts::plain(1.0, Causal::None) };
    let float = Element::Float(Dtype::Bf16);
    let layout = SideLayout::dense(SideTensor::Bias, float, [1, 1, 65_536, 65_536], &shape).unwrap();
    let begin = attnd_wire::Begin {
        operator: Arc::new(Operator::new(parts, &shape).unwrap()),
        sides: Sides::new(vec![layout]).unwrap(),
        ..begin(&shape)
    };
    let (_requests, mut replies) = cluster.begin_attend(begin).await;
    let text = Error::from(replies.message().await.unwrap_err()).message();
    // An f32 and a bit for each element; the worker has 1 GiB.
    let bias = 65_536 * 65_536 * 4 + 65_536 * 65_536 / 8_u64;
    let need =
        text.strip_prefix("KV_BUDGET: need ").and_then(|rest| rest.split(',').next()?.parse::<u64>().ok());
    assert!(
        need.is_some_and(|need| (bias..bias + (64 << 20)).contains(&need)),
        "{text}, the bias takes {bias}"
    );
    assert!(text.ends_with("free 1073741824"), "{text}");
    cluster.stop().await;
}
