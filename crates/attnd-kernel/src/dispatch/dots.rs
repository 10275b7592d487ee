//! The entries that need a CPU's dot products of narrow elements. They go with the kernels of one ISA and are looked for on
//! their own, because some CPUs with that ISA lack them.

use super::{AttendQueries, AttendRows};
use crate::arch::avx512::Avx512;
use crate::arithmetic::bf16::Bf16Dots;
use crate::arithmetic::int8::Int8Dots;
use crate::block::{RowBlock, RowPartials};
use crate::queries::{Groups, attend_queries, pair};
use crate::rows::attend_rows;

/// Rows of the register tile of both, by four vectors; those of queries are packed for it.
pub(super) const ROWS: usize = 4;

/// Dot products of bf16. Possession proves that this CPU has them.
pub(crate) struct Bf16Entries {
    pub(super) rows: AttendRows,
    pub(super) queries: AttendQueries,
    /// Makes pairs of packed queries, as [`pair`] says.
    pub(super) pair: unsafe fn(Groups, usize, &mut [f32]),
    /// As `Kernels::fma_loop`, with twice the operations a round.
    pub(super) dot_loop: unsafe fn(u64) -> f32,
}

/// Those of 16-bit integers.
pub(crate) struct Int8Entries {
    pub(super) rows: AttendRows,
}

/// The entries for bf16 if this CPU runs them.
pub(super) fn bf16() -> Option<&'static Bf16Entries> {
    // All that the entries enable beyond what the kernels of AVX-512 have been chosen by.
    let found = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512bf16");
    found.then_some(&AVX512_BF16)
}

/// The entries for int8 if this CPU runs them.
pub(super) fn int8() -> Option<&'static Int8Entries> {
    let found = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni");
    found.then_some(&AVX512_INT8)
}

static AVX512_BF16: Bf16Entries = {
    /// # Safety
    /// The CPU has these features; the table is handed out only there. Operands are as the function called wants them.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512bf16,avx2,fma,f16c")]
    unsafe fn rows_dots_entry(
        block: &RowBlock<'_>,
        scratch: &mut [f32],
        out: &mut RowPartials<'_>,
    ) -> Option<usize> {
        // SAFETY: the features are enabled on this function.
        unsafe { attend_rows::<Avx512, Bf16Dots, ROWS, 4, ROWS, 4, 0>(block, scratch, out) }
    }
    /// # Safety
    /// The CPU has these features; the table is handed out only there. Operands are as the function called wants them.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512bf16,avx2,fma,f16c")]
    unsafe fn queries_dots_entry(
        block: &RowBlock<'_>,
        groups: Groups,
        scratch: &mut [f32],
        out: &mut RowPartials<'_>,
    ) -> Option<usize> {
        // SAFETY: the features are enabled on this function.
        unsafe { attend_queries::<Avx512, Bf16Dots, 8, 3>(block, groups, scratch, out) }
    }
    /// # Safety
    /// The CPU has these features; the table is handed out only there. Operands are as the function called wants them.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512bf16,avx2,fma,f16c")]
    unsafe fn pair_entry(groups: Groups, d: usize, q: &mut [f32]) {
        // SAFETY: the features are enabled on this function.
        unsafe { pair::<Avx512>(groups, d, q) }
    }
    /// # Safety
    /// The CPU has these features; the table is handed out only there. Operands are as the function called wants them.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512bf16,avx2,fma,f16c")]
    unsafe fn dot_loop_entry(rounds: u64) -> f32 {
        // SAFETY: the features are enabled on this function.
        unsafe { super::chains::<Avx512, Bf16Dots, 12>(rounds) }
    }
    Bf16Entries {
        rows: rows_dots_entry,
        queries: queries_dots_entry,
        pair: pair_entry,
        dot_loop: dot_loop_entry,
    }
};

static AVX512_INT8: Int8Entries = {
    /// # Safety
    /// The CPU has these features; the table is handed out only there. Operands are as the function called wants them.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni,avx2,fma,f16c")]
    unsafe fn rows_dots_entry(
        block: &RowBlock<'_>,
        scratch: &mut [f32],
        out: &mut RowPartials<'_>,
    ) -> Option<usize> {
        // SAFETY: the features are enabled on this function.
        unsafe { attend_rows::<Avx512, Int8Dots, ROWS, 4, ROWS, 4, 1024>(block, scratch, out) }
    }
    Int8Entries { rows: rows_dots_entry }
};
