//! Scaled dot products (Vaswani et al. 2017, section 3.2.1): `q . k / sqrt(head_dim)`.

use std::sync::Arc;

use super::{DefaultScale, Function, ScoreFunction};

/// What every call computes that doesn't say otherwise.
pub(super) static FUNCTION: Function = Function {
    name: "scaled_dot",
    summary: "q . k / sqrt(head_dim) (Vaswani)",
    parameters: &[],
    default_scale: DefaultScale::InverseSqrtKeyDim,
    bind: |bound| Ok(Arc::new(Product { dim: bound.same_dim()? })),
};

/// Rows as they are sent.
#[derive(Debug)]
pub(super) struct Product {
    pub(super) dim: usize,
}

impl ScoreFunction for Product {
    fn dim(&self) -> usize {
        self.dim
    }
}
