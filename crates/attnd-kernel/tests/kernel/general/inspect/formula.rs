//! What a view should be, by the oracle of the whole operator.

use attnd_kernel::reference::UNIT_ROUNDOFF;
use attnd_kernel::reference::operator::{At, Formula, OperatorRow};
use attnd_kernel::{FinishedReport, Outputs, Stage};

use super::super::formula::{dense, problem};
use super::super::request::Request;
use super::view::View;

/// The worst of some errors over what they may be.
#[derive(Default)]
pub(super) struct Worst(pub(super) f64);

impl Worst {
    fn compare(&mut self, got: f32, want: f64, bound: f64) {
        let off = (f64::from(got) - want).abs();
        let ratio = if f64::from(got) == want { 0.0 } else { off / bound };
        self.0 = if ratio <= self.0 { self.0 } else { ratio };
        if ratio.is_nan() {
            self.0 = f64::INFINITY;
        }
    }
}

/// The worst error of all that was looked at, over what rounding may do; at most 1 is right.
pub(super) fn worst_ratio(
    request: &Request,
    wanted: &Outputs,
    view: &View,
    finished: &FinishedReport,
    means: &[f32],
) -> f64 {
    let (mask, bias) = (dense(&request.mask, request.n_keys()), dense(&request.bias, request.n_keys()));
    let problem = problem(request, mask.as_ref(), bias.as_ref());
    let formulas: Vec<Formula<'_>> =
        (0..request.n_queries()).map(|token| problem.formula(0, token)).collect();
    let (n_queries, n_keys) = (request.n_queries(), request.n_keys());
    let mut worst = Worst::default();
    let heads = wanted.heads_of_group(0);
    let rows: Vec<OperatorRow> = heads
        .clone()
        .flat_map(|head| (0..n_queries).map(move |token| (head, token)))
        .map(|(head, token)| formulas[token].row(0, head, token))
        .collect();
    let at = |head: usize, token: usize| &rows[(head - heads.start) * n_queries + token];

    for (index, rectangle) in wanted.rectangles().iter().enumerate() {
        let mut i = 0;
        for head in rectangle.heads.clone() {
            for token in rectangle.tokens.clone() {
                for key in rectangle.keys.clone() {
                    let row = at(head, token);
                    let score = (formulas[token].score)(At { batch: 0, head, token, key });
                    // Of a masked key, which has no part in the row's bound.
                    let own = 16.0 * UNIT_ROUNDOFF * (1.0 + 6.0 * score.magnitude);
                    let (want, bound) = match rectangle.stage {
                        Stage::Raw => (row.stages.raw[key], own),
                        Stage::Capped => (row.stages.capped[key], own),
                        Stage::Masked => {
                            let want = row.stages.masked[key];
                            (want, 2.0 * row.bound.lse + 2.0 * UNIT_ROUNDOFF * want.abs())
                        }
                        Stage::Weights => {
                            (row.stages.weights[key], weight_bound(row, row.stages.weights[key]))
                        }
                    };
                    worst.compare(view.element(index, i), want, bound);
                    i += 1;
                }
            }
        }
    }

    let parts = wanted.parts();
    let (k, blocks) = (parts.top_k, wanted.mass_blocks());
    let width = parts.mass_block.map_or(1, |width| width.get());
    for (i, row) in rows.iter().enumerate() {
        let (weights, masked) = (&row.stages.weights, &row.stages.masked);
        let score_bound = |score: f64| 2.0 * row.bound.lse + 2.0 * UNIT_ROUNDOFF * score.abs();
        let mut best: Vec<f64> = masked.iter().copied().filter(|score| *score > f64::NEG_INFINITY).collect();
        best.sort_unstable_by(|a, b| b.total_cmp(a));
        for rank in 0..k {
            let [key, weight, score] = [
                finished.top_keys[i * k + rank] as f32,
                finished.top_weights[i * k + rank],
                finished.top_scores[i * k + rank],
            ];
            match best.get(rank) {
                // Keys whose scores are closer than rounding may change places.
                Some(want) if key < n_keys as f32 => {
                    let key = finished.top_keys[i * k + rank] as usize;
                    worst.compare(score, *want, score_bound(*want));
                    worst.compare(score, masked[key], score_bound(masked[key]));
                    worst.compare(weight, weights[key], weight_bound(row, weights[key]));
                }
                Some(_) => worst.0 = f64::INFINITY,
                None => {
                    let is_none = finished.top_keys[i * k + rank] == u32::MAX;
                    if !(is_none && weight == 0.0 && score == f32::NEG_INFINITY) {
                        worst.0 = f64::INFINITY;
                    }
                }
            }
        }
        for block in 0..blocks {
            let want: f64 = weights.iter().skip(block * width).take(width).sum();
            worst.compare(finished.mass[i * blocks + block], want, weight_bound(row, want) + 2e-10);
        }
        if parts.entropy {
            let bound = 4.0 * row.bound.lse.min(1.0) * (1.0 + row.entropy) + 1e-6;
            worst.compare(finished.entropy[i], row.entropy, bound);
        }
        if parts.distance {
            let sum: f64 = match request.parts.normaliser {
                attnd_kernel::Normaliser::Sigmoid { .. } => weights.iter().sum(),
                attnd_kernel::Normaliser::Softmax => 1.0,
            };
            let operator = request.operator();
            let position = operator.mask_of_group(0, &request.case.shape).position(i % n_queries) as f64;
            let of_key = |(key, weight): (usize, &f64)| weight * (position - key as f64).abs();
            let want =
                if sum > 0.0 { weights.iter().enumerate().map(of_key).sum::<f64>() / sum } else { 0.0 };
            worst.compare(finished.distance[i], want, 2.0 * weight_bound(row, want) + 1e-7);
        }
        if parts.max_score {
            let want = best.first().copied().unwrap_or(f64::NEG_INFINITY);
            worst.compare(finished.max_score[i], want, score_bound(want));
        }
    }
    if let Some((heat_rows, columns)) = parts.heatmap {
        let cut = |bin: usize, n: usize, length: usize| bin * length / n..(bin + 1) * length / n;
        for head in heads.clone() {
            for r in 0..heat_rows {
                for c in 0..columns {
                    let tokens = cut(r, heat_rows, n_queries);
                    let (mut want, mut bound) = (0.0, 2e-10);
                    for token in tokens.clone() {
                        let row = at(head, token);
                        let mass: f64 = row.stages.weights[cut(c, columns, n_keys)].iter().sum();
                        want += mass / tokens.len() as f64;
                        bound += weight_bound(row, mass) / tokens.len() as f64;
                    }
                    worst.compare(means[((head - heads.start) * heat_rows + r) * columns + c], want, bound);
                }
            }
        }
    }
    worst.0
}

/// How far a weight, or a sum of weights, may be off: twice as much as their logarithm, and what is flushed.
fn weight_bound(row: &OperatorRow, weight: f64) -> f64 {
    2.0 * row.bound.lse.min(1e6) * weight + 4.0 * UNIT_ROUNDOFF * weight + 1e-35
}
