//! The arithmetic of dot products: the bits of its definition written out in scalars, no trace of how the work was cut, and
//! errors as stated.

use std::ops::Range;

use attnd_kernel::reference::reference_row;
use attnd_kernel::slot::{Node, PAGE_KEYS, keys_in_page, pages_of_slot};
use attnd_kernel::{Causal, Compute, Kernels, Mask, Storage};
use half::bf16;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::cases::{Case, Data, differing_bits};
use crate::masks::mask_for;

pub(crate) const MODES: [Mode; 2] = [(Compute::Bf16, Storage::Bf16), (Compute::Int8, Storage::Int8)];

/// Kernels that have dot products for a mode on this CPU; where there are none, says so past the test harness's capture.
pub(crate) fn kernels_with(compute: Compute, storage: Storage) -> Option<&'static Kernels> {
    let has_it = |kernels: &&Kernels| kernels.effective(compute, storage).unwrap().instead_of().is_none();
    let found = Kernels::available().into_iter().find(has_it);
    if found.is_none() {
        use std::io::Write as _;
        let _written = writeln!(std::io::stderr(), "SKIPPED: {compute} dot products, which this CPU lacks");
    }
    found
}

pub(crate) type Mode = (Compute, Storage);

pub(crate) fn case_of(seed: u64, data: Data, mask: impl Into<Mask>, sizes: [usize; 5], mode: Mode) -> Case {
    let mut case = Case::new(seed, data, mask, sizes);
    (case.compute, case.storage) = mode;
    case
}

/// A row by definition: `m`, `l` and `o` of some keys.
#[derive(Clone)]
struct Partial {
    m: f32,
    l: f32,
    o: Vec<f32>,
}

/// `P(s, m')` of the canonical order with the polynomial of the mode.
fn power(s: f32, m: f32, poly: &[f32]) -> f32 {
    let n = s.round_ties_even();
    let e = n - m;
    if e <= -126.0 {
        return 0.0;
    }
    let y = poly.iter().rev().copied().reduce(|y, c| y.mul_add(s - n, c)).unwrap();
    y * f32::from_bits(((e as i32 + 127) as u32) << 23)
}

fn merge(left: Partial, right: Partial) -> Partial {
    let m = left.m.max(right.m);
    let finite = if m == f32::NEG_INFINITY { 0.0 } else { m };
    let factor = |m: f32| if m - finite <= -126.0 { 0.0 } else { (m - finite).exp2() };
    let (a, b) = (factor(left.m), factor(right.m));
    let o = left.o.iter().zip(&right.o).map(|(x, y)| x.mul_add(a, y * b)).collect();
    Partial { m, l: left.l.mul_add(a, right.l * b), o }
}

/// The scale of 16-bit integers for numbers of up to `largest`: the power of two that leaves 15 bits and a little room.
fn scale_of(largest: f32) -> f32 {
    if largest == 0.0 {
        return 1.0;
    }
    let half = f64::from(largest / 2.0 * (1.0 + 2.0_f32.powi(-14)));
    2.0_f64.powi((half.log2().floor() - 13.0).max(-126.0) as i32) as f32
}

/// What the dot products of a mode are made of.
struct Model<'a> {
    case: &'a Case,
    poly: &'static [f32],
    q: Vec<f32>,
    q_scale: f32,
}

const DEGREE_3: [f32; 4] = [0.999_928_06, 0.693_260_97, 0.242_611_13, 0.055_171_67];
const DEGREE_6: [f32; 7] = [
    1.0,
    std::f32::consts::LN_2,
    0.240_226_46,
    0.055_503_286,
    0.009_618_489,
    0.001_339_993_1,
    0.000_153_458_12,
];

/// Subnormals are zeros to `VDPBF16PS`.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0.0_f32.copysign(x) } else { x }
}

/// A query or a weight, which the kernel rounds, subnormals to zero.
fn to_bf16(x: f32) -> f32 {
    flushed(bf16::from_f32(flushed(x)).to_f32())
}

/// A key or a value, which was rounded when it was stored, as a dot product sees it.
fn stored_bf16(x: f32) -> f32 {
    flushed(bf16::from_f32(x).to_f32())
}

/// Pairs of products into an accumulator, the odd one first.
fn pairs(a: &[f32], b: &[f32], mut acc: f32) -> f32 {
    for (a, b) in a.chunks(2).zip(b.chunks(2)) {
        for i in [1, 0] {
            let (a, b) = (a.get(i).copied().unwrap_or(0.0), b.get(i).copied().unwrap_or(0.0));
            acc = flushed(a.mul_add(b, acc));
        }
    }
    acc
}

/// A row of stored integers and their scale, as `quantise.rs` defines them.
fn stored_integers(row: &[f32]) -> (Vec<f32>, f32) {
    let max = row.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    if max == 0.0 {
        return (vec![0.0; row.len()], 0.0);
    }
    // Rounded up to 17 significant bits.
    let exact = f64::from(max) / 127.0;
    let step = 2.0_f64.powi(exact.log2().floor() as i32 - 16).max(2.0_f64.powi(-149));
    let scale = ((exact / step).ceil() * step) as f32;
    (row.iter().map(|x| (f64::from(*x) / f64::from(scale)).round_ties_even() as f32).collect(), scale)
}

impl<'a> Model<'a> {
    fn new(case: &'a Case, head: usize, token: usize) -> Self {
        let (d, tq) = (case.shape.head_dim(), case.shape.n_queries());
        let factor = case.scale * std::f32::consts::LOG2_E;
        let q: Vec<f32> = case.q[(head * tq + token) * d..][..d].iter().map(|x| x * factor).collect();
        match case.compute {
            Compute::Bf16 => {
                Self { case, poly: &DEGREE_3, q: q.into_iter().map(to_bf16).collect(), q_scale: 1.0 }
            }
            Compute::Int8 => {
                let q_scale = scale_of(q.iter().fold(0.0_f32, |max, x| max.max(x.abs())));
                let q = q.into_iter().map(|x| (x / q_scale).round_ties_even()).collect();
                Self { case, poly: &DEGREE_6, q, q_scale }
            }
            Compute::F32 => panic!("no dot products"),
        }
    }

    fn score(&self, key: usize) -> f32 {
        let d = self.q.len();
        let k = &self.case.k[key * d..][..d];
        if self.case.compute == Compute::Bf16 {
            let k: Vec<f32> = k.iter().map(|x| stored_bf16(*x)).collect();
            return pairs(&self.q, &k, 0.0);
        }
        let (k, scale) = stored_integers(k);
        let sum: i64 = self.q.iter().zip(&k).map(|(q, k)| *q as i64 * *k as i64).sum();
        i32::try_from(sum).unwrap() as f32 * (scale * self.q_scale)
    }

    /// The keys of one page that the row sees, `page` on.
    fn page(&self, page: usize, visible: Range<usize>) -> Partial {
        let dv = self.case.shape.value_dim();
        let scores: Vec<f32> = visible.clone().map(|key| self.score(key)).collect();
        let m = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max).round_ties_even() + 0.0;
        let mut p = [0.0; PAGE_KEYS];
        let mut t = [0.0; 16];
        for (key, s) in visible.clone().zip(&scores) {
            let at = key - page * PAGE_KEYS;
            p[at] = power(*s, m, self.poly);
            t[at % 16] += p[at];
        }
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                t[i] += t[i + half];
            }
        }
        let v = |at: usize, c: usize| {
            let key = page * PAGE_KEYS + at;
            if visible.contains(&key) { self.case.v[key * dv + c] } else { 0.0 }
        };
        let o = if self.case.compute == Compute::Bf16 {
            let weights = p.map(to_bf16);
            let column = |c: usize| {
                pairs(&weights, &std::array::from_fn::<_, PAGE_KEYS, _>(|at| stored_bf16(v(at, c))), 0.0)
            };
            (0..dv).map(column).collect()
        } else {
            let rows: Vec<(Vec<f32>, f32)> = (0..PAGE_KEYS)
                .map(|at| stored_integers(&(0..dv).map(|c| v(at, c)).collect::<Vec<_>>()))
                .collect();
            let weights: Vec<f32> = p.iter().zip(&rows).map(|(p, (_, scale))| p * scale).collect();
            let scale = scale_of(weights.iter().copied().fold(0.0, f32::max));
            let column = |c: usize| {
                let products = weights
                    .iter()
                    .zip(&rows)
                    .map(|(w, (v, _))| (w / scale).round_ties_even() as i64 * v[c] as i64);
                i32::try_from(products.sum::<i64>()).unwrap() as f32 * scale
            };
            (0..dv).map(column).collect()
        };
        Partial { m, l: t[0], o }
    }

    fn node(&self, node: Node, visible: &Range<usize>) -> Option<Partial> {
        if let Some((left, right)) = node.children() {
            return match (self.node(left, visible), self.node(right, visible)) {
                (Some(left), Some(right)) => Some(merge(left, right)),
                (one, other) => one.or(other),
            };
        }
        let n_keys = self.case.shape.n_keys();
        let pages = pages_of_slot(usize::from(node.index()), n_keys).filter_map(|page| {
            let first = page * PAGE_KEYS;
            let seen = visible.start.max(first)..visible.end.min(first + keys_in_page(page, n_keys));
            (!seen.is_empty()).then(|| self.page(page, seen))
        });
        pages.reduce(merge)
    }

    /// The context, and lse.
    fn row(&self, token: usize) -> (Vec<f32>, f32) {
        let visible = self.case.mask.of_batch(0, &self.case.shape).visible(token);
        match self.node(Node::ROOT, &visible) {
            Some(Partial { m, l, o }) => {
                let lse = std::f64::consts::LN_2 * (f64::from(m) + f64::from(l).log2());
                (o.into_iter().map(|o| o / l + 0.0).collect(), lse as f32)
            }
            None => (vec![0.0; self.case.shape.value_dim()], f32::NEG_INFINITY),
        }
    }
}

/// Compares a row with the model's.
fn check(what: &str, case: &Case, got: &attnd_kernel::FinishedRows, head: usize, token: usize) {
    let (dv, tq) = (case.shape.value_dim(), case.shape.n_queries());
    let (context, lse) = Model::new(case, head, token).row(token);
    let at = head * tq + token;
    for (c, (expected, got)) in context.iter().zip(&got.context[at * dv..][..dv]).enumerate() {
        let same = expected.to_bits() == got.to_bits();
        assert!(same, "{what} head {head} token {token} column {c}: {expected:e} by definition, {got:e}");
    }
    // The kernel's logarithm is its own, and rounded once as this one is.
    let (expected, got) = (lse, got.lse[at]);
    let same = expected == got || (expected - got).abs() <= f32::EPSILON * expected.abs();
    assert!(same, "{what} head {head} token {token}: lse {expected:e} by definition, {got:e}");
}

/// Sizes around every edge; both families, and few rows.
fn sizes(rng: &mut SmallRng) -> [usize; 5] {
    let mut one_of = |choices: &[usize]| choices[rng.random_range(0..choices.len())];
    let (group, tq) = (one_of(&[1, 1, 2, 3, 4]), one_of(&[1, 2, 3, 5, 16, 31, 32, 33, 48]));
    let tk = one_of(&[0, 0, 256, 512]) + one_of(&[1, 2, 15, 16, 17, 63, 64, 65, 130, 255, 256]);
    [group, tq, tk, one_of(&[1, 2, 3, 7, 16, 33, 40, 64]), one_of(&[1, 3, 16, 33, 64, 80])]
}

#[test]
fn dot_products_have_the_bits_of_their_definition() {
    for mode in MODES {
        let Some(kernels) = kernels_with(mode.0, mode.1) else { continue };
        for seed in 0..120 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let sizes = sizes(&mut rng);
            let [group, tq, tk, ..] = sizes;
            let data = [Data::Normal, Data::Peaked, Data::Flat, Data::Ties, Data::Constant, Data::Tiny]
                [seed as usize / 3 % 6];
            let mut case = case_of(seed, data, mask_for(seed, tq, tk), sizes, mode);
            case.scale *= [1.0, 1.0, -1.0, 0.0][seed as usize % 4];
            let got = case.attend(kernels, 0..tq);
            for _ in 0..6 {
                let (head, token) = (rng.random_range(0..group), rng.random_range(0..tq));
                let what = format!("{} seed {seed} {data:?} {:?} {sizes:?}", mode.0, case.mask);
                check(&what, &case, &got, head, token);
            }
        }
    }
}

/// Where the scales of stored integers are subnormal, and rounded by as much as they are, and those of weights are the smallest.
#[test]
fn tiny_operands_keep_their_definition_and_their_sign() {
    for mode in MODES {
        let Some(kernels) = kernels_with(mode.0, mode.1) else { continue };
        for exponent in 100..149 {
            for (of_values, sizes) in [(true, [1, 1, 40, 3, 5]), (false, [2, 33, 40, 3, 5])] {
                let mut case = case_of(exponent, Data::Normal, Causal::None, sizes, mode);
                let factor = 2.0_f32.powi(-(exponent as i32 / 2))
                    * 2.0_f32.powi(-(exponent as i32 - exponent as i32 / 2));
                let tiny = if of_values { &mut case.v } else { &mut case.q };
                tiny.iter_mut().for_each(|x| *x = (*x * 1.3 + 2.0) * factor);
                let got = case.attend(kernels, 0..sizes[1]);
                check(
                    &format!("{} 2^-{exponent} {of_values}", mode.0),
                    &case,
                    &got,
                    sizes[0] - 1,
                    sizes[1] - 1,
                );
                let is_normal = exponent < 120;
                assert!(!of_values || !is_normal || got.context.iter().all(|x| *x > 0.0), "2^-{exponent}");
            }
        }
    }
}

/// A subnormal query is zero, however many there are: rounded to bf16 it would be the smallest normal number.
#[test]
fn subnormal_queries_of_bf16_dots_are_zero_alone_and_in_a_batch() {
    let Some(kernels) = kernels_with(MODES[0].0, MODES[0].1) else { return };
    let mut case = case_of(1, Data::Normal, Causal::None, [1, 48, 40, 2, 1], MODES[0]);
    case.scale = std::f32::consts::LOG2_E.recip();
    assert_eq!(case.scale * std::f32::consts::LOG2_E, 1.0);
    case.q.fill(f32::from_bits(0x007f_ffff));
    case.k[..40].fill(3e38);
    case.k[40..].fill(0.0);
    case.v[..20].fill(1.0);
    case.v[20..].fill(-1.0);
    assert_eq!(case.attend(kernels, 0..48).context, [0.0; 48]);
    assert_eq!(case.attend(kernels, 7..8).context, [0.0]);
}

/// Keys far out of the ordinary whose scores aren't.
#[test]
fn scores_of_huge_keys_and_tiny_queries_are_numbers() {
    for mode in MODES {
        let Some(kernels) = kernels_with(mode.0, mode.1) else { continue };
        let mut case = case_of(1, Data::Normal, Causal::None, [1, 1, 2, 128, 2], mode);
        case.q.fill(1e-32);
        case.k[..128].fill(1e32);
        case.k[128..].fill(0.9e32);
        let got = case.attend(kernels, 0..1);
        assert!(got.context.iter().chain(&got.lse).all(|x| x.is_finite()), "{}: {got:?}", mode.0);
        check("huge keys", &case, &got, 0, 0);
    }
}

/// The largest queries there are, of either sign, become integers of the same size.
#[test]
fn the_largest_queries_are_integers() {
    let Some(kernels) = kernels_with(MODES[1].0, MODES[1].1) else { return };
    let mut case = case_of(1, Data::Normal, Causal::None, [1, 2, 2, 2, 2], MODES[1]);
    case.scale = std::f32::consts::LOG2_E.recip();
    case.q.copy_from_slice(&[f32::MAX, 1e38, -f32::MAX, -1e38]);
    case.k.copy_from_slice(&[1e-38, 2e-38, 3e-38, 1.5e-38]);
    let got = case.attend(kernels, 0..2);
    for token in 0..2 {
        check("largest queries", &case, &got, 0, token);
    }
    assert!(Model::new(&case, 0, 1).q.iter().zip(&Model::new(&case, 0, 0).q).all(|(a, b)| *a == -b));
    assert!(Model::new(&case, 0, 0).q[0] <= 32_767.0);
}

#[test]
fn dot_products_leave_no_trace_of_cuts_and_batches() {
    for mode in MODES {
        let Some(kernels) = kernels_with(mode.0, mode.1) else { continue };
        for seed in 0..24 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let [group, tq, _, d, dv] = sizes(&mut rng);
            let tk = rng.random_range(1..6000);
            let case = case_of(seed, Data::Normal, mask_for(seed, tq, tk), [group, tq, tk, d, dv], mode);
            let expected = case.attend(kernels, 0..tq);
            let mut cuts: Vec<usize> = (0..1 + seed as usize % 4).map(|_| rng.random_range(0..=64)).collect();
            cuts.sort_unstable();
            let cut = case.attend_cut(&[kernels], &cuts);
            assert_eq!(differing_bits(&expected, &cut), None, "{} seed {seed} cuts {cuts:?}", mode.0);
            for token in [0, tq / 2, tq - 1] {
                let alone = case.attend(kernels, token..token + 1);
                for head in 0..group {
                    let of_batch = &expected.context[(head * tq + token) * dv..][..dv];
                    let of_one = &alone.context[head * dv..][..dv];
                    let same = of_batch.iter().zip(of_one).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{} seed {seed} token {token} head {head}", mode.0);
                }
            }
        }
    }
}

/// A NaN that a row doesn't see must not reach it, in either half of a pair, and one that it sees must.
#[test]
fn a_row_of_dot_products_depends_on_what_it_sees() {
    for (tq, bad) in [(2, 1), (48, 24), (48, 25)] {
        let mode = MODES[0];
        let Some(kernels) = kernels_with(mode.0, mode.1) else { continue };
        let mut case = case_of(5, Data::Normal, Causal::TopLeft, [1, tq, 300, 16, 24], mode);
        let clean = case.attend(kernels, 0..tq);
        case.k[bad * 16 + 3] = f32::NAN;
        case.v[bad * 24..(bad + 1) * 24].fill(f32::NAN);
        let got = case.attend(kernels, 0..tq);
        for token in 0..tq {
            let rows = [&clean, &got].map(|finished| &finished.context[token * 24..][..24]);
            if token < bad {
                assert!(rows[0].iter().zip(rows[1]).all(|(a, b)| a.to_bits() == b.to_bits()), "{tq} {token}");
            } else {
                assert!(rows[1].iter().all(|x| x.to_bits() == 0x7fc0_0000), "{tq} {token}: {:?}", rows[1]);
            }
        }
    }
    let Some(kernels) = kernels_with(MODES[1].0, MODES[1].1) else { return };
    let mut case = case_of(5, Data::Normal, Causal::None, [1, 2, 300, 16, 24], MODES[1]);
    case.q[5] = f32::INFINITY;
    let got = case.attend(kernels, 0..2);
    assert!(got.context[..24].iter().all(|x| x.to_bits() == 0x7fc0_0000), "a query that is no number");
    assert!(got.context[24..].iter().all(|x| x.is_finite()));
}

/// The largest error of a context of 4 rows, relative to the root mean square of its values, against f64 over what is stored.
fn error_of(mode: (Compute, Storage), d: usize) -> Option<f64> {
    let kernels = kernels_with(mode.0, mode.1)?;
    let case = case_of(11, Data::Normal, Causal::None, [1, 4, 2048, d, d], mode);
    let got = case.attend(kernels, 0..4);
    let stored = |x: &[f32]| -> Vec<f32> {
        match mode.1 {
            Storage::Bf16 => x.iter().map(|x| stored_bf16(*x)).collect(),
            _ => x
                .chunks(d)
                .flat_map(|row| {
                    let (integers, scale) = stored_integers(row);
                    integers.into_iter().map(move |n| n * scale)
                })
                .collect(),
        }
    };
    let (k, v) = (stored(&case.k), stored(&case.v));
    let (mut worst, mut squares) = (0.0_f64, 0.0);
    for token in 0..4 {
        let scale = f64::from(case.scale);
        let row = reference_row(&case.shape, scale, Causal::None, (&case.q, &k, &v), 0, token);
        for (got, exact) in got.context[token * d..][..d].iter().zip(&row.context) {
            worst = worst.max((f64::from(*got) - exact).abs());
            squares += exact * exact;
        }
    }
    Some(worst / (squares / (4.0 * d as f64)).sqrt())
}

#[test]
fn errors_of_dot_products_are_as_stated() {
    // Fixed operands and a fixed order, so that these are no estimates: a change of the arithmetic shows.
    let stated = [
        (MODES[0], 64, 8.86e-3),
        (MODES[0], 128, 6.33e-3),
        (MODES[1], 64, 3.28e-4),
        (MODES[1], 128, 3.91e-4),
    ];
    for (mode, d, stated) in stated {
        if let Some(found) = error_of(mode, d) {
            assert!(
                (0.98 * stated..=stated).contains(&found),
                "{} d={d}: {found:e}, stated {stated:e}",
                mode.0
            );
        }
    }
}
