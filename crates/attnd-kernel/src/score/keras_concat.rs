//! Keras' `Attention` with `score_mode="concat"`: `c sum_x tanh(s (q_x + k_x))`, which is not Luong's. `c` is its
//! `concat_score_weight`, `s` its `scale`. The sum is made of products, `s q_x + s k_x`.

use std::sync::Arc;

use super::keras_additive::Tangents;
use super::{Bound, DefaultScale, Function, Parameter, ScoreError, ScoreFunction, Symbol};

pub(super) static FUNCTION: Function = Function {
    name: "keras_concat",
    summary: "c sum_x tanh(s (q_x + k_x)) (Keras' Attention, score_mode=concat)",
    parameters: &[
        Parameter { name: "c", shapes: &[&[Symbol::One], &[Symbol::Heads]], default: Some(1.0) },
        Parameter { name: "s", shapes: &[&[Symbol::One]], default: Some(1.0) },
    ],
    default_scale: DefaultScale::One,
    bind,
};

fn bind(bound: &Bound<'_>) -> Result<Arc<dyn ScoreFunction>, ScoreError> {
    let dim = bound.same_dim()?;
    let weights = bound.per_head("c").try_map(|c| Ok(vec![c[0]; dim]))?;
    Ok(Arc::new(Tangents { dim, weights, factor: Some(bound.per_head("s").of(0)[0]) }))
}
