//! The entries of the second pass: small ones, each called for a row of a page.

use std::ops::Range;

use super::Kernels;
use super::isa::Isa;
use crate::arch;
use crate::inspect::row::{self, Moments};
use crate::mask::PageBits;
use crate::pages::{KvView, PageView};
use crate::slot::PAGE_KEYS;
use crate::widen::key_panels;

type Row = [f32; PAGE_KEYS];
type MomentsOf = unsafe fn((&Row, &Row), Range<usize>, f32, f32, usize) -> Moments;
type KeyPanels = for<'m> unsafe fn(&KvView, PageView<'m>, &'m mut [f32]) -> &'m [f32];

/// The entries of one ISA. [`Kernels::inspect`] hands them out only where the CPU has its features.
pub(crate) struct InspectEntries {
    key_panels: KeyPanels,
    weights: unsafe fn(&Row, Range<usize>, f32, &mut Row),
    segment_sums: unsafe fn(&Row, &[u16], &mut [f32]),
    moments: MomentsOf,
    highest: unsafe fn(&Row, Range<usize>) -> f32,
    at_least: unsafe fn(&Row, Range<usize>, f32) -> PageBits,
}

impl Kernels {
    /// The entries of the second pass.
    pub(crate) fn inspect(&self) -> &'static InspectEntries {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &AVX512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &AVX2,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => &NEON,
            _ => &PORTABLE,
        }
    }
}

/// SAFETY, of all calls below: possession of the table proves that the CPU has the ISA's features.
impl InspectEntries {
    /// [`key_panels`].
    pub(crate) fn key_panels<'m>(&self, kv: &KvView, page: PageView<'m>, memory: &'m mut [f32]) -> &'m [f32] {
        // SAFETY: above.
        unsafe { (self.key_panels)(kv, page, memory) }
    }

    /// [`row::weights`].
    pub(crate) fn weights(&self, s: &Row, vectors: Range<usize>, shift: f32, p: &mut Row) {
        // SAFETY: above.
        unsafe { (self.weights)(s, vectors, shift, p) }
    }

    /// [`row::segment_sums`].
    pub(crate) fn segment_sums(&self, p: &Row, ends: &[u16], sums: &mut [f32]) {
        // SAFETY: above.
        unsafe { (self.segment_sums)(p, ends, sums) }
    }

    /// [`row::moments`].
    pub(crate) fn moments(
        &self,
        rows: (&Row, &Row),
        vectors: Range<usize>,
        shift: f32,
        position: f32,
        first_key: usize,
    ) -> Moments {
        // SAFETY: above.
        unsafe { (self.moments)(rows, vectors, shift, position, first_key) }
    }

    /// [`row::highest`].
    pub(crate) fn highest(&self, s: &Row, vectors: Range<usize>) -> f32 {
        // SAFETY: above.
        unsafe { (self.highest)(s, vectors) }
    }

    /// [`row::at_least`].
    pub(crate) fn at_least(&self, s: &Row, vectors: Range<usize>, least: f32) -> PageBits {
        // SAFETY: above.
        unsafe { (self.at_least)(s, vectors, least) }
    }
}

/// Stamps the entries of one ISA.
///
/// # Safety
/// The entries may only be called on a CPU that has `$features`; [`Kernels::inspect`] hands the table out only there.
macro_rules! instantiate {
    ($table:ident, $lanes:ty $(, #[$features:meta])?) => {
        static $table: InspectEntries = {
            $(#[$features])?
            unsafe fn key_panels_entry<'m>(kv: &KvView, page: PageView<'m>, memory: &'m mut [f32]) -> &'m [f32] {
                // SAFETY: the features are enabled on this function.
                unsafe { key_panels::<$lanes>(kv, page, memory) }
            }
            $(#[$features])?
            unsafe fn weights_entry(s: &Row, vectors: Range<usize>, shift: f32, p: &mut Row) {
                // SAFETY: the features are enabled on this function.
                unsafe { row::weights::<$lanes>(s, vectors, shift, p) }
            }
            $(#[$features])?
            unsafe fn segment_sums_entry(p: &Row, ends: &[u16], sums: &mut [f32]) {
                // SAFETY: the features are enabled on this function.
                unsafe { row::segment_sums::<$lanes>(p, ends, sums) }
            }
            $(#[$features])?
            unsafe fn moments_entry(
                rows: (&Row, &Row),
                vectors: Range<usize>,
                shift: f32,
                position: f32,
                first_key: usize,
            ) -> Moments {
                // SAFETY: the features are enabled on this function.
                unsafe { row::moments::<$lanes>(rows, vectors, shift, position, first_key) }
            }
            $(#[$features])?
            unsafe fn highest_entry(s: &Row, vectors: Range<usize>) -> f32 {
                // SAFETY: the features are enabled on this function.
                unsafe { row::highest::<$lanes>(s, vectors) }
            }
            $(#[$features])?
            unsafe fn at_least_entry(s: &Row, vectors: Range<usize>, least: f32) -> PageBits {
                // SAFETY: the features are enabled on this function.
                unsafe { row::at_least::<$lanes>(s, vectors, least) }
            }
            InspectEntries {
                key_panels: key_panels_entry,
                weights: weights_entry,
                segment_sums: segment_sums_entry,
                moments: moments_entry,
                highest: highest_entry,
                at_least: at_least_entry,
            }
        };
    };
}

#[cfg(target_arch = "x86_64")]
instantiate!(AVX512, arch::avx512::Avx512, #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
instantiate!(AVX2, arch::avx2::Avx2, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "aarch64")]
instantiate!(NEON, arch::neon::Neon);
instantiate!(PORTABLE, arch::portable::Portable);
