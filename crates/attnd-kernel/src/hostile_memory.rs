//! Tests of every entry on hostile memory: operands between inaccessible pages, NaN where nothing may be read from.
//!
//! An access outside an operand faults, which ends the test run; `--nocapture` shows the case. What an entry must not
//! use, or must write before it reads, holds signalling NaNs: keys behind the last one, padding, lanes without a row,
//! scratch, output. The bits of the results must be those of a run on plain, zeroed memory.
//!
//! Where pages can't be protected the NaNs remain. Under Miri, which sees every access by itself, cases are few and small.

mod cache;
mod general;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::block::{Place, QueryLayout, RowBlock, RowPartials};
#[cfg(all(target_os = "linux", not(miri)))]
use crate::buffer::fence::{Fence, Fenced};
use crate::buffer::{Buffer, fill_by_copies};
use crate::compute::Compute;
use crate::dispatch::{Isa, Kernels};
use crate::dtype::Dtype;
use crate::mask::{Causal, Mask, PerBatch, Positions, Window};
use crate::pages::{KvHead, KvView, padded_columns};
use crate::queries::Groups;
use crate::shape::{AttnShape, Dims};
use crate::slot::{N_SLOTS, keys_in_page, n_pages};
use crate::storage::Storage;

/// A word of signalling NaNs; integers know none, but have it for their scales.
fn poison(storage: Storage) -> f32 {
    f32::from_bits(match storage {
        Storage::F32 | Storage::Int8 | Storage::Int4 => 0x7fa0_1234,
        Storage::Bf16 => 0x7fa0_7fa0,
        Storage::F16 => 0x7da0_7da0,
    })
}

/// Where operands lie, and whether unused memory is poisoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    Plain,
    Poisoned,
    /// Poisoned, and between inaccessible pages.
    #[cfg(all(target_os = "linux", not(miri)))]
    Fenced(Fence),
}

impl Memory {
    #[cfg(all(target_os = "linux", not(miri)))]
    const HOSTILE: &[Self] = &[Self::Poisoned, Self::Fenced(Fence::AtStart), Self::Fenced(Fence::AtEnd)];
    #[cfg(not(all(target_os = "linux", not(miri))))]
    const HOSTILE: &[Self] = &[Self::Poisoned];

    fn allocate<T>(self, allocate: impl FnOnce() -> T) -> T {
        #[cfg(all(target_os = "linux", not(miri)))]
        if let Self::Fenced(at) = self {
            let _fenced = Fenced::buffers(at);
            return allocate();
        }
        allocate()
    }

    fn buffer(self, len: usize) -> Buffer {
        let mut buffer = self.allocate(|| Buffer::zeroed(len)).unwrap();
        if self != Self::Plain {
            fill_by_copies(&mut buffer, poison(Storage::F32));
        }
        buffer
    }

    fn copy(self, from: &[f32]) -> Buffer {
        let mut buffer = self.allocate(|| Buffer::zeroed(from.len())).unwrap();
        buffer.copy_from_slice(from);
        buffer
    }

    /// The bytes of two 16-bit or one 32-bit element a word; the last one ends where the buffer does, so that it touches a
    /// fence there.
    fn with_bytes<T>(self, bytes: &[u8], read: impl FnOnce(&[u8]) -> T) -> T {
        let mut buffer = self.buffer(bytes.len().div_ceil(4));
        let start = buffer.len() * 4 - bytes.len();
        // SAFETY: the buffer's own bytes, of which there are start + bytes.len(), and any four bytes are an f32.
        let copy = unsafe {
            let memory = buffer.as_mut_ptr().cast::<u8>().add(start);
            std::slice::from_raw_parts_mut(memory, bytes.len())
        };
        copy.copy_from_slice(bytes);
        read(copy)
    }
}

/// The bits that an entry left.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A block of rows with its keys and values.
#[derive(Debug)]
struct Case {
    shape: AttnShape,
    mask: Mask,
    storage: Storage,
    /// The type in which keys and values are handed over.
    sent_as: Dtype,
    data: Data,
}

struct Data {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl std::fmt::Debug for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("..")
    }
}

impl Case {
    /// Small shapes around every edge, of at most `products` multiply-adds. The least that is enough for any is 6144, under Miri
    /// 2312.
    fn random(seed: u64, products: usize) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut one_of = |choices: &[usize]| choices[rng.random_range(0..choices.len())];
        let group = one_of(&[1, 1, 2, 3, 4]);
        let (pages, more, dims): (&[usize], &[usize], &[usize]) = if cfg!(miri) {
            (&[0, 0, 0, 256], &[1, 2, 15, 16, 17, 33], &[1, 2, 3, 5, 16, 17, 65])
        } else {
            let dims = &[1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 40, 48, 64, 65, 81];
            (&[0, 0, 256, 512], &[1, 2, 15, 16, 17, 63, 64, 65, 130, 255, 256], dims)
        };
        let n_keys = one_of(pages) + one_of(more);
        let (d, dv) = loop {
            let (d, dv) = (one_of(dims), one_of(dims));
            if group * n_keys * (d + dv) <= products {
                break (d, dv);
            }
        };
        let rows = if cfg!(miri) { 24 } else { 96 };
        let tokens = one_of(&[1, 1, 2, 3, 5, 7, 12, 16, 17, 24, 31, 32]).min(rows / group);
        let tokens = tokens.min(products / (group * n_keys * (d + dv)));
        let (storage, narrow) = [
            (Storage::F32, Dtype::F32),
            (Storage::Bf16, Dtype::Bf16),
            (Storage::F16, Dtype::F16),
            (Storage::Int8, Dtype::F16),
            (Storage::Int4, Dtype::Bf16),
        ][seed as usize % 5];
        let shape = AttnShape::new(Dims {
            batch: 1,
            heads: group as u64,
            kv_heads: 1,
            queries: tokens as u64,
            keys: n_keys as u64,
            head_dim: d as u64,
            value_dim: dv as u64,
        })
        .unwrap();
        // Rows that begin inside of pages, some of which see nothing.
        let windowed = Mask {
            positions: Some(Positions::BottomRight),
            window: Window { left: Some(one_of(&[0, 3, 40, 100])), right: Some(one_of(&[0, 1, 17])) },
            query_end: Some(PerBatch::Same(one_of(&[1, tokens, tokens]))),
            ..Mask::default()
        };
        let mut values = |n: usize| (0..n).map(|_| rng.random_range(-1.0..1.0_f32)).collect::<Vec<_>>();
        Self {
            shape,
            mask: [Causal::None.into(), Causal::BottomRight.into(), Causal::TopLeft.into(), windowed]
                [seed as usize / 5 % 4]
                .clone(),
            storage,
            sent_as: [Dtype::F32, narrow][seed as usize / 20 % 2],
            data: Data { q: values(group * tokens * d), k: values(n_keys * d), v: values(n_keys * dv) },
        }
    }

    fn n_rows(&self) -> usize {
        self.shape.group_size() * self.shape.n_queries()
    }

    fn encoded(&self, values: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(values.len() * self.sent_as.size());
        for value in values {
            match self.sent_as {
                Dtype::F32 => bytes.extend_from_slice(&value.to_le_bytes()),
                Dtype::F16 => bytes.extend_from_slice(&half::f16::from_f32(*value).to_le_bytes()),
                Dtype::Bf16 => bytes.extend_from_slice(&half::bf16::from_f32(*value).to_le_bytes()),
            }
        }
        bytes
    }

    fn resident(&self, memory: Memory) -> KvHead {
        let (n_keys, d, dv) = (self.shape.n_keys(), self.shape.head_dim(), self.shape.value_dim());
        let reserve = || KvHead::with_storage(n_keys, d, dv, 0..N_SLOTS, self.storage);
        let mut kv = memory.allocate(reserve).unwrap();
        if memory != Memory::Plain {
            kv.poison(poison(self.storage));
        }
        let is_finite = self.data.v.iter().all(|value| value.is_finite());
        for page in 0..n_pages(n_keys) {
            let keys = page * 256..page * 256 + keys_in_page(page, n_keys);
            let k = self.encoded(&self.data.k[keys.start * d..keys.end * d]);
            let v = self.encoded(&self.data.v[keys.start * dv..keys.end * dv]);
            memory.with_bytes(&k, |rows| kv.write_k(page, rows, self.sent_as, true)).unwrap();
            memory.with_bytes(&v, |rows| kv.write_v(page, rows, self.sent_as, is_finite)).unwrap();
        }
        kv
    }

    /// What the entries leave of the block: its packed queries, and `m`, `l` and `o` without padding.
    fn run(&self, kernels: &Kernels, layout: QueryLayout, memory: Memory, kv: &KvView) -> [Vec<u32>; 4] {
        let (n_rows, d, dv) = (self.n_rows(), self.shape.head_dim(), self.shape.value_dim());
        let rows: Vec<Buffer> = self.data.q.chunks(d).map(|row| memory.copy(row)).collect();
        let rows: Vec<&[f32]> = rows.iter().map(|row| &**row).collect();
        let mut q = memory.buffer(layout.words());
        kernels.pack_queries(layout, &rows, 0.3, &mut q);
        let packed = bits(&q);
        if memory != Memory::Plain {
            // Nothing but lanes without a row is zero in a block of ones.
            let ones = vec![1.0; d];
            let mut is_used = vec![0.0; layout.words()];
            kernels.pack_queries(layout, &vec![&ones[..]; n_rows], 1.0, &mut is_used);
            for (q, is_used) in q.iter_mut().zip(is_used) {
                *q = if is_used == 0.0 { poison(Storage::F32) } else { *q };
            }
        }

        let mask = self.mask.of_batch(0, &self.shape);
        let visible: Vec<_> = (0..n_rows).map(|row| mask.visible(row / self.shape.group_size())).collect();
        let pages: Vec<usize> = (0..n_pages(self.shape.n_keys())).collect();
        let block = RowBlock { q: &q, visible: &visible, kv, pages: &pages };
        let columns = padded_columns(dv);
        let mut scratch = memory.buffer(layout.scratch_floats(kv));
        let (mut m, mut l, mut o) =
            (memory.buffer(n_rows), memory.buffer(n_rows), memory.buffer(n_rows * columns));
        let mut out = RowPartials { m: &mut m, l: &mut l, o: &mut o };
        let overflow = kernels.attend_block(&block, layout, &mut scratch, &mut out);
        assert_eq!(overflow, None);
        let o: Vec<f32> = o.chunks(columns).flat_map(|row| row[..dv].to_vec()).collect();
        [packed, bits(&m), bits(&l), bits(&o)]
    }
}

/// Both families, and every tile of an ISA, whatever tile this CPU's caches ask for; in every arithmetic that the CPU has for
/// the storage, f32 first.
fn layouts(kernels: &Kernels, n_rows: usize, d: usize, storage: Storage) -> Vec<QueryLayout> {
    let vectors = if kernels.isa() == Isa::Avx512 { 1..=3 } else { 1..=1 };
    let tile_rows = kernels.tiles().rows_for(n_rows, storage);
    let mut layouts = Vec::new();
    for compute in Compute::ALL {
        if !kernels.effective(compute, storage).is_ok_and(|effective| effective.instead_of().is_none()) {
            continue;
        }
        // Portable kernels have one entry for both.
        let prefetch: &[bool] = if cfg!(miri) { &[false] } else { &[false, true] };
        let tiles = prefetch.iter().map(|prefetch| Place::Tiles { n_rows, tile_rows, prefetch: *prefetch });
        layouts.extend(tiles.map(|place| QueryLayout { d, compute, place }));
        if compute != Compute::Int8 {
            let groups = vectors.clone().flat_map(|vectors| {
                prefetch.iter().map(move |prefetch| Groups::new(n_rows, vectors, *prefetch))
            });
            layouts.extend(groups.map(|groups| QueryLayout { d, compute, place: Place::Groups(groups) }));
        }
    }
    layouts
}

fn check_blocks(kernels: &Kernels, cases: u64, products: usize) {
    for seed in 0..cases {
        let case = Case::random(seed, products);
        // Under Miri once, in the memory where nothing may be used by mistake: families are compared all the same.
        let (first, more): (Memory, &[Memory]) =
            if cfg!(miri) { (Memory::Poisoned, &[]) } else { (Memory::Plain, Memory::HOSTILE) };
        let kv = case.resident(first);
        let more: Vec<_> = more.iter().map(|memory| (*memory, case.resident(*memory))).collect();
        let mut of_first_layout = Vec::new();
        for layout in layouts(kernels, case.n_rows(), case.shape.head_dim(), case.storage) {
            println!("seed {seed}, {}, {layout:?}, {case:?}", kernels.isa());
            let expected = case.run(kernels, layout, first, &kv);
            for (memory, kv) in &more {
                let got = case.run(kernels, layout, *memory, kv);
                for (what, (expected, got)) in ["q", "m", "l", "o"].iter().zip(expected.iter().zip(&got)) {
                    let differ = expected.iter().zip(got).position(|(a, b)| a != b);
                    assert_eq!(differ, None, "{what}, {memory:?}");
                }
            }
            // Families may differ in the sign of a zero of `o`, and in nothing else. This CPU may not use all layouts.
            let [_, m, l, o] = expected;
            let o: Vec<f32> = o.into_iter().map(f32::from_bits).collect();
            assert!(o.iter().all(|o| o.is_finite()), "o");
            let found = (m, l, o);
            match of_first_layout.iter().find(|(compute, _)| *compute == layout.compute) {
                Some((_, of_first_layout)) => assert_eq!(*of_first_layout, found),
                None => of_first_layout.push((layout.compute, found)),
            }
        }
    }
}

#[test]
fn blocks_stay_inside_their_operands_and_use_no_padding() {
    for kernels in Kernels::available() {
        let (cases, products) = match kernels.isa() {
            // Each storage type with each mask.
            _ if cfg!(miri) => (20, 2_400),
            // Without the CPU's multiply-add.
            Isa::Portable => (120, 200_000),
            _ => (360, 4_000_000),
        };
        check_blocks(kernels, cases, products);
    }
}

/// Where a value is infinite, the products of rows that don't see it are undone: entries have loops of their own for that.
#[test]
fn an_infinite_value_reaches_the_rows_that_see_it_and_no_other() {
    let (n_keys, d, dv) = (5, 3, 17);
    let dims = Dims { batch: 1, heads: 1, kv_heads: 1, queries: 3, keys: n_keys, head_dim: d, value_dim: dv };
    let values = |n: u64, factor: f32| (0..n).map(|i| (i * 37 % 11) as f32 * factor).collect::<Vec<_>>();
    for (storage, sent_as) in
        [(Storage::F32, Dtype::F32), (Storage::F16, Dtype::F32), (Storage::Bf16, Dtype::Bf16)]
    {
        let mut case = Case {
            shape: AttnShape::new(dims).unwrap(),
            mask: Causal::TopLeft.into(),
            storage,
            sent_as,
            data: Data {
                q: values(3 * d, 0.125),
                k: values(n_keys * d, 0.0625),
                v: values(n_keys * dv, 0.5),
            },
        };
        // The last column of the second key.
        let at = 2 * dv as usize - 1;
        for kernels in Kernels::available() {
            for layout in layouts(kernels, 3, d as usize, storage) {
                for memory in Memory::HOSTILE {
                    let [finite, infinite] = [8.0, f32::INFINITY].map(|value| {
                        case.data.v[at] = value;
                        let [_, m, l, o] = case.run(kernels, layout, *memory, &case.resident(*memory));
                        (m, l, o.into_iter().map(f32::from_bits).collect::<Vec<_>>())
                    });
                    let mut expected = finite;
                    for row in [1, 2] {
                        expected.2[(row + 1) * dv as usize - 1] = f32::INFINITY;
                    }
                    assert_eq!(infinite, expected, "{}, {layout:?}, {storage}, {memory:?}", kernels.isa());
                }
            }
        }
    }
}

#[test]
fn merging_and_dividing_stay_inside_their_operands() {
    let mut rng = SmallRng::seed_from_u64(1);
    let columns: Vec<usize> =
        if cfg!(miri) { vec![1, 15, 16, 17, 35] } else { (1..=70).chain([127, 128, 129]).collect() };
    for columns in columns {
        let n_rows = rng.random_range(1..=4_usize);
        // A maximum is an integer.
        let mut maxima = || (0..n_rows).map(|_| rng.random_range(-3..3_i8).into()).collect::<Vec<f32>>();
        let (m, m_right) = (maxima(), maxima());
        let mut values = |n: usize| (0..n).map(|_| rng.random_range(0.5..2.0_f32)).collect::<Vec<_>>();
        let (l, l_right) = (values(n_rows), values(n_rows));
        let (o, o_right) = (values(n_rows * columns), values(n_rows * columns));
        for kernels in Kernels::available() {
            let run = |memory: Memory| {
                let [mut m, mut l, mut o] = [&m, &l, &o].map(|left| memory.copy(left));
                let [m_right, l_right, o_right] =
                    [&m_right, &l_right, &o_right].map(|right| memory.copy(right));
                let left = RowPartials { m: &mut m, l: &mut l, o: &mut o };
                kernels.merge_rows(left, &m_right, &l_right, &o_right, columns);
                let merged = bits(&o);
                kernels.divide_rows(&m, &l, &mut o, columns);
                [bits(&m), bits(&l), merged, bits(&o)]
            };
            let expected = run(Memory::Plain);
            for memory in Memory::HOSTILE {
                assert_eq!(run(*memory), expected, "{} {n_rows} x {columns} {memory:?}", kernels.isa());
            }
        }
    }
}

#[test]
fn the_reading_loop_stays_inside_what_it_reads() {
    for len in [0, 1, 15, 16, 127, 128, 129, 1000, 4096] {
        if cfg!(miri) && len > 129 {
            continue;
        }
        for memory in Memory::HOSTILE {
            let ones = memory.copy(&vec![1.0; len]);
            for kernels in Kernels::available() {
                assert_eq!(kernels.read_loop(&ones), len as f32, "{} {len} {memory:?}", kernels.isa());
            }
        }
    }
}
