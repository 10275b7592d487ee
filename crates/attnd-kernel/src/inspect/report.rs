//! What a second pass leaves of some rows over some keys, how two such parts join, and how one becomes numbers.

use std::ops::Range;

use super::heat::Heat;
use super::outputs::{ENTROPY_UNIT, Outputs};
use super::top::{Ranked, merge_best};
use crate::attend::ScoreOverflow;
use crate::canonical::functions::sigmoid;
use crate::canonical::{CANONICAL_NAN, finite_max, query_factor, weight};
use crate::float_env::FloatEnvironment;
use crate::normaliser::Normaliser;
use crate::operator::Operator;

/// What the weights of some rows are divided by: `m` and `l` of [`crate::PartialRows`] over all keys, after sinks have joined (see
/// [`Operator::join_sinks`]). Both `[head in group, token]`, of all heads of the group and of the tokens that are asked for.
#[derive(Clone, Copy, Debug)]
pub struct RowSums<'a> {
    /// Integer maximum in log2 units, -inf where a row saw nothing; 0 where weights are sigmoids.
    pub m: &'a [f32],
    /// Sum of `2^(s - m)`, or of sigmoids.
    pub l: &'a [f32],
}

/// What is known of the rows of a kv group from some keys. Sums are integers, so that parts join exactly, in any order; what isn't wanted is
/// empty. Rows are `[head, token]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeReport {
    /// Heads of the group that are wanted, counted from its first.
    pub heads: Range<usize>,
    /// Query tokens.
    pub tokens: Range<usize>,
    /// `[rows, k]`: the keys with the highest scores, best first; where there are fewer, the default at the end.
    pub top: Vec<Ranked>,
    /// `[rows, blocks]`: sums of weights.
    pub mass: Vec<i64>,
    /// `[rows]`: sums of `-w ln w`.
    pub entropy: Vec<i64>,
    /// `[rows]`: sums of weight times distance.
    pub distance: Vec<i64>,
    /// `[rows]`: the highest score that is finite, in log2 units, or -inf.
    pub max_score: Vec<f32>,
    /// Sums of weights by cell.
    pub heat: Heat,
    /// The first row, by token and then by head, of which a visible score left the range of f32, as [`crate::attend_node`] reports it.
    pub overflow: Option<ScoreOverflow>,
}

/// A report that is none of what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// Another number of elements.
    #[error("report.{part} has {got} elements, not {want}")]
    Length {
        /// Which part.
        part: &'static str,
        /// How many there are.
        got: usize,
        /// How many there should be.
        want: usize,
    },
    /// Rows of something else.
    #[error("report.{part} is {}..{}, not {}..{}", got.0, got.1, want.0, want.1)]
    Rows {
        /// Which part.
        part: &'static str,
        /// What it is of.
        got: (usize, usize),
        /// What it should be of.
        want: (usize, usize),
    },
    /// A value that no computation gives.
    #[error("report.{part}[{at}] is no such value")]
    Value {
        /// Which part.
        part: &'static str,
        /// Which element.
        at: usize,
    },
}

/// Numbers of some rows, `[head, token]` of the heads that are wanted. What isn't wanted is empty; what a NaN or an infinite score
/// has reached is NaN.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FinishedReport {
    /// `[rows, k]`: keys by falling score, the lower one first where scores are equal; `u32::MAX` behind the last.
    pub top_keys: Vec<u32>,
    /// `[rows, k]`: their weights; 0 behind the last.
    pub top_weights: Vec<f32>,
    /// `[rows, k]`: their scores, biases included, in natural units; -inf behind the last.
    pub top_scores: Vec<f32>,
    /// `[rows, blocks]`: sums of weights over blocks of keys.
    pub mass: Vec<f32>,
    /// `[rows]`: `- sum_j w_j ln w_j` over the keys, in nats; 0 for a row that sees nothing.
    pub entropy: Vec<f32>,
    /// `[rows]`: `sum_j w_j |p_i - j|`, over the sum of weights where these are sigmoids; 0 for a row that sees nothing.
    pub distance: Vec<f32>,
    /// `[rows]`: the highest score in natural units; -inf for a row that sees nothing.
    pub max_score: Vec<f32>,
}

impl NodeReport {
    /// The report of a group's tokens over no keys.
    pub fn empty(wanted: &Outputs, group: usize, tokens: Range<usize>) -> Self {
        let heads = wanted.heads_of_group(group);
        let rows = heads.len() * tokens.len();
        let parts = wanted.parts();
        let of = |is_wanted: bool| if is_wanted { rows } else { 0 };
        Self {
            top: vec![Ranked::default(); rows * parts.top_k],
            mass: vec![0; rows * wanted.mass_blocks()],
            entropy: vec![0; of(parts.entropy)],
            distance: vec![0; of(parts.distance)],
            max_score: vec![f32::NEG_INFINITY; of(parts.max_score)],
            heat: Heat::empty(wanted, group, &tokens),
            overflow: None,
            heads,
            tokens,
        }
    }

    /// Joins with the report of the same rows over other keys: exactly, so in any order. Joining the same keys twice is a silently wrong
    /// answer: callers keep account of what is joined.
    ///
    /// # Panics
    /// If the two are of other rows or outputs; [`Self::check`] tells before.
    pub fn merge(&mut self, right: &Self) {
        assert_eq!((&self.heads, &self.tokens), (&right.heads, &right.tokens), "rows of a report");
        let rows = self.heads.len() * self.tokens.len();
        assert_eq!(self.top.len(), right.top.len(), "top keys");
        if let Some(k) = self.top.len().checked_div(rows).filter(|k| *k > 0) {
            for (left, right) in self.top.chunks_mut(k).zip(right.top.chunks(k)) {
                merge_best(left, right);
            }
        }
        let sums = [
            (&mut self.mass, &right.mass),
            (&mut self.entropy, &right.entropy),
            (&mut self.distance, &right.distance),
        ];
        for (left, right) in sums {
            assert_eq!(left.len(), right.len(), "sums of a report");
            left.iter_mut().zip(right).for_each(|(left, right)| *left = left.saturating_add(*right));
        }
        assert_eq!(self.max_score.len(), right.max_score.len(), "highest scores");
        for (left, right) in self.max_score.iter_mut().zip(&right.max_score) {
            *left = if *right > *left { *right } else { *left };
        }
        self.heat.merge(&right.heat);
        self.overflow = first(self.overflow, right.overflow);
    }

    /// Whether this can be a report of a group's tokens, whatever the keys: what a peer sent must pass before it joins another.
    ///
    /// # Errors
    /// [`ReportError`] for the first part that can't.
    pub fn check(&self, wanted: &Outputs, group: usize, tokens: &Range<usize>) -> Result<(), ReportError> {
        let pair = |range: &Range<usize>| (range.start, range.end);
        let n_keys = wanted.shape().n_keys();
        let parts = wanted.parts();
        let heads = wanted.heads_of_group(group);
        let of_heat = |range: Range<usize>| if parts.heatmap.is_some() { range } else { 0..0 };
        let ranges = [
            ("heads", &self.heads, heads.clone()),
            ("tokens", &self.tokens, tokens.clone()),
            ("heat.heads", &self.heat.heads, of_heat(heads.clone())),
            ("heat.rows", &self.heat.rows, of_heat(wanted.heat_rows_of(tokens))),
        ];
        for (part, got, want) in ranges {
            if *got != want {
                return Err(ReportError::Rows { part, got: pair(got), want: pair(&want) });
            }
        }
        let rows = heads.len() * tokens.len();
        let of = |is_wanted: bool| if is_wanted { rows } else { 0 };
        let columns = parts.heatmap.map_or(0, |(_, columns)| columns);
        let lengths = [
            ("top", self.top.len(), rows * parts.top_k),
            ("mass", self.mass.len(), rows * wanted.mass_blocks()),
            ("entropy", self.entropy.len(), of(parts.entropy)),
            ("distance", self.distance.len(), of(parts.distance)),
            ("max_score", self.max_score.len(), of(parts.max_score)),
            ("heat.columns", self.heat.columns, columns),
            ("heat.cells", self.heat.cells.len(), self.heat.heads.len() * self.heat.rows.len() * columns),
        ];
        if let Some((part, got, want)) = lengths.into_iter().find(|(_, got, want)| got != want) {
            return Err(ReportError::Length { part, got, want });
        }
        let k = parts.top_k.max(1);
        let is_key = |ranked: &Ranked| (ranked.key() as usize) < n_keys && !ranked.score().is_nan();
        let is_wrong_key = |at: &usize| {
            let ranked = self.top[*at];
            let follows = !at.is_multiple_of(k) && ranked >= self.top[*at - 1] && ranked.is_some();
            ranked.is_some() && !is_key(&ranked) || follows
        };
        let values = [
            ("top", (0..self.top.len()).find(is_wrong_key)),
            ("mass", self.mass.iter().position(|sum| *sum < 0)),
            ("distance", self.distance.iter().position(|sum| *sum < 0)),
            ("max_score", self.max_score.iter().position(|score| score.is_nan() || *score == f32::INFINITY)),
            ("heat.cells", self.heat.cells.iter().position(|sum| *sum < 0)),
        ];
        for (part, at) in values {
            if let Some(at) = at {
                return Err(ReportError::Value { part, at });
            }
        }
        let is_row = |row: ScoreOverflow| heads.contains(&row.head_in_group) && tokens.contains(&row.token);
        match self.overflow {
            Some(row) if !is_row(row) => Err(ReportError::Value { part: "overflow", at: row.token }),
            _ => Ok(()),
        }
    }

    /// The numbers, where this has joined with the reports of all other keys; of the map see [`Heat::means`]. `sums` are those that the
    /// second pass was given.
    ///
    /// # Panics
    /// If `sums` are of other rows, or the report is none of these outputs.
    pub fn finish(&self, sums: RowSums<'_>, wanted: &Outputs, operator: &Operator) -> FinishedReport {
        let group_size = wanted.shape().group_size();
        let n_tokens = self.tokens.len();
        assert!(sums.m.len() == group_size * n_tokens && sums.l.len() == sums.m.len(), "sums of the rows");
        let _standard = FloatEnvironment::standard();
        let k = wanted.parts().top_k;
        let blocks = wanted.mass_blocks();
        let at = |row: usize| self.heads.start * n_tokens + row;
        let is_nan = |row: usize| sums.l[at(row)].is_nan();
        let keep = |row: usize, value: f32| if is_nan(row) { CANONICAL_NAN } else { value };
        let scaled = |sums: &[i64], of_row: usize, unit: i32| -> Vec<f32> {
            let unit = 2.0_f64.powi(-unit);
            let value = |(i, sum): (usize, &i64)| keep(i / of_row, (*sum as f64 * unit) as f32);
            sums.iter().enumerate().map(value).collect()
        };
        let natural = |score: f32| score * std::f32::consts::LN_2;
        let weight_of = |row: usize, score: f32| match operator.normaliser() {
            Normaliser::Softmax => {
                let (m, l) = (sums.m[at(row)], sums.l[at(row)]);
                if l > 0.0 { weight(score, finite_max(m)) / l } else { 0.0 }
            }
            Normaliser::Sigmoid { bias } => sigmoid(bias.mul_add(std::f32::consts::LOG2_E, score)),
        };
        let top = |(i, ranked): (usize, &Ranked)| match ranked.is_some() {
            true => {
                let (row, score) = (i / k, ranked.score());
                (ranked.key(), keep(row, weight_of(row, score)), natural(score))
            }
            false => (u32::MAX, 0.0, f32::NEG_INFINITY),
        };
        let (keys, (weights, scores)) = self
            .top
            .iter()
            .enumerate()
            .map(top)
            .map(|(key, weight, score)| (key, (weight, score)))
            .unzip::<u32, (f32, f32), Vec<u32>, (Vec<f32>, Vec<f32>)>();
        let mut entropy = scaled(&self.entropy, 1, ENTROPY_UNIT);
        // A key that weighs nearly 1 leaves a rounding error of either sign.
        entropy.iter_mut().filter(|entropy| **entropy < 0.0).for_each(|entropy| *entropy = 0.0);
        FinishedReport {
            top_keys: keys,
            top_weights: weights,
            top_scores: scores,
            mass: scaled(&self.mass, blocks.max(1), wanted.units.mass),
            entropy,
            distance: scaled(&self.distance, 1, wanted.units.distance),
            max_score: self.max_score.iter().enumerate().map(|(row, max)| keep(row, natural(*max))).collect(),
        }
    }
}

/// The weights of a group's sinks, `[head, token]` of the heads that are wanted: what the weights of a row's keys lack to 1. Empty where
/// there are no sinks.
///
/// # Panics
/// If the sums aren't those of as many tokens for each head of the group.
pub fn sink_weights(sums: RowSums<'_>, wanted: &Outputs, operator: &Operator, group: usize) -> Vec<f32> {
    let Some(sinks) = operator.sinks() else { return Vec::new() };
    let shape = wanted.shape();
    let n_tokens = sums.m.len() / shape.group_size();
    assert!(
        sums.m.len() == shape.group_size() * n_tokens && sums.l.len() == sums.m.len(),
        "sums of the rows"
    );
    let _standard = FloatEnvironment::standard();
    let first_head = group % shape.n_kv_heads() * shape.group_size();
    let of_head = |head: usize| {
        let score = query_factor(sinks[first_head + head]);
        let rows = sums.m.iter().zip(sums.l).skip(head * n_tokens).take(n_tokens);
        rows.map(move |(m, l)| match *l {
            l if l > 0.0 => weight(score, finite_max(*m)) / l,
            l if l.is_nan() => CANONICAL_NAN,
            _ => 0.0,
        })
    };
    wanted.heads_of_group(group).flat_map(of_head).collect()
}

/// The overflow of the earlier token, then of the lower head.
pub(super) fn first(a: Option<ScoreOverflow>, b: Option<ScoreOverflow>) -> Option<ScoreOverflow> {
    [a, b].into_iter().flatten().min_by_key(|row| (row.token, row.head_in_group))
}
