//! What the kernels make of a composition: each kv group of it, whole or cut among nodes as workers are.

use std::ops::Range;

use attnd_kernel::reference::problem::Dense;
use attnd_kernel::slot::{
    N_SLOTS, Node, PAGE_KEYS, cover, keys_in_page, keys_in_slots, n_pages, slot_of_page,
};
use attnd_kernel::{
    DensePlane, Dtype, Effective, EmptyRow, GroupCall, Kernels, KvHead, PartialRows, ScoreOverflow, Side,
    ValueSum, attend_node,
};

use super::case::Case;

/// Results of all rows, `[batch, heads, queries]`.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Rows {
    pub(super) context: Vec<f32>,
    pub(super) lse: Vec<f32>,
}

/// Where two results differ in bits.
pub(super) fn differing_bits(one: &Rows, other: &Rows) -> Option<String> {
    let differ = |what: &str, one: &[f32], other: &[f32]| {
        assert_eq!(one.len(), other.len());
        let at = one.iter().zip(other).position(|(one, other)| one.to_bits() != other.to_bits())?;
        Some(format!("{what}[{at}] is {:?} and {:?}", one[at], other[at]))
    };
    differ("context", &one.context, &other.context).or_else(|| differ("lse", &one.lse, &other.lse))
}

fn pages(slots: &Range<usize>, n_keys: usize) -> impl Iterator<Item = usize> {
    (0..n_pages(n_keys)).filter(move |page| slots.contains(&slot_of_page(*page)))
}

fn keys_of(page: usize, n_keys: usize) -> Range<usize> {
    page * PAGE_KEYS..page * PAGE_KEYS + keys_in_page(page, n_keys)
}

/// The keys and values of a group in some slots.
fn resident(case: &Case, group: usize, slots: &Range<usize>) -> KvHead {
    let (n_keys, d, dv) = (case.shape.n_keys(), case.shape.head_dim(), case.shape.value_dim());
    let mut kv = KvHead::new(n_keys, d, dv, slots.clone()).unwrap();
    for page in pages(slots, n_keys) {
        let keys = keys_of(page, n_keys);
        let bytes = |x: &[f32], dim: usize| -> Vec<u8> {
            let keys = (group * n_keys + keys.start) * dim..(group * n_keys + keys.end) * dim;
            x[keys].iter().flat_map(|x| x.to_le_bytes()).collect()
        };
        kv.write_k(page, &bytes(&case.k, d), Dtype::F32, false).unwrap();
        kv.write_v(page, &bytes(&case.v, dv), Dtype::F32, false).unwrap();
    }
    kv
}

/// The planes of a group in some slots, made by `plane` and filled row by row and page by page by `write`.
fn planes<T: Copy>(
    case: &Case,
    dense: Option<&Dense<T>>,
    (group, slots): (usize, &Range<usize>),
    plane: impl Fn(usize) -> DensePlane,
    write: impl Fn(&mut DensePlane, usize, usize, &[T]),
) -> Vec<DensePlane> {
    let Some(Dense { shape: [batches, heads, rows, keys], elements }) = dense else { return Vec::new() };
    let (batch, kv_head) = (group / case.shape.n_kv_heads(), group % case.shape.n_kv_heads());
    let of_group = if *heads == 1 { 1 } else { case.shape.group_size() };
    let planes = (0..of_group).map(|head| {
        let batch = if *batches == 1 { 0 } else { batch };
        let head = if *heads == 1 { 0 } else { kv_head * of_group + head };
        let mut plane = plane(*rows);
        for row in 0..*rows {
            let elements = &elements[((batch * heads + head) * rows + row) * keys..][..*keys];
            for page in pages(slots, case.shape.n_keys()) {
                let of_page = keys_of(page, case.shape.n_keys());
                write(&mut plane, row, page, &elements[of_page.start.min(*keys)..of_page.end.min(*keys)]);
            }
        }
        plane
    });
    planes.collect()
}

/// The partials of a group over some nodes of some slots.
fn partials(
    case: &Case,
    kernels: &Kernels,
    group: usize,
    slots: &Range<usize>,
    nodes: &[Node],
) -> Result<Vec<(Node, PartialRows)>, ScoreOverflow> {
    let (shape, operator) = (case.shape, case.operator());
    let rows = shape.group_size() * shape.n_queries() * shape.head_dim();
    let masks = planes(
        case,
        case.mask.as_ref(),
        (group, slots),
        |rows| DensePlane::mask(rows, shape.n_keys(), slots).unwrap(),
        |plane, row, page, seen| {
            let bytes: Vec<u8> = seen.iter().map(|seen| u8::from(*seen)).collect();
            plane.write_mask(row, page, &bytes);
        },
    );
    let biases = planes(
        case,
        case.bias.as_ref(),
        (group, slots),
        |rows| DensePlane::bias(rows, shape.n_keys(), slots).unwrap(),
        |plane, row, page, values| {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            plane.write_bias(row, page, &bytes, Dtype::F32).unwrap();
        },
    );
    let (mask, bias): (Vec<_>, Vec<_>) = (masks.iter().collect(), biases.iter().collect());
    let call = GroupCall {
        shape,
        operator: &operator,
        group,
        q: &case.q[group * rows..][..rows],
        kv: &resident(case, group, slots),
        side: Side { mask: &mask, bias: &bias, ..Side::default() },
        compute: Effective::F32,
    };
    let of_node = |node: &Node| {
        let (partial, overflow) = attend_node(kernels, &call, *node, 0..shape.n_queries());
        overflow.map(|()| (*node, partial))
    };
    nodes.iter().map(of_node).collect()
}

/// The canonical tree by its definition: a node is its two children, left first.
fn merge_up(node: Node, parts: &[(Node, PartialRows)], kernels: &Kernels) -> Option<PartialRows> {
    if let Some((_, part)) = parts.iter().find(|(of, _)| *of == node) {
        return Some(part.clone());
    }
    let (left, right) = node.children()?;
    match (merge_up(left, parts, kernels), merge_up(right, parts, kernels)) {
        (Some(left), Some(right)) => Some(left.merge(&right, kernels)),
        (one, other) => one.or(other),
    }
}

/// All groups on one node.
pub(super) fn attend(case: &Case, kernels: &Kernels) -> Result<Rows, ScoreOverflow> {
    let mut all = Rows::default();
    for group in 0..case.shape.n_groups() {
        let parts = partials(case, kernels, group, &(0..N_SLOTS), &[Node::ROOT])?;
        finish(case, group, &parts, kernels, &mut all);
    }
    Ok(all)
}

/// All groups with their slots cut at `cuts`, the parts by one kernel after the other.
pub(super) fn attend_cut(case: &Case, kernels: &[&Kernels], cuts: &[usize]) -> Rows {
    let edges = [&[0], cuts, &[N_SLOTS]].concat();
    let mut all = Rows::default();
    for group in 0..case.shape.n_groups() {
        let mut parts = Vec::new();
        for (nth, edge) in edges.windows(2).enumerate() {
            let slots = edge[0]..edge[1];
            let has_keys = |node: &Node| keys_in_slots(node.slots(), case.shape.n_keys()) > 0;
            let nodes: Vec<Node> = cover(slots.clone()).into_iter().filter(has_keys).collect();
            parts.extend(partials(case, kernels[nth % kernels.len()], group, &slots, &nodes).unwrap());
        }
        finish(case, group, &parts, kernels[0], &mut all);
    }
    all
}

/// Adds the finished rows of a group.
fn finish(case: &Case, group: usize, parts: &[(Node, PartialRows)], kernels: &Kernels, all: &mut Rows) {
    let whole = merge_up(Node::ROOT, parts, kernels).unwrap();
    let mut sum = ValueSum::new(&case.shape);
    let of_group = case.shape.n_keys() * case.shape.value_dim();
    sum.add(&case.v[group * of_group..][..of_group]);
    let mean = sum.mean().filter(|_| case.parts.empty_row == EmptyRow::Uniform);
    let finished = case.operator().finish(whole, group, &case.shape, mean.as_deref(), kernels);
    all.context.extend_from_slice(&finished.context);
    all.lse.extend_from_slice(&finished.lse);
}
