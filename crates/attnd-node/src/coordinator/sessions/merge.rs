//! From the partials of all shards to finished rows. Pure.

use std::collections::BTreeMap;

use attnd_kernel::slot::Node;
use attnd_kernel::{AttnShape, Kernels, Operator, PartialRows};
use attnd_plan::CellId;
use attnd_plan::omission::{Omission, omits};
use attnd_wire::{Error, Reason, refusal};

/// All rows of some queries.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rows {
    /// `[heads, tokens, value_dim]`.
    pub(crate) context: Vec<f32>,
    /// `[heads, tokens]`.
    pub(crate) lse: Vec<f32>,
}

/// Merges the partials of all shards along the canonical tree, adds sinks and divides. The shards tile kv heads and slots, and
/// each gave all its cells once; what is missing all the same is an error here, never a wrong row.
///
/// # Errors
/// [`Reason::OutputOverflow`] for the first row that isn't finite, unless that is allowed; [`Reason::Internal`] if the cells don't tile
/// the rows.
pub(crate) fn merge(
    cells: Vec<(CellId, PartialRows)>,
    shape: &AttnShape,
    operator: &Operator,
    allow_non_finite: bool,
    kernels: &Kernels,
) -> Result<Rows, Error> {
    let (tokens, dim, group_size) = (shape.n_queries(), shape.value_dim(), shape.group_size());
    // By kv head and first token; of each, its nodes.
    let mut rows: BTreeMap<(usize, usize), Row> = BTreeMap::new();
    for (cell, partial) in cells {
        let new = || Row { tokens: cell.tokens, keys: 0, nodes: Vec::new() };
        let row = rows.entry((cell.group, cell.first_token)).or_insert_with(new);
        if row.tokens != cell.tokens {
            return Err(uncovered(&cell));
        }
        row.keys += cell.keys;
        row.nodes.push((cell.node, partial));
    }
    // The first row that isn't there yet.
    let mut next = (0, 0);
    let mut merged =
        Rows { context: vec![0.0; shape.n_heads() * tokens * dim], lse: vec![0.0; shape.n_heads() * tokens] };
    for ((group, first), Row { tokens: of_tokens, keys, mut nodes }) in rows {
        nodes.sort_by_key(|(node, _)| node.slots().start);
        // Nodes apart from each other with as many keys as there are have each key once.
        let are_apart =
            nodes.array_windows().all(|[(left, _), (right, _)]| left.slots().end <= right.slots().start);
        if (!are_apart || keys != shape.n_keys()) && !omits(Omission::CoverageCheck) {
            let detail = format!("partials of {keys} keys of kv head {group}, which has {}", shape.n_keys());
            return Err(Error::new(Reason::Internal, detail));
        }
        if next != (group, first) {
            return Err(missing(next));
        }
        next = if first + of_tokens == tokens { (group + 1, 0) } else { (group, first + of_tokens) };
        let folded = attnd_plan::fold(nodes, |left, right| left.merge(&right, kernels));
        let partial = folded.unwrap_or_else(|| PartialRows::empty(group_size * of_tokens, dim));
        let partial = operator.join_sinks(partial, group, shape, kernels);
        let finished = operator.divide(partial, None, kernels);
        if let Some(row) = finished.non_finite_row.filter(|_| !allow_non_finite) {
            let head = group * group_size + row / of_tokens;
            return Err(refusal::output_overflow(head, first + row % of_tokens));
        }
        for head in 0..group_size {
            let from = head * of_tokens;
            let to = (group * group_size + head) * tokens + first;
            let (lse, context) = (&mut merged.lse, &mut merged.context);
            let placed =
                lse.get_mut(to..to + of_tokens).zip(context.get_mut(to * dim..(to + of_tokens) * dim));
            let Some((lse, context)) = placed else {
                return Err(Error::new(Reason::Internal, format!("a cell of head {head}, token {first}")));
            };
            lse.copy_from_slice(&finished.lse[from..from + of_tokens]);
            context.copy_from_slice(&finished.context[from * dim..(from + of_tokens) * dim]);
        }
    }
    if next == (shape.n_groups(), 0) { Ok(merged) } else { Err(missing(next)) }
}

fn missing((group, token): (usize, usize)) -> Error {
    Error::new(Reason::Internal, format!("no partial of kv head {group} begins with token {token}"))
}

/// All partials of some tokens of a kv head.
struct Row {
    tokens: usize,
    keys: usize,
    nodes: Vec<(Node, PartialRows)>,
}

fn uncovered(cell: &CellId) -> Error {
    let CellId { group, first_token, tokens, .. } = cell;
    Error::new(
        Reason::Internal,
        format!("cells of kv head {group} disagree about tokens {first_token}+{tokens}"),
    )
}

#[cfg(test)]
mod tests {
    use attnd_kernel::slot::N_SLOTS;
    use attnd_kernel::{Causal, Dims, Isa};
    use attnd_plan::{Piece, cells};

    use super::*;

    fn shape() -> AttnShape {
        let dims =
            Dims { batch: 1, heads: 4, kv_heads: 2, queries: 5, keys: 3000, head_dim: 4, value_dim: 2 };
        AttnShape::new(dims).unwrap()
    }

    /// Partials in which each row saw as many keys of weight 1 as the node holds, of values that are the number of its head
    /// and token.
    fn partials(pieces: &[Piece], tokens_per_cell: usize) -> Vec<(CellId, PartialRows)> {
        let shape = shape();
        let of_cell = |cell: CellId| {
            let rows = shape.group_size() * cell.tokens;
            let value = |at: usize| {
                let (row, dim) = (at / 2, at % 2);
                let (head, token) = (row / cell.tokens, row % cell.tokens + cell.first_token);
                (cell.group * 200 + head * 100 + token * 2 + dim) as f32 * cell.keys as f32
            };
            let partial = PartialRows {
                value_dim: 2,
                m: vec![0.0; rows],
                l: vec![cell.keys as f32; rows],
                o: (0..rows * 2).map(value).collect(),
            };
            (cell, partial)
        };
        cells(pieces, &shape, tokens_per_cell).into_iter().map(of_cell).collect()
    }

    fn merged(cells: Vec<(CellId, PartialRows)>) -> Result<Rows, Error> {
        let operator = Operator::plain(1.0, Causal::None);
        merge(cells, &shape(), &operator, false, Kernels::for_isa(Isa::Portable).unwrap())
    }

    fn pieces() -> Vec<Piece> {
        vec![
            Piece { groups: 0..1, slots: 0..N_SLOTS },
            Piece { groups: 1..2, slots: 0..5 },
            Piece { groups: 1..2, slots: 5..N_SLOTS },
        ]
    }

    #[test]
    fn rows_come_to_their_places_in_whatever_order_and_cells() {
        for tokens_per_cell in [1, 2, 5] {
            let mut cells = partials(&pieces(), tokens_per_cell);
            cells.reverse();
            let rows = merged(cells).unwrap();
            let expected: Vec<f32> = (0..4 * 5 * 2).map(|at| (at / 10 * 100 + at % 10) as f32).collect();
            assert_eq!(rows.context, expected);
            assert!(rows.lse.iter().all(|lse| (lse - 3000_f32.ln()).abs() < 1e-5), "{:?}", rows.lse);
        }
    }

    #[test]
    fn a_cell_that_is_missing_or_there_twice_is_an_error() {
        for at in 0..partials(&pieces(), 2).len() {
            let mut cells = partials(&pieces(), 2);
            let cell = cells.remove(at);
            let missing = merged(cells.clone()).unwrap_err();
            assert_eq!(missing.reason, Reason::Internal, "{missing}");
            cells.extend([cell.clone(), cell.clone()]);
            let twice = merged(cells.clone()).unwrap_err();
            assert_eq!(twice.reason, Reason::Internal, "{twice}");
            // One in the place of another, with as many keys.
            let other = cells.iter().position(|(other, _)| other.keys == cell.0.keys && *other != cell.0);
            if let Some(other) = other {
                cells.remove(other);
                assert_eq!(merged(cells).unwrap_err().reason, Reason::Internal);
            }
        }
    }

    #[test]
    fn a_row_that_is_not_finite_is_named_unless_it_may_be() {
        let mut cells = partials(&pieces(), 5);
        cells[0].1.o[2 * 7] = f32::INFINITY;
        let refused = merged(cells).unwrap_err();
        assert_eq!(refused.reason, Reason::OutputOverflow);
        assert!(refused.message().contains("head 1 row 2"), "{refused}");
    }
}
