//! How long a step takes inside of a worker, beside its kernels. Measured on request: `ATTND_NIGHTLY=1 cargo test --release -p attnd-node
//! --lib latency -- --nocapture`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use attnd_kernel::{
    Causal, Compute, Dtype, Effective, GroupCall, Kernels, Operator, Side, Storage, attend_node,
};
use attnd_plan::cells;
use attnd_plan::session::SessionSpec;
use attnd_wire::hold::{HoldAsk, HoldRequest, ShardQueries};
use attnd_wire::proto;
use attnd_wire::session::QueryOperator;
use rayon::prelude::*;
use tokio::sync::mpsc;

use super::reader::Reader;
use crate::budget::Budget;
use crate::compute_pool::ComputePool;
use crate::shutdown::Calls;
use crate::worker::store::Store;
use crate::worker::store::shard::key_of;
use crate::worker::store::tests::{MIB, Session, encode, number, piece, spec};
use crate::worker::store::works::{self, Work};

const TOKENS: usize = 1024;

fn median(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 9 / 10])
}

fn queries(session: &Session, at_len: usize) -> ShardQueries {
    let operator = Operator::plain(0.088, Causal::BottomRight);
    let heads = ShardQueries::heads(&session.spec, &session.pieces);
    let q = encode((0..heads.len() * 128).map(|at| number([at as u64, 1, 2, 3])), Dtype::F32);
    ShardQueries {
        generation: 0,
        at_len,
        tokens: 1,
        dtype: Dtype::F32,
        crc32c: crc32c::crc32c(&q),
        q: q.into(),
        operator: QueryOperator::from(&operator),
        allow_non_finite: false,
        tokens_per_cell: 1,
        kernel_id: operator.kernel_id(Compute::F32).to_owned(),
        timeout: None,
    }
}

/// The median and the ninth decile of steps, from message to message, and of their kernels alone.
async fn measure(
    n_steps: usize,
    threads: usize,
    kv_heads: usize,
    with_rows: bool,
) -> [(Duration, Duration); 4] {
    let kernels = Kernels::from_env().unwrap();
    let pool = ComputePool::new(threads, 2).unwrap();
    let store = Store::new(kernels, pool.clone(), Budget::new(64 * MIB), 512 * MIB);
    let spec = SessionSpec {
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        value_dim: 128,
        layers: 1,
        ..spec(Dtype::F32, Storage::F32)
    };
    let mut session = Session::open(&store, 1, spec, vec![piece(0..kv_heads, 0..64)]);
    session.append(&store, 0, &(0..TOKENS as u64 - 200).collect::<Vec<_>>());
    let (replies, mut queue) = mpsc::channel(super::QUEUE);
    let mut reader = Reader::new(store.clone(), Calls::new(), replies, Arc::default(), Arc::default());
    let (mut steps, mut taken, mut hops) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..n_steps {
        let rows = with_rows.then(|| session.rows(0, &[step as u64]));
        session.layers[0].extend(with_rows.then_some(step as u64));
        let work = session.shard_work(0, rows, Some(queries(&session, session.layers[0].len())));
        let ask = HoldAsk::Works(vec![work]);
        let frame: proto::HoldRequest = HoldRequest { request: step as u64 + 1, term: 1, ask }.into();
        // What a model does between two steps takes time, too.
        tokio::time::sleep(Duration::from_millis(1)).await;
        let begun = Instant::now();
        assert!(reader.take(frame).await.is_ok());
        taken.push(begun.elapsed());
        let answer = queue.recv().await.unwrap();
        steps.push(begun.elapsed());
        assert_eq!(answer.frames.len(), 1);
    }
    // To the pool and back, with nothing to do there.
    for _ in 0..n_steps {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let begun = Instant::now();
        let (there, back) = tokio::sync::oneshot::channel();
        pool.begin(move || there.send(()).unwrap());
        back.await.unwrap();
        hops.push(begun.elapsed());
    }
    let resident = store.resident(key_of(&session.at)).unwrap();
    let len = session.layers[0].len();
    let call = queries(&session, len).call(0, &session.spec, &session.pieces).unwrap();
    let views = resident.look().views(1, 0, 0, len).unwrap();
    let q: Vec<f32> = (0..4 * 128).map(|at| number([at as u64, 1, 2, 3])).collect();
    let (found, told) = std::sync::mpsc::channel();
    pool.begin(move || {
        let alone = (0..n_steps).map(|_| {
            let all = cells(&[piece(0..kv_heads, 0..64)], &call.shape, 1);
            std::thread::sleep(Duration::from_millis(1));
            let begun = Instant::now();
            let cell = |cell: &attnd_plan::CellId| {
                let group = GroupCall {
                    shape: call.shape,
                    operator: &call.operator,
                    group: cell.group,
                    q: &q,
                    kv: &views[cell.group].1,
                    side: Side::default(),
                    compute: Effective::F32,
                };
                attend_node(kernels, &group, cell.node, 0..1)
            };
            let rows: Vec<_> = all.par_iter().map(cell).collect();
            let took = begun.elapsed();
            assert_eq!(rows.len(), kv_heads);
            took
        });
        found.send(alone.collect::<Vec<_>>()).unwrap();
    });
    let alone = told.recv().unwrap();
    // What a step is made of, on a thread of the pool.
    let frame = |request: u64| -> proto::HoldRequest {
        let work = session.shard_work(0, None, Some(queries(&session, len)));
        HoldRequest { request, term: 1, ask: HoldAsk::Works(vec![work]) }.into()
    };
    let frames: Vec<proto::HoldRequest> = (0..n_steps as u64).map(frame).collect();
    let (found, told) = std::sync::mpsc::channel();
    let on_pool = store.clone();
    pool.begin(move || {
        let mut parts = [const { Vec::new() }; 3];
        for frame in frames {
            std::thread::sleep(Duration::from_millis(1));
            let begun = Instant::now();
            let Ok(HoldAsk::Works(works)) = HoldRequest::decode(frame).ask else { panic!("no works") };
            parts[0].push(begun.elapsed());
            let begun = Instant::now();
            let works = works.into_iter().map(|work| work.and_then(|work| Work::new(&on_pool, work)));
            let works: Vec<_> = works.collect();
            let _memory = on_pool.reserve(works[0].as_ref().unwrap().bytes(2)).unwrap();
            parts[1].push(begun.elapsed());
            let begun = Instant::now();
            let done = works::run_all(&on_pool, works, || true);
            parts[2].push(begun.elapsed());
            assert!(done[0].as_ref().unwrap().partials.is_ok());
        }
        found.send(parts.map(median)).unwrap();
    });
    println!("decoded, checked, run: {:?}", told.recv().unwrap());
    [median(steps), median(alone), median(taken), median(hops)]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_beside_its_kernels() {
    if std::env::var_os("ATTND_NIGHTLY").is_none_or(|value| value != "1") {
        let [step, kernels, ..] = measure(5, 2, 1, true).await;
        assert!(step.0 > Duration::ZERO && kernels.0 > Duration::ZERO);
        return;
    }
    for threads in [1, 2] {
        for kv_heads in [8, 4] {
            for with_rows in [true, false] {
                let [step, kernels, taken, hop] = measure(300, threads, kv_heads, with_rows).await;
                println!(
                    "{threads} threads, {kv_heads} kv heads, rows {with_rows}: step {:?} (p90 {:?}), kernels {:?} (p90 {:?}), \
                     taken {:?}, hop {:?} (p90 {:?})",
                    step.0, step.1, kernels.0, kernels.1, taken.0, hop.0, hop.1
                );
            }
        }
    }
}
