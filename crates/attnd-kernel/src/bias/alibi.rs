//! ALiBi: a bias that falls with the distance between query and key.

use crate::lanes::{LANES, Lanes};
use crate::slot::PAGE_KEYS;

/// The bias of one row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ramp {
    pub(crate) slope: f32,
    /// Of the query among the keys; exact up to `2^24`.
    pub(crate) position: f32,
    /// `slope * j` instead of `-slope * abs(position - j)`.
    pub(crate) by_key: bool,
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
        let position = L::splat(ramp.position);
        let slope = L::splat(if ramp.by_key { ramp.slope } else { -ramp.slope });
        for key in (0..PAGE_KEYS).step_by(LANES) {
            let at = L::add(L::splat((page * PAGE_KEYS + key) as f32), steps);
            let steps = if ramp.by_key { at } else { L::abs(L::sub(position, at)) };
            L::store(to.as_mut_ptr().add(key), L::mul(slope, steps));
        }
    }
}
