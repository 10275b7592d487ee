//! Bahdanau's additive score (2015, appendix A.1.2): `v . tanh(W_q q + W_k k + b)`. Parts of it are the other functions here that
//! sum tangents.

use std::sync::Arc;

use super::{
    Bound, DefaultScale, Function, KeyRows, Parameter, PerHead, QueryRows, ScoreError, ScoreFunction, Symbol,
};
use crate::dispatch::Kernels;
use crate::general::reduce::Reducer;
use crate::project::Linear;

pub(super) static FUNCTION: Function = Function {
    name: "additive",
    summary: "v . tanh(W_q q + W_k k + b) (Bahdanau)",
    parameters: PARAMETERS,
    default_scale: DefaultScale::One,
    bind: |bound| Ok(Arc::new(Units::of(bound, Reducer::Tanh)?)),
};

/// Of functions of hidden units into which queries and keys are projected.
pub(super) const PARAMETERS: &[Parameter] = &[
    Parameter { name: "v", shapes: &[&[Symbol::Units], &[Symbol::Heads, Symbol::Units]], default: None },
    Parameter {
        name: "w_q",
        shapes: &[&[Symbol::Units, Symbol::QueryDim], &[Symbol::Heads, Symbol::Units, Symbol::QueryDim]],
        default: None,
    },
    Parameter {
        name: "w_k",
        shapes: &[&[Symbol::Units, Symbol::KeyDim], &[Symbol::KvHeads, Symbol::Units, Symbol::KeyDim]],
        default: None,
    },
    Parameter { name: "b", shapes: &[&[Symbol::Units], &[Symbol::Heads, Symbol::Units]], default: Some(0.0) },
];

/// Projections of queries and keys into hidden units, which a reducer sums with weights.
#[derive(Debug)]
pub(super) struct Units {
    pub(super) reducer: Reducer,
    /// `[units]`.
    pub(super) weights: PerHead<Vec<f32>>,
    /// Of query heads, with the bias.
    pub(super) of_queries: PerHead<Linear>,
    /// Of kv heads.
    pub(super) of_keys: PerHead<Linear>,
}

impl Units {
    /// Those of [`PARAMETERS`].
    ///
    /// # Errors
    /// If the system has no memory for the projections.
    pub(super) fn of(bound: &Bound<'_>, reducer: Reducer) -> Result<Self, ScoreError> {
        let units = bound.free(Symbol::Units).unwrap_or_default();
        let size = [units, bound.shape.query_dim()];
        let layers = bound.per_head("w_q").try_map(|w| bound.linear(w, size))?;
        let with_bias = |layer: &Linear, b: &Vec<f32>| Ok(layer.with_bias(spread(b, units)));
        let of_queries = layers.with(&bound.per_head("b"), with_bias)?;
        let size = [units, bound.shape.head_dim()];
        let of_keys = bound.per_head("w_k").try_map(|w| bound.linear(w, size))?;
        Ok(Self { reducer, weights: bound.per_head("v"), of_queries, of_keys })
    }
}

/// `n` numbers of a vector, or of one that stands for all.
pub(super) fn spread(values: &[f32], n: usize) -> Vec<f32> {
    values.iter().copied().cycle().take(n).collect()
}

impl ScoreFunction for Units {
    fn reducer(&self) -> Reducer {
        self.reducer
    }

    fn dim(&self) -> usize {
        self.of_keys.of(0).outputs()
    }

    fn keeps_queries(&self) -> bool {
        false
    }

    fn keeps_keys(&self) -> bool {
        false
    }

    fn query_rows(&self, kernels: &Kernels, rows: QueryRows, q: &[f32], out: &mut [f32]) {
        self.of_queries.of(rows.head).apply(kernels, q, out);
    }

    fn key_rows(&self, kernels: &Kernels, rows: KeyRows, k: &[f32], out: &mut [f32]) {
        self.of_keys.of(rows.kv_head).apply(kernels, k, out);
    }

    fn key_cost(&self) -> usize {
        self.dim() * self.of_keys.of(0).inputs()
    }

    fn weights(&self, head: usize) -> &[f32] {
        self.weights.of(head)
    }
}
