//! The matrices of a layer, and whether they fit together.

use attnd_wire::floats;
use bytes::Bytes;

use super::LayerDims;

/// `y = x W^T + b`.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// What errors call it: the name of its tensor.
    pub name: String,
    /// Elements of a row that comes out.
    pub outputs: usize,
    /// Elements of a row that goes in.
    pub inputs: usize,
    /// `W`, `[outputs, inputs]`.
    pub weight: Vec<f32>,
    /// `b`, `[outputs]`.
    pub bias: Option<Vec<f32>>,
}

/// A learnt key and its value, which stand behind all others and are seen by every row (torch's `bias_k` and `bias_v`). They
/// are no rows of the input: nothing projects or rotates them.
#[derive(Clone, Debug, PartialEq)]
pub struct Learnt {
    /// `[kv_heads * head_dim]`.
    pub key: Vec<f32>,
    /// `[kv_heads * value_dim]`.
    pub value: Vec<f32>,
}

/// The matrices of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    /// `W^Q`, `[heads * head_dim, width]`.
    pub query: Matrix,
    /// `W^K`, `[kv_heads * head_dim, key width]`.
    pub key: Matrix,
    /// `W^V`, `[kv_heads * value_dim, value width]`.
    pub value: Matrix,
    /// `W^O`, `[output width, heads * value_dim]`; without one the heads' contexts, side by side, are the result.
    pub output: Option<Matrix>,
    /// `W^G`, `[heads * value_dim, width]`: before `W^O`, each element of the contexts is multiplied by the sigmoid of one of
    /// `x_q W^G + b^G` (Keras' `use_gate`).
    pub gate: Option<Matrix>,
    /// A learnt key and value.
    pub learnt: Option<Learnt>,
}

/// Why tensors make no layer. The text names the tensor, its shape and what was expected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum WeightsError {
    /// A part that every layer has isn't there.
    #[error("no tensor for {part}; looked for {}", looked_for.join(", "))]
    Missing {
        /// Which part.
        part: &'static str,
        /// All names that it may have.
        looked_for: Vec<&'static str>,
    },
    /// A tensor of which nobody knows what it does; ignoring it would compute another layer.
    #[error("tensor {name} {shape:?} is no part of a layer that attnd knows; it knows {}", known.join(", "))]
    Unknown {
        /// Its name.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// All names that it would know.
        known: Vec<&'static str>,
    },
    /// A tensor of another shape.
    #[error("tensor {name} is {shape:?}, expected {expected}")]
    Shape {
        /// Its name.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// What would fit, with the numbers that say so.
        expected: String,
    },
    /// Heads that make no layer.
    #[error("{heads} heads over {kv_heads} kv heads")]
    Heads {
        /// Query heads.
        heads: usize,
        /// Heads of keys and values.
        kv_heads: usize,
    },
    /// NaN or an infinity in a matrix that contexts go through, where no check of operands would see it.
    #[error("tensor {name} has {value} at {at}, expected finite numbers")]
    NonFinite {
        /// Its name.
        name: String,
        /// Which of its elements.
        at: usize,
        /// The number.
        value: f32,
    },
    /// What a norm divides by could be no number.
    #[error("{name}: eps {eps}, expected a finite number that isn't below 0")]
    Eps {
        /// The tensor of the norm.
        name: String,
        /// What is added to its mean square.
        eps: f64,
    },
}

impl Matrix {
    /// # Errors
    /// [`WeightsError::Shape`] with `expected`, unless `fits`.
    pub(super) fn expect(&self, fits: bool, expected: impl FnOnce() -> String) -> Result<(), WeightsError> {
        let shape = vec![self.outputs, self.inputs];
        if fits {
            Ok(())
        } else {
            Err(WeightsError::Shape { name: self.name.clone(), shape, expected: expected() })
        }
    }

    /// # Errors
    /// [`WeightsError::Shape`] if a slice has another length, or there is nothing in it.
    pub(super) fn check(&self) -> Result<(), WeightsError> {
        let elements = self.outputs.checked_mul(self.inputs);
        self.expect(elements == Some(self.weight.len()) && !self.weight.is_empty(), || {
            format!("{} elements, which is what it has", self.weight.len())
        })?;
        let bias = self.bias.as_ref().map_or(self.outputs, Vec::len);
        self.expect(bias == self.outputs, || format!("{bias} outputs, as its bias has"))
    }
}

impl Weights {
    /// The dimensions of a layer of these matrices.
    ///
    /// # Errors
    /// [`WeightsError::Heads`] and [`WeightsError::Shape`].
    pub(super) fn dims(&self, heads: usize, kv_heads: usize) -> Result<LayerDims, WeightsError> {
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(WeightsError::Heads { heads, kv_heads });
        }
        let Self { query, key, value, output, gate, learnt } = self;
        for matrix in
            [Some(query), Some(key), Some(value), output.as_ref(), gate.as_ref()].into_iter().flatten()
        {
            matrix.check()?;
        }
        query.expect(query.outputs.is_multiple_of(heads), || format!("outputs for {heads} heads"))?;
        let head_dim = query.outputs / heads;
        let keys = kv_heads * head_dim;
        key.expect(key.outputs == keys, || format!("{keys} outputs: {kv_heads} kv heads of {head_dim}"))?;
        value
            .expect(value.outputs.is_multiple_of(kv_heads), || format!("outputs for {kv_heads} kv heads"))?;
        let value_dim = value.outputs / kv_heads;
        let contexts = heads * value_dim;
        if let Some(output) = output {
            output.expect(output.inputs == contexts, || {
                format!("{contexts} inputs: {heads} heads of {value_dim}")
            })?;
        }
        if let Some(gate) = gate {
            gate.expect(gate.outputs == contexts && gate.inputs == query.inputs, || {
                format!("[{contexts}, {}]: an element for each of {heads} heads of {value_dim}", query.inputs)
            })?;
        }
        if let Some(Learnt { key, value }) = learnt {
            for (name, row, expected) in [("bias_k", key, keys), ("bias_v", value, kv_heads * value_dim)] {
                if row.len() != expected {
                    let expected = format!("{expected} elements");
                    return Err(WeightsError::Shape { name: name.into(), shape: vec![row.len()], expected });
                }
            }
        }
        Ok(LayerDims { heads, kv_heads, head_dim, value_dim })
    }
}

/// A matrix of keys or values, cut by kv heads: of each its rows, and then its elements of the bias if there is one.
#[derive(Clone, Debug, Default)]
pub(super) struct HeadMatrices {
    pub(super) has_bias: bool,
    pub(super) bytes: Bytes,
}

impl HeadMatrices {
    /// A matrix whose outputs are `kv_heads` equal parts.
    pub(super) fn new(matrix: Matrix, kv_heads: usize) -> Self {
        let Matrix { outputs, inputs, weight, bias, .. } = matrix;
        let elements = match &bias {
            None => weight,
            Some(bias) => {
                let dim = outputs / kv_heads.max(1);
                let heads = weight.chunks(dim * inputs).zip(bias.chunks(dim));
                heads.flat_map(|(weight, bias)| weight.iter().chain(bias)).copied().collect()
            }
        };
        Self { has_bias: bias.is_some(), bytes: floats::into_bytes(elements) }
    }
}
