//! ALiBi: a bias that falls with the distance between query and key (Press, Smith and Lewis, *Train Short, Test Long*, ICLR 2022).

use crate::lanes::{LANES, Lanes};
use crate::slot::PAGE_KEYS;

/// The bias of one row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ramp {
    pub(crate) slope: f32,
    /// From where distances count: the position of the query, or the first key where they are by key. Exact up to `2^24`.
    pub(crate) origin: f32,
    /// `slope * (j - origin)` instead of `-slope * abs(origin - j)`.
    pub(crate) by_key: bool,
}

/// The slopes that ALiBi was published with (section 3): a geometric sequence that begins with `2^(-8 / heads)`, which is also its ratio. For
/// heads that are no power of two, those of the power below, and behind them every other one of the power above.
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let below = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    let slope = |nth: usize, of: usize| (-8.0 * nth as f64 / of as f64).exp2() as f32;
    let of_head = |head: usize| match head {
        head if head < below => slope(head + 1, below),
        head => slope(2 * (head - below) + 1, 2 * below),
    };
    (0..heads).map(of_head).collect()
}

/// Values for the keys of `page`.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
pub(crate) unsafe fn fill_ramp<L: Lanes>(ramp: Ramp, page: usize, to: &mut [f32; PAGE_KEYS]) {
    const STEPS: [f32; LANES] = {
        let mut steps = [0.0; LANES];
        let mut i = 0;
        while i < LANES {
            steps[i] = i as f32;
            i += 1;
        }
        steps
    };
    // SAFETY: STEPS are 16 f32, and key + 16 <= 256.
    unsafe {
        let steps = L::load(STEPS.as_ptr());
        let origin = L::splat(ramp.origin);
        let slope = L::splat(if ramp.by_key { ramp.slope } else { -ramp.slope });
        for key in (0..PAGE_KEYS).step_by(LANES) {
            let at = L::add(L::splat((page * PAGE_KEYS + key) as f32), steps);
            let steps = if ramp.by_key { L::sub(at, origin) } else { L::abs(L::sub(origin, at)) };
            L::store(to.as_mut_ptr().add(key), L::mul(slope, steps));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::biases;

    #[test]
    fn slopes_are_those_of_the_paper() {
        assert_eq!(alibi_slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
        assert_eq!(alibi_slopes(3), [0.0625, 0.00390625, 0.25]);
        assert_eq!(alibi_slopes(1), [0.00390625]);
        assert!(alibi_slopes(0).is_empty());
        for heads in 1..=1024 {
            let (slopes, wanted) = (alibi_slopes(heads), biases::alibi_slopes(heads));
            assert_eq!(slopes.len(), wanted.len());
            for (slope, wanted) in slopes.iter().zip(&wanted) {
                assert!((slope - wanted).abs() <= wanted * f32::EPSILON, "{heads} heads: {slope}, {wanted}");
            }
        }
    }
}
