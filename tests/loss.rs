//! Processes that vanish in the middle of a one-shot call: killed, paused, or hanging up.

use std::time::Duration;

use attnd_client::{Attended, Client, ClientError, Progress, Reason, WorkerChoice};
use attnd_kernel::{Dims, Dtype, Kernels};
use attnd_wire::{AttendRequest, limits, proto};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request};

use crate::support::cases::{Answer, Case};
use crate::support::cluster::{Cluster, WorkerSpec};
use crate::support::dense::{random_bias, random_mask};
use crate::support::{eventually, raw_call};

/// A call of a few tenths of a second.
fn call(seed: u64) -> Case {
    let dims =
        Dims { batch: 1, heads: 8, kv_heads: 4, queries: 1500, keys: 3000, head_dim: 128, value_dim: 128 };
    Case::plain(seed, dims)
}

fn computed_here(case: &Case) -> Answer {
    case.compute(Kernels::available()[0])
}

/// Makes the call; gives the result and when it came.
async fn attend(
    client: &Client,
    case: &Case,
    workers: WorkerChoice,
) -> (Result<Attended, ClientError>, Instant) {
    let result = client.attend(&case.operands, &case.options(workers), &mut |_| {}).await;
    (result, Instant::now())
}

/// How long the call takes undisturbed: the shortest of three.
async fn duration(client: &Client, case: &Case, wanted: &Answer, workers: WorkerChoice) -> Duration {
    let mut shortest = Duration::MAX;
    for _ in 0..3 {
        let begun = Instant::now();
        let (result, ended) = attend(client, case, workers).await;
        let answer = Answer::from(result.unwrap_or_else(|error| panic!("undisturbed: {error}")));
        answer.assert_bits_of(wanted, "undisturbed");
        shortest = shortest.min(ended - begun);
    }
    shortest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_one_of_three_workers_at_any_moment_leaves_the_bits_alone() {
    const KILLS: u32 = 20;
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); 3], None).await;
    let client = cluster.client();
    let case = call(1);
    let wanted = computed_here(&case);
    let workers = WorkerChoice::AtMost(3);
    let whole = duration(&client, &case, &wanted, WorkerChoice::Exactly(3)).await;

    let mut rng = SmallRng::seed_from_u64(20);
    let (mut felt, mut slowest) = (0, Duration::ZERO);
    for kill in 0..KILLS {
        // One moment in each twentieth of the call.
        let delay = whole.mul_f64((f64::from(kill) + rng.random_range(0.0..1.0)) / f64::from(KILLS));
        let victim = rng.random_range(0..3);
        let what = format!("kill {kill}: w{victim} after {delay:?} of {whole:?}");
        let strike = async {
            sleep(delay).await;
            let struck = Instant::now();
            cluster.kill_worker(victim);
            struck
        };
        let ((result, ended), struck) = tokio::join!(attend(&client, &case, workers), strike);
        let attended = result.unwrap_or_else(|error| panic!("{what}: {error}"));
        let took = ended.saturating_duration_since(struck);
        assert!(took < whole * 4 + Duration::from_secs(3), "{what}: answered {took:?} after the loss");
        felt += u32::from(attended.attempts > 1);
        slowest = slowest.max(took);
        Answer::from(attended).assert_bits_of(&wanted, &what);
        cluster.start_worker(victim);
        cluster.wait_until_settled().await;
    }
    println!(
        "{KILLS} kills, {felt} felt, 0 wrong, slowest answer {slowest:?} after the loss; undisturbed {whole:?}"
    );
    // Otherwise the kills were at the wrong moments, and nothing has been shown.
    assert!(felt >= KILLS / 4, "only {felt} of {KILLS} kills hit a worker that the call still needed");

    let (result, _) = attend(&client, &case, WorkerChoice::Exactly(3)).await;
    Answer::from(result.expect("a good call")).assert_bits_of(&wanted, "afterwards");
    cluster.wait_until_idle(Duration::from_secs(1)).await;
}

/// What travels beside the operands is sent again with them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_a_worker_in_the_middle_of_a_masked_call_leaves_the_bits_alone() {
    const KILLS: u32 = 6;
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); 2], None).await;
    let client = cluster.client();
    let mut case = call(3);
    let mut rng = SmallRng::seed_from_u64(22);
    case.dense_mask = Some(random_mask([1, 1, 1500, 3000], &mut rng));
    case.dense_bias = Some(random_bias([1, 8, 1, 2900], Dtype::F16, &mut rng));
    let wanted = computed_here(&case);
    let whole = duration(&client, &case, &wanted, WorkerChoice::Exactly(2)).await;
    let mut felt = 0;
    for kill in 0..KILLS {
        let delay = whole.mul_f64((f64::from(kill) + rng.random_range(0.0..1.0)) / f64::from(KILLS));
        let victim = rng.random_range(0..2);
        let what = format!("kill {kill}: w{victim} after {delay:?} of {whole:?}");
        let strike = async {
            sleep(delay).await;
            cluster.kill_worker(victim);
        };
        let ((result, _), ()) = tokio::join!(attend(&client, &case, WorkerChoice::AtMost(2)), strike);
        let attended = result.unwrap_or_else(|error| panic!("{what}: {error}"));
        felt += u32::from(attended.attempts > 1);
        Answer::from(attended).assert_bits_of(&wanted, &what);
        cluster.start_worker(victim);
        cluster.wait_until_settled().await;
    }
    assert!(felt > 0, "none of {KILLS} kills hit a worker that the call still needed");
    cluster.wait_until_idle(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn losing_the_only_worker_is_a_clear_error_within_a_second() {
    const KILLS: u32 = 8;
    const LIMIT: Duration = Duration::from_secs(1);
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); 1], None).await;
    let client = cluster.client();
    let case = call(2);
    let wanted = computed_here(&case);
    let whole = duration(&client, &case, &wanted, WorkerChoice::Auto).await;

    let mut rng = SmallRng::seed_from_u64(21);
    let (mut failed, mut slowest) = (0, Duration::ZERO);
    for kill in 0..KILLS {
        // Not in the last tenth, where the worker may have sent everything.
        let delay = whole.mul_f64(0.9 * (f64::from(kill) + rng.random_range(0.0..1.0)) / f64::from(KILLS));
        let what = format!("kill {kill} after {delay:?} of {whole:?}");
        let strike = async {
            sleep(delay).await;
            let struck = Instant::now();
            cluster.kill_worker(0);
            struck
        };
        let ((result, ended), struck) = tokio::join!(attend(&client, &case, WorkerChoice::Auto), strike);
        match result {
            Err(error) => {
                let took = ended.saturating_duration_since(struck);
                assert!(took <= LIMIT, "{what}: {error} came {took:?} after the loss");
                assert_eq!(error.reason.code(), Code::Unavailable, "{what}: {error}");
                assert!(matches!(error.reason, Reason::NoWorkers | Reason::WorkerLost), "{what}: {error}");
                failed += 1;
                slowest = slowest.max(took);
            }
            Ok(attended) => Answer::from(attended).assert_bits_of(&wanted, &what),
        }
        cluster.start_worker(0);
        cluster.wait_until_settled().await;
    }
    println!("{KILLS} kills of the only worker, {failed} errors, the slowest {slowest:?} after the loss");
    assert!(failed >= KILLS / 2, "only {failed} of {KILLS} calls noticed that their only worker was killed");

    let (result, _) = attend(&client, &case, WorkerChoice::Auto).await;
    Answer::from(result.expect("a good call")).assert_bits_of(&wanted, "afterwards");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_worker_is_given_up_and_the_call_comes_right() {
    const LIMIT: Duration = Duration::from_secs(6);
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); 3], None).await;
    let client = cluster.client();
    let case = call(3);
    let wanted = computed_here(&case);
    let whole = duration(&client, &case, &wanted, WorkerChoice::Exactly(3)).await;
    let mut felt = 0;
    for (victim, moment) in [(0, 0.0), (1, 0.3), (2, 0.6)] {
        let what = format!("w{victim} paused after {moment} of {whole:?}");
        let strike = async {
            sleep(whole.mul_f64(moment)).await;
            let struck = Instant::now();
            cluster.pause(victim);
            struck
        };
        let ((result, ended), struck) = tokio::join!(attend(&client, &case, WorkerChoice::AtMost(3)), strike);
        let attended = result.unwrap_or_else(|error| panic!("{what}: {error}"));
        let took = ended.saturating_duration_since(struck);
        assert!(took <= LIMIT, "{what}: answered {took:?} later");
        felt += u32::from(attended.attempts > 1);
        Answer::from(attended).assert_bits_of(&wanted, &what);
        // It comes back as another life of itself, and is of use again.
        cluster.resume(victim);
        cluster.wait_until_settled().await;
        let (result, _) = attend(&client, &case, WorkerChoice::Exactly(3)).await;
        let answer =
            Answer::from(result.unwrap_or_else(|error| panic!("{what}, after it came back: {error}")));
        answer.assert_bits_of(&wanted, &format!("{what}, after it came back"));
    }
    assert!(felt > 0, "no pause hit a worker that the call still needed");
    cluster.wait_until_idle(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn losing_the_coordinator_is_an_error_at_once() {
    for moment in [0.2, 0.6] {
        let mut cluster = Cluster::alone(vec![WorkerSpec::default(); 2], None).await;
        let client = cluster.client();
        let case = call(4);
        let wanted = computed_here(&case);
        let whole = duration(&client, &case, &wanted, WorkerChoice::Auto).await;
        let strike = async {
            sleep(whole.mul_f64(moment)).await;
            let struck = Instant::now();
            cluster.coordinator().kill();
            struck
        };
        let ((result, ended), struck) = tokio::join!(attend(&client, &case, WorkerChoice::Auto), strike);
        let error = result.expect_err("nobody is there to answer");
        let took = ended.saturating_duration_since(struck);
        assert!(took <= Duration::from_secs(1), "{error} came {took:?} after the loss");
        assert_eq!(error.reason, Reason::Transport, "{error}");
    }
}

/// How a client hangs up in the middle of its upload.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Vanish {
    /// Its process is gone, and so is the connection.
    Connection,
    /// It ends the stream without Commit.
    Stream,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_vanishes_in_its_upload_leaves_nothing_behind() {
    let cluster = Cluster::alone(vec![WorkerSpec::default(); 2], None).await;
    let case = call(5);
    let wanted = computed_here(&case);
    let mut rng = SmallRng::seed_from_u64(22);
    for vanish in [Vanish::Connection, Vanish::Stream] {
        let frames = raw_call::interleaved(&case, WorkerChoice::Exactly(2), 100_000, &mut rng);
        let half = frames.len() / 2;
        let (send, receive) = mpsc::channel(1);
        let url = cluster.url().to_owned();
        // Ends with all it holds, sockets too, like a process.
        let client = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let client = client.expect("a runtime");
        let exchange = client.spawn(async move {
            let mut stub = limits::attention_client(raw_call::channel(&url));
            let mut replies = stub.attend(Request::new(ReceiverStream::new(receive))).await?.into_inner();
            while replies.message().await?.is_some() {}
            Ok::<(), tonic::Status>(())
        });
        for frame in frames.into_iter().take(half) {
            assert!(!matches!(frame, AttendRequest::Commit(_)));
            send.send(proto::AttendRequest::from(frame)).await.expect("the call goes on");
        }
        eventually("workers hold memory for the call", Duration::from_secs(5), async || {
            let status = cluster.status().await;
            let used = status.workers.iter().all(|worker| worker.memory_used_bytes > 0);
            (used && status.calls_in_flight == 1).then_some(())
        })
        .await;
        if vanish == Vanish::Stream {
            drop(send);
            let status = exchange.await.expect("no panic").expect_err("half a call has no answer");
            assert_eq!(attnd_wire::Error::from(&status).reason, Reason::StreamTruncated, "{status}");
        }
        client.shutdown_background();
        cluster.wait_until_idle(Duration::from_secs(1)).await;

        let (result, _) = attend(&cluster.client(), &case, WorkerChoice::Exactly(2)).await;
        let answer = Answer::from(result.unwrap_or_else(|error| panic!("after {vanish:?}: {error}")));
        answer.assert_bits_of(&wanted, &format!("after {vanish:?}"));
    }
    let status = cluster.status().await;
    assert_eq!(
        (status.calls_finished, status.calls_failed),
        (2, 2),
        "half a call is no call that ended well"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_a_call_cancels_it_in_the_cluster() {
    let cluster = Cluster::alone(vec![WorkerSpec::default(); 2], None).await;
    let client = cluster.client();
    // Seconds of work, so that the cluster is still at it when the deadline of this test comes.
    let dims =
        Dims { batch: 1, heads: 16, kv_heads: 4, queries: 4000, keys: 12_000, head_dim: 128, value_dim: 128 };
    let case = Case::plain(6, dims);
    let options = case.options(WorkerChoice::Exactly(2));
    // In the middle of the upload, and in the middle of the answer.
    for in_answer in [false, true] {
        let (tell, reached) = oneshot::channel();
        let mut tell = Some(tell);
        let mut progress = |progress: Progress| {
            let reached = match progress {
                Progress::Sent { bytes, total } => !in_answer && bytes >= total / 2,
                Progress::Received { .. } => in_answer,
                Progress::Planned(_) => false,
            };
            if let Some(tell) = tell.take_if(|_| reached) {
                tell.send(()).expect("somebody waits");
            }
        };
        tokio::select! {
            result = client.attend(&case.operands, &options, &mut progress) => {
                panic!("it should have been dropped: {:?}", result.map(|attended| attended.timings));
            }
            moment = reached => moment.expect("the moment comes"),
        }
        cluster.wait_until_idle(Duration::from_secs(1)).await;
    }
    let status = cluster.status().await;
    assert_eq!((status.calls_finished, status.calls_failed), (0, 2));
    let case = call(7);
    let (result, _) = attend(&client, &case, WorkerChoice::Exactly(2)).await;
    Answer::from(result.expect("a good call")).assert_bits_of(&computed_here(&case), "afterwards");
}
