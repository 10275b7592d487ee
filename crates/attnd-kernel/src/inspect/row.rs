//! What a second pass takes from the scores of one row over one page. Sums are by residues and halving, as rule 4 has them.

use std::ops::Range;

use crate::canonical::EXP2_POLY;
use crate::general::shape::check;
use crate::lanes::{LANES, Lanes};
use crate::mask::PageBits;
use crate::slot::PAGE_KEYS;

type Row = [f32; PAGE_KEYS];

/// Rule 3 with `shift` for `m'`: `p_j = P(s_j, shift)` for whole vectors, 0 for all others.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `vectors` are no multiples of 16 inside a page.
#[inline(always)]
pub(crate) unsafe fn weights<L: Lanes>(s: &Row, vectors: Range<usize>, shift: f32, p: &mut Row) {
    check(&vectors);
    p[..vectors.start].fill(0.0);
    p[vectors.end..].fill(0.0);
    let (s, p) = (s.as_ptr(), p.as_mut_ptr());
    // SAFETY: every access is in `vectors`.
    unsafe {
        let shift = L::splat(shift);
        for j in vectors.step_by(LANES) {
            let score = L::load(s.add(j));
            let n = L::rint(score);
            let r = L::sub(score, n);
            let mut y = L::splat(EXP2_POLY[6]);
            for i in (0..6).rev() {
                y = L::fma(y, r, L::splat(EXP2_POLY[i]));
            }
            L::store(p.add(j), L::scale_or_flush(y, L::sub(n, shift)));
        }
    }
}

/// Sums of `p` from each of `ends` to the next, the first one from 0. Vectors that an end cuts count on both sides, with zeros for what is
/// on the other.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If there are fewer sums than ends, or an end is past the page.
#[inline(always)]
pub(crate) unsafe fn segment_sums<L: Lanes>(p: &Row, ends: &[u16], sums: &mut [f32]) {
    assert!(sums.len() >= ends.len() && ends.iter().all(|end| usize::from(*end) <= PAGE_KEYS));
    let p = p.as_ptr();
    let mut first = 0;
    for (end, sum) in ends.iter().zip(sums) {
        let end = usize::from(*end);
        // SAFETY: the ISA is enabled; j is a multiple of 16 below `end`, which is at most 256.
        unsafe {
            let mut residues = L::zero();
            for j in (first / LANES * LANES..end).step_by(LANES) {
                let mut vector = L::load(p.add(j));
                if j < first || j + LANES > end {
                    let below = |edge: usize| ((1_u32 << edge.saturating_sub(j).min(LANES)) - 1) as u16;
                    vector = L::select_bits(below(end) & !below(first), vector, L::zero());
                }
                residues = L::add(residues, vector);
            }
            *sum = L::halving_sum(residues);
        }
        first = end;
    }
}

/// Sums over the keys of a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moments {
    /// `sum_j p_j`.
    pub(crate) mass: f32,
    /// `sum_j p_j (shift - s_j)`, by fma.
    pub(crate) depth: f32,
    /// `sum_j p_j |position - j|`, by fma.
    pub(crate) distance: f32,
}

/// Moments of the weights of [`weights`], whose first key is `first_key`; masked keys have no part in them.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `vectors` are no multiples of 16 inside a page.
#[inline(always)]
pub(crate) unsafe fn moments<L: Lanes>(
    (s, p): (&Row, &Row),
    vectors: Range<usize>,
    shift: f32,
    position: f32,
    first_key: usize,
) -> Moments {
    const STEPS: [f32; LANES] = {
        let mut steps = [0.0; LANES];
        let mut i = 0;
        while i < LANES {
            steps[i] = i as f32;
            i += 1;
        }
        steps
    };
    check(&vectors);
    let (s, p) = (s.as_ptr(), p.as_ptr());
    // SAFETY: STEPS are 16 f32, and every other access is in `vectors`.
    unsafe {
        let (shift, position) = (L::splat(shift), L::splat(position));
        let (lowest, infinite) = (L::splat(f32::MIN), L::splat(f32::INFINITY));
        let steps = L::load(STEPS.as_ptr());
        let (mut mass, mut depth, mut distance) = (L::zero(), L::zero(), L::zero());
        for j in vectors.step_by(LANES) {
            let (score, weight) = (L::load(s.add(j)), L::load(p.add(j)));
            // A masked key's weight is 0 and its score -inf, whose product is NaN.
            let below = L::sub(shift, score);
            let below = L::select_between(score, lowest, infinite, below, L::zero());
            let at = L::add(L::splat((first_key + j) as f32), steps);
            mass = L::add(mass, weight);
            depth = L::fma(weight, below, depth);
            distance = L::fma(weight, L::abs(L::sub(position, at)), distance);
        }
        Moments {
            mass: L::halving_sum(mass),
            depth: L::halving_sum(depth),
            distance: L::halving_sum(distance),
        }
    }
}

/// The highest finite score, or -inf.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `vectors` are no multiples of 16 inside a page.
#[inline(always)]
pub(crate) unsafe fn highest<L: Lanes>(s: &Row, vectors: Range<usize>) -> f32 {
    check(&vectors);
    let s = s.as_ptr();
    // SAFETY: every access is in `vectors`.
    unsafe {
        let (lowest, infinite) = (L::splat(f32::MIN), L::splat(f32::INFINITY));
        let masked = L::splat(f32::NEG_INFINITY);
        let mut highest = masked;
        for j in vectors.step_by(LANES) {
            let score = L::load(s.add(j));
            highest = L::max(highest, L::select_between(score, lowest, infinite, score, masked));
        }
        // Which of two zeros comes back is the ISA's affair.
        L::largest(highest) + 0.0
    }
}

/// The keys with scores of `least` or more.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `vectors` are no multiples of 16 inside a page.
#[inline(always)]
pub(crate) unsafe fn at_least<L: Lanes>(s: &Row, vectors: Range<usize>, least: f32) -> PageBits {
    check(&vectors);
    let s = s.as_ptr();
    let mut bits = PageBits::default();
    // SAFETY: every access is in `vectors`.
    unsafe {
        let least = L::splat(least);
        for j in vectors.step_by(LANES) {
            bits.put_vector(j, L::at_least(L::load(s.add(j)), least));
        }
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::canonical::weight;
    use crate::dispatch::Kernels;
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    /// The sum of rule 4 by its definition.
    fn by_residues(terms: impl Iterator<Item = (usize, f32)>, add: impl Fn(f32, f32) -> f32) -> f32 {
        let mut t = [0.0_f32; 16];
        for (j, term) in terms {
            t[j % 16] = add(t[j % 16], term);
        }
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                t[i] += t[i + half];
            }
        }
        t[0]
    }

    #[test]
    fn every_isa_gives_the_bits_of_the_definitions() {
        for seed in 0..40 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (first, end) = (rng.random_range(0..8_usize) * 16, rng.random_range(9..17_usize) * 16);
            let shift = f32::from(rng.random_range(10..12_u8));
            let mut score = || match rng.random_range(0..20_u32) {
                0 => f32::NEG_INFINITY,
                1 => -200.0,
                _ => rng.random_range(-20.0..10.0),
            };
            let s: Row = std::array::from_fn(|_| score());
            let want: Row =
                std::array::from_fn(|j| if (first..end).contains(&j) { weight(s[j], shift) } else { 0.0 });
            let mut ends: Vec<u16> = (0..rng.random_range(0..9)).map(|_| rng.random_range(1..256)).collect();
            ends.push(256);
            ends.sort_unstable();
            ends.dedup();
            let (position, least) =
                (rng.random_range(-3000.0..3000.0_f32).round(), rng.random_range(-9.0..9.0));
            let terms = || (first..end).map(|j| (j, want[j]));
            let depth =
                |sum: f32, j: usize| if s[j].is_finite() { want[j].mul_add(shift - s[j], sum) } else { sum };
            let far = |sum: f32, j: usize| want[j].mul_add((position - (512 + j) as f32).abs(), sum);
            let moments_by = |step: &dyn Fn(f32, usize) -> f32| {
                let mut t = [0.0_f32; 16];
                (first..end).for_each(|j| t[j % 16] = step(t[j % 16], j));
                by_residues(t.into_iter().enumerate(), |_, term| term)
            };
            for kernels in Kernels::available() {
                let entries = kernels.inspect();
                let mut p = [f32::NAN; PAGE_KEYS];
                entries.weights(&s, first..end, shift, &mut p);
                assert_eq!(p.map(f32::to_bits), want.map(f32::to_bits), "seed {seed} {}", kernels.isa());
                let mut sums = vec![0.0; ends.len()];
                entries.segment_sums(&p, &ends, &mut sums);
                let mut from = 0;
                for (end, sum) in ends.iter().zip(&sums) {
                    let end = usize::from(*end);
                    let want = by_residues((from..end).map(|j| (j, want[j])), |a, b| a + b);
                    assert_eq!(sum.to_bits(), want.to_bits(), "seed {seed} {from}..{end} {}", kernels.isa());
                    from = end;
                }
                let found = entries.moments((&s, &p), first..end, shift, position, 512);
                assert_eq!(found.mass.to_bits(), by_residues(terms(), |a, b| a + b).to_bits());
                assert_eq!(found.depth.to_bits(), moments_by(&depth).to_bits());
                assert_eq!(found.distance.to_bits(), moments_by(&far).to_bits());
                let highest = s[first..end].iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert_eq!(entries.highest(&s, first..end), highest);
                let bits = entries.at_least(&s, first..end, least);
                for j in 0..PAGE_KEYS {
                    let want = (first..end).contains(&j) && s[j] >= least;
                    assert_eq!(bits.contains(j), want, "{j} {}", kernels.isa());
                }
            }
        }
    }

    #[test]
    fn scores_that_are_no_numbers_are_neither_highest_nor_among_the_best() {
        let mut s = [1.0; PAGE_KEYS];
        (s[3], s[40], s[41]) = (f32::NAN, f32::INFINITY, -f32::NAN);
        for kernels in Kernels::available() {
            assert_eq!(kernels.inspect().highest(&s, 0..256), 1.0);
            assert_eq!(kernels.inspect().highest(&[f32::NAN; 256], 16..32), f32::NEG_INFINITY);
            let bits = kernels.inspect().at_least(&s, 0..256, 0.5);
            assert!(!bits.contains(3) && !bits.contains(41) && bits.contains(40) && bits.contains(0));
        }
    }
}
