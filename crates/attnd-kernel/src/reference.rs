//! The oracle: two passes in f64, as close to the formula as code can be. Never optimised.

use crate::mask::Causal;
use crate::shape::AttnShape;
use crate::slot::{N_SLOTS, n_pages};

pub mod biases;
pub mod masks;
pub mod operator;
pub mod problem;
pub mod scores;

/// What one row should be, and how far from it an f32 result may be.
#[derive(Clone, Debug)]
pub struct ReferenceRow {
    /// `softmax(scale * q K^T) V`, `[value_dim]`; 0 where no key is visible.
    pub context: Vec<f64>,
    /// Natural logarithm of the sum of exponentials, or -inf.
    pub lse: f64,
    /// Weights of all keys, `[n_keys]`; 0 where a key is not visible.
    pub weights: Vec<f64>,
    /// Errors of a result whose roundings don't conspire.
    pub expected: Bound,
    /// Errors that no result exceeds, whatever the operands.
    pub proven: Bound,
}

/// How far an f32 result may be from the exact one.
#[derive(Clone, Debug)]
pub struct Bound {
    /// For `|context - exact|`, per column.
    pub context: Vec<f64>,
    /// For `|lse - exact|`.
    pub lse: f64,
}

/// Unit roundoff of f32.
pub const UNIT_ROUNDOFF: f64 = 1.0 / (1_u64 << 24) as f64;
/// Half of the smallest subnormal f32: what one rounding may lose whatever its result.
const UNDERFLOW: f64 = f64::from_bits((1023 - 150) << 52);

/// Computes one row: query token `token` of query head `head` (flattened over the batch).
///
/// With `S = scale * max_j sum_x |q_x k_jx|` and `A_c = sum_j p_j |v_jc|`:
///
/// * [`ReferenceRow::expected`] is `8 u (8 + S) A_c`, and `8 u (8 + S)` for lse. Rounding errors are of both signs, so a
///   sum of `d` products loses a few `u S`, not `d u S`. This holds for anything random, and is what a regression
///   would break. It is no theorem: keys whose elements are all equal round in one direction.
/// * [`ReferenceRow::proven`] counts every rounding of the canonical order at its worst, first order in `u`. A score has
///   `d` of them and three in `q'`, so a weight is off by a factor of `exp(e)`, `e = (d + 3) u S + 2 u`. Weights are
///   used twice, above and below the fraction. The sum of a page rounds 20 times, its output 256 times, a merge once;
///   a page passes through six merges and as many as its slot has pages; the division rounds once.
///
/// Both add what underflow takes: weights below `2^-125` that are flushed, `q'` and products with `v` below the normal
/// range.
///
/// # Panics
/// If a slice doesn't have the shape's length.
pub fn reference_row(
    shape: &AttnShape,
    scale: f64,
    causal: Causal,
    (q, k, v): (&[f32], &[f32], &[f32]),
    head: usize,
    token: usize,
) -> ReferenceRow {
    let visible: Vec<usize> = causal.visible(token, shape).collect();
    reference_row_over(shape, scale, &visible, (q, k, v), head, token)
}

/// The same over the keys in `visible`, whatever the rule is that makes them so; `scale` may be of any sign, or 0.
///
/// # Panics
/// If a slice doesn't have the shape's length, or a key is not one of it.
pub fn reference_row_over(
    shape: &AttnShape,
    scale: f64,
    visible: &[usize],
    (q, k, v): (&[f32], &[f32], &[f32]),
    head: usize,
    token: usize,
) -> ReferenceRow {
    assert_eq!(q.len() as u64, shape.q_elements(), "length of q");
    assert_eq!(k.len() as u64, shape.k_elements(), "length of k");
    assert_eq!(v.len() as u64, shape.v_elements(), "length of v");
    let (d, dv, n_keys) = (shape.head_dim(), shape.value_dim(), shape.n_keys());
    let group = head / shape.group_size();
    let q = &q[(head * shape.n_queries() + token) * d..][..d];
    let k = |j: usize| &k[(group * n_keys + j) * d..][..d];
    let v = |j: usize| &v[(group * n_keys + j) * dv..][..dv];

    let products = |j: usize| q.iter().zip(k(j)).map(|(q, k)| f64::from(*q) * f64::from(*k));
    let scores: Vec<f64> = visible.iter().map(|j| scale * products(*j).sum::<f64>()).collect();
    let largest_of = |size: &dyn Fn(usize) -> f64| visible.iter().map(|j| size(*j)).fold(0.0, f64::max);
    let product_size = largest_of(&|j| products(j).map(f64::abs).sum::<f64>());
    let magnitude = scale.abs() * product_size;
    let key_size = largest_of(&|j| k(j).iter().map(|k| f64::from(k.abs())).sum::<f64>());
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();

    let mut weights = vec![0.0; n_keys];
    let mut context = vec![0.0; dv];
    let mut amplitude = vec![0.0; dv];
    let mut largest = vec![0.0_f64; dv];
    for (j, s) in visible.iter().copied().zip(&scores) {
        weights[j] = (s - max).exp() / sum;
        for c in 0..dv {
            let value = f64::from(v(j)[c]);
            context[c] += weights[j] * value;
            amplitude[c] += weights[j] * value.abs();
            largest[c] = largest[c].max(value.abs());
        }
    }
    let lse = if scores.is_empty() { f64::NEG_INFINITY } else { max + sum.ln() };

    let u = UNIT_ROUNDOFF;
    let n_visible = visible.len() as f64;
    // q' and the factor it is made with may be subnormal; the products with k are sums of normal size or lose as much.
    let score_underflow =
        product_size * (UNDERFLOW / std::f64::consts::LOG2_E) + (key_size + d as f64) * UNDERFLOW;
    let weight = (d as f64 + 3.0) * u * magnitude + 2.0 * u + score_underflow;
    let merges = 6.0 + n_pages(n_keys).div_ceil(N_SLOTS) as f64;
    let proven = ((2.0 * weight).exp() - 1.0) * (1.0 + 512.0 * u) + u * (256.0 + 20.0 + 2.0 * merges + 2.0);
    let expected = 8.0 * u * (8.0 + magnitude) + 2.0 * score_underflow;
    let flushed = 2.0_f64.powi(-125) * n_visible;
    let bound = |relative: f64, lse_error: f64| Bound {
        context: amplitude
            .iter()
            .zip(&largest)
            .map(|(a, l)| relative * a + flushed * l + (n_visible + merges + 2.0) * UNDERFLOW * 2.0)
            .collect(),
        lse: lse_error + flushed + if lse.is_finite() { lse.abs() * u } else { 0.0 },
    };
    ReferenceRow {
        expected: bound(expected, expected),
        proven: bound(proven, weight + u * (20.0 + merges + 4.0)),
        context,
        lse,
        weights,
    }
}

impl ReferenceRow {
    /// The worst error of a result over [`Self::expected`]; at most 1 is right, and NaN never is where finite values
    /// are exact.
    ///
    /// # Panics
    /// If `context` has another length.
    pub fn worst_ratio(&self, context: &[f32], lse: f32) -> f64 {
        self.expected.worst_ratio((&self.context, self.lse), (context, lse))
    }

    /// The same over [`Self::proven`].
    ///
    /// # Panics
    /// If `context` has another length.
    pub fn worst_proven_ratio(&self, context: &[f32], lse: f32) -> f64 {
        self.proven.worst_ratio((&self.context, self.lse), (context, lse))
    }
}

impl Bound {
    /// The worst error of a result, `(context, lse)`, over this bound. Exact values that are not finite are met by the
    /// same ones only: infinity by its like, NaN by NaN.
    ///
    /// # Panics
    /// If the contexts don't have the bound's length.
    pub fn worst_ratio(&self, exact: (&[f64], f64), result: (&[f32], f32)) -> f64 {
        assert_eq!(exact.0.len(), self.context.len(), "length of the exact context");
        assert_eq!(result.0.len(), self.context.len(), "length of context");
        let columns = exact.0.iter().zip(result.0).zip(&self.context);
        let lse = ratio(f64::from(result.1), exact.1, self.lse);
        columns.map(|((want, got), bound)| ratio(f64::from(*got), *want, *bound)).fold(lse, f64::max)
    }
}

/// An error over its bound: never NaN, which a comparison would let pass.
fn ratio(got: f64, want: f64, bound: f64) -> f64 {
    // An error that has no bound may be any but NaN.
    let is_unbounded = bound == f64::INFINITY && !got.is_nan();
    if got == want || (got.is_nan() && want.is_nan()) || is_unbounded {
        return 0.0;
    }
    let ratio = (got - want).abs() / bound;
    if want.is_finite() && !ratio.is_nan() { ratio } else { f64::INFINITY }
}
