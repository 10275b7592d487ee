//! Attention in the freest order of arithmetic: what the canonical order is measured against.
//!
//! The same pages, register tiles and outer work as the canonical kernels, so that the order is the only difference:
//! * pages in ascending order into one running `(m, l, o)` a row: no tree, no partial of a page, no merges;
//! * `m` is the largest score itself; `p = 2^(s - m)` is never flushed; no score is looked at for overflow;
//! * the weights of a row add up in few independent sums, across pages where lanes are keys;
//! * where lanes are queries, accumulators of a page's context start from `o * 2^(m_before - m)`; where rows are broadcast,
//!   `o` is multiplied by that only when the largest score of a row rises.
//!
//! f32 storage, every row sees whole pages. Its results have the accuracy of the canonical ones and none of the promises
//! about bits; partials can't merge, so a call must be computed by one thread. `benches/canonical_order.rs` measures.

use crate::arch::avx2::Avx2;
use crate::arch::avx512::Avx512;
use crate::arithmetic::Exact;
use crate::block::{RowBlock, RowPartials, Seen, Visible};
use crate::canonical::EXP2_POLY;
use crate::dispatch::{AVX2, AVX512, Isa, Kernels};
use crate::lanes::Lanes;
use crate::queries::Groups;
use crate::queries::free_order::attend_queries;
use crate::rows::free_order::attend_rows;
use crate::storage::{Storage, StoredF32};

/// The arithmetic of all of it.
pub(crate) type F32 = Exact<StoredF32>;

impl Kernels {
    /// Kernels of an ISA that compute attention in the freest order, if this CPU has them: to be measured, by one thread.
    /// They take whole pages of f32 that every row sees, and blocks of few rows or of many.
    pub fn in_free_order(isa: Isa) -> Option<&'static Self> {
        let kernels = match isa {
            Isa::Avx512 => &FREE_AVX512,
            Isa::Avx2 => &FREE_AVX2,
            Isa::Neon | Isa::Portable => return None,
        };
        Self::for_isa(isa).is_ok().then_some(kernels)
    }
}

/// Weights have no smaller exponent where the ISA scales by adding to the exponent field.
const LEAST_EXPONENT: f32 = -126.0;

/// `2^x` for `x <= 0`. `CLAMP` says whether the ISA's scaling needs normal powers.
///
/// # Safety
/// The ISA of `L` is enabled.
#[inline(always)]
pub(crate) unsafe fn exp2<L: Lanes, const CLAMP: bool>(x: L::V) -> L::V {
    // SAFETY: the ISA is enabled; exponents are at most 0, and above -127 where it matters.
    unsafe {
        let x = if CLAMP { L::max(L::splat(LEAST_EXPONENT), x) } else { x };
        let e = L::rint(x);
        let r = L::sub(x, e);
        let degree = EXP2_POLY.len() - 1;
        let mut y = L::splat(EXP2_POLY[degree]);
        for i in (0..degree).rev() {
            y = L::fma(y, r, L::splat(EXP2_POLY[i]));
        }
        L::scale(y, e)
    }
}

/// # Panics
/// If the block is none that the free order is written for.
pub(crate) fn check(block: &RowBlock<'_>) {
    assert_eq!(block.kv.storage(), Storage::F32, "storage");
    let visible = Visible::new(block.visible, block.kv.n_keys());
    assert!(block.pages.iter().all(|page| visible.of_page(*page) == Seen::Whole), "rows see whole pages");
}

/// Stands where the canonical kernels merge.
///
/// # Safety
/// None: it has the type of an entry.
unsafe fn refuse_to_merge(_left: RowPartials<'_>, _m: &[f32], _l: &[f32], _o: &[f32], _columns: usize) {
    panic!("partials of the free order don't merge; one thread computes a call whole");
}

/// Stamps the entries of one ISA over those of its canonical table, with the same tiles.
///
/// # Safety
/// As of the canonical entries: possession of the table proves that the CPU has `$features`.
macro_rules! instantiate_free {
    ($table:ident, $canonical:ident, $lanes:ty, clamp $clamp:literal, few $fr:literal x $fnr:literal ahead $ahead:literal, one row $one:expr, queries $keys:literal x $queries:literal, #[$features:meta]) => {
        static $table: Kernels = {
            /// # Safety
            /// As the canonical entry says.
            #[$features]
            unsafe fn rows_entry(
                block: &RowBlock<'_>,
                scratch: &mut [f32],
                out: &mut RowPartials<'_>,
            ) -> Option<usize> {
                // SAFETY: the features are enabled on this function.
                unsafe { attend_rows::<$lanes, $fr, $fnr, 0, $clamp>(block, scratch, out) }
            }
            /// # Safety
            /// As the canonical entry says.
            #[$features]
            unsafe fn rows_ahead_entry(
                block: &RowBlock<'_>,
                scratch: &mut [f32],
                out: &mut RowPartials<'_>,
            ) -> Option<usize> {
                // SAFETY: the features are enabled on this function.
                unsafe { attend_rows::<$lanes, $fr, $fnr, $ahead, $clamp>(block, scratch, out) }
            }
            /// # Safety
            /// As the canonical entry says.
            #[$features]
            unsafe fn queries_entry(
                block: &RowBlock<'_>,
                groups: Groups,
                scratch: &mut [f32],
                out: &mut RowPartials<'_>,
            ) -> Option<usize> {
                // SAFETY: the features are enabled on this function.
                unsafe { attend_queries::<$lanes, $keys, $queries, $clamp>(block, groups, scratch, out) }
            }
            let rows =
                (rows_entry as _, if $ahead > 0 { rows_ahead_entry as _ } else { rows_entry as _ }, $one);
            $canonical.with_f32_entries(($fr, $queries), rows, queries_entry, refuse_to_merge)
        };
    };
}

instantiate_free!(FREE_AVX512, AVX512, Avx512, clamp false, few 6 x 4 ahead 1024, one row Some(FREE_AVX2.f32_rows()), queries 8 x 3, #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]);
instantiate_free!(FREE_AVX2, AVX2, Avx2, clamp true, few 1 x 4 ahead 0, one row None, queries 6 x 1, #[target_feature(enable = "avx2,fma,f16c")]);

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::attend::{GroupCall, Side, attend_node};
    use crate::compute::Effective;
    use crate::dtype::Dtype;
    use crate::mask::Causal;
    use crate::operator::Operator;
    use crate::pages::KvHead;
    use crate::partial::FinishedRows;
    use crate::reference::reference_row;
    use crate::shape::{AttnShape, Dims};
    use crate::slot::{Node, PAGE_KEYS, n_pages};

    /// Both orders of a call on every ISA that has both; the operands grow with the key, so that maxima keep rising.
    fn compare(heads: u64, queries: u64, keys: u64, head_dim: u64, value_dim: u64, scale: f32) {
        let shape = AttnShape::new(Dims { batch: 1, heads, kv_heads: 1, queries, keys, head_dim, value_dim })
            .unwrap();
        let mut random = StdRng::seed_from_u64(heads + queries + keys + head_dim);
        let mut uniform = |n: u64| -> Vec<f32> { (0..n).map(|_| random.random_range(-1.0..1.0)).collect() };
        let (q, mut k, v) =
            (uniform(shape.q_elements()), uniform(shape.k_elements()), uniform(shape.v_elements()));
        for (i, k) in k.iter_mut().enumerate() {
            *k *= 0.25 + 0.75 * i as f32 / shape.k_elements() as f32;
        }
        let (d, dv, n_keys) = (shape.head_dim(), shape.value_dim(), shape.n_keys());
        let mut kv = KvHead::new(n_keys, d, dv, 0..64).unwrap();
        let bytes = |words: &[f32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        for page in 0..n_pages(n_keys) {
            let rows = |of: &[f32], dim: usize| bytes(&of[page * PAGE_KEYS * dim..][..PAGE_KEYS * dim]);
            kv.write_k(page, &rows(&k, d), Dtype::F32, true).unwrap();
            kv.write_v(page, &rows(&v, dv), Dtype::F32, true).unwrap();
        }
        let operator = Operator::plain(scale, Causal::None);
        let call = GroupCall {
            shape,
            operator: &operator,
            group: 0,
            q: &q,
            kv: &kv,
            side: Side::default(),
            compute: Effective::F32,
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let rows = |kernels: &Kernels| -> FinishedRows {
            let tokens = 0..shape.n_queries();
            let (partial, result) = pool.install(|| attend_node(kernels, &call, Node::ROOT, tokens));
            assert_eq!(result, Ok(()));
            partial.finish(kernels)
        };
        for kernels in Kernels::available() {
            let Some(free) = Kernels::in_free_order(kernels.isa()) else { continue };
            let (canonical, free) = (rows(kernels), rows(free));
            assert_ne!(canonical.context, free.context, "{kernels:?}: the order is another one");
            let n_rows = shape.n_queries() * shape.group_size();
            for row in (0..n_rows).step_by(n_rows.div_ceil(24)).chain([n_rows - 1]) {
                let (head, token) = (row / shape.n_queries(), row % shape.n_queries());
                let exact = reference_row(&shape, scale.into(), Causal::None, (&q, &k, &v), head, token);
                let of =
                    |rows: &FinishedRows| exact.worst_ratio(&rows.context[row * dv..][..dv], rows.lse[row]);
                let (canonical, free) = (of(&canonical), of(&free));
                assert!(canonical <= 1.0 && free <= 1.0, "{kernels:?} row {row}: {canonical}, {free}");
            }
        }
    }

    #[test]
    fn few_rows_are_accurate() {
        for (heads, queries, d, dv) in [(1, 1, 128, 128), (4, 1, 64, 64), (3, 2, 80, 48), (1, 2, 64, 192)] {
            compare(heads, queries, 67 * 256, d, dv, 0.3);
            compare(heads, queries, 256, d, dv, 0.3);
        }
    }

    #[test]
    fn many_rows_are_accurate() {
        for (heads, queries, d, dv) in
            [(1, 96, 128, 128), (1, 128, 64, 64), (4, 20, 80, 48), (1, 47, 64, 208)]
        {
            compare(heads, queries, 9 * 256, d, dv, 0.3);
        }
    }

    #[test]
    fn weights_too_small_for_f32_are_as_good_as_zero() {
        compare(1, 96, 1024, 64, 64, 40.0);
        compare(2, 1, 1024, 64, 64, 40.0);
    }
}
