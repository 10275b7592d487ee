//! Random operations on sessions by several clients, while workers are killed, paused and restarted, and the coordinator with them: every
//! answer is compared with what the session must have.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use attnd_client::session::{OpenOptions, QueryOptions, Session, Sessions};
use attnd_client::{Client, ClientError, Outcome};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::support::cases::Answer;
use crate::support::cluster::{Cluster, WorkerSpec};
use crate::support::nightly;
use crate::support::tokens::{RowShape, query_options};

const SHAPE: RowShape = RowShape { layers: 1, heads: 4, kv_heads: 2, head_dim: 32, value_dim: 32 };
const REPLICAS: usize = 2;
const WORKERS: usize = 4;
const CLIENTS: u64 = 3;
/// Sessions are cut when they are longer.
const MOST_TOKENS: usize = 3000;
/// For replicas to be made again, with all that is going on.
const REPAIR: Duration = Duration::from_secs(30);

/// How often what happened.
type Counts = BTreeMap<String, u64>;

fn count(counts: &mut Counts, what: impl Into<String>) {
    *counts.entry(what.into()).or_default() += 1;
}

/// A session, and the tokens that it must have.
struct Checked {
    session: Session,
    tokens: Vec<u64>,
    /// What an operation would have made of them whose outcome isn't known.
    or: Option<Vec<u64>>,
}

/// One client with its sessions, each of which it alone changes.
struct Writer {
    id: u64,
    sessions: Sessions,
    open: Vec<Checked>,
    /// Numbers of tokens, and of names, that were given out.
    next: u64,
    rng: SmallRng,
    counts: Counts,
    has_failed: Arc<AtomicBool>,
}

fn spec(name: String) -> OpenOptions {
    let mut open = OpenOptions { name: Some(name), ..SHAPE.open() };
    (open.spec.replicas, open.spec.acks, open.spec.allow_same_host) = (REPLICAS, REPLICAS, true);
    open
}

/// Time enough for all that happens to the processes.
fn options(at_len: Option<u64>) -> QueryOptions {
    let mut options = query_options(at_len);
    options.attend.timeout = Some(Duration::from_secs(60));
    options
}

impl Writer {
    fn new(url: &str, id: u64, seed: u64, has_failed: &Arc<AtomicBool>) -> Self {
        let client = Client::connect(url).expect("a URL");
        let rng = SmallRng::seed_from_u64(seed << 8 | id);
        Self {
            id,
            sessions: client.sessions(),
            open: Vec::new(),
            next: id << 40,
            rng,
            counts: Counts::new(),
            has_failed: Arc::clone(has_failed),
        }
    }

    fn new_tokens(&mut self, n: usize) -> Vec<u64> {
        let first = self.next;
        self.next += n as u64;
        (first..self.next).collect()
    }

    /// Writes down how an operation failed: nothing may, but then its outcome must be true. The first one ends the run, while processes
    /// still have their logs.
    fn failed(&mut self, what: &str, error: &ClientError) {
        self.has_failed.store(true, Ordering::Relaxed);
        count(&mut self.counts, format!("{what} of client {} FAILED: {error}, {:?}", self.id, error.outcome));
    }

    async fn open_one(&mut self) {
        self.next += 1;
        let name = format!("soak-{}", self.next);
        match self.sessions.open(spec(name)).await {
            Ok(session) => {
                count(&mut self.counts, "open");
                self.open.push(Checked { session, tokens: Vec::new(), or: None });
            }
            Err(error) => self.failed("open", &error),
        }
    }

    /// Finds out what became of an operation whose outcome isn't known.
    async fn settle(&mut self, at: usize) {
        let Some(or) = self.open[at].or.take() else { return };
        let name = self.open[at].session.name().to_string();
        match self.sessions.open(spec(name.clone())).await {
            Ok(session) => {
                let (len, before) = (session.len(0) as usize, self.open[at].tokens.len());
                assert!(
                    len == before || len == or.len(),
                    "{name}: {before} or {} tokens, not {len}",
                    or.len()
                );
                if len == or.len() {
                    self.open[at].tokens = or;
                }
                self.open[at].session = session;
                count(&mut self.counts, "settled");
            }
            Err(error) => {
                self.open[at].or = Some(or);
                self.failed("settle", &error);
            }
        }
    }

    /// What a mutation came to, that would have made the tokens `after`.
    fn settled(&mut self, at: usize, what: &str, result: Result<u64, ClientError>, after: Vec<u64>) -> bool {
        let checked = &mut self.open[at];
        match result {
            Ok(len) => {
                assert_eq!(len, after.len() as u64, "{}: {what}", checked.session.name());
                checked.tokens = after;
                count(&mut self.counts, what);
                true
            }
            Err(error) => {
                match error.outcome {
                    Outcome::NotExecuted => {}
                    Outcome::Applied => checked.tokens = after,
                    Outcome::Unknown => checked.or = Some(after),
                }
                self.failed(what, &error);
                false
            }
        }
    }

    async fn append(&mut self, at: usize, n: usize, what: &str) {
        let added = self.new_tokens(n);
        let [k, v] = SHAPE.keys_and_values(0, &added);
        let after = [&self.open[at].tokens[..], &added].concat();
        let result = self.open[at].session.append(0, k, v).await.map(|appended| appended.len);
        self.settled(at, what, result, after);
    }

    async fn step(&mut self, at: usize) {
        let n = self.rng.random_range(1..6);
        let added = self.new_tokens(n);
        let [k, v] = SHAPE.keys_and_values(0, &added);
        let (q, after) = (SHAPE.queries(0, &added), [&self.open[at].tokens[..], &added].concat());
        let stepped = self.open[at].session.step(0, k, v, q, &options(None)).await;
        let (result, attended) = match stepped {
            Ok(stepped) => (Ok(stepped.appended.len), Some(stepped.attended)),
            Err(error) => (Err(error), None),
        };
        if self.settled(at, "step", result, after)
            && let Some(attended) = attended
        {
            let answer = Answer { context: attended.context, lse: attended.lse };
            let wanted = SHAPE.answer(0, &self.open[at].tokens, &added);
            answer.assert_bits_of(&wanted, &format!("{}: a step", self.open[at].session.name()));
        }
    }

    async fn attend(&mut self, at: usize) {
        let len = self.open[at].tokens.len();
        if len == 0 {
            return;
        }
        let at_len = if self.rng.random() { len } else { self.rng.random_range(1..=len) };
        let asked = [self.next + 17];
        let attended =
            self.open[at].session.attend(0, SHAPE.queries(0, &asked), &options(Some(at_len as u64))).await;
        match attended {
            Ok(attended) => {
                let answer = Answer { context: attended.context, lse: attended.lse };
                let wanted = SHAPE.answer(0, &self.open[at].tokens[..at_len], &asked);
                answer.assert_bits_of(&wanted, &format!("{} at {at_len}", self.open[at].session.name()));
                count(&mut self.counts, "attend");
            }
            Err(error) => self.failed("attend", &error),
        }
    }

    async fn truncate(&mut self, at: usize) {
        let len = self.rng.random_range(0..=self.open[at].tokens.len().min(1000));
        let after = self.open[at].tokens[..len].to_vec();
        let result = self.open[at].session.truncate(len as u64).await.map(|()| len as u64);
        self.settled(at, "truncate", result, after);
    }

    /// The child takes the place of the parent, or goes on beside it.
    async fn fork(&mut self, at: usize) {
        self.next += 1;
        let child = format!("soak-{}", self.next);
        match self.open[at].session.fork(Some(&child)).await {
            Ok(session) => {
                count(&mut self.counts, "fork");
                let tokens = self.open[at].tokens.clone();
                assert_eq!(session.len(0), tokens.len() as u64, "{child}");
                self.open.push(Checked { session, tokens, or: None });
            }
            Err(error) => {
                if error.outcome != Outcome::NotExecuted {
                    self.open[at].or = Some(self.open[at].tokens.clone());
                }
                self.failed("fork", &error);
            }
        }
    }

    async fn close(&mut self, at: usize) {
        let mut checked = self.open.swap_remove(at);
        let sealed = checked.session.seal().await;
        if let Err(error) = &sealed {
            self.failed("seal", error);
        }
        match checked.session.close().await {
            Ok(_) => count(&mut self.counts, "close"),
            Err(error) => self.failed("close", &error),
        }
    }

    async fn run(mut self, ends: Arc<AtomicBool>) -> Counts {
        while !ends.load(Ordering::Relaxed) {
            if self.open.len() < 2 {
                self.open_one().await;
                continue;
            }
            let at = self.rng.random_range(0..self.open.len());
            if self.open[at].or.is_some() {
                self.settle(at).await;
                continue;
            }
            match self.rng.random_range(0..100) {
                0..35 => self.step(at).await,
                35..50 => {
                    let n = self.rng.random_range(1..40);
                    self.append(at, n, "append").await;
                }
                50..56 => {
                    let n = self.rng.random_range(2500..4500);
                    self.append(at, n, "append in chunks").await;
                }
                56..86 => self.attend(at).await,
                86..91 => self.fork(at).await,
                91..94 => self.truncate(at).await,
                _ if self.open.len() > 4 => self.close(at).await,
                _ => self.attend(at).await,
            }
            if self
                .open
                .get(at)
                .is_some_and(|checked| checked.tokens.len() > MOST_TOKENS && checked.or.is_none())
            {
                self.truncate(at).await;
            }
        }
        // At the end all of it is looked at once more.
        for at in 0..self.open.len() {
            self.settle(at).await;
            self.attend(at).await;
        }
        self.counts
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operations_come_right_whatever_happens_to_the_processes() {
    let seconds = match std::env::var("ATTND_SOAK") {
        Ok(seconds) => seconds.parse().expect("ATTND_SOAK is a number of seconds"),
        Err(_) if nightly("ten minutes of random operations and faults, of which 8 seconds are tested") => {
            600
        }
        Err(_) => 8,
    };
    let seed = std::env::var("ATTND_SEED").map_or(1, |seed| seed.parse().expect("ATTND_SEED is a number"));
    println!("ATTND_SEED={seed} ATTND_SOAK={seconds}");
    let state = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); WORKERS], Some(state.path())).await;
    let [ends, has_failed] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let writers: Vec<_> = (0..CLIENTS)
        .map(|id| tokio::spawn(Writer::new(cluster.url(), id + 1, seed, &has_failed).run(Arc::clone(&ends))))
        .collect();
    let sessions = cluster.client().sessions();
    let mut rng = SmallRng::seed_from_u64(seed);
    let (begun, mut counts) = (Instant::now(), Counts::new());
    let goes_on =
        || !has_failed.load(Ordering::Relaxed) && !writers.iter().any(|writer| writer.is_finished());
    while begun.elapsed() < Duration::from_secs(seconds) && goes_on() {
        tokio::time::sleep(Duration::from_millis(rng.random_range(50..1000))).await;
        let victim = rng.random_range(0..WORKERS);
        let what = match rng.random_range(0..10) {
            0..4 => {
                cluster.kill_worker(victim);
                cluster.start_worker(victim);
                "workers killed"
            }
            4..6 => {
                // Longer than it takes to be declared dead, or shorter.
                let pause = Duration::from_millis(rng.random_range(100..3000));
                cluster.pause(victim);
                tokio::time::sleep(pause).await;
                cluster.resume(victim);
                "workers paused"
            }
            6..8 => {
                cluster.worker(victim).signal("TERM");
                let status = cluster.worker(victim).wait_for_end(Duration::from_secs(40)).await;
                assert_eq!(status.code(), Some(0), "w{victim} left with {status}");
                cluster.start_worker(victim);
                "workers restarted"
            }
            _ => {
                cluster.kill_coordinator();
                cluster.start_coordinator();
                "coordinators killed"
            }
        };
        count(&mut counts, what);
        cluster.wait_until_repaired(&sessions, REPAIR, what).await;
    }
    ends.store(true, Ordering::Relaxed);
    for writer in writers {
        for (what, n) in writer.await.expect("no answer is wrong") {
            *counts.entry(what).or_default() += n;
        }
    }
    println!("{seconds} s, seed {seed}, violations 0: {counts:?}");
    let failed: Vec<&String> = counts.keys().filter(|what| what.contains("FAILED")).collect();
    assert!(failed.is_empty(), "operations failed: {counts:?}");
}
