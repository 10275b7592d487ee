//! Replicas that are made again: after a worker is lost, before one leaves, and when one comes. Steps go on meanwhile, with the same bits.

use std::time::{Duration, Instant};

use attnd_client::session::{QueryOptions, Session, Sessions, ShardHealth};
use attnd_client::{Dtype, SessionDescription, Storage};

use super::{Sequence, dims};
use crate::support::cases::Answer;
use crate::support::cluster::{Cluster, WorkerSpec};
use crate::support::{eventually, nightly};

const SOON: Duration = Duration::from_secs(10);

/// A session that is stepped token by token, and compared with the whole call.
struct Stepped {
    session: Session,
    sequence: Sequence,
    options: QueryOptions,
    at: usize,
}

impl Stepped {
    /// Opens one of two layers.
    async fn open(sessions: &Sessions, seed: u64, replicas: usize, name: &str) -> Self {
        let sequence = Sequence::new(seed, Dtype::F32, dims(4, 2, 2200, 32, 32));
        let mut open = sequence.open(2);
        (open.spec.replicas, open.spec.acks, open.spec.allow_same_host) = (replicas, replicas, true);
        open.name = Some(name.to_owned());
        let session = sessions.open(open).await.unwrap();
        let options = sequence.options();
        Self { session, sequence, options, at: 0 }
    }

    /// Appends up to a token, at once.
    async fn fill(&mut self, to: usize) {
        let [k, v, _] = self.sequence.rows(self.at..to);
        for layer in [0, 1] {
            self.session.append(layer, k.clone(), v.clone()).await.unwrap();
        }
        self.at = to;
    }

    /// The next step of one token, in both layers.
    async fn step(&mut self, what: &str) {
        let [k, v, q] = self.sequence.rows(self.at..self.at + 1);
        for layer in [1, 0] {
            let (k, v, q) = (k.clone(), v.clone(), q.clone());
            let stepped = self.session.step(layer, k, v, q, &self.options).await;
            let stepped = stepped.unwrap_or_else(|error| panic!("{what}, token {}: {error}", self.at));
            let answer = Answer { context: stepped.attended.context, lse: stepped.attended.lse };
            let expected = self.sequence.answer(self.at..self.at + 1);
            answer.assert_bits_of(&expected, &format!("{what}, token {}", self.at));
        }
        self.at += 1;
    }

    /// Steps until the description is as it shall be.
    async fn step_until(
        &mut self,
        what: &str,
        limit: Duration,
        is_so: impl Fn(&SessionDescription) -> bool,
    ) -> Duration {
        let begun = Instant::now();
        loop {
            self.step(what).await;
            let description = self.session.describe().await.unwrap();
            if is_so(&description) {
                return begun.elapsed();
            }
            assert!(begun.elapsed() < limit, "{what}: not within {limit:?}: {:?}", description.shards);
        }
    }

    /// All tokens in both layers, as those who compute now have them.
    async fn check_all(&mut self, what: &str) {
        for tokens in [0..64, self.at - 64..self.at] {
            let [_, _, q] = self.sequence.rows(tokens.clone());
            for layer in [0, 1] {
                let options = QueryOptions { at_len: Some(tokens.end as u64), ..self.options.clone() };
                let attended = self.session.attend(layer, q.clone(), &options).await;
                let attended = attended.unwrap_or_else(|error| panic!("{what}: {error}"));
                let answer = Answer { context: attended.context, lse: attended.lse };
                answer.assert_bits_of(&self.sequence.answer(tokens.clone()), what);
            }
        }
    }
}

/// Whether every shard has so many replicas, none of them on this worker.
fn is_whole_without(description: &SessionDescription, replicas: usize, lost: &str) -> bool {
    description.shards.iter().all(|shard| {
        shard.health == ShardHealth::Open
            && shard.workers.len() == replicas
            && shard.workers.iter().all(|worker| worker.as_str() != lost)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_of_a_lost_worker_are_made_again_and_survive_the_other_one() {
    let mut cluster = Cluster::start(3).await;
    let sessions = cluster.client().sessions();
    let mut stepped = Stepped::open(&sessions, 31, 2, "lost").await;
    stepped.fill(1500).await;
    // A fork shares pages with its parent, and has replicas of its own.
    let mut child = stepped.session.fork(Some("child")).await.unwrap();
    stepped.step("before").await;
    for lost in ["w0", "w1"] {
        cluster.kill_worker(usize::from(lost == "w1"));
        let whole = |description: &SessionDescription| is_whole_without(description, 2, lost);
        if lost == "w1" {
            // Whoever had it first is gone; w2 has all of it, by a copy.
            cluster.add_worker(WorkerSpec::default());
        }
        let took = stepped.step_until(lost, SOON, whole).await;
        println!("{lost}: replicas were there again after {took:?}");
        stepped.check_all(lost).await;
    }
    let description = child.describe().await.unwrap();
    assert!(is_whole_without(&description, 2, "w0") && is_whole_without(&description, 2, "w1"));
    let options = QueryOptions { at_len: Some(1500), ..stepped.options.clone() };
    let [_, _, q] = stepped.sequence.rows(1400..1500);
    let attended = child.attend(1, q, &options).await.unwrap();
    let answer = Answer { context: attended.context, lse: attended.lse };
    answer.assert_bits_of(&stepped.sequence.answer(1400..1500), "the child");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_as_integers_is_copied_and_not_rounded_again() {
    let mut cluster = Cluster::start(2).await;
    let sessions = cluster.client().sessions();
    let sequence = Sequence::new(33, Dtype::Bf16, dims(4, 2, 700, 64, 48));
    let mut all = Vec::new();
    for storage in [Storage::Int8, Storage::Int4] {
        let mut open = sequence.open(1);
        (open.spec.storage, open.spec.replicas, open.spec.acks) = (storage, 2, 1);
        open.spec.allow_same_host = true;
        let mut session = sessions.open(open).await.unwrap();
        let [k, v, _] = sequence.rows(0..650);
        session.append(0, k, v).await.unwrap();
        let [_, _, q] = sequence.rows(640..650);
        let before = session.attend(0, q.clone(), &sequence.options()).await.unwrap();
        all.push((session, q, before));
    }
    cluster.add_worker(WorkerSpec::default());
    for (at, lost) in ["w0", "w1"].into_iter().enumerate() {
        cluster.kill_worker(at);
        if at == 1 {
            cluster.add_worker(WorkerSpec::default());
        }
        for (session, q, before) in &mut all {
            eventually("two replicas", SOON, async || {
                let description = session.describe().await.unwrap();
                is_whole_without(&description, 2, lost).then_some(())
            })
            .await;
            let after = session.attend(0, q.clone(), &sequence.options()).await.unwrap();
            let [after, before] = [&after, &*before]
                .map(|attended| Answer { context: attended.context.clone(), lse: attended.lse.clone() });
            after.assert_bits_of(&before, lost);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_drains_hands_its_shards_over_while_steps_go_on() {
    let mut cluster = Cluster::start(3).await;
    let sessions = cluster.client().sessions();
    let mut of_two = Stepped::open(&sessions, 41, 2, "two").await;
    let mut of_one = Stepped::open(&sessions, 42, 1, "one").await;
    of_two.fill(900).await;
    of_one.fill(700).await;
    cluster.worker(0).signal("TERM");
    let begun = Instant::now();
    let status = loop {
        of_two.step("two replicas").await;
        of_one.step("one replica").await;
        if let Some(status) = cluster.worker(0).ended() {
            break status;
        }
        assert!(begun.elapsed() < SOON, "it doesn't end");
    };
    println!("it left after {:?}", begun.elapsed());
    assert_eq!(status.code(), Some(0), "{status}");
    for (stepped, replicas) in [(&mut of_two, 2), (&mut of_one, 1)] {
        let description = stepped.session.describe().await.unwrap();
        assert!(is_whole_without(&description, replicas, "w0"), "{:?}", description.shards);
        stepped.step("without it").await;
        stepped.check_all("without it").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_comes_gets_replicas_of_others_while_steps_go_on() {
    // A session takes 2 x 2 x 2 pages for 1024 tokens, 64 KiB each.
    let small = WorkerSpec { session_mib: Some(8), ..WorkerSpec::default() };
    let mut cluster = Cluster::with(vec![small.clone(); 2]).await;
    let sessions = cluster.client().sessions();
    let mut stepped = Stepped::open(&sessions, 51, 2, "moves").await;
    stepped.fill(1000).await;
    stepped.step("before").await;
    cluster.add_worker(small);
    let mut least = usize::MAX;
    let begun = Instant::now();
    loop {
        stepped.step("while it comes").await;
        let description = stepped.session.describe().await.unwrap();
        least = description.shards.iter().map(|shard| shard.workers.len()).min().unwrap().min(least);
        let shards = &description.shards;
        let has_some = shards.iter().any(|shard| shard.workers.iter().any(|worker| worker.as_str() == "w2"));
        if has_some && is_whole_without(&description, 2, "nobody") {
            break;
        }
        assert!(begun.elapsed() < SOON, "nothing moves: {shards:?}");
    }
    assert_eq!(least, 2, "replicas while one moved");
    stepped.step("after").await;
    // Whoever came has it all.
    let description = stepped.session.describe().await.unwrap();
    let leaves = description
        .shards
        .iter()
        .position(|shard| shard.workers.iter().any(|worker| worker.as_str() == "w2"));
    let shard = &description.shards[leaves.unwrap()];
    let other = shard.workers.iter().find(|worker| worker.as_str() != "w2").unwrap();
    cluster.kill_worker(usize::from(other.as_str() == "w1"));
    let lost = other.as_str().to_owned();
    stepped.step_until("lost", SOON, |description| is_whole_without(description, 2, &lost)).await;
    stepped.check_all("lost").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_replica_is_there_again_in_a_second_for_each_100_mib() {
    if !nightly("how long a replica of 256 MiB takes to be made again") {
        return;
    }
    let mut cluster = Cluster::start(3).await;
    let sessions = cluster.client().sessions();
    // 2 kv heads of 2048 tokens of 256 f32 are 4 MiB of a layer.
    let sequence = Sequence::new(61, Dtype::F32, dims(2, 2, 2048, 128, 128));
    let mut open = sequence.open(64);
    (open.spec.replicas, open.spec.acks, open.spec.allow_same_host) = (2, 2, true);
    let mut session = sessions.open(open).await.unwrap();
    let [k, v, _] = sequence.rows(0..2000);
    for layer in 0..64 {
        session.append(layer, k.clone(), v.clone()).await.unwrap();
    }
    let bytes: u64 = session.describe().await.unwrap().shards.iter().map(|shard| shard.bytes).sum();
    cluster.kill_worker(0);
    let killed = Instant::now();
    let (mut slowest, mut at) = (Duration::ZERO, 2000);
    // Steps go on, each of them over one layer.
    let took = loop {
        let begun = Instant::now();
        let [k, v, q] = sequence.rows(at..at + 1);
        let stepped = session.step(0, k, v, q, &sequence.options()).await.unwrap();
        slowest = slowest.max(begun.elapsed());
        let answer = Answer { context: stepped.attended.context, lse: stepped.attended.lse };
        answer.assert_bits_of(&sequence.answer(at..at + 1), "while a replica is made");
        at = if at + 1 < 2048 { at + 1 } else { break killed.elapsed() };
        let description = session.describe().await.unwrap();
        if is_whole_without(&description, 2, "w0") {
            break killed.elapsed();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let description = session.describe().await.unwrap();
    println!("{} MiB in both shards: whole after {took:?}, the slowest step took {slowest:?}", bytes >> 20);
    assert!(is_whole_without(&description, 2, "w0"), "not after {took:?}");
    let limit = Duration::from_secs(2) + Duration::from_secs(1) * u32::try_from(bytes / (100 << 20)).unwrap();
    assert!(took < limit, "{took:?} for {bytes} bytes, at most {limit:?}");
}
