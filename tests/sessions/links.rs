//! Connections between a coordinator and workers that live: they break, and sessions go on with the same bits.

use std::time::{Duration, Instant};

use attnd_client::session::{QueryOptions, Session};
use attnd_client::{Dtype, Reason};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::{Sequence, dims};
use crate::support::cases::Answer;
use crate::support::cluster::{Cluster, WorkerSpec};
use crate::support::proxy::Swallows;

async fn behind_proxies(workers: usize) -> Cluster {
    Cluster::with(vec![WorkerSpec { behind_proxy: true, ..WorkerSpec::default() }; workers]).await
}

/// Steps by one token, and compares the row with the whole call's.
pub(crate) async fn step(session: &mut Session, sequence: &Sequence, token: usize, options: &QueryOptions) {
    let [k, v, q] = sequence.rows(token..token + 1);
    let stepped = session.step(0, k, v, q, options).await;
    let stepped = stepped.unwrap_or_else(|error| panic!("token {token}: {error:?}"));
    assert_eq!(stepped.appended.len, token as u64 + 1, "applied once");
    let answer = Answer { context: stepped.attended.context, lse: stepped.attended.lse };
    answer.assert_bits_of(&sequence.answer(token..token + 1), &format!("token {token}"));
}

async fn sessions_survive_resets(replicas: usize, acks: usize, seed: u64) {
    const TOKENS: usize = 300;
    let sequence = Sequence::new(seed, Dtype::F32, dims(4, 2, TOKENS as u64, 32, 32));
    let cluster = behind_proxies(2).await;
    let sessions = cluster.client().sessions();
    let options = sequence.options();
    let mut open = sequence.open(1);
    (open.spec.replicas, open.spec.acks, open.spec.allow_same_host) = (replicas, acks, true);
    let mut session = sessions.open(open).await.unwrap();
    let mut rng = StdRng::seed_from_u64(seed);
    let reset = async {
        for _ in 0..12 {
            tokio::time::sleep(Duration::from_millis(rng.random_range(5..60))).await;
            let proxy = cluster.proxy(rng.random_range(0..2));
            // Of the two connections to a worker often only one.
            match rng.random_range(0..3) {
                2 => proxy.reset(),
                n => proxy.reset_one(n),
            }
        }
    };
    let steps = async {
        for token in 0..TOKENS {
            step(&mut session, &sequence, token, &options).await;
        }
        // In chunks, over the other connection.
        session.truncate(100).await.unwrap();
        let [k, v, _] = sequence.rows(100..TOKENS);
        session.append(0, k, v).await.unwrap();
        let [_, _, q] = sequence.rows(200..TOKENS);
        let attended = session.attend(0, q, &options).await.unwrap();
        let answer = Answer { context: attended.context, lse: attended.lse };
        answer.assert_bits_of(&sequence.answer(200..TOKENS), "after a cut");
    };
    tokio::join!(reset, steps);
    let broken: usize = (0..2).map(|worker| cluster.proxy(worker).accepted()).sum();
    assert!(broken >= 8, "seed {seed}: {broken} connections, so nothing was reset");
    assert!(!session.close().await.unwrap());
    cluster.wait_until_sessions_are_gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_with_one_replica_survives_connections_that_break() {
    sessions_survive_resets(1, 1, 21).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_with_two_replicas_survive_connections_that_break() {
    sessions_survive_resets(2, 2, 22).await;
    sessions_survive_resets(2, 1, 23).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_waits_for_a_worker_that_is_away_and_memory_of_what_was_closed_meanwhile_comes_back() {
    let sequence = Sequence::new(24, Dtype::F32, dims(4, 2, 40, 16, 16));
    let cluster = behind_proxies(1).await;
    let sessions = cluster.client().sessions();
    let options = sequence.options();
    let mut session = sessions.open(sequence.open(1)).await.unwrap();
    let mut other = sessions.open(sequence.open(1)).await.unwrap();
    for token in 0..20 {
        step(&mut session, &sequence, token, &options).await;
        step(&mut other, &sequence, token, &options).await;
    }
    let used = async |cluster: &Cluster| cluster.status().await.workers[0].session_used_bytes;
    cluster.proxy(0).refuse(true);
    cluster.proxy(0).reset();
    let back = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        // It lives, and holds both still.
        assert!(used(&cluster).await > 0);
        assert!(!other.close().await.unwrap());
        cluster.proxy(0).refuse(false);
    };
    let begun = Instant::now();
    tokio::join!(back, step(&mut session, &sequence, 20, &options));
    assert!(begun.elapsed() >= Duration::from_millis(700), "nobody else could have answered");
    for token in 21..40 {
        step(&mut session, &sequence, token, &options).await;
    }
    let gone = sessions.describe("nobody").await.unwrap_err();
    assert_eq!(gone.reason, Reason::Session);
    assert!(!session.close().await.unwrap());
    cluster.wait_until_sessions_are_gone().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_go_on_where_the_link_to_a_worker_swallows_what_goes_over_it() {
    const TOKENS: usize = 150;
    /// Pings find out within two seconds, and a shard is asked of another replica.
    const LONGEST: Duration = Duration::from_millis(2500 + 2500);
    const REPAIR: Duration = Duration::from_secs(30);
    let sequence = Sequence::new(25, Dtype::F32, dims(4, 2, TOKENS as u64, 32, 32));
    let cluster = behind_proxies(2).await;
    let sessions = cluster.client().sessions();
    let options = sequence.options();
    let mut open = sequence.open(1);
    (open.spec.replicas, open.spec.acks, open.spec.allow_same_host) = (2, 1, true);
    let mut session = sessions.open(open).await.unwrap();
    let mut tokens = 0..TOKENS;
    let ways = [(true, false), (false, true), (true, true)].map(|(there, back)| Swallows { there, back });
    for (victim, swallows) in [0, 1].into_iter().cycle().zip(ways) {
        for token in tokens.by_ref().take(10) {
            step(&mut session, &sequence, token, &options).await;
        }
        cluster.proxy(victim).swallow(swallows);
        let mut longest = Duration::ZERO;
        for token in tokens.by_ref().take(20) {
            let begun = Instant::now();
            step(&mut session, &sequence, token, &options).await;
            longest = longest.max(begun.elapsed());
        }
        println!("w{victim} {swallows:?}: longest {longest:?}");
        assert!(longest < LONGEST, "w{victim} {swallows:?}: a step took {longest:?}");
        cluster.proxy(victim).swallow(Swallows::default());
        let what = format!("w{victim} {swallows:?}");
        cluster.wait_until_repaired(&sessions, REPAIR, &what).await;
    }
    // Whatever is computed where has all that came meanwhile.
    for token in tokens {
        step(&mut session, &sequence, token, &options).await;
    }
    assert!(!session.close().await.unwrap());
    cluster.wait_until_sessions_are_gone().await;
}
