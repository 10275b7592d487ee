//! Attention on one machine: pure functions of slices, in one canonical order of arithmetic.
//!
//! For each query row `i` of a head, with the keys `j` that it sees:
//!
//! ```text
//! s_ij = scale * q_i . k_j      p_ij = exp(s_ij) / sum_j exp(s_ij)      o_i = sum_j p_ij v_j
//! lse_i = ln sum_j exp(s_ij)
//! ```
//!
//! An [`Operator`] says what the scale is, which keys are seen, what joins the sum, and what a row without keys is.
//!
//! **Bits.** [`KERNEL_ID`] names an order of arithmetic (`canonical.rs` has its rules). Every path of f32 follows it: any
//! ISA, any block of rows, any split of the keys into tree nodes, any number of threads. Results with equal inputs and
//! equal `KERNEL_ID` have equal bits. The dot products of [`Compute`] have orders and names of their own.
//!
//! **Accuracy.** `|o_c - exact| <= 8 u (8 + S) A_c` unless rounding errors conspire, with a proven bound beside it: see
//! [`mod@reference`]. Scores are f32 throughout: products that leave
//! its range are reported, not hidden.
//!
//! **Map.** [`slot`] and [`shape`] are the vocabulary; `mask.rs` makes an interval of keys for each row; [`KvHead`] holds
//! keys and values as the kernels read them, [`KvCache`] those of a sequence that grows, in an [`Arena`]; [`attend_node`] computes a [`PartialRows`]; partials merge and finish. Inside:
//! `block.rs` (a block of rows, and which family takes it), `rows.rs` and `queries.rs` (the families: rows broadcast, lanes =
//! queries), `score.rs` (functions of a query and a key, which transform rows by `project.rs`), `general.rs` (sums that are no dot
//! products, and stages between scores and weights: cap, biases of `bias.rs`, masks and other normalisers), `inspect.rs` (what a
//! second pass over the scores gives), `product.rs` (the register tile), `arithmetic.rs` (how it multiplies), `widen.rs` (whole
//! pages in f32), `fold.rs` (the order of merges), `lanes.rs` and `arch/` (vectors), `dispatch.rs` (which ISA), `free_order.rs`
//! (what the canonical order is measured against).
//! This is the only crate of the project with unsafe code.

#![allow(unsafe_code)]
// Register tiles are written with indices: `acc[r][n]` is the notation of the comment above them.
#![allow(clippy::needless_range_loop)]

mod arch;
mod arena;
mod arithmetic;
mod attend;
mod bias;
mod block;
mod buffer;
mod cache;
mod calibrate;
mod canonical;
mod compute;
mod dispatch;
mod dtype;
mod fill;
mod float_env;
mod fold;
#[cfg(all(feature = "free-order", target_arch = "x86_64"))]
mod free_order;
mod general;
#[cfg(test)]
mod hostile_memory;
mod inspect;
mod kv_cache;
mod lanes;
mod mask;
mod normaliser;
mod operator;
mod pages;
mod partial;
mod plane;
mod product;
mod project;
mod quantise;
mod queries;
pub mod reference;
mod rows;
mod score;
pub mod shape;
pub mod slot;
mod storage;
mod value_sum;
mod widen;

pub use arena::Arena;
pub use attend::{GroupCall, ScoreOverflow, Side, attend_node};
pub use bias::{Bias, BiasError, Relative, Shift, Swin, alibi_slopes};
pub use buffer::OutOfMemory;
pub use calibrate::{ReadArea, core_ghz};
pub use canonical::KERNEL_ID;
pub use compute::{Compute, Effective, StorageMismatch};
pub use dispatch::{ISA_VARIABLE, Isa, IsaError, Kernels};
pub use dtype::{Dtype, first_non_finite, widen};
pub use inspect::{
    ElementTile, FinishedReport, Heat, NodeReport, Outputs, OutputsError, OutputsParts, Ranked, Rectangle,
    ReportError, RowSums, Stage, inspect_node, sink_weights,
};
pub use kv_cache::{AppendError, KvCache};
pub use mask::{
    BatchMask, Causal, Csr, CsrError, Documents, Mask, MaskError, PerBatch, Positions, Run, Selection, Window,
};
pub use normaliser::Normaliser;
pub use operator::{EmptyRow, Operator, OperatorError, OperatorParts, Path};
pub use pages::{KvHead, KvView, NonFinite, PageLayout};
pub use partial::{FinishedRows, PartialRows};
pub use plane::{BiasValue, DensePlane};
pub use project::Linear;
pub use score::{DefaultScale, FUNCTIONS, Function, Parameter, Score, ScoreError, Symbol, Tensor};
pub use shape::{AttnShape, Dims, ShapeError};
pub use storage::Storage;
pub use value_sum::ValueSum;
