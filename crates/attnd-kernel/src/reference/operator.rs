//! The oracle of the whole operator: any score, cap, biases, masks, normaliser, sink, element by element in f64.
//!
//! ```text
//! raw = score(q, k) -> capped = cap tanh(raw / cap) -> masked = capped + biases, or -inf -> weights -> context
//! ```
//!
//! Nothing here comes from the code under test: a mask is a predicate of one element, a bias a number of one element.
//! [`super::scores`], [`super::masks`] and [`super::biases`] have the ones with names.

use std::f64::consts::LOG2_E;
use std::fmt;

use super::{Bound, UNDERFLOW, UNIT_ROUNDOFF};
use crate::slot::{N_SLOTS, n_pages};

/// One element of the scores: a query token, a key, and the head that relates them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// Which of the independent problems.
    pub batch: usize,
    /// Query head of that problem.
    pub head: usize,
    /// Query token.
    pub token: usize,
    /// Key token.
    pub key: usize,
}

/// A score and how far from it a computation in f32 may end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// The exact score, scale included.
    pub value: f64,
    /// What rounding errors are proportional to: the sum of the absolute values of everything that is added up on the
    /// way to the score, scale included.
    pub magnitude: f64,
    /// What underflow may add to the error, whatever the magnitude.
    pub underflow: f64,
}

impl Score {
    /// `scale * q . k`.
    ///
    /// # Panics
    /// If the rows have different lengths.
    pub fn dot(scale: f64, q: &[f32], k: &[f32]) -> Self {
        assert_eq!(q.len(), k.len(), "length of a query and a key");
        let products = || q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k));
        let absolute: f64 = products().map(f64::abs).sum();
        let key_size: f64 = k.iter().map(|k| f64::from(k.abs())).sum();
        Self {
            value: scale * products().sum::<f64>(),
            magnitude: scale.abs() * absolute,
            // The factor and the scaled query may be subnormal, and so may products and their sums.
            underflow: (absolute / LOG2_E + key_size + q.len() as f64) * UNDERFLOW,
        }
    }
}

/// How scores become weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Normaliser {
    /// `e^s / sum_j e^s_j`, the sink in the sum.
    Softmax,
    /// `1 / (1 + e^-(s + bias))`, each key by itself.
    Sigmoid {
        /// Added to every score that is seen.
        bias: f64,
    },
}

/// What a row is that sees no key. Its lse is -inf whatever its context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmptyRow {
    /// Context and weights are 0.
    Zero,
    /// Both are NaN, as 0 / 0.
    Nan,
    /// Every key weighs the same: the mean of all values.
    Uniform,
}

/// A number of one element of the scores.
pub type Bias<'a> = Box<dyn Fn(At) -> f64 + 'a>;
/// Whether a query token sees a key.
pub type Predicate<'a> = Box<dyn Fn(At) -> bool + 'a>;

/// The operator, one element at a time.
pub struct Formula<'a> {
    /// Key tokens; may be 0.
    pub keys: usize,
    /// Dimension of values.
    pub value_dim: usize,
    /// The value of a key, `[value_dim]`, for the head of the element.
    pub value: Box<dyn Fn(At) -> &'a [f32] + 'a>,
    /// The score before anything is done to it. Asked for keys that are not seen too: they have raw scores.
    pub score: Box<dyn Fn(At) -> Score + 'a>,
    /// `c` of `c tanh(s / c)`; > 0.
    pub softcap: Option<f64>,
    /// Added after the cap. One that is -inf hides the key.
    pub biases: Vec<Bias<'a>>,
    /// All of them must hold for a key to be seen.
    pub visible: Vec<Predicate<'a>>,
    /// How scores become weights.
    pub normaliser: Normaliser,
    /// A score of the row's head that takes weight and has no value; -inf for none.
    pub sink: Option<Box<dyn Fn(usize) -> f64 + 'a>>,
    /// What a row is that sees no key and has no sink.
    pub empty_row: EmptyRow,
}

impl fmt::Debug for Formula<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Formula")
            .field("keys", &self.keys)
            .field("value_dim", &self.value_dim)
            .field("softcap", &self.softcap)
            .field("biases", &self.biases.len())
            .field("visible", &self.visible.len())
            .field("normaliser", &self.normaliser)
            .field("sink", &self.sink.is_some())
            .field("empty_row", &self.empty_row)
            .finish_non_exhaustive()
    }
}

/// What the scores of one row are on their way, each `[keys]`.
#[derive(Clone, Debug)]
pub struct Stages {
    /// With scale.
    pub raw: Vec<f64>,
    /// After the cap.
    pub capped: Vec<f64>,
    /// With biases; -inf where the key is not seen.
    pub masked: Vec<f64>,
    /// What values are multiplied by; 0 where the key is not seen. With a sink they sum to less than 1.
    pub weights: Vec<f64>,
}

/// What one row should be, and how far from it an f32 result may be.
#[derive(Clone, Debug)]
pub struct OperatorRow {
    /// `[value_dim]`.
    pub context: Vec<f64>,
    /// Natural logarithm of what weights are divided by, the sink included; of the sum of weights where nothing is
    /// divided. -inf where there is nothing to sum.
    pub lse: f64,
    /// The way there.
    pub stages: Stages,
    /// `- sum_j w_j ln w_j`, in nats, over the keys alone.
    pub entropy: f64,
    /// Errors of a result whose roundings don't conspire.
    ///
    /// `8 u (8 + S) A_c` for the context and `8 u (8 + S)` for lse, with `A_c = sum_j w_j |v_jc|` and `S` the largest
    /// sum, over the keys that are seen, of a score's magnitude, its biases' and what the cap adds: its tanh is off by
    /// about 5 roundings of the result. Beside it what underflow takes, as [`super::reference_row`] counts it.
    pub bound: Bound,
}

impl OperatorRow {
    /// The worst error of a result over [`Self::bound`]; at most 1 is right. NaN is right where NaN is exact, only.
    ///
    /// # Panics
    /// If `context` has another length.
    pub fn worst_ratio(&self, context: &[f32], lse: f32) -> f64 {
        self.bound.worst_ratio((&self.context, self.lse), (context, lse))
    }
}

/// The weights of one row and what they were divided by.
struct Weighed {
    weights: Vec<f64>,
    lse: f64,
    /// The sum of exponentials over the largest one, or of the sigmoids: what flushed weights are small beside.
    sum: f64,
}

impl Formula<'_> {
    /// Computes one row: query token `token` of query head `head` of problem `batch`.
    ///
    /// # Panics
    /// If a value doesn't have `value_dim` elements, or a sigmoid has a sink: it divides by nothing.
    pub fn row(&self, batch: usize, head: usize, token: usize) -> OperatorRow {
        let at = |key: usize| At { batch, head, token, key };
        let scores: Vec<Score> = (0..self.keys).map(|key| (self.score)(at(key))).collect();
        let raw: Vec<f64> = scores.iter().map(|score| score.value).collect();
        let capped: Vec<f64> =
            raw.iter().map(|score| self.softcap.map_or(*score, |cap| cap * (score / cap).tanh())).collect();

        let mut magnitude = 0.0_f64;
        let mut underflow = 0.0_f64;
        let mut masked = vec![f64::NEG_INFINITY; self.keys];
        let mut seen = Vec::new();
        for key in 0..self.keys {
            if !self.visible.iter().all(|sees| sees(at(key))) {
                continue;
            }
            let biases: Vec<f64> = self.biases.iter().map(|bias| bias(at(key))).collect();
            if biases.contains(&f64::NEG_INFINITY) {
                continue;
            }
            seen.push(key);
            masked[key] = capped[key] + biases.iter().sum::<f64>();
            let cap = if self.softcap.is_some() { 5.0 * capped[key].abs() } else { 0.0 };
            let added: f64 = biases.iter().map(|bias| bias.abs()).sum();
            magnitude = magnitude.max(scores[key].magnitude + cap + added);
            underflow = underflow.max(scores[key].underflow);
        }
        let sink = self.sink.as_ref().map_or(f64::NEG_INFINITY, |sink| sink(head));
        magnitude = match self.normaliser {
            Normaliser::Softmax if sink.is_finite() => magnitude.max(sink.abs()),
            Normaliser::Softmax => magnitude,
            Normaliser::Sigmoid { bias } => {
                assert!(self.sink.is_none(), "a sigmoid has no sink");
                magnitude + bias.abs()
            }
        };

        let is_empty = seen.is_empty() && sink == f64::NEG_INFINITY;
        let Weighed { weights, lse, sum } = match self.normaliser {
            _ if is_empty => self.empty(),
            Normaliser::Softmax => softmax(&masked, &seen, sink),
            Normaliser::Sigmoid { bias } => sigmoid(&masked, &seen, bias),
        };
        let counted = match self.empty_row {
            EmptyRow::Uniform if is_empty => (0..self.keys).collect(),
            EmptyRow::Zero | EmptyRow::Nan | EmptyRow::Uniform => seen,
        };
        let nothing = if is_empty && self.empty_row == EmptyRow::Nan { f64::NAN } else { 0.0 };
        let mut context = vec![nothing; self.value_dim];
        let mut amplitude = vec![0.0; self.value_dim];
        let mut largest = vec![0.0_f64; self.value_dim];
        for key in &counted {
            let value = (self.value)(at(*key));
            assert_eq!(value.len(), self.value_dim, "length of a value");
            for (c, value) in value.iter().map(|value| f64::from(*value)).enumerate() {
                context[c] += weights[*key] * value;
                amplitude[c] += weights[*key] * value.abs();
                largest[c] = largest[c].max(value.abs());
            }
        }
        let entropy = weights.iter().map(|w| if *w == 0.0 { 0.0 } else { -w * w.ln() }).sum();

        let relative = 8.0 * UNIT_ROUNDOFF * (8.0 + magnitude) + 2.0 * underflow;
        let n = counted.len() as f64;
        let merges = 6.0 + n_pages(self.keys).div_ceil(N_SLOTS) as f64;
        let flushed = 2.0_f64.powi(-125) * n;
        let column = |(a, l): (&f64, &f64)| relative * a + flushed * l + (n + merges + 2.0) * UNDERFLOW * 2.0;
        let bound = Bound {
            context: amplitude.iter().zip(&largest).map(column).collect(),
            lse: relative
                + if lse.is_finite() { lost(flushed / sum) + lse.abs() * UNIT_ROUNDOFF } else { 0.0 },
        };
        OperatorRow { context, lse, stages: Stages { raw, capped, masked, weights }, entropy, bound }
    }

    fn empty(&self) -> Weighed {
        let weight = match self.empty_row {
            EmptyRow::Zero => 0.0,
            EmptyRow::Nan => f64::NAN,
            EmptyRow::Uniform => 1.0 / self.keys as f64,
        };
        Weighed { weights: vec![weight; self.keys], lse: f64::NEG_INFINITY, sum: 0.0 }
    }
}

/// What a logarithm may lose where that share of its argument may be missing: everything, if all of it may.
fn lost(share: f64) -> f64 {
    if share < 1.0 { -(-share).ln_1p() } else { f64::INFINITY }
}

fn softmax(masked: &[f64], seen: &[usize], sink: f64) -> Weighed {
    let max = seen.iter().map(|key| masked[*key]).fold(sink, f64::max);
    let mut weights = vec![0.0; masked.len()];
    for key in seen {
        weights[*key] = (masked[*key] - max).exp();
    }
    let sum = weights.iter().sum::<f64>() + if sink == f64::NEG_INFINITY { 0.0 } else { (sink - max).exp() };
    weights.iter_mut().for_each(|weight| *weight /= sum);
    Weighed { weights, lse: max + sum.ln(), sum }
}

fn sigmoid(masked: &[f64], seen: &[usize], bias: f64) -> Weighed {
    let mut weights = vec![0.0; masked.len()];
    for key in seen {
        weights[*key] = 1.0 / (1.0 + (-(masked[*key] + bias)).exp());
    }
    let sum: f64 = weights.iter().sum();
    Weighed { weights, lse: sum.ln(), sum }
}

#[cfg(test)]
mod tests;
