//! A layer element by element in f64, with the magnitudes of what was added up on the way. It shares no code with what it judges.

use attnd_client::layer::{Angles, Rope, RopeStyle, Rows};

/// A number, and the sum of the magnitudes of all that it is a sum of.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Number {
    pub(super) value: f64,
    pub(super) magnitude: f64,
}

impl Number {
    pub(super) fn exact(value: f32) -> Self {
        Self { value: value.into(), magnitude: f64::from(value).abs() }
    }

    pub(super) fn plus(self, other: Self, factor: f64) -> Self {
        Self {
            value: self.value + factor * other.value,
            magnitude: self.magnitude + factor.abs() * other.magnitude,
        }
    }
}

/// `W x + b`.
pub(super) struct Affine {
    weight: Vec<f32>,
    inputs: usize,
    bias: Option<Vec<f32>>,
}

impl Affine {
    /// `weight` is `[outputs, inputs]`.
    pub(super) fn new(weight: Vec<f32>, inputs: usize, bias: Option<Vec<f32>>) -> Self {
        Self { weight, inputs, bias }
    }

    pub(super) fn of(&self, x: &[Number]) -> Vec<Number> {
        assert_eq!(x.len(), self.inputs, "elements of a row");
        let of_output = |(output, weights): (usize, &[f32])| {
            let bias = self.bias.as_ref().map_or(0.0, |bias| bias[output]);
            let products = x.iter().zip(weights);
            products.fold(Number::exact(bias), |sum, (x, weight)| sum.plus(*x, f64::from(*weight)))
        };
        self.weight.chunks(self.inputs).enumerate().map(of_output).collect()
    }
}

/// Whether a query of a problem sees a key of the input.
type Visible = Box<dyn Fn(usize, usize, usize) -> bool>;

/// A layer.
pub(super) struct Formula {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) query: Affine,
    pub(super) key: Affine,
    pub(super) value: Affine,
    pub(super) output: Affine,
    pub(super) gate: Option<Affine>,
    /// A key and a value for each kv head.
    pub(super) learnt: Option<(Vec<f32>, Vec<f32>)>,
    pub(super) has_zero: bool,
    pub(super) rope: Option<Rope>,
    /// Of the first one, for `rope`.
    pub(super) query_position: usize,
    pub(super) visible: Visible,
}

/// What one row of queries should give.
pub(super) struct Row {
    /// Queries of a problem.
    pub(super) queries: usize,
    pub(super) output: Vec<Number>,
    /// Of each head: the keys of the input, the learnt one, the zero one.
    pub(super) weights: Vec<Vec<f64>>,
    /// The largest magnitude of a score.
    pub(super) score: f64,
}

impl Formula {
    /// All rows of queries, problem by problem.
    pub(super) fn rows(&self, [query, key, value]: &[Rows; 3]) -> Vec<Row> {
        let mut rows = Vec::new();
        for batch in 0..query.batch() {
            let keys: Vec<Vec<Vec<Number>>> =
                of_problem(key, batch).enumerate().map(|(j, x)| self.heads_of_key(&x, j)).collect();
            let values: Vec<Vec<Number>> = of_problem(value, batch).map(|x| self.value.of(&x)).collect();
            for (token, x) in of_problem(query, batch).enumerate() {
                rows.push(self.row(batch, token, &x, &keys, &values, query.tokens()));
            }
        }
        rows
    }

    fn heads_of_key(&self, x: &[Number], position: usize) -> Vec<Vec<Number>> {
        let row = self.key.of(x);
        row.chunks(row.len() / self.kv_heads).map(|head| self.turned(head, position)).collect()
    }

    /// Rotates a head's row as its position says.
    fn turned(&self, row: &[Number], position: usize) -> Vec<Number> {
        self.rope.as_ref().map_or_else(|| row.to_vec(), |rope| turned(rope, row, position))
    }

    fn row(
        &self,
        batch: usize,
        token: usize,
        x: &[Number],
        keys: &[Vec<Vec<Number>>],
        values: &[Vec<Number>],
        queries: usize,
    ) -> Row {
        let q = self.query.of(x);
        let head_dim = q.len() / self.heads;
        let scale = 1.0 / (head_dim as f64).sqrt();
        let (mut weights, mut contexts, mut largest) = (Vec::new(), Vec::new(), 0.0_f64);
        for head in 0..self.heads {
            let kv_head = head * self.kv_heads / self.heads;
            let q = self.turned(&q[head * head_dim..][..head_dim], self.query_position + token);
            let value_dim = values[0].len() / self.kv_heads;
            let mut candidates: Vec<(Option<Vec<Number>>, Vec<Number>)> = Vec::new();
            for (j, (key, value)) in keys.iter().zip(values).enumerate() {
                let seen = (self.visible)(batch, token, j).then(|| key[kv_head].clone());
                candidates.push((seen, value[kv_head * value_dim..][..value_dim].to_vec()));
            }
            if let Some((key, value)) = &self.learnt {
                let part = |row: &[f32], dim: usize| {
                    row[kv_head * dim..][..dim].iter().map(|x| Number::exact(*x)).collect::<Vec<_>>()
                };
                candidates.push((Some(part(key, head_dim)), part(value, value_dim)));
            }
            if self.has_zero {
                candidates
                    .push((Some(vec![Number::default(); head_dim]), vec![Number::default(); value_dim]));
            }
            let (of_head, context) = head_of(&q, &candidates, scale, &mut largest);
            contexts.extend(context);
            weights.push(of_head);
        }
        if let Some(gate) = &self.gate {
            for (context, gate) in contexts.iter_mut().zip(gate.of(x)) {
                // An error of the gate's argument is one of its sigmoid, times a factor below 1: it counts as one of a score.
                largest = largest.max(gate.magnitude);
                *context = Number::default().plus(*context, 1.0 / (1.0 + (-gate.value).exp()));
            }
        }
        Row { queries, output: self.output.of(&contexts), weights, score: largest }
    }
}

/// The row of a head, rotated as its position says.
pub(super) fn turned(rope: &Rope, row: &[Number], position: usize) -> Vec<Number> {
    let mut out = row.to_vec();
    let Angles::Base(base) = rope.angles else { panic!("the formula has no tables") };
    let rotary = rope.dims.unwrap_or(row.len());
    for pair in 0..rotary / 2 {
        let (a, b) = match rope.style {
            RopeStyle::HalfSplit => (rope.first + pair, rope.first + pair + rotary / 2),
            RopeStyle::Interleaved => (rope.first + 2 * pair, rope.first + 2 * pair + 1),
        };
        let angle = position as f64 * base.powf(-2.0 * pair as f64 / rotary as f64);
        out[a] = Number::default().plus(row[a], angle.cos()).plus(row[b], -angle.sin());
        out[b] = Number::default().plus(row[b], angle.cos()).plus(row[a], angle.sin());
    }
    out
}

/// Weights and context of a query over keys, those that it doesn't see being `None`, and their values; `largest` is raised to the largest
/// magnitude of a score.
pub(super) fn head_of(
    q: &[Number],
    candidates: &[(Option<Vec<Number>>, Vec<Number>)],
    scale: f64,
    largest: &mut f64,
) -> (Vec<f64>, Vec<Number>) {
    let score = |(key, _): &(Option<Vec<Number>>, Vec<Number>)| {
        let Some(key) = key else { return f64::NEG_INFINITY };
        let magnitude: f64 = q.iter().zip(key).map(|(q, k)| q.magnitude * k.magnitude).sum();
        *largest = largest.max(scale * magnitude);
        scale * q.iter().zip(key).map(|(q, k)| q.value * k.value).sum::<f64>()
    };
    let scores: Vec<f64> = candidates.iter().map(score).collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - top).exp()).sum();
    let weights: Vec<f64> = scores.iter().map(|score| (score - top).exp() / sum).collect();
    let mut context = vec![Number::default(); candidates[0].1.len()];
    for (weight, (_, value)) in weights.iter().zip(candidates) {
        context.iter_mut().zip(value).for_each(|(sum, value)| *sum = sum.plus(*value, *weight));
    }
    (weights, context)
}

/// Rows of one problem.
pub(super) fn of_problem(rows: &Rows, batch: usize) -> impl Iterator<Item = Vec<Number>> + '_ {
    let (tokens, width) = (rows.tokens(), rows.width());
    let problem = &rows.values()[batch * tokens * width..][..tokens * width];
    problem.chunks(width).map(|row| row.iter().map(|x| Number::exact(*x)).collect())
}
