//! Keras' `AdditiveAttention`: `sum_x v_x tanh(q_x + k_x)`, without projections. `v` is its `scale`, ones where it isn't used.

use std::sync::Arc;

use super::additive::spread;
use super::{
    Bound, DefaultScale, Function, KeyRows, Parameter, PerHead, QueryRows, ScoreError, ScoreFunction, Symbol,
};
use crate::dispatch::Kernels;
use crate::general::reduce::Reducer;

pub(super) static FUNCTION: Function = Function {
    name: "keras_additive",
    summary: "sum_x v_x tanh(q_x + k_x) (Keras' AdditiveAttention)",
    parameters: &[Parameter {
        name: "v",
        shapes: &[&[Symbol::KeyDim], &[Symbol::Heads, Symbol::KeyDim]],
        default: Some(1.0),
    }],
    default_scale: DefaultScale::One,
    bind,
};

fn bind(bound: &Bound<'_>) -> Result<Arc<dyn ScoreFunction>, ScoreError> {
    let dim = bound.same_dim()?;
    let weights = bound.per_head("v").try_map(|v| Ok(spread(v, dim)))?;
    Ok(Arc::new(Tangents { dim, weights, factor: None }))
}

/// Tangents of sums of elements, which may be multiplied before.
#[derive(Debug)]
pub(super) struct Tangents {
    pub(super) dim: usize,
    /// `[dim]`.
    pub(super) weights: PerHead<Vec<f32>>,
    /// What queries and keys are multiplied by.
    pub(super) factor: Option<f32>,
}

impl Tangents {
    fn times(&self, rows: &[f32], out: &mut [f32]) {
        let factor = self.factor.unwrap_or(1.0);
        out.iter_mut().zip(rows).for_each(|(to, x)| *to = x * factor);
    }
}

impl ScoreFunction for Tangents {
    fn reducer(&self) -> Reducer {
        Reducer::Tanh
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn keeps_queries(&self) -> bool {
        self.factor.is_none()
    }

    fn keeps_keys(&self) -> bool {
        self.factor.is_none()
    }

    fn query_rows(&self, _kernels: &Kernels, _rows: QueryRows, q: &[f32], out: &mut [f32]) {
        self.times(q, out);
    }

    fn key_rows(&self, _kernels: &Kernels, _rows: KeyRows, k: &[f32], out: &mut [f32]) {
        self.times(k, out);
    }

    fn weights(&self, head: usize) -> &[f32] {
        self.weights.of(head)
    }
}
