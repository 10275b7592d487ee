//! The coordinator never holds a whole K or V.

use attnd_client::{Attended, PlanSummary, WorkerChoice};
use attnd_kernel::slot::{cover, keys_in_slots};
use attnd_kernel::{AttnShape, Dims, Kernels};

use crate::support::cases::{Answer, Case};
use crate::support::cluster::{Cluster, WorkerSpec};
use crate::support::nightly;

/// What the coordinator may take beside the partials, its own program included.
const ALLOWANCE: u64 = 64 << 20;

/// Bytes of all partials of a call that was planned like this: `m`, `l` and `o` in f32.
fn partial_bytes(plan: &PlanSummary, shape: &AttnShape) -> u64 {
    let rows = (shape.group_size() * shape.n_queries()) as u64;
    let row = (shape.value_dim() as u64 + 2) * 4;
    let pieces = plan.shares.iter().flat_map(|share| &share.pieces);
    let nodes = pieces.map(|piece| {
        let nodes = cover(piece.slots.clone());
        let filled = nodes.iter().filter(|node| keys_in_slots(node.slots(), shape.n_keys()) > 0);
        (piece.groups.len() * filled.count()) as u64
    });
    nodes.sum::<u64>() * rows * row
}

/// Makes the call on a fresh cluster and holds the coordinator's peak memory against the bound.
async fn check(case: &Case, workers: usize, calls: usize) -> Attended {
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); workers], None).await;
    let client = cluster.client();
    let options = case.options(WorkerChoice::Exactly(workers));
    let mut last = None;
    for _ in 0..calls {
        let attended = client.attend(&case.operands, &options, &mut |_| {}).await;
        last = Some(attended.unwrap_or_else(|error| panic!("{workers} workers: {error}")));
    }
    let attended = last.expect("at least one call");
    assert_eq!(attended.plan.shares.len(), workers);
    let (peak, partials) = (cluster.coordinator().peak_memory(), partial_bytes(&attended.plan, case.shape()));
    assert!(
        peak < ALLOWANCE + partials,
        "{workers} workers: the coordinator's peak of {} MiB is over 64 MiB + {} MiB of partials, for a call of {} MiB",
        peak >> 20,
        partials >> 20,
        case.bytes() >> 20
    );
    attended
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_coordinator_holds_partials_and_no_operands() {
    let dims =
        Dims { batch: 1, heads: 8, kv_heads: 8, queries: 4096, keys: 4096, head_dim: 128, value_dim: 128 };
    let case = Case::plain(1, dims);
    let wanted = case.compute(Kernels::available()[0]);
    // Two workers take four heads each; three cut heads into slots, which makes more partials.
    for workers in [2, 3] {
        let attended = check(&case, workers, 2).await;
        Answer::from(attended).assert_bits_of(&wanted, &format!("{workers} workers"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nightly_two_gib_of_keys_and_values_pass_through_the_coordinator() {
    if !nightly("2 GiB of K and V through a coordinator of less than 64 MiB") {
        return;
    }
    let dims =
        Dims { batch: 1, heads: 8, kv_heads: 2, queries: 16, keys: 1 << 20, head_dim: 128, value_dim: 128 };
    let case = Case::plain(2, dims);
    assert_eq!(case.operands.k.len() + case.operands.v.len(), 2 << 30);
    let wanted = case.compute(Kernels::available()[0]);
    for workers in [2, 3] {
        let attended = check(&case, workers, 1).await;
        Answer::from(attended).assert_bits_of(&wanted, &format!("{workers} workers"));
    }
}
