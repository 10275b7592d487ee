//! Rows of all heads as heads of rows, and back.

use attnd_kernel::AttnShape;

use super::LayerError;
use super::rope::Turns;
use crate::context::zeros;

/// Rows `[batch, tokens, heads * dim]` as heads, `[batch, heads, tokens, dim]`, each turned, and behind a row of `front`,
/// `[heads, dim]`, that isn't.
pub(super) fn into_heads(
    rows: &[f32],
    [batch, tokens, heads, dim]: [usize; 4],
    front: Option<&[f32]>,
    turns: Option<&Turns>,
) -> Result<Vec<f32>, LayerError> {
    let elements = rows.len() + front.map_or(0, |front| batch * front.len());
    let mut out = Vec::new();
    out.try_reserve_exact(elements).map_err(|_refused| LayerError::RowMemory { what: "heads", elements })?;
    for problem in rows.chunks_exact(tokens * heads * dim) {
        for head in 0..heads {
            let of_head = head * dim..(head + 1) * dim;
            out.extend(front.and_then(|front| front.get(of_head.clone())).into_iter().flatten());
            for (token, row) in problem.chunks_exact(heads * dim).enumerate() {
                let first = out.len();
                out.extend_from_slice(&row[of_head.clone()]);
                if let Some(turns) = turns {
                    turns.turn(token, &mut out[first..]);
                }
            }
        }
    }
    Ok(out)
}

/// Contexts `[batch, heads, queries, dim]` as rows, `[batch, queries, heads * dim]`.
pub(super) fn into_rows(context: &[f32], shape: &AttnShape) -> Result<Vec<f32>, LayerError> {
    let (heads, queries, dim) = (shape.n_heads(), shape.n_queries(), shape.value_dim());
    let elements = context.len();
    let mut rows = zeros(elements).ok_or(LayerError::RowMemory { what: "contexts", elements })?;
    for (head, of_head) in context.chunks_exact(queries * dim).enumerate() {
        let (batch, head) = (head / heads, head % heads);
        for (token, from) in of_head.chunks_exact(dim).enumerate() {
            let row: &mut [f32] = &mut rows[((batch * queries + token) * heads + head) * dim..][..dim];
            row.copy_from_slice(from);
        }
    }
    Ok(rows)
}
