//! Luong's location score (2015, equation 8): `W_a q`, one row of `W_a` for each position of a key, whatever the key is. As in its
//! footnote, sequences shorter than `W_a` use the top of it.

use std::sync::Arc;

use super::{Bound, DefaultScale, Function, KeyRows, Parameter, PerHead, ScoreError, ScoreFunction, Symbol};
use crate::dispatch::Kernels;

pub(super) static FUNCTION: Function = Function {
    name: "location",
    summary: "(W_a q)_j, keys are not looked at (Luong)",
    parameters: &[Parameter {
        name: "w_a",
        shapes: &[
            &[Symbol::Positions, Symbol::QueryDim],
            &[Symbol::KvHeads, Symbol::Positions, Symbol::QueryDim],
        ],
        default: None,
    }],
    default_scale: DefaultScale::One,
    bind,
};

fn bind(bound: &Bound<'_>) -> Result<Arc<dyn ScoreFunction>, ScoreError> {
    let (got, keys) = (bound.free(Symbol::Positions).unwrap_or_default(), bound.shape.n_keys());
    if got < keys {
        return Err(ScoreError::Positions { function: bound.name(), got, keys });
    }
    Ok(Arc::new(Location { dim: bound.shape.query_dim(), w_a: bound.per_head("w_a") }))
}

#[derive(Debug)]
struct Location {
    dim: usize,
    w_a: PerHead<Vec<f32>>,
}

impl ScoreFunction for Location {
    fn dim(&self) -> usize {
        self.dim
    }

    fn keeps_keys(&self) -> bool {
        false
    }

    fn key_rows(&self, _kernels: &Kernels, rows: KeyRows, _k: &[f32], out: &mut [f32]) {
        let of_keys = rows.keys.start * self.dim..rows.keys.end * self.dim;
        out.copy_from_slice(&self.w_a.of(rows.kv_head)[of_keys]);
    }
}
