//! A case as the f64 oracle of the whole operator has it.

use attnd_client::Element;
use attnd_kernel::Normaliser;
use attnd_kernel::reference::operator::OperatorRow;
use attnd_kernel::reference::problem::{Dense, Problem};

use super::cases::{Answer, Case, Row};
use super::dense::{lowest, numbers};

/// Sums of weights under this logarithm are below what f32 holds.
const UNDERFLOWN: f64 = -80.0;

impl Case {
    /// Some rows by the f64 oracle of the whole operator, of scores that are products.
    pub(crate) fn operator_reference(&self, rows: &[Row]) -> Vec<(Row, OperatorRow)> {
        assert!(self.score.is_scaled_dot(), "the oracle of operators knows no other score");
        let (shape, [q, k, v], parts) = (*self.shape(), &self.floats(), &self.parts());
        let mask = self.dense_mask.as_ref().map(|mask| {
            assert_eq!(mask.element, Element::Bool);
            Dense { shape: mask.shape, elements: mask.bytes.iter().map(|byte| *byte == 1).collect() }
        });
        let bias = self.dense_bias.as_ref().map(|bias| {
            // The lowest number of any type is for keys that aren't seen.
            let lowest = lowest(bias);
            let elements = numbers(bias).into_iter().map(|x| if x <= lowest { f32::NEG_INFINITY } else { x });
            Dense { shape: bias.shape, elements: elements.collect() }
        });
        let problem = Problem { shape, parts, q, k, v, mask: mask.as_ref(), bias: bias.as_ref() };
        let row = |(head, token)| problem.row(head / shape.n_heads(), head % shape.n_heads(), token);
        rows.iter().map(|at| (*at, row(*at))).collect()
    }

    /// The mean of one kv group's values by its definition: columns summed in f64, key by key.
    pub(crate) fn value_mean(&self, group: usize) -> Vec<f32> {
        let (n_keys, dim) = (self.shape().n_keys(), self.shape().value_dim());
        let [_, _, v] = self.floats();
        let column = |column: usize| {
            let values = (0..n_keys).map(|key| f64::from(v[(group * n_keys + key) * dim + column]));
            let mean = (values.fold(0.0, |sum, value| sum + value) / n_keys as f64) as f32;
            if mean.is_nan() { f32::from_bits(0x7fc0_0000) } else { mean + 0.0 }
        };
        (0..dim).map(column).collect()
    }
}

impl Answer {
    /// # Panics
    /// If a row of `wanted` is further from the oracle than its bound.
    pub(crate) fn assert_within_operator(&self, case: &Case, wanted: &[(Row, OperatorRow)], what: &str) {
        for (at, wanted) in wanted {
            let row = self.row(case.shape(), *at);
            let is_sum = case.normaliser != Normaliser::Softmax;
            let lse = if is_sum && wanted.lse < UNDERFLOWN { wanted.lse as f32 } else { row.lse[0] };
            let ratio = wanted.worst_ratio(&row.context, lse);
            assert!(ratio <= 1.0, "{what}: row {at:?} is {ratio} times the bound from the f64 oracle");
        }
    }
}
