//! A cell in slices short enough to be given up between two of them.
//!
//! A kernel can't be interrupted, and a cell over a million keys takes seconds. So a large cell is computed by parts
//! of its tokens, and where few tokens see very many keys by the children of its node, which merge as the canonical
//! tree says: the bits are those of the whole.

use std::ops::Range;

use attnd_kernel::slot::{Node, keys_in_slots};
use attnd_kernel::{GroupCall, Kernels, PartialRows, ScoreOverflow, attend_node};

/// Multiply-adds of a slice on one thread: some ten milliseconds.
const SLICE: u64 = 1 << 30;
/// Multiply-adds of a row in whose time an element of keys and values is read from memory.
const READ: u64 = 8;
/// Tokens below which a slice is not cut further by tokens: the kernels work on blocks of rows of about that size.
const TOKENS: usize = 48;

type Outcome = (PartialRows, Result<(), ScoreOverflow>);

/// Computes cells of one group.
#[derive(Debug)]
pub(crate) struct Slicer<'a, G> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) call: GroupCall<'a>,
    /// Multiply-adds of a slice.
    most: u64,
    /// Whether the answer is still wanted; asked before each slice.
    go_on: G,
}

impl<'a, G: Fn() -> bool> Slicer<'a, G> {
    /// On the current rayon pool.
    pub(crate) fn new(kernels: &'a Kernels, call: GroupCall<'a>, go_on: G) -> Self {
        Self { kernels, call, most: SLICE * rayon::current_num_threads() as u64, go_on }
    }

    /// The same for one of so many cells that are computed at once: each has its part of the threads.
    pub(crate) fn one_of(self, cells: usize) -> Self {
        let threads = rayon::current_num_threads() / cells.max(1);
        Self { most: SLICE * threads.max(1) as u64, ..self }
    }

    /// What [`attend_node`] gives, or `None` once nobody wants it any more.
    pub(crate) fn attend(&self, node: Node, tokens: Range<usize>) -> Option<Outcome> {
        let shape = &self.call.shape;
        let keys = keys_in_slots(node.slots(), shape.n_keys());
        // Not more than the mask shows: kernels look at no other pages.
        let mask = self.call.operator.mask_of_group(self.call.group, shape);
        let visible = tokens.clone().map(|token| mask.visible(token).len().min(keys) as u64);
        let (seen, widest) = visible.fold((0, 0), |(sum, most), n| (sum + n, n.max(most)));
        let of_score = self.call.operator.score_cost(shape);
        let per_key = (shape.group_size() * (of_score + shape.value_dim())) as u64;
        // What is made of queries is made again for each slice, and cut by tokens alone.
        let of_queries = if self.call.operator.keeps_queries() || tokens.len() <= TOKENS {
            0
        } else {
            let each = (shape.query_dim() * self.call.operator.packed_dim(shape)) as u64;
            each * (shape.group_size() * tokens.len()) as u64
        };
        // Where few rows look at keys, these take as long as they take to come.
        let read = widest.saturating_mul((shape.head_dim() + shape.value_dim()) as u64 * READ);
        let work = seen.saturating_mul(per_key).saturating_add(of_queries).max(read);
        if work <= self.most {
            return (self.go_on)().then(|| attend_node(self.kernels, &self.call, node, tokens));
        }
        if tokens.len() > TOKENS {
            let per_token = (work / tokens.len() as u64).max(1);
            let affordable = usize::try_from(self.most / per_token).unwrap_or(TOKENS);
            return self.by_tokens(node, tokens, (affordable / TOKENS).max(1) * TOKENS);
        }
        match node.children() {
            Some((left, right)) => self.by_children(left, right, tokens),
            None => (self.go_on)().then(|| attend_node(self.kernels, &self.call, node, tokens)),
        }
    }

    fn by_tokens(&self, node: Node, tokens: Range<usize>, step: usize) -> Option<Outcome> {
        let (heads, dim) = (self.call.shape.group_size(), self.call.shape.value_dim());
        let mut whole = PartialRows::empty(heads * tokens.len(), dim);
        let mut finite = Ok(());
        for first in tokens.clone().step_by(step) {
            let part = first..(first + step).min(tokens.end);
            let (rows, part_finite) = self.attend(node, part.clone())?;
            finite = finite.and(part_finite);
            // Rows are ordered [head, token]: a part is a run in each head.
            for head in 0..heads {
                let from = head * part.len()..(head + 1) * part.len();
                let to = head * tokens.len() + part.start - tokens.start;
                let to = to..to + part.len();
                whole.m[to.clone()].copy_from_slice(&rows.m[from.clone()]);
                whole.l[to.clone()].copy_from_slice(&rows.l[from.clone()]);
                whole.o[to.start * dim..to.end * dim]
                    .copy_from_slice(&rows.o[from.start * dim..from.end * dim]);
            }
        }
        Some((whole, finite))
    }

    fn by_children(&self, left: Node, right: Node, tokens: Range<usize>) -> Option<Outcome> {
        let n_keys = self.call.shape.n_keys();
        let mut merged: Option<Outcome> = None;
        // A child without keys is absent, which is not the same as empty.
        for child in [left, right].into_iter().filter(|child| keys_in_slots(child.slots(), n_keys) > 0) {
            let (rows, finite) = self.attend(child, tokens.clone())?;
            merged = Some(match merged {
                Some((left, left_finite)) => (left.merge(&rows, self.kernels), earlier(left_finite, finite)),
                None => (rows, finite),
            });
        }
        merged
    }
}

/// The overflow of the earlier token, then head.
fn earlier(a: Result<(), ScoreOverflow>, b: Result<(), ScoreOverflow>) -> Result<(), ScoreOverflow> {
    match (a, b) {
        (Err(a), Err(b)) if (b.token, b.head_in_group) < (a.token, a.head_in_group) => Err(b),
        (Err(a), _) => Err(a),
        (Ok(()), b) => b,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use attnd_kernel::{AttnShape, Causal, Dims, Dtype, Effective, KvHead, Operator, Side};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const DIMS: Dims =
        Dims { batch: 1, heads: 3, kv_heads: 1, queries: 130, keys: 9_000, head_dim: 4, value_dim: 5 };

    fn operands(shape: &AttnShape) -> (Vec<f32>, KvHead) {
        let mut rng = StdRng::seed_from_u64(9);
        let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-2.0..2.0)).collect() };
        let q = random(3 * 130 * 4);
        let mut kv = KvHead::new(shape.n_keys(), 4, 5, 0..64).unwrap();
        for page in 0..shape.n_keys().div_ceil(256) {
            let keys = (shape.n_keys() - page * 256).min(256);
            let bytes =
                |values: Vec<f32>| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
            kv.write_k(page, &bytes(random(keys * 4)), Dtype::F32, true).unwrap();
            kv.write_v(page, &bytes(random(keys * 5)), Dtype::F32, true).unwrap();
        }
        (q, kv)
    }

    #[test]
    fn slices_of_any_size_have_the_bits_of_the_whole() {
        let shape = AttnShape::new(DIMS).unwrap();
        let (q, kv) = operands(&shape);
        let call = GroupCall {
            shape,
            operator: &Operator::plain(0.5, Causal::BottomRight),
            group: 0,
            q: &q,
            kv: &kv,
            side: Side::default(),
            compute: Effective::F32,
        };
        let kernels = Kernels::from_env().unwrap();
        for node in [Node::ROOT, Node::new(5, 1).unwrap(), Node::new(0, 17).unwrap()] {
            let whole = attend_node(kernels, &call, node, 7..130);
            for most in [1, 1 << 16, 1 << 20, 1 << 23, u64::MAX] {
                let asked = Cell::new(0);
                let go_on = || {
                    asked.set(asked.get() + 1);
                    true
                };
                let slicer = Slicer { kernels, call, most, go_on };
                assert!(slicer.attend(node, 7..130) == Some(whole.clone()), "{node:?}, at most {most}");
                assert!(asked.get() > 1 || most > 1, "the smallest slices are several");
            }
        }
    }

    #[test]
    fn nothing_more_is_computed_once_nobody_wants_it() {
        let shape = AttnShape::new(DIMS).unwrap();
        let (q, kv) = operands(&shape);
        let operator = Operator::plain(0.5, Causal::None);
        let call = GroupCall {
            shape,
            operator: &operator,
            group: 0,
            q: &q,
            kv: &kv,
            side: Side::default(),
            compute: Effective::F32,
        };
        let left = Cell::new(3);
        let go_on = || left.replace(left.get() - 1) > 0;
        let slicer = Slicer { kernels: Kernels::from_env().unwrap(), call, most: 1 << 16, go_on };
        assert!(slicer.attend(Node::ROOT, 0..130).is_none());
        assert_eq!(left.get(), -1, "asked once more and not again");
    }

    #[test]
    fn the_earliest_overflow_is_reported() {
        let at = |token, head_in_group| Err(ScoreOverflow { head_in_group, token });
        assert_eq!(earlier(at(5, 0), at(4, 1)), at(4, 1));
        assert_eq!(earlier(at(4, 1), at(4, 2)), at(4, 1));
        assert_eq!(earlier(Ok(()), at(1, 1)), at(1, 1));
        assert_eq!(earlier(at(1, 1), Ok(())), at(1, 1));
    }
}
