//! Seeded calls, and their answers as the kernels of this process give them.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use attnd_client::{
    Alibi, AttendOptions, Attended, DenseTensor, Inspected, Operands, Rectangle, WorkerChoice,
};
use attnd_kernel::reference::operator::At;
use attnd_kernel::reference::{ReferenceRow, reference_row};
use attnd_kernel::slot::{N_SLOTS, Node, PAGE_KEYS, keys_in_page, n_pages};
use attnd_kernel::{
    AttnShape, Bias, Causal, Csr, Dims, Dtype, Effective, ElementTile, EmptyRow, FinishedRows, GroupCall,
    Kernels, KvHead, Mask, NodeReport, Normaliser, Operator, OperatorParts, Outputs, OutputsParts, Relative,
    RowSums, Score, Side, Swin, alibi_slopes, attend_node, inspect_node, widen,
};
use bytes::Bytes;
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Longer than any call of these tests takes: what hangs becomes an error.
const CALL_LIMIT: Duration = Duration::from_secs(120);

/// What the numbers look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    /// N(0, 1)-like.
    Normal,
    /// Logits of many hundreds: most weights are flushed.
    Peaked,
    /// Weights almost equal.
    Flat,
    /// Values of +-1e30, or what the dtype holds.
    HugeValues,
    /// Many equal scores and signed zeros.
    Ties,
    /// NaNs and infinities strewn about.
    Poisoned,
}

impl Data {
    pub(crate) const ALL: [Self; 6] =
        [Self::Normal, Self::Peaked, Self::Flat, Self::HugeValues, Self::Ties, Self::Poisoned];
}

/// Head over the batch, and query token.
pub(crate) type Row = (usize, usize);

/// One call.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) data: Data,
    pub(crate) causal: Causal,
    pub(crate) score: Score,
    /// Of numbers, where the score looks at them.
    pub(crate) previous: Option<DenseTensor>,
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
    pub(crate) alibi: Option<Alibi>,
    pub(crate) relative: Option<Relative>,
    pub(crate) swin: Option<Swin>,
    /// Beside the causal rule.
    pub(crate) mask: Mask,
    /// Of bools.
    pub(crate) dense_mask: Option<DenseTensor>,
    /// Of numbers.
    pub(crate) dense_bias: Option<DenseTensor>,
    pub(crate) csr: Option<Csr>,
    pub(crate) normaliser: Normaliser,
    pub(crate) sinks: Option<Arc<[f32]>>,
    pub(crate) empty_row: EmptyRow,
    pub(crate) operands: Operands,
}

/// Context `[batch, heads, queries, value_dim]` and lse `[batch, heads, queries]`.
#[derive(Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) context: Vec<f32>,
    pub(crate) lse: Vec<f32>,
}

/// Elements of one operand, in `dtype`.
fn fill(rng: &mut SmallRng, n: u64, amplitude: f32, data: Data, dtype: Dtype) -> Bytes {
    let mut element = || {
        let x = (rng.random_range(-1.0..1.0_f32) + rng.random_range(-1.0..1.0_f32)) * amplitude * 1.22;
        match data {
            Data::Ties => (x * 2.0).round() * if rng.random::<bool>() { 0.5 } else { -0.5 },
            Data::Poisoned => match rng.random_range(0..5000_u32) {
                0 => f32::from_bits(0xffc0_1234),
                1 => f32::INFINITY,
                2 => f32::NEG_INFINITY,
                _ => x,
            },
            _ => x,
        }
    };
    let n = usize::try_from(n).expect("operands fit into memory");
    match dtype {
        Dtype::F32 => attnd_wire::floats::into_bytes((0..n).map(|_| element()).collect()),
        Dtype::F16 => (0..n).flat_map(|_| f16::from_f32(element()).to_le_bytes()).collect::<Vec<u8>>().into(),
        Dtype::Bf16 => {
            (0..n).flat_map(|_| bf16::from_f32(element()).to_le_bytes()).collect::<Vec<u8>>().into()
        }
    }
}

impl Case {
    /// Seeded operands of that shape.
    pub(crate) fn new(seed: u64, data: Data, causal: Causal, dtype: Dtype, dims: Dims) -> Self {
        let shape = AttnShape::new(dims).unwrap_or_else(|error| panic!("{dims:?}: {error}"));
        Self::of_shape(seed, data, causal, dtype, shape)
    }

    /// The same of a shape, whose queries may have a dimension of their own.
    pub(crate) fn of_shape(seed: u64, data: Data, causal: Causal, dtype: Dtype, shape: AttnShape) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (qk, value) = match data {
            Data::Peaked => (12.0, 1.0),
            Data::Flat => (1e-2, 1.0),
            Data::HugeValues if dtype == Dtype::F16 => (1.0, 1e4),
            Data::HugeValues => (1.0, 1e30),
            _ => (1.0, 1.0),
        };
        let q = fill(&mut rng, shape.q_elements(), qk, data, dtype);
        let k = fill(&mut rng, shape.k_elements(), qk, data, dtype);
        let v = fill(&mut rng, shape.v_elements(), value, data, dtype);
        // Not always the default, and never a power of two by accident.
        let scale = (shape.head_dim() as f32).sqrt().recip() * if seed.is_multiple_of(2) { 1.0 } else { 0.7 };
        Self::of(data, causal, scale, Operands { shape, dtype, q, k, v })
    }

    /// A case of these operands, with a scale and a causal rule and nothing else.
    pub(crate) fn of(data: Data, causal: Causal, scale: f32, operands: Operands) -> Self {
        let (mask, normaliser, empty_row) = (Mask::default(), Normaliser::Softmax, EmptyRow::Zero);
        let (softcap, alibi, dense_mask, dense_bias, sinks) = (None, None, None, None, None);
        let (previous, relative, swin, csr) = (None, None, None, None);
        Self {
            data,
            causal,
            score: Score::default(),
            previous,
            relative,
            swin,
            csr,
            scale,
            softcap,
            alibi,
            mask,
            dense_mask,
            dense_bias,
            normaliser,
            sinks,
            empty_row,
            operands,
        }
    }

    /// What is computed.
    pub(crate) fn operator(&self) -> Operator {
        Operator::new(self.parts(), self.shape()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The same as somebody types it.
    pub(crate) fn parts(&self) -> OperatorParts {
        let mask = attnd_wire::operator::with_causal(self.causal, self.mask.clone()).expect("one position");
        let (selection, dense) = self.reads();
        let alibi = self.slopes().map(|(slopes, by_key)| Bias::Alibi { slopes, by_key });
        let relative = self.relative.clone().map(Bias::Relative);
        let swin = self.swin.clone().map(Bias::Swin);
        OperatorParts {
            score: self.score.clone(),
            softcap: self.softcap,
            biases: [alibi, relative, swin].into_iter().flatten().chain(dense).collect(),
            mask,
            selection,
            csr: self.csr.clone(),
            normaliser: self.normaliser,
            sinks: self.sinks.clone(),
            empty_row: self.empty_row,
            ..OperatorParts::plain(self.scale, Causal::None)
        }
    }

    /// Slopes of the linear bias, and whether it is by key.
    pub(crate) fn slopes(&self) -> Option<(Arc<[f32]>, bool)> {
        let Alibi { slopes, by_key } = self.alibi.as_ref()?;
        let published = || alibi_slopes(self.shape().n_heads()).into();
        Some((slopes.clone().unwrap_or_else(published), *by_key))
    }

    /// A case of ordinary numbers, f32, without a mask.
    pub(crate) fn plain(seed: u64, dims: Dims) -> Self {
        Self::new(seed, Data::Normal, Causal::None, Dtype::F32, dims)
    }

    /// The same numbers in f32.
    pub(crate) fn in_f32(&self) -> Self {
        let Operands { shape, dtype, ref q, ref k, ref v } = self.operands;
        let widened = |bytes: &Bytes| {
            let mut floats = vec![0.0; bytes.len() / dtype.size()];
            widen(bytes, dtype, &mut floats);
            attnd_wire::floats::into_bytes(floats)
        };
        let operands = Operands { shape, dtype: Dtype::F32, q: widened(q), k: widened(k), v: widened(v) };
        Self { operands, ..self.clone() }
    }

    pub(crate) fn shape(&self) -> &AttnShape {
        &self.operands.shape
    }

    /// The call's options, with this choice of workers.
    pub(crate) fn options(&self, workers: WorkerChoice) -> AttendOptions {
        AttendOptions {
            score: self.score.clone(),
            previous: self.previous.clone(),
            relative: self.relative.clone(),
            swin: self.swin.clone(),
            csr: self.csr.clone(),
            scale: Some(self.scale),
            softcap: self.softcap,
            alibi: self.alibi.clone(),
            causal: self.causal,
            mask: self.mask.clone(),
            dense_mask: self.dense_mask.clone(),
            dense_bias: self.dense_bias.clone(),
            normaliser: self.normaliser,
            sinks: self.sinks.clone(),
            empty_row: self.empty_row,
            outputs: OutputsParts::default(),
            allow_non_finite: self.data == Data::Poisoned,
            forbid_empty_rows: false,
            source: None,
            workers,
            timeout: Some(CALL_LIMIT),
        }
    }

    /// Bytes of Q, K and V on the wire.
    pub(crate) fn bytes(&self) -> usize {
        self.operands.q.len() + self.operands.k.len() + self.operands.v.len()
    }

    /// Floating-point operations of both products, as if nothing were masked.
    pub(crate) fn flops(&self) -> f64 {
        let shape = self.shape();
        let pairs = (shape.batch() * shape.n_heads() * shape.n_queries()) as f64 * shape.n_keys() as f64;
        2.0 * pairs * (shape.head_dim() + shape.value_dim()) as f64
    }

    /// Rows that see no key.
    pub(crate) fn empty_rows(&self) -> u64 {
        let shape = self.shape();
        let operator = self.operator();
        let of_group = |group: usize| {
            let mask = operator.mask_of_group(group, shape);
            let (batch, first) =
                (group / shape.n_kv_heads(), group % shape.n_kv_heads() * shape.group_size());
            let sees = |head: usize, token: usize| {
                let at = |key| At { batch, head: first + head, token, key };
                mask.visible(token).any(|key| self.shows(at(key)))
            };
            let of_head = |head: usize| (0..shape.n_queries()).filter(|token| !sees(head, *token)).count();
            (0..shape.group_size()).map(of_head).sum::<usize>()
        };
        (0..shape.n_groups()).map(of_group).sum::<usize>() as u64
    }

    /// Some rows: the first, the last and random ones.
    pub(crate) fn sample_rows(&self, seed: u64, random: usize) -> Vec<Row> {
        let (heads, tokens) = (self.shape().batch() * self.shape().n_heads(), self.shape().n_queries());
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut rows = vec![(0, 0), (heads - 1, tokens - 1)];
        rows.extend((0..random).map(|_| (rng.random_range(0..heads), rng.random_range(0..tokens))));
        rows
    }

    /// V, also where it is part of K and isn't sent.
    fn values(&self) -> Bytes {
        let (shape, element) = (self.shape(), self.operands.dtype.size());
        if !shape.value_is_key_prefix() {
            return self.operands.v.clone();
        }
        let of_key = |key: &'_ [u8]| key[..shape.value_dim() * element].to_vec();
        self.operands.k.chunks(shape.head_dim() * element).flat_map(of_key).collect::<Vec<u8>>().into()
    }

    /// The same with values that are the first elements of keys, and aren't sent.
    pub(crate) fn with_values_from_keys(mut self) -> Self {
        self.operands.shape = self.shape().with_values_from_keys().expect("values shorter than keys");
        self.operands.v = Bytes::new();
        self
    }

    /// Keys and values of one kv group, all of them.
    fn resident(&self, kernels: &Kernels, group: usize) -> KvHead {
        let (shape, operator) = (self.shape(), &self.operator());
        let (d, dv, n_keys) = (shape.head_dim(), shape.value_dim(), shape.n_keys());
        let (dtype, finite) = (self.operands.dtype, self.data != Data::Poisoned);
        let (key_dim, values) = (operator.key_dim(shape), self.values());
        let mut kv = KvHead::new(n_keys, key_dim, dv, 0..N_SLOTS).expect("memory for one kv head");
        for page in 0..n_pages(n_keys) {
            let rows = |bytes: &[u8], dim: usize| {
                let token = dim * dtype.size();
                let begin = (group * n_keys + page * PAGE_KEYS) * token;
                bytes[begin..begin + keys_in_page(page, n_keys) * token].to_vec()
            };
            let k = rows(&self.operands.k, d);
            if operator.keeps_keys() {
                kv.write_k(page, &k, dtype, finite).expect("finite keys");
            } else {
                let n = keys_in_page(page, n_keys);
                let (mut sent, mut others) = (vec![0.0; n * d], vec![0.0; n * key_dim]);
                widen(&k, dtype, &mut sent);
                let keys = page * PAGE_KEYS..page * PAGE_KEYS + n;
                operator.key_rows(kernels, shape, group, keys, &sent, &mut others);
                let others = attnd_wire::floats::into_bytes(others);
                kv.write_k(page, &others, Dtype::F32, finite).expect("finite keys");
            }
            kv.write_v(page, &rows(&values, dv), dtype, finite).expect("finite values");
        }
        kv
    }

    /// Computes the call in this process.
    pub(crate) fn compute(&self, kernels: &Kernels) -> Answer {
        let mut answer = Answer { context: Vec::new(), lse: Vec::new() };
        for group in 0..self.shape().n_groups() {
            let finished = self.compute_group(kernels, group, 0..self.shape().n_queries());
            answer.context.extend_from_slice(&finished.context);
            answer.lse.extend_from_slice(&finished.lse);
        }
        answer
    }

    /// Computes some rows in this process, each by itself.
    pub(crate) fn compute_alone(&self, kernels: &Kernels, rows: &[Row]) -> Vec<(Row, Answer)> {
        let (size, value_dim) = (self.shape().group_size(), self.shape().value_dim());
        let row = |(head, token): Row| {
            let group = self.compute_group(kernels, head / size, token..token + 1);
            let one = head % size;
            Answer {
                context: group.context[one * value_dim..][..value_dim].to_vec(),
                lse: vec![group.lse[one]],
            }
        };
        rows.iter().map(|at| (*at, row(*at))).collect()
    }

    /// The queries of one kv group.
    fn queries(&self, group: usize) -> Vec<f32> {
        let shape = self.shape();
        let mut q = vec![0.0; shape.group_size() * shape.n_queries() * shape.query_dim()];
        let bytes = q.len() * self.operands.dtype.size();
        widen(&self.operands.q[group * bytes..][..bytes], self.operands.dtype, &mut q);
        q
    }

    /// What is wanted beside the context, computed in this process, each group in one piece.
    pub(crate) fn inspect(&self, kernels: &Kernels, outputs: &Outputs) -> Inspected {
        let shape = *self.shape();
        let operator = &self.operator();
        let size = |rectangle: &Rectangle| {
            shape.batch() * rectangle.heads.len() * rectangle.tokens.len() * rectangle.keys.len()
        };
        let elements = outputs.rectangles().iter().map(|rectangle| vec![f32::NAN; size(rectangle)]).collect();
        let mut all = Inspected { heads: outputs.heads(), elements, ..Inspected::default() };
        for group in 0..shape.n_groups() {
            let (q, kv) = (self.queries(group), self.resident(kernels, group));
            let planes = self.planes(group);
            let [mask, bias] = planes.each_ref().map(|planes| planes.iter().collect::<Vec<_>>());
            let previous = self.previous_of(group);
            let previous: Vec<&[f32]> = previous.iter().map(Vec::as_slice).collect();
            let side = Side { mask: &mask, bias: &bias, previous: &previous };
            let call = GroupCall { shape, operator, group, q: &q, kv: &kv, side, compute: Effective::F32 };
            let tokens = 0..shape.n_queries();
            let (partial, _overflow) = attend_node(kernels, &call, Node::ROOT, tokens.clone());
            let partial = operator.join_sinks(partial, group, &shape, kernels);
            let sums = RowSums { m: &partial.m, l: &partial.l };
            let first_head = group * shape.group_size();
            let mut place = |tile: ElementTile<'_>| {
                let wanted = &outputs.rectangles()[tile.rectangle];
                let head = first_head + tile.head_in_group;
                let (batch, head) = (head / shape.n_heads(), head % shape.n_heads() - wanted.heads.start);
                for (token, values) in tile.tokens.clone().zip(tile.values.chunks(tile.keys.len())) {
                    let row = (batch * wanted.heads.len() + head) * wanted.tokens.len() + token
                        - wanted.tokens.start;
                    let at = row * wanted.keys.len() + tile.keys.start - wanted.keys.start;
                    all.elements[tile.rectangle][at..at + values.len()].copy_from_slice(values);
                }
            };
            let report: NodeReport =
                inspect_node(kernels, &call, sums, outputs, Node::ROOT, tokens, &mut place);
            let numbers = report.finish(sums, outputs, operator);
            all.top_keys.extend(numbers.top_keys);
            all.top_weights.extend(numbers.top_weights);
            all.top_scores.extend(numbers.top_scores);
            all.mass.extend(numbers.mass);
            all.entropy.extend(numbers.entropy);
            all.distance.extend(numbers.distance);
            all.max_score.extend(numbers.max_score);
            all.heat.extend(report.heat.means(outputs));
        }
        all
    }

    /// Some tokens of one kv group, all heads of the group.
    fn compute_group(&self, kernels: &Kernels, group: usize, tokens: Range<usize>) -> FinishedRows {
        let shape = *self.shape();
        let (q, kv) = (self.queries(group), self.resident(kernels, group));
        let operator = &self.operator();
        let planes = self.planes(group);
        let [mask, bias] = planes.each_ref().map(|planes| planes.iter().collect::<Vec<_>>());
        let previous = self.previous_of(group);
        let previous: Vec<&[f32]> = previous.iter().map(Vec::as_slice).collect();
        let call = GroupCall {
            shape,
            operator,
            group,
            q: &q,
            kv: &kv,
            side: Side { mask: &mask, bias: &bias, previous: &previous },
            compute: Effective::F32,
        };
        let (partial, _overflow) = attend_node(kernels, &call, Node::ROOT, tokens);
        let mean = (self.empty_row == EmptyRow::Uniform).then(|| self.value_mean(group));
        operator.finish(partial, group, &shape, mean.as_deref(), kernels)
    }

    /// Q, K and V, widened.
    pub(crate) fn floats(&self) -> [Vec<f32>; 3] {
        let Operands { dtype, ref q, ref k, .. } = self.operands;
        [q, k, &self.values()].map(|bytes| {
            let mut floats = vec![0.0; bytes.len() / dtype.size()];
            widen(bytes, dtype, &mut floats);
            floats
        })
    }

    /// Some rows by the f64 oracle, of a scale and a causal rule alone.
    pub(crate) fn reference(&self, rows: &[Row]) -> Vec<(Row, ReferenceRow)> {
        let [q, k, v] = self.floats();
        let row = |(head, token)| {
            reference_row(self.shape(), self.scale.into(), self.causal, (&q, &k, &v), head, token)
        };
        rows.iter().map(|at| (*at, row(*at))).collect()
    }
}

impl From<Attended> for Answer {
    fn from(attended: Attended) -> Self {
        Self { context: attended.context, lse: attended.lse }
    }
}

impl Answer {
    /// One row.
    pub(crate) fn row(&self, shape: &AttnShape, (head, token): Row) -> Self {
        let row = head * shape.n_queries() + token;
        let context = self.context[row * shape.value_dim()..][..shape.value_dim()].to_vec();
        Self { context, lse: vec![self.lse[row]] }
    }

    /// Where two answers differ in bits.
    pub(crate) fn difference(&self, other: &Self) -> Option<String> {
        let differ = |what: &str, a: &[f32], b: &[f32]| {
            if a.len() != b.len() {
                return Some(format!("{what}: {} and {} elements", a.len(), b.len()));
            }
            // Most often they don't, and nothing is compared as fast as bytes, also where this is compiled in haste.
            if bytemuck::cast_slice::<f32, u8>(a) == bytemuck::cast_slice::<f32, u8>(b) {
                return None;
            }
            let differing = a.iter().zip(b).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            let at = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits())?;
            let [a_bits, b_bits] = [a[at].to_bits(), b[at].to_bits()];
            let [a_value, b_value] = [a[at], b[at]];
            Some(format!(
                "{differing} of {} differ, first {what}[{at}]: {a_value:e} {a_bits:#x} and {b_value:e} {b_bits:#x}",
                a.len()
            ))
        };
        differ("context", &self.context, &other.context).or_else(|| differ("lse", &self.lse, &other.lse))
    }

    /// # Panics
    /// If the other answer has other bits.
    pub(crate) fn assert_bits_of(&self, other: &Self, what: &str) {
        if let Some(difference) = self.difference(other) {
            panic!("{what}: {difference}");
        }
    }

    /// # Panics
    /// If a row of `wanted` is further from the oracle than its bound.
    pub(crate) fn assert_within(&self, shape: &AttnShape, wanted: &[(Row, ReferenceRow)], what: &str) {
        for (at, wanted) in wanted {
            let row = self.row(shape, *at);
            let ratio = wanted.worst_ratio(&row.context, row.lse[0]);
            assert!(ratio <= 1.0, "{what}: row {at:?} is {ratio} times the bound from the f64 reference");
        }
    }
}
