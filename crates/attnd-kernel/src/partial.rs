//! Partials: `(m, l, o)` of some rows over some keys; how two of them merge, how sinks join and how one becomes a result.

use crate::block::RowPartials;
use crate::canonical;
use crate::dispatch::Kernels;
use crate::float_env::FloatEnvironment;

/// The partial of some rows over the keys of one tree node.
#[derive(Clone, Debug, PartialEq)]
pub struct PartialRows {
    /// Dimension of a value row.
    pub value_dim: usize,
    /// Integer running maximum of the scores in log2 units, -inf where a row sees no key. `[rows]`.
    pub m: Vec<f32>,
    /// Sum of `2^(s - m)` over the visible keys. `[rows]`.
    pub l: Vec<f32>,
    /// Unnormalised output. `[rows, value_dim]`.
    pub o: Vec<f32>,
}

/// Rows of the final result.
#[derive(Clone, Debug, PartialEq)]
pub struct FinishedRows {
    /// `[rows, value_dim]`; 0 where a row sees no key, unless something else was asked for.
    pub context: Vec<f32>,
    /// Natural logarithm of the sum of exponentials, `[rows]`; -inf where a row sees no key, or only scores of -inf,
    /// which callers that refuse infinite operands never have.
    pub lse: Vec<f32>,
    /// The first row with a NaN or an infinity in its context.
    pub non_finite_row: Option<usize>,
}

impl PartialRows {
    /// The partial of rows that have seen no key yet.
    pub fn empty(rows: usize, value_dim: usize) -> Self {
        Self {
            value_dim,
            m: vec![f32::NEG_INFINITY; rows],
            l: vec![0.0; rows],
            o: vec![0.0; rows * value_dim],
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.m.len()
    }

    /// The rows that have seen nothing, neither a key nor a sink.
    pub(crate) fn unseen(&self) -> Vec<usize> {
        (0..self.rows()).filter(|row| self.m[*row] == f32::NEG_INFINITY && self.l[*row] == 0.0).collect()
    }

    /// Merges with the partial to the right in the canonical tree (rule 6). Merging the same keys twice is a silently
    /// wrong answer: callers keep account of what is merged.
    ///
    /// # Panics
    /// If the two differ in rows or value dimension, or the lengths of a partial don't agree with each other.
    #[must_use]
    pub fn merge(mut self, right: &Self, kernels: &Kernels) -> Self {
        assert_eq!(self.value_dim, right.value_dim, "value dimensions differ");
        let left = RowPartials { m: &mut self.m, l: &mut self.l, o: &mut self.o };
        let _standard = FloatEnvironment::standard();
        kernels.merge_rows(left, &right.m, &right.l, &right.o, right.value_dim);
        self
    }

    /// Adds a logit without a value to the rows of each head, of which there are as many as `sinks` (rule 9). It is the
    /// rightmost part of the tree, so all keys must have been merged before.
    ///
    /// # Panics
    /// If the heads don't divide the rows, or the lengths of the partial don't agree with each other.
    #[must_use]
    pub fn with_sinks(self, sinks: &[f32], kernels: &Kernels) -> Self {
        let rows = self.rows();
        assert!(rows.is_multiple_of(sinks.len()), "{rows} rows of {} heads", sinks.len());
        let per_head = rows / sinks.len();
        let mut right = Self::empty(rows, self.value_dim);
        {
            let _standard = FloatEnvironment::standard();
            for (head, logit) in sinks.iter().enumerate() {
                let (m, l) = canonical::sink(*logit);
                right.m[head * per_head..][..per_head].fill(m);
                right.l[head * per_head..][..per_head].fill(l);
            }
        }
        self.merge(&right, kernels)
    }

    /// Divides, once, and takes the logarithm (rule 8).
    ///
    /// # Panics
    /// If the lengths don't agree with each other.
    pub fn finish(mut self, kernels: &Kernels) -> FinishedRows {
        let _standard = FloatEnvironment::standard();
        kernels.divide_rows(&self.m, &self.l, &mut self.o, self.value_dim);
        let lse: Vec<f32> = self.m.iter().zip(&self.l).map(|(m, l)| canonical::lse(*m, *l)).collect();
        let non_finite_row = crate::dtype::first_non_finite(&self.o).map(|at| at / self.value_dim);
        FinishedRows { context: self.o, lse, non_finite_row }
    }
    /// The end of rows whose weights are no softmax but sigmoids, each by itself: nothing is divided, and lse is the logarithm
    /// of the sum of weights (rule 10).
    ///
    /// # Panics
    /// If the lengths don't agree with each other.
    pub fn finish_sigmoid(mut self, kernels: &Kernels) -> FinishedRows {
        let _standard = FloatEnvironment::standard();
        // Divided by 1, a context has the signs of zeros and the NaN that all results have.
        let ones = vec![1.0; self.rows()];
        kernels.divide_rows(&self.m, &ones, &mut self.o, self.value_dim);
        let lse = self.l.iter().map(|l| if *l == 0.0 { f32::NEG_INFINITY } else { canonical::lse(0.0, *l) });
        let lse = lse.collect();
        let non_finite_row = crate::dtype::first_non_finite(&self.o).map(|at| at / self.value_dim);
        FinishedRows { context: self.o, lse, non_finite_row }
    }
}

impl FinishedRows {
    /// Puts what was asked for into rows that saw nothing, `[value_dim]`. [`Self::non_finite_row`] stays: a NaN that was asked for
    /// is no accident, and neither is one in the mean of values that may have some.
    pub(crate) fn fill(&mut self, rows: &[usize], context: &[f32]) {
        for row in rows {
            self.context[row * context.len()..][..context.len()].copy_from_slice(context);
        }
    }
}
