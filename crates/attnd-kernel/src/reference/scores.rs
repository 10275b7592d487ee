//! Score functions by name, each as the formula that its authors published, for one query and one key.
//!
//! A magnitude grows with everything that is added up on the way, so that it bounds what rounding does to any order of
//! the sums: a projection counts the absolute values of its products, a tanh two units beside those of its argument.
//! Underflow is left out: elements and parameters are taken to be of ordinary size.

use super::operator::Score;

/// A number that was computed, and the absolute values that went into it.
#[derive(Clone, Copy)]
struct Term {
    value: f64,
    size: f64,
}

impl Term {
    const ZERO: Self = Self { value: 0.0, size: 0.0 };

    fn of(value: f32) -> Self {
        Self { value: f64::from(value), size: f64::from(value.abs()) }
    }

    fn plus(self, other: Self) -> Self {
        Self { value: self.value + other.value, size: self.size + other.size }
    }

    fn times(self, factor: f64) -> Self {
        Self { value: self.value * factor, size: self.size * factor.abs() }
    }

    /// The slope is at most 1; the result is off by two more units.
    fn tanh(self) -> Self {
        Self { value: self.value.tanh(), size: self.size + 2.0 }
    }

    /// `t` where it is positive, else `slope t`; slopes are at most 1.
    fn leaky(self, slope: f64) -> Self {
        Self { value: if self.value > 0.0 { self.value } else { slope * self.value }, size: self.size }
    }

    fn score(self, scale: f64) -> Score {
        let Self { value, size } = self.times(scale);
        Score { value, magnitude: size, underflow: 0.0 }
    }
}

/// `weights . row`.
fn product(weights: &[f32], row: &[f32]) -> Term {
    assert_eq!(weights.len(), row.len(), "length of a row and of its weights");
    weights.iter().zip(row).map(|(w, x)| Term::of(*x).times(f64::from(*w))).fold(Term::ZERO, Term::plus)
}

/// Each output of a matrix `[outputs, inputs]`.
fn projection<'a>(matrix: &'a [f32], row: &'a [f32]) -> impl Iterator<Item = Term> + 'a {
    assert!(matrix.len().is_multiple_of(row.len()), "a matrix over rows of {}", row.len());
    matrix.chunks_exact(row.len()).map(move |weights| product(weights, row))
}

/// Luong's general, also called bilinear or multiplicative: `q^T W k`, with `w` of `[query_dim, key_dim]`.
pub fn general(scale: f64, w: &[f32], q: &[f32], k: &[f32]) -> Score {
    // The products with k are rounded as those with W are.
    let sum = bilinear(w, q, k);
    Term { size: 2.0 * sum.size, ..sum }.score(scale)
}

fn bilinear(w: &[f32], q: &[f32], k: &[f32]) -> Term {
    assert_eq!(w.len(), q.len() * k.len(), "length of a matrix between the two");
    let rows = projection(w, k).zip(q);
    rows.map(|(row, q)| row.times(f64::from(*q))).fold(Term::ZERO, Term::plus)
}

/// The parameters of [`additive`] and [`gatv2`].
#[derive(Clone, Copy, Debug)]
pub struct Additive<'a> {
    /// What the units are multiplied by, `[units]`.
    pub v: &'a [f32],
    /// `[units, query_dim]`.
    pub w_q: &'a [f32],
    /// `[units, key_dim]`.
    pub w_k: &'a [f32],
    /// `[units]`, or empty for none.
    pub bias: &'a [f32],
}

impl Additive<'_> {
    /// What each unit gets.
    fn units(&self, q: &[f32], k: &[f32]) -> Vec<Term> {
        let biases = self.bias.iter().copied().map(Term::of).chain(std::iter::repeat(Term::ZERO));
        let sums = projection(self.w_q, q).zip(projection(self.w_k, k));
        sums.zip(biases).map(|((of_q, of_k), bias)| of_q.plus(of_k).plus(bias)).collect()
    }

    fn weighted(&self, units: impl IntoIterator<Item = Term>) -> Term {
        let of_v = units.into_iter().zip(self.v);
        of_v.map(|(unit, v)| unit.times(f64::from(*v))).fold(Term::ZERO, Term::plus)
    }
}

/// Bahdanau's additive: `v . tanh(W_q q + W_k k + b)`.
pub fn additive(scale: f64, parameters: Additive<'_>, q: &[f32], k: &[f32]) -> Score {
    parameters.weighted(parameters.units(q, k).into_iter().map(Term::tanh)).score(scale)
}

/// Luong's concat: `v . tanh(W [q; k])`, with `w` of `[units, query_dim + key_dim]`.
pub fn concat(scale: f64, v: &[f32], w: &[f32], q: &[f32], k: &[f32]) -> Score {
    let both: Vec<f32> = q.iter().chain(k).copied().collect();
    let units = projection(w, &both).map(Term::tanh).zip(v);
    units.map(|(unit, v)| unit.times(f64::from(*v))).fold(Term::ZERO, Term::plus).score(scale)
}

/// Keras' AdditiveAttention: `sum_x v_x tanh(q_x + k_x)`.
pub fn keras_additive(scale: f64, v: &[f32], q: &[f32], k: &[f32]) -> Score {
    assert_eq!((v.len(), q.len()), (k.len(), k.len()), "length of a query, a key and their weights");
    let units = q.iter().zip(k).map(|(q, k)| Term::of(*q).plus(Term::of(*k)).tanh());
    units.zip(v).map(|(unit, v)| unit.times(f64::from(*v))).fold(Term::ZERO, Term::plus).score(scale)
}

/// Keras' Attention with `score_mode="concat"`: `c sum_x tanh(s (q_x + k_x))`. It is not Luong's.
pub fn keras_concat(scale: f64, (c, s): (f32, f32), q: &[f32], k: &[f32]) -> Score {
    assert_eq!(q.len(), k.len(), "length of a query and a key");
    let units = q.iter().zip(k).map(|(q, k)| Term::of(*q).plus(Term::of(*k)).times(f64::from(s)).tanh());
    units.fold(Term::ZERO, Term::plus).times(f64::from(c)).score(scale)
}

/// Chorowski's location-aware: [`additive`] with `U f` beside the projections, where `f` are the previous weights
/// around the key, convolved. `u` is `[units, filters]`.
pub fn location_aware(
    scale: f64,
    parameters: Additive<'_>,
    (u, features): (&[f32], &[f64]),
    q: &[f32],
    k: &[f32],
) -> Score {
    let of_location = u.chunks_exact(features.len()).map(|row| {
        let products = row.iter().zip(features).map(|(u, f)| f64::from(*u) * f);
        products.map(|value| Term { value, size: value.abs() }).fold(Term::ZERO, Term::plus)
    });
    let units = parameters.units(q, k).into_iter().zip(of_location);
    parameters.weighted(units.map(|(unit, location)| unit.plus(location).tanh())).score(scale)
}

/// The previous weights of a row around key `key`, by each of the filters `[filters, width]`: a convolution as neural
/// networks have it, centred, with zeros outside.
pub fn convolved(previous: &[f32], filters: &[f32], width: usize, key: usize) -> Vec<f64> {
    let around = |tap: usize| (key + tap).checked_sub(width / 2).and_then(|at| previous.get(at));
    let response = |filter: &[f32]| {
        let taps = filter.iter().enumerate();
        taps.map(|(tap, f)| f64::from(*f) * around(tap).copied().map_or(0.0, f64::from)).sum()
    };
    filters.chunks_exact(width).map(response).collect()
}

/// Content-based: `beta q . k / (max(|q|, eps) max(|k|, eps))`, each norm held by itself as torch does.
pub fn cosine(scale: f64, beta: f64, eps: f64, q: &[f32], k: &[f32]) -> Score {
    let norm = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt().max(eps);
    // Both rows are rounded by their norms before they are multiplied.
    let sum = product(q, k);
    Term { size: 3.0 * sum.size, ..sum }.times(beta / (norm(q) * norm(k))).score(scale)
}

/// Luong's location: row `key` of a matrix `[positions, query_dim]` times the query, whatever the key is.
pub fn location(scale: f64, w: &[f32], q: &[f32], key: usize) -> Score {
    product(&w[key * q.len()..][..q.len()], q).score(scale)
}

/// Dozat's biaffine: `q^T W k + u . q + w . k + b`.
pub fn biaffine(scale: f64, matrix: &[f32], (u, w, b): (&[f32], &[f32], f32), q: &[f32], k: &[f32]) -> Score {
    let affine = bilinear(matrix, q, k).plus(product(u, q)).plus(product(w, k)).plus(Term::of(b));
    Term { size: 2.0 * affine.size, ..affine }.score(scale)
}

/// Graph attention: `LeakyReLU(a_q . W q + a_k . W k)`, with `w` of `[units, dim]`.
pub fn gat(scale: f64, slope: f64, (a_q, a_k, w): (&[f32], &[f32], &[f32]), q: &[f32], k: &[f32]) -> Score {
    let along = |a: &[f32], row: &[f32]| {
        let units = projection(w, row).zip(a);
        units.map(|(unit, a)| unit.times(f64::from(*a))).fold(Term::ZERO, Term::plus)
    };
    let sum = along(a_q, q).plus(along(a_k, k));
    Term { size: 2.0 * sum.size, ..sum }.leaky(slope).score(scale)
}

/// Brody's graph attention: `v . LeakyReLU(W_q q + W_k k)`.
pub fn gatv2(scale: f64, slope: f64, parameters: Additive<'_>, q: &[f32], k: &[f32]) -> Score {
    let units = parameters.units(q, k).into_iter().map(|unit| unit.leaky(slope));
    let sum = parameters.weighted(units);
    Term { size: 2.0 * sum.size, ..sum }.score(scale)
}

/// A Gaussian kernel's exponent: `- |q - k|^2 / (2 width^2)`.
pub fn distance(scale: f64, width: f64, q: &[f32], k: &[f32]) -> Score {
    assert_eq!(q.len(), k.len(), "length of a query and a key");
    let squares = q.iter().zip(k).map(|(q, k)| (f64::from(*q) - f64::from(*k)).powi(2));
    // Differences are rounded before they are squared, and their sum afterwards.
    let sum: f64 = squares.sum();
    Term { value: sum, size: 3.0 * sum }.times(-1.0 / (2.0 * width * width)).score(scale)
}

#[cfg(test)]
mod tests;
