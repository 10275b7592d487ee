//! Sessions that survive: workers killed at random moments, all processes restarted; and what is left of those that are closed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use attnd_client::session::{OpenOptions, Session, Sessions};
use attnd_client::{ClientError, Outcome};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::support::cases::Answer;
use crate::support::cluster::{Cluster, WorkerSpec};
use crate::support::tokens::{RowShape, query_options};
use crate::support::{eventually, nightly};

const SHAPE: RowShape = RowShape { layers: 1, heads: 4, kv_heads: 2, head_dim: 64, value_dim: 64 };
/// Sessions are cut when they are longer.
const MOST_TOKENS: usize = 12_000;
/// For a replica to be made again.
const REPAIR: Duration = Duration::from_secs(15);

fn open(name: &str, replicas: usize, acks: usize) -> OpenOptions {
    let mut open = OpenOptions { name: Some(name.to_owned()), ..SHAPE.open() };
    (open.spec.replicas, open.spec.acks, open.spec.allow_same_host) = (replicas, acks, true);
    open
}

/// What must be true of a session, and how often it was looked at.
#[derive(Default)]
struct Checks {
    lost: u64,
    doubled: u64,
    wrong: u64,
    looked: u64,
}

impl Checks {
    /// The session has exactly these tokens.
    async fn look(&mut self, sessions: &Sessions, session: &Session, tokens: &[u64], what: &str) {
        let description = sessions.describe(session.name().as_str()).await;
        let description = description.unwrap_or_else(|error| panic!("{what}: {error}"));
        let len = description.tokens[0];
        self.lost += (tokens.len() as u64).saturating_sub(len);
        self.doubled += len.saturating_sub(tokens.len() as u64);
        assert_eq!(len, tokens.len() as u64, "{what}: tokens");
        let asked = [u64::MAX - len];
        let attended = session.attend(0, SHAPE.queries(0, &asked), &query_options(None)).await;
        let attended = attended.unwrap_or_else(|error| panic!("{what}: {error}"));
        let answer = Answer { context: attended.context, lse: attended.lse };
        let wanted = SHAPE.answer(0, tokens, &asked);
        self.wrong += u64::from(answer != wanted);
        answer.assert_bits_of(&wanted, what);
        self.looked += 1;
    }
}

/// Whether an append has happened that ended so: after an unknown outcome, whoever writes next finds out.
async fn has_happened(
    result: &Result<u64, ClientError>,
    sessions: &Sessions,
    session: &mut Session,
    before: usize,
    added: usize,
    what: &str,
) -> bool {
    let outcome = match result {
        Ok(len) => {
            assert_eq!(*len, (before + added) as u64, "{what}: the length that was acknowledged");
            return true;
        }
        Err(error) => error.outcome,
    };
    let again = OpenOptions { name: Some(session.name().to_string()), spec: session.spec().clone() };
    *session = sessions.open(again).await.unwrap_or_else(|error| panic!("{what}: opened again: {error}"));
    let len = session.len(0);
    let has = len == (before + added) as u64;
    assert!(has || len == before as u64, "{what}: {before} and {added} tokens, and there are {len}");
    match outcome {
        Outcome::NotExecuted => assert!(!has, "{what}: it is said not to have happened"),
        Outcome::Applied => assert!(has, "{what}: it is said to have happened"),
        Outcome::Unknown => {}
    }
    has
}

/// Kills workers in the middle of appends, of one token and of thousands; nothing that was acknowledged is lost, doubled or wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_workers_in_the_middle_of_appends_loses_and_doubles_nothing() {
    let kills = match std::env::var("ATTND_KILLS") {
        Ok(kills) => kills.parse().expect("ATTND_KILLS is a number"),
        Err(_) if nightly("1,000 kills in the middle of appends, 8 of them are tested") => 1000,
        Err(_) => 8,
    };
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); 3], None).await;
    let sessions = cluster.client().sessions();
    let mut session = sessions.open(open("survivor", 2, 2)).await.unwrap();
    let (mut tokens, mut next) = (Vec::<u64>::new(), 0..);
    let mut rng = SmallRng::seed_from_u64(1000);
    let (mut checks, mut failed) = (Checks::default(), BTreeMap::<String, u32>::new());
    let (mut slowest_repair, mut hit) = (Duration::ZERO, 0);
    // Of appends that nobody disturbs: short and long ones.
    let mut usual = [Duration::from_millis(2), Duration::from_millis(20)];
    for kill in 0..kills {
        let is_long = rng.random::<bool>();
        let n = if is_long { rng.random_range(1100..4000) } else { rng.random_range(1..20) };
        let added: Vec<u64> = next.by_ref().take(n).collect();
        let [k, v] = SHAPE.keys_and_values(0, &added);
        let delay = usual[usize::from(is_long)].mul_f64(rng.random_range(0.0..1.2));
        let victim = rng.random_range(0..3);
        let what = format!("kill {kill}: w{victim}, {delay:?} into an append of {n} to {}", tokens.len());
        let begun = Instant::now();
        let strike = async {
            tokio::time::sleep(delay).await;
            cluster.kill_worker(victim);
            Instant::now()
        };
        let append = async {
            let result = session.append(0, k, v).await.map(|appended| appended.len);
            (result, Instant::now())
        };
        let ((result, ended), struck) = tokio::join!(append, strike);
        if ended < struck {
            let usual = &mut usual[usize::from(is_long)];
            *usual = (*usual + (ended - begun)) / 2;
        } else {
            hit += 1;
        }
        if let Err(error) = &result {
            *failed.entry(format!("{:?}, {:?}", error.reason, error.outcome)).or_default() += 1;
        }
        cluster.start_worker(victim);
        if has_happened(&result, &sessions, &mut session, tokens.len(), n, &what).await {
            tokens.extend(added);
        }
        slowest_repair = slowest_repair.max(cluster.wait_until_repaired(&sessions, REPAIR, &what).await);
        checks.look(&sessions, &session, &tokens, &what).await;
        if tokens.len() > MOST_TOKENS {
            tokens.truncate(rng.random_range(0..2000));
            session
                .truncate(tokens.len() as u64)
                .await
                .unwrap_or_else(|error| panic!("{what}: cut: {error}"));
        }
    }
    let Checks { lost, doubled, wrong, looked } = checks;
    println!(
        "{kills} kills, {hit} before the append was answered: {lost} tokens lost, {doubled} doubled, {wrong} of {looked} answers wrong; \
         appends that failed: {failed:?}; slowest repair {slowest_repair:?}"
    );
}

/// Steps of one token, one after the other, each compared with what it must be.
struct Stepping {
    session: Session,
    tokens: Vec<u64>,
    /// Of each step, and how often it was sent.
    times: Vec<(Duration, u32)>,
}

impl Stepping {
    async fn open(sessions: &Sessions, name: &str, first: u64) -> Self {
        let mut session = sessions.open(open(name, 2, 2)).await.unwrap();
        let tokens: Vec<u64> = (first..first + 500).collect();
        let [k, v] = SHAPE.keys_and_values(0, &tokens);
        session.append(0, k, v).await.unwrap();
        Self { session, tokens, times: Vec::new() }
    }

    async fn step(&mut self) {
        let token = self.tokens[self.tokens.len() - 1] + 1;
        self.tokens.push(token);
        let ([k, v], q) = (SHAPE.keys_and_values(0, &[token]), SHAPE.queries(0, &[token]));
        let begun = Instant::now();
        let stepped = self.session.step(0, k, v, q, &query_options(None)).await;
        let took = begun.elapsed();
        let stepped = stepped.unwrap_or_else(|error| panic!("token {token}: {error} ({:?})", error.outcome));
        self.times.push((took, stepped.attended.attempts));
        assert_eq!(stepped.appended.len, self.tokens.len() as u64, "token {token}");
        let answer = Answer { context: stepped.attended.context, lse: stepped.attended.lse };
        answer.assert_bits_of(&SHAPE.answer(0, &self.tokens, &[token]), &format!("token {token}"));
    }

    /// Median and longest time since this was last asked, the latter with how often the step was sent.
    fn took(&mut self) -> (Duration, (Duration, u32)) {
        let mut times = std::mem::take(&mut self.times);
        times.sort();
        (times[times.len() / 2].0, times[times.len() - 1])
    }
}

/// Every worker is restarted, then the coordinator, and all the time two clients go on: none of their steps fails, and each has its bits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_of_everything_fails_no_step() {
    let state = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); 3], Some(state.path())).await;
    let ends = Arc::new(AtomicBool::new(false));
    let mut clients = Vec::new();
    for id in 0..2 {
        let (client, ends) = (cluster.client(), Arc::clone(&ends));
        clients.push(tokio::spawn(async move {
            let mut stepping = Stepping::open(&client.sessions(), &format!("rolling-{id}"), id << 32).await;
            while !ends.load(Ordering::Relaxed) {
                stepping.step().await;
            }
            stepping
        }));
    }
    let sessions = cluster.client().sessions();
    let both = eventually("two sessions", REPAIR, async || {
        let names = sessions.list().await.ok()?;
        (names.len() == 2).then_some(names)
    })
    .await;
    for worker in 0..3 {
        cluster.worker(worker).signal("TERM");
        let status = cluster.worker(worker).wait_for_end(Duration::from_secs(40)).await;
        assert_eq!(status.code(), Some(0), "w{worker} left with {status}");
        cluster.start_worker(worker);
        for name in &both {
            let description = sessions.describe(name.as_str()).await;
            let spec = description.unwrap_or_else(|error| panic!("{name} is there: {error}")).spec;
            assert_eq!(spec, open(name.as_str(), 2, 2).spec);
        }
    }
    cluster.coordinator().signal("TERM");
    let status = cluster.coordinator().wait_for_end(Duration::from_secs(40)).await;
    assert_eq!(status.code(), Some(0), "the coordinator left with {status}");
    cluster.start_coordinator();
    tokio::time::sleep(Duration::from_millis(500)).await;
    ends.store(true, Ordering::Relaxed);
    for client in clients {
        let mut stepping = client.await.expect("no step fails");
        let (steps, (median, longest)) = (stepping.times.len(), stepping.took());
        println!(
            "{steps} steps while all was restarted: 0 failed, 0 wrong, median {median:?}, longest {longest:?}"
        );
        assert!(steps > 50, "only {steps} steps");
        stepping.step().await;
    }
}

/// A worker is killed, and another one stops to run, while a client steps: it sees a slower answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_go_on_while_a_worker_is_killed_or_stands_still() {
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); 3], None).await;
    let sessions = cluster.client().sessions();
    let mut stepping = Stepping::open(&sessions, "goes-on", 0).await;
    for what in ["killed", "paused"] {
        for _ in 0..50 {
            stepping.step().await;
        }
        let (usual, _) = stepping.took();
        // Whoever computes is among all of them.
        for victim in 0..3 {
            let strike = async {
                tokio::time::sleep(usual / 2).await;
                match what {
                    "killed" => cluster.kill_worker(victim),
                    _ => cluster.pause(victim),
                }
            };
            tokio::join!(stepping.step(), strike);
            for _ in 0..20 {
                stepping.step().await;
            }
            match what {
                "killed" => cluster.start_worker(victim),
                _ => cluster.resume(victim),
            }
            cluster.wait_until_repaired(&sessions, REPAIR, what).await;
            let (median, (longest, sent)) = stepping.took();
            println!(
                "w{victim} {what}: 0 steps failed, 0 wrong; usual {usual:?}, then median {median:?}, longest {longest:?}, sent {sent} times"
            );
        }
    }
}

/// Bytes that a process has in memory.
fn resident(process: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{process}/statm")).expect("it runs");
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("a number of pages");
    pages * 4096
}

/// Memory of sessions that were closed comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_come_and_go_leave_nothing_behind() {
    let rounds =
        if nightly("10,000 sessions that come and go, of which 300 are tested") { 10_000 } else { 300 };
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); 2], None).await;
    let sessions = cluster.client().sessions();
    let tokens: Vec<u64> = (0..600).collect();
    let [k, v] = SHAPE.keys_and_values(0, &tokens);
    let round = async |n: u32| {
        let mut session = sessions.open(open(&format!("passing-{n}"), 1 + n as usize % 2, 1)).await.unwrap();
        session.append(0, k.clone(), v.clone()).await.unwrap();
        assert!(!session.close().await.unwrap(), "it was open");
    };
    for n in 0..50 {
        round(n).await;
    }
    let processes = [cluster.coordinator().id(), cluster.worker(0).id(), cluster.worker(1).id()];
    let before = processes.map(resident);
    for n in 0..rounds {
        round(n).await;
    }
    // One spare chunk of pages on each worker.
    eventually("memory of sessions is back", Duration::from_secs(5), async || {
        let used: u64 = cluster.status().await.workers.iter().map(|worker| worker.session_used_bytes).sum();
        (used <= 2 * (2 << 20)).then_some(())
    })
    .await;
    let grown: i64 = processes.map(resident).iter().sum::<u64>() as i64 - before.iter().sum::<u64>() as i64;
    println!("{rounds} sessions came and went: memory of all processes grew by {} KiB", grown / 1024);
    assert!(grown < 64 << 20, "memory grew by {grown} bytes over {rounds} sessions");
    assert!(sessions.list().await.unwrap().is_empty());
}
