//! Why a layer wasn't made, or a call of it failed.

use attnd_kernel::{IsaError, OutOfMemory};

use super::weights::WeightsError;
use crate::error::ClientError;

/// What can go wrong with a layer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LayerError {
    /// Tensors that make no layer.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Rows of another shape than the layer, or than each other.
    #[error("{what} {got}, expected {expected}")]
    Rows {
        /// Which rows, and which of their numbers.
        what: &'static str,
        /// What it is.
        got: usize,
        /// What it should be.
        expected: usize,
    },
    /// Rows without elements, or with others than their shape says.
    #[error("rows of shape {shape:?} with {got} elements")]
    Elements {
        /// Batch, tokens, width.
        shape: [usize; 3],
        /// How many there are.
        got: usize,
    },
    /// Rotary positions that don't fit. The text has the numbers.
    #[error("rope: {0}")]
    Rope(String),
    /// Two things that can't be asked for together.
    #[error("{one} and {other}{}", why.map_or_else(String::new, |why| format!(": {why}")))]
    Together {
        /// One of them.
        one: &'static str,
        /// The other one.
        other: &'static str,
        /// Why not, where that isn't plain.
        why: Option<&'static str>,
    },
    /// The environment names kernels that don't run here.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// The system has no memory for a matrix.
    #[error("matrices of the layer: {0}")]
    Memory(OutOfMemory),
    /// The system has no memory for rows that were projected.
    #[error("{what} of {elements} elements don't fit into memory")]
    RowMemory {
        /// Which rows.
        what: &'static str,
        /// How many elements.
        elements: usize,
    },
    /// The call over the projected heads.
    #[error(transparent)]
    Call(#[from] ClientError),
    /// The runtime is shutting down.
    #[error("the runtime ends")]
    Stopped,
}
