//! Operands of a case: random queries, keys and values, the same in every run.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;
use attnd_kernel::slot::{N_SLOTS, Node, keys_in_page, n_pages};
use attnd_kernel::{
    AttnShape, Dtype, Effective, GroupCall, Kernels, KvHead, Operator, Side, Storage, attend_node,
};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use rayon::ThreadPool;

use super::case::{Case, Team};

/// Where all numbers come from.
const SEED: u64 = 7;
/// Groups that a worker has in its pool at a time.
const GROUPS_IN_FLIGHT: usize = 2;

/// What a case attends over.
#[derive(Debug)]
pub struct CaseOperands {
    case: Case,
    shape: AttnShape,
    groups: Vec<GroupOperands>,
}

#[derive(Debug)]
struct GroupOperands {
    q: Vec<f32>,
    kv: KvHead,
}

impl CaseOperands {
    /// Makes operands for a case.
    ///
    /// # Errors
    /// If the system refuses the memory, or the case is no attention shape.
    pub fn random(case: &Case) -> anyhow::Result<Self> {
        let shape = case.shape().with_context(|| case.name)?;
        let mut rng = SmallRng::seed_from_u64(SEED);
        let groups =
            (0..shape.n_groups()).map(|_group| GroupOperands::random(&shape, case.storage, &mut rng));
        let groups: anyhow::Result<Vec<GroupOperands>> = groups.collect();
        Ok(Self { case: *case, shape, groups: groups.with_context(|| case.name)? })
    }

    /// Whether another case attends over the same.
    pub fn serve(&self, case: &Case) -> bool {
        self.case.same_operands(case)
    }

    /// Computes one call, as a worker would: group by group on one thread, on several with two groups in flight, each of
    /// which the kernel cuts further. `operator` and `team` are those of `case`, `compute` is what the kernels have for it.
    pub fn attend(
        &self,
        case: &Case,
        operator: &Operator,
        compute: Effective,
        kernels: &Kernels,
        pool: &ThreadPool,
    ) {
        let group = |group: &GroupOperands| {
            let call = GroupCall {
                shape: self.shape,
                operator,
                group: 0,
                q: &group.q,
                kv: &group.kv,
                side: Side::default(),
                compute,
            };
            let (rows, finite) = attend_node(kernels, &call, Node::ROOT, 0..self.shape.n_queries());
            // Numbers below 2 give no score that overflows.
            std::hint::black_box((rows, finite.is_ok()));
        };
        let next = AtomicUsize::new(0);
        let drain = || {
            while let Some(operands) = self.groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                group(operands);
            }
        };
        pool.install(|| match case.team {
            Team::One => drain(),
            Team::All => {
                rayon::scope(|scope| {
                    for _ in 0..GROUPS_IN_FLIGHT {
                        scope.spawn(|_| drain());
                    }
                });
            }
        });
    }
}

impl GroupOperands {
    fn random(shape: &AttnShape, storage: Storage, rng: &mut SmallRng) -> anyhow::Result<Self> {
        let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.7..1.7)).collect() };
        let (d, dv, n_keys) = (shape.head_dim(), shape.value_dim(), shape.n_keys());
        let q = random(shape.group_size() * shape.n_queries() * d);
        let mut kv = KvHead::with_storage(n_keys, d, dv, 0..N_SLOTS, storage)?;
        for page in 0..n_pages(n_keys) {
            let mut rows = |dim: usize| -> Vec<u8> {
                random(keys_in_page(page, n_keys) * dim).into_iter().flat_map(f32::to_le_bytes).collect()
            };
            let (k, v) = (rows(d), rows(dv));
            kv.write_k(page, &k, Dtype::F32, false)?;
            kv.write_v(page, &v, Dtype::F32, false)?;
        }
        Ok(Self { q, kv })
    }
}
