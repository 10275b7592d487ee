//! Maps of weights on their way to the client: rows of a map leave when all of their queries have been reported on.
//!
//! Reports are on ranges of tokens, and a row of a map may begin in one range and end in another. Sums are integers, so the ranges
//! may come in any order. What waits here is rows that are begun and not whole: for each range of tokens under way two at most.

use std::collections::BTreeMap;
use std::ops::Range;

use attnd_kernel::{AttnShape, Heat, Outputs};
use attnd_wire::HeatChunk;

/// The rows of one call that are begun and not whole, by group and row.
#[derive(Debug, Default)]
pub(crate) struct HeatRows {
    begun: BTreeMap<(usize, usize), Begun>,
}

#[derive(Debug)]
struct Begun {
    sums: Heat,
    /// Query tokens that were not reported on.
    left: usize,
}

impl HeatRows {
    /// Adds what is known of the maps of a group's heads from some query tokens, over all keys. Returns the rows that are whole with
    /// it, which are `[heads, 1, columns]` each.
    pub(crate) fn add(
        &mut self,
        part: &Heat,
        group: usize,
        tokens: &Range<usize>,
        shape: &AttnShape,
        outputs: &Outputs,
    ) -> Vec<HeatChunk> {
        let Some((n_rows, columns)) = outputs.parts().heatmap else { return Vec::new() };
        let n_queries = shape.n_queries();
        let mut whole = Vec::new();
        for row in part.rows.clone() {
            // As the outputs say: row r holds [r * queries / rows, (r + 1) * queries / rows).
            let of_row = row * n_queries / n_rows..(row + 1) * n_queries / n_rows;
            let begun = self.begun.entry((group, row)).or_insert_with(|| Begun {
                sums: Heat {
                    heads: part.heads.clone(),
                    rows: row..row + 1,
                    columns,
                    cells: vec![0; part.heads.len() * columns],
                },
                left: of_row.len(),
            });
            begun.sums.merge(part);
            let shared = of_row.end.min(tokens.end).saturating_sub(of_row.start.max(tokens.start));
            begun.left = begun.left.saturating_sub(shared);
            if begun.left == 0
                && let Some(Begun { sums, .. }) = self.begun.remove(&(group, row))
            {
                let first_head = group * shape.group_size();
                let heads = first_head + sums.heads.start..first_head + sums.heads.end;
                whole.push(HeatChunk { heads, rows: row..row + 1, cells: sums.means(outputs) });
            }
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{Causal, Dims, Operator, OutputsParts};

    use super::*;

    /// Wherever tokens are cut and in whatever order ranges come, each row leaves once, whole.
    #[test]
    fn rows_leave_when_they_are_whole() {
        let dims = Dims { batch: 1, heads: 4, kv_heads: 2, queries: 23, keys: 9, head_dim: 1, value_dim: 1 };
        let shape = AttnShape::new(dims).unwrap();
        let parts = OutputsParts { heatmap: Some((5, 3)), heads: Some(1..4), ..OutputsParts::default() };
        let outputs = Outputs::new(parts, &shape, &Operator::plain(1.0, Causal::None)).unwrap();
        for step in [1, 2, 4, 7, 23] {
            let mut ranges: Vec<Range<usize>> =
                (0..23).step_by(step).map(|first| first..23.min(first + step)).collect();
            for _order in 0..2 {
                ranges.reverse();
                let mut rows = HeatRows::default();
                let mut left = Vec::new();
                for tokens in &ranges {
                    let mut part = Heat::empty(&outputs, 0, tokens);
                    // Each token weighs 1 in column 1.
                    for row in part.rows.clone() {
                        let n =
                            (row * 23 / 5..(row + 1) * 23 / 5).filter(|token| tokens.contains(token)).count();
                        part.cells[(row - part.rows.start) * 3 + 1] = (n as i64) << 44;
                    }
                    left.extend(rows.add(&part, 0, tokens, &shape, &outputs));
                }
                left.sort_by_key(|chunk| chunk.rows.start);
                let expected =
                    |row: usize| HeatChunk { heads: 1..2, rows: row..row + 1, cells: vec![0.0, 1.0, 0.0] };
                assert_eq!(left, (0..5).map(expected).collect::<Vec<_>>(), "ranges of {step}");
                assert!(rows.begun.is_empty());
            }
        }
    }
}
