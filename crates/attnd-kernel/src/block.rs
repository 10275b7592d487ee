//! A block of rows over the pages of one tree node: what both kernel families are given and give back, and which of
//! them takes it.

use std::ops::Range;

use crate::arithmetic::int8;
use crate::canonical::{CANONICAL_NAN, finite_max, rescale};
use crate::compute::Compute;
use crate::lanes::{LANES, Lanes};
use crate::pages::{KvView, padded_columns};
use crate::queries::Groups;
use crate::slot::{N_SLOTS, PAGE_KEYS, slot_of_page};
use crate::storage::{Storage, put};
use crate::{queries, rows};

/// Rows that one call handles: few enough that scores and queries stay in the near caches, and a multiple of the tiles.
pub(crate) const BLOCK_ROWS: usize = 96;

/// What one call computes.
#[derive(Debug)]
pub(crate) struct RowBlock<'a> {
    /// What [`pack_queries`] left.
    pub(crate) q: &'a [f32],
    /// Keys that each row sees, as positions in the sequence.
    pub(crate) visible: &'a [Range<usize>],
    /// Keys and values; every page of `pages` is resident.
    pub(crate) kv: &'a KvView,
    /// Pages to cover, ascending.
    pub(crate) pages: &'a [usize],
}

impl RowBlock<'_> {
    /// Checks what the entries rely on.
    ///
    /// # Panics
    /// If a slice is too short for its shape, or the layout is that of another block.
    pub(crate) fn check(&self, layout: QueryLayout, scratch: &[f32], out: &RowPartials<'_>) {
        let n_rows = self.visible.len();
        let columns = padded_columns(self.kv.value_dim());
        assert!(layout.n_rows() == n_rows && n_rows <= BLOCK_ROWS && layout.d == self.kv.head_dim());
        assert!(layout.compute.storage().is_none_or(|storage| storage == self.kv.storage()));
        assert_eq!(self.q.len(), layout.words());
        assert!(scratch.len() >= layout.scratch_floats(self.kv));
        assert!(out.m.len() == n_rows && out.l.len() == n_rows && out.o.len() == n_rows * columns);
    }
}

/// Where the partial of some rows is or goes.
#[derive(Debug)]
pub(crate) struct RowPartials<'a> {
    /// `[n_rows]`.
    pub(crate) m: &'a mut [f32],
    /// `[n_rows]`.
    pub(crate) l: &'a mut [f32],
    /// `[n_rows, columns]`; of a block, columns are padded.
    pub(crate) o: &'a mut [f32],
}

/// The register tiles of one ISA, in units of one accumulator of [`LANES`] floats.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiles {
    /// Rows of the largest tile of the rows-broadcast family, where rows are few.
    pub(crate) few_rows: usize,
    /// The same where they are more.
    pub(crate) rows: usize,
    /// Rows of the largest tile of that family over words of several elements, which take registers to widen: where rows are
    /// few, and where they are more.
    pub(crate) narrow_rows: [usize; 2],
    /// Whether memory is asked for lines ahead of their use, where an entry can.
    pub(crate) prefetch: bool,
    /// Vectors of query lanes of the largest tile of the other family.
    pub(crate) query_vectors: usize,
}

impl Tiles {
    /// Rows of the tile that a block of `n_rows` rows is cut into.
    pub(crate) fn rows_for(self, n_rows: usize, storage: Storage) -> usize {
        let is_few = n_rows <= rows::FEW_ROWS;
        match (storage, is_few) {
            (Storage::F32, true) => self.few_rows,
            (Storage::F32, false) => self.rows,
            (_, true) => self.narrow_rows[0],
            (_, false) => self.narrow_rows[1],
        }
    }
}

/// How the queries of a block lie in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueryLayout {
    pub(crate) d: usize,
    /// What their words are: f32, pairs of bf16, or pairs of integers, which have a scale for each row behind them.
    pub(crate) compute: Compute,
    pub(crate) place: Place,
}

/// Which family takes a block, and where its rows are then.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// For the rows-broadcast family: tile by tile, inside a tile word by word, so that a tile reads its broadcasts front to
    /// back from one pointer. Lines of f32 are asked for ahead of their use or not.
    Tiles { n_rows: usize, tile_rows: usize, prefetch: bool },
    /// For lanes = queries: group by group, inside a group word by word.
    Groups(Groups),
}

impl QueryLayout {
    /// The layout for a block of `n_rows` rows of `d` elements, and with it the family that takes the block.
    ///
    /// Lanes that have no row compute for nothing, and a single vector of lanes has too few accumulators to hide their
    /// latency; then the rows are broadcast. So they are against integers, whose scales would have to be those of lanes.
    pub(crate) fn new(n_rows: usize, d: usize, storage: Storage, compute: Compute, tiles: Tiles) -> Self {
        let idle = n_rows.next_multiple_of(LANES) - n_rows;
        let fills_lanes = n_rows >= LANES * tiles.query_vectors.min(2) && idle * 8 <= n_rows;
        let place = if fills_lanes && compute != Compute::Int8 {
            Place::Groups(Groups::new(n_rows, tiles.query_vectors, tiles.prefetch))
        } else {
            let tile_rows = tiles.rows_for(n_rows, storage);
            Place::Tiles { n_rows, tile_rows, prefetch: tiles.prefetch }
        };
        Self { d, compute, place }
    }

    /// Rows of the block.
    fn n_rows(self) -> usize {
        match self.place {
            Place::Tiles { n_rows, .. } => n_rows,
            Place::Groups(groups) => groups.rows(),
        }
    }

    /// Words of a query.
    fn row_words(self) -> usize {
        match self.compute {
            Compute::F32 => self.d,
            Compute::Bf16 => self.d.div_ceil(2),
            Compute::Int8 => 2 * self.d.div_ceil(4),
        }
    }

    /// Words of the whole block, padding and scales included, and room to make them in.
    pub(crate) fn words(self) -> usize {
        match self.place {
            Place::Tiles { n_rows, .. } => {
                let scales = if self.compute == Compute::Int8 { n_rows } else { 0 };
                n_rows * self.row_words() + scales
            }
            // Pairs are made of f32 in place.
            Place::Groups(groups) => groups.lanes() * self.d,
        }
    }

    /// Memory that the block is computed in, in f32s.
    pub(crate) fn scratch_floats(self, kv: &KvView) -> usize {
        match self.place {
            Place::Tiles { n_rows, .. } => rows::scratch_floats(n_rows, kv.value_dim()),
            Place::Groups(groups) => queries::scratch_floats(groups, kv, self.compute),
        }
    }
}

/// Lays the rows of a block out as `layout` says, multiplied by `factor`.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If `q` doesn't have [`QueryLayout::words`] elements, or `rows` another number or length of rows than the layout.
#[inline(always)]
pub(crate) unsafe fn pack_queries<L: Lanes>(
    layout: QueryLayout,
    rows: &[&[f32]],
    factor: f32,
    q: &mut [f32],
) {
    let d = layout.d;
    assert_eq!(q.len(), layout.words());
    match layout.place {
        Place::Tiles { n_rows, tile_rows, .. } => {
            assert!(rows.len() == n_rows && rows.iter().all(|row| row.len() == d));
            let (words, scales) = q.split_at_mut(n_rows * layout.row_words());
            for (tile, rows) in words.chunks_mut(tile_rows * layout.row_words()).zip(rows.chunks(tile_rows)) {
                for (r, row) in rows.iter().enumerate() {
                    let words = tile[r..].iter_mut().step_by(rows.len());
                    match layout.compute {
                        Compute::F32 => words.zip(*row).for_each(|(to, from)| *to = from * factor),
                        Compute::Bf16 => {
                            for (to, pair) in words.zip(row.chunks(2)) {
                                *to = 0.0;
                                for (at, x) in pair.iter().enumerate() {
                                    // Subnormals are zeros to the dot products, before rounding and after.
                                    let x = x * factor;
                                    put(to, at, if x.is_subnormal() { 0.0 } else { x }, Storage::Bf16);
                                }
                            }
                        }
                        // Below, because each row has a scale beside its words.
                        Compute::Int8 => {}
                    }
                }
            }
            if layout.compute == Compute::Int8 {
                for (i, (row, scale)) in rows.iter().zip(scales).enumerate() {
                    let (tile, r) = (i / tile_rows * tile_rows, i % tile_rows);
                    let in_tile = tile_rows.min(n_rows - tile);
                    let tile = &mut words[tile * layout.row_words()..];
                    *scale = int8::pack_query(row, factor, |x, word| tile[x * in_tile + r] = word);
                }
            }
        }
        // SAFETY: the ISA is enabled, as the caller vouches.
        Place::Groups(groups) => unsafe { queries::pack::<L>(groups, d, rows, factor, q) },
    }
}

/// How much of a page some rows see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// No row sees a key of it.
    Nothing,
    /// Some rows see some keys.
    Part,
    /// Every row sees all 256 keys.
    Whole,
}

/// What some intervals of keys have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// From the first key of any interval to the last; empty if all are.
    pub(crate) hull: Range<usize>,
    /// The keys of every interval; empty at the end of `hull` if there are none.
    pub(crate) shared: Range<usize>,
}

impl Span {
    pub(crate) fn of(intervals: impl Iterator<Item = Range<usize>>) -> Self {
        let (mut first, mut end) = (usize::MAX, 0);
        let mut shared = 0..usize::MAX;
        for keys in intervals {
            if !keys.is_empty() {
                (first, end) = (first.min(keys.start), end.max(keys.end));
            }
            shared = shared.start.max(keys.start)..shared.end.min(keys.end);
        }
        let hull = first.min(end)..end;
        let shared = if shared.is_empty() || hull.is_empty() { end..end } else { shared };
        Self { hull, shared }
    }
}

/// The intervals of keys that some rows see.
#[derive(Clone, Debug)]
pub(crate) struct Visible<'a> {
    rows: &'a [Range<usize>],
    n_keys: usize,
    /// From the first key that any row sees to the last one.
    hull: Range<usize>,
    /// The keys that every row sees.
    shared: Range<usize>,
}

impl<'a> Visible<'a> {
    pub(crate) fn new(rows: &'a [Range<usize>], n_keys: usize) -> Self {
        let Span { hull, shared } = Span::of(rows.iter().cloned());
        Self { rows, n_keys, hull, shared }
    }

    /// Keys of `page` that row `row` sees, counted from the page's first.
    pub(crate) fn of_row(&self, row: usize, page: usize) -> Range<usize> {
        let first = page * PAGE_KEYS;
        let keys = &self.rows[row];
        let end = keys.end.min(self.n_keys).saturating_sub(first).min(PAGE_KEYS);
        keys.start.saturating_sub(first).min(end)..end
    }

    /// How much of `page` the rows see.
    pub(crate) fn of_page(&self, page: usize) -> Seen {
        let keys = page * PAGE_KEYS..(page + 1) * PAGE_KEYS;
        if self.shared.start <= keys.start && keys.end <= self.shared.end && keys.end <= self.n_keys {
            Seen::Whole
        } else if keys.end <= self.hull.start || self.hull.end <= keys.start {
            Seen::Nothing
        } else if (0..self.rows.len()).any(|row| !self.of_row(row, page).is_empty()) {
            Seen::Part
        } else {
            Seen::Nothing
        }
    }
}

/// `pages` in the order of the canonical tree: by slot, then ascending.
pub(crate) fn by_slot(pages: &[usize]) -> impl Iterator<Item = usize> {
    (0..N_SLOTS).flat_map(|slot| pages.iter().copied().filter(move |page| slot_of_page(*page) == slot))
}

/// Rule 6 over rows: `left = merge(left, right)`; `columns` may be any number.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If the slices differ in length.
#[inline(always)]
pub(crate) unsafe fn merge_rows<L: Lanes>(
    left: RowPartials<'_>,
    m_right: &[f32],
    l_right: &[f32],
    o_right: &[f32],
    columns: usize,
) {
    let n_rows = left.m.len();
    assert!(left.l.len() == n_rows && m_right.len() == n_rows && l_right.len() == n_rows);
    assert!(left.o.len() == n_rows * columns && o_right.len() == n_rows * columns);
    for row in 0..n_rows {
        let max = if left.m[row] > m_right[row] { left.m[row] } else { m_right[row] };
        let shift = finite_max(max);
        let (a, b) = (rescale(left.m[row], shift), rescale(m_right[row], shift));
        left.m[row] = max;
        left.l[row] = left.l[row].mul_add(a, l_right[row] * b);
        let (o, o_right) = (&mut left.o[row * columns..][..columns], &o_right[row * columns..][..columns]);
        let vectors = columns / 16 * 16;
        // SAFETY: both rows have `columns` elements and the vectors end before that.
        unsafe {
            let (a, b) = (L::splat(a), L::splat(b));
            for c in (0..vectors).step_by(16) {
                let right = L::mul(L::load(o_right.as_ptr().add(c)), b);
                let merged = L::fma(L::load(o.as_ptr().add(c)), a, right);
                L::store(o.as_mut_ptr().add(c), merged);
            }
        }
        for c in vectors..columns {
            o[c] = o[c].mul_add(a, o_right[c] * b);
        }
    }
}

/// Rule 8 for the context: `o = o / l + 0.0` in place, every NaN the canonical one.
///
/// # Safety
/// The ISA of `L` is enabled.
///
/// # Panics
/// If the slices differ in length.
#[inline(always)]
pub(crate) unsafe fn divide_rows<L: Lanes>(m: &[f32], l: &[f32], o: &mut [f32], columns: usize) {
    assert!(m.len() == l.len() && o.len() == l.len() * columns);
    for row in 0..l.len() {
        let empty = m[row] == f32::NEG_INFINITY && l[row] == 0.0;
        let divisor = if empty { 1.0 } else { l[row] };
        let o = &mut o[row * columns..][..columns];
        let vectors = columns / 16 * 16;
        // SAFETY: the row has `columns` elements and the vectors end before that.
        unsafe {
            let divisor = L::splat(divisor);
            for c in (0..vectors).step_by(16) {
                let at = o.as_mut_ptr().add(c);
                let value = L::add(L::div(L::load(at), divisor), L::zero());
                L::store(at, L::canonical_nan(value));
            }
        }
        for value in &mut o[vectors..] {
            let divided = *value / divisor + 0.0;
            *value = if divided.is_nan() { CANONICAL_NAN } else { divided };
        }
    }
}
