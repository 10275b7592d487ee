//! Cosine similarity with a sharpness (Graves et al. 2014, "Neural Turing Machines", equations 5 and 6):
//! `beta q . k / (max(|q|, eps) max(|k|, eps))`, each norm held by itself as torch's `cosine_similarity` does.
//!
//! Norms are sums of squares in f64, ascending, where a square of f32 is exact and can't overflow.

use std::sync::Arc;

use super::{Bound, DefaultScale, Function, KeyRows, Parameter, QueryRows, ScoreError, ScoreFunction, Symbol};
use crate::dispatch::Kernels;

pub(super) static FUNCTION: Function = Function {
    name: "cosine",
    summary: "beta cos(q, k), norms of eps at least (Graves' content addressing, torch's cosine_similarity)",
    parameters: &[
        Parameter {
            name: "beta",
            shapes: &[
                &[Symbol::One],
                &[Symbol::Heads],
                &[Symbol::Heads, Symbol::Queries],
                &[Symbol::Batch, Symbol::Heads, Symbol::Queries],
            ],
            default: Some(1.0),
        },
        Parameter { name: "eps", shapes: &[&[Symbol::One]], default: Some(1e-8) },
    ],
    default_scale: DefaultScale::One,
    bind,
};

fn bind(bound: &Bound<'_>) -> Result<Arc<dyn ScoreFunction>, ScoreError> {
    let eps = bound.per_head("eps").of(0)[0];
    if eps <= 0.0 {
        return Err(ScoreError::Value { parameter: "eps", at: 0, value: eps, expected: "over 0" });
    }
    let (beta, strides) = match bound.given("beta") {
        None => (vec![1.0], [0; 3]),
        Some((beta, shape)) => {
            let (heads, queries) = (bound.shape.n_heads(), bound.shape.n_queries());
            let strides = [[0, 0, 0], [0, 1, 0], [0, queries, 1], [heads * queries, queries, 1]];
            (beta.to_vec(), strides[shape])
        }
    };
    Ok(Arc::new(Cosine { dim: bound.same_dim()?, eps: eps.into(), beta, strides }))
}

#[derive(Debug)]
struct Cosine {
    dim: usize,
    eps: f64,
    beta: Vec<f32>,
    /// Of batch elements, heads and tokens in `beta`.
    strides: [usize; 3],
}

impl Cosine {
    /// Rows over their norms, times `factor` of each.
    fn divided(&self, rows: &[f32], factor: impl Fn(usize) -> f32, out: &mut [f32]) {
        let rows = rows.chunks_exact(self.dim).zip(out.chunks_exact_mut(self.dim));
        for (i, (row, out)) in rows.enumerate() {
            let norm = row.iter().fold(0.0, |sum, x| sum + f64::from(*x) * f64::from(*x)).sqrt();
            // A norm that is NaN stays.
            let factor = f64::from(factor(i)) / if norm < self.eps { self.eps } else { norm };
            out.iter_mut().zip(row).for_each(|(to, x)| *to = (f64::from(*x) * factor) as f32);
        }
    }
}

impl ScoreFunction for Cosine {
    fn dim(&self) -> usize {
        self.dim
    }

    fn keeps_queries(&self) -> bool {
        false
    }

    fn keeps_keys(&self) -> bool {
        false
    }

    fn query_rows(&self, _kernels: &Kernels, rows: QueryRows, q: &[f32], out: &mut [f32]) {
        let [of_batch, of_head, of_token] = self.strides;
        let first = rows.batch * of_batch + rows.head * of_head + rows.tokens.start * of_token;
        self.divided(q, |i| self.beta[first + i * of_token], out);
    }

    fn key_rows(&self, _kernels: &Kernels, _rows: KeyRows, k: &[f32], out: &mut [f32]) {
        self.divided(k, |_| 1.0, out);
    }
}
