//! How long workers compute for an answer that nobody waits for any more: `cargo bench -p attnd-tests --bench giving_up`.
//!
//! Not a test: figures are printed. Two workers with one thread each are in the middle of seconds of work, of a one-shot call and of a
//! session's queries, when the client drops the call, its process ends, or its time is over. Every two milliseconds their processor
//! time is read. Wanted: no processor time 100 ms after the client has gone, and 50 ms after the deadline.

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code, reason = "the tests use the rest of it")]
#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use attnd_client::session::{OpenOptions, QueryOptions, Session};
use attnd_client::{AttendOptions, Causal, Client, ClientError, Dims, Dtype, WorkerChoice};
use attnd_wire::Reason;
use bytes::Bytes;

use support::cases::Case;
use support::cluster::Cluster;

/// When the call is dropped, or how much time it is given. A one-shot call has mostly sent its operands by then, but for the first ones,
/// whose memory is new.
const INTO_THE_WORK: Duration = Duration::from_millis(1500);
const INTERVAL: Duration = Duration::from_millis(2);
/// Less than this in an interval is what idle workers take.
const IDLE: Duration = Duration::from_micros(500);
const WATCHED: Duration = Duration::from_millis(500);
const ROUNDS: usize = 10;

#[derive(Clone, Copy, Debug)]
enum End {
    Dropped,
    Gone,
    Deadline,
}

/// A client with threads and connections of its own, which end with it as those of a process do.
struct Elsewhere {
    runtime: tokio::runtime::Runtime,
}

impl Elsewhere {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Self { runtime: runtime.expect("a runtime") }
    }

    /// Begins some work and ends in the middle of it; returns when.
    async fn end_in<T>(self, work: impl Future<Output = Result<T, ClientError>> + Send + 'static) -> Instant {
        let done = self.runtime.spawn(async move { work.await.is_ok() });
        tokio::time::sleep(INTO_THE_WORK).await;
        assert!(!done.is_finished(), "it came to its end: more work is needed on this machine");
        let ended = Instant::now();
        self.runtime.shutdown_background();
        ended
    }
}

/// Processor time of all threads of a process, as the scheduler counts it.
fn processor_time(id: u32) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{id}/task")).expect("/proc is there");
    let of_thread = |path: std::path::PathBuf| -> Option<u64> {
        let text = std::fs::read_to_string(path.join("schedstat")).ok()?;
        text.split(' ').next()?.parse().ok()
    };
    Duration::from_nanos(tasks.filter_map(|task| of_thread(task.ok()?.path())).sum())
}

/// How long after `ended` the workers went on computing.
async fn watch(workers: &[u32], ended: Instant) -> Duration {
    let read = || workers.iter().map(|id| processor_time(*id)).sum::<Duration>();
    let (mut before, mut last) = (read(), Duration::ZERO);
    while ended.elapsed() < WATCHED {
        tokio::time::sleep(INTERVAL).await;
        let now = read();
        if now.saturating_sub(before) >= IDLE {
            last = ended.elapsed();
        }
        before = now;
    }
    last
}

/// Starts the work and ends it; returns when it ended.
async fn ended<T>(end: End, work: impl Future<Output = Result<T, ClientError>>) -> Instant {
    let begun = Instant::now();
    match end {
        End::Dropped | End::Gone => {
            let done = tokio::time::timeout(INTO_THE_WORK, work).await;
            assert!(done.is_err(), "it came to its end: more work is needed on this machine");
            Instant::now()
        }
        End::Deadline => {
            let error = work.await.err().expect("more work than this machine does in this time");
            assert_eq!(error.reason, Reason::Deadline, "{error}");
            assert!(
                begun.elapsed() + Duration::from_millis(50) >= INTO_THE_WORK,
                "after {:?}",
                begun.elapsed()
            );
            begun + INTO_THE_WORK
        }
    }
}

async fn one_shot(client: &Client, url: &str, case: &Arc<Case>, end: End) -> Instant {
    if matches!(end, End::Gone) {
        let (case, url) = (Arc::clone(case), url.to_owned());
        return Elsewhere::new()
            .end_in(async move {
                let client = Client::connect(&url).expect("an address");
                let options = case.options(WorkerChoice::Exactly(2));
                client.attend(&case.operands, &options, &mut |_| {}).await
            })
            .await;
    }
    let timeout = matches!(end, End::Deadline).then_some(INTO_THE_WORK);
    let options = AttendOptions { timeout, ..case.options(WorkerChoice::Exactly(2)) };
    ended(end, client.attend(&case.operands, &options, &mut |_| {})).await
}

async fn of_session(session: &Session, url: &str, q: &Bytes, end: End) -> Instant {
    let timeout = matches!(end, End::Deadline).then_some(INTO_THE_WORK);
    let attend = AttendOptions { causal: Causal::None, timeout, ..AttendOptions::default() };
    let options = QueryOptions { attend, ..QueryOptions::default() };
    if matches!(end, End::Gone) {
        let (name, url, q) = (session.name().clone(), url.to_owned(), q.clone());
        return Elsewhere::new()
            .end_in(async move {
                let sessions = Client::connect(&url).expect("an address").sessions();
                sessions.read(name.as_str()).await?.attend(0, q, &options).await
            })
            .await;
    }
    ended(end, session.attend(0, q.clone(), &options)).await
}

fn report(what: &str, end: End, went_on: &[Duration]) {
    let ms: Vec<String> = went_on.iter().map(|of| format!("{:.0}", of.as_secs_f64() * 1e3)).collect();
    println!("{what}, {end:?}: processor time for so many ms more: {}", ms.join(" "));
}

#[tokio::main]
async fn main() {
    let mut cluster = Cluster::start(2).await;
    let workers: Vec<u32> = (0..2).map(|i| cluster.worker(i).id()).collect();
    let (client, url) = (cluster.client(), cluster.url().to_owned());
    let dims =
        Dims { batch: 1, heads: 16, kv_heads: 4, queries: 8192, keys: 32_768, head_dim: 128, value_dim: 128 };
    let case = Arc::new(Case::plain(1, dims));
    for end in [End::Dropped, End::Gone, End::Deadline] {
        let mut went_on = Vec::new();
        for _ in 0..ROUNDS {
            let ended = one_shot(&client, &url, &case, end).await;
            went_on.push(watch(&workers, ended).await);
            cluster.wait_until_idle(Duration::from_secs(1)).await;
        }
        report("one-shot call", end, &went_on);
    }

    let sessions = client.sessions();
    let mut session = sessions.open(OpenOptions::new(1, 16, 4, 128, Dtype::F32)).await.expect("a session");
    let [q, k, v] = [&case.operands.q, &case.operands.k, &case.operands.v].map(Bytes::clone);
    session.append(0, k, v).await.expect("appended");
    for end in [End::Dropped, End::Gone, End::Deadline] {
        let mut went_on = Vec::new();
        for _ in 0..ROUNDS {
            let ended = of_session(&session, &url, &q, end).await;
            went_on.push(watch(&workers, ended).await);
        }
        report("queries of a session", end, &went_on);
    }
    session.close().await.expect("closed");
}
