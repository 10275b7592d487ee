//! Graph attention (Velickovic et al. 2018, equation 3): `LeakyReLU(a_q . W q + a_k . W k)`.
//!
//! A query and a key are one number each: the products with `W^T a_q` and `W^T a_k`, which are made once, in f64, and rounded.

use std::sync::Arc;

use super::additive::Units;
use super::{Bound, DefaultScale, Function, Parameter, PerHead, ScoreError, ScoreFunction, Symbol};
use crate::general::reduce::Reducer;

pub(super) static FUNCTION: Function = Function {
    name: "gat",
    summary: "LeakyReLU(a_q . W q + a_k . W k) (Velickovic)",
    parameters: &[
        Parameter {
            name: "w",
            shapes: &[&[Symbol::Units, Symbol::KeyDim], &[Symbol::KvHeads, Symbol::Units, Symbol::KeyDim]],
            default: None,
        },
        Parameter {
            name: "a_q",
            shapes: &[&[Symbol::Units], &[Symbol::Heads, Symbol::Units]],
            default: None,
        },
        Parameter {
            name: "a_k",
            shapes: &[&[Symbol::Units], &[Symbol::KvHeads, Symbol::Units]],
            default: None,
        },
        SLOPE,
    ],
    default_scale: DefaultScale::One,
    bind,
};

/// Of the rectifier where its argument is negative.
pub(super) const SLOPE: Parameter =
    Parameter { name: "slope", shapes: &[&[Symbol::One]], default: Some(0.2) };

/// # Errors
/// If the rectifier would turn the sign of what it leaks, or let more through than the other side.
pub(super) fn slope(bound: &Bound<'_>) -> Result<f32, ScoreError> {
    let value = bound.per_head("slope").of(0)[0];
    if (0.0..=1.0).contains(&value) {
        return Ok(value);
    }
    Err(ScoreError::Value { parameter: "slope", at: 0, value, expected: "from 0 to 1" })
}

fn bind(bound: &Bound<'_>) -> Result<Arc<dyn ScoreFunction>, ScoreError> {
    let dim = bound.same_dim()?;
    let along = |w: &Vec<f32>, a: &Vec<f32>| {
        let mut sums = vec![0.0_f64; dim];
        for (row, a) in w.chunks_exact(dim).zip(a) {
            sums.iter_mut().zip(row).for_each(|(sum, w)| *sum += f64::from(*a) * f64::from(*w));
        }
        let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
        bound.linear(&sums, [1, dim])
    };
    let w = bound.per_head("w");
    Ok(Arc::new(Units {
        reducer: Reducer::Leaky { slope: slope(bound)? },
        weights: PerHead::one(vec![1.0]),
        of_queries: w.with_queries(bound.shape.group_size(), &bound.per_head("a_q"), along)?,
        of_keys: w.with(&bound.per_head("a_k"), along)?,
    }))
}
