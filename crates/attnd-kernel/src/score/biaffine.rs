//! Dozat's biaffine score (Dozat and Manning 2017, equation 3): `q^T W k + u . q + w . k + b`.
//!
//! As the product of `[W^T q + w, u . q + b]` and `[k, 1]`: what a row adds to all of its scores alike is the last product of the
//! sum, so that it shows in lse and in raw scores, too.

use std::sync::Arc;

use super::additive::spread;
use super::general::transposed;
use super::{
    Bound, DefaultScale, Function, KeyRows, Parameter, PerHead, QueryRows, ScoreError, ScoreFunction, Symbol,
};
use crate::dispatch::Kernels;
use crate::project::Linear;
use crate::storage::Storage;

pub(super) static FUNCTION: Function = Function {
    name: "biaffine",
    summary: "q^T W k + u . q + v . k + b (Dozat)",
    parameters: &[
        Parameter {
            name: "w",
            shapes: &[&[Symbol::QueryDim, Symbol::KeyDim], &[Symbol::Heads, Symbol::QueryDim, Symbol::KeyDim]],
            default: None,
        },
        Parameter {
            name: "u",
            shapes: &[&[Symbol::QueryDim], &[Symbol::Heads, Symbol::QueryDim]],
            default: Some(0.0),
        },
        Parameter {
            name: "v",
            shapes: &[&[Symbol::KeyDim], &[Symbol::Heads, Symbol::KeyDim]],
            default: Some(0.0),
        },
        Parameter { name: "b", shapes: &[&[Symbol::One], &[Symbol::Heads]], default: Some(0.0) },
    ],
    default_scale: DefaultScale::One,
    bind,
};

fn bind(bound: &Bound<'_>) -> Result<Arc<dyn ScoreFunction>, ScoreError> {
    let (queries, keys) = (bound.shape.query_dim(), bound.shape.head_dim());
    let layers = bound.per_head("w").with(&bound.per_head("u"), |w, u| {
        let mut matrix = transposed(w, keys);
        matrix.extend(spread(u, queries));
        bound.linear(&matrix, [keys + 1, queries])
    })?;
    let bias = bound.per_head("v").with(&bound.per_head("b"), |v, b| {
        let mut bias = spread(v, keys);
        bias.extend(b);
        Ok(bias)
    })?;
    let layers = layers.with(&bias, |layer, bias| Ok(layer.with_bias(bias.clone())))?;
    Ok(Arc::new(Biaffine { layers }))
}

#[derive(Debug)]
struct Biaffine {
    layers: PerHead<Linear>,
}

impl ScoreFunction for Biaffine {
    fn dim(&self) -> usize {
        self.layers.of(0).outputs()
    }

    fn keeps_queries(&self) -> bool {
        false
    }

    fn keeps_keys(&self) -> bool {
        false
    }

    /// Floats have the 1 that is appended; integers would have to share their scale with it.
    fn storage(&self, sent: Storage) -> Storage {
        if sent.has_scales() { Storage::F32 } else { sent }
    }

    fn query_rows(&self, kernels: &Kernels, rows: QueryRows, q: &[f32], out: &mut [f32]) {
        self.layers.of(rows.head).apply(kernels, q, out);
    }

    fn key_rows(&self, _kernels: &Kernels, _rows: KeyRows, k: &[f32], out: &mut [f32]) {
        let dim = self.dim();
        for (k, out) in k.chunks_exact(dim - 1).zip(out.chunks_exact_mut(dim)) {
            out[..dim - 1].copy_from_slice(k);
            out[dim - 1] = 1.0;
        }
    }
}
