//! Luong's general score (2015, equation 8), also called bilinear or multiplicative: `q^T W k`, as the product of `W^T q` and `k`.

use std::sync::Arc;

use super::{
    Bound, DefaultScale, Function, Parameter, PerHead, QueryRows, ScoreError, ScoreFunction, Symbol,
};
use crate::dispatch::Kernels;
use crate::project::Linear;

pub(super) static FUNCTION: Function = Function {
    name: "general",
    summary: "q^T W k (Luong)",
    parameters: &[Parameter {
        name: "w",
        shapes: &[&[Symbol::QueryDim, Symbol::KeyDim], &[Symbol::Heads, Symbol::QueryDim, Symbol::KeyDim]],
        default: None,
    }],
    default_scale: DefaultScale::One,
    bind,
};

fn bind(bound: &Bound<'_>) -> Result<Arc<dyn ScoreFunction>, ScoreError> {
    let (queries, keys) = (bound.shape.query_dim(), bound.shape.head_dim());
    let layers = bound.per_head("w").try_map(|w| bound.linear(&transposed(w, keys), [keys, queries]))?;
    Ok(Arc::new(General { layers }))
}

/// The transpose of rows of `columns`.
pub(super) fn transposed(matrix: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| matrix.iter().skip(column).step_by(columns).copied()).collect()
}

#[derive(Debug)]
struct General {
    /// `W^T`.
    layers: PerHead<Linear>,
}

impl ScoreFunction for General {
    fn dim(&self) -> usize {
        self.layers.of(0).outputs()
    }

    fn keeps_queries(&self) -> bool {
        false
    }

    fn query_rows(&self, kernels: &Kernels, rows: QueryRows, q: &[f32], out: &mut [f32]) {
        self.layers.of(rows.head).apply(kernels, q, out);
    }
}
