//! Layers of multi-head attention: projections on this side, unless those of keys and values cost less on the workers, and attention
//! over them on the cluster.
//!
//! ```text
//! Q = x_q W^Q + b^Q     K = x_k W^K + b^K     V = x_v W^V + b^V      heads are equal parts of a row
//! o_h = softmax(scale * rope(Q_h) rope(K_h)^T + mask) V_h            by Client::attend
//! y = ([o_1, ..., o_H] * sigmoid(x_q W^G + b^G)) W^O + b^O           the gate where there is one
//! ```
//!
//! (Vaswani et al., "Attention Is All You Need", 3.2.2.) With fewer heads of K and V than of Q, each serves as many query heads
//! (Ainslie et al., "GQA"). Beside that there is what torch's `nn.MultiheadAttention` has: a learnt key and value behind
//! all others (`add_bias_kv`), and a zero key with a zero value behind that (`add_zero_attn`), which every row sees.
//!
//! Projections are those of [`attnd_kernel::Linear`], on all cores, so a layer's results have the same bits on any number of workers
//! and on any instruction set. [`Layer::project`] makes keys and values once; [`ProjectedKv`] serves any number of calls, as a
//! decoder's attention to its encoder needs. [`Layer::call`] makes them for one call, here or on the workers, which have the same
//! linear layers, so its result has the same bits either way; [`Layer::plan`] says which is predicted to be faster.
//!
//! `weights.rs` has the matrices, `state.rs` their names in files, `rope.rs` rotary positions, `learnt.rs` what a learnt key does to
//! the options of a call, `heads.rs` makes heads of rows, `attention.rs` the call, `plan.rs` where keys and values are projected and
//! what travels, `latent.rs` latent attention, whose keys and values are one latent for all heads: to the rest it is a layer with one kv
//! head and more steps around the call.

mod attention;
mod error;
mod heads;
mod latent;
mod learnt;
mod plan;
mod rope;
mod rows;
mod state;
#[cfg(test)]
mod tests;
mod weights;

use std::sync::Arc;

use attnd_kernel::{Kernels, Linear};

use self::weights::HeadMatrices;

pub use self::attention::{LayerAnswer, LayerCall, LayerWeights, ProjectedKv};
pub use self::error::LayerError;
use self::latent::Latent;
pub use self::latent::{LatentParts, LatentWeights, Norm};
pub use self::plan::{Obstacle, Place, PlaceReason, Prediction, ProjectOn, ProjectionPlan};
pub use self::rope::{Angles, Rope, RopeStyle};
pub use self::rows::Rows;
pub use self::state::StateTensor;
pub use self::weights::{Learnt, Matrix, Weights, WeightsError};

/// A layer as somebody put it together; [`Layer::new`] decides whether it makes sense.
#[derive(Clone, Debug)]
pub struct LayerParts {
    /// The matrices.
    pub weights: Weights,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values; `heads` is a multiple.
    pub kv_heads: usize,
    /// What scores are multiplied by; `None`: one over the square root of a key's dimension.
    pub scale: Option<f32>,
    /// Rotary positions.
    pub rope: Option<Rope>,
    /// Whether rows see a zero key with a zero value beside all others, whatever is masked (torch's `add_zero_attn`).
    pub add_zero_attn: bool,
}

/// A layer of multi-head attention. Cloning copies no matrix.
#[derive(Clone, Debug)]
pub struct Layer {
    inner: Arc<Inner>,
}

/// The numbers of a layer, all checked against each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LayerDims {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// Of a query's and a key's head.
    pub(crate) head_dim: usize,
    /// Of a value's head.
    pub(crate) value_dim: usize,
}

#[derive(Debug)]
struct Inner {
    kernels: &'static Kernels,
    dims: LayerDims,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Option<Linear>,
    gate: Option<Linear>,
    learnt: Option<Learnt>,
    latent: Option<Latent>,
    scale: Option<f32>,
    rope: Option<Rope>,
    add_zero_attn: bool,
    /// The matrices of keys and values as they travel to workers.
    key_matrices: HeadMatrices,
    value_matrices: HeadMatrices,
}

impl Layer {
    /// A layer of these parts.
    ///
    /// # Errors
    /// [`LayerError::Weights`] for matrices that don't fit together or to the heads, with the name and the shape of the one that
    /// doesn't and what it should be; [`LayerError::Rope`] if rows are too short to be rotated so; [`LayerError::Memory`];
    /// [`LayerError::Isa`] where the environment names kernels that don't run here.
    pub fn new(parts: LayerParts) -> Result<Self, LayerError> {
        let LayerParts { weights, heads, kv_heads, scale, rope, add_zero_attn } = parts;
        let dims = weights.dims(heads, kv_heads)?;
        if let Some(rope) = &rope {
            rope.check(dims.head_dim)?;
        }
        // Workers never need them otherwise, see Obstacle.
        let may_travel = rope.is_none() && weights.learnt.is_none();
        let to_send = |matrix: Matrix| {
            if may_travel { HeadMatrices::new(matrix, kv_heads) } else { HeadMatrices::default() }
        };
        let inner = Inner {
            kernels: Kernels::from_env()?,
            dims,
            query: linear(&weights.query)?,
            key: linear(&weights.key)?,
            value: linear(&weights.value)?,
            output: weights.output.as_ref().map(linear).transpose()?,
            gate: weights.gate.as_ref().map(linear).transpose()?,
            learnt: weights.learnt,
            latent: None,
            scale,
            rope,
            add_zero_attn,
            key_matrices: to_send(weights.key),
            value_matrices: to_send(weights.value),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Elements of a row of queries.
    pub fn query_width(&self) -> usize {
        self.inner.query.inputs()
    }

    /// Elements of a row that keys are made of.
    pub fn key_width(&self) -> usize {
        self.inner.key.inputs()
    }

    /// Elements of a row that values are made of.
    pub fn value_width(&self) -> usize {
        self.inner.value.inputs()
    }

    /// Elements of a row of the result.
    pub fn output_width(&self) -> usize {
        let dims = &self.inner.dims;
        self.inner.output.as_ref().map_or(dims.heads * dims.value_dim, Linear::outputs)
    }
}

fn linear(matrix: &Matrix) -> Result<Linear, LayerError> {
    let shape = [matrix.outputs, matrix.inputs];
    Linear::new(&matrix.weight, shape, matrix.bias.as_deref()).map_err(LayerError::Memory)
}
