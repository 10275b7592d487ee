//! Sessions that survive: workers killed at random moments of appends.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use attnd_client::session::{OpenOptions, QueryOptions, Session, Sessions, ShardDescription};
use attnd_client::{AttendOptions, Causal, ClientError, Dtype, Outcome};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::support::cases::Answer;
use crate::support::cluster::Cluster;
use crate::support::tokens::TokenShape;
use crate::support::{eventually, nightly};

const SHAPE: TokenShape = TokenShape { heads: 4, kv_heads: 2, dim: 64 };
const SCALE: f32 = 0.125;
/// Sessions are cut when they are longer.
const MOST_TOKENS: usize = 12_000;
/// For a replica to be made again.
const REPAIR: Duration = Duration::from_secs(15);

fn open(name: &str, replicas: usize, acks: usize) -> OpenOptions {
    let mut open = OpenOptions::new(1, SHAPE.heads, SHAPE.kv_heads, SHAPE.dim, Dtype::F32);
    open.name = Some(name.to_owned());
    (open.spec.replicas, open.spec.acks, open.spec.allow_same_host) = (replicas, acks, true);
    open
}

fn options() -> QueryOptions {
    let attend =
        AttendOptions { causal: Causal::BottomRight, scale: Some(SCALE), ..AttendOptions::default() };
    QueryOptions { attend, ..QueryOptions::default() }
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
        let attended = session.attend(0, SHAPE.queries(&asked), &options()).await;
        let attended = attended.unwrap_or_else(|error| panic!("{what}: {error}"));
        let answer = Answer { context: attended.context, lse: attended.lse };
        let wanted = SHAPE.answer(tokens, &asked, SCALE);
        self.wrong += u64::from(answer != wanted);
        answer.assert_bits_of(&wanted, what);
        self.looked += 1;
    }
}

/// Waits until all shards have as many replicas as they shall, on workers that run.
async fn repaired(cluster: &Cluster, sessions: &Sessions, session: &Session, what: &str) -> Duration {
    let (begun, names, replicas) = (Instant::now(), cluster.names(), session.spec().replicas);
    eventually(&format!("{what}: repaired"), REPAIR, async || {
        let description = sessions.describe(session.name().as_str()).await.ok()?;
        let is_whole = |shard: &ShardDescription| {
            shard.workers.len() == replicas
                && shard.workers.iter().all(|worker| names.contains(worker.as_str()))
        };
        description.shards.iter().all(is_whole).then_some(())
    })
    .await;
    begun.elapsed()
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
    let mut cluster = Cluster::start(3).await;
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
        let [k, v] = SHAPE.rows(&added);
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
        slowest_repair = slowest_repair.max(repaired(&cluster, &sessions, &session, &what).await);
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
