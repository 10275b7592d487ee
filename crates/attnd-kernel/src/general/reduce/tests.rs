//! Every ISA against each reducer's definition, written down element by element.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::canonical::functions::{FACTORED, FAR, SATURATED_SUM, TWO_LOG2_E, tanh};
use crate::canonical::{EXP2_POLY, query_factor};
use crate::slot::PAGE_KEYS;

/// `e^2x` in two factors, where its binary logarithm is cut at `limit`.
fn exponential(x: f32, limit: f32) -> (f32, f32) {
    let y = x * TWO_LOG2_E;
    let y = if y > limit { limit } else { y };
    let y = if y < -limit { -limit } else { y };
    let n = y.round_ties_even();
    let m = EXP2_POLY.iter().rev().copied().reduce(|sum, c| sum.mul_add(y - n, c)).unwrap();
    let power = |n: f32| f32::from_bits(((n as i32 + 127) as u32) << 23);
    let half = (n * 0.5).round_ties_even();
    (m * power(half), power(n - half))
}

fn is_far(row: &[f32]) -> bool {
    !row.iter().all(|x| x.abs() <= FACTORED)
}

/// The definition of a sum of tangents.
fn tangents(a: &[f32], w: &[f32], b: &[f32]) -> f32 {
    if is_far(b) {
        let terms = a.iter().zip(b).zip(w);
        return terms.fold(0.0, |sum, ((a, b), w)| w.mul_add(tanh(a + b), sum));
    }
    let of_far_row = is_far(a);
    let sums: Vec<f32> = a
        .iter()
        .zip(b)
        .map(|(a, b)| {
            let ((e1, e2), (f1, f2)) = (exponential(*a, FAR), exponential(*b, 125.0));
            let f = f1 * f2;
            let sum = if of_far_row { (e1 * f).mul_add(e2, 1.0) } else { (e1 * e2).mul_add(f, 1.0) };
            if sum > SATURATED_SUM { SATURATED_SUM } else { sum }
        })
        .collect();
    let mut s = w.iter().fold(0.0_f32, |sum, w| sum + w);
    for (d, w) in sums.chunks(2).zip(w.chunks(2)) {
        s += match (d, w) {
            ([d0, d1], [w0, w1]) => (-2.0 * w0).mul_add(*d1, -2.0 * w1 * d0) / (d0 * d1),
            _ => -2.0 * w[0] / d[0],
        };
    }
    s
}

fn leaky(slope: f32, a: &[f32], w: &[f32], b: &[f32]) -> f32 {
    let leak = |t: f32| if t.is_nan() { t } else { slope.mul_add(t.min(0.0), t.max(0.0)) };
    a.iter().zip(b).zip(w).fold(0.0, |sum, ((a, b), w)| w.mul_add(leak(a + b), sum))
}

fn distance(factor: f32, q: &[f32], k: &[f32]) -> f32 {
    q.iter().zip(k).fold(0.0_f32, |sum, (q, k)| (q - k).mul_add(q - k, sum)) * factor
}

#[test]
fn every_isa_gives_the_bits_of_the_definitions() {
    let cases = if cfg!(miri) { 1 } else { 40 };
    for seed in 0..cases {
        let mut rng = SmallRng::seed_from_u64(900 + seed);
        let sizes = (rng.random_range(1..=13), rng.random_range(1..=21_usize));
        // An interpreter takes minutes for a page of thirteen rows.
        let (n_rows, d) = if cfg!(miri) { (3, 3) } else { sizes };
        let mut element = |size: f32| match rng.random_range(0..400_u32) {
            0 => f32::NAN,
            1 => [f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e38, -1e-40][seed as usize % 5],
            2 => [FACTORED, -FACTORED, FACTORED.next_up(), 50.0, -83.0, 300.0][seed as usize % 6],
            _ => rng.random_range(-size..size),
        };
        let mut rows = |n: usize, sizes: [f32; 4]| -> Vec<Vec<f32>> {
            (0..n).map(|i| (0..d).map(|_| element(sizes[i % 4])).collect()).collect()
        };
        let queries = rows(n_rows, [1.0, 3.0, 45.0, 20.0]);
        let weights = rows(n_rows, [1.0; 4]);
        let keys = rows(PAGE_KEYS, [1.0, 30.0, 3.0, 42.0]);
        let slope = [0.0, 0.2, 1.0][seed as usize % 3];
        let factor = query_factor(0.7);
        for reducer in [Reducer::Tanh, Reducer::Leaky { slope }, Reducer::Distance { width: 0.6 }] {
            for kernels in Kernels::available() {
                let layout = Layout::new(reducer, n_rows, d, factor, kernels);
                let mut q = vec![f32::NAN; layout.words()];
                let of_rows: Vec<&[f32]> = queries.iter().map(|row| &row[..]).collect();
                let of_weights: Vec<&[f32]> = weights.iter().map(|row| &row[..]).collect();
                layout.pack(kernels, &of_rows, &of_weights, &mut q);

                let key_dim = d + reducer.flags();
                let mut resident: Vec<f32> = keys.concat();
                if reducer == Reducer::Tanh {
                    resident = vec![f32::NAN; PAGE_KEYS * key_dim];
                    flagged_exponentials(kernels, &keys.concat(), d, &mut resident);
                }
                let mut panels = vec![0.0; PAGE_KEYS * key_dim];
                for (key, row) in resident.chunks(key_dim).enumerate() {
                    for (x, element) in row.iter().enumerate() {
                        panels[panel_at(key / PANEL_KEYS, key_dim) + x * PANEL_KEYS + key % PANEL_KEYS] =
                            *element;
                    }
                }
                let mut s = vec![f32::NAN; n_rows * PAGE_KEYS];
                layout.scores(&q, (&panels, 0), 0..4, |_| None, &mut s);
                for (at, got) in s.iter().enumerate() {
                    let (row, key) = (at / PAGE_KEYS, at % PAGE_KEYS);
                    let w: Vec<f32> = weights[row].iter().map(|w| w * factor).collect();
                    let (a, b) = (&queries[row], &keys[key]);
                    let want = match reducer {
                        Reducer::Tanh => tangents(a, &w, b),
                        Reducer::Leaky { slope } => leaky(slope, a, &w, b),
                        _ => {
                            let width = f64::from(0.6_f32);
                            distance((f64::from(factor) / (-2.0 * width * width)) as f32, a, b)
                        }
                    };
                    let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                    let isa = kernels.isa();
                    assert!(same, "seed {seed} {reducer:?} {isa}: {got:e} for {want:e}, {a:?} and {b:?}");
                }
            }
        }
    }
}

/// The same of what previous weights say, in the first page and in one behind it.
#[test]
fn every_isa_gives_the_bits_of_the_located_definition() {
    for seed in 0..if cfg!(miri) { 1 } else { 10 } {
        let mut rng = SmallRng::seed_from_u64(960 + seed);
        let (d, n_filters, n_taps) =
            (rng.random_range(1..=9_usize), rng.random_range(1..=4_usize), rng.random_range(1..=40_usize));
        let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-2.0..2.0)).collect() };
        let (a, w, keys) = (random(d), random(d), random(PAGE_KEYS * d));
        let (taps, units, previous) = (random(n_filters * n_taps), random(d * n_filters), random(300));
        let mut panels = vec![0.0; PAGE_KEYS * d];
        for (key, row) in keys.chunks(d).enumerate() {
            for (x, element) in row.iter().enumerate() {
                panels[panel_at(key / PANEL_KEYS, d) + x * PANEL_KEYS + key % PANEL_KEYS] = *element;
            }
        }
        let located =
            Located { previous: &previous, filters: Filters { taps: &taps, n_taps, units: &units } };
        for (page, kernels) in
            (0..2).flat_map(|page| Kernels::available().into_iter().map(move |k| (page, k)))
        {
            let layout = Layout::new(Reducer::Located, 1, d, 0.75, kernels);
            let (mut q, mut s) = (vec![f32::NAN; layout.words()], vec![f32::NAN; PAGE_KEYS]);
            layout.pack(kernels, &[&a], &[&w], &mut q);
            layout.scores(&q, (&panels, page), 0..4, |_| Some(located), &mut s);
            for (key, got) in s.iter().enumerate() {
                let at = |t: usize| (page * PAGE_KEYS + key + t).checked_sub(n_taps / 2);
                let response = |c: usize| {
                    let around = |t: usize| at(t).and_then(|at| previous.get(at)).copied().unwrap_or(0.0);
                    (0..n_taps).fold(0.0, |sum: f32, t| taps[c * n_taps + t].mul_add(around(t), sum))
                };
                let want = (0..d).fold(0.0, |sum: f32, x| {
                    let t = a[x] + keys[key * d + x];
                    let t = (0..n_filters).fold(t, |t, c| units[x * n_filters + c].mul_add(response(c), t));
                    (w[x] * 0.75).mul_add(tanh(t), sum)
                });
                assert_eq!(got.to_bits(), want.to_bits(), "seed {seed}, key {key} on {}", kernels.isa());
            }
        }
    }
}

/// The factored form is as good as a tanh of each sum: some units of the sizes that go into it.
#[test]
fn factored_tangents_are_within_their_bound_up_to_where_they_end() {
    let mut worst = 0.0_f64;
    let step = if cfg!(miri) { 97 } else { 1 };
    for i in (-440..440).step_by(step) {
        for j in -440..440 {
            let (a, b) = (i as f32 * 0.0997, j as f32 * 0.0971);
            let got = f64::from(tangents(&[a], &[1.0], &[b]));
            let want = (f64::from(a) + f64::from(b)).tanh();
            let bound = (2.0 + f64::from(a.abs()) + f64::from(b.abs())) / f64::from(1 << 24);
            worst = worst.max((got - want).abs() / bound);
        }
    }
    assert!(worst <= 2.0, "{worst}");
}
