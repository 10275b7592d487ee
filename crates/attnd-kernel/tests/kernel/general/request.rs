//! A case with an operator and its dense tensors, and the ways to compute it.

use std::ops::Range;

use attnd_kernel::slot::{
    N_SLOTS, Node, PAGE_KEYS, cover, keys_in_page, keys_in_slots, n_pages, slot_of_page,
};
use attnd_kernel::{
    Bias, DensePlane, Dtype, Effective, FinishedRows, GroupCall, Kernels, Mask, Normaliser, Operator,
    OperatorParts, PartialRows, Positions, Selection, Side, attend_node,
};
use rand::RngExt;
use rand::rngs::SmallRng;

use crate::cases::{Case, merge_up};

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

impl Request {
    pub(super) fn new(case: Case, parts: OperatorParts) -> Self {
        Self { case, parts, mask: Vec::new(), bias: Vec::new() }
    }

    /// Any part or none, with at least one that takes the general path.
    pub(super) fn random(case: Case, rng: &mut SmallRng) -> Self {
        let scale = case.scale * [1.0, -0.7, 0.0, 2.0][rng.random_range(0..4)];
        let mut parts = OperatorParts::plain(scale, attnd_kernel::Causal::None);
        parts.mask = match rng.random_range(0..4_u32) {
            0 => Mask { causal: true, positions: Some(Positions::BottomRight), ..Mask::default() },
            1 => Mask { causal: true, positions: Some(Positions::TopLeft), ..Mask::default() },
            2 => Mask {
                positions: Some(Positions::Offset(attnd_kernel::PerBatch::Same(rng.random_range(-3..50)))),
                window: attnd_kernel::Window { left: Some(rng.random_range(0..90)), right: Some(7) },
                ..Mask::default()
            },
            _ => Mask { positions: Some(Positions::TopLeft), ..Mask::default() },
        };
        let (heads, queries, keys) = (case.shape.n_heads(), case.shape.n_queries(), case.shape.n_keys());
        let mut request = Self::new(case, parts);
        let which = rng.random_range(1..32_u32);
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

    fn compute(
        &self,
        kernels: &Kernels,
        slots: &Range<usize>,
        nodes: &[Node],
        tokens: Range<usize>,
    ) -> (Vec<PartialRows>, Option<(usize, usize)>) {
        let (kv, operator, planes) = (self.case.resident(slots.clone()), self.operator(), self.planes(slots));
        let [mask, bias] = planes.each_ref().map(|planes| planes.iter().collect::<Vec<_>>());
        let call = GroupCall {
            shape: self.case.shape,
            operator: &operator,
            group: 0,
            q: &self.case.q,
            kv: &kv,
            side: Side { mask: &mask, bias: &bias, ..Side::default() },
            compute: Effective::F32,
        };
        let mut overflow = None;
        let partials = nodes.iter().map(|node| {
            let (partial, found) = attend_node(kernels, &call, *node, tokens.clone());
            overflow = overflow.or(found.err().map(|found| (found.head_in_group, found.token)));
            partial
        });
        (partials.collect(), overflow)
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
        self.operator().finish(partial, 0, &self.case.shape, kernels)
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
