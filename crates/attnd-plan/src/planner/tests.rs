//! Properties of plans, over random calls and clusters.

use std::collections::BTreeMap;

use attnd_kernel::{Causal, Dims, KvHead, OperatorParts, Storage};
use proptest::prelude::*;

use super::*;
use crate::Router;

/// Dimensions, and (gflops, fraction of the memory that is needed) of each worker.
pub(crate) type AnyCall = (Dims, Vec<(f64, f64)>);

pub(crate) fn any_call() -> impl Strategy<Value = AnyCall> {
    let heads = (1u64..=4, 1u64..=8, 1u64..=4);
    let sizes = (1u64..=20, prop_oneof![1u64..2000, 1u64..40_000], 1u64..=40, 1u64..=40);
    let workers = proptest::collection::vec((0.1f64..1000.0, 0.0f64..2.0), 1..=64);
    (heads, sizes, workers).prop_map(
        |((batch, kv_heads, group), (queries, keys, head_dim, value_dim), workers)| {
            (Dims { batch, heads: kv_heads * group, kv_heads, queries, keys, head_dim, value_dim }, workers)
        },
    )
}

/// A plan that uses every worker it can, for calls of up to `most_keys` keys over all groups; memory is unlimited.
pub(crate) fn planned(call: &AnyCall, most_keys: u64) -> Option<(AttnShape, Plan)> {
    let shape = AttnShape::new(call.0).unwrap();
    if shape.n_groups() as u64 * call.0.keys > most_keys {
        return None;
    }
    let req = request(shape, WorkerChoice::Exactly(call.1.len()));
    Some((shape, plan(&req, &capacities(&call.1, f64::INFINITY), &CostModel::default()).unwrap()))
}

/// A plain call of f32 operands.
pub(crate) fn request(shape: AttnShape, workers: WorkerChoice) -> PlanRequest {
    let operator = Arc::new(Operator::plain(1.0, Causal::None));
    PlanRequest { shape, operator, outputs: None, dtype: Dtype::F32, sides: Sides::default(), workers }
}

/// Workers whose memory is their fraction of `need` bytes; all of it for an infinite need.
fn capacities(workers: &[(f64, f64)], need: f64) -> Vec<Capacity> {
    let capacity = |(i, (gflops, fraction)): (usize, &(f64, f64))| Capacity {
        id: WorkerId::new(format!("w{i:02}")).unwrap(),
        gflops: *gflops,
        free_bytes: ((fraction + 1e-9) * need) as u64,
    };
    workers.iter().enumerate().map(capacity).collect()
}

fn equal_workers(n: usize) -> Vec<Capacity> {
    capacities(&vec![(100.0, 1.0); n], f64::INFINITY)
}

fn shape(kv_heads: u64, queries: u64, keys: u64) -> AttnShape {
    let dims = Dims { batch: 1, heads: kv_heads, kv_heads, queries, keys, head_dim: 128, value_dim: 128 };
    AttnShape::new(dims).unwrap()
}

fn whole_need(shape: &AttnShape) -> u64 {
    let line = Line::new(&request(*shape, WorkerChoice::Auto), tokens_per_cell(shape, None));
    line.resident_bytes(&(0..line.len()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn plans_cover_everything_once_and_fit(call in any_call(), choice in 0usize..3, asked in 1usize..=64) {
        let shape = AttnShape::new(call.0).unwrap();
        let asked = asked.min(call.1.len());
        let choice = [WorkerChoice::Auto, WorkerChoice::AtMost(asked), WorkerChoice::Exactly(asked)][choice];
        let req = request(shape, choice);
        let workers = capacities(&call.1, whole_need(&shape) as f64);
        let costs = CostModel::default();
        let plan = match super::plan(&req, &workers, &costs) {
            Ok(plan) => plan,
            Err(error) => {
                // The one worker that could do it alone is only out of reach where more were asked for.
                let somebody = workers.iter().any(|worker| worker.free_bytes >= whole_need(&shape));
                let PlanError::Memory { need, free } = error else { panic!("{error}") };
                prop_assert!(need > free, "{error}");
                prop_assert!(!somebody, "{error}, and somebody has it");
                return Ok(());
            }
        };
        let cover = plan.clone().verify(&shape).unwrap();
        prop_assert_eq!(cover.keys(), (shape.n_groups() * shape.n_keys()) as u64);
        if let WorkerChoice::AtMost(most) | WorkerChoice::Exactly(most) = choice {
            prop_assert!(plan.shares.len() <= most);
        }
        prop_assert!(plan.shares.is_sorted_by(|a, b| a.worker < b.worker));
        prop_assert!(plan.predicted_seconds.is_finite() && plan.predicted_seconds > 0.0);
        for share in &plan.shares {
            let worker = workers.iter().find(|worker| worker.id == share.worker).unwrap();
            prop_assert!(share.resident_bytes <= worker.free_bytes, "{} holds too much", worker.id);
            prop_assert!(share.pieces.len() <= 3);
            // What the kernels will really allocate.
            let kv = share.pieces.iter().map(|piece| piece.groups.len() as u64
                * KvHead::bytes_needed(shape.n_keys(), shape.head_dim(), shape.value_dim(), &piece.slots, Storage::F32));
            prop_assert!(kv.sum::<u64>() <= share.resident_bytes);
        }
        let mut shuffled = workers.clone();
        shuffled.reverse();
        prop_assert_eq!(super::plan(&req, &shuffled, &costs).unwrap(), plan);
    }

    #[test]
    fn shares_are_even_where_messages_are_free(
        kv_heads in 1u64..20,
        rounds in 1u64..5,
        speeds in proptest::collection::vec(50.0f64..500.0, 1..12),
    ) {
        // Whole rounds over the slots: all places cost the same.
        let shape = shape(kv_heads, 1, rounds * 64 * 256);
        let workers = capacities(&speeds.iter().map(|speed| (*speed, 1.0)).collect::<Vec<_>>(), f64::INFINITY);
        let free = CostModel { link_bytes_per_second: 1e30, message_seconds: 0.0, ..CostModel::default() };
        let plan = super::plan(&request(shape, WorkerChoice::Exactly(workers.len())), &workers, &free).unwrap();
        let plan = plan.verify(&shape).unwrap();
        prop_assert_eq!(plan.shares.len(), workers.len());
        let places = (kv_heads * 64) as f64;
        let all: f64 = speeds.iter().sum();
        for (share, speed) in plan.shares.iter().zip(&speeds) {
            let got: usize = share.pieces.iter().map(|piece| piece.groups.len() * piece.slots.len()).sum();
            let fair = places * speed / all;
            prop_assert!(got as f64 <= fair * 1.04 + 2.0, "{got} places for {fair}: {}", share.worker);
        }
    }

    #[test]
    fn messages_of_cut_groups_are_counted_as_they_are_routed(call in any_call()) {
        let Some((shape, plan)) = planned(&call, 1 << 18) else { return Ok(()) };
        let line = Line::new(&request(shape, WorkerChoice::Auto), plan.tokens_per_cell);
        let bytes = Tensor::K.bytes(&shape, 4);
        let runs = Router::new(&plan, &shape, 4).route(Tensor::K, 0, bytes as usize);
        let head_bytes = bytes as usize / shape.n_groups();
        for (share, of_worker) in plan.shares.iter().enumerate() {
            let place = |group: usize, slot: usize| group * N_SLOTS + slot;
            let (first, last) = (&of_worker.pieces[0], &of_worker.pieces[of_worker.pieces.len() - 1]);
            let whole = place(first.groups.start, first.slots.start)..place(last.groups.end - 1, last.slots.end);
            let mut of_head = BTreeMap::<usize, (u64, usize)>::new();
            for run in runs.iter().filter(|run| run.share == share) {
                let (n, bytes) = of_head.entry(run.head).or_default();
                (*n, *bytes) = (*n + 1, *bytes + run.bytes.len());
            }
            let cut = of_head.values().filter(|(_, bytes)| *bytes < head_bytes);
            let routed: u64 = cut.map(|(n, _)| n).sum();
            prop_assert_eq!(line.cut_runs(&whole), routed, "{}", of_worker.worker);
        }
    }

    #[test]
    fn memory_moves_work_to_others(kv_heads in 1u64..10, keys in 1u64..100_000, small in 0.01f64..0.5) {
        let shape = shape(kv_heads, 3, keys);
        let need = whole_need(&shape) as f64;
        let workers = capacities(&[(900.0, small), (100.0, 1.0)], need);
        let plan = super::plan(&request(shape, WorkerChoice::Auto), &workers, &CostModel::default()).unwrap();
        let plan = plan.verify(&shape).unwrap();
        for share in &plan.shares {
            let worker = workers.iter().find(|worker| worker.id == share.worker).unwrap();
            prop_assert!(share.resident_bytes <= worker.free_bytes);
        }
    }
}

#[test]
fn heads_are_never_split_where_workers_divide_them() {
    for (kv_heads, workers) in [(8, 2), (8, 4), (8, 8), (12, 3), (12, 4), (64, 16), (1, 1)] {
        let shape = shape(kv_heads, 512, 5000);
        let plan = plan(
            &request(shape, WorkerChoice::Exactly(workers)),
            &equal_workers(workers),
            &CostModel::default(),
        );
        for share in plan.unwrap().shares {
            assert_eq!(share.pieces.len(), 1, "{kv_heads} heads, {workers} workers: {share:?}");
            assert_eq!(share.pieces[0].slots, 0..N_SLOTS);
            assert_eq!(share.pieces[0].groups.len(), kv_heads as usize / workers);
        }
    }
}

#[test]
fn one_head_goes_to_as_many_workers_as_it_has_slots() {
    for (keys, workers, used) in
        [(256, 5, 1), (257, 5, 2), (1024, 5, 4), (1 << 20, 64, 64), (1 << 20, 100, 64)]
    {
        let shape = shape(1, 1, keys);
        let req = request(shape, WorkerChoice::Exactly(workers));
        let plan = plan(&req, &equal_workers(workers), &CostModel::default()).unwrap();
        let plan = plan.verify(&shape).unwrap();
        assert_eq!(plan.shares.len(), used, "{keys} keys: {}", plan.reason);
    }
}

#[test]
fn every_page_of_a_head_that_is_cut_is_two_messages_more() {
    let seconds = |message_seconds, workers| {
        let costs = CostModel { message_seconds, ..CostModel::default() };
        let req = request(shape(1, 1, 100_000), WorkerChoice::Exactly(workers));
        plan(&req, &equal_workers(2), &costs).unwrap().predicted_seconds
    };
    let messages = |workers| ((seconds(2e-3, workers) - seconds(1e-3, workers)) / 1e-3).round();
    // 391 pages; the second worker also sends a partial.
    assert_eq!(messages(2) - messages(1), 2.0 * 391.0 + 1.0);
}

#[test]
fn auto_takes_one_for_little_and_all_for_much() {
    let shares = |queries, keys| {
        let shape = shape(8, queries, keys);
        plan(&request(shape, WorkerChoice::Auto), &equal_workers(4), &CostModel::default())
            .unwrap()
            .shares
            .len()
    };
    assert_eq!(shares(1, 100), 1);
    assert_eq!(shares(4096, 4096), 4);
}

#[test]
fn a_call_of_the_general_path_takes_longer() {
    let shape = shape(8, 4096, 4096);
    let seconds = |softcap, workers| {
        let parts = OperatorParts { softcap, ..OperatorParts::plain(1.0, Causal::None) };
        let operator = Arc::new(Operator::new(parts, &shape).unwrap());
        let request = PlanRequest { operator, ..request(shape, workers) };
        plan(&request, &equal_workers(2), &CostModel::default()).unwrap().predicted_seconds
    };
    for workers in [1, 2] {
        let [plain, general] =
            [None, Some(30.0)].map(|softcap| seconds(softcap, WorkerChoice::Exactly(workers)));
        assert!((1.05..1.16).contains(&(general / plain)), "{plain} s and {general} s on {workers}");
    }
}

#[test]
fn a_very_slow_worker_is_left_out() {
    let shape = shape(8, 4096, 4096);
    let workers = capacities(&[(100.0, 1.0), (100.0, 1.0), (0.01, 1.0)], f64::INFINITY);
    let plan = plan(&request(shape, WorkerChoice::Auto), &workers, &CostModel::default()).unwrap();
    assert_eq!(plan.shares.len(), 2, "{}", plan.reason);
}

#[test]
fn what_cannot_be_planned_is_refused_with_numbers() {
    let shape = shape(2, 10, 1000);
    let refused =
        |choice, workers: &[Capacity]| plan(&request(shape, choice), workers, &CostModel::default());
    assert_eq!(refused(WorkerChoice::Auto, &[]).unwrap_err(), PlanError::NoWorkers);
    assert_eq!(refused(WorkerChoice::Exactly(0), &equal_workers(2)).unwrap_err(), PlanError::NoneAsked);
    assert_eq!(
        refused(WorkerChoice::Exactly(3), &equal_workers(2)).unwrap_err(),
        PlanError::TooFewWorkers { asked: 3, alive: 2 }
    );
    let poor = capacities(&[(1.0, 0.3), (1.0, 0.3)], whole_need(&shape) as f64);
    assert_eq!(
        refused(WorkerChoice::Auto, &poor).unwrap_err(),
        PlanError::Memory {
            need: whole_need(&shape),
            free: poor.iter().map(|worker| worker.free_bytes).sum()
        }
    );
}

#[test]
fn a_call_that_only_cuts_make_too_large_needs_more_than_is_free() {
    let shape = shape(1, 1, 1 << 16);
    let whole = whole_need(&shape);
    let halves = capacities(&[(1.0, 0.5), (1.0, 0.5)], whole as f64);
    for choice in [WorkerChoice::Auto, WorkerChoice::Exactly(2)] {
        let refused = plan(&request(shape, choice), &halves, &CostModel::default()).unwrap_err();
        let PlanError::Memory { need, free } = refused else { panic!("{refused}") };
        assert_eq!(free, whole);
        assert!(need > free, "{refused}");
        // It is enough: with a worker more that has what is missing, the call fits.
        let mut more = halves.clone();
        more.push(Capacity { id: "x".parse().unwrap(), gflops: 1.0, free_bytes: need - free });
        assert!(plan(&request(shape, WorkerChoice::Auto), &more, &CostModel::default()).is_ok());
    }
}

#[test]
fn the_search_makes_few_drafts() {
    use std::cell::Cell;
    let calls = Cell::new(0);
    let count = |yes: bool| {
        calls.set(calls.get() + 1);
        yes
    };
    for (most, first) in [(1, 1), (2, 2), (500, 1), (500, 337), (500, 500)] {
        assert_eq!(fewest(most, |n| count(n >= first)), Some(first));
    }
    assert_eq!(fewest(500, |_| count(false)), None);
    assert!(calls.take() <= 40);

    // Every draft is far slower than its guess, and the later the faster.
    let order: Vec<(f64, usize)> = (1..=500).map(|n| (1e-3 * n as f64, n)).collect();
    let draft =
        |n: usize| Draft { shares: Vec::new(), seconds: 1e3 / n as f64, sent_bytes: 0, splits_groups: false };
    let best = best_draft(&order, |n| count(true).then(|| draft(n))).unwrap();
    assert!(best.seconds < 1e3 / 250.0, "{}", best.seconds);
    assert!(calls.take() <= 10);
    assert!(
        best_draft(&order, |_| {
            count(true);
            None
        })
        .is_none()
    );
    assert!(calls.take() <= 10);
}

#[test]
fn hundreds_of_workers_with_little_memory_share_a_call() {
    let shape = shape(64, 64, 1 << 14);
    let workers = capacities(&vec![(100.0, 1.0 / 330.0); 500], whole_need(&shape) as f64);
    let plan = plan(&request(shape, WorkerChoice::Auto), &workers, &CostModel::default()).unwrap();
    let plan = plan.verify(&shape).unwrap();
    assert!((330..=500).contains(&plan.shares.len()), "{}", plan.reason);
}

#[test]
fn partial_messages_stay_near_half_a_mebibyte() {
    for (heads, kv_heads, value_dim, queries) in
        [(1, 1, 1, 65_536), (8, 8, 128, 4096), (8, 2, 128, 4096), (1024, 1, 512, 64), (64, 1, 100, 7)]
    {
        let dims = Dims { batch: 1, heads, kv_heads, queries, keys: 1, head_dim: 1, value_dim };
        let shape = AttnShape::new(dims).unwrap();
        let tokens = tokens_per_cell(&shape, None);
        let bytes = shape.group_size() * tokens * (shape.value_dim() + 2) * 4;
        assert!(tokens >= 1 && tokens <= shape.n_queries());
        assert!(bytes <= CELL_BYTES || (tokens == 1 && bytes <= 6 << 20), "{dims:?}: {bytes}");
        assert!(bytes > CELL_BYTES / 2 || tokens == shape.n_queries() || tokens == 1, "{dims:?}: {bytes}");
    }
}

#[test]
fn a_plan_that_is_not_exact_is_found_out() {
    use crate::cover::CoverError;
    let shape = shape(4, 1, 20_000);
    let good =
        plan(&request(shape, WorkerChoice::Exactly(3)), &equal_workers(3), &CostModel::default()).unwrap();
    let broken = |break_it: fn(&mut Plan)| {
        let mut plan = good.clone();
        break_it(&mut plan);
        plan.verify(&shape).unwrap_err()
    };
    assert!(matches!(broken(|plan| plan.shares[1].pieces.clear()), CoverError::EmptyShare { share: 1 }));
    assert!(matches!(broken(|plan| drop(plan.shares.pop())), CoverError::Gap { .. }));
    assert!(matches!(broken(|plan| plan.shares[1].pieces[0].groups.start -= 1), CoverError::Overlap { .. }));
    assert!(matches!(broken(|plan| plan.shares[2].pieces[0].groups.end += 9), CoverError::Piece { .. }));
    assert!(matches!(broken(|plan| plan.shares[2].pieces[0].slots.end += 1), CoverError::Piece { .. }));
    assert!(matches!(
        broken(|plan| plan.shares[2].worker = plan.shares[0].worker.clone()),
        CoverError::Worker { .. }
    ));
    assert!(matches!(broken(|plan| plan.tokens_per_cell = 0), CoverError::Tokens));
}

#[test]
fn sixteen_bits_take_half_the_memory_of_keys_and_values() {
    let shape = shape(4, 3, 10_000);
    let of = |dtype| {
        let req = PlanRequest { dtype, ..request(shape, WorkerChoice::Exactly(1)) };
        let plan = plan(&req, &equal_workers(1), &CostModel::default()).unwrap();
        (plan.shares[0].kv_bytes, plan.shares[0].resident_bytes)
    };
    // 40 pages of each of 4 groups; beside them queries of 3 tokens and two cells of as many, in f32 always.
    let (pages, others) = (4 * 40 * 256 * 256, (4 * 3 * 128 + 2 * 3 * 130) * 4);
    assert_eq!(of(Dtype::F32), (4 * 10_000 * 256 * 4, pages * 4 + others));
    for dtype in [Dtype::F16, Dtype::Bf16] {
        assert_eq!(of(dtype), (4 * 10_000 * 256 * 2, pages * 2 + others), "{dtype}");
    }
}
