//! A case with an operator and its dense tensors, and the ways to compute it.

use std::ops::Range;

use attnd_kernel::slot::{
    N_SLOTS, Node, PAGE_KEYS, cover, keys_in_page, keys_in_slots, n_pages, slot_of_page,
};
use attnd_kernel::{
    Bias, Csr, DensePlane, Documents, Dtype, Effective, FinishedRows, GroupCall, Kernels, Mask, Normaliser,
    Operator, OperatorParts, PartialRows, PerBatch, Positions, Relative, Selection, Shift, Side, Swin,
    attend_node,
};
use rand::RngExt;
use rand::rngs::SmallRng;

use crate::cases::{Case, merge_up};
use crate::masks::runs;

#[derive(Clone)]
pub(super) struct Request {
    pub(super) case: Case,
    pub(super) parts: OperatorParts,
    /// `[1 or group][1 or queries, keys]`.
    pub(super) mask: Vec<Vec<bool>>,
    /// The same of the dense bias.
    pub(super) bias: Vec<Vec<f32>>,
}

/// Slots at which the keys are cut.
pub(super) fn random_cuts(rng: &mut SmallRng) -> Vec<usize> {
    let mut cuts: Vec<usize> = (0..rng.random_range(1..5)).map(|_| rng.random_range(1..N_SLOTS)).collect();
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}

/// Blocks of any size, from none of a row to all of it.
pub(super) fn random_csr(rng: &mut SmallRng, layouts: usize, queries: usize, keys: usize) -> Csr {
    let sizes = [1, 2, 3, 16, 64, 100, 256, 300];
    let block = |rng: &mut SmallRng| sizes[rng.random_range(0..sizes.len())];
    let (query_block, key_block) = (block(rng), block(rng));
    let (mut row_ptr, mut columns) = (Vec::new(), Vec::new());
    for _ in 0..layouts {
        let begin = columns.len();
        let row = |_| {
            let share = [0.0, 0.1, 0.5, 0.9, 1.0][rng.random_range(0..5)];
            columns.extend((0..keys.div_ceil(key_block) as u32).filter(|_| rng.random_bool(share)));
            (columns.len() - begin) as u32
        };
        row_ptr.extend([0].into_iter().chain((0..queries.div_ceil(query_block)).map(row)));
    }
    Csr::new((query_block, key_block), layouts, row_ptr.into(), columns.into()).unwrap()
}

/// Documents in runs that come again, of queries and of keys; some have none of either.
pub(super) fn scattered_documents(rng: &mut SmallRng, queries: usize, keys: usize) -> Documents {
    let mut of = |tokens: usize| {
        let mut ids: Vec<u32> = Vec::new();
        while ids.len() < tokens {
            let run = rng.random_range(1..=tokens.div_ceil(3)).min(tokens - ids.len());
            ids.extend(std::iter::repeat_n(rng.random_range(0..4), run));
        }
        vec![runs(&ids)]
    };
    let queries = of(queries);
    Documents::new(&queries, &of(keys)).unwrap()
}

/// A bias of windows with so many tokens, shifted or not.
fn random_swin(rng: &mut SmallRng, heads: usize, tokens: usize) -> Swin {
    let heights: Vec<usize> = (1..=tokens).filter(|height| tokens.is_multiple_of(*height)).collect();
    let height = heights[rng.random_range(0..heights.len())];
    let width = tokens / height;
    let table =
        (0..(2 * height - 1) * (2 * width - 1) * heads).map(|_| rng.random_range(-3.0..3.0)).collect();
    let shift = rng.random::<bool>().then(|| Shift {
        regions: (0..tokens).map(|_| rng.random_range(0..3)).collect(),
        between: [-100.0, -2.0][rng.random_range(0..2)],
    });
    Swin { height, width, table, shift }
}

impl Request {
    pub(super) fn new(case: Case, parts: OperatorParts) -> Self {
        Self { case, parts, mask: Vec::new(), bias: Vec::new() }
    }

    /// Any part or none, nearly always with at least one that takes the general path.
    pub(super) fn random(case: Case, rng: &mut SmallRng) -> Self {
        let scale = case.scale * [1.0, -0.7, 0.0, 2.0][rng.random_range(0..4)];
        let mut parts = OperatorParts::plain(scale, attnd_kernel::Causal::None);
        parts.mask = match rng.random_range(0..4_u32) {
            0 => Mask { causal: true, positions: Some(Positions::BottomRight), ..Mask::default() },
            1 => Mask { causal: true, positions: Some(Positions::TopLeft), ..Mask::default() },
            2 => Mask {
                positions: Some(Positions::Offset(PerBatch::Same(rng.random_range(-3..50)))),
                window: attnd_kernel::Window { left: Some(rng.random_range(0..90)), right: Some(7) },
                ..Mask::default()
            },
            _ => Mask { positions: Some(Positions::TopLeft), ..Mask::default() },
        };
        let (heads, queries, keys) = (case.shape.n_heads(), case.shape.n_queries(), case.shape.n_keys());
        if rng.random_range(0..3) == 0 {
            parts.mask.key_begin = Some(PerBatch::Same(rng.random_range(0..=keys)));
        }
        let mut request = Self::new(case, parts);
        let which = rng.random_range(1..256_u32);
        if which & 1 != 0 {
            request.parts.softcap = Some([0.5, 5.0, 50.0][rng.random_range(0..3)]);
        }
        let rows = |rng: &mut SmallRng| if rng.random() { 1 } else { queries };
        let planes = |rng: &mut SmallRng| if rng.random() { 1 } else { heads };
        if which & 2 != 0 {
            // From nearly all to nearly none, by row.
            request.parts.selection = Some(Selection::Dense);
            let (planes, rows) = (planes(rng), rows(rng));
            request.mask = (0..planes)
                .map(|_| {
                    (0..rows)
                        .flat_map(|_| {
                            let share = [0.0, 0.02, 0.5, 0.98, 1.0][rng.random_range(0..5)];
                            (0..keys).map(|_| rng.random_bool(share)).collect::<Vec<_>>()
                        })
                        .collect()
                })
                .collect();
        }
        if which & 4 != 0 {
            request.parts.biases.push(Bias::Dense);
            let (planes, rows) = (planes(rng), rows(rng));
            let mut value = || match rng.random_range(0..20_u32) {
                0 => f32::NEG_INFINITY,
                1 => f32::MIN,
                2 => -1e4,
                _ => rng.random_range(-3.0..3.0_f32),
            };
            request.bias = (0..planes).map(|_| (0..rows * keys).map(|_| value()).collect()).collect();
        }
        if which & 8 != 0 {
            let slopes: Vec<f32> = (0..heads).map(|_| rng.random_range(-0.01..0.3)).collect();
            request.parts.biases.push(Bias::Alibi { slopes: slopes.into(), by_key: rng.random() });
        }
        if which & 32 != 0 {
            let buckets = rng.random_range(4..40);
            let table = (0..buckets * heads).map(|_| rng.random_range(-3.0..3.0)).collect();
            let relative = Relative::new(table, buckets, rng.random_range(20..300), rng.random());
            request.parts.biases.push(Bias::Relative(relative.unwrap()));
        }
        if queries == keys && rng.random() {
            request.parts.biases.push(Bias::Swin(random_swin(rng, heads, keys)));
        }
        if which & 64 != 0 {
            let layouts = if rng.random() { 1 } else { heads };
            request.parts.csr = Some(random_csr(rng, layouts, queries, keys));
        }
        if which & 128 != 0 && !matches!(request.parts.mask.positions, Some(Positions::Offset(_))) {
            request.parts.mask.documents = Some(scattered_documents(rng, queries, keys).into());
        } else if which & 127 == 0 {
            request.parts.softcap = Some(20.0);
        }
        if which & 16 != 0 {
            request.parts.normaliser = Normaliser::Sigmoid { bias: rng.random_range(-4.0..1.0_f32) };
        }
        request
    }

    pub(super) fn group(&self) -> usize {
        self.case.shape.group_size()
    }
    pub(super) fn n_queries(&self) -> usize {
        self.case.shape.n_queries()
    }
    pub(super) fn n_keys(&self) -> usize {
        self.case.shape.n_keys()
    }

    pub(super) fn operator(&self) -> Operator {
        Operator::new(self.parts.clone(), &self.case.shape).unwrap()
    }

    /// Who sees what by the intervals, `[queries, keys]`.
    pub(super) fn intervals(&self) -> Vec<bool> {
        let (operator, shape) = (self.operator(), self.case.shape);
        let mask = operator.mask_of_group(0, &shape);
        let of_token = |token| {
            let visible = mask.visible(token);
            (0..shape.n_keys()).map(move |key| visible.contains(&key))
        };
        (0..shape.n_queries()).flat_map(of_token).collect()
    }

    /// The planes that the worker that owns `slots` holds.
    fn planes(&self, slots: &Range<usize>) -> [Vec<DensePlane>; 2] {
        let n_keys = self.n_keys();
        let pages: Vec<usize> =
            (0..n_pages(n_keys)).filter(|page| slots.contains(&slot_of_page(*page))).collect();
        let keys = |page: usize| page * PAGE_KEYS..page * PAGE_KEYS + keys_in_page(page, n_keys);
        let mask = self.mask.iter().map(|elements| {
            let mut plane = DensePlane::mask(elements.len() / n_keys, n_keys, slots).unwrap();
            for (row, elements) in elements.chunks(n_keys).enumerate() {
                for page in &pages {
                    let bytes: Vec<u8> = elements[keys(*page)].iter().map(|seen| u8::from(*seen)).collect();
                    plane.write_mask(row, *page, &bytes);
                }
            }
            plane
        });
        let bias = self.bias.iter().map(|elements| {
            let mut plane = DensePlane::bias(elements.len() / n_keys, n_keys, slots).unwrap();
            for (row, elements) in elements.chunks(n_keys).enumerate() {
                for page in &pages {
                    let bytes: Vec<u8> =
                        elements[keys(*page)].iter().flat_map(|bias| bias.to_le_bytes()).collect();
                    plane.write_bias(row, *page, &bytes, Dtype::F32).unwrap();
                }
            }
            plane
        });
        [mask.collect(), bias.collect()]
    }

    /// The call as the worker that owns `slots` makes it.
    pub(super) fn with_call<T>(&self, slots: &Range<usize>, work: impl FnOnce(&GroupCall<'_>) -> T) -> T {
        let (kv, operator, planes) = (self.case.resident(slots.clone()), self.operator(), self.planes(slots));
        let [mask, bias] = planes.each_ref().map(|planes| planes.iter().collect::<Vec<_>>());
        work(&GroupCall {
            shape: self.case.shape,
            operator: &operator,
            group: 0,
            q: &self.case.q,
            kv: &kv,
            side: Side { mask: &mask, bias: &bias, ..Side::default() },
            compute: Effective::F32,
        })
    }

    fn compute(
        &self,
        kernels: &Kernels,
        slots: &Range<usize>,
        nodes: &[Node],
        tokens: Range<usize>,
    ) -> (Vec<PartialRows>, Option<(usize, usize)>) {
        self.with_call(slots, |call| {
            let mut overflow = None;
            let partials = nodes.iter().map(|node| {
                let (partial, found) = attend_node(kernels, call, *node, tokens.clone());
                overflow = overflow.or(found.err().map(|found| (found.head_in_group, found.token)));
                partial
            });
            (partials.collect(), overflow)
        })
    }

    pub(super) fn partial(
        &self,
        kernels: &Kernels,
        slots: &Range<usize>,
        node: Node,
        tokens: Range<usize>,
    ) -> PartialRows {
        self.compute(kernels, slots, &[node], tokens).0.remove(0)
    }

    /// The first head and token with a score that left f32.
    pub(super) fn overflow(&self, kernels: &Kernels) -> Option<(usize, usize)> {
        self.compute(kernels, &(0..N_SLOTS), &[Node::ROOT], 0..self.n_queries()).1
    }

    fn finish(&self, partial: PartialRows, kernels: &Kernels) -> FinishedRows {
        self.operator().finish(partial, 0, &self.case.shape, None, kernels)
    }

    pub(super) fn attend_tokens(&self, kernels: &Kernels, tokens: Range<usize>) -> FinishedRows {
        self.finish(self.partial(kernels, &(0..N_SLOTS), Node::ROOT, tokens), kernels)
    }

    pub(super) fn attend(&self, kernels: &Kernels) -> FinishedRows {
        self.attend_tokens(kernels, 0..self.n_queries())
    }

    /// With the slots cut at `cuts`; part `i` is computed by `kernels[i % len]`.
    pub(super) fn attend_cut(&self, kernels: &[&Kernels], cuts: &[usize]) -> FinishedRows {
        let edges = [&[0], cuts, &[N_SLOTS]].concat();
        let mut parts = Vec::new();
        for (i, edge) in edges.windows(2).enumerate() {
            let slots = edge[0]..edge[1];
            let has_keys = |node: &Node| keys_in_slots(node.slots(), self.n_keys()) > 0;
            let nodes: Vec<Node> = cover(slots.clone()).into_iter().filter(has_keys).collect();
            let partials = self.compute(kernels[i % kernels.len()], &slots, &nodes, 0..self.n_queries()).0;
            parts.extend(nodes.into_iter().zip(partials));
        }
        let whole = merge_up(Node::ROOT, &parts, kernels[0]).expect("at least one key");
        self.finish(whole, kernels[0])
    }
}
