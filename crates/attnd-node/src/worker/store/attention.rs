//! Partials of queries over what shards hold: all cells of all the works of a message side by side on the compute pool.
//!
//! A work's cells come in the order of [`attnd_plan::cells`]: by piece, kv head, tokens and node. Their partials lie one behind the other,
//! m, l and o of each, in buffers that leave as they are.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use attnd_kernel::slot::Node;
use attnd_kernel::{AttnShape, Effective, GroupCall, Kernels, KvView, Operator, Side};
use attnd_plan::filled_nodes;
use attnd_wire::surroundings::now;
use attnd_wire::{Deadline, Error, Reason, refusal};
use rayon::prelude::*;

use crate::compute_pool::is_pool_thread;
use crate::worker::slices::Slicer;

/// Bytes of partials in one buffer, unless a single cell has more.
pub(crate) const RUN_BYTES: usize = 2 << 20;

/// Queries over a part of a shard's tokens, which fit each other.
#[derive(Debug)]
pub(crate) struct Attention {
    /// Of a call of these queries over as many keys.
    pub(crate) shape: AttnShape,
    /// Made for the shape. It reads no dense tensors, and keys as they are.
    pub(crate) operator: Arc<Operator>,
    /// Of the shard's kv heads, `[heads, tokens, head_dim]`.
    pub(crate) q: Vec<f32>,
    /// The first of the shard's kv heads.
    pub(crate) first_kv_head: usize,
    /// Of each piece, of each of its kv heads, what is looked at.
    pub(crate) views: Vec<(usize, KvView)>,
    pub(crate) allow_non_finite: bool,
    pub(crate) tokens_per_cell: usize,
    /// After that nobody waits for the partials.
    pub(crate) deadline: Option<Deadline>,
}

/// Partials of consecutive cells.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Run {
    /// Place of the first one among the work's cells.
    pub(crate) first_cell: usize,
    pub(crate) cells: usize,
    /// Of each cell m, l and o.
    pub(crate) data: Vec<f32>,
}

/// One cell, and where its partial goes.
struct Cell<'w> {
    work: usize,
    view: usize,
    node: Node,
    tokens: Range<usize>,
    out: &'w mut [f32],
}

/// Which cells the views of a work have, without where they go.
type Places = Vec<(usize, Node, Range<usize>)>;

impl Attention {
    fn places(&self) -> Places {
        let n_queries = self.shape.n_queries();
        let mut places = Vec::new();
        let mut nodes: (Range<usize>, Vec<(Node, usize)>) = (0..0, Vec::new());
        for (at, (_, view)) in self.views.iter().enumerate() {
            // Those of one piece are neighbours.
            if at == 0 || nodes.0 != view.slots() {
                nodes = (view.slots(), filled_nodes(view.slots(), view.n_keys()));
            }
            for first in (0..n_queries).step_by(self.tokens_per_cell.max(1)) {
                let tokens = first..(first + self.tokens_per_cell).min(n_queries);
                places.extend(nodes.1.iter().map(|(node, _)| (at, *node, tokens.clone())));
            }
        }
        places
    }

    /// Elements of the partial of a cell.
    fn cell_len(&self, tokens: &Range<usize>) -> usize {
        cell_len(&self.shape, tokens.len())
    }

    /// Buffers for these cells.
    fn runs(&self, places: &Places) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut lens: Vec<usize> = Vec::new();
        for (at, (_, _, tokens)) in places.iter().enumerate() {
            let len = self.cell_len(tokens);
            match (runs.last_mut(), lens.last_mut()) {
                (Some(run), Some(floats)) if (*floats + len) * size_of::<f32>() <= RUN_BYTES => {
                    run.cells += 1;
                    *floats += len;
                }
                _ => {
                    runs.push(Run { first_cell: at, cells: 1, data: Vec::new() });
                    lens.push(len);
                }
            }
        }
        for (run, len) in runs.iter_mut().zip(lens) {
            run.data = vec![0.0; len];
        }
        runs
    }

    /// Computes a cell, one of `at_once`; `None` once nobody wants it any more.
    fn compute(
        &self,
        kernels: &Kernels,
        cell: Cell<'_>,
        at_once: usize,
        wanted: impl Fn() -> bool,
    ) -> Option<Result<(), Error>> {
        let Some((kv_head, view)) = self.views.get(cell.view) else { return Some(Ok(())) };
        let (shape, heads) = (self.shape, self.shape.group_size());
        let per_group = heads * shape.n_queries() * shape.query_dim();
        let group = GroupCall {
            shape,
            operator: &self.operator,
            group: *kv_head,
            q: &self.q[(kv_head - self.first_kv_head) * per_group..][..per_group],
            kv: view,
            side: Side::default(),
            compute: Effective::F32,
        };
        let slicer = Slicer::new(kernels, group, wanted).one_of(at_once);
        let (rows, finite) = slicer.attend(cell.node, cell.tokens.clone())?;
        // Whoever allowed non-finite operands gets what IEEE 754 makes of them.
        if !self.allow_non_finite {
            let first_head = kv_head * heads;
            if let Err(at) = finite {
                return Some(Err(refusal::score_overflow(first_head, &at)));
            }
            if let Some(at) = rows.o.iter().position(|o| o.is_nan()) {
                let row = at / shape.value_dim();
                let n_tokens = cell.tokens.len();
                let (head, token) = (first_head + row / n_tokens, cell.tokens.start + row % n_tokens);
                return Some(Err(refusal::output_overflow(head, token)));
            }
        }
        let (m, rest) = cell.out.split_at_mut(rows.m.len());
        let (l, o) = rest.split_at_mut(rows.l.len());
        m.copy_from_slice(&rows.m);
        l.copy_from_slice(&rows.l);
        o.copy_from_slice(&rows.o);
        Some(Ok(()))
    }
}

fn cell_len(shape: &AttnShape, tokens: usize) -> usize {
    shape.group_size() * tokens * (shape.value_dim() + 2)
}

/// Elements of all partials of a work over `heads`, which are a piece's slots and how many kv heads have them, and of those that
/// are computed at a time by `threads`.
pub(crate) fn partial_floats<'a>(
    shape: &AttnShape,
    pieces: impl Iterator<Item = (&'a Range<usize>, usize)>,
    tokens_per_cell: usize,
    threads: usize,
) -> u64 {
    let per_node = cell_len(shape, shape.n_queries()) as u64;
    let nodes: usize =
        pieces.map(|(slots, heads)| filled_nodes(slots.clone(), shape.n_keys()).len() * heads).sum();
    let at_once = cell_len(shape, tokens_per_cell.min(shape.n_queries())) as u64 * threads as u64;
    (nodes as u64).saturating_mul(per_node).saturating_add(at_once)
}

/// What becomes of partials for which somebody waited until `deadline`, if there is nobody any more.
pub(crate) fn unwanted(deadline: Option<Deadline>) -> Error {
    match in_time(deadline) {
        Ok(()) => Error::new(Reason::Cancelled, "nobody waits for the partials"),
        Err(expired) => expired,
    }
}

/// Whether partials for which somebody waits until `deadline` may still be had in time.
pub(crate) fn in_time(deadline: Option<Deadline>) -> Result<(), Error> {
    deadline.map_or(Ok(()), |deadline| deadline.remaining(now()).map(|_left| ()))
}

/// Computes the partials of all these works, on the current rayon pool. `wanted` is asked now and then whether there still is somebody who
/// waits for them, and each work's deadline is looked at: of what nobody waits for no more is computed.
pub(crate) fn attend(
    kernels: &Kernels,
    works: &[Attention],
    wanted: impl Fn() -> bool + Sync,
) -> Vec<Result<Vec<Run>, Error>> {
    let places: Vec<Places> = works.iter().map(Attention::places).collect();
    let mut runs: Vec<Vec<Run>> = works.iter().zip(&places).map(|(work, places)| work.runs(places)).collect();
    let mut cells: Vec<Cell<'_>> = Vec::with_capacity(places.iter().map(Vec::len).sum());
    for (work, (of_work, runs)) in places.into_iter().zip(&mut runs).enumerate() {
        let mut buffers = runs.iter_mut().map(|run| &mut run.data[..]);
        let mut rest: &mut [f32] = &mut [];
        for (view, node, tokens) in of_work {
            if rest.is_empty() {
                rest = buffers.next().unwrap_or_default();
            }
            let (out, behind) = rest.split_at_mut(works[work].cell_len(&tokens));
            rest = behind;
            cells.push(Cell { work, view, node, tokens, out });
        }
    }
    let at_once = cells.len();
    let compute = |cell: Cell<'_>| {
        let work = cell.work;
        let deadline = works[work].deadline;
        let go_on = || in_time(deadline).is_ok() && wanted();
        let computed = catch_unwind(AssertUnwindSafe(|| works[work].compute(kernels, cell, at_once, go_on)));
        let computed = match computed {
            Ok(Some(computed)) => computed,
            Ok(None) => Err(unwanted(deadline)),
            Err(panic) => {
                let text = crate::compute_pool::text_of(&*panic);
                tracing::error!(panic = text, "a kernel panicked");
                Err(Error::new(Reason::Internal, "a kernel panicked"))
            }
        };
        (work, computed)
    };
    let computed: Vec<(usize, Result<(), Error>)> =
        if cells.len() == 1 || !is_pool_thread() || rayon::current_num_threads() == 1 {
            cells.into_iter().map(compute).collect()
        } else {
            cells.into_par_iter().map(compute).collect()
        };
    let mut results: Vec<Result<Vec<Run>, Error>> = runs.into_iter().map(Ok).collect();
    // What is wrong with the first cell is said.
    for (work, computed) in computed {
        if let (Err(error), true) = (computed, results[work].is_ok()) {
            results[work] = Err(error);
        }
    }
    results
}
