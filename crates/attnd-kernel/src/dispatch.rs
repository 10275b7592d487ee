//! Chooses the kernels once: what the CPU has, or what `ATTND_ISA` asks for.
//!
//! The `*_entry` functions are what enables CPU features. Everything generic below them is inlined into them, one
//! instantiation of a family's whole loop per ISA and type of its operands, and no call crosses a feature boundary inside it.

#[cfg(target_arch = "x86_64")]
mod dots;
mod general;
mod inspect;
mod isa;
mod loops;
mod reduce;

use std::sync::OnceLock;

pub(crate) use self::general::GeneralEntries;
pub(crate) use self::inspect::InspectEntries;
pub use self::isa::{ISA_VARIABLE, Isa, IsaError};
pub(crate) use self::loops::FLOP_PER_ROUND;
use self::loops::{chains, read_chains};
pub(crate) use self::reduce::ReduceEntries;
use crate::arch;
use crate::arithmetic::Exact;
use crate::block::{Place, QueryLayout, RowBlock, RowPartials, Tiles, divide_rows, merge_rows, pack_queries};
use crate::compute::{Compute, Effective, StorageMismatch};
use crate::fill::transpose_rows;
use crate::lanes::LANES;
use crate::queries::{Groups, attend_queries};
use crate::rows::attend_rows;
use crate::storage::{Storage, StoredBf16, StoredF16, StoredF32, StoredInt4, StoredInt8};

pub(crate) type AttendRows = unsafe fn(&RowBlock<'_>, &mut [f32], &mut RowPartials<'_>) -> Option<usize>;
pub(crate) type AttendQueries =
    unsafe fn(&RowBlock<'_>, Groups, &mut [f32], &mut RowPartials<'_>) -> Option<usize>;
type PackQueries = unsafe fn(QueryLayout, &[&[f32]], f32, &mut [f32]);
pub(crate) type MergeRows = unsafe fn(RowPartials<'_>, &[f32], &[f32], &[f32], usize);
type DivideRows = unsafe fn(&[f32], &[f32], &mut [f32], usize);
type TransposeRows = unsafe fn(*const f32, usize, &mut [f32], usize) -> bool;
type FmaLoop = unsafe fn(u64) -> f32;
type ReadLoop = unsafe fn(&[f32]) -> f32;

/// The entries of the rows-broadcast family, one for each way of reading pages. Apart, because all that an entry calls is
/// inlined into it, and a compiler's time grows faster than a function.
struct RowsEntries {
    f32: AttendRows,
    /// The same, where memory is asked for lines ahead of their use.
    f32_ahead: AttendRows,
    /// The same for one row, where memory isn't asked ahead and another way is faster.
    f32_one: Option<AttendRows>,
    f16: AttendRows,
    bf16: AttendRows,
    int8: AttendRows,
    int4: AttendRows,
}

/// The kernels of one ISA. Possession proves that this CPU runs them.
pub struct Kernels {
    isa: Isa,
    tiles: Tiles,
    pack_queries: PackQueries,
    rows: RowsEntries,
    attend_queries: AttendQueries,
    merge_rows: MergeRows,
    divide_rows: DivideRows,
    transpose_rows: TransposeRows,
    fma_loop: FmaLoop,
    read_loop: ReadLoop,
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Kernels").field(&self.isa).finish()
    }
}

impl Kernels {
    /// The kernels that `ATTND_ISA` names, or the fastest that this CPU runs. Reads the environment on the first call
    /// only.
    pub fn from_env() -> Result<&'static Self, IsaError> {
        static CHOICE: OnceLock<Result<&'static Kernels, IsaError>> = OnceLock::new();
        CHOICE
            .get_or_init(|| match std::env::var_os(ISA_VARIABLE) {
                None => Ok(Self::available()[0]),
                Some(name) => Self::for_isa(name.to_string_lossy().parse()?),
            })
            .clone()
    }

    /// As [`Self::from_env`], and the portable kernels where the environment names none that run here: for work that
    /// has the same result on all.
    pub(crate) fn chosen() -> &'static Self {
        Self::from_env().unwrap_or(&PORTABLE)
    }

    /// The kernels of one ISA, if this CPU runs them.
    pub fn for_isa(isa: Isa) -> Result<&'static Self, IsaError> {
        let available = Self::available();
        available.iter().find(|k| k.isa == isa).copied().ok_or_else(|| IsaError::Unsupported {
            isa,
            available: available.iter().map(|k| k.isa.name()).collect::<Vec<_>>().join(", "),
        })
    }

    /// All kernels that this CPU runs, fastest first; the portable ones are always there.
    pub fn available() -> Vec<&'static Self> {
        let mut available: Vec<&'static Self> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            // One predicate per ISA, over all the features that its entries enable.
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") {
                available.push(&AVX512);
            }
            if avx2 {
                available.push(&AVX2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        available.push(&NEON);
        available.push(&PORTABLE);
        available
    }

    /// The same kernels with other entries for f32 storage, whose tiles are of as many rows, and of as many vectors of queries.
    #[cfg(all(feature = "free-order", target_arch = "x86_64"))]
    pub(crate) const fn with_f32_entries(
        &self,
        (few_rows, query_vectors): (usize, usize),
        (f32, f32_ahead, f32_one): (AttendRows, AttendRows, Option<AttendRows>),
        attend_queries: AttendQueries,
        merge_rows: MergeRows,
    ) -> Self {
        assert!(few_rows == self.tiles.few_rows && query_vectors == self.tiles.query_vectors);
        let rows = RowsEntries { f32, f32_ahead, f32_one, ..self.rows };
        Self { rows, attend_queries, merge_rows, ..*self }
    }

    /// The entry for few rows in f32.
    #[cfg(all(feature = "free-order", target_arch = "x86_64"))]
    pub(crate) const fn f32_rows(&self) -> AttendRows {
        self.rows.f32
    }

    /// Which ISA this is.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The largest register tiles, and how they come by what they read, as suits this CPU.
    ///
    /// A first-level cache of 48 KiB tells newer cores from older ones. Newer ones gain where memory is asked for lines
    /// and pages ahead of their use, and hold the scores of a page against two vectors of queries (32 KiB). Older ones lose up to a
    /// third of their bandwidth to such requests, and three vectors load less per multiply-add.
    pub(crate) fn tiles(&self) -> Tiles {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            static FIRST_LEVEL: OnceLock<Option<usize>> = OnceLock::new();
            let bytes = *FIRST_LEVEL.get_or_init(crate::cache::first_level_bytes);
            let is_newer = bytes.is_some_and(|bytes| bytes >= 48 << 10);
            let query_vectors = self.tiles.query_vectors.min(if is_newer { 2 } else { 3 });
            Tiles { prefetch: is_newer, query_vectors, ..self.tiles }
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        self.tiles
    }

    /// What a call over keys and values in `storage` is computed in where `wanted` is asked for: that, or f32 where these
    /// kernels, or this CPU, lack the dot products.
    ///
    /// # Errors
    /// If `wanted` isn't for `storage`.
    pub fn effective(&self, wanted: Compute, storage: Storage) -> Result<Effective, StorageMismatch> {
        if let Some(needed) = wanted.storage().filter(|needed| *needed != storage) {
            return Err(StorageMismatch { compute: wanted, needed, storage });
        }
        let is_there = match wanted {
            Compute::F32 => true,
            Compute::Bf16 => self.has_bf16_dots(),
            Compute::Int8 => self.has_int8_dots(),
        };
        Ok(match is_there {
            true => Effective { compute: wanted, instead_of: None },
            false => Effective { compute: Compute::F32, instead_of: Some(wanted) },
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn bf16(&self) -> Option<&'static dots::Bf16Entries> {
        if self.isa == Isa::Avx512 { dots::bf16() } else { None }
    }

    #[cfg(target_arch = "x86_64")]
    fn int8(&self) -> Option<&'static dots::Int8Entries> {
        if self.isa == Isa::Avx512 { dots::int8() } else { None }
    }

    fn has_bf16_dots(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.bf16().is_some();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    fn has_int8_dots(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.int8().is_some();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    pub(crate) fn pack_queries(&self, layout: QueryLayout, rows: &[&[f32]], factor: f32, q: &mut [f32]) {
        // SAFETY: as in attend_block.
        unsafe { (self.pack_queries)(layout, rows, factor, q) }
        #[cfg(target_arch = "x86_64")]
        if let (Place::Groups(groups), Compute::Bf16, Some(entries)) =
            (layout.place, layout.compute, self.bf16())
        {
            // SAFETY: the entries are there, so the CPU has their features.
            unsafe { (entries.pair)(groups, layout.d, q) }
        }
    }

    /// # Panics
    /// If the parts don't fit together, or the layout is for dot products that these kernels don't have.
    pub(crate) fn attend_block(
        &self,
        block: &RowBlock<'_>,
        layout: QueryLayout,
        scratch: &mut [f32],
        out: &mut RowPartials<'_>,
    ) -> Option<usize> {
        block.check(layout, scratch, out);
        let storage = block.kv.storage();
        match layout.place {
            Place::Tiles { n_rows, tile_rows, prefetch } => {
                assert_eq!(tile_rows, self.tiles.rows_for(n_rows, storage));
                #[cfg(target_arch = "x86_64")]
                assert!(layout.compute == Compute::F32 || tile_rows == dots::ROWS);
                // SAFETY: a Kernels of this ISA is only handed out where the CPU has its features, entries for dot products
                // only where it has those, and the block has been checked.
                unsafe { self.rows_entry(storage, layout.compute, n_rows, prefetch)(block, scratch, out) }
            }
            // SAFETY: as above.
            Place::Groups(groups) => unsafe {
                self.queries_entry(layout.compute)(block, groups, scratch, out)
            },
        }
    }

    fn rows_entry(&self, storage: Storage, compute: Compute, n_rows: usize, prefetch: bool) -> AttendRows {
        #[cfg(target_arch = "x86_64")]
        match (compute, self.bf16(), self.int8()) {
            (Compute::Bf16, Some(entries), _) => return entries.rows,
            (Compute::Int8, _, Some(entries)) => return entries.rows,
            _ => {}
        }
        assert_eq!(compute, Compute::F32, "dot products that {} doesn't have here", self.isa);
        match storage {
            Storage::F32 if prefetch => self.rows.f32_ahead,
            Storage::F32 if n_rows == 1 => self.rows.f32_one.unwrap_or(self.rows.f32),
            Storage::F32 => self.rows.f32,
            Storage::F16 => self.rows.f16,
            Storage::Bf16 => self.rows.bf16,
            Storage::Int8 => self.rows.int8,
            Storage::Int4 => self.rows.int4,
        }
    }

    fn queries_entry(&self, compute: Compute) -> AttendQueries {
        #[cfg(target_arch = "x86_64")]
        if let (Compute::Bf16, Some(entries)) = (compute, self.bf16()) {
            return entries.queries;
        }
        assert_eq!(compute, Compute::F32, "dot products that {} doesn't have here", self.isa);
        self.attend_queries
    }

    pub(crate) fn merge_rows(
        &self,
        left: RowPartials<'_>,
        m_right: &[f32],
        l_right: &[f32],
        o_right: &[f32],
        columns: usize,
    ) {
        // SAFETY: as in attend_block.
        unsafe { (self.merge_rows)(left, m_right, l_right, o_right, columns) }
    }

    pub(crate) fn divide_rows(&self, m: &[f32], l: &[f32], o: &mut [f32], columns: usize) {
        // SAFETY: as in attend_block.
        unsafe { (self.divide_rows)(m, l, o, columns) }
    }

    /// [`transpose_rows`] of `words`, `[16, width]`.
    pub(crate) fn transpose_words(
        &self,
        words: &[f32],
        width: usize,
        panel: &mut [f32],
        first: usize,
    ) -> bool {
        assert_eq!(words.len(), LANES * width);
        // SAFETY: as in attend_block, and `words` are 16 rows.
        unsafe { (self.transpose_rows)(words.as_ptr(), width, panel, first) }
    }

    /// The same of words as they lie in memory, at any alignment.
    pub(crate) fn transpose_bytes(
        &self,
        bytes: &[u8],
        width: usize,
        panel: &mut [f32],
        first: usize,
    ) -> bool {
        assert_eq!(bytes.len(), LANES * width * size_of::<f32>());
        // SAFETY: as in attend_block, and `bytes` are 16 rows of words.
        unsafe { (self.transpose_rows)(bytes.as_ptr().cast(), width, panel, first) }
    }

    /// Runs `rounds` of [`FLOP_PER_ROUND`] floating-point operations from registers, or of twice as many as dot products of
    /// bf16; the result only keeps the optimiser honest.
    pub(crate) fn peak_loop(&self, compute: Compute, rounds: u64) -> f32 {
        #[cfg(target_arch = "x86_64")]
        if let (Compute::Bf16, Some(entries)) = (compute, self.bf16()) {
            // SAFETY: the entries are there, so the CPU has their features.
            return unsafe { (entries.dot_loop)(rounds) };
        }
        assert_eq!(compute, Compute::F32, "no loop of such products");
        // SAFETY: as in attend_block.
        unsafe { (self.fma_loop)(rounds) }
    }

    /// Adds up what it reads, in no particular order; the result only keeps the optimiser honest.
    pub(crate) fn read_loop(&self, from: &[f32]) -> f32 {
        // SAFETY: as in attend_block.
        unsafe { (self.read_loop)(from) }
    }
}

/// Stamps the entries of one ISA. Its register tiles are `$mr` rows by `$nr` vectors of 16 keys where rows are broadcast,
/// or `$fr` by `$fn` where rows are few, of which one has an entry of its own if `$one` says so; over narrow elements they are smaller. They are `$keys` keys by `$queries` vectors of 16 queries in the other family. Where the CPU gains by it,
/// lines of f32 are asked for `$ahead` words ahead of their use. `$chains` are its independent accumulators.
///
/// # Safety
/// The entries may only be called on a CPU that has `$features`; [`Kernels::available`] hands the table out only there.
macro_rules! instantiate {
    ($table:ident, $isa:expr, $lanes:ty, few $fr:literal x $fn:literal, one row $one:expr, rows $mr:literal x $nr:literal ahead $ahead:literal, narrow few $nfr:literal x $nfn:literal, rows $nmr:literal x $nnr:literal ahead $nahead:literal, queries $keys:literal x $queries:literal, chains $chains:literal $(, #[$features:meta])?) => {
        pub(crate) static $table: Kernels = {
            $(#[$features])?
            unsafe fn pack_queries_entry(layout: QueryLayout, rows: &[&[f32]], factor: f32, q: &mut [f32]) {
                // SAFETY: the features are enabled on this function.
                unsafe { pack_queries::<$lanes>(layout, rows, factor, q) }
            }
            $(#[$features])?
            unsafe fn rows_f32_entry(block: &RowBlock<'_>, scratch: &mut [f32], out: &mut RowPartials<'_>) -> Option<usize> {
                // SAFETY: the features are enabled on this function.
                unsafe { attend_rows::<$lanes, Exact<StoredF32>, $fr, $fn, $mr, $nr, 0>(block, scratch, out) }
            }
            $(#[$features])?
            unsafe fn rows_f32_ahead_entry(block: &RowBlock<'_>, scratch: &mut [f32], out: &mut RowPartials<'_>) -> Option<usize> {
                // SAFETY: the features are enabled on this function.
                unsafe { attend_rows::<$lanes, Exact<StoredF32>, $fr, $fn, $mr, $nr, $ahead>(block, scratch, out) }
            }
            $(#[$features])?
            unsafe fn rows_f16_entry(block: &RowBlock<'_>, scratch: &mut [f32], out: &mut RowPartials<'_>) -> Option<usize> {
                // SAFETY: the features are enabled on this function.
                unsafe { attend_rows::<$lanes, Exact<StoredF16>, $nfr, $nfn, $nmr, $nnr, $nahead>(block, scratch, out) }
            }
            $(#[$features])?
            unsafe fn rows_bf16_entry(block: &RowBlock<'_>, scratch: &mut [f32], out: &mut RowPartials<'_>) -> Option<usize> {
                // SAFETY: the features are enabled on this function.
                unsafe { attend_rows::<$lanes, Exact<StoredBf16>, $nfr, $nfn, $nmr, $nnr, $nahead>(block, scratch, out) }
            }
            $(#[$features])?
            unsafe fn rows_int8_entry(block: &RowBlock<'_>, scratch: &mut [f32], out: &mut RowPartials<'_>) -> Option<usize> {
                // SAFETY: the features are enabled on this function.
                unsafe { attend_rows::<$lanes, Exact<StoredInt8>, $nfr, $nfn, $nmr, $nnr, $nahead>(block, scratch, out) }
            }
            $(#[$features])?
            unsafe fn rows_int4_entry(block: &RowBlock<'_>, scratch: &mut [f32], out: &mut RowPartials<'_>) -> Option<usize> {
                // SAFETY: the features are enabled on this function.
                unsafe { attend_rows::<$lanes, Exact<StoredInt4>, $nfr, $nfn, $nmr, $nnr, $nahead>(block, scratch, out) }
            }
            $(#[$features])?
            unsafe fn attend_queries_entry(
                block: &RowBlock<'_>,
                groups: Groups,
                scratch: &mut [f32],
                out: &mut RowPartials<'_>,
            ) -> Option<usize> {
                // SAFETY: the features are enabled on this function.
                unsafe { attend_queries::<$lanes, Exact<StoredF32>, $keys, $queries>(block, groups, scratch, out) }
            }
            $(#[$features])?
            unsafe fn merge_rows_entry(
                left: RowPartials<'_>,
                m_right: &[f32],
                l_right: &[f32],
                o_right: &[f32],
                columns: usize,
            ) {
                // SAFETY: the features are enabled on this function.
                unsafe { merge_rows::<$lanes>(left, m_right, l_right, o_right, columns) }
            }
            $(#[$features])?
            unsafe fn divide_rows_entry(m: &[f32], l: &[f32], o: &mut [f32], columns: usize) {
                // SAFETY: the features are enabled on this function.
                unsafe { divide_rows::<$lanes>(m, l, o, columns) }
            }
            $(#[$features])?
            unsafe fn transpose_rows_entry(rows: *const f32, width: usize, panel: &mut [f32], first: usize) -> bool {
                // SAFETY: the features are enabled on this function.
                unsafe { transpose_rows::<$lanes>(rows, width, panel, first) }
            }
            $(#[$features])?
            unsafe fn fma_loop_entry(rounds: u64) -> f32 {
                // SAFETY: the features are enabled on this function.
                unsafe { chains::<$lanes, Exact<StoredF32>, $chains>(rounds) }
            }
            $(#[$features])?
            unsafe fn read_loop_entry(from: &[f32]) -> f32 {
                // SAFETY: the features are enabled on this function.
                unsafe { read_chains::<$lanes>(from) }
            }
            Kernels {
                isa: $isa,
                tiles: Tiles {
                    few_rows: $fr,
                    rows: $mr,
                    narrow_rows: [$nfr, $nmr],
                    prefetch: false,
                    query_vectors: $queries,
                },
                pack_queries: pack_queries_entry,
                rows: RowsEntries {
                    f32: rows_f32_entry,
                    // Where nothing is asked for ahead, the entry for it is not compiled.
                    f32_ahead: if $ahead > 0 { rows_f32_ahead_entry } else { rows_f32_entry },
                    f32_one: $one,
                    f16: rows_f16_entry,
                    bf16: rows_bf16_entry,
                    int8: rows_int8_entry,
                    int4: rows_int4_entry,
                },
                attend_queries: attend_queries_entry,
                merge_rows: merge_rows_entry,
                divide_rows: divide_rows_entry,
                transpose_rows: transpose_rows_entry,
                fma_loop: fma_loop_entry,
                read_loop: read_loop_entry,
            }
        };
    };
}

// One row has as many loads as multiply-adds, and Zen 4 takes its lines 11 to 19 % faster from memory by vectors of half the width
// (d=128). AVX-512 is handed out only where the features of AVX2 are there; the bits are those of every ISA.
#[cfg(target_arch = "x86_64")]
instantiate!(AVX512, Isa::Avx512, arch::avx512::Avx512, few 6 x 4, one row Some(AVX2.rows.f32), rows 6 x 4 ahead 1024, narrow few 4 x 4, rows 4 x 4 ahead 1024, queries 8 x 3, chains 12, #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
instantiate!(AVX2, Isa::Avx2, arch::avx2::Avx2, few 1 x 4, one row None, rows 6 x 1 ahead 0, narrow few 1 x 4, rows 4 x 1 ahead 0, queries 6 x 1, chains 6, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "aarch64")]
instantiate!(NEON, Isa::Neon, arch::neon::Neon, few 1 x 4, one row None, rows 6 x 1 ahead 0, narrow few 1 x 4, rows 4 x 1 ahead 0, queries 6 x 1, chains 6);
instantiate!(PORTABLE, Isa::Portable, arch::portable::Portable, few 2 x 1, one row None, rows 2 x 1 ahead 0, narrow few 2 x 1, rows 2 x 1 ahead 0, queries 2 x 1, chains 2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reading_loop_reads_every_element_once() {
        for kernels in Kernels::available() {
            for len in [0, 1, 127, 128, 1000, 4096] {
                assert_eq!(kernels.read_loop(&vec![1.0; len]), len as f32, "{kernels:?}, {len}");
            }
        }
    }

    /// Each adds the product of 0.9999 and 0.0001, in whichever chain.
    #[test]
    fn the_loop_of_multiply_adds_does_as_many_as_it_says() {
        for kernels in Kernels::available() {
            for rounds in [0, 1, 7] {
                let got = f64::from(kernels.peak_loop(Compute::F32, rounds));
                let expected = (rounds * FLOP_PER_ROUND / 2) as f64 * 0.999_9e-4;
                assert!((got - expected).abs() <= 1e-5 * expected, "{kernels:?}, {rounds} rounds: {got}");
            }
        }
    }

    #[test]
    fn what_this_cpu_lacks_is_refused_with_what_it_has() {
        let missing = if cfg!(target_arch = "aarch64") { Isa::Avx2 } else { Isa::Neon };
        let error = Kernels::for_isa(missing).unwrap_err();
        assert!(error.to_string().contains("portable"), "{error}");
        assert!(Kernels::for_isa(Isa::Portable).is_ok());
    }
}
