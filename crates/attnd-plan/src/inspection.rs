//! How the second pass is cut, and what memory it takes of a worker beside operands and partials.

use attnd_kernel::slot::{N_SLOTS, keys_in_slots};
use attnd_kernel::{AttnShape, Outputs, Rectangle};

/// Bytes that a report aims at; one on a single token may have more.
const REPORT_BYTES: u64 = 1 << 20;
/// Bytes of elements that are computed at a time; those of one token and one slot may be more. A node that has more is computed
/// by its children.
pub const ELEMENT_BYTES: u64 = 4 << 20;

/// The most bytes that a report on so many consecutive query tokens of one kv group can have.
pub fn most_report_bytes(outputs: &Outputs, tokens: usize) -> u64 {
    let shape = outputs.shape();
    let of_group = |group: usize| {
        // Wherever several tokens begin, they touch one row of the map more than the first ones do, at most.
        let columns = outputs.parts().heatmap.filter(|_| tokens > 1).map_or(0, |(_, columns)| columns);
        let one_row = 8 * (outputs.heads_of_group(group).len() * columns) as u64;
        outputs.report_bytes(group, &(0..tokens.min(shape.n_queries()))) + one_row
    };
    (0..shape.n_kv_heads()).map(of_group).max().unwrap_or(0)
}

/// The most bytes of elements that one query token of a kv group has in one slot.
fn most_element_bytes(outputs: &Outputs) -> u64 {
    let shape = outputs.shape();
    let slot_keys = (0..N_SLOTS).map(|slot| keys_in_slots(slot..slot + 1, shape.n_keys())).max().unwrap_or(0);
    let of_rectangle = |rectangle: &Rectangle| {
        let heads = rectangle.heads.len().min(shape.group_size()) as u64;
        4 * heads * rectangle.keys.len().min(slot_keys) as u64
    };
    outputs.rectangles().iter().map(of_rectangle).sum()
}

/// The most tokens, up to `most`, whose report, and whose elements in a slot, have the size that they aim at; at least one.
pub(crate) fn tokens_per_report(outputs: &Outputs, most: usize) -> usize {
    let of_token = most_element_bytes(outputs);
    let fits = |tokens: usize| {
        most_report_bytes(outputs, tokens) <= REPORT_BYTES && of_token * tokens as u64 <= ELEMENT_BYTES
    };
    if fits(most) {
        return most;
    }
    let (mut low, mut high) = (1, most);
    while low + 1 < high {
        let middle = low.midpoint(high);
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

/// What a worker reserves for the second pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InspectionBytes {
    /// Of each kv group: how its rows ended.
    pub of_group: u64,
    /// Of the share: a report that grows, one that joins it, one that is sent, and elements.
    pub of_share: u64,
}

impl InspectionBytes {
    /// With so many tokens in a report; nothing where nothing is wanted.
    pub fn new(outputs: Option<&Outputs>, shape: &AttnShape, tokens_per_cell: usize) -> Self {
        let Some(outputs) = outputs else { return Self::default() };
        let indivisible = most_element_bytes(outputs) * tokens_per_cell as u64;
        let elements = if indivisible == 0 { 0 } else { ELEMENT_BYTES.max(indivisible) };
        Self {
            of_group: 8 * (shape.group_size() * shape.n_queries()) as u64,
            of_share: 3 * most_report_bytes(outputs, tokens_per_cell) + elements,
        }
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{Causal, Dims, Operator, OutputsParts};
    use proptest::prelude::*;

    use super::*;

    fn shape(queries: u64, keys: u64) -> AttnShape {
        let dims = Dims { batch: 2, heads: 6, kv_heads: 2, queries, keys, head_dim: 4, value_dim: 4 };
        AttnShape::new(dims).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Reports of cells are never larger than was said, and as many tokens share one as fit.
        #[test]
        fn reports_have_the_size_that_was_reserved(
            (queries, rows) in (1u64..3000).prop_flat_map(|queries| (Just(queries), 1..=queries.min(4096))),
            columns in 1usize..4096, top_k in 0usize..1024, blocks in 1usize..300, most in 1usize..3000,
        ) {
            let shape = shape(queries, 4096);
            let parts = OutputsParts {
                top_k,
                mass_block: std::num::NonZeroUsize::new(4096 / blocks),
                heatmap: Some((rows as usize, columns)),
                heads: Some(1..5),
                ..OutputsParts::default()
            };
            let outputs = Outputs::new(parts, &shape, &Operator::plain(1.0, Causal::None)).unwrap();
            let tokens = tokens_per_report(&outputs, most.min(queries as usize));
            for group in 0..shape.n_groups() {
                for first in (0..shape.n_queries()).step_by(tokens) {
                    let cell = first..shape.n_queries().min(first + tokens);
                    prop_assert!(outputs.report_bytes(group, &cell) <= most_report_bytes(&outputs, tokens));
                }
            }
            prop_assert!(tokens == 1 || most_report_bytes(&outputs, tokens) <= REPORT_BYTES);
            let one_more = (tokens + 1).min(most.min(queries as usize));
            prop_assert!(one_more == tokens || most_report_bytes(&outputs, one_more) > REPORT_BYTES);
        }
    }

    #[test]
    fn nothing_wanted_takes_nothing() {
        assert_eq!(InspectionBytes::new(None, &shape(9, 9), 9), InspectionBytes::default());
    }
}
