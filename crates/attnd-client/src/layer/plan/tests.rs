//! Decisions: the faster place, what was asked for, and what is impossible.

use std::time::Duration;

use attnd_kernel::{Dims, Dtype};
use attnd_plan::{Projected, Projection};
use attnd_wire::WorkerStatus;

use super::*;
use crate::operands::Operands;
use crate::side::KvSource;

fn worker(name: &str, gflops: f64, wire_version: u32) -> WorkerStatus {
    WorkerStatus {
        worker: name.parse().unwrap(),
        address: format!("http://{name}:1"),
        state: "ACTIVE".into(),
        isa: "avx2".into(),
        kernel_id: "c1-f32".into(),
        threads: 1,
        gflops,
        memory_budget_bytes: 1 << 34,
        memory_used_bytes: 0,
        calls_in_flight: 0,
        load: 0.0,
        since_heartbeat: Duration::ZERO,
        version: "0.1.0".into(),
        wire_version,
        host: name.into(),
        session_memory_bytes: 1 << 33,
        session_used_bytes: 0,
    }
}

fn cluster(workers: &[WorkerStatus]) -> ClusterStatus {
    ClusterStatus { workers: workers.to_vec(), ..ClusterStatus::default() }
}

fn two_workers() -> ClusterStatus {
    cluster(&[worker("a", 200.0, 6), worker("b", 200.0, 6)])
}

/// A call of so many kv heads of 64 and keys, whose rows have `width` elements.
fn ways(kv_heads: u64, keys: u64, width: usize) -> Ways {
    let dims = Dims { batch: 1, heads: 8, kv_heads, queries: 4, keys, head_dim: 64, value_dim: 64 };
    let shape = AttnShape::new(dims).unwrap();
    let of = Projected { dtype: Dtype::F32, width, has_bias: false };
    let matrices = || bytes::Bytes::from(vec![0; kv_heads as usize * 64 * width * 4]);
    let source = KvSource {
        projection: Projection { key: of, value: of, same_rows: true },
        key_matrices: matrices(),
        value_matrices: matrices(),
        rows: vec![0; keys as usize * width * 4].into(),
        value_rows: bytes::Bytes::new(),
    };
    let begin = |source| {
        let options = AttendOptions { source, ..AttendOptions::default() };
        Operands::begin_of(shape, Dtype::F32, &options).unwrap()
    };
    let flops = 2 * keys * width as u64 * kv_heads * 128;
    Ways { client: begin(None), workers: begin(Some(source)), query_bytes: 8 * 4 * 64 * 4, flops }
}

fn decided(on: ProjectOn, ways: &Ways, cluster: &ClusterStatus, gflops: f64) -> ProjectionPlan {
    decide(on, ways, cluster, gflops).unwrap()
}

#[test]
fn rows_that_grow_are_projected_where_they_go_and_rows_that_shrink_where_they_are() {
    let fast = 400.0;
    // 8 heads of 64 + 64 out of 128 elements: K and V are eight times the rows.
    let grow = decided(ProjectOn::Auto, &ways(8, 20_000, 128), &two_workers(), fast);
    assert_eq!((grow.place, grow.reason), (Place::Workers, PlaceReason::Faster), "{grow}");
    // One head of 64 + 64 out of 4096.
    let shrink = decided(ProjectOn::Auto, &ways(1, 4_000, 4096), &two_workers(), fast);
    assert_eq!((shrink.place, shrink.reason), (Place::Client, PlaceReason::Faster), "{shrink}");
    // The same where the client's own projections would take much longer.
    let slow = decided(ProjectOn::Auto, &ways(1, 4_000, 4096), &two_workers(), 1.0);
    assert_eq!(slow.place, Place::Workers, "{slow}");
    for plan in [grow, shrink, slow] {
        let (client, workers) = (plan.client.unwrap(), plan.workers.unwrap());
        assert_eq!(plan.place == Place::Workers, workers.seconds < client.seconds);
    }
}

#[test]
fn bytes_are_those_that_travel() {
    let ways = ways(8, 20_000, 128);
    let plan = decided(ProjectOn::Auto, &ways, &two_workers(), 400.0);
    let (q, kv, rows, matrices) = (8 * 4 * 64 * 4, 20_000 * 8 * 128 * 4, 20_000 * 128 * 4, 8 * 128 * 128 * 4);
    let (client, workers) = (plan.client.unwrap(), plan.workers.unwrap());
    assert_eq!((client.client_bytes, client.worker_bytes), (q + kv, q + kv));
    assert_eq!(workers.client_bytes, q + rows + matrices);
    // Cut by heads, every row goes to both.
    let on_two = Ways {
        workers: Begin { workers: attnd_plan::WorkerChoice::Exactly(2), ..ways.workers.clone() },
        ..ways
    };
    let plan = decided(ProjectOn::Workers, &on_two, &two_workers(), 400.0);
    assert_eq!(plan.workers.unwrap().worker_bytes, q + 2 * rows + matrices);
    let text = plan.to_string();
    assert!(
        text.starts_with(
            "keys and values are projected on the workers, 5242.9 MFLOP, as asked; on the client: "
        ),
        "{text}"
    );
    let of_workers = format!(
        "; on the workers: {} bytes to the coordinator, {} to workers, ",
        q + rows + matrices,
        q + 2 * rows + matrices
    );
    assert!(text.contains(&of_workers), "{text}");
}

#[test]
fn what_is_asked_for_is_done_where_it_can_be() {
    let ways = ways(8, 20_000, 128);
    for (on, place) in [(ProjectOn::Client, Place::Client), (ProjectOn::Workers, Place::Workers)] {
        let plan = decided(on, &ways, &two_workers(), 400.0);
        assert_eq!((plan.place, plan.reason), (place, PlaceReason::Asked));
    }
    let suspect = WorkerStatus { state: "SUSPECT".into(), ..worker("c", 200.0, 6) };
    let old = cluster(&[worker("a", 200.0, 5), worker("b", 200.0, 0), suspect]);
    let auto = decided(ProjectOn::Auto, &ways, &old, 400.0);
    let text = auto.to_string();
    assert_eq!(auto.place, Place::Client);
    let why = "because workers can't (the cluster: no active worker makes keys and values of rows); on the client: ";
    assert!(text.contains(why), "{text}");
    assert_eq!(decided(ProjectOn::Client, &ways, &old, 400.0).reason, PlaceReason::Asked);
    let error = decide(ProjectOn::Workers, &ways, &old, 400.0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "project=workers and the cluster: no active worker makes keys and values of rows"
    );
    // Only those that can are counted on.
    let mixed = cluster(&[worker("a", 200.0, 5), worker("b", 200.0, 6)]);
    let both = decided(ProjectOn::Workers, &ways, &two_workers(), 400.0).workers.unwrap();
    assert!(decided(ProjectOn::Workers, &ways, &mixed, 400.0).workers.unwrap().seconds > both.seconds);
}

#[test]
fn memory_decides_where_only_one_place_has_it() {
    // Rows and what becomes of them are resident together.
    let ways = ways(1, 40_000, 2048);
    let with =
        |memory_budget_bytes| cluster(&[WorkerStatus { memory_budget_bytes, ..worker("a", 200.0, 6) }]);
    let tight = decided(ProjectOn::Auto, &ways, &with(60 << 20), 1.0);
    assert_eq!((tight.place, tight.workers), (Place::Client, None), "{tight}");
    assert!(
        tight.to_string().contains("the workers: too few make keys and values of rows, or have no room"),
        "{tight}"
    );
    assert_eq!(decided(ProjectOn::Auto, &ways, &with(1 << 30), 1.0).place, Place::Workers);
    let none = decided(ProjectOn::Auto, &ways, &with(1 << 20), 1.0);
    assert_eq!((none.place, none.client, none.workers), (Place::Client, None, None));
    assert!(none.to_string().contains("the call fits neither way"), "{none}");
}

#[test]
fn the_rate_of_this_process_is_measured_once() {
    let rate = own_gflops(Kernels::from_env().unwrap());
    assert!(rate > 0.01 && rate < 1e6, "{rate}");
    assert_eq!(own_gflops(Kernels::from_env().unwrap()).to_bits(), rate.to_bits());
}
