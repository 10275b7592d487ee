//! One kv group's part of a call: rows in blocks, blocks and sub-trees over threads.
//!
//! The query heads of a kv group and their tokens fold into rows (token first, then head), so keys and values are read
//! once for all of them. Blocks of rows are independent. Where there are too few blocks to keep the pool busy, the
//! node splits into its children: those are nodes of the same tree, so who computes which cannot show in the bits.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use crate::bias::Bias;
use crate::block::{BLOCK_ROWS, QueryLayout, RowBlock, RowPartials, Span};
use crate::buffer::Buffer;
use crate::compute::{Compute, Effective};
use crate::dispatch::Kernels;
use crate::float_env::FloatEnvironment;
use crate::general::reduce::{Layout, Located};
use crate::general::{self, GeneralBlock, RowTerms};
use crate::mask::{BatchMask, Selection};
use crate::operator::{Operator, Path, Queries};
use crate::pages::{KvView, padded_columns};
use crate::partial::PartialRows;
use crate::plane::DensePlane;
use crate::shape::{AttnShape, MAX_INT8_DIM};
use crate::slot::{Node, PAGE_KEYS, pages_of_slot};

/// Blocks per thread below which the keys are split too.
pub(crate) const BLOCKS_PER_THREAD: usize = 2;
/// Pages that a task is worth.
const MIN_PAGES: usize = 4;

/// One kv group of one call.
#[derive(Clone, Copy, Debug)]
pub struct GroupCall<'a> {
    /// The whole call's shape.
    pub shape: AttnShape,
    /// What is computed beside products; made for that shape.
    pub operator: &'a Operator,
    /// Which kv group of the batch it is; batch elements may have masks of their own.
    pub group: usize,
    /// `[group_size, n_queries, query_dim]`, as it was sent.
    pub q: &'a [f32],
    /// The group's keys, as [`Operator::key_rows`] makes them, and values.
    pub kv: &'a KvView,
    /// What else the operator reads.
    pub side: Side<'a>,
    /// In what arithmetic. Where kernels lack the one that is wanted, [`Kernels::effective`] says what there is instead, and
    /// whoever calls decides to go on with that: nothing here falls back.
    pub compute: Effective,
}

/// Dense tensors beside the operands of a kv group. Of each there is a plane for all its heads, or one for each of them; none
/// where the operator has no such tensor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Side<'a> {
    /// For [`crate::Selection::Dense`].
    pub mask: &'a [&'a DensePlane],
    /// For [`Bias::Dense`].
    pub bias: &'a [&'a DensePlane],
    /// The weights that rows had before, where [`Operator::reads_previous`]: planes of `[n_queries, n_keys]`, or of one row for all
    /// queries.
    pub previous: &'a [&'a [f32]],
}

impl<'a> Side<'a> {
    /// # Panics
    /// If planes aren't those that the operator reads, or not of the call's shape.
    fn check(&self, call: &GroupCall<'_>) {
        let (operator, shape) = (call.operator, &call.shape);
        let has_bias = operator.biases().contains(&Bias::Dense);
        let counts = |is_there: bool| if is_there { [1, shape.group_size()] } else { [0; 2] };
        assert!(
            counts(operator.reads_previous()).contains(&self.previous.len()),
            "planes of previous weights"
        );
        for plane in self.previous {
            let sizes = [1, shape.n_queries()].map(|rows| rows * shape.n_keys());
            assert!(sizes.contains(&plane.len()), "{} previous weights in a plane", plane.len());
        }
        let has_mask = operator.selection() == Some(Selection::Dense);
        for (planes, is_there, is_bias) in [(self.mask, has_mask, false), (self.bias, has_bias, true)] {
            assert!(counts(is_there).contains(&planes.len()), "{} planes, bias: {is_bias}", planes.len());
            for plane in planes {
                let rows = [1, shape.n_queries()].contains(&plane.n_rows());
                assert!(rows && plane.n_keys() == shape.n_keys(), "shape of a plane, bias: {is_bias}");
                assert_eq!(plane.is_bias(), is_bias, "kind of a plane");
            }
        }
    }

    /// The plane of a head of the group.
    fn of_head<T: ?Sized>(planes: &[&'a T], head: usize) -> Option<&'a T> {
        planes.get(if planes.len() == 1 { 0 } else { head }).copied()
    }
}

impl GroupCall<'_> {
    /// Checks that the parts fit together, that these kernels compute as it says, and that it has these query tokens.
    ///
    /// # Panics
    /// If not.
    pub(crate) fn check(&self, kernels: &Kernels, tokens: &Range<usize>) {
        let call = self;
        let shape = &call.shape;
        let group = shape.group_size();
        let operator = call.operator;
        assert_eq!(call.q.len(), group * shape.n_queries() * shape.query_dim(), "length of q");
        assert_eq!(
            (call.kv.n_keys(), call.kv.head_dim(), call.kv.value_dim()),
            (shape.n_keys(), operator.key_dim(shape), shape.value_dim()),
            "shape of kv"
        );
        assert_eq!(operator.storage(call.kv.storage()), call.kv.storage(), "storage of kv");
        let (int8, dims) = (call.compute.compute() == Compute::Int8, [shape.head_dim(), shape.value_dim()]);
        assert!(
            !int8 || dims.iter().all(|dim| *dim <= MAX_INT8_DIM),
            "dimensions {dims:?} of int8 dot products"
        );
        assert!(call.group < shape.n_groups(), "group {} of {}", call.group, shape.n_groups());
        assert!(tokens.end <= shape.n_queries(), "tokens {tokens:?} of {}", shape.n_queries());
        let compute = call.compute.compute();
        match kernels.effective(compute, call.kv.storage()) {
            Ok(there) => assert_eq!(there.compute(), compute, "{kernels:?} compute in {there}"),
            Err(mismatch) => panic!("{mismatch}"),
        }
        assert_eq!(operator.check_compute(compute), Ok(()));
        call.side.check(call);
    }
}

/// A score left the range of f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the score of head {head_in_group} of the group, token {token}, leaves the range of f32")]
pub struct ScoreOverflow {
    /// Which head of the group.
    pub head_in_group: usize,
    /// Which query token.
    pub token: usize,
}

/// Computes the partial of query tokens `tokens` of a group over the keys of `node`, on the current rayon pool. Rows
/// are ordered `[head in group, token]`.
///
/// # Errors
/// The first row, by token and then by head, one of whose scores is NaN or infinite although the operands may be finite. The partial is computed
/// all the same and handed back with it: a caller that allows such values goes on with that.
///
/// # Panics
/// If `q` or `kv` doesn't have the call's shape, the group isn't one of it, `tokens` reaches past the last query, or a slot of
/// `node` isn't resident in `kv`, or `compute` isn't for its storage, not what these kernels have or not what the operator's path
/// has, or planes aren't those that the operator reads.
pub fn attend_node(
    kernels: &Kernels,
    call: &GroupCall<'_>,
    node: Node,
    tokens: Range<usize>,
) -> (PartialRows, Result<(), ScoreOverflow>) {
    call.check(kernels, &tokens);
    let (shape, compute) = (&call.shape, call.compute.compute());
    let group = shape.group_size();
    let operator = call.operator;
    let n_rows = tokens.len() * group;
    if n_rows == 0 {
        return (PartialRows::empty(0, shape.value_dim()), Ok(()));
    }
    let blocks = n_rows.div_ceil(BLOCK_ROWS);
    // A thread alone takes the node whole: one forward-moving address through all its pages.
    let threads = rayon::current_num_threads();
    let enough = if threads == 1 { 1 } else { BLOCKS_PER_THREAD * threads };
    let queries = operator.queries(kernels, shape, call.group, tokens.clone(), call.q);
    let task = NodeTask { kernels, call, queries, compute, tokens };
    let nodes = split(node, call.kv.n_keys(), enough.div_ceil(blocks));
    task.subtree(&nodes).unwrap_or_else(|| (PartialRows::empty(n_rows, shape.value_dim()), Ok(())))
}

/// Splits a node into about `parts` nodes that tile it, in order; absent children are left out.
pub(crate) fn split(node: Node, n_keys: usize, parts: usize) -> Tree {
    let pages: usize = node.slots().map(|slot| pages_of_slot(slot, n_keys).count()).sum();
    match node.children() {
        _ if pages == 0 => Tree::Absent,
        Some((left, right)) if parts > 1 && pages >= 2 * MIN_PAGES => {
            let parts = parts.div_ceil(2);
            Tree::Split(Box::new((split(left, n_keys, parts), split(right, n_keys, parts))))
        }
        _ => Tree::Whole(node),
    }
}

pub(crate) enum Tree {
    Absent,
    Whole(Node),
    Split(Box<(Tree, Tree)>),
}

struct NodeTask<'a> {
    kernels: &'a Kernels,
    call: &'a GroupCall<'a>,
    queries: Queries<'a>,
    compute: Compute,
    tokens: Range<usize>,
}

type Outcome = (PartialRows, Result<(), ScoreOverflow>);

impl NodeTask<'_> {
    fn subtree(&self, tree: &Tree) -> Option<Outcome> {
        match tree {
            Tree::Absent => None,
            Tree::Whole(node) => Some(self.node(*node)),
            Tree::Split(children) => {
                let (left, right) = rayon::join(|| self.subtree(&children.0), || self.subtree(&children.1));
                match (left, right) {
                    (Some((left, ok)), Some((right, right_ok))) => {
                        Some((left.merge(&right, self.kernels), earlier(ok, right_ok)))
                    }
                    (one, other) => one.or(other),
                }
            }
        }
    }

    fn node(&self, node: Node) -> Outcome {
        let shape = &self.call.shape;
        let mut pages: Vec<usize> =
            node.slots().flat_map(|slot| pages_of_slot(slot, shape.n_keys())).collect();
        pages.sort_unstable();
        let n_rows = self.tokens.len() * shape.group_size();
        let mut partial = PartialRows::empty(n_rows, shape.value_dim());
        let overflows: Vec<Option<ScoreOverflow>> =
            self.blocks(&mut partial).into_par_iter().map(|block| self.block(block, &pages)).collect();
        let overflow = overflows.into_iter().map(|found| found.map_or(Ok(()), Err)).fold(Ok(()), earlier);
        (partial, overflow)
    }

    /// Cuts the rows of a partial, ordered `[head, token]`, into blocks of some heads times some tokens.
    fn blocks<'p>(&self, partial: &'p mut PartialRows) -> Vec<Block<'p>> {
        let (group, n_tokens) = (self.call.shape.group_size(), self.tokens.len());
        let heads_per_block = group.min(BLOCK_ROWS);
        let tokens_per_block = BLOCK_ROWS / heads_per_block;
        let (value_dim, per_head) = (partial.value_dim, n_tokens.div_ceil(tokens_per_block));
        let mut blocks: Vec<Block<'p>> = Vec::new();
        let rows = partial.m.chunks_mut(n_tokens).zip(partial.l.chunks_mut(n_tokens));
        for (head, ((m, l), o)) in rows.zip(partial.o.chunks_mut(n_tokens * value_dim)).enumerate() {
            let m = m.chunks_mut(tokens_per_block);
            let l = l.chunks_mut(tokens_per_block);
            let o = o.chunks_mut(tokens_per_block * value_dim);
            let new_row_of_blocks = head % heads_per_block == 0;
            let first = head / heads_per_block * per_head;
            for (i, ((m, l), o)) in m.zip(l).zip(o).enumerate() {
                if new_row_of_blocks {
                    let first_token = self.tokens.start + i * tokens_per_block;
                    blocks.push(Block {
                        first_head: head,
                        first_token,
                        n_tokens: m.len(),
                        heads: Vec::new(),
                    });
                }
                blocks[first + i].heads.push(HeadRows { m, l, o });
            }
        }
        blocks
    }

    fn block(&self, mut block: Block<'_>, pages: &[usize]) -> Option<ScoreOverflow> {
        let shape = &self.call.shape;
        let (d, value_dim) = (self.call.operator.packed_dim(shape), shape.value_dim());
        let columns = padded_columns(value_dim);
        let n_heads = block.heads.len();
        let n_rows = block.n_tokens * n_heads;
        // Token first, so that neighbouring rows see nearly the same keys.
        let place = |row: usize| (block.first_head + row % n_heads, block.first_token + row / n_heads);
        let mask = self.call.operator.mask_of_group(self.call.group, shape);
        let visible: Vec<Range<usize>> = (0..n_rows).map(|row| mask.visible(place(row).1)).collect();
        // The families pass over all pages that they are given, often: where a window leaves few, those alone.
        let Span { hull, .. } = Span::of(visible.iter().cloned());
        let first = pages.partition_point(|page| (page + 1) * PAGE_KEYS <= hull.start);
        let end = pages.partition_point(|page| page * PAGE_KEYS < hull.end);
        let pages = &pages[first..end];
        let operator = self.call.operator;
        let storage = self.call.kv.storage();
        let plain = QueryLayout::new(n_rows, d, storage, self.compute, self.kernels.tiles());
        let layout = Layout::new(operator.reducer(), n_rows, d, operator.factor(), self.kernels);
        let (words, scratch_floats) = match operator.path() {
            Path::Plain => (plain.words(), plain.scratch_floats(self.call.kv)),
            Path::General => (layout.words(), general::scratch_floats(n_rows, self.call.kv)),
        };
        let query_words = words.next_multiple_of(16);
        let sum_floats = n_rows.next_multiple_of(16);
        let floats = query_words + 2 * sum_floats + n_rows * columns;

        let _standard = FloatEnvironment::standard();
        with_scratch(floats + scratch_floats, |memory| {
            let (q, memory) = memory.split_at_mut(query_words);
            let (m, memory) = memory.split_at_mut(sum_floats);
            let (l, memory) = memory.split_at_mut(sum_floats);
            let (o, scratch) = memory.split_at_mut(n_rows * columns);
            let of_row = |row: usize| {
                let (head, token) = place(row);
                self.queries.row(head, token)
            };
            let q = &mut q[..words];
            let of_rows = (0..n_rows).map(of_row).collect::<Vec<_>>();
            match operator.path() {
                Path::Plain => self.kernels.pack_queries(plain, &of_rows, operator.factor(), q),
                Path::General => {
                    let of_row = |row: usize| operator.weights(shape, self.call.group, place(row).0);
                    layout.pack(self.kernels, &of_rows, &(0..n_rows).map(of_row).collect::<Vec<_>>(), q);
                }
            }
            let rows = RowBlock { q, visible: &visible, kv: self.call.kv, pages };
            let mut out = RowPartials { m: &mut m[..n_rows], l: &mut l[..n_rows], o };
            let overflow = match operator.path() {
                Path::Plain => self.kernels.attend_block(&rows, plain, scratch, &mut out),
                Path::General => {
                    let terms: Vec<RowTerms<'_>> =
                        (0..n_rows).map(|row| self.call.terms(place(row), &mask)).collect();
                    let (cap, normaliser) = (operator.cap(), operator.normaliser());
                    let block = GeneralBlock { rows, layout, terms: &terms, cap, normaliser };
                    general::attend(self.kernels, &block, scratch, &mut out)
                }
            };
            for (row, o) in o.chunks_exact(columns).enumerate() {
                let (head, token) = (row % n_heads, row / n_heads);
                let to = &mut block.heads[head];
                to.m[token] = m[row];
                to.l[token] = l[row];
                to.o[token * value_dim..][..value_dim].copy_from_slice(&o[..value_dim]);
            }
            overflow.map(|row| {
                let (head_in_group, token) = place(row);
                ScoreOverflow { head_in_group, token }
            })
        })
    }
}

impl GroupCall<'_> {
    /// What the scores of a row meet.
    pub(crate) fn terms<'s>(&'s self, (head, token): (usize, usize), mask: &BatchMask<'s>) -> RowTerms<'s> {
        let GroupCall { shape, operator, group, side, .. } = self;
        let (batch, kv_head) = (group / shape.n_kv_heads(), group % shape.n_kv_heads());
        let in_batch = kv_head * shape.group_size() + head;
        let of_batch = batch * shape.n_heads() + in_batch;
        let blocks = operator.csr().map(|csr| csr.of_row(of_batch, token));
        RowTerms {
            token,
            mask: Side::of_head(side.mask, head),
            bias: Side::of_head(side.bias, head),
            ramp: operator.ramp(of_batch, token, mask),
            relative: operator.relative(in_batch, mask.position(token)),
            swin: operator.swin(batch, in_batch, token),
            runs: [blocks, mask.scattered(token)],
            located: Side::of_head(side.previous, head).zip(operator.filters(shape, *group, head)).map(
                |(previous, filters)| {
                    let first = if previous.len() == shape.n_keys() { 0 } else { token * shape.n_keys() };
                    Located { previous: &previous[first..][..shape.n_keys()], filters }
                },
            ),
        }
    }
}

/// The overflow of the earlier token, then of the lower head: the same one however the work was cut.
fn earlier(a: Result<(), ScoreOverflow>, b: Result<(), ScoreOverflow>) -> Result<(), ScoreOverflow> {
    match (a, b) {
        (Err(a), Err(b)) if (b.token, b.head_in_group) < (a.token, a.head_in_group) => Err(b),
        (Err(a), _) => Err(a),
        (Ok(()), b) => b,
    }
}

/// Rows that one call of the kernel computes: some heads of the group times some tokens.
struct Block<'p> {
    first_head: usize,
    first_token: usize,
    n_tokens: usize,
    heads: Vec<HeadRows<'p>>,
}

/// Where the rows of one head of a block go.
struct HeadRows<'p> {
    m: &'p mut [f32],
    l: &'p mut [f32],
    o: &'p mut [f32],
}

/// Smallest scratch of a thread: one huge page, so that scores and partials don't compete for address translations.
const SCRATCH_FLOATS: usize = (2 << 20) / 4;

/// Lends memory that a thread keeps between blocks, so that kernels don't allocate.
pub(crate) fn with_scratch<T>(floats: usize, work: impl FnOnce(&mut [f32]) -> T) -> T {
    thread_local! {
        static SCRATCH: RefCell<Option<Buffer>> = const { RefCell::new(None) };
    }
    let held = SCRATCH.take().filter(|buffer| buffer.len() >= floats);
    let mut buffer = match held {
        Some(buffer) => buffer,
        None => match Buffer::zeroed(floats.next_power_of_two().max(SCRATCH_FLOATS)) {
            Ok(buffer) => buffer,
            // A few MiB: a process that can't have them has no use for an answer either.
            Err(refused) => panic!("{refused}"),
        },
    };
    let result = work(&mut buffer[..floats]);
    SCRATCH.set(Some(buffer));
    result
}
