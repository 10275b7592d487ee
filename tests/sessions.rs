//! Sessions over real processes: the bits of a whole call, however the rows came and whoever holds them.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use attnd_client::session::{BatchStep, OpenOptions, QueryOptions, Sessions};
use attnd_client::{AttendOptions, Causal, Client, Dims, Dtype, Outcome, Reason};
use attnd_kernel::{Isa, Kernels};
use bytes::Bytes;

use crate::support::cases::{Answer, Case, Data};
use crate::support::cluster::{Cluster, WorkerSpec};
use crate::support::tap::Tap;

mod links;
mod repair;
mod restart;
mod soak;
mod survival;

/// A sequence that attends to itself: token by token, or whole.
pub(crate) struct Sequence {
    case: Case,
    whole: Answer,
}

impl Sequence {
    pub(crate) fn new(seed: u64, dtype: Dtype, dims: Dims) -> Self {
        assert!(dims.batch == 1 && dims.queries == dims.keys);
        let case = Case::new(seed, Data::Normal, Causal::BottomRight, dtype, dims);
        let whole = case.compute(Kernels::from_env().unwrap());
        Self { case, whole }
    }

    fn tokens(&self) -> usize {
        self.case.shape().n_keys()
    }

    /// K, V and Q of some tokens.
    pub(crate) fn rows(&self, tokens: Range<usize>) -> [Bytes; 3] {
        let (shape, operands) = (self.case.shape(), &self.case.operands);
        let cut = |bytes: &Bytes, heads: usize| {
            let head = bytes.len() / heads;
            let row = head / self.tokens();
            let of_head = |h: usize| &bytes[h * head + tokens.start * row..h * head + tokens.end * row];
            Bytes::from((0..heads).map(of_head).collect::<Vec<_>>().concat())
        };
        let kv = shape.n_kv_heads();
        [cut(&operands.k, kv), cut(&operands.v, kv), cut(&operands.q, shape.n_heads())]
    }

    /// What the whole call says of some tokens.
    pub(crate) fn answer(&self, tokens: Range<usize>) -> Answer {
        let (shape, n) = (self.case.shape(), self.tokens());
        let of = |all: &[f32], dim: usize| -> Vec<f32> {
            let of_head = |h: usize| &all[(h * n + tokens.start) * dim..(h * n + tokens.end) * dim];
            (0..shape.n_heads()).map(of_head).collect::<Vec<_>>().concat()
        };
        Answer { context: of(&self.whole.context, shape.value_dim()), lse: of(&self.whole.lse, 1) }
    }

    pub(crate) fn options(&self) -> QueryOptions {
        let attend = AttendOptions {
            causal: Causal::BottomRight,
            scale: Some(self.case.scale),
            ..AttendOptions::default()
        };
        QueryOptions { attend, ..QueryOptions::default() }
    }

    pub(crate) fn open(&self, layers: usize) -> OpenOptions {
        let shape = self.case.shape();
        let (heads, kv_heads) = (shape.n_heads(), shape.n_kv_heads());
        let mut open = OpenOptions::new(layers, heads, kv_heads, shape.head_dim(), self.case.operands.dtype);
        open.spec.value_dim = shape.value_dim();
        open
    }
}

pub(crate) fn dims(heads: u64, kv_heads: u64, tokens: u64, head_dim: u64, value_dim: u64) -> Dims {
    Dims { batch: 1, heads, kv_heads, queries: tokens, keys: tokens, head_dim, value_dim }
}

/// Appends and attends in pieces of these sizes, again and again, and compares each row with the whole call's.
async fn replay(sessions: &Sessions, sequence: &Sequence, open: OpenOptions, sizes: &[usize], what: &str) {
    let mut session = sessions.open(open).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    let options = sequence.options();
    let mut at = 0;
    for size in sizes.iter().cycle() {
        let end = sequence.tokens().min(at + size);
        let [k, v, q] = sequence.rows(at..end);
        for layer in [1, 0] {
            let (k, v, q) = (k.clone(), v.clone(), q.clone());
            let stepped = session.step(layer, k, v, q, &options).await;
            let stepped = stepped.unwrap_or_else(|error| panic!("{what}: tokens {at}..{end}: {error}"));
            assert_eq!((stepped.appended.len, stepped.attended.at_len), (end as u64, end as u64), "{what}");
            let answer = Answer { context: stepped.attended.context, lse: stepped.attended.lse };
            answer.assert_bits_of(&sequence.answer(at..end), &format!("{what}, tokens {at}..{end}"));
        }
        at = end;
        if at == sequence.tokens() {
            break;
        }
    }
    session.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_have_the_bits_of_the_whole_call_on_any_workers_in_any_pieces() {
    let sequence = Sequence::new(7, Dtype::F32, dims(6, 3, 1100, 128, 64));
    let narrow = Sequence::new(8, Dtype::Bf16, dims(4, 1, 900, 40, 40));
    for workers in 1..=4 {
        let cluster = Cluster::start(workers).await;
        let sessions = cluster.client().sessions();
        let description = sessions.open(sequence.open(2)).await.unwrap().describe().await.unwrap();
        assert_eq!(description.shards.len(), workers, "a shard on each worker");
        let pieces: [&[usize]; 3] = [&[1100], &[700, 1, 1, 5, 256, 1, 100], &[257, 33]];
        for sizes in pieces {
            let what = format!("{workers} workers, pieces {sizes:?}");
            replay(&sessions, &sequence, sequence.open(2), sizes, &what).await;
            replay(&sessions, &narrow, narrow.open(2), sizes, &what).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_token_at_a_time_has_the_bits_of_all_at_once() {
    let sequence = Sequence::new(9, Dtype::F32, dims(4, 2, 300, 16, 16));
    let portable = WorkerSpec { isa: Some(Isa::Portable), ..WorkerSpec::default() };
    let cluster = Cluster::with(vec![portable; 3]).await;
    replay(&cluster.client().sessions(), &sequence, sequence.open(2), &[1], "one by one").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forks_share_and_part_cuts_begin_anew_and_seals_end() {
    let sequence = Sequence::new(10, Dtype::F32, dims(4, 2, 600, 32, 16));
    let cluster = Cluster::start(2).await;
    let sessions = cluster.client().sessions();
    let options = sequence.options();
    let mut parent =
        sessions.open(OpenOptions { name: Some("parent".into()), ..sequence.open(1) }).await.unwrap();
    let [k, v, _] = sequence.rows(0..400);
    assert_eq!(parent.append(0, k, v).await.unwrap().len, 400);
    let mut child = parent.fork(Some("child")).await.unwrap();
    // The child goes on with the sequence, the parent with other rows.
    let [k, v, q] = sequence.rows(400..600);
    let [other_k, other_v, other_q] = sequence.rows(0..1);
    let stepped = child.step(0, k.clone(), v.clone(), q.clone(), &options).await.unwrap();
    let expected = sequence.answer(400..600);
    let answer = Answer { context: stepped.attended.context, lse: stepped.attended.lse };
    answer.assert_bits_of(&expected, "the child");
    let apart = parent.step(0, other_k, other_v, other_q, &options).await.unwrap();
    assert_eq!(apart.attended.at_len, 401);
    // What is cut off makes room for what belongs there.
    parent.truncate(300).await.unwrap();
    assert_eq!((parent.generation(), parent.len(0)), (1, 300));
    let [middle_k, middle_v, _] = sequence.rows(300..400);
    parent.append(0, middle_k, middle_v).await.unwrap();
    let stepped = parent.step(0, k, v, q.clone(), &options).await.unwrap();
    let answer = Answer { context: stepped.attended.context, lse: stepped.attended.lse };
    answer.assert_bits_of(&expected, "the parent after a cut");
    // The past stays to be looked at.
    let [_, _, early] = sequence.rows(100..150);
    let past = QueryOptions { at_len: Some(150), ..sequence.options() };
    let attended = child.attend(0, early, &past).await.unwrap();
    let answer = Answer { context: attended.context, lse: attended.lse };
    answer.assert_bits_of(&sequence.answer(100..150), "the past");
    child.seal().await.unwrap();
    let [k, v, _] = sequence.rows(0..1);
    let sealed = child.append(0, k, v).await.unwrap_err();
    assert_eq!((sealed.reason, sealed.outcome), (Reason::Sealed, Outcome::NotExecuted), "{sealed}");
    let mut names: Vec<String> = sessions.list().await.unwrap().iter().map(ToString::to_string).collect();
    names.sort();
    assert_eq!(names, ["child", "parent"]);
    assert!(!parent.close().await.unwrap());
    assert!(sessions.close("parent").await.unwrap(), "it was closed before");
    let attended = child.attend(0, q, &options).await.unwrap();
    let answer = Answer { context: attended.context, lse: attended.lse };
    answer.assert_bits_of(&expected, "the child of a closed parent");
    assert!(!child.close().await.unwrap());
    let gone = sessions.describe("child").await.unwrap_err();
    assert_eq!(gone.reason, Reason::Session, "{gone}");
    // All memory comes back.
    let begun = Instant::now();
    loop {
        let used: u64 = cluster.status().await.workers.iter().map(|worker| worker.session_used_bytes).sum();
        // One spare chunk on each worker.
        if used <= 2 * (2 << 20) {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{used} bytes are still in use");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_sessions_of_different_lengths_is_answered_together() {
    let sequence = Sequence::new(11, Dtype::F32, dims(4, 2, 500, 32, 32));
    let cluster = Cluster::start(2).await;
    let sessions = cluster.client().sessions();
    let options = sequence.options();
    let lens = [1, 77, 256, 499];
    let mut open = Vec::new();
    for len in lens {
        let mut session = sessions.open(sequence.open(1)).await.unwrap();
        let [k, v, _] = sequence.rows(0..len);
        session.append(0, k, v).await.unwrap();
        open.push(session);
    }
    let mut steps: Vec<BatchStep<'_>> = open
        .iter_mut()
        .zip(lens)
        .map(|(session, len)| {
            let [k, v, q] = sequence.rows(len..len + 1);
            BatchStep { session, layer: 0, k, v, q, options: &options }
        })
        .collect();
    let stepped = sessions.step_batch(&mut steps).await;
    for (stepped, len) in stepped.into_iter().zip(lens) {
        let attended = stepped.unwrap().attended;
        let answer = Answer { context: attended.context, lse: attended.lse };
        answer.assert_bits_of(&sequence.answer(len..len + 1), &format!("{len} tokens before"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_takes_over_in_the_middle_of_a_session_with_the_same_bits() {
    let sequence = Sequence::new(12, Dtype::F32, dims(4, 2, 400, 32, 32));
    let mut cluster = Cluster::start(3).await;
    let sessions = cluster.client().sessions();
    let options = sequence.options();
    let mut open = sequence.open(1);
    (open.spec.replicas, open.spec.acks, open.spec.allow_same_host) = (2, 1, true);
    let mut session = sessions.open(open).await.unwrap();
    let mut slowest = Duration::ZERO;
    for token in 0..400 {
        if token == 150 {
            cluster.kill_worker(1);
        }
        let [k, v, q] = sequence.rows(token..token + 1);
        let begun = Instant::now();
        let stepped =
            session.step(0, k, v, q, &options).await.unwrap_or_else(|error| panic!("{token}: {error}"));
        slowest = slowest.max(begun.elapsed());
        assert_eq!(stepped.appended.len, token as u64 + 1);
        let answer = Answer { context: stepped.attended.context, lse: stepped.attended.lse };
        answer.assert_bits_of(&sequence.answer(token..token + 1), &format!("token {token}"));
    }
    let description = session.describe().await.unwrap();
    assert!(
        description.shards.iter().all(|shard| shard.workers.iter().all(|worker| worker.as_str() != "w1"))
    );
    println!("the slowest step took {slowest:?}");
}

/// Whatever the number of heads, pages, layers' rows and sessions: one message to each worker and one back, one from the client and one
/// to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_is_one_message_to_each_worker_and_one_back() {
    const SESSIONS: usize = 16;
    let mut taps = Vec::new();
    for _ in 0..3 {
        taps.push(Arc::new(Tap::new().await));
    }
    let specs = taps.iter().map(|tap| WorkerSpec { tap: Some(Arc::clone(tap)), ..WorkerSpec::default() });
    let cluster = Cluster::with(specs.collect()).await;
    let at_client = Tap::new().await;
    at_client.lead_to(cluster.url());
    let sessions = Client::connect(at_client.url()).unwrap().sessions();
    let all = || taps.iter().map(|tap| tap.messages()).chain([at_client.messages()]).collect::<Vec<_>>();
    let since = |before: &[[u64; 2]]| -> Vec<[u64; 2]> {
        all().iter().zip(before).map(|(now, before)| [now[0] - before[0], now[1] - before[1]]).collect()
    };
    let sequence = Sequence::new(13, Dtype::F32, dims(32, 8, 1500, 16, 16));
    let options = sequence.options();
    for (replicas, acks) in [(1, 1), (2, 2), (3, 3)] {
        let mut open = Vec::new();
        for _ in 0..SESSIONS {
            let mut spec = sequence.open(2);
            (spec.spec.replicas, spec.spec.acks, spec.spec.allow_same_host) = (replicas, acks, true);
            let mut session = sessions.open(spec).await.unwrap();
            assert_eq!(session.describe().await.unwrap().shards.len(), 3, "all workers have a part");
            let [k, v, _] = sequence.rows(0..700);
            session.append(0, k, v).await.unwrap();
            open.push(session);
        }
        let before = all();
        for token in 700..750 {
            let [k, v, q] = sequence.rows(token..token + 1);
            open[0].step(0, k, v, q, &options).await.unwrap();
        }
        assert_eq!(since(&before), [[50, 50]; 4], "50 steps of one token, {replicas} replicas");

        let before = all();
        let [k, v, q] = sequence.rows(750..1250);
        open[0].step(0, k, v, q, &options).await.unwrap();
        assert_eq!(since(&before), [[1, 1]; 4], "a step of 500 tokens, {replicas} replicas");

        let before = all();
        let mut batch: Vec<BatchStep<'_>> = open
            .iter_mut()
            .enumerate()
            .map(|(at, session)| {
                let token = if at == 0 { 1250 } else { 700 };
                let [k, v, q] = sequence.rows(token..token + 1);
                BatchStep { session, layer: 0, k, v, q, options: &options }
            })
            .collect();
        for stepped in sessions.step_batch(&mut batch).await {
            stepped.unwrap();
        }
        assert_eq!(since(&before), [[1, 1]; 4], "a batch of {SESSIONS} sessions, {replicas} replicas");
        for session in open {
            session.close().await.unwrap();
        }
    }
}
