//! A random call with a score function, the ways to compute it, and what it is by its formula.

use std::fmt;

use attnd_kernel::reference::operator::{
    At, EmptyRow, Formula, Normaliser as Normalised, Predicate, Score as Exact,
};
use attnd_kernel::slot::{
    N_SLOTS, Node, PAGE_KEYS, cover, keys_in_page, keys_in_slots, n_pages, slot_of_page,
};
use attnd_kernel::{
    AttnShape, Causal, DensePlane, Dims, Dtype, Effective, FinishedRows, Function, GroupCall, Kernels,
    KvHead, Mask, Normaliser, Operator, OperatorParts, Positions, Score, Selection, Side, Storage, Symbol,
    Tensor, Window, attend_node,
};
use rand::RngExt;
use rand::rngs::SmallRng;

use crate::cases::{merge_up, round_row};

/// Of `[batch, heads, kv_heads, queries, keys, head_dim, value_dim]`.
pub(super) fn shape([batch, heads, kv_heads, queries, keys, head_dim, value_dim]: [u64; 7]) -> AttnShape {
    AttnShape::new(Dims { batch, heads, kv_heads, queries, keys, head_dim, value_dim }).unwrap()
}

pub(super) struct Problem {
    pub(super) shape: AttnShape,
    pub(super) parts: OperatorParts,
    /// In what keys are sent.
    pub(super) sent: Storage,
    /// Slots at which the keys may be cut.
    pub(super) cuts: Vec<usize>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// `[batch, heads, queries, keys]`; empty where the function doesn't ask for it.
    previous: Vec<f32>,
    /// `[queries, keys]`, of all heads; empty for none.
    mask: Vec<bool>,
}

impl fmt::Debug for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OperatorParts { score, scale, softcap, mask, normaliser, .. } = &self.parts;
        let given: Vec<_> = score.parameters().iter().map(|tensor| (&tensor.name, &tensor.shape)).collect();
        write!(f, "{} of {given:?}, {:?}, sent as {}, ", score.function().name, self.shape, self.sent)?;
        write!(
            f,
            "scale {scale}, {softcap:?}, {mask:?}, {normaliser:?}, dense mask: {}",
            !self.mask.is_empty()
        )
    }
}

/// What a function is given, as a query head sees it.
pub(super) struct Given<'a> {
    function: &'static Function,
    tensors: &'a [Tensor],
    shape: &'a AttnShape,
    at: At,
    /// Of the row.
    pub(super) previous: &'a [f32],
}

impl Given<'_> {
    /// The part of a parameter that belongs to the head, or its default.
    pub(super) fn of(&self, name: &str) -> Vec<f32> {
        let parameter = self.function.parameters.iter().find(|parameter| parameter.name == name).unwrap();
        let Some(tensor) = self.tensors.iter().find(|tensor| tensor.name == name) else {
            return vec![parameter.default.unwrap()];
        };
        let symbols = parameter.shapes.iter().find(|symbols| fits(symbols, tensor, self.shape)).unwrap();
        let (mut from, mut len) = (0, tensor.values.len());
        for (symbol, size) in symbols.iter().zip(&tensor.shape) {
            let index = match symbol {
                Symbol::Batch => self.at.batch,
                Symbol::Heads => self.at.head,
                Symbol::KvHeads => self.at.head / self.shape.group_size(),
                Symbol::Queries => self.at.token,
                _ => break,
            };
            len /= size;
            from += index * len;
        }
        tensor.values[from..][..len].to_vec()
    }

    pub(super) fn one(&self, name: &str) -> f32 {
        let values = self.of(name);
        assert_eq!(values.len(), 1, "{name}");
        values[0]
    }

    /// A default stands for all elements.
    pub(super) fn spread(&self, name: &str, n: usize) -> Vec<f32> {
        let values = self.of(name);
        if values.len() == n { values } else { vec![self.one(name); n] }
    }
}

/// Whether a tensor may have these dimensions as far as the call's shape says them.
fn fits(symbols: &[Symbol], tensor: &Tensor, shape: &AttnShape) -> bool {
    let sizes = symbols.iter().zip(&tensor.shape);
    symbols.len() == tensor.shape.len()
        && sizes.clone().all(|(symbol, size)| size_of(*symbol, shape, 0).is_none_or(|known| known == *size))
}

/// What a dimension is; `None` of those that are free, unless `free` is what they shall be.
fn size_of(symbol: Symbol, shape: &AttnShape, free: usize) -> Option<usize> {
    match symbol {
        Symbol::Batch => Some(shape.batch()),
        Symbol::Heads => Some(shape.n_heads()),
        Symbol::KvHeads => Some(shape.n_kv_heads()),
        Symbol::Queries => Some(shape.n_queries()),
        Symbol::QueryDim => Some(shape.query_dim()),
        Symbol::KeyDim => Some(shape.head_dim()),
        Symbol::BothDims => Some(shape.query_dim() + shape.head_dim()),
        Symbol::One => Some(1),
        Symbol::Positions => (free > 0).then_some(shape.n_keys() + free),
        Symbol::Units | Symbol::Filters | Symbol::Taps => (free > 0).then_some(free),
    }
}

impl Problem {
    pub(super) fn random(name: &str, rng: &mut SmallRng) -> Self {
        let function = Function::named(name).unwrap();
        let (kv_heads, group) = (rng.random_range(1..=2_u64), rng.random_range(1..=3_u64));
        let queries = if rng.random_bool(0.2) { rng.random_range(33..70) } else { rng.random_range(1..=9) };
        let keys = rng.random_range(1..=600);
        let dims = [1 + u64::from(rng.random_bool(0.3)), kv_heads * group, kv_heads, queries, keys];
        let [batch, heads, kv_heads, queries, keys] = dims;
        let shape = shape([
            batch,
            heads,
            kv_heads,
            queries,
            keys,
            rng.random_range(1..=20),
            rng.random_range(1..=20),
        ]);
        let other = shape.with_query_dim(rng.random_range(1..=20)).unwrap();
        let free = rng.random_range(1..=24_usize);
        let tensors = |rng: &mut SmallRng, shape: &AttnShape| -> Vec<Tensor> {
            let given = function
                .parameters
                .iter()
                .filter(|parameter| parameter.default.is_none() || rng.random_bool(0.7));
            let given: Vec<_> = given.copied().collect();
            given
                .iter()
                .map(|parameter| {
                    let symbols = parameter.shapes[rng.random_range(0..parameter.shapes.len())];
                    let sizes: Vec<usize> =
                        symbols.iter().map(|symbol| size_of(*symbol, shape, free).unwrap()).collect();
                    let n: usize = sizes.iter().product();
                    // Numbers by themselves are widths, slopes and the like, which are positive.
                    let lowest = if symbols == [Symbol::One] { 0.1 } else { -1.0 };
                    let values = (0..n).map(|_| rng.random_range(lowest..1.0_f32)).collect();
                    Tensor { name: parameter.name.to_owned(), shape: sizes, values }
                })
                .collect()
        };
        // Of functions that compare elements, queries have the dimension of keys.
        let takes_other = {
            let score = Score::new(name, tensors(rng, &other)).unwrap();
            Operator::new(OperatorParts { score, ..OperatorParts::plain(1.0, Causal::None) }, &other).is_ok()
        };
        let shape = if takes_other { other } else { shape };
        let score = Score::new(name, tensors(rng, &shape)).unwrap();
        let scale = [1.0, function.default_scale(&shape), -0.7][rng.random_range(0..3)];
        let mask = match rng.random_range(0..4_u32) {
            0 => Causal::BottomRight.into(),
            1 => Mask {
                positions: Some(Positions::TopLeft),
                window: Window { left: Some(rng.random_range(0..90)), right: Some(300) },
                ..Mask::default()
            },
            _ => Mask::default(),
        };
        let mut parts = OperatorParts { score, mask, ..OperatorParts::plain(scale, Causal::None) };
        if rng.random_bool(0.3) {
            parts.softcap = Some([0.5, 5.0][rng.random_range(0..2)]);
        }
        if rng.random_bool(0.2) {
            parts.normaliser = Normaliser::Sigmoid { bias: rng.random_range(-2.0..1.0) };
        }
        let sent =
            [Storage::F32, Storage::Bf16, Storage::F16, Storage::Int8, Storage::Int4][rng.random_range(0..5)];
        // Some rows are so large that exponentials of them aren't in range.
        let is_large = rng.random_bool(0.4);
        let mut rows = |n: usize, dim: usize| -> Vec<f32> {
            (0..n)
                .flat_map(|_| {
                    let size = if is_large && rng.random_bool(0.1) { 60.0 } else { 1.2 };
                    (0..dim).map(|_| rng.random_range(-size..size)).collect::<Vec<f32>>()
                })
                .collect()
        };
        let q = rows(shape.batch() * shape.n_heads() * shape.n_queries(), shape.query_dim());
        let mut k = rows(shape.n_groups() * shape.n_keys(), shape.head_dim());
        let mut v = rows(shape.n_groups() * shape.n_keys(), shape.value_dim());
        k.chunks_mut(shape.head_dim())
            .chain(v.chunks_mut(shape.value_dim()))
            .for_each(|row| round_row(row, sent));
        let n_previous =
            if name == "location_aware" { q.len() / shape.query_dim() * shape.n_keys() } else { 0 };
        let previous = (0..n_previous).map(|_| rng.random_range(0.0..1.0_f32)).collect();
        let mut problem = Self {
            previous,
            shape,
            parts,
            sent,
            cuts: vec![rng.random_range(1..40), rng.random_range(40..64)],
            q,
            k,
            v,
            mask: Vec::new(),
        };
        if rng.random_bool(0.3) {
            let share = rng.random_range(0.1..1.0);
            let seen: Vec<bool> =
                (0..shape.n_queries() * shape.n_keys()).map(|_| rng.random_bool(share)).collect();
            problem.hide(|token, key| !seen[token * shape.n_keys() + key]);
        }
        problem
    }

    /// Hides keys from tokens, of all heads.
    pub(super) fn hide(&mut self, is_hidden: impl Fn(usize, usize) -> bool) {
        self.parts.selection = Some(Selection::Dense);
        let n_keys = self.shape.n_keys();
        self.mask =
            (0..self.shape.n_queries() * n_keys).map(|at| !is_hidden(at / n_keys, at % n_keys)).collect();
    }

    /// Makes keys and their values, of all groups, what is no number or too much of one.
    pub(super) fn spoil(&mut self, keys: &[usize]) {
        let (d, dv, n_keys) = (self.shape.head_dim(), self.shape.value_dim(), self.shape.n_keys());
        for group in 0..self.shape.n_groups() {
            for (i, key) in keys.iter().enumerate() {
                let row = group * n_keys + key;
                self.k[row * d..][..d].fill([f32::NAN, f32::INFINITY, 3e38][(i + group) % 3]);
                self.v[row * dv..][..dv].fill([f32::INFINITY, f32::NAN, f32::NEG_INFINITY][i % 3]);
            }
        }
    }

    fn operator(&self) -> Operator {
        Operator::new(self.parts.clone(), &self.shape).unwrap()
    }

    /// A group's keys and values as the worker that owns `slots` holds them.
    fn resident(&self, group: usize, operator: &Operator, slots: std::ops::Range<usize>) -> KvHead {
        let (d, dv, n_keys) = (self.shape.head_dim(), self.shape.value_dim(), self.shape.n_keys());
        let (key_dim, storage) = (operator.key_dim(&self.shape), operator.storage(self.sent));
        let mut kv = KvHead::with_storage(n_keys, key_dim, dv, slots.clone(), storage).unwrap();
        let bytes = |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };
        for page in (0..n_pages(n_keys)).filter(|page| slots.contains(&slot_of_page(*page))) {
            let keys = page * PAGE_KEYS..page * PAGE_KEYS + keys_in_page(page, n_keys);
            let first = group * n_keys + keys.start;
            let k = &self.k[first * d..][..keys.len() * d];
            let mut rows = vec![f32::NAN; keys.len() * key_dim];
            operator.key_rows(
                Kernels::available()[page % Kernels::available().len()],
                &self.shape,
                group,
                keys.clone(),
                k,
                &mut rows,
            );
            kv.write_k(page, &bytes(&rows), Dtype::F32, false).unwrap();
            kv.write_v(page, &bytes(&self.v[first * dv..][..keys.len() * dv]), Dtype::F32, false).unwrap();
        }
        kv
    }

    fn plane(&self, slots: &std::ops::Range<usize>) -> DensePlane {
        let n_keys = self.shape.n_keys();
        let mut plane = DensePlane::mask(self.mask.len() / n_keys, n_keys, slots).unwrap();
        for (row, seen) in self.mask.chunks(n_keys).enumerate() {
            for page in (0..n_pages(n_keys)).filter(|page| slots.contains(&slot_of_page(*page))) {
                let seen = &seen[page * PAGE_KEYS..][..keys_in_page(page, n_keys)];
                plane.write_mask(row, page, &seen.iter().map(|seen| u8::from(*seen)).collect::<Vec<_>>());
            }
        }
        plane
    }

    /// A group's result, with the slots cut at `cuts`; part `i` is computed by `kernels[i % len]`.
    pub(super) fn attend(&self, group: usize, kernels: &[&Kernels], cuts: &[usize]) -> FinishedRows {
        let (operator, shape) = (self.operator(), self.shape);
        let of_group = shape.group_size() * shape.n_queries() * shape.query_dim();
        let of_previous = shape.group_size() * shape.n_queries() * shape.n_keys();
        let edges = [&[0], cuts, &[N_SLOTS]].concat();
        let mut parts = Vec::new();
        for (i, edge) in edges.windows(2).enumerate() {
            let slots = edge[0]..edge[1];
            let (kv, plane) = (self.resident(group, &operator, slots.clone()), self.plane(&slots));
            let plane = [&plane];
            // One for each head, or none.
            let weights = self.previous.get(group * of_previous..(group + 1) * of_previous);
            let of_head = shape.n_queries() * shape.n_keys();
            let previous: Vec<&[f32]> =
                weights.map_or(Vec::new(), |weights| weights.chunks(of_head).collect());
            let call = GroupCall {
                shape,
                operator: &operator,
                group,
                q: &self.q[group * of_group..][..of_group],
                kv: &kv,
                side: Side {
                    mask: if self.mask.is_empty() { &[] } else { &plane },
                    previous: &previous,
                    ..Side::default()
                },
                compute: Effective::F32,
            };
            let has_keys = |node: &Node| keys_in_slots(node.slots(), shape.n_keys()) > 0;
            for node in cover(slots).into_iter().filter(has_keys) {
                let partial = attend_node(kernels[i % kernels.len()], &call, node, 0..shape.n_queries()).0;
                parts.push((node, partial));
            }
        }
        let whole = merge_up(Node::ROOT, &parts, kernels[0]).expect("at least one key");
        operator.finish(whole, group, &shape, None, kernels[0])
    }

    /// The worst error of a group's result over the bound, by a formula of a scale, what the function is given, a query, and a
    /// key at a position.
    pub(super) fn worst_ratio(
        &self,
        group: usize,
        got: &FinishedRows,
        formula: impl Fn(f64, &Given<'_>, &[f32], (usize, &[f32])) -> Exact,
    ) -> f64 {
        let shape = &self.shape;
        let (d, dq, dv, n_keys) = (shape.head_dim(), shape.query_dim(), shape.value_dim(), shape.n_keys());
        let row_of_kv =
            |at: At| (at.batch * shape.n_kv_heads() + at.head / shape.group_size()) * n_keys + at.key;
        let operator = self.operator();
        let intervals = operator.mask_of_group(group, shape);
        let score = |at: At| {
            let row = (at.batch * shape.n_heads() + at.head) * shape.n_queries() + at.token;
            let (q, k) = (&self.q[row * dq..][..dq], &self.k[row_of_kv(at) * d..][..d]);
            let tensors = self.parts.score.parameters();
            let previous =
                if self.previous.is_empty() { &[] } else { &self.previous[row * n_keys..][..n_keys] };
            let given = Given { function: self.parts.score.function(), tensors, shape, at, previous };
            formula(self.parts.scale.into(), &given, q, (at.key, k))
        };
        let mut visible: Vec<Predicate<'_>> =
            vec![Box::new(|at: At| intervals.visible(at.token).contains(&at.key))];
        if !self.mask.is_empty() {
            visible.push(Box::new(|at: At| self.mask[at.token * n_keys + at.key]));
        }
        let formula = Formula {
            keys: n_keys,
            value_dim: dv,
            value: Box::new(|at| &self.v[row_of_kv(at) * dv..][..dv]),
            score: Box::new(score),
            softcap: self.parts.softcap.map(f64::from),
            biases: Vec::new(),
            visible,
            normaliser: match self.parts.normaliser {
                Normaliser::Softmax => Normalised::Softmax,
                Normaliser::Sigmoid { bias } => Normalised::Sigmoid { bias: bias.into() },
            },
            sink: None,
            empty_row: EmptyRow::Zero,
        };
        let (batch, kv_head) = (group / shape.n_kv_heads(), group % shape.n_kv_heads());
        let mut worst = 0.0_f64;
        for (row, lse) in got.lse.iter().enumerate() {
            let (head, token) = (row / shape.n_queries(), row % shape.n_queries());
            let exact = formula.row(batch, kv_head * shape.group_size() + head, token);
            // Sums of sigmoids that are all flushed have no logarithm.
            let is_flushed = exact.lse < -80.0 && self.parts.normaliser != Normaliser::Softmax;
            let lse = if is_flushed { exact.lse as f32 } else { *lse };
            worst = worst.max(exact.worst_ratio(&got.context[row * dv..][..dv], lse));
        }
        worst
    }
}
