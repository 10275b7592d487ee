//! Rows of partials: what they must be to have been made by a kernel.

use attnd_kernel::slot::{PAGE_KEYS, n_pages, slot_of_page};
use attnd_kernel::{Normaliser, PartialRows};
use attnd_plan::CellId;

use crate::compute::CallShape;
use crate::{floats, operator};

/// m, l and o of the rows of one cell, as they came; as many bytes as the cell needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowBytes<'a> {
    pub(crate) m: &'a [u8],
    pub(crate) l: &'a [u8],
    pub(crate) o: &'a [u8],
}

impl RowBytes<'_> {
    /// The rows, if a kernel can have made them where each token sees so many keys as `seen` says.
    pub(crate) fn decode(self, seen: &[usize], call: &CallShape) -> Result<PartialRows, String> {
        let value_dim = call.shape.value_dim();
        let [m, l, o] = [self.m, self.l, self.o].map(floats::from_bytes);
        // Rows are ordered [head in group, token]: the same counts for each head.
        let rows = m.iter().zip(&l).zip(seen.iter().cycle());
        let impossible = rows.enumerate().find(|(_, ((m, l), seen))| !is_possible(**m, **l, **seen, call));
        if let Some((row, ((m, l), seen))) = impossible {
            return Err(format!("row {row} has m {m}, l {l} over {seen} keys"));
        }
        // Infinities are sums that overflowed: the client's doing. A worker says so itself where they became NaN.
        if !call.allow_non_finite
            && let Some(at) = o.iter().position(|o| o.is_nan())
        {
            return Err(format!("row {} has o NaN", at / value_dim));
        }
        Ok(PartialRows { value_dim, m, l, o })
    }
}

/// How many keys of the node each token of a cell sees. One pass over pages and one over tokens.
pub(crate) fn keys_seen(cell: &CellId, call: &CallShape) -> Vec<usize> {
    let slots = cell.node.slots();
    let n_pages = n_pages(call.shape.n_keys());
    let is_of_node = |page: usize| slots.contains(&slot_of_page(page));
    // Keys of the node before each page, all pages being whole: no mask reaches behind the last key.
    let mut before = Vec::with_capacity(n_pages + 1);
    let mut keys = 0;
    for page in 0..=n_pages {
        before.push(keys);
        keys += if is_of_node(page) { PAGE_KEYS } else { 0 };
    }
    let before_key = |key: usize| {
        let page = key / PAGE_KEYS;
        before[page] + if is_of_node(page) { key % PAGE_KEYS } else { 0 }
    };
    let mask = call.operator.mask_of_group(cell.group, &call.shape);
    let tokens = cell.first_token..cell.first_token + cell.tokens;
    let seen = tokens.map(|token| {
        let visible = mask.visible(token);
        before_key(visible.end) - before_key(visible.start)
    });
    seen.collect()
}

/// Whether a kernel can have made a row with this maximum and this sum over `seen` visible keys, or up to so many.
///
/// The maximum is an integer, so the weight of the largest score is at least `2^-0.5`, and none is over `2^0.5`; where
/// weights are sigmoids the maximum is 0, and none is over 1. Finite operands have finite scores, so a row is empty if
/// and only if it sees no key, which of those `seen` is only known where no tensor hides more of them.
pub(crate) fn is_possible(m: f32, l: f32, seen: usize, call: &CallShape) -> bool {
    let empty = m == f32::NEG_INFINITY && l == 0.0;
    let keys = seen as f32;
    let regular = match call.operator.normaliser() {
        Normaliser::Softmax => m.is_finite() && m.fract() == 0.0 && (0.7..=1.42 * keys).contains(&l),
        Normaliser::Sigmoid { .. } => m == 0.0 && (0.0..=1.01 * keys).contains(&l),
    };
    if !call.allow_non_finite {
        let may_be_empty = seen == 0 || operator::hides_single_keys(&call.operator);
        return (seen > 0 && regular) || (may_be_empty && empty);
    }
    let poisoned = m.is_nan() || m == f32::INFINITY || !l.is_finite();
    empty || regular || poisoned
}
