//! The operator in f64, element by element and in its own words, and faults that it can be given.

use attnd_kernel::reference::UNIT_ROUNDOFF;
use attnd_kernel::{Bias, FinishedRows, Normaliser, PerBatch};

use super::request::Request;

/// A formula that is wrong in one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    NoCap,
    CapAfterBias,
    NoBias,
    NoMask,
    BiasMaskIsData,
    AlibiByOtherEnd,
    NoAlibi,
    AlibiFromPadding,
    SoftmaxForSigmoid,
    NoSigmoidBias,
}

impl Fault {
    pub(super) const ALL: [Self; 10] = [
        Self::NoCap,
        Self::CapAfterBias,
        Self::NoBias,
        Self::NoMask,
        Self::BiasMaskIsData,
        Self::AlibiByOtherEnd,
        Self::NoAlibi,
        Self::AlibiFromPadding,
        Self::SoftmaxForSigmoid,
        Self::NoSigmoidBias,
    ];
}

/// The worst error of a result over the bound; at most 1 is right.
pub(super) fn worst_ratio(request: &Request, got: &FinishedRows) -> f64 {
    worst_ratio_with(request, got, None)
}

pub(super) fn worst_ratio_with(request: &Request, got: &FinishedRows, fault: Option<Fault>) -> f64 {
    let dv = request.case.shape.value_dim();
    let mut worst: f64 = 0.0;
    for head in 0..request.group() {
        for token in 0..request.n_queries() {
            let row = head * request.n_queries() + token;
            let context = &got.context[row * dv..][..dv];
            worst = worst.max(row_ratio(request, head, token, context, got.lse[row], fault));
        }
    }
    worst
}

/// The element of a dense tensor, `[1 or heads][1 or queries, keys]`.
fn element<T: Copy>(planes: &[Vec<T>], head: usize, token: usize, key: usize, n_keys: usize) -> T {
    let plane = if planes.len() == 1 { &planes[0] } else { &planes[head] };
    if plane.len() == n_keys { plane[key] } else { plane[token * n_keys + key] }
}

fn row_ratio(
    request: &Request,
    head: usize,
    token: usize,
    context: &[f32],
    lse: f32,
    fault: Option<Fault>,
) -> f64 {
    let (case, parts) = (&request.case, &request.parts);
    let (d, dv, n_keys) = (case.shape.head_dim(), case.shape.value_dim(), request.n_keys());
    let q = &case.q[(head * request.n_queries() + token) * d..][..d];
    let operator = request.operator();
    let position = operator.mask_of_group(0, &case.shape).position(token) as f64;
    let interval = operator.mask_of_group(0, &case.shape).visible(token);
    let first = match &parts.mask.key_begin {
        Some(PerBatch::Same(begin)) => *begin as f64,
        _ => 0.0,
    };

    let (mut scores, mut magnitude) = (Vec::new(), 0.0_f64);
    for j in interval {
        let masked = !request.mask.is_empty() && !element(&request.mask, head, token, j, n_keys);
        if masked && fault != Some(Fault::NoMask) {
            continue;
        }
        let products = q.iter().zip(&case.k[j * d..]).map(|(q, k)| f64::from(*q) * f64::from(*k));
        let scale = f64::from(parts.scale);
        let mut size = scale.abs() * products.clone().map(f64::abs).sum::<f64>();
        let mut score = scale * products.sum::<f64>();
        let cap = |score: f64| match parts.softcap {
            Some(cap) if fault != Some(Fault::NoCap) => f64::from(cap) * (score / f64::from(cap)).tanh(),
            _ => score,
        };
        if fault != Some(Fault::CapAfterBias) {
            score = cap(score);
        }
        if parts.softcap.is_some() {
            size += 5.0 * score.abs();
        }
        let mut is_masked = false;
        for bias in &parts.biases {
            let value = match bias {
                Bias::Dense => {
                    let value = element(&request.bias, head, token, j, n_keys);
                    if value == f32::NEG_INFINITY || value == f32::MIN {
                        is_masked = fault != Some(Fault::BiasMaskIsData);
                        0.0
                    } else if fault == Some(Fault::NoBias) {
                        0.0
                    } else {
                        f64::from(value)
                    }
                }
                Bias::Alibi { slopes, by_key } => {
                    let (slope, j) = (f64::from(slopes[head]), j as f64);
                    match (fault, by_key) {
                        (Some(Fault::NoAlibi), _) => 0.0,
                        (Some(Fault::AlibiByOtherEnd), false) => -slope * (position + 1.0 - j).abs(),
                        (Some(Fault::AlibiFromPadding), true) => slope * j,
                        (_, true) => slope * (j - first),
                        (_, false) => -slope * (position - j).abs(),
                    }
                }
            };
            score += value;
            size += value.abs();
        }
        if fault == Some(Fault::CapAfterBias) {
            score = cap(score);
        }
        if !is_masked {
            scores.push((j, score));
            magnitude = magnitude.max(size);
        }
    }

    let max = scores.iter().map(|(_, score)| *score).fold(f64::NEG_INFINITY, f64::max);
    let (weights, want_lse): (Vec<f64>, f64) = match parts.normaliser {
        Normaliser::Sigmoid { bias } if fault != Some(Fault::SoftmaxForSigmoid) => {
            let bias = if fault == Some(Fault::NoSigmoidBias) { 0.0 } else { f64::from(bias) };
            magnitude += bias.abs();
            let weights: Vec<f64> =
                scores.iter().map(|(_, score)| 1.0 / (1.0 + (-(score + bias)).exp())).collect();
            let sum = weights.iter().sum::<f64>();
            (weights, sum.ln())
        }
        _ => {
            let sum = scores.iter().map(|(_, score)| (score - max).exp()).sum::<f64>();
            (scores.iter().map(|(_, score)| (score - max).exp() / sum).collect(), max + sum.ln())
        }
    };
    let bound = 8.0 * UNIT_ROUNDOFF * (8.0 + magnitude);
    let ratio = |got: f32, want: f64, bound: f64| {
        let off = (f64::from(got) - want).abs();
        if f64::from(got) == want {
            0.0
        } else if off.is_nan() {
            f64::INFINITY
        } else {
            off / bound
        }
    };
    let want_lse = if scores.is_empty() { f64::NEG_INFINITY } else { want_lse };
    // Sums of weights that are all flushed have no logarithm.
    let mut worst = if want_lse < -80.0 && matches!(parts.normaliser, Normaliser::Sigmoid { .. }) {
        0.0
    } else {
        ratio(lse, want_lse, bound + want_lse.abs() * UNIT_ROUNDOFF)
    };
    for (c, got) in context.iter().enumerate() {
        let (mut want, mut amplitude) = (0.0, 0.0);
        for ((j, _), weight) in scores.iter().zip(&weights) {
            let value = f64::from(case.v[j * dv + c]);
            want += weight * value;
            amplitude += weight * value.abs();
        }
        worst = worst.max(ratio(*got, want, bound * amplitude + 1e-35));
    }
    worst
}
