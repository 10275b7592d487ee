//! The second pass: weights and what is made of them, where the first one has told what they are divided by.
//!
//! Attention never holds its weights. Whoever wants to see some computes the scores again, with the same code and so with the same bits, and
//! takes `p = P(s, m) / l` of them, `(m, l)` being a row's sums over all keys. Memory is that of the result.
//!
//! ```text
//! scores     as on the general path (`general.rs`), which without stages has the bits of the plain one
//! elements   stages of single scores: tiles of a page, each made once and emitted at once
//! reports    sums over keys, best keys, maxima: joined over pages, nodes and workers
//! ```
//!
//! **Bits.** Reports of the same keys are equal, however these were cut into nodes, tokens into ranges, and whoever computed what. Inside
//! a page sums are f32 in the order of rule 4; over pages they are integers, in fine enough a unit (`outputs.rs` has the bounds), since sums
//! of integers have no order. The best keys are a set by an order without ties. Integers saturate and never wrap; sums only leave
//! their range where `(m, l)` aren't those of the rows.
//!
//! `outputs.rs` says what is wanted, `block.rs` takes a block of rows through the pages, `row.rs` has the vector code for one row of
//! a page, `top.rs`, `bins.rs` and `elements.rs` gather; `report.rs` and `heat.rs` are what comes out.

mod bins;
mod block;
mod elements;
mod heat;
mod outputs;
mod report;
pub(crate) mod row;
mod top;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use self::block::Rows;
pub use self::elements::ElementTile;
use self::elements::Tiles;
pub use self::heat::Heat;
pub use self::outputs::{Outputs, OutputsError, OutputsParts, Rectangle, Stage};
pub use self::report::{FinishedReport, NodeReport, ReportError, RowSums, sink_weights};
pub use self::top::Ranked;
use crate::attend::{BLOCKS_PER_THREAD, GroupCall, Tree, split};
use crate::block::BLOCK_ROWS;
use crate::dispatch::Kernels;
use crate::operator::Queries;
use crate::slot::{Node, pages_of_slot};

/// Computes what is wanted of query tokens `tokens` of a group over the keys of `node`, on the current rayon pool. Elements go to `emit` in
/// any order, from the pool's threads but never from two at a time; they and the report make no use of the values of the keys.
///
/// # Panics
/// As [`crate::attend_node`]; if the outputs are for another shape, `sums` of other rows, or the arithmetic is another than that of f32
/// ([`Outputs::check_compute`]).
pub fn inspect_node(
    kernels: &Kernels,
    call: &GroupCall<'_>,
    sums: RowSums<'_>,
    wanted: &Outputs,
    node: Node,
    tokens: Range<usize>,
    emit: &mut (dyn FnMut(ElementTile<'_>) + Send),
) -> NodeReport {
    call.check(kernels, &tokens);
    assert_eq!(wanted.shape(), &call.shape, "shape of the outputs");
    assert_eq!(wanted.check_compute(call.compute.compute()), Ok(()));
    let n_sums = call.shape.group_size() * tokens.len();
    assert!(sums.m.len() == n_sums && sums.l.len() == n_sums, "sums of the rows");

    let report = NodeReport::empty(wanted, call.group, tokens.clone());
    let heads = report.heads.clone();
    if wanted.is_empty() || heads.is_empty() || tokens.is_empty() {
        return report;
    }
    let blocks = blocks(&heads, &tokens);
    let threads = rayon::current_num_threads();
    let enough = if threads == 1 { 1 } else { BLOCKS_PER_THREAD * threads };
    let mut nodes = Vec::new();
    leaves(&split(node, call.kv.n_keys(), enough.div_ceil(blocks.len())), &mut nodes);
    let pages: Vec<Vec<usize>> = nodes.iter().map(|node| pages_of(*node, call.kv.n_keys())).collect();
    let tasks: Vec<(&[usize], &Rows)> =
        pages.iter().flat_map(|pages| blocks.iter().map(move |rows| (&pages[..], rows))).collect();

    let queries = call.operator.queries(kernels, &call.shape, call.group, tokens.clone(), call.q);
    let pass = Pass { kernels, call, queries, sums, wanted, tokens };
    let sink = Sink { report: Mutex::new(report), emit: Mutex::new(emit) };
    // The last rows of a causal call have the most keys.
    tasks.into_par_iter().rev().for_each(|(pages, rows)| pass.block(rows, pages, &sink));
    sink.report.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Blocks of some heads times some tokens.
fn blocks(heads: &Range<usize>, tokens: &Range<usize>) -> Vec<Rows> {
    let heads_per_block = heads.len().min(BLOCK_ROWS);
    let tokens_per_block = BLOCK_ROWS / heads_per_block;
    let cut = |range: &Range<usize>, step: usize| {
        let end = range.end;
        range.clone().step_by(step).map(move |first| first..(first + step).min(end)).collect::<Vec<_>>()
    };
    let tokens = cut(tokens, tokens_per_block);
    let of_heads = |heads: Range<usize>| {
        tokens.iter().cloned().map(move |tokens| Rows { heads: heads.clone(), tokens }).collect::<Vec<_>>()
    };
    cut(heads, heads_per_block).into_iter().flat_map(of_heads).collect()
}

fn leaves(tree: &Tree, nodes: &mut Vec<Node>) {
    match tree {
        Tree::Absent => {}
        Tree::Whole(node) => nodes.push(*node),
        Tree::Split(children) => {
            leaves(&children.0, nodes);
            leaves(&children.1, nodes);
        }
    }
}

/// The pages of a node, ascending.
fn pages_of(node: Node, n_keys: usize) -> Vec<usize> {
    let mut pages: Vec<usize> = node.slots().flat_map(|slot| pages_of_slot(slot, n_keys)).collect();
    pages.sort_unstable();
    pages
}

/// What all blocks of a node share.
struct Pass<'a> {
    kernels: &'a Kernels,
    call: &'a GroupCall<'a>,
    queries: Queries<'a>,
    sums: RowSums<'a>,
    wanted: &'a Outputs,
    tokens: Range<usize>,
}

/// Where blocks put what they have, one at a time. What they add is integers and maxima, so which is first doesn't matter.
struct Sink<'a> {
    report: Mutex<NodeReport>,
    emit: Mutex<&'a mut (dyn FnMut(ElementTile<'_>) + Send)>,
}

impl Sink<'_> {
    fn report(&self, join: impl FnOnce(&mut NodeReport)) {
        join(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn emit(&self, tiles: &Tiles) {
        let mut emit = self.emit.lock().unwrap_or_else(PoisonError::into_inner);
        tiles.emit(&mut **emit);
    }
}
