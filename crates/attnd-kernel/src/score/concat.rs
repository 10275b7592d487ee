//! Luong's concat score (2015, equation 8): `v . tanh(W [q; k])`, as the additive one with the columns of `W` for queries and those
//! for keys.

use std::sync::Arc;

use super::additive::Units;
use super::{Bound, DefaultScale, Function, Parameter, PerHead, ScoreError, ScoreFunction, Symbol};
use crate::general::reduce::Reducer;
use crate::project::Linear;

pub(super) static FUNCTION: Function = Function {
    name: "concat",
    summary: "v . tanh(W [q; k]) (Luong)",
    parameters: &[
        Parameter { name: "v", shapes: &[&[Symbol::Units], &[Symbol::Heads, Symbol::Units]], default: None },
        Parameter {
            name: "w",
            shapes: &[
                &[Symbol::Units, Symbol::BothDims],
                &[Symbol::KvHeads, Symbol::Units, Symbol::BothDims],
            ],
            default: None,
        },
    ],
    default_scale: DefaultScale::One,
    bind,
};

fn bind(bound: &Bound<'_>) -> Result<Arc<dyn ScoreFunction>, ScoreError> {
    let units = bound.free(Symbol::Units).unwrap_or_default();
    let (queries, keys) = (bound.shape.query_dim(), bound.shape.head_dim());
    let w = bound.per_head("w");
    let columns = |w: &PerHead<Vec<f32>>, columns: std::ops::Range<usize>| -> Result<PerHead<Linear>, ScoreError> {
        w.try_map(|w| {
            let rows = w.chunks_exact(queries + keys);
            let part: Vec<f32> = rows.flat_map(|row| &row[columns.clone()]).copied().collect();
            bound.linear(&part, [units, columns.len()])
        })
    };
    Ok(Arc::new(Units {
        reducer: Reducer::Tanh,
        weights: bound.per_head("v"),
        of_queries: columns(&w, 0..queries)?.for_group(bound.shape.group_size()),
        of_keys: columns(&w, queries..queries + keys)?,
    }))
}
