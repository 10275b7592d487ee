//! Where the projections of a call run, and what that has travel.
//!
//! Two places are possible in principle. On the client, Q, K and V travel to the coordinator, which sends each worker its part. On the
//! workers, rows would travel as they are, and each worker would need the matrices and, its heads being parts of every row, all
//! rows. Attention grows rows where heads times their dimension exceed a row's width, and shrinks them with few kv heads; so either
//! may have less to send. Workers can't project yet: the choice is always the client, and the text says what that costs.

use std::fmt;

use super::{Inner, Rows};

/// What projecting costs. All bytes are of f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProjectionPlan {
    /// Bytes of Q, K and V, which travel to the coordinator.
    pub operand_bytes: u64,
    /// Bytes of the rows that they are made of, each counted once: what would travel to each worker if workers projected.
    pub input_bytes: u64,
    /// Bytes of all matrices and biases, which each worker would need.
    pub weight_bytes: u64,
    /// Operations of the projections, those of gate and result included.
    pub flops: u64,
}

impl fmt::Display for ProjectionPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operand_bytes, input_bytes, weight_bytes, flops } = self;
        write!(
            f,
            "projections run on the client, {:.1} MFLOP; {operand_bytes} bytes of Q, K and V travel (workers can't project yet: \
             {input_bytes} bytes of rows and {weight_bytes} of weights would travel to each)",
            *flops as f64 / 1e6
        )
    }
}

/// The plan of one call over these rows.
pub(super) fn plan(layer: &Inner, query: &Rows, key: &Rows, value: &Rows) -> ProjectionPlan {
    let bytes = |elements: u64| elements.saturating_mul(size_of::<f32>() as u64);
    let rows = |rows: &Rows| (rows.batch() * rows.tokens()) as u64;
    let learnt = if layer.learnt.is_some() { key.batch() as u64 } else { 0 };
    let dims = &layer.dims;
    let of_queries = rows(query).saturating_mul((dims.heads * dims.head_dim) as u64);
    // Values that are parts of keys neither travel nor are projected.
    let has_values = layer.latent.is_none();
    let per_key = dims.head_dim + if has_values { dims.value_dim } else { 0 };
    let of_keys = (rows(key) + learnt).saturating_mul((dims.kv_heads * per_key) as u64);

    let mut distinct: Vec<&Rows> = Vec::new();
    for input in [query, key, value] {
        if !distinct.iter().any(|known| known.are(input)) {
            distinct.push(input);
        }
    }
    let on_queries = [Some(&layer.query), layer.gate.as_ref(), layer.output.as_ref()].into_iter().flatten();
    let on_values = has_values.then_some((&layer.value, value));
    let work = on_queries.map(|linear| (linear, query)).chain([(&layer.key, key)]).chain(on_values);
    let flops = work.map(|(linear, input)| {
        rows(input).saturating_mul(2 * linear.inputs() as u64).saturating_mul(linear.outputs() as u64)
    });
    let latent = layer.latent.as_ref().map(|latent| rows(query).saturating_mul(latent.flops()));
    ProjectionPlan {
        operand_bytes: bytes(of_queries.saturating_add(of_keys)),
        input_bytes: bytes(distinct.iter().map(|input| input.values().len() as u64).sum()),
        weight_bytes: layer.weight_bytes,
        flops: flops.chain(latent).fold(0, u64::saturating_add),
    }
}
