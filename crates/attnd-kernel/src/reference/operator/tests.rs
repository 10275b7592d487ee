//! The formula against the plain oracle, against itself in other words, and against numbers worked out by hand.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::super::{masks, reference_row};
use super::*;
use crate::mask::Causal;
use crate::shape::{AttnShape, Dims};

/// Two heads of keys, four of queries, three tokens, five keys.
struct Example {
    shape: AttnShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

const SCALE: f64 = 0.5;

impl Example {
    fn new(seed: u64) -> Self {
        let dims = Dims { batch: 2, heads: 4, kv_heads: 2, queries: 3, keys: 5, head_dim: 4, value_dim: 3 };
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut draw = |n: usize| (0..n).map(|_| rng.random_range(-2.0..2.0_f32)).collect();
        Self {
            shape: AttnShape::new(dims).unwrap(),
            q: draw(2 * 4 * 3 * 4),
            k: draw(2 * 2 * 5 * 4),
            v: draw(2 * 2 * 5 * 3),
        }
    }

    fn value(&self, at: At) -> &[f32] {
        &self.v[((at.batch * 2 + at.head / 2) * 5 + at.key) * 3..][..3]
    }

    fn score(&self, at: At) -> Score {
        let q = &self.q[((at.batch * 4 + at.head) * 3 + at.token) * 4..][..4];
        let k = &self.k[((at.batch * 2 + at.head / 2) * 5 + at.key) * 4..][..4];
        Score::dot(SCALE, q, k)
    }

    fn formula(&self) -> Formula<'_> {
        Formula {
            keys: 5,
            value_dim: 3,
            value: Box::new(|at| self.value(at)),
            score: Box::new(|at| self.score(at)),
            softcap: None,
            biases: Vec::new(),
            visible: Vec::new(),
            normaliser: Normaliser::Softmax,
            sink: None,
            empty_row: EmptyRow::Zero,
        }
    }
}

fn assert_close(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    let close = |(got, want): (&f64, &f64)| got == want || (got - want).abs() <= 1e-14 * want.abs().max(1.0);
    assert!(got.iter().zip(want).all(close), "{got:?}, not {want:?}");
}

#[test]
fn plain_attention_is_the_plain_oracles_row_and_bound() {
    let example = Example::new(1);
    for (causal, offset) in [(Causal::None, 5), (Causal::BottomRight, 2), (Causal::TopLeft, 0)] {
        let mut formula = example.formula();
        formula.visible.push(Box::new(masks::causal(offset)));
        for (batch, head, token) in [(0, 0, 0), (0, 3, 1), (1, 1, 2), (1, 2, 0)] {
            let operands = (&example.q[..], &example.k[..], &example.v[..]);
            let want = reference_row(&example.shape, SCALE, causal, operands, batch * 4 + head, token);
            let row = formula.row(batch, head, token);
            assert_close(&row.context, &want.context);
            assert_close(&row.stages.weights, &want.weights);
            assert_close(&[row.lse], &[want.lse]);
            // The plain oracle looks for the largest of each term by itself.
            let near = |got: f64, want: f64| got <= want && got > 0.999 * want;
            assert!(near(row.bound.lse, want.expected.lse), "{:?}, {:?}", row.bound, want.expected);
            let mut columns = row.bound.context.iter().zip(&want.expected.context);
            assert!(columns.all(|(got, want)| near(*got, *want)), "{:?}, {:?}", row.bound, want.expected);
        }
    }
}

#[test]
fn stages_are_cap_then_biases_then_masks() {
    let example = Example::new(2);
    let mut formula = example.formula();
    formula.softcap = Some(0.75);
    formula.biases.push(Box::new(|at| at.key as f64));
    formula.biases.push(Box::new(|at| if at.key == 3 { f64::NEG_INFINITY } else { 0.25 }));
    formula.visible.push(Box::new(|at| at.key != 1));
    let row = formula.row(1, 2, 1);
    for key in 0..5 {
        let raw = example.score(At { batch: 1, head: 2, token: 1, key }).value;
        let capped = 0.75 * (raw / 0.75).tanh();
        let masked = if [1, 3].contains(&key) { f64::NEG_INFINITY } else { capped + key as f64 + 0.25 };
        let stages = [row.stages.raw[key], row.stages.capped[key], row.stages.masked[key]];
        assert_close(&stages, &[raw, capped, masked]);
        let weight = if masked.is_finite() { (masked - row.lse).exp() } else { 0.0 };
        assert_close(&[row.stages.weights[key]], &[weight]);
    }
    assert_close(&[row.stages.weights.iter().sum()], &[1.0]);
}

#[test]
fn hidden_keys_have_no_influence_even_where_they_hold_nan() {
    let mut example = Example::new(3);
    let hides = |at: At| at.key != 2;
    let mut formula = example.formula();
    formula.visible.push(Box::new(hides));
    let want = formula.row(0, 1, 0);
    drop(formula);
    example.k[2 * 4] = f32::NAN;
    example.v[2 * 3 + 1] = f32::INFINITY;
    let mut formula = example.formula();
    formula.visible.push(Box::new(hides));
    let row = formula.row(0, 1, 0);
    assert_eq!((&row.context, row.lse), (&want.context, want.lse));
    assert!(row.stages.raw[2].is_nan() && row.stages.masked[2] == f64::NEG_INFINITY);
    // Seen, it is everywhere.
    let row = example.formula().row(0, 1, 0);
    assert!(row.context.iter().all(|c| c.is_nan()) && row.lse.is_nan());
}

#[test]
fn a_sink_is_one_more_key_without_a_value() {
    let example = Example::new(4);
    let plain = example.formula().row(0, 2, 1);
    let mut formula = example.formula();
    formula.sink = Some(Box::new(|head| [9.0, 9.0, 0.3, 9.0][head]));
    let row = formula.row(0, 2, 1);
    let (all, sink) = (plain.lse.exp(), 0.3_f64.exp());
    assert_close(&[row.lse], &[(all + sink).ln()]);
    let shrunk: Vec<f64> = plain.context.iter().map(|c| c * all / (all + sink)).collect();
    assert_close(&row.context, &shrunk);
    assert_close(&[row.stages.weights.iter().sum()], &[all / (all + sink)]);
    formula.sink = Some(Box::new(|_| f64::NEG_INFINITY));
    assert_close(&formula.row(0, 2, 1).context, &plain.context);
    // Far above every score it takes everything, and without a key it is all there is.
    formula.sink = Some(Box::new(|_| 1000.0));
    let row = formula.row(0, 2, 1);
    assert_eq!((&row.context[..], row.lse), (&[0.0; 3][..], 1000.0));
    formula.visible.push(Box::new(|_| false));
    formula.empty_row = EmptyRow::Nan;
    let row = formula.row(0, 2, 1);
    assert_eq!((&row.context[..], row.lse), (&[0.0; 3][..], 1000.0));
}

#[test]
fn sigmoids_are_each_keys_own() {
    let example = Example::new(5);
    let mut formula = example.formula();
    formula.normaliser = Normaliser::Sigmoid { bias: -1.5 };
    formula.visible.push(Box::new(|at| at.key != 0));
    let row = formula.row(0, 0, 0);
    let mut context = [0.0; 3];
    let mut sum = 0.0;
    for key in 1..5 {
        let at = At { batch: 0, head: 0, token: 0, key };
        let weight = 1.0 / (1.0 + (1.5 - example.score(at).value).exp());
        assert_close(&[row.stages.weights[key]], &[weight]);
        sum += weight;
        for (context, value) in context.iter_mut().zip(example.value(at)) {
            *context += weight * f64::from(*value);
        }
    }
    assert_eq!(row.stages.weights[0], 0.0);
    assert_close(&row.context, &context);
    assert_close(&[row.lse], &[sum.ln()]);
}

#[test]
fn empty_rows_are_what_was_asked_for() {
    let example = Example::new(6);
    let row_of = |empty_row: EmptyRow| {
        let mut formula = example.formula();
        formula.visible.push(Box::new(|_| false));
        formula.empty_row = empty_row;
        formula.row(1, 3, 2)
    };
    let zero = row_of(EmptyRow::Zero);
    assert_eq!((&zero.context[..], zero.lse, zero.entropy), (&[0.0; 3][..], f64::NEG_INFINITY, 0.0));
    assert_eq!(zero.stages.weights, [0.0; 5]);
    assert_eq!(zero.worst_ratio(&[0.0, -0.0, 0.0], f32::NEG_INFINITY), 0.0);
    assert_eq!(zero.worst_ratio(&[0.0, f32::NAN, 0.0], f32::NEG_INFINITY), f64::INFINITY);
    let nan = row_of(EmptyRow::Nan);
    assert!(nan.context.iter().all(|c| c.is_nan()) && nan.lse == f64::NEG_INFINITY);
    assert_eq!(nan.worst_ratio(&[f32::NAN; 3], f32::NEG_INFINITY), 0.0);
    assert_eq!(nan.worst_ratio(&[f32::NAN, 0.0, f32::NAN], f32::NEG_INFINITY), f64::INFINITY);
    let uniform = row_of(EmptyRow::Uniform);
    let column = |c: usize| (0..5).map(|key| f64::from(example.v[(3 * 5 + key) * 3 + c])).sum::<f64>() / 5.0;
    assert_close(&uniform.context, &[0, 1, 2].map(column));
    assert_close(&[uniform.entropy], &[5.0_f64.ln()]);
    assert_eq!(uniform.lse, f64::NEG_INFINITY);
}

#[test]
fn no_keys_at_all_are_an_empty_row() {
    let example = Example::new(7);
    for (empty_row, is_nan) in [(EmptyRow::Zero, false), (EmptyRow::Nan, true), (EmptyRow::Uniform, false)] {
        let formula = Formula { keys: 0, empty_row, ..example.formula() };
        let row = formula.row(0, 0, 0);
        assert_eq!((row.context.len(), row.lse), (3, f64::NEG_INFINITY));
        assert!(row.context.iter().all(|c| if is_nan { c.is_nan() } else { *c == 0.0 }), "{empty_row:?}");
    }
}

#[test]
fn entropy_is_that_of_the_weights() {
    let example = Example::new(8);
    let mut formula = example.formula();
    formula.score =
        Box::new(|at| Score { value: (at.key as f64 + 1.0).ln(), magnitude: 0.0, underflow: 0.0 });
    formula.visible.push(Box::new(|at| at.key < 2));
    // Weights 1/3 and 2/3.
    let want = 3.0_f64.ln() - 2.0 / 3.0 * 2.0_f64.ln();
    assert_close(&[formula.row(0, 0, 0).entropy], &[want]);
}

#[test]
fn a_negative_scale_and_one_of_zero_are_scores_like_others() {
    let (q, k) = ([1.0, -2.0], [3.0, 0.5]);
    assert_eq!(Score::dot(-2.0, &q, &k), Score { value: -4.0, magnitude: 8.0, ..Score::dot(1.0, &q, &k) });
    let zero = Score::dot(0.0, &q, &k);
    assert_eq!((zero.value, zero.magnitude), (0.0, 0.0));
    assert!(zero.underflow > 0.0 && zero.underflow < 1e-40);
}
