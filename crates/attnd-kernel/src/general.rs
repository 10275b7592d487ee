//! The general path: rows broadcast over pages, with stages between the product and the weights.
//!
//! Whatever touches single scores runs here: caps, biases, masks that are no interval, other normalisers. All else is the plain path
//! of `rows.rs` and `queries.rs`, whose entries stay as small as they are. Per page of 256 keys:
//!
//! ```text
//! scores    s[row][256] = query rows . K panels, or another sum    one call for all rows
//! shape     cap, then each bias, then masked -> -inf               a few calls for each row
//! weigh     rules 2 to 4, or sigmoids: p[row][256], m, l           a call for each row
//! context   o[row][columns] = p . V panels                         one call for all rows
//! ```
//!
//! The driver is ordinary Rust, compiled once; what it calls are small entries of each ISA (`dispatch/general.rs`). A call costs a few
//! cycles, and even the stages of a row some hundred. They take turns on a row while its 256 scores are in the first-level cache.
//!
//! With nothing to cap, add or mask, results have the bits of the plain path: the tiles, the arithmetic of the weights and the
//! order of merges are the same code.
//!
//! Masked keys: their weight is 0, and a product with it adds nothing to a number. Where a page has a value that is none, runs of visible
//! keys are reduced one after the other, as an accumulator that is stored and loaded again is the same number.

mod block;
pub(crate) mod functions;
pub(crate) mod reduce;
pub(crate) mod shape;
mod walk;
pub(crate) mod weigh;

pub(crate) use self::block::{GeneralBlock, RowTerms, add_and_mask, attend, row_of, scratch_floats};
