//! Seeded inputs, and the ways to compute one group's result.

use std::ops::Range;

use attnd_kernel::reference::{ReferenceRow, reference_row_over};
use attnd_kernel::slot::{
    N_SLOTS, Node, PAGE_KEYS, cover, keys_in_page, keys_in_slots, n_pages, slot_of_page,
};
use attnd_kernel::{
    AttnShape, Causal, Compute, Dims, Dtype, FinishedRows, GroupCall, Kernels, KvHead, Mask, Operator,
    OperatorParts, PartialRows, Side, Storage, attend_node,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// What the numbers look like.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Data {
    /// N(0, 1)-like.
    Normal,
    /// Logits of many hundreds: most weights are flushed.
    Peaked,
    /// Weights almost equal.
    Flat,
    /// Values of +-1e30.
    HugeValues,
    /// Many equal scores and signed zeros.
    Ties,
    /// All elements of a key, and of the query, nearly equal: rounding errors of a score add up instead of cancelling.
    Constant,
    /// Queries, and values, in the subnormal range.
    Tiny,
    /// NaNs and infinities strewn about.
    Poisoned,
}

impl Data {
    /// Those whose rounding errors don't conspire.
    pub(crate) const BENIGN: [Self; 5] =
        [Self::Normal, Self::Peaked, Self::Flat, Self::HugeValues, Self::Ties];
    pub(crate) const ALL: [Self; 8] = [
        Self::Normal,
        Self::Peaked,
        Self::Flat,
        Self::HugeValues,
        Self::Ties,
        Self::Constant,
        Self::Tiny,
        Self::Poisoned,
    ];
}

/// One kv group with its operands.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) shape: AttnShape,
    pub(crate) mask: Mask,
    /// How keys and values are stored.
    pub(crate) storage: Storage,
    /// In what arithmetic, or in f32 with kernels that lack it.
    pub(crate) compute: Compute,
    pub(crate) scale: f32,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

impl Case {
    pub(crate) fn new(
        seed: u64,
        data: Data,
        mask: impl Into<Mask>,
        [group, tq, tk, d, dv]: [usize; 5],
    ) -> Self {
        let shape = AttnShape::new(Dims {
            batch: 1,
            heads: group as u64,
            kv_heads: 1,
            queries: tq as u64,
            keys: tk as u64,
            head_dim: d as u64,
            value_dim: dv as u64,
        })
        .unwrap();
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut fill = |n: usize, amplitude: f32| -> Vec<f32> {
            if let Data::Constant = data {
                // Runs of d or dv equal elements are not aligned with rows, which changes nothing: half of them are.
                let mut row = Vec::new();
                while row.len() < n {
                    let x = rng.random_range(0.3..1.0_f32);
                    row.extend(std::iter::repeat_n(x, d.min(n - row.len())));
                }
                return row;
            }
            (0..n)
                .map(|_| {
                    let x = (rng.random_range(-1.0..1.0_f32) + rng.random_range(-1.0..1.0_f32))
                        * amplitude
                        * 1.22;
                    match data {
                        Data::Ties => (x * 2.0).round() * 0.5 * if rng.random::<bool>() { 1.0 } else { -1.0 },
                        Data::Poisoned => match rng.random_range(0..3000_u32) {
                            0 => f32::from_bits(0xffc0_1234),
                            1 => f32::INFINITY,
                            2 => f32::NEG_INFINITY,
                            _ => x,
                        },
                        _ => x,
                    }
                })
                .collect()
        };
        let (qk, value) = match data {
            Data::Peaked => (12.0, 1.0),
            Data::Flat => (1e-2, 1.0),
            Data::HugeValues => (1.0, 1e30),
            Data::Tiny => (1e-20, 1e-41),
            _ => (1.0, 1.0),
        };
        let (q, k, v) = (fill(group * tq * d, qk), fill(tk * d, qk), fill(tk * dv, value));
        Self {
            shape,
            mask: mask.into(),
            storage: Storage::F32,
            compute: Compute::F32,
            scale: (d as f32).sqrt().recip(),
            q,
            k,
            v,
        }
    }

    /// The case with its keys and values as `storage` holds them.
    pub(crate) fn rounded_to(mut self, storage: Storage) -> Self {
        for row in self.k.chunks_mut(self.shape.head_dim()).chain(self.v.chunks_mut(self.shape.value_dim())) {
            round_row(row, storage);
        }
        self
    }

    /// Keys and values as the worker that owns `slots` holds them.
    pub(crate) fn resident(&self, slots: Range<usize>) -> KvHead {
        let (d, dv, tk) = (self.shape.head_dim(), self.shape.value_dim(), self.shape.n_keys());
        let mut kv = KvHead::with_storage(tk, d, dv, slots.clone(), self.storage).unwrap();
        for page in (0..n_pages(tk)).filter(|p| slots.contains(&slot_of_page(*p))) {
            let keys = page * PAGE_KEYS..page * PAGE_KEYS + keys_in_page(page, tk);
            let bytes = |x: &[f32], dim: usize| -> Vec<u8> {
                x[keys.start * dim..keys.end * dim].iter().flat_map(|x| x.to_le_bytes()).collect()
            };
            kv.write_k(page, &bytes(&self.k, d), Dtype::F32, false).unwrap();
            kv.write_v(page, &bytes(&self.v, dv), Dtype::F32, false).unwrap();
        }
        kv
    }

    pub(crate) fn operator(&self) -> Operator {
        let (scale, mask) = (self.scale, self.mask.clone());
        Operator::new(OperatorParts { scale, mask, ..OperatorParts::plain(1.0, Causal::None) }, &self.shape)
            .unwrap()
    }

    /// What a row should be.
    pub(crate) fn reference(&self, head: usize, token: usize) -> ReferenceRow {
        let keys: Vec<usize> = self.mask.of_batch(0, &self.shape).visible(token).collect();
        let operands = (&self.q[..], &self.k[..], &self.v[..]);
        reference_row_over(&self.shape, self.scale.into(), &keys, operands, head, token)
    }

    /// The partial of some tokens over one node.
    pub(crate) fn partial(
        &self,
        kernels: &Kernels,
        kv: &KvHead,
        node: Node,
        tokens: Range<usize>,
    ) -> PartialRows {
        let call = GroupCall {
            shape: self.shape,
            operator: &self.operator(),
            group: 0,
            q: &self.q,
            kv,
            side: Side::default(),
            compute: kernels.effective(self.compute, self.storage).unwrap(),
        };
        attend_node(kernels, &call, node, tokens).0
    }

    /// The result of some tokens on one worker.
    pub(crate) fn attend(&self, kernels: &Kernels, tokens: Range<usize>) -> FinishedRows {
        self.partial(kernels, &self.resident(0..N_SLOTS), Node::ROOT, tokens).finish(kernels)
    }

    /// The result of all tokens with the slots cut at `cuts`; part `i` is computed by `kernels[i % len]`.
    pub(crate) fn attend_cut(&self, kernels: &[&Kernels], cuts: &[usize]) -> FinishedRows {
        let mut edges = vec![0];
        edges.extend_from_slice(cuts);
        edges.push(N_SLOTS);
        let mut parts = Vec::new();
        for (i, edge) in edges.windows(2).enumerate() {
            let kv = self.resident(edge[0]..edge[1]);
            for node in cover(edge[0]..edge[1]) {
                if keys_in_slots(node.slots(), self.shape.n_keys()) > 0 {
                    let kernels = kernels[i % kernels.len()];
                    parts.push((node, self.partial(kernels, &kv, node, 0..self.shape.n_queries())));
                }
            }
        }
        merge_up(Node::ROOT, &parts, kernels[0]).expect("at least one key").finish(kernels[0])
    }
}

/// What a row is when it comes out of `storage`, by the definition: scales are found by trying, quotients in f64.
pub(crate) fn round_row(row: &mut [f32], storage: Storage) {
    let (most, bits) = match storage {
        Storage::F32 => return,
        Storage::F16 => return row.iter_mut().for_each(|x| *x = half::f16::from_f32(*x).to_f32()),
        Storage::Bf16 => return row.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32()),
        Storage::Int8 => (127.0_f32, 17),
        Storage::Int4 => (7.0, 20),
    };
    let max = row.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    if max == 0.0 {
        return row.fill(0.0);
    }
    let significant_bits = |x: f32| {
        let fraction = x.to_bits() & 0x007f_ffff;
        let significand = if x.is_normal() { fraction | 0x0080_0000 } else { fraction };
        32 - significand.leading_zeros() - significand.trailing_zeros()
    };
    let mut scale = f32::from_bits(((max / most).to_bits().saturating_sub(2)).max(1));
    while significant_bits(scale) > bits || f64::from(scale) * f64::from(most) < f64::from(max) {
        scale = scale.next_up();
    }
    assert!((scale * most).is_finite(), "the largest numbers are a case of their own");
    for x in row {
        let integer = (f64::from(*x) / f64::from(scale)).round_ties_even();
        *x = (integer * f64::from(scale)) as f32;
    }
}

/// The canonical tree by its definition: a node is its two children, left first.
pub(crate) fn merge_up(node: Node, parts: &[(Node, PartialRows)], kernels: &Kernels) -> Option<PartialRows> {
    if let Some((_, part)) = parts.iter().find(|(n, _)| *n == node) {
        return Some(part.clone());
    }
    let (left, right) = node.children()?;
    match (merge_up(left, parts, kernels), merge_up(right, parts, kernels)) {
        (Some(left), Some(right)) => Some(left.merge(&right, kernels)),
        (one, other) => one.or(other),
    }
}

/// Where two results differ in bits.
pub(crate) fn differing_bits(a: &FinishedRows, b: &FinishedRows) -> Option<String> {
    let differ = |what: &str, a: &[f32], b: &[f32]| {
        if a.len() != b.len() {
            return Some(format!("{what}: {} and {} elements", a.len(), b.len()));
        }
        let at = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits())?;
        Some(format!(
            "{what}[{at}]: {:?} {:#x} and {:?} {:#x}",
            a[at],
            a[at].to_bits(),
            b[at],
            b[at].to_bits()
        ))
    };
    differ("context", &a.context, &b.context).or_else(|| differ("lse", &a.lse, &b.lse))
}
