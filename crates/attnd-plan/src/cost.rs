//! Predicts the seconds of a one-shot call, so that the planner can choose how many workers are worth it.
//!
//! Every byte of a call passes through the hub (the coordinator's link), so the hub's time doesn't shrink with more
//! workers, and replicated queries, messages and partials make it grow; only the arithmetic shrinks. The prediction
//! is `bytes out / link + slowest share's arithmetic + partials in / link + workers * start + messages * handling`.
//! It adds up what may overlap: a worker computes a kv group as soon as it has all of it, and how early that is depends
//! on the order in which the client sends.

use attnd_kernel::{AttnShape, Causal, Csr, Mask, Operator, Path};

use crate::Tensor;
use crate::line::CutCosts;
use crate::planner::PlanRequest;
use crate::residency::Residency;
use crate::side::Projection;

/// Bytes that one message carries when a large tensor streams.
const CHUNK_BYTES: f64 = (1 << 20) as f64;

/// Query tokens of one element of the batch, and elements, whose visible keys are counted; of more a sample is.
const COUNTED_TOKENS: usize = 4096;
const COUNTED_ELEMENTS: usize = 16;

/// What stages between the product and the weights multiply the arithmetic by: `crates/attnd-kernel/NOTES.md` has 1.06 to 1.33 times
/// a plain call for caps, ALiBi, both, and sigmoids, over dimensions of 64 and 128 and two instruction sets, 1.16 in the mean.
const GENERAL_PATH: f64 = 1.16;

/// Measured or assumed speeds of everything around the kernels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CostModel {
    /// Bytes per second of the coordinator's link, one direction, gRPC included. 2e9 is the lower half of the 1.5 to
    /// 5 GB/s of HTTP/2 on loopback; a 10 Gbit/s network has 1.2e9.
    pub link_bytes_per_second: f64,
    /// Seconds that one more worker costs whatever its share: a stream to open, Begin, Commit and Finished.
    pub worker_seconds: f64,
    /// Seconds that one message costs beyond its bytes.
    pub message_seconds: f64,
    /// Fraction of a worker's calibrated peak that its kernels reach in a call, 0 to 1.
    pub kernel_efficiency: f64,
    /// Floating-point operations that a worker could do while it reads one byte of K or V: few queries are bound by
    /// memory. 230 GFLOP/s at 28 GB/s make 8.
    pub flops_per_byte: f64,
}

impl Default for CostModel {
    fn default() -> Self {
        Self {
            link_bytes_per_second: 2e9,
            worker_seconds: 500e-6,
            message_seconds: 25e-6,
            kernel_efficiency: 0.75,
            flops_per_byte: 8.0,
        }
    }
}

/// One worker's load, as far as it costs time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Keys over all its groups.
    pub(crate) keys: u64,
    /// Kv groups that it touches.
    pub(crate) groups: usize,
    /// Tree nodes that it sends partials of, over all its groups.
    pub(crate) nodes: usize,
    /// Runs of pages that it gets of groups that are cut, see [`crate::line::Line::cut_runs`].
    pub(crate) cut_runs: u64,
    /// Bytes of what travels beside Q, K and V.
    pub(crate) side_bytes: u64,
    /// 10^9 operations per second.
    pub(crate) gflops: f64,
}

/// Time of a second pass over the scores, as a fraction of the first one's: it has no product with values. Measured, see the
/// kernels' performance log.
const SECOND_PASS: f64 = 0.6;

/// The costs of one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallCosts {
    model: CostModel,
    /// Operations per key of one kv group, or as many as pass while the key is read.
    flops_per_key: f64,
    /// Bytes of K and V per key of one kv group, on the wire.
    bytes_per_key: f64,
    /// Bytes of Q of one kv group.
    query_bytes: f64,
    /// Bytes and messages of the partials of one node of one kv group.
    partial_bytes: f64,
    partial_messages: f64,
    /// Bytes of the finished rows of all groups.
    result_bytes: f64,
    /// Bytes of the operator's own tensors, which each worker gets.
    operator_bytes: f64,
    /// Messages of a run of pages of a group that is cut: of K and of V, which come alone. Rows that these are made of come together.
    run_messages: f64,
}

impl CallCosts {
    pub(crate) fn new(model: &CostModel, req: &PlanRequest, tokens_per_cell: usize) -> Self {
        let PlanRequest { shape, operator, outputs, dtype, sides, .. } = req;
        let (d, dv, bytes) = (shape.head_dim() as f64, shape.value_dim() as f64, dtype.size() as f64);
        let [sent_d, sent_dv] = [Tensor::K, Tensor::V].map(|tensor| tensor.layout(shape).2 as f64);
        let score = operator.score_cost(shape) as f64;
        // A key becomes another one once, and is made of a row once.
        let of_rows = Projection::of(sides).map_or(0, |projection| projection.cost(shape));
        let of_key = 2.0 * (operator.key_cost() + of_rows) as f64;
        let group_rows = (shape.group_size() * shape.n_queries()) as f64;
        let pairs = visible_pairs(operator, shape) * shape.group_size() as f64;
        let stages = match operator.path() {
            Path::Plain => 1.0,
            Path::General => GENERAL_PATH,
        };
        let passes = if outputs.is_some() { stages + SECOND_PASS } else { stages };
        Self {
            model: *model,
            flops_per_key: (passes * 2.0 * (score + dv) * pairs / shape.n_keys() as f64 + of_key)
                .max((d + dv) * bytes * model.flops_per_byte),
            bytes_per_key: (sent_d + sent_dv) * bytes,
            query_bytes: group_rows * shape.query_dim() as f64 * bytes,
            partial_bytes: group_rows * (dv + 2.0) * 4.0,
            partial_messages: shape.n_queries().div_ceil(tokens_per_cell) as f64,
            operator_bytes: Residency::new(*shape, *dtype, operator).operator_bytes() as f64,
            result_bytes: group_rows * shape.n_groups() as f64 * (dv + 1.0) * 4.0,
            run_messages: if shape.kv_is_projected() { 0.0 } else { 2.0 },
        }
    }

    /// Arithmetic of one key of one kv group.
    fn seconds_per_key(&self, gflops: f64) -> f64 {
        self.flops_per_key / (gflops * 1e9 * self.model.kernel_efficiency)
    }

    /// What cutting costs the workers and the hub.
    pub(crate) fn of_cuts(&self) -> CutCosts {
        let CostModel { link_bytes_per_second, message_seconds, .. } = self.model;
        CutCosts {
            key_seconds: self.seconds_per_key(1.0),
            node_seconds: self.partial_bytes / link_bytes_per_second
                + self.partial_messages * message_seconds,
            query_seconds: self.query_bytes / link_bytes_per_second + message_seconds,
            run_seconds: self.run_seconds(),
        }
    }

    /// What one run of pages of a group that is cut costs the hub beyond its bytes.
    fn run_seconds(&self) -> f64 {
        self.run_messages * self.model.message_seconds
    }

    /// Bytes that go to the workers.
    pub(crate) fn bytes_out(&self, loads: &[Load]) -> f64 {
        let of_load = |load: &Load| {
            load.keys as f64 * self.bytes_per_key
                + load.groups as f64 * self.query_bytes
                + load.side_bytes as f64
                + self.operator_bytes
        };
        loads.iter().map(of_load).sum()
    }

    /// The whole call.
    pub(crate) fn predict(&self, loads: &[Load]) -> f64 {
        let sum = |of: &dyn Fn(&Load) -> f64| loads.iter().map(of).sum::<f64>();
        let bytes_out = self.bytes_out(loads);
        let nodes = sum(&|load| load.nodes as f64);
        let slowest = loads
            .iter()
            .map(|load| load.keys as f64 * self.seconds_per_key(load.gflops))
            .fold(0.0, |a: f64, b| a.max(b));
        let cut_runs = sum(&|load| load.cut_runs as f64);
        let messages = (bytes_out / CHUNK_BYTES).ceil() + nodes * self.partial_messages;
        (bytes_out + nodes * self.partial_bytes + self.result_bytes) / self.model.link_bytes_per_second
            + slowest
            + loads.len() as f64 * self.model.worker_seconds
            + messages * self.model.message_seconds
            + cut_runs * self.run_seconds()
    }
}

/// (query, key) pairs that one head computes, on average over the batch.
fn visible_pairs(operator: &Operator, shape: &AttnShape) -> f64 {
    let mask = operator.mask();
    let of_mask = match mask.as_causal() {
        Some(causal) => causal_pairs(causal, shape) as f64,
        None => counted_pairs(mask, shape),
    };
    of_mask * operator.csr().map_or(1.0, |csr| listed(csr, shape))
}

/// Which fraction of all blocks a mask of blocks lists.
fn listed(csr: &Csr, shape: &AttnShape) -> f64 {
    let blocks = shape.n_queries().div_ceil(csr.query_block()) * shape.n_keys().div_ceil(csr.key_block());
    csr.columns().len() as f64 / (blocks * csr.layouts()) as f64
}

/// The same by counting, of many tokens and elements of the batch only some.
fn counted_pairs(mask: &Mask, shape: &AttnShape) -> f64 {
    let (batch, queries) = (shape.batch(), shape.n_queries());
    let (elements, tokens) = (batch.min(COUNTED_ELEMENTS), queries.min(COUNTED_TOKENS));
    let mut keys = 0_u64;
    for element in 0..elements {
        let mask = mask.of_batch(element * batch / elements, shape);
        let of = |token: usize| mask.visible(token * queries / tokens).len() as u64;
        keys += (0..tokens).map(of).sum::<u64>();
    }
    keys as f64 * (queries as f64 / tokens as f64) / elements as f64
}

/// The same of a causal rule alone, exactly.
fn causal_pairs(causal: Causal, shape: &AttnShape) -> u64 {
    let (queries, keys) = (shape.n_queries() as u64, shape.n_keys() as u64);
    // Row i sees min(keys, i + shift), or none where that is negative: a staircase, then a plateau.
    let (blind, first) = match causal {
        Causal::None => return queries * keys,
        Causal::TopLeft => (0, 1),
        Causal::BottomRight if queries > keys => (queries - keys, 1),
        Causal::BottomRight => (0, keys - queries + 1),
    };
    let rows = queries - blind;
    let stairs = rows.min(keys + 1 - first);
    stairs * first + stairs * stairs.saturating_sub(1) / 2 + (rows - stairs) * keys
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{Dims, OperatorParts, PerBatch, Window};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pairs_are_what_the_mask_shows(queries in 1u64..300, keys in 1u64..300) {
            let dims = Dims { batch: 1, heads: 1, kv_heads: 1, queries, keys, head_dim: 1, value_dim: 1 };
            let shape = AttnShape::new(dims).unwrap();
            for causal in [Causal::None, Causal::BottomRight, Causal::TopLeft] {
                let counted: usize = (0..shape.n_queries()).map(|i| causal.visible(i, &shape).len()).sum();
                prop_assert_eq!(visible_pairs(&Operator::plain(1.0, causal), &shape), counted as f64, "{:?}", causal);
                prop_assert_eq!(counted_pairs(&causal.into(), &shape), counted as f64, "{:?}", causal);
            }
        }
    }

    #[test]
    fn a_sample_of_many_tokens_is_near_the_count() {
        let (queries, keys) = (10_000, 50_000);
        let dims = Dims { batch: 20, heads: 1, kv_heads: 1, queries, keys, head_dim: 1, value_dim: 1 };
        let shape = AttnShape::new(dims).unwrap();
        let ends = PerBatch::Each((0..20).map(|element| 50_000 - element * 100).collect());
        let window = Window { left: Some(700), right: None };
        let mask = Mask { window, key_end: Some(ends), ..Causal::BottomRight.into() };
        let of_element = |element: usize| -> usize {
            let mask = mask.of_batch(element, &shape);
            (0..shape.n_queries()).map(|token| mask.visible(token).len()).sum()
        };
        let counted = (0..20).map(of_element).sum::<usize>() as f64 / 20.0;
        let parts = OperatorParts { mask, ..OperatorParts::plain(1.0, Causal::None) };
        let sampled = visible_pairs(&Operator::new(parts, &shape).unwrap(), &shape);
        assert!((sampled / counted - 1.0).abs() < 1e-3, "{sampled} of {counted}");
    }

    #[test]
    fn of_blocks_only_those_count_that_are_listed() {
        let dims =
            Dims { batch: 1, heads: 1, kv_heads: 1, queries: 100, keys: 90, head_dim: 1, value_dim: 1 };
        let shape = AttnShape::new(dims).unwrap();
        // 10 rows of 9 blocks, of which each lists 2.
        let row_ptr = (0..=10).map(|row| 2 * row).collect();
        let columns = (0..10).flat_map(|_| [3, 7]).collect();
        let csr = Some(Csr::new((10, 10), 1, row_ptr, columns).unwrap());
        let parts = OperatorParts { csr, ..OperatorParts::plain(1.0, Causal::None) };
        let pairs = visible_pairs(&Operator::new(parts, &shape).unwrap(), &shape);
        assert!((pairs - 2000.0).abs() < 1e-9, "{pairs}");
    }
}
